"""Windows -> padded tensors. Heads and text rows are addressed by flat index, so padding can carry no loss.

Padding stands on the right under a causal mask: no real token ever sees it, so there is no attention mask
to get wrong. Windows of a step are sorted by length and cut so that padded tokens stay under a budget.
Pixels are loaded when a micro-batch runs: those of a whole step can be gigabytes.

    B windows    L tokens, padded    F frames of a window    N frames of the batch    k tokens per frame
    T supervised text tokens    S side in pixels
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.clips import ClipExample
from trainer.config import TrainConfig
from trainer.frames import FrameSource
from trainer.sequence import Window, build_windows
from trainer.tokenizer import Tokens


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass reads. An index is row * L + position, into [B, L] flattened."""

    windows: tuple[Window, ...]
    pixels: Callable[[], Tensor]  # -> uint8 [N, 3, S, S]
    input_ids: Tensor  # int64 [B, L]
    frame_index: Tensor  # int64 [N, k]
    lm_index: Tensor  # int64 [T] positions whose next token is a target
    lm_targets: Tensor  # int64 [T]
    labels: Tensor  # int8 [2, N]
    neg_rate: Tensor  # float32 [N]

    @property
    def decision_index(self) -> Tensor:
        return self.frame_index[:, -1]

    def to(self, device: torch.device) -> Batch:
        moved: dict[str, Any] = {k: v.to(device) for k, v in self.__dict__.items() if isinstance(v, Tensor)}
        return replace(self, pixels=lambda: self.pixels().to(device), **moved)


def windows_of(clips: Iterable[ClipExample], tokens: Tokens, config: TrainConfig) -> list[Window]:
    """All windows of the clips, in order."""
    k, budget = config.tokens_per_frame, config.max_tokens
    return [window for clip in clips for window in build_windows(clip, tokens, k, budget)]


def collate(windows: Sequence[Window], frames: FrameSource) -> Batch:
    """One batch of `windows`, in their order."""
    length = max(len(window.input_ids) for window in windows)
    ids = np.zeros((len(windows), length), np.int64)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window.input_ids)] = window.input_ids
    frame_index = np.concatenate([i * length + w.frame_positions for i, w in enumerate(windows)])
    lm_index = np.concatenate([i * length + w.lm_positions for i, w in enumerate(windows)])
    return Batch(
        windows=tuple(windows),
        pixels=lambda: load_pixels(windows, frames),
        input_ids=torch.from_numpy(ids),
        frame_index=torch.from_numpy(frame_index),
        lm_index=torch.from_numpy(lm_index),
        lm_targets=torch.from_numpy(ids.reshape(-1)[lm_index + 1]),
        labels=torch.from_numpy(np.concatenate([w.labels for w in windows], axis=1)),
        neg_rate=torch.cat([torch.full((w.labels.shape[1],), w.clip.neg_rate) for w in windows]),
    )


def load_pixels(windows: Sequence[Window], frames: FrameSource) -> Tensor:
    """uint8 [N, 3, S, S], in the order of `Batch.frame_index`."""
    return torch.from_numpy(np.concatenate([frames.load(w.clip, w.first_frame, w.end_frame) for w in windows]))


def micro_batches(windows: Sequence[Window], frames: FrameSource, max_tokens: int) -> list[Batch]:
    """Batches of similar lengths, each of at most `max_tokens` padded tokens (a longer window goes alone)."""
    groups: list[list[Window]] = []
    for window in sorted(windows, key=lambda w: len(w.input_ids)):
        if not groups or (len(groups[-1]) + 1) * len(window.input_ids) > max_tokens:
            groups.append([])
        groups[-1].append(window)
    return [collate(group, frames) for group in groups]
