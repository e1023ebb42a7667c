"""Event level: did it speak at the right moments, how late, how often for nothing? Needs no text.

References are turns, one per instant; predictions are frames at which a score reaches the threshold, then silence for
the refractory time, or what a live model did. Both are matched one to one inside a window of seconds around the
reference (2 s early to 4 s late; docs/prior-work.md has ProAssist's, which are the other way round): as many as can be,
then with the least sum of |latency|. What can't be read off a matching (ranking, calibration) is the frame level's.

A threshold is chosen by the number of matches alone, found by walking references and predictions once (equal
windows): 14 ms for one threshold on 1,000 clips of 600 frames, where the optimal assignment takes 180.

    C clips    E reference events    P predicted events    F frames of a clip    M matches
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from pipeline.dataset import ClipExample, Turn
from pipeline.labels import labels_a_frame
from pipeline.schema import ROLE_OF
from trainer.config import Settings
from trainer.evaluation.frame_metrics import Mask, between, beyond, fires, plain, ratio
from trainer.evaluation.scores import Floats, Ints, ScoredClip, canonical

TOLERANCE: Final = 1e-6  # seconds: frame / fps and a turn's time are not exact
FAR: Final = 1e-3  # seconds: more than any rounding, less than any frame
CUTS: Final = 50  # thresholds tried, twice: coarsely over all ranks, then finely around the best


# ---- events ------------------------------------------------------------------------------------------


def is_event(turn: Turn, clip: ClipExample) -> bool:
    """Whether the turn labels a frame of the clip: it has frames, some inside; under `onset` its first is."""
    if turn.start_frame is None or turn.end_frame is None:
        return False
    return bool(labels_a_frame(turn.start_frame, turn.end_frame, clip.start_frame, clip.end_frame, clip.positive))


def instant(turn: Turn, clip: ClipExample) -> float:
    """Seconds at which an event turn happens: its time, else its first frame; the clip's start, if it began before."""
    assert turn.start_frame is not None
    own = turn.start_frame / clip.fps if turn.time_s is None else turn.time_s
    return max(own, clip.start_frame / clip.fps)


def references(clip: ClipExample, role: str) -> Floats:
    """float64 [E], ascending: the instants at which turns of `role` happen; co-timed turns are one."""
    times = np.sort([instant(turn, clip) for turn in clip.turns if turn.role == role and is_event(turn, clip)])
    return times[np.diff(times, prepend=-np.inf) > TOLERANCE]


def tracked(clip: ClipExample) -> bool:
    """Whether the clip says anything about the dialog state."""
    return bool(clip.steps) or any(turn.role == "DST_UPDATE" for turn in clip.turns)


def is_live(scored: ScoredClip, head: str) -> bool:
    return (scored.said if head == "speaking" else scored.updates) is not None


def predicted_frames(scored: ScoredClip, head: str, threshold: float | None, refractory_s: float) -> Ints:
    """int64 [P], ascending: the absolute frames at which the model spoke, or its score makes an event.

    Not those that nobody annotated: there is no telling whether they are right.
    """
    clip = scored.clip
    did = scored.said if head == "speaking" else scored.updates
    if did is not None:
        frames = np.flatnonzero([what is not None for what in did]) + clip.start_frame
    else:
        assert threshold is not None
        hot = np.flatnonzero(fires(scored.logits[head], threshold))
        frames = spaced(hot, refractory_frames(clip.fps, refractory_s)) + clip.start_frame
    return frames[annotated(clip)[frames - clip.start_frame]]


def annotated(clip: ClipExample) -> Mask:
    """bool [F]: frames that somebody annotated. What a model does at others is neither right nor wrong."""
    known = np.ones(clip.num_frames, bool)
    for start, end in clip.unlabelled:
        known[max(0, start - clip.start_frame) : max(0, end - clip.start_frame)] = False
    return known


def predictions(scored: ScoredClip, head: str, threshold: float | None, refractory_s: float) -> Floats:
    """float64 [P], ascending: `predicted_frames` in seconds."""
    return predicted_frames(scored, head, threshold, refractory_s) / scored.clip.fps


