"""Windows -> packs: laid end to end in one row, so that no token of any forward pass is padding.

Heads and text rows are addressed by index into the row; windows are kept apart by their lengths alone
(`trainer.attention`). Frames are loaded when a pack runs, or in a loader's worker.

    W windows    L tokens    N frames    k tokens per frame    T supervised text tokens
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.dataset import ClipExample
from pipeline.schema import NOT_SAMPLED
from trainer.arms import find_arm
from trainer.config import TrainConfig
from trainer.frame_source import FrameSource
from trainer.sequence import Window, build_windows
from trainer.tokenizer import Tokens

ON_HOST = ("seg_lens", "labels", "neg_rate")  # parts of a pack that stay on the CPU


@dataclass(frozen=True, eq=False)
class Pack:
    """What one forward pass reads."""

    clip_ids: tuple[str, ...]  # for messages
    frames: Callable[[], Tensor]  # -> pixels uint8 [N, 3, S, S], or cached features [N, k, D]
    input_ids: Tensor  # int64 [L]
    position_ids: Tensor  # int64 [L], from 0 in each window
    seg_lens: Tensor  # int64 [W]
    seg_ends: Tensor  # int32 [W + 1]: 0, and where each window ends
    frame_index: Tensor  # int64 [N, k] where each frame's tokens stand; both heads read at the last
    lm_index: Tensor  # int64 [T] positions whose next token is a target
    lm_targets: Tensor  # int64 [T]
    labels: Tensor  # int8 [2, N], of which `loss.supervise` makes indices
    neg_rate: Tensor  # float32 [N]

    @property
    def longest(self) -> int:
        return max(self.seg_lens.tolist())

    @property
    def device_tensors(self) -> dict[str, Tensor]:
        """The parts that go to the model's device, frames aside."""
        return {k: v for k, v in self.__dict__.items() if isinstance(v, Tensor) and k not in ON_HOST}

    def to(self, device: torch.device) -> Pack:
        moved: dict[str, Any] = {name: upload(value, device) for name, value in self.device_tensors.items()}
        return replace(self, frames=lambda: upload(self.frames(), device), **moved)

    def loaded(self) -> Pack:
        """With its frames in memory: what a loader's worker sends."""
        return replace(self, frames=Loaded(self.frames()))

    def pin_memory(self) -> Pack:
        """In pinned memory, frames included: what a DataLoader calls."""
        moved: dict[str, Any] = {name: value.pin_memory() for name, value in self.device_tensors.items()}
        return replace(self, frames=Loaded(self.frames().pin_memory()), **moved)


@dataclass(frozen=True, eq=False)
class Loaded:
    frames: Tensor

    def __call__(self) -> Tensor:
        return self.frames


def upload(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`, through pinned memory: the host would wait for a copy to a GPU from pageable memory."""
    pins = device.type == "cuda" and not (value.is_cuda or value.is_pinned())
    return (value.pin_memory() if pins else value).to(device, non_blocking=True)


def ends_of(seg_lens: Tensor) -> Tensor:
    """int32 [W + 1]: 0, and where each window of a pack ends."""
    return F.pad(seg_lens.cumsum(0), (1, 0)).to(torch.int32)


def windows_of(clips: Iterable[ClipExample], tokens: Tokens, config: TrainConfig) -> list[Window]:
    k, budget, arm = config.tokens_per_frame, config.max_tokens, find_arm(config.arm)
    return [window for clip in clips for window in build_windows(clip, tokens, k, budget, arm)]


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Which windows share a pack: indices into `lengths` [W]; at most `budget` tokens each, a longer one goes alone."""
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = next((p for p, left in enumerate(room) if lengths[i] <= left), len(packs))
        if fits == len(packs):
            packs.append([])
            room.append(budget)
        packs[fits].append(i)
        room[fits] -= lengths[i]
    return packs


def pack_windows(windows: Sequence[Window], frames: FrameSource, budget: int) -> list[Pack]:
    """All windows, in as few packs of at most `budget` tokens as first fit finds."""
    groups = plan([len(window.input_ids) for window in windows], budget)
    return [make_pack([windows[i] for i in group], frames) for group in groups]


def make_pack(windows: Sequence[Window], frames: FrameSource) -> Pack:
    """One pack of `windows`, in their order."""

    def load() -> Tensor:
        parts = [frames.load(window.clip, window.first_frame, window.end_frame) for window in windows]
        return torch.from_numpy(np.concatenate(parts))

    seg_lens = torch.tensor([len(window.input_ids) for window in windows])
    seg_ends = ends_of(seg_lens)
    starts = seg_ends[:-1].tolist()
    ids = np.concatenate([window.input_ids for window in windows])
    lm_index = np.concatenate([start + w.lm_positions for start, w in zip(starts, windows, strict=True)])
    frame_index = np.concatenate([start + w.frame_positions for start, w in zip(starts, windows, strict=True)])
    return Pack(
        clip_ids=tuple(dict.fromkeys(window.clip.clip_id for window in windows)),
        frames=load,
        input_ids=torch.from_numpy(ids),
        position_ids=torch.cat([torch.arange(length) for length in seg_lens.tolist()]),
        seg_lens=seg_lens,
        seg_ends=seg_ends,
        frame_index=torch.from_numpy(frame_index),
        lm_index=torch.from_numpy(lm_index),
        lm_targets=torch.from_numpy(ids[lm_index + 1]),
        labels=torch.from_numpy(np.concatenate([w.labels for w in windows], axis=1)),
        neg_rate=torch.cat([torch.full((w.labels.shape[1],), w.clip.neg_rate) for w in windows]),
    )


def blank_pack(clip: ClipExample, tokens: Tokens, frames: FrameSource, k: int) -> Pack:
    """A clip's first frame, unsupervised: a rank without packs gets from it a gradient of 0 for every parameter."""
    nothing, labels = np.zeros(0, np.int64), np.full((2, 1), NOT_SAMPLED, np.int8)
    ids, places = np.full(k, tokens.image), np.arange(k)[None]
    return make_pack([Window(clip, clip.start_frame, 1, ids, places, nothing, labels)], frames)
