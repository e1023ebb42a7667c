"""A lean torch trainer: streams prospect-dst shards into SmolVLM with two direct decision heads.

    config      every knob              pack        windows -> one row      train       train, fit, train_step
    clips       a clip, its labels      attention   within each window      start       new, or resumed
    shards      clips from Parquet      vision      frames -> features      parallel    one rank or many
    frames      pixels, three sources   encode      features once, for all  checkpoint  a run on disk
    features    ... and a fourth        model       SmolVLM + two heads     evaluate    scores, average precision
    tokenizer   ids and markers         losses      sums and counts         metrics     what is seen while it runs
    sequence    clip -> tokens          errors      what the user can mend  curves      the picture of a run
                                        disk        digests, syncs

Imports point one way: train -> start, evaluate -> checkpoint -> model -> pack -> sequence -> clips.
Of `pipeline` only `schema` is imported. Everything is teacher-forced: texts in the context are the reference's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.checkpoint import LoadedRun

# Waiting OpenMP threads sleep instead of spinning. Spinning costs nothing on an idle machine, but where cores are
# shared a step of the tiny model took 4 to 7 s on two threads, against 1.2 to 2 s asleep. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(run: str | Path) -> LoadedRun:
    """The model of a run (its `last`), or of one checkpoint folder, ready to score; TrainerError where there is none.

    run = trainer.load("run"); then run.score("labels", "test"), or run.model, run.tokens, run.config, run.info.
    """
    from trainer.checkpoint import load_run

    return load_run(Path(run))
