"""Reads the folder that `preprocess` writes: the manifest, and clips by number with the labels of any epoch.

A split's shards are compared with the manifest's SHA-256 when it is opened. Labels follow from the table `clips` by the
rule that wrote `frames` (`pipeline.labels`), so the rows of `frames` are not read. At most HELD_GROUPS row groups (of
up to 256 clips) are in memory: an order that stays within so many at a time reads each once (`trainer.sampler`).

    F frames of a clip or of a row group    C clips of a row group    T turns
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.labels import LabelRule, Labels, Ranges, Turns, epoch_labels, label_rule
from pipeline.schema import MANIFEST, NOT_SAMPLED, ROLES, SCHEMA_HASH, SCHEMA_VERSION
from pipeline.storage import sha256

HELD_GROUPS = 4


# ---- a clip ------------------------------------------------------------------------------------------


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

    @property
    def end_frame(self) -> int:
        return self.start_frame + self.num_frames


# ---- the folder --------------------------------------------------------------------------------------


def read_manifest(data: Path) -> dict[str, Any]:
    """The manifest of a preprocessed folder; InputError if there is none or it is of another schema."""
    path = data / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        schema = manifest["schema_version"], manifest["schema_hash"]
        _ = manifest["splits"], [shard["path"] for shard in manifest["shards"]]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{path}: not found, expected a folder written by preprocess; run prospect-dst preprocess"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a manifest ({error!r}); run preprocess again") from None
    if schema != (SCHEMA_VERSION, SCHEMA_HASH):
        expected = f"schema {SCHEMA_VERSION} {SCHEMA_HASH}"
        raise InputError(f"{path}: schema {schema[0]} {schema[1]}, expected {expected}; run preprocess again")
    return dict(manifest)


def verify_shard(data: Path, shard: dict[str, Any]) -> Path:
    """The path of a manifest's shard; InputError where its size or SHA-256 is another."""
    path = data / shard["path"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        found = "missing" if size is None else f"{size} bytes"
        raise InputError(f"{path}: {found}, expected {shard['bytes']} bytes; run preprocess again")
    if sha256(path) != shard["sha256"]:
        raise InputError(f"{path}: damaged, SHA-256 differs from the manifest's; run preprocess again")
    return path


@dataclass(frozen=True, eq=False)
class Statistics:
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
            found = ", ".join(sorted(self.manifest["splits"])) or "none"
            raise InputError(
                f"{data / MANIFEST}: no split {split!r}, found: {found}; name the input file "
                f"{split}_<anything>.json, or run preprocess with --split {split}"
            )
        paths = {(shard["table"], shard["part"]): verify_shard(data, shard) for shard in shards}
        content = "".join(sorted(f"{shard['path']} {shard['sha256']}\n" for shard in shards))
        self.key = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._groups: list[tuple[Path, int]] = []  # shard of clips, number of the row group in it
        self.sizes: list[int] = []  # clips of each row group
        for _, path in sorted((part, path) for (table, part), path in paths.items() if table == "clips"):
            footer = pq.read_metadata(path)
            for i in range(footer.num_row_groups):
                self._groups.append((path, i))
                self.sizes.append(footer.row_group(i).num_rows)
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
        for start in self._starts[:-1]:
            group, _ = self.find(start)
            stored = group.labels(0)
            counts += np.stack([(stored == value).sum(1) for value in (0, 1, NOT_SAMPLED)], 1)
            rates += float(group.rule.rates.sum())
        return Statistics(counts, rates / len(self))

    def find(self, number: int) -> tuple[_RowGroup, int]:
        """A clip's row group, in memory, and its row there."""
        at = bisect_right(self._starts, number) - 1
        return _row_group(*self._groups[at], self.key), number - self._starts[at]


# ---- one row group in memory -------------------------------------------------------------------------

_ROLE = "turns.list.element.role"
_NUMBERS = (
    *("start_frame", "num_frames", "sampling_seed", "neg_rate", "positive", "steps.list.element.id"),
    *(_ROLE, "turns.list.element.start_frame", "turns.list.element.end_frame"),
    *("unlabelled.list.element.start_frame", "unlabelled.list.element.end_frame"),
)
_COPIED = (  # columns that a ClipExample takes over as they are
    *("clip_id", "clip", "video_uid", "recording_id", "fps", "start_frame", "num_frames", "frames_file"),
    *("goal", "knowledge", "sampling_seed", "neg_rate", "positive", "dataset"),
)
# -1 in Arrow: `pa.scalar` imports pandas where it is installed, which takes a third of a second
_NO_FRAME = pa.Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(np.full(1, -1, np.int32))])[0]


