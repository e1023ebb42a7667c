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
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from PIL import Image

from pipeline.errors import InputError
from pipeline.media import UNDECODABLE, Pixels, fit, open_pictures, shown

_TIMED: Final = re.compile(r"@([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s+(.*)")


@dataclass(frozen=True)
class VideoFrame:
    frame: int  # at the model's rate, from 0
    time_s: float  # frame / fps
    pixels: Pixels  # uint8 RGB [3, S, S]
    image: Image.Image  # RGB, uncropped, longest side at most 640
    skipped: int = 0  # frames that were due since the one before


@contextmanager
def open_video_input(
    where: str, fps: float, side: int, realtime: bool = False, frames: range | None = None
) -> Iterator[Iterator[VideoFrame]]:
    """Frames of `where` at `fps`: a video file, a folder of images, an .arrow file, or a camera's number.

    frames: the part of a file to read. Raises InputError where it cannot be read, also while iterating.
    """
    if where.isascii() and where.isdigit():
        with closing(Camera(int(where))) as camera:
            yield _timed_frames(range(sys.maxsize), fps, side, True, camera.image)
        return
    with closing(open_pictures(Path(where))) as opened:
        count = opened.count(fps)
        wanted = frames or range(count)
        if not 0 < wanted.stop <= count:
            raise InputError(f"{where}: has {count} frames, expected {max(wanted.stop, 1)} or more; get the whole file")

        def image(number: int) -> Image.Image:
            try:
                return opened.image(number, fps)
            except UNDECODABLE as error:
                raise InputError(f"{where} frame {number}: {opened.wrong} ({error}); get the file again") from None

        yield _timed_frames(wanted, fps, side, realtime, image)


def _timed_frames(
    wanted: range, fps: float, side: int, realtime: bool, image: Callable[[int], Image.Image]
) -> Iterator[VideoFrame]:
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
        picture.thumbnail((640, 640), Image.Resampling.BILINEAR)
        yield VideoFrame(number, number / fps, pixels, picture, number - last - 1)
        last, number = number, number + 1


class Camera:
    """The newest picture of a camera: a thread reads on, so that none is old. InputError where it can't be opened."""

    def __init__(self, index: int) -> None:
        import av

        linux = sys.platform.startswith("linux")
        device, kind = (f"/dev/video{index}", "v4l2") if linux else (f"{index}:none", "avfoundation")
        try:
            self._container: Any = av.open(device, format=kind)
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"camera {index}: can't open {device} ({error}); for a file write ./{index}") from None
        self.name, self._picture = f"camera {index}", None
        self._started, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def image(self, number: int) -> Image.Image:
        """The newest picture, whatever the frame's number. InputError where the camera gives none any more."""
        self._started.wait(10.0)  # for the first picture
        if self._ended or self._picture is None:
            raise InputError(f"{self.name}: gives no picture; is it still plugged in?")
        return shown(self._picture)

    def close(self) -> None:
        """The thread ends with the next picture; a camera that gives none is left to the end of the process."""
        self._ended = True
        self._thread.join(1.0)

    def _read(self) -> None:
        with suppress(OSError, ValueError), self._container:  # of the driver: the camera was pulled out
            for picture in self._container.decode(video=0):
                self._picture = picture
                self._started.set()
                if self._ended:
                    break
        self._ended = True
        self._started.set()


class UserInput:
    """A user's lines from a text stream (None: nobody). "text" is due at once, "@12.5 text" at 12.5 s of the video.

    A file is read whole before the first frame, so a script is the same at each run; a terminal or a pipe by a thread.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._lines: list[tuple[float, int, str]] = []  # a heap: (time, place in the stream, text)
        if stream is not None:
            thread = threading.Thread(target=self._read, args=(stream.fileno(),), daemon=True)
            thread.start()
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                thread.join()

    def due(self, time_s: float) -> list[str]:
        """The lines before the frame at `time_s`, in order: by time, then as they came."""
        due = []
        while self._lines and self._lines[0][0] <= time_s:
            due.append(heapq.heappop(self._lines)[2])
        return due

    def _read(self, handle: int) -> None:
        # not sys.stdin itself, whose lock a thread that waits for a line would still hold at exit
        with open(handle, encoding="utf-8", errors="replace", closefd=False) as stream:
            for place, line in enumerate(stream):
                timed = _TIMED.fullmatch(text := line.strip())
                when, text = (float(timed[1]), timed[2]) if timed else (-math.inf, text)
                if text:
                    heapq.heappush(self._lines, (when, place, text))
