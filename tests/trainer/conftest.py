from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from small_run import go, write_data

from trainer.tokenizer import Tokens, train_tiny_tokens


def pytest_configure(config: pytest.Config) -> None:
    """Bits and gloo are the CPU's: a GPU is used by `-m gpu` alone."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and on a busy machine lose tenfold to them."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokens() -> Tokens:
    return train_tiny_tokens(["Put the base down", "S1->complete", "well done"] * 3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards of `small_run`, for modules that have no data of their own."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on `data` that nobody stopped, by one process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    go(data, run)
    return run
