"""Pass 1: decode and check the clips of a part, spool them as Arrow, and keep what the whole input must decide on.

Costs one typed decode of the JSON and some 3 us a turn. Texts and turns go to disk for pass 2; in memory stays one
`ClipInfo` a clip, about 1 kB.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import operator
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import labels
from pipeline.dataset import flat_lists
from pipeline.readers import decode
from pipeline.readers.clip import EVERYWHERE, Clip, ClipError, Range
from pipeline.readers.index import NOT_STRICT
from pipeline.schema import CLIPS, ROLES
from pipeline.state import contradicts

GROUP_CLIPS: Final = 256
GROUP_BYTES: Final = 64 << 20
NONE: Final = -1  # in an extent: a clip without such turns

_AS_STORED: Final = (
    *("video_uid", "recording_id", "dataset", "clip_idx", "fps", "frames_file", "goal", "knowledge"),
    *("steps", "initial_state", "neg_rate"),
)
_FRAMES = ("start_frame", "end_frame")  # int64 in the spool, as the source has them
_SPOOL_TYPES: Final = {"role": pa.int8(), "start_frame": pa.int64(), "end_frame": pa.int64()}  # role: index in ROLES
_TURN = pa.struct([f.with_type(_SPOOL_TYPES.get(f.name, f.type)) for f in CLIPS.field("turns").type.value_type])
SPOOL: Final = pa.schema(
    [
        *(pa.field(name, CLIPS.field(name).type) for name in _AS_STORED),
        ("unlabelled", pa.list_(pa.struct([(name, pa.int64()) for name in _FRAMES]))),
        ("convention", pa.string()),  # null: as in the rest of the file
        ("summaries", pa.int32()),
        ("turns", pa.list_(_TURN)),
    ]
)
_ROLE_CODES: Final = {role: code for code, role in enumerate(ROLES)}


@dataclass(slots=True)
class ClipInfo:
    """What the decisions on the whole input need of one clip, and what they decide. An extent is (first start, last
    end) of some turns with frames, as the source has them; (-1, -1) without any."""

    clip: Clip  # in the end without texts, steps and turns
    number: int  # in its file
    span: Range  # bytes
    recording_id: str
    clip_id: str = ""
    tracked: bool = False  # whether it says anything about the dialog state
    contradicted: bool = False  # whether the given state makes one of the clip's own updates impossible
    extent: Range = (NONE, NONE)  # of the non-system turns
    dst_extent: Range = (NONE, NONE)  # of the DST_UPDATE turns
    first_end: int = NONE  # end of the first of the non-system turns by end
    votes: Sequence[int] = (0, 0, 0, 0)  # timed turns, and those of them that fit lead-in, event, window
    updates: bytes = b""  # those of placed turns, as msgpack of (start, end, step id, transition): 20 bytes each
    keep: bool = True
    bounds: Range = (0, 0)
    state: Mapping[str, str] | None = None  # replayed; None: as given

    @property
    def placed(self) -> bool:
        """Whether the reader gave the turns their frames: the file's convention is not theirs."""
        return self.clip.convention is not None

    @property
    def given(self) -> tuple[int | None, int | None]:
        """The bounds as given."""
        return self.clip.start_frame, self.clip.end_frame

    @property
    def unbounded(self) -> bool:
        """Whether `given` is the 0..0 that generators write for a clip without DST updates."""
        return self.given == (0, 0) and self.dst_extent[1] == NONE and self.extent[1] > 0


@dataclass
class Extracted:
    """Pass 1's result for a part."""

    spool: str
    clips: list[ClipInfo]
    refused: list[tuple[int, ClipError, Range, str | None]]  # number in the file, why, bytes, id


