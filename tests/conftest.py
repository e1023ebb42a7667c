"""With `pytest -n`: files with slow tests first, and an idle worker takes over half of what another has left."""

import pytest


def pytest_collection_modifyitems(items):
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path not in slow, len(item.path.parts)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