def refractory_frames(fps: float, refractory_s: float) -> int:
    """The least number of frames from one event to the next, at least 1."""
    return max(1, math.ceil((refractory_s - TOLERANCE) * fps))


def spaced(hot: Ints, gap: int | Ints) -> Ints:
    """Of the ascending positions `hot`, those at which an event fires: the first, then each at least `gap` later."""
    following = np.searchsorted(hot, hot + gap).tolist()
    kept, i = [], 0
    while i < len(following):
        kept.append(i)
        i = following[i]
    return hot[kept]


# ---- matching ----------------------------------------------------------------------------------------


def match(reference: Floats, predicted: Floats, early_s: float, late_s: float) -> tuple[Ints, Ints]:
    """(indices into `reference`, into `predicted`) [M], both ascending inputs: the most matches, then the nearest.

    Matches never cross: uncrossing two keeps both inside their windows and brings neither further off.
    """
    rows, cols = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    cuts = np.flatnonzero(np.diff(reference) > early_s + late_s + 4 * FAR) + 1  # windows that share no prediction
    for part in np.split(np.arange(len(reference)), cuts) if len(reference) else []:
        ends = [reference[part[0]] - early_s - FAR, reference[part[-1]] + late_s + FAR]
        first, end = np.searchsorted(predicted, ends)
        own, near = _assign(reference[part], predicted[first:end], early_s, late_s)
        rows.append(part[own])
        cols.append(near + first)
    return np.concatenate(rows), np.concatenate(cols)


def _assign(reference: Floats, predicted: Floats, early_s: float, late_s: float) -> tuple[Ints, Ints]:
    latency = predicted[None] - reference[:, None]
    fits = (latency >= -early_s - TOLERANCE) & (latency <= late_s + TOLERANCE)
    bonus = (len(reference) + 1) * (max(early_s, late_s) + 1.0)  # outweighs all latencies together
    rows, cols = linear_sum_assignment(np.where(fits, np.abs(latency) - bonus, 0.0))
    kept = fits[rows, cols]
    return rows[kept], np.sort(cols[kept])


def _in_window(reference: Floats, predicted: Floats, settings: Settings) -> Mask:
    """bool [P]: inside the window of some reference."""
    last = np.searchsorted(reference, predicted + settings.early_s + TOLERANCE, side="right")
    first = np.searchsorted(reference, predicted - settings.late_s - TOLERANCE, side="left")
    return last > first


def _quiet(clip: ClipExample, reference: Floats, settings: Settings) -> float:
    """Hours of the clip that lie in no reference's window and that somebody annotated."""
    start, end = clip.start_frame / clip.fps, clip.end_frame / clip.fps
    nobody = np.array(clip.unlabelled, np.float64).reshape(-1, 2) / clip.fps
    opened = np.clip(np.concatenate([reference - settings.early_s, nobody[:, 0]]), start, end)
    closed = np.clip(np.concatenate([reference + settings.late_s, nobody[:, 1]]), start, end)
    order = np.argsort(opened, kind="stable")
    opened, closed = opened[order], np.maximum.accumulate(closed[order])
    opened[1:] = np.maximum(opened[1:], closed[:-1])
    return max(0.0, end - start - float(np.maximum(closed - opened, 0).sum())) / 3600


def reactive(clip: ClipExample, times: Floats, reactive_s: float) -> Mask:
    """bool, as `times`: a user turn began at that moment or up to `reactive_s` before.

    A user turn is heard from its first frame or its time, whichever comes first, as in the model's input.
    """
    reacts = np.zeros(len(times), bool)
    for turn in clip.turns:
        begins = [t for t in (_frame_time(turn, clip), turn.time_s) if t is not None]
        if turn.role == "user" and begins:
            reacts |= (times >= min(begins) - TOLERANCE) & (times <= max(begins) + reactive_s + TOLERANCE)
    return reacts


def _frame_time(turn: Turn, clip: ClipExample) -> float | None:
    return None if turn.start_frame is None else turn.start_frame / clip.fps


# ---- counts ------------------------------------------------------------------------------------------


