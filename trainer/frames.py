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

A hostile file is refused in one line before it costs much: what it says of its sizes is held against the bounds here
and in `pipeline.schema`, and against the file. One picture takes at most 0.5 GB; one frame of a video MOST_S.

    F frames    S side of the model's square input in pixels
"""

from __future__ import annotations

import base64
import io
import struct
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from pipeline.media import (
    MAX_BYTES,
    MAX_PIXELS,
    VIDEOS,
    ArrowFrames,
    find_frames,
    images_in,
    open_video,
    regular,
    video_times,
)
from pipeline.schema import MANIFEST
from trainer.clips import ClipExample
from trainer.errors import TrainerError

if TYPE_CHECKING:
    from av import VideoFrame

Pixels = npt.NDArray[np.uint8]
MAX_SIDE = 16_384  # pixels: a picture of 1 x 32M takes three times the memory
MAX_SCANS = 100  # of a JPEG: ten are usual; 100,000, each a pass over all pixels, fit into 8 MB and take minutes
MOST_S = 120.0  # to decode up to one frame that is asked for: minutes of full HD without a keyframe, on two cores
DECODERS = 4  # threads of one open video
WORTH_A_JUMP = 60  # pictures: decoding fewer costs less than seeking past them
TRIED_KEYS = 3
_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"
_KEYFRAMES = "give it keyframes: ffmpeg -i IT -c:v libx264 -g 60 OUT.mp4"
UNDECODABLE = (OSError, ValueError, TypeError, SyntaxError, struct.error, Image.DecompressionBombError)
warnings.filterwarnings("ignore", module=r"PIL\.")  # what it says of an odd file is no line of ours


class FrameSource(Protocol):
    """Anything that can give a clip's frames: `PixelFrames`, `features.CachedFeatures`; tests have another."""

    def check(self, clip: ClipExample) -> None:
        """TrainerError where it can be told without reading that the clip has no frames."""
        ...

    def load(self, clip: ClipExample, start: int, end: int) -> npt.NDArray[Any]:
        """The frames [start, end) of the clip's video (absolute numbers): uint8 RGB [F, 3, S, S], or the vision
        tower's features, float16 or float32 [F, k, D]."""
        ...


class PixelFrames:
    """Frames below `root`, as `find_frames` finds them. May be pickled; files and cached frames stay behind."""

    _open: OrderedDict[Path, _Opened]

    def __init__(self, root: Path, side: int, cache_bytes: int = 512 << 20, open_files: int = 8) -> None:
        if not root.is_dir():
            raise TrainerError(f"{root}: no such folder, expected the videos' frames; set --frames-root")
        self.root, self.side, self._open_files = root, side, open_files
        self._cache_frames = cache_bytes // (3 * side * side)
        self._forget()

    def load(self, clip: ClipExample, start: int, end: int) -> Pixels:
        """uint8 [F, 3, S, S]; TrainerError for a missing or short file and for a frame that can't be decoded."""
        path = self.find(clip)
        opened = self._opened(path)
        there = opened.count(clip.fps)
        if end > there:
            rate = f" at {clip.fps:g} fps" if isinstance(opened, _Video) else ""
            raise TrainerError(
                f"{path}: {there} frames{rate}, but clip {clip.clip_id} needs frame {end - 1}; get the whole "
                f"file, or preprocess with --frames-root, which reports such clips"
            )
        return np.stack([self._frame(path, opened, number, clip.fps) for number in range(start, end)])

    def find(self, clip: ClipExample) -> Path:
        """The file or folder with the frames of the clip's video; TrainerError where there is none."""
        video = (clip.video_uid, clip.frames_file, clip.dataset)
        if video not in self._paths:
            path = find_frames(self.root, *video)
            if path is None:
                raise TrainerError(
                    f"clip {clip.clip_id}: no frames of {clip.frames_file or clip.video_uid} below {self.root}; put "
                    f"the .arrow file, the video or its folder of images there, or set --frames-root"
                )
            self._paths[video] = path
        return self._paths[video]

    def check(self, clip: ClipExample) -> None:
        """TrainerError where nothing is there for the clip's video; how long it is shows when it is read."""
        self.find(clip)

    def count(self, clip: ClipExample) -> int:
        """Frames that the clip's video has at the clip's fps."""
        return self._opened(self.find(clip)).count(clip.fps)

    def close(self) -> None:
        """Close all files; they are opened again when asked for."""
        while self._open:
            self._open.popitem()[1].close()

    def _frame(self, path: Path, opened: _Opened, number: int, fps: float) -> Pixels:
        cached = self._cache.get((path, number, fps))
        if cached is not None:
            return cached
        try:
            pixels = fit(opened.image(number, fps), self.side)
        except UNDECODABLE as error:
            raise TrainerError(f"{path} frame {number}: {opened.wrong} ({error}); get the file again") from None
        if len(self._cache) < self._cache_frames:
            self._cache[path, number, fps] = pixels
        return pixels

    def _opened(self, path: Path) -> _Opened:
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
        raise TrainerError(f"{MANIFEST}: names no frames_root; say where the videos' frames are: --frames-root")
    return PixelFrames(Path(stored) if root is None else root, side)


