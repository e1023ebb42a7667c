from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from by_hand import clip_example, dst, turn
from hypothesis import given
from hypothesis import settings as fuzz
from hypothesis import strategies as st
from scored import clip_of, noisy_clips, said_at

from pipeline.dataset import Turn
from trainer.evaluation.event_metrics import (
    Beat,
    Settings,
    best_beat,
    best_event_threshold,
    find_events,
    match,
    most_matches,
    predicted_frames,
    references,
    report_events,
)

S = Settings()


def report(scored, threshold=None, head="speaking"):
    return report_events(find_events([scored], head, threshold, S))


UNDER_WAY = Turn("assistant", "x", 8, 12, 4.1)


@pytest.mark.parametrize(
    ("turns", "role", "expected", "clip"),
    [
        ([Turn("assistant", "x", 12, 14, 6.6), turn("assistant", "x", 20, 22)], "assistant", [6.6, 10.0], {}),
        ([turn("assistant", "a", 20, 22), turn("assistant", "b", 20, 21), dst(20, 22)], "assistant", [10.0], {}),
        ([dst(20, 22), dst(20, 22), dst(24, 25)], "DST_UPDATE", [10.0, 12.0], {}),
        ([turn("assistant", "x"), Turn("assistant", "x", None, None, 8.0)], "assistant", [], {}),
        ([turn("assistant", "x", *frames) for frames in ((20, 20), (30, 32), (8, 10))], "assistant", [], {}),
        ([UNDER_WAY], "assistant", [5.0], {}),  # as the clip begins
        ([UNDER_WAY], "assistant", [], {"positive": "onset"}),
    ],
)
def test_events_happen_at_their_time_else_at_their_first_frame_if_they_label_one(turns, role, expected, clip):
    assert references(clip_example(turns, 10, 20, **clip), role).tolist() == expected  # seconds 5 to 15


def test_after_an_event_the_head_is_silent_for_the_refractory_time():
    scored = clip_of(start=10, frames=10, speaking=[0, 1, 1, 1, 1, 1, 0, 0, 1, 1])  # at 2 fps
    assert predicted_frames(scored, "speaking", 0.5, 2.0).tolist() == [11, 15, 19]
    assert predicted_frames(scored, "speaking", 0.5, 0.0).tolist() == [11, 12, 13, 14, 15, 18, 19]
    assert predicted_frames(scored, "speaking", 1.0, 2.0).tolist() == [11, 15, 19]  # on the threshold it fires
    live = clip_of(frames=20, speaking=[9] * 20, spoke=[1.0, 1.5, 4.0])  # a live model's events are what it said
    assert predicted_frames(live, "speaking", 0.5, 2.0).tolist() == [2, 3, 8]


def pairs(reference, predicted):
    own, near = match(np.array(reference, float), np.array(predicted, float), 2.0, 4.0)
    return list(zip(own.tolist(), near.tolist(), strict=True))


@pytest.mark.parametrize(
    ("reference", "predicted", "expected"),
    [
        ([10], [8], [(0, 0)]),  # the window includes its ends
        ([10], [14], [(0, 0)]),
        ([10], [14.1], []),
        ([0.1 * 3], [0.3 - 2], [(0, 0)]),  # 0.1 * 3 is not 0.3
        ([0, 3], [2.9, 7], [(0, 0), (1, 1)]),  # 2.9 is nearest to 3, but then 7 has no reference left
        ([10], [9, 10.5, 13], [(0, 1)]),  # of as many matches the nearest
        ([10, 11], [12, 13], [(0, 0), (1, 1)]),  # crossed, the distances would add up to as much
    ],
)
def test_as_many_as_can_be_are_matched_then_the_nearest(reference, predicted, expected):
    assert pairs(reference, predicted) == expected


half_seconds = st.lists(st.integers(0, 24).map(lambda n: n / 2), max_size=5, unique=True).map(sorted)


