"""What a clip is to the trainer, and the pure rule that gives labels in any epoch, for a whole row group at once.

Parquet holds the labels of epoch 0. Of those only the positives are used; which silent frames count is drawn
anew for each epoch from (sampling_seed, epoch, frame), so a low rate still shows all silence over time. Clips are
drawn many at a time: 9 ns a frame for the labels of both heads, where clip by clip the draws alone took 30.

    C clips    F frames, those of all C clips end to end    T turns, likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.schema import NOT_SAMPLED, ROLES, draws, rate_threshold

BLOCK = 32  # clips drawn at a time: 20,000 frames stay in the cache; a group of 256 at once takes twice as long
SPEAK, DST = 0, 1  # rows of every [2, ...] array: the two heads
HEADS = {ROLES.index("assistant"): SPEAK, ROLES.index("DST_UPDATE"): DST}  # role code -> the head whose events they are

Labels = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Turn:
    """One entry of the conversation; [start_frame, end_frame) are absolute, both None where it has no frames."""

    role: str
    text: str
    start_frame: int | None = None
    end_frame: int | None = None
    time_s: float | None = None
    updates: tuple[tuple[str, str], ...] = ()  # (step id, transition)


class ClipLabels(NamedTuple):
    """One clip's labels and turns as numbers, without any text."""

    clip: int  # position in its split
    start_frame: int
    labels: Labels  # [2, F] (speaking, DST) of the epoch asked for
    turns: npt.NDArray[np.int32]  # [T, 3] code of the role in ROLES, start_frame, end_frame (-1: no frames)


@dataclass(frozen=True, eq=False)
class ClipExample:
    """One clip as the trainer sees it; `labels` int8 [2, F] (speaking, DST) are of the epoch asked for."""

    clip_id: str
    clip: int  # position in its split
    video_uid: str
    recording_id: str
    fps: float
    start_frame: int
    num_frames: int
    frames_file: str | None
    goal: str | None
    knowledge: str | None
    steps: tuple[tuple[str, str], ...]  # (id, name)
    initial_state: tuple[tuple[str, str], ...]  # (step id, state)
    turns: Sequence[Turn]
    sampling_seed: int
    neg_rate: float
    positive: str  # 'span' or 'onset'
    labels: Labels
    unlabelled: tuple[tuple[int, int], ...] = ()  # absolute ranges that nobody annotated
    dataset: str = "unknown"

    @property
    def end_frame(self) -> int:
        return self.start_frame + self.num_frames


# ---- the labels of an epoch --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LabelRule:
    """What the labels of C clips follow from, in any epoch."""

    starts: Ints  # [C] start_frame
    sizes: Ints  # [C] num_frames
    seeds: npt.NDArray[np.uint64]  # [C] sampling_seed
    rates: npt.NDArray[np.float64]  # [C] neg_rate
    tracked: Mask  # [C] whether the clip says anything about the DST head
    positives: Mask  # [2, F]
    onset_rest: Mask | None  # [2, F] frames of onset events after their first; None where there are none
    unlabelled: Mask | None  # [F] frames that nobody annotated; None where there are none


def epoch_labels(rule: LabelRule, epoch: int, rate: float | None = None) -> Labels:
    """Labels int8 [2, F] of one epoch, at `rate` or (None) at each clip's own.

    Epoch 0 at the clips' own rates gives what Parquet holds; rate 1.0 supervises every frame, as evaluation does.
    """
    rates = rule.rates if rate is None else np.full(len(rule.sizes), rate)
    supervised = rule.positives[::-1] | _drawn(rule, epoch, rates)  # positive for one head: silence for the other
    labels: Labels = (supervised.view(np.int8) - np.int8(1)) * np.int8(-NOT_SAMPLED)  # 1 -> 0, 0 -> -100
    if rule.onset_rest is not None:
        labels[rule.onset_rest] = NOT_SAMPLED
    np.copyto(labels, 1, where=rule.positives)
    if not rule.tracked.all():
        labels[DST, np.repeat(~rule.tracked, rule.sizes)] = NOT_SAMPLED
    if rule.unlabelled is not None:
        labels[:, rule.unlabelled] = NOT_SAMPLED
    return labels


def _drawn(rule: LabelRule, epoch: int, rates: npt.NDArray[np.float64]) -> Mask:
    """bool [F]: where the draw is below the rate."""
    thresholds = np.array([rate_threshold(rate) for rate in rates.tolist()], np.uint64)
    drawn = []
    for first in range(0, len(rates), BLOCK):
        own = slice(first, first + BLOCK)
        sizes = rule.sizes[own]
        frames = np.arange(sizes.sum()) + np.repeat(rule.starts[own] - (np.cumsum(sizes) - sizes), sizes)
        draw = draws(np.repeat(rule.seeds[own], sizes), epoch, frames)
        drawn.append(draw < np.repeat(thresholds[own], sizes))
    return np.concatenate(drawn)


def onset_rest(turns: npt.NDArray[np.int32], owner: Ints, starts: Ints, sizes: Ints, onset: Mask) -> Mask | None:
    """bool [2, F]: where events lie after their first frame, for the clips whose labels are onsets; None without any.

    turns [T, 3]: role code, start_frame, end_frame (-1: no frames); owner [T]: the clip of each turn;
    starts, sizes [C]: the clips' first frames and lengths; onset [C]: whether a clip's labels are onsets.
    """
    if not onset.any():
        return None
    offset, total = (np.cumsum(sizes) - sizes)[owner], int(sizes.sum())
    first = offset + np.clip(turns[:, 1] + 1 - starts[owner], 0, sizes[owner])
    end = offset + np.clip(turns[:, 2] - starts[owner], 0, sizes[owner])
    rest = np.zeros((2, total), bool)
    for code, head in HEADS.items():
        chosen = onset[owner] & (turns[:, 0] == code) & (first < end)
        opened, closed = (np.bincount(edge[chosen], minlength=total + 1) for edge in (first, end))
        rest[head] = np.cumsum(opened - closed)[:-1] > 0
    return rest
