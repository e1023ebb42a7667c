from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.schema import TRANSITIONS
from pipeline.updates import parse_updates, write_updates

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
