"""The streaming engine: many clips at once against one at a time, frames a second live, and eight hours of it.

    A  free-running evaluation: ours (a slot per clip, several frames a pass) against a plain loop
       (`plain.py`: the library's attention and cache, one clip at a time, a forward per frame and written token) and
       against itself with one slot and one frame a pass. The sides take turns. On a CPU all must write the same texts;
       in bf16 on a GPU near ties fall either way: the report counts the clips that have them, and compares logits up to
       there
    B  live: one frame at a time with ready features, k=1, in a context of at most 2,048 tokens. Every frame of a whole
       cycle is timed, from just after the context started over to just after it did so again. At four sizes of context
       the rivals read its last frames: the library's `DynamicCache`, and everything once more at each frame
    C  live from pixels, vision tower included, the context half full
    D  eight hours at 2 frames/s: 57,600 frames through `Stream.step`, which fires and writes; memory by the hour. On a
       GPU 4,800 frames, in eight parts (57,600 would take a quarter of an hour at 256M): several full contexts

A cost is CPU seconds on a CPU, which neighbours on the machine disturb least; on a GPU seconds by the clock from one
synchronisation of the card to the next.

    uv run python benchmarks/stream/run.py --work WORK                   # half an hour on two quiet cores, 4 GB
    uv run python benchmarks/stream/run.py --work WORK --parts AB --sizes tiny
    uv run python benchmarks/stream/run.py --work WORK --device cuda     # 256M, and 2.2B in B

tiny is trained a little on made-up data (in WORK, or --run and --data), so that it fires and writes as a model does;
the true 256M shape has random weights, which cost the same. What is in WORK is not measured again. A run of all parts
and sizes writes results.md beside this file; a smaller one prints what lies in WORK, unless `--results` names a file.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import plain  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import trainer.live.rollout  # noqa: E402
from benchmarks.preprocess.run import versions  # noqa: E402
from benchmarks.trainer.shared import CachedNoise, Case, build  # noqa: E402
from pipeline.dataset import ClipExample, Split, read_manifest  # noqa: E402
from pipeline.errors import InputError  # noqa: E402
from pipeline.options import Options  # noqa: E402
from pipeline.preprocess import preprocess  # noqa: E402
from pipeline.synth import SynthConfig, synth  # noqa: E402
from trainer.checkpoint import LoadedRun, load_run  # noqa: E402
from trainer.config import RunOptions, TrainConfig  # noqa: E402
from trainer.evaluate import evaluate  # noqa: E402
from trainer.evaluation.scores import ScoredClip  # noqa: E402
from trainer.frame_source import FrameSource, open_frames  # noqa: E402
from trainer.live.engine import Engine, streaming  # noqa: E402
from trainer.live.session import DecodingConfig, FrameInput, Session, token_budget  # noqa: E402
from trainer.live.stream import Stream, decoding_config  # noqa: E402
from trainer.live.video_input import VideoFrame  # noqa: E402
from trainer.model import ProspectModel  # noqa: E402
from trainer.sequence import texts_at  # noqa: E402
from trainer.tokenizer import Tokens  # noqa: E402
from trainer.train import train  # noqa: E402

Found = dict[str, Any]
V = 49280  # of the released models
RECORDINGS = {"train": 100, "val": 10, "test": 25}
STEPS = 150
FEW_RECORDINGS, FEW_STEPS = {"train": 4, "val": 1, "test": 2}, 4  # of a smoke run
BUDGET = 2048  # tokens of a context
MOST_TEXT = 16  # tokens of a text where weights are random, and none ends by itself
NEVER = DecodingConfig({"speaking": math.inf, "dst_update": math.inf}, max_text=MOST_TEXT)
HOUR, HOURS = 7200, 8  # frames at 2 frames/s
PART = 600  # frames instead of an hour's, on a GPU
NEAR = 16  # frames that the rivals read at a size of context
AT = (0.02, 0.33, 0.66, 0.97)  # of a cycle
MOST_GROWTH_MB = 10.0
GPU_BARS = {"256M": 100, "2.2B": 25}  # decisions/s
SIDES = {
    "ours": "**ours**: many clips at once",
    "one": "ours: one slot, one frame a pass",
    "ahead": "ours: one slot, up to four frames a pass",
    "plain": "a plain loop: `DynamicCache`, one clip at a time",
}


# ---- models and clips ----------------------------------------------------------------------------------


def trained(work: Path, run: Path | None, data: Path | None, smoke: bool) -> tuple[Path, Path]:
    """(run, data): those given, or a tiny model trained a little on made-up data, evaluated for its thresholds."""
    if run and data:
        return run, data
    raw, data, run = work / "raw", work / "data", work / "run"
    if not raw.exists():
        synth(raw, SynthConfig(recordings=FEW_RECORDINGS if smoke else RECORDINGS))
    with patch("pipeline.preprocess.version", lambda name: "0"):  # the manifest's; nothing need be installed
        preprocess([raw], data, Options(frames_root=str(raw), positive="onset"))
    if not (run / "evaluation-test" / "metrics.json").exists():
        config = TrainConfig(steps=FEW_STEPS, warmup_steps=1) if smoke else TrainConfig(steps=STEPS)
        train(data, run, config, options=RunOptions(progress=False))
        evaluate(run, data, live=False)
    return run, data


def true_size(size: str, bf16: bool, device: str, tokens: Tokens, **more: Any) -> LoadedRun:
    """Random weights in the shape of a released model."""
    vlm, heads = build(Case(size, V, device=device))
    config = TrainConfig(bf16=bf16, **more)
    return LoadedRun(ProspectModel(vlm, heads, config).eval(), tokens, config, {"neg_rate": 1.0})


def long_clips(clips: Sequence[ClipExample], count: int, frames: int) -> list[ClipExample]:
    """The first clips, `frames` long: their features are noise that never ends."""
    return [replace(clip, num_frames=frames, labels=np.zeros((2, frames), np.int8)) for clip in clips[:count]]


def firing(scored: Sequence[ScoredClip], share: float) -> DecodingConfig:
    """Thresholds that a `share` of the frames reaches, for weights that never learned when to fire."""
    heads = scored[0].logits
    return replace(
        NEVER,
        thresholds={h: float(np.quantile(np.concatenate([s.logits[h] for s in scored]), 1 - share)) for h in heads},
    )


# ---- A: many clips at once -----------------------------------------------------------------------------


def by_side(
    side: str, run: LoadedRun, clips: Sequence[ClipExample], frames: FrameSource, live: DecodingConfig
) -> list[ScoredClip]:
    given = run.model, run.tokens
    if side == "plain":
        return list(plain.free_running(*given, clips, frames, run.config, live))
    kept, trainer.live.rollout.READ_AHEAD = (
        trainer.live.rollout.READ_AHEAD,
        1 if side == "one" else trainer.live.rollout.READ_AHEAD,
    )
    try:
        slots = None if side == "ours" else 1
        return list(trainer.live.rollout.free_running(*given, clips, frames, run.config, live, slots=slots))
    finally:
        trainer.live.rollout.READ_AHEAD = kept


def difference(found: Sequence[ScoredClip], expected: Sequence[ScoredClip], exact: bool) -> tuple[float, int]:
    """(the largest of logits up to where a clip's texts first differ, clips whose texts do not).

    `exact`: RuntimeError where one differs.
    """
    apart, same = 0.0, 0
    for one, other in zip(found, expected, strict=True):
        texts = [list(zip(clip.said, clip.updates or clip.said, strict=True)) for clip in (one, other)]
        until = next((i + 1 for i, (mine, theirs) in enumerate(zip(*texts, strict=True)) if mine != theirs), None)
        if exact and until is not None:
            raise RuntimeError(f"clip {one.clip.clip_id}: other texts than the rival's")
        same += until is None
        apart = max(apart, *(float(np.abs(one.logits[h] - other.logits[h])[:until].max()) for h in one.logits))
    return apart, same


def cost_now(device: str) -> float:
    """Seconds of which a difference is a cost: see above."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(
    run: LoadedRun,
    clips: Sequence[ClipExample],
    frames: FrameSource,
    live: DecodingConfig,
    reps: int,
    sides: Sequence[str],
) -> Found:
    """(cost, wall seconds) by side, taking turns; RuntimeError where they disagree on a CPU."""
    for clip in clips:
        frames.load(clip, clip.start_frame, clip.end_frame)  # warms the reader's cache, as `evaluate` has by then
    expected: list[ScoredClip] = []
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    apart, same, device = 0.0, len(clips), run.model.device.type
    for _ in range(reps):
        for side in sides:
            gc.collect()
            cost, wall = cost_now(device), time.perf_counter()
            found = by_side(side, run, clips, frames, live)
            times[side].append((cost_now(device) - cost, time.perf_counter() - wall))
            expected = expected or found
            differs, agree = difference(found, expected, exact=device == "cpu")
            apart, same = max(apart, differs), min(same, agree)
            print(f"    {side:6} cost {times[side][-1][0]:7.2f}  wall {times[side][-1][1]:7.2f}", flush=True)
    texts = [text for one in expected for text in one.said if text is not None]
    updates = [made for one in expected for made in one.updates or [] if made is not None]
    return {
        "clips": len(clips), "frames": sum(clip.num_frames for clip in clips), "replies": len(texts),
        "words": median(len(run.tokens.encode(text)) for text in texts) if texts else 0, "updates": len(updates),
        "apart": apart, "same": same, "times": times,
    }  # fmt: skip


