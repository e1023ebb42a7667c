"""Pass 1: a part's JSON -> checked clips, spooled as Arrow, and the little that the whole input must know.

Costs one typed decode of the JSON and some 2 us a turn; keeps in memory what later decisions need (ids, bounds,
votes: some 200 bytes a clip) and puts the rest, text and turns, on disk for pass 2.

    C clips of a part, T turns
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from pipeline import labels
from pipeline.read import MAX_CLIP_BYTES, Checked, ClipError, Metadata, Refusal, clip_name, decode, refuse
from pipeline.schema import ROLES

GROUP_CLIPS: Final = 256
GROUP_BYTES: Final = 64 << 20
NOT_GIVEN: Final = -1  # a bound that the source leaves out

_UPDATES = pa.list_(pa.struct([("id", pa.string()), ("transition", pa.string())]))
_SPOOL_TURN = pa.struct(
    [
        ("role", pa.int8()),
        ("text", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("time", pa.float64()),
        ("updates", _UPDATES),
    ]
)
_PAIRS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))
SPOOL: Final = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_uid", pa.string()),
        ("recording_id", pa.string()),
        ("dataset", pa.string()),
        ("clip_idx", pa.int32()),
        ("fps", pa.float64()),
        ("frames_file", pa.string()),
        ("goal", pa.string()),
        ("knowledge", pa.string()),
        ("steps", _PAIRS),
        ("initial_state", _PAIRS),
        ("neg_rate", pa.float64()),
        ("proassist", pa.bool_()),
        ("summaries", pa.int32()),
        ("turns", pa.list_(_SPOOL_TURN)),
    ]
)
_ROLE_CODES: Final = {role: code for code, role in enumerate(ROLES)}
_SYSTEM, _ASSISTANT, _DST = (ROLES.index(role) for role in ("system", "assistant", "DST_UPDATE"))


@dataclass(frozen=True)
class Task:
    """A part of one file: where its clips lie, and their numbers in the file."""

    file: str
    spans: np.ndarray  # int64 [C, 2] bytes
    numbers: np.ndarray  # int64 [C]
    spool: str


@dataclass
class Survey:
    """What pass 1 keeps in memory of a part's C clips; bounds are -1 where not given."""

    clip_ids: list[str]
    video_uids: list[str]
    recording_ids: list[str]
    frames_files: list[str | None]
    place: np.ndarray  # [C] of the clip in its task
    fps: np.ndarray  # [C]
    given: np.ndarray  # int64 [C, 2] bounds as given
    seen: np.ndarray  # int64 [C, 2] first start and last end of the non-system turns with frames
    votes: np.ndarray  # int64 [C, 4]
    proassist: np.ndarray  # bool [C]
    fps_assumed: int
    refused: list[Refusal]


def survey(task: Task, recording: str) -> Survey:
    """Decode, check and spool the clips of a part; `recording` is the pattern of recording_id."""
    pattern = re.compile(recording)
    refused: list[Refusal] = []
    groups = []
    with open(task.file, "rb") as file, pa.ipc.new_file(task.spool, SPOOL) as spool:
        for first, last in _groups(task.spans):
            places, clips = _read(task, file.fileno(), range(first, last), refused)
            ids = [clip_name(clip) for clip in clips]
            recordings = [recording_id(clip.clip.video_uid, pattern) for clip in clips]
            batch, numeric = _spooled(clips, ids, recordings)
            spool.write_batch(batch)
            groups.append((places, ids, recordings, [_About.of(clip) for clip in clips], numeric))
    about = [one for group in groups for one in group[3]]
    fps, given, seen, votes = (np.concatenate(column) for column in zip(*[g[4] for g in groups], strict=True))
    return Survey(
        clip_ids=[name for group in groups for name in group[1]],
        recording_ids=[name for group in groups for name in group[2]],
        video_uids=[one.video_uid for one in about],
        frames_files=[one.frames_file for one in about],
        place=np.array([place for group in groups for place in group[0]], np.int64),
        fps=fps,
        given=given,
        seen=seen,
        votes=votes,
        proassist=np.array([one.proassist for one in about], bool),
        fps_assumed=sum(one.fps_assumed for one in about),
        refused=refused,
    )


class _About(NamedTuple):
    video_uid: str
    frames_file: str | None
    proassist: bool
    fps_assumed: bool

    @classmethod
    def of(cls, checked: Checked) -> _About:
        clip = checked.clip
        return cls(clip.video_uid, clip.frames_file, checked.schema == "proassist", not checked.fps_given)


def _read(task: Task, handle: int, which: range, refused: list[Refusal]) -> tuple[list[int], list[Checked]]:
    """Places (in the task) and checked clips of some of its spans; the others go to `refused`."""
    places, clips = [], []
    for i in which:
        start, end = task.spans[i].tolist()
        raw = os.pread(handle, end - start, start) if end - start <= MAX_CLIP_BYTES else b""
        try:
            clips.append(decode(raw, end - start))
            places.append(i)
        except ClipError as error:
            refused.append(refuse(task.file, int(task.numbers[i]), error, (start, end), _id_of(raw)))
    return places, clips


def _id_of(raw: bytes) -> str | None:
    """The `id` of a refused clip, for the quarantine line, if it can be read."""
    try:
        found = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("id")
        return None if found is None else str(msgspec.json.decode(found, type=str | int))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def recording_id(video_uid: str, pattern: re.Pattern[str]) -> str:
    """The first group (else the whole match) of `pattern` in the name, else the name itself."""
    match = pattern.search(video_uid)
    return (match[1] if match.re.groups else match[0]) or video_uid if match else video_uid