class Counts(NamedTuple):
    """One clip's events, or any sums of such counts."""

    references: Any
    predictions: Any
    matched: Any
    duplicates: Any  # unmatched, inside the window of some reference
    false_alarms: Any  # unmatched, in no window
    quiet_hours: Any  # outside all windows
    reactive_references: Any = 0
    reactive_found: Any = 0  # of these references, matched
    reactive_predictions: Any = 0
    reactive_right: Any = 0  # of these predictions, matched


@dataclass(frozen=True, eq=False)
class Events:
    """One head's events in all clips: what every event metric is computed from."""

    counts: Floats  # [C, len(Counts)]
    latencies: Floats  # [M] seconds, prediction minus reference
    owner: Ints  # [M] the clip of each latency
    clips: list[ScoredClip]  # [C] by clip_id


def find_events(
    clips: Sequence[ScoredClip], head: str, threshold: float | None, settings: Settings
) -> Events | None:  # fmt: skip
    """The events of one head in the clips that have such; None where it lacks scores, a threshold, or any such clip."""
    chosen = [s for s in canonical(clips) if head == "speaking" or tracked(s.clip)]
    known = all(is_live(s, head) or (threshold is not None and head in s.logits) for s in chosen)
    if not chosen or not known:
        return None
    outcomes = [_outcome(scored, head, threshold, settings) for scored in chosen]
    return Events(
        counts=np.array([counts for counts, _ in outcomes], np.float64),
        latencies=np.concatenate([late for _, late in outcomes]),
        owner=np.repeat(np.arange(len(chosen)), [len(late) for _, late in outcomes]),
        clips=chosen,
    )


def _outcome(scored: ScoredClip, head: str, threshold: float | None, settings: Settings) -> tuple[Counts, Floats]:
    """(the clip's counts, the latencies of its matches [M])"""
    clip = scored.clip
    reference = references(clip, ROLE_OF[head])
    predicted = predictions(scored, head, threshold, settings.refractory_s)
    own, near = match(reference, predicted, settings.early_s, settings.late_s)
    unmatched = np.ones(len(predicted), bool)
    unmatched[near] = False
    close = _in_window(reference, predicted, settings)
    reacts = [reactive(clip, times, settings.reactive_s) for times in (reference, predicted)]
    counts = Counts(
        references=len(reference),
        predictions=len(predicted),
        matched=len(own),
        duplicates=(unmatched & close).sum(),
        false_alarms=(unmatched & ~close).sum(),
        quiet_hours=_quiet(clip, reference, settings),
        reactive_references=reacts[0].sum(),
        reactive_found=reacts[0][own].sum(),
        reactive_predictions=reacts[1].sum(),
        reactive_right=reacts[1][near].sum(),
    )
    return counts, predicted[near] - reference[own]


# ---- numbers -----------------------------------------------------------------------------------------


def event_rates(sums: Counts) -> dict[str, Floats]:
    """Rates from summed counts, elementwise, NaN where undefined.

    f1 is 2 matched / (references + predictions): 0 for a model that is always silent, whose precision is undefined;
    itself undefined only where there is neither reference nor prediction.
    """
    c = sums
    return {
        "precision": ratio(c.matched, c.predictions),
        "recall": ratio(c.matched, c.references),
        "f1": ratio(2 * c.matched, c.references + c.predictions),
        "duplicates_per_event": ratio(c.duplicates, c.references),
        "false_alarms_per_quiet_hour": ratio(c.false_alarms, c.quiet_hours),
    }


def kind_rates(references: Any, found: Any, predictions: Any, right: Any) -> dict[str, Floats]:
    """Of reactive or of proactive events: recall by the reference's kind, precision by the prediction's.

    f1 is their harmonic mean, 0 where one is 0 or undefined, undefined where both are.
    """
    recall, precision = ratio(found, references), ratio(right, predictions)
    filled = np.nan_to_num(recall), np.nan_to_num(precision)
    f1 = np.where(filled[0] * filled[1] > 0, ratio(2 * filled[0] * filled[1], filled[0] + filled[1]), 0.0)
    return {
        "precision": precision,
        "recall": recall,
        "f1": np.where(np.isnan(recall) & np.isnan(precision), np.nan, f1),
    }


