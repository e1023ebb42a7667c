"""What lies on disk of a video (Arrow file, video file, folder of images): how many frames, and some as pictures.

Nothing is decoded: rows, names or packets are counted, those of a 10-minute video at 30 fps in 0.1 s.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.schema import VIDEOS, ArrowFrames, images_in, open_video, video_times


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
        return len(ArrowFrames(path))
    except (OSError, ValueError, OverflowError):
        return None


def read_frames(path: Path, frames: Iterable[int]) -> list[str]:
    """The base64 JPEGs of some frames (absolute numbers) from an Arrow file's column `frame`; of other files none:
    they would have to be decoded."""
    if path.is_dir() or path.suffix.lower() in VIDEOS:
        return []
    rows = ArrowFrames(path)
    return [bytes(rows.row(number)).decode() for number in frames if number < len(rows)]
