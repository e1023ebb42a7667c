"""A lean torch trainer: SmolVLM with two decision heads on the shards of `pipeline`. `load` opens a trained run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.teacher_forced import Run

# Waiting OpenMP threads sleep instead of spinning. Spinning costs nothing on an idle machine, but where cores are
# shared a step of the tiny model took 4 to 7 s on two threads, against 1.2 to 2 s asleep. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(run: str | Path) -> Run:
    """The model of a run (its `last`), or of one checkpoint folder, ready to score; InputError where there is none.

    run = trainer.load("run"); then run.score("labels", "test"), or run.model, run.tokens, run.config, run.info.
    """
    from trainer.checkpoint import load_run
    from trainer.teacher_forced import Run

    return Run(**load_run(Path(run)).__dict__)
