"""Event metrics: precision, recall, F1 and latency of speech or state updates, matched in time. Needs no text.

References are turns, one per instant; predictions are frames at which the score reaches the threshold, each followed by
silence for the refractory time, or what a free-running model did. Both are matched one to one in a window of seconds
around the reference (2 s early to 4 s late; ProAssist's is the other way round, docs/prior-work.md): the most matches,
then the least sum of |latency|. Thresholds, metronomes and F1 by window or group need the number of matches alone.

    C clips    E reference events    P predicted events    F frames of a clip    M matches    W widths of the window
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from pipeline.dataset import ClipExample, Split, Turn
from pipeline.labels import labels_a_frame
from pipeline.schema import ROLE_OF
from trainer.config import Settings
from trainer.evaluation.bootstrap import draw_recordings, interval_of
from trainer.evaluation.frame_metrics import Mask, between, plain, ratio
from trainer.evaluation.scores import Floats, Ints, ScoredClip

TOLERANCE: Final = 1e-6  # seconds: frame / fps and a turn's time are not exact
FAR: Final = 1e-3  # seconds: more than any rounding, less than any frame
CUTS: Final = 50  # thresholds tried, twice: coarsely over all ranks, then finely around the best
PHASES: Final = np.arange(8) / 8  # of a metronome's period
WIDTHS: Final = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)  # seconds of a window
MOST_GROUPS: Final = 50  # data sets, or tasks, those with most speech


def is_event(turn: Turn, clip: ClipExample) -> bool:
    """Whether the turn labels a frame of the clip: it has frames, some inside; under `onset` its first is."""
    if turn.start_frame is None or turn.end_frame is None:
        return False
    return bool(labels_a_frame(turn.start_frame, turn.end_frame, clip.start_frame, clip.end_frame, clip.positive))


def instant(turn: Turn, clip: ClipExample) -> float:
    """Seconds at which an event turn happens: its time, else its first frame; the clip's start if it began before."""
    assert turn.start_frame is not None
    own = turn.start_frame / clip.fps if turn.time_s is None else turn.time_s
    return max(own, clip.start_frame / clip.fps)


def references(clip: ClipExample, role: str) -> Floats:
    """float64 [E], ascending: the instants at which turns of `role` happen; turns at the same time are one."""
    times = np.sort([instant(turn, clip) for turn in clip.turns if turn.role == role and is_event(turn, clip)])
    return times[np.diff(times, prepend=-np.inf) > TOLERANCE]


def tracked(clip: ClipExample, head: str = "dst_update") -> bool:
    """Whether the head's events can happen in the clip: speech always, updates where it has a dialog state at all."""
    return head == "speaking" or bool(clip.steps) or any(turn.role == "DST_UPDATE" for turn in clip.turns)


def annotated(clip: ClipExample) -> Mask:
    """bool [F]: what a model does at frames that nobody annotated is neither right nor wrong."""
    known = np.ones(clip.num_frames, bool)
    for start, end in clip.unlabelled:
        known[max(0, start - clip.start_frame) : max(0, end - clip.start_frame)] = False
    return known


def predicted_frames(scored: ScoredClip, head: str, threshold: float | None, refractory_s: float) -> Ints:
    """int64 [P], ascending: the absolute, annotated frames at which the model acted, or its score makes an event."""
    actions: Sequence[object] | None = scored.said if head == "speaking" else scored.updates
    if actions is None:
        assert threshold is not None
        frames = threshold_frames(scored, head, threshold, refractory_s)
    else:
        frames = np.flatnonzero([action is not None for action in actions])
    return frames[annotated(scored.clip)[frames]] + scored.clip.start_frame


def threshold_frames(scored: ScoredClip, head: str, threshold: float, refractory_s: float) -> Ints:
    """int64 [P], ascending, from the clip's start: the first frame that fires, then each after the refractory time."""
    hot = np.flatnonzero(scored.logits[head].astype(np.float64) >= threshold)
    gap = max(1, math.ceil((refractory_s - TOLERANCE) * scored.clip.fps))
    following = np.searchsorted(hot, hot + gap).tolist()
    kept, i = [], 0
    while i < len(following):
        kept.append(i)
        i = following[i]
    return hot[kept]


