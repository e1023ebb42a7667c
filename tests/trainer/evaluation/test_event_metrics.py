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
    Settings,
    best_event_threshold,
    best_metronome,
    find_events,
    match,
    metronome_f1,
    most_matches,
    predictions,
    references,
    report_events,
    targets_of,
)

S = Settings()


def report(scored, threshold=None, head="speaking", settings=S):
    return report_events(find_events([scored], head, threshold, settings), head, threshold)


def times(turns, role="assistant", **clip) -> list[float]:
    return references(clip_example(turns, 10, 20, **clip), role).tolist()  # seconds 5 to 15


def test_an_event_happens_at_its_time_else_at_its_first_frame():
    timed = Turn("assistant", "x", 12, 14, 6.6)
    assert times([timed, turn("assistant", "x", 20, 22)]) == [6.6, 10.0]


def test_turns_of_one_role_at_one_time_are_one_event():
    turns = [turn("assistant", "a", 20, 22), turn("assistant", "b", 20, 21), dst(20, 22), dst(20, 22), dst(24, 25)]
    assert times(turns) == [10.0]
    assert times(turns, "DST_UPDATE") == [10.0, 12.0]


def test_a_turn_that_labels_nothing_is_no_reference():
    empty, outside, before = (
        turn("assistant", "x", 20, 20),
        turn("assistant", "x", 30, 32),
        turn("assistant", "x", 8, 10),
    )
    assert times([turn("assistant", "x"), Turn("assistant", "x", None, None, 8.0), empty, outside, before]) == []


def test_an_event_under_way_when_the_clip_begins_happens_at_its_start():
    under_way = Turn("assistant", "x", 8, 12, 4.1)
    assert times([under_way]) == [5.0]
    assert times([under_way], positive="onset") == []


def test_after_an_event_the_head_is_silent_for_the_refractory_time():
    scores = [0, 1, 1, 1, 1, 1, 0, 0, 1, 1]  # at 2 fps from second 5; 2 s are 4 frames
    scored = clip_of(start=10, frames=10, speaking=scores)
    assert predictions(scored, "speaking", 0.5, 2.0).tolist() == [5.5, 7.5, 9.5]
    assert predictions(scored, "speaking", 0.5, 2.2).tolist() == [5.5, 9.0]
    assert predictions(scored, "speaking", 0.5, 0.0).tolist() == [5.5, 6.0, 6.5, 7.0, 7.5, 9.0, 9.5]
    assert predictions(scored, "speaking", 1.0, 2.0).tolist() == [5.5, 7.5, 9.5]  # on the threshold it fires
    assert predictions(scored, "speaking", 1.1, 2.0).tolist() == []


def test_a_live_models_events_are_what_it_said():
    scored = clip_of(frames=20, speaking=[9] * 20, spoke=[1.0, 1.5, 4.0], updates={3.0: (), 5.0: (("S1", "start"),)})
    assert predictions(scored, "speaking", 0.5, 2.0).tolist() == [1.0, 1.5, 4.0]
    assert predictions(scored, "dst_update", None, 2.0).tolist() == [3.0, 5.0]


def pairs(reference, predicted, early=2.0, late=4.0):
    own, near = match(np.array(reference, float), np.array(predicted, float), early, late)
    return list(zip(own.tolist(), near.tolist(), strict=True))


def test_the_window_includes_its_ends():
    assert pairs([10], [8]) == [(0, 0)]
    assert pairs([10], [14]) == [(0, 0)]
    assert pairs([10], [7.9]) == pairs([10], [14.1]) == []
    assert pairs([0.1 * 3], [0.3 - 2]) == [(0, 0)]  # 0.1 * 3 is not 0.3


def test_as_many_as_can_be_are_matched_before_the_nearest():
    # 2.9 is nearest to 3, but then 7 has no reference left
    assert pairs([0, 3], [2.9, 7]) == [(0, 0), (1, 1)]


