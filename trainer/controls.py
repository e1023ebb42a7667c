"""Rungs without a model: what the clock alone, and what the history of events alone, tell about when to speak.

    metronome    an event every `period` seconds from a phase on: those of the best event F1 on train
    history      gradient boosting on what the context holds before a frame, without its texts and without pictures: how
                 long ago the assistant spoke, the state changed and the user spoke, how often, the last gaps, the clock

`score_control` writes what `trainer.evaluate` writes of a run. Free-running, `history` conditions on its own speech and
updates; its threshold is that of the best event F1 of free-running passes over val. Both are fitted on all annotated
frames of train (of at most MAX_FRAMES), as an arm sees them over its epochs: so probabilities need no correction.

    C clips    F frames of the longest clip    K features    E events of the clip with most    P phases
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from pipeline.schema import HEADS, ROLE_OF
from trainer.config import Settings
from trainer.evaluation import evaluate_scores as scoring
from trainer.evaluation.event_metrics import TOLERANCE, most_matches, predicted_frames, targets_of, threshold_frames
from trainer.evaluation.scores import Floats, Ints, ScoredClip, Singles
from trainer.sequence import texts_at

CONTROLS: Final = ("metronome", "history")
VERSION: Final = 1  # of the features and the fit: what another wrote is made again
MAX_FRAMES: Final = 2_000_000  # of train
CLIPS_AT_ONCE: Final = 2_000
PHASES: Final = np.arange(8) / 8  # of a metronome's period
CUTS: Final = 24  # thresholds tried free-running
KINDS: Final = (*ROLE_OF.values(), "user")  # of events in the context
GAPS: Final = 5
NEVER: Final = -1.0  # seconds since, or between, what has not happened yet
FEATURES: Final = (
    *(f"seconds since {kind}" for kind in KINDS),
    "seconds in the clip",
    *(f"number of {kind}" for kind in KINDS),
    *(f"{kind} gap {i + 1}, seconds" for kind in ROLE_OF.values() for i in range(GAPS)),
)

Mask = npt.NDArray[np.bool_]
Act = Callable[[int, Singles], Mask]  # (frame from the clips' start, features [C, K]) -> events after it, bool [2, C]
Thresholds = Mapping[str, Floats]  # by head [C]


def score_control(
    name: str, data: Path, split: str, out: Path, seed: int, settings: Settings, live: bool = True
) -> scoring.Evaluation:
    """Fit the control on train, score val and `split`, and write scores and metrics.json into the folder `out`."""
    held, train = scoring.hold(data, split), Split(data, "train")
    (out / scoring.METRICS_FILE).unlink(missing_ok=True)  # the last to be written: with it the folder is complete
    control = _fit(name, train, seed, settings)
    origin: dict[str, Any] = {
        "data": str(data.resolve()),
        "data_key": {part: s.key for part, s in held.all.items()},
        "model": control_key(name, train, seed),
    }
    scored = {part: list(control.teacher_forced(list(s.in_order()))) for part, s in held.all.items()}

    def free_running_pass(thresholds: scoring.Thresholds) -> list[ScoredClip]:
        chosen = {head: thresholds.event.get(head, math.inf) for head in HEADS}
        assert held.val is not None  # thresholds were chosen there
        chosen["speaking"] = _best_free_running(control, scored[held.val.name], chosen, settings)
        clips = [one.clip for one in scored[split]]
        rows = {head: np.full(len(clips), value) for head, value in chosen.items()}
        return list(control.free_running(clips, rows, settings.refractory_s))

    return scoring.write_evaluation(out, scored, held, settings, origin, name, free_running_pass if live else None)


def control_key(name: str, train: Split, seed: int) -> str:
    """Names what the control is a function of, beside the settings, as `run_hash` names a checkpoint."""
    return hashlib.sha256(f"{name} {VERSION} {train.key} {seed}".encode()).hexdigest()


def _fit(name: str, train: Split, seed: int, settings: Settings) -> Metronome | History:
    if name not in CONTROLS:
        raise InputError(f"control {name!r}: not known, expected one of {', '.join(CONTROLS)}")
    shards = [shard for shard in train.manifest["shards"] if (shard["split"], shard["table"]) == (train.name, "frames")]
    share = min(1.0, MAX_FRAMES / sum(shard["rows"] for shard in shards))
    drawn = np.random.default_rng(seed).permutation(len(train))[: math.ceil(share * len(train))]
    clips = [train.clip(number, rate=1.0) for number in sorted(drawn.tolist())]
    return Metronome.fit(clips, settings) if name == "metronome" else History.fit(clips, seed)


def _best_free_running(
    control: Metronome | History, val: Sequence[ScoredClip], thresholds: Mapping[str, float], settings: Settings
) -> float:
    """The threshold for speaking of the best event F1, free-running on val; the highest of equals."""
    targets = targets_of(val, "speaking", settings)
    falling = np.sort(np.concatenate([scored.logits["speaking"] for scored in val]))[::-1]
    references = sum(target.references for target in targets)
    ranks = np.geomspace(max(1, references // 4), len(falling), CUTS).astype(int) - 1
    tried = np.setdiff1d(falling[ranks], falling[-1:])[::-1].astype(np.float64)  # the lowest is no cut
    rows = {head: np.full(len(val) * len(tried), value) for head, value in thresholds.items()}
    rows["speaking"] = np.repeat(tried, len(val))
    counts = np.zeros((len(tried), 2))  # matches, predictions
    runs = control.free_running([scored.clip for scored in val] * len(tried), rows, settings.refractory_s)
    for i, run in enumerate(runs):
        fired = predicted_frames(run, "speaking", None, settings.refractory_s) - run.clip.start_frame
        counts[i // len(val)] += most_matches(targets[i % len(val)].windows, fired), len(fired)
    f1 = 2 * counts[:, 0] / (references + counts[:, 1])
    return float(tried[f1.argmax()]) if len(tried) else thresholds["speaking"]


def _acted(clip: ClipExample, logits: dict[str, Singles], events: Mask, calibrated: bool) -> ScoredClip:
    """events: bool [2, F of the clip]; speech has no text, an update says nothing."""
    said = ["" if spoke else None for spoke in events[0].tolist()]
    updates = [() if changed else None for changed in events[1].tolist()] if "dst_update" in logits else None
    return ScoredClip(clip, logits, _probabilities(logits) if calibrated else {}, said, updates)  # type: ignore[arg-type]


def _probabilities(logits: Mapping[str, Singles]) -> dict[str, Singles]:
    return {head: expit(values) for head, values in logits.items()}


# ---- the clock ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metronome:
    """By head the period in seconds and the phase as a share of it. Logits are 1 at a tick, else -1."""

    beats: Mapping[str, tuple[float, float]]

    @classmethod
    def fit(cls, clips: Sequence[ClipExample], settings: Settings) -> Metronome:
        beats = {head: best_beat(clips, head, settings) for head in HEADS}
        return cls({head: beat for head, beat in beats.items() if beat is not None})

    def teacher_forced(self, clips: Sequence[ClipExample]) -> Iterator[ScoredClip]:
        for clip in clips:
            logits = {head: np.full(clip.num_frames, -1, np.float32) for head in self.beats}
            for head, beat in self.beats.items():
                logits[head][tick_frames(clip, *beat)] = 1
            yield ScoredClip(clip, logits, {})

    def free_running(
        self, clips: Sequence[ClipExample], thresholds: Thresholds, refractory_s: float
    ) -> Iterator[ScoredClip]:
        for i, scored in enumerate(self.teacher_forced(clips)):
            events = np.zeros((2, scored.clip.num_frames), bool)
            for head in scored.logits:
                fired = threshold_frames(scored, head, float(thresholds[head][i]), refractory_s)
                events[HEADS.index(head), fired] = True
            yield _acted(scored.clip, scored.logits, events, calibrated=False)


def tick_frames(clip: ClipExample, period_s: float, phase: float) -> Ints:
    """int64, ascending, from the clip's start."""
    period = period_s * clip.fps
    count = math.ceil((clip.num_frames - 0.5) / period - phase)
    return np.floor((phase + np.arange(max(0, count))) * period + 0.5).astype(np.int64)


