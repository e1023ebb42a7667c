"""All metrics of one model in one mode, and `evaluate --scores`: from a Parquet file of scores, anybody's, to metrics.

Thresholds come from `val` or from the user, never from the split that is measured. `measure` gives the metrics JSON,
`weighted` its scalars by recording's weight: of sums per recording, or ranks sorted once; with all weights 1 the two
are equal. Needs no torch.

    B draws    R recordings    M matches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import HEADS
from pipeline.storage import write_json
from trainer.config import FREE_RUNNING, TEACHER_FORCED, Settings, check_thresholds
from trainer.evaluation import chunk_metrics, event_metrics, frame_metrics, state_metrics
from trainer.evaluation.bootstrap import (
    ANY,
    Bounds,
    Estimator,
    Floats,
    Weights,
    draw_recordings,
    interval_of,
    replicate,
)
from trainer.evaluation.event_metrics import Beat, Counted
from trainer.evaluation.scores import Ints, ScoredClip, read_info, read_scores, write_scores

METRICS_FILE: Final = "metrics.json"


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
    meaning: str  # for the report's reader
    bounds: Bounds = (0.0, 1.0)  # its range


_POSITIVE: Final = (0.0, math.inf)
METRICS: Final[dict[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("event_f1", "event F1", "speaking.events.f1",
               "speech events matched one to one with the reference's, in time; harmonic mean of the next two"),
        Metric("event_precision", "event precision", "speaking.events.precision",
               "share of its speech events that match one of the reference's"),
        Metric("event_recall", "event recall", "speaking.events.recall",
               "share of the reference's speech events that it matched"),
        Metric("event_f1_reactive", "event F1, reactive", "speaking.events.reactive.f1",
               "as event F1, for speech just after the user spoke"),
        Metric("event_f1_proactive", "event F1, proactive", "speaking.events.proactive.f1",
               "as event F1, for speech that nobody asked for"),
        Metric("false_alarms_per_quiet_hour", "false alarms per quiet hour (/h)",
               "speaking.events.false_alarms_per_quiet_hour",
               "speech in no reference event's window, per hour outside all windows", _POSITIVE),
        Metric("duplicates_per_event", "duplicates per event", "speaking.events.duplicates_per_event",
               "further speech within a reference event's window, per reference event", _POSITIVE),
        Metric("median_latency_s", "median latency (s)", "speaking.events.median_latency_s",
               "how long after the reference it spoke, at matched events; negative: earlier", ANY),
        Metric("speaking_ap", "speaking AP", "speaking.frames.ap",
               "average precision of ranking frames to speak at before silent ones; guessing gets their share of all"),
        Metric("speaking_auroc", "speaking AUROC", "speaking.frames.auroc",
               "chance that a frame to speak at outscores a silent one; guessing gets 0.5"),
        Metric("speaking_f1", "speaking frame F1", "speaking.frames.f1",
               "over frames, at the threshold that was best on val"),
        Metric("speaking_balanced_accuracy", "speaking balanced accuracy", "speaking.frames.balanced_accuracy",
               "mean of the shares of speaking and of silent frames judged right, at that threshold"),
        Metric("speaking_ece", "speaking calibration error", "speaking.frames.calibration.ece",
               "expected calibration error: mean distance of probabilities from observed shares, over frames"),
        Metric("speaking_ap_alone", "speaking AP without DST frames", "speaking.frames.alone.ap",
               "average precision without the frames of state updates: only speech can tell them from silence"),
        Metric("dst_ap", "DST AP", "dst_update.frames.ap", "as speaking AP, for state updates"),
        Metric("dst_event_f1", "DST event F1", "dst_update.events.f1", "as event F1, for state updates"),
        Metric("joint_state_accuracy", "joint state accuracy", "state.joint_accuracy",
               "share of frames at whose end every step's state is right, from the updates it made"),
        Metric("transition_f1", "transition F1", "state.transitions.f1",
               "updates matched in time, step and transition with the reference's"),
    )
}  # fmt: skip


def choose_thresholds(val: Sequence[ScoredClip], settings: Settings) -> Thresholds:
    """The thresholds of the best frame F1 and of the best event F1 on `val`, ties go to the higher, and the best
    metronome. A head without scores, or without a positive frame (an event) on `val`, gets none."""
    chosen = Thresholds({}, {}, {})
    for head in HEADS:
        frames = frame_metrics.head_frames(val, head, recordings_of(val))
        if frames and (best := frame_metrics.best_threshold(frames)) is not None:
            chosen.frame[head] = best
        if (best := event_metrics.best_event_threshold(val, head, settings)) is not None:
            chosen.event[head] = best
        if beat := event_metrics.best_beat([scored.clip for scored in val], head, settings):
            chosen.metronome[head] = beat
    return chosen


def measure(clips: Sequence[ScoredClip], thresholds: Thresholds, settings: Settings) -> dict[str, Any]:
    """The metrics JSON: plain types, None where undefined or without a threshold (free-running clips need none for
    their events); the same digits whatever the order of the clips."""
    clips, recordings = sorted(clips, key=lambda scored: scored.clip.clip_id), recordings_of(clips)
    speaking, updating = np.concatenate([scored.clip.labels for scored in clips], axis=1)
    known = (speaking >= 0) | (updating >= 0)
    cells = np.bincount(((speaking == 1) + 2 * (updating == 1))[known], minlength=4).tolist()  # by heads
    report: dict[str, Any] = {
        "clips": len(clips),
        "recordings": len(recordings),
        "frames": sum(scored.clip.num_frames for scored in clips),
        "cells": dict(zip(("neither", "speaking_only", "dst_update_only", "both"), cells, strict=True)),
    }
    for head in HEADS:
        frames = frame_metrics.head_frames(clips, head, recordings)
        events = event_metrics.find_events(clips, head, thresholds.event.get(head), settings)
        report[head] = {
            "frames": frames and frame_metrics.report_frames(frames, thresholds.frame.get(head), settings.bins),
            "events": events and event_metrics.report_events(events),
        }
        if events is not None:
            beat = thresholds.metronome.get(head)
            f1 = beat and beat.f1([scored.clip for scored in clips], head, settings)
            report[head]["events"]["metronome"] = beat and {**asdict(beat), "f1": f1}
    states = state_metrics.find_states(clips, settings)
    return report | {"state": states and state_metrics.report_states(states)}


def recordings_of(clips: Sequence[ScoredClip]) -> list[str]:
    """Sorted and unique."""
    return sorted({scored.clip.recording_id for scored in clips})


def value_at(nested: Any, path: str) -> Any:
    """The value at a dotted path in nested dictionaries; None where that is not there."""
    for key in path.split("."):
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested


def weighted(
    clips: Sequence[ScoredClip], thresholds: Thresholds, settings: Settings, recordings: Sequence[str]
) -> Callable[[Weights], dict[str, Floats]]:
    """METRICS as a function of how often each recording is drawn.

    recordings: sorted and unique, at least those of the clips. The function takes [B, R] and gives float64 [B] each,
    NaN where a draw leaves it undefined.
    """
    clips = sorted(clips, key=lambda scored: scored.clip.clip_id)  # sums do not depend on the order given
    parts: dict[str, dict[str, Any]] = {}
    latency: Estimator | None = None
    for head in HEADS:
        frames, threshold = frame_metrics.head_frames(clips, head, recordings), thresholds.frame.get(head)
        events = event_metrics.find_events(clips, head, thresholds.event.get(head), settings)
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
        values = {name: value_at(report, metric.path) for name, metric in METRICS.items()}
        values["median_latency_s"] = latency and latency(weights)
        return {name: np.full(len(weights), np.nan) if value is None else value for name, value in values.items()}

    return rates


def _weighted_counts(counted: Counted, recordings: Sequence[str], rates: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`rates` of counts as a function of weights [B, R]: the counts are summed per recording once."""
    sums = np.zeros((len(recordings), len(counted.counts[0])))
    np.add.at(sums, np.searchsorted(recordings, [s.clip.recording_id for s in counted.clips]), counted.table())
    return lambda weights: rates(dict(zip(counted.counts[0], (weights @ sums).T, strict=True)))


