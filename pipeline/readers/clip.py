"""`Clip`, the form that every reader brings its schema's clips into, and the checks that the readers share.

Only a field that decides a label, a position, an identity or what is trained on may refuse a clip (`ClipError`).
Descriptive fields are read leniently: `text_of` takes text or a list of texts and counts any other type as ignored.

    T turns
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import msgspec

from pipeline.schema import STATES, TRANSITIONS, is_inside

MAX_FRAMES: Final = 1_000_000  # of one clip: 5.8 days at 2 frames a second
MAX_FRAME: Final = 2**31 - 1  # columns are int32
DEFAULT_FPS: Final = 2.0

EVERYWHERE: Final = ((0, MAX_FRAME),)  # `unlabelled` of a clip that nobody annotated

T = TypeVar("T")
Range = tuple[int, int]  # half-open [start_frame, end_frame), absolute


class Update(msgspec.Struct, gc=False):
    """One state transition of one step."""

    id: str
    transition: Literal["start", "complete", "pause", "resume", "cancel", "reset", "fail"]


@dataclass(slots=True)
class Clip:
    """One clip, whatever schema it was written in. Frames are absolute.

    `turns` holds five columns [T]: role (of schema.ROLES), content (text; of a DST_UPDATE a list of Update), time in
    seconds or None, start_frame and end_frame (both None: no frames). `convention`: how those two are meant; None: as
    in the rest of the file, which decides by a vote.
    """

    schema: str
    video_uid: str
    turns: tuple[Sequence[Any], ...]
    fps: float
    fps_given: bool = True
    start_frame: int | None = None  # bounds as given; None: from the turns
    end_frame: int | None = None
    convention: str | None = None
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
    given_away: tuple[int, int, bool] = (
        0,
        0,
        False,
    )  # decisions told by the file's own history, of how many; verbatim?


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


def brief(value: object, width: int = 60) -> str:
    """A value for an error message: one line, at most `width` characters, printable."""
    text = repr(value) if not isinstance(value, str) else json.dumps(value[: 2 * width])
    return text if len(text) <= width else text[: width - 3] + "..."


# ---- JSON to typed structs ---------------------------------------------------------------------------

TOO_DEEP: Final = "nesting too deep to read"
NOT_STRICT: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # not ValidationError, its subclass


def _integer(digits: str) -> int | float:
    """Python refuses integers of thousands of digits; as infinity they are harmless in a field that is not read."""
    return int(digits) if len(digits) < 400 else math.inf


LENIENT: Final = json.JSONDecoder(parse_int=_integer)


def parse(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """`raw` as the decoder's type. Raises ClipError.

    What msgspec refuses as JSON, NaN say, is read by the standard library: NaN in a field that is not read is harmless.
    """
    try:
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError:
            raise
        except NOT_STRICT:
            found: T = msgspec.convert(lenient(raw), decoder.type)
            msgspec.json.encode(found)  # a lone surrogate, or bytes that are not UTF-8, in a field that is read
            return found
    except msgspec.ValidationError as error:
        raise explain(error) from None
    except UnicodeEncodeError:
        raise ClipError("text", "bytes that are not UTF-8, or half a surrogate pair", "valid text") from None


def lenient(raw: bytes) -> Any:
    """The JSON value of `raw` by the standard library, NaN and all. Raises ClipError."""
    try:
        return LENIENT.decode(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ClipError("JSON", syntax(error), "a JSON object") from None


def syntax(error: Exception) -> str:
    """What is wrong with text that is not JSON, on one line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos} of the clip"
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return brief(" ".join(str(error).split()), 90)


_MESSAGE = re.compile(r"^(.*?)(?: - at `\$?(.*)`)?$", re.DOTALL)
_TURN_PATH = re.compile(r"^\.conversation\[(\d+)\]\.?(.*)$")


def explain(error: msgspec.ValidationError) -> ClipError:
    """msgspec's message as (field, found, expected, turn)."""
    match = _MESSAGE.match(str(error))
    assert match
    message, path = match[1], match[2] or ""
    in_turn = _TURN_PATH.match(path)
    turn, where = (int(in_turn[1]), in_turn[2]) if in_turn else (None, path.lstrip("."))
    if missing := re.match(r"Object missing required field `(.*)`", message):
        name = f"{where}.{missing[1]}" if where else missing[1]
        return ClipError(name, "nothing", f"the field {missing[1]}", turn)
    if unknown := re.match(r"Invalid enum value (.*)", message):
        allowed = ", ".join(TRANSITIONS) if "transition" in where else "system, user, assistant, DST_UPDATE"
        return ClipError(where or "value", brief(unknown[1].strip("'")), f"one of {allowed}", turn)
    if typed := re.match(r"Expected `(.*?)`, got `(.*?)`", message):
        return ClipError(where or "clip", typed[2], typed[1].replace(" | null", ""), turn)
    return ClipError(where or "clip", message, "a number in range", turn)


