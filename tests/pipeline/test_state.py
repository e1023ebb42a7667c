"""The dialog state: replay, contradiction, and the state before each clip of a conversation."""

import numpy as np
import pytest
from hypothesis import given, settings
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


@settings(max_examples=50, deadline=None)
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


def test_equal_updates_at_one_moment_of_one_clip_all_count():
    twice = Segment(0, [(0, "S1", "pause"), (0, "S1", "complete"), (0, "S1", "pause")], None)
    assert states_before([twice, Segment(4, [], None)])[-1] == {"S1": "paused"}


@pytest.mark.parametrize(
    ("before", "updates", "wrong", "lacking"),
    [
        ({}, [("S1", "start")], False, False),
        ({"S1": "completed"}, [("S1", "start")], True, False),
        ({"S1": "in_progress"}, [("S1", "complete"), ("S1", "start")], False, False),
        ({"S1": "not_started"}, [("S1", "complete")], False, True),
        ({}, [("S1", "start"), ("S2", "pause")], False, True),
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


IDS = st.one_of(st.text(st.characters(exclude_categories=("Cs",))), st.text(',:"\\->\n\r\t \u2028aS1'))
UPDATES = st.lists(st.tuples(IDS, st.sampled_from(sorted(TRANSITIONS)))).map(tuple)


@settings(max_examples=50, deadline=None)
@given(UPDATES, UPDATES)
def test_any_step_ids_read_back_as_they_were_written_and_texts_of_two_turns_may_be_joined(one, other):
    assert parse_updates(write_updates(one)) == one
    assert parse_updates(", ".join(filter(None, map(write_updates, (one, other))))) == one + other


def test_ids_are_quoted_only_where_they_must_be():
    assert write_updates([("S1", "complete"), ("S2", "start")]) == "S1->complete, S2->start"
    assert write_updates([("Fit a bolt: top", "start"), ("a->b", "fail")]) == "Fit a bolt: top->start, a->b->fail"
    assert write_updates([("step 1, toy", "start"), (" S", "pause")]) == '"step 1, toy"->start, " S"->pause'


def test_what_reads_as_no_update_is_left_out():
    assert parse_updates("S1->complete,S2 -> start") == (("S1", "complete"), ("S2", "start"))
    assert parse_updates("S1->jump, S2->start, ->start, S1->, complete, S1") == (("S2", "start"),)