def weighted_median(values: Floats, recording: Ints) -> Estimator:
    """The median of values [M] that each count as often as their recording is drawn; NaN where none is drawn."""
    order = np.argsort(values, kind="stable")
    values, recording = values[order], recording[order]

    def median(weights: Weights) -> Floats:
        medians = np.full(len(weights), np.nan)
        rows = max(1, 4_000_000 // max(1, len(values)))  # draws at a time: 32 MB
        for first in range(0, len(weights) if len(values) else 0, rows):
            up_to = np.cumsum(weights[first : first + rows, recording], axis=1)  # [b, M]
            total = up_to[:, -1:]
            at = [(up_to < half).sum(1).clip(max=len(values) - 1) for half in ((total + 1) // 2, total // 2 + 1)]
            medians[first : first + rows] = np.where(total[:, 0] > 0, values[at].mean(0), np.nan)
        return medians

    return median


def replicates(
    clips: Sequence[ScoredClip], thresholds: Thresholds, settings: Settings, num_draws: int
) -> dict[str, Floats]:
    """Each of METRICS: float64 [1, 1 + B], as `replicate` gives it for one run, over draws of the clips' recordings."""
    recordings = recordings_of(clips)
    rates = weighted(clips, thresholds, settings, recordings)
    draws = draw_recordings(len(recordings), num_draws)
    (values,) = replicate([lambda weights: np.stack([*rates(weights).values()])], draws)
    return dict(zip(METRICS, values[:, None], strict=True))


# ---- files of scores ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    split: str
    metrics: dict[str, Any]  # the content of metrics.json
    notes: tuple[str, ...]  # what it lacks and why
    folder: Path | None = None  # where the files are


@dataclass(frozen=True)
class EvalSplits:
    test: Split  # to measure on
    val: Split | None  # to choose thresholds on

    @property
    def all(self) -> dict[str, Split]:
        return {split.name: split for split in (self.val, self.test) if split is not None}


class FreeRunning(NamedTuple):
    """What a free-running pass over the measured split gives."""

    clips: list[ScoredClip]
    how: dict[str, Any] | None = None  # how a control decides to speak, for metrics.json
    notes: tuple[str, ...] = ()


def hold(data: Path, split: str) -> EvalSplits:
    test = Split(data, split)
    return EvalSplits(test, Split(data, "val") if "val" in test.manifest["splits"] and split != "val" else None)


def evaluate_scores(
    path: Path,
    data: Path | None = None,
    split: str = "test",
    out: Path | None = None,
    settings: Settings | None = None,
    given: Mapping[str, float] | None = None,
    chunks: Path | None = None,
    submission: Path | None = None,
    draws: int = 0,
) -> Evaluation:
    """Measure a scores Parquet, ours or anybody's, against the shards in `data` (None: where the file says they are).

    Thresholds are `given` (logits by head), those that a free-running file was made with, or chosen on the file's own
    `val` rows; else what needs one is None. out: a folder for metrics.json. The last three are as for `all_metrics`.
    """
    check_thresholds(given or {})
    settings, info = settings or Settings(), read_info(path)
    if data is None and "data" not in info:
        raise InputError(f"{path}: does not say which shards it is of; name them: evaluate DATA --scores {path}")
    held = hold(data or Path(info["data"]), split)
    scored = read_scores(path, held.all, optional=held.all.keys() - {split})
    thresholds, source, notes = pick_thresholds(scored, held, settings, given)
    was_given = "given" in str(info.get("thresholds_from"))
    if not given and "thresholds" in info and (was_given or scored[split][0].said is not None):
        was, source, notes = info["thresholds"], info.get("thresholds_from"), []
        beats = {head: Beat(**beat) for head, beat in was.get("metronome", {}).items()}
        thresholds = Thresholds(was["frame"], was["event"], beats)
    by_mode = {str(info.get("mode", "scores")): scored[split]}
    metrics, missing = all_metrics(by_mode, thresholds, settings, chunks, submission, draws)
    metrics |= {"file": str(path), "split": split, "thresholds": asdict(thresholds), "thresholds_from": source}
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(split, metrics, (*notes, *missing), out)


def evaluate_submission(path: Path, chunks: Path, out: Path | None = None) -> Evaluation:
    """EgoProactive's metrics of a submission (predictions in its format) against the sessions file `chunks`."""
    sessions = chunk_metrics.read_sessions(chunks)
    report = chunk_metrics.report_chunks(sessions, chunk_metrics.read_submission(path, sessions))
    metrics = {"submission": {"chunks": report}, "file": str(path), "sessions": str(chunks)}
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(chunks.stem, metrics, (), out)


def write_evaluation(
    folder: Path,
    scored: Mapping[str, Sequence[ScoredClip]],
    held: EvalSplits,
    settings: Settings,
    origin: dict[str, Any],
    run_live: Callable[[Thresholds], FreeRunning] | None,
    chunks: Path | None = None,
    submission: Path | None = None,
    draws: int = 0,
    given: Mapping[str, float] | None = None,
) -> Evaluation:
    """The metrics and files of what was just scored: the Parquet files first, metrics.json last.

    scored: teacher-forced, by split. origin: what the files say of their data and model. run_live: the measured split,
    free-running, or None. chunks, submission, draws: as for `all_metrics`; given: as for `pick_thresholds`.
    """
    split = held.test.name
    thresholds, source, notes = pick_thresholds(scored, held, settings, given)
    origin = {**origin, "thresholds": asdict(thresholds), "thresholds_from": source}
    write_scores(folder / f"{TEACHER_FORCED}.parquet", scored, origin | {"mode": TEACHER_FORCED})
    by_mode = {TEACHER_FORCED: scored[split]}
    if run_live is not None and "speaking" in thresholds.event:  # a DST head without a threshold never fires
        by_mode[FREE_RUNNING], how, live_notes = run_live(thresholds)
        origin, notes = origin | ({} if how is None else {"speaks_at": how}), [*notes, *live_notes]
        write_scores(
            folder / f"{FREE_RUNNING}.parquet", {split: by_mode[FREE_RUNNING]}, origin | {"mode": FREE_RUNNING}
        )
    elif run_live is not None:
        notes.append("not evaluated free-running: no threshold for speaking")
    metrics, missing = all_metrics(by_mode, thresholds, settings, chunks, submission, draws)
    metrics |= origin | {"split": split}
    write_json(folder / METRICS_FILE, metrics)
    return Evaluation(split, metrics, (*notes, *missing), folder)


def pick_thresholds(
    scored: Mapping[str, Sequence[ScoredClip]], held: EvalSplits, settings: Settings, given: Mapping[str, float] | None
) -> tuple[Thresholds, str | None, list[str]]:
    """(thresholds, where they come from: a split, 'given', both or None; notes). given: logits by head, which count
    instead of that head's chosen ones."""
    chosen, source, own = Thresholds({}, {}), None, dict(given or {})
    if held.val is not None and held.val.name in scored:
        chosen, source = choose_thresholds(scored[held.val.name], settings), held.val.name
    if own:
        chosen = Thresholds(chosen.frame | own, chosen.event | own, chosen.metronome)
        source = f"{source}, but {' and '.join(own)} given" if source else "given"
    note = "no scores of val beside those of the split: no threshold was chosen, so no events from scores; give one"
    return chosen, source, [] if source else [note]


def all_metrics(
    by_mode: Mapping[str, Sequence[ScoredClip]],
    thresholds: Thresholds,
    settings: Settings,
    chunks: Path | None = None,
    submission: Path | None = None,
    draws: int = 0,
) -> tuple[dict[str, Any], list[str]]:
    """(each mode's metrics and the settings; notes on what could not be measured).

    draws: adds `intervals`, by name of METRICS. chunks: a sessions file of EgoProactive's: adds its metrics, and writes
    the last mode's answers to `submission`. Raises InputError where a session has no clip.
    """
    metrics: dict[str, Any] = {}
    answers: list[list[str]] = []
    sessions = None if chunks is None else chunk_metrics.read_sessions(chunks)
    for mode, clips in by_mode.items():
        metrics[mode] = measure(clips, thresholds, settings)
        if draws:
            limits = metrics[mode]["intervals"] = {}
            for name, values in replicates(clips, thresholds, settings, draws).items():
                interval = interval_of(values, metrics[mode]["recordings"], METRICS[name].bounds)
                limits[name] = None if interval.low is None else [interval.low, interval.high]
        if sessions is not None:
            at = thresholds.event.get("speaking")
            metrics[mode]["chunks"], answers = chunk_metrics.report_clips(sessions, clips, at, settings.refractory_s)
    if sessions and submission is not None and answers:
        chunk_metrics.write_submission(submission, sessions, answers)
    notes = ["no chunk metrics and no submission: no threshold for speaking"] if sessions and not answers else []
    return metrics | {"settings": asdict(settings)}, notes
