from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from small_run import go, go_until, write_data

from trainer.tokenizer import Tokens, train_tiny_tokens


def pytest_configure(config: pytest.Config) -> None:
    """Bits and gloo are the CPU's: a GPU is used by `-m gpu` alone."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    return train_tiny_tokens(["Put the base down", "What now?", "S1->complete", "Well done."] * 3)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `small_run`; nobody may change them."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `data` that nobody stopped, by one process; nobody may change it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    go(data, run, drawn=True)
    return run


@pytest.fixture(scope="session")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 clips of train, 4 of val, 6 of test; nobody may change them."""
    return write_data(tmp_path_factory.mktemp("splits"), val=4, test=6)


@pytest.fixture(scope="session")
def splits_run(splits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `splits`; evaluations are written into it."""
    run = tmp_path_factory.mktemp("splits_run") / "run"
    go(splits, run)
    return run


@pytest.fixture(scope="session")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after step 7; its last checkpoint is of step 6. Nobody may change it."""
    run = tmp_path_factory.mktemp("killed") / "run"
    go_until(7, data, run)
    return run


@pytest.fixture
def cut(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, tmp_path / "run")
    return tmp_path / "run"
