from __future__ import annotations

import ast
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from by_hand import dst, turn
from scored import clip_of, noisy_clips

from trainer.evaluation.bootstrap import draw_recordings, interval_of, replicate
from trainer.evaluation.metrics import (
    METRICS,
    Settings,
    Thresholds,
    choose_thresholds,
    estimators,
    intervals,
    look_up,
    measure,
    weighted_median,
)
from trainer.evaluation.read_scores import read_scores
from trainer.evaluation.scores import ScoredClip, write_scores

S = Settings()
HALF = Thresholds({"speaking": 1.25, "dst_update": 1.25}, {"speaking": 1.25, "dst_update": 1.25})
RECORDINGS = [f"r{i}" for i in range(5)]


def scalars(report) -> dict[str, float | None]:
    return {name: look_up(report, metric) for name, metric in METRICS.items()}


def models(give, seed: int = 0, **live) -> list[ScoredClip]:
    """30 clips of a minute at 2 fps: 5 events of one frame every 10 s or so, first at 8 s, last 5 s before the end.

    `give(frames at which is spoken, rng)` -> 120 logits, for each clip.
    """
    clips = []
    for i in range(30):
        rng = np.random.default_rng(100 * seed + i)
        at = [16 + 20 * k + int(rng.integers(0, 4)) for k in range(5)]
        turns = [turn("assistant", "x", frame, frame + 1) for frame in at]
        logits = give(np.isin(np.arange(120), at), np.random.default_rng(1000 * seed + i))
        clips.append(clip_of(turns, 0, 120, name=f"c{i:02d}", speaking=logits, **live))
    return clips


def judge(give) -> dict:
    """Thresholds from one set of clips, numbers from another, as val and test."""
    return measure(models(give, seed=1), choose_thresholds(models(give, seed=2), S), S)["speaking"]


def oracle(speaks, rng):
    return np.where(speaks, 5.0, -5.0)


def test_an_oracle_is_perfect():
    found = judge(oracle)
    frames, events = found["frames"], found["events"]
    assert (frames["ap"], frames["auroc"], frames["f1"], frames["balanced_accuracy"]) == (1, 1, 1, 1)
    assert (events["precision"], events["recall"], events["f1"]) == (1, 1, 1)
    assert (events["median_latency_s"], events["duplicates"], events["false_alarms"]) == (0, 0, 0)
    assert frames["threshold"] == events["threshold"] == 0  # midway between 5 and -5


def test_the_one_perfect_threshold_among_thousands_of_scores_is_found():
    clips = models(lambda speaks, rng: speaks + rng.random(120))
    found = measure(clips, choose_thresholds(clips, S), S)["speaking"]
    assert (found["events"]["f1"], found["frames"]["f1"]) == (1, 1)
    assert 0.999 < found["events"]["threshold"] < 1.01


def test_an_oracle_one_second_late_is_perfect_in_its_events_and_hopeless_on_frames():
    # Every reply comes 2 frames late, inside the window; no frame that fires is a positive one.
    found = judge(lambda speaks, rng: oracle(np.roll(speaks, 2), rng))
    events, frames = found["events"], found["frames"]
    assert (events["precision"], events["recall"], events["f1"], events["median_latency_s"]) == (1, 1, 1, 1)
    assert events["latency_quartiles_s"] == [1, 1]
    assert frames["f1"] == 0
    # all 3,600 frames tie but the 150 that fire in vain: the positives are reached with all the rest
    assert frames["ap"] == frames["chance"] == 150 / 3600
    assert frames["auroc"] == pytest.approx((3450 - 150) / 2 / 3450, rel=1e-12)


def test_chance_ranks_at_the_level_of_chance():
    # AP of guessing is the share of positives, 150 of 3,600, give or take sampling; AUROC one half.
    found = judge(lambda speaks, rng: rng.normal(size=120))
    assert found["frames"]["chance"] == 150 / 3600
    assert found["frames"]["ap"] == pytest.approx(150 / 3600, abs=0.02)
    assert found["frames"]["auroc"] == pytest.approx(0.5, abs=0.07)  # three standard errors of 1 / sqrt(12 * 150)
    assert found["events"]["f1"] < 0.6
    assert found["events"]["duplicates"] + found["events"]["false_alarms"] > 150


