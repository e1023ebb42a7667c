"""Label algebra on ranges and draws written by hand."""

import numpy as np
from hypothesis import strategies as st

from pipeline import labels
from pipeline.labels import NO_FRAMES, Ranges, Turns
from pipeline.schema import ROLES


def rule(speaking, dst, bounds, positive="span", tracked=True, unlabelled=()):
    """The rule of one clip [start, end) from its event ranges."""
    turns = [(ROLES.index("assistant"), *r) for r in speaking] + [(ROLES.index("DST_UPDATE"), *r) for r in dst]
    turns, nobody = (np.array(a, np.int64).reshape(-1, n) for a, n in ((turns, 3), (unlabelled, 2)))
    return labels.label_rule(
        Turns(np.zeros(len(turns), np.int64), *turns.T),
        Ranges(np.zeros(len(nobody), np.int64), *nobody.T),
        starts=np.array([bounds[0]]),
        sizes=np.array([bounds[1] - bounds[0]]),
        seeds=np.array([7], np.uint64),
        rates=np.array([0.5]),
        steps=np.array([int(tracked)]),
        onset=np.array([positive == "onset"]),
    )


def label(speaking, dst, bounds=(10, 18), drawn=(), **rest):
    mask = np.zeros(bounds[1] - bounds[0], bool)
    mask[[frame - bounds[0] for frame in drawn]] = True
    return labels.labels_of(rule(speaking, dst, bounds, **rest), mask).tolist()


N = -100


def test_a_frame_positive_for_one_head_is_silence_for_the_other():
    assert label([(11, 13)], [(12, 14)], drawn=[17]) == [
        [N, 1, 1, 0, N, N, N, 0],
        [N, 0, 1, 1, N, N, N, 0],
    ]


def test_frames_that_nobody_annotated_are_left_out_of_both_heads_whatever_happens_there():
    assert label([(11, 13)], [(12, 14)], drawn=range(10, 18), unlabelled=[(12, 13), (16, 18)]) == [
        [0, 1, N, 0, 0, 0, N, N],
        [0, 0, N, 1, 0, 0, N, N],
    ]


def test_onset_leaves_the_rest_of_the_range_alone_for_its_head_only():
    # frame 12 is drawn: silence for DST; for speaking it is the rest of a range
    assert label([(11, 14)], [], drawn=[12], positive="onset") == [
        [N, 1, N, N, N, N, N, N],
        [N, 0, 0, N, N, N, N, N],
    ]


def test_the_rest_of_a_range_is_not_punished_by_the_other_heads_onset():
    assert label([(11, 14)], [(12, 13)], positive="onset") == [
        [N, 1, N, N, N, N, N, N],
        [N, 0, 1, N, N, N, N, N],
    ]


def test_an_onset_inside_another_turns_rest_is_positive():
    assert label([(11, 14), (12, 15)], [], positive="onset")[0] == [N, 1, 1, N, N, N, N, N]


def test_an_onset_before_the_clip_is_not_moved_into_it():
    assert label([(8, 12)], [], drawn=range(10, 18), positive="onset") == [
        [N, N, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_turns_are_cut_to_the_clip_and_never_moved():
    speaking = [(5, 11), (17, 30), (18, 20), (0, 10), (100, 200)]
    assert label(speaking, [])[0] == [1, N, N, N, N, N, N, 1]


def test_the_last_turn_may_end_where_the_clip_ends():
    assert label([], [(449, 451)], bounds=(445, 451))[1] == [N, N, N, N, 1, 1]


def test_a_clip_without_dst_says_nothing_about_the_second_head():
    assert label([(11, 12)], [], drawn=range(10, 18), tracked=False) == [[0, 1, 0, 0, 0, 0, 0, 0], [N] * 8]


def test_ranges_that_overlap_or_repeat_mark_their_union():
    ranges = Ranges(np.array([0, 0, 1, 0, 1]), np.array([1, 2, -3, 1, 6]), np.array([3, 4, 1, 3, 4]))
    marked = labels.mark(ranges, starts=np.array([0, 0]), sizes=np.array([5, 3]))
    assert np.flatnonzero(marked).tolist() == [1, 2, 3, 5]


def test_clips_end_to_end_do_not_touch():
    ranges = Ranges(np.array([0, 1]), np.array([2, 0]), np.array([9, 1]))
    marked = labels.mark(ranges, starts=np.array([0, 0]), sizes=np.array([3, 3]))
    assert marked.tolist() == [False, False, True, True, False, False]


ranges = st.lists(st.tuples(st.integers(-5, 40), st.integers(0, 12)).map(lambda r: (r[0], r[0] + r[1])), max_size=6)


def test_conventions_say_which_frames_an_event_has():
    start, end = np.array([193, 5]), np.array([195, 5])
    assert [a.tolist() for a in labels.canonical("event", start, end)] == [[193, 5], [195, 5]]
    assert [a.tolist() for a in labels.canonical("window", start, end)] == [[193, 5], [196, 6]]
    assert [a.tolist() for a in labels.canonical("lead-in", start, end)] == [[194, 4], [195, 5]]


def test_why_turns_label_nothing():
    start = np.array([NO_FRAMES[0], 12, 18, 4, 8, 12])
    end = np.array([NO_FRAMES[1], 12, 20, 10, 12, 14])
    low, high = np.full(6, 10), np.full(6, 18)
    named = [labels.DROP_REASONS[r] if r >= 0 else "" for r in labels.drops(start, end, low, high, "onset")]
    assert named == [
        "no frames",
        "empty range",
        "outside the clip",
        "outside the clip",
        "onset outside the clip",
        "",
    ]
    assert labels.drops(start, end, low, high, "span").tolist() == [0, 1, 2, 2, -1, -1]
