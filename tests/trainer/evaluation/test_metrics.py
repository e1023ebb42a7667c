from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from by_hand import clip_example, dst, turn, write_shards
from scored import clip_of, noisy_clips

from trainer.evaluation.metrics import (
    METRICS,
    Settings,
    Thresholds,
    choose_thresholds,
    evaluate_scores,
    measure,
    value_at,
    weighted,
    weighted_median,
)

S = Settings()
HALF = Thresholds({"speaking": 1.25, "dst_update": 1.25}, {"speaking": 1.25, "dst_update": 1.25})
RECORDINGS = [f"r{i}" for i in range(5)]

# ---- models that are not ours, by `evaluate --scores` alone ----------------------------------------------

FRAMES, EVENTS = 400, np.arange(8, 400, 16)  # at 2 fps: speech of one frame every 8 s
SPEAKS = np.isin(np.arange(FRAMES), EVENTS)
CHANCE = len(EVENTS) / FRAMES


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    made = {
        split: [
            clip_example([turn("assistant", "x", f, f + 1) for f in EVENTS], 0, FRAMES, clip_id=f"{split}{i}", clip=i,
                         video=f"{split}{i}", rate=1.0)
            for i in range(8)
        ]
        for split in ("val", "test")
    }  # fmt: skip
    return write_shards(tmp_path_factory.mktemp("shards") / "data", made)


def every(frames, first=0):
    return np.isin(np.arange(FRAMES), np.arange(first, FRAMES, frames))


def judged(shards, path, scores):
    """What `evaluate_scores` says of the speaking logits that `scores` gives for each clip."""
    clips = [{"split": split, "clip_id": f"{split}{i}"} for split in ("test", "val") for i in range(8)]
    tables = [pl.DataFrame({**clip, "frame": range(FRAMES), "speaking_logit": scores()}) for clip in clips]
    pl.concat(tables).write_parquet(path)
    return evaluate_scores(path, shards, settings=Settings(early_s=1, late_s=1)).metrics["scores"]["speaking"]


@pytest.mark.parametrize(
    ("scores", "events", "latency_s", "ap", "frame_f1"),
    [
        (SPEAKS, (1, 1, 1), 0, 1, 1),  # an oracle
        (np.roll(SPEAKS, 2), (1, 1, 1), 1, CHANCE, 0),  # late by 1 s: its frames are all wrong
        (np.roll(SPEAKS, 3), (0, 0, 0), None, CHANCE, 0),  # out of the window
        (every(16, first=7), (1, 1, 1), -0.5, CHANCE, 0),  # metronomes: of speech's period, half a second early
        (every(8), (2 / 3, 1 / 2, 1), 0, 1 / 2, 2 / 3),  # of half of it
        (every(32, first=8), (26 / 38, 1, 13 / 25), 0, 13 / 25 + 12 / 25 * CHANCE, 26 / 38),  # of twice of it
        (np.full(FRAMES, -5), (0, None, 0), None, CHANCE, 0),  # silent
    ],
)
def test_strangers_scores_come_out_as_thought_says(shards, tmp_path, scores, events, latency_s, ap, frame_f1):
    found = judged(shards, tmp_path / "s.parquet", lambda: scores * 1.0)
    assert tuple(found["events"][name] for name in ("f1", "precision", "recall")) == pytest.approx(events)
    assert found["events"]["median_latency_s"] == latency_s
    assert (found["frames"]["ap"], found["frames"]["f1"]) == pytest.approx((ap, frame_f1), abs=1e-3)
    beat = found["events"]["metronome"]
    assert (beat["period_s"], beat["f1"]) == (pytest.approx(8, abs=0.1), 1)  # the one to compare with hits all


def test_random_scores_rank_at_chance_and_find_no_more_than_firing_at_random(shards, tmp_path):
    rng = np.random.default_rng(0)
    found = judged(shards, tmp_path / "s.parquet", lambda: rng.normal(size=FRAMES))
    assert found["frames"]["ap"] == pytest.approx(CHANCE, abs=0.02)
    assert found["frames"]["auroc"] == pytest.approx(0.5, abs=0.07)  # three standard errors of 1 / sqrt(12 * 200)
    assert found["events"]["f1"] < 0.55  # 5 of 16 frames are in a window


