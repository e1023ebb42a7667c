"""The label rule: on ranges written by hand. tests/contract holds it against an independent reference."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import labels
from pipeline.labels import BLOCK, NO_FRAMES, Ranges, Turns, epoch_labels, label_rule
from pipeline.schema import ROLES, draws, rate_threshold

N = -100


def rule(clips: int, turns: list, unlabelled=(), steps=1, onset=False):
    """The same clip from frame 10 to 18, `clips` times, each with a seed of its own; turns: (role, start, end)."""
    turns = [(i, ROLES.index(role), *r) for i in range(clips) for role, *r in turns]
    nobody = [(i, *r) for i in range(clips) for r in unlabelled]
    return label_rule(
        Turns(*np.array(turns, np.int64).reshape(-1, 4).T), Ranges(*np.array(nobody, np.int64).reshape(-1, 3).T),
        starts=np.full(clips, 10), sizes=np.full(clips, 8), seeds=np.arange(7, 7 + clips, dtype=np.uint64),
        rates=np.full(clips, 0.5), steps=np.full(clips, steps), onset=np.full(clips, onset),
    )  # fmt: skip


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
    turns = [("assistant", *r) for r in speaking] + [("DST_UPDATE", *r) for r in dst]
    assert epoch_labels(rule(1, turns, **more), 0, rate).tolist() == expected
    # and of many clips, more than are drawn at a time
    assert epoch_labels(rule(BLOCK + 1, turns, **more), 0, rate).tolist() == [row * (BLOCK + 1) for row in expected]


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


EVENTS = st.lists(st.tuples(st.sampled_from(["assistant", "DST_UPDATE"]), st.integers(6, 20), st.integers(0, 9)))


def by_definition(head, events, steps, onset, drawn):
    """Of one head from frame 10 to 18, of which nobody annotated 13 and 14; drawn: [8] bool."""
    tracked = head == "assistant" or steps or any(role == head for role, *_ in events)
    for frame, kept in zip(range(10, 18), drawn, strict=True):
        here = [(role == head, at == frame or not onset) for role, at, n in events if at <= frame < at + n]
        silence = N if (True, False) in here else 0 if kept or (False, True) in here else N  # the rest of an onset: N
        yield N if frame in (13, 14) or not tracked else 1 if (True, True) in here else silence


@settings(max_examples=40, deadline=None)
@given(EVENTS, st.booleans(), st.booleans(), st.integers(0, 5), st.sampled_from([None, 0.0, 0.3, 1.0]))
def test_labels_of_any_epoch_and_rate_are_those_of_the_definition_frame_by_frame(events, steps, onset, epoch, rate):
    count = BLOCK + 1
    turns = [(role, at, at + n) for role, at, n in events]
    found = epoch_labels(rule(count, turns, [(13, 15)], steps, onset), epoch, rate).reshape(2, count, 8)
    for i in range(count):
        drawn = draws(7 + i, epoch, np.arange(10, 18)) < np.uint64(rate_threshold(0.5 if rate is None else rate))
        for row, head in enumerate(("assistant", "DST_UPDATE")):
            assert found[row, i].tolist() == [*by_definition(head, events, steps, onset, drawn)]