def part_a_tiny(options: argparse.Namespace, folder: Path, data: Path) -> Found:
    run, split = load_run(folder), Split(data, "test")
    run.model.to(options.device)
    frames = open_frames(read_manifest(data), None, run.model.side)
    clips = list(split.in_order())[: 6 if options.smoke else None]
    return compare(run, clips, frames, thresholds(folder, run, clips, frames), options.reps, list(SIDES)[::-1])


def thresholds(folder: Path, run: LoadedRun, clips: Sequence[ClipExample], frames: FrameSource) -> DecodingConfig:
    """Those that `evaluate` chose; where the run was not evaluated, those that 3% of the frames reach."""
    try:
        return decoding_config(folder, {}, None)
    except InputError:
        return firing(
            list(trainer.live.rollout.free_running(run.model, run.tokens, clips, frames, run.config, NEVER)), 0.03
        )


def part_a_true(options: argparse.Namespace, tokens: Tokens, data: Path, share: float) -> Found:
    run = true_size("256M", options.device == "cuda", options.device, tokens)
    clips = long_clips(list(Split(data, "test").in_order()), *(2, 6) if options.smoke else (12, 100))
    frames, live = CachedNoise(run.model.vlm), NEVER
    if share:
        silent = list(trainer.live.rollout.free_running(run.model, tokens, clips, frames, run.config, NEVER))
        live = firing(silent, share)
    return compare(run, clips, frames, live, options.reps, ["plain", "ours"])


