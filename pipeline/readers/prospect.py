"""The prospect schema: what the public generators write as `{split}_training.json`, and its one documented sample.

Turns carry `start_frame`/`end_frame`, meant in one of three conventions that the file decides by a vote (labels.py).
Where no turn has frames but turns have times, frame = floor(time * fps), provided that fps is given. Nearly all
clips pass the typed decode and one look at the columns (`_usual`); the others are checked turn by turn.

    T turns
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Sequence
from typing import Any, Final, Literal

import msgspec
import numpy as np

from pipeline.labels import event_frame
from pipeline.readers.clip import (
    MAX_FRAME,
    NOT_STRICT,
    Clip,
    ClipError,
    Reader,
    Update,
    brief,
    check_bounds,
    check_fps,
    check_path,
    check_rate,
    check_states,
    check_time,
    check_uid,
    columns,
    name_of,
    parse,
    text_of,
    whole,
    whole_or_none,
)
from pipeline.schema import TRANSITIONS

FIELDS: Final = "video_uid, conversation [{role, content, time, start_frame, end_frame}], dst [{id, name}]"


class Turn(msgspec.Struct, gc=False):
    """One entry of `conversation`; after the checks, frames are ints or None and DST content is a list."""

    role: Literal["system", "user", "assistant", "DST_UPDATE"]
    content: str | list[Update] | None = None
    time: float | None = None
    start_frame: int | float | None = None
    end_frame: int | float | None = None


class Step(msgspec.Struct, gc=False):
    id: str | int
    name: Any = None


class Steps(msgspec.Struct, gc=False):
    """`dst` as an object that holds its steps."""

    steps: list[Step] | None = None


class Record(msgspec.Struct, gc=False):
    """The fields that are read of a clip; any other is skipped unbuilt. Descriptive ones are of any type."""

    video_uid: str
    conversation: list[Turn]
    id: str | int | None = None
    clip_idx: int | float | None = None
    dataset: Any = None
    fps: float | str | None = None
    start_frame_idx: int | float | None = None
    end_frame_idx: int | float | None = None
    frames_file: str | None = None
    inferred_goal: Any = None
    inferred_knowledge: Any = None
    dst: list[Step] | Steps | None = None
    initial_dst_state: dict[str, str] | None = None
    neg_frame_sampling_rate: float | None = None
    metadata: Any = None


_RECORD = msgspec.json.Decoder(Record)
_UPDATES = msgspec.json.Decoder(list[Update])


def read_usual(raw: bytes, fps: float | None) -> Clip | None:
    """The clip where its bytes decode at once as this schema; None: look closer."""
    try:
        record = _RECORD.decode(raw)
    except NOT_STRICT:
        return None
    return _clip(record, fps, strict=True)


def read(raw: bytes, fps: float | None) -> Clip:
    return _clip(parse(raw, _RECORD), fps, strict=False)


def _clip(record: Record, fps: float | None, strict: bool) -> Clip:
    clip = clip_of(record, "prospect", fps)
    clip.turns = columns(map(_TURN, record.conversation))
    check_rate(clip.neg_rate)
    return check_bounds(clip if strict and _usual(*clip.turns) else _checked(clip))


def recognises(names: Collection[str], raw: bytes) -> bool:
    return "video_uid" in names or "conversation" in names


READER: Final = Reader("prospect", FIELDS, recognises, read)


def clip_of(record: Record, schema: str, default_fps: float | None) -> Clip:
    """The Clip of a decoded record of this schema or of ProAssist's, all but its turns. Raises ClipError."""
    ignored: list[str] = []
    metadata = record.metadata
    if type(metadata) is not dict:
        if metadata:
            ignored.append("metadata")
        metadata = {}
    check_uid(record.video_uid)
    check_path("frames_file", record.frames_file)
    if record.id == "":
        raise ClipError("id", '""', "a name or a number")
    fps, fps_given = check_fps(record.fps, default_fps)
    dst = record.dst.steps if isinstance(record.dst, Steps) else record.dst
    steps: list[tuple[Any, Any]] = [(step.id, step.name) for step in dst or ()]
    if not {type(part) for step in steps for part in step} <= {str}:
        steps = [(str(step), text_of(name, "dst.name", ignored) or "") for step, name in steps]
    get = metadata.get
    return Clip(
        schema=schema,
        video_uid=record.video_uid,
        turns=(),
        fps=fps,
        fps_given=fps_given,
        start_frame=whole_or_none(record.start_frame_idx, "start_frame_idx"),
        end_frame=whole_or_none(record.end_frame_idx, "end_frame_idx"),
        id=record.id,
        clip_idx=whole_or_none(record.clip_idx, "clip_idx", least=-(2**31)),
        user=name_of(get("user_id"), "metadata.user_id", ignored),
        dataset=text_of(record.dataset, "dataset", ignored),
        frames_file=record.frames_file,
        goal=text_of(record.inferred_goal, "inferred_goal", ignored)
        or text_of(get("task_goal"), "metadata.task_goal", ignored),
        knowledge=text_of(record.inferred_knowledge, "inferred_knowledge", ignored)
        or text_of(get("knowledge"), "metadata.knowledge", ignored),
        steps=steps,
        initial_state=check_states(record.initial_dst_state),
        neg_rate=record.neg_frame_sampling_rate,
        ignored=ignored,
    )


