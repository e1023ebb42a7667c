"""Streamo-Instruct and JoyAI-VL-Interaction: per-second streaming data, a `question` list and a `response` list.

All times are seconds, as numbers or text; a second is what is decided at a time. The two projects share the fields but
not what second a time names: Streamo's 5 is [4, 5), JoyAI's is [5, 6) (their converters `convert_streaming_video.py`
and `convert_data.py`). A clip whose responses have the fields st_time or end_time, even empty, is Streamo's. Its answer
to an event follows in the second after end_time; before it is silence (Streamo's "standby"). The length of the video
is in neither file: a clip goes from frame 0 to its last turn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final

import msgspec
from msgspec import UNSET

from pipeline.labels import FLOOR_TOLERANCE
from pipeline.readers.clip import (
    MAX_FRAME,
    Clip,
    ClipError,
    Reader,
    brief,
    check_bounds,
    check_fps,
    check_path,
    check_uid,
    columns,
    name_of,
    parse,
)

FIELDS: Final = "video_name or video_path, question and response [{content, time}, ...], or st_time and end_time"
_ENDING: Final = re.compile(r"\.(mp4|mkv|webm|mov|avi|m4v)$", re.IGNORECASE)
_CLOCK: Final = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)")  # 75.5, 1:15.5, 0:01:15


class Said(msgspec.Struct, gc=False):
    """A question or a response. UNSET: a field that is not there."""

    content: str | None = None
    time: Any = UNSET
    st_time: Any = UNSET
    end_time: Any = UNSET


class Record(msgspec.Struct, gc=False):
    response: list[Said | list[Said]]
    question: list[Said] | None = None
    video_name: str | None = None
    video_path: str | None = None
    source: Any = None
    fps: float | None = None


_RECORD = msgspec.json.Decoder(Record)


def recognises(names: Collection[str], raw: bytes) -> bool:
    return "response" in names and ("video_name" in names or "video_path" in names)


def read(raw: bytes, fps: float | None) -> Clip:
    record, ignored = parse(raw, _RECORD), []  # type: tuple[Record, list[str]]
    responses = [one for entry in record.response for one in (entry if isinstance(entry, list) else [entry])]
    fps, given = check_fps(record.fps, fps)
    early = any(one.st_time is not UNSET or one.end_time is not UNSET for one in responses)  # Streamo's
    rows = [*_rows("user", "question", record.question or (), early, fps)]
    rows += _rows("assistant", "response", responses, early, fps)
    rows.sort(key=lambda row: (row[3], row[0] != "user"))
    path = _path(record)
    clip = Clip(
        schema="streamo",
        video_uid=_ENDING.sub("", path),
        turns=columns(rows),
        fps=fps,
        fps_given=given,
        start_frame=0,
        end_frame=max((row[4] for row in rows), default=None),
        convention="event",
        dataset=name_of(record.source, "source", ignored),
        frames_file=path,
        ignored=ignored,
    )
    check_uid(clip.video_uid)
    return check_bounds(clip)


READER: Final = Reader("streamo", FIELDS, recognises, read)


def _rows(role: str, field: str, said: Iterable[Said], early: bool, fps: float) -> Iterator[tuple[Any, ...]]:
    """Rows of `Clip.turns`: a response over its whole second, a question at the beginning of its own."""
    for number, one in enumerate(said):
        if one.content and not one.content.isspace():
            for second in _seconds(one, f"{field}[{number}]", early):
                start = _frame(second, fps)
                yield role, one.content, second, start, start + 1 if role == "user" else _frame(second + 1, fps)


def _seconds(one: Said, name: str, early: bool) -> Iterator[float]:
    """The beginning of each second in which it is said. Raises ClipError where no time tells any."""
    start, end = (_times(one.st_time, f"{name}.st_time"), _times(one.end_time, f"{name}.end_time"))
    if start and end:
        if end[-1] < start[0]:
            raise ClipError(f"{name}.end_time", brief(one.end_time), f"at least st_time {start[0]:g}")
        yield end[-1]
        return
    times = _times(one.time, f"{name}.time")
    if not times and name.startswith("question"):
        times = [0.0]
    if not times:
        raise ClipError(name, "no time", "time, or st_time and end_time, in seconds")
    yield from (max(0.0, time - 1) if early else time for time in times)


def _times(value: Any, name: str) -> list[float]:
    """Seconds of a number or of text such as "5", "1:05" or "5,6,7"; none for what says nothing. Raises ClipError."""
    if value is None or value is UNSET:
        return []
    if type(value) in (int, float):
        found = [float(value)]
    elif type(value) is str:
        found = [_clock(part) for part in value.split(",") if part.strip()]
    else:
        found = [math.nan]
    if not all(0 <= time <= MAX_FRAME for time in found):
        raise ClipError(name, brief(value), 'seconds, as a number or as text ("5", "1:05", "5,6,7")')
    return found


def _clock(text: str) -> float:
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        return math.nan
    hours, minutes, seconds = match.groups(default="0")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _frame(second: float, fps: float) -> int:
    """The first frame at or after a time. Raises ClipError."""
    if second * fps > MAX_FRAME:
        raise ClipError("time", f"{second:g}", f"at most {MAX_FRAME} frames")
    return math.ceil(second * fps - FLOOR_TOLERANCE)


def _path(record: Record) -> str:
    """The video's file as the source names it; its name alone where it was given as an absolute path."""
    path = (record.video_path or record.video_name or "").replace("\\", "/").removeprefix("./")
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute():  # JoyAI's, filled in by its user
        path = PurePosixPath(path).name
    if not path:
        raise ClipError("video_path", "nothing", "the video's file, in video_path or video_name")
    check_path("video_path", path)
    return path