# ---- B: live, ready features -----------------------------------------------------------------------------


def cycle(run: LoadedRun, task: ClipExample) -> Found:
    """Seconds of every frame between two times that the context starts over, and the rivals' at four places of it."""
    model, config = run.model, replace(run.config, max_tokens=BUDGET)
    frames = CachedNoise(model.vlm)
    found: Found = {"seconds": [], "used": [], "plain": [], "again": [], "apart": 0.0, "apart_again": 0.0}

    def coming(numbers: range, script: Any = None) -> list[FrameInput]:
        loaded = torch.from_numpy(frames.load(task, numbers.start, numbers.stop)).to(model.device)
        features = model.frame_features(loaded)
        return [FrameInput(number, (), seen, script) for number, seen in zip(numbers, features, strict=True)]

    with streaming(model):
        _, capacity = token_budget(model, config, NEVER)
        engine = Engine(model, run.tokens, 1, capacity)
        context, number = Session(model, run.tokens, task, config, NEVER), 0
        while context.restarts < 1:
            number += len(engine.run(context.step(coming(range(number, number + 64)))))
        first, logits, places = context.used, [], list(AT)
        cpu = time.process_time()
        beside = 0.0  # CPU seconds of the rivals
        while context.restarts < 2:
            started = time.perf_counter()
            [happened] = engine.run(context.step(coming(range(number, number + 1))))
            found["seconds"].append(time.perf_counter() - started)
            found["used"].append(context.used)
            logits.append(happened.logits)
            number += 1
            if places and len(logits) >= NEAR and context.used >= first + places[0] * (context.budget - first):
                paused = time.process_time()
                seconds, theirs = plain.live(context, model, NEAR)
                found["plain"].append({"used": context.used, "seconds": seconds[1:]})
                found["apart"] = max(found["apart"], float(np.abs(np.stack(logits[-NEAR:], 1) - theirs).max()))
                repeated = [plain.again(context, model) for _ in range(2)]
                found["again"].append({"used": context.used, "seconds": repeated[1][0]})
                found["apart_again"] = max(found["apart_again"], float(np.abs(logits[-1] - repeated[1][1]).max()))
                places.pop(0)
                beside += time.process_time() - paused
        found["cpu_s"] = time.process_time() - cpu - beside
        speaks = coming(range(number, number + 1), {"assistant": None})
        started = time.perf_counter()
        engine.run(context.step(speaks))
        found["written_s"] = (time.perf_counter() - started - median(found["seconds"])) / MOST_TEXT
    return found