_TURN = operator.attrgetter("role", "content", "time", "start_frame", "end_frame")
_CONTENT_TYPES: Final = {"system": str, "user": str, "assistant": str, "DST_UPDATE": list}
_INT: Final = {int}


def _usual(role: Any, content: Any, time: Any, start: Any, end: Any) -> bool:
    """Whether the turns are plainly right as they are: what `_check_turns` would find, in a tenth of its time.

    Content of its role's type, all frames ints in order. Times are finite: strict JSON knows no others.
    """
    return (
        list(map(type, content)) == list(map(_CONTENT_TYPES.__getitem__, role))
        and set(map(type, start)) | set(map(type, end)) <= _INT
        and all(map(operator.le, start, end))
        and min(start, default=0) >= 0
        and max(end, default=0) <= MAX_FRAME
    )


def _checked(clip: Clip) -> Clip:
    """The clip with its turns checked and brought into form where need be."""
    rows = []
    for number, (role, content, time, start, end) in enumerate(zip(*clip.turns, strict=True)):
        content = checked_content(role, content, number)
        rows.append((role, content, check_time(time, number), *_range(start, end, number)))
    clip.turns = columns(rows)
    if _untimed(clip.turns):
        return _placed_by_time(clip)
    return clip


def _range(start: Any, end: Any, number: int) -> tuple[int | None, int | None]:
    """A turn's checked range; half a range is none."""
    start = whole_or_none(start, "start_frame", number)
    end = whole_or_none(end, "end_frame", number)
    if start is None or end is None:
        return None, None
    if end < start:
        raise ClipError("end_frame", str(end), f"at least start_frame {start}", number)
    return start, end


def _untimed(turns: Sequence[Sequence[Any]]) -> bool:
    """Whether turns have times, but none of them (the system's left out) has frames."""
    said = [(time, start) for role, _, time, start, _ in zip(*turns, strict=True) if role != "system"]
    return any(time is not None for time, _ in said) and all(start is None for _, start in said)


def _placed_by_time(clip: Clip) -> Clip:
    """Each timed turn gets the one frame that shows its time."""
    if not clip.fps_given:
        raise ClipError("fps", "nothing", "frames a second, as turns have times but no frames; give --fps")
    rows: list[tuple[Any, ...]] = []
    for number, (role, content, time, _, _) in enumerate(zip(*clip.turns, strict=True)):
        if time is None:
            rows.append((role, content, time, None, None))
            continue
        frame = whole(float(event_frame(np.asarray(time), np.asarray(clip.fps))), "time", number)
        rows.append((role, content, time, frame, frame + 1))
    clip.turns, clip.convention = columns(rows), "event"
    return clip


def checked_content(role: str, content: Any, number: int) -> Any:
    """Text, or the updates of a DST_UPDATE: a list of {id, transition}, its JSON as text, or 'S1->start, ...'."""
    if role != "DST_UPDATE":
        if type(content) is not str:
            if role == "system":
                return ""  # never read
            raise ClipError("content", brief(content), "text", number)
        return content
    if type(content) is list:
        return content
    if type(content) is not str:
        raise ClipError("content", brief(content), "a list of {id, transition}, or text like S1->start", number)
    if content.lstrip().startswith("["):
        try:
            return _UPDATES.decode(content)
        except (msgspec.DecodeError, RecursionError) as error:
            raise ClipError("content", brief(content), f"a list of updates ({error})", number) from None
    updates = []
    for part in filter(str.strip, re.split(r"[,;\n]", content)):
        match = _ARROW.fullmatch(part)
        if not match:
            raise ClipError("content", brief(part), "text like S1->start", number)
        if match[2] not in TRANSITIONS:
            raise ClipError("content", brief(match[2]), f"one of {', '.join(TRANSITIONS)}", number)
        updates.append(Update(match[1], match[2]))  # type: ignore[arg-type]
    return updates


_ARROW = re.compile(r"\s*(.+?)\s*->\s*(\w+)\s*")