def match(reference: Floats, predicted: Floats, early_s: float, late_s: float) -> tuple[Ints, Ints]:
    """(indices into `reference`, into `predicted`) [M], both ascending inputs: the most matches, then the nearest.

    Matches never cross: uncrossing two keeps both inside their windows and brings neither further off. References whose
    windows share no prediction are assigned apart.
    """
    rows, columns = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    cuts = np.flatnonzero(np.diff(reference) > early_s + late_s + 4 * FAR) + 1
    for part in np.split(np.arange(len(reference)), cuts) if len(reference) else []:
        own = reference[part]
        first, end = np.searchsorted(predicted, [own[0] - early_s - FAR, own[-1] + late_s + FAR])
        latency = predicted[None, first:end] - own[:, None]
        fits = (latency >= -early_s - TOLERANCE) & (latency <= late_s + TOLERANCE)
        bonus = (len(own) + 1) * (max(early_s, late_s) + 1.0)  # outweighs all latencies together
        row, column = linear_sum_assignment(np.where(fits, np.abs(latency) - bonus, 0.0))
        kept = fits[row, column]
        rows.append(part[row[kept]])
        columns.append(np.sort(column[kept]) + first)
    return np.concatenate(rows), np.concatenate(columns)


class Counted(NamedTuple):
    """Counts by clip, of events or of state changes."""

    clips: list[ScoredClip]  # [C] by clip_id
    counts: Sequence[dict[str, Any]]  # [C] of the same names
    latencies: Sequence[Floats]  # [C] of [M] seconds, prediction minus reference

    def table(self) -> Floats:
        """[C, K] for K counts."""
        return np.array([list(count.values()) for count in self.counts], np.float64)

    def sums(self) -> dict[str, Any]:
        return dict(zip(self.counts[0], self.table().sum(0), strict=True))


def find_events(clips: Sequence[ScoredClip], head: str, threshold: float | None, settings: Settings) -> Counted | None:
    """The events of one head; None where no clip has such events, or scores or a threshold are missing."""
    chosen = [s for s in clips if tracked(s.clip, head)]
    live = all((s.said if head == "speaking" else s.updates) is not None for s in chosen)
    if not chosen or not (live or (threshold is not None and all(head in s.logits for s in chosen))):
        return None
    counted = (_count_events(scored, head, threshold, settings) for scored in chosen)
    return Counted(chosen, *zip(*counted, strict=True))  # type: ignore[arg-type]


def _count_events(
    scored: ScoredClip, head: str, threshold: float | None, settings: Settings
) -> tuple[dict[str, Any], Floats]:
    """(the clip's counts, the latencies of its matches [M])"""
    clip, early, late = scored.clip, settings.early_s, settings.late_s
    reference = references(clip, ROLE_OF[head])
    predicted = predicted_frames(scored, head, threshold, settings.refractory_s) / clip.fps
    own, near = match(reference, predicted, early, late)
    unmatched = np.delete(predicted, near)
    last = np.searchsorted(reference, unmatched + early + TOLERANCE, side="right")
    first = np.searchsorted(reference, unmatched - late - TOLERANCE, side="left")
    reacts_to, reacts = (_reactive(clip, times, settings.reactive_s) for times in (reference, predicted))
    start, end = clip.start_frame / clip.fps, clip.end_frame / clip.fps
    unlabelled = np.array(clip.unlabelled, np.float64).reshape(-1, 2) / clip.fps
    opened = np.clip(np.concatenate([reference - early, unlabelled[:, 0]]), start, end)
    closed = np.clip(np.concatenate([reference + late, unlabelled[:, 1]]), start, end)
    order = np.argsort(opened, kind="stable")
    opened, closed = opened[order], np.maximum.accumulate(closed[order])
    opened[1:] = np.maximum(opened[1:], closed[:-1])  # where windows overlap, time counts once
    counts = {
        "references": len(reference),
        "predictions": len(predicted),
        "matched": len(own),
        "duplicates": (last > first).sum(),  # unmatched, inside the window of some reference
        "false_alarms": (last <= first).sum(),  # unmatched, in no window
        # in no reference's window, and annotated
        "quiet_hours": max(0.0, end - start - float(np.maximum(closed - opened, 0).sum())) / 3600,
        "reactive_references": reacts_to.sum(),
        "reactive_found": reacts_to[own].sum(),  # of these references, matched
        "reactive_predictions": reacts.sum(),
        "reactive_right": reacts[near].sum(),  # of these predictions, matched
    }
    return counts, predicted[near] - reference[own]


