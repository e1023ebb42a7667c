"""The public ProAssist data as prepared for training (`processed_data/<dataset>/prepared/*.jsonl`).

`frames` turns {start, end} stand before the turn that they lead to; there is no dialog state. Turns get ranges of
their own here, so that no convention has to be voted on. Clips of summary files had their assistant turns removed:
nobody annotated any of their frames.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal

import msgspec

from pipeline.readers.clip import EVERYWHERE, Clip, ClipError, Frame, Reader, Update, brief, columns
from pipeline.readers.index import parse
from pipeline.readers.prospect import Record, checked_content, clip_of

SUMMARY_REQUEST: Final = "Please summarize"  # a system turn; the reply is the model's note to itself
Row = list[Any]  # a turn: role, content, time, start_frame, end_frame


class Turn(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant", "DST_UPDATE", "frames"]
    content: str | list[Update] | None = None
    time: float | None = None
    start: Frame | None = None  # of a `frames` turn
    end: Frame | None = None


class ProAssistRecord(Record, gc=False):
    conversation: list[Turn]  # type: ignore[assignment]


_FRAMES_TURN = re.compile(rb'"role"\s*:\s*"frames"')


def read(raw: bytes, fps: float | None) -> Clip:
    """Turns, without the `frames` turns, get the range that each happens in; bounds not given are those of the frames.

    An assistant (or DST) turn happens at the last frame of the `frames` turn before it. A user turn is heard by the
    next frame, or, where the reply follows with no frame in between, by that last frame. The reply to
    'Please summarize' gets no frames.
    """
    record = parse(raw, ProAssistRecord)
    metadata = record.metadata if type(record.metadata) is dict else {}
    summary_file = record.neg_frame_sampling_rate == -1
    if summary_file:
        record.neg_frame_sampling_rate = None
    clip = clip_of(record, "proassist", fps)
    clip.convention = "lead-in"
    if summary_file or metadata.get("summary_only") is True:
        clip.unlabelled = EVERYWHERE
    if metadata.get("add_knowledge") is False:
        clip.knowledge = None
    rows: list[Row] = []
    waiting: list[Row] = []  # user turns that neither a reply nor frames followed yet
    heard_later: list[Row] = []  # user turns that frames, or the end, follow
    edges: list[tuple[int, int]] = []
    summarizing = False
    for number, turn in enumerate(record.conversation):
        if turn.role == "frames":
            if turn.start is None or turn.end is None or turn.end < turn.start:
                found = brief((turn.start, turn.end))
                raise ClipError("start, end", found, "frame numbers, end at least start", number)
            edges.append((turn.start, turn.end))
            heard_later += waiting
            waiting = []
            continue
        summary = summarizing and turn.role == "assistant"
        clip.summaries += summary
        content = checked_content(turn.role, turn.content, number)
        row = [turn.role, content, turn.time, None, None]
        rows.append(row)
        summarizing = turn.role == "system" and content.startswith(SUMMARY_REQUEST)
        if edges and turn.role != "system" and not summary:
            last = max(edges[-1][1] - 1, 0)
            row[3:] = last, last + 1
            if turn.role == "user":
                waiting.append(row)
        if turn.role == "assistant":
            waiting = []
    for row in heard_later + waiting:
        row[3], row[4] = row[4], row[4] + 1
    clip.turns = columns(rows)
    clip.start_frame = min((a for a, _ in edges), default=None) if clip.start_frame is None else clip.start_frame
    clip.end_frame = max((b for _, b in edges), default=None) if clip.end_frame is None else clip.end_frame
    return clip


READER: Final = Reader(
    "proassist",
    lambda names, raw: "conversation" in names and _FRAMES_TURN.search(raw) is not None,
    read,
    "video_uid, conversation [{role: frames, start, end}, {role, content}], start_frame_idx, end_frame_idx",
)