def extract(path: str, spans: np.ndarray, first: int, spool: str, fps: float | None, recording: str) -> Extracted:
    """Decode, check and spool the clips of a part of a file. They lie at `spans` (int64 [clips, 2] bytes).

    first: number of the part's first clip in the file; fps: --fps; recording: the pattern of recording_id. The spool is
    renamed into place, so that two tries of one part, of which a cluster lost one, do not meet.
    """
    pattern, result = re.compile(recording), Extracted(spool, [], [])
    new = Path(f"{spool}.{secrets.token_hex(4)}")
    with open(path, "rb") as file, pa.ipc.new_file(new, SPOOL) as writer, without_gc():
        for begin, stop in cut(spans[:, 1] - spans[:, 0], GROUP_CLIPS, GROUP_BYTES):
            infos = []
            for number, (start, end) in enumerate(spans[begin:stop].tolist(), first + begin):
                raw = os.pread(file.fileno(), end - start, start)
                try:
                    clip = decode(raw, fps)
                except ClipError as error:
                    result.refused.append((number, error, (start, end), _own_id(raw)))
                    continue
                match = pattern.search(clip.video_uid)
                take = match and (match[1] if pattern.groups else match[0])
                infos.append(ClipInfo(clip, number, (start, end), take or clip.video_uid))
            batch = _spooled(infos)
            writer.write_batch(batch)
            at, turns = flat_lists(batch.column("turns"))
            _describe(infos, turns, at)
            _measure(infos, turns, np.repeat(np.arange(len(infos)), np.diff(at)))
            result.clips += infos
    new.rename(spool)
    return result


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Clips hold no cycles: looking for some only costs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def cut(sizes: Sequence[int] | np.ndarray, most: int, total: int) -> Iterator[Range]:
    """Ranges of consecutive items: at most `most` of them and, beyond a single one, of `total` size."""
    begin, used = 0, 0
    for i, size in enumerate(np.asarray(sizes).tolist()):
        if i > begin and (i - begin >= most or used + size > total):
            yield begin, i
            begin, used = i, 0
        used += size
    if len(sizes):
        yield begin, len(sizes)


def _spooled(infos: list[ClipInfo]) -> pa.RecordBatch:
    """The clips as Arrow. Their turns become arrays over all clips: Arrow takes nested lists ten times slower."""
    clips = [info.clip for info in infos]
    flat = [list(chain.from_iterable(part)) for part in zip(*[clip.turns for clip in clips], strict=True)]
    roles, contents, time, start, end = flat or [[]] * 5
    role = np.fromiter(map(_ROLE_CODES.__getitem__, roles), np.int8, len(roles))
    which = np.flatnonzero(role == ROLES.index("DST_UPDATE"))
    changes = [contents[turn] for turn in which.tolist()]
    sizes = np.zeros(len(roles) + 1, np.int32)
    sizes[which + 1] = list(map(len, changes))
    for turn in which.tolist():
        contents[turn] = None
    updates = [update for change in changes for update in change]
    ids = pa.array([update.id for update in updates], pa.string())
    transitions = pa.array([update.transition for update in updates], pa.string())
    offsets = pa.array(np.cumsum(sizes, dtype=np.int32))
    type_ = _TURN.field("updates").type
    pairs = pa.StructArray.from_arrays([ids, transitions], fields=[*type_.value_type])
    each = pa.ListArray.from_arrays(offsets, pc.binary_join_element_wise(ids, transitions, "->"))
    columns = [
        pa.array(role),
        pc.coalesce(pa.array(contents, pa.string()), pc.binary_join(each, ", ")),  # 'S1->complete, S2->start'
        *(pa.array(column, pa.int64()) for column in (start, end)),
        pa.array(time, pa.float64()),
        pa.ListArray.from_arrays(offsets, pairs, type=type_),
    ]
    turns = pa.StructArray.from_arrays(columns, fields=list(_TURN))
    offsets = pa.array(np.cumsum([0, *(len(clip.turns[0]) for clip in clips)], dtype=np.int32))
    values = {
        "recording_id": [info.recording_id for info in infos],
        "dataset": [clip.dataset or "unknown" for clip in clips],
        "clip_idx": [clip.clip_idx or 0 for clip in clips],
        "initial_state": [list((clip.initial_state or {}).items()) for clip in clips],
        "turns": pa.ListArray.from_arrays(offsets, turns, type=SPOOL.field("turns").type),
    }
    for name in set(SPOOL.names) - set(values):
        values[name] = list(map(operator.attrgetter(name), clips))
    return pa.RecordBatch.from_pydict(values, SPOOL)