def by_trying_all(reference, predicted) -> tuple[int, float]:
    """(matches, least sum of distances) over all one-to-one assignments."""
    for size in range(min(len(reference), len(predicted)), 0, -1):
        sums = [
            sum(abs(p - r) for r, p in zip(chosen, order, strict=True))
            for chosen in combinations(reference, size)
            for order in permutations(predicted, size)
            if all(-2 <= p - r <= 4 for r, p in zip(chosen, order, strict=True))
        ]
        if sums:
            return size, min(sums)
    return 0, 0.0


@fuzz(max_examples=40, deadline=None)
@given(half_seconds, half_seconds)
def test_matching_is_the_best_of_all_assignments(reference, predicted):
    found = pairs(reference, predicted)
    assert (len(found), sum(abs(predicted[p] - reference[r]) for r, p in found)) == by_trying_all(reference, predicted)
    assert found == sorted(found)
    windows = [[2 * r - 4, 2 * r + 8] for r in reference]  # in half seconds
    fired = np.array([2 * p for p in predicted], np.int64)
    assert most_matches(np.array(windows, np.int64).reshape(-1, 2), fired) == len(found)


def test_events_of_one_minute_by_hand():
    # 60 s; references at 10, 20, 40. 9.5 matches 10; 12 too late for a second, a duplicate; 23 matches 20; 50 is false.
    found = report(clip_of([said_at(10), said_at(20), said_at(40)], spoke=[9.5, 12, 23, 50]))
    assert (found["references"], found["predictions"], found["matched"]) == (3, 4, 2)
    assert (found["precision"], found["recall"], found["f1"]) == (0.5, 2 / 3, 4 / 7)
    assert (found["duplicates"], found["duplicates_per_event"], found["false_alarms"]) == (1, 1 / 3, 1)
    assert found["quiet_hours"] == pytest.approx((60 - 3 * 6) / 3600, rel=1e-12)
    assert found["false_alarms_per_quiet_hour"] == pytest.approx(3600 / 42, rel=1e-12)
    assert found["median_latency_s"] == (-0.5 + 3) / 2


def test_quiet_time_counts_overlapping_windows_once_and_ends_with_the_clip():
    # 10 to 40 s; windows 9..15, 12..18, 37..43: quiet are 18..37
    scored = clip_of([said_at(11), said_at(14), said_at(39)], 20, 60, spoke=[])
    assert report(scored)["quiet_hours"] == pytest.approx(19 / 3600, rel=1e-12)
    assert report(clip_of([said_at(2)], 0, 8, spoke=[1]))["false_alarms_per_quiet_hour"] is None  # no quiet


@pytest.mark.parametrize(
    ("turns", "spoke", "precision", "recall", "f1"),
    [([said_at(10)], [], None, 0, 0), ([], [10], 0, None, 0), ([], [], None, None, None)],
)
def test_silence_and_emptiness(turns, spoke, precision, recall, f1):
    found = report(clip_of(turns, spoke=spoke))
    assert (found["precision"], found["recall"], found["f1"]) == (precision, recall, f1)
    assert (found["median_latency_s"], found["duplicates_per_event"]) == (None, 0 if turns else None)


def test_reactions_and_initiative_are_told_apart():
    turns = [
        said_at(10, "user"), said_at(10),  # reactive: the same moment
        said_at(20, "user"), said_at(22),  # reactive: two seconds later
        said_at(30, "user"), said_at(33),  # proactive: three seconds later
        said_at(45), said_at(46, "user"),  # proactive: before the user
    ]  # fmt: skip
    # 10 and 21 follow the user; 33 does not, nor 45; 56 is nobody's
    found = report(clip_of(turns, spoke=[10, 21, 33, 56]))
    assert (found["reactive_references"], found["reactive_predictions"]) == (2, 2)
    assert found["reactive"] == {"precision": 1, "recall": 1, "f1": 1}
    assert found["proactive"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5}