def best_beat(clips: Sequence[ClipExample], head: str, settings: Settings) -> tuple[float, float] | None:
    """(period in seconds, phase as a share of it) of the best event F1: from the refractory time to a minute, coarsely,
    then finely around the best; ties: the longer. None without any event."""
    targets = targets_of([ScoredClip(clip, {}, {}) for clip in clips], head, settings)
    references = sum(target.references for target in targets)
    if not references:
        return None
    windows = np.full((max(len(target.windows) for target in targets), len(targets), 2), -1.0)  # no frame: none there
    for i, target in enumerate(targets):
        windows[: len(target.windows), i] = target.windows
    numbers = [(t.scored.clip.num_frames, t.scored.clip.fps, t.annotated.mean()) for t in targets]
    sizes, fps, known = np.array(numbers).T[..., None]  # [C, 1] each

    def f1(period_s: float) -> tuple[float, float, float]:
        """(F1, period, phase) of the best phase."""
        period = period_s * fps  # frames
        predicted = (known * np.ceil((sizes - 0.5) / period - PHASES)).sum(0)  # [P]
        matched, last = np.zeros(len(PHASES)), np.full((len(targets), len(PHASES)), -1.0)  # last: the tick used last
        for first, end in np.moveaxis(windows, 2, 1)[..., None]:  # of the E events
            tick = np.maximum(np.ceil((first - 0.5) / period - PHASES), last + 1)
            hit = (np.floor((tick + PHASES) * period + 0.5) <= end) & (end >= 0)
            last = np.where(hit, tick, last)
            matched += hit.sum(0)
        scores = 2 * matched / (references + predicted)
        best = int(scores.argmax())
        return float(scores[best]), period_s, float(PHASES[best])

    shortest = max(settings.refractory_s, 0.5)
    coarse = max(map(f1, np.unique(np.round(np.geomspace(shortest, 60, 60) * 2) / 2).tolist()))
    fine = np.arange(-9, 10) * 0.05 + coarse[1]
    _, period_s, phase = max([coarse, *map(f1, fine[fine >= shortest - TOLERANCE].tolist())])
    return period_s, phase


