"""Pass 1: decode and check the clips of a part, spool them as Arrow, and keep what the whole input must decide on.

Costs one typed decode of the JSON and some 3 us a turn. Texts and turns go to disk for pass 2; in memory stays one
`ClipInfo` a clip, about 1 kB.

    C clips, T turns
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
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import labels, state
from pipeline.readers import decode
from pipeline.readers.clip import EVERYWHERE, NOT_STRICT, Clip, ClipError, Range, Refusal, refuse
from pipeline.readers.index import MAX_CLIP_BYTES
from pipeline.schema import CLIPS, ROLES, STATES
from pipeline.storage import move

GROUP_CLIPS: Final = 256
GROUP_BYTES: Final = 64 << 20
NONE: Final = -1  # in an extent: a clip without such turns
ECHO_BYTES: Final = 20  # a shorter text ("yes") is repeated by chance

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
ROLE_CODES: Final = {role: code for code, role in enumerate(ROLES)}
_SYSTEM, _USER, _ASSISTANT, _DST = range(len(ROLES))
_UPDATE = operator.attrgetter("id", "transition")
_ANY_STATE: Final = re.compile(rf":\s*(?:{'|'.join(STATES)})\b")  # a quick look before
_STEP_STATE: Final = re.compile(rf"(\S+)\s*:\s*({'|'.join(STATES)})\b")


@dataclass(frozen=True)
class Task:
    """A part of one file: where its clips lie, and the first one's number in the file."""

    file: str
    spans: np.ndarray  # int64 [C, 2] bytes
    first: int
    spool: str
    fps: float | None  # of --fps


@dataclass(slots=True)
class ClipInfo:
    """What the decisions on the whole input need of one clip, and what they decide. An extent is (first start, last
    end) of some turns with frames, as the source has them; (-1, -1) without any."""

    clip: Clip  # in the end without texts, steps and turns
    number: int  # in its file
    span: Range  # bytes
    recording_id: str
    clip_id: str = ""
    placed: bool = False  # whether the reader gave the turns their frames: the file's convention is not theirs
    given: tuple[int | None, int | None] = (None, None)  # bounds
    unbounded: bool = False  # whether `given` is the 0..0 that generators write for a clip without DST updates
    tracked: bool = False  # whether it says anything about the dialog state
    annotated: bool = False  # whether anybody annotated some of its frames
    contradicted: bool = False  # whether the given state makes one of the clip's own updates impossible
    system_contradicted: bool = False  # the same of the states that its system turns name
    extent: Range = (NONE, NONE)  # of the non-system turns
    dst_extent: Range = (NONE, NONE)  # of the DST_UPDATE turns
    first_end: int = NONE  # end of the first of the non-system turns by end
    votes: Sequence[int] = (0, 0, 0, 0)  # timed turns, and those of them that fit lead-in, event, window
    updates: Updates | None = None  # of its group,
    own_updates: Range = (0, 0)  # and which of them are its
    keep: bool = True
    bounds: Range = (0, 0)
    state: Mapping[str, str] | None = None  # replayed; None: as given


class Updates(NamedTuple):
    """The state updates of a group of clips as flat columns: compact to keep, and to send between processes."""

    start: np.ndarray  # int64 [U] of their turns
    end: np.ndarray
    ids: pa.StringArray
    transitions: pa.StringArray

    def rows(self) -> list[tuple[int, int, str, str]]:
        return list(zip(self.start.tolist(), self.end.tolist(), *(c.to_pylist() for c in self[2:]), strict=True))


@dataclass
class Extracted:
    """Pass 1's result for a part."""

    spool: str
    clips: list[ClipInfo]
    refused: list[Refusal]
    spoken: int = 0  # assistant turns
    echoed: int = 0  # of those, whose whole text stands in an earlier user turn


def extract(task: Task, recording: str) -> Extracted:
    """Decode, check and spool the clips of a part; `recording` is the pattern of recording_id.

    The spool is renamed into place, so that two tries of one part, of which a cluster lost one, do not meet.
    """
    pattern, result = re.compile(recording), Extracted(task.spool, [], [])
    new = Path(f"{task.spool}.{secrets.token_hex(4)}")
    with open(task.file, "rb") as file, pa.ipc.new_file(new, SPOOL) as spool, without_gc():
        for first, last in cut(task.spans[:, 1] - task.spans[:, 0], GROUP_CLIPS, GROUP_BYTES):
            infos = _decode(task, file.fileno(), range(first, last), pattern, result.refused)
            turns = _flatten([info.clip for info in infos])
            spool.write_batch(_spooled(infos, turns))
            _describe(infos, turns)
            result.clips += infos
            result.spoken += int((turns.role == _ASSISTANT).sum())
            result.echoed += _echoes(turns)
    move(new, Path(task.spool))
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


