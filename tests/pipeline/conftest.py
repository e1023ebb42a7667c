import pytest
from made_up import Out, toy_output


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Out:
    """A finished output folder of three clips, to be read only."""
    return toy_output(tmp_path_factory.mktemp("toy"))
