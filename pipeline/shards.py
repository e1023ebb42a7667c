"""Pass 2: one spooled part -> per-frame labels, its `frames` and `clips` shards, and the counts for the report.

A pure function of its Plan: no other part, clock or worker can change a byte. A group of at most 256 clips is one
row group in both tables. Costs some 100 us a clip, half of it in the Parquet encoders.

    C clips of a group, T turns, F frames of the group
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from pipeline import labels
from pipeline.hazards import usual_gap
from pipeline.options import Options
from pipeline.output import TableWriter
from pipeline.schema import CLIPS, HEADS, NOT_SAMPLED, ROLES, sampling_seed, shard_path
from pipeline.state import NOT_STARTED
from pipeline.storage import move, sha256

GROUP_FRAMES: Final = 2_000_000  # 3,300 clips of the usual size; bounds memory where clips are huge
_ASSISTANT, _DST = ROLES.index("assistant"), ROLES.index("DST_UPDATE")
_ROLES: Final = pa.array(ROLES)


@dataclass(frozen=True)
class Plan:
    """What pass 2 needs to write a part: which spooled clips, their bounds, the first one's number."""

    spool: str
    staging: str
    split: str
    part: int
    convention: str
    keep: np.ndarray  # bool [C]
    bounds: np.ndarray  # int64 [C, 2]
    first_clip: int
    options: Options
    states: dict[int, dict[str, str]]  # clip of the part (before `keep`) -> its replayed initial state
    renamed: dict[int, str]  # clip of the part -> its id, where that is not the spooled one


@dataclass
class Written:
    """A written part: its shards' manifest entries and its counts."""

    split: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    gaps: dict[str, Counter[float]] = field(default_factory=lambda: {head: Counter() for head in HEADS})
    seconds: float = 0.0


def write_part(plan: Plan) -> Written:
    """Label and write one part.

    Its shards are written beside the spool and renamed into place: two tries of one part, where a cluster lost sight
    of the first, do not meet, and a late one finds its folder gone.
    """
    done = Written(plan.split)
    writers = {
        table: TableWriter(Path(f"{plan.spool}.{secrets.token_hex(4)}.{table}"), table) for table in ("frames", "clips")
    }
    try:
        clips = _write_groups(plan, writers, done)
        for writer in writers.values():
            writer.close()
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    done.shards = [_entry(plan, table, writer, clips) for table, writer in writers.items()]
    return done


def _write_groups(plan: Plan, writers: dict[str, TableWriter], done: Written) -> int:
    """Write and count the part's groups; returns the number of clips."""
    clip = plan.first_clip
    for batch, bounds, places in _groups(plan):
        group = _Group(batch, bounds, clip, plan, places)
        writers["frames"].write(group.frames_batch(writers["frames"].batch_schema))
        writers["clips"].write(group.clips_batch())
        group.count(done)
        clip += batch.num_rows
    return clip - plan.first_clip


def merged(written: list[Written]) -> dict[str, dict[str, Any]]:
    """Counts per split for the manifest, summed over the parts."""
    splits: dict[str, Written] = {}
    for part in written:
        total = splits.setdefault(part.split, Written(part.split))
        total.counts.update(part.counts)
        total.drops.update(part.drops)
        for head, gaps in part.gaps.items():
            total.gaps[head].update(gaps)
        total.seconds += part.seconds
    return {
        split: {
            **total.counts,
            **{f"{head}_usual_gap": usual_gap(gaps) for head, gaps in total.gaps.items()},
            "hours": round(total.seconds / 3600, 4),
            "drops": {reason: count for reason, count in sorted(total.drops.items()) if count},
        }
        for split, total in splits.items()
    }


def _entry(plan: Plan, table: str, writer: TableWriter, clips: int) -> dict[str, Any]:
    """Puts a written shard into its place; its entry in the manifest."""
    path = Path(plan.staging) / shard_path(table, plan.split, plan.part)
    move(writer.path, path)
    return {
        "path": shard_path(table, plan.split, plan.part),
        "table": table,
        "split": plan.split,
        "part": plan.part,
        "rows": writer.rows,
        "clips": clips,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }


