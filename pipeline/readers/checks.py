"""Checks of the fields that several schemas share. Each raises ClipError.

Only a field that decides a label, a position, an identity or what is trained on may refuse a clip. Descriptive fields
are read leniently: `text` takes text or a list of texts and counts any other type as ignored.
"""

from __future__ import annotations

import math
import re
from typing import Any, Final

from pipeline.labels import FLOOR_TOLERANCE
from pipeline.readers.clip import MAX_FRAME, Clip, ClipError, brief
from pipeline.schema import is_inside

DEFAULT_FPS: Final = 2.0
MAX_FRAMES: Final = 1_000_000  # of one clip: 5.8 days at 2 frames a second


def text(value: Any, name: str, ignored: list[str]) -> str | None:
    """A descriptive field as text: a list of strings by lines, None for null and empty ones.

    Any other type is no reason to lose a clip: `name` is added to `ignored`.
    """
    if value is None or type(value) is str:
        return value or None
    if type(value) is list and all(type(line) is str for line in value):
        return "\n".join(value) or None
    ignored.append(name)
    return None


def path(value: str | None, field: str) -> None:
    """A name from a file must not lead out of the folder it is looked up in."""
    if value is not None and not is_inside(value):
        raise ClipError(field, brief(value), "a relative path without '..'")


def fps(given: float | str | None, option: float | None) -> tuple[float, bool]:
    """(frames a second, whether the clip or --fps says it); text is a fraction, as in "24000/1001"."""
    value = option or DEFAULT_FPS if given is None else given
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


def frame_after(second: float, fps: float, field: str, turn: int | None = None) -> int:
    """The first frame at or after a time: ceil(second * fps)."""
    frame_at(second, fps, field, turn)
    return math.ceil(second * fps - FLOOR_TOLERANCE)


def check_size(start: int, end: int) -> None:
    """Refuse empty, reversed or absurd clip bounds."""
    if end <= start:
        raise ClipError("end_frame_idx", str(end), f"more than start_frame_idx {start}")
    if end > MAX_FRAME:
        raise ClipError("end_frame_idx", str(end), f"at most {MAX_FRAME}")
    if end - start > MAX_FRAMES:
        raise ClipError("end_frame_idx", f"{end - start} frames", f"at most {MAX_FRAMES}")


def bounds(clip: Clip) -> Clip:
    """The clip, if its given bounds are right; missing and empty ones are decided once the file's convention is."""
    if clip.start_frame is not None and clip.end_frame is not None:
        check_size(clip.start_frame, max(clip.end_frame, clip.start_frame + (clip.end_frame == clip.start_frame)))
    elif all(start is None or role == "system" for role, _, _, start, _ in zip(*clip.turns, strict=True)):
        raise ClipError("start_frame_idx, end_frame_idx", "nothing", "the clip's bounds, or a turn with frames")
    return clip
