"""Inputs of `stream`: frames at the model's rate from a file or a camera, and the user's lines.

Files give the frames that training reads, in order, decoded when they are asked for. With `realtime`, and from a camera
always, the clock decides: frame i is given i/fps seconds after the first; a caller that is late gets the frame that is
due and the number of those skipped.

    S side of the model's square input in pixels
"""

from __future__ import annotations

import heapq
import math
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from PIL import Image

from pipeline.errors import InputError
from pipeline.media import UNDECODABLE, VIDEOS, Pixels, fit, open_pictures
from pipeline.video import shown

SHOWN_SIDE = 640  # pixels, the longest side of `VideoFrame.image`
MIN_FPS, MAX_FPS = 0.01, 1000.0
ROUNDING_S = 6e-4  # by which an image's time may be too late, as for videos
FIRST_PICTURE_S = 10.0  # for a camera to start
STALLED_S = 5.0  # without a new picture: a camera that was pulled out may report nothing
CUT_OFF = 0.9  # of the seconds that a video's header announces: one with fewer has lost its end
MAX_LINE = 1000  # characters that are kept of a user's line
_TIMED = re.compile(r"@([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s+(.*)")


@dataclass(frozen=True)
class VideoFrame:
    frame: int  # at the model's rate, from 0
    time_s: float  # frame / fps
    pixels: Pixels  # uint8 RGB [3, S, S]
    image: Image.Image  # RGB, uncropped, longest side at most SHOWN_SIDE
    skipped: int = 0  # frames that were due since the one before


@contextmanager
def open_video_input(
    where: str,
    fps: float,
    side: int,
    realtime: bool = False,
    source_fps: float | None = None,
    frames: range | None = None,
) -> Iterator[Iterator[VideoFrame]]:
    """Frames of `where` at `fps`: a video file, a folder of images, an .arrow file, or a camera's number.

    source_fps: at which a folder's images or an Arrow file's rows were taken; without it each is a frame. frames: the
    part of a file to read. Raises InputError where it cannot be read, also while iterating.
    """
    for name, rate in (("fps", fps), ("source fps", source_fps)):
        if rate is not None and not MIN_FPS <= rate <= MAX_FPS:
            raise InputError(f"{where}: {name} {rate:g}, expected {MIN_FPS:g} to {MAX_FPS:g}")
    path, source = Path(where), "a video, a folder of images or a camera's number"
    if where.isascii() and where.isdigit():
        with closing(Camera(int(where))) as camera:
            yield camera.frames(fps, side)
    elif not os.path.exists(path):
        raise InputError(f"{path}: no such file or folder; expected {source}")
    elif path.is_file() and path.suffix.lower() not in (".arrow", *VIDEOS):
        raise InputError(
            f"{path}: ends in neither .arrow nor {' '.join(VIDEOS)}; rename it if it is one, or convert it: "
            f"ffmpeg -i IT -c:v libx264 OUT.mp4"
        )
    else:
        with closing(open_pictures(path)) as opened:
            yield _file_frames(path, opened, fps, side, realtime, source_fps, frames)


def _file_frames(
    path: Path, opened: Any, fps: float, side: int, realtime: bool, source_fps: float | None, frames: range | None
) -> Iterator[VideoFrame]:
    count = opened.count(fps)
    if source_fps is not None and path.suffix.lower() in VIDEOS and not path.is_dir():
        raise InputError(f"{path}: a video has the times of its pictures; leave the source fps out")
    if not count:
        raise InputError(f"{path}: holds no frame; expected images (.jpg, .png), an .arrow file or a video")
    if source_fps is not None:
        count = max(1, math.ceil((count / source_fps - ROUNDING_S) * fps))
    wanted = frames or range(count)
    if wanted.stop > count:
        raise InputError(f"{path}: ends at frame {count - 1}, but its clip at {wanted.stop - 1}; get the whole file")

    def image(number: int) -> Image.Image:
        picture = number if source_fps is None else math.floor((number / fps + ROUNDING_S) * source_fps)
        try:
            return opened.image(picture, fps)
        except UNDECODABLE as error:
            raise InputError(f"{path} frame {number}: {opened.wrong} ({error}); get the file again") from None

    def in_order() -> Iterator[VideoFrame]:
        yield from _timed_frames(wanted, fps, side, realtime, image)
        announced = getattr(opened, "announced_s", 0.0)
        if frames is None and announced > 1 and count / fps < CUT_OFF * announced:
            raise InputError(f"{path}: ends after {count / fps:g} of {announced:g} seconds; get the whole file")

    return in_order()


