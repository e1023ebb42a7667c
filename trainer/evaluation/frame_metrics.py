"""Frame metrics of one head: ranking (AP, AUROC), F1 at a threshold, calibration.

Computed over all supervised frames of all clips at once, never averaged over clips. Reported numbers are
scikit-learn's; under the bootstrap's weights `Ranking` sorts once and multiplies sparse counts per recording. Speaking
and DST events often coincide, so each head is also measured on the frames where the other has no event.

    N supervised frames    R recordings    B draws    J distinct scores of positive frames
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.schema import HEADS
from trainer.evaluation.bootstrap import Estimator, Floats
from trainer.evaluation.scores import Ints, ScoredClip, Singles, canonical

Mask = npt.NDArray[np.bool_]

BLOCK: Final = 1 << 20  # numbers in a temporary array: 8 MB, a handful at a time


@dataclass(frozen=True, eq=False)
class HeadFrames:
    """The supervised frames of one head, by (clip_id, frame)."""

    scores: Singles  # [N] logits
    positive: Mask  # [N]
    other: npt.NDArray[np.int8]  # [N] the other head's label: 1, 0 or -100
    probabilities: Singles | None  # [N]
    recording: Ints  # [N] index into the recordings
    num_recordings: int

    def only(self, chosen: Mask) -> HeadFrames:
        arrays: dict[str, Any] = {k: v[chosen] for k, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **arrays)

    def alone(self) -> HeadFrames:
        """Without the frames of the other head's events."""
        return self.only(self.other == 0)


def head_frames(clips: Sequence[ScoredClip], head: str, recordings: Sequence[str]) -> HeadFrames | None:
    """The head's supervised frames; None where the model lacks the head. `recordings`: sorted, at least the clips'."""
    clips = canonical(clips)
    if not clips or any(head not in scored.logits for scored in clips):
        return None
    row = HEADS.index(head)
    own, other = (np.concatenate([scored.clip.labels[r] for scored in clips]) for r in (row, 1 - row))
    calibrated = all(head in scored.probabilities for scored in clips)
    recording = np.searchsorted(recordings, [scored.clip.recording_id for scored in clips])
    return HeadFrames(
        scores=np.concatenate([scored.logits[head] for scored in clips]),
        positive=own == 1,
        other=other,
        probabilities=np.concatenate([scored.probabilities[head] for scored in clips]) if calibrated else None,
        recording=np.repeat(recording, [scored.clip.num_frames for scored in clips]),
        num_recordings=len(recordings),
    ).only(own >= 0)


def report_frames(frames: HeadFrames, threshold: float | None, bins: int) -> dict[str, Any]:
    """Plain numbers; None where undefined: no positive or no negative frame, no threshold, no probabilities."""
    any_event = frames.positive | (frames.other == 1)
    return {
        **_ranking(frames),
        "threshold": threshold,
        **plain(confusion_rates(confusion(frames, threshold).sum(0))),
        "calibration": calibration(frames, bins),
        "alone": _ranking(frames.alone()),
        "both": _ranking(frames.only(frames.other == frames.positive)),
        "auroc_against_other": _ranking(frames.only(any_event & (frames.other >= 0)))["auroc"],
    }


def frame_estimators(frames: HeadFrames, threshold: float | None, bins: int) -> dict[str, Estimator]:
    """Some of `report_frames`, by dotted path, as functions of how often each recording is drawn."""
    ranking, alone = Ranking(frames), Ranking(frames.alone())
    counts, in_bins = confusion(frames, threshold), bin_sums(frames, bins)
    found: dict[str, Estimator] = {
        "ap": ranking.average_precision,
        "auroc": ranking.auroc,
        "alone.ap": alone.average_precision,
        "f1": lambda weights: confusion_rates(weights @ counts)["f1"],
        "balanced_accuracy": lambda weights: confusion_rates(weights @ counts)["balanced_accuracy"],
    }
    if in_bins is not None:
        found["calibration.ece"] = lambda weights: calibration_error(np.tensordot(weights.astype(float), in_bins, 1))
    return found


def _ranking(frames: HeadFrames) -> dict[str, Any]:
    n, positives = len(frames.positive), int(frames.positive.sum())
    return {
        "frames": n,
        "positives": positives,
        "ap": float(average_precision_score(frames.positive, frames.scores)) if positives else None,
        "chance": positives / n if n else None,  # the average precision of guessing
        "auroc": float(roc_auc_score(frames.positive, frames.scores)) if 0 < positives < n else None,
    }