def test_dst_events_are_told_from_speech_and_asked_of_clips_with_dst_only():
    tracked = clip_of([dst(20, 22), turn("assistant", "x", 60, 62)], updates={10.5: ()}, spoke=[])
    untracked = clip_of([], name="c1", updates={3.0: (), 9.0: ()}, spoke=[], steps=())
    numbers = report_events(find_events([tracked, untracked], "dst_update", None, S))
    assert (numbers["references"], numbers["predictions"], numbers["matched"]) == (1, 1, 1)
    assert numbers["median_latency_s"] == 0.5
    assert find_events([untracked], "dst_update", None, S) is None


def test_the_event_threshold_is_the_one_of_the_best_event_f1():
    scores = np.zeros(120)
    scores[20], scores[60], scores[61], scores[100] = 3, 2, 1.9, 1  # references at 10 s and 30 s
    scored = clip_of([said_at(10), said_at(30)], speaking=scores)
    assert best_event_threshold([scored], "speaking", S) == pytest.approx((2 + 1.9) / 2)  # 1.9 makes no event more
    assert best_event_threshold([clip_of([], speaking=scores)], "speaking", S) is None
    silent = clip_of([said_at(10)], speaking=[-5.0] * 120)
    assert report(silent, best_event_threshold([silent], "speaking", S))["predictions"] == 0


def test_the_threshold_is_as_good_as_any():
    clips = noisy_clips(4)
    clips[1] = replace(clips[1], clip=replace(clips[1].clip, fps=3.0))

    def f1(cut):
        return report_events(find_events(clips, "speaking", cut, S))["f1"]

    cuts = np.unique(np.concatenate([s.logits["speaking"] for s in clips])).astype(float) - 0.05
    assert f1(best_event_threshold(clips, "speaking", S)) == max(map(f1, cuts))


def test_frames_that_nobody_annotated_are_neither_right_nor_wrong():
    """Speech at 10 s; scores also fire at 0, 20 and 25 s, of which 20 s alone was annotated."""
    scores = np.zeros(120)
    scores[[0, 20, 40, 50]] = 3, 2, 1, 3
    unlabelled = ((0, 10), (44, 120))
    scored = clip_of([said_at(10)], speaking=scores, unlabelled=unlabelled)
    found = report(scored, 0.5)
    assert (found["predictions"], found["matched"], found["false_alarms"]) == (2, 1, 1)
    live = clip_of([said_at(10)], spoke=[0, 10, 25], unlabelled=unlabelled)
    assert report(live)["predictions"] == 1
    assert best_event_threshold([scored], "speaking", S) == 1.5


def spoken(frames, size):
    return clip_example([turn("assistant", "!", f, f + 1) for f in frames], 0, size, positive="onset", rate=1.0)


def test_a_metronomes_f1_by_hand():
    """20 s, speech at 5 s and 15 s; a tick every 10 s, at 5 s and 15 s, hits both, one every 4 s is 5 ticks for 2."""
    clip = spoken([10, 30], 40)
    narrow, wide = Settings(early_s=0.5, late_s=0.5), Settings(early_s=1, late_s=1)
    assert Beat(10, 0.5).f1([clip], "speaking", narrow) == 1.0
    assert Beat(4, 0.5).f1([clip], "speaking", narrow) == 0.0  # at 2, 6, 10, 14, 18 s
    assert Beat(4, 0.5).f1([clip], "speaking", wide) == 2 * 2 / (2 + 5)
    seen = replace(clip, unlabelled=((0, 9), (32, 40)))
    assert Beat(4, 0.5).f1([seen], "speaking", wide) == 2 * 2 / (2 + 3)


def test_a_metronome_whose_last_tick_rounds_to_the_frame_after_the_clip():
    """35 frames, a tick every 4.6: the last, at 34.5, would be the frame 35."""
    assert Beat(2.3, 0.5).ticks(spoken([10], 35)).tolist() == [2, 7, 12, 16, 21, 25, 30]


def test_a_metronome_of_known_period_and_phase_is_found():
    clips = [spoken(range(4, size, 16), size) for size in (300, 450, 601)]
    beat = best_beat(clips, "speaking", Settings(early_s=0, late_s=0))
    assert (beat.period_s, beat.phase) == pytest.approx((8, 0.25))
