"""A lean torch trainer: streams prospect-dst shards into SmolVLM with two direct decision heads.

    config      every knob            sequence    clip -> tokens         train       train, fit, train_step
    clips       a clip, its labels    batch       windows -> tensors     evaluate    scores, average precision
    shards      clips from Parquet    model       SmolVLM + two heads    checkpoint  a run on disk
    frames      pixels from Arrow     losses      sums and counts        errors      what the user can mend
    tokenizer   ids and markers

Imports point one way: train -> evaluate -> checkpoint -> model -> batch -> sequence -> clips.
Of `pipeline` only `schema` is imported. Everything is teacher-forced: texts in the context are the reference's.
"""

import os

# Waiting OpenMP threads sleep instead of spinning. Spinning costs nothing on an idle machine, but where cores are
# shared a step of the tiny model took 4 to 7 s on two threads, against 1.2 to 2 s asleep. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
