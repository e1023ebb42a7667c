"""A lean torch trainer: streams prospect-dst shards into SmolVLM with two direct decision heads.

    arms        variants compared   attention   within each window      checkpoint  a run on disk
    config      every knob          vision      frames -> features      score       at every frame, teacher-forced
    clips       a clip, its labels  encode      features once, for all  cache       keys and values of many contexts
    shards      clips from Parquet  model       SmolVLM + two heads     engine      many live runs, one forward pass
    frames      pixels, 3 sources   losses      sums and counts         context     what a live run has read, and says
    features    ... and a fourth    train       train, fit, train_step  selffed     clips on the model's own texts
    tokenizer   ids and markers     start       new, or resumed         stream      a video, live; feed, task: its input
    sequence    clip -> tokens      parallel    one rank or many        evaluate    a run -> scores -> metrics
    pack        windows -> one row  errors      what the user can mend  benchmark   all arms, what differs, how surely
    metrics     seen while it runs  curves      the picture of a run    evaluation  from scores alone, without torch
    disk        digests, syncs

Imports point one way: benchmark -> evaluate, train -> start, score -> checkpoint -> model -> pack -> sequence -> clips;
evaluate -> selffed -> context -> engine -> cache, model.
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
    """The model of a run (its `last`), or of one checkpoint folder, ready to score; InputError where there is none.

    run = trainer.load("run"); then run.score("labels", "test"), or run.model, run.tokens, run.config, run.info.
    """
    from trainer.checkpoint import load_run

    return load_run(Path(run))
