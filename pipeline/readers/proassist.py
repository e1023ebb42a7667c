"""The public ProAssist data as prepared for training (`processed_data/<dataset>/prepared/*.jsonl`).

`frames` turns {start, end} stand before the turn that they lead to; there is no dialog state. Turns get ranges of
their own here, so that no convention has to be voted on. Clips of summary files had their assistant turns removed:
nobody annotated any of their frames.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Final, Literal

import msgspec

from pipeline.readers.clip import (
    EVERYWHERE,
    Clip,
    ClipError,
    Reader,
    Update,
    check_bounds,
    check_rate,
    check_time,
    columns,
    parse,
    whole,
)
from pipeline.readers.prospect import Record, checked_content, clip_of

FIELDS: Final = "video_uid, conversation [{role: frames, start, end}, {role, content}], start_frame_idx, end_frame_idx"
SUMMARY_REQUEST: Final = "Please summarize"  # a system turn; the reply is the model's note to itself


class Turn(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant", "DST_UPDATE", "frames"]
    content: str | list[Update] | None = None
    time: float | None = None
    start: Any = None  # of a `frames` turn
    end: Any = None


class ProAssistRecord(Record, gc=False):
    conversation: list[Turn]  # type: ignore[assignment]


_RECORD = msgspec.json.Decoder(ProAssistRecord)
_FRAMES_TURN = re.compile(rb'"role"\s*:\s*"frames"')


def recognises(names: Collection[str], raw: bytes) -> bool:
    return "conversation" in names and _FRAMES_TURN.search(raw) is not None


def read(raw: bytes, fps: float | None) -> Clip:
    record = parse(raw, _RECORD)
    clip = clip_of(record, "proassist", fps)
    _place(clip, record.conversation)  # type: ignore[arg-type]
    clip.convention = "lead-in"
    metadata = record.metadata if type(record.metadata) is dict else {}
    no_rate = clip.neg_rate == -1
    if no_rate:
        clip.neg_rate = None
    if no_rate or metadata.get("summary_only") is True:
        clip.unlabelled = EVERYWHERE
    if metadata.get("add_knowledge") is False:
        clip.knowledge = None
    check_rate(clip.neg_rate)
    return check_bounds(clip)


READER: Final = Reader("proassist", FIELDS, recognises, read)


def _place(clip: Clip, turns: list[Turn]) -> None:
    """Give the turns (without the `frames` turns) the range that each happens in; bounds where none are given.

    An assistant (or DST) turn happens at the last frame of the `frames` turn before it. A user turn is heard by the
    next frame, or, where the reply follows with no frame in between, by that last frame. The reply to
    'Please summarize' gets no frames.
    """
    rows: list[list[Any]] = []
    waiting: list[list[Any]] = []  # user turns without a reply yet
    starts: list[int] = []
    ends: list[int] = []
    summarizing = False
    for number, turn in enumerate(turns):
        if turn.role == "frames":
            starts.append(whole(turn.start, "start", number))
            ends.append(whole(turn.end, "end", number))
            if ends[-1] < starts[-1]:
                raise ClipError("end", str(ends[-1]), f"at least start {starts[-1]}", number)
            _hear_later(waiting)
            continue
        summary = summarizing and turn.role == "assistant"
        clip.summaries += summary
        placed = ends and turn.role != "system" and not summary
        content = checked_content(turn.role, turn.content, number)
        frames = (max(ends[-1] - 1, 0), max(ends[-1], 1)) if placed else (None, None)
        row = [turn.role, content, check_time(turn.time, number), *frames]
        rows.append(row)
        summarizing = turn.role == "system" and content.startswith(SUMMARY_REQUEST)
        if turn.role == "user" and placed:
            waiting.append(row)
        elif turn.role == "assistant":
            waiting.clear()
    _hear_later(waiting)
    clip.turns = columns(rows)  # type: ignore[arg-type]
    clip.start_frame = min(starts, default=None) if clip.start_frame is None else clip.start_frame
    clip.end_frame = max(ends, default=None) if clip.end_frame is None else clip.end_frame


def _hear_later(waiting: list[list[Any]]) -> None:
    """Frames (or the end) follow: what was said is heard by the next frame. Empties `waiting`."""
    for row in waiting:
        row[3], row[4] = row[4], row[4] + 1
    waiting.clear()
