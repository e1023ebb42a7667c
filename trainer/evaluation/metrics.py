"""Everything that is said about one model in one mode: `measure` gives the metrics JSON, `estimators` the same scalars
under a bootstrap's weights.

Thresholds are chosen on `val` and handed in; nothing here looks for one on the clips that it measures. Each estimator
reads sums per recording, or ranks sorted once: 10,000 draws of all metrics over 5,000 frames take 0.13 s. At weights 1
an estimator equals the number in the JSON.

    B draws    R recordings    M matches
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from trainer.config import Settings
from trainer.evaluation.event_metrics import (
    Counts,
    Events,
    best_event_threshold,
    best_metronome,
    event_rates,
    find_events,
    metronome_f1,
    proactive_rates,
    reactive_rates,
    report_events,
)
from trainer.evaluation.frame_metrics import (
    Estimator,
    HeadFrames,
    Ranking,
    alone,
    best_threshold,
    bin_sums,
    cells,
    confusion,
    confusion_rates,
    expected_calibration_error,
    head_frames,
    recordings_of,
    report_frames,
)
from trainer.evaluation.scores import HEADS, Floats, Ints, ScoredClip, canonical
from trainer.evaluation.state_metrics import StateCounts, find_states, report_states, state_rates

__all__ = ["METRICS", "Estimator", "Metric", "Settings", "Thresholds", "choose_thresholds", "estimators", "measure"]


@dataclass(frozen=True)
class Thresholds:
    """Logits by head, chosen on `val` alone: for single frames, and for events. A head without one is left out."""

    frame: dict[str, float]
    event: dict[str, float]
    metronome_s: dict[str, float] = field(default_factory=dict)  # the best period of one that sees nothing, seconds


@dataclass(frozen=True)
class Metric:
    """A scalar that arms are compared by."""

    name: str
    label: str
    unit: str  # "" for shares
    higher_is_better: bool
    head: str | None  # 'speaking', 'dst_update', or None: the state
    path: tuple[str, ...]  # in what `measure` returns
    bounds: tuple[float, float] | None = (0.0, 1.0)  # what it can be; None: anything


_EVENTS, _FRAMES = ("speaking", "events"), ("speaking", "frames")
METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("event_f1", "event F1", "", True, "speaking", (*_EVENTS, "f1")),
        Metric("event_precision", "event precision", "", True, "speaking", (*_EVENTS, "precision")),
        Metric("event_recall", "event recall", "", True, "speaking", (*_EVENTS, "recall")),
        Metric("event_f1_reactive", "event F1, reactive", "", True, "speaking", (*_EVENTS, "reactive", "f1")),
        Metric("event_f1_proactive", "event F1, proactive", "", True, "speaking", (*_EVENTS, "proactive", "f1")),
        Metric("false_alarms_per_quiet_hour", "false alarms per quiet hour", "/h", False, "speaking",
               (*_EVENTS, "false_alarms_per_quiet_hour"), (0.0, math.inf)),
        Metric("duplicates_per_event", "duplicates per event", "", False, "speaking",
               (*_EVENTS, "duplicates_per_event"), (0.0, math.inf)),
        Metric("median_latency_s", "median latency", "s", False, "speaking", (*_EVENTS, "median_latency_s"), None),
        Metric("speaking_ap", "speaking AP", "", True, "speaking", (*_FRAMES, "ap")),
        Metric("speaking_auroc", "speaking AUROC", "", True, "speaking", (*_FRAMES, "auroc")),
        Metric("speaking_f1", "speaking frame F1", "", True, "speaking", (*_FRAMES, "f1")),
        Metric("speaking_balanced_accuracy", "speaking balanced accuracy", "", True, "speaking",
               (*_FRAMES, "balanced_accuracy")),
        Metric("speaking_ece", "speaking calibration error", "", False, "speaking", (*_FRAMES, "calibration", "ece")),
        Metric("speaking_ap_alone", "speaking AP without DST frames", "", True, "speaking", (*_FRAMES, "alone", "ap")),
        Metric("dst_ap", "DST AP", "", True, "dst_update", ("dst_update", "frames", "ap")),
        Metric("dst_event_f1", "DST event F1", "", True, "dst_update", ("dst_update", "events", "f1")),
        Metric("joint_state_accuracy", "joint state accuracy", "", True, None, ("state", "joint_accuracy")),
        Metric("transition_f1", "transition F1", "", True, None, ("state", "transitions", "f1")),
    )
}  # fmt: skip


def choose_thresholds(val: Sequence[ScoredClip], settings: Settings) -> Thresholds:
    """The thresholds of the best frame F1 and of the best event F1 on `val`; ties go to the higher.

    A head without scores, or without a positive frame (an event) on `val`, gets none.
    """
    frame: dict[str, float] = {}
    event: dict[str, float] = {}
    metronome_s: dict[str, float] = {}
    for head in HEADS:
        frames = head_frames(val, head, recordings_of(val))
        best = None if frames is None else best_threshold(frames.scores, frames.positive)
        if best is not None:
            frame[head] = best
        best = best_event_threshold(val, head, settings)
        if best is not None:
            event[head] = best
        best = best_metronome(val, head, settings)
        if best is not None:
            metronome_s[head] = best
    return Thresholds(frame, event, metronome_s)


def measure(clips: Sequence[ScoredClip], thresholds: Thresholds | None, settings: Settings) -> dict[str, Any]:
    """The metrics JSON: plain types, None where undefined; the same digits in whatever order the clips come.

    Without thresholds, what needs one is None; live clips (`said`, `updates`) need none for their events.
    """
    clips = canonical(clips)
    recordings = recordings_of(clips)
    report: dict[str, Any] = {
        "clips": len(clips),
        "recordings": len(recordings),
        "frames": sum(scored.clip.num_frames for scored in clips),
        "hours": sum(scored.clip.num_frames / scored.clip.fps for scored in clips) / 3600,
        "cells": cells(clips),
    }
    for head in HEADS:
        frames = head_frames(clips, head, recordings)
        cut, at = _thresholds(thresholds, head)
        events = find_events(clips, head, at, settings)
        report[head] = {
            "frames": None if frames is None else report_frames(frames, cut, settings.bins),
            "events": None
            if events is None
            else report_events(events, head, at) | _metronome(clips, head, thresholds, settings),
        }
    states = find_states(clips, settings)
    return report | {"state": None if states is None else report_states(states)}


def _metronome(
    clips: Sequence[ScoredClip], head: str, thresholds: Thresholds | None, settings: Settings
) -> dict[str, Any]:
    """What one gets who sees nothing, at the period that was best on val."""
    period = None if thresholds is None else thresholds.metronome_s.get(head)
    if period is None:
        return {"metronome": None}
    return {"metronome": {"period_s": period, "f1": metronome_f1(clips, head, period, settings)}}


def look_up(report: dict[str, Any], metric: Metric) -> float | None:
    """The metric's value in what `measure` returned."""
    found: Any = report
    for key in metric.path:
        found = None if found is None else found[key]
    return None if found is None else float(found)


