"""EgoProactive sessions: chunks to frames, answers to events, gaps to nothing, and what `dialog` gives away."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from made_up import run

from pipeline.readers.egoproactive import chunk_frames


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
