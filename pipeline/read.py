"""JSON bytes -> validated clips: the only place for input errors.

Two steps, so that one bad clip never costs its neighbours. `index` finds where each clip of a file lies
without building it (a memory-mapped array of 1.1 GB: 0.6 s, 24 bytes a clip); `decode` turns one clip's bytes
into typed structs and checks it. Typed decoding drops unread fields unbuilt, which is what makes it ten times
faster than json.load. What msgspec refuses as a whole (one NaN, a byte-order mark, a truncated tail) goes
through a slower bounded scanner for the index, and through the standard library for the clip alone.
"""

from __future__ import annotations

import codecs
import json
import math
import mmap
import operator
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import msgspec
import numpy as np

from pipeline.errors import InputError
from pipeline.schema import STATES, TRANSITIONS, is_inside

MAX_FRAMES: Final = 1_000_000  # of one clip: 5.8 days at 2 frames a second
MAX_FRAME: Final = 2**31 - 1  # columns are int32
MAX_CLIP_BYTES: Final = 64 << 20
DEFAULT_FPS: Final = 2.0
_BOM: Final = b"\xef\xbb\xbf"
_SPACE: Final = b" \t\r\n"


# ---- what a clip looks like --------------------------------------------------------------------------


class Update(msgspec.Struct, gc=False):
    """One state transition of one step."""

    id: str
    transition: Literal["start", "complete", "pause", "resume", "cancel", "reset", "fail"]


class Turn(msgspec.Struct, gc=False):
    """One entry of `conversation`; after `check`, frames are ints or None and DST content is a list."""

    role: Literal["system", "user", "assistant", "DST_UPDATE", "frames"]
    content: str | list[Update] | None = None
    time: float | None = None
    start_frame: int | float | None = None
    end_frame: int | float | None = None
    start: Any = None  # of a ProAssist `frames` turn
    end: Any = None


class Step(msgspec.Struct, gc=False):
    id: str
    name: str | None = None


class Metadata(msgspec.Struct, gc=False):
    user_id: str | int | None = None
    task_goal: str | None = None
    knowledge: str | None = None


class Clip(msgspec.Struct, gc=False):
    """The fields that are read of a clip, both schemas; any other field is skipped unbuilt."""

    video_uid: str
    conversation: list[Turn]
    id: str | int | None = None
    clip_idx: int | float | None = None
    dataset: str | None = None
    fps: float | None = None
    start_frame_idx: int | float | None = None
    end_frame_idx: int | float | None = None
    frames_file: str | None = None
    inferred_goal: str | None = None
    inferred_knowledge: str | None = None
    dst: list[Step] | None = None
    initial_dst_state: dict[str, str] | None = None
    neg_frame_sampling_rate: float | None = None
    metadata: Metadata | None = None


@dataclass(slots=True)
class Checked:
    """A clip that passed, with its numbers made ints."""

    clip: Clip
    columns: tuple[tuple[Any, ...], ...]  # role, content, time, start_frame, end_frame of all turns but `frames`
    schema: str  # prospect or proassist
    fps: float
    fps_given: bool
    start: int | None  # bounds as given, None: to be inferred
    end: int | None
    clip_idx: int | None
    summaries: int = 0  # assistant turns that answer "Please summarize": not speech


_CLIP = msgspec.json.Decoder(Clip)
_UPDATES = msgspec.json.Decoder(list[Update])


class ClipError(Exception):
    """Why one clip is refused."""

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


# ---- one clip ----------------------------------------------------------------------------------------


def decode(raw: bytes, size: int = 0) -> Checked:
    """The checked clip of one clip's JSON bytes. Raises ClipError naming turn and field.

    size: bytes the clip takes in its file, where the caller did not read it for being too large.
    """
    if size > MAX_CLIP_BYTES:
        raise ClipError("clip", f"{size:,} bytes", f"at most {MAX_CLIP_BYTES:,}")
    try:
        return check(_CLIP.decode(raw))
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return check(_decode_slowly(raw))


