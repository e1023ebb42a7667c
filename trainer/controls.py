"""Rungs without a model: what the clock alone, and what the history of events alone, tell about when to speak.

    metronome    an event every `period` seconds from a phase on: those of the best event F1 on train
    history      gradient boosting on what the context holds before a frame, without its texts and without pictures: how
                 long ago the assistant spoke, the state changed and the user spoke, how often, the last gaps, the clock

Free-running, `history` conditions on its own speech and updates; its threshold is that of the best event F1 of
free-running passes over val. Where the metronome is better on val, it speaks as the metronome does: it has the clock,
too, and a rung that does worse than the one below it would make the next one look good. Both are fitted on all
annotated frames of train (of at most MAX_FRAMES), as an arm sees them over its epochs: so probabilities need no
correction.

    C clips    F frames of the longest clip    K features
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
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
from trainer.evaluation.event_metrics import (
    TOLERANCE,
    Beat,
    best_beat,
    most_matches,
    predicted_frames,
    targets_of,
    threshold_frames,
)
from trainer.evaluation.metrics import METRICS_FILE, Evaluation, FreeRunning, Thresholds, hold, write_evaluation
from trainer.evaluation.scores import Floats, ScoredClip, Singles
from trainer.sequence import texts_at

CONTROLS: Final = ("metronome", "history")
VERSION: Final = 3  # of the features and the fit: what another wrote is made again
MAX_FRAMES: Final = 2_000_000  # of train
CLIPS_AT_ONCE: Final = 2_000
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
OfClips = Mapping[str, Floats]  # thresholds by head [C]
Speech = Sequence[Sequence[str | None]] | None  # [C] of [F]


def score_control(
    name: str, data: Path, split: str, out: Path, seed: int, settings: Settings, live: bool = True
) -> Evaluation:
    """Fit the control on train, score val and `split`, and write into `out` what `trainer.evaluate` writes of a run."""
    if name not in CONTROLS:
        raise InputError(f"control {name!r}: not known, expected one of {', '.join(CONTROLS)}")
    held, train = hold(data, split), Split(data, "train")
    (out / METRICS_FILE).unlink(missing_ok=True)  # the last to be written: with it the folder is complete
    shards = [shard for shard in train.manifest["shards"] if (shard["split"], shard["table"]) == (train.name, "frames")]
    share = min(1.0, MAX_FRAMES / sum(shard["rows"] for shard in shards))
    drawn = np.random.default_rng(seed).permutation(len(train))[: math.ceil(share * len(train))]
    clips = [train.clip(number, rate=1.0) for number in sorted(drawn.tolist())]
    clock = Metronome({head: beat for head in HEADS if (beat := best_beat(clips, head, settings))})
    control = clock if name == "metronome" else History.fit(clips, seed)
    origin: dict[str, Any] = {
        "data": str(data.resolve()),
        "data_key": {part: s.key for part, s in held.all.items()},
        "model": control_key(name, train, seed),
        "arm": name,
    }
    scored = {part: list(control.teacher_forced(list(s.in_order()))) for part, s in held.all.items()}

    def free_running_pass(thresholds: Thresholds) -> FreeRunning:
        assert held.val is not None  # thresholds were chosen there
        val, measured = scored[held.val.name], [one.clip for one in scored[split]]
        chosen = {head: thresholds.event.get(head, math.inf) for head in HEADS}
        chosen["speaking"], f1 = _best_free_running(control, val, chosen, settings)
        rows = {head: np.full(len(measured), value) for head, value in chosen.items()}
        beat = clock.beats.get("speaking")
        ticking = (beat and beat.f1([one.clip for one in val], "speaking", settings)) or 0.0
        if isinstance(control, History) and beat and ticking >= f1:
            zeros = dict.fromkeys(HEADS, np.zeros(len(measured)))
            speech = [one.said or [] for one in clock.free_running(measured, zeros, settings.refractory_s)]
            clips = control.free_running(measured, rows, settings.refractory_s, speech)
            note = f"free-running, it speaks as the metronome, whose event F1 on val is {ticking:.3f}, not {f1:.3f}"
            return FreeRunning(list(clips), {"threshold": None, "speaks_as": "metronome"}, (note,))
        clips = control.free_running(measured, rows, settings.refractory_s)
        return FreeRunning(list(clips), {"threshold": chosen["speaking"]})

    return write_evaluation(out, scored, held, settings, origin, free_running_pass if live else None)


def control_key(name: str, train: Split, seed: int) -> str:
    """Names what the control is a function of, beside the settings, as `run_hash` names a checkpoint."""
    return hashlib.sha256(f"{name} {VERSION} {train.key} {seed}".encode()).hexdigest()


def _best_free_running(
    control: Metronome | History, val: Sequence[ScoredClip], thresholds: Mapping[str, float], settings: Settings
) -> tuple[float, float]:
    """(the threshold for speaking of the best event F1, free-running on val, the highest of equals; that F1)."""
    clips = [scored.clip for scored in val]
    targets = targets_of(clips, "speaking", settings)
    falling = np.sort(np.concatenate([scored.logits["speaking"] for scored in val]))[::-1]
    references = sum(target.references for target in targets)
    ranks = np.geomspace(max(1, references // 4), len(falling), CUTS).astype(int) - 1
    tried = np.setdiff1d(falling[ranks], falling[-1:])[::-1].astype(np.float64)  # the lowest is no cut
    if not len(tried):
        return thresholds["speaking"], 0.0
    rows = {head: np.full(len(val) * len(tried), value) for head, value in thresholds.items()}
    rows["speaking"] = np.repeat(tried, len(val))
    counts = np.zeros((len(tried), 2))  # matches, predictions
    for i, run in enumerate(control.free_running(clips * len(tried), rows, settings.refractory_s)):
        fired = predicted_frames(run, "speaking", None, settings.refractory_s) - run.clip.start_frame
        counts[i // len(val)] += most_matches(targets[i % len(val)].windows, fired), len(fired)
    f1 = 2 * counts[:, 0] / (references + counts[:, 1])
    return float(tried[f1.argmax()]), float(f1.max())


def _acted(scored: ScoredClip, events: Mask) -> ScoredClip:
    """events: bool [2, F of the clip]; speech has no text, an update says nothing."""
    said = ["" if spoke else None for spoke in events[0].tolist()]
    updates = [() if changed else None for changed in events[1].tolist()] if "dst_update" in scored.logits else None
    return ScoredClip(scored.clip, scored.logits, scored.probabilities, said, updates)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Metronome:
    """Logits are 1 at a tick, else -1. A head without events on train is absent."""

    beats: Mapping[str, Beat]

    def teacher_forced(self, clips: Sequence[ClipExample]) -> Iterator[ScoredClip]:
        for clip in clips:
            logits = {head: np.full(clip.num_frames, -1, np.float32) for head in self.beats}
            for head, beat in self.beats.items():
                logits[head][beat.ticks(clip)] = 1
            yield ScoredClip(clip, logits, {})

    def free_running(
        self, clips: Sequence[ClipExample], thresholds: OfClips, refractory_s: float
    ) -> Iterator[ScoredClip]:
        for i, scored in enumerate(self.teacher_forced(clips)):
            events = np.zeros((2, scored.clip.num_frames), bool)
            for head in scored.logits:
                fired = threshold_frames(scored, head, float(thresholds[head][i]), refractory_s)
                events[HEADS.index(head), fired] = True
            yield _acted(scored, events)


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
            yield ScoredClip(clip, logits, {head: expit(values) for head, values in logits.items()})

    def free_running(
        self, clips: Sequence[ClipExample], thresholds: OfClips, refractory_s: float, speech: Speech = None
    ) -> Iterator[ScoredClip]:
        """speech: what it says after each frame of each clip, instead of speaking where a threshold is reached."""
        for first in range(0, len(clips), CLIPS_AT_ONCE):
            own = clips[first : first + CLIPS_AT_ONCE]
            sizes, fps = np.array([clip.num_frames for clip in own]), np.array([clip.fps for clip in own])
            events = np.zeros((2, len(own), sizes.max()), bool)
            logits, last = np.zeros(events.shape, np.float32), np.full(events.shape[:2], -np.inf)
            for frame, features in _contexts(own, events):
                active = np.flatnonzero(frame < sizes)
                for head, values in self.logits(features[active]).items():
                    row = HEADS.index(head)
                    logits[row, active, frame] = values
                    rested = (frame - last[row, active]) / fps[active] >= refractory_s - TOLERANCE
                    fires = rested & (values >= thresholds[head][first + active])
                    if speech is not None and head == "speaking":
                        fires = np.array([speech[first + i][frame] is not None for i in active.tolist()])
                    events[row, active, frame] = fires
                    last[row, events[row, :, frame]] = frame
            for i, clip in enumerate(own):
                scores = {head: logits[HEADS.index(head), i, : clip.num_frames] for head in self.classifiers}
                scored = ScoredClip(clip, scores, {head: expit(values) for head, values in scores.items()})
                yield _acted(scored, events[:, i, : clip.num_frames])


def context_features(clips: Sequence[ClipExample]) -> Iterator[Singles]:
    """Each clip's FEATURES before every decision, float32 [F of the clip, K], with the reference's events."""
    for first in range(0, len(clips), CLIPS_AT_ONCE):
        own = clips[first : first + CLIPS_AT_ONCE]
        events = _marks(own, *ROLE_OF.values())
        features = np.empty((*events.shape[1:], len(FEATURES)), np.float32)
        for frame, before in _contexts(own, events):
            features[:, frame] = before
        yield from (features[i, : clip.num_frames] for i, clip in enumerate(own))


def _marks(clips: Sequence[ClipExample], *roles: str) -> Mask:
    """bool [roles, C, F]: where texts of the role stand."""
    marks = np.zeros((len(roles), len(clips), max(clip.num_frames for clip in clips)), bool)
    for kind, role in enumerate(roles):
        for i, clip in enumerate(clips):
            marks[kind, i, [frame - clip.start_frame for frame in texts_at(clip, role)]] = True
    return marks


def _contexts(clips: Sequence[ClipExample], events: Mask) -> Iterator[tuple[int, Singles]]:
    """(frame from the clips' start, FEATURES before it [C, K]), frame after frame, all clips at once.

    events: bool [2, C, F], what happens after each frame. The caller may fill in a frame's before asking for the next.
    """
    (user,), fps = _marks(clips, "user"), np.array([clip.fps for clip in clips])
    last, number = np.full((len(KINDS), len(clips)), np.nan), np.zeros((len(KINDS), len(clips)))
    gaps = np.full((len(ROLE_OF), GAPS, len(clips)), np.nan)
    for frame in range(user.shape[1]):
        last[-1, user[:, frame]] = frame
        number[-1] += user[:, frame]
        clock = np.full((1, len(clips)), frame / fps)
        since, between = (frame - last) / fps, gaps.reshape(-1, len(clips)) / fps
        features = np.concatenate([since, clock, number, between]).T.astype(np.float32)
        features[np.isnan(features)] = NEVER
        yield frame, features
        for kind, happened in enumerate(events[:, :, frame]):
            gaps[kind, 1:, happened] = gaps[kind, :-1, happened]
            gaps[kind, 0, happened] = frame - last[kind, happened]
            last[kind, happened] = frame
            number[kind] += happened
