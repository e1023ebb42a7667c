"""The label rule: which frames are 1, 0 or -100 for each head. Used by `preprocess` (epoch 0) and by the trainer.

Three conventions share the field names start_frame/end_frame; `vote` says which one a file's turns follow, `canonical`
turns each into the half-open range of the event's frames, `label_rule` and `epoch_labels` turn ranges into labels.
All work on flat arrays of many clips laid end to end: C clips with T turns and F frames, no loop over any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.schema import DST_UPDATE, NOT_SAMPLED, ROLE_OF, ROLES, draws, rate_threshold

FLOOR_TOLERANCE: Final = 1e-6  # time * fps may fall just short of a whole frame
AGREEMENT: Final = Fraction(9, 10)  # share of turns that a convention must explain
VOTED: Final = ("lead-in", "event", "window")  # the first that fits
MIN_VOTERS: Final = 5  # fewer say nothing: `event` is assumed
BLOCK = 32  # clips drawn at a time: 20,000 frames stay in the cache; a group of 256 at once takes twice as long
NO_FRAMES: Final = (-1, -2)  # (start, end) of a turn without frames; no real range is reversed
DROP_REASONS: Final = ("no frames", "empty range", "outside the clip", "onset outside the clip")

Labels = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


def canonical(convention: str, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-open absolute ranges ([T], [T]) of the events whose source fields are `start`, `end`.

    event: as they are. window: end is inclusive. lead-in: the range is the silence before; the event is its last frame
    (at least 0), also where the range is empty because two turns share a time.
    """
    if convention == "window":
        return start, end + 1
    if convention == "lead-in":
        return np.maximum(end - 1, 0), np.maximum(end, 1)
    return start, end


def vote(clip: Ints, start: Ints, end: Ints, position: np.ndarray, clip_start: Ints) -> Ints:
    """[C, 4]: per clip its number of voting turns, and how many of them fit lead-in, event, window.

    The voters [V] are the timed, non-system turns with frames, in order; clip [V] is each one's clip, position [V] its
    time * fps, clip_start [C] the clips' first frames before any cutting.
    """
    frame = np.floor(position + FLOOR_TOLERANCE)
    first = np.diff(clip, prepend=-1) != 0
    before = np.where(first, clip_start[clip], np.roll(end, 1))
    lead_in = (start == before) & ((end == frame) | (end == frame + 1))
    fits = (np.ones_like(first), lead_in, (start <= frame) & (frame < end), end == frame)
    return np.stack([np.bincount(clip[fit], minlength=len(clip_start)) for fit in fits], axis=1)


def decide(votes: Sequence[int]) -> str | None:
    """The convention that summed `votes` speak for; None where no rule explains 90% of the turns."""
    if votes[0] < MIN_VOTERS:
        return "event"
    fits = zip(VOTED, votes[1:], strict=True)
    return next((name for name, count in fits if count >= AGREEMENT * votes[0]), None)


class Turns(NamedTuple):
    """Turns [T] of C clips, of any role; a range that is empty or reversed (NO_FRAMES) labels nothing."""

    owner: np.ndarray  # the turn's clip
    role: np.ndarray  # code in ROLES
    start: np.ndarray  # canonical, absolute
    end: np.ndarray


class Ranges(NamedTuple):
    """Half-open absolute ranges [U] of frames of C clips."""

    owner: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclass(frozen=True, eq=False)
class LabelRule:
    """What the labels of C clips, laid end to end, follow from in any epoch."""

    starts: Ints  # [C] start_frame
    sizes: Ints  # [C] num_frames
    seeds: npt.NDArray[np.uint64]  # [C] sampling_seed
    rates: npt.NDArray[np.float64]  # [C] neg_rate
    tracked: Mask  # [C] whether the clip has steps or DST_UPDATE turns: without, it has no labels for dst_update
    positives: Mask  # [2, F]
    onset_rest: Mask | None  # [2, F] frames of onset events, of which all but the first are -100; None without any
    unlabelled: Mask | None  # [F] frames that nobody annotated; None without any