def test_a_model_that_is_always_silent_finds_nothing():
    # One score everywhere says nothing about when to speak: no threshold makes it speak.
    found = judge(lambda speaks, rng: np.full(120, -5.0))
    events, frames = found["events"], found["frames"]
    assert (events["recall"], events["f1"], events["precision"], events["median_latency_s"]) == (0, 0, None, None)
    assert (events["predictions"], events["false_alarms_per_quiet_hour"]) == (0, 0)
    assert frames["ap"] == frames["chance"]
    assert (frames["auroc"], frames["recall"], frames["f1"], frames["balanced_accuracy"]) == (0.5, 0, 0, 0.5)


def test_a_free_running_model_that_speaks_every_two_seconds_finds_all_and_is_mostly_wrong():
    # 30 events a minute for 5 references: one in six is right.
    events = measure(models(oracle, spoke=np.arange(0, 60, 2.0)), None, S)["speaking"]["events"]
    assert (events["recall"], events["precision"]) == (1, 1 / 6)
    assert events["f1"] == 2 * 150 / (150 + 900)


@pytest.mark.parametrize("live", [False, True])
def test_permuting_clips_changes_no_digit(live):
    clips = noisy_clips(9, live=live)
    mixed = [clips[i] for i in np.random.default_rng(0).permutation(9)]
    assert choose_thresholds(mixed, S) == choose_thresholds(clips, S)
    assert json.dumps(measure(mixed, HALF, S)) == json.dumps(measure(clips, HALF, S))
    weights = np.random.default_rng(1).multinomial(5, [0.2] * 5, size=20)
    ours, theirs = estimators(clips, HALF, S, RECORDINGS), estimators(mixed, HALF, S, RECORDINGS)
    for name in METRICS:
        assert np.array_equal(ours[name](weights), theirs[name](weights), equal_nan=True), name


def test_writing_and_reading_changes_no_digit(tmp_path):
    class Shards:  # what `read_scores` asks of a Split
        def in_order(self):
            return iter([scored.clip for scored in clips])

    clips = noisy_clips(4, live=True)
    write_scores(tmp_path / "s.parquet", {"test": clips[::-1]}, {})
    read = read_scores(tmp_path / "s.parquet", {"test": Shards()})["test"]
    assert json.dumps(measure(read, HALF, S)) == json.dumps(measure(clips, HALF, S))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("drawn", [[1, 1, 1, 1, 1], [2, 0, 1, 0, 2], [0, 5, 0, 0, 0], [1, 1, 0, 3, 0]])
def test_weights_count_as_recordings_repeated(drawn, live):
    clips = noisy_clips(9, live=live)
    found = estimators(clips, HALF, S, [*RECORDINGS, "without clips"])
    repeated = [
        replace(s, clip=replace(s.clip, clip_id=f"{s.clip.clip_id}-{copy}"))
        for s in clips
        for copy in range(drawn[int(s.clip.recording_id[1:])])
    ]
    assert list(found) == list(METRICS)
    for name, value in scalars(measure(repeated, HALF, S)).items():
        got = found[name](np.array([[*drawn, 4]]))
        assert got.dtype == np.float64
        assert got[0] == pytest.approx(np.nan if value is None else value, rel=1e-12, nan_ok=True), name
    if not live:
        assert np.isnan(found["transition_f1"](np.ones((1, 6), int))).all()


def test_intervals_are_those_of_the_estimators_over_the_clips_own_recordings():
    clips = noisy_clips(9, live=True)
    found = intervals(clips, HALF, S, 300)
    draws = draw_recordings(5, 300)
    for name, estimator in estimators(clips, HALF, S, RECORDINGS).items():
        expected = interval_of(replicate([estimator], draws), 5, METRICS[name].bounds)
        assert found[name] == [expected.low, expected.high], name
    assert set(intervals(clips[:1], HALF, S, 300).values()) == {None}  # one recording has none