class _RowGroup:
    """A row group of clips as flat arrays; its texts are read when a clip with texts is first asked for.

    content: names what the file holds, as a cache's key.
    """

    def __init__(self, path: Path, index: int, content: str) -> None:
        self._path, self._index = path, index
        table = _read(path, index, _NUMBERS)
        self.turn_at, turns = flat_lists(table["turns"])
        frames = (np.from_dlpack(turns.field(name).fill_null(_NO_FRAME)) for name in ("start_frame", "end_frame"))
        roles = turns.field("role")
        codes = np.array([ROLES.index(role) for role in roles.dictionary.to_pylist()], np.int32)
        self.turns: npt.NDArray[np.int32] = np.stack([codes[np.from_dlpack(roles.indices)], *frames], axis=1)
        self.rule = self._rule(table)
        self._frame_at = np.concatenate([[0], np.cumsum(self.rule.sizes)])
        self._drawn: tuple[tuple[int, float | None], Labels] | None = None  # the labels asked for last
        self._texts: _Texts | None = None

    def _rule(self, table: pa.Table) -> LabelRule:
        clip = np.arange(len(table))
        at, ranges = flat_lists(table["unlabelled"])
        unlabelled = (np.from_dlpack(ranges.field(name)) for name in ("start_frame", "end_frame"))
        return label_rule(
            Turns(np.repeat(clip, np.diff(self.turn_at)), *self.turns.T),
            Ranges(np.repeat(clip, np.diff(at)), *unlabelled),
            starts=_array(table["start_frame"]).astype(np.int64),
            sizes=_array(table["num_frames"]).astype(np.int64),
            seeds=_array(table["sampling_seed"]),
            rates=_array(table["neg_rate"]),
            steps=np.diff(flat_lists(table["steps"])[0]),
            onset=np.array(table["positive"].to_pylist()) == "onset",
        )

    def labels(self, epoch: int, rate: float | None = None) -> Labels:
        """int8 [2, F] of all clips."""
        if self._drawn is None or self._drawn[0] != (epoch, rate):
            self._drawn = (epoch, rate), epoch_labels(self.rule, epoch, rate)
        return self._drawn[1]

    def own(self, row: int, labels: Labels) -> Labels:
        return labels[:, self._frame_at[row] : self._frame_at[row + 1]].copy()

    def clip(self, row: int, labels: Labels) -> ClipExample:
        self._texts = self._texts or _Texts(_read(self._path, self._index))
        texts = self._texts
        return ClipExample(
            **texts.copied[row],
            steps=texts.steps[row],
            initial_state=texts.states[row],
            unlabelled=texts.unlabelled[row],
            turns=tuple(texts.turns[self.turn_at[row] : self.turn_at[row + 1]]),
            labels=self.own(row, labels),
        )


_row_group = lru_cache(HELD_GROUPS)(_RowGroup)


class _Texts:
    """The columns of a row group that hold text, as Python objects; by column, which is several times faster."""

    def __init__(self, table: pa.Table) -> None:
        self.copied = table.select(_COPIED).to_pylist()
        self.steps, self.states = _pairs(table["steps"]), _pairs(table["initial_state"])
        self.unlabelled = _pairs(table["unlabelled"])
        _, turns = flat_lists(table["turns"])
        *columns, updates = (turns.field(name) for name in Turn._fields)
        self.turns = list(map(Turn, *(column.to_pylist() for column in columns), _pairs(updates)))


def _read(path: Path, row_group: int, columns: Sequence[str] = ()) -> pa.Table:
    """One row group, whole or some columns; without Arrow's threads, which gain nothing and are a pool per worker."""
    with pq.ParquetFile(path, read_dictionary=[_ROLE]) as file:
        return file.read_row_group(row_group, columns=list(columns) or None, use_threads=False)


def _array(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    return np.from_dlpack(column.combine_chunks())


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
