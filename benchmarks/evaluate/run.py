"""`evaluate --scores` at size: 10,000 clips x 600 frames, 10,000 bootstrap draws, and against the plain way on less.

The shards and the scores are made up: every clip is a recording of its own (the most that a bootstrap can meet), with
12 utterances and 10 state updates; a logit is noise plus 3 at an event, so hardly two frames tie. Two files, as
`evaluate` writes them: `teacher-forced` (val and test, thresholds chosen on val) and `free-running` (with texts and
updates). The plain way is scikit-learn, once per draw, with the frames' weights. Each case is a process of its own.

    uv run python benchmarks/evaluate/run.py --work /tmp/evaluate            # writes results.md beside this file
    uv run python benchmarks/evaluate/run.py --work /tmp/small --clips 300 --draws 200       # prints only
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
FULL_SIZE, FRAMES, DRAWS = 10_000, 600, 10_000
PLAIN_CLIPS, PLAIN_DRAWS = (300, 2_000), 20  # 300: every score has a cell of its own; 2,000: not


def make(work: Path, clips: int, frames: int, val_clips: int) -> None:
    """WORK/data: shards; WORK/{teacher-forced,free-running}.parquet: scores."""
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
    info = origin | {
        "mode": "free-running",
        "thresholds": thresholds | {"metronome": {"speaking": {"period_s": 20.0, "phase": 0.5}}},
    }
    write_scores(work / "free-running.parquet", {"test": free}, info)


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
    texts = ["Go on." if ((t := second.get(i)) and t.role == "assistant") or i % 97 == 0 else None for i in range(600)]
    made = [t.updates if (t := second.get(i)) and t.role == "DST_UPDATE" else None for i in range(600)]
    n = scored.clip.num_frames
    return replace(scored, said=texts[:n], updates=made[:n])


def evaluate(work: Path, mode: str, draws: int) -> dict[str, float]:
    from trainer.evaluation.metrics import evaluate_scores

    started = time.perf_counter()
    evaluate_scores(work / f"{mode}.parquet", out=work / mode, draws=draws)
    used = resource.getrusage(resource.RUSAGE_SELF)
    wall, cpu = time.perf_counter() - started, used.ru_utime + used.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "peak_mb": used.ru_maxrss / 1024}


def against_plain(work: Path, draws: int) -> dict[str, float]:
    """CPU seconds of speaking's average precision and AUROC by draw, ours and scikit-learn's, and how they differ."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    from pipeline.dataset import Split
    from trainer.evaluation.bootstrap import draw_recordings, replicate
    from trainer.evaluation.frame_metrics import head_frames, ranking
    from trainer.evaluation.scores import read_scores

    clips = read_scores(work / "free-running.parquet", {"test": Split(work / "data", "test")})["test"]
    recordings = sorted({scored.clip.recording_id for scored in clips})
    frames = head_frames(clips, "speaking", recordings)
    assert frames is not None
    weights = draw_recordings(len(recordings), draws)
    started = time.process_time()
    rates = ranking(frames)
    prepared = time.process_time()
    ours = replicate([rates], weights)[0, :, 1:]
    between = time.process_time()
    plain = [
        [score(frames.positive, frames.scores, sample_weight=drawn[frames.recording]) for drawn in weights]
        for score in (average_precision_score, roc_auc_score)
    ]
    ended = time.process_time()
    return {
        "clips": len(clips),
        "ours_prepare_s": prepared - started,
        "ours_per_draw_s": (between - prepared) / draws,
        "plain_per_draw_s": (ended - between) / draws,
        **dict(zip(("ap_differs", "auroc_differs"), np.abs(ours - plain).max(axis=1).tolist(), strict=True)),
        **dict(zip(("ap_sd", "auroc_sd"), ours.std(axis=1).tolist(), strict=True)),
    }


def case(work: Path, name: str, clips: int, draws: int) -> dict[str, float]:
    """One case in a process of its own."""
    words = [
        sys.executable,
        __file__,
        "--work",
        str(work),
        "--clips",
        str(clips),
        "--draws",
        str(draws),
        "--case",
        name,
    ]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(rows: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    return "\n".join(
        [*lines, *(f"| {name} | {' | '.join(f'{row[key]:.4g}' for key in names)} |" for name, row in rows.items())]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=FULL_SIZE)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--case", choices=("make", "teacher-forced", "free-running", "plain"))
    given = parser.parse_args()
    if given.case == "make":
        make(given.work, given.clips, FRAMES, max(2, given.clips // 50))
        print("{}")
    elif given.case == "plain":
        print(json.dumps(against_plain(given.work, given.draws)))
    elif given.case:
        print(json.dumps(evaluate(given.work, given.case, given.draws)))
    else:
        report(given.work, given.clips, given.draws)


def report(work: Path, clips: int, draws: int) -> None:
    if not (work / "whole" / "free-running.parquet").exists():
        case(work / "whole", "make", clips, draws)
    modes = ("teacher-forced", "free-running")
    whole = {f"{mode}, {draws:,} draws": case(work / "whole", mode, clips, draws) for mode in modes}
    plain = {}
    for count in PLAIN_CLIPS:
        case(work / f"plain-{count}", "make", count, PLAIN_DRAWS)
        plain[f"{count:,} clips"] = case(work / f"plain-{count}", "plain", count, PLAIN_DRAWS)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    text = f"""# `evaluate --scores` at size

{date.today()}, {os.cpu_count()} cores ({platform.machine()}), numpy {np.__version__}, load average at the end {load};
OMP_NUM_THREADS={os.environ.get("OMP_NUM_THREADS", "unset")}. Command: `python benchmarks/evaluate/run.py --work WORK`.

One process, {clips:,} clips (recordings) x {FRAMES} frames, all metrics of `metrics.json` and all intervals:

{table(whole)}

Average precision and AUROC of speaking, ours and the plain way (scikit-learn per draw, `sample_weight`), CPU seconds;
`differs`: the largest difference over {PLAIN_DRAWS} draws, `sd`: the draws' standard deviation:

{table(plain)}
"""
    print(text)
    if (clips, draws) == (FULL_SIZE, DRAWS):
        (HERE / "results.md").write_text(text)


if __name__ == "__main__":
    main()
