"""A video's Arrow file: how many frames it holds, and single frames as stored (base64 JPEG), without decoding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa


def count_frames(path: Path) -> int | None:
    """Rows of an Arrow IPC stream (as HF datasets and ProAssist write it) or file; None: not readable."""
    try:
        return sum(batch.num_rows for batch in _batches(path))
    except (pa.ArrowInvalid, OSError, ValueError):
        return None


def read_frames(path: Path, frames: Iterable[int]) -> list[str]:
    """The base64 JPEGs of some frames (absolute numbers) from the column `frame`."""
    column = pa.Table.from_batches(list(_batches(path))).column("frame")
    return [column[number].as_py() for number in frames if number < len(column)]


def _batches(path: Path) -> list[pa.RecordBatch]:
    """Record batches over a memory map: headers are read, pages stay on disk until they are used."""
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            return [reader.get_batch(i) for i in range(reader.num_record_batches)]
        source.seek(0)
        return list(pa.ipc.open_stream(source))