def decode(text: str, side: int) -> Pixels:
    """uint8 [3, S, S] from a base64 JPEG: centre-cropped, then resized. Raises ValueError, OSError."""
    return fit(_read_base64(text), side)


def _read_base64(text: str | memoryview) -> Image.Image:
    if len(text) > 4 * MAX_BYTES // 3:
        raise ValueError(f"{len(text):,} characters, at most {4 * MAX_BYTES // 3:,} are read")
    return _read_image(base64.b64decode(text, validate=True), "JPEG")


def fit(image: Image.Image, side: int) -> Pixels:
    square = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _read_image(content: bytes, *formats: str) -> Image.Image:
    _check_scans(content)
    with Image.open(io.BytesIO(content), formats=formats) as image:
        check_size(image.width, image.height)
        return image.convert("RGB")


def check_size(width: int, height: int) -> None:
    """ValueError for a picture that is not to be decoded."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded, {MAX_SIDE} a side")


def _check_scans(content: bytes) -> None:
    if content[:2] == _JPEG and content.count(_SCAN) > MAX_SCANS:
        raise ValueError(f"a JPEG of {content.count(_SCAN):,} scans, at most {MAX_SCANS} are decoded")


# ---- the three kinds of files ------------------------------------------------------------------------


class _Opened(Protocol):
    wrong: str  # what a frame is that can't be decoded

    def count(self, fps: float) -> int: ...

    def image(self, number: int, fps: float) -> Image.Image:
        """Frame `number`, RGB. Raises one of UNDECODABLE."""
        ...

    def close(self) -> None: ...


def open_file(path: Path) -> _Opened:
    """TrainerError where it is not what its name says."""
    try:
        if path.is_dir():
            return _Images(path)
        return _Video(path) if path.suffix.lower() in VIDEOS else _Arrow(path)
    except (OSError, ValueError) as error:
        if isinstance(error, TrainerError):
            raise
        raise TrainerError(f"{path}: {error}") from None


class _Arrow:
    wrong = "no base64 JPEG"

    def __init__(self, path: Path) -> None:
        self._rows = ArrowFrames(path)

    def count(self, fps: float) -> int:
        return len(self._rows)

    def image(self, number: int, fps: float) -> Image.Image:
        return _read_base64(self._rows.row(number))

    def close(self) -> None:
        del self._rows


class _Images:
    wrong = "no JPEG or PNG"

    def __init__(self, folder: Path) -> None:
        self._files = images_in(folder)

    def count(self, fps: float) -> int:
        return len(self._files)

    def image(self, number: int, fps: float) -> Image.Image:
        file = self._files[number]
        size = regular(file).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size:,} bytes, at most {MAX_BYTES:,} are read")
        return _read_image(file.read_bytes(), "JPEG", "PNG")

    def close(self) -> None:
        self._files = []


class _Video:
    """Asked for frames in order, the file is decoded once; a jump starts decoding at the last keyframe before it.
    A picture that the decoder finds damaged is refused, and those built on it up to the next keyframe with it."""

    wrong = "can't be decoded"
    _at: int  # place of the picture that was asked for last, `_shown`; -1: none yet
    _shown: VideoFrame | None
    _next: tuple[int, VideoFrame] | None  # decoded, but not yet asked for
    _coming: Iterator[tuple[int, VideoFrame]]
    _deadline: float  # of time.monotonic, for the frame that is asked for

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container, self._stream = open_video(path)
        self._times = video_times(self._container, self._stream)
        self._start_over()

    def count(self, fps: float) -> int:
        return self._times.count(fps)

    @property
    def announced_s(self) -> float:
        """Seconds of pictures that the file's header speaks of; 0 where it does not."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0

    def image(self, number: int, fps: float) -> Image.Image:
        import av

        self._deadline = time.monotonic() + MOST_S
        try:
            picture = self._picture(self._times.picture(number, fps))
        except (av.FFmpegError, ValueError) as error:
            self._at = len(self._times.pts)  # the decoder is lost: the next call seeks
            raise ValueError(getattr(error, "strerror", None) or str(error)) from None
        check_size(picture.width, picture.height)
        image = picture.to_image()
        return image.rotate(picture.rotation, expand=True) if picture.rotation else image

    def close(self) -> None:
        self._container.close()

    def _picture(self, wanted: int) -> VideoFrame:
        """The last picture that is not after `wanted`, a place in time."""
        keys = self._times.keys
        key = keys[keys <= wanted].max(initial=0)
        if self._at > wanted or self._at + WORTH_A_JUMP < key:
            self._jump(wanted)
        while self._at < wanted:
            if self._next is None:
                self._next = next(self._coming, None)
            if self._next is None or self._next[0] > wanted:
                break
            (self._at, self._shown), self._next = self._next, None
        if self._shown is None:
            raise ValueError("there is no picture before it")
        return self._shown

    def _jump(self, wanted: int) -> None:
        """Go on from a keyframe: a container may overshoot (it seeks by decoding time), so from earlier ones too."""
        keys = self._times.keys
        for key in keys[keys <= wanted][: -TRIED_KEYS - 1 : -1].tolist():
            self._container.seek(int(self._times.pts[key]), stream=self._stream)
            self._go_on(key)
            self._next = next(self._coming, None)
            if self._next is not None and self._next[0] <= wanted:
                return
        self._start_over()

    def _start_over(self) -> None:
        self._container.close()
        self._container, self._stream = open_video(self._path)
        codec = self._stream.codec_context
        check_size(codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        codec.thread_type, codec.thread_count = "AUTO", DECODERS
        self._go_on(0)

    def _go_on(self, key: int) -> None:
        self._at, self._shown, self._next = -1, None, None
        self._coming = self._decoded(key)

    def _decoded(self, key: int) -> Iterator[tuple[int, VideoFrame]]:
        """(place in time, picture) from the decoder; those before `key` lack what they are built on."""
        for picture in self._pictures():
            if picture.pts is None:
                raise ValueError("a picture without a time")
            place = int(np.searchsorted(self._times.pts, picture.pts, side="right")) - 1
            if place < key:
                continue
            if picture.is_corrupt:
                raise ValueError(f"picture {place} of the file is damaged")
            yield place, picture

    def _pictures(self) -> Iterator[VideoFrame]:
        is_jpeg = self._stream.codec_context.name == "mjpeg"
        for packet in self._container.demux(self._stream):
            if time.monotonic() > self._deadline:
                raise ValueError(f"{MOST_S:g} seconds were not enough to decode up to it; {_KEYFRAMES}")
            if is_jpeg:
                _check_scans(bytes(packet))
            yield from packet.decode()