def test_a_draw_that_leaves_nothing_is_undefined():
    clips = [clip_of([turn("assistant", "x", 4, 5)], 0, 40, name="a", recording="a", speaking=np.eye(40)[4]),
             clip_of([], 0, 40, name="b", recording="b", speaking=np.zeros(40))]  # fmt: skip
    found = estimators(clips, HALF, S, ["a", "b"])
    for name in ("event_f1", "event_recall", "median_latency_s", "speaking_ap", "speaking_auroc", "dst_ap"):
        assert np.isnan(found[name](np.array([[0, 2], [1, 1]]))[0]), name


def test_the_weighted_median_is_that_of_repeated_values():
    median = weighted_median(np.array([3.0, -1.0, 2.0, 2.0, 8.0]), np.array([0, 1, 1, 2, 2]))
    # -1, 2, 2, 3, 8; twice the third recording's 2, 8; -1, -1, 2, 2, 3; nothing
    assert median(np.array([[1, 1, 1, 0], [0, 0, 2, 0], [1, 2, 0, 7]])).tolist() == [2, 5, 2]
    assert np.isnan(median(np.array([[0, 0, 0, 3]]))).all()
    assert np.isnan(weighted_median(np.zeros(0), np.zeros(0, np.int64))(np.array([[1, 1]]))).all()


def test_every_metric_has_its_place_in_the_report():
    full = measure(noisy_clips(9, live=True), HALF, S)
    assert len(METRICS) == 18
    for metric in METRICS.values():
        low, high = metric.bounds or (-np.inf, np.inf)
        assert low <= look_up(full, metric) <= high
    assert json.loads(json.dumps(full, allow_nan=False)) == full
    assert (full["clips"], full["recordings"], full["frames"]) == (9, 5, 540)
    assert full["hours"] == pytest.approx(270 / 3600)


def test_what_a_model_lacks_is_none():
    clips = [clip_of([turn("assistant", "x", 4, 5), dst(8, 9)], 0, 40, speaking=np.eye(40)[4])]
    report = measure(clips, None, S)
    assert report["dst_update"] == {"frames": None, "events": None}
    assert (report["state"], report["speaking"]["events"]) == (None, None)
    frames = report["speaking"]["frames"]
    assert (frames["ap"], frames["f1"], frames["calibration"]) == (1, None, None)
    chosen = choose_thresholds(clips, S)
    assert (chosen.frame, chosen.event) == ({"speaking": 0.5}, {"speaking": 0.5})
    assert choose_thresholds([clip_of([], 0, 40, speaking=np.zeros(40))], S) == Thresholds({}, {})


def test_thresholds_come_from_val_and_not_from_what_is_measured():
    val, test = models(oracle, seed=2), models(lambda speaks, rng: oracle(speaks, rng) + 20, seed=1)
    report = measure(test, choose_thresholds(val, S), S)
    assert report["speaking"]["frames"]["precision"] == 150 / 3600  # at 0, all frames fire


def test_frames_and_events_have_a_threshold_each():
    scores = np.zeros(40)
    scores[[4, 20]] = 1, 2
    clips = [clip_of([turn("assistant", "x", 4, 5)], 0, 40, speaking=scores)]
    given, ones = Thresholds({"speaking": 0.5}, {"speaking": 1.5}), np.ones((1, 1), int)
    report, found = measure(clips, given, S)["speaking"], estimators(clips, given, S, ["r-c0"])
    assert (report["frames"]["threshold"], report["frames"]["recall"]) == (0.5, 1)
    assert (report["events"]["threshold"], report["events"]["recall"]) == (1.5, 0)
    assert (found["speaking_f1"](ones)[0], found["event_recall"](ones)[0]) == (2 / 3, 0)


def test_metrics_need_no_torch():
    root, seen, todo = Path(__file__).parents[3], set(), ["trainer.evaluation.metrics"]
    while todo:
        name = todo.pop()
        file = root / (name.replace(".", "/") + ".py")
        assert name.split(".")[0] not in ("torch", "transformers")
        if name in seen or not file.exists():
            continue
        seen.add(name)
        for statement in ast.parse(file.read_text()).body:
            if isinstance(statement, ast.ImportFrom):
                todo += [statement.module, *(f"{statement.module}.{alias.name}" for alias in statement.names)]
            elif isinstance(statement, ast.Import):
                todo += [alias.name for alias in statement.names]
    assert {"pipeline.dataset", "trainer.evaluation.event_metrics"} <= seen
