from __future__ import annotations

import pytest
from by_hand import clip_example, dst, turn
from scored import clip_of

from pipeline.dataset import Turn
from trainer.evaluation.event_metrics import Settings
from trainer.evaluation.scores import ScoredClip
from trainer.evaluation.state_metrics import changes, find_states, report_states, state_at_start

S = Settings()
START, DONE, NEXT = ("S1", "start"), ("S1", "complete"), ("S2", "start")


def report(*clips: ScoredClip):
    return report_states(find_states(clips, S))


def test_the_state_at_the_start_is_the_initial_one_and_what_happened_before():
    clip = clip_example([dst(4, 6, START), dst(None, None, DONE), dst(12, 13, NEXT)], 10, 8, initial=[("S2", "paused")])
    assert state_at_start(clip) == {"S1": "in_progress", "S2": "paused"}  # the one without frames waits for frame 12
    assert state_at_start(clip_example([dst(10, 12, START)], 10, 8))["S1"] == "not_started"
    under_way = clip_example([dst(8, 12, START)], 10, 8, positive="onset")
    assert state_at_start(under_way) == {"S1": "in_progress", "S2": "not_started"}


def test_changes_happen_at_the_frame_that_shows_their_instant():
    turns = [
        Turn("DST_UPDATE", "x", 4, 6, 2.4, (("S3", "start"),)),  # before the clip
        Turn("DST_UPDATE", "x", 8, 12, 4.2, (START,)),  # under way as the clip begins
        Turn("DST_UPDATE", "x", 11, 13, 6.0 - 1e-9, (DONE, NEXT)),  # 12 frames, but for rounding
        Turn("DST_UPDATE", "x", None, None, 7.1, (("S4", "start"),)),
        turn("assistant", "x", 15, 16),
    ]
    assert changes(clip_example(turns, 10, 8)) == [
        (4, ("S3", "start")), (10, START), (12, DONE), (12, NEXT), (14, ("S4", "start")),
    ]  # fmt: skip


def test_joint_accuracy_by_hand():
    # 10 frames; S1 starts at frame 2, completes at 6. The model: start at 3, complete at 6, and S2 by mistake at 8.
    turns = [dst(2, 4, START), dst(6, 7, DONE)]
    found = report(clip_of(turns, frames=10, updates={1.5: (START,), 3.0: (DONE,), 4.0: (NEXT,)}))
    assert found["joint_accuracy"] == 7 / 10  # wrong at 2, 8 and 9
    assert found["joint_accuracy_never_updating"] == 2 / 10
    assert found["over_time"] == [1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    assert found["over_time_never_updating"] == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    missed = clip_of([dst(2, 3, START), dst(6, 7, DONE)], frames=10, updates={3.0: (DONE,)})
    assert report(missed)["joint_accuracy"] == 6 / 10  # wrong until the state is right again


def test_an_update_that_says_nothing_changes_nothing():
    found = report(clip_of([dst(2, 3, START)], frames=10, updates={1.0: (), 4.0: (("S9", "start"),)}))
    assert found["joint_accuracy"] == found["joint_accuracy_never_updating"] == 2 / 10
    assert (found["transitions"]["f1"], found["transitions"]["recall"]) == (0, 0)


def test_transitions_match_by_step_and_kind_inside_the_window():
    turns = [dst(20, 22, START), dst(60, 62, DONE, NEXT)]  # 10 s, 30 s
    updates = {10.5: (START,), 20.0: (DONE,), 34.0: (NEXT, ("S9", "start")), 40.0: (("S1", "explode"),)}
    found = report(clip_of(turns, updates=updates))["transitions"]
    # START half a second late, NEXT four; DONE is ten early
    assert (found["references"], found["predictions"], found["matched"]) == (3, 5, 2)
    assert (found["precision"], found["recall"], found["f1"]) == (2 / 5, 2 / 3, 4 / 8)
    assert found["median_latency_s"] == (0.5 + 4) / 2
    again = report(clip_of([dst(20, 22, START)], updates={10.0: (START,), 11.0: (START,)}))["transitions"]
    assert (again["matched"], again["precision"], again["recall"]) == (1, 0.5, 1)


def test_without_dst_or_updates_that_say_something_there_is_nothing_to_judge():
    assert find_states([clip_of([dst(2, 3, START)], speaking=[0] * 120)], S) is None
    assert find_states([clip_of([], updates={1.0: ()}, steps=())], S) is None
    assert find_states([clip_of([dst(2, 3, START)], frames=10, updates={1.0: ()})], S) is None  # speak+markers
    tracked = clip_of([dst(2, 3, START)], frames=10, updates={1.0: (START,)})
    assert report(tracked, clip_of([], name="c1", updates={1.0: (START,)}, steps=())) == report(tracked)


def test_completed_steps_by_hand():
    done = [(f"S{i}", "complete") for i in range(5)]
    turns = [dst(4, 6, done[1]), dst(8, 10, done[2]), dst(12, 14, done[3]), dst(16, 18, done[4])]
    # S1 two frames late, S2 ten and after S3, S3 a frame early, S4 never, S0 never due
    made = {3.0: (done[1],), 5.5: (done[3],), 9.0: (done[2],), 10.0: (done[0],)}
    found = report(clip_of(turns, frames=40, updates=made))["completions"]
    assert (found["references"], found["predictions"], found["matched"]) == (4, 4, 2)
    assert (found["precision"], found["recall"]) == (2 / 4, 2 / 3)  # S3 is false, and no miss
    assert found["f1"] == 2 * 2 / (2 * 2 + 2 + 1)
    assert found["delay_s"] == (1 + 5) / 2
    twice = clip_of([dst(4, 6, DONE), dst(20, 22, DONE)], frames=40, updates={3.0: (DONE,), 4.0: (DONE,)})
    found = report(twice)["completions"]
    assert (found["matched"], found["precision"], found["recall"]) == (1, 0.5, 1)


def test_mistakes_are_failed_and_reset_steps():
    turns = [dst(4, 6, ("S1", "fail")), dst(30, 32, ("S2", "reset"))]
    found = report(clip_of(turns, frames=60, updates={3.0: (("S1", "fail"),), 9.0: (("S1", "reset"),)}))
    assert (found["mistakes"]["matched"], found["mistakes"]["precision"], found["mistakes"]["recall"]) == (1, 0.5, 0.5)
    none = report(clip_of([dst(4, 6, START)], frames=60, updates={2.0: (START,)}))
    assert (none["mistakes"]["f1"], none["completions"]["f1"]) == (None, None)


@pytest.mark.parametrize(("said_s", "f1", "delay_s"), [(1.5, 0.0, None), (2.0, 1.0, 0.0), (2.5, 1.0, 0.5)])
def test_a_completion_is_early_before_its_first_positive_frame(said_s, f1, delay_s):
    """Frames 4 and 5 are positive, the turn's time is that of frame 5: said at frame 4 (2.0 s) it is not early."""
    found = report(clip_of([Turn("DST_UPDATE", "x", 4, 6, 2.6, (DONE,))], frames=10, updates={said_s: (DONE,)}))
    assert (found["completions"]["f1"], found["completions"]["delay_s"]) == (f1, delay_s)
