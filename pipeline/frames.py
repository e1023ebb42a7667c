"""How many frames a video's Arrow file holds, without decoding one (record batch headers only)."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa


def count_frames(path: Path) -> int | None:
    """Rows of an Arrow IPC stream (as HF datasets and ProAssist write it) or file; None: not readable."""
    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
            source.seek(0)
            return sum(batch.num_rows for batch in pa.ipc.open_stream(source))
    except (pa.ArrowInvalid, OSError, ValueError):
        return None
