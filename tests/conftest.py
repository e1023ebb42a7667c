"""Byte code is kept. With `pytest -n`: files with slow tests first, and an idle worker takes over half of what another
has left."""

import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

if sys.dont_write_bytecode:  # with which every process that a test starts compiles torch and transformers, for seconds
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

IMPORTED = ["trainer.train", "trainer.encode", "trainer.cli", "trainer.curves", "sklearn.metrics", "torch.utils.tensorboard"]


@pytest.fixture(autouse=True, scope="session")
def _one_fork_server():
    """Whoever starts it: what processes of tests need is imported in it, once, also what they import when they need it."""
    with pytest.MonkeyPatch.context() as patch:
        forkserver.set_forkserver_preload(IMPORTED)
        patch.setattr(forkserver, "set_forkserver_preload", lambda modules: None)
        yield


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