# ---- the history -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """By head a fitted classifier; a head of which train says nothing is absent."""

    classifiers: Mapping[str, Any]

    @classmethod
    def fit(cls, clips: Sequence[ClipExample], seed: int) -> History:
        from sklearn.ensemble import HistGradientBoostingClassifier  # scoring alone needs none of it

        features, classifiers = np.concatenate(list(context_features(clips))), {}
        for row, head in enumerate(HEADS):
            labels = np.concatenate([clip.labels[row] for clip in clips])
            known = labels >= 0
            if 0 < labels[known].sum() < known.sum():
                model = HistGradientBoostingClassifier(
                    min_samples_leaf=50, l2_regularization=1.0, early_stopping=False, random_state=seed
                )
                classifiers[head] = model.fit(features[known], labels[known])
        return cls(classifiers)

    def logits(self, features: Singles) -> dict[str, Singles]:
        return {head: own.decision_function(features).astype(np.float32) for head, own in self.classifiers.items()}

    def teacher_forced(self, clips: Sequence[ClipExample]) -> Iterator[ScoredClip]:
        for clip, features in zip(clips, context_features(clips), strict=True):
            logits = self.logits(features)
            yield ScoredClip(clip, logits, _probabilities(logits))

    def free_running(
        self, clips: Sequence[ClipExample], thresholds: Thresholds, refractory_s: float
    ) -> Iterator[ScoredClip]:
        for first in range(0, len(clips), CLIPS_AT_ONCE):
            own = slice(first, first + CLIPS_AT_ONCE)
            contexts, chosen = _Contexts(clips[own]), {head: values[own] for head, values in thresholds.items()}
            logits, events = self._run(contexts, chosen, refractory_s)
            for i, clip in enumerate(clips[own]):
                scores = {head: logits[HEADS.index(head), i, : clip.num_frames] for head in self.classifiers}
                yield _acted(clip, scores, events[:, i, : clip.num_frames], calibrated=True)

    def _run(self, contexts: _Contexts, thresholds: Thresholds, refractory_s: float) -> tuple[Singles, Mask]:
        """(logits, events) [2, C, F]"""
        logits = np.zeros((2, *contexts.user.shape), np.float32)
        events = np.zeros((2, *contexts.user.shape), bool)
        last = np.full(logits.shape[:2], -np.inf)

        def act(frame: int, features: Singles) -> Mask:
            active = np.flatnonzero(frame < contexts.sizes)
            for head, values in self.logits(features[active]).items():
                row = HEADS.index(head)
                logits[row, active, frame] = values
                rested = (frame - last[row, active]) / contexts.fps[active] >= refractory_s - TOLERANCE
                events[row, active, frame] = rested & (values >= thresholds[head][active])
                last[row, events[row, :, frame]] = frame
            return events[:, :, frame]

        contexts.walk(act)
        return logits, events


