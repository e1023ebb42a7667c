"""Reads the folder that `preprocess` writes: the manifest, and clips by number with the labels of any epoch.

Labels follow from the table `clips` by the rule that wrote `frames` (`pipeline.labels`), so `frames` is not read. At
most HELD_GROUPS row groups (of up to 256 clips) are in memory: an order that stays within so many at a time reads each
once (`trainer.sampler`).

    F frames of a clip or of a row group    C clips of a row group    T turns
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache, cached_property, lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.labels import Labels, Ranges, Turns, epoch_labels, label_rule
from pipeline.schema import MANIFEST, NOT_SAMPLED, ROLES, SCHEMA_HASH, SCHEMA_VERSION
from pipeline.storage import sha256

HELD_GROUPS = 4


class Turn(NamedTuple):
    """One entry of the conversation; [start_frame, end_frame) are absolute, both None where it has no frames."""

    role: str
    text: str
    start_frame: int | None = None
    end_frame: int | None = None
    time_s: float | None = None
    updates: tuple[tuple[str, str], ...] = ()  # (step id, transition)


@dataclass(frozen=True, eq=False)
class ClipExample:
    """A clip with the labels of one epoch."""

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
    turns: tuple[Turn, ...]
    sampling_seed: int
    neg_rate: float
    positive: str  # 'span' or 'onset'
    labels: Labels  # int8 [2, F] (speaking, DST update)
    unlabelled: tuple[tuple[int, int], ...] = ()  # absolute ranges that nobody annotated
    dataset: str = "unknown"
    frame_convention: str = "event"  # how the source's frames were read

    @property
    def end_frame(self) -> int:
        return self.start_frame + self.num_frames


def read_manifest(data: Path) -> dict[str, Any]:
    """The manifest of a preprocessed folder; InputError if there is none or it is of another schema."""
    path = data / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        schema = manifest["schema_version"], manifest["schema_hash"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        problem = "not found, or not ours; expected a folder written by preprocess: run prospect-dst preprocess"
        raise InputError(f"{path}: {problem}") from None
    if schema != (SCHEMA_VERSION, SCHEMA_HASH):
        expected = f"schema {SCHEMA_VERSION} {SCHEMA_HASH}"
        raise InputError(f"{path}: schema {schema[0]} {schema[1]}, expected {expected}; run preprocess again")
    return dict(manifest)


def verify_shard(data: Path, shard: dict[str, Any]) -> Path:
    """The path of a manifest's shard; InputError where it is missing or its SHA-256 is another."""
    path = data / shard["path"]
    if not path.is_file() or _sha256(path, path.stat().st_mtime_ns) != shard["sha256"]:
        problem = "damaged, SHA-256 differs from the manifest's" if path.is_file() else "missing"
        raise InputError(f"{path}: {problem}; run preprocess again")
    return path


@cache
def _sha256(path: Path, changed: int) -> str:
    """Read once per process, unless the file has changed since."""
    return sha256(path)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, once every shard proves to be the one it lists; InputError names the damage otherwise."""
    manifest = read_manifest(folder)
    listed = {verify_shard(folder, shard) for shard in manifest["shards"]}
    if others := set(folder.glob("*/split=*/*.parquet")) - listed:
        raise InputError(f"{min(others)}: a shard that {MANIFEST} does not list; remove it, or run preprocess again")
    return manifest


class Statistics(NamedTuple):
    """Of a split's labels in epoch 0, which are those of `frames`."""

    counts: npt.NDArray[np.int64]  # [2, 3] per head: frames labelled 0, labelled 1, not sampled
    neg_rate: float  # mean over clips

    def positive_rates(self, of_all: bool = False) -> tuple[float, float]:
        """Per head, positives among its supervised frames, or among all frames; 0.5 where there are none."""
        total = self.counts.sum(1) if of_all else self.counts[:, :2].sum(1)
        speaking, dst_update = (float(p / n) if n else 0.5 for p, n in zip(self.counts[:, 1], total, strict=True))
        return speaking, dst_update