def reactive_rates(c: Counts) -> dict[str, Floats]:
    return kind_rates(c.reactive_references, c.reactive_found, c.reactive_predictions, c.reactive_right)


def proactive_rates(c: Counts) -> dict[str, Floats]:
    return kind_rates(
        c.references - c.reactive_references,
        c.matched - c.reactive_found,
        c.predictions - c.reactive_predictions,
        c.matched - c.reactive_right,
    )


def latency_summary(latencies: Floats) -> dict[str, Any]:
    """Median and quartiles, None without a match."""
    if not len(latencies):
        return {"median_latency_s": None, "latency_quartiles_s": None}
    low, high = (float(np.quantile(latencies, q)) for q in (0.25, 0.75))
    return {"median_latency_s": float(np.median(latencies)), "latency_quartiles_s": [low, high]}


def report_events(events: Events, head: str, threshold: float | None) -> dict[str, Any]:
    """Plain numbers, None where undefined; `threshold` is None where all clips are live."""
    sums = Counts(*events.counts.sum(0))
    whole = ("references", "predictions", "matched", "duplicates", "false_alarms")
    live = all(is_live(scored, head) for scored in events.clips)
    report = {
        "live": live,
        "threshold": None if live else threshold,
        **{name: int(getattr(sums, name)) for name in whole},
        "quiet_hours": float(sums.quiet_hours),
        **plain(event_rates(sums)),
        **latency_summary(events.latencies),
    }
    if head == "speaking":
        kinds = {
            "reactive": (sums.reactive_references, sums.reactive_predictions, reactive_rates(sums)),
            "proactive": (
                sums.references - sums.reactive_references,
                sums.predictions - sums.reactive_predictions,
                proactive_rates(sums),
            ),
        }
        for kind, (refs, preds, rates) in kinds.items():
            report[kind] = {"references": int(refs), "predictions": int(preds), **plain(rates)}
    return report


# ---- thresholds --------------------------------------------------------------------------------------


