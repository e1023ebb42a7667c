"""A folder as `benchmark` leaves it, made up: the tables hold what the test says, the scores are labels with noise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from by_hand import clip_example, dst, turn, write_shards

from pipeline.dataset import ClipExample, Split

MODES = ("teacher-forced", "self-fed")
RECORDINGS = 5
REFRACTORY_FRAMES = 4

# (arm, mode) -> event F1; speaking AP is the same plus 0.1
VALUES = {
    ("silence", "teacher-forced"): 0.52, ("silence", "self-fed"): 0.5,
    ("speak", "teacher-forced"): 0.52, ("speak", "self-fed"): 0.5,
    ("speak+dst", "teacher-forced"): 0.82, ("speak+dst", "self-fed"): 0.6,
    ("speak+markers", "teacher-forced"): 0.6, ("speak+markers", "self-fed"): 0.525,
}  # fmt: skip
PAIRS = (("speak+dst", "speak"), ("speak+dst", "speak+markers"), ("speak+markers", "speak"), ("silence", "speak"))
METRICS = ("event_f1", "speaking_ap", "median_latency_s", "state_accuracy_nobody_knows")

SCORES = pa.schema(
    [("split", pa.string()), ("clip_id", pa.string()), ("recording_id", pa.string()), ("frame", pa.int32()),
     ("time_s", pa.float32()), ("speaking_logit", pa.float32()), ("dst_update_logit", pa.float32()),
     ("speaking_probability", pa.float32()), ("dst_update_probability", pa.float32()),
     ("speaking_label", pa.int8()), ("dst_update_label", pa.int8())]
)  # fmt: skip
LIVE = [
    pa.field("said", pa.string()),
    pa.field("updates", pa.list_(pa.struct([("id", pa.string()), ("transition", pa.string())]))),
]


@dataclass(frozen=True)
class Fake:
    """What the folder holds."""

    arms: Sequence[str] = ("silence", "speak", "speak+dst", "speak+markers")
    seeds: Sequence[int] = (0, 1)
    modes: Sequence[str] = MODES
    clips: int = 6
    frames: int = 120
    metronome: tuple[float, float] | None = (6.0, 0.45)  # seconds, event F1: below every arm's interval
    seed_share: float | None = None  # of the differences' intervals; None: the folder is of a time before it
    thresholds: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"frame": {"speaking": 0.0}, "event": {"speaking": 0.5}}
    )
    half_width: float | None = 0.04  # of the differences' intervals; None: there are none
    values: dict[tuple[str, str], float | None] = field(default_factory=lambda: dict(VALUES))
    silence_differs: float = 0.0  # added to the logits of `silence`
    info: dict[str, Any] = field(default_factory=dict)  # put over benchmark.json
    clip_ids: Sequence[str] = ()
    said: str = "Now attach the wheel."
    spoken: dict[tuple[str, str], Sequence[int]] | None = None  # (arm, clip_id) -> frames; None: by threshold


def make_benchmark(out: Path, fake: Fake | None = None) -> Path:
    fake = fake or Fake()
    clips = [_clip(i, fake) for i in range(fake.clips)]
    data = write_shards(out.parent / f"{out.name}-data", {"val": clips[:1], "test": clips})
    out.mkdir()
    (out / "benchmark.json").write_text(json.dumps(_info(fake, data) | fake.info))
    for arm in fake.arms:
        for seed in fake.seeds:
            _run(out / "runs" / arm / f"seed-{seed}", arm, seed, fake, clips)
    pq.write_table(pa.Table.from_pylist(_results(fake)), out / "results.parquet")
    pq.write_table(pa.Table.from_pylist(_arms(fake)), out / "arms.parquet")
    pq.write_table(pa.Table.from_pylist(_comparisons(fake), schema=COMPARISONS), out / "comparisons.parquet")
    return out


def _clip(i: int, fake: Fake) -> ClipExample:
    """User at 20, then speech and an update in every 40 frames (20 s)."""
    turns = [turn("user", "What comes next?", 20, 22)]
    for k, at in enumerate(range(24, fake.frames - 8, 40)):
        turns.append(dst(at, at + 2, (f"S{1 + k % 2}", "complete")))
        turns.append(turn("assistant", f"Well done, part {k}.", at, at + 2))
    clip_id = fake.clip_ids[i] if i < len(fake.clip_ids) else f"c{i}"
    return clip_example(turns, 0, fake.frames, clip_id=clip_id, clip=i, video=f"take-{i % RECORDINGS}", rate=1.0)


def _info(fake: Fake, data: Path) -> dict[str, Any]:
    return {
        "arms": list(fake.arms),
        "seeds": list(fake.seeds),
        "primary": {"metric": "event_f1", "mode": "self-fed", "pair": ["speak+dst", "speak"]},
        "split": "test",
        "recordings": RECORDINGS,
        "clips": fake.clips,
        "frames": fake.clips * fake.frames,
        "data": str(data),
        "data_key": {split: Split(data, split).key for split in ("val", "test")},
        "config": {"steps": 300, "lr": 0.001, "balance": "none"},
        "settings": {"early_s": 2.0, "late_s": 4.0, "refractory_s": 2.0, "reactive_s": 2.0, "bins": 10},
        "commands": ["prospect-dst benchmark data --arms speak,speak+dst --seeds 2"],
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "hazards": ["test: speaking and DST events coincide on 90% of frames"],
        "hashes": {f"{arm}/seed-{seed}": "ab" * 32 for arm in fake.arms for seed in fake.seeds},
        "machine": "2 cores",
        "seconds": 61.5,
        "draws": 10000,
        "label_rule": "onset",
    }


# ---- runs --------------------------------------------------------------------------------------------


def _run(run: Path, arm: str, seed: int, fake: Fake, clips: Sequence[ClipExample]) -> None:
    (run / "scores").mkdir(parents=True)
    lines = [_evaluation(step, 0.2 + 0.1 * k + 0.02 * seed, arm) for k, step in enumerate((100, 200, 300))]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "scores" / "metrics.json").write_text(json.dumps(_metrics(arm, seed, fake)))
    for mode in fake.modes:
        live = mode == "self-fed"
        splits = {"test": clips} if live else {"val": clips[:1], "test": clips}
        rows = [row for split, own in splits.items() for c in own for row in _frames(split, c, arm, seed, live, fake)]
        schema = pa.schema([*SCORES, *LIVE]) if live else SCORES
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), run / "scores" / f"{mode}.parquet")


def _metrics(arm: str, seed: int, fake: Fake) -> dict[str, Any]:
    """metrics.json: of each mode what the report takes from there, and little else."""
    metronome = None if fake.metronome is None else dict(zip(("period_s", "f1"), fake.metronome, strict=True))
    speaking = {"frames": {"chance": 0.05, "alone": {"chance": 0.04}}, "events": {"metronome": metronome}}
    modes = {mode: {"speaking": speaking, "dst_update": {"frames": None, "events": None}} for mode in fake.modes}
    if "self-fed" in modes and arm == "speak+dst":
        modes["self-fed"]["state"] = STATES[seed]
    return {"thresholds": fake.thresholds, "thresholds_from": "val", **modes}


NEVER = {"joint_accuracy_never_updating": 0.375, "over_time_never_updating": [0.75, 0.0, None, None]}
STATES = {  # by seed; clips in 4 parts, the last without a frame
    0: {"over_time": [1.0, 0.5, 0.25, None], "transitions": {"median_latency_s": -0.5}, **NEVER},
    1: {"over_time": [1.0, 1.0, 0.75, None], "transitions": {"median_latency_s": 0.25}, **NEVER},
}


def _evaluation(step: int, ap: float, arm: str) -> dict[str, Any]:
    dst_ap = ap + 0.1 if "dst" in arm or "markers" in arm else None
    heads = {"speaking": {"ap": ap, "chance": 0.05}, "dst_update": {"ap": dst_ap, "chance": 0.05}}
    return {"step": step, "evaluation": {"split": "val", **heads}}


def _frames(split: str, clip: ClipExample, arm: str, seed: int, live: bool, fake: Fake) -> list[dict[str, Any]]:
    logits = score(clip, arm, seed) + (fake.silence_differs if arm == "silence" else 0.0)
    rows, last = [], -REFRACTORY_FRAMES
    for i, logit in enumerate(logits.tolist()):
        frame = clip.start_frame + i
        row = {
            "split": split, "clip_id": clip.clip_id, "recording_id": clip.recording_id, "frame": frame,
            "time_s": frame / clip.fps, "speaking_logit": logit, "speaking_probability": 1 / (1 + np.exp(1 - logit)),
            "speaking_label": int(clip.labels[0, i]), "dst_update_label": int(clip.labels[1, i]),
        }  # fmt: skip
        chosen = None if fake.spoken is None else fake.spoken.get((arm, clip.clip_id), ())
        fires = frame in chosen if chosen is not None else logit >= 0.5 and frame - last >= REFRACTORY_FRAMES
        if live and fires:
            last = frame
            row |= {"said": fake.said, "updates": [{"id": "S1", "transition": "complete"}] if "+dst" in arm else None}
        rows.append(row)
    return rows


def score(clip: ClipExample, arm: str, seed: int) -> np.ndarray:
    """Logits [F]: right by 8 with DST text, else by 3; `silence` scores as `speak` does."""
    name = "speak" if arm == "silence" else arm
    rng = np.random.default_rng([seed, clip.clip, *name.encode()])
    return (8.0 if name == "speak+dst" else 3.0) * (clip.labels[0] == 1) - 3.0 + rng.normal(0, 1, clip.num_frames)


# ---- tables ------------------------------------------------------------------------------------------


def value(fake: Fake, arm: str, mode: str, metric: str) -> float | None:
    event_f1 = fake.values.get((arm, mode))
    if event_f1 is None or metric == "state_accuracy_nobody_knows":
        return None
    return {"event_f1": event_f1, "speaking_ap": event_f1 + 0.1, "median_latency_s": 0.5}[metric]


def _results(fake: Fake) -> list[dict[str, Any]]:
    return [
        {"arm": arm, "seed": seed, "mode": mode, "metric": metric, "value": value(fake, arm, mode, metric),
         "recordings": RECORDINGS}
        for arm in fake.arms for seed in fake.seeds for mode in fake.modes for metric in METRICS
    ]  # fmt: skip


def _arms(fake: Fake) -> list[dict[str, Any]]:
    def row(arm: str, mode: str, metric: str) -> dict[str, Any]:
        at = value(fake, arm, mode, metric)
        ends = (None, None) if at is None or fake.half_width is None else (at - 0.03, at + 0.03)
        return {"arm": arm, "mode": mode, "metric": metric, "value": at, "low": ends[0], "high": ends[1],
                "seeds": len(fake.seeds), "recordings": RECORDINGS}  # fmt: skip

    return [row(arm, mode, metric) for arm in fake.arms for mode in fake.modes for metric in METRICS]


NUMBERS = ("difference", "low", "high", "p_direction", "p_value", "p_holm", "detectable", "seed_share")
COMPARISONS = pa.schema(
    [("a", pa.string()), ("b", pa.string()), ("mode", pa.string()), ("metric", pa.string()),
     *((name, pa.float64()) for name in NUMBERS),
     ("seeds", pa.int32()), ("recordings", pa.int32()), ("primary", pa.bool_())]
)  # fmt: skip


def _comparisons(fake: Fake) -> list[dict[str, Any]]:
    return [
        _compared(fake, a, b, mode, metric)
        for a, b in PAIRS if a in fake.arms and b in fake.arms
        for mode in fake.modes for metric in METRICS
    ]  # fmt: skip


def _compared(fake: Fake, a: str, b: str, mode: str, metric: str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COMPARISONS.names) | {
        "a": a, "b": b, "mode": mode, "metric": metric, "seeds": len(fake.seeds), "recordings": RECORDINGS,
        "primary": (a, b, mode, metric) == ("speak+dst", "speak", "self-fed", "event_f1"),
    }  # fmt: skip
    first, second = value(fake, a, mode, metric), value(fake, b, mode, metric)
    if first is None or second is None:
        return row
    by = first - second
    row |= {"difference": by, "p_direction": 0.99, "p_value": 0.02, "p_holm": 0.06, "detectable": 0.057,
            "seed_share": fake.seed_share}  # fmt: skip
    if fake.half_width is not None:
        row |= {"low": by - fake.half_width, "high": by + fake.half_width}
    return row