# ---- the same numbers however they are computed ----------------------------------------------------------


def test_permuting_clips_changes_no_digit():
    clips = noisy_clips(9, live=True)
    mixed = [clips[i] for i in np.random.default_rng(0).permutation(9)]
    assert choose_thresholds(mixed, S) == choose_thresholds(clips, S)
    assert json.dumps(measure(mixed, HALF, S)) == json.dumps(measure(clips, HALF, S))
    weights = np.random.default_rng(1).multinomial(5, [0.2] * 5, size=20)
    ours, theirs = (weighted(order, HALF, S, RECORDINGS)(weights) for order in (clips, mixed))
    for name in METRICS:
        assert np.array_equal(ours[name], theirs[name], equal_nan=True), name


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("drawn", [[1, 1, 1, 1, 1], [2, 0, 1, 0, 2], [0, 5, 0, 0, 0]])
def test_weights_count_as_recordings_repeated(drawn, live):
    clips = noisy_clips(9, live=live)
    found = weighted(clips, HALF, S, [*RECORDINGS, "without clips"])(np.array([[*drawn, 4]]))
    repeated = [
        replace(s, clip=replace(s.clip, clip_id=f"{s.clip.clip_id}-{copy}"))
        for s in clips
        for copy in range(drawn[int(s.clip.recording_id[1:])])
    ]
    report = measure(repeated, HALF, S)
    for name, metric in METRICS.items():
        got, value = found[name], value_at(report, metric.path)
        assert got.dtype == np.float64
        assert got[0] == pytest.approx(np.nan if value is None else value, rel=1e-12, nan_ok=True), name
    assert live or np.isnan(found["transition_f1"]).all()


def test_the_weighted_median_is_that_of_repeated_values():
    median = weighted_median(np.array([3.0, -1.0, 2.0, 2.0, 8.0]), np.array([0, 1, 1, 2, 2]))
    # -1, 2, 2, 3, 8; twice the third recording's 2, 8; -1, -1, 2, 2, 3; nothing
    assert median(np.array([[1, 1, 1, 0], [0, 0, 2, 0], [1, 2, 0, 7]])).tolist() == [2, 5, 2]
    assert np.isnan(median(np.array([[0, 0, 0, 3]]))).all()


def test_every_metric_has_its_place_in_the_report():
    full = measure(noisy_clips(9, live=True), HALF, S)
    assert len(METRICS) == 18
    for metric in METRICS.values():
        low, high = metric.bounds or (-np.inf, np.inf)
        assert low <= value_at(full, metric.path) <= high
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert (full["clips"], full["recordings"], full["frames"]) == (9, 5, 540)


def test_what_a_model_lacks_is_none():
    clips = [clip_of([turn("assistant", "x", 4, 5), dst(8, 9)], 0, 40, speaking=np.eye(40)[4])]
    report = measure(clips, Thresholds({}, {}), S)
    assert report["dst_update"] == {"frames": None, "events": None}
    assert (report["state"], report["speaking"]["events"]) == (None, None)
    frames = report["speaking"]["frames"]
    assert (frames["ap"], frames["f1"], frames["calibration"]) == (1, None, None)
    chosen = choose_thresholds(clips, S)
    assert (chosen.frame, chosen.event) == ({"speaking": 0.5}, {"speaking": 0.5})
    assert choose_thresholds([clip_of([], 0, 40, speaking=np.zeros(40))], S) == Thresholds({}, {})


def test_frames_and_events_have_a_threshold_each_that_was_chosen_elsewhere():
    scores = np.zeros(40)
    scores[[4, 20]] = 1, 2
    clips = [clip_of([turn("assistant", "x", 4, 5)], 0, 40, speaking=scores)]
    given = Thresholds({"speaking": 0.5}, {"speaking": 1.5})
    report, found = measure(clips, given, S)["speaking"], weighted(clips, given, S, ["r-c0"])(np.ones((1, 1), int))
    assert (report["frames"]["recall"], report["events"]["recall"]) == (1, 0)
    assert (found["speaking_f1"][0], found["event_recall"][0]) == (2 / 3, 0)
