"""From conversations to an evaluated and streamed model on one machine, in one process, at the true shape.

Weights are random: what is shown is that every stage runs on the device, and how long it takes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from shared import Case, build

from pipeline.dataset import Split
from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.synth import SynthConfig, synth
from trainer.checkpoint import load_run
from trainer.config import RunOptions, TrainConfig
from trainer.encode import encode
from trainer.evaluate import evaluate
from trainer.live.session import DecodingConfig
from trainer.live.stream import Stream
from trainer.live.video_input import VideoFrame
from trainer.loader import default_workers
from trainer.run_log import read_metrics
from trainer.tokenizer import train_tiny_tokens
from trainer.train import train


def go(work: Path, case: Case, smoke: bool, say: Callable[..., None]) -> None:
    began = time.perf_counter()

    def stage(name: str, **found: Any) -> None:
        nonlocal began
        say("e2e", name, seconds=time.perf_counter() - began, **found)
        began = time.perf_counter()

    data, model, features = work / "data", work / "model", work / "features"
    recordings = {"train": 1, "val": 1, "test": 1} if smoke else {"train": 16, "val": 2, "test": 3}
    synth(work / "raw", SynthConfig(recordings=recordings, views=1 if smoke else 2))
    preprocess([work / "raw"], data, Options(frames_root=str(work / "raw"), positive="onset"))
    stage("synth, preprocess")

    vlm, _ = build(case)
    vlm.save_pretrained(model)
    train_tiny_tokens(Split(data, "train").texts()).tokenizer.save_pretrained(model)
    del vlm
    stage("a model of that shape")

    done = encode(data, features, str(model))
    stage("encode", frames=done.frames, frames_per_s=done.frames / done.seconds, computed=done.computed)

    run, workers = work / "run", default_workers(torch.device(case.device))
    steps, clips = (2, 2) if smoke else (24, 32)
    config: dict[str, Any] = {
        "model": str(model), "freeze": ("vision",), "lr": 1e-4, "lr_by_part": {"heads": 1e-3}, "bf16": case.bf16,
        "clips_per_step": clips, "micro_batch_tokens": 16384, "warmup_steps": 1,
    }  # fmt: skip
    options = RunOptions(save_every=0, progress=False)
    train(data, run, TrainConfig(steps=steps, **config), features=features, options=options)
    stage("train on features", workers=workers, **_told(run))

    train(
        data, work / "pixels", TrainConfig(**config | {"clips_per_step": 2}, steps=2 if smoke else 3), options=options
    )
    stage("train from pixels, tower frozen", workers=workers, **_told(work / "pixels"))

    evaluate(run, data, "test", features=features)
    stage("evaluate, teacher-forced and free-running")

    never = DecodingConfig({"speaking": math.inf, "dst_update": math.inf})
    loaded, shown = load_run(run), Image.new("RGB", (8, 8))
    side, rng = loaded.model.side, np.random.default_rng(0)
    with Stream(loaded, next(Split(data, "test").in_order()), never) as stream:
        seen = [
            VideoFrame(i, i / 2, rng.integers(0, 256, (3, side, side), np.uint8), shown, 0)
            for i in range(3 if smoke else 60)
        ]
        took = [1e3 * stream.step(one).seconds for one in seen]
    stage("stream from pixels", median_ms=statistics.median(took), worst_ms=max(took))


def _told(run: Path) -> dict[str, float]:
    """Of a run: loss at both ends, the median rate of its later steps, the card's peak."""
    lines = [line for line in read_metrics(run) if "loss" in line]
    rates = [line["clock"]["tokens_per_s"] for line in lines[2:] or lines]
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    first, last = lines[0]["loss"], lines[-1]["loss"]
    return {"first_loss": first, "last_loss": last, "tokens_per_s": statistics.median(rates), "peak_gb": peak}
