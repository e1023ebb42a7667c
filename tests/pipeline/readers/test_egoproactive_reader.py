"""EgoProactive sessions: chunks to frames, answers to events, gaps to nothing, and what `dialog` gives away."""

from __future__ import annotations

import math
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import run

from pipeline.readers.egoproactive import chunk_frames


def session(video, query, intervals, answers, leak=True):
    history, dialog = [{"role": "user", "text": query}], []
    for answer in answers:
        dialog.append(list(history))
        history += [{"role": "assistant", "text": answer}] * (leak and answer.startswith("$interrupt$"))
    named = {"video_path": video, "query": query, "domain": "Repair", "task": "Patching a tyre"}
    named |= {"duration_in_sec": intervals[-1][1], "video_intervals": intervals}
    return named | {"answers": answers, "dialog": dialog}


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
    assert [(row["video_uid"], row["frames_file"], row["goal"]) for row in rows] == [
        ("pots", "pots.mp4", "Patching a tyre"),
        ("tyre", "val/tyre.mp4", "Patching a tyre"),
        ("tee", "tee.mp4", "Patching a tyre"),
    ]
    assert [(t["role"], t["text"], t["start_frame"], t["end_frame"]) for t in rows[0]["turns"]] == [
        ("user", "How?", 0, 1),  # the query, at the first chunk
        ("assistant", "Gravel.", 0, 4),
        ("assistant", "Soil.", 21, 37),
        ("assistant", "x", 152, 168),
    ]
    assert out.manifest["splits"]["val"]["speaking_frames"] == 184 - 17 - 32 - 51 + 47 + 32
    assert out.hazards()["dialog history tells the answers"].startswith("8 of 8 speaking decisions")


def test_at_a_lower_rate_gaps_stay_out_and_onsets_are_the_chunks_first_frames(tmp_path):
    clean = [session(s["video_path"], s["query"], s["video_intervals"], s["answers"], leak=False) for s in SESSIONS]
    out = run(tmp_path, clean, "train.jsonl", positive="onset", neg_rate={"*": 0.0})
    assert out.ones("train", 0) == ([0, 21, 152], [])
    assert set(out.labels("train", 0)["speaking"].values()) == {1, -100}
    assert "dialog history tells the answers" not in out.hazards()


hundredths = st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 900)), min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(chunks=hundredths, hz=st.sampled_from(["1", "2", "5", "29.97"]))
def test_a_frame_belongs_to_the_chunk_that_holds_its_time(chunks, hz):
    """Against exact fractions: frame f of a chunk [s, e) has s <= f / fps < e."""
    edges, at = [], 0
    for gap, length in chunks:
        edges.append((at + gap, at + gap + length))
        at += gap + length
    found = chunk_frames([(start / 100, end / 100) for start, end in edges], float(hz))
    assert found == [tuple(math.ceil(Fraction(edge, 100) * Fraction(hz)) for edge in pair) for pair in edges]
