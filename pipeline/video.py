"""Pictures of a video file, as a player shows them and when it shows them; docs/pictures.md lists what was tried.

When: on the player's clock, which starts with the earliest track; before the first picture the first is shown. As:
square pixels, turned and mirrored by the display matrix, colours by the file's matrix and range, alpha on black.
Times come from the packets, without decoding: those of a 10-minute video at 30 fps in 0.1 s.

    P pictures in a video file
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

MAX_PIXELS: Final = 32_000_000  # of one picture: eight times 4 MP, far below a decompression bomb
MAX_PICTURES: Final = 10_000_000  # of one video: two days at 60 a second
DECODERS: Final = 4  # threads of one open video
WORTH_A_JUMP: Final = 60  # pictures: decoding fewer costs less than seeking past them
TRIED_KEYS: Final = 3
LATE_S: Final = 0.1  # a track that starts later than this is late; an encoder's delay (AAC: 21 to 85 ms) is not
_UNTAGGED: Final = 2  # AVCOL_SPC_UNSPECIFIED
_CONVERT: Final = "convert it: ffmpeg -i IT -c:v libx264 OUT.mp4"


def check_size(width: int, height: int) -> None:
    """ValueError for a picture that is too large to be decoded."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS} are decoded")


def on_black(image: Image.Image) -> Image.Image:
    """RGB; transparent parts over black, as most video players show them."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_video(path: Path) -> tuple[InputContainer, VideoStream]:
    """A video file and its track: the first of those marked as default, else the first; never a cover.

    Playlists, which lead to other files, are not opened. ValueError or OSError where it can't be read.
    """
    import av
    from av.stream import Disposition

    stills = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    options = {"max_pixels": str(MAX_PIXELS)}  # for the pictures that FFmpeg decodes to learn what they are
    limits = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi", "max_streams": "100"}
    try:
        container = av.open(os.path.abspath(path), options=options, container_options=limits, metadata_errors="replace")
    except av.FFmpegError as error:
        raise ValueError(f"not a video that can be read ({error.strerror or error}); get the file again") from None
    tracks = [stream for stream in container.streams.video if not stream.disposition & stills]
    tracks.sort(key=lambda stream: not stream.disposition & Disposition.default)
    if tracks and tracks[0].codec_context is not None:
        return container, tracks[0]
    container.close()
    if tracks:
        raise ValueError(f"its pictures are coded as nothing that FFmpeg knows; {_CONVERT}")
    raise ValueError("no video in it, or not its end; get the file again")


class Video:
    """A video file. Frame i is what a player shows i/fps seconds after its clock starts, or the first picture where
    there is none yet.

    Pictures are decoded one after the other; a jump seeks to a keyframe. A picture that the decoder finds damaged is
    refused, and with it those built on it up to the next keyframe.
    """

    wrong = "can't be decoded"
    _shown: tuple[float, VideoFrame | None]  # index and picture that was asked for last
    _next: tuple[float, VideoFrame | None]  # decoded, but not yet asked for

    def __init__(self, path: Path) -> None:
        """Reads the packets: some 3 us and 50 bytes a picture. ValueError or OSError where it can't be read."""
        import av

        self._path = path
        timeless = f"does not say when its pictures are shown; {_CONVERT}"
        times, durations, starts = array("q"), array("q"), array("b")  # not packets: those hold the file's bytes
        container, stream = open_video(path)
        with container:
            try:
                for packet in container.demux(stream):
                    if not packet.size or packet.is_discard:
                        continue
                    if packet.pts is None:
                        raise ValueError(timeless)
                    times.append(packet.pts)
                    durations.append(packet.duration or 0)
                    starts.append(packet.is_keyframe)
                    if len(times) > MAX_PICTURES:
                        raise ValueError(f"more than {MAX_PICTURES:,} pictures; cut it into parts")
            except av.FFmpegError as error:
                raise ValueError(f"damaged ({error.strerror or error}); get the file again") from None
            made_up = container.format.name == "avi" and stream.codec_context.has_b_frames
            if not times or made_up or not stream.time_base:
                raise ValueError(timeless)
            clock, self._tick = container.start_time, float(stream.time_base)  # in microseconds, in seconds
        self._pts, first = np.unique(np.array(times), return_index=True)  # int64 [P] in ticks, ascending
        self._keys = np.flatnonzero(np.array(starts)[first])  # pictures at which decoding can start
        length = durations[first[-1]] or int(self._pts[-1] - self._pts[-2:][0])  # of the last picture
        self._end = int(self._pts[-1]) + max(0, length)
        # negative: an audio decoder's delay
        late_s = 0.0 if clock is None else float(self._pts[0]) * self._tick - max(clock, 0) / 1e6
        self._late = round(late_s / self._tick) if late_s >= LATE_S else 0  # ticks up to the first picture
        self.late_s = self._late * self._tick
        # seconds by which a picture's time may be too late: half a tick (Matroska's are 1 ms), within reason
        self._rounding = min(max(0.51 * self._tick, 1e-4), 6e-4)
        self._open()

    def count(self, fps: float) -> int:
        """How many frames there are: those with i/fps before the end."""
        length = (self._end - int(self._pts[0]) + self._late) * self._tick
        return max(1, math.ceil((length - self._rounding) * fps))

    @property
    def announced_s(self) -> float:
        """Seconds of pictures according to the file's header; 0 where it does not say."""
        stream, container = self._stream, self._container
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0

    def image(self, number: int, fps: float) -> Image.Image:
        """Frame `number`, RGB: the last picture whose time is not after number/fps. ValueError: can't be decoded."""
        import av

        time = int(self._pts[0]) + (number / fps + self._rounding) / self._tick - self._late
        wanted = max(0, int(np.searchsorted(self._pts, time, side="right")) - 1)
        try:
            keys = self._keys[self._keys <= wanted]
            if self._shown[0] > wanted or self._shown[0] + WORTH_A_JUMP < keys.max(initial=0):
                self._seek(wanted, keys)
            while self._next[0] <= wanted:
                self._shown, self._next = self._next, next(self._pictures, (math.inf, None))
            if self._shown[1] is None:
                raise ValueError("there is no picture before it")
            return shown(self._shown[1], self._stream.sample_aspect_ratio)
        except (av.FFmpegError, ValueError) as error:
            self._shown = math.inf, None  # so that the next call seeks
            raise ValueError(getattr(error, "strerror", None) or str(error)) from None

    def close(self) -> None:
        self._container.close()

    def _open(self) -> None:
        self._container, self._stream = open_video(self._path)
        codec = self._stream.codec_context
        check_size(codec.width, codec.height)
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        codec.thread_type, codec.thread_count = "AUTO", DECODERS
        self._pictures, self._shown, self._next = self._decode(0), (-1, None), (-1, None)

    def _seek(self, wanted: int, keys: np.ndarray) -> None:
        """Go on from a keyframe, an earlier one where the container overshoots (it seeks by decoding time)."""
        for key in keys[: -TRIED_KEYS - 1 : -1].tolist():
            self._container.seek(int(self._pts[key]), stream=self._stream)
            self._pictures, self._shown = self._decode(key), (-1, None)
            self._next = next(self._pictures, (math.inf, None))
            if self._next[0] <= wanted:
                return
        self._container.close()
        self._open()

    def _decode(self, key: int) -> Iterator[tuple[float, VideoFrame | None]]:
        """(index, picture) from the decoder; those before `key` lack the pictures that they are built on."""
        for picture in self._container.decode(self._stream):
            if picture.pts is None:
                raise ValueError("a picture without a time")
            index = int(np.searchsorted(self._pts, picture.pts, side="right")) - 1
            if index >= key and picture.is_corrupt:
                raise ValueError(f"picture {index} of the file is damaged")
            if index >= key:
                yield index, picture


