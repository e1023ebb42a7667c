"""Where the frames of a video lie (Arrow file, video file, folder of images), how many there are, and which is which.

Counting decodes nothing: rows, names or packets are counted, those of a 10-minute video at 30 fps in 0.1 s. Decoding
is the trainer's (`trainer/frames.py`), which shares the limits below.

    P pictures in a video file
"""

from __future__ import annotations

import bisect
import math
import os
import re
import stat
import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.schema import is_inside

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEOS: Final = (".mp4", ".mkv", ".webm", ".mov", ".avi")
IMAGES: Final = (".jpg", ".jpeg", ".png")


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
    if not path.is_dir():
        return path.is_file()
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


class VideoTimes(NamedTuple):
    """When each picture of a video file is shown. Frame i is what a player shows i/fps seconds after the first."""

    pts: np.ndarray  # int64 [P] in ticks, ascending
    keys: np.ndarray  # int64: pictures at which decoding can start, ascending
    tick: float  # seconds
    end: int  # ticks: when the last picture is over

    @property
    def rounding(self) -> float:
        """Seconds by which a picture's time may be too late: half a tick (Matroska's are 1 ms), within reason."""
        return min(max(0.51 * self.tick, 1e-4), 6e-4)

    def count(self, fps: float) -> int:
        """How many frames there are: those with i/fps before the end."""
        length = (self.end - int(self.pts[0])) * self.tick
        return max(1, math.ceil((length - self.rounding) * fps))

    def picture(self, frame: int, fps: float) -> int:
        """Which picture is the frame: the last one whose time is not after frame/fps."""
        time = (frame / fps + self.rounding) / self.tick
        return int(np.searchsorted(self.pts, int(self.pts[0]) + time, side="right")) - 1


# What a hostile file may cost, whatever it says of itself.
MAX_PIXELS: Final = 32_000_000  # of one picture before it is decoded: eight times 4 MP, far below a decompression bomb
MAX_BYTES: Final = 32_000_000  # of one coded picture: a 4K PNG that can't be compressed has 25 MB
MAX_SAMPLES: Final = 10_000_000  # a day of pictures at 60 a second, with sound; FFmpeg's tables of them take 0.7 GB
MAX_HEADER: Final = 256 << 20  # bytes of a box of an mp4 other than the data: those of eight hours have 40 MB
MAX_BOXES: Final = 1_000_000  # of an mp4, outermost: a fragment each second makes 60,000 in eight hours
MAX_LENGTH_S: Final = 1_000_000  # eleven days
CODECS: Final = (  # what cameras, phones and editors write; FFmpeg has 250 more, which few have tested
    *("h264", "hevc", "vvc", "av1", "libdav1d", "libaom-av1", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "h263"),
    *("mpeg1video", "mpeg2video", "mjpeg", "msmpeg4v2", "msmpeg4", "wmv1", "wmv2", "wmv3", "vc1", "theora", "prores"),
    *("dnxhd", "ffv1", "huffyuv", "ffvhuff", "utvideo", "dvvideo", "png", "rawvideo"),
)
_CONVERT: Final = "convert it: ffmpeg -i IT -c:v libx264 OUT.mp4"


def open_video(path: Path) -> tuple[InputContainer, VideoStream]:
    """A video file, never a playlist that leads elsewhere. ValueError or OSError where it can't be read."""
    import av

    options = {"max_pixels": str(MAX_PIXELS)}  # for the pictures that FFmpeg decodes to learn what they are
    limits = {"protocol_whitelist": "file", "max_streams": "100"}
    try:
        container = av.open(
            os.path.abspath(path),
            format=_format(path),
            options=options,
            container_options=limits,
            metadata_errors="replace",
        )
    except av.FFmpegError as error:
        raise ValueError(f"not a video that can be read ({error.strerror or error}); get the file again") from None
    if not container.streams.video:
        container.close()
        raise ValueError("no video in it, or not its end; get the file again")
    stream = container.streams.video[0]
    codec = stream.codec_context.name if stream.codec_context else "nothing that FFmpeg knows"
    if codec not in CODECS:
        container.close()
        raise ValueError(f"its pictures are coded as {codec}; {_CONVERT}")
    return container, stream


