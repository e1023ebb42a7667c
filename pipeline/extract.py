"""Pass 1: a part's JSON -> checked clips, spooled as Arrow, and the little that the whole input must know.

Costs one typed decode of the JSON and some 3 us a turn; keeps in memory what later decisions need (ids, bounds,
votes: some 700 bytes a clip) and puts the rest, text and turns, on disk for pass 2.

    C clips of a part, T turns
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
from pipeline.readers.clip import EVERYWHERE, Clip, ClipError, Refusal, refuse
from pipeline.readers.index import MAX_CLIP_BYTES
from pipeline.schema import ROLES, STATES
from pipeline.storage import move

GROUP_CLIPS: Final = 256
GROUP_BYTES: Final = 64 << 20
NOT_GIVEN: Final = -1  # a bound that the source leaves out
ECHO_CHARACTERS: Final = 20  # shorter texts ("yes") are repeated by chance

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
_RANGES = pa.list_(pa.struct([("start", pa.int64()), ("end", pa.int64())]))
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
        ("unlabelled", _RANGES),
        ("convention", pa.string()),  # null: as in the rest of the file
        ("summaries", pa.int32()),
        ("turns", pa.list_(_SPOOL_TURN)),
    ]
)
_ROLE_CODES: Final = {role: code for code, role in enumerate(ROLES)}
_SYSTEM, _USER, _ASSISTANT, _DST = range(len(ROLES))


@dataclass(frozen=True)
class Task:
    """A part of one file: where its clips lie, and the first one's number in the file."""

    file: str
    spans: np.ndarray  # int64 [C, 2] bytes
    first: int
    spool: str
    fps: float | None  # of --fps


@dataclass
class Survey:
    """What pass 1 keeps in memory of a part's C clips; bounds are -1 where not given."""

    clip_ids: list[str]
    recording_ids: list[str]
    heads: list[Head]
    place: np.ndarray  # [C] of the clip in its task
    fps: np.ndarray  # [C]
    given: np.ndarray  # int64 [C, 2] bounds as given
    seen: np.ndarray  # int64 [C, 2] first start and last end of the non-system turns with frames
    dst_seen: np.ndarray  # int64 [C, 2] the same of the DST_UPDATE turns alone
    first_end: np.ndarray  # int64 [C] the first end of those turns; -1 without any
    votes: np.ndarray  # int64 [C, 4]
    placed: np.ndarray  # bool [C] whether the reader gave the turns their frames: the file's convention is not theirs
    spoken: int  # assistant turns with text
    echoed: int  # those whose text a user turn holds
    refused: list[Refusal]


class Head(NamedTuple):
    """What later decisions need of one clip, beside its numbers."""

    schema: str
    convention: str | None
    video_uid: str
    dataset: str | None
    user: str | None
    clip_idx: int | None
    tracked: bool  # whether the clip says anything about the dialog state
    annotated: bool  # whether anybody annotated some of its frames
    frames_file: str | None
    given: Mapping[str, str] | None  # initial state
    contradicted: bool  # whether the given state makes one of the clip's own updates impossible
    system_contradicted: bool  # the same of the states that its system turns tell
    fps_given: bool
    ignored: list[str]
    given_away: tuple[int, int, bool]


def survey(task: Task, recording: str) -> Survey:
    """Decode, check and spool the clips of a part; `recording` is the pattern of recording_id.

    The spool is renamed into place: two tries of one part, where a cluster lost sight of the first, do not meet.
    """
    pattern = re.compile(recording)
    refused: list[Refusal] = []
    groups = []
    new = f"{task.spool}.{secrets.token_hex(4)}"
    with open(task.file, "rb") as file, pa.ipc.new_file(new, SPOOL) as spool, _no_gc():
        for first, last in _groups(task.spans):
            places, clips = _read(task, file.fileno(), range(first, last), refused)
            turns = _Turns(clips)
            ids = _names(clips, turns)
            recordings = [recording_id(clip.video_uid, pattern) for clip in clips]
            spool.write_batch(
                pa.RecordBatch.from_arrays([*_clip_columns(clips, ids, recordings), turns.column()], schema=SPOOL)
            )
            heads = list(map(_head, clips, turns.told_states()))
            groups.append((places, ids, recordings, heads, turns.numbers(), turns.echoes()))
    move(Path(new), Path(task.spool))
    numbers = zip(*[group[4] for group in groups], strict=True)
    fps, given, seen, dst_seen, first_end, votes = map(np.concatenate, numbers)
    return Survey(
        clip_ids=[name for group in groups for name in group[1]],
        recording_ids=[name for group in groups for name in group[2]],
        heads=[head for group in groups for head in group[3]],
        place=np.array([place for group in groups for place in group[0]], np.int64),
        fps=fps,
        given=given,
        seen=seen,
        dst_seen=dst_seen,
        first_end=first_end,
        votes=votes,
        placed=np.array([head.convention is not None for group in groups for head in group[3]], bool),
        echoed=sum(group[5][0] for group in groups),
        spoken=sum(group[5][1] for group in groups),
        refused=refused,
    )


