"""What `stream` sees and hears: frames at the model's rate from a video file, a folder of images, an Arrow file or a
camera, and the user's lines from a text stream.

Files give the frames that training gives (`frames.PixelFrames`, bit for bit), in order, one at a time: a picture is
decoded when its frame is asked for. With `realtime`, and from a camera always, the clock decides: frame i is given
i/fps seconds after the first; one who asks late gets the frame that is due, and is told how many went by. Simple
rather than fast: decoding does not run ahead of the model (but FFmpeg's threads do, by a few pictures).

    S side of the model's square input in pixels
"""

from __future__ import annotations

import codecs
import heapq
import io
import math
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
from PIL import Image

from pipeline.errors import InputError
from pipeline.media import UNDECODABLE, VIDEOS, Pixels, fit, open_pictures
from pipeline.video import VideoTimes, shown

SHOWN = 640  # pixels, the longest side of `Seen.image`: enough to look at, 1.2 MB
MIN_FPS, MAX_FPS = 0.01, 1000.0
FIRST_PICTURE_S = 10.0  # that a camera may take to wake up
STALLED_S = 5.0  # without a new picture: a camera that was pulled out may say nothing
CUT_OFF = 0.9  # of the seconds that a video announces: one with fewer has lost its end
LINE = 1000  # characters of a user's line that are kept
WAITING = 1000  # lines that are read ahead


@dataclass(frozen=True)
class Seen:
    """One frame, as the model and as people see it."""

    frame: int  # of the model's, from 0; after skipped ones it jumps
    time_s: float  # frame / fps
    pixels: Pixels  # uint8 RGB [3, S, S]
    image: Image.Image  # RGB, uncropped, longest side at most SHOWN
    skipped: int  # frames that went by since the one before