def _thresholds(thresholds: Thresholds | None, head: str) -> tuple[float | None, float | None]:
    """(for frames, for events)"""
    return (None, None) if thresholds is None else (thresholds.frame.get(head), thresholds.event.get(head))


# ---- under weights -----------------------------------------------------------------------------------


def estimators(
    clips: Sequence[ScoredClip], thresholds: Thresholds | None, settings: Settings, recordings: Sequence[str]
) -> dict[str, Estimator]:
    """Each of METRICS as a function of how often each recording is drawn.

    recordings: sorted and unique, all that the clips are of. An estimator takes int64 [B, R] and gives float64 [B],
    NaN where a draw leaves it undefined; throughout, where `measure` gives None.
    """
    clips = canonical(clips)
    found: dict[str, Estimator] = {}
    for head, prefix in zip(HEADS, ("speaking", "dst"), strict=True):
        cut, at = _thresholds(thresholds, head)
        frames = head_frames(clips, head, recordings)
        if frames is not None:
            found |= _of_frames(frames, cut, settings.bins, prefix)
        events = find_events(clips, head, at, settings)
        if events is not None:
            found |= _of_events(events, recordings, "event" if head == "speaking" else "dst_event")
    states = find_states(clips, settings)
    if states is not None:
        sums = _Sums(states.counts, _recording(states.clips, recordings), len(recordings))
        found["joint_state_accuracy"] = lambda w: state_rates(StateCounts(*sums(w)))["joint_accuracy"]
        found["transition_f1"] = lambda w: state_rates(StateCounts(*sums(w)))["f1"]
    return {name: found.get(name, _undefined) for name in METRICS}