class Ranking:
    """Average precision and AUROC under any weights of the recordings, exact, tied scores as in scikit-learn.

    Only the J scores at which positive frames lie matter: frames are counted by recording and by the first such score
    that is not above their own. B draws cost B times the distinct (score, recording) pairs, whatever R is.
    """

    def __init__(self, frames: HeadFrames) -> None:
        _, rank = np.unique(-frames.scores, return_inverse=True)  # 0 is the highest score
        has_positive = np.bincount(rank, frames.positive) > 0
        level: Ints = (np.cumsum(has_positive) - has_positive)[rank]  # [N]: a frame below all positives has level J
        shape = (int(has_positive.sum()) + 1, frames.num_recordings)

        def count(chosen: Mask) -> Any:
            ones = np.ones(int(chosen.sum()))
            return coo_array((ones, (level[chosen], frames.recording[chosen])), shape).tocsr()

        self._positives, self._negatives = count(frames.positive), count(~frames.positive)  # [J + 1, R]
        self._frames = self._positives + self._negatives
        self._tied = count(~frames.positive & has_positive[rank])  # negatives with a positive's very score

    def average_precision(self, weights: Ints) -> Floats:
        """float64 [B] for weights [B, R]; NaN where no positive frame is drawn."""
        found = np.empty(len(weights))
        for rows, drawn in self._draws(weights):
            positives = self._positives @ drawn  # [J + 1, b]
            hits, fired = np.cumsum(positives, axis=0), np.cumsum(self._frames @ drawn, axis=0)
            positives *= hits
            positives /= np.maximum(fired, 1, out=fired)
            found[rows] = ratio(positives.sum(0), hits[-1])
        return found

    def auroc(self, weights: Ints) -> Floats:
        """float64 [B] for weights [B, R]; NaN where a class is not drawn."""
        found = np.empty(len(weights))
        for rows, drawn in self._draws(weights):
            positives, fired = self._positives @ drawn, np.cumsum(self._negatives @ drawn, axis=0)
            below = fired[-1] - fired + self._tied @ drawn / 2
            found[rows] = ratio((positives * below).sum(0), positives.sum(0) * fired[-1])
        return found

    def _draws(self, weights: Ints) -> Iterator[tuple[slice, Floats]]:
        for rows in chunks(len(weights), self._positives.shape[0]):
            yield rows, np.ascontiguousarray(weights[rows].T, np.float64)


def between(above: float, below: float) -> float:
    """A threshold between two adjacent scores, equal to neither, also after rounding to float32. Above all scores where
    the two are equal: a head that gives all frames the same score separates nothing and stays silent."""
    if above == below:
        return above + max(1.0, abs(above))
    middle = (above + below) / 2
    return middle if np.float32(middle) > below else above


def best_threshold(scores: Singles, positive: Mask) -> float | None:
    """The threshold (`>=` fires) of the best F1, the highest of equals; None without a positive frame."""
    if not positive.any():
        return None
    rising, rank = np.unique(scores, return_inverse=True)
    if len(rising) == 1:
        return between(float(rising[0]), float(rising[0]))
    fired = np.cumsum(np.bincount(rank)[:0:-1])  # at each cut but the lowest, at which all frames fire
    hits = np.cumsum(np.bincount(rank, positive)[:0:-1])
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


def bin_sums(frames: HeadFrames, bins: int) -> Floats | None:
    """float64 [R, 3, bins]: frames, sum of their probabilities, positives, in equal-width bins of the probability."""
    if frames.probabilities is None:
        return None
    p = frames.probabilities.astype(np.float64)
    flat = frames.recording * bins + np.minimum((p * bins).astype(np.int64), bins - 1)
    sums = [np.bincount(flat, w, frames.num_recordings * bins) for w in (None, p, frames.positive)]
    return np.stack([s.reshape(-1, bins) for s in sums], axis=1).astype(np.float64)


def calibration_error(sums: Floats) -> Floats:
    """ECE [...] from [..., 3, bins]: the mean over frames of |mean probability - share of positives| of their bin."""
    return ratio(np.abs(sums[..., 1, :] - sums[..., 2, :]).sum(-1), sums[..., 0, :].sum(-1))


def calibration(frames: HeadFrames, bins: int) -> dict[str, Any] | None:
    """Expected calibration error and the reliability curve; None without probabilities or frames."""
    sums = bin_sums(frames, bins)
    if sums is None or not len(frames.positive):
        return None
    curve = []
    for i, (n, probability, positive) in enumerate(sums.sum(0).T):
        means = plain({"probability": ratio(probability, n), "positive": ratio(positive, n)})
        curve.append({"low": i / bins, "high": (i + 1) / bins, "frames": int(n), **means})
    return {"ece": float(calibration_error(sums.sum(0))), "bins": curve}


def ratio(a: Any, b: Any) -> Floats:
    """a / b elementwise, NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Nested scalars as JSON has them: NaN is None."""
    return {
        name: plain(value) if isinstance(value, dict) else None if np.isnan(value) else float(value)
        for name, value in values.items()
    }


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Slices of `rows` with rows x width near BLOCK, and at least 8 rows."""
    step = max(8, BLOCK // max(width, 1))
    return (slice(first, first + step) for first in range(0, rows, step))
