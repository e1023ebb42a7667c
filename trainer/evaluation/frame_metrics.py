"""Frame metrics of one head: ranking (AP, AUROC), F1 at a threshold, calibration.

Computed over all supervised frames of all clips at once, never averaged over clips. Reported numbers are
scikit-learn's; under the bootstrap's weights `ranking` sorts once and multiplies counts per recording. Speaking and
DST events often coincide, so each head is also measured on the frames where the other has no event (`alone`), and on
those where both heads have one or none has (`both`).

    N supervised frames    R recordings    B draws    K cells of scores
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.schema import HEADS
from trainer.evaluation.bootstrap import Floats, Weights
from trainer.evaluation.scores import Ints, ScoredClip, Singles

Mask = npt.NDArray[np.bool_]

FEWEST_CELLS, MOST_CELLS, MOST_COUNTS = 1024, 1 << 14, 1 << 23  # K, and R * K, of `ranking`


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


def head_frames(clips: Sequence[ScoredClip], head: str, recordings: Sequence[str]) -> HeadFrames | None:
    """The head's supervised frames; None where the model lacks the head. `recordings`: sorted, at least the clips'."""
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
    sums, calibration = bin_sums(frames, bins), None
    if sums is not None and len(frames.positive):
        total = sums.sum(0)
        shares = {"probability": ratio(total[1], total[0]), "positive": ratio(total[2], total[0])}
        curve = [
            {"low": i / bins, "high": (i + 1) / bins, "frames": int(n)} | plain({k: v[i] for k, v in shares.items()})
            for i, n in enumerate(total[0])
        ]
        calibration = {"ece": float(calibration_error(total)), "bins": curve}
    return {
        **_ranking(frames),
        **plain(confusion_rates(confusion(frames, threshold).sum(0))),
        "calibration": calibration,
        "alone": _ranking(frames.only(frames.other == 0)),
        "both": _ranking(frames.only(frames.other == frames.positive)),
    }


def _ranking(frames: HeadFrames) -> dict[str, Any]:
    n, positives = len(frames.positive), int(frames.positive.sum())
    return {
        "frames": n,
        "positives": positives,
        "ap": float(average_precision_score(frames.positive, frames.scores)) if positives else None,
        "chance": positives / n if n else None,  # the average precision of guessing
        "auroc": float(roc_auc_score(frames.positive, frames.scores)) if 0 < positives < n else None,
    }


def weighted_frames(frames: HeadFrames, threshold: float | None, bins: int, alone: bool) -> Callable[[Weights], Any]:
    """Some of `report_frames` as a function of how often each recording is drawn, [B, R] -> [B] each; `alone`: also on
    the frames without the other head's events, which takes as long again."""
    rank = ranking(frames)
    rank_alone = ranking(frames.only(frames.other == 0)) if alone else None
    counts, in_bins = confusion(frames, threshold), bin_sums(frames, bins)

    def rates(weights: Weights) -> dict[str, Any]:
        ap, auroc = rank(weights)
        metrics: dict[str, Any] = {"ap": ap, "auroc": auroc} | confusion_rates(weights @ counts)
        if rank_alone is not None:
            metrics["alone"] = {"ap": rank_alone(weights)[0]}
        if in_bins is not None:
            metrics["calibration"] = {"ece": calibration_error(np.tensordot(weights.astype(float), in_bins, 1))}
        return metrics

    return rates


