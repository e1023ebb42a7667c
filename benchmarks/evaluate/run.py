"""`evaluate --scores` at size: 10,000 clips x 600 frames, 10,000 bootstrap draws, and against the plain way on less.

The shards and the scores are made up: every clip is a recording of its own (the most that a bootstrap can meet), with 12
utterances and 10 state updates; a logit is noise plus 3 at an event, so no two frames tie. Two files, as `evaluate`
writes them: `teacher-forced` (val and test, thresholds chosen on val) and `self-fed` (with texts and updates).
The plain way is scikit-learn, once per draw, with the frames' weights. Each case is a process of its own.

    uv run python benchmarks/evaluate/run.py --work /tmp/evaluate            # writes results.md beside this file
    uv run python benchmarks/evaluate/run.py --work /tmp/small --clips 300 --draws 200 --no-results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
FPS, STEPS, UTTERANCES = 2, 5, 12
SMALL_CLIPS, SMALL_DRAWS = 200, 50  # of the plain way


def make(work: Path, clips: int, frames: int, val_clips: int) -> None:
    """WORK/data: shards; WORK/{teacher-forced,self-fed}.parquet: scores."""
    from pipeline.dataset import Split
    from pipeline.preprocess import preprocess
    from trainer.evaluation.scores import ScoredClip, write_scores

    rng = np.random.default_rng(clips)
    work.mkdir(parents=True, exist_ok=True)
    for split, count in (("test", clips), ("val", val_clips)):
        lines = (json.dumps(conversation(rng, f"{split}{i:05d}", frames)) for i in range(count))
        (work / f"{split}_made.json").write_text("\n".join(lines) + "\n")
    preprocess([work / "test_made.json", work / "val_made.json"], work / "data")
    scored: dict[str, list[ScoredClip]] = {}
    for split in ("test", "val"):
        for clip in Split(work / "data", split).in_order():
            logits = (3 * (clip.labels == 1) - 2 + rng.standard_normal(clip.labels.shape)).astype(np.float32)
            by_head = dict(zip(("speaking", "dst_update"), logits, strict=True))
            probabilities = {
                head: (1 / (1 + np.exp(1 - values))).astype(np.float32) for head, values in by_head.items()
            }
            scored.setdefault(split, []).append(ScoredClip(clip, by_head, probabilities))
    origin: dict[str, Any] = {"data": str(work / "data"), "mode": "teacher-forced"}
    write_scores(work / "teacher-forced.parquet", scored, origin)
    thresholds = {"frame": {"speaking": 0.0, "dst_update": 0.0}, "event": {"speaking": 1.0, "dst_update": 1.0}}
    free = [said(one) for one in scored["test"]]
    info = origin | {"mode": "self-fed", "thresholds": thresholds | {"metronome_s": {"speaking": 20.0}}}
    write_scores(work / "self-fed.parquet", {"test": free}, info)


def conversation(rng: np.random.Generator, name: str, frames: int) -> dict[str, Any]:
    """One clip in the schema `prospect`; events of two frames, `start <= time * fps < end`."""
    at = np.sort(rng.choice(np.arange(4, frames - 4, 4), UTTERANCES + 2 * STEPS, replace=False)).tolist()
    spoken = set(rng.choice(at, UTTERANCES, replace=False).tolist())
    due = [(f"S{i}", transition) for i in range(STEPS) for transition in ("start", "complete")]
    turns = [event("user", 0, content="How do I begin?")]
    for frame in at:
        if frame in spoken:
            turns.append(event("assistant", frame, content=f"Now do what comes after {frame}."))
        else:
            step, transition = due.pop(0)
            turns.append(event("DST_UPDATE", frame, content=[{"id": step, "transition": transition}]))
    steps = [{"id": f"S{i}", "name": f"step {i}"} for i in range(STEPS)]
    bounds = {"start_frame_idx": 0, "end_frame_idx": frames, "fps": FPS}
    return {"video_uid": name, "conversation": turns, "dst": steps, "neg_frame_sampling_rate": 1.0} | bounds


def event(role: str, frame: int, **more: Any) -> dict[str, Any]:
    return {"role": role, "start_frame": frame, "end_frame": frame + 2, "time": frame / FPS} | more


def said(scored: Any) -> Any:
    """As a free-running model that speaks and updates at each event's second frame, and sometimes elsewhere."""
    from dataclasses import replace

    second = {turn.start_frame + 1 - scored.clip.start_frame: turn for turn in scored.clip.turns}
    texts = ["Go on." if (t := second.get(i)) and t.role == "assistant" or i % 97 == 0 else None for i in range(600)]
    made = [t.updates if (t := second.get(i)) and t.role == "DST_UPDATE" else None for i in range(600)]
    n = scored.clip.num_frames
    return replace(scored, said=texts[:n], updates=made[:n])


def evaluate(work: Path, mode: str, draws: int) -> dict[str, Any]:
    from trainer.evaluation.evaluate_scores import evaluate_scores

    started = time.perf_counter()
    evaluate_scores(work / f"{mode}.parquet", out=work / mode, draws=draws)
    return usage(started)


def usage(started: float) -> dict[str, Any]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1024,
    }