class Feed:
    """Frames in order, to be iterated once; a context manager. InputError while iterating for a frame that can't be
    had: those before it have been given."""

    def __init__(self, name: str, fps: float, frames: Iterator[Seen], close: Callable[[], None]):
        self.name, self.fps, self._frames, self._close = name, fps, frames, close

    def __iter__(self) -> Iterator[Seen]:
        return self._frames

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file or the camera; again does nothing."""
        self._close()


def open_feed(
    where: str, fps: float, side: int, realtime: bool = False, source_fps: float | None = None, first: int = 0
) -> Feed:
    """Frames of `where` at `fps`: a video file, a folder of images, an .arrow file, or a camera's number ("0"; a
    folder of that name is "./0").

    source_fps: at which a folder's images or an Arrow file's rows were taken; without it each is a frame. Frame i is
    the last image taken by i/fps seconds. realtime: give no frame of a file before its time, and skip those that the
    caller is too slow for. first: the frame that a file is read from. InputError, one line, where it can't be read
    or is none of these.
    """
    for name, rate in (("fps", fps), ("source fps", source_fps)):
        if rate is not None and not MIN_FPS <= rate <= MAX_FPS:
            raise InputError(f"{where}: {name} {rate:g}, expected {MIN_FPS:g} to {MAX_FPS:g}")
    if where.isascii() and where.isdigit():
        return _camera_feed(int(where), fps, side)
    return _file_feed(Path(where), fps, side, realtime, source_fps, first)


# ---- files -------------------------------------------------------------------------------------------


def _file_feed(path: Path, fps: float, side: int, realtime: bool, source_fps: float | None, first: int) -> Feed:
    if not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; expected a video, a folder of images or a camera's number")
    if path.is_file() and path.suffix.lower() not in (".arrow", *VIDEOS):
        raise InputError(
            f"{path}: ends in neither .arrow nor {' '.join(VIDEOS)}; rename it if it is one, or convert it: "
            f"ffmpeg -i IT -c:v libx264 OUT.mp4"
        )
    is_video = path.suffix.lower() in VIDEOS and not path.is_dir()
    if is_video and source_fps is not None:
        raise InputError(f"{path}: a video says itself when its pictures are shown; leave the source fps out")
    opened = open_pictures(path)
    images = 0 if is_video else opened.count(fps)
    if not is_video and not images:
        opened.close()
        raise InputError(f"{path}: holds no frame; expected images (.jpg, .png), an .arrow file or a video")
    times = None if is_video else _evenly(images, source_fps or fps)
    count = opened.count(fps) if times is None else times.count(fps)
    announced = getattr(opened, "announced_s", 0.0)
    if first >= count:
        opened.close()
        raise InputError(f"{path}: {count} frames at {fps:g} fps, expected more than {first}; is this its video?")

    def frames() -> Iterator[Seen]:
        for number, skipped in _numbers(count, fps, realtime, first):
            try:
                image = opened.image(number if times is None else times.picture(number, fps), fps)
            except UNDECODABLE as error:
                raise InputError(f"{path} frame {number}: {opened.wrong} ({error}); get the file again") from None
            yield _seen(image, number, fps, side, skipped)
        if announced > 1 and count / fps < CUT_OFF * announced:
            raise InputError(f"{path}: ends after {count / fps:g} of {announced:g} seconds; get the whole file")

    return Feed(str(path), fps, frames(), opened.close)


def _evenly(images: int, source_fps: float) -> VideoTimes:
    return VideoTimes(np.arange(images), np.zeros(1, np.int64), 1 / source_fps, images)


def _seen(image: Image.Image, number: int, fps: float, side: int, skipped: int) -> Seen:
    pixels = fit(image, side)  # of the whole image, as in training
    image.thumbnail((SHOWN, SHOWN), Image.Resampling.BILINEAR)
    return Seen(number, number / fps, pixels, image, skipped)


def _numbers(count: int | None, fps: float, realtime: bool, first: int = 0) -> Iterator[tuple[int, int]]:
    """(frame, skipped before it) from `first` up to `count`; in real time each when it is due."""
    start, last = time.monotonic() - first / fps, first - 1
    while count is None or last + 1 < count:
        number = last + 1
        if realtime and number > first:
            early = number / fps - (time.monotonic() - start)
            if early > 0:
                time.sleep(early)
            else:
                number = max(number, math.floor((time.monotonic() - start) * fps))
            if count is not None and number >= count:
                return
        yield number, number - last - 1
        last = number


# ---- cameras -----------------------------------------------------------------------------------------


def _camera_feed(index: int, fps: float, side: int) -> Feed:
    newest = _Newest(f"camera {index}", _open_camera(index))

    def frames() -> Iterator[Seen]:
        newest.wait_for_one()
        for number, skipped in _numbers(None, fps, realtime=True):
            yield _seen(newest.image(), number, fps, side, skipped)

    return Feed(newest.name, fps, frames(), newest.close)


def _open_camera(index: int) -> Any:
    """An open PyAV container. InputError where there is no such camera, or it does not let us in."""
    import av

    linux = sys.platform.startswith("linux")
    device = f"/dev/video{index}" if linux else f"{index}:none"
    if linux and not os.path.exists(device):
        there = ", ".join(sorted(str(path) for path in Path("/dev").glob("video*"))) or "none"
        raise InputError(f"camera {index}: no {device}, cameras there: {there}; for a file or folder write ./{index}")
    try:
        container = av.open(device, format="v4l2" if linux else "avfoundation")
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"camera {index}: {device} can't be opened ({reason}); is another program using it?") from None
    if not container.streams.video:
        raise InputError(f"camera {index}: {device} gives no pictures; try another number")
    return container


class _Newest:
    """The newest picture of a camera. A thread reads on, whether or not anybody looks, so that no picture is old."""

    def __init__(self, name: str, container: Any) -> None:
        self.name, self._container = name, container
        self._new = threading.Condition()
        self._picture: Any = None
        self._when = time.monotonic()
        self._wrong: str | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._read, name=name, daemon=True)
        self._thread.start()

    def wait_for_one(self) -> None:
        with self._new:
            self._new.wait_for(lambda: self._picture is not None or self._wrong is not None, FIRST_PICTURE_S)

    def image(self) -> Image.Image:
        """RGB. InputError where the camera has stopped or has never started."""
        with self._new:
            picture, wrong, silent = self._picture, self._wrong, time.monotonic() - self._when
        if wrong is None and (picture is None or silent > STALLED_S):
            wrong = f"no picture for {silent:.0f} seconds"
        if wrong is not None:
            raise InputError(f"{self.name}: {wrong}; is it still plugged in?")
        return shown(picture)

    def close(self) -> None:
        """The thread ends with the next picture; a camera that gives none is left to the end of the process."""
        self._stop = True
        self._thread.join(1.0)

    def _read(self) -> None:
        wrong = "it gave its last picture"
        try:
            for picture in self._container.decode(video=0):
                if self._stop:
                    break
                with self._new:
                    self._picture, self._when = picture, time.monotonic()
                    self._new.notify_all()
        except Exception as error:  # of the driver, in a thread: told by `image`
            wrong = str(getattr(error, "strerror", None) or error)
        with self._new:
            self._wrong = wrong
            self._new.notify_all()
        self._container.close()


# ---- what the user says ------------------------------------------------------------------------------

_AT = re.compile(r"@([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s+(.*)")


class Listener:
    """A user's lines from a text stream (None: nobody talks), read by a thread.

    "text" is heard before the next frame, "@12.5 text" before the first frame with time_s >= 12.5. Empty lines are
    not; a line keeps its first LINE characters; WAITING lines at most are read ahead, so that those after so many for
    later wait with them. A file, or text in memory, is a script: it is read before the first frame, which hears all of
    its plain lines, so it says the same at each run. From a terminal or a pipe, lines are heard when they come. The end
    of the stream is not the end of the frames.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._lines: list[tuple[float, int, str]] = []  # a heap: (time, place in the stream, text)
        self._changed = threading.Condition()
        self._ended = stream is None
        self._script = _is_script(stream)
        if stream is not None:
            threading.Thread(target=self._read, args=(stream,), name="listener", daemon=True).start()

    def wait(self) -> None:
        """Until a script is read."""
        with self._changed:
            if self._script:
                self._changed.wait_for(self._all_known)

    def heard(self, time_s: float) -> list[str]:
        """The lines to be heard before the frame at `time_s`, in order: by time, then as they were said."""
        self.wait()
        with self._changed:
            due = []
            while self._lines and self._lines[0][0] <= time_s:
                due.append(heapq.heappop(self._lines)[2])
            self._changed.notify_all()
        return due

    def _all_known(self) -> bool:
        return self._ended or len(self._lines) >= WAITING

    def _read(self, stream: TextIO) -> None:
        for place, line in enumerate(_lines(stream)):
            at = _AT.fullmatch(line)
            with self._changed:
                self._changed.wait_for(lambda: len(self._lines) < WAITING)
                heapq.heappush(self._lines, (float(at[1]), place, at[2]) if at else (-math.inf, place, line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _is_script(stream: TextIO | None) -> bool:
    """Whether it ends by itself."""
    try:
        return stream is not None and stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):  # text in memory
        return True


def _lines(stream: TextIO) -> Iterator[str]:
    """Its lines that say something, without their ends, cut to LINE characters."""
    rest = ""
    for chunk in _chunks(stream):
        *whole, rest = (rest + chunk).split("\n")
        for line in whole:
            if said := line[:LINE].strip():
                yield said
        rest = rest[:LINE]
    if said := rest.strip():
        yield said


def _chunks(stream: TextIO) -> Iterator[str]:
    """Past Python's own buffer, whose lock a thread that waits for a line would still hold when the process ends."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        with suppress(OSError, ValueError):  # one that can't be read, or was closed
            yield from iter(lambda: stream.read(io.DEFAULT_BUFFER_SIZE), "")
        return
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with suppress(OSError):  # a terminal that went away
        while content := os.read(descriptor, io.DEFAULT_BUFFER_SIZE):
            yield decoder.decode(content)
    yield decoder.decode(b"", final=True)