# ---- C: live from pixels ---------------------------------------------------------------------------------


def from_pixels(run: LoadedRun, task: ClipExample, count: int) -> Found:
    """Seconds a frame through `Stream.step`, half of the context full."""
    frames, side = CachedNoise(run.model.vlm), run.model.side
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, side, side), np.uint8)
    with Stream(run, task, NEVER, BUDGET) as stream:
        number = 0
        while stream._session.used < BUDGET // 2:
            features = run.model.frame_features(
                torch.from_numpy(frames.load(task, number, number + 64)).to(run.model.device)
            )
            stream._engine.run(
                stream._session.step([FrameInput(number + i, (), seen) for i, seen in enumerate(features)])
            )
            number += 64
        shown = Image.new("RGB", (8, 8))
        seconds = [
            stream.step(VideoFrame(number + i, (number + i) / 2, pixels[i % 4], shown, 0)).seconds
            for i in range(count + 1)
        ]
    return {"seconds": seconds[1:], "side": side}


# ---- D: eight hours --------------------------------------------------------------------------------------


def memory_mb(device: str) -> float:
    """What the process holds by itself; on a GPU what torch has reserved there."""
    if device == "cuda":
        return torch.cuda.memory_reserved() / 1e6
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def hours(
    run: LoadedRun,
    task: ClipExample,
    live: DecodingConfig,
    video: Iterator[tuple[Any, Sequence[str]]],
    device: str,
    hour: int,
) -> list[Found]:
    """By the hour: memory, milliseconds a frame, what happened."""
    shown, rows = Image.new("RGB", (8, 8)), []
    with Stream(run, task, live) as stream:
        for number in range(HOURS):
            seconds, counts, most = [], dict.fromkeys(("replies", "updates", "started over", "heard"), 0), 0
            for frame in range(number * hour, (number + 1) * hour):
                pixels, heard = next(video)
                moment = stream.step(VideoFrame(frame, frame / 2, pixels, shown, 0), heard)
                seconds.append(moment.seconds)
                counts["replies"] += moment.assistant_text is not None
                counts["updates"] += moment.updates is not None
                counts["started over"] += moment.started_over
                counts["heard"] += len(moment.user_texts)
                most = max(most, moment.tokens)
            p50, p99 = np.quantile(seconds, [0.5, 0.99])
            rows.append(counts | {"mb": memory_mb(device), "p50": p50, "p99": p99, "worst": max(seconds),
                                  "mean": fmean(seconds), "tokens": most})  # fmt: skip
            print(f"    part {number + 1}: {rows[-1]}", flush=True)
    return rows


