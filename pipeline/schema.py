"""What is on disk: every column's type, unit and meaning, the manifest's place, and the sampling draw.

The only module of `pipeline` that `trainer` may import. A column's documentation travels inside the Parquet
file (Arrow field metadata `doc`), and `SCHEMA_HASH` changes with any column, type or meaning, so a reader
can refuse what it was not written for. The sampling draw is *not* a column: it would be 88% of the file
(57 of 65 MB at 17M frames); it is a pure function of (sampling_seed, epoch, frame), given here for numpy
and as a polars expression, and pinned by golden values in the tests.

Which file holds a video's frames, and which of its pictures is frame i, is said here too, for both sides.

    F frames of a clip    P pictures in a video file
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import polars as pl
    from av.container import InputContainer
    from av.video.stream import VideoStream

SCHEMA_VERSION: Final = 1
NOT_SAMPLED: Final = -100  # label of a frame that carries no loss
MANIFEST: Final = "manifest.json"
QUARANTINE: Final = "quarantine.jsonl"

ROLES: Final = ("system", "user", "assistant", "DST_UPDATE")
CONVENTIONS: Final = ("event", "window", "lead-in")
POSITIVES: Final = ("span", "onset")
# transition -> the state that a step is in afterwards
TRANSITIONS: Final = {
    "start": "in_progress",
    "complete": "completed",
    "pause": "paused",
    "resume": "in_progress",
    "cancel": "cancelled",
    "reset": "not_started",
    "fail": "failed",
}
STATES: Final = tuple(dict.fromkeys(TRANSITIONS.values()))


def _field(name: str, type_: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"doc": doc})


def _list(*fields: pa.Field) -> pa.DataType:
    return pa.list_(pa.field("element", pa.struct(fields), nullable=False))


_UPDATE = _list(
    _field("id", pa.string(), "step id"), _field("transition", pa.string(), "one of TRANSITIONS, e.g. start")
)
_TURN = _list(
    _field("role", pa.string(), "system, user, assistant or DST_UPDATE"),
    _field("text", pa.string(), "what was said; for DST_UPDATE its updates as 'S1->complete, S2->start'"),
    _field(
        "start_frame",
        pa.int32(),
        "first absolute frame of the event, the source's frame convention already applied; null: no frames",
        nullable=True,
    ),
    _field("end_frame", pa.int32(), "one past the event's last frame; null as start_frame", nullable=True),
    _field("time_s", pa.float64(), "seconds from the video's start, as the source says", nullable=True),
    _field("updates", _UPDATE, "state transitions of a DST_UPDATE turn, in order; else empty"),
)  # fmt: skip

FRAMES: Final = pa.schema(
    [
        _field("clip_id", pa.string(), "the clip this frame belongs to"),
        _field("clip", pa.int32(), "position of the clip in its split, from 0"),
        _field("frame", pa.int32(), "absolute frame number in the video, from 0"),
        _field("time_s", pa.float32(), "frame / fps, seconds from the video's start"),
        _field("speaking_label", pa.int8(), "1 the assistant speaks here, 0 supervised silence, -100 not sampled"),
        _field("dst_update_label", pa.int8(), "1 the state changes here, 0 supervised, -100 not sampled"),
    ]
)  # fmt: skip

CLIPS: Final = pa.schema(
    [
        _field("clip_id", pa.string(), "unique within its split"),
        _field("clip", pa.int32(), "position of the clip in its split, from 0"),
        _field("video_uid", pa.string(), "one camera's recording"),
        _field("recording_id", pa.string(), "one real-world take, over all camera views; split and resample by this"),
        _field("dataset", pa.string(), "the source's name; 'unknown' where it gives none"),
        _field("clip_idx", pa.int32(), "the source's number of the clip in its video; 0 where it gives none"),
        _field("fps", pa.float32(), "frames per second of the frame numbers"),
        _field("start_frame", pa.int32(), "first frame of the clip (absolute)"),
        _field("end_frame", pa.int32(), "one past the last frame of the clip"),
        _field("num_frames", pa.int32(), "end_frame - start_frame"),
        _field("frames_file", pa.string(), "where the source keeps the frames; relative", nullable=True),
        _field("goal", pa.string(), "the task's goal", nullable=True),
        _field("knowledge", pa.string(), "the task's recipe, as text", nullable=True),
        _field(
            "steps",
            _list(_field("id", pa.string(), "step id"), _field("name", pa.string(), "what the step is")),
            "the task's steps, in order; empty where the source has no DST",
        ),
        _field(
            "initial_state",
            _list(_field("id", pa.string(), "step id"), _field("state", pa.string(), "e.g. in_progress")),
            "state before the clip's first turn, as the source says; a step left out is not started",
        ),
        _field("turns", _TURN, "the conversation, in the source's order"),
        _field("sampling_seed", pa.uint64(), "seed of the clip's draws: a pure function of (--seed, clip_id)"),
        _field("neg_rate", pa.float64(), "probability that a frame positive for neither head is supervised"),
        _field("positive", pa.string(), "span: every frame of an event is positive; onset: its first alone"),
        _field("frame_convention", pa.string(), "how the source's start_frame/end_frame were read"),
        _field("n_speaking", pa.int32(), "frames with speaking_label 1"),
        _field("n_dst_update", pa.int32(), "frames with dst_update_label 1"),
        _field("n_supervised", pa.int32(), "frames with a 0 or 1 for at least one head (epoch 0)"),
    ]
)  # fmt: skip


def _described(schema: pa.Schema) -> str:
    return "\n".join(f"{f.name}|{f.type}|{f.nullable}|{f.metadata[b'doc'].decode()}" for f in schema)


SCHEMA_HASH: Final = hashlib.sha256(
    f"{SCHEMA_VERSION}\n{_described(FRAMES)}\n{_described(CLIPS)}".encode()
).hexdigest()[:16]
_METADATA = {"prospect_dst.schema_version": str(SCHEMA_VERSION), "prospect_dst.schema_hash": SCHEMA_HASH}
FRAMES = FRAMES.with_metadata(_METADATA)  # type: ignore[misc]
CLIPS = CLIPS.with_metadata(_METADATA)  # type: ignore[misc]


def shard_path(table: str, split: str, part: int) -> str:
    """Path of a shard relative to the output folder; table is `frames` or `clips`."""
    return f"{table}/split={split}/part-{part:05d}.parquet"


# ---- the sampling draw -------------------------------------------------------------------------------

_GAMMA = 0x9E3779B97F4A7C15  # splitmix64's increment, and its two multipliers
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def sampling_seed(seed: int, clip_id: str) -> int:
    """uint64 seed of one clip's draws: the first 8 bytes of SHA-256 of 'seed:clip_id' (never `hash()`)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{clip_id}".encode()).digest()[:8], "little")