def video_times(container: InputContainer, stream: VideoStream) -> VideoTimes:
    """From the file's packets, without decoding: some 3 us and 50 bytes a picture, and one pass over the file."""
    import av

    timeless = f"does not say when its pictures are shown; {_CONVERT}"
    times, lasts, starts = array("q"), array("q"), array("b")  # not packets: those hold the file's bytes
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if packet.pts is None:
                raise ValueError(timeless)
            times.append(packet.pts)
            lasts.append(packet.duration or 0)
            starts.append(packet.is_keyframe)
            if len(times) > MAX_SAMPLES:
                raise ValueError(f"more than {MAX_SAMPLES:,} pictures; cut it into parts")
    except av.FFmpegError as error:
        raise ValueError(f"damaged ({error.strerror or error}); get the file again") from None
    reordered = container.format.name == "avi" and stream.codec_context.has_b_frames  # its times are then made up
    if not times or reordered or not stream.time_base:
        raise ValueError(timeless)
    pts, first = np.unique(np.array(times), return_index=True)
    end = int(pts[-1]) + max(0, lasts[first[-1]] or int(pts[-1]) - int(pts[-2:][0]))
    length = (end - int(pts[0])) * float(stream.time_base)
    if length > MAX_LENGTH_S:
        raise ValueError(f"says that it lasts {length:.3g} seconds, at most {MAX_LENGTH_S:,} are read; {_CONVERT}")
    return VideoTimes(pts, np.flatnonzero(np.array(starts)[first]), float(stream.time_base), end)


def _format(path: Path) -> str:
    """Which of the three kinds a video file is by how it begins. ValueError for an mp4 whose index would be huge."""
    size = regular(path).st_size
    with path.open("rb") as file:
        start = file.read(4)
        if start == b"\x1aE\xdf\xa3":
            return "matroska"
        if start == b"RIFF":
            return "avi"
        samples = edits = 0
        for box in _boxes(file, size):
            for track in box.split(b"trak"):  # FFmpeg counts for the last one, wherever in it a table is
                samples += _samples(track)
                edits = max(edits, *_counts(track, b"elst", 8), 1)
    if samples > size or samples * edits > MAX_SAMPLES:
        said = f"{samples:,} pictures and samples of sound in {size:,} bytes, {edits} parts"
        raise ValueError(f"says that it has {said}; at most {MAX_SAMPLES:,} are read; {_CONVERT}")
    return "mov"


def regular(path: Path) -> os.stat_result:
    """ValueError where reading would wait forever (a named pipe) or never end (a device)."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file")
    return found


def _boxes(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The outermost boxes of an mp4, without those of data."""
    start = 0
    for _ in range(MAX_BOXES):
        file.seek(start)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4]), head[4:8]
        length = {0: size - start, 1: int.from_bytes(head[8:])}.get(length, length)
        if len(head) < 8 or length < 8:
            return
        if kind != b"mdat":
            there = min(length, size - start)
            if there > MAX_HEADER:
                raise ValueError(f"an index of {there:,} bytes, at most {MAX_HEADER:,} are read; {_CONVERT}")
            file.seek(start)
            yield file.read(there)
        start += length
    raise ValueError(f"more than {MAX_BOXES:,} parts; {_CONVERT}")


def _samples(track: bytes) -> int:
    """How many entries FFmpeg would make in its index; for plain sound, each lasting a tick, it makes them by chunk."""
    if b"cmov" in track or b"saiz" in track or b"senc" in track:
        raise ValueError(f"compressed or encrypted; {_CONVERT}")
    fragments = sum(_counts(track, b"trun", 8))
    durations = _counts(track, b"stts", 16)
    if b"vide" not in track and _counts(track, b"stts", 8) == [1] and durations == [1]:
        return fragments
    return fragments + sum(_counts(track, b"stsz", 12) + _counts(track, b"stz2", 12))


def _counts(header: bytes, kind: bytes, offset: int) -> list[int]:
    """The 32-bit numbers that stand `offset` after each place where a box of that kind may start."""
    places = (found.start() + offset for found in re.finditer(kind, header))
    return [int.from_bytes(header[place : place + 4]) for place in places]


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
    try:
        if path.is_dir():
            return len(images_in(path))
        if path.suffix.lower() in VIDEOS:
            container, stream = open_video(path)
            with container:
                return video_times(container, stream).count(fps)
        return len(ArrowFrames(path))
    except (OSError, ValueError, OverflowError):
        return None


def read_frames(path: Path, frames: Iterable[int]) -> list[str]:
    """The base64 JPEGs of some frames (absolute numbers) from an Arrow file's column `frame`; of other files none:
    they would have to be decoded."""
    if path.is_dir() or path.suffix.lower() in VIDEOS:
        return []
    rows = ArrowFrames(path)
    return [bytes(rows.row(number)).decode() for number in frames if number < len(rows)]
