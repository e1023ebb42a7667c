"""The prospect schema: what the public generators write as `{split}_training.json`, and its one documented sample.

Turns carry `start_frame`/`end_frame`, meant in one of three conventions that the file decides by a vote (labels.py).
Where no turn has frames but turns have times, frame = floor(time * fps), provided that fps is given.
"""

from __future__ import annotations

import operator
import re
from typing import Annotated, Any, Final, Literal

import msgspec

from pipeline.readers import checks
from pipeline.readers.clip import Clip, ClipError, Frame, Reader, Update, brief, columns
from pipeline.readers.index import NOT_STRICT, parse
from pipeline.schema import STATES, TRANSITIONS


class Turn(msgspec.Struct, gc=False):
    role: Literal["system", "user", "assistant", "DST_UPDATE"]
    content: str | list[Update] | None = None
    time: float | None = None
    start_frame: Frame | None = None
    end_frame: Frame | None = None


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
    initial_dst_state: dict[str, str] | None = None
    neg_frame_sampling_rate: float | None = None
    metadata: Any = None


_RECORD = msgspec.json.Decoder(Record)
_UPDATES = msgspec.json.Decoder(list[Update])
_COLUMNS = operator.attrgetter("role", "content", "time", "start_frame", "end_frame")
_CONTENT_TYPES: Final = {"system": str, "user": str, "assistant": str, "DST_UPDATE": list}


def read_usual(raw: bytes, fps: float | None) -> Clip | None:
    """The clip where its bytes decode at once as this schema; None: look closer."""
    try:
        record = _RECORD.decode(raw)
    except NOT_STRICT:
        return None
    return _clip(record, fps)


READER: Final = Reader(
    "prospect",
    "video_uid, conversation [{role, content, time, start_frame, end_frame}], dst [{id, name}]",
    lambda names, raw: "video_uid" in names or "conversation" in names,
    lambda raw, fps: _clip(parse(raw, _RECORD), fps),
)


def _clip(record: Record, fps: float | None) -> Clip:
    clip = clip_of(record, "prospect", fps)
    clip.turns = role, content, _, start, end = columns(map(_COLUMNS, record.conversation))
    whole = None not in start and None not in end and all(map(operator.le, start, end))
    if whole and list(map(type, content)) == list(map(_CONTENT_TYPES.__getitem__, role)):
        return checks.bounds(clip)
    turns = []  # that need a closer look
    for number, (kind, words, time, first, last) in enumerate(zip(*clip.turns, strict=True)):
        words = checked_content(kind, words, number)
        if first is None or last is None:  # half a frame range is none
            first, last = None, None
        elif last < first:
            raise ClipError("end_frame", str(last), f"at least start_frame {first}", number)
        turns.append((kind, words, time, first, last))
    said = [(time, start) for role, _, time, start, _ in turns if role != "system"]
    if any(time is not None for time, _ in said) and all(start is None for _, start in said):
        if not clip.fps_given:
            raise ClipError("fps", "nothing", "frames a second, as turns have times but no frames; give --fps")
        clip.convention = "event"
        for i, (role, content, time, *_) in enumerate(turns):  # each timed one at the frame that shows its time
            if time is not None:
                frame = checks.frame_at(time, clip.fps, "time", i)
                turns[i] = role, content, time, frame, frame + 1
    clip.turns = columns(turns)
    return checks.bounds(clip)


def clip_of(record: Record, schema: str, option: float | None) -> Clip:
    """The Clip of a decoded record of this schema or of ProAssist's, all but its turns. Raises ClipError."""
    ignored: list[str] = []
    metadata = record.metadata or {}
    if type(metadata) is not dict:
        ignored.append("metadata")
        metadata = {}
    checks.path(record.video_uid, "video_uid")
    checks.path(record.frames_file or None, "frames_file")
    fps, fps_given = checks.fps(record.fps, option)
    rate, user = record.neg_frame_sampling_rate, metadata.get("user_id")
    steps = [(step.id, step.name) for step in (record.dst.steps if isinstance(record.dst, Steps) else record.dst) or ()]
    if not {type(part) for step in steps for part in step} <= {str}:
        steps = [(str(step), checks.text(name, "dst.name", ignored) or "") for step, name in steps]

    def described(field: str, key: str) -> str | None:
        own = checks.text(getattr(record, field), field, ignored)
        return own or checks.text(metadata.get(key), f"metadata.{key}", ignored)

    clip = Clip(
        schema=schema,
        video_uid=record.video_uid,
        turns=(),
        fps=fps,
        fps_given=fps_given,
        start_frame=record.start_frame_idx,
        end_frame=record.end_frame_idx,
        id=record.id,
        clip_idx=record.clip_idx,
        user=str(user) if type(user) is int else checks.text(user, "metadata.user_id", ignored),
        dataset=checks.text(record.dataset, "dataset", ignored),
        frames_file=record.frames_file,
        goal=described("inferred_goal", "task_goal"),
        knowledge=described("inferred_knowledge", "knowledge"),
        steps=steps,  # type: ignore[arg-type]
        initial_state=record.initial_dst_state,
        neg_rate=rate,
        ignored=ignored,
    )
    for step, state in (record.initial_dst_state or {}).items():
        if state not in STATES:
            raise ClipError(f"initial_dst_state.{step}", brief(state), f"one of {', '.join(STATES)}")
    if rate is not None and not 0 <= rate <= 1:
        raise ClipError("neg_frame_sampling_rate", str(rate), "a rate between 0 and 1")
    return clip


def checked_content(role: str, content: Any, number: int) -> Any:
    """Text, or the updates of a DST_UPDATE: a list of {id, transition}, its JSON as text, or 'S1->start, ...'."""
    if role == "system":
        return content if type(content) is str else ""  # never read
    if type(content) is (list if role == "DST_UPDATE" else str):
        return content
    if role != "DST_UPDATE":
        raise ClipError("content", brief(content), "text", number)
    if type(content) is not str:
        raise ClipError("content", brief(content), "a list of {id, transition}, or text like S1->start", number)
    if content.lstrip().startswith("["):
        try:
            return _UPDATES.decode(content)
        except NOT_STRICT as error:
            raise ClipError("content", brief(content), f"a list of updates ({error})", number) from None
    updates = []
    for part in filter(str.strip, re.split(r"[,;\n]", content)):
        match = re.fullmatch(r"\s*(.+?)\s*->\s*(\w+)\s*", part)
        if not match:
            raise ClipError("content", brief(part), "text like S1->start", number)
        if match[2] not in TRANSITIONS:
            raise ClipError("content", brief(match[2]), f"one of {', '.join(TRANSITIONS)}", number)
        updates.append(Update(match[1], match[2]))  # type: ignore[arg-type]
    return updates
