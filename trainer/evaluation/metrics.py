"""All metrics of one model in one mode: `measure` gives the metrics JSON, `weighted` its scalars by recording's weight.

Thresholds are chosen on `val` and handed in; nothing here looks for one on the clips that it measures. `weighted` reads
sums per recording, or ranks sorted once; with all weights 1 it equals the numbers in the JSON.

    B draws    R recordings    M matches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import numpy as np

from pipeline.schema import HEADS
from trainer.config import Settings
from trainer.evaluation import event_metrics, frame_metrics, state_metrics
from trainer.evaluation.bootstrap import Estimator, Floats, Weights, draw_recordings, interval_of, replicate
from trainer.evaluation.event_metrics import Beat, Counted
from trainer.evaluation.scores import Ints, ScoredClip, canonical


@dataclass(frozen=True)
class Thresholds:
    """Logits by head, chosen on `val` alone: for single frames, and for events. A head without one is left out."""

    frame: dict[str, float]
    event: dict[str, float]
    metronome: dict[str, Beat] = field(default_factory=dict)  # the best of those that see nothing


@dataclass(frozen=True)
class Metric:
    """A scalar that arms are compared by."""

    name: str
    label: str
    path: str  # in the result of `measure`, with dots
    unit: str = ""  # "" for shares
    higher_is_better: bool = True
    bounds: tuple[float, float] | None = (0.0, 1.0)  # its range; None: any number
    meaning: str = ""  # for the report's reader


_POSITIVE: Final = (0.0, math.inf)
METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("event_f1", "event F1", "speaking.events.f1",
               meaning="speech events matched one to one with the reference's, in time; "
               "harmonic mean of the next two"),
        Metric("event_precision", "event precision", "speaking.events.precision",
               meaning="share of its speech events that match one of the reference's"),
        Metric("event_recall", "event recall", "speaking.events.recall",
               meaning="share of the reference's speech events that it matched"),
        Metric("event_f1_reactive", "event F1, reactive", "speaking.events.reactive.f1",
               meaning="as event F1, for speech just after the user spoke"),
        Metric("event_f1_proactive", "event F1, proactive", "speaking.events.proactive.f1",
               meaning="as event F1, for speech that nobody asked for"),
        Metric("false_alarms_per_quiet_hour", "false alarms per quiet hour",
               "speaking.events.false_alarms_per_quiet_hour", "/h", False, _POSITIVE,
               meaning="speech in no reference event's window, per hour outside all windows"),
        Metric("duplicates_per_event", "duplicates per event", "speaking.events.duplicates_per_event", "", False,
               _POSITIVE, meaning="further speech within a reference event's window, per reference event"),
        Metric("median_latency_s", "median latency", "speaking.events.median_latency_s", "s", False, None,
               meaning="how long after the reference it spoke, at matched events; negative: earlier"),
        Metric("speaking_ap", "speaking AP", "speaking.frames.ap",
               meaning="average precision: how well it ranks frames to speak at before silent ones; guessing gets "
               "their share of all frames"),
        Metric("speaking_auroc", "speaking AUROC", "speaking.frames.auroc",
               meaning="chance that a frame to speak at outscores a silent one; guessing gets 0.5"),
        Metric("speaking_f1", "speaking frame F1", "speaking.frames.f1",
               meaning="over frames, at the threshold that was best on val"),
        Metric("speaking_balanced_accuracy", "speaking balanced accuracy", "speaking.frames.balanced_accuracy",
               meaning="mean of the shares of speaking and of silent frames judged right, at that threshold"),
        Metric("speaking_ece", "speaking calibration error", "speaking.frames.calibration.ece", "", False,
               meaning="expected calibration error: mean distance of probabilities from observed shares, over frames"),
        Metric("speaking_ap_alone", "speaking AP without DST frames", "speaking.frames.alone.ap",
               meaning="average precision without the frames of state updates: only speech can tell them from silence"),
        Metric("dst_ap", "DST AP", "dst_update.frames.ap", meaning="as speaking AP, for state updates"),
        Metric("dst_event_f1", "DST event F1", "dst_update.events.f1", meaning="as event F1, for state updates"),
        Metric("joint_state_accuracy", "joint state accuracy", "state.joint_accuracy",
               meaning="share of frames at whose end every step's state is right, from the updates it made"),
        Metric("transition_f1", "transition F1", "state.transitions.f1",
               meaning="updates matched in time, step and transition with the reference's"),
    )
}  # fmt: skip


def choose_thresholds(val: Sequence[ScoredClip], settings: Settings) -> Thresholds:
    """The thresholds of the best frame F1 and of the best event F1 on `val`; ties go to the higher.

    A head without scores, or without a positive frame (an event) on `val`, gets none.
    """
    frames = {head: frame_metrics.head_frames(val, head, recordings_of(val)) for head in HEADS}
    best = {head: f and frame_metrics.best_threshold(f.scores, f.positive) for head, f in frames.items()}
    event = {head: event_metrics.best_event_threshold(val, head, settings) for head in HEADS}
    beats = {head: event_metrics.best_beat([s.clip for s in val], head, settings) for head in HEADS}
    return Thresholds(*({k: v for k, v in found.items() if v is not None} for found in (best, event, beats)))  # type: ignore[arg-type]


def measure(clips: Sequence[ScoredClip], thresholds: Thresholds | None, settings: Settings) -> dict[str, Any]:
    """The metrics JSON: plain types, None where undefined; the same digits whatever the order of the clips.

    Without thresholds, what needs one is None; free-running clips (`said`, `updates`) need none for their events.
    """
    clips, given = canonical(clips), thresholds or Thresholds({}, {})
    recordings, (speaking, updating) = recordings_of(clips), np.concatenate([s.clip.labels for s in clips], axis=1)
    both_known = (speaking >= 0) & (updating >= 0)
    cells = np.bincount((speaking + 2 * updating)[both_known], minlength=4).tolist()
    report: dict[str, Any] = {
        "clips": len(clips),
        "recordings": len(recordings),
        "frames": sum(scored.clip.num_frames for scored in clips),
        "hours": sum(scored.clip.num_frames / scored.clip.fps for scored in clips) / 3600,
        # positive for which heads, of the frames supervised for both
        "cells": dict(zip(("neither", "speaking_only", "dst_update_only", "both"), cells, strict=True)),
    }
    for head in HEADS:
        frames = frame_metrics.head_frames(clips, head, recordings)
        events = event_metrics.find_events(clips, head, given.event.get(head), settings)
        report[head] = {
            "frames": frames and frame_metrics.report_frames(frames, given.frame.get(head), settings.bins),
            "events": events and event_metrics.report_events(events, head, given.event.get(head)),
        }
        if events is not None:
            beat = given.metronome.get(head)
            f1 = beat and beat.f1([scored.clip for scored in clips], head, settings)
            report[head]["events"]["metronome"] = beat and {**asdict(beat), "f1": f1}
    states = state_metrics.find_states(clips, settings)
    return report | {"state": states and state_metrics.report_states(states)}


def recordings_of(clips: Sequence[ScoredClip]) -> list[str]:
    """Sorted and unique."""
    return sorted({scored.clip.recording_id for scored in clips})


def look_up(report: dict[str, Any], metric: Metric) -> float | None:
    """The metric's value in the result of `measure`."""
    value = value_at(report, metric.path)
    return None if value is None else float(value)


