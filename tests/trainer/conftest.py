from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and on a busy machine lose tenfold to them."""
    torch.set_num_threads(1)
