import pytest
from toy_folder import toy_splits, write_folder


@pytest.fixture
def toy(tmp_path):
    """A finished output folder of three hand-labelled clips."""
    return write_folder(tmp_path / "out", toy_splits())