def test_of_as_many_matches_the_nearest_are_taken():
    assert pairs([10], [9, 10.5, 13]) == [(0, 1)]
    assert pairs([10, 11], [9.5, 11, 11.2]) == [(0, 0), (1, 1)]
    assert pairs([10, 11], [12, 13]) == [(0, 0), (1, 1)]  # crossed, the distances would add up to as much


def test_nothing_matches_nothing():
    assert pairs([], [1.0]) == pairs([1.0], []) == pairs([], []) == []


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


@fuzz(max_examples=60, deadline=None)
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
    assert found["latency_quartiles_s"] == [-0.5 + 0.25 * 3.5, -0.5 + 0.75 * 3.5]
    assert (found["live"], found["threshold"]) == (True, None)


def test_quiet_time_counts_overlapping_windows_once_and_ends_with_the_clip():
    # 10 to 40 s; windows 9..15, 12..18, 37..43: quiet are 18..37
    scored = clip_of([said_at(11), said_at(14), said_at(39)], 20, 60, spoke=[])
    assert report(scored)["quiet_hours"] == pytest.approx(19 / 3600, rel=1e-12)


def test_a_clip_without_quiet_has_no_rate_of_false_alarms():
    assert report(clip_of([said_at(2)], 0, 8, spoke=[1]))["false_alarms_per_quiet_hour"] is None


def test_silence_and_emptiness():
    silent = report(clip_of([said_at(10)], spoke=[]))
    assert (silent["precision"], silent["recall"], silent["f1"], silent["median_latency_s"]) == (None, 0, 0, None)
    chatty = report(clip_of([], spoke=[10]))
    assert (chatty["precision"], chatty["recall"], chatty["f1"], chatty["duplicates_per_event"]) == (0, None, 0, None)
    nothing = report(clip_of([], spoke=[]))
    assert (nothing["precision"], nothing["recall"], nothing["f1"]) == (None, None, None)


