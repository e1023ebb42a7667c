"""Pixels of a clip's frames, from the Arrow file, the video file or the folder of images that `pipeline.media` finds.

Decoded 64x64 frames cost 12 KB each, so a small data set is decoded once and kept, up to `cache_bytes`; nothing is
evicted, as under epoch-wise access an LRU cache that is too small never hits. At 512x512 a frame is 786 KB and decoding
costs milliseconds: run the vision tower once instead (`encode`), train from its features.

    F frames    S side of the model's square input in pixels
"""

from __future__ import annotations

from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.media import UNDECODABLE, Opened, Pixels, find_frames, fit, open_pictures
from pipeline.schema import MANIFEST


class FrameSource(Protocol):
    """What can give a clip's frames: `PixelFrames`, `BlankFrames`, `features.CachedFeatures`; tests have others."""

    def load(self, clip: ClipExample, start: int, end: int) -> npt.NDArray[Any]:
        """The frames [start, end) of the clip's video (absolute numbers): uint8 RGB [F, 3, S, S], or the vision
        tower's features, float16 or float32 [F, k, D]."""
        ...


class BlankFrames:
    """For an arm without images: no video is looked for; a frame is a byte (`ProspectModel.frame_features`)."""

    def load(self, clip: ClipExample, start: int, end: int) -> npt.NDArray[np.uint8]:
        """uint8 [F, 1]."""
        return np.zeros((end - start, 1), np.uint8)


class PixelFrames:
    """Frames below `root`; at most `open_files` are open. May be pickled; files and cached frames stay behind."""

    def __init__(self, root: Path, side: int, cache_bytes: int = 512 << 20, open_files: int = 8) -> None:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder, expected the videos' frames; set --frames-root")
        self.root, self.side = root, side
        self._cache_bytes, self._open_files = cache_bytes, open_files
        self._cache: dict[tuple[Path, int, float], Pixels] = {}
        self._paths: dict[tuple[str, str | None, str], Path] = {}
        self._open: OrderedDict[Path, Opened] = OrderedDict()

    def load(self, clip: ClipExample, start: int, end: int) -> Pixels:
        """uint8 [F, 3, S, S]; InputError for a missing or short file and for a frame that can't be decoded."""
        path = self.find(clip)
        opened = self._opened(path)
        if end > (count := opened.count(clip.fps)):
            raise InputError(
                f"{path}: {count} frames, but clip {clip.clip_id} needs frame {end - 1}; get the whole file, or "
                f"preprocess with --frames-root, which reports such clips"
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

    def count(self, clip: ClipExample) -> int:
        """Frames that the clip's video has at the clip's fps."""
        return self._opened(self.find(clip)).count(clip.fps)

    def _frame(self, path: Path, opened: Opened, number: int, fps: float) -> Pixels:
        if (cached := self._cache.get((path, number, fps))) is not None:
            return cached
        try:
            pixels = fit(opened.image(number, fps), self.side)
        except UNDECODABLE as error:
            raise InputError(f"{path} frame {number}: {opened.wrong} ({error}); get the file again") from None
        if (len(self._cache) + 1) * pixels.nbytes <= self._cache_bytes:
            self._cache[path, number, fps] = pixels
        return pixels

    def _opened(self, path: Path) -> Opened:
        if path not in self._open:
            if len(self._open) >= self._open_files:
                self._open.popitem(last=False)[1].close()
            self._open[path] = open_pictures(path)
        self._open.move_to_end(path)
        return self._open[path]

    def __reduce__(self) -> tuple[Any, ...]:
        return PixelFrames, (self.root, self.side, self._cache_bytes, self._open_files)


def open_frames(manifest: dict[str, Any], root: Path | None, side: int) -> PixelFrames:
    """Frames below `root`, or where the manifest says that `preprocess` looked for them."""
    stored = manifest.get("options", {}).get("frames_root")
    if root is None and stored is None:
        raise InputError(f"{MANIFEST}: names no frames_root; say where the videos' frames are: --frames-root")
    return _pixel_frames(Path(stored) if root is None else root, side)


_pixel_frames = lru_cache(maxsize=2)(PixelFrames)  # what one run of a process decoded the next one has
