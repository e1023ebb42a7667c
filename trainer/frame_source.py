"""Where a clip's pixels come from: an Arrow file, a video file or a folder of images per video, told apart by
what lies below `--frames-root`.

    NAME.arrow         ProAssist's: one row per frame, base64 JPEG in `frame`; row i is frame i
    NAME.mp4, .mkv ..  sampled by timestamp: frame i is the picture that a player shows at i/fps seconds
    NAME/              JPEG or PNG, numbered from 0 or 1 without a gap

Frames are cropped to a square around the centre, then resized. Files are opened when asked for, eight at a
time; a window that starts where the last one ended is read on without seeking. Decoded 64x64 frames cost 12 KB
each, so a small data set is decoded once and kept (up to `cache_bytes`, first come, never evicted: under
epoch-wise access an LRU that is too small would never hit). At 512x512 a frame is 786 KB and decoding costs
milliseconds: run the tower once instead (`encode`) and train from its features.

Decoding is `pipeline.media`'s and `pipeline.video`'s.

    F frames    S side of the model's square input in pixels
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.media import UNDECODABLE, Opened, Pixels, Video, find_frames, fit, open_pictures, read_base64
from pipeline.schema import MANIFEST


class FrameSource(Protocol):
    """Anything that can give a clip's frames: `PixelFrames`, `features.CachedFeatures`; tests have another."""

    def check(self, clip: ClipExample) -> None:
        """InputError where it can be told without reading that the clip has no frames."""
        ...

    def load(self, clip: ClipExample, start: int, end: int) -> npt.NDArray[Any]:
        """The frames [start, end) of the clip's video (absolute numbers): uint8 RGB [F, 3, S, S], or the vision
        tower's features, float16 or float32 [F, k, D]."""
        ...


class PixelFrames:
    """Frames below `root`, as `find_frames` finds them. May be pickled; files and cached frames stay behind."""

    _open: OrderedDict[Path, Opened]

    def __init__(self, root: Path, side: int, cache_bytes: int = 512 << 20, open_files: int = 8) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder, expected the videos' frames; set --frames-root")
        self.root, self.side, self._open_files = root, side, open_files
        self._cache_frames = cache_bytes // (3 * side * side)
        self._forget()

    def load(self, clip: ClipExample, start: int, end: int) -> Pixels:
        """uint8 [F, 3, S, S]; InputError for a missing or short file and for a frame that can't be decoded."""
        path = self.find(clip)
        opened = self._opened(path)
        there = opened.count(clip.fps)
        if end > there:
            rate = f" at {clip.fps:g} fps" if isinstance(opened, Video) else ""
            raise InputError(
                f"{path}: {there} frames{rate}, but clip {clip.clip_id} needs frame {end - 1}; get the whole "
                f"file, or preprocess with --frames-root, which reports such clips"
            )
        return np.stack([self._frame(path, opened, number, clip.fps) for number in range(start, end)])

    def find(self, clip: ClipExample) -> Path:
        """The file or folder with the frames of the clip's video; InputError where there is none."""
        video = (clip.video_uid, clip.frames_file, clip.dataset)
        if video not in self._paths:
            path = find_frames(self.root, *video)
            if path is None:
                raise InputError(
                    f"clip {clip.clip_id}: no frames of {clip.frames_file or clip.video_uid} below {self.root}; put "
                    f"the .arrow file, the video or its folder of images there, or set --frames-root"
                )
            self._paths[video] = path
        return self._paths[video]

    def check(self, clip: ClipExample) -> None:
        """InputError where nothing is there for the clip's video; how long it is shows when it is read."""
        self.find(clip)

    def count(self, clip: ClipExample) -> int:
        """Frames that the clip's video has at the clip's fps."""
        return self._opened(self.find(clip)).count(clip.fps)

    def close(self) -> None:
        """Close all files; they are opened again when asked for."""
        while self._open:
            self._open.popitem()[1].close()

    def _frame(self, path: Path, opened: Opened, number: int, fps: float) -> Pixels:
        cached = self._cache.get((path, number, fps))
        if cached is not None:
            return cached
        try:
            pixels = fit(opened.image(number, fps), self.side)
        except UNDECODABLE as error:
            raise InputError(f"{path} frame {number}: {opened.wrong} ({error}); get the file again") from None
        if len(self._cache) < self._cache_frames:
            self._cache[path, number, fps] = pixels
        return pixels

    def _opened(self, path: Path) -> Opened:
        if path not in self._open:
            self._open[path] = open_file(path)
            if len(self._open) > self._open_files:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(path)
        return self._open[path]

    def _forget(self) -> None:
        self._cache: dict[tuple[Path, int, float], Pixels] = {}
        self._paths: dict[tuple[str, str | None, str], Path] = {}
        self._open = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("root", "side", "_open_files", "_cache_frames")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def open_frames(manifest: dict[str, Any], root: Path | None, side: int) -> PixelFrames:
    """Frames below `root`, or where the manifest says that `preprocess` looked for them."""
    stored = manifest.get("options", {}).get("frames_root")
    if root is None and stored is None:
        raise InputError(f"{MANIFEST}: names no frames_root; say where the videos' frames are: --frames-root")
    return PixelFrames(Path(stored) if root is None else root, side)


def decode(text: str, side: int) -> Pixels:
    """uint8 [3, S, S] from a base64 JPEG: centre-cropped, then resized. Raises ValueError, OSError."""
    return fit(read_base64(text), side)


def open_file(path: Path) -> Opened:
    """InputError where it is not what its name says."""
    try:
        return open_pictures(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
