"""The dialog state: replay, contradiction, and the state before each clip of a conversation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schema import STATES, TRANSITIONS
from pipeline.state import (
    Segment,
    contradicts,
    initial_state,
    lacks,
    parse_updates,
    replay,
    replay_frames,
    states_before,
    write_updates,
)

STEPS = st.sampled_from(["S1", "S2", "S3"])
MOVES = st.sampled_from(sorted(TRANSITIONS))
STATE = st.dictionaries(STEPS, st.sampled_from(["in_progress", "completed", "failed"]))


@st.composite
def conversations(draw):
    """(moments: frame -> updates, first moment of each clip, clips) cut with or without the moment before repeated."""
    gaps = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    frames = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    moments = {frame: draw(st.lists(st.tuples(STEPS, MOVES), max_size=3, unique=True)) for frame in frames}
    cuts = sorted(draw(st.sets(st.integers(1, len(frames)), max_size=4)) - {len(frames)})
    starts, clips = [], []
    for low, high in zip([0, *cuts], [*cuts, len(frames)], strict=True):
        low -= low > 0 and draw(st.booleans()) and (not starts or frames[low - 1] > starts[-1])
        starts.append(frames[low])
        updates = [(frame, *update) for frame in frames[low:high] for update in moments[frame]]
        clips.append(Segment(frames[low], updates, draw(st.none() | STATE)))
    return moments, starts, clips


@given(conversations(), st.randoms(use_true_random=False))
def test_the_state_before_each_clip_is_that_of_a_plain_replay(made, rng):
    """Whatever the other clips' given states say, and however the clips are ordered."""
    moments, starts, clips = made
    order = list(range(len(clips)))
    rng.shuffle(order)
    found = dict(zip(order, states_before([clips[i] for i in order]), strict=True))
    base = clips[0].given or {}
    for i, start in enumerate(starts):
        before = [update for frame, updates in moments.items() if frame < start for update in updates]
        assert found[i] == replay(base, before), i


@pytest.mark.parametrize(
    ("clips", "last"),
    [
        # an update at a clip's first moment that it does not repeat was before it
        ([(0, [(5, "S1", "start"), (9, "S1", "complete")]), (9, [(9, "S2", "start")])], {"S1": "completed"}),
        # what an earlier clip holds of a later time was not before
        ([(0, [(5, "S1", "start"), (30, "S1", "complete")]), (9, [(12, "S2", "start")])], {"S1": "in_progress"}),
        # equal updates at one moment of one clip all count
        ([(0, [(0, "S1", "pause"), (0, "S1", "complete"), (0, "S1", "pause")]), (4, [])], {"S1": "paused"}),
    ],
)
def test_which_updates_of_earlier_clips_were_before(clips, last):
    assert states_before([Segment(*clip, None) for clip in clips])[-1] == last


@pytest.mark.parametrize(
    ("before", "updates", "wrong", "lacking"),
    [
        ({}, [("S1", "start")], False, False),
        ({"S1": "completed"}, [("S1", "start")], True, False),
        ({"S1": "in_progress"}, [("S1", "start")], True, False),
        ({"S1": "completed"}, [("S1", "complete")], True, False),
        ({"S1": "in_progress"}, [("S1", "complete"), ("S1", "start")], False, False),
        ({"S2": "completed"}, [("S1", "start"), ("S1", "complete")], False, False),
        ({"S1": "not_started"}, [("S1", "complete")], False, True),
        ({}, [("S1", "start"), ("S2", "pause")], False, True),
        ({"S1": "paused"}, [("S1", "start")], False, False),
        ({"S1": "in_progress"}, [], False, False),
    ],
)
def test_states_that_cannot_be_before_the_updates(before, updates, wrong, lacking):
    assert contradicts(before, updates) == wrong
    assert lacks(before, updates) == lacking


def test_states_at_the_end_of_every_frame():
    start = initial_state(["S1", "S2"], {"S2": "paused"})
    updates = [(1, ("S1", "start")), (1, ("S9", "start")), (1, ("S2", "dance")), (3, ("S1", "complete"))]
    names = np.array(STATES)[replay_frames(start, updates, 4)].tolist()
    assert names == [["not_started", "paused"], *[["in_progress", "paused"]] * 2, ["completed", "paused"]]


# ---- updates as text -----------------------------------------------------------------------------------

IDS = st.one_of(st.text(st.characters(exclude_categories=("Cs",))), st.text(',:"\\->\n\r\t \u2028aS1'))
UPDATES = st.lists(st.tuples(IDS, st.sampled_from(sorted(TRANSITIONS)))).map(tuple)


@given(UPDATES)
def test_any_step_ids_read_back_as_they_were_written(updates):
    assert parse_updates(write_updates(updates)) == updates


@given(UPDATES, UPDATES)
def test_texts_of_two_turns_may_be_joined(one, other):
    assert parse_updates(", ".join(filter(None, map(write_updates, (one, other))))) == one + other


@pytest.mark.parametrize(
    ("updates", "text"),
    [
        ([("S1", "complete"), ("S2", "start")], "S1->complete, S2->start"),
        ([("Fit a bolt: top", "start"), ("a->b", "fail")], "Fit a bolt: top->start, a->b->fail"),
        ([("step 1, toy", "start"), (" S", "pause")], '"step 1, toy"->start, " S"->pause'),
        ([], ""),
    ],
)
def test_ids_are_quoted_only_where_they_must_be(updates, text):
    assert write_updates(updates) == text


@pytest.mark.parametrize(
    ("text", "updates"),
    [
        ("S1->complete,S2 -> start", (("S1", "complete"), ("S2", "start"))),
        ("S1->jump, S2->start", (("S2", "start"),)),
        ("->start, S1->, complete, S1", ()),
        ('"S1->start, S2->start', (('"S1', "start"), ("S2", "start"))),
        ('"a" b->start', (('"a" b', "start"),)),
    ],
)
def test_what_reads_as_no_update_is_left_out(text, updates):
    assert parse_updates(text) == updates
