"""The label rule: on ranges written by hand, and on many clips at once against the definition, frame by frame."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import labels
from pipeline.labels import BLOCK, NO_FRAMES, Ranges, Turns, epoch_labels, label_rule
from pipeline.schema import ROLES, draws, rate_threshold

N = -100


@pytest.mark.parametrize(
    ("speaking", "dst", "rate", "more", "expected"),
    [
        # a frame positive for one head is silence for the other
        ([(11, 13)], [(12, 14)], 0, {}, [[N, 1, 1, 0, N, N, N, N], [N, 0, 1, 1, N, N, N, N]]),
        # frames that nobody annotated are left out of both heads, whatever happens there
        ([(11, 13)], [(12, 14)], 1, {"unlabelled": [(12, 13), (16, 18)]},
         [[0, 1, N, 0, 0, 0, N, N], [0, 0, N, 1, 0, 0, N, N]]),
        # onset: the rest of the range is left alone, for its head only
        ([(11, 14)], [], 0, {"onset": True}, [[N, 1, N, N, N, N, N, N], [N, 0, N, N, N, N, N, N]]),
        ([(11, 14)], [], 1, {"onset": True}, [[0, 1, N, N, 0, 0, 0, 0], [0] * 8]),
        ([(11, 14)], [(12, 13)], 0, {"onset": True}, [[N, 1, N, N, N, N, N, N], [N, 0, 1, N, N, N, N, N]]),
        # an onset inside another turn's rest is positive; one before the clip is not moved into it
        ([(11, 14), (12, 15)], [], 0, {"onset": True}, [[N, 1, 1, N, N, N, N, N], [N, 0, 0, N, N, N, N, N]]),
        ([(8, 12)], [], 1, {"onset": True}, [[N, N, 0, 0, 0, 0, 0, 0], [0] * 8]),
        # turns are cut to the clip and never moved; the last may end where the clip ends
        ([(5, 11), (17, 30), (18, 20), (0, 10), (100, 200)], [], 0, {},
         [[1, N, N, N, N, N, N, 1], [0, N, N, N, N, N, N, 0]]),
        ([], [(16, 18)], 0, {}, [[N, N, N, N, N, N, 0, 0], [N, N, N, N, N, N, 1, 1]]),
        # a clip without DST says nothing about the second head
        ([(11, 12)], [], 1, {"steps": 0}, [[0, 1, 0, 0, 0, 0, 0, 0], [N] * 8]),
    ],
)  # fmt: skip
def test_labels_of_one_clip_from_frame_10_to_18(speaking, dst, rate, more, expected):
    turns = [(ROLES.index("assistant"), *r) for r in speaking] + [(ROLES.index("DST_UPDATE"), *r) for r in dst]
    turns, nobody = (np.array(a, np.int64).reshape(-1, n) for a, n in ((turns, 3), (more.get("unlabelled", ()), 2)))
    rule = label_rule(
        Turns(np.zeros(len(turns), np.int64), *turns.T), Ranges(np.zeros(len(nobody), np.int64), *nobody.T),
        starts=np.array([10]), sizes=np.array([8]), seeds=np.array([7], np.uint64), rates=np.array([0.5]),
        steps=np.array([more.get("steps", 1)]), onset=np.array([more.get("onset", False)]),
    )  # fmt: skip
    assert epoch_labels(rule, 0, rate).tolist() == expected


def test_ranges_that_overlap_or_repeat_mark_their_union_and_clips_end_to_end_do_not_touch():
    ranges = Ranges(np.array([0, 0, 1, 0, 1]), np.array([1, 2, -3, 1, 6]), np.array([3, 9, 1, 3, 4]))
    marked = labels.mark(ranges, starts=np.array([0, 0]), sizes=np.array([5, 3]))
    assert np.flatnonzero(marked).tolist() == [1, 2, 3, 4, 5]


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
    assert named == ["no frames", "empty range", *["outside the clip"] * 2, "onset outside the clip", ""]
    assert labels.drops(start, end, low, high, "span").tolist() == [0, 1, 2, 2, -1, -1]


# ---- many clips ----------------------------------------------------------------------------------------

events = st.lists(st.tuples(st.sampled_from(["assistant", "DST_UPDATE"]), st.integers(0, 30), st.integers(0, 9)))
rates = st.sampled_from([0.0, 0.3, 1.0])
clip = st.tuples(st.integers(0, 9), st.integers(1, 12), events, st.integers(0, 1), st.booleans(), rates)


def by_definition(number, start, size, turns, steps, onset, rate, epoch):
    """[2, size]; frames 3 and 4 were annotated by nobody."""
    drawn = draws(number, epoch, np.arange(start, start + size)) < np.uint64(rate_threshold(rate))
    tracked = steps or any(role == "DST_UPDATE" for role, *_ in turns)
    labels = []
    for head in ("assistant", "DST_UPDATE"):
        row = []
        for frame, kept in zip(range(start, start + size), drawn, strict=True):
            here = [(role == head, at == frame or not onset) for role, at, n in turns if at <= frame < at + n]
            if (True, True) in here:
                label = 1
            elif (True, False) in here:  # the rest of an onset
                label = -100
            else:
                label = 0 if kept or (False, True) in here else -100
            row.append(-100 if frame in (3, 4) or (head == "DST_UPDATE" and not tracked) else label)
        labels.append(row)
    return labels


@settings(max_examples=40, deadline=None)
@given(st.lists(clip, min_size=1, max_size=3), st.integers(0, 5))
def test_many_clips_have_the_labels_of_each_alone(some, epoch):
    clips = [some[i % len(some)] for i in range(BLOCK + 3)]  # more than are drawn at a time
    starts, sizes, steps, onset, rate = (np.array([c[k] for c in clips]) for k in (0, 1, 3, 4, 5))
    turns = [(i, ROLES.index(role), at, at + n) for i, c in enumerate(clips) for role, at, n in c[2]]
    rule = label_rule(
        Turns(*np.array(turns, np.int64).reshape(-1, 4).T),
        Ranges(np.arange(len(clips)), np.full(len(clips), 3), np.full(len(clips), 5)),
        starts=starts, sizes=sizes, seeds=np.arange(len(clips), dtype=np.uint64), rates=rate, steps=steps, onset=onset,
    )  # fmt: skip
    expected = [by_definition(i, *c, epoch) for i, c in enumerate(clips)]
    assert epoch_labels(rule, epoch).tolist() == np.concatenate(expected, axis=1).tolist()
