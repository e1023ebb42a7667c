"""Where a clip's pixels come from: ProAssist's Arrow files, one row per video frame, base64 JPEG in `frame`.

Files are memory-mapped and only the asked rows are decoded; decoded 64x64 frames cost 12 KB each, so a small
data set is decoded once and kept (up to `cache_bytes`, first come, never evicted: under epoch-wise access an
LRU that is too small would never hit). Row i of a file is frame i of the video.

    F frames    S side of the model's square input in pixels
"""

from __future__ import annotations

import base64
import io
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps

from pipeline.schema import MANIFEST, find_frames
from trainer.clips import ClipExample
from trainer.errors import TrainerError

Pixels = npt.NDArray[np.uint8]
MAX_PIXELS = 32_000_000  # of one JPEG before it is decoded: eight times 4 MP, far below a decompression bomb
OPEN_FILES = 32


class FrameSource(Protocol):
    """Anything that can give a clip's frames; `ArrowFrames` is one, tests have another."""

    def load(self, clip: ClipExample, start: int, end: int) -> Pixels:
        """uint8 [F, 3, S, S]: the RGB frames [start, end) of the clip's video (absolute numbers)."""
        ...


class ArrowFrames:
    """Frames from Arrow IPC files (stream or file format) below `root`, as `find_frames` finds them."""

    def __init__(self, root: Path, side: int, cache_bytes: int = 512 << 20) -> None:
        if not root.is_dir():
            raise TrainerError(f"{root}: no such folder, expected the videos' .arrow files; set --frames-root")
        self.root, self.side = root, side
        self._cache: dict[tuple[Path, int], Pixels] = {}
        self._cache_frames = cache_bytes // (3 * side * side)
        self._open: OrderedDict[Path, pa.ChunkedArray] = OrderedDict()

    def load(self, clip: ClipExample, start: int, end: int) -> Pixels:
        """uint8 [F, 3, S, S]; TrainerError for a missing or short file and for a frame that is no JPEG."""
        path = find_frames(self.root, clip.video_uid, clip.frames_file)
        if path is None:
            raise TrainerError(
                f"clip {clip.clip_id}: no frames of {clip.frames_file or clip.video_uid} below {self.root}; "
                f"put the .arrow file there, or set --frames-root"
            )
        column = self._column(path)
        if end > len(column):
            raise TrainerError(
                f"{path}: {len(column)} frames, but clip {clip.clip_id} needs frame {end - 1}; get the whole "
                f"file, or preprocess with --frames-root, which reports such clips"
            )
        return np.stack([self._frame(path, column, i) for i in range(start, end)])

    def _column(self, path: Path) -> pa.ChunkedArray:
        if path not in self._open:
            self._open[path] = _open_column(path)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def _frame(self, path: Path, column: pa.ChunkedArray, number: int) -> Pixels:
        cached = self._cache.get((path, number))
        if cached is not None:
            return cached
        try:
            pixels = decode(column[number].as_py(), self.side)
        except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
            raise TrainerError(f"{path} frame {number}: no base64 JPEG ({error}); get the file again") from None
        if len(self._cache) < self._cache_frames:
            self._cache[path, number] = pixels
        return pixels


def open_frames(manifest: dict[str, Any], root: Path | None, side: int) -> ArrowFrames:
    """Frames below `root`, or where the manifest says that `preprocess` looked for them."""
    stored = manifest.get("options", {}).get("frames_root")
    if root is None and stored is None:
        raise TrainerError(f"{MANIFEST}: names no frames_root; say where the videos' .arrow files are: --frames-root")
    return ArrowFrames(Path(stored) if root is None else root, side)


def _open_column(path: Path) -> pa.ChunkedArray:
    """The `frame` column, memory-mapped: only the rows that are read are ever loaded."""
    try:
        source = pa.memory_map(str(path))
        is_file_format = source.read(6) == b"ARROW1"
        source.seek(0)
        table = (pa.ipc.open_file if is_file_format else pa.ipc.open_stream)(source).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise TrainerError(f"{path}: not an Arrow IPC file ({error}); get the file again") from None
    if "frame" not in table.column_names:
        raise TrainerError(f"{path}: columns {', '.join(table.column_names)}, expected one named frame")
    return table["frame"]


def decode(text: str, side: int) -> Pixels:
    """uint8 [3, S, S] from a base64 JPEG: centre-cropped, then resized. Raises ValueError, OSError."""
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["JPEG"]) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are decoded")
        square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