def rate_threshold(rate: float) -> int:
    """Draws strictly below this integer are supervised: round(rate * 2**32), 2**32 for rate 1."""
    return round(rate * 2**32)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser of uint64 [F], modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


def draws(seed: int | np.ndarray, epoch: int, frames: np.ndarray) -> np.ndarray:
    """uint32 draws [F] for absolute `frames` [F]; seed: one clip's sampling_seed, or uint64 [F].

    key = mix(seed + (epoch + 1) * GAMMA); draw = mix(key + (frame + 1) * GAMMA) >> 32, all modulo 2**64.
    Source of the mixer: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    key = _mix(np.atleast_1d(np.asarray(seed, np.uint64)) + np.uint64((epoch + 1) * _GAMMA & _MASK))
    counter = (frames.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    return (_mix(key + counter) >> np.uint64(32)).astype(np.uint32)


def draw_expr(epoch: int = 0, seed: str = "sampling_seed", frame: str = "frame") -> pl.Expr:
    """The same draws as a polars expression (UInt32) over a frames table joined to its clips' sampling_seed.

    supervised-at-another-rate, in one line:
        frames.join(clips.select("clip", "sampling_seed"), on="clip")
              .with_columns(kept=draw_expr().cast(pl.UInt64) < rate_threshold(0.25))
    """
    import polars as pl

    def lit(value: int) -> pl.Expr:
        return pl.lit(value & _MASK, dtype=pl.UInt64)

    def mix(x: pl.Expr) -> pl.Expr:
        x = (x ^ _shift_right(x, 30)) * lit(_MIX1)
        x = (x ^ _shift_right(x, 27)) * lit(_MIX2)
        return x ^ _shift_right(x, 31)

    key = mix(pl.col(seed).cast(pl.UInt64) + lit((epoch + 1) * _GAMMA))
    drawn = mix(key + (pl.col(frame).cast(pl.UInt64) + lit(1)) * lit(_GAMMA))
    return _shift_right(drawn, 32).cast(pl.UInt32).alias("draw")


def _shift_right(x: pl.Expr, bits: int) -> pl.Expr:
    return x // (1 << bits)  # polars has no >>; floor division of a UInt64 is one


# ---- where a clip's frames lie, and which is which -----------------------------------------------------

_SUSPECT: Final = ("..", "\\", ":", "\0")


def is_inside(path: str) -> bool:
    """Whether a path from a file stays below the folder it is looked up in (no '..', not absolute, no NUL)."""
    if path and path[0] != "/" and not any(sign in path for sign in _SUSPECT):
        return True  # the usual case, in a tenth of the time
    windows = PureWindowsPath(path)
    return not (
        not path
        or "\0" in path
        or PurePosixPath(path).is_absolute()
        or windows.drive
        or windows.root
        or ".." in windows.parts
    )


VIDEOS: Final = (".mp4", ".mkv", ".webm", ".mov", ".avi")
IMAGES: Final = (".jpg", ".jpeg", ".png")


def find_frames(root: Path, video_uid: str, frames_file: str | None) -> Path | None:
    """The Arrow file, the video file or the folder of images with a video's frames below `root`, or None.

    Tried in order: root/frames_file; then, as .arrow, as one of VIDEOS (.mp4, .MP4) and as a folder that holds an
    image, its bare name and video_uid in root and root/frames, each with and without the prefix before 'nusar-'
    (in the public data the two names differ by it).
    """
    if frames_file and is_inside(frames_file) and _holds_frames(root / frames_file):
        return root / frames_file
    stems = [_stem(frames_file), video_uid] if frames_file else [video_uid]
    stems += [stem[stem.index("nusar-") :] for stem in stems if "nusar-" in stem]
    stems = [stem for stem in dict.fromkeys(stems) if is_inside(stem)]
    endings = [".arrow", *(ending for video in VIDEOS for ending in (video, video.upper()))]
    tried = [folder / f"{stem}{end}" for end in endings for stem in stems for folder in (root, root / "frames")]
    folders = [folder / stem for stem in stems for folder in (root, root / "frames")]
    found = (path for path in tried if path.is_file())
    return next(found, None) or next((path for path in folders if _holds_frames(path)), None)


def _stem(frames_file: str) -> str:
    path = Path(frames_file)
    return path.stem if path.suffix.lower() in (".arrow", *VIDEOS) else path.name


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
    found = [re.findall("[0-9]+", Path(name).stem) for name in names]
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


def open_video(path: Path) -> tuple[InputContainer, VideoStream]:
    """A video file, never a playlist that leads elsewhere. ValueError or OSError where it can't be read."""
    import av

    options = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi", "protocol_whitelist": "file"}
    try:
        container = av.open(os.path.abspath(path), container_options=options)
    except av.FFmpegError as error:
        raise ValueError(f"not a video that can be read ({error.strerror or error}); get the file again") from None
    if not container.streams.video:
        raise ValueError("no video in it, or not its end; get the file again")
    return container, container.streams.video[0]


def video_times(container: InputContainer, stream: VideoStream) -> VideoTimes:
    """From the file's packets, without decoding: some 3 us a picture and one pass over the file."""
    import av

    try:  # tuples, not packets: those hold the file's bytes
        told = [(p.pts, p.is_keyframe, p.duration or 0) for p in container.demux(stream) if p.size and not p.is_discard]
    except av.FFmpegError as error:
        raise ValueError(f"damaged ({error.strerror or error}); get the file again") from None
    reordered = container.format.name == "avi" and stream.codec_context.has_b_frames  # its times are then made up
    if not told or any(pts is None for pts, _, _ in told) or reordered or stream.time_base is None:
        raise ValueError("does not say when its pictures are shown; convert it: ffmpeg -i IT -c:v libx264 OUT.mp4")
    pts, first = np.unique(np.array([time for time, _, _ in told], np.int64), return_index=True)
    keys = np.flatnonzero([told[i][1] for i in first])
    last = told[first[-1]][2] or int(np.diff(pts[-2:]).sum())
    return VideoTimes(pts, keys, float(stream.time_base), int(pts[-1]) + last)