def _head(clip: Clip, told: Mapping[str, str]) -> Head:
    """`told`: the states that the clip's system turns tell."""
    given = clip.initial_state
    updates = _updates(clip) if given or told else []
    return Head(
        schema=clip.schema,
        convention=clip.convention,
        video_uid=clip.video_uid,
        dataset=clip.dataset,
        user=clip.user,
        clip_idx=clip.clip_idx,
        annotated=tuple(clip.unlabelled) != EVERYWHERE,
        tracked=bool(clip.steps) or "DST_UPDATE" in clip.turns[0],
        frames_file=clip.frames_file,
        given=given,
        contradicted=bool(given) and state.contradicts(given or {}, updates),
        system_contradicted=bool(told) and state.contradicts(told, updates),
        fps_given=clip.fps_given,
        ignored=clip.ignored,
        given_away=clip.given_away,
    )


def _updates(clip: Clip) -> list[tuple[str, str]]:
    """(step id, transition) of the clip's DST_UPDATE turns, in order."""
    contents = (content for role, content in zip(clip.turns[0], clip.turns[1], strict=True) if role == "DST_UPDATE")
    return list(map(_UPDATE, chain.from_iterable(contents)))


_STATE_NAMES: Final = "|".join(STATES)
_TOLD: Final = re.compile(rf":\s*(?:{_STATE_NAMES})\b")  # at once, where there is none
_TOLD_STATE: Final = re.compile(rf"(\S+)\s*:\s*({_STATE_NAMES})\b")


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    """Decoded clips hold no cycles: looking for some only costs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(task: Task, handle: int, which: range, refused: list[Refusal]) -> tuple[list[int], list[Clip]]:
    """Places (in the task) and checked clips of some of its spans; the others go to `refused`."""
    places, clips = [], []
    for i in which:
        start, end = task.spans[i].tolist()
        raw = os.pread(handle, end - start, start) if end - start <= MAX_CLIP_BYTES else b""
        try:
            clips.append(decode(raw, end - start, task.fps))
            places.append(i)
        except ClipError as error:
            refused.append(refuse(task.file, task.first + i, error, (start, end), _id_of(raw)))
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


_UPDATE = operator.attrgetter("id", "transition")


class _Turns:
    """All turns of a group's C clips as flat arrays [T]."""

    def __init__(self, clips: list[Clip]) -> None:
        columns = [list(chain.from_iterable(part)) for part in zip(*[clip.turns for clip in clips], strict=True)]
        roles, content, time, start, end = columns or [[]] * 5
        self.clips, self.content = clips, content
        self.offsets = _offsets([len(clip.turns[0]) for clip in clips])
        self.owner = np.repeat(np.arange(len(clips)), np.diff(self.offsets))
        self.role = np.fromiter(map(_ROLE_CODES.__getitem__, roles), np.int8, len(roles))
        self.start = pa.array(start, pa.int64()).fill_null(labels.NO_FRAMES[0]).to_numpy()
        self.end = pa.array(end, pa.int64()).fill_null(labels.NO_FRAMES[1]).to_numpy()
        self.time = pa.array(time, pa.float64())
        changes = np.flatnonzero(self.role == _DST).tolist()
        updates = [content[turn] for turn in changes]
        flat = list(map(_UPDATE, chain.from_iterable(updates)))
        counts = np.zeros(len(roles), np.int64)
        counts[self.role == _DST] = [len(some) for some in updates]
        ids, transitions = zip(*flat, strict=True) if flat else ((), ())
        self.updates = _list_of(_offsets(counts), _UPDATES, ids, transitions)
        texts = content.copy()
        for turn in changes:
            texts[turn] = None
        self.text = pc.coalesce(pa.array(texts, pa.string()), _written(self.updates))

    def column(self) -> pa.ListArray:
        """The spool's `turns`."""
        numbers = [pa.array(self.start), pa.array(self.end), self.time]
        columns = [pa.array(self.role), self.text, *numbers, self.updates]
        struct = pa.StructArray.from_arrays(columns, fields=list(_SPOOL_TURN))
        return pa.ListArray.from_arrays(pa.array(self.offsets), struct)

    def numbers(self) -> tuple[np.ndarray, ...]:
        """fps [C], given bounds [C, 2], seen bounds [C, 2], those of DST turns [C, 2], first end [C], votes [C, 4]."""
        clips = self.clips
        fps = np.array([clip.fps for clip in clips], np.float64)
        bounds = [(NOT_GIVEN if b is None else b) for clip in clips for b in (clip.start_frame, clip.end_frame)]
        given = np.array(bounds, np.int64).reshape(-1, 2)
        framed = (self.role != _SYSTEM) & (self.end != labels.NO_FRAMES[1])
        seen, dst_seen = (
            _seen(self.owner[which], self.start[which], self.end[which], len(clips))
            for which in (framed, framed & (self.role == _DST))
        )
        voting = framed & self.time.is_valid().to_numpy(zero_copy_only=False)
        voting &= ~np.array([clip.convention is not None for clip in clips], bool)[self.owner]
        owner = self.owner[voting]
        frame = labels.event_frame(self.time.fill_null(0.0).to_numpy()[voting], fps[owner])
        dst_alone = (given == dst_seen).all(axis=1) | absent(given, seen, dst_seen)  # bounds that may leave turns out
        first = np.where(dst_alone | (given[:, 0] == NOT_GIVEN), seen[:, 0], given[:, 0])
        votes = labels.vote(owner, self.start[voting], self.end[voting], frame, first, len(clips))
        first_end = _seen(self.owner[framed], self.end[framed], self.end[framed], len(clips))[:, 0]
        return fps, given, seen, dst_seen, first_end, votes

    def echoes(self) -> tuple[int, int]:
        """(assistant turns whose whole text stands in an earlier user turn of their clip, assistant turns)."""
        size = pc.binary_length(self.text).to_numpy()
        heard, spoken = self.role == _USER, self.role == _ASSISTANT
        longest = np.zeros(len(self.clips), size.dtype)  # user turn of a clip: a longer text stands in none
        np.maximum.at(longest, self.owner[heard], size[heard])
        found = 0
        for turn in np.flatnonzero(spoken & (size >= ECHO_CHARACTERS) & (size <= longest[self.owner])).tolist():
            earlier = np.flatnonzero(heard[self.offsets[self.owner[turn]] : turn]) + self.offsets[self.owner[turn]]
            found += any(self.content[turn] in self.content[one] for one in earlier.tolist())
        return found, int(spoken.sum())

    def told_states(self) -> list[dict[str, str]]:
        """Per clip, the step states that its system turns tell, as in 'Step S1: completed'."""
        told: list[dict[str, str]] = [{} for _ in self.clips]
        for turn in np.flatnonzero(self.role == _SYSTEM).tolist():
            if _TOLD.search(self.content[turn]):
                told[self.owner[turn]].update(_TOLD_STATE.findall(self.content[turn]))
        return told

    def digests(self) -> list[str]:
        """8 hex digits per clip of what is said in it and when: roles, times, frames and texts."""
        _, ends, data = self.text.buffers()
        ends = np.frombuffer(ends, np.int32)[: len(self.role) + 1] if len(self.role) else np.zeros(1, np.int32)
        text = memoryview(data or b"")
        time = self.time.fill_null(np.nan).to_numpy().view(np.int64)
        numbers = np.stack([self.role, self.start, self.end, time, np.diff(ends)], axis=1)
        found = []
        for clip, begin, stop in zip(self.clips, self.offsets, self.offsets[1:], strict=False):
            sha = hashlib.sha256(numbers[begin:stop].tobytes())
            sha.update(text[ends[begin] : ends[stop]])
            sha.update(f"{clip.start_frame} {clip.end_frame}".encode())
            found.append(sha.hexdigest()[:8])
        return found


