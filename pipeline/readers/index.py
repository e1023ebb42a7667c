"""JSON as it is found: where the clips of a file lie, and one clip's bytes as a typed struct.

A file is a JSON array, one clip object, or JSON Lines, told apart by content. msgspec finds the byte spans of its clips
without building one (a memory-mapped array of 1.1 GB: 0.6 s, 24 bytes a clip), so that one bad clip never costs its
neighbours. An array that it refuses as a whole (one NaN, a byte-order mark, a truncated tail) is read into memory and
walked by the standard library, two to four times slower, up to where its syntax breaks; the rest is one refusal.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import pyarrow as pa

from pipeline.readers.clip import ClipError, Range, brief
from pipeline.schema import ROLES, STATES, TRANSITIONS

_BOM: Final = b"\xef\xbb\xbf"
_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_NEXT_LINE: Final = re.compile(rb'\n\{[ \t]*"')  # a pretty-printed object opens no other at a line's start
NOT_STRICT: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
NOT_JSON: Final = (ValueError, RecursionError)  # of the standard library
T = TypeVar("T")


def _number(digits: str) -> int | float | bytes:
    """193.0 is an integer; a number that is none (1e400, and NaN below) is bytes, a type that no field has."""
    value = float(digits)
    if not math.isfinite(value):
        return digits.encode()
    if not value.is_integer():
        return value
    return int(digits) if digits.lstrip("-").isdigit() else int(value)


LENIENT: Final = json.JSONDecoder(parse_int=_number, parse_float=_number, parse_constant=str.encode)
Index = tuple[np.ndarray, tuple[int, ClipError, Range] | None]


def index(path: Path) -> Index:
    """(int64 [clips, 2]: the bytes of a file's clips, in order; number, reason and bytes of what is not JSON, or None).

    Raises ClipError where the file is empty, or begins like none of JSON array, object and JSON Lines.
    """
    if not path.stat().st_size:
        raise ClipError("file", "an empty file (or a pipe)", "clips as JSON; check how it was made")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = _after_space(data, len(_BOM) if data[: len(_BOM)] == _BOM else 0)
        head = data[start : start + 20]
        if head.startswith(b"["):
            return _array(data, start)
        if _NEXT_LINE.search(data):
            return np.array(list(_lines(data, start)), np.int64), None
        if head.startswith(b"{"):
            return _walk(data, start, b"")
    raise ClipError("file", brief(head), "clips as a JSON array, one object or lines, in plain UTF-8")


def _array(data: mmap.mmap, start: int) -> Index:
    try:
        clips = msgspec.json.decode(data, type=list[msgspec.Raw])
    except NOT_STRICT:
        return _walk(data, start, b"]")
    spans = [(clip.address, clip.address + clip.size) for clip in map(pa.py_buffer, clips)]
    return np.array(spans, np.int64).reshape(-1, 2) - pa.py_buffer(data).address, None


def _lines(data: mmap.mmap, start: int) -> Iterator[Range]:
    """The bytes of each line that is not blank; lines end at \\n alone (U+2028 may stand in a text)."""
    while start < len(data):
        stop = data.find(b"\n", start)
        stop = len(data) if stop < 0 else stop
        if data[start:stop].strip():
            yield start, stop
        start = stop + 1


def _walk(data: mmap.mmap, at: int, close: bytes) -> Index:
    """The clips of an array that msgspec refuses (close: b"]"), up to where its syntax breaks, or one object (b"")."""
    text = str(data, "latin-1")  # a character per byte, so that positions are bytes
    spans: list[Range] = []
    problem = ""
    at = _after_space(data, at + len(close))
    while text[at : at + 1] not in ("]", ""):
        try:
            spans.append((at, LENIENT.raw_decode(text, at)[1]))
        except NOT_JSON as error:
            problem = str(error)
            break
        at = _after_space(data, spans[-1][1])
        if not close or text[at : at + 1] != ",":
            break
        at = _after_space(data, at + 1)
    rest = data[at:].strip()
    found = problem or (brief(rest[:20]) if rest else "the end of the file")
    why = ClipError("JSON", found, "a clip, or the end after the last; what follows was not read")
    broken = None if rest == close else (len(spans), why, (at, len(data)))
    return np.array(spans, np.int64).reshape(-1, 2), broken


def _after_space(data: mmap.mmap, at: int) -> int:
    match = _SPACE.match(data, at)
    return match.end() if match else at


def parse(raw: bytes, kind: type[T]) -> T:
    """`raw` as a struct of this kind; what msgspec refuses is read by the standard library. Raises ClipError."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except NOT_STRICT:
        tree = lenient(raw)
    try:
        record = msgspec.convert(tree, kind)
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
    except NOT_JSON as error:
        raise ClipError("JSON", str(error), "a JSON object") from None


def _explained(error: msgspec.ValidationError, tree: Any) -> ClipError:
    """msgspec's message ("Expected `int`, got `str` - at `$.conversation[3].time`") with the value at that path."""
    message, _, path = str(error).partition(" - at `$")
    where = path.removesuffix("`").lstrip(".")
    for key in re.findall(r"[^.\[\]]+", where):
        tree = tree[int(key) if isinstance(tree, list) else key]
    in_turn = re.match(r"conversation\[(\d+)\]\.?(.*)", where)
    turn, where = (int(in_turn[1]), in_turn[2]) if in_turn else (None, where)
    if missing := re.match(r"Object missing required field `(.*)`", message):
        if missing[1] == "role" and "type" in tree:
            expected = "the field role; this is of an early generator version: use a later one's {split}_training.json"
            return ClipError("role", "type in its place", expected, turn)
        return ClipError(f"{where}.{missing[1]}".lstrip("."), "nothing", f"the field {missing[1]}", turn)
    if message.startswith("Invalid enum value"):
        names = STATES if "state" in where else TRANSITIONS if "transition" in where else ROLES
        expected = f"one of {', '.join(names)}"
    else:
        expected = message.removeprefix("Expected ").partition(", got ")[0].replace("`", "").replace(" | null", "")
    return ClipError(where or "clip", brief(tree), expected, turn)