def shown(picture: VideoFrame, aspect: Fraction | None = None) -> Image.Image:
    """RGB, as a player shows a decoded picture whose pixels are `aspect` times as wide as high. ValueError: too large.

    Colours without a matrix are BT.709 from 577 lines or 1280 columns on, else BT.601, as players take them. A display
    matrix that turns by other than quarters is rounded to one.
    """
    from av.sidedata.sidedata import Type
    from av.video.reformatter import Colorspace

    wide = float(aspect or 1)
    width, height = round(picture.width * max(wide, 1)), round(picture.height / min(wide, 1))
    check_size(width, height)
    pixels = picture.format
    guessed = picture.colorspace == _UNTAGGED and not pixels.is_rgb and (picture.width >= 1280 or picture.height > 576)
    matrix = Colorspace.ITU709 if guessed else None
    has_alpha = pixels.has_palette or any(component.is_alpha for component in pixels.components)
    kind = "rgba" if has_alpha else "rgb24"
    array = picture.to_ndarray(format=kind, width=width, height=height, src_colorspace=matrix)
    side_data: Any = picture.side_data  # the display matrix: x' = a x + c y, y' = b x + d y
    if Type.DISPLAYMATRIX in side_data:
        a, b, _, c, d = np.frombuffer(side_data[Type.DISPLAYMATRIX], np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            array, a, d = array.swapaxes(0, 1), c, b
        array = array[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return on_black(Image.fromarray(np.ascontiguousarray(array)))