def _timed_frames(wanted: range, fps: float, side: int, realtime: bool, image: Any) -> Iterator[VideoFrame]:
    """The wanted frames, whose RGB `image(frame)` gives; in real time each when it is due, late ones left out."""
    number = wanted.start
    start, last = time.monotonic() - number / fps, number - 1
    while number < wanted.stop:
        if realtime and number > wanted.start:
            time.sleep(max(0.0, number / fps - (time.monotonic() - start)))
            number = max(number, math.floor((time.monotonic() - start) * fps))
            if number >= wanted.stop:
                return
        picture = image(number)
        pixels = fit(picture, side)  # of the whole image, as in training
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BILINEAR)
        yield VideoFrame(number, number / fps, pixels, picture, number - last - 1)
        last, number = number, number + 1


class Camera:
    """The newest picture of a camera: a thread reads on, so that none is old. InputError where it can't be opened."""

    def __init__(self, index: int) -> None:
        self.name, self._container = f"camera {index}", _open_camera(index)
        self._picture: Any = None
        self._time = time.monotonic()
        self._problem: str | None = None
        self._started, self._stop = threading.Event(), False
        self._thread = threading.Thread(target=self._read, name=self.name, daemon=True)
        self._thread.start()

    def frames(self, fps: float, side: int) -> Iterator[VideoFrame]:
        self._started.wait(FIRST_PICTURE_S)
        yield from _timed_frames(range(sys.maxsize), fps, side, True, lambda _: self.image())

    def image(self) -> Image.Image:
        problem, silent_s = self._problem, time.monotonic() - self._time
        if problem is None and (self._picture is None or silent_s > STALLED_S):
            problem = f"no picture for {silent_s:.0f} seconds"
        if problem is not None:
            raise InputError(f"{self.name}: {problem}; is it still plugged in?")
        return shown(self._picture)

    def close(self) -> None:
        """The thread ends with the next picture; a camera that gives none is left to the end of the process."""
        self._stop = True
        self._thread.join(1.0)

    def _read(self) -> None:
        problem = "it gave its last picture"
        try:
            for picture in self._container.decode(video=0):
                if self._stop:
                    break
                self._picture, self._time = picture, time.monotonic()
                self._started.set()
        except Exception as error:  # the driver's, raised by `image` in the caller's thread
            problem = str(getattr(error, "strerror", None) or error)
        self._problem = problem
        self._started.set()
        self._container.close()


def _open_camera(index: int) -> Any:
    """An open PyAV container. InputError where there is no such camera, or it can't be opened."""
    import av

    linux = sys.platform.startswith("linux")
    device = f"/dev/video{index}" if linux else f"{index}:none"
    if linux and not os.path.exists(device):
        present = ", ".join(sorted(str(path) for path in Path("/dev").glob("video*"))) or "none"
        raise InputError(f"camera {index}: no {device}, cameras: {present}; for a file or folder write ./{index}")
    try:
        return av.open(device, format="v4l2" if linux else "avfoundation")
    except (av.FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"camera {index}: {device} can't be opened ({reason}); is another program using it?") from None


class UserInput:
    """A user's lines from a text stream (None: nobody). "text" is due at once, "@12.5 text" at 12.5 s of the video.

    A file is read whole before the first frame, so a script is the same at each run; a terminal or a pipe is read by a
    thread. Empty lines are left out; a line keeps its first MAX_LINE characters.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._lines: list[tuple[float, int, str]] = []  # a heap: (time, place in the stream, text)
        if stream is None:
            return
        try:
            waits = not stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
            # not sys.stdin itself, whose lock a thread that waits for a line would still hold at exit
            stream = open(stream.fileno(), encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        except (OSError, ValueError):  # in memory
            waits = False
        thread = threading.Thread(target=self._read, args=(stream,), name="user input", daemon=True)
        thread.start()
        if not waits:
            thread.join()

    def due(self, time_s: float) -> list[str]:
        """The lines before the frame at `time_s`, in order: by time, then as they came."""
        due = []
        while self._lines and self._lines[0][0] <= time_s:
            due.append(heapq.heappop(self._lines)[2])
        return due

    def _read(self, stream: TextIO) -> None:
        with suppress(OSError, ValueError):  # it can't be read, or the terminal went away
            for place, line in enumerate(stream):
                text = line[:MAX_LINE].strip()
                timed = _TIMED.fullmatch(text)
                if text:
                    when, text = (float(timed[1]), timed[2]) if timed else (-math.inf, text)
                    heapq.heappush(self._lines, (when, place, text))
