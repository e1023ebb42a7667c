"""EgoProactive sessions: chunks to frames, answers to events, gaps to nothing, and what `dialog` gives away."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import run

from pipeline import readers
from pipeline.hazards import ContextCounts, of_context
from pipeline.readers.clip import ClipError
from pipeline.readers.egoproactive import chunk_frames, interrupt_text


def session(video, query, intervals, answers, leak=True):
    history, dialog = [{"role": "user", "text": query}], []
    for answer in answers:
        dialog.append(list(history))
        if leak and answer.startswith("$interrupt$"):
            history.append({"role": "assistant", "text": answer})
    named = {"video_path": video, "query": query, "domain": "Repair", "task": "Patching a tyre"}
    return named | {
        "duration_in_sec": intervals[-1][1],
        "video_intervals": intervals,
        "answers": answers,
        "dialog": dialog,
    }


GAPS = [[0.0, 2.0], [10.4, 18.4], [18.4, 26.4], [42.4, 50.4], [75.9, 83.9], [83.9, 91.9]]
SAID = ["$interrupt$Gravel.", "$interrupt$ Soil. ", "$silent$", "$silent$", "$interrupt$x", ""]
TYRE = [[0.0, 8.0], [8.0, 16.0], [16.0, 23.5]]
SESSIONS = [
    session("pots.mp4", "How?", GAPS, SAID),
    session("val/tyre.mp4", "Help.", TYRE, ["$interrupt$Lever.", "$silent$", "$silent$"]),
    session("tee.mp4", "Tee?", [[0.25, 8.25], [8.25, 16.25]], ["$interrupt$Wasser.", " \n$interrupt$Aufgießen."]),
]


def spread(*ranges):
    return {frame: label for start, end, label in ranges for frame in range(start, end)}


def test_every_frame_of_three_sessions(tmp_path):
    out = run(tmp_path, SESSIONS, "val.jsonl")
    assert out.bounds("val") == [(0, 184), (0, 47), (0, 33)]
    assert out.labels("val", 0)["speaking"] == spread(
        (0, 4, 1), (4, 21, -100), (21, 37, 1), (37, 53, 0), (53, 85, -100), (85, 101, 0), (101, 152, -100),
        (152, 168, 1), (168, 184, 0),
    )  # fmt: skip
    assert out.labels("val", 1)["speaking"] == spread((0, 16, 1), (16, 47, 0))
    assert out.labels("val", 2)["speaking"] == spread((0, 1, -100), (1, 33, 1))
    assert {label for clip in range(3) for label in out.labels("val", clip)["dst_update"].values()} == {-100}
    rows = out.clips("val")
    assert [row["frames_file"] for row in rows] == ["pots.mp4", "val/tyre.mp4", "tee.mp4"]
    assert [row["video_uid"] for row in rows] == ["pots", "tyre", "tee"]
    assert rows[2]["unlabelled"] == [{"start_frame": 0, "end_frame": 1}]
    assert out.manifest["splits"]["val"]["speaking_frames"] == 184 - 17 - 32 - 51 + 47 + 32


def test_texts_stand_in_their_chunks_and_the_query_at_the_first(tmp_path):
    (row, *_) = run(tmp_path, SESSIONS, "val.jsonl").clips("val")
    assert [(t["role"], t["text"], t["start_frame"], t["end_frame"]) for t in row["turns"]] == [
        ("user", "How?", 0, 1),
        ("assistant", "Gravel.", 0, 4),
        ("assistant", "Soil.", 21, 37),
        ("assistant", "x", 152, 168),
    ]
    assert row["goal"] == "Patching a tyre"


def test_at_a_lower_rate_gaps_stay_out_and_onsets_are_the_chunks_first_frames(tmp_path):
    out = run(tmp_path, SESSIONS, "train.jsonl", positive="onset", neg_rate={"*": 0.0})
    assert out.ones("train", 0) == ([0, 21, 152], [])
    assert set(out.labels("train", 0)["speaking"].values()) == {1, -100}


def test_fps_and_duration_of_the_session(tmp_path):
    """Frames after the last chunk are annotated by nobody."""
    clips = [SESSIONS[1] | {"duration_in_sec": 25.0}, SESSIONS[1] | {"fps": 1, "video_path": "b.mp4"}]
    out = run(tmp_path, clips, "val.jsonl", fps=4.0)
    assert out.bounds("val") == [(0, 100), (0, 24)]
    assert out.labels("val")["speaking"] == spread((0, 32, 1), (32, 94, 0), (94, 100, -100))


@pytest.mark.parametrize(
    ("answer", "text"),
    [("$silent$", None), ("", None), ("now $interrupt$", None), ("$interrupt$", ""), ("\n\t $interrupt$ x ", "x")],
)
def test_a_tag_may_follow_white_space_alone(answer, text):
    assert interrupt_text(answer) == text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"answers": ["$silent$"]}, "answers"),
        ({"video_intervals": [[8.0, 0.0], [8.0, 16.0]]}, "video_intervals"),
        ({"video_intervals": [[0.0, 8.0], [7.0, 16.0]]}, "video_intervals"),
        ({"video_path": "../a.mp4"}, "video_path"),
    ],
)
def test_what_decides_a_label_is_checked(change, field):
    with pytest.raises(ClipError) as error:
        readers.decode(json.dumps(SESSIONS[2] | change).encode())
    assert error.value.field.startswith(field)


hundredths = st.lists(st.integers(0, 1200), min_size=1, max_size=12)


@given(
    gaps=hundredths,
    lengths=st.lists(st.integers(0, 900), min_size=12, max_size=12),
    hz=st.sampled_from(["1", "2", "5", "29.97"]),
)
def test_a_frame_belongs_to_the_chunk_that_holds_its_time(gaps, lengths, hz):
    """Against exact fractions: frame f of a chunk [s, e) has s <= f / fps < e."""
    edges, at = [], 0
    for gap, length in zip(gaps, lengths, strict=False):
        edges.append((at + gap, at + gap + length))
        at += gap + length
    found = chunk_frames([(start / 100, end / 100) for start, end in edges], float(hz))
    exact = [tuple(math.ceil(Fraction(edge, 100) * Fraction(hz)) for edge in pair) for pair in edges]
    assert found == exact


# ---- what the dialog gives away ----------------------------------------------------------------------

LEAK = "dialog history tells the answers"


def test_a_dialog_that_grows_after_interrupts_is_counted(tmp_path):
    text = run(tmp_path, SESSIONS, "val.jsonl").hazards()[LEAK]
    assert text.startswith("8 of 8 speaking decisions")
    clean = [session(s["video_path"], s["query"], s["video_intervals"], s["answers"], leak=False) for s in SESSIONS]
    assert LEAK not in run(tmp_path / "clean", clean, "val.jsonl").hazards()


def test_a_thousand_random_sessions_give_nothing_away():
    """With a dialog that does not grow, grows at every chunk, or whenever it likes."""
    rng, counts = random.Random(0), ContextCounts()
    for i in range(1000):
        chunks = rng.randint(2, 14)
        answers = ["$interrupt$Do it."] + [rng.choice(("$silent$", "$interrupt$Go on.")) for _ in range(chunks - 1)]
        made, said = session("a.mp4", "How?", [[8 * i, 8 * i + 8] for i in range(chunks)], answers, leak=False), 0
        for history in made["dialog"]:
            said += i % 3 == 1 or (i % 3 == 2 and rng.random() < 0.5)
            history += [{"role": "assistant", "text": "ok"}] * said
        given_away, decisions = readers.decode(json.dumps(made).encode()).given_away
        counts.given_away += given_away
        counts.decisions += decisions
    assert counts.decisions > 4000
    assert not list(of_context("val", counts))
