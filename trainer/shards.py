"""Opens a folder written by `preprocess` and streams its clips, with fresh labels every epoch.

Trades a perfectly global shuffle for bounded memory: row groups (up to 256 clips) are permuted and clips
are shuffled inside a window of WINDOW_GROUPS of them, so about a thousand clips are held, whatever the
data's size. The order is a pure function of (seed, epoch); the whole state of the stream is (epoch, position).
Every shard of a split is checked against the manifest's size and SHA-256 before the first clip is read.

    F frames of a clip    G row groups    N clips of a split
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.schema import MANIFEST, NOT_SAMPLED, SCHEMA_HASH, SCHEMA_VERSION, draws, is_inside
from trainer.clips import ClipExample, Turn, epoch_labels
from trainer.errors import TrainerError

WINDOW_GROUPS = 4
LABELS = ("speaking_label", "dst_update_label")


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
    """The manifest of a preprocessed folder; TrainerError if there is none or it is of another schema."""
    path = data / MANIFEST
    if not path.is_file():
        raise TrainerError(f"{path}: not found, expected a folder written by preprocess; run prospect-dst preprocess")
    try:
        manifest = json.loads(path.read_bytes())
        found = (manifest["schema_version"], manifest["schema_hash"])
        needed = ("path", "table", "split", "part", "clips", "bytes", "sha256")
        _ = manifest["splits"], [shard[key] for shard in manifest["shards"] for key in needed]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainerError(f"{path}: not a manifest ({error!r}); run preprocess again") from None
    if found != (SCHEMA_VERSION, SCHEMA_HASH):
        expected = f"schema {SCHEMA_VERSION} {SCHEMA_HASH}"
        raise TrainerError(f"{path}: schema {found[0]} {found[1]}, expected {expected}; run preprocess again")
    return dict(manifest)


def _verify(data: Path, shard: dict[str, Any]) -> Path:
    """The shard's path, after its size and SHA-256 proved to be the manifest's."""
    if not is_inside(shard["path"]):
        raise TrainerError(f"{data / MANIFEST}: lists a shard at {shard['path']!r}; run preprocess again")
    path = data / shard["path"]
    size = path.stat().st_size if path.is_file() else None
    if size != shard["bytes"]:
        found = "missing" if size is None else f"{size} bytes"
        raise TrainerError(f"{path}: {found}, expected {shard['bytes']} bytes; run preprocess again")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != shard["sha256"]:
        raise TrainerError(f"{path}: damaged, SHA-256 differs from the manifest's; run preprocess again")
    return path


@dataclass(frozen=True)
class _RowGroup:
    """Where up to 256 clips lie: the same row group of a frames shard and of a clips shard."""

    frames: Path
    clips: Path
    index: int
    num_clips: int


@dataclass(frozen=True)
class _Loaded:
    clips: pa.Table  # one row per clip
    starts: npt.NDArray[np.int64]  # first row of each clip in `labels`
    labels: npt.NDArray[np.int8]  # [2, rows], as stored


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

    Raises TrainerError for a missing split (naming those there are) and for a damaged or missing shard.
    """

    def __init__(self, data: Path, split: str) -> None:
        self.manifest = read_manifest(data)
        self.name = split
        shards = [s for s in self.manifest["shards"] if s["split"] == split]
        if not sum(s["clips"] for s in shards):
            raise TrainerError(_no_such_split(data, split, self.manifest))
        paths = {(s["table"], s["part"]): _verify(data, s) for s in shards}
        digest = "".join(sorted(f"{s['path']} {s['sha256']}\n" for s in shards))
        self.key = hashlib.sha256(digest.encode()).hexdigest()[:16]
        parts = sorted({s["part"] for s in shards})
        self.groups = [g for part in parts for g in _row_groups(paths, part)]
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self._open: OrderedDict[int, _Loaded] = OrderedDict()

    @property
    def sizes(self) -> list[int]:
        return [group.num_clips for group in self.groups]

    def __len__(self) -> int:
        return sum(self.sizes)

    def epoch(self, seed: int, epoch: int, position: int = 0) -> Iterator[ClipExample]:
        """The epoch's clips in shuffled order from `position` on, with that epoch's labels."""
        for number in order(seed, epoch, self.sizes)[position:]:
            yield self._clip(int(number), epoch, rate=None)

    def in_order(self, rate: float | None = 1.0) -> Iterator[ClipExample]:
        """The clips as on disk; every frame is supervised, or at another `rate` (None: the clip's own)."""
        for number in range(len(self)):
            yield self._clip(number, 0, rate)

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
            loaded = self._load(number)
            counts += np.stack([(loaded.labels == value).sum(1) for value in (0, 1, NOT_SAMPLED)], 1)
            rates += sum(loaded.clips["neg_rate"].to_pylist())
        return Statistics(counts, rates / len(self))

    def _load(self, number: int) -> _Loaded:
        if number not in self._open:
            self._open[number] = _read_group(self.groups[number])
            if len(self._open) > WINDOW_GROUPS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _clip(self, number: int, epoch: int, rate: float | None) -> ClipExample:
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        loaded, row = self._load(group), number - int(self._starts[group])
        stored = loaded.labels[:, loaded.starts[row] : loaded.starts[row + 1]]
        clip = _example(loaded.clips.slice(row, 1).to_pylist()[0], stored)
        self._check_draw(clip, group)
        rate = clip.neg_rate if rate is None else rate
        return replace(clip, labels=epoch_labels(clip, stored == 1, epoch, rate))

    def _check_draw(self, clip: ClipExample, group: int) -> None:
        drawn = epoch_labels(clip, clip.labels == 1, 0, clip.neg_rate)
        if not np.array_equal(drawn, clip.labels):
            head, i = np.argwhere(drawn != clip.labels)[0]
            raise TrainerError(
                f"{self.groups[group].frames} clip {clip.clip_id} frame {clip.start_frame + i}: {LABELS[head]} "
                f"is {clip.labels[head, i]}, but sampling_seed and neg_rate give {drawn[head, i]}; "
                f"run preprocess again"
            )


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
        raise TrainerError(f"{MANIFEST}: part {part} has no {missing.args[0][0]} shard; run preprocess again") from None
    footer, other = pq.read_metadata(clips), pq.read_metadata(frames)
    if footer.num_row_groups != other.num_row_groups:
        raise TrainerError(
            f"{frames}: {other.num_row_groups} row groups, expected {footer.num_row_groups} as in {clips}; "
            f"run preprocess again"
        )
    return [
        _RowGroup(frames, clips, i, footer.row_group(i).num_rows)
        for i in range(footer.num_row_groups)
    ]  # fmt: skip