def video_of(data: Path, side: int) -> Iterator[tuple[Any, Sequence[str]]]:
    """The test split's clips one after the other, over and over: pixels, and what the user says before them."""
    frames = open_frames(read_manifest(data), None, side)
    clips = [
        (frames.load(clip, clip.start_frame, clip.end_frame), texts_at(clip, "user"), clip.start_frame)
        for clip in Split(data, "test").in_order()
    ]
    for pixels, heard, start in itertools.cycle(clips):
        for i, seen in enumerate(pixels):
            yield seen, heard.get(start + i, ())


def hour_of(options: argparse.Namespace) -> int:
    """Frames of a row of D."""
    return 300 if options.smoke else PART if options.device == "cuda" else HOUR


def part_d(options: argparse.Namespace, folder: Path, data: Path, tokens: Tokens) -> list[Found]:
    task, hour = next(Split(data, "test").in_order()), hour_of(options)
    if options.device == "cpu":
        run = load_run(folder)
        frames = open_frames(read_manifest(data), None, run.model.side)
        live = thresholds(folder, run, list(Split(data, "test").in_order())[:2], frames)
        return hours(run, task, live, video_of(data, run.model.side), "cpu", hour)
    run = true_size("256M", True, "cuda", tokens)
    noise = CachedNoise(run.model.vlm)
    silent = trainer.live.rollout.free_running(run.model, tokens, [task], noise, run.config, NEVER)
    live = firing(list(silent), 0.05)
    ready = ((vector.astype(np.float32), ()) for vector in itertools.cycle(noise.table))
    return hours(run, task, live, ready, "cuda", hour)


# ---- the run ---------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace, name: str, threads: int, what: Callable[[], Any]) -> None:
    """Into WORK/results/NAME.json, unless it is there."""
    path = options.work / "results" / f"{name}.json"
    if path.exists():
        return
    print(f"{name}  (load {os.getloadavg()[0]:.1f})", flush=True)
    torch.set_num_threads(threads)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, started = os.getloadavg()[0], datetime.datetime.now(datetime.UTC)
    found = {"found": what(), "threads": threads, "load": (before, os.getloadavg()[0]), "at": started.isoformat()}
    if options.device == "cuda":
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    gc.collect()


def run_all(options: argparse.Namespace) -> None:
    folder, data = trained(options.work, options.run, options.data, options.smoke)
    tokens, task = load_run(folder).tokens, next(Split(data, "test").in_order())
    cpu, parts, sizes = options.device == "cpu", options.parts, options.sizes.split(",")
    if "A" in parts and "tiny" in sizes:
        measure(options, "A-tiny", 1, lambda: part_a_tiny(options, folder, data))
    if "B" in parts and "tiny" in sizes and cpu:
        for threads in (1, 2):
            measure(options, f"B-tiny-float32-{threads}", threads, lambda: cycle(load_run(folder), task))
    if "C" in parts and "tiny" in sizes and cpu:
        for threads in (1, 2):
            measure(options, f"C-tiny-float32-{threads}", threads, lambda: from_pixels(load_run(folder), task, 300))
    if "D" in parts and ("tiny" if cpu else "256M") in sizes:
        measure(options, "D", 1, lambda: part_d(options, folder, data, tokens))
    if "256M" in sizes:
        true_parts(options, tokens, data, task)
    if "B" in parts and "2.2B" in sizes and not cpu:
        measure(options, "B-2.2B-bf16-1", 1, lambda: cycle(true_size("2.2B", True, "cuda", tokens), task))


def true_parts(options: argparse.Namespace, tokens: Tokens, data: Path, task: ClipExample) -> None:
    device, parts = options.device, options.parts
    kinds = [("float32", 1), ("float32", 2), ("bf16", 1), ("bf16", 2)] if device == "cpu" else [("bf16", 1)]
    if "B" in parts:
        for kind, threads in kinds:
            name = f"B-256M-{kind}-{threads}"
            measure(options, name, threads, lambda k=kind: cycle(true_size("256M", k == "bf16", device, tokens), task))
    if "C" in parts:
        for (kind, threads), freeze in itertools.product(kinds, ((), ("vision",))):
            if not freeze or kind == "bf16":
                name = f"C-256M-{kind}{'-frozen' if freeze else ''}-{threads}"
                made = lambda k=kind, f=freeze: true_size("256M", k == "bf16", device, tokens, freeze=f)  # noqa: E731
                count = 2 if options.smoke else 6 if device == "cpu" else 200
                measure(options, name, threads, lambda m=made, n=count: from_pixels(m(), task, n))
    if "A" in parts:
        for name, share in (("silent", 0.0), ("texts", 0.03)):
            measure(options, f"A-256M-{name}", 1, lambda s=share: part_a_true(options, tokens, data, s))


