"""Where the clips of a file lie: byte spans, so that one bad clip never costs its neighbours.

A JSON array, one clip object, or JSON Lines, told apart by content. msgspec finds the spans without building a clip
(a memory-mapped array of 1.1 GB: 0.6 s, 24 bytes a clip). An array that it refuses as a whole (one NaN, a byte-order
mark, a truncated tail) is read into memory and walked by the standard library, two to four times slower, up to where
its syntax breaks; the rest is reported as one stretch.
"""

from __future__ import annotations

import mmap
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from pipeline.errors import InputError
from pipeline.readers.clip import LENIENT, NOT_STRICT, ClipError, brief, syntax

MAX_CLIP_BYTES: Final = 64 << 20
CLIP_NAMES: Final = frozenset(("conversation", "video_uid", "video_path", "video_intervals"))
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
        try:
            clips = msgspec.json.decode(data, type=list[msgspec.Raw])
        except NOT_STRICT:
            return _walk(data, start, "array")
        base = np.frombuffer(data, np.uint8).ctypes.data
        starts = np.array([np.frombuffer(clip, np.uint8).ctypes.data for clip in clips], np.int64) - base
        sizes = np.array([memoryview(clip).nbytes for clip in clips], np.int64)
        del clips  # they hold the memory map
        return Index("array", np.stack([starts, starts + sizes], axis=1))
    if _looks_like_lines(data):
        return Index("lines", _spans(line_spans(data)))
    if opening == b"{":
        return _walk(data, start, "object")
    head = data[start : start + 20]
    kinds = {b"": "only white space", b"\x1f\x8b": "a gzip file (decompress it first)"}
    kinds |= dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text (save it as UTF-8 first)")
    raise InputError(
        f"{path}: found {kinds.get(head[:2]) or brief(head)}, expected a JSON array of clips, one clip object, "
        "or JSON Lines, as UTF-8"
    )


def _looks_like_lines(data: Data) -> bool:
    """Whether the first line, or after broken ones another, is by itself a clip (not so in a pretty-printed object)."""
    for number, (start, stop) in zip(range(16), line_spans(data), strict=False):
        try:
            tree = LENIENT.decode(str(data[start : min(stop, start + MAX_CLIP_BYTES)], "latin-1"))
        except (ValueError, RecursionError):
            continue
        if isinstance(tree, dict) and (CLIP_NAMES & tree.keys() or (number == 0 and tree)):
            return True
    return False


def _spans(pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.array(list(pairs), np.int64).reshape(-1, 2)


def _walk(data: Data, start: int, form: str) -> Index:
    """The clips of an array that msgspec refuses, or of one object, at `start`, up to where the syntax breaks."""
    text = str(data, "latin-1")  # a character per byte, so that positions are bytes
    spans: list[tuple[int, int]] = []
    at, problem, closed = start, "", False
    if form == "array":
        at = _after_space(data, start + 1)
        closed = text[at : at + 1] == "]"
        at += closed
    while not closed:
        try:
            _, end = LENIENT.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            problem = syntax(error, at)
            break
        spans.append((at, end))
        at = _after_space(data, end)
        if form == "object":
            break
        if text[at : at + 1] not in (",", "]"):
            problem = f"{_shown(data, at, 1) if text[at : at + 1] else 'the end of the file'} after a clip"
            break
        closed, at = text[at] == "]", _after_space(data, at + 1)
    if not problem and at < len(data):
        problem = f"{_shown(data, at, 20)} after the end"
    why = ClipError("JSON", problem, "a clip; what follows was not read")
    return Index(form, _spans(spans), [(len(spans), why, (at, len(data)))] if problem else [])


def _after_space(data: Data, at: int) -> int:
    match = _SPACE.match(data, at)
    return match.end() if match else at


def _shown(data: Data, at: int, length: int) -> str:
    return brief(data[at : at + 4 * length].decode("utf-8", "surrogateescape")[:length])
