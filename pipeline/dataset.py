"""Opens a folder written by `preprocess` and gives its clips, in order or shuffled, with fresh labels every epoch.

Trades a perfectly global shuffle for bounded memory: row groups (up to 256 clips) are permuted and clips are
shuffled inside a window of WINDOW_GROUPS of them, so about a thousand clips are held, whatever the data's size.
The order is a pure function of (seed, epoch), so any clip of the endless stream is reached by its index. On one
core 37,000 clips/s (of 600 frames) become padded tensors of labels and turns, 6,000 with every text an object.
Every shard of a split is checked against the manifest's size and SHA-256 before the first clip is read, every
row group's labels against the draw before its first clip is given.

    F frames of a clip    G row groups    N clips of a split
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.labels import LabelRule, Labels, Ranges, Turns, epoch_labels, label_rule
from pipeline.schema import (
    CLIPS,
    FRAMES,
    LABEL_COLUMNS,
    MANIFEST,
    NOT_SAMPLED,
    POSITIVES,
    ROLES,
    SCHEMA_HASH,
    SCHEMA_VERSION,
    STATES,
    TRANSITIONS,
    draws,
    is_inside,
    shard_path,
)
from pipeline.storage import sha256

WINDOW_GROUPS = 4


# ---- a clip ----


@dataclass(frozen=True)
class Turn:
    """One entry of the conversation; [start_frame, end_frame) are absolute, both None where it has no frames."""

    role: str
    text: str
    start_frame: int | None = None
    end_frame: int | None = None
    time_s: float | None = None
    updates: tuple[tuple[str, str], ...] = ()  # (step id, transition)


class ClipLabels(NamedTuple):
    """One clip's labels and turns as numbers, without any text."""

    clip: int  # position in its split
    start_frame: int
    labels: Labels  # [2, F] (speaking, DST) of the epoch asked for
    turns: npt.NDArray[np.int32]  # [T, 3] code of the role in ROLES, start_frame, end_frame (-1: no frames)


@dataclass(frozen=True, eq=False)
class ClipExample:
    """One clip as the trainer sees it; `labels` int8 [2, F] (speaking, DST) are of the epoch asked for."""

    clip_id: str
    clip: int  # position in its split
    video_uid: str
    recording_id: str
    fps: float
    start_frame: int
    num_frames: int
    frames_file: str | None
    goal: str | None
    knowledge: str | None
    steps: tuple[tuple[str, str], ...]  # (id, name)
    initial_state: tuple[tuple[str, str], ...]  # (step id, state)
    turns: Sequence[Turn]
    sampling_seed: int
    neg_rate: float
    positive: str  # 'span' or 'onset'
    labels: Labels
    unlabelled: tuple[tuple[int, int], ...] = ()  # absolute ranges that nobody annotated
    dataset: str = "unknown"

    @property
    def end_frame(self) -> int:
        return self.start_frame + self.num_frames


# ---- order -------------------------------------------------------------------------------------------


def order(seed: int, epoch: int, sizes: Sequence[int], window: int = WINDOW_GROUPS) -> npt.NDArray[np.int64]:
    """int64 [N]: the epoch's clips by their number on disk, from the clips in each row group (`sizes`, [G]).

    Groups are permuted, then the clips of each `window` successive groups are shuffled together. The keys are
    the schema's hash, not a generator's stream, so the order outlives numpy versions.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    groups = np.argsort(draws(seed, 2 * epoch, np.arange(len(sizes))), kind="stable")
    key = draws(seed, 2 * epoch + 1, np.arange(starts[-1]))
    out = []
    for i in range(0, len(groups), window):
        clips = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in groups[i : i + window]])
        out.append(clips[np.argsort(key[clips], kind="stable")])
    return np.concatenate(out) if out else np.zeros(0, np.int64)


# ---- files -------------------------------------------------------------------------------------------


def read_manifest(data: Path) -> dict[str, Any]:
    """The manifest of a preprocessed folder; InputError if there is none or it is of another schema."""
    path = data / MANIFEST
    if not path.is_file():
        raise InputError(f"{path}: not found, expected a folder written by preprocess; run prospect-dst preprocess")
    try:
        manifest = json.loads(path.read_bytes())
        found = (manifest["schema_version"], manifest["schema_hash"])
        for shard in manifest["shards"]:
            _check_entry(shard)
        _ = [manifest["splits"][shard["split"]] for shard in manifest["shards"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a manifest ({error!r}); run preprocess again") from None
    if found != (SCHEMA_VERSION, SCHEMA_HASH):
        expected = f"schema {SCHEMA_VERSION} {SCHEMA_HASH}"
        raise InputError(f"{path}: schema {found[0]} {found[1]}, expected {expected}; run preprocess again")
    return dict(manifest)


def _check_entry(shard: dict[str, Any]) -> None:
    """ValueError (KeyError, TypeError) unless this can be a shard's entry in the manifest."""
    kinds = {"path": str, "table": str, "split": str, "part": int, "clips": int, "bytes": int, "sha256": str}
    for name, kind in kinds.items():
        if type(shard[name]) is not kind:
            raise ValueError(f"a shard's {name} is {shard[name]!r}")
    if shard["table"] not in ("frames", "clips") or shard["clips"] < 0 or shard["part"] < 0:
        raise ValueError(f"a shard of table {shard['table']!r}, part {shard['part']}, {shard['clips']} clips")
    if shard["path"] != shard_path(shard["table"], shard["split"], shard["part"]):
        raise ValueError(f"{shard['table']} part {shard['part']} of {shard['split']} at {shard['path']!r}")