def value_at(nested: Any, path: str) -> Any:
    """The value at a dotted path in nested dictionaries; None where that is not there."""
    for key in path.split("."):
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested


def weighted(
    clips: Sequence[ScoredClip], thresholds: Thresholds | None, settings: Settings, recordings: Sequence[str]
) -> Callable[[Weights], dict[str, Floats]]:
    """METRICS as a function of how often each recording is drawn.

    recordings: sorted and unique, at least those of the clips. The function takes int64 [B, R] and gives float64 [B]
    each, NaN where a draw leaves it undefined; throughout, where `measure` gives None.
    """
    clips, given = canonical(clips), thresholds or Thresholds({}, {})
    parts: dict[str, dict[str, Any]] = {}
    latency: Estimator = _undefined
    for head in HEADS:
        frames, threshold = frame_metrics.head_frames(clips, head, recordings), given.frame.get(head)
        events = event_metrics.find_events(clips, head, given.event.get(head), settings)
        speaking = head == "speaking"  # some metrics are of this head alone
        parts[head] = {
            "frames": frames and frame_metrics.weighted_frames(frames, threshold, settings.bins, alone=speaking),
            "events": events and _weighted_counts(events, recordings, event_metrics.event_rates),
        }
        if events is not None and speaking:
            of_matches = [s.clip.recording_id for s, found in zip(*events[::2], strict=True) for _ in found]
            latency = weighted_median(np.concatenate(events.latencies), np.searchsorted(recordings, of_matches))
    states = state_metrics.find_states(clips, settings)
    of_states = states and _weighted_counts(states, recordings, state_metrics.state_rates)

    def rates(weights: Weights) -> dict[str, Floats]:
        report: dict[str, Any] = {
            head: {kind: part and part(weights) for kind, part in own.items()} for head, own in parts.items()
        }
        report["state"] = of_states and of_states(weights)
        found = {name: value_at(report, metric.path) for name, metric in METRICS.items()}
        found["median_latency_s"] = latency(weights)
        return {name: _undefined(weights) if value is None else value for name, value in found.items()}

    return rates