def _reactive(clip: ClipExample, times: Floats, reactive_s: float) -> Mask:
    """bool, as `times`: a user turn began (its first frame or its time) at that moment or up to `reactive_s` before."""
    reacts = np.zeros(len(times), bool)
    for turn in clip.turns:
        frame_time = None if turn.start_frame is None else turn.start_frame / clip.fps
        begins = [t for t in (frame_time, turn.time_s) if t is not None]
        if turn.role == "user" and begins:
            reacts |= (times >= min(begins) - TOLERANCE) & (times <= max(begins) + reactive_s + TOLERANCE)
    return reacts


def event_rates(c: dict[str, Any]) -> dict[str, Any]:
    """Rates from summed counts, numbers or arrays; NaN where undefined. f1 is 0 for a model that is always silent.

    Of reactive and of proactive events, recall goes by the reference's kind, precision by the prediction's; their f1 is
    the harmonic mean, 0 where one is 0 or undefined.
    """
    rates: dict[str, Any] = {
        "precision": ratio(c["matched"], c["predictions"]),
        "recall": ratio(c["matched"], c["references"]),
        "f1": ratio(2 * c["matched"], c["references"] + c["predictions"]),
        "duplicates_per_event": ratio(c["duplicates"], c["references"]),
        "false_alarms_per_quiet_hour": ratio(c["false_alarms"], c["quiet_hours"]),
    }
    reactive = [c[f"reactive_{name}"] for name in ("references", "found", "predictions", "right")]
    everything = [c[name] for name in ("references", "matched", "predictions", "matched")]
    proactive = [total - part for total, part in zip(everything, reactive, strict=True)]
    for kind, (due, hits, predicted, right) in (("reactive", reactive), ("proactive", proactive)):
        recall, precision = ratio(hits, due), ratio(right, predicted)
        f1 = np.nan_to_num(ratio(2 * recall * precision, recall + precision))
        f1 = np.where(np.isnan(recall) & np.isnan(precision), np.nan, f1)
        rates[kind] = {"precision": precision, "recall": recall, "f1": f1}
    return rates


def report_events(events: Counted) -> dict[str, Any]:
    """Counts and rates, plain numbers, None where undefined."""
    sums, latencies = events.sums(), np.concatenate(events.latencies)
    counts = {name: float(n) if name == "quiet_hours" else int(n) for name, n in sums.items()}
    median = float(np.median(latencies)) if len(latencies) else None
    return counts | plain(event_rates(sums)) | {"median_latency_s": median}


# ---- choosing by the number of matches ---------------------------------------------------------------


class Target(NamedTuple):
    """One clip's references, for counting matches alone."""

    clip: ClipExample
    windows: Ints  # [up to E, 2] first and last frame, from the clip's start, at which a reference may be matched
    references: int  # E
    annotated: Mask  # [F]


def targets_of(clips: Iterable[ClipExample], head: str, settings: Settings) -> list[Target]:
    """Of the clips in which the head's events can happen."""
    targets = []
    for clip in (clip for clip in clips if tracked(clip, head)):
        times = references(clip, ROLE_OF[head])
        first = np.ceil((times - settings.early_s - TOLERANCE) * clip.fps) - clip.start_frame
        last = np.floor((times + settings.late_s + TOLERANCE) * clip.fps) - clip.start_frame
        windows = np.stack([np.maximum(first, 0), np.minimum(last, clip.num_frames - 1)], axis=1).astype(np.int64)
        targets.append(Target(clip, windows[windows[:, 0] <= windows[:, 1]], len(times), annotated(clip)))
    return targets


def most_matches(windows: Ints, fired: Ints) -> int:
    """How many of the ascending `fired` can be matched one to one to `windows` (first and last ascending)."""
    ends, events = windows.tolist(), fired.tolist()
    i = j = matched = 0
    while i < len(ends) and j < len(events):
        if events[j] < ends[i][0]:
            j += 1
        elif events[j] > ends[i][1]:
            i += 1
        else:
            i, j, matched = i + 1, j + 1, matched + 1
    return matched


def _f1(targets: Sequence[Target], fired: Iterable[Ints]) -> float:
    """Event F1 of each clip's ascending frames, from its start."""
    matched = events = 0
    for target, frames in zip(targets, fired, strict=True):
        known = frames[target.annotated[frames]]
        matched += most_matches(target.windows, known)
        events += target.references + len(known)
    return 2 * matched / events