# ---- checks that several schemas need ----------------------------------------------------------------


def text_of(value: Any, name: str, ignored: list[str]) -> str | None:
    """A descriptive field as text: a list of strings by lines, nothing for null and empty ones.

    Any other type is no reason to lose a clip: `name` is added to `ignored`.
    """
    if value is None or type(value) is str:
        return value or None
    if type(value) is list and all(type(line) is str for line in value):
        return "\n".join(value) or None
    ignored.append(name)
    return None


def name_of(value: Any, name: str, ignored: list[str]) -> str | None:
    """A descriptive name: text or an integer."""
    return str(value) if type(value) is int else text_of(value, name, ignored)


def whole(value: Any, name: str, turn: int | None = None, least: int = 0) -> int:
    """A frame number as an int; 193.0 is one. Raises ClipError."""
    if type(value) is float and value.is_integer():  # NaN and the infinities are not
        value = int(value)
    if type(value) is not int:
        raise ClipError(name, "nothing" if value is None else brief(value), "a whole number", turn)
    if not least <= value <= MAX_FRAME:
        raise ClipError(name, brief(value), f"a number from {least} to {MAX_FRAME}", turn)
    return value


def whole_or_none(value: Any, name: str, turn: int | None = None, least: int = 0) -> int | None:
    return None if value is None else whole(value, name, turn, least)


def check_path(name: str, path: str | None) -> None:
    """Refuse a name from a file that leads out of the folder it is looked up in."""
    if path and not is_inside(path):
        raise ClipError(name, brief(path), "a relative path without '..'")


def check_uid(video_uid: str) -> None:
    if not (video_uid and is_inside(video_uid)):
        raise ClipError("video_uid", brief(video_uid), "a relative path without '..'" if video_uid else "a name")


def check_fps(given: float | str | None, fallback: float | None) -> tuple[float, bool]:
    """(frames a second, whether the clip or --fps told it); text is a fraction, as in "24000/1001"."""
    fps = fallback or DEFAULT_FPS if given is None else given
    if isinstance(fps, str):
        parts = re.fullmatch("([0-9]{1,9})/([1-9][0-9]{0,8})", fps)
        fps = int(parts[1]) / int(parts[2]) if parts else math.nan
    if not (math.isfinite(fps) and 1e-6 <= fps <= 1e6):
        raise ClipError("fps", brief(given or fps), "a positive number of frames a second, or text such as 24000/1001")
    return fps, given is not None or fallback is not None


def check_rate(rate: float | None) -> float | None:
    if rate is not None and not 0 <= rate <= 1:
        raise ClipError("neg_frame_sampling_rate", str(rate), "a rate between 0 and 1")
    return rate


def check_time(time: float | None, turn: int) -> float | None:
    if time is not None and not math.isfinite(time):
        raise ClipError("time", str(time), "a finite number of seconds", turn)
    return time


def check_states(states: Mapping[str, str] | None) -> Mapping[str, str] | None:
    for step, state in (states or {}).items():
        if state not in STATES:
            raise ClipError(f"initial_dst_state.{step}", brief(state), f"one of {', '.join(STATES)}")
    return states


def check_bounds(clip: Clip) -> Clip:
    """Check given bounds; missing and empty ones are decided later, once the file's convention is known."""
    if clip.start_frame is not None and clip.end_frame is not None:
        check_size(clip.start_frame, max(clip.end_frame, clip.start_frame + (clip.end_frame == clip.start_frame)))
    elif all(start is None or role == "system" for role, _, _, start, _ in zip(*clip.turns, strict=True)):
        raise ClipError("start_frame_idx, end_frame_idx", "nothing", "the clip's bounds, or a turn with frames")
    return clip


def check_size(start: int, end: int) -> None:
    """Refuse empty, reversed or absurd clip bounds."""
    if end <= start:
        raise ClipError("end_frame_idx", str(end), f"more than start_frame_idx {start}")
    if end > MAX_FRAME:
        raise ClipError("end_frame_idx", str(end), f"at most {MAX_FRAME}")
    if end - start > MAX_FRAMES:
        raise ClipError("end_frame_idx", f"{end - start} frames", f"at most {MAX_FRAMES}")


def columns(turns: Iterable[Sequence[Any]]) -> tuple[Sequence[Any], ...]:
    """Rows (role, content, time, start_frame, end_frame) as the five columns of `Clip.turns`."""
    return tuple(zip(*turns, strict=True)) or ((),) * 5


@dataclass(frozen=True)
class Reader:
    """One input schema. `read` gives the Clip of one clip's JSON bytes and the fps of --fps, or raises ClipError."""

    name: str
    needs: str  # the fields that a clip must have, for messages
    recognises: Callable[[Collection[str], bytes], bool]  # by the clip's top-level field names, and its bytes
    read: Callable[[bytes, float | None], Clip]