def replicates(
    clips: Sequence[ScoredClip], thresholds: Thresholds | None, settings: Settings, num_draws: int
) -> dict[str, Floats]:
    """Each of METRICS: float64 [1, 1 + B], as `replicate` gives it for one run, over draws of the clips' recordings."""
    recordings = recordings_of(clips)
    rates = weighted(clips, thresholds, settings, recordings)
    draws = draw_recordings(len(recordings), num_draws)
    (values,) = replicate([lambda weights: np.stack([*rates(weights).values()])], draws)
    return dict(zip(METRICS, values[:, None], strict=True))


def intervals(
    clips: Sequence[ScoredClip], thresholds: Thresholds | None, settings: Settings, num_draws: int
) -> dict[str, list[float] | None]:
    """The 95% interval of each of METRICS, one run's; None where there is none."""
    recordings, limits = len(recordings_of(clips)), {}
    for name, values in replicates(clips, thresholds, settings, num_draws).items():
        found = interval_of(values, recordings, METRICS[name].bounds)
        limits[name] = None if found.low is None or found.high is None else [found.low, found.high]
    return limits


def _weighted_counts(counted: Counted, recordings: Sequence[str], rates: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`rates` of counts as a function of weights [B, R]: the counts are summed per recording once."""
    sums = np.zeros((len(recordings), len(counted.counts[0])))
    np.add.at(sums, np.searchsorted(recordings, [s.clip.recording_id for s in counted.clips]), counted.table())
    return lambda weights: rates(dict(zip(counted.counts[0], (weights @ sums).T, strict=True)))


def _undefined(weights: Weights) -> Floats:
    return np.full(len(weights), np.nan)


def weighted_median(values: Floats, recording: Ints) -> Estimator:
    """The median of values [M] that each count as often as their recording is drawn; NaN where none is drawn."""
    order = np.argsort(values, kind="stable")
    values, recording = values[order], recording[order]

    def median(weights: Weights) -> Floats:
        found = _undefined(weights)
        if not len(values):
            return found
        rows = max(1, 4_000_000 // len(values))  # draws at a time: 32 MB
        for first in range(0, len(weights), rows):
            up_to = np.cumsum(weights[first : first + rows, recording], axis=1)  # [b, M]
            total = up_to[:, -1:]
            middle = [
                values[(up_to < half).sum(1).clip(max=len(values) - 1)] for half in ((total + 1) // 2, total // 2 + 1)
            ]
            found[first : first + rows] = np.where(total[:, 0] > 0, (middle[0] + middle[1]) / 2, np.nan)
        return found

    return median