def best_event_threshold(clips: Sequence[ScoredClip], head: str, settings: Settings) -> float | None:
    """The threshold of the best event F1, the highest of equals; None without scores or references.

    CUTS thresholds between scores are tried, spread over the ranks of all frames by equal ratios (dense among the
    highest scores), then as many between the neighbours of the best.
    """
    clips = [scored for scored in clips if tracked(scored.clip, head)]
    targets = targets_of([scored.clip for scored in clips], head, settings)
    total = sum(target.references for target in targets)
    if not total or any(head not in scored.logits for scored in clips):
        return None
    rising, counts = np.unique(np.concatenate([scored.logits[head] for scored in clips]), return_counts=True)
    if len(rising) == 1:
        return between(float(rising[0]), float(rising[0]))
    fired = np.cumsum(counts[:0:-1])  # frames that reach each score, the highest first; the lowest is no cut

    def threshold(cut: int) -> float:
        return between(float(rising[-1 - cut]), float(rising[-2 - cut]))

    @cache
    def f1(cut: int) -> float:
        return _f1(targets, (threshold_frames(s, head, threshold(cut), settings.refractory_s) for s in clips))

    def spread(low: int, high: int) -> list[int]:
        ranks = np.round(np.geomspace(low, max(low, high), CUTS))
        return sorted(set(np.minimum(np.searchsorted(fired, ranks), len(fired) - 1).tolist()))

    coarse = spread(max(1, total // 8), int(fired[-1]))
    i = coarse.index(max(coarse, key=f1))
    low, high = (int(fired[coarse[i - 1]]) if i else 1), int(fired[coarse[min(i + 1, len(coarse) - 1)]])
    return threshold(max(sorted({*coarse, *spread(low, high)}), key=f1))


@dataclass(frozen=True, order=True)
class Beat:
    """A metronome, which sees nothing: the time between two ticks, and how much of it goes before the first."""

    period_s: float
    phase: float  # 0 to 1

    def ticks(self, clip: ClipExample) -> Ints:
        """int64, ascending: the frames at which it speaks, from the clip's start."""
        period = self.period_s * clip.fps
        count = math.ceil((clip.num_frames - 0.5) / period - self.phase)
        ticks = np.floor((self.phase + np.arange(max(0, count))) * period + 0.5).astype(np.int64)
        return ticks[ticks < clip.num_frames]  # rounding may have counted one more

    def f1(self, clips: Iterable[ClipExample], head: str, settings: Settings) -> float | None:
        """Event F1; None without any reference."""
        targets = targets_of(clips, head, settings)
        some = any(target.references for target in targets)
        return _f1(targets, (self.ticks(target.clip) for target in targets)) if some else None


def best_beat(clips: Iterable[ClipExample], head: str, settings: Settings) -> Beat | None:
    """The metronome of the best event F1: its period from the refractory time to a minute, coarsely, then finely around
    the best; of equals the longer. None without any event."""
    targets = targets_of(clips, head, settings)
    references = sum(target.references for target in targets)
    if not references:
        return None
    windows = np.full((max(len(target.windows) for target in targets), len(targets), 2), -1.0)  # no frame: none there
    for i, target in enumerate(targets):
        windows[: len(target.windows), i] = target.windows
    numbers = [(t.clip.num_frames, t.clip.fps, t.annotated.mean()) for t in targets]
    sizes, fps, known = np.array(numbers).T[..., None]  # [C, 1] each

    def f1(period_s: float) -> tuple[float, Beat]:
        """Of the best phase."""
        period = period_s * fps  # frames
        predicted = (known * np.ceil((sizes - 0.5) / period - PHASES)).sum(0)  # [T]
        matched, last = np.zeros(len(PHASES)), np.full((len(targets), len(PHASES)), -1.0)  # last: the tick used last
        for first, end in np.moveaxis(windows, 2, 1)[..., None]:  # of the E events
            tick = np.maximum(np.ceil((first - 0.5) / period - PHASES), last + 1)
            hit = (np.floor((tick + PHASES) * period + 0.5) <= end) & (end >= 0)
            last = np.where(hit, tick, last)
            matched += hit.sum(0)
        scores = 2 * matched / (references + predicted)
        best = int(scores.argmax())
        return float(scores[best]), Beat(period_s, float(PHASES[best]))

    shortest = max(settings.refractory_s, 0.5)
    coarse = max(map(f1, np.unique(np.round(np.geomspace(shortest, 60, 60) * 2) / 2).tolist()))
    fine = np.arange(-9, 10) * 0.05 + coarse[1].period_s
    return max([coarse, *map(f1, fine[fine >= shortest - TOLERANCE].tolist())])[1]


# ---- event F1 of speaking taken apart ------------------------------------------------------------------


def windows(settings: Settings) -> dict[float, Settings]:
    """Width in seconds -> the settings at that width, split into early and late as their own is; ascending [W]."""
    own = settings.early_s + settings.late_s
    share = settings.early_s / own if own else 0.5
    made = {w: replace(settings, early_s=w * share, late_s=w * (1 - share)) for w in WIDTHS}
    return dict(sorted((made | {own: settings}).items()))


def count_matches(clips: Sequence[ScoredClip], threshold: float | None, settings: Settings) -> Ints | None:
    """int64 [1 + W, C]: references and predictions together, then the matches at each width.

    The threshold stays the one that was chosen at the settings' own window. None without one, unless free-running.
    """
    if threshold is None and any(scored.said is None for scored in clips):
        return None
    fired = [predicted_frames(s, "speaking", threshold, settings.refractory_s) - s.clip.start_frame for s in clips]
    targets = [targets_of([s.clip for s in clips], "speaking", at) for at in windows(settings).values()]
    events = [target.references + len(own) for target, own in zip(targets[0], fired, strict=True)]
    matched = [[most_matches(t.windows, own) for t, own in zip(of_width, fired, strict=True)] for of_width in targets]
    return np.array([events, *matched])


@cache
def metronomes(test: Split, val: Split | None, settings: Settings) -> dict[float, float | None]:
    """Width -> the event F1 on test of the metronome that is best on val at that width."""
    if val is None:
        return {}
    on_val, on_test = (list(split.in_order()) for split in (val, test))
    beats = {width: (best_beat(on_val, "speaking", at), at) for width, at in windows(settings).items()}
    return {width: beat.f1(on_test, "speaking", at) if beat else None for width, (beat, at) in beats.items()}


def window_rows(
    matches: Mapping[tuple[str, str], Mapping[int, Ints]], settings: Settings, beside: Mapping[float, float | None]
) -> Iterator[dict[str, Any]]:
    """By (rung, mode) and seed, with the result of `count_matches`: event F1 at each width, with the metronome's."""
    for (rung, mode), of_seeds in matches.items():
        for seed, counts in of_seeds.items():
            events, *matched = counts.sum(axis=1)
            for (width, at), hits in zip(windows(settings).items(), matched, strict=True):
                row = {"rung": rung, "seed": seed, "mode": mode, "width_s": width, "early_s": at.early_s}
                f1 = float(ratio(2 * hits, events))
                yield row | {"late_s": at.late_s, "f1": f1, "metronome_f1": beside.get(width)}


def group_rows(
    matches: Mapping[tuple[str, str], Mapping[int, Ints]], split: Split, settings: Settings, draws: int
) -> Iterator[dict[str, Any]]:
    """By data set and by task, (rung, mode): event F1 at the settings' window, with its interval over recordings."""
    clips = sorted(split.in_order(), key=lambda clip: clip.clip_id)
    own = 1 + [*windows(settings)].index(settings.early_s + settings.late_s)
    speech = np.array([target.references for target in targets_of(clips, "speaking", settings)])
    for by, names in (("dataset", [c.dataset for c in clips]), ("task", [c.goal or "(none given)" for c in clips])):
        members = {name: np.flatnonzero([name == other for other in names]) for name in sorted(set(names))}
        for name in sorted(members, key=lambda name: (-speech[members[name]].sum(), name))[:MOST_GROUPS]:
            group = members[name]
            ids, of_clip = np.unique([clips[i].recording_id for i in group], return_inverse=True)
            weights = np.concatenate([np.ones((1, len(ids)), np.int64), draw_recordings(len(ids), draws)])
            for (rung, mode), of_seeds in matches.items():
                matched, events = (  # [S, R]
                    np.stack([np.bincount(of_clip, run[row][group], len(ids)) for run in of_seeds.values()])
                    for row in (own, 0)
                )
                f1 = ratio(2 * matched @ weights.T, events @ weights.T)
                row = {"by": by, "group": name, "rung": rung, "mode": mode, "seeds": len(f1), "recordings": len(ids)}
                yield row | {"events": int(speech[group].sum())} | asdict(interval_of(f1, len(ids), (0.0, 1.0)))
