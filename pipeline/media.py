"""Frames of a video below a root folder: an Arrow file, a video file or a folder of images; found, counted, decoded.

Counting decodes nothing: rows, names or packets are counted. A decoded image is what a viewer shows: turned by its EXIF
orientation, 16 bits scaled to 8, alpha on black; for video files see `pipeline.video`.

    S side of the model's square input in pixels
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import unicodedata
import warnings
from contextlib import closing, suppress
from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps

from pipeline.errors import InputError
from pipeline.schema import is_inside
from pipeline.video import Video, check_size, on_black

VIDEOS: Final = (".mp4", ".mkv", ".webm", ".mov", ".avi")
IMAGES: Final = (".jpg", ".jpeg", ".png")
MAX_BYTES: Final = 32_000_000  # of one coded picture: a 4K PNG that can't be compressed has 25 MB
UNDECODABLE: Final = (OSError, ValueError, TypeError, SyntaxError, struct.error, Image.DecompressionBombError)
Pixels = npt.NDArray[np.uint8]
warnings.filterwarnings("ignore", module=r"PIL\.")

_FILES: Final = (".arrow", *(ending for video in VIDEOS for ending in (video, video.upper())))
_GENERIC: Final = ("data", "processed_data", "frames", "videos")  # folders that do not tell videos apart


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
    no name has a number, they go in alphabetical order. ValueError where a number is missing or doubled, or only
    some names have one: any guess would shift the frames.
    """
    names = sorted(filter(_is_image, os.listdir(folder)))
    numbers = [re.findall("[0-9]+", os.path.splitext(name)[0]) for name in names]
    if not any(numbers):
        return [folder / name for name in names]
    by_number: dict[int, str] = {}
    for name, found in zip(names, numbers, strict=True):
        if not found:
            raise ValueError(f"{name} has no number, the others have; number all images, or move it away")
        if (other := by_number.setdefault(int(found[-1]), name)) != name:
            raise ValueError(f"{other} and {name} have the same last number; keep one, or rename")
    first = 0 if 0 in by_number else 1
    missing = set(range(first, first + len(names))) - by_number.keys()
    if missing:
        raise ValueError(
            f"no image has the number {min(missing)}, the {len(names)} there must count from 0 or 1 without a gap; "
            f"{min(by_number)} is the smallest, {max(by_number)} the largest"
        )
    return [folder / by_number[number] for number in sorted(by_number)]


def count_frames(path: Path, fps: float = 2.0) -> int | None:
    """Frames of what `find_frames` found, at `fps` of a video file; None: not readable."""
    return count_and_delay(path, fps)[0]


def count_and_delay(path: Path, fps: float = 2.0) -> tuple[int | None, float]:
    """(`count_frames`, seconds from the start of a player's clock to the first picture)."""
    try:
        with closing(open_pictures(path)) as opened:
            return opened.count(fps), getattr(opened, "late_s", 0.0)
    except (OSError, ValueError, OverflowError):
        return None, 0.0


class ArrowFrames:
    """The column `frame` of an Arrow IPC file, base64 JPEG or PNG; memory-mapped: a row is loaded when read."""

    wrong = "no base64 JPEG"

    def __init__(self, path: Path) -> None:
        """ValueError or OSError where it isn't such a file."""
        try:
            with pa.memory_map(str(path)) as source:
                source.seek(8 if source.read(6) == b"ARROW1" else 0)  # a file is a stream with a frame around it
                table = pa.ipc.open_stream(source).read_all()
            if table.column_names.count("frame") != 1:
                raise ValueError(f"columns {', '.join(table.column_names)}, expected one named frame")
            column = table.column("frame")
            raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(column.type, column.type)
            if raw not in (pa.binary(), pa.large_binary()):
                raise ValueError(f"column frame is of {column.type}, expected string or binary with base64 JPEGs")
            self._rows = pa.chunked_array([chunk.view(raw) for chunk in column.chunks], raw)  # no check of UTF-8
            self._rows.validate(full=True)  # Arrow crashes on offsets that lead out of the file
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"not an Arrow IPC file ({error}); get the file again") from None

    def count(self, fps: float = 2.0) -> int:
        return len(self._rows)

    def image(self, number: int, fps: float) -> Image.Image:
        content = self._rows[number].as_buffer()
        if content is None:
            raise ValueError("null")
        return _read_image(base64.b64decode(memoryview(content), validate=True))

    def close(self) -> None:
        del self._rows


class ImageFolder:
    wrong = "no JPEG or PNG"

    def __init__(self, folder: Path) -> None:
        """ValueError where names have no numbers, or not all of them."""
        self._files = images_in(folder)

    def count(self, fps: float = 2.0) -> int:
        return len(self._files)

    def image(self, number: int, fps: float) -> Image.Image:
        with self._files[number].open("rb") as file:
            return _read_image(file.read(MAX_BYTES + 1))

    def close(self) -> None:
        self._files = []


Opened = ArrowFrames | ImageFolder | Video  # `image` gives RGB or raises one of UNDECODABLE


def open_pictures(path: Path) -> Opened:
    """InputError where it is not what its name says."""
    kind = ImageFolder if path.is_dir() else Video if path.suffix.lower() in VIDEOS else ArrowFrames
    try:
        return kind(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


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


def fit(image: Image.Image, side: int) -> Pixels:
    """uint8 [3, S, S]: cropped to a square around the centre, then resized."""
    square = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))
