"""`Clip`, the form that every reader brings its schema's clips into, why a clip is refused, and JSON to typed structs.

T turns
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from pipeline.schema import ROLES, TRANSITIONS

MAX_FRAMES: Final = 1_000_000  # of one clip: 5.8 days at 2 frames a second
MAX_FRAME: Final = 2**31 - 1  # columns are int32

EVERYWHERE: Final = ((0, MAX_FRAME),)  # `unlabelled` of a clip that nobody annotated

T = TypeVar("T")
Range = tuple[int, int]  # half-open [start_frame, end_frame), absolute
Frame = Annotated[int, msgspec.Meta(ge=0, le=MAX_FRAME)]


class Update(msgspec.Struct, gc=False):
    """One state transition of one step."""

    id: str
    transition: Literal["start", "complete", "pause", "resume", "cancel", "reset", "fail"]


@dataclass(slots=True)
class Clip:
    """One clip, whatever schema it was written in. Frames are absolute."""

    schema: str
    video_uid: str
    # five columns [T]: role (of schema.ROLES), content (text; of a DST_UPDATE a list of Update), time in seconds or
    # None, start_frame and end_frame (both None: no frames)
    turns: tuple[Sequence[Any], ...]
    fps: float
    fps_given: bool = True
    start_frame: int | None = None  # bounds as given; None: from the turns
    end_frame: int | None = None
    convention: str | None = None  # of the turns' frames; None: as in the rest of the file, which decides by a vote
    id: str | int | None = None
    clip_idx: int | None = None
    user: str | None = None  # which of several conversations over one video
    dataset: str | None = None
    frames_file: str | None = None
    goal: str | None = None
    knowledge: str | None = None
    steps: Sequence[tuple[str, str]] = ()  # (id, name)
    initial_state: Mapping[str, str] | None = None  # None: not given
    neg_rate: float | None = None
    unlabelled: Sequence[Range] = ()  # frames that nobody annotated
    summaries: int = 0  # assistant turns that are not speech
    ignored: list[str] = field(default_factory=list)  # descriptive fields of a type that says nothing
    given_away: tuple[int, int] = (0, 0)  # decisions that the file's own history tells, of how many


@dataclass(frozen=True)
class Reader:
    """One input schema. `read` gives the Clip of one clip's JSON bytes and the fps of --fps, or raises ClipError."""

    name: str
    needs: str  # the fields that a clip must have, for messages
    recognises: Callable[[Collection[str], bytes], bool]  # by the clip's top-level field names, and its bytes
    read: Callable[[bytes, float | None], Clip]


def columns(turns: Iterable[Sequence[Any]]) -> tuple[Sequence[Any], ...]:
    """Rows (role, content, time, start_frame, end_frame) as the five columns of `Clip.turns`."""
    return tuple(zip(*turns, strict=True)) or ((),) * 5


# ---- refusals ----------------------------------------------------------------------------------------


class ClipError(Exception):
    """Why one clip is refused: field, what was found there, what was expected, turn number or None."""

    def __init__(self, field: str, found: str, expected: str, turn: int | None = None) -> None:
        super().__init__(field, found, expected, turn)
        self.field, self.found, self.expected, self.turn = field, found, expected, turn


class Refusal(msgspec.Struct):
    """One line of quarantine.jsonl: where, found, expected. `clip` counts the file's clips from 0."""

    file: str
    clip: int | None
    clip_id: str | None
    turn: int | None
    field: str
    found: str
    expected: str
    byte_start: int
    byte_end: int
    split: str = ""

    def __str__(self) -> str:
        clip = "" if self.clip is None else f" clip {self.clip}"
        turn = "" if self.turn is None else f" turn {self.turn}"
        return f"{self.file}{clip}{turn}: {self.field}: found {self.found}, expected {self.expected}"


def refuse(file: str, clip: int | None, error: ClipError, span: tuple[int, int], clip_id: str | None = None) -> Refusal:
    return Refusal(file, clip, clip_id, error.turn, error.field, error.found, error.expected, *span)


def check_size(start: int, end: int) -> None:
    """Refuse empty, reversed or absurd clip bounds."""
    if end <= start:
        raise ClipError("end_frame_idx", str(end), f"more than start_frame_idx {start}")
    if end > MAX_FRAME:
        raise ClipError("end_frame_idx", str(end), f"at most {MAX_FRAME}")
    if end - start > MAX_FRAMES:
        raise ClipError("end_frame_idx", f"{end - start} frames", f"at most {MAX_FRAMES}")


def brief(value: object, width: int = 60) -> str:
    """A value for an error message: one line, at most `width` characters, printable."""
    text = json.dumps(value[: 2 * width]) if isinstance(value, str) else repr(value).removeprefix("b")
    return text if len(text) <= width else text[: width - 3] + "..."


# ---- JSON to typed structs ---------------------------------------------------------------------------

NOT_STRICT: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _number(digits: str) -> int | float | bytes:
    value = float(digits)
    if not math.isfinite(value):
        return digits.encode()
    if not value.is_integer():
        return value
    return int(digits) if digits.lstrip("-").isdigit() else int(value)


# 193.0 is an integer. Numbers that are none (NaN, 1e400) are bytes, a type that no field has.
LENIENT: Final = json.JSONDecoder(parse_int=_number, parse_float=_number, parse_constant=str.encode)


def parse(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """`raw` as the decoder's type; what msgspec refuses is read by the standard library. Raises ClipError."""
    try:
        return decoder.decode(raw)
    except NOT_STRICT:
        tree = lenient(raw)
    try:
        record: T = msgspec.convert(tree, decoder.type)
        msgspec.json.encode(record)  # a lone surrogate, or bytes that are not UTF-8, in a field that is read
    except msgspec.ValidationError as error:
        raise _explained(error, tree) from None
    except UnicodeEncodeError:
        raise ClipError("text", "bytes that are not UTF-8, or half a surrogate pair", "valid text") from None
    return record


def lenient(raw: bytes) -> Any:
    """The JSON value of `raw` by the standard library. Raises ClipError."""
    try:
        return LENIENT.decode(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ClipError("JSON", syntax(error), "a JSON object") from None


def syntax(error: Exception, start: int = 0) -> str:
    """What is wrong with text that is not JSON, on one line; the clip begins at character `start` of it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at character {error.pos - start} of the clip"
    if isinstance(error, RecursionError):
        return "nesting too deep to read"
    return brief(" ".join(str(error).split()), 90)


def _explained(error: msgspec.ValidationError, tree: Any) -> ClipError:
    """msgspec's message ("Expected `int`, got `str` - at `$.conversation[3].time`") with the value at that path."""
    message, _, path = str(error).partition(" - at `$")
    where = path.removesuffix("`").lstrip(".")
    for key in re.findall(r"[^.\[\]]+", where):
        tree = tree[int(key) if isinstance(tree, list) else key]
    in_turn = re.match(r"conversation\[(\d+)\]\.?(.*)", where)
    turn, where = (int(in_turn[1]), in_turn[2]) if in_turn else (None, where)
    if missing := re.match(r"Object missing required field `(.*)`", message):
        return ClipError(f"{where}.{missing[1]}".lstrip("."), "nothing", f"the field {missing[1]}", turn)
    if message.startswith("Invalid enum value"):
        expected = f"one of {', '.join(TRANSITIONS if 'transition' in where else ROLES)}"
    else:
        expected = message.removeprefix("Expected ").partition(", got ")[0].replace("`", "").replace(" | null", "")
    return ClipError(where or "clip", brief(tree), expected, turn)