def context_features(clips: Sequence[ClipExample]) -> Iterator[Singles]:
    """Each clip's FEATURES before every decision, float32 [F of the clip, K], with the reference's events."""
    for first in range(0, len(clips), CLIPS_AT_ONCE):
        contexts = _Contexts(clips[first : first + CLIPS_AT_ONCE])
        features = np.empty((*contexts.user.shape, len(FEATURES)), np.float32)

        def act(frame: int, before: Singles, contexts: _Contexts = contexts, features: Singles = features) -> Mask:
            features[:, frame] = before
            return contexts.own[:, :, frame]

        contexts.walk(act)
        yield from (features[i, :size] for i, size in enumerate(contexts.sizes.tolist()))


class _Contexts:
    """The contexts of C clips, frame by frame: where texts stand, and what has happened so far."""

    def __init__(self, clips: Sequence[ClipExample]) -> None:
        self.sizes = np.array([clip.num_frames for clip in clips])
        self.fps = np.array([clip.fps for clip in clips])
        marks = np.zeros((len(KINDS), len(clips), self.sizes.max()), bool)
        for kind, role in enumerate(KINDS):
            for i, clip in enumerate(clips):
                marks[kind, i, [frame - clip.start_frame for frame in texts_at(clip, role)]] = True
        self.own, self.user = marks[:-1], marks[-1]  # bool [2, C, F] after a frame, [C, F] before it

    def walk(self, act: Act) -> None:
        """Frame after frame, all clips at once; `act` says which events follow."""
        count, frames = self.user.shape
        last = np.full((len(KINDS), count), np.nan)
        number = np.zeros((len(KINDS), count))
        gaps = np.full((len(ROLE_OF), GAPS, count), np.nan)
        for frame in range(frames):
            user = self.user[:, frame]
            last[-1, user] = frame
            number[-1] += user
            clock = np.full((1, count), frame / self.fps)
            since, between = (frame - last) / self.fps, gaps.reshape(-1, count) / self.fps
            features = np.concatenate([since, clock, number, between]).T.astype(np.float32)
            features[np.isnan(features)] = NEVER
            for kind, events in enumerate(act(frame, features)):
                gaps[kind, 1:, events] = gaps[kind, :-1, events]
                gaps[kind, 0, events] = frame - last[kind, events]
                last[kind, events] = frame
                number[kind] += events