class Split:
    """The clips of one split, by their number on disk. `key` names its exact content.

    Raises InputError for a missing split and for a missing or damaged shard.
    """

    def __init__(self, data: Path, split: str) -> None:
        self.manifest, self.name = read_manifest(data), split
        shards = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        if not any(shard["clips"] for shard in shards):
            available = ", ".join(sorted(self.manifest["splits"])) or "none"
            then = f"name the input file {split}_<anything>.json, or run preprocess with --split {split}"
            raise InputError(f"{data / MANIFEST}: no split {split!r}, found: {available}; {then}")
        content = "".join(sorted(f"{shard['path']} {shard['sha256']}\n" for shard in shards))
        self.key = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._groups: list[tuple[Path, int]] = []  # shard of clips, number of the row group in it
        self.sizes: list[int] = []  # clips of each row group
        for shard in sorted(shards, key=lambda shard: shard["part"]):
            path = verify_shard(data, shard)
            if shard["table"] == "clips":
                footer = pq.read_metadata(path)
                self._groups += [(path, i) for i in range(footer.num_row_groups)]
                self.sizes += [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        self._starts = [0, *accumulate(self.sizes)]  # the first clip of each group

    def __len__(self) -> int:
        return self._starts[-1]

    def clip(self, number: int, epoch: int = 0, rate: float | None = None) -> ClipExample:
        """A clip with the labels of an epoch, at its own rate or at another (1.0 supervises every frame)."""
        group, row = self.find(number)
        return group.clip(row, group.labels(epoch, rate))

    def num_frames(self, number: int) -> int:
        group, row = self.find(number)
        return int(group.rule.sizes[row])

    def in_order(self, rate: float | None = 1.0) -> Iterator[ClipExample]:
        """The clips as on disk; every frame is supervised, or at another `rate` (None: the clip's own)."""
        return (self.clip(number, rate=rate) for number in range(len(self)))

    def texts(self) -> Iterator[str]:
        """Everything that a tokenizer will meet in this split."""
        for clip in self.in_order(rate=None):
            yield from (text for text in (clip.goal, clip.knowledge) if text)
            yield from (f"{step}: {name}" for step, name in clip.steps)
            yield from (turn.text for turn in clip.turns)

    def statistics(self) -> Statistics:
        """Label counts and mean rate, from one pass over the split."""
        counts, rates = np.zeros((2, 3), np.int64), 0.0
        for group in (self.find(start)[0] for start in self._starts[:-1]):
            counts += np.stack([(group.labels(0) == value).sum(1) for value in (0, 1, NOT_SAMPLED)], 1)
            rates += float(group.rule.rates.sum())
        return Statistics(counts, rates / len(self))

    def find(self, number: int) -> tuple[_RowGroup, int]:
        """A clip's row group, in memory, and its row there."""
        at = bisect_right(self._starts, number) - 1
        return _row_group(*self._groups[at], self.key), number - self._starts[at]


_ROLE = "turns.list.element.role"
_NUMBERS = [
    *("start_frame", "num_frames", "sampling_seed", "neg_rate", "positive", "steps.list.element.id"),
    *(_ROLE, "turns.list.element.start_frame", "turns.list.element.end_frame"),
    *("unlabelled.list.element.start_frame", "unlabelled.list.element.end_frame"),
]
_PAIRS = ("steps", "initial_state", "unlabelled")  # columns of lists of two values
# -1 in Arrow: `pa.scalar` imports pandas where it is installed, which takes a third of a second
_NO_FRAME = pa.Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(np.full(1, -1, np.int32))])[0]