def verify_shard(data: Path, shard: dict[str, Any]) -> Path:
    """The shard's path, after its size and SHA-256 proved to be the manifest's."""
    if not is_inside(shard["path"]):
        raise InputError(f"{data / MANIFEST}: lists a shard at {shard['path']!r}; run preprocess again")
    path = data / shard["path"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        found = "missing" if size is None else f"{size} bytes"
        raise InputError(f"{path}: {found}, expected {shard['bytes']} bytes; run preprocess again")
    if sha256(path) != shard["sha256"]:
        raise InputError(f"{path}: damaged, SHA-256 differs from the manifest's; run preprocess again")
    return path


@dataclass(frozen=True)
class _RowGroup:
    """Where up to 256 clips lie: the same row group of a frames shard and of a clips shard."""

    frames: Path
    clips: Path
    index: int
    num_clips: int


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a split's stored labels look like."""

    counts: npt.NDArray[np.int64]  # [2, 3] per head: frames labelled 0, labelled 1, not sampled
    neg_rate: float  # mean over clips

    def positive_rates(self, of_all: bool = False) -> tuple[float, float]:
        """Per head, positives among its supervised frames, or among all frames; 0.5 where there are none."""
        total = self.counts.sum(1) if of_all else self.counts[:, :2].sum(1)
        speak, dst = (float(p / n) if n else 0.5 for p, n in zip(self.counts[:, 1], total, strict=True))
        return speak, dst


class Split:
    """The clips of one split, verified against the manifest when opened; `key` names its exact content.

    Numbered without end, epoch after epoch: clip `index` is at place `index % N` of epoch `index // N`. Where a
    run is in its data is therefore one integer, and ranks and DataLoader workers take the indices that are theirs.
    Rising indices, dense or not, read each row group once per epoch. Pickled (for a spawned worker), it takes
    what was verified along and leaves what was read.

    Raises InputError for a missing split (naming those there are) and for a damaged or missing shard.
    """

    def __init__(self, data: Path, split: str) -> None:
        self.manifest = read_manifest(data)
        self.name = split
        shards = [s for s in self.manifest["shards"] if s["split"] == split]
        if not sum(s["clips"] for s in shards):
            raise InputError(_no_such_split(data, split, self.manifest))
        paths = {(s["table"], s["part"]): verify_shard(data, s) for s in shards}
        if len(paths) < len(shards):
            raise InputError(f"{data / MANIFEST}: lists a shard of {split} twice; run preprocess again")
        digest = "".join(sorted(f"{s['path']} {s['sha256']}\n" for s in shards))
        self.key = hashlib.sha256(digest.encode()).hexdigest()[:16]
        parts = sorted({s["part"] for s in shards})
        self.groups = [g for part in parts for g in _row_groups(paths, part)]
        self.sizes = [group.num_clips for group in self.groups]
        if 2 * sum(self.sizes) != sum(s["clips"] for s in shards):
            told, there = sum(s["clips"] for s in shards if s["table"] == "clips"), sum(self.sizes)
            raise InputError(
                f"{data / MANIFEST}: {told} clips of {split}, but its shards hold {there}; run preprocess again"
            )
        self._starts = [0, *accumulate(self.sizes)]  # the first clip of each group
        self._checked: set[int] = set()  # groups whose stored labels proved to be the draw's
        self._forget()

    def _forget(self) -> None:
        self._open: OrderedDict[int, _Group] = OrderedDict()
        self._order: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None  # ((seed, epoch), its order)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_order")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, seed: int, index: int) -> ClipExample:
        """Clip `index` of the endless shuffled stream, with the labels of its epoch."""
        epoch, group, row = self._find(seed, index)
        return group.example(row, group.labels(epoch))

    def labels_at(self, seed: int, index: int) -> ClipLabels:
        """What `at` gives, as numbers alone: no text is read, no object made per turn."""
        epoch, group, row = self._find(seed, index)
        return group.numbers(row, group.labels(epoch))

    def epoch(self, seed: int, epoch: int, position: int = 0) -> Iterator[ClipExample]:
        """The epoch's clips in shuffled order from `position` on, with that epoch's labels."""
        return (self.at(seed, epoch * len(self) + i) for i in range(position, len(self)))

    def label_stream(self, seed: int, epoch: int, position: int = 0) -> Iterator[ClipLabels]:
        """What `epoch` gives, as numbers alone."""
        return (self.labels_at(seed, epoch * len(self) + i) for i in range(position, len(self)))

    def in_order(self, rate: float | None = 1.0) -> Iterator[ClipExample]:
        """The clips as on disk; every frame is supervised, or at another `rate` (None: the clip's own)."""
        for number, size in enumerate(self.sizes):
            group = self._load(number)
            labels = group.labels(0, rate)
            yield from (group.example(row, labels) for row in range(size))

    def texts(self) -> Iterator[str]:
        """Everything that a tokenizer will meet in this split."""
        for clip in self.in_order(rate=None):
            yield from (text for text in (clip.goal, clip.knowledge) if text)
            yield from (f"{step}: {name}" for step, name in clip.steps)
            yield from (turn.text for turn in clip.turns)

    def statistics(self) -> Statistics:
        """Label counts and mean rate, from one pass that holds a few row groups at a time."""
        counts, rates = np.zeros((2, 3), np.int64), 0.0
        for number in range(len(self.groups)):
            group = self._load(number)
            counts += np.stack([(group.stored == value).sum(1) for value in (0, 1, NOT_SAMPLED)], 1)
            rates += float(group.rule.rates.sum())
        return Statistics(counts, rates / len(self))

    def _find(self, seed: int, index: int) -> tuple[int, _Group, int]:
        """(epoch, group, row in the group) of a clip of the stream."""
        epoch, position = divmod(index, len(self))
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), order(seed, epoch, self.sizes)
        number = int(self._order[1][position])
        group = bisect_right(self._starts, number) - 1
        return epoch, self._load(group), number - self._starts[group]

    def _load(self, number: int) -> _Group:
        if number not in self._open:
            while len(self._open) >= WINDOW_GROUPS:
                self._open.popitem(last=False)
            if number not in self._checked:
                _check_rows(self.groups[number], self._starts[number])
            group = _Group(self.groups[number], self._starts[number])
            if number not in self._checked:
                group.check_draw()
                self._checked.add(number)
            self._open[number] = group
        self._open.move_to_end(number)
        return self._open[number]