def _written(updates: pa.ListArray) -> pa.StringArray:
    """Each list of updates as text: 'S1->complete, S2->start'."""
    ids, transitions = updates.values.flatten()
    each = pc.binary_join_element_wise(ids, transitions, "->")
    return pc.binary_join(pa.ListArray.from_arrays(updates.offsets, each), ", ")


def _names(clips: list[Clip], turns: _Turns) -> list[str]:
    """clip_id of each clip: its own `id`, else its video, number, user and a digest of its conversation.

    A pure function of the clip, so that other clips never rename it; two conversations over one video differ
    in the digest, a true duplicate does not.
    """
    given = [clip.id for clip in clips]
    digests = turns.digests() if None in given else given
    return [
        _built_name(clip, str(digest)) if name is None else str(name)
        for clip, name, digest in zip(clips, given, digests, strict=True)
    ]


def _built_name(clip: Clip, digest: str) -> str:
    return "_".join(str(part) for part in (clip.video_uid, clip.clip_idx, clip.user, digest) if part is not None)


def _offsets(lengths: list[int] | np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)


def _list_of(offsets: np.ndarray, type_: pa.DataType, first: Sequence[Any], second: Sequence[Any]) -> pa.ListArray:
    """list<struct<a: string, b: string>> from flat columns."""
    fields = list(type_.value_type)
    struct = pa.StructArray.from_arrays([pa.array(first, pa.string()), pa.array(second, pa.string())], fields=fields)
    return pa.ListArray.from_arrays(pa.array(offsets), struct, type=type_)