def label_rule(
    turns: Turns, unlabelled: Ranges, *, starts: Ints, sizes: Ints, seeds: Any, rates: Any, steps: Ints, onset: Mask
) -> LabelRule:
    """The rule of C clips from their turns. What lies outside its clip is cut off.

    starts, sizes, seeds, rates [C]: as in LabelRule; steps [C]: how many task steps each has; onset [C]: whether its
    first frame alone is positive of an event (else every frame).
    """

    def events(end: Ints) -> Mask:
        heads = (turns.role == ROLES.index(role) for role in ROLE_OF.values())
        return np.stack([mark(Ranges(turns.owner[m], turns.start[m], end[m]), starts, sizes) for m in heads])

    updates = np.bincount(turns.owner[turns.role == ROLES.index("DST_UPDATE")], minlength=len(sizes))
    spans, short = events(turns.end), onset.any()
    onset_end = np.where(onset[turns.owner], np.minimum(turns.start + 1, turns.end), turns.end)
    positives = events(onset_end) if short else spans
    onset_rest = spans & np.repeat(onset, sizes) if short else None
    nobody = mark(unlabelled, starts, sizes) if len(unlabelled.owner) else None
    return LabelRule(starts, sizes, seeds, rates, (steps > 0) | (updates > 0), positives, onset_rest, nobody)


def end_to_end(first: Ints, sizes: Ints) -> Ints:
    """int64 [F]: first, first + 1, ... of each range of `sizes` numbers, end to end."""
    frames: Ints = np.arange(sizes.sum()) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    return frames


def mark(ranges: Ranges, starts: Ints, sizes: Ints) -> Mask:
    """bool [F]: frames inside any of the ranges, cut to their clips; starts, sizes [C]: those of the clips."""
    low, size, offset = (of_clip[ranges.owner] for of_clip in (starts, sizes, np.cumsum(sizes) - sizes))
    first = offset + np.clip(ranges.start - low, 0, size)
    last = np.maximum(offset + np.clip(ranges.end - low, 0, size), first)
    order = np.argsort(first, kind="stable")
    first, last = first[order], np.maximum.accumulate(last[order])
    first[1:] = np.maximum(first[1:], last[:-1])  # now they are disjoint and ascending
    marked = np.zeros(sizes.sum(), bool)
    marked[end_to_end(first, last - first)] = True
    return marked


def epoch_labels(rule: LabelRule, epoch: int, rate: float | None = None) -> Labels:
    """Labels int8 [2, F] of one epoch, at `rate` or (None) at each clip's own.

    Epoch 0 at the clips' own rates gives what Parquet holds; rate 1.0 supervises every frame, as evaluation does.
    """
    rates = rule.rates.tolist() if rate is None else [rate] * len(rule.sizes)
    thresholds = np.array([rate_threshold(rate) for rate in rates], np.uint64)
    drawn = []
    for own in (slice(first, first + BLOCK) for first in range(0, len(rates), BLOCK)):
        sizes = rule.sizes[own]
        draw = draws(np.repeat(rule.seeds[own], sizes), epoch, end_to_end(rule.starts[own], sizes))
        drawn.append(draw < np.repeat(thresholds[own], sizes))
    supervised = rule.positives[::-1] | np.concatenate(drawn)  # positive for the other head, or drawn
    labels: Labels = (supervised.view(np.int8) - np.int8(1)) * np.int8(-NOT_SAMPLED)  # 1 -> 0, 0 -> -100
    if rule.onset_rest is not None:
        labels[rule.onset_rest] = NOT_SAMPLED
    np.copyto(labels, 1, where=rule.positives)
    if not rule.tracked.all():
        labels[DST_UPDATE, np.repeat(~rule.tracked, rule.sizes)] = NOT_SAMPLED
    if rule.unlabelled is not None:
        labels[:, rule.unlabelled] = NOT_SAMPLED
    return labels


def labels_a_frame(start: Any, end: Any, clip_start: Any, clip_end: Any, positive: str) -> Any:
    """Whether a speaking or DST turn labels a frame of its clip; ints or arrays, with NO_FRAMES where it has none."""
    inside = (start < end) & (start < clip_end) & (end > clip_start)
    return inside & (start >= clip_start) if positive == "onset" else inside


def drops(start: Any, end: Any, clip_start: Any, clip_end: Any, positive: str) -> Ints:
    """[T]: why each speaking or DST turn labels nothing, as an index into DROP_REASONS; -1: it labels."""
    outside = (end <= clip_start) | (start >= clip_end)
    silent = np.logical_not(labels_a_frame(start, end, clip_start, clip_end, positive))
    return np.select((end == NO_FRAMES[1], end <= start, outside, silent), range(len(DROP_REASONS)), -1)