def _read_group(group: _RowGroup) -> _Loaded:
    clips = pq.ParquetFile(group.clips).read_row_group(group.index)
    frames = pq.ParquetFile(group.frames).read_row_group(group.index, columns=list(LABELS))
    starts = np.concatenate([[0], np.cumsum(clips["num_frames"].to_pylist())]).astype(np.int64)
    if frames.num_rows != starts[-1]:
        raise TrainerError(
            f"{group.frames} row group {group.index}: {frames.num_rows} frames, expected {starts[-1]} as its "
            f"clips say; run preprocess again"
        )
    labels = np.stack([np.from_dlpack(frames[name].combine_chunks()) for name in LABELS])
    return _Loaded(clips, starts, labels)


def _example(row: dict[str, Any], labels: npt.NDArray[np.int8]) -> ClipExample:
    turns = tuple(
        Turn(
            turn["role"], turn["text"], turn["start_frame"], turn["end_frame"], turn["time_s"],
            tuple((u["id"], u["transition"]) for u in turn["updates"]),
        )
        for turn in row["turns"]
    )  # fmt: skip
    same = (
        "clip_id", "clip", "video_uid", "recording_id", "fps", "start_frame", "num_frames", "frames_file",
        "goal", "knowledge", "sampling_seed", "neg_rate", "positive",
    )  # fmt: skip
    return ClipExample(
        **{name: row[name] for name in same},
        steps=tuple((step["id"], step["name"]) for step in row["steps"]),
        initial_state=tuple((s["id"], s["state"]) for s in row["initial_state"]),
        turns=turns,
        labels=labels,
    )
