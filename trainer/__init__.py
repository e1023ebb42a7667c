"""A lean torch trainer: streams prospect-dst shards into SmolVLM with two direct decision heads.

    arms        variants compared   pack        windows -> one row      train       train, fit, train_step
    config      every knob          attention   within each window      start       new, or resumed
    clips       a clip, its labels  vision      frames -> features      parallel    one rank or many
    shards      clips from Parquet  encode      features once, for all  checkpoint  a run on disk
    frames      pixels, 3 sources   model       SmolVLM + two heads     score       at every frame, teacher-forced
    features    ... and a fourth    losses      sums and counts         selffed     frame by frame, on its own texts
    tokenizer   ids and markers     errors      what the user can mend  evaluate    a run -> scores -> metrics
    sequence    clip -> tokens      disk        digests, syncs          benchmark   all arms, what differs, how surely
    metrics     seen while it runs  curves      the picture of a run    evaluation  from scores alone, without torch

Imports point one way: benchmark -> evaluate, train -> start, score -> checkpoint -> model -> pack -> sequence -> clips.
Of `pipeline` only `schema` is imported. Training is teacher-forced: texts in the context are the reference's.
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
