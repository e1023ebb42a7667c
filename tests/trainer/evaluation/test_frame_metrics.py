from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scored import clip_of, noisy_clips
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from trainer.config import Settings
from trainer.evaluation import frame_metrics
from trainer.evaluation.frame_metrics import HeadFrames, best_threshold, head_frames, ranking, report_frames
from trainer.evaluation.metrics import Thresholds, measure

RECORDINGS = [f"r{i}" for i in range(5)]


def frames_of(scores, labels, other=None, probabilities=None, recording=None) -> HeadFrames:
    recording = np.zeros(len(labels), np.int64) if recording is None else np.array(recording)
    return HeadFrames(
        scores=np.array(scores, np.float32),
        positive=np.array(labels) == 1,
        other=np.zeros(len(labels), np.int8) if other is None else np.array(other, np.int8),
        probabilities=None if probabilities is None else np.array(probabilities, np.float32),
        recording=recording,
        num_recordings=int(recording.max(initial=0)) + 1,
    )


def test_ranking_of_four_frames_by_hand():
    report = report_frames(frames_of([4, 3, 2, 1], [1, 0, 1, 0]), 2.5, 10)
    assert report["ap"] == pytest.approx((1 / 1 + 2 / 3) / 2, abs=1e-15)
    assert (report["chance"], report["auroc"]) == (0.5, 0.75)  # 3 of the 4 pairs are in order
    assert (report["precision"], report["recall"], report["f1"]) == (0.5, 0.5, 0.5)
    assert (report["frames"], report["positives"]) == (4, 2)
    ties = report_frames(frames_of([2, 2, 2, 1], [1, 0, 1, 0]), None, 10)
    assert (ties["ap"], ties["auroc"]) == (2 / 3, (2 * 0.5 + 2 * 1) / 4)


@pytest.mark.parametrize(
    ("labels", "threshold", "expected"),
    [
        ([0, 0], 1.5, {"ap": None, "chance": 0, "auroc": None, "recall": None, "precision": 0, "f1": 0,
                       "balanced_accuracy": None}),
        ([0, 1], 9.0, {"precision": None, "recall": 0, "f1": 0}),
        ([], None, {"ap": None, "chance": None, "calibration": None, "f1": None}),
    ],
)  # fmt: skip
def test_what_needs_both_classes_is_none_without(labels, threshold, expected):
    report = report_frames(frames_of([1, 2][: len(labels)], labels), threshold, 10)
    assert {name: report[name] for name in expected} == expected


def test_calibration_of_two_bins_by_hand():
    labels, p = [1, 0, 0, 1, 1], [0.1, 0.3, 0.2, 0.5, 1.0]  # an edge belongs to the bin above, 1 to the last
    report = report_frames(frames_of(p, labels, probabilities=p), None, 2)["calibration"]
    # three frames at 0.2 on average, one of them positive; two at 0.75, both positive
    assert report["ece"] == pytest.approx((3 * abs(1 / 3 - 0.2) + 2 * abs(1 - 0.75)) / 5, rel=1e-6)
    low, high = report["bins"]
    assert (low["low"], low["high"], low["frames"], low["positive"]) == (0, 0.5, 3, 1 / 3)
    assert (high["frames"], high["positive"]) == (2, 1)


def test_a_heads_own_events_are_told_from_the_others():
    """Six frames: own event, none, both, the other's, none, own where the other head is not supervised."""
    report = report_frames(frames_of([1, 2, 6, 5, 0, 9], [1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, -100]), None, 10)
    alone = report["alone"]
    assert (alone["frames"], alone["positives"], alone["ap"], alone["chance"]) == (3, 1, 0.5, 1 / 3)
    assert (report["both"]["frames"], report["both"]["positives"], report["both"]["ap"]) == (3, 1, 1.0)


def test_frames_are_counted_by_both_labels():
    labels = np.array([[1, 1, 0, 0, -100, 0], [0, 1, 1, 0, 0, -100]], np.int8)
    scored = clip_of(frames=6, speaking=range(6), updating=range(6))
    scored = replace(scored, clip=replace(scored.clip, labels=labels))
    cells = {"speaking_only": 1, "dst_update_only": 1, "both": 1, "neither": 3}  # or unknown to one head
    assert measure([scored], Thresholds({}, {}), Settings())["cells"] == cells
    speaking = head_frames([scored], "speaking", ["r-c0"])
    assert (speaking.scores.tolist(), speaking.other.tolist()) == ([0, 1, 2, 3, 5], [0, 1, 1, 0, -100])
    assert head_frames([scored], "dst_update", ["r-c0"]).scores.tolist() == [0, 1, 2, 3, 4]
    assert head_frames([clip_of(frames=4, speaking=range(4))], "dst_update", ["r-c0"]) is None


@pytest.mark.parametrize(
    ("scores", "positive", "threshold"),
    [
        ([5, 4, 3, 2], [1, 0, 1, 0], 2.5),  # F1 by cut: {5}: 2/3, {5, 4}: 1/2, {5, 4, 3}: 4/5; never all
        ([4, 3, 2, 1, 0], [1, 0, 0, 1, 0], 3.5),  # {4}: 2/3, {4, 3}: 1/2, {4, 3, 2, 1}: 2/3; the highest of equals
        ([1, 2], [0, 0], None),
    ],
)
def test_the_best_threshold_lies_midway_between_scores(scores, positive, threshold):
    assert best_threshold(frames_of(scores, positive)) == threshold


def test_numbers_are_scikit_learns():
    frames = head_frames(noisy_clips(6), "speaking", RECORDINGS)
    report = report_frames(frames, 1.25, 10)
    y, fired = frames.positive, frames.scores >= 1.25
    assert report["ap"] == average_precision_score(y, frames.scores)
    assert report["auroc"] == roc_auc_score(y, frames.scores)
    assert report["precision"] == precision_score(y, fired)
    assert report["recall"] == recall_score(y, fired)
    assert report["f1"] == f1_score(y, fired)
    assert report["balanced_accuracy"] == balanced_accuracy_score(y, fired)
    best = f1_score(y, frames.scores >= best_threshold(frames))
    assert best == max(f1_score(y, frames.scores > cut) for cut in np.unique(frames.scores))


@pytest.mark.parametrize(("cells", "tolerance"), [(None, 1e-9), (200, 1e-3)])  # the draws differ by 0.01
def test_weighted_ranking_is_that_of_repeated_frames_and_close_to_it_in_few_cells(monkeypatch, cells, tolerance):
    """By scikit-learn, of each frame as often as its recording is drawn."""
    for name in ("FEWEST_CELLS", "MOST_CELLS") if cells else ():
        monkeypatch.setattr(frame_metrics, name, cells)
    rng = np.random.default_rng(0)
    labels, recording = rng.random(9_000) < 0.1, np.repeat(np.arange(30), 300)
    frames = frames_of(2 * labels + rng.normal(size=9_000), labels, recording=recording)
    weights = rng.multinomial(30, [1 / 30] * 30, size=4)
    for drawn, found in zip(weights, ranking(frames)(weights).T, strict=True):
        rows = np.repeat(np.arange(9_000), drawn[recording])
        y, scores = frames.positive[rows], frames.scores[rows]
        expected = average_precision_score(y, scores), roc_auc_score(y, scores)
        assert found.tolist() == pytest.approx(expected, abs=tolerance)
