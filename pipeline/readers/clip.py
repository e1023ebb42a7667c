"""`Clip`, which every reader makes of its schema's clips, and why a clip is refused.

T turns of a clip
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

import msgspec

MAX_FRAME: Final = 2**31 - 1  # columns are int32
EVERYWHERE: Final = ((0, MAX_FRAME),)  # `unlabelled` of a clip that nobody annotated

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


@dataclass(eq=False)
class ClipError(Exception):
    """Why one clip is refused: field, what was found there, what was expected, turn number or None."""

    field: str
    found: str
    expected: str
    turn: int | None = None


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


def refuse(file: str, clip: int | None, error: ClipError, span: Range, clip_id: str | None = None) -> Refusal:
    return Refusal(file, clip, clip_id, error.turn, error.field, error.found, error.expected, *span)


def brief(value: object, width: int = 60) -> str:
    """A value for an error message: one line, at most `width` characters, printable."""
    text = json.dumps(value[: 2 * width]) if isinstance(value, str) else repr(value).removeprefix("b")
    return text if len(text) <= width else text[: width - 3] + "..."
