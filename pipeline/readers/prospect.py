"""The prospect schema: what the public generators write as `{split}_training.json`, and its one documented sample.

Turns carry `start_frame`/`end_frame`, meant in one of three conventions that the file decides by a vote (labels.py).
Where no turn has frames but turns have times, frame = floor(time * fps), provided that fps is given.
"""

from __future__ import annotations

import operator
import re
from typing import Annotated, Any, Final, Literal

import msgspec

from pipeline.readers.clip import Clip, ClipError, Frame, Reader, Update, brief, columns, fps_of, frame_at, text_of
from pipeline.readers.index import parse
from pipeline.schema import TRANSITIONS, State


class Turn(msgspec.Struct, gc=False):  # in the order of Clip.turns
    role: Literal["system", "user", "assistant", "DST_UPDATE"]
    content: str | list[Update] | None = None
    time: float | None = None
    start_frame: Frame | None = None
    end_frame: Frame | None = None


class Step(msgspec.Struct, gc=False):
    id: str | int
    name: Any = None


class Steps(msgspec.Struct, gc=False):  # `dst` as an object
    steps: list[Step] | None = None


class Record(msgspec.Struct, gc=False):
    """The fields that are read of a clip; any other is skipped unbuilt. Descriptive ones are of any type."""

    video_uid: str
    conversation: list[Turn]
    id: Annotated[str, msgspec.Meta(min_length=1)] | int | None = None
    clip_idx: Annotated[int, msgspec.Meta(ge=-(2**31), lt=2**31)] | None = None
    dataset: Any = None
    fps: float | str | None = None
    start_frame_idx: Frame | None = None
    end_frame_idx: Frame | None = None
    frames_file: str | None = None
    inferred_goal: Any = None
    inferred_knowledge: Any = None
    dst: list[Step] | Steps | None = None
    initial_dst_state: dict[str, State] | None = None
    neg_frame_sampling_rate: float | None = None
    metadata: Any = None


RECORD = msgspec.json.Decoder(Record)
_CONTENT_TYPES: Final = {"system": str, "user": str, "assistant": str, "DST_UPDATE": list}


def read(raw: bytes, fps: float | None) -> Clip:
    return clip_in(parse(raw, Record), fps)


_NEEDS: Final = "video_uid, conversation [{role, content, time, start_frame, end_frame}], dst [{id, name}]"
READER: Final = Reader("prospect", lambda names, raw: "video_uid" in names or "conversation" in names, read, _NEEDS)


def clip_in(record: Record, fps: float | None) -> Clip:
    """The Clip of a decoded record. Raises ClipError."""
    clip = clip_of(record, "prospect", fps)
    clip.turns = role, content, _, start, end = columns(map(msgspec.structs.astuple, record.conversation))
    whole = None not in start and None not in end and all(map(operator.le, start, end))
    if whole and list(map(type, content)) == list(map(_CONTENT_TYPES.__getitem__, role)):
        return clip
    turns = []  # that need a closer look
    for number, (kind, words, time, first, last) in enumerate(zip(*clip.turns, strict=True)):
        words = checked_content(kind, words, number)
        if first is None or last is None:  # half a frame range is none
            first, last = None, None
        elif last < first:
            raise ClipError("end_frame", str(last), f"at least start_frame {first}", number)
        turns.append((kind, words, time, first, last))
    spoken = [(time, start) for role, _, time, start, _ in turns if role != "system"]
    if any(time is not None for time, _ in spoken) and all(start is None for _, start in spoken):
        if not clip.fps_given:
            raise ClipError("fps", "nothing", "frames a second, as turns have times but no frames; give --fps")
        clip.convention = "event"
        for i, (role, content, time, *_) in enumerate(turns):  # each timed one at the frame that shows its time
            if time is not None:
                frame = frame_at(time, clip.fps, "time", i)
                turns[i] = role, content, time, frame, frame + 1
    clip.turns = columns(turns)
    return clip


def clip_of(record: Record, schema: str, option: float | None) -> Clip:
    """The Clip of a decoded record of this schema or of ProAssist's, all but its turns. Raises ClipError."""
    ignored: list[str] = []
    metadata = record.metadata or {}
    if type(metadata) is not dict:
        ignored.append("metadata")
        metadata = {}
    fps, fps_given = fps_of(record.fps, option)
    rate, user = record.neg_frame_sampling_rate, metadata.get("user_id")
    steps = [(step.id, step.name) for step in (record.dst.steps if isinstance(record.dst, Steps) else record.dst) or ()]
    if not {type(part) for step in steps for part in step} <= {str}:
        steps = [(str(step), text_of(name, "dst.name", ignored) or "") for step, name in steps]
    if rate is not None and not 0 <= rate <= 1:
        raise ClipError("neg_frame_sampling_rate", str(rate), "a rate between 0 and 1")
    return Clip(
        schema=schema,
        video_uid=record.video_uid,
        turns=(),
        fps=fps,
        fps_given=fps_given,
        start_frame=record.start_frame_idx,
        end_frame=record.end_frame_idx,
        id=record.id,
        clip_idx=record.clip_idx,
        user=str(user) if type(user) is int else text_of(user, "metadata.user_id", ignored),
        dataset=text_of(record.dataset, "dataset", ignored),
        frames_file=record.frames_file,
        goal=text_of(record.inferred_goal, "inferred_goal", ignored)
        or text_of(metadata.get("task_goal"), "metadata.task_goal", ignored),
        knowledge=text_of(record.inferred_knowledge, "inferred_knowledge", ignored)
        or text_of(metadata.get("knowledge"), "metadata.knowledge", ignored),
        steps=steps,  # type: ignore[arg-type]
        initial_state=record.initial_dst_state,
        neg_rate=rate,
        ignored=ignored,
    )


def checked_content(role: str, content: Any, number: int) -> Any:
    """Text, or the updates of a DST_UPDATE: a list of {id, transition}, or text like 'S1->start, S2->pause'."""
    if role == "system":
        return content if type(content) is str else ""  # never read
    if type(content) is (list if role == "DST_UPDATE" else str):
        return content
    if type(content) is not str:
        expected = "text" if role != "DST_UPDATE" else "a list of {id, transition}, or text like S1->start"
        raise ClipError("content", brief(content), expected, number)
    updates = []
    for part in filter(str.strip, re.split(r"[,;\n]", content)):
        step, _, transition = map(str.strip, part.rpartition("->"))
        if not step or transition not in TRANSITIONS:
            expected = f"text like S1->start, with one of {', '.join(TRANSITIONS)}"
            raise ClipError("content", brief(part), expected, number)
        updates.append(Update(step, transition))  # type: ignore[arg-type]
    return updates
