"""Pure label logic: ranges in, arrays out. No clock, path, randomness or logging.

Three conventions share the field names start_frame/end_frame; `canonical` turns each into the half-open range
of the event's frames, `vote` says which one a set of turns follows. `label_head` then gives 1, 0 or -100 per
frame. Everything works on flat arrays of many clips at once: no loop over frames, turns or clips.

    F frames of a clip, T turns, V voting turns, C clips
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.schema import CONVENTIONS, NOT_SAMPLED, ROLES, draws, rate_threshold

FLOOR_TOLERANCE: Final = 1e-6  # time * fps may fall just short of a whole frame
AGREEMENT: Final = Fraction(9, 10)  # share of turns that a convention must explain
MIN_VOTERS: Final = 5  # fewer say nothing: `event` is assumed
BLOCK = 32  # clips drawn at a time: 20,000 frames stay in the cache; a group of 256 at once takes twice as long
SPEAK, DST = 0, 1  # rows of every [2, ...] array: the two heads
HEADS = {ROLES.index("assistant"): SPEAK, ROLES.index("DST_UPDATE"): DST}  # role code -> the head whose events they are

Labels = npt.NDArray[np.int8]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Events(NamedTuple):
    """One head's event turns: canonical absolute ranges, their clips' bounds, where those begin in the flat frames."""

    start: np.ndarray  # int64 [T]
    end: np.ndarray  # int64 [T]
    bounds: np.ndarray  # int64 [T, 2]
    first: np.ndarray  # int64 [T]


def event_frame(time_s: np.ndarray, fps: np.ndarray) -> np.ndarray:
    """Frame number (float64) [V] that shows second `time_s`: floor(time * fps) with a tolerance."""
    with np.errstate(over="ignore"):
        return np.floor(time_s * fps + FLOOR_TOLERANCE)


def canonical(convention: str, start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Half-open absolute ranges ([T], [T]) of the events whose source fields are `start`, `end`.

    event: as they are. window: end is inclusive. lead-in: the range is the silence before; the event is its
    last frame, end - 1 (at least 0), also where the range is empty because two turns share a time.
    """
    if convention == "window":
        return start, end + 1
    if convention == "lead-in":
        event = np.maximum(end - 1, 0)
        return event, event + 1
    return start, end


def vote(
    clip: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    frame: np.ndarray,
    clip_start: np.ndarray,
    clips: int,
) -> np.ndarray:
    """int64 [C, 4]: per clip its number of voting turns, and how many of them fit lead-in, event, window.

    The voters [V] are the timed, non-system turns with frames, in order; clip [V] is each one's clip, frame
    [V] its event frame, clip_start [C] the clips' first frames before any cutting.
    """
    before = np.empty_like(start)
    before[1:] = end[:-1]
    first = np.ones(len(clip), bool)
    first[1:] = clip[1:] != clip[:-1]
    before[first] = clip_start[clip[first]]
    fits = (
        np.ones(len(clip), bool),
        (start == before) & ((end == frame) | (end == frame + 1)),
        (start <= frame) & (frame < end),
        end == frame,
    )
    return np.stack([np.bincount(clip[fit], minlength=clips) for fit in fits], axis=1)


def decide(votes: np.ndarray) -> str | None:
    """The convention that summed `votes` [4] speak for; None where no rule explains 90% of the turns."""
    total, lead_in, event, window = (int(v) for v in votes)
    if total < MIN_VOTERS:
        return "event"
    for name, count in (("lead-in", lead_in), ("event", event), ("window", window)):
        if count >= AGREEMENT * total:
            return name
    return None


def fitting(convention: str, votes: np.ndarray) -> int:
    """How many of the voting turns follow `convention`."""
    return int(votes[{"lead-in": 1, "event": 2, "window": 3}[convention]])


