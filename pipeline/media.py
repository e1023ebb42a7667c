"""Frames of a video below a root folder: an Arrow file, a video file or a folder of images; found, counted, decoded.

Counting decodes nothing: rows, names or packets are counted. What is decoded is what a viewer or a player shows, and a
video's picture when it shows it; docs/pictures.md lists what was tried.

    S side of the model's square input in pixels    P pictures in a video file
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import struct
import unicodedata
from array import array
from collections.abc import Iterator
from contextlib import closing, suppress
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps

from pipeline.errors import InputError
from pipeline.schema import is_inside

if TYPE_CHECKING:
    from av import VideoFrame

VIDEOS: Final = (".mp4", ".mkv", ".webm", ".mov", ".avi")
IMAGES: Final = (".jpg", ".jpeg", ".png")
MAX_BYTES: Final = 32_000_000  # of one coded picture: a 4K PNG that can't be compressed has 25 MB
MAX_PIXELS: Final = 32_000_000  # of one picture: eight times 4 MP, far below a decompression bomb
MAX_PICTURES: Final = 10_000_000  # of one video: two days at 60 a second
UNDECODABLE: Final = (OSError, ValueError, TypeError, SyntaxError, struct.error, Image.DecompressionBombError)
Pixels = npt.NDArray[np.uint8]

_FILES: Final = (".arrow", *(ending for video in VIDEOS for ending in (video, video.upper())))
_GENERIC: Final = ("data", "processed_data", "frames", "videos")  # folders that do not tell videos apart


# ---- finding frames ----------------------------------------------------------------------------------


def find_frames(root: Path, video_uid: str, frames_file: str | None, dataset: str | None = None) -> Path | None:
    """The Arrow file, the video file or the folder of images with a video's frames below `root`, or None.

    Tried in order: root/frames_file; then the folders root/dataset, root/dataset/frames, root, root/frames. In each it
    may go by its video_uid or by its frames_file (without leading folders that are generic or the dataset's own), with
    or without the dataset's name as a prefix, and be a .arrow file, one of VIDEOS (.mp4, .MP4) or a folder that holds
    an image. Other folders of frames_file are never left out: P01/rgb.mp4 and P02/rgb.mp4 are different videos.
    """
    if frames_file and is_inside(frames_file) and _holds_frames(root / frames_file):
        return root / frames_file
    dataset = dataset if dataset and dataset != "unknown" and is_inside(dataset) else None
    names = _names(video_uid, frames_file, dataset)
    for base in [root / dataset, root] if dataset else [root]:
        folders = [folder for folder in (base, base / "frames") if os.path.isdir(folder)]
        for ending, name, folder in product((*_FILES, ""), names, folders):
            path = f"{folder}{os.sep}{name}{ending}"
            if os.path.isfile(path) if ending else os.path.isdir(path) and _holds_frames(Path(path)):
                return Path(path)
    return None


def _names(video_uid: str, frames_file: str | None, dataset: str | None) -> list[str]:
    """What a video may be called below a folder of frames, without ending: its names, each with and without a prefix.

    The prefix is the dataset's name, with or without its number ('assembly101', 'assembly'), or all before 'nusar-':
    in Assembly101's public data 'disassembly_nusar-X' and 'nusar-X' are one video. So are Ego4D's 'grp-X' and 'X'.
    """
    stem, ending = os.path.splitext(frames_file or "")
    given = [video_uid, *([stem if ending.lower() in _FILES else stem + ending] if frames_file else [])]
    given += [path.removeprefix("grp-") for path in given]
    words = dict.fromkeys(filter(None, [dataset, dataset.rstrip("0123456789")] if dataset else []))
    prefixes = [word + sign for word in words for sign in "_-"]
    for path in given.copy():  # without leading folders that are generic or the dataset's
        parts = path.split("/")
        while len(parts) > 1 and parts[0] in (*_GENERIC, dataset):
            del parts[0]
        given.append("/".join(parts))
    names = []
    for folder, name in map(os.path.split, dict.fromkeys(given)):
        forms = [name, *(name.removeprefix(prefix) for prefix in prefixes), name[max(name.find("nusar-"), 0) :]]
        names += [os.path.join(folder, form) for form in [*forms, *(prefix + name for prefix in prefixes)] if form]
    names += [unicodedata.normalize(form, name) for form in ("NFC", "NFD") for name in names]  # a Mac writes NFD
    return [name for name in dict.fromkeys(names) if is_inside(name)]


def _holds_frames(path: Path) -> bool:
    if not os.path.isdir(path):  # unlike Path's, False for a name that is too long
        return os.path.isfile(path)
    with os.scandir(path) as entries:
        return any(_is_image(entry.name) for entry in entries)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGES) and not name.startswith(".")


def images_in(folder: Path) -> list[Path]:
    """The images of a folder, the i-th is frame i.

    The last number in a name is its frame's, counted from 0 or from 1 (ffmpeg's frame_000001.jpg is frame 0). Where
    no name has one, they go in alphabetical order. ValueError where one is missing or doubled: a guess would shift.
    """
    names = sorted(filter(_is_image, os.listdir(folder)))
    numbers = [re.findall("[0-9]+", os.path.splitext(name)[0]) for name in names]
    if not any(numbers):
        return [folder / name for name in names]
    ordered = sorted((int(digits[-1]) if digits else -1, name) for name, digits in zip(names, numbers, strict=True))
    for expected, (number, name) in enumerate(ordered, min(abs(ordered[0][0]), 1)):
        if number != expected:
            raise ValueError(f"{name}: expected number {expected}; images count from 0 or 1, by a name's last number")
    return [folder / name for _, name in ordered]


# ---- counting and decoding ---------------------------------------------------------------------------


def count_frames(path: Path, fps: float = 2.0) -> tuple[int | None, float]:
    """(frames at `fps`, None: not readable; seconds from the start of a player's clock to the first picture)."""
    try:
        with closing(open_pictures(path)) as opened:
            return opened.count(fps), opened.late_s
    except (OSError, ValueError, OverflowError):
        return None, 0.0


class _Images:
    _rows: Any
    late_s = 0.0

    def count(self, fps: float = 2.0) -> int:
        return len(self._rows)

    def close(self) -> None:
        self._rows = []


class ArrowFrames(_Images):
    """The column `frame` of an Arrow IPC file, base64 JPEG or PNG; memory-mapped: a row is loaded when read."""

    wrong = "no base64 JPEG"

    def __init__(self, path: Path) -> None:
        """ValueError where it isn't such a file."""
        try:
            with pa.memory_map(str(path)) as source:
                source.seek(8 if source.read(6) == b"ARROW1" else 0)  # a file is a stream with a frame around it
                column = pa.ipc.open_stream(source).read_all().column("frame")
            raw = {pa.large_string(): pa.large_binary(), pa.large_binary(): pa.large_binary()}
            kind = raw.get(column.type, pa.binary())
            self._rows = pa.chunked_array([chunk.view(kind) for chunk in column.chunks], kind)  # no check of UTF-8
            self._rows.validate(full=True)  # Arrow crashes on offsets that lead out of the file
        except (OSError, KeyError, pa.ArrowException) as error:
            raise ValueError(f"no Arrow file with a column frame of base64 JPEGs ({error}); get it again") from None

    def image(self, number: int, fps: float) -> Image.Image:
        return _read_image(base64.b64decode(memoryview(self._rows[number].as_buffer()), validate=True))


class ImageFolder(_Images):
    wrong = "no JPEG or PNG"

    def __init__(self, folder: Path) -> None:
        """ValueError where the names' numbers do not tell the order."""
        self._rows = images_in(folder)

    def image(self, number: int, fps: float) -> Image.Image:
        with self._rows[number].open("rb") as file:
            return _read_image(file.read(MAX_BYTES + 1))


def _read_image(content: bytes) -> Image.Image:
    if len(content) > MAX_BYTES:
        raise ValueError(f"{len(content):,} bytes, at most {MAX_BYTES:,} are read")
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        check_size(image.width, image.height)
        image.load()
        with suppress(*UNDECODABLE):  # damaged EXIF turns nothing
            ImageOps.exif_transpose(image, in_place=True)
        if not image.mode.startswith("I"):
            return on_black(image)
        grey = np.asarray(image).clip(0, 65_535).astype(np.uint32)  # 16 bits
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")


class Video:
    """A video file. Frame i is what a player shows i/fps seconds after its clock starts, or the first picture where
    there is none yet: the clock starts with the earliest track.

    Pictures are decoded in order; a jump seeks to a keyframe. A damaged one is refused, and all before the next key.
    """

    wrong = "can't be decoded"
    _worth_a_jump: Final = 60  # pictures: decoding fewer costs less than seeking past them
    _shown: tuple[float, VideoFrame | None]  # index and picture that was asked for last
    _next: tuple[float, VideoFrame | None]  # decoded, but not yet asked for

    def __init__(self, path: Path) -> None:
        """Reads the packets, without decoding: some 3 us and 50 bytes a picture. ValueError where it can't be read."""
        import av

        self._path = path
        timeless = "does not say when its pictures are shown; convert it: ffmpeg -i IT -c:v libx264 OUT.mp4"
        times, durations, starts = array("q"), array("q"), array("b")  # not packets: those hold the file's bytes
        try:
            self._open()
            for packet in self._container.demux(self._stream):
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
            raise ValueError(f"not a video that can be read ({error.strerror or error}); get the file again") from None
        made_up = self._container.format.name == "avi" and self._stream.codec_context.has_b_frames
        if not times or made_up or not self._stream.time_base:
            raise ValueError(timeless)
        clock, self._tick = self._container.start_time, float(self._stream.time_base)  # in microseconds, in seconds
        self._container.close()
        self._pts, first = np.unique(np.array(times), return_index=True)  # int64 [P] in ticks, ascending
        self._keys = np.flatnonzero(np.array(starts)[first])  # pictures at which decoding can start
        length = durations[first[-1]] or int(self._pts[-1] - self._pts[-2:][0])  # of the last picture
        self._end = int(self._pts[-1]) + max(0, length)
        late_s = 0.0 if clock is None else float(self._pts[0]) * self._tick - max(clock, 0) / 1e6
        # ticks up to the first picture; under 0.1 s is an encoder's delay (AAC: 21 to 85 ms), no late start
        self._late = round(late_s / self._tick) if late_s >= 0.1 else 0
        self.late_s = self._late * self._tick
        # seconds by which a picture's time may be too late: half a tick (Matroska's are 1 ms), within reason
        self._rounding = min(max(0.51 * self._tick, 1e-4), 6e-4)
        self._open()

    def count(self, fps: float) -> int:
        """How many frames there are: those with i/fps before the end."""
        length = (self._end - int(self._pts[0]) + self._late) * self._tick
        return max(1, math.ceil((length - self._rounding) * fps))

    def image(self, number: int, fps: float) -> Image.Image:
        """Frame `number`, RGB: the last picture whose time is not after number/fps. ValueError: can't be decoded."""
        import av

        time = int(self._pts[0]) + (number / fps + self._rounding) / self._tick - self._late
        wanted = max(0, int(np.searchsorted(self._pts, time, side="right")) - 1)
        try:
            keys = self._keys[self._keys <= wanted]
            if self._shown[0] > wanted or self._shown[0] + self._worth_a_jump < keys.max(initial=0):
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
        """Take the first track of those marked as default, else the first; never a cover."""
        import av
        from av.stream import Disposition

        stills = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
        limits = {"protocol_whitelist": "file", "format_whitelist": "mov,matroska,avi", "max_streams": "100"}
        most = {"max_pixels": str(MAX_PIXELS)}  # also of pictures that FFmpeg decodes to learn what they are
        where = os.path.abspath(self._path)
        self._container = av.open(where, options=most, container_options=limits, metadata_errors="replace")
        tracks = [one for one in self._container.streams.video if one.codec_context and not one.disposition & stills]
        if not tracks:
            raise ValueError("no video in it that FFmpeg knows, or not its end; get the file again")
        self._stream = min(tracks, key=lambda track: not track.disposition & Disposition.default)
        codec = self._stream.codec_context
        check_size(codec.width, codec.height)
        codec.options = most
        codec.thread_type, codec.thread_count = "AUTO", 4
        self._pictures, self._shown, self._next = self._decode(0), (-1, None), (-1, None)

    def _seek(self, wanted: int, keys: np.ndarray) -> None:
        """Go on from a keyframe, the one before where the container overshoots (it seeks by decoding time)."""
        for key in keys[:-3:-1].tolist():
            self._container.seek(int(self._pts[key]), stream=self._stream)
            self._pictures, self._shown = self._decode(key), (-1, None)
            self._next = next(self._pictures, (math.inf, None))
            if self._next[0] <= wanted:
                return
        self._container.close()
        self._open()

    def _decode(self, key: int) -> Iterator[tuple[float, VideoFrame | None]]:
        """(index, picture) from the decoder; those before `key` lack the pictures that they are built on."""
        pictures: Any = self._container.decode(self._stream)
        for picture in pictures:
            index = int(np.searchsorted(self._pts, picture.pts, side="right")) - 1
            if index >= key and picture.is_corrupt:
                raise ValueError(f"picture {index} of the file is damaged")
            if index >= key:
                yield index, picture


Opened = ArrowFrames | ImageFolder | Video  # `image` gives RGB or raises one of UNDECODABLE


def open_pictures(path: Path) -> Opened:
    """InputError where it can't be read: a folder as images, .arrow as Arrow, any other file as a video."""
    kind = ImageFolder if path.is_dir() else ArrowFrames if path.suffix == ".arrow" else Video
    try:
        return kind(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


# ---- what is shown -----------------------------------------------------------------------------------


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


def shown(picture: VideoFrame, aspect: Fraction | None = None) -> Image.Image:
    """RGB, as a player shows a decoded picture whose pixels are `aspect` times as wide as high.

    Colours are of the picture's matrix and range; without a matrix BT.709 from 577 lines or 1280 columns on, else
    BT.601, as players take them. A display matrix that turns by other than quarters is rounded to one.
    """
    from av.sidedata.sidedata import Type
    from av.video.reformatter import Colorspace

    wide = float(aspect or 1)
    width, height = round(picture.width * max(wide, 1)), round(picture.height / min(wide, 1))
    check_size(width, height)
    pixels = picture.format
    untagged = picture.colorspace == 2 and not pixels.is_rgb  # AVCOL_SPC_UNSPECIFIED
    matrix = Colorspace.ITU709 if untagged and (picture.width >= 1280 or picture.height > 576) else None
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


def fit(image: Image.Image, side: int) -> Pixels:
    """uint8 [3, S, S]: cropped to a square around the centre, then resized."""
    square = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