def _decode(
    task: Task, handle: int, which: range, recording: re.Pattern[str], refused: list[Refusal]
) -> list[ClipInfo]:
    """The checked clips of some of the task's spans; the others go to `refused`."""
    infos = []
    for i in which:
        start, end = task.spans[i].tolist()
        raw = os.pread(handle, end - start, start) if end - start <= MAX_CLIP_BYTES else b""
        try:
            clip = decode(raw, end - start, task.fps)
            match = recording.search(clip.video_uid)
            take = (match[1] if recording.groups else match[0]) if match else None
            infos.append(ClipInfo(clip, task.first + i, (start, end), take or clip.video_uid))
        except ClipError as error:
            clip_id = None  # for the quarantine line
            with contextlib.suppress(*NOT_STRICT, KeyError):
                given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])["id"]
                clip_id = str(msgspec.json.decode(given, type=str | int))
            refused.append(refuse(task.file, task.first + i, error, (start, end), clip_id))
    return infos


# ---- turns as flat arrays ----------------------------------------------------------------------------


class _Turns(NamedTuple):
    """All turns [T] of C clips, end to end."""

    offsets: np.ndarray  # int32 [C + 1]
    owner: np.ndarray  # [T] the turn's clip
    role: np.ndarray  # int8 [T] code in ROLES
    start: np.ndarray  # int64 [T]
    end: np.ndarray  # int64 [T]
    text: list[Any]  # not of DST_UPDATE turns
    updates: Updates
    begins: list[int]  # [C + 1] of each clip's in `updates`
    spooled: pa.StructArray


def _flatten(clips: list[Clip]) -> _Turns:
    columns = [list(chain.from_iterable(part)) for part in zip(*[clip.turns for clip in clips], strict=True)]
    roles, text, time, start, end = columns or [[]] * 5
    offsets = np.cumsum([0, *(len(clip.turns[0]) for clip in clips)], dtype=np.int32)
    role = np.fromiter(map(ROLE_CODES.__getitem__, roles), np.int8, len(roles))
    which, counts = np.flatnonzero(role == _DST), np.zeros(len(role), np.int32)
    content = [text[turn] for turn in which.tolist()]
    counts[which] = list(map(len, content))
    for turn in which.tolist():
        text[turn] = None
    ids, transitions = zip(*map(_UPDATE, chain.from_iterable(content)), strict=True) if counts.any() else ((), ())
    update_offsets = np.cumsum([0, *counts.tolist()], dtype=np.int32)
    pairs = [pa.array(ids, pa.string()), pa.array(transitions, pa.string())]
    type_ = _TURN.field("updates").type
    struct = pa.StructArray.from_arrays(pairs, fields=[*type_.value_type])
    lists = pa.ListArray.from_arrays(pa.array(update_offsets), struct, type=type_)
    each = pc.binary_join_element_wise(*pairs, "->")
    written = pc.binary_join(pa.ListArray.from_arrays(lists.offsets, each), ", ")  # 'S1->complete, S2->start'
    frames = [pa.array(column, pa.int64()) for column in (start, end)]
    starts, ends = (column.fill_null(none).to_numpy() for column, none in zip(frames, labels.NO_FRAMES, strict=True))
    turn_of = np.repeat(np.arange(len(role)), counts)
    said = pc.coalesce(pa.array(text, pa.string()), written)
    return _Turns(
        offsets=offsets,
        owner=np.repeat(np.arange(len(clips)), np.diff(offsets)),
        role=role,
        start=starts,
        end=ends,
        text=text,
        updates=Updates(starts[turn_of], ends[turn_of], *pairs),
        begins=update_offsets[offsets].tolist(),
        spooled=pa.StructArray.from_arrays(
            [pa.array(role), said, *frames, pa.array(time, pa.float64()), lists], fields=list(_TURN)
        ),
    )


def _spooled(infos: list[ClipInfo], turns: _Turns) -> pa.RecordBatch:
    clips = [info.clip for info in infos]
    columns = {
        "recording_id": [info.recording_id for info in infos],
        "dataset": [clip.dataset or "unknown" for clip in clips],
        "clip_idx": [clip.clip_idx or 0 for clip in clips],
        "initial_state": [list((clip.initial_state or {}).items()) for clip in clips],
        "turns": pa.ListArray.from_arrays(pa.array(turns.offsets), turns.spooled, type=SPOOL.field("turns").type),
    }
    for name in set(SPOOL.names) - set(columns):
        columns[name] = list(map(operator.attrgetter(name), clips))
    return pa.RecordBatch.from_pydict(columns, SPOOL)


def _echoes(turns: _Turns) -> int:
    """Assistant turns whose whole text stands in an earlier user turn of their clip."""
    size = pc.binary_length(turns.spooled.field("text")).to_numpy()
    heard = turns.role == _USER
    longest = np.zeros(len(turns.offsets) - 1, size.dtype)  # user turn of a clip: a longer text stands in none
    np.maximum.at(longest, turns.owner[heard], size[heard])
    long_enough = (size >= ECHO_BYTES) & (size <= longest[turns.owner])
    found = 0
    for turn in np.flatnonzero((turns.role == _ASSISTANT) & long_enough).tolist():
        first = turns.offsets[turns.owner[turn]]
        earlier = (np.flatnonzero(heard[first:turn]) + first).tolist()
        found += any(turns.text[turn] in turns.text[one] for one in earlier)
    return found