def cut(spans: np.ndarray, most: int, size: int, first: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive spans: at most `most` of them and, beyond a single one, `size` bytes."""
    begin, used = first, 0
    for i, (start, end) in enumerate(spans.tolist(), first):
        if i > begin and (i - begin >= most or used + end - start > size):
            yield begin, i
            begin, used = i, 0
        used += end - start
    if len(spans):
        yield begin, first + len(spans)


def _groups(spans: np.ndarray) -> Iterator[tuple[int, int]]:
    return cut(spans, GROUP_CLIPS, GROUP_BYTES)


def _spooled(
    clips: list[Checked], ids: list[str], recordings: list[str]
) -> tuple[pa.RecordBatch, tuple[np.ndarray, ...]]:
    """A group's clips as a record batch, and its numbers: fps [C], given [C, 2], seen [C, 2], votes [C, 4]."""
    turns = [turn for clip in clips for turn in clip.turns]
    offsets = _offsets([len(clip.turns) for clip in clips])
    role = np.array([_ROLE_CODES[turn.role] for turn in turns], np.int8)
    start = np.array([NOT_GIVEN if t.start_frame is None else t.start_frame for t in turns], np.int64)
    end = np.array([labels.NO_FRAMES[1] if t.end_frame is None else t.end_frame for t in turns], np.int64)
    times = pa.array([turn.time for turn in turns], pa.float64())
    updates = [t.content if type(t.content) is list else _NOTHING for t in turns]
    flat = [update for some in updates for update in some]
    text = [
        ", ".join([f"{u.id}->{u.transition}" for u in t.content]) if type(t.content) is list else t.content
        for t in turns
    ]
    update_offsets = _offsets([len(some) for some in updates])
    columns = [
        role,
        pa.array(text, pa.string()),
        start,
        end,
        times,
        _list_of(update_offsets, _UPDATES, [u.id for u in flat], [u.transition for u in flat]),
    ]
    struct = pa.StructArray.from_arrays([pa.array(c) for c in columns], fields=list(_SPOOL_TURN))
    batch = pa.RecordBatch.from_arrays(
        [*_clip_columns(clips, ids, recordings), pa.ListArray.from_arrays(pa.array(offsets), struct)],
        schema=SPOOL,
    )
    fps = np.array([clip.fps for clip in clips], np.float64)
    given = np.array(
        [(NOT_GIVEN if c.start is None else c.start, NOT_GIVEN if c.end is None else c.end) for c in clips],
        np.int64,
    ).reshape(-1, 2)
    owner = np.repeat(np.arange(len(clips)), np.diff(offsets))
    framed = (role != _SYSTEM) & (end != labels.NO_FRAMES[1])
    seen = _seen(owner[framed], start[framed], end[framed], len(clips))
    voting = framed & times.is_valid().to_numpy(zero_copy_only=False)
    voting &= ~np.array([clip.schema == "proassist" for clip in clips], bool)[owner]
    frame = labels.event_frame(times.fill_null(0.0).to_numpy()[voting], fps[owner[voting]])
    first = np.where(given[:, 0] == NOT_GIVEN, seen[:, 0], given[:, 0])
    votes = labels.vote(owner[voting], start[voting], end[voting], frame, first, len(clips))
    return batch, (fps, given, seen, votes)


_NOTHING: Final[list[Any]] = []


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def _list_of(offsets: np.ndarray, type_: pa.DataType, first: list[Any], second: list[Any]) -> pa.ListArray:
    """list<struct<a: string, b: string>> from flat columns."""
    fields = list(type_.value_type)
    struct = pa.StructArray.from_arrays([pa.array(first, pa.string()), pa.array(second, pa.string())], fields=fields)
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=type_)


def _clip_columns(clips: list[Checked], ids: list[str], recordings: list[str]) -> list[pa.Array]:
    sources = [clip.clip for clip in clips]
    about = [clip.metadata or _NO_METADATA for clip in sources]
    steps = [[(step.id, step.name or "") for step in clip.dst or _NOTHING] for clip in sources]
    states = [list((clip.initial_dst_state or {}).items()) for clip in sources]
    text = pa.string()
    return [
        pa.array(ids, text),
        pa.array([clip.video_uid for clip in sources], text),
        pa.array(recordings, text),
        pa.array([clip.dataset or "unknown" for clip in sources], text),
        pa.array([clip.clip_idx or 0 for clip in clips], pa.int32()),
        pa.array([clip.fps for clip in clips], pa.float64()),
        pa.array([clip.frames_file for clip in sources], text),
        pa.array([c.inferred_goal or m.task_goal for c, m in zip(sources, about, strict=True)], text),
        pa.array([c.inferred_knowledge or m.knowledge for c, m in zip(sources, about, strict=True)], text),
        _pairs(steps),
        _pairs(states),
        pa.array([clip.neg_frame_sampling_rate for clip in sources], pa.float64()),
        pa.array([clip.schema == "proassist" for clip in clips], pa.bool_()),
        pa.array([clip.summaries for clip in clips], pa.int32()),
    ]


_NO_METADATA: Final = Metadata()


def _pairs(rows: list[list[tuple[str, str]]]) -> pa.ListArray:
    flat = [pair for row in rows for pair in row]
    return _list_of(_offsets([len(row) for row in rows]), _PAIRS, [k for k, _ in flat], [v for _, v in flat])


def _seen(owner: np.ndarray, start: np.ndarray, end: np.ndarray, clips: int) -> np.ndarray:
    """int64 [C, 2]: each clip's first start and last end; -1 where it has none."""
    seen = np.stack([np.full(clips, np.iinfo(np.int64).max), np.full(clips, NOT_GIVEN)], axis=1)
    np.minimum.at(seen[:, 0], owner, start)
    np.maximum.at(seen[:, 1], owner, end)
    seen[seen[:, 1] == NOT_GIVEN] = NOT_GIVEN
    return seen