def best_event_threshold(clips: Sequence[ScoredClip], head: str, settings: Settings) -> float | None:
    """The threshold of the best event F1, the highest of equals; None without scores or references.

    It lies between two scores; a head that gives all frames the same score says nothing, and stays silent. CUTS of
    them are tried, spread over the ranks of all frames by equal ratios (dense among the highest scores), then as many
    between the neighbours of the best: at most 2 * CUTS walks of the data.
    """
    chosen = [s for s in canonical(clips) if head == "speaking" or tracked(s.clip)]
    if not chosen or any(head not in scored.logits for scored in chosen):
        return None
    board = _Board(chosen, head, settings)
    if not board.references:
        return None
    rising, counts = np.unique(board.scores, return_counts=True)
    if len(rising) == 1:
        return beyond(float(rising[0]))
    fired = np.cumsum(counts[:0:-1])  # frames that reach each score, the highest first; the lowest is no cut
    coarse = _spread(fired, max(1, board.references // 8), int(fired[-1]))
    tried = {cut: board.f1(_cut(rising, cut)) for cut in coarse}
    i = coarse.index(_best(tried))
    low = int(fired[coarse[i - 1]]) if i else 1
    fine = _spread(fired, low, int(fired[coarse[min(i + 1, len(coarse) - 1)]]))
    tried |= {cut: board.f1(_cut(rising, cut)) for cut in fine if cut not in tried}
    return _cut(rising, _best(tried))


def _best(tried: dict[int, float]) -> int:
    return max(tried, key=lambda cut: (tried[cut], -cut))


def _cut(rising: Floats, cut: int) -> float:
    """The threshold that the `cut` + 1 highest distinct scores reach."""
    return between(float(rising[-1 - cut]), float(rising[-2 - cut]))


def _spread(fired: Ints, low: int, high: int) -> list[int]:
    """Up to CUTS indices of distinct scores, at equal ratios of rank from the `low`-th to the `high`-th frame."""
    ranks = np.round(np.geomspace(low, max(low, high), CUTS)).astype(np.int64)
    return sorted(set(np.minimum(np.searchsorted(fired, ranks), len(fired) - 1).tolist()))


class _Board:
    """All clips end to end, so far apart that neither a refractory time nor a window reaches the next clip."""

    def __init__(self, clips: Sequence[ScoredClip], head: str, settings: Settings) -> None:
        gaps = [refractory_frames(scored.clip.fps, settings.refractory_s) for scored in clips]
        sizes = [scored.clip.num_frames for scored in clips]
        first = np.concatenate([[0], np.cumsum(np.add(sizes, gaps))])
        self.scores = np.concatenate([scored.logits[head] for scored in clips]).astype(np.float64)
        self._gap = np.repeat(gaps, sizes)
        self._at = np.concatenate([np.arange(n) + start for n, start in zip(sizes, first, strict=False)])
        self._annotated = np.zeros(first[-1], bool)
        self._annotated[self._at] = np.concatenate([annotated(scored.clip) for scored in clips])
        windows, self.references = [], 0
        for scored, start in zip(clips, first.tolist(), strict=False):
            instants = references(scored.clip, ROLE_OF[head])
            self.references += len(instants)
            windows.append(_windows(scored.clip, instants, settings) + start)
        self._windows = np.concatenate(windows)

    def f1(self, threshold: float) -> float:
        hot = np.flatnonzero(self.scores >= threshold)
        fired = spaced(self._at[hot], self._gap[hot])
        fired = fired[self._annotated[fired]]
        return 2 * most_matches(self._windows, fired) / (self.references + len(fired))


def _windows(clip: ClipExample, instants: Floats, settings: Settings) -> Ints:
    """int64 [<= E, 2]: the first and last frame, from the clip's start, that each reference may be matched at."""
    first = np.ceil((instants - settings.early_s - TOLERANCE) * clip.fps).astype(np.int64) - clip.start_frame
    last = np.floor((instants + settings.late_s + TOLERANCE) * clip.fps).astype(np.int64) - clip.start_frame
    both = np.stack([np.maximum(first, 0), np.minimum(last, clip.num_frames - 1)], axis=1)
    return both[both[:, 0] <= both[:, 1]]


def most_matches(windows: Ints, fired: Ints) -> int:
    """How many of the ascending `fired` can be matched one to one to `windows` (first and last ascending)."""
    ends, events = windows.tolist(), fired.tolist()
    i = j = found = 0
    while i < len(ends) and j < len(events):
        if events[j] < ends[i][0]:
            j += 1
        elif events[j] > ends[i][1]:
            i += 1
        else:
            i, j, found = i + 1, j + 1, found + 1
    return found


# ---- without seeing ----------------------------------------------------------------------------------


def metronome_f1(clips: Sequence[ScoredClip], head: str, period_s: float, settings: Settings) -> float | None:
    """Event F1 of an assistant that sees nothing and fires every `period_s` seconds: what a model must beat.

    None without any reference. At a wide window and a busy assistant it is high: 0.8 is no feat then.
    """
    found = fired = references_ = 0
    for clip in (scored.clip for scored in clips if head == "speaking" or tracked(scored.clip)):
        gap = max(1, round(period_s * clip.fps))
        ticks = np.arange(gap // 2, clip.num_frames, gap)
        ticks = ticks[annotated(clip)[ticks]]
        instants = references(clip, ROLE_OF[head])
        found += most_matches(_windows(clip, instants, settings), ticks)
        fired, references_ = fired + len(ticks), references_ + len(instants)
    return 2 * found / (references_ + fired) if references_ else None


def best_metronome(clips: Sequence[ScoredClip], head: str, settings: Settings) -> float | None:
    """The period of the best event F1 on `clips`: seconds, from the refractory time to a minute; ties: the longer."""
    periods = sorted({round(2 * s) / 2 for s in np.geomspace(max(settings.refractory_s, 0.5), 60, 40).tolist()})
    tried = {period: metronome_f1(clips, head, period, settings) for period in periods}
    known = {period: f1 for period, f1 in tried.items() if f1 is not None}
    return max(known, key=lambda period: (known[period], period)) if known else None