def _clip_columns(clips: list[Clip], ids: list[str], recordings: list[str]) -> list[pa.Array]:
    text = pa.string()
    ranges = [bounds for clip in clips for bounds in clip.unlabelled]
    struct = pa.StructArray.from_arrays(
        [pa.array([bounds[i] for bounds in ranges], pa.int64()) for i in (0, 1)], fields=list(_RANGES.value_type)
    )
    offsets = _offsets([len(clip.unlabelled) for clip in clips])
    return [
        pa.array(ids, text),
        pa.array([clip.video_uid for clip in clips], text),
        pa.array(recordings, text),
        pa.array([clip.dataset or "unknown" for clip in clips], text),
        pa.array([clip.clip_idx or 0 for clip in clips], pa.int32()),
        pa.array([clip.fps for clip in clips], pa.float64()),
        pa.array([clip.frames_file for clip in clips], text),
        pa.array([clip.goal for clip in clips], text),
        pa.array([clip.knowledge for clip in clips], text),
        _pairs([clip.steps for clip in clips]),
        _pairs([list((clip.initial_state or {}).items()) for clip in clips]),
        pa.array([clip.neg_rate for clip in clips], pa.float64()),
        pa.ListArray.from_arrays(pa.array(offsets), struct, type=_RANGES),
        pa.array([clip.convention for clip in clips], text),
        pa.array([clip.summaries for clip in clips], pa.int32()),
    ]


def _pairs(rows: Sequence[Sequence[tuple[str, str]]]) -> pa.ListArray:
    flat = [pair for row in rows for pair in row]
    return _list_of(_offsets([len(row) for row in rows]), _PAIRS, [k for k, _ in flat], [v for _, v in flat])


def absent(given: np.ndarray, seen: np.ndarray, dst_seen: np.ndarray) -> np.ndarray:
    """bool [C]: clips without DST updates that are said to span 0..0, as generators do: no bounds at all."""
    return (given == 0).all(axis=1) & (dst_seen[:, 1] == NOT_GIVEN) & (seen[:, 1] > 0)


class SpooledTurns(NamedTuple):
    """Turns [T] of some spooled clips without their texts; frames in the source's convention."""

    owner: np.ndarray  # [T] index into the clips asked for
    role: np.ndarray  # [T] code in ROLES
    start: np.ndarray  # int64 [T]
    end: np.ndarray  # int64 [T]
    updates: list[list[dict[str, str]]]  # [T] {id, transition}


def spooled_turns(spool: str, clips: np.ndarray) -> Iterator[SpooledTurns]:
    """The turns of the (ascending) clips [C] of a part, batch by batch; `owner` counts on through them."""
    first = done = 0
    with pa.memory_map(spool) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            rows = clips[(clips >= first) & (clips < first + batch.num_rows)] - first
            first += batch.num_rows
            if not len(rows):
                continue
            lists = batch.column("turns").take(pa.array(rows))
            offsets = lists.offsets.to_numpy()
            turns = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
            role, start, end = (turns.field(name).to_numpy() for name in ("role", "start", "end"))
            owner = done + np.repeat(np.arange(len(rows)), np.diff(offsets))
            done += len(rows)
            yield SpooledTurns(owner, role, start, end, turns.field("updates").to_pylist())


def _seen(owner: np.ndarray, start: np.ndarray, end: np.ndarray, clips: int) -> np.ndarray:
    """int64 [C, 2]: each clip's first start and last end; -1 where it has none."""
    seen = np.stack([np.full(clips, np.iinfo(np.int64).max), np.full(clips, NOT_GIVEN)], axis=1)
    np.minimum.at(seen[:, 0], owner, start)
    np.maximum.at(seen[:, 1], owner, end)
    seen[seen[:, 1] == NOT_GIVEN] = NOT_GIVEN
    return seen