def _no_such_split(data: Path, split: str, manifest: dict[str, Any]) -> str:
    found = ", ".join(sorted(manifest["splits"])) or "none"
    return (
        f"{data / MANIFEST}: no split {split!r}, found: {found}; name the input file "
        f"{split}_<anything>.json, or run preprocess with --split {split}"
    )


def _row_groups(paths: dict[tuple[str, int], Path], part: int) -> list[_RowGroup]:
    try:
        frames, clips = paths["frames", part], paths["clips", part]
    except KeyError as missing:
        raise InputError(f"{MANIFEST}: part {part} has no {missing.args[0][0]} shard; run preprocess again") from None
    footer, other = _footer(clips, CLIPS), _footer(frames, FRAMES)
    if footer.num_row_groups != other.num_row_groups:
        raise InputError(
            f"{frames}: {other.num_row_groups} row groups, expected {footer.num_row_groups} as in {clips}; "
            f"run preprocess again"
        )
    return [
        _RowGroup(frames, clips, i, footer.row_group(i).num_rows)
        for i in range(footer.num_row_groups)
    ]  # fmt: skip


def _footer(path: Path, expected: pa.Schema) -> pq.FileMetaData:
    """What a shard says of itself; InputError where its columns are not the schema's."""
    try:
        with pq.ParquetFile(path) as file:
            found, footer = file.schema_arrow, file.metadata
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    if not found.equals(expected):
        wrong = [name for name in expected.names if found.get_all_field_indices(name) != [expected.names.index(name)]]
        wrong += [field.name for field in found if field not in expected]
        raise InputError(f"{path}: column {(wrong or ['order'])[0]} is not the schema's; run preprocess again")
    return footer


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: can't be read ({' '.join(str(error).split())}); run preprocess again")


