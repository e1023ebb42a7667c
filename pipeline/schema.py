"""What is on disk: every column's type, unit and meaning, the manifest's place, and the sampling draw.

A column's documentation travels inside the Parquet file (Arrow field metadata `doc`), and `SCHEMA_HASH` changes
with any column, type or meaning, so a reader can refuse what it was not written for. The draw is no column (it would be
88% of the file) but a pure function of (sampling_seed, epoch, frame), for numpy and as a polars expression.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, Literal, get_args

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import polars as pl

SCHEMA_VERSION: Final = 2
NOT_SAMPLED: Final = -100  # label of a frame that carries no loss
MANIFEST: Final = "manifest.json"
QUARANTINE: Final = "quarantine.jsonl"

ROLES: Final = ("system", "user", "assistant", "DST_UPDATE")
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
# a checkpoint knows the states' tokens by their place in this order
State = Literal["not_started", "in_progress", "paused", "completed", "cancelled", "failed"]
STATES: Final = get_args(State)

# the two heads; their order is that of the rows of every labels or logits array [2, F]
HEADS: Final = ("speaking", "dst_update")
SPEAKING, DST_UPDATE = 0, 1
HEAD_TITLES: Final = {"speaking": "speaking", "dst_update": "DST"}  # in tables and pictures
ROLE_OF: Final = {"speaking": "assistant", "dst_update": "DST_UPDATE"}  # head -> the role whose turns are its events
HEAD_OF: Final = {role: head for head, role in ROLE_OF.items()}
LABEL_COLUMNS: Final = ("speaking_label", "dst_update_label")


def _fields(text: str, **nested: list[pa.Field]) -> list[pa.Field]:
    """Columns from lines of name, type and documentation; `?`: may be null; `list`: of structs of the nested fields."""
    fields = []
    for line in text.strip().splitlines():
        name, kind, doc = line.split(maxsplit=2)
        if kind == "list":
            type_ = pa.list_(pa.field("element", pa.struct(nested[name]), nullable=False))
        else:
            type_ = pa.type_for_alias(kind.removesuffix("?"))
        fields.append(pa.field(name, type_, nullable=kind.endswith("?"), metadata={"doc": doc}))
    return fields


_TURN = _fields(
    """
role              string    system, user, assistant or DST_UPDATE
text              string    what was said; for DST_UPDATE its updates as 'S1->complete, S2->start'
start_frame       int32?    first absolute frame of the event, the source's frame convention already applied; null: \
no frames
end_frame         int32?    one past the event's last frame; null as start_frame
time_s            float64?  seconds from the video's start, as the source says
updates           list      state transitions of a DST_UPDATE turn, in order; else empty
""",
    updates=_fields("id string step id\ntransition string one of TRANSITIONS, e.g. start"),
)
FRAMES: Final = pa.schema(
    _fields("""
clip_id           string    the clip this frame belongs to
clip              int32     position of the clip in its split, from 0
frame             int32     absolute frame number in the video, from 0
time_s            float32   frame / fps, seconds from the video's start
speaking_label    int8      1 the assistant speaks here, 0 supervised silence, -100 not sampled
dst_update_label  int8      1 the state changes here, 0 supervised, -100 not sampled
""")
)
CLIPS: Final = pa.schema(
    _fields(
        """
clip_id           string    unique within its split
clip              int32     position of the clip in its split, from 0
video_uid         string    one camera's recording
recording_id      string    one real-world take, over all camera views; split and resample by this
dataset           string    the source's name; 'unknown' where it gives none
clip_idx          int32     the source's number of the clip in its video; 0 where it gives none
fps               float64   frames per second of the frame numbers, e.g. 24000/1001 to the last digit
start_frame       int32     first frame of the clip (absolute)
end_frame         int32     one past the last frame of the clip
num_frames        int32     end_frame - start_frame
frames_file       string?   where the source keeps the frames; relative
goal              string?   the task's goal
knowledge         string?   the task's recipe, as text
steps             list      the task's steps, in order; empty where the source has no DST
initial_state     list      state before the clip's first turn, replayed over the conversation's earlier clips where \
there are any, else as the source says; a step left out is not started
turns             list      the conversation, in the source's order
sampling_seed     uint64    seed of the clip's draws: a pure function of (--seed, clip_id)
neg_rate          float64   probability that a frame positive for neither head is supervised
unlabelled        list      ranges of frames that nobody annotated: -100 for both heads, in every epoch
positive          string    span: every frame of an event is positive; onset: its first alone
frame_convention  string    how the source's start_frame/end_frame were read
n_speaking        int32     frames with speaking_label 1
n_dst_update      int32     frames with dst_update_label 1
n_supervised      int32     frames with a 0 or 1 for at least one head (epoch 0)
""",
        steps=_fields("id string step id\nname string what the step is"),
        initial_state=_fields("id string step id\nstate string e.g. in_progress"),
        turns=_TURN,
        unlabelled=_fields("start_frame int32 first frame (absolute)\nend_frame int32 one past the last"),
    )
)

_DESCRIBED = "\n".join(f"{f.name}|{f.type}|{f.nullable}|{f.metadata[b'doc'].decode()}" for f in [*FRAMES, *CLIPS])
SCHEMA_HASH: Final = hashlib.sha256(f"{SCHEMA_VERSION}\n{_DESCRIBED}".encode()).hexdigest()[:16]
_METADATA = {"prospect_dst.schema_version": str(SCHEMA_VERSION), "prospect_dst.schema_hash": SCHEMA_HASH}
FRAMES = FRAMES.with_metadata(_METADATA)  # type: ignore[misc]
CLIPS = CLIPS.with_metadata(_METADATA)  # type: ignore[misc]


def shard_path(table: str, split: str, part: int) -> str:
    """Path of a shard relative to the output folder; table is `frames` or `clips`."""
    return f"{table}/split={split}/part-{part:05d}.parquet"


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
    """The same draws as a polars expression (UInt32) over a frames table joined to its clips' sampling_seed."""
    import polars as pl

    def lit(value: int) -> pl.Expr:
        return pl.lit(value & _MASK, dtype=pl.UInt64)

    def mix(x: pl.Expr) -> pl.Expr:  # polars has no >>; floor division of a UInt64 is one
        x = (x ^ (x // (1 << 30))) * lit(_MIX1)
        x = (x ^ (x // (1 << 27))) * lit(_MIX2)
        return x ^ (x // (1 << 31))

    key = mix(pl.col(seed).cast(pl.UInt64) + lit((epoch + 1) * _GAMMA))
    drawn = mix(key + (pl.col(frame).cast(pl.UInt64) + lit(1)) * lit(_GAMMA))
    return (drawn // (1 << 32)).cast(pl.UInt32).alias("draw")


def is_inside(path: str) -> bool:
    """Whether a path from a file stays below the folder it is looked up in (no '..', not absolute, no NUL)."""
    relative = path != "" and path[0] not in "/\\" and path[1:2] != ":"  # C: is a drive
    return relative and "\0" not in path and ".." not in path.replace("\\", "/").split("/")