def _own_id(raw: bytes) -> str | None:
    """The `id` of a refused clip, where it can be read."""
    with contextlib.suppress(*NOT_STRICT, KeyError):
        given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])["id"]
        return str(msgspec.json.decode(given, type=str | int))
    return None


def _describe(infos: list[ClipInfo], turns: pa.StructArray, at: np.ndarray) -> None:
    """Each clip's id, and what it says about the dialog state; turns[at[i] : at[i + 1]] are its turns, which go.

    The id is the clip's own, else its video, number, user and a digest of its conversation: a function of the clip
    alone, so that two conversations over one video differ, a true duplicate does not, and other clips change nothing.
    """
    start, end = (turns.field(name).fill_null(none) for name, none in zip(_FRAMES, labels.NO_FRAMES, strict=True))
    time = turns.field("time_s").fill_null(np.nan).to_numpy().view(np.int64)
    size = pc.binary_length(turns.field("text"))
    numbers = np.stack([turns.field("role"), start, end, time, size], axis=1, dtype=np.int64)
    for info, begin, stop in zip(infos, at, at[1:], strict=False):
        clip = info.clip
        if clip.id is None:
            said = hashlib.sha256(numbers[begin:stop].tobytes())
            said.update("".join(turns.field("text")[begin:stop].to_pylist()).encode())
            said.update(f"{clip.start_frame} {clip.end_frame}".encode())
        parts = (clip.video_uid, clip.clip_idx, clip.user, said.hexdigest()[:8]) if clip.id is None else (clip.id,)
        info.clip_id = "_".join(str(part) for part in parts if part is not None)
        roles, contents, _, starts, ends = clip.turns
        own = [(starts[i], ends[i], contents[i]) for i, role in enumerate(roles) if role == "DST_UPDATE"]
        flat = [(a, b, u.id, u.transition) for a, b, us in own if a is not None and b is not None for u in us]
        info.updates, info.tracked = msgspec.msgpack.encode(flat), bool(clip.steps or own)
        if clip.initial_state:
            changes = [(update.id, update.transition) for _, _, updates in own for update in updates]
            info.contradicted = contradicts(clip.initial_state, changes)
        clip.turns, clip.goal, clip.knowledge, clip.steps = (), None, None, ()
        clip.unlabelled = EVERYWHERE if tuple(clip.unlabelled) == EVERYWHERE else ()


def _measure(infos: list[ClipInfo], turns: pa.StructArray, owner: np.ndarray) -> None:
    """The clips' extents, and how their turns [T] vote on the file's convention; owner [T]: each turn's clip."""
    start, end, time = (turns.field(name).to_numpy(zero_copy_only=False) for name in (*_FRAMES, "time_s"))
    role = turns.field("role").to_numpy()
    framed = (role != ROLES.index("system")) & turns.field("end_frame").is_valid().to_numpy(zero_copy_only=False)

    def extents(which: np.ndarray, low: np.ndarray) -> list[Range]:
        first, last = np.full(len(infos), np.iinfo(np.int64).max), np.full(len(infos), NONE)
        np.minimum.at(first, owner[which], low[which].astype(np.int64))
        np.maximum.at(last, owner[which], end[which].astype(np.int64))
        return list(zip(np.where(last == NONE, NONE, first).tolist(), last.tolist(), strict=True))

    columns = extents(framed, start), extents(framed & (role == ROLES.index("DST_UPDATE")), start), extents(framed, end)
    for info, extent, dst_extent, of_ends in zip(infos, *columns, strict=True):
        info.extent, info.dst_extent, info.first_end = extent, dst_extent, of_ends[0]
    voting = framed & ~np.isnan(time) & np.array([not info.placed for info in infos], bool)[owner]
    firsts = [  # bounds that are the DST turns' may leave turns out
        info.extent[0] if info.unbounded or info.given[0] is None or info.given == info.dst_extent else info.given[0]
        for info in infos
    ]
    start, end, owner = start[voting].astype(np.int64), end[voting].astype(np.int64), owner[voting]
    frame = time[voting] * np.array([info.clip.fps for info in infos])[owner]
    votes = labels.vote(owner, start, end, frame, np.array(firsts, np.int64))
    for info, counts in zip(infos, votes.tolist(), strict=True):
        info.votes = counts
