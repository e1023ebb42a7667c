"""Frame level: how well a head ranks frames, what it does at a threshold, whether its probabilities are to be believed.

Over all supervised frames of all clips at once (never averaged over clips or batches). Ranking is scikit-learn's; under
a bootstrap's weights it is our own, sorted once: 10,000 draws over 5,000 frames take 0.04 s, where as many calls of
scikit-learn take 16. Speaking and DST events coincide on real data, so each head is also measured on its events alone.

    N supervised frames    R recordings    B draws    J scores at which a positive frame lies (ties are one)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from trainer.evaluation.scores import HEADS, Floats, Ints, ScoredClip, Singles, canonical

Mask = npt.NDArray[np.bool_]
Estimator = Callable[[Ints], Floats]  # how often each recording is drawn [B, R] -> the metric [B], NaN where undefined

NEITHER, OWN, OTHER, BOTH, UNKNOWN = 0, 1, 2, 3, -1  # which heads a frame is positive for, as one of them sees it
BLOCK: Final = 1 << 20  # numbers in one table or chunk: 8 MB, a handful of which are alive at a time


@dataclass(frozen=True, eq=False)
class HeadFrames:
    """The supervised frames of one head, by (clip_id, frame)."""

    scores: Singles  # [N] logits
    positive: Mask  # [N]
    cell: npt.NDArray[np.int8]  # [N] NEITHER, OWN, OTHER or BOTH; UNKNOWN where the other head is not supervised
    probabilities: Singles | None  # [N]
    recording: Ints  # [N] index into the recordings
    num_recordings: int

    def only(self, chosen: Mask) -> HeadFrames:
        """Those frames alone."""
        return HeadFrames(
            self.scores[chosen],
            self.positive[chosen],
            self.cell[chosen],
            None if self.probabilities is None else self.probabilities[chosen],
            self.recording[chosen],
            self.num_recordings,
        )


def recordings_of(clips: Sequence[ScoredClip]) -> list[str]:
    return sorted({scored.clip.recording_id for scored in clips})


def head_frames(clips: Sequence[ScoredClip], head: str, recordings: Sequence[str]) -> HeadFrames | None:
    """The head's supervised frames; None where the model lacks the head. `recordings`: sorted, at least the clips'."""
    clips = canonical(clips)
    if not clips or any(head not in scored.logits for scored in clips):
        return None
    number = {name: i for i, name in enumerate(recordings)}
    row = HEADS.index(head)
    own, other = (np.concatenate([scored.clip.labels[r] for scored in clips]) for r in (row, 1 - row))
    known = own >= 0
    cell = np.where(other >= 0, (own == 1) * OWN + (other == 1) * OTHER, UNKNOWN).astype(np.int8)
    believed = all(head in scored.probabilities for scored in clips)
    return HeadFrames(
        scores=np.concatenate([scored.logits[head] for scored in clips])[known],
        positive=(own == 1)[known],
        cell=cell[known],
        probabilities=np.concatenate([s.probabilities[head] for s in clips])[known] if believed else None,
        recording=np.repeat(
            [number[scored.clip.recording_id] for scored in clips], [scored.clip.num_frames for scored in clips]
        )[known],
        num_recordings=len(recordings),
    )


def cells(clips: Sequence[ScoredClip]) -> dict[str, int]:
    """How many frames are positive for which heads, among those supervised for both."""
    labels = np.concatenate([scored.clip.labels for scored in clips], 1)
    speaks, updates = labels[:, (labels >= 0).all(0)] == 1
    return {
        "speaking_only": int((speaks & ~updates).sum()),
        "dst_update_only": int((updates & ~speaks).sum()),
        "both": int((speaks & updates).sum()),
        "neither": int((~speaks & ~updates).sum()),
    }


def report_frames(frames: HeadFrames, threshold: float | None, bins: int) -> dict[str, Any]:
    """Plain numbers; None where undefined: no positive or no negative frame, no threshold, no probabilities."""
    return {
        **_ranking(frames),
        "threshold": threshold,
        **plain(confusion_rates(confusion(frames, threshold).sum(0))),
        "calibration": calibration(frames, bins),
        "alone": _ranking(alone(frames)),
        "both": _ranking(frames.only((frames.cell == BOTH) | (frames.cell == NEITHER))),
        "auroc_against_other": _auroc(frames.only((frames.cell != NEITHER) & (frames.cell != UNKNOWN))),
    }


# ---- ranking -----------------------------------------------------------------------------------------


def alone(frames: HeadFrames) -> HeadFrames:
    """The frames positive for this head only, and those positive for neither."""
    return frames.only((frames.cell == OWN) | (frames.cell == NEITHER))


def _ranking(frames: HeadFrames) -> dict[str, Any]:
    n, positives = len(frames.positive), int(frames.positive.sum())
    ap = float(average_precision_score(frames.positive, frames.scores)) if positives else None
    return {
        "frames": n,
        "positives": positives,
        "ap": ap,
        "chance": positives / n if n else None,  # the average precision of guessing
        "auroc": _auroc(frames),
    }


def _auroc(frames: HeadFrames) -> float | None:
    if frames.positive.all() or not frames.positive.any():
        return None
    return float(roc_auc_score(frames.positive, frames.scores))


class Ranking:
    """Scores against labels, sorted once: average precision and AUROC under any weights of the recordings.

    Ties are treated as scikit-learn treats them: frames of equal score are passed at once. Only the J scores at which
    positives lie count; how many frames stand above each, per recording, times the weights, is a matrix product of
    whole numbers, hence exact and independent of the frames' order.
    """

    def __init__(self, frames: HeadFrames) -> None:
        self.num_recordings = frames.num_recordings
        _, group = np.unique(-frames.scores, return_inverse=True)  # 0 is the highest score
        holds = np.bincount(group, frames.positive) > 0
        column: Ints = (np.cumsum(holds) - holds)[group]  # the first positive score that is not above the frame's
        order = np.argsort(column, kind="stable")
        self._column: Ints = column[order]
        self._positive: Mask = frames.positive[order]
        self._recording, self._tied = frames.recording[order], holds[group][order]
        self._columns = int(holds.sum())
        self.positives = self._count(frames.recording[frames.positive])
        self.negatives = self._count(frames.recording[~frames.positive])

    def average_precision(self, weights: Ints) -> Floats:
        """float64 [B] for weights [B, R]; NaN where no positive frame is drawn."""
        total = np.zeros(len(weights))
        for own, above, hits in self._tables():
            for rows in chunks(len(weights), own.shape[1]):
                w = weights[rows].astype(np.float64)
                total[rows] += ((w @ own) * (w @ hits) / np.maximum(w @ above, 1)).sum(1)
        return ratio(total, weights @ self.positives)

    def auroc(self, weights: Ints) -> Floats:
        """float64 [B] for weights [B, R]; NaN where a class is not drawn."""
        won = np.zeros((self.num_recordings, self.num_recordings))  # pairs of a positive of r and a negative of s below
        for own, above, hits in self._tables():
            won += own @ (self.negatives[:, None] - (above - hits)).T
        won += self._ties() / 2
        w = weights.astype(np.float64)
        return ratio(((w @ won) * w).sum(1), (w @ self.positives) * (w @ self.negatives))

    def _count(self, recording: Ints) -> Floats:
        return np.bincount(recording, minlength=self.num_recordings).astype(np.float64)

    def _tables(self) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Blocks [R, b] of the J scores: positives there, frames there or above, positives there or above."""
        width = max(1, BLOCK // self.num_recordings)
        base_all, base_hits = np.zeros((self.num_recordings, 1)), np.zeros((self.num_recordings, 1))
        for first in range(0, self._columns, width):
            b = min(width, self._columns - first)
            own = self._table(first, b, self._positive)
            above = base_all + np.cumsum(self._table(first, b, None), 1)
            hits = base_hits + np.cumsum(own, 1)
            base_all, base_hits = above[:, -1:], hits[:, -1:]
            yield own, above, hits

    def _table(self, first: int, b: int, chosen: Mask | None) -> Floats:
        """[R, b]: how many frames (of those chosen) belong to each of the scores first .. first + b."""
        low, high = np.searchsorted(self._column, [first, first + b])
        own = slice(low, high) if chosen is None else np.flatnonzero(chosen[low:high]) + low
        flat = self._recording[own] * b + self._column[own] - first
        return np.bincount(flat, minlength=self.num_recordings * b).reshape(-1, b).astype(np.float64)

    def _ties(self) -> Floats:
        """[R, R]: pairs of a positive of r and a negative of s that have the same score."""
        pairs = np.zeros((self.num_recordings, self.num_recordings))
        width = max(1, BLOCK // self.num_recordings)
        for first in range(0, self._columns, width):
            b = min(width, self._columns - first)
            pairs += self._table(first, b, self._positive) @ self._table(first, b, self._tied & ~self._positive).T
        return pairs


# ---- at a threshold ----------------------------------------------------------------------------------


def between(above: float, below: float) -> float:
    """A threshold between two adjacent scores, on neither; a float32 falls on the same side of it as its float64."""
    middle = (above + below) / 2
    return middle if np.float32(middle) > below else above


def beyond(score: float) -> float:
    """A threshold that no such score reaches, however large."""
    return score + max(1.0, abs(score))


def best_threshold(scores: Singles, positive: Mask) -> float | None:
    """The threshold (`>=` fires) of the best F1, the highest of equals; None without a positive frame.

    It separates scores: a head that gives all frames the same score says nothing, and stays silent.
    """
    if not positive.any():
        return None
    rising, group = np.unique(scores, return_inverse=True)
    if len(rising) == 1:
        return beyond(float(rising[0]))
    fired = np.cumsum(np.bincount(group)[:0:-1])  # by each cut but the lowest, at which all frames fire
    hits = np.cumsum(np.bincount(group, positive)[:0:-1])
    best = len(rising) - 1 - int((2 * hits / (fired + positive.sum())).argmax())
    return between(float(rising[best]), float(rising[best - 1]))


def fires(scores: Singles, threshold: float) -> Mask:
    """bool, as `scores`: compared in float64, so that a threshold between two scores stays between them."""
    return scores.astype(np.float64) >= threshold


def confusion(frames: HeadFrames, threshold: float | None) -> Ints:
    """int64 [R, 4]: true positives, false positives, false negatives, true negatives; all 0 without a threshold."""
    if threshold is None:
        return np.zeros((frames.num_recordings, 4), np.int64)
    kind = np.where(fires(frames.scores, threshold), 1 - frames.positive, 3 - frames.positive)
    return np.bincount(frames.recording * 4 + kind, minlength=4 * frames.num_recordings).reshape(-1, 4)


def confusion_rates(counts: npt.NDArray[Any]) -> dict[str, Floats]:
    """From [..., 4] counts (of `confusion`): precision, recall, f1, balanced_accuracy, NaN where undefined."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    recall = ratio(tp, tp + fn)
    return {
        "precision": ratio(tp, tp + fp),
        "recall": recall,
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
        "balanced_accuracy": (recall + ratio(tn, tn + fp)) / 2,
    }


# ---- calibration -------------------------------------------------------------------------------------


def bin_sums(frames: HeadFrames, bins: int) -> Floats | None:
    """float64 [R, 3, bins]: frames, sum of their probabilities, positives, in equal-width bins of the probability."""
    if frames.probabilities is None:
        return None
    p = frames.probabilities.astype(np.float64)
    flat = frames.recording * bins + np.minimum((p * bins).astype(np.int64), bins - 1)
    sums = [np.bincount(flat, w, frames.num_recordings * bins) for w in (np.ones_like(p), p, frames.positive)]
    return np.stack([s.reshape(-1, bins) for s in sums], axis=1)


def expected_calibration_error(sums: Floats) -> Floats:
    """[...] from [..., 3, bins]: the mean over frames of |mean probability - share of positives| of the frame's bin."""
    return ratio(np.abs(sums[..., 1, :] - sums[..., 2, :]).sum(-1), sums[..., 0, :].sum(-1))


def calibration(frames: HeadFrames, bins: int) -> dict[str, Any] | None:
    """Expected calibration error and the reliability curve; None without probabilities or frames."""
    sums = bin_sums(frames, bins)
    if sums is None or not len(frames.positive):
        return None
    n, probability, positive = sums.sum(0)
    curve = [
        {
            "low": i / bins,
            "high": (i + 1) / bins,
            "frames": int(n[i]),
            "probability": probability[i] / n[i] if n[i] else None,
            "positive": positive[i] / n[i] if n[i] else None,
        }
        for i in range(bins)
    ]
    return {"ece": float(expected_calibration_error(sums.sum(0))), "bins": curve}


# ---- arithmetic --------------------------------------------------------------------------------------


def ratio(a: Any, b: Any) -> Floats:
    """a / b elementwise, NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


def plain(values: dict[str, Floats]) -> dict[str, float | None]:
    """Scalars as JSON has them: NaN is None."""
    return {name: None if np.isnan(value) else float(value) for name, value in values.items()}


def chunks(rows: int, width: int) -> list[slice]:
    """Slices of `rows` such that rows x width stays near BLOCK."""
    step = max(1, BLOCK // max(width, 1))
    return [slice(first, first + step) for first in range(0, rows, step)]