def cut(start: np.ndarray, end: np.ndarray, bounds: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Absolute ranges ([T], [T]) cut to their clips and moved to where those lie in a flat array of frames.

    bounds [T, 2]: each range's clip, [start, end) absolute; first [T]: position of that clip's first frame.
    Returns int64 [T, 2]; what lies outside its clip becomes empty.
    """
    low, high = bounds[:, 0], bounds[:, 1]
    return np.stack([np.clip(start, low, high), np.clip(end, low, high)], axis=1) + (first - low)[:, None]


def mark(ranges: np.ndarray, frames: int) -> np.ndarray:
    """bool [F]: frames inside any of the half-open `ranges` [T, 2] (reversed ones are empty)."""
    ranges = ranges[ranges[:, 1] > ranges[:, 0]]
    lengths = ranges[:, 1] - ranges[:, 0]
    total = int(lengths.sum())
    if total <= frames:  # events are rare: name their frames
        marked = np.zeros(frames, bool)
        within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        marked[np.repeat(ranges[:, 0], lengths) + within] = True
        return marked
    opened = np.bincount(ranges[:, 0], minlength=frames + 1)
    closed = np.bincount(ranges[:, 1], minlength=frames + 1)
    return np.cumsum(opened - closed)[:frames] > 0


def label_head(positive: np.ndarray, rest: np.ndarray, other: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """int8 labels [F] of one head: 1 where positive; -100 in the rest of an onset's range; else 0 where
    the other head is positive or the frame was drawn; else -100.

    positive, rest, other, drawn: bool [F]; `other` is the other head's positives.
    """
    labels = np.where(other | drawn, np.int8(0), np.int8(NOT_SAMPLED))
    labels[rest] = NOT_SAMPLED
    labels[positive] = 1
    return labels


def label_frames(
    heads: Sequence[Events], drawn: np.ndarray, tracked: np.ndarray, unlabelled: np.ndarray, positive: str
) -> np.ndarray:
    """int8 [2, F]: speaking and DST-update labels of one or many clips, laid end to end.

    heads: the events of each head; drawn, tracked: bool [F], whether the frame's draw is below the rate, and
    whether its clip says anything about the second head (else that is -100); unlabelled [U, 2]: ranges of the flat
    frames that nobody annotated (-100 for both heads); positive: `span` or `onset`.
    """
    positives, rests = [], []
    for start, end, bounds, first in heads:
        spanned = mark(cut(start, end, bounds, first), len(drawn))
        hits = spanned
        if positive == "onset":
            hits = mark(cut(start, np.minimum(start + 1, end), bounds, first), len(drawn))
        positives.append(hits)
        rests.append(spanned & ~hits)
    labels = np.stack([label_head(positives[h], rests[h], positives[1 - h], drawn) for h in (0, 1)])
    labels[1, ~tracked] = NOT_SAMPLED
    if len(unlabelled):
        labels[:, mark(unlabelled, len(drawn))] = NOT_SAMPLED
    return labels


DROP_REASONS: Final = ("no frames", "empty range", "outside the clip", "onset outside the clip")


def drops(
    start: np.ndarray, end: np.ndarray, clip_start: np.ndarray, clip_end: np.ndarray, positive: str
) -> np.ndarray:
    """int8 [T]: why each speaking or DST turn labels nothing, as an index into DROP_REASONS; -1: it labels.

    start, end: canonical ranges, start -1 and end -2 for a turn without frames; clip_*: its clip's bounds.
    """
    reason = np.full(len(start), -1, np.int8)
    if positive == "onset":
        reason[(start < clip_start) | (start >= clip_end)] = 3
    reason[(end <= clip_start) | (start >= clip_end)] = 2
    reason[end <= start] = 1
    reason[end == NO_FRAMES[1]] = 0
    return reason


NO_FRAMES: Final = (-1, -2)  # (start, end) of a turn without frames; no real range is reversed
assert set(CONVENTIONS) == {"lead-in", "event", "window"}


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
