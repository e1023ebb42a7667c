"""With `pytest -n`: files with slow tests first, and an idle worker takes over half of what another has left."""

import os
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

if sys.dont_write_bytecode:  # with which every process that a test starts compiles torch and transformers, for seconds
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(Path(__file__).parents[1] / ".pytest_cache" / "bytecode")
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors gain nothing from threads; on a busy machine they lose tenfold
IMPORTED = ["trainer.train", "trainer.encode", "trainer.cli", "trainer.curves", "sklearn.metrics"]


@pytest.fixture(autouse=True, scope="session")
def _one_fork_server():
    """Whoever starts it, what the processes of tests need is imported in it, once: also what they import late."""
    with pytest.MonkeyPatch.context() as patch:
        forkserver.set_forkserver_preload([*IMPORTED, "torch.utils.tensorboard"])
        patch.setattr(forkserver, "set_forkserver_preload", lambda modules: None)
        yield


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
