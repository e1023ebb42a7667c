from __future__ import annotations

import pytest
from workbench import CONTEXT, Workbench


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Workbench:
    CONTEXT.set_forkserver_preload(["trainer.train", "trainer.encode", "trainer.cli", "pipeline.preprocess"])
    workbench = Workbench(tmp_path_factory.mktemp("torture"))
    workbench.build()
    return workbench