# ---- one row group, before it is used ----------------------------------------------------------------

_TURN = "turns.list.element"
_WORDS = {  # a column of words and those that there are
    f"{_TURN}.role": ROLES,
    f"{_TURN}.updates.list.element.transition": tuple(TRANSITIONS),
    "initial_state.list.element.state": STATES,
    "positive": POSITIVES,
}
_CHECKED = (
    *("clip_id", "clip", "start_frame", "end_frame", "num_frames", "fps", "neg_rate"),
    *(f"{_TURN}.start_frame", f"{_TURN}.end_frame", *_WORDS),
)


def _check_rows(where: _RowGroup, first_clip: int) -> None:
    """InputError, naming the file, unless the rows say what rows of shards can say, and frames and clips agree."""
    clips = _read(where.clips, where.index, _CHECKED, dictionaries=list(_WORDS))
    frames = _read(where.frames, where.index, ("clip_id", "clip", "frame"), dictionaries=["clip_id"])
    start, end, size = (_array(clips[name]).astype(np.int64) for name in ("start_frame", "end_frame", "num_frames"))
    number = first_clip + np.arange(len(start))
    fps, rate = _array(clips["fps"]), _array(clips["neg_rate"])
    turns = _flat(clips["turns"])[1]
    begins, ends = (np.from_dlpack(turns.field(name).fill_null(_NO_FRAME)) for name in ("start_frame", "end_frame"))
    checks = {
        "clip is not the clip's place in its split": _array(clips["clip"]) == number,
        "start_frame, end_frame, num_frames are no range": (start >= 0) & (size > 0) & (size == end - start),
        "fps is no positive number": np.isfinite(fps) & (fps > 0),
        "neg_rate is no rate": (rate >= 0) & (rate <= 1),
    }
    for what, right in checks.items():
        if not right.all():
            raise _wrong(where.clips, where.index, f"{what} (row {int(np.argmin(right))})")
    if ((begins < 0) != (ends < 0)).any() or (begins < -1).any() or (ends < begins).any():
        raise _wrong(where.clips, where.index, "a turn's start_frame and end_frame are no range")
    for name, known in _WORDS.items():
        if unknown := _words(clips, name) - set(known):
            raise _wrong(where.clips, where.index, f"{name.rpartition('.')[2]} {sorted(unknown)[0]!r} is not known")
    if len(frames) != size.sum():
        raise InputError(
            f"{where.frames} row group {where.index}: {len(frames)} frames, expected {size.sum()} as its clips say; "
            f"run preprocess again"
        )
    first = np.arange(len(frames), dtype=np.int32) - _array(frames["frame"])  # the same at all frames of a clip
    agree = (_array(frames["clip"]) == np.repeat(number.astype(np.int32), size)).all()
    agree &= (first == np.repeat((np.cumsum(size) - size - start).astype(np.int32), size)).all()
    if not (agree and _same_ids(frames["clip_id"], clips["clip_id"], size)):
        raise _wrong(where.frames, where.index, "clip_id, clip and frame are not those of its clips")


def _wrong(path: Path, row_group: int, what: str) -> InputError:
    return InputError(f"{path} row group {row_group}: {what}; run preprocess again")


def _words(clips: pa.Table, name: str) -> set[str]:
    """The different texts of a column, nested or not, that was read with dictionaries."""
    column = clips[name.partition(".")[0]]
    for part in name.split(".")[1:]:
        if part == "list":
            column = _flat(column)[1]
        elif part != "element":
            column = column.field(part)
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    return {text for chunk in chunks for text in chunk.dictionary.to_pylist()}