def test_reactions_and_initiative_are_told_apart():
    turns = [
        said_at(10, "user"), said_at(10),  # reactive: the same moment
        said_at(20, "user"), said_at(22),  # reactive: two seconds later
        said_at(30, "user"), said_at(33),  # proactive: three seconds later
        said_at(45), said_at(46, "user"),  # proactive: before the user
    ]  # fmt: skip
    # 10 and 21 follow the user; 33 does not, nor 45; 56 is nobody's
    found = report(clip_of(turns, spoke=[10, 21, 33, 56]))
    assert found["reactive"] == {"references": 2, "predictions": 2, "precision": 1, "recall": 1, "f1": 1}
    proactive = {"references": 2, "predictions": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert found["proactive"] == proactive


def test_a_reaction_to_a_users_frames_counts_before_the_users_time():
    # the user's text is heard at frame 193 (96.5 s), its time is 97.2: as in the real clip
    user = Turn("user", "x", 193, 195, 97.2)
    scored = clip_of([user, Turn("assistant", "x", 193, 195, 97.2)], 193, 40, spoke=[96.5])
    found = report(scored)
    assert (found["reactive"]["references"], found["reactive"]["predictions"], found["reactive"]["f1"]) == (1, 1, 1)
    assert found["proactive"] == {"references": 0, "predictions": 0, "precision": None, "recall": None, "f1": None}
    later = clip_of([user, Turn("assistant", "x", 198, 200, 99.1)], 193, 40, spoke=[])  # 1.9 s after the user's time
    assert report(later)["reactive"]["references"] == 1


def test_dst_events_are_told_from_speech_and_asked_of_clips_with_dst_only():
    tracked = clip_of([dst(20, 22), turn("assistant", "x", 60, 62)], updates={10.5: ()}, spoke=[])
    untracked = clip_of([], name="c1", updates={3.0: (), 9.0: ()}, spoke=[], steps=())
    found = find_events([tracked, untracked], "dst_update", None, S)
    numbers = report_events(found, "dst_update", None)
    assert (numbers["references"], numbers["predictions"], numbers["matched"]) == (1, 1, 1)
    assert numbers["median_latency_s"] == 0.5
    assert "reactive" not in numbers
    assert find_events([untracked], "dst_update", None, S) is None


def test_scores_without_a_threshold_are_no_events():
    assert find_events([clip_of(frames=4, speaking=[1] * 4)], "speaking", None, S) is None
    assert find_events([clip_of(frames=4, speaking=[1] * 4)], "dst_update", 0.5, S) is None


def test_the_event_threshold_is_the_one_of_the_best_event_f1():
    scores = np.zeros(120)
    scores[20], scores[60], scores[61], scores[100] = 3, 2, 1.9, 1  # references at 10 s and 30 s
    scored = clip_of([said_at(10), said_at(30)], speaking=scores)
    assert best_event_threshold([scored], "speaking", S) == pytest.approx((2 + 1.9) / 2)  # 1.9 makes no event more
    assert best_event_threshold([clip_of([], speaking=scores)], "speaking", S) is None
    assert best_event_threshold([scored], "dst_update", S) is None


def test_the_threshold_is_as_good_as_any():
    clips = noisy_clips(4)
    clips[1] = replace(clips[1], clip=replace(clips[1].clip, fps=3.0))
    for head in ("speaking", "dst_update"):
        f1 = {
            cut: report_events(find_events(clips, head, cut, S), head, cut)["f1"]
            for cut in np.unique(np.concatenate([s.logits[head] for s in clips])).astype(float) - 0.05
        }
        cut = best_event_threshold(clips, head, S)
        assert report_events(find_events(clips, head, cut, S), head, cut)["f1"] == max(f1.values())


def test_a_head_that_says_nothing_stays_silent():
    scored = clip_of([said_at(10)], speaking=[-5.0] * 120)
    assert report(scored, best_event_threshold([scored], "speaking", S))["predictions"] == 0


def nobody_saw(scored, *ranges):
    return replace(scored, clip=replace(scored.clip, unlabelled=ranges))


def test_frames_that_nobody_annotated_are_neither_right_nor_wrong():
    """Speech at 10 s; scores also fire at 0, 20 and 25 s, of which 20 s alone was annotated."""
    scores = np.zeros(120)
    scores[[0, 20, 40, 50]] = 3, 2, 1, 3
    scored = nobody_saw(clip_of([said_at(10)], speaking=scores), (0, 10), (44, 120))
    found = report(scored, 0.5)
    assert (found["predictions"], found["matched"], found["false_alarms"]) == (2, 1, 1)
    live = nobody_saw(clip_of([said_at(10)], spoke=[0, 10, 25]), (0, 10), (44, 120))
    assert report(live, None)["predictions"] == 1
    assert best_event_threshold([scored], "speaking", S) == 1.5


def test_a_metronomes_f1_by_hand():
    """20 s, speech at 5 s and 15 s; a tick every 10 s, at 5 s and 15 s, hits both, one every 4 s is 5 ticks for 2."""
    clips = [clip_of([turn("assistant", "a", 10, 11), turn("assistant", "b", 30, 31)], 0, 40)]
    narrow, wide = Settings(early_s=0.5, late_s=0.5), Settings(early_s=1, late_s=1)
    assert metronome_f1(targets_of(clips, "speaking", narrow), 10.0) == 1.0
    assert metronome_f1(targets_of(clips, "speaking", narrow), 4.0) == 0.0  # at 2, 6, 10, 14, 18 s
    assert metronome_f1(targets_of(clips, "speaking", wide), 4.0) == 2 * 2 / (2 + 5)
    assert metronome_f1(targets_of([nobody_saw(clips[0], (0, 9), (32, 40))], "speaking", wide), 4.0) == 2 * 2 / (2 + 3)
    assert best_metronome(clips, "speaking", narrow) == 10.5  # at 5 and 15.5 s: of equals the longest


def test_where_nobody_speaks_there_is_no_metronome():
    assert metronome_f1(targets_of([clip_of([], 0, 40)], "speaking", Settings()), 4.0) is None
    assert best_metronome([clip_of([], 0, 40)], "speaking", Settings()) is None
