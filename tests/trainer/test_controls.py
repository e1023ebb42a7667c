"""Rungs without a model: features of a hand-written clip, causality, and clocks of known period."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from by_hand import clip_example, dst, turn, write_shards

from trainer.config import MODES, Settings
from trainer.controls import CONTROLS, FEATURES, best_beat, context_features, score_control, tick_frames
from trainer.evaluation.evaluate_scores import evaluate_scores
from trainer.evaluation.metrics import choose_thresholds, measure
from trainer.evaluation.scores import ScoredClip

ONE_SECOND = Settings(early_s=1, late_s=1)


def spoken(frames, size=60, **more):
    return clip_example([turn("assistant", "!", f, f + 1) for f in frames], 0, size, positive="onset", rate=1.0, **more)


def columns(clip, *names):
    (features,) = context_features([clip])
    return [features[:, FEATURES.index(name)].tolist() for name in names]


# ---- features ------------------------------------------------------------------------------------------

TURNS = [  # at 2 fps, in a clip that starts at frame 10
    turn("assistant", "before the clip", 4, 6),
    turn("user", "?", 11, 13),
    dst(12, 13, ("S1", "complete")),
    turn("assistant", "!", 12, 14),
    turn("assistant", "!", 15, 17),
    turn("user", "?", 16, 17),
]


def test_features_are_what_stands_in_the_context_before_each_frame():
    clip = clip_example(TURNS, 10, 8, positive="onset")
    (features,) = context_features([clip])
    assert features.shape == (8, 17)
    assert columns(clip, "seconds in the clip") == [[0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]]
    since, number = columns(clip, "seconds since assistant", "number of assistant")
    assert since == [-1, -1, -1, 0.5, 1, 1.5, 0.5, 1]
    assert number == [0, 0, 0, 1, 1, 1, 2, 2]
    since, number = columns(clip, "seconds since user", "number of user")  # heard by the decision at its frame
    assert since == [-1, 0, 0.5, 1, 1.5, 2, 0, 0.5]
    assert number == [0, 1, 1, 1, 1, 1, 2, 2]
    assert columns(clip, "seconds since DST_UPDATE") == [[-1, -1, -1, 0.5, 1, 1.5, 2, 2.5]]
    first, second = columns(clip, "assistant gap 1, seconds", "assistant gap 2, seconds")
    assert first == [-1, -1, -1, -1, -1, -1, 1.5, 1.5]
    assert second == [-1] * 8


def test_the_last_five_gaps_are_kept_the_latest_first():
    gaps = columns(spoken([0, 2, 5, 9, 14, 20, 27], 30), *(f"assistant gap {i + 1}, seconds" for i in range(5)))
    assert [gap[29] for gap in gaps] == [3.5, 3, 2.5, 2, 1.5]


def test_with_span_labels_a_text_stands_after_the_event_s_last_frame():
    clip = clip_example([turn("assistant", "!", 2, 5)], 0, 8, positive="span")
    assert columns(clip, "seconds since assistant") == [[-1, -1, -1, -1, -1, 0.5, 1, 1.5]]


def test_the_future_changes_no_feature():
    rng = np.random.default_rng(0)
    for _ in range(20):
        turns = [turn(str(rng.choice(["user", "assistant"])), "!", f, f + 2) for f in rng.integers(0, 29, 12).tolist()]
        now = int(rng.integers(1, 30))
        past = [t for t in turns if t.start_frame < now]
        whole, cut = (
            clip_example(sorted(some, key=lambda t: t.start_frame), 0, 30, positive="onset") for some in (turns, past)
        )
        features, of_cut = context_features([whole, cut])
        np.testing.assert_array_equal(features[:now], of_cut[:now])


# ---- clocks --------------------------------------------------------------------------------------------


def test_a_metronome_of_known_period_and_phase_is_found():
    clips = [spoken(range(4, size, 16), size) for size in (300, 450, 601)]
    assert best_beat(clips, "speaking", Settings(early_s=0, late_s=0)) == pytest.approx((8, 0.25))
    assert best_beat(clips, "dst_update", ONE_SECOND) is None


def test_ticks_begin_at_the_phase_and_end_in_the_clip():
    assert tick_frames(spoken([], 20), 3, 0.5).tolist() == [3, 9, 15]  # every 6 frames
    assert tick_frames(spoken([], 16), 3, 0.5).tolist() == [3, 9, 15]
    assert tick_frames(spoken([], 15), 3, 0.5).tolist() == [3, 9]


# ---- whole controls ------------------------------------------------------------------------------------


def answers(seed: int, count: int, questions: bool) -> list:
    """Recordings in which the assistant answers the user 3 frames later, or speaks every 16 frames."""
    rng, clips = np.random.default_rng(seed), []
    for i in range(count):
        asked = np.cumsum(rng.integers(6, 14, 5)).tolist() if questions else range(2, 70, 16)
        turns = [t for f in asked for t in (turn("user", "?", f, f + 1), turn("assistant", "!", f + 3, f + 4))]
        turns = turns if questions else turns[1::2]
        clips.append(clip_example(turns, 0, 80, clip_id=f"{seed}-{i}", clip=i, video=f"{seed}-{i}", positive="onset"))
    return clips


@pytest.fixture(scope="module", params=[True, False], ids=["questions", "periodic"])
def scored(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    counts = {"train": 30, "val": 3, "test": 4}
    splits = {name: answers(seed, n, request.param) for seed, (name, n) in enumerate(counts.items())}
    data = write_shards(out / "data", splits)
    return request.param, data, {n: score_control(n, data, "test", out / n, 3, ONE_SECOND) for n in CONTROLS}


def test_history_finds_what_follows_from_the_user_and_a_metronome_what_is_periodic(scored):
    questions, _, found = scored
    for name, mode in product(CONTROLS, MODES):
        f1 = found[name].metrics[mode]["speaking"]["events"]["f1"]
        assert (f1 == 1) if name == "history" or not questions else (f1 < 0.7)
        assert found[name].metrics[mode]["speaking"]["events"]["live"] == (mode == "self-fed")


def test_what_is_written_is_what_evaluate_reads(scored):
    _, data, found = scored
    for name, mode in product(CONTROLS, MODES):
        folder, metrics = found[name].folder, found[name].metrics
        assert json.loads((folder / "metrics.json").read_bytes()) == metrics
        assert metrics["arm"] == name
        assert evaluate_scores(folder / f"{mode}.parquet", data, settings=ONE_SECOND).metrics[mode] == metrics[mode]


def test_the_same_seed_writes_the_same_bytes(scored, tmp_path):
    questions, data, found = scored
    name = "history" if questions else "metronome"
    score_control(name, data, "test", tmp_path, 3, ONE_SECOND)
    for mode in MODES:
        assert (tmp_path / f"{mode}.parquet").read_bytes() == (found[name].folder / f"{mode}.parquet").read_bytes()


# ---- scores of models that are not ours ----------------------------------------------------------------


def measured(score, late=0):
    """Metrics of a model with these scores on 12 clips with 12 events each, 8 to 12 s apart; thresholds from others."""
    rng = np.random.default_rng(7)

    def clips():
        for i in range(12):
            clip = spoken(np.cumsum(rng.integers(16, 25, 12)).tolist(), 320, clip_id=f"c{i}", video=f"r{i}")
            yield ScoredClip(clip, {"speaking": score(np.roll(clip.labels[0] == 1, late), rng).astype(np.float32)}, {})

    val, test = list(clips()), list(clips())
    return measure(test, choose_thresholds(val, ONE_SECOND), ONE_SECOND)["speaking"]


def test_an_oracle_is_perfect_and_late_by_a_second_only_its_latency_and_frames_tell():
    found = measured(lambda event, rng: event)
    assert (found["events"]["f1"], found["frames"]["ap"], found["events"]["median_latency_s"]) == (1, 1, 0)
    late = measured(lambda event, rng: event, late=2)
    assert (late["events"]["f1"], late["events"]["median_latency_s"]) == (1, 1)
    assert late["frames"]["ap"] == pytest.approx(late["frames"]["chance"], abs=1e-6)
    assert measured(lambda event, rng: event, late=3)["events"]["f1"] < 0.5  # only always firing is left


def test_random_scores_have_chance_precision_and_no_more_events_than_always_firing():
    found = measured(lambda event, rng: rng.random(len(event)))
    assert found["frames"]["ap"] == pytest.approx(found["frames"]["chance"], abs=0.01)
    assert 0.2 < found["events"]["f1"] < 0.5
