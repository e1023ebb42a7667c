"""Where the clips of a file lie: byte spans, so that one bad clip never costs its neighbours.

A JSON array, one clip object, or JSON Lines, told apart by content. msgspec finds the spans without building a clip
(a memory-mapped array of 1.1 GB: 0.6 s, 24 bytes a clip). An array that it refuses as a whole (one NaN, a byte-order
mark, a truncated tail) is walked by the standard library, two to four times slower and in a bounded window, up to
where its syntax breaks; the rest is reported as one stretch.
"""

from __future__ import annotations

import codecs
import json
import mmap
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import numpy as np

from pipeline.errors import InputError
from pipeline.readers.clip import LENIENT, NOT_STRICT, ClipError, brief, syntax

MAX_CLIP_BYTES: Final = 64 << 20
CLIP_NAMES: Final = frozenset(("conversation", "video_uid", "video_path", "video_intervals"))
_BOM: Final = b"\xef\xbb\xbf"
_SPACE: Final = b" \t\r\n"


@dataclass
class Index:
    """Byte spans of a file's clips, in order, and what of the file is not JSON."""

    form: str  # array, object, lines
    spans: np.ndarray  # int64 [C, 2]
    broken: list[tuple[int, ClipError, tuple[int, int]]] = field(default_factory=list)  # (number, why, span)


def index(path: Path) -> Index:
    """Find the clips of a JSON array, one JSON object or JSON Lines file.

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
        raise InputError(f"{path}: cannot be read: {syntax(error)}") from None


def _index(path: Path, data: mmap.mmap, file: BinaryIO) -> Index:
    start = 3 if data[:3] == _BOM else 0
    while start < len(data) and data[start] in _SPACE:
        start += 1
    opening = data[start : start + 1]
    if opening == b"[":
        return _index_array(data, file)
    if _looks_like_lines(data, start):
        return Index("lines", _line_spans(data))
    if opening != b"{":
        found = _kind(data[start : start + 20])
        raise InputError(
            f"{path}: found {found}, expected a JSON array of clips, one clip object, or JSON Lines, as UTF-8"
        )
    try:
        msgspec.json.decode(memoryview(data)[start:], type=msgspec.Raw)
        return Index("object", np.array([[start, len(data)]], np.int64))
    except NOT_STRICT:
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
    except NOT_STRICT:
        return Scanner(file).index("array")
    base = np.frombuffer(data, np.uint8).ctypes.data
    starts = np.array([np.frombuffer(clip, np.uint8).ctypes.data for clip in clips], np.int64) - base
    sizes = np.array([memoryview(clip).nbytes for clip in clips], np.int64)
    del clips
    return Index("array", np.stack([starts, starts + sizes], axis=1).reshape(-1, 2))


def _looks_like_lines(data: mmap.mmap, start: int) -> bool:
    """Whether the first line, or after broken ones another, is by itself a clip (not so in a pretty-printed object)."""
    for number in range(16):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        names = _object_names(data[start:stop]) if stop - start <= MAX_CLIP_BYTES else frozenset()
        if names & CLIP_NAMES or (number == 0 and names):
            return True
        start = stop + 1
        if start >= len(data):
            break
    return False


def _object_names(line: bytes) -> frozenset[str]:
    """The field names of a line that is a JSON object; none where it isn't."""
    try:
        tree = LENIENT.decode(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return frozenset()
    return frozenset(tree) if isinstance(tree, dict) else frozenset()


def _line_spans(data: mmap.mmap) -> np.ndarray:
    spans, start = [], 3 if data[:3] == _BOM else 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if stop - start > MAX_CLIP_BYTES or data[start:stop].strip():
            spans.append((start, stop))
        start = stop + 1
    return np.array(spans, np.int64).reshape(-1, 2)


# ---- what msgspec refuses as a whole -----------------------------------------------------------------


class Scanner:
    """Walks an array (or one object) that is not strict JSON, clip by clip, up to where its syntax breaks.

    Memory: one window of text, or the largest clip.
    """

    WINDOW = 4 << 20
    MARGIN = 16  # an error this close to the window's end may only mean: read on

    def __init__(self, file: BinaryIO) -> None:
        file.seek(0)
        self._read = file.read
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at, self.byte, self.done = "", 0, 0, False  # window, cursor in it and in the file
        self._fill()
        if self.text.startswith("\ufeff"):
            self._advance(1)
        self._skip_space()

    def index(self, form: str) -> Index:
        """The spans of whole clips; `broken` says where the walk ended early, and why."""
        spans: list[tuple[int, int]] = []
        problem = ""
        for span, problem in self._walk(form == "array"):
            if not problem:
                spans.append(span)
        broken = []
        if problem:
            begin = self.byte
            self._skip_rest()
            error = ClipError("JSON", problem, "a clip; what follows was not read")
            broken.append((len(spans), error, (begin, self.byte)))
        return Index(form, np.array(spans, np.int64).reshape(-1, 2), broken)

    def _walk(self, array: bool) -> Iterator[tuple[tuple[int, int], str]]:
        """Spans of clips (with ""), and at last, where the syntax breaks, what is wrong there."""
        self._advance(1 if array else 0)
        self._skip_space()
        if array and self._peek() == "]":
            self._advance(1)
        else:
            while True:
                begin, problem = self.byte, self._value()
                yield (begin, self.byte), problem
                if problem or not array:
                    break
                self._skip_space()
                char = self._peek()
                if char not in (",", "]"):
                    yield (self.byte, self.byte), f"{brief(char) if char else 'the end of the file'} after a clip"
                    return
                self._advance(1)
                if char == "]":
                    break
                self._skip_space()
            if problem:
                return
        self._skip_space()
        if self._peek():
            yield (self.byte, self.byte), f"{brief(self.text[self.at : self.at + 20])} after the end"

    def _value(self) -> str:
        """Step over the JSON value at the cursor; what is wrong with it, or ""."""
        while True:
            try:
                _, end = LENIENT.raw_decode(self.text, self.at)
                self._advance(end - self.at)
                return ""
            except json.JSONDecodeError as error:
                cut = error.pos >= len(self.text) - self.MARGIN or error.msg.startswith("Unterminated string")
                if self.done or not cut or len(self.text) - self.at > MAX_CLIP_BYTES:
                    return f"{error.msg} at character {error.pos - self.at} of the clip"
                self._fill(len(self.text) - self.at)
            except (ValueError, RecursionError) as error:
                return syntax(error)

    def _skip_rest(self) -> None:
        while self._peek():
            self._advance(len(self.text) - self.at)
            self._fill()

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
