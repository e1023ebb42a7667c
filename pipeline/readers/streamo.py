"""Streamo-Instruct and JoyAI-VL-Interaction: per-second streaming data, a `question` list and a `response` list.

All times are seconds. Streamo's 5 is the second [4, 5), JoyAI's is [5, 6) (converters `convert_streaming_video.py` and
`convert_data.py`); a clip whose responses have the fields st_time or end_time, even empty, is Streamo's, which
answers an event in the second after end_time. No length is given: a clip goes from frame 0 to its last turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

import msgspec

from pipeline.readers.clip import Clip, ClipError, Reader, brief, check_path, columns, fps_of, frame_after, text_of
from pipeline.readers.index import parse

_ENDING: Final = re.compile(r"\.(mp4|mkv|webm|mov|avi|m4v)$", re.IGNORECASE)
_CLOCK: Final = re.compile(r"\s*(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)\s*")  # 75.5, 1:15.5, 0:01:15
Time = float | str | None | msgspec.UnsetType  # UNSET: the field is not there


class Said(msgspec.Struct, gc=False):  # a question or a response
    content: str | None = None
    time: Time = msgspec.UNSET
    st_time: Time = msgspec.UNSET
    end_time: Time = msgspec.UNSET


class Record(msgspec.Struct, gc=False):
    response: list[Said | list[Said]]
    question: list[Said] | None = None
    video_name: str | None = None
    video_path: str | None = None
    source: Any = None
    fps: float | None = None


def read(raw: bytes, fps: float | None) -> Clip:
    record = parse(raw, Record)
    ignored: list[str] = []
    fps, given = fps_of(record.fps, fps)
    responses = [said for entry in record.response for said in (entry if isinstance(entry, list) else [entry])]
    streamo = any(said.st_time is not msgspec.UNSET or said.end_time is not msgspec.UNSET for said in responses)
    turns: list[tuple[Any, ...]] = []
    for role, name, entries in (("user", "question", record.question or ()), ("assistant", "response", responses)):
        for number, said in enumerate(entries):
            for second in _seconds(said, f"{name}[{number}]", streamo):
                start = frame_after(second, fps, "time")
                end = start + 1 if role == "user" else frame_after(second + 1, fps, "time")
                turns.append((role, said.content, second, start, end))
    turns.sort(key=lambda turn: (turn[3], turn[0] != "user"))
    path = (record.video_path or record.video_name or "").replace("\\", "/").removeprefix("./")
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute():  # JoyAI's, filled in by its user
        path = PurePosixPath(path).name
    check_path(path, "video_path")
    source = record.source
    return Clip(
        schema="streamo",
        video_uid=_ENDING.sub("", path),
        turns=columns(turns),
        fps=fps,
        fps_given=given,
        start_frame=0,
        end_frame=max((turn[4] for turn in turns), default=None),
        convention="event",
        dataset=str(source) if type(source) is int else text_of(source, "source", ignored),
        frames_file=path,
        ignored=ignored,
    )


READER: Final = Reader(
    "streamo",
    lambda names, raw: "response" in names and ("video_name" in names or "video_path" in names),
    read,
    "video_name or video_path, question and response [{content, time}, ...], or st_time and end_time",
)


def _seconds(said: Said, field: str, streamo: bool) -> Iterator[float]:
    """The beginning of each second in which it is said; none for silence. Raises ClipError where no time says any."""
    if not said.content or said.content.isspace():
        return
    start, end = _times(said.st_time, f"{field}.st_time"), _times(said.end_time, f"{field}.end_time")
    if start and end:
        if end[-1] < start[0]:
            raise ClipError(f"{field}.end_time", brief(said.end_time), f"at least st_time {start[0]:g}")
        yield end[-1]
        return
    times = _times(said.time, f"{field}.time") or ([0.0] if field.startswith("question") else [])
    if not times:
        raise ClipError(field, "no time", "time, or st_time and end_time, in seconds")
    yield from (max(0.0, time - 1) if streamo else time for time in times)


def _times(value: Time, field: str) -> list[float]:
    """Seconds of a number or of text such as "5", "1:05" or "5,6,7"; none for what says nothing. Raises ClipError."""
    times = [value] if isinstance(value, float) else []
    for part in filter(str.strip, value.split(",") if isinstance(value, str) else ()):
        match = _CLOCK.fullmatch(part)
        hours, minutes, seconds = match.groups(default="0") if match else (0, 0, "nan")
        times.append(int(hours) * 3600 + int(minutes) * 60 + float(seconds))
    if not all(time >= 0 for time in times):
        raise ClipError(field, brief(value), 'seconds, as a number or as text ("5", "1:05", "5,6,7")')
    return times
