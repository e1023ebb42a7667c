"""What lies on disk of a video (Arrow file, video file, folder of images): how many frames, and some as pictures.

Nothing is decoded: rows, names or packets are counted, those of a 10-minute video at 30 fps in 0.1 s.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from pipeline.schema import VIDEOS, images_in, open_video, video_times


def count_frames(path: Path, fps: float = 2.0) -> int | None:
    """Frames of what `find_frames` found; None: not readable. `fps` matters to video files alone: how many frames
    a player's time holds at that rate."""
    try:
        if path.is_dir():
            return len(images_in(path))
        if path.suffix.lower() in VIDEOS:
            container, stream = open_video(path)
            with container:
                return video_times(container, stream).count(fps)
        return sum(batch.num_rows for batch in _batches(path))
    except (pa.ArrowInvalid, OSError, ValueError, OverflowError):
        return None


def read_frames(path: Path, frames: Iterable[int]) -> list[str]:
    """The base64 JPEGs of some frames (absolute numbers) from an Arrow file's column `frame`; of other files none:
    they would have to be decoded."""
    if path.is_dir() or path.suffix.lower() in VIDEOS:
        return []
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
