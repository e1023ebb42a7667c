"""Where the frames of a video lie (Arrow file, video file, folder of images), how many there are, and what they show.

Counting decodes nothing: rows, names or packets are counted. Decoding gives the picture that a viewer shows: turned by
its EXIF orientation, 16 bits scaled to 8, alpha on black; for videos see `pipeline/video.py`.

    S side of the model's square input in pixels
"""

from __future__ import annotations

import base64
import bisect
import io
import os
import re
import struct
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image, ImageOps

from pipeline.schema import is_inside
from pipeline.video import Video, check_size, on_black, open_video, regular, video_times

VIDEOS: Final = (".mp4", ".mkv", ".webm", ".mov", ".avi")
IMAGES: Final = (".jpg", ".jpeg", ".png")
MAX_BYTES: Final = 32_000_000  # of one coded picture: a 4K PNG that can't be compressed has 25 MB
UNDECODABLE: Final = (OSError, ValueError, TypeError, SyntaxError, struct.error, Image.DecompressionBombError)
Pixels = npt.NDArray[np.uint8]
warnings.filterwarnings("ignore", module=r"PIL\.")  # what it says of an odd file is no line of ours


_ENDINGS: Final = (".arrow", *(ending for video in VIDEOS for ending in (video, video.upper())))
_GENERIC: Final = ("data", "processed_data", "frames", "videos")  # folders that tell nothing about which video it is


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
        folders = [f"{folder}{os.sep}" for folder in (base, base / "frames") if folder.is_dir()]
        files = (f"{folder}{name}{end}" for end in _ENDINGS for name in names for folder in folders)
        images = (f"{folder}{name}" for name in names for folder in folders)
        found = next(filter(os.path.isfile, files), None)
        found = found or next((path for path in images if os.path.isdir(path) and _holds_frames(Path(path))), None)
        if found:
            return Path(found)
    return None


def _names(video_uid: str, frames_file: str | None, dataset: str | None) -> list[str]:
    """What a video may be called below a folder of frames, without ending: its names, each with and without a prefix.

    The prefix is the dataset's name, with or without its number ('assembly101', 'assembly'), or all before 'nusar-':
    in Assembly101's public data 'disassembly_nusar-X' and 'nusar-X' are one video. So are Ego4D's 'grp-X' and 'X'.
    """
    given = [video_uid, _without_ending(frames_file)] if frames_file else [video_uid]
    words = dict.fromkeys(w for w in (dataset, (dataset or "").rstrip("0123456789")) if w)
    prefixes = [word + sign for word in words for sign in "_-"]
    given += [path.removeprefix("grp-") for path in given if path.startswith("grp-")]  # Ego4D's joined videos
    names = []
    for path in dict.fromkeys([*given, *(_specific(path, dataset) for path in given)]):
        folder, name = os.path.split(path)
        bare = [name.removeprefix(prefix) for prefix in prefixes]
        bare += [name[name.index("nusar-") :]] if "nusar-" in name else []
        names += [os.path.join(folder, one) for one in [name, *bare, *(prefix + name for prefix in prefixes)] if one]
    names += [unicodedata.normalize(form, name) for form in ("NFC", "NFD") for name in names]  # a Mac writes NFD
    return [name for name in dict.fromkeys(names) if is_inside(name)]


def _without_ending(frames_file: str) -> str:
    stem, ending = os.path.splitext(frames_file)
    return stem if ending.lower() in (".arrow", *VIDEOS) else frames_file


def _specific(path: str, dataset: str | None) -> str:
    """The path without its leading folders that tell nothing about which video of the dataset it is."""
    parts = path.split("/")
    while len(parts) > 1 and (parts[0] in _GENERIC or parts[0] == dataset):
        del parts[0]
    return "/".join(parts)


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
    names = sorted(name for name in os.listdir(folder) if _is_image(name))
    found = [re.findall("[0-9]+", os.path.splitext(name)[0]) for name in names]
    if not any(found):
        return [folder / name for name in names]
    by_number: dict[int, str] = {}
    for name, numbers in zip(names, found, strict=True):
        if not numbers:
            raise ValueError(f"{name} has no number, the others have; number all images, or move it away")
        number = int(numbers[-1])
        if number in by_number:
            raise ValueError(f"{by_number[number]} and {name} have the same last number; keep one, or rename")
        by_number[number] = name
    first = 0 if 0 in by_number else 1
    missing = next((n for n in range(first, first + len(names)) if n not in by_number), None)
    if missing is not None:
        raise ValueError(
            f"no image has the number {missing}, the {len(names)} there must count from 0 or 1 without a gap; "
            f"{min(by_number)} is the smallest, {max(by_number)} the largest"
        )
    return [folder / by_number[n] for n in range(first, first + len(names))]