def _same_ids(of_frames: pa.ChunkedArray, of_clips: pa.ChunkedArray, size: npt.NDArray[np.int64]) -> bool:
    """Whether each frame has its clip's id; `size`: frames of each clip."""
    found = of_frames.unify_dictionaries().combine_chunks()
    names = found.dictionary.to_pylist()
    code = {name: number for number, name in enumerate(names)}
    expected = np.array([code.get(name, -1) for name in of_clips.to_pylist()], np.int32)
    return bool((np.from_dlpack(found.indices) == np.repeat(expected, size)).all())


# ---- one row group in memory -------------------------------------------------------------------------

_ROLE = "turns.list.element.role"
_NUMBERS = (
    *("start_frame", "num_frames", "sampling_seed", "neg_rate", "positive", "steps.list.element.id"),
    *(_ROLE, "turns.list.element.start_frame", "turns.list.element.end_frame"),
    *("unlabelled.list.element.start_frame", "unlabelled.list.element.end_frame"),
)
_SAME = (  # what a ClipExample takes over as it is
    *("clip_id", "clip", "video_uid", "recording_id", "fps", "start_frame", "num_frames", "frames_file"),
    *("goal", "knowledge", "sampling_seed", "neg_rate", "positive", "dataset"),
)
# -1 in Arrow: `pa.scalar` imports pandas where it is installed, and so does `to_numpy`: a third of a second
_NO_FRAME = pa.Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(np.full(1, -1, np.int32))])[0]


class _Group:
    """A row group as flat arrays; its texts are read when a clip's are first asked for."""

    def __init__(self, where: _RowGroup, first_clip: int) -> None:
        self.where, self._first_clip = where, first_clip
        clips = _read(where.clips, where.index, _NUMBERS, dictionaries=[_ROLE])
        frames = _read(where.frames, where.index, LABEL_COLUMNS)
        self._starts = _array(clips["start_frame"]).astype(np.int64)
        self._turn_at, turns = _flat(clips["turns"])
        self._turns = _turn_numbers(turns)
        self.stored: Labels = np.stack([_array(frames[name]) for name in LABEL_COLUMNS])
        self.rule = self._rule(clips)
        self._frame_at = np.concatenate([[0], np.cumsum(self.rule.sizes)])
        self._drawn: tuple[tuple[int, float | None], Labels] | None = None  # ((epoch, rate), their labels)
        self._texts: _Texts | None = None

    def _rule(self, clips: pa.Table) -> LabelRule:
        sizes = _array(clips["num_frames"]).astype(np.int64)
        clip = np.arange(len(sizes))
        at, ranges = _flat(clips["unlabelled"])
        first, end = (np.from_dlpack(ranges.field(name)) for name in ("start_frame", "end_frame"))
        return label_rule(
            Turns(np.repeat(clip, np.diff(self._turn_at)), *self._turns.T),
            Ranges(np.repeat(clip, np.diff(at)), first, end),
            starts=self._starts,
            sizes=sizes,
            seeds=_array(clips["sampling_seed"]),
            rates=_array(clips["neg_rate"]),
            steps=np.diff(_flat(clips["steps"])[0]),
            onset=np.array(clips["positive"].to_pylist()) == "onset",
        )

    def check_draw(self) -> None:
        """InputError, naming clip and frame, unless the stored labels are those that the draw gives."""
        drawn = epoch_labels(self.rule, 0)
        if np.array_equal(drawn, self.stored):
            return
        at, head = np.argwhere((drawn != self.stored).T)[0]
        row = int(np.searchsorted(self._frame_at, at, side="right")) - 1
        clip_id = _read(self.where.clips, self.where.index, ["clip_id"])["clip_id"][row]
        raise InputError(
            f"{self.where.frames} clip {clip_id} frame {self._starts[row] + at - self._frame_at[row]}: "
            f"{LABEL_COLUMNS[head]} is {self.stored[head, at]}, but sampling_seed and neg_rate give {drawn[head, at]}; "
            f"run preprocess again"
        )

    def labels(self, epoch: int, rate: float | None = None) -> Labels:
        """int8 [2, F] of all clips; the last ones asked for are kept."""
        if self._drawn is None or self._drawn[0] != (epoch, rate):
            self._drawn = (epoch, rate), epoch_labels(self.rule, epoch, rate)
        return self._drawn[1]

    def numbers(self, row: int, labels: Labels) -> ClipLabels:
        turns = self._turns[self._turn_at[row] : self._turn_at[row + 1]].copy()
        return ClipLabels(self._first_clip + row, int(self._starts[row]), self._own(row, labels), turns)

    def example(self, row: int, labels: Labels) -> ClipExample:
        if self._texts is None:
            self._texts = _Texts(self.where)
        return self._texts.example(row, self._own(row, labels))

    def _own(self, row: int, labels: Labels) -> Labels:
        return labels[:, self._frame_at[row] : self._frame_at[row + 1]].copy()


