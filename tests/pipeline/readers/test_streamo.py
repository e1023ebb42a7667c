"""Streamo-Instruct and JoyAI-VL-Interaction, on made-up samples: which second a time names, what is read of them."""

from __future__ import annotations

import json

import polars as pl
import pytest

from pipeline.readers import decode
from pipeline.readers.clip import ClipError
from trainer.cli import main


def record(**more) -> dict:
    return {
        "video_name": "v1.mp4",
        "video_path": "SrcA/clips/v1.mp4",
        "task_type": "QA",
        "source": "SrcA",
        "question": [{"content": "What is on the bench?", "time": "3"}],
        "response": [{"content": "A red vice.", "st_time": 3.0, "end_time": 5.0, "time": ""}],
        **more,
    }


def read(fps: float | None = None, **more):
    return decode(json.dumps(record(**more)).encode(), fps=fps)


def turns(clip) -> list[tuple]:
    """(role, text, time, first frame, end)"""
    return list(zip(*clip.turns, strict=True))


def test_an_event_of_streamo_is_answered_in_the_second_after_it():
    clip = read()
    assert turns(clip) == [
        ("user", "What is on the bench?", 2.0, 4, 5),  # "3" is the second [2, 3)
        ("assistant", "A red vice.", 5.0, 10, 12),  # the event ends at 5 s
    ]
    assert (clip.start_frame, clip.end_frame, clip.fps, clip.convention) == (0, 12, 2.0, "event")
    assert (clip.video_uid, clip.frames_file, clip.dataset) == ("SrcA/clips/v1", "SrcA/clips/v1.mp4", "SrcA")


def test_an_instant_response_of_streamo_stands_in_the_second_that_ends_at_its_time():
    response = {"content": "He opens it.", "st_time": "", "end_time": "", "time": "4"}
    question = [{"content": "Tell me.", "time": "0"}]
    assert turns(read(question=question, response=[response])) == [
        ("user", "Tell me.", 0.0, 0, 1),
        ("assistant", "He opens it.", 3.0, 6, 8),
    ]


def test_a_time_of_joyai_names_the_second_that_begins_there():
    """No response has st_time or end_time; one text may be said several times; lists may be nested."""
    question = [{"content": "Say when it boils.", "time": "4"}]
    response = [{"content": "Now.", "time": "7, 9"}, [{"content": "Off.", "time": 11}]]
    clip = read(question=question, response=response, video_path="")
    assert turns(clip) == [
        ("user", "Say when it boils.", 4.0, 8, 9),
        ("assistant", "Now.", 7.0, 14, 16),
        ("assistant", "Now.", 9.0, 18, 20),
        ("assistant", "Off.", 11.0, 22, 24),
    ]
    assert (clip.video_uid, clip.frames_file, clip.end_frame) == ("v1", "v1.mp4", 24)


def test_turns_are_in_order_and_a_question_before_the_answer_of_its_second():
    question = [{"content": "b?", "time": 6}, {"content": "a?", "time": 1}]
    response = [{"content": "b", "time": 6}, {"content": "a", "time": 2}]
    assert [turn[1] for turn in turns(read(question=question, response=response))] == ["a?", "a", "b?", "b"]


@pytest.mark.parametrize(
    ("time", "fps", "frames"),
    [
        ("5", 1.0, (5, 6)),
        ("5", 4.0, (20, 24)),
        (2.25, 2.0, (5, 7)),
        ("1:05", 2.0, (130, 132)),
        ("0:01:05.5", 2.0, (131, 133)),
    ],
)
def test_times_are_seconds_in_any_spelling(time, fps, frames):
    (turn,) = turns(read(fps=fps, question=None, response=[{"content": "x", "time": time}]))
    assert turn[3:] == frames


@pytest.mark.parametrize(
    ("names", "uid", "file"),
    [
        ({"video_path": "/home/me/videos/v1.mp4"}, "v1", "v1.mp4"),
        ({"video_path": "C:\\videos\\v1.mp4"}, "v1", "v1.mp4"),
        ({"video_path": "./a/v1.MKV"}, "a/v1", "a/v1.MKV"),
        ({"video_path": None, "video_name": "v.1"}, "v.1", "v.1"),
    ],
)
def test_videos_go_by_their_path_where_that_is_not_of_one_machine(names, uid, file):
    clip = read(**names)
    assert (clip.video_uid, clip.frames_file) == (uid, file)


def test_silence_is_no_turn():
    response = [{"content": " ", "time": "3"}, {"content": None, "time": "4"}, {"content": "x", "time": "5"}]
    assert [turn[1] for turn in turns(read(question=[], response=response))] == ["x"]


@pytest.mark.parametrize(
    ("more", "field", "found"),
    [
        ({"response": [{"content": "x", "time": "soon"}]}, "response[0].time", '"soon"'),
        ({"response": [{"content": "x", "time": -1}]}, "response[0].time", "-1"),
        ({"response": [{"content": "x", "time": [1]}]}, "response[0].time", "[1]"),
        ({"response": [{"content": "x", "time": 1e12}]}, "response[0].time", "1000000000000.0"),
        ({"response": [{"content": "x", "st_time": 9.0, "end_time": 5.0}]}, "response[0].end_time", "5.0"),
        ({"response": [{"content": "x", "st_time": 5.0, "end_time": "", "time": ""}]}, "response[0]", "no time"),
        ({"response": [{"content": 5, "time": 1}]}, "response[0].content", "5"),
        ({"response": [], "question": []}, "start_frame_idx, end_frame_idx", "nothing"),
        ({"video_path": "../v1.mp4"}, "video_path", '"../v1.mp4"'),
        ({"video_path": "", "video_name": ""}, "video_path", "nothing"),
    ],
)
def test_what_decides_a_label_is_refused_by_name(more, field, found):
    with pytest.raises(ClipError) as error:
        read(**more)
    assert (error.value.field, error.value.found) == (field, found)


def test_preprocess_labels_each_second(tmp_path):
    """Two records of one video (as published: one for each question) are two clips."""
    other = record(question=[{"content": "And then?", "time": 5}], response=[{"content": "Glue.", "time": 6}])
    (tmp_path / "qa.json").write_text(json.dumps([record(), other]))
    out = tmp_path / "out"
    assert (
        main(["preprocess", str(tmp_path / "qa.json"), "--split", "train", "--neg-rate", "1", "--out", str(out)]) == 0
    )
    frames = pl.read_parquet(out / "frames").sort("clip", "frame")
    labels = frames.group_by("clip", maintain_order=True).agg("speaking_label", "dst_update_label")
    assert labels["speaking_label"].to_list() == [[0] * 10 + [1, 1], [0] * 12 + [1, 1]]
    assert set(frames["dst_update_label"]) == {-100}
    clips = pl.read_parquet(out / "clips").sort("clip")
    assert clips["clip_id"].n_unique() == 2
    assert clips["video_uid"].to_list() == ["SrcA/clips/v1"] * 2
    assert clips["frame_convention"].to_list() == ["event"] * 2
