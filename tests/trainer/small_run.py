"""A run small enough to repeat, kill and resume many times: 7 clips of 12 to 14 frames, half a second for all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from by_hand import clip_example, dst, turn, write_frames, write_shards

import trainer.curves
import trainer.train
from trainer.config import RunOptions, TrainConfig
from trainer.train import TrainReport, train

CONFIG = TrainConfig(
    steps=10, clips_per_step=3, warmup_steps=2, max_tokens=200, micro_batch_tokens=120, eval_every=4
)  # three packs a step, four epochs and a bit


def clip(i: int, split: str = "train", **more):
    at = 3 + i % 5
    turns = [
        turn("user", "What now, <image>?", 1, 2),  # text is text, also for a worker
        dst(at, at + 1, ("S1", "complete")),
        turn("assistant", "Well done.", at + 1, at + 3),
    ]
    return clip_example(turns, 0, 12 + i % 3, clip_id=f"{split}{i}", clip=i, video=f"{split}-v{i}", **more)


def write_data(out: Path, clips: int = 7, val: int = 3, test: int = 0, order=list, **layout: int) -> Path:
    """Shards and frames of that many clips; an event's frame is white. layout: clips per row group and shard."""
    counts = {"train": clips, "val": val, "test": test}
    splits = {split: order([clip(i, split) for i in range(n)]) for split, n in counts.items() if n}
    for c in (c for chosen in splits.values() for c in chosen):
        frames = [np.full((64, 64, 3), 255 * v, np.uint8) for v in (c.labels == 1).any(0)]
        write_frames(out / "frames-on-disk" / f"{c.video_uid}.arrow", frames)
    placed = {split: [replace(c, clip=i) for i, c in enumerate(chosen)] for split, chosen in splits.items()}
    return write_shards(out, placed, frames_root=out / "frames-on-disk", **{"group": 2, **layout})


def go(data: Path, run: Path, resume=False, workers=0, save_every=2, fsdp=False, drawn=False, **changed) -> TrainReport:
    """Train, quietly; top-level, so that a fresh process can be started on it. Curves are drawn if asked for."""
    config = TrainConfig(**{**CONFIG.__dict__, **changed})
    options = RunOptions(workers=workers, save_every=save_every, fsdp=fsdp, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:  # which takes half a second
            patch.setattr(trainer.curves, "draw", lambda run: None)
        return train(data, run, config, options=options, resume=resume)


class PowerCut(BaseException):
    pass


def go_until(step: int, data: Path, run: Path, **changed) -> None:
    """A run that dies after `step` steps."""
    after = trainer.train._Session.after_step

    def dies(self, done, line):
        after(self, done, line)
        if done == step:
            raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.train._Session, "after_step", dies)
        with pytest.raises(PowerCut):
            go(data, run, **changed)


def curve(run: Path) -> list[dict]:
    """All that was logged but the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "clock"} for line in lines]


def weights(run: Path) -> dict[str, bytes]:
    """All files of both checkpoints: weights, optimizer, options, tokenizer."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("[lb]*/*"))}


def same(run: Path, other: Path) -> bool:
    """Whether two runs left the same, bit for bit."""
    return weights(run) == weights(other) and curve(run) == curve(other)