class _Texts:
    """The columns of a row group that hold text: a clip's scalars and steps as objects, its turns still in Arrow."""

    def __init__(self, where: _RowGroup) -> None:
        clips = _read(where.clips, where.index)
        self._same = clips.select(list(_SAME)).to_pylist()
        self._steps, self._states = (_pairs(*_flat(clips[name])) for name in ("steps", "initial_state"))
        self._turn_at, self._turns = _flat(clips["turns"])
        self._unlabelled = _pairs(*_flat(clips["unlabelled"]))

    def example(self, row: int, labels: Labels) -> ClipExample:
        first, end = int(self._turn_at[row]), int(self._turn_at[row + 1])
        return ClipExample(
            **self._same[row],
            steps=self._steps[row],
            initial_state=self._states[row],
            turns=_Turns(self._turns.slice(first, end - first)),
            labels=labels,
            unlabelled=self._unlabelled[row],
        )


class _Turns(Sequence[Turn]):
    """A clip's turns, decoded from Arrow when first looked at. Equal to the tuple of them, and pickled as it."""

    def __init__(self, structs: pa.StructArray) -> None:
        self._structs: pa.StructArray | None = structs
        self._decoded: tuple[Turn, ...] = ()

    def _tuple(self) -> tuple[Turn, ...]:
        if self._structs is not None:
            self._decoded, self._structs = _decode(self._structs), None  # lets the row group go
        return self._decoded

    def __len__(self) -> int:
        return len(self._tuple())

    def __getitem__(self, i: Any) -> Any:
        return self._tuple()[i]

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._tuple())

    def __eq__(self, other: object) -> bool:
        return self._tuple() == (other._tuple() if isinstance(other, _Turns) else other)

    def __hash__(self) -> int:
        return hash(self._tuple())

    def __repr__(self) -> str:
        return repr(self._tuple())

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (self._tuple(),)


# ---- Arrow to numpy and Python -----------------------------------------------------------------------


def _read(
    path: Path, row_group: int, columns: Sequence[str] = (), dictionaries: Sequence[str] | None = None
) -> pa.Table:
    """One row group, whole or some columns; without Arrow's threads, which gain nothing and are a pool per worker."""
    try:
        with pq.ParquetFile(path, read_dictionary=dictionaries) as file:
            return file.read_row_group(row_group, columns=list(columns) or None, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _array(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """A column without nulls, as it lies in memory."""
    return np.from_dlpack(column.combine_chunks())


def _flat(column: pa.ChunkedArray | pa.ListArray) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """(where each list begins, [rows + 1]; what the lists hold, end to end)."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    at = np.from_dlpack(lists.offsets)
    return at - at[0], lists.values.slice(int(at[0]), int(at[-1] - at[0]))


def _turn_numbers(structs: pa.StructArray) -> npt.NDArray[np.int32]:
    """[T, 3]: code of the role in ROLES, start_frame, end_frame; -1 where a turn has no frames."""
    roles = structs.field("role")
    code = np.array([ROLES.index(role) for role in roles.dictionary.to_pylist()], np.int32)
    frames = (np.from_dlpack(structs.field(name).fill_null(_NO_FRAME)) for name in ("start_frame", "end_frame"))
    return np.stack([code[np.from_dlpack(roles.indices)], *frames], axis=1)


def _decode(structs: pa.StructArray) -> tuple[Turn, ...]:
    *columns, updates = (structs.field(field.name) for field in fields(Turn))
    return tuple(map(Turn, *(column.to_pylist() for column in columns), _pairs(*_flat(updates))))


def _pairs(at: npt.NDArray[np.int32], structs: pa.StructArray) -> list[tuple[tuple[Any, Any], ...]]:
    """Per list, its structs of two values."""
    pairs = list(zip(*(column.to_pylist() for column in structs.flatten()), strict=True))
    return [tuple(pairs[a:b]) for a, b in pairwise(at.tolist())]