def _groups(plan: Plan) -> Iterator[tuple[pa.RecordBatch, np.ndarray, list[int]]]:
    """The kept clips of each spooled batch, their bounds and places in the part, cut where frames are too many."""
    first = 0
    with pa.memory_map(plan.spool) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            keep = plan.keep[first : first + batch.num_rows]
            bounds = plan.bounds[first : first + batch.num_rows][keep]
            places = (first + np.flatnonzero(keep)).tolist()
            first += batch.num_rows
            if not keep.all():
                batch = batch.filter(pa.array(keep))
            for begin, end in _cut(bounds):
                yield batch.slice(begin, end - begin), bounds[begin:end], places[begin:end]


def _cut(bounds: np.ndarray) -> Iterator[tuple[int, int]]:
    begin, frames = 0, 0
    for i, (start, end) in enumerate(bounds.tolist()):
        if i > begin and frames + end - start > GROUP_FRAMES:
            yield begin, i
            begin, frames = i, 0
        frames += end - start
    if len(bounds):
        yield begin, len(bounds)


class _Group:
    """One row group: the clips' turns as flat arrays, their labels as one flat array over all frames."""

    def __init__(
        self,
        batch: pa.RecordBatch,
        bounds: np.ndarray,
        first_clip: int,
        plan: Plan,
        places: list[int],
    ) -> None:
        self.batch, self.bounds, self.plan = batch, bounds, plan
        self.states = {i: plan.states[place] for i, place in enumerate(places) if place in plan.states}
        self.number = np.arange(first_clip, first_clip + batch.num_rows, dtype=np.int32)
        ids = batch.column("clip_id").to_pylist()
        if plan.renamed:
            ids = [plan.renamed.get(place, name) for place, name in zip(places, ids, strict=True)]
        self.ids = pa.array(ids, pa.string())
        seeds = [sampling_seed(plan.options.seed, name) for name in ids]
        self.seeds = np.array(seeds, np.uint64)
        self.rates = [plan.options.rate(plan.split, own) for own in batch.column("neg_rate").to_pylist()]
        self.sizes = bounds[:, 1] - bounds[:, 0]
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])  # of each clip, in the flat frames
        own = batch.column("convention").to_pylist()
        self.conventions = [name or plan.convention for name in own]
        self.placed = np.array([name is not None for name in own], bool)
        self._read_turns()
        self._read_unlabelled()
        self.frame = np.arange(self.first[-1]) + np.repeat(bounds[:, 0] - self.first[:-1], self.sizes)
        self.labels = self._label()

    def _read_turns(self) -> None:
        turns = self.batch.column("turns")
        self.offsets = turns.offsets.to_numpy()
        self.turns = turns.values.slice(self.offsets[0], self.offsets[-1] - self.offsets[0])
        self.offsets = self.offsets - self.offsets[0]
        self.owner = np.repeat(np.arange(self.batch.num_rows), np.diff(self.offsets))
        self.role = self.turns.field("role").to_numpy()
        start, end = (self.turns.field(name).to_numpy() for name in ("start", "end"))
        as_they_are = (end == labels.NO_FRAMES[1]) | self.placed[self.owner]
        moved = labels.canonical(self.plan.convention, start, end)
        self.start = np.where(as_they_are, start, moved[0])
        self.end = np.where(as_they_are, end, moved[1])

    def _read_unlabelled(self) -> None:
        """The ranges that nobody annotated, cut to their clips: `unlabelled` absolute [U, 2], of clips `whose` [U]."""
        column = self.batch.column("unlabelled")
        offsets = column.offsets.to_numpy()
        ranges = column.values.slice(offsets[0], offsets[-1] - offsets[0])
        whose = np.repeat(np.arange(self.batch.num_rows), np.diff(offsets))
        bounds = self.bounds[whose]
        start, end = (np.clip(ranges.field(i).to_numpy(), bounds[:, 0], bounds[:, 1]) for i in (0, 1))
        inside = start < end
        self.whose, self.unlabelled = whose[inside], np.stack([start, end], axis=1)[inside]

    def _label(self) -> np.ndarray:
        """int8 [2, F]."""
        rule = labels.label_rule(
            labels.Turns(self.owner, self.role, self.start, self.end),
            labels.Ranges(self.whose, self.unlabelled[:, 0], self.unlabelled[:, 1]),
            starts=self.bounds[:, 0],
            sizes=self.sizes,
            seeds=self.seeds,
            rates=np.array(self.rates, np.float64),
            steps=np.diff(self.batch.column("steps").offsets.to_numpy()),
            onset=np.full(len(self.sizes), self.plan.options.positive == "onset"),
        )
        self.tracked = rule.tracked
        return labels.epoch_labels(rule, 0)

    def frames_batch(self, schema: pa.Schema) -> pa.RecordBatch:
        which = np.repeat(np.arange(self.batch.num_rows, dtype=np.int32), self.sizes)
        fps = self.batch.column("fps").to_numpy()
        columns = [
            pa.DictionaryArray.from_arrays(pa.array(which), self.ids),
            self.number[which],
            self.frame.astype(np.int32),
            (self.frame / fps[which]).astype(np.float32),
            self.labels[0],
            self.labels[1],
        ]
        return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=schema)

    def clips_batch(self) -> pa.RecordBatch:
        rows = self.batch.num_rows
        taken = {name: self.batch.column(name) for name in ("video_uid", "recording_id", "dataset", "fps")}
        taken |= {name: self.batch.column(name) for name in ("clip_idx", "frames_file", "goal", "knowledge")}
        supervised = (self.labels != NOT_SAMPLED).any(axis=0)
        taken |= {
            "clip_id": self.ids,
            "clip": pa.array(self.number),
            "start_frame": pa.array(self.bounds[:, 0], pa.int32()),
            "end_frame": pa.array(self.bounds[:, 1], pa.int32()),
            "num_frames": pa.array(self.sizes, pa.int32()),
            "steps": _retyped(self.batch.column("steps"), CLIPS.field("steps").type),
            "initial_state": self._initial_state(),
            "turns": self._turns_column(),
            "sampling_seed": pa.array(self.seeds, pa.uint64()),
            "neg_rate": pa.array(self.rates, pa.float64()),
            "unlabelled": self._unlabelled_column(),
            "positive": pa.array([self.plan.options.positive] * rows),
            "frame_convention": pa.array(self.conventions),
            "n_speaking": self._per_clip(self.labels[0] == 1),
            "n_dst_update": self._per_clip(self.labels[1] == 1),
            "n_supervised": self._per_clip(supervised),
        }
        return pa.RecordBatch.from_arrays([taken[name] for name in CLIPS.names], schema=CLIPS)

    def _initial_state(self) -> pa.Array:
        """Replayed states tell every step of the clip; given ones are as the source has them."""
        type_ = CLIPS.field("initial_state").type
        column = self.batch.column("initial_state")
        if not self.states:
            return _retyped(column, type_)
        rows = [[(pair["key"], pair["value"]) for pair in pairs] for pairs in column.to_pylist()]
        steps = self.batch.column("steps").to_pylist()
        for i, state in self.states.items():
            rows[i] = list((dict.fromkeys((step["key"] for step in steps[i]), NOT_STARTED) | state).items())
        return pa.array([[{"id": step, "state": state} for step, state in row] for row in rows], type_)

    def _unlabelled_column(self) -> pa.Array:
        type_ = CLIPS.field("unlabelled").type
        offsets = np.searchsorted(self.whose, np.arange(self.batch.num_rows + 1)).astype(np.int32)
        columns = [pa.array(self.unlabelled[:, i], pa.int32()) for i in (0, 1)]
        struct = pa.StructArray.from_arrays(columns, fields=list(type_.value_type))
        return pa.ListArray.from_arrays(pa.array(offsets), struct, type=type_)

    def _per_clip(self, mask: np.ndarray) -> pa.Array:
        return pa.array(np.add.reduceat(mask, self.first[:-1], dtype=np.int64), pa.int32())

    def _turns_column(self) -> pa.Array:
        type_ = CLIPS.field("turns").type
        absent = self.end == labels.NO_FRAMES[1]
        columns = [
            _ROLES.take(self.turns.field("role")),
            self.turns.field("text"),
            pa.array(self.start.astype(np.int32), mask=absent),
            pa.array(np.minimum(self.end, 2**31 - 1).astype(np.int32), mask=absent),
            self.turns.field("time"),
            _retyped(self.turns.field("updates"), type_.value_type.field("updates").type),
        ]
        struct = pa.StructArray.from_arrays(columns, fields=list(type_.value_type))
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), struct, type=type_)

    def count(self, done: Written) -> None:
        """Add this group's counts: what the report and the hazards are made of."""
        speaking, dst = self.labels[0], self.labels[1]
        both = (speaking == 1) & (dst == 1)
        firsts = self.first[:-1]
        fps = self.batch.column("fps").to_numpy()
        nobody = np.bincount(self.whose, self.unlabelled[:, 1] - self.unlabelled[:, 0], self.batch.num_rows)
        annotated = self.sizes - nobody.astype(np.int64)  # frames [C]
        tracked = self.tracked & (annotated > 0)
        done.counts.update(
            clips=self.batch.num_rows,
            frames=len(self.frame),
            speaking_clips=int((annotated > 0).sum()),
            speaking_frames=int(annotated.sum()),
            dst_update_clips=int(tracked.sum()),
            dst_update_frames=int(annotated[tracked].sum()),
            supervised=int(((speaking != NOT_SAMPLED) | (dst != NOT_SAMPLED)).sum()),
            speaking_supervised=int((speaking != NOT_SAMPLED).sum()),
            dst_update_supervised=int((dst != NOT_SAMPLED).sum()),
            speaking_positive=int((speaking == 1).sum()),
            dst_update_positive=int((dst == 1).sum()),
            both_positive=int(both.sum()),
            first_frame_positive=int(((speaking[firsts] == 1) | (dst[firsts] == 1)).sum()),
        )
        done.seconds += float((self.sizes / fps).sum())
        for head, own in zip(HEADS, self.labels, strict=True):
            positive = np.flatnonzero(own == 1)
            clip = np.searchsorted(self.first, positive, side="right") - 1
            quiet = np.diff(positive) - 1
            between = (quiet > 0) & (np.diff(clip) == 0)
            seconds = np.round(quiet[between] / fps[clip[1:][between]], 3)
            done.gaps[head].update(
                dict(zip(*(a.tolist() for a in np.unique(seconds, return_counts=True)), strict=True))
            )
        self._count_drops(done)

    def _count_drops(self, done: Written) -> None:
        events = (self.role == _ASSISTANT) | (self.role == _DST)
        start, end, bounds = self.start[events], self.end[events], self.bounds[self.owner[events]]
        reasons = labels.drops(start, end, bounds[:, 0], bounds[:, 1], self.plan.options.positive)
        summaries = int(np.sum(self.batch.column("summaries").to_numpy()))
        for code, reason in enumerate(labels.DROP_REASONS):
            done.drops[reason] += int((reasons == code).sum()) - (summaries if code == 0 else 0)
        done.drops["summary, not speech"] += summaries
        inside = reasons == -1
        done.counts["event_turns"] += len(reasons)
        cut = inside & ((start < bounds[:, 0]) | (end > bounds[:, 1]))
        done.counts["turns_cut"] += int(cut.sum())


def _retyped(column: pa.Array, type_: pa.DataType) -> pa.Array:
    """A spooled list<struct> under the schema's field names."""
    offsets = column.offsets.to_numpy()
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    children = [values.field(i) for i in range(values.type.num_fields)]
    struct = pa.StructArray.from_arrays(children, fields=list(type_.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets - offsets[0], pa.int32()), struct, type=type_)
