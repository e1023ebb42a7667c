"""The harness held against two worlds whose answer is known, small enough to train in: does it find what is there, and
only that? The full study is benchmarks/truth.

A clip has one flash, at which the state changes and the assistant may speak. Where the state tells, it speaks if step
S1 was paused when the clip began, which no picture shows. Where it tells nothing, it speaks if the flash is of the
brighter kind, and S1 was paused or not as a coin falls.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from by_hand import clip_example, dst, turn, write_frames, write_shards

import trainer.curves
import trainer.evaluation.plots
from trainer.benchmark import answer_of, benchmark
from trainer.config import TrainConfig
from trainer.evaluation.comparison import QUESTION
from trainer.plan import Plan

DARK, FLASH, BRIGHT = 20, 120, 250
SEEDS = (0, 1, 2)
CONFIG = TrainConfig(model="nano", steps=30, optimizer="muon", lr=5e-3, warmup_steps=10, max_tokens=200)


def world(out: Path, state_tells: bool) -> Path:
    """160 recordings to train on, 16 to choose thresholds on, 24 to test on; a clip of 6 frames each."""
    splits = {}
    for split, count in (("train", 160), ("val", 16), ("test", 24)):
        rng = np.random.default_rng([len(split), state_tells])
        splits[split] = [_clip(out, split, i, rng, state_tells) for i in range(count)]
    return write_shards(out, splits, frames_root=out / "videos")


def _clip(out, split, number, rng, state_tells):
    flash = 1 + int(rng.integers(4))
    paused, brighter = bool(rng.integers(2)), bool(rng.integers(2))
    light = np.full(6, DARK)
    light[flash] = BRIGHT if brighter and not state_tells else FLASH
    turns = [dst(flash, flash + 1, ("S1", "resume" if paused else "complete"))]
    if paused if state_tells else brighter:
        turns.append(turn("assistant", "Go on.", flash, flash + 1))
    video, before = f"{split}-{number}", [("S1", "paused" if paused else "in_progress")]
    write_frames(out / "videos" / f"{video}.arrow", [np.full((32, 32, 3), value, np.uint8) for value in light])
    return clip_example(
        turns, 0, 6, clip_id=video, clip=number, video=video, steps=[("S1", "Fit it")], initial=before, rate=1.0,
        positive="onset",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("state_tells", [True, False], ids=["the state tells", "the state tells nothing"])
def test_an_effect_is_found_and_reported_where_there_is_one_and_only_there(tmp_path, monkeypatch, state_tells):
    monkeypatch.setattr(trainer.evaluation.plots, "write_figure", lambda stem, make, label: "")  # which takes seconds
    monkeypatch.setattr(trainer.curves, "draw", lambda run: None)  # so does this
    out = tmp_path / "answer"
    benchmark(Plan(world(tmp_path / "data", state_tells), out, QUESTION, SEEDS, CONFIG, draws=2000, jobs=1))
    rows = pq.read_table(out / "comparisons.parquet").to_pylist()
    for metric, mode in product(("event_f1", "speaking_ap"), ("teacher-forced", "free-running")):
        (row,) = [row for row in rows if (row["metric"], row["mode"]) == (metric, mode)]
        assert (row["a"], row["b"], row["seeds"], row["recordings"]) == ("speak+dst", "speak", 3, 24)
        assert (row["low"] > 0) if state_tells else (row["low"] <= 0 <= row["high"])
    answer = answer_of(out)
    assert f"{'speak+dst' if state_tells else 'speak'} is the lowest rung that reaches the top" in answer
    assert ("is told by own state" in answer) == state_tells
    assert "(free-running, 24 recordings, 3 seeds)" in answer
    first, _, second = answer.partition(". ")
    assert f'<h1>{first}.</h1>\n<p class="numbers">{second}</p>' in (out / "report.html").read_text()