def _integer(digits: str) -> int | float:
    """Python refuses integers of thousands of digits; as infinity they are harmless where nobody reads them."""
    return int(digits) if len(digits) < 400 else math.inf


_LENIENT = json.JSONDecoder(parse_int=_integer)


def _decode_slowly(raw: bytes) -> Clip:
    """The standard library accepts NaN in a field that nobody reads; what it refuses is not JSON."""
    try:
        tree = _LENIENT.decode(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise ClipError("JSON", _syntax(error), "a JSON object") from None
    try:
        clip = msgspec.convert(tree, Clip)
        for number, turn in enumerate(clip.conversation):
            if turn.time is not None and not math.isfinite(turn.time):
                raise ClipError("time", str(turn.time), "a finite number of seconds", number)
        for number, turn in enumerate(clip.conversation):
            _encodable(turn, number)
        _encodable(clip, None)
    except msgspec.ValidationError as error:
        raise _explain(error) from None
    except UnicodeEncodeError:  # in a word that is compared, a role say
        raise _not_text(None) from None
    return clip


def _encodable(part: Clip | Turn, number: int | None) -> None:
    """Refuse a lone surrogate, or bytes that are not UTF-8, in a field that is read."""
    try:
        msgspec.json.encode(part)
    except UnicodeEncodeError:
        raise _not_text(number) from None


def _not_text(turn: int | None) -> ClipError:
    return ClipError("text", "bytes that are not UTF-8, or half a surrogate pair", "valid text", turn)


TOO_DEEP: Final = "nesting too deep to read"


def _syntax(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos} of the clip"
    if isinstance(error, RecursionError):
        return TOO_DEEP
    return brief(" ".join(str(error).split()), 90)


_MESSAGE = re.compile(r"^(.*?)(?: - at `\$?(.*)`)?$", re.DOTALL)
_TURN_PATH = re.compile(r"^\.conversation\[(\d+)\]\.?(.*)$")


def _explain(error: msgspec.ValidationError) -> ClipError:
    """msgspec's message as (turn, field, found, expected)."""
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


# ---- checks: what types cannot say -------------------------------------------------------------------


def check(clip: Clip) -> Checked:
    """Check a decoded clip and bring its turns into one form. Raises ClipError.

    In the result's columns, frames are int or None; ProAssist's `frames` turns are gone and the turns they lead
    to carry ranges of their own; the content of a DST_UPDATE is a list of Update, any other's is text.
    """
    _check_names(clip)
    fps = DEFAULT_FPS if clip.fps is None else clip.fps
    if not (math.isfinite(fps) and 1e-6 <= fps <= 1e6):
        raise ClipError("fps", str(fps), "a positive number of frames a second")
    rate = clip.neg_frame_sampling_rate
    if rate is not None and not 0 <= rate <= 1:
        raise ClipError("neg_frame_sampling_rate", str(rate), "a rate between 0 and 1")
    checked = Checked(
        clip,
        _columns(clip.conversation),
        "prospect",
        fps,
        clip.fps is not None,
        _whole_or_none(clip.start_frame_idx, "start_frame_idx"),
        _whole_or_none(clip.end_frame_idx, "end_frame_idx"),
        _whole_or_none(clip.clip_idx, "clip_idx", least=-(2**31)),
    )
    if not _usual(*checked.columns):
        _check_turns(checked)
    _check_bounds(checked)
    return checked


_TURN = operator.attrgetter("role", "content", "time", "start_frame", "end_frame")
_CONTENT_TYPES: Final = {"system": str, "user": str, "assistant": str, "DST_UPDATE": list, "frames": None}


def _columns(turns: list[Turn]) -> tuple[tuple[Any, ...], ...]:
    return tuple(zip(*map(_TURN, turns), strict=True)) or ((),) * 5


def _usual(role: Any, content: Any, time: Any, start: Any, end: Any) -> bool:
    """Whether the turns are plainly right as they are: what `_check_turns` would find, a tenth of its time.

    No `frames` turn, content of its role's type, all frames ints in order. Times are finite: JSON knows no
    others, and `_decode_slowly` looks.
    """
    return (
        list(map(type, content)) == list(map(_CONTENT_TYPES.__getitem__, role))
        and set(map(type, start)) | set(map(type, end)) <= _INT
        and all(map(operator.le, start, end))
        and min(start, default=0) >= 0
        and max(end, default=0) <= MAX_FRAME
    )


_INT: Final = {int}


def _check_turns(checked: Checked) -> None:
    """Check turn by turn, and bring into form what can be."""
    turns = checked.clip.conversation
    for number, turn in enumerate(turns):
        if turn.role == "frames":
            checked.schema = "proassist"
        elif turn.role == "DST_UPDATE":
            turn.content = _updates(turn.content, number)
        elif type(turn.content) is not str:
            raise ClipError("content", brief(turn.content), "text", number)
    if checked.schema == "proassist":
        turns = _place_by_frames_turns(checked)
    else:
        for number, turn in enumerate(turns):
            _check_range(turn, number)
    checked.columns = _columns(turns)


def _check_names(clip: Clip) -> None:
    if not clip.video_uid:
        raise ClipError("video_uid", '""', "a name")
    for name, path in (("video_uid", clip.video_uid), ("frames_file", clip.frames_file)):
        if path and not is_inside(path):
            raise ClipError(name, brief(path), "a relative path without '..'")
    for step, state in (clip.initial_dst_state or {}).items():
        if state not in STATES:
            raise ClipError(f"initial_dst_state.{step}", brief(state), f"one of {', '.join(STATES)}")
    if clip.id == "":
        raise ClipError("id", '""', "a name or a number")


def _whole(value: Any, name: str, turn: int | None = None, least: int = 0) -> int:
    """A frame number as an int; 193.0 is one."""
    if type(value) is float and value.is_integer():  # NaN and the infinities are not
        value = int(value)
    if type(value) is not int:
        raise ClipError(name, "nothing" if value is None else brief(value), "a whole number", turn)
    if not least <= value <= MAX_FRAME:
        raise ClipError(name, brief(value), f"a number from {least} to {MAX_FRAME}", turn)
    return value


def _whole_or_none(value: Any, name: str, turn: int | None = None, least: int = 0) -> int | None:
    return None if value is None else _whole(value, name, turn, least)


def _check_range(turn: Turn, number: int) -> None:
    start = _whole_or_none(turn.start_frame, "start_frame", number)
    end = _whole_or_none(turn.end_frame, "end_frame", number)
    if start is None or end is None:  # half a range is none
        turn.start_frame = turn.end_frame = None
        return
    if end < start:
        raise ClipError("end_frame", str(end), f"at least start_frame {start}", number)
    turn.start_frame, turn.end_frame = start, end


_ARROW = re.compile(r"\s*(.+?)\s*->\s*(\w+)\s*")


def _updates(content: str | list[Update] | None, number: int) -> list[Update]:
    """The transitions of a DST_UPDATE: a list of {id, transition}, its JSON as text, or 'S1->start, ...'."""
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


def _place_by_frames_turns(checked: Checked) -> list[Turn]:
    """ProAssist: the turns without `frames` turns, each with the range that it happens in.

    An assistant (or DST) turn happens at the last frame of the `frames` turn before it. A user turn is heard
    by the next frame, or, where the reply follows with no frame in between, by that last frame. The reply to
    'Please summarize' is the model's note to itself, not speech: it gets no frames.
    """
    turns: list[Turn] = []
    waiting: list[Turn] = []  # user turns that nobody answered yet
    starts: list[int] = []
    ends: list[int] = []
    summarizing = False
    for number, turn in enumerate(checked.clip.conversation):
        if turn.role == "frames":
            starts.append(_whole(turn.start, "start", number))
            ends.append(_whole(turn.end, "end", number))
            if ends[-1] < starts[-1]:
                raise ClipError("end", str(ends[-1]), f"at least start {starts[-1]}", number)
            _hear_later(waiting)
            continue
        summary = summarizing and turn.role == "assistant"
        checked.summaries += summary
        placed = ends and turn.role != "system" and not summary
        turn.start_frame, turn.end_frame = (ends[-1] - 1, ends[-1]) if placed else (None, None)
        summarizing = turn.role == "system" and str(turn.content).startswith("Please summarize")
        turns.append(turn)
        if turn.role == "user" and placed:
            waiting.append(turn)
        elif turn.role == "assistant":
            waiting.clear()
    _hear_later(waiting)
    checked.start = min(starts) if checked.start is None else checked.start
    checked.end = max(ends) if checked.end is None else checked.end
    return turns


def _hear_later(waiting: list[Turn]) -> None:
    """Frames (or the end) follow: what was said is heard by the next frame. Empties `waiting`."""
    for turn in waiting:
        turn.start_frame, turn.end_frame = turn.end_frame, (turn.end_frame or 0) + 1
    waiting.clear()


def _check_bounds(checked: Checked) -> None:
    """Check the bounds; missing ones are inferred later, once the file's convention is known."""
    if checked.start is not None and checked.end is not None:
        check_size(checked.start, checked.end)
    elif all(start is None or role == "system" for role, _, _, start, _ in zip(*checked.columns, strict=True)):
        raise ClipError("start_frame_idx, end_frame_idx", "nothing", "the clip's bounds, or a turn with frames")


def check_size(start: int, end: int) -> None:
    """Refuse empty, reversed or absurd clip bounds."""
    if end <= start:
        raise ClipError("end_frame_idx", str(end), f"more than start_frame_idx {start}")
    if end > MAX_FRAME:
        raise ClipError("end_frame_idx", str(end), f"at most {MAX_FRAME}")
    if end - start > MAX_FRAMES:
        raise ClipError("end_frame_idx", f"{end - start} frames", f"at most {MAX_FRAMES}")


# ---- where the clips of a file lie -------------------------------------------------------------------


@dataclass
class Index:
    """Byte spans of a file's clips, in order, and what of the file is not JSON."""

    form: str  # array, object, lines
    spans: np.ndarray  # int64 [C, 2]
    numbers: np.ndarray  # int64 [C] of each clip in the file; a stretch that is broken counts as one
    broken: list[tuple[int, ClipError, tuple[int, int]]] = field(default_factory=list)  # (number, why, span)

    @classmethod
    def whole(cls, form: str, spans: np.ndarray) -> Index:
        """Of a file where nothing is broken."""
        return cls(form, spans, np.arange(len(spans)))


def index(path: Path) -> Index:
    """Find the clips of a JSON array, one JSON object or JSON Lines file; told apart by content.

    Raises InputError where the file cannot be read, is empty, or begins like none of them.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: found no regular file (a pipe, say), expected one; save it to a file first")
        with path.open("rb") as file:
            if status.st_size == 0:
                raise InputError(f"{path}: found an empty file, expected clips as JSON; check how it was made")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _index(path, data, file)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {_syntax(error)}") from None


def _index(path: Path, data: mmap.mmap, file: BinaryIO) -> Index:
    start = 3 if data[:3] == _BOM else 0
    while start < len(data) and data[start] in _SPACE:
        start += 1
    opening = data[start : start + 1]
    if opening == b"[":
        return _index_array(data, file)
    if opening != b"{" and not _looks_like_lines(data, start):
        found = _kind(data[start : start + 20])
        raise InputError(
            f"{path}: found {found}, expected a JSON array of clips, one clip object, or JSON Lines, as UTF-8"
        )
    if _looks_like_lines(data, start):
        return Index.whole("lines", _line_spans(data))
    try:
        msgspec.json.decode(memoryview(data)[start:], type=msgspec.Raw)
        return Index.whole("object", np.array([[start, len(data)]], np.int64))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Scanner(file).index("object")


def _kind(head: bytes) -> str:
    """What a file that is not JSON begins like, and what to do about it."""
    if not head:
        return "only white space"
    if head[:2] == b"\x1f\x8b":
        return "a gzip file (decompress it first)"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16 text (save it as UTF-8 first)"
    return brief(head)


def _index_array(data: mmap.mmap, file: BinaryIO) -> Index:
    try:
        clips = msgspec.json.decode(data, type=list[msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Scanner(file).index("array")
    base = np.frombuffer(data, np.uint8).ctypes.data
    starts = np.array([np.frombuffer(clip, np.uint8).ctypes.data for clip in clips], np.int64) - base
    sizes = np.array([memoryview(clip).nbytes for clip in clips], np.int64)
    del clips
    return Index.whole("array", np.stack([starts, starts + sizes], axis=1).reshape(-1, 2))


def _looks_like_lines(data: mmap.mmap, start: int) -> bool:
    """Whether one of the first lines is by itself a clip (a pretty-printed object's lines are not)."""
    for _ in range(16):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if stop - start <= MAX_CLIP_BYTES and _is_clip(data[start:stop]):
            return True
        start = stop + 1
        if start >= len(data):
            break
    return False


def _is_clip(line: bytes) -> bool:
    try:
        return _clip_like(_LENIENT.decode(line.decode("utf-8", "surrogateescape")))
    except (ValueError, RecursionError):
        return False


def _clip_like(tree: object) -> bool:
    return isinstance(tree, dict) and ("conversation" in tree or "video_uid" in tree)


def _line_spans(data: mmap.mmap) -> np.ndarray:
    spans, start = [], 3 if data[:3] == _BOM else 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if stop - start > MAX_CLIP_BYTES or data[start:stop].strip():
            spans.append((start, stop))
        start = stop + 1
    return np.array(spans, np.int64).reshape(-1, 2)


# ---- the slow road -----------------------------------------------------------------------------------


class Scanner:
    """Finds clips in text that is not quite JSON, in a bounded window, and resumes after what is broken.

    Two to four times slower than msgspec; memory: one window (4 MiB of text, or the largest clip). A stretch that
    does not parse is reported once, and the search goes on at the next object that looks like a clip.
    """

    WINDOW = 4 << 20
    MARGIN = 16  # an error this close to the window's end may only mean: read on
    PATIENCE = 1 << 28  # characters tried in vain in one broken stretch, before the rest is given up
    DEEP = 400  # objects to skip where nesting is too deep: all of them inside one another

    def __init__(self, file: BinaryIO) -> None:
        file.seek(0)
        self._read: Callable[[int], bytes] = file.read
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._json, self.tried = _LENIENT, 0
        self.text, self.at, self.byte, self.done = "", 0, 0, False  # window, cursor in it and in the file
        self._fill()
        if self.text.startswith("\ufeff"):
            self._advance(1)
        self._skip_space()

    def index(self, form: str) -> Index:
        spans, numbers, broken, number = [], [], [], 0
        for span, error in self._walk(form == "array"):
            if error is None:
                spans.append(span)
                numbers.append(number)
            else:
                broken.append((number, error, span))
            number += span[1] > span[0]  # what is only said of a place is no clip
        return Index(form, np.array(spans, np.int64).reshape(-1, 2), np.array(numbers, np.int64), broken)

    def _walk(self, array: bool) -> Iterator[tuple[tuple[int, int], ClipError | None]]:
        """Spans of clips (with None), and of broken stretches (with what is wrong there)."""
        self._advance(1 if array else 0)
        before = "["
        while True:
            self._skip_space()
            char = self._peek()
            if not char:
                if array:
                    yield self._note("the end of the file", "']' after the last clip")
                return
            if array and char == "]":
                if before == ",":
                    yield self._note("',' before ']'", "a clip")
                self._advance(1)
                break
            if before == "clip" and array:
                if char == ",":
                    self._advance(1)
                    before = ","
                    continue
                yield self._note(brief(char), "',' or ']' after a clip")
            if before == "clip" and char != "{":
                break
            span, problem = self._value()
            if problem is None:
                yield span, None
                before = "clip"
                continue
            self._resync()
            yield (span[0], self.byte), ClipError("JSON", problem, "a clip")
            before = "resynced"
            if not self._peek():
                return
        yield from self._walk_rest()

    def _walk_rest(self) -> Iterator[tuple[tuple[int, int], ClipError | None]]:
        """Whatever follows the end of the array or object: say so, and keep what looks like a clip."""
        self._skip_space()
        if self._peek():
            yield self._note(brief(self.text[self.at : self.at + 20]), "nothing after the end")
            while self._resync(step=0):
                yield self._value()[0], None

    def _note(self, found: str, expected: str) -> tuple[tuple[int, int], ClipError]:
        return (self.byte, self.byte), ClipError("JSON", found, expected)

    def _value(self) -> tuple[tuple[int, int], str | None]:
        """Decode the value at the cursor and step over it; on failure stay, and say what is wrong."""
        begin = self.byte
        tree, end, problem = self._try()
        size = end - self.at
        if isinstance(tree, list) and self._ends_after(size):
            problem = "an array that the file ends with"  # a bracket too many: there can be clips inside
        if problem is None:
            self._advance(size)
        return (begin, self.byte), problem

    def _try(self) -> tuple[object, int, str | None]:
        """(tree, where it ends, None) of the value at the cursor, or what is wrong; reads on if need be."""
        while True:
            try:
                tree, end = self._json.raw_decode(self.text, self.at)
                return tree, end, None
            except json.JSONDecodeError as error:
                self.tried = error.pos - self.at + 1
                cut = error.pos >= len(self.text) - self.MARGIN or error.msg.startswith("Unterminated string")
                if self.done or not cut or len(self.text) - self.at > MAX_CLIP_BYTES:
                    return None, self.at, f"{error.msg} at character {error.pos - self.at} of the clip"
                self._fill(len(self.text) - self.at)
            except (ValueError, RecursionError) as error:
                self.tried = 1
                return None, self.at, _syntax(error)

    def _resync(self, step: int = 1) -> bool:
        """Move on to the next object that looks like a clip; False: there is none, the cursor is at the end."""
        patience = self.PATIENCE
        while patience > 0 and self._find_object(step):
            tree, end, problem = self._try()
            if problem is None and _clip_like(tree):
                return True
            step = 1 if problem else end - self.at
            patience -= self.tried if problem else 0
            if problem == TOO_DEEP:
                self._skip_nested()
        while self._peek():
            self._advance(len(self.text) - self.at)
            self._fill()
        return False

    def _ends_after(self, size: int) -> bool:
        """Whether nothing but space follows the next `size` characters."""
        while not self.done and not self.text[self.at + size :].strip():
            self._fill()
        return not self.text[self.at + size :].strip()

    def _skip_nested(self) -> None:
        """Step over up to DEEP objects that begin inside one another: each would fail in the same place."""
        for _ in range(self.DEEP):
            opens, closes = self.text.find("{", self.at + 1), self.text.find("}", self.at + 1)
            if opens < 0 or 0 <= closes < opens:
                return
            self._advance(opens - self.at)

    def _find_object(self, step: int) -> bool:
        """Move the cursor `step` on and to the next '{'; False at the end of the file."""
        self._advance(step)
        while (found := self.text.find("{", self.at)) < 0:
            self._advance(len(self.text) - self.at)
            if self.done:
                return False
            self._fill()
        self._advance(found - self.at)
        return True

    def _skip_space(self) -> None:
        while True:
            match = _WHITE.match(self.text, self.at)
            self._advance(match.end() - self.at if match else 0)
            if self.at < len(self.text) or self.done:
                return
            self._fill()

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _advance(self, count: int) -> None:
        self.byte += len(self.text[self.at : self.at + count].encode("utf-8", "surrogateescape"))
        self.at += count

    def _fill(self, more: int = 0) -> None:
        """Read on, at least one window; what lies before the cursor is dropped."""
        data = self._read(max(more, self.WINDOW))
        self.done = not data
        self.text, self.at = self.text[self.at :] + self._utf8.decode(data, final=self.done), 0


_WHITE = re.compile(r"[ \t\r\n]*")