class ArrowFrames:
    """The column `frame` of an Arrow IPC file, memory-mapped: only rows that are read are ever loaded.

    Neither compressed nor nested, so that a row is bytes of the file. Arrow itself trusts a file's offsets: it
    crashes on wrong ones. Here each row's are held against the file's before they are followed.
    """

    def __init__(self, path: Path) -> None:
        """ValueError or OSError where it isn't such a file."""
        regular(path)
        self._starts = [0]  # of each batch, by row; and the end
        self._batches: list[tuple[pa.Buffer | None, np.ndarray, pa.Buffer | None]] = []
        try:
            with pa.memory_map(str(path)) as source:
                source.seek(8 if source.read(6) == b"ARROW1" else 0)  # a file is a stream with a frame around it
                for column in _columns(pa.ipc.MessageReader.open_stream(source)):
                    self._add(column)
        except (OSError, pa.ArrowException, struct.error, EOFError) as error:
            raise ValueError(f"not an Arrow IPC file ({error}); get the file again") from None

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> memoryview:
        """The row's bytes. ValueError where it is null, or not in the file."""
        batch = bisect.bisect_right(self._starts, number) - 1
        valid, offsets, content = self._batches[batch]
        place = number - self._starts[batch]
        if valid is not None and not valid[place >> 3] >> (place & 7) & 1:
            raise ValueError("null")
        start, end = offsets[place : place + 2].tolist()
        if content is None or not 0 <= start <= end <= content.size:
            raise ValueError(f"bytes {start} to {end} of {content.size if content else 0}")
        return memoryview(content)[start:end]

    def _add(self, column: pa.Array) -> None:
        column.validate()  # whether its buffers are long enough, not what is in them
        valid, offsets, content = column.buffers()
        width = np.int64 if column.type in (pa.large_string(), pa.large_binary()) else np.int32
        places = np.frombuffer(offsets, width) if len(column) else np.zeros(1, width)
        self._batches.append((valid, places[: len(column) + 1], content))
        self._starts.append(self._starts[-1] + len(column))


def _columns(messages: pa.ipc.MessageReader) -> Iterator[pa.Array]:
    """The column `frame` of each record batch."""
    first = next(iter(messages), None)
    if first is None:
        raise ValueError("not an Arrow IPC file (empty); get the file again")
    schema = pa.ipc.read_schema(first)
    if schema.names.count("frame") != 1:
        raise ValueError(f"columns {', '.join(schema.names)}, expected one named frame")
    type_ = schema.field("frame").type
    if type_ not in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        raise ValueError(f"column frame is of {type_}, expected string or binary with base64 JPEGs")
    for message in messages:
        if message.type == "record batch":
            if _is_compressed(message.metadata):
                raise ValueError("compressed, and small files may unpack to any size; write it uncompressed")
            yield pa.ipc.read_record_batch(message, schema).column("frame")


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Whether an Arrow message's flatbuffer, a Message whose third field is a RecordBatch, has that one's fourth."""
    content = memoryview(metadata)

    def field(table: int, place: int) -> int:
        vtable = table - struct.unpack_from("<i", content, table)[0]
        if struct.unpack_from("<H", content, vtable)[0] < 2 * place + 6:
            return 0
        found = struct.unpack_from("<H", content, vtable + 4 + 2 * place)[0]
        return table + found if found else 0

    header = field(struct.unpack_from("<I", content)[0], 2)
    return field(header + struct.unpack_from("<I", content, header)[0], 3) != 0


def count_frames(path: Path, fps: float = 2.0) -> int | None:
    """Frames of what `find_frames` found; None: not readable. `fps` matters to video files alone: how many frames
    a player's time holds at that rate."""
    return count_and_delay(path, fps)[0]


def count_and_delay(path: Path, fps: float = 2.0) -> tuple[int | None, float]:
    """(`count_frames`, seconds from the start of a player's clock to the first picture)."""
    try:
        if path.is_dir():
            return len(images_in(path)), 0.0
        if path.suffix.lower() in VIDEOS:
            container, stream = open_video(path)
            with container:
                times = video_times(container, stream)
            return times.count(fps), times.late_s
        return len(ArrowFrames(path)), 0.0
    except (OSError, ValueError, OverflowError):
        return None, 0.0


def read_frames(path: Path, frames: Iterable[int]) -> list[str]:
    """The base64 JPEGs of some frames (absolute numbers) from an Arrow file's column `frame`; of other files none:
    they would have to be decoded."""
    if path.is_dir() or path.suffix.lower() in VIDEOS:
        return []
    rows = ArrowFrames(path)
    return [bytes(rows.row(number)).decode() for number in frames if number < len(rows)]


# ---- decoding ----------------------------------------------------------------------------------------


def fit(image: Image.Image, side: int) -> Pixels:
    square = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def read_base64(text: str | memoryview) -> Image.Image:
    if len(text) > 4 * MAX_BYTES // 3:
        raise ValueError(f"{len(text):,} characters, at most {4 * MAX_BYTES // 3:,} are read")
    return _read_image(base64.b64decode(text, validate=True), "JPEG", "PNG")


def _read_image(content: bytes, *formats: str) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=formats) as image:
        check_size(image.width, image.height)
        image.load()
        with suppress(*UNDECODABLE):  # damaged EXIF turns nothing
            ImageOps.exif_transpose(image, in_place=True)
        if not image.mode.startswith("I"):
            return on_black(image)
        grey = np.asarray(image).clip(0, 65_535).astype(np.uint32)  # 16 bits
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")


class Opened(Protocol):
    wrong: str  # what a frame is that can't be decoded

    def count(self, fps: float) -> int: ...

    def image(self, number: int, fps: float) -> Image.Image:
        """Frame `number`, RGB. Raises one of UNDECODABLE."""
        ...

    def close(self) -> None: ...


def open_pictures(path: Path) -> Opened:
    """ValueError or OSError where it is not what its name says."""
    if path.is_dir():
        return _Images(path)
    return Video(path) if path.suffix.lower() in VIDEOS else _Arrow(path)


class _Arrow:
    wrong = "no base64 JPEG"

    def __init__(self, path: Path) -> None:
        self._rows = ArrowFrames(path)

    def count(self, fps: float) -> int:
        return len(self._rows)

    def image(self, number: int, fps: float) -> Image.Image:
        return read_base64(self._rows.row(number))

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
