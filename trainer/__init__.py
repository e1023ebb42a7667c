"""A lean torch trainer: SmolVLM with two decision heads on the shards of `pipeline`. `load` opens a trained run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.teacher_forced import Run

# Waiting OpenMP threads sleep: where cores are shared, a step of the tiny model took 4 to 7 s with spinning threads,
# 1.2 to 2 s with sleeping ones. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(run: str | Path) -> Run:
    """The model of a run (its `last`) or of one checkpoint folder, ready to `score`; InputError where there is none."""
    from trainer.checkpoint import load_run
    from trainer.teacher_forced import Run

    return Run(**load_run(Path(run)).__dict__)