def _undefined(weights: Ints) -> Floats:
    return np.full(len(weights), np.nan)


def _of_frames(frames: HeadFrames, threshold: float | None, bins: int, prefix: str) -> dict[str, Estimator]:
    ranking, apart = Ranking(frames), Ranking(alone(frames))
    counts, in_bins = confusion(frames, threshold), bin_sums(frames, bins)
    found: dict[str, Estimator] = {
        f"{prefix}_ap": ranking.average_precision,
        f"{prefix}_auroc": ranking.auroc,
        f"{prefix}_ap_alone": apart.average_precision,
        f"{prefix}_f1": lambda w: confusion_rates(w @ counts)["f1"],
        f"{prefix}_balanced_accuracy": lambda w: confusion_rates(w @ counts)["balanced_accuracy"],
    }
    if in_bins is not None:
        sums = in_bins
        found[f"{prefix}_ece"] = lambda w: expected_calibration_error(np.tensordot(w.astype(np.float64), sums, 1))
    return found


def _of_events(events: Events, recordings: Sequence[str], prefix: str) -> dict[str, Estimator]:
    recording = _recording(events.clips, recordings)
    sums = _Sums(events.counts, recording, len(recordings))
    rates: dict[str, Estimator] = {
        f"{prefix}_f1": lambda w: event_rates(Counts(*sums(w)))["f1"],
    }
    if prefix != "event":
        return rates
    return rates | {
        "event_precision": lambda w: event_rates(Counts(*sums(w)))["precision"],
        "event_recall": lambda w: event_rates(Counts(*sums(w)))["recall"],
        "event_f1_reactive": lambda w: reactive_rates(Counts(*sums(w)))["f1"],
        "event_f1_proactive": lambda w: proactive_rates(Counts(*sums(w)))["f1"],
        "false_alarms_per_quiet_hour": lambda w: event_rates(Counts(*sums(w)))["false_alarms_per_quiet_hour"],
        "duplicates_per_event": lambda w: event_rates(Counts(*sums(w)))["duplicates_per_event"],
        "median_latency_s": WeightedMedian(events.latencies, recording[events.owner], len(recordings)),
    }


def _recording(clips: Sequence[ScoredClip], recordings: Sequence[str]) -> Ints:
    """int64 [C]: each clip's index into `recordings`."""
    number = {name: i for i, name in enumerate(recordings)}
    return np.array([number[scored.clip.recording_id] for scored in clips], np.int64)


class _Sums:
    """Counts [C, K] of clips, summed per recording once: [B, R] weights give the K sums, [B] each."""

    def __init__(self, counts: Floats, recording: Ints, num_recordings: int) -> None:
        self._of = np.zeros((num_recordings, counts.shape[1]))
        np.add.at(self._of, recording, counts)

    def __call__(self, weights: Ints) -> Floats:
        return (weights.astype(np.float64) @ self._of).T


class WeightedMedian:
    """The median of values that each count as often as their recording is drawn; NaN where none is drawn."""

    def __init__(self, values: Floats, recording: Ints, num_recordings: int) -> None:
        order = np.argsort(values, kind="stable")
        self._values = values[order]
        own = np.arange(num_recordings)[:, None] == recording[order]
        self._up_to = np.cumsum(own, axis=1, dtype=np.int64).T  # [M, R] how many values of each recording up to each

    def __call__(self, weights: Ints) -> Floats:
        if not len(self._values):
            return _undefined(weights)
        total = weights @ self._up_to[-1]
        low, high = (self._values[self._reaching(weights, rank)] for rank in ((total + 1) // 2, total // 2 + 1))
        return np.where(total > 0, (low + high) / 2, np.nan)

    def _reaching(self, weights: Ints, rank: Ints) -> Ints:
        """[B]: the first value up to which at least `rank` have been counted, by bisection."""
        low, high = np.zeros(len(weights), np.int64), np.full(len(weights), len(self._values) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            enough = (weights * self._up_to[middle]).sum(1) >= rank
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return np.minimum(low, len(self._values) - 1)
