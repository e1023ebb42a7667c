"""Sequences, written out by hand token by token. F: a frame's token; [role]: a marker; . : the end of a text."""

from __future__ import annotations

import numpy as np
import pytest
from by_hand import Words, clip_example, dst, turn
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from trainer.sequence import DEFAULT_ARM, Window, build_windows, check_budget, state_before

PROMPT = (
    "[system] You are a helpful assistant. Toy [step] S1: Put the base down [not_started] "
    "[step] S2: Attach the wheel [not_started] ."
)
HELP = turn("system", "Current step states - Step S1: completed", 0, 1)  # as generated: tells the future


def one(clip: ClipExample, k: int = 1) -> tuple[str, Window, Words]:
    words = Words()
    (window,) = build_windows(clip, words, k, 1000)
    return words.show(window.input_ids), window, words


def toy(*turns, start=0, frames=6, **more) -> ClipExample:
    return clip_example([HELP, *turns], start, frames, goal="Toy", rate=1.0, **more)


def test_user_before_its_first_frame_and_replies_after_their_last():
    """TRAPS 11, 12."""
    clip = toy(turn("user", "what now", 2, 4), turn("assistant", "put it down", 3, 5))
    text, window, _ = one(clip)
    assert text == f"{PROMPT} F F [user] what now . F F F [assistant] put it down . F"
    base = len(PROMPT.split())
    assert (window.frame_positions[:, -1] - base).tolist() == [0, 1, 6, 7, 8, 14]
    # predicted: put it down . (the marker is given: the head decided to speak)
    assert (window.lm_positions - base).tolist() == [9, 10, 11, 12]
    assert window.labels.tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]


def test_real_clip_shape_two_updates_then_speech_at_one_moment():
    """TRAPS 1, 8. The real clip at 212: S1 completes, S2 starts, the assistant speaks; frames are absolute."""
    clip = toy(
        dst(212, 214, ("S1", "complete")),
        dst(212, 214, ("S2", "start")),
        turn("assistant", "Now screw it", 212, 214),
        start=210,
        initial=[("S1", "in_progress")],
    )
    text, window, words = one(clip)
    assert text == (
        "[system] You are a helpful assistant. Toy [step] S1: Put the base down [in_progress] "
        "[step] S2: Attach the wheel [not_started] . "
        "F F F F [DST_UPDATE] S1->complete, S2->start . [assistant] Now screw it . F F"
    )
    assert window.first_frame == 210
    assert window.labels.tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]]
    targets = words.show(window.input_ids[window.lm_positions + 1])
    assert targets == "S1->complete, S2->start . Now screw it ."


@pytest.mark.parametrize(
    ("turns", "more", "expected"),
    [
        pytest.param(
            [turn("assistant", "good", 1, 2), dst(1, 2, ("S1", "complete"))], {},
            "F F [DST_UPDATE] S1->complete . [assistant] good . F F F F", id="DST text first",
        ),
        pytest.param(
            [turn("user", "hi", 1, 2), turn("assistant", "hello", 1, 2)], {},
            "F [user] hi . F [assistant] hello . F F F F", id="a user at the frame of the reply",
        ),
        pytest.param(
            [turn("assistant", "first", 1, 2), turn("user", "a", 4, 5), turn("assistant", "second", 0, 2),
             turn("user", "b", 4, 6)], {},
            "F F [assistant] first second . F F [user] a b . F F", id="several of a role at one frame",
        ),
        pytest.param(
            [dst(1, 4, ("S1", "complete")), turn("assistant", "good", 2, 4)], {"positive": "onset"},
            "F F [DST_UPDATE] S1->complete . F [assistant] good . F F F", id="right after an onset",
        ),
        pytest.param(
            [turn("user", "early", 5, 12), turn("assistant", "late", 15, 30)], {"start": 10},
            "[user] early . F F F F F F [assistant] late .", id="cut to the clip",
        ),
        pytest.param(
            [turn("user", "before", 8, 10), turn("assistant", "unseen", None, None), turn("assistant", "empty", 12, 12),
             dst(16, 18, ("S1", "complete")), turn("user", "after", 16, 17)], {"start": 10},
            "F F F F F F", id="outside, empty or without frames",
        ),
        pytest.param([dst(8, 12)], {"start": 10, "positive": "onset"}, "F F F F F F", id="an onset before the clip"),
        pytest.param([dst(1, 2, ("step 1, toy", "complete"), ("S2", "start"))], {},
            'F F [DST_UPDATE] "step 1, toy"->complete, S2->start . F F F F', id="a step's id with a comma",
        ),
    ],
)  # fmt: skip
def test_where_texts_stand(turns, more, expected):
    assert one(toy(*turns, **more))[0].partition(" . ")[2] == expected


def test_k_tokens_per_frame_and_decision_at_the_last():
    clip = toy(turn("assistant", "ok", 1, 2), frames=3)
    text, window, _ = one(clip, k=4)
    assert text == f"{PROMPT} F F F F F F F F [assistant] ok . F F F F"
    base = len(PROMPT.split())
    assert (window.frame_positions - base).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [11, 12, 13, 14]]
    assert (window.frame_positions[:, -1] - base).tolist() == [3, 7, 14]


