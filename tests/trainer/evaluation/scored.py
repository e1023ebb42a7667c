"""Clips with scores, built by hand, for the tests of the metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from by_hand import clip_example, dst, turn

from pipeline.dataset import Turn
from pipeline.schema import HEADS
from trainer.evaluation.scores import ScoredClip


def said_at(second: float, role: str = "assistant", *updates: tuple[str, str]) -> Turn:
    """A turn of two frames at 2 fps that begins at that moment, which is its time."""
    frame = int(second * 2)
    return Turn(role, "x", frame, frame + 2, second, updates)


def clip_of(
    turns: Sequence[Turn] = (),
    start: int = 0,
    frames: int = 120,
    *,
    name: str = "c0",
    recording: str | None = None,
    speaking: Sequence[float] | None = None,
    updating: Sequence[float] | None = None,
    spoke: Sequence[float] | None = None,
    updates: dict[float, tuple[tuple[str, str], ...]] | None = None,
    **other,
) -> ScoredClip:
    """At 2 fps. `spoke` and the keys of `updates` are seconds of a live model's events."""
    example = clip_example(turns, start, frames, clip_id=name, rate=1.0, video=recording or f"r-{name}", **other)
    logits = {
        head: np.asarray(values, np.float32)
        for head, values in zip(HEADS, (speaking, updating), strict=True)
        if values is not None
    }
    at = [(start + i) / 2 for i in range(frames)]
    return ScoredClip(
        example,
        logits,
        {},
        said=None if spoke is None else ["said" if t in spoke else None for t in at],
        updates=None if updates is None else [updates.get(t) for t in at],
    )


def noisy_clips(number: int, live: bool = False):
    """Clips of 60 frames in 5 recordings, with events of all kinds and scores that know something; many scores tie."""
    rng = np.random.default_rng(0)
    frames = 60
    clips = []
    for i in range(number):
        turns: list[Turn] = []
        for at in sorted(rng.choice(frames - 2, frames // 10, replace=False).tolist()):
            if rng.random() < 0.3:
                turns.append(turn("user", "?", at, at + 1))
            if rng.random() < 0.6:
                turns.append(dst(at, at + 1, ("S1", "start" if rng.random() < 0.5 else "complete")))
            if rng.random() < 0.7:
                turns.append(turn("assistant", "!", at, at + 1))
        shifted = [t._replace(start_frame=t.start_frame + 10 * i, end_frame=t.end_frame + 10 * i) for t in turns]
        scored = clip_of(shifted, 10 * i, frames, name=f"c{i:02d}", recording=f"r{i % 5}")
        logits = {
            head: np.round(3 * (scored.clip.labels[row] == 1) + rng.normal(size=frames), 1).astype(np.float32)
            for row, head in enumerate(HEADS)
        }
        chance = {head: (1 / (1 + np.exp(1 - value))).astype(np.float32) for head, value in logits.items()}
        updates = [(("S1", "start"),) if rng.random() < 0.1 else None for _ in range(frames)]
        said = ["x" if rng.random() < 0.1 else None for _ in range(frames)]
        clips.append(ScoredClip(scored.clip, logits, chance, *((said, updates) if live else (None, None))))
    return clips