def ranking(frames: HeadFrames) -> Callable[[Weights], Floats]:
    """Average precision and AUROC, [2, B] for weights [B, R] of the recordings; NaN where a class is not drawn.

    Frames are counted by recording and cell, the highest scores first: each score of a positive frame is a cell, and
    each run of other scores between. Up to K cells this is exact. Beyond, K cells hold equal shares of the positives,
    whose order inside a cell is taken as even, and the values are shifted by the difference that this makes to the
    unweighted one, which is exact (largest error found: benchmarks/evaluate).
    """
    _, place = np.unique(-frames.scores, return_inverse=True)
    begins = np.bincount(place, frames.positive) > 0
    begins[1:] |= begins[:-1].copy()
    cell: Ints = (np.cumsum(begins) - begins[:1])[place]
    fine = _count(frames.positive, np.zeros_like(cell), cell, 1)  # [2, 1, cells]
    most = max(FEWEST_CELLS, min(MOST_CELLS, MOST_COUNTS // max(1, frames.num_recordings)))
    coarse = fine.shape[2] > most
    if coarse:
        above = np.cumsum(fine[:, 0], axis=1) - fine[:, 0] / 2  # frames of each class above the cell's middle
        share = (above * (most // 2) // np.maximum(1, fine[:, 0].sum(1, keepdims=True))).sum(0)
        cell = (np.cumsum(np.diff(share, prepend=share[0]) > 0))[cell]
    negatives, positives = _count(frames.positive, frames.recording, cell, frames.num_recordings).astype(np.float32)

    def rates(weights: Weights) -> Floats:
        single = weights.astype(np.float32)
        return _rates(single @ positives, single @ negatives, 0.5 if coarse else 0.0)

    shift = _rates(fine[1], fine[0], 0.0) - rates(np.ones((1, frames.num_recordings))) if coarse else 0.0
    return lambda weights: rates(weights) + shift


def _count(positive: Mask, recording: Ints, cell: Ints, num_recordings: int) -> npt.NDArray[Any]:
    """[2, R, K] negative and positive frames."""
    cells = int(cell.max(initial=0)) + 1
    flat = (positive * num_recordings + recording) * cells + cell
    return np.bincount(flat, minlength=2 * num_recordings * cells).reshape(2, num_recordings, cells)


def _rates(positives: npt.NDArray[Any], negatives: npt.NDArray[Any], spread: float) -> Floats:
    """[2, B] average precision and AUROC from counts [B, K], the highest scores first; spread: 0 where the frames of a
    cell tie, 0.5 where positives and negatives lie evenly in it."""
    hits, alarms = (np.cumsum(counts, axis=1, dtype=np.float64) for counts in (positives, negatives))
    below = alarms[:, -1:] - alarms + negatives / 2
    auroc = ratio((positives * below).sum(1), hits[:, -1] * alarms[:, -1])
    total = hits[:, -1].copy()
    hits -= spread * positives
    alarms += hits - spread * negatives  # frames at or above the cell, or above its middle
    return np.stack([ratio((positives * hits / np.maximum(alarms, 0.5)).sum(1), total), auroc])


def between(above: float, below: float) -> float:
    """A threshold between two adjacent scores, equal to neither, also after rounding to float32. Above all scores where
    the two are equal: a head that gives all frames the same score separates nothing and stays silent."""
    if above == below:
        return above + max(1.0, abs(above))
    middle = (above + below) / 2
    return middle if np.float32(middle) > below else above


def best_threshold(frames: HeadFrames) -> float | None:
    """The threshold (`>=` fires) of the best F1, the highest of equals; None without a positive frame."""
    if not frames.positive.any():
        return None
    rising, rank = np.unique(frames.scores, return_inverse=True)
    best = len(rising) - 1
    if best:
        fired = np.cumsum(np.bincount(rank)[:0:-1])  # at each cut but the lowest, at which all frames fire
        hits = np.cumsum(np.bincount(rank, frames.positive)[:0:-1])
        best -= int((2 * hits / (fired + frames.positive.sum())).argmax())
    return between(float(rising[best]), float(rising[max(0, best - 1)]))


def confusion(frames: HeadFrames, threshold: float | None) -> Ints:
    """int64 [R, 4]: true positives, false positives, false negatives, true negatives; all 0 without a threshold."""
    if threshold is None:
        return np.zeros((frames.num_recordings, 4), np.int64)
    fired = frames.scores.astype(np.float64) >= threshold
    kind = np.where(fired, 1 - frames.positive, 3 - frames.positive)
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