class _RowGroup:
    """Clips as flat arrays; texts are read when first asked for. content: a cache key, of what the file holds."""

    def __init__(self, path: Path, index: int, content: str) -> None:
        self._path, self._index = path, index
        table = self._read(_NUMBERS)
        clip = np.arange(len(table))
        self.turn_at, turns = flat_lists(table["turns"])
        frames = (np.from_dlpack(turns.field(name).fill_null(_NO_FRAME)) for name in ("start_frame", "end_frame"))
        roles = turns.field("role")
        codes = np.array([ROLES.index(role) for role in roles.dictionary.to_pylist()], np.int32)
        self.turns: npt.NDArray[np.int32] = np.stack([codes[np.from_dlpack(roles.indices)], *frames], axis=1)
        unlabelled_at, ranges = flat_lists(table["unlabelled"])
        unlabelled = (np.from_dlpack(ranges.field(name)) for name in ("start_frame", "end_frame"))
        self.rule = label_rule(
            Turns(np.repeat(clip, np.diff(self.turn_at)), *self.turns.T),
            Ranges(np.repeat(clip, np.diff(unlabelled_at)), *unlabelled),
            starts=table["start_frame"].to_numpy().astype(np.int64),
            sizes=table["num_frames"].to_numpy().astype(np.int64),
            seeds=table["sampling_seed"].to_numpy(),
            rates=table["neg_rate"].to_numpy(),
            steps=np.diff(flat_lists(table["steps"])[0]),
            onset=np.array(table["positive"].to_pylist()) == "onset",
        )
        self.frame_at = np.concatenate([[0], np.cumsum(self.rule.sizes)])
        self._drawn: tuple[tuple[int, float | None], Labels] | None = None  # the labels asked for last

    def _read(self, columns: list[str] | None = None) -> pa.Table:
        """Some columns, or all; without Arrow's threads, which gain nothing and are a pool per worker."""
        with pq.ParquetFile(self._path, read_dictionary=[_ROLE]) as file:
            return file.read_row_group(self._index, columns=columns, use_threads=False)

    def labels(self, epoch: int, rate: float | None = None) -> Labels:
        """int8 [2, F] of all clips."""
        if self._drawn is None or self._drawn[0] != (epoch, rate):
            self._drawn = (epoch, rate), epoch_labels(self.rule, epoch, rate)
        return self._drawn[1]

    def clip(self, row: int, labels: Labels) -> ClipExample:
        own = labels[:, self.frame_at[row] : self.frame_at[row + 1]].copy()
        return ClipExample(**self._clips[row], labels=own)

    @cached_property
    def _clips(self) -> list[dict[str, Any]]:
        """Of each clip what a ClipExample holds but its labels; made by column, which is several times faster."""
        table = self._read()
        *columns, updates = (flat_lists(table["turns"])[1].field(name) for name in Turn._fields)
        turns = list(map(Turn, *(column.to_pylist() for column in columns), _pairs(updates)))
        copied = [field.name for field in fields(ClipExample) if field.name not in (*_PAIRS, "turns", "labels")]
        rows: list[dict[str, Any]] = table.select(copied).to_pylist()
        for row, *own, (a, b) in zip(rows, *(_pairs(table[n]) for n in _PAIRS), pairwise(self.turn_at), strict=True):
            row |= dict(zip(_PAIRS, own, strict=True)) | {"turns": tuple(turns[a:b])}
        return rows


_row_group = lru_cache(HELD_GROUPS)(_RowGroup)


def flat_lists(column: pa.ChunkedArray | pa.ListArray) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """(where each list begins, [C + 1]; what the lists hold, end to end)."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    at = np.from_dlpack(lists.offsets)
    return at - at[0], lists.values.slice(int(at[0]), int(at[-1] - at[0]))


def _pairs(column: pa.ChunkedArray | pa.ListArray) -> list[tuple[tuple[Any, Any], ...]]:
    """Per list, its structs of two values."""
    at, structs = flat_lists(column)
    pairs = list(zip(*(values.to_pylist() for values in structs.flatten()), strict=True))
    return [tuple(pairs[a:b]) for a, b in pairwise(at.tolist())]