def test_prompt_of_a_clip_without_steps_tells_the_recipe():
    clip = clip_example([turn("assistant", "hi", 1, 2)], 0, 2, steps=(), goal="Tea", knowledge="Boil water")
    assert one(clip)[0] == "[system] You are a helpful assistant. Tea Boil water . F F [assistant] hi ."


# ---- windows -----------------------------------------------------------------------------------------


def long_clip() -> ClipExample:
    """100 frames; S1 starts at 10, completes at 40, S2 starts at 40, completes at 80."""
    return toy(
        dst(10, 12, ("S1", "start")),
        dst(40, 42, ("S1", "complete"), ("S2", "start")),
        turn("assistant", "good work", 41, 43),
        dst(80, 82, ("S2", "complete")),
        frames=100,
    )


def test_long_clips_become_windows_that_own_every_frame_once():
    clip, words = long_clip(), Words()
    prompt = len(PROMPT.split())
    windows = build_windows(clip, words, 1, prompt + 40)
    assert len(windows) == 4
    assert [w.context for w in windows] == [0, 10, 10, 7]  # the last: 7 frames and a text of 3
    owned = [f for w in windows for f in range(w.first_frame + w.context, w.end_frame)]
    assert owned == list(range(100))
    for w in windows:
        assert len(w.input_ids) <= prompt + 40
        assert (w.labels[:, : w.context] == -100).all()
        own = slice(w.first_frame + w.context, w.end_frame)
        assert np.array_equal(w.labels[:, w.context :], clip.labels[:, own])
    texts = " ".join(filter(None, (words.show(w.input_ids[w.lm_positions + 1]) for w in windows)))
    assert texts == "S1->start . S1->complete, S2->start . good work . S2->complete ."


def test_a_windows_prompt_has_the_state_before_it_never_its_own_or_later():
    clip, words = long_clip(), Words()
    for window in build_windows(clip, words, 1, len(PROMPT.split()) + 30):
        shown = words.show(window.input_ids)
        first = window.first_frame
        # text of an update on [a, b) stands after frame b - 1
        s1 = "not_started" if first <= 11 else "in_progress" if first <= 41 else "completed"
        s2 = "not_started" if first <= 41 else "in_progress" if first <= 81 else "completed"
        assert f"down [{s1}]" in shown
        assert f"wheel [{s2}]" in shown
        assert ("S1->start" in shown) == (first <= 11 < window.end_frame)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "DST_UPDATE"]), st.integers(90, 135), st.integers(0, 6)), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(events=EVENTS, positive=st.sampled_from(["span", "onset"]), room=st.integers(30, 90))
def test_no_text_stands_before_a_frame_that_is_positive_for_its_event(events, positive, room):
    """TRAPS 46, in every window. A user's text stands before its first frame."""
    turns = [
        dst(at, at + n, (f"text{i}", "start")) if role == "DST_UPDATE" else turn(role, f"text{i}", at, at + n)
        for i, (role, at, n) in enumerate(events)
    ]
    clip, words = clip_example(turns, 100, 30, positive=positive, rate=1.0), Words()
    prompt = len(build_windows(clip, words, 1, 10_000)[0].input_ids)
    for window in build_windows(clip, words, 1, prompt + room):
        for place, word in enumerate(words.show(window.input_ids).split()):
            if word.startswith("text"):
                own = turns[int(word[4])]
                frames = range(own.start_frame, own.end_frame if positive == "span" else own.start_frame + 1)
                after = set(window.first_frame + np.flatnonzero(window.frame_positions[:, -1] > place))
                assert (max(frames[0], 100) in after) if own.role == "user" else after.isdisjoint(frames)


def test_a_transition_without_frames_counts_from_the_next_turn_with_some():
    clip = toy(dst(2, 3, ("S1", "start")), dst(None, None, ("S1", "complete")), turn("user", "hi", 7, 8), frames=12)
    states = [state_before(clip, frame)["S1"] for frame in (2, 3, 7, 8)]
    assert states == ["not_started", "in_progress", "in_progress", "completed"]


def test_the_budget_that_would_do_is_told_before_the_first_step_and_does():
    """Prompt [system] You are a helpful assistant. end = 7; the frame costs 1, its text 2 with marker and end added."""
    clips = [clip_example([turn("assistant", "w " * n, 2, 3)], 0, 5, clip_id=f"c{n}", steps=()) for n in (3, 40, 30)]
    check_budget(clips, Words(), 1, 7 + 1 + 42, 8192, DEFAULT_ARM)
    with pytest.raises(InputError, match=r"clip c40: .* have 50 tokens, max_tokens is 30; use --max-tokens 50"):
        check_budget(clips, Words(), 1, 30, 50, DEFAULT_ARM)
    with pytest.raises(InputError, match=r"have 50 tokens, .*; the model reads 49: shorten its texts"):
        check_budget(clips, Words(), 1, 30, 49, DEFAULT_ARM)
    check_budget(clips, None, 1, 500, 8192, DEFAULT_ARM)  # so many bytes have none of them: none is tokenized
    build_windows(clips[1], Words(), 1, 50)
    with pytest.raises(InputError, match=r"clip c40 frame 2: 43 tokens .* leaves 42 beside"):
        build_windows(clips[1], Words(), 1, 49)
