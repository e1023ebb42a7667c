"""Streamo-Instruct and JoyAI-VL-Interaction, on made-up samples: which second a time names, what is read of them."""

import json

import pytest
from made_up import run

from pipeline.readers import decode
from pipeline.readers.clip import ClipError


def record(**more) -> dict:
    return {
        "video_name": "v1.mp4",
        "video_path": "SrcA/clips/v1.mp4",
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
    assert [turn[2:] for turn in turns(read(question=question, response=[response]))] == [(0.0, 0, 1), (3.0, 6, 8)]


def test_a_time_of_joyai_names_the_second_that_begins_there():
    """No response has st_time or end_time; one text may be said twice; lists may be nested; blanks are silence."""
    question = [{"content": "Say when it boils.", "time": "7"}]
    response = [{"content": "Now.", "time": "7, 9"}, [{"content": "Off.", "time": 2}], {"content": " ", "time": "3"}]
    clip = read(question=question, response=response, video_path="")
    assert turns(clip) == [
        ("assistant", "Off.", 2.0, 4, 6),
        ("user", "Say when it boils.", 7.0, 14, 15),
        ("assistant", "Now.", 7.0, 14, 16),
        ("assistant", "Now.", 9.0, 18, 20),
    ]
    assert (clip.video_uid, clip.frames_file, clip.end_frame) == ("v1", "v1.mp4", 20)


def test_times_are_seconds_in_any_spelling():
    times = ["5", 2.25, "1:05", "0:01:05.5"]
    found = [turns(read(question=None, response=[{"content": "x", "time": time}]))[0][3:] for time in times]
    assert found == [(10, 12), (5, 7), (130, 132), (131, 133)]


def test_videos_go_by_their_path_where_that_is_not_of_one_machine():
    clips = [read(video_path=path) for path in ("./a/v1.MKV", "/home/me/videos/v1.mp4", "C:\\videos\\v1.mp4", None)]
    assert [clip.frames_file for clip in clips] == ["a/v1.MKV", *["v1.mp4"] * 3]
    assert [clip.video_uid for clip in clips] == ["a/v1", *["v1"] * 3]


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"response": [{"content": "x", "time": "soon"}]}, "response[0].time"),
        ({"response": [{"content": "x", "st_time": 9.0, "end_time": 5.0}]}, "response[0].end_time"),
        ({"response": [], "question": []}, "start_frame_idx, end_frame_idx"),
        ({"video_path": "../v1.mp4"}, "video_path"),
    ],
)
def test_what_decides_a_label_is_refused_by_name(more, field):
    with pytest.raises(ClipError) as error:
        read(**more)
    assert error.value.field == field


def test_preprocess_labels_each_second(tmp_path):
    """Two records of one video (as published: one for each question) are two clips."""
    other = record(question=[{"content": "And then?", "time": 5}], response=[{"content": "Glue.", "time": 6}])
    out = run(tmp_path, [record(), other])
    assert [out.ones(clip=clip) for clip in (0, 1)] == [([10, 11], []), ([12, 13], [])]
    assert len({clip["clip_id"] for clip in out.clips()}) == 2
    assert [clip["video_uid"] for clip in out.clips()] == ["SrcA/clips/v1"] * 2
