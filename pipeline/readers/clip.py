"""`Clip`, which every reader makes of its schema's clips; why a clip is refused; checks that several schemas share.

Only a field that decides a label, a position, an identity or what is trained on may refuse a clip. Descriptive fields
are read leniently: `text_of` takes text or a list of texts and counts any other type as ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import msgspec

from pipeline.labels import FLOOR_TOLERANCE
from pipeline.schema import is_inside

MAX_FRAME: Final = 2**31 - 1  # columns are int32
MAX_FRAMES: Final = 1_000_000  # of one clip: 5.8 days at 2 frames a second
EVERYWHERE: Final = ((0, MAX_FRAME),)  # `unlabelled` of a clip that nobody annotated

Range = tuple[int, int]  # half-open [start_frame, end_frame), absolute
Frame = Annotated[int, msgspec.Meta(ge=0, le=MAX_FRAME)]


class Update(msgspec.Struct, gc=False):  # of a step's state
    id: str | int
    transition: Literal["start", "complete", "pause", "resume", "cancel", "reset", "fail"]


@dataclass(slots=True)
class Clip:
    """One clip of T turns, whatever schema it was written in, and what is decided on it. Frames are absolute."""

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
    # what `extract` adds; an extent: (first start, last end) of some turns with frames, as the source has them
    number: int = -1  # in its file
    span: Range = (0, 0)  # bytes there
    recording_id: str = ""
    clip_id: str = ""
    tracked: bool = False  # whether it says anything about the dialog state
    contradicted: bool = False  # whether the given state makes one of the clip's own updates impossible
    system_contradicted: bool = False  # whether a state that its system turns name does
    echoed: tuple[int, int] = (0, 0)  # assistant turns whose whole text an earlier user turn has, of how many
    extent: Range = (-1, -1)  # of the non-system turns
    dst_extent: Range = (-1, -1)  # of the DST_UPDATE turns
    unbounded: bool = False  # whether `given` is the 0..0 that generators write for a clip without DST updates
    first_end: int = -1  # end of the first of the non-system turns by end
    votes: Sequence[int] = (0, 0, 0, 0)  # timed turns, and those of them that fit lead-in, event, window
    updates: bytes = b""  # msgpack of (start, end, step id, transition); without frames the first two are NO_FRAMES
    # what `resolve` decides
    keep: bool = True
    bounds: Range = (0, 0)
    state: Mapping[str, str] | None = None  # before the first turn, replayed; None: as given
    lacks_updates: bool = False  # whether it completes a step that no earlier clip of its conversation started

    @property
    def given(self) -> tuple[int | None, int | None]:
        """The bounds as given."""
        return self.start_frame, self.end_frame


@dataclass(frozen=True)
class Reader:
    """One input schema. `read` gives the Clip of one clip's JSON bytes and the fps of --fps, or raises ClipError."""

    name: str
    recognises: Callable[[Collection[str], bytes], bool]  # by the clip's top-level field names, and its bytes
    read: Callable[[bytes, float | None], Clip]
    needs: str = ""  # the fields that a clip must have, for messages


@dataclass(eq=False)
class ClipError(Exception):
    """Why one clip is refused: field, what was found there, what was expected, turn number or None."""

    field: str
    found: str
    expected: str
    turn: int | None = None


def brief(value: object, width: int = 60) -> str:
    """A value for an error message: one line, at most `width` characters, printable."""
    short = value[: 2 * width] if isinstance(value, str) else value
    text = repr(value)[1:] if isinstance(value, bytes) else json.dumps(short, default=_as_json)
    return text if len(text) <= width else text[: width - 3] + "..."


def _as_json(value: object) -> Any:
    return msgspec.to_builtins(value) if isinstance(value, msgspec.Struct) else repr(value)


def columns(turns: Iterable[Sequence[Any]]) -> tuple[Sequence[Any], ...]:
    """Rows (role, content, time, start_frame, end_frame) as the five columns of `Clip.turns`."""
    return tuple(zip(*turns, strict=True)) or ((),) * 5


def text_of(value: Any, name: str, ignored: list[str]) -> str | None:
    """A descriptive field as text, a list of strings by lines; None, and `name` in `ignored`, for any other type."""
    if value is None or type(value) is str:
        return value or None
    if type(value) is list and all(type(line) is str for line in value):
        return "\n".join(value) or None
    ignored.append(name)
    return None


def fps_of(given: float | str | None, option: float | None) -> tuple[float, bool]:
    """(frames a second, whether the clip or --fps says it); text is a fraction, as in "24000/1001"."""
    value = option or 2.0 if given is None else given
    if isinstance(value, str):
        parts = re.fullmatch("([0-9]{1,9})/([1-9][0-9]{0,8})", value)
        value = int(parts[1]) / int(parts[2]) if parts else 0.0
    if not 1e-6 <= value <= 1e6:
        raise ClipError("fps", brief(given), "a positive number of frames a second, or text such as 24000/1001")
    return value, given is not None or option is not None


def frame_at(second: float, fps: float, field: str, turn: int | None = None) -> int:
    """The frame that shows a time: floor(second * fps)."""
    if not 0 <= second * fps <= MAX_FRAME:
        raise ClipError(field, f"{second:g}", f"seconds, at least 0 and at most {MAX_FRAME} frames", turn)
    return math.floor(second * fps + FLOOR_TOLERANCE)


def frame_after(second: float, fps: float, field: str) -> int:
    """The first frame at or after a time: ceil(second * fps)."""
    frame_at(second, fps, field)
    return math.ceil(second * fps - FLOOR_TOLERANCE)


def check_path(value: str, field: str) -> None:
    """A name from a file must not lead out of the folder it is looked up in."""
    if not is_inside(value):
        raise ClipError(field, brief(value), "a relative path without '..'")


def check_bounds(start: int, end: int) -> None:
    """Refuse empty, reversed or absurd clip bounds."""
    most = min(MAX_FRAME, start + MAX_FRAMES)
    if not start < end <= most:
        raise ClipError("end_frame_idx", str(end), f"more than start_frame_idx {start}, at most {most}")


def checked(clip: Clip) -> Clip:
    """The clip, if its names and given bounds are right; missing and empty bounds are decided with the whole file."""
    check_path(clip.video_uid, "video_uid")
    if clip.frames_file:
        check_path(clip.frames_file, "frames_file")
    if clip.start_frame is not None and clip.end_frame is not None:
        check_bounds(clip.start_frame, max(clip.end_frame, clip.start_frame + (clip.end_frame == clip.start_frame)))
    elif all(start is None or role == "system" for role, _, _, start, _ in zip(*clip.turns, strict=True)):
        raise ClipError("start_frame_idx, end_frame_idx", "nothing", "the clip's bounds, or a turn with frames")
    return clip