# ---- what is kept in memory --------------------------------------------------------------------------


def _describe(infos: list[ClipInfo], turns: _Turns) -> None:
    """Fill in what is kept in memory of some clips; their texts, steps and turns go."""
    framed = (turns.role != _SYSTEM) & (turns.end != labels.NO_FRAMES[1])
    extents, dst_extents = _extents(turns, framed), _extents(turns, framed & (turns.role == _DST))
    first_ends = _extents(turns._replace(start=turns.end), framed)
    named: list[dict[str, str]] = [{} for _ in infos]  # the states that a clip's system turns name
    for turn in np.flatnonzero(turns.role == _SYSTEM).tolist():
        if _ANY_STATE.search(turns.text[turn]):
            named[turns.owner[turn]].update(_STEP_STATE.findall(turns.text[turn]))
    ids = _clip_ids([info.clip for info in infos], turns)
    for i, info in enumerate(infos):
        clip = info.clip
        info.clip_id, info.placed, info.given = ids[i], clip.convention is not None, (clip.start_frame, clip.end_frame)
        info.extent, info.dst_extent, info.first_end = extents[i], dst_extents[i], first_ends[i][0]
        info.unbounded = info.given == (0, 0) and info.dst_extent[1] == NONE and info.extent[1] > 0
        info.tracked = bool(clip.steps) or "DST_UPDATE" in clip.turns[0]
        info.annotated = tuple(clip.unlabelled) != EVERYWHERE
        info.updates, info.own_updates = turns.updates, (turns.begins[i], turns.begins[i + 1])
        if clip.initial_state or named[i]:
            own = slice(*info.own_updates)
            changes = list(zip(*(column[own].to_pylist() for column in turns.updates[2:]), strict=True))
            info.contradicted = bool(clip.initial_state) and state.contradicts(clip.initial_state or {}, changes)
            info.system_contradicted = bool(named[i]) and state.contradicts(named[i], changes)
        clip.turns, clip.goal, clip.knowledge, clip.steps, clip.unlabelled = (), None, None, (), ()
    # the votes of labels.vote; bounds that are the DST turns' may leave turns out
    firsts = [
        info.extent[0] if info.unbounded or info.given[0] is None or info.given == info.dst_extent else info.given[0]
        for info in infos
    ]
    time, unplaced = turns.spooled.field("time_s"), np.array([not info.placed for info in infos], bool)
    voting = framed & time.is_valid().to_numpy(zero_copy_only=False) & unplaced[turns.owner]
    owner, fps = turns.owner[voting], np.array([info.clip.fps for info in infos], np.float64)
    frame = labels.event_frame(time.fill_null(0.0).to_numpy()[voting], fps[owner])
    start, end = turns.start[voting], turns.end[voting]
    votes = labels.vote(owner, start, end, frame, np.array(firsts, np.int64), len(infos))
    for info, counts in zip(infos, votes.tolist(), strict=True):
        info.votes = counts


def _extents(turns: _Turns, which: np.ndarray) -> list[Range]:
    """Each clip's first start and last end among some turns; -1, -1 where it has none."""
    start = np.full(len(turns.offsets) - 1, np.iinfo(np.int64).max)
    end = np.full(len(turns.offsets) - 1, NONE)
    np.minimum.at(start, turns.owner[which], turns.start[which])
    np.maximum.at(end, turns.owner[which], turns.end[which])
    return list(zip(np.where(end == NONE, NONE, start).tolist(), end.tolist(), strict=True))


def _clip_ids(clips: list[Clip], turns: _Turns) -> list[str]:
    """Each clip's own `id`, else its video, number, user and a digest of its conversation.

    A function of the clip alone, so that other clips never rename it: two conversations over one video differ in the
    digest, a true duplicate does not.
    """
    if all(clip.id is not None for clip in clips):
        return [str(clip.id) for clip in clips]
    time = turns.spooled.field("time_s").fill_null(np.nan).to_numpy().view(np.int64)
    _, ends, data = turns.spooled.field("text").buffers()
    ends, text = np.frombuffer(ends, np.int32)[: len(time) + 1], memoryview(data or b"")
    numbers = np.stack([turns.role, turns.start, turns.end, time, np.diff(ends)], axis=1)
    ids = []
    for clip, begin, stop in zip(clips, turns.offsets, turns.offsets[1:], strict=False):
        said = hashlib.sha256(numbers[begin:stop].tobytes())
        said.update(text[ends[begin] : ends[stop]])
        said.update(f"{clip.start_frame} {clip.end_frame}".encode())
        parts = (clip.video_uid, clip.clip_idx, clip.user, said.hexdigest()[:8])
        ids.append("_".join(str(p) for p in parts if p is not None) if clip.id is None else str(clip.id))
    return ids