# ---- the report ------------------------------------------------------------------------------------------


class Report:
    """Lines of results.md, from what lies in WORK."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.cost = "CPU seconds" if options.device == "cpu" else "seconds on the card"
        paths = sorted((options.work / "results").glob("*.json"))
        self.all = {path.stem: json.loads(path.read_text()) for path in paths}

    def of(self, prefix: str) -> dict[str, Found]:
        return {name: found for name, found in self.all.items() if name.startswith(prefix)}

    def lines(self) -> list[str]:
        loads = [load for found in self.all.values() for load in found["load"]]
        dates = sorted(found["at"][:10] for found in self.all.values())
        spread = f"{min(loads):.1f} to {max(loads):.1f}"
        return [
            "# Streaming: many clips at once, frames a second live, eight hours",
            "",
            f"- date: {dates[0]}; machine: {machine()}",
            f"- versions: {versions(('prospect-dst', 'torch', 'transformers', 'numpy'))}",
            f"- command: `uv run python benchmarks/stream/run.py --work WORK --device {self.options.device}`",
            f"- load average (1 minute) at the parts' beginnings and ends, up to 2 of it our own: {spread}",
            "",
            *self.bars(),
            "",
            *self.part_a(),
            *self.part_b(),
            *self.part_c(),
            *self.part_d(),
            UNFAIR,
        ]

    # bars

    def bars(self) -> list[str]:
        cpu = self.options.device == "cpu"
        lines = [
            self.ratio_bar("A-tiny", "tiny, trained a little, from pixels"),
            self.ratio_bar("A-256M-silent", "256M, ready features, no text"),
            self.ratio_bar("A-256M-texts", "256M, ready features, texts"),
        ]
        if cpu:
            lines += [self.rate_bar(f"B-tiny-float32-{n}", f"tiny, float32, threads: {n}", 100) for n in (1, 2)]
            lines += [self.rate_bar(f"B-256M-float32-{n}", f"256M, float32, threads: {n}", 10) for n in (1, 2)]
            lines += [self.rate_bar(f"B-256M-bf16-{n}", f"256M, bf16, threads: {n}", 10) for n in (1, 2)]
        else:
            lines += [self.rate_bar(f"B-{size}-bf16-1", f"{size}, bf16", bar) for size, bar in GPU_BARS.items()]
        lines.append(self.flat_bar())
        if cpu:
            gpu = "256M at 100 decisions/s, 2.2B at 25, memory over eight hours"
            lines.append(f"- GPU ({gpu}): not run, no GPU was at hand; `--device cuda` runs it")
        return lines

    def ratio_bar(self, name: str, what: str) -> str:
        claim = f"- A, {what}: free-running at least 5x faster than one clip at a time"
        if name not in self.all:
            return f"{claim}: not run"
        times = self.all[name]["found"]["times"]
        by = {side: faster(times, side) for side in ("plain", "one") if side in times}
        says = ", ".join(f"{ratio:.1f}x against {SIDES[side]}" for side, ratio in by.items())
        worst = min(cpu for cpu, _ in times["plain"]) / max(cpu for cpu, _ in times["ours"])
        return f"{claim}: {verdict(by['plain'] >= 5)}, {says} ({self.cost}; at worst {worst:.1f}x)"

    def rate_bar(self, name: str, what: str, bar: int) -> str:
        claim = f"- B, {what}: at least {bar} frames/s in a context of at most {BUDGET} tokens"
        if name not in self.all:
            return f"{claim}: not run"
        rate = 1 / fmean(self.all[name]["found"]["seconds"])
        return f"{claim}: {verdict(rate >= bar)}, {rate:.1f} frames/s (mean over a cycle, wall)"

    def flat_bar(self) -> str:
        frames = HOURS * hour_of(self.options)
        claim = f"- D: memory flat over {frames:,} frames (it grows by less than {MOST_GROWTH_MB:g} MB after an eighth)"
        if "D" not in self.all:
            return f"{claim}: not run"
        rows = self.all["D"]["found"]
        growth = max(row["mb"] for row in rows) - rows[0]["mb"]
        return f"{claim}: {verdict(growth < MOST_GROWTH_MB)}, {growth:+.1f} MB"

    # tables

    def part_a(self) -> list[str]:
        lines = ["## A  Free-running: many clips at once", ""]
        for name, whole in self.of("A-").items():
            found, times = whole["found"], whole["found"]["times"]
            lines += [
                f"### {name[2:]}",
                "",
                f"{found['clips']} clips, {found['frames']:,} frames, {found['replies']} replies (median "
                f"{found['words']:g} tokens), {found['updates']} updates; one thread. Same work: the texts of "
                f"{found['same']} clips are equal, logits differ by at most {found['apart']:.1e}.",
                "",
                f"| side | {self.cost} (min-max) | wall s | frames a second of it | ours is faster by |",
                "|---|---:|---:|---:|---:|",
            ]
            for side, runs in ((side, times[side]) for side in SIDES if side in times):
                cpu, wall = ([run[i] for run in runs] for i in (0, 1))
                gain = "" if side == "ours" else f"{faster(times, side):.2f}x"
                lines.append(
                    f"| {SIDES[side]} | {median(cpu):.2f} ({min(cpu):.2f}-{max(cpu):.2f}, n={len(cpu)}) | "
                    f"{median(wall):.2f} | {found['frames'] / median(cpu):,.0f} | {gain} |"
                )
            lines.append("")
        return lines

    def part_b(self) -> list[str]:
        head = (
            "model;threads;frames/s;CPU ms a frame;median ms;p99 ms;worst ms (starts over);"
            "ms a written token;`DynamicCache`;everything again"
        )
        lines = [
            "## B  DecodingConfig, ready features, k=1",
            "",
            "One whole cycle; frames/s is its mean by wall clock. The rivals: mean ms a frame at four sizes of the",
            "context; ours at the same frames in brackets.",
            "",
            "| " + head.replace(";", " | ") + " |",
            "|---" + "|---:" * 9 + "|",
        ]
        measured = {name[2:]: whole for name, whole in self.of("B-").items()}
        lines += [self.live_row(name, whole) for name, whole in measured.items()]
        apart = [f"{n} {w['found']['apart']:.1e} and {w['found']['apart_again']:.1e}" for n, w in measured.items()]
        peaks = [f"{n} {w['peak_mb']:,.0f} MB" for n, w in measured.items() if "peak_mb" in w]
        lines += ["", f"Largest difference of logits from the two rivals': {', '.join(apart)}.", ""]
        return lines + ([f"Peak GPU memory: {', '.join(peaks)}.", ""] if peaks else [])

    def live_row(self, name: str, whole: Found) -> str:
        found, seconds = whole["found"], np.array(whole["found"]["seconds"]) * 1000
        size, kind, threads = name.split("-")
        used = np.array(found["used"])
        ours = [fmean(seconds[(used > at["used"] - NEAR) & (used <= at["used"])]) for at in found["plain"]]
        cells = [
            f"{size}, {kind}", threads, f"{1000 / seconds.mean():,.1f}",
            f"{found['cpu_s'] * 1000 / len(seconds):.2f}" if self.options.device == "cpu" else "",
            f"{np.median(seconds):.2f}", f"{np.quantile(seconds, 0.99):.2f}", f"{seconds.max():.1f}",
            f"{found['written_s'] * 1000:.2f}",
            f"{fmean(fmean(at['seconds']) for at in found['plain']) * 1000:.2f} ({fmean(ours):.2f})",
            f"{fmean(at['seconds'] for at in found['again']) * 1000:,.1f}",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"

    def part_c(self) -> list[str]:
        lines = [
            "## C  DecodingConfig from pixels",
            "",
            "`frozen`: trained with `--freeze vision`. Context half full; frames are noise.",
            "",
            "| model | threads | pixels | frames | median s a frame | worst |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, whole in self.of("C-").items():
            found, kind = whole["found"], ", ".join(name.split("-")[1:-1])
            seconds = found["seconds"]
            lines.append(
                f"| {kind} | {whole['threads']} | {found['side']} | {len(seconds)} | {median(seconds):.4f} | "
                f"{max(seconds):.4f} |"
            )
        return [*lines, ""]

    def part_d(self) -> list[str]:
        what, hour = (
            "memory reserved on the GPU" if self.options.device == "cuda" else "resident memory",
            hour_of(self.options),
        )
        lines = [
            "## D  Eight hours",
            "",
            f"{'256M, ready features' if self.options.device == 'cuda' else 'tiny, from pixels'}, {HOURS * hour:,} "
            f"frames at 2 frames/s, one thread; {what} after each {hour:,} frames, the most tokens in the context.",
            "",
            "| part | MB | median ms | p99 ms | worst ms | started over | replies | updates | user lines | tokens |",
            "|---:" * 10 + "|",
        ]
        for number, row in enumerate(self.all.get("D", {"found": []})["found"], 1):
            ms = " | ".join(f"{row[key] * 1000:.1f}" for key in ("p50", "p99", "worst"))
            counts = " | ".join(f"{row[key]:,}" for key in ("started over", "replies", "updates", "heard", "tokens"))
            lines.append(f"| {number} | {row['mb']:.1f} | {ms} | {counts} |")
        return [*lines, ""]


UNFAIR = """## What is unfair to whom

