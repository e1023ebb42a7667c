from __future__ import annotations

import os

import pytest
import torch

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
