"""Where the clips of a file lie: byte spans, so that one bad clip never costs its neighbours.

A JSON array, one clip object, or JSON Lines, told apart by content. msgspec finds the spans without building a clip
(a memory-mapped array of 1.1 GB: 0.6 s, 24 bytes a clip). An array that it refuses as a whole (one NaN, a byte-order
mark, a truncated tail) is walked by the standard library, two to four times slower, up to where its syntax breaks; the
rest is reported as one stretch.
"""

from __future__ import annotations

import json
import mmap
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from pipeline.errors import InputError
from pipeline.readers.clip import LENIENT, NOT_STRICT, ClipError, brief, syntax

MAX_CLIP_BYTES: Final = 64 << 20
CLIP_NAMES: Final = frozenset(("conversation", "video_uid", "video_path", "video_intervals"))
WINDOW = 1 << 18  # bytes decoded at first to find a clip's end
MARGIN: Final = 16  # characters: an error this close to the window's end may only mean that it is too small
_BOM: Final = b"\xef\xbb\xbf"
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
Data = bytes | mmap.mmap


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
        if status.st_size == 0:
            raise InputError(f"{path}: found an empty file, expected clips as JSON; check how it was made")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _index(path, data)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read: {syntax(error)}") from None


def line_spans(data: Data) -> Iterator[tuple[int, int]]:
    """The bytes of each line of JSON Lines that is not blank; lines end at \\n alone (U+2028 may stand in a text)."""
    start = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if stop - start > MAX_CLIP_BYTES or data[start:stop].strip():
            yield start, stop
        start = stop + 1


def _index(path: Path, data: mmap.mmap) -> Index:
    start = _after_space(data, len(_BOM) if data[: len(_BOM)] == _BOM else 0)
    opening = data[start : start + 1]
    if opening == b"[":
        return _array(data, start)
    if _looks_like_lines(data):
        return Index("lines", _spans(line_spans(data)))
    if opening == b"{":
        return _walk(data, start, "object")
    raise InputError(
        f"{path}: found {_kind(data[start : start + 20])}, expected a JSON array of clips, one clip object, "
        "or JSON Lines, as UTF-8"
    )


def _kind(head: bytes) -> str:
    """What a file that is not JSON begins like, and what to do about it."""
    if not head:
        return "only white space"
    if head[:2] == b"\x1f\x8b":
        return "a gzip file (decompress it first)"
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16 text (save it as UTF-8 first)"
    return brief(head)


def _array(data: mmap.mmap, start: int) -> Index:
    try:
        clips = msgspec.json.decode(data, type=list[msgspec.Raw])
    except NOT_STRICT:
        return _walk(data, start, "array")
    base = np.frombuffer(data, np.uint8).ctypes.data
    starts = np.array([np.frombuffer(clip, np.uint8).ctypes.data for clip in clips], np.int64) - base
    sizes = np.array([memoryview(clip).nbytes for clip in clips], np.int64)
    del clips  # they hold the memory map
    return Index("array", np.stack([starts, starts + sizes], axis=1).reshape(-1, 2))


def _looks_like_lines(data: Data) -> bool:
    """Whether the first line, or after broken ones another, is by itself a clip (not so in a pretty-printed object)."""
    for number, (start, stop) in zip(range(16), line_spans(data), strict=False):
        try:
            tree = LENIENT.decode(data[start : min(stop, start + MAX_CLIP_BYTES)].decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, dict) and (CLIP_NAMES & tree.keys() or (number == 0 and tree)):
            return True
    return False


def _spans(pairs: Iterator[tuple[int, int]] | list[tuple[int, int]]) -> np.ndarray:
    return np.array(list(pairs), np.int64).reshape(-1, 2)


# ---- what msgspec refuses as a whole -----------------------------------------------------------------


def _walk(data: Data, start: int, form: str) -> Index:
    """The clips of an array, or of one object, at `start` by the standard library, up to where the syntax breaks."""
    spans: list[tuple[int, int]] = []
    at, problem, closed = start, "", False
    if form == "array":
        at = _after_space(data, start + 1)
        closed = data[at : at + 1] == b"]"
        at += closed
    while not closed:
        end, problem = _value_end(data, at)
        if problem:
            break
        spans.append((at, end))
        at = _after_space(data, end)
        if form == "object":
            break
        sign = data[at : at + 1]
        if sign not in (b",", b"]"):
            problem = f"{_shown(data, at, 1) if sign else 'the end of the file'} after a clip"
            break
        closed, at = sign == b"]", _after_space(data, at + 1)
    if not problem and at < len(data):
        problem = f"{_shown(data, at, 20)} after the end"
    error = ClipError("JSON", problem, "a clip; what follows was not read")
    return Index(form, _spans(spans), [(len(spans), error, (at, len(data)))] if problem else [])


def _value_end(data: Data, start: int) -> tuple[int, str]:
    """(where the JSON value at `start` ends, what is wrong with it or "")."""
    size = WINDOW
    while True:
        text = data[start : start + size].decode("utf-8", "surrogateescape")
        whole = start + size >= len(data)
        try:
            _, end = LENIENT.raw_decode(text)
            if whole or end < len(text) - MARGIN:
                return start + len(text[:end].encode("utf-8", "surrogateescape")), ""
        except json.JSONDecodeError as error:
            cut = error.pos >= len(text) - MARGIN or error.msg.startswith("Unterminated string")
            if whole or not cut or size > MAX_CLIP_BYTES:
                return start, syntax(error)
        except (ValueError, RecursionError) as error:
            return start, syntax(error)
        size *= 4


def _after_space(data: Data, at: int) -> int:
    match = _SPACE.match(data, at)
    return match.end() if match else at


def _shown(data: Data, at: int, length: int) -> str:
    return brief(data[at : at + 4 * length].decode("utf-8", "surrogateescape")[:length])