To the rivals in A: a padded batch over the library's cache was possible there, too; nobody had written it, and clips
that fire at different frames make it long. In B: `DynamicCache` copies all keys and values at every frame; the library
also has a static cache, which is made for compiled models and was not run. Reading everything again needs no
positions or cache to be right, and shares the work of a training step.

To ours: the rivals take thresholds, prompts, texts and the rule of what is kept from our code, so that they can be
compared at all; their bookkeeping is shorter. In A all sides find decoded frames in the same cache of the frame reader,
as the free-running pass of `evaluate` does, and each runs the vision tower (tiny) or the connector (256M) itself."""


def faster(times: dict[str, list[tuple[float, float]]], side: str) -> float:
    return median(cpu for cpu, _ in times[side]) / median(cpu for cpu, _ in times["ours"])


def verdict(met: bool) -> str:
    return "met" if met else "**NOT met**"


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(info))}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    name, family, model = (facts.get(key, "?") for key in ("model name", "cpu family", "model"))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name} (family {family} model {model}), {os.cpu_count()} cores, {memory:.0f} GB, {card}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, run and measurements")
    parser.add_argument("--run", type=Path, help="a run of train, evaluated, instead of one made here")
    parser.add_argument("--data", type=Path, help="its data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parts", default="ABCD")
    parser.add_argument("--sizes", help="default: tiny,256M, on a GPU also 2.2B")
    parser.add_argument("--reps", type=int, default=3, help="of A")
    parser.add_argument("--smoke", action="store_true", help="all code paths on little")
    parser.add_argument("--results", type=Path, help="default: results.md beside this file, for a full run")
    options = parser.parse_args()
    every = "tiny,256M" if options.device == "cpu" else "tiny,256M,2.2B"
    full = options.parts == "ABCD" and options.sizes in (None, every) and not options.smoke
    options.sizes = options.sizes or every
    if full and options.results is None:
        options.results = Path(__file__).with_name("results.md" if options.device == "cpu" else "results-gpu.md")
    return options


def main() -> None:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a Stream takes a GPU where it finds one
    run_all(options)
    text = "\n".join(Report(options).lines()) + "\n"
    if options.results:
        options.results.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
