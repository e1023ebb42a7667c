"""Rungs without a model: features of a hand-written clip, causality, and what each control can find."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from by_hand import clip_example, dst, turn, write_shards

from trainer.config import MODES, Settings
from trainer.controls import CONTROLS, FEATURES, context_features, score_control


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
    span = clip_example([turn("assistant", "!", 2, 5)], 0, 8, positive="span")  # the text stands after the last frame
    assert columns(span, "seconds since assistant") == [[-1, -1, -1, -1, -1, 0.5, 1, 1.5]]


def test_the_future_changes_no_feature():
    rng = np.random.default_rng(0)
    for _ in range(8):
        turns = [turn(str(rng.choice(["user", "assistant"])), "!", f, f + 2) for f in rng.integers(0, 29, 12).tolist()]
        now = int(rng.integers(1, 30))
        past = [t for t in turns if t.start_frame < now]
        whole, cut = (
            clip_example(sorted(some, key=lambda t: t.start_frame), 0, 30, positive="onset") for some in (turns, past)
        )
        features, of_cut = context_features([whole, cut])
        np.testing.assert_array_equal(features[:now], of_cut[:now])


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


@pytest.mark.parametrize("questions", [True, False], ids=["questions", "periodic"])
def test_history_finds_what_follows_from_the_user_and_a_metronome_what_is_periodic(tmp_path, questions):
    counts, one_second = {"train": 24, "val": 3, "test": 3}, Settings(early_s=1, late_s=1)
    splits = {name: answers(seed, n, questions) for seed, (name, n) in enumerate(counts.items())}
    data = write_shards(tmp_path / "data", splits)
    found = {name: score_control(name, data, "test", tmp_path / name, 3, one_second) for name in CONTROLS}
    for name, mode in product(CONTROLS, MODES):
        events = found[name].metrics[mode]["speaking"]["events"]
        assert (events["f1"] == 1) if name == "history" or not questions else (events["f1"] < 0.7)
    # of two that are as good on val, the metronome: a rung that is worse than the one below makes the next look good
    assert ["speaks as the metronome" in note for note in found["history"].notes] == ([] if questions else [True])
    how = found["history"].metrics["speaks_at"]
    assert (how["threshold"] is None, how.get("speaks_as")) == ((False, None) if questions else (True, "metronome"))
