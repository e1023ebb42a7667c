"""A folder as `benchmark` leaves it, made up: the tables hold what the test says, the scores are labels with noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from by_hand import clip_example, dst, turn, write_shards

from pipeline.dataset import ClipExample, Split
from trainer.arms import RUNGS
from trainer.config import MODES
from trainer.evaluation.scores import ScoredClip, write_scores

RECORDINGS, REFRACTORY_FRAMES = 5, 4
# (rung, mode) -> event F1; speaking AP is the same plus 0.1
VALUES: dict[tuple[str, str], float | None] = {
    ("silence", "teacher-forced"): 0.52, ("silence", "self-fed"): 0.5,
    ("speak", "teacher-forced"): 0.52, ("speak", "self-fed"): 0.5,
    ("speak+dst", "teacher-forced"): 0.82, ("speak+dst", "self-fed"): 0.6,
    ("speak+markers", "teacher-forced"): 0.6, ("speak+markers", "self-fed"): 0.525,
}  # fmt: skip
PAIRS = (("speak+dst", "speak"), ("speak+dst", "speak+markers"), ("speak+markers", "speak"), ("silence", "speak"))
TASKS = {"make tea": 0.25, "bake": 0.75}
METRICS = ("event_f1", "speaking_ap", "median_latency_s")
NEVER = {"joint_accuracy_never_updating": 0.375, "over_time_never_updating": [0.75, 0.0, None, None]}
STATES = {  # of speak+dst by seed; clips in 4 parts, the last without a frame
    0: {"over_time": [1.0, 0.5, 0.25, None], "transitions": {"median_latency_s": -0.5}, **NEVER},
    1: {"over_time": [1.0, 1.0, 0.75, None], "transitions": {"median_latency_s": 0.25}, **NEVER},
}


@dataclass(frozen=True)
class Fake:
    """What the folder holds."""

    rungs: Sequence[str] = ("silence", "speak", "speak+dst", "speak+markers")
    seeds: Sequence[int] = (0, 1)
    modes: Sequence[str] = MODES
    clips: int = 6
    frames: int = 120
    seed_share: float = 0.25  # of the differences' intervals
    half_width: float | None = 0.04  # of the differences' intervals; None: there are none
    values: dict[tuple[str, str], float | None] = field(default_factory=lambda: dict(VALUES))
    silence_differs: float = 0.0  # added to the logits of `silence`
    primary: str = "event_f1"
    clip_ids: Sequence[str] = ()
    said: str = "Now attach the wheel."
    spoken: dict[tuple[str, str], Sequence[int]] | None = None  # (rung, clip_id) -> frames; None: by threshold


def make_benchmark(out: Path, fake: Fake | None = None) -> Path:
    fake = fake or Fake()
    clips = [_clip(i, fake) for i in range(fake.clips)]
    data = write_shards(out.parent / f"{out.name}-data", {"val": clips[:1], "test": clips})
    out.mkdir()
    (out / "benchmark.json").write_text(json.dumps(_info(fake, data)))
    for rung, seed in product(fake.rungs, fake.seeds):
        _run(out / "runs" / rung / f"seed-{seed}", rung, seed, fake, clips)
    cells, widths = [*product(fake.rungs, fake.modes)], (3.0, 6.0)
    scores = [_score(fake, rung, mode, metric) for (rung, mode), metric in product(cells, METRICS)]
    compared = product([pair for pair in PAIRS if set(pair) <= set(fake.rungs)], fake.modes, METRICS)
    tables = {
        "rungs": scores,
        "results": [{**row, "seed": seed} for row in scores for seed in fake.seeds],
        "comparisons": [_compared(fake, *pair, mode, metric) for pair, mode, metric in compared],
        "windows": [{"rung": rung, "seed": seed, "mode": mode, "width_s": width, "f1": width / 10 + seed / 100,
                     "metronome_f1": width / 20} for (rung, mode), seed, width in product(cells, fake.seeds, widths)],
        "groups": [{"by": "task", "group": task, "rung": rung, "mode": mode, "recordings": 2, "events": 6, "seeds": 2,
                    "value": value, "low": value - 0.1, "high": value + 0.1}
                   for (task, value), (rung, mode) in product(TASKS.items(), cells)],
    }  # fmt: skip
    floats = ("value", "low", "high", "difference", "p_value", "p_holm")
    for name, rows in tables.items():
        types = {column: pl.Float64 for column in floats if rows and column in rows[0]}
        pl.DataFrame(rows, schema_overrides=types, infer_schema_length=None).write_parquet(out / f"{name}.parquet")
    return out


def _clip(i: int, fake: Fake) -> ClipExample:
    """User at 20, then speech and an update in every 40 frames (20 s)."""
    turns = [turn("user", "What comes next?", 20, 22)]
    for k, at in enumerate(range(24, fake.frames - 8, 40)):
        turns += [
            dst(at, at + 2, (f"S{1 + k % 2}", "complete")),
            turn("assistant", f"Well done, part {k}.", at, at + 2),
        ]
    clip_id = fake.clip_ids[i] if i < len(fake.clip_ids) else f"c{i}"
    return clip_example(turns, 0, fake.frames, clip_id=clip_id, clip=i, video=f"take-{i % RECORDINGS}", rate=1.0)


def _info(fake: Fake, data: Path) -> dict[str, Any]:
    return {
        "rungs": [rung.name for rung in RUNGS if rung.name in fake.rungs],
        "margin": 0.05,
        "seeds": list(fake.seeds),
        "primary": {"metric": fake.primary, "mode": "self-fed", "pair": ["speak+dst", "speak"]},
        "split": "test",
        "recordings": RECORDINGS,
        "clips": fake.clips,
        "frames": fake.clips * fake.frames,
        "data": str(data),
        "data_key": {split: Split(data, split).key for split in ("val", "test")},
        "config": {"steps": 300, "lr": 0.001, "balance": "none"},
        "settings": {"early_s": 2.0, "late_s": 4.0, "refractory_s": 2.0, "reactive_s": 2.0, "bins": 10},
        "commands": ["prospect-dst benchmark data --rungs speak,speak+dst --seeds 2"],
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "hazards": ["test: speaking and DST events coincide on 90% of frames"],
        "hashes": {f"{rung}/seed-{seed}": "ab" * 32 for rung in fake.rungs for seed in fake.seeds},
        "machine": "2 cores",
        "seconds": 61.5,
        "cost": {rung: {"runs": 2, "steps": 600, "tokens": 123456, "seconds": 90.0} for rung in fake.rungs},
        "draws": 10000,
        "label_rule": "onset",
    }


# ---- runs --------------------------------------------------------------------------------------------


def _run(run: Path, rung: str, seed: int, fake: Fake, clips: Sequence[ClipExample]) -> None:
    """metrics.json holds of each mode what the report takes from there, and little else."""
    (run / "scores").mkdir(parents=True)
    lines = [evaluation(step, 0.2 + 0.1 * k + 0.02 * seed, rung) for k, step in enumerate((100, 200, 300))]
    (run / "metrics.jsonl").write_text("".join(lines))
    metronome = {"period_s": 6.0, "f1": 0.45}  # below every rung's interval
    speaking = {"frames": {"chance": 0.05, "alone": {"chance": 0.04}}, "events": {"metronome": metronome}}
    metrics: dict[str, Any] = {mode: {"speaking": speaking} for mode in fake.modes}
    if "self-fed" in metrics and rung == "speak+dst":
        metrics["self-fed"]["state"] = STATES[seed]
    thresholds = {"frame": {"speaking": 0.0}, "event": {"speaking": 0.5}}
    metrics |= {"thresholds": thresholds, "thresholds_from": "val"}
    (run / "scores" / "metrics.json").write_text(json.dumps(metrics))
    for mode in fake.modes:
        scored = [_scored(clip, rung, seed, mode == "self-fed", fake) for clip in clips]
        write_scores(run / "scores" / f"{mode}.parquet", {"test": scored}, {})


def evaluation(step: int, ap: float | None, rung: str = "speak", split: str = "val") -> str:
    """A line of metrics.jsonl."""
    dst_ap = ap + 0.1 if ap is not None and ("dst" in rung or "markers" in rung) else None
    heads = {"speaking": {"ap": ap, "chance": 0.05}, "dst_update": {"ap": dst_ap, "chance": 0.05}}
    return json.dumps({"step": step, "evaluation": {"split": split, **heads}}) + "\n"


def _scored(clip: ClipExample, rung: str, seed: int, live: bool, fake: Fake) -> ScoredClip:
    """Logits are right by 8 with DST text, else by 3; `silence` scores as `speak` does."""
    name = "speak" if rung == "silence" else rung
    rng = np.random.default_rng([seed, clip.clip, *name.encode()])
    logits = (8.0 if name == "speak+dst" else 3.0) * (clip.labels[0] == 1) - 3.0 + rng.normal(0, 1, clip.num_frames)
    logits = (logits + (fake.silence_differs if rung == "silence" else 0.0)).astype(np.float32)
    heads, probabilities = {"speaking": logits}, {"speaking": (1 / (1 + np.exp(1 - logits))).astype(np.float32)}
    if not live:
        return ScoredClip(clip, heads, probabilities)
    fires = np.zeros(clip.num_frames, bool)
    if fake.spoken is None:
        for i in np.flatnonzero(logits >= 0.5):
            fires[i] = not fires[max(0, i - REFRACTORY_FRAMES + 1) : i].any()
    else:
        fires[list(fake.spoken.get((rung, clip.clip_id), ()))] = True
    said = [fake.said if fire else None for fire in fires]
    updates = [(("S1", "complete"),) if fire and "+dst" in rung else None for fire in fires]
    return ScoredClip(clip, heads, probabilities, said, updates)


# ---- tables ------------------------------------------------------------------------------------------


def _score(fake: Fake, rung: str, mode: str, metric: str) -> dict[str, Any]:
    event_f1 = fake.values[rung, mode]
    value = None if event_f1 is None else {"event_f1": event_f1, "speaking_ap": event_f1 + 0.1}.get(metric, 0.5)
    ends = (None, None) if value is None or fake.half_width is None else (value - 0.03, value + 0.03)
    row = {"rung": rung, "mode": mode, "metric": metric, "value": value, "low": ends[0], "high": ends[1]}
    return row | {"seeds": len(fake.seeds), "recordings": RECORDINGS}


def _compared(fake: Fake, a: str, b: str, mode: str, metric: str) -> dict[str, Any]:
    row: dict[str, Any] = {"a": a, "b": b, "mode": mode, "metric": metric, "undefined": 0}
    row |= {"seeds": len(fake.seeds), "recordings": RECORDINGS}
    row |= dict.fromkeys(("difference", "low", "high", "p_direction", "p_value", "p_holm", "detectable", "seed_share"))
    row["primary"] = (a, b, mode, metric) == ("speak+dst", "speak", "self-fed", fake.primary)
    first, second = (_score(fake, rung, mode, metric)["value"] for rung in (a, b))
    if first is None or second is None:
        return row
    difference = first - second if metric != "median_latency_s" else -0.5
    row |= {"difference": difference, "p_direction": 0.99, "p_value": 0.02, "p_holm": 0.06, "detectable": 0.057}
    row["seed_share"] = fake.seed_share
    if fake.half_width is not None:
        row |= {"low": difference - fake.half_width, "high": difference + fake.half_width}
    return row
