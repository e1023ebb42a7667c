"""Pass 2: one spooled part -> per-frame labels, its `frames` and `clips` shards, and the counts for the report.

A pure function of its Plan: no other part, clock or worker can change a byte. A group of at most 256 clips is one
row group in both tables. Costs some 100 us a clip, half of it in the Parquet encoders.

    K clips of a part, C clips of a group, T turns, F frames of the group
"""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import labels
from pipeline.dataset import flat_lists
from pipeline.extract import ClipInfo, cut
from pipeline.options import Options
from pipeline.output import FRAMES_WRITTEN, parquet_writer
from pipeline.readers.clip import Range
from pipeline.schema import CLIPS, DST_UPDATE, HEADS, NOT_SAMPLED, ROLE_OF, ROLES, SPEAKING, sampling_seed, shard_path
from pipeline.state import initial_state
from pipeline.storage import move, sha256

GROUP_FRAMES: Final = 2_000_000  # 3,300 clips of the usual size; bounds memory where clips are huge


@dataclass(frozen=True)
class Plan:
    """What pass 2 needs to write a part: its clips' rows in the spool, and what was decided on them."""

    spool: str
    staging: str
    split: str
    part: int
    first_clip: int  # number of the first clip in its split
    convention: str
    options: Options
    rows: np.ndarray  # int64 [K], ascending
    clips: list[ClipInfo]


Counts = defaultdict[str, Counter[Any]]  # "counts", "drops" (by reason), and for each head its gaps (by seconds)
Written = tuple[str, list[dict[str, Any]], Counts]  # a part's split, its shards' manifest entries, its counts


def write_part(plan: Plan) -> Written:
    """Label and write one part.

    Its shards are written beside the spool and renamed into place: two tries of one part, where a cluster lost sight
    of the first, do not meet, and a late one finds its folder gone.
    """
    frames_new, clips_new = (Path(f"{plan.spool}.{secrets.token_hex(4)}.{table}") for table in ("frames", "clips"))
    counts: Counts = defaultdict(Counter)
    with parquet_writer(frames_new, "frames") as frames, parquet_writer(clips_new, "clips") as clips:
        for batch, own in _groups(plan):
            group = _labelled(plan, batch, own)
            rows = _frames_batch(group, plan.first_clip + own.start)
            frames.write_batch(rows, max(1, rows.num_rows))
            clips.write_batch(_clips_batch(group, plan, own), batch.num_rows)
            _count(group, plan.options.positive, counts)
    entries = []
    for table, new in (("frames", frames_new), ("clips", clips_new)):
        name = shard_path(table, plan.split, plan.part)
        path = Path(plan.staging) / name
        move(new, path)
        entry = {"path": name, "table": table, "split": plan.split, "part": plan.part}
        entry |= {"rows": counts["counts"][table], "clips": counts["counts"]["clips"]}
        entries.append(entry | {"bytes": path.stat().st_size, "sha256": sha256(path)})
    return plan.split, entries, counts


def counts_by_split(written: list[Written]) -> dict[str, dict[str, Any]]:
    """Counts per split for the manifest, summed over the parts."""
    splits: dict[str, Counts] = {}
    for split, _, counts in written:
        total = splits.setdefault(split, defaultdict(Counter))
        for name, counter in counts.items():
            total[name].update(counter)
    return {
        split: {
            **{name: count for name, count in total["counts"].items() if name != "seconds"},
            **{f"{head}_gaps": sorted(total[head].items()) for head in HEADS},
            "neg_rates": sorted(total["neg_rates"]),
            "hours": round(total["counts"]["seconds"] / 3600, 4),
            "drops": {reason: count for reason, count in sorted(total["drops"].items()) if count},
        }
        for split, total in splits.items()
    }


# ---- one row group -----------------------------------------------------------------------------------


def _groups(plan: Plan) -> Iterator[tuple[pa.RecordBatch, slice]]:
    """The plan's clips of each spooled batch, and which of the plan they are, cut where frames are too many."""
    first = done = 0
    with pa.memory_map(plan.spool) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            rows = plan.rows[done:][plan.rows[done:] < first + batch.num_rows] - first
            first += batch.num_rows
            if len(rows) < batch.num_rows:
                batch = batch.take(pa.array(rows))
            sizes = [clip.bounds[1] - clip.bounds[0] for clip in plan.clips[done : done + len(rows)]]
            for begin, end in cut(sizes, len(rows), GROUP_FRAMES):
                yield batch.slice(begin, end - begin), slice(done + begin, done + end)
            done += len(rows)


class _Group(NamedTuple):
    """A row group: its clips' turns and labels as flat arrays, end to end."""

    batch: pa.RecordBatch  # as spooled
    ids: pa.StringArray
    turns: labels.Turns
    unlabelled: labels.Ranges
    rule: labels.LabelRule
    labels: np.ndarray  # int8 [2, F]

    def per_clip(self, mask: np.ndarray) -> np.ndarray:
        """int32 [C]: each clip's frames where `mask` [F] is true."""
        first = np.cumsum(self.rule.sizes) - self.rule.sizes
        return np.add.reduceat(mask, first, dtype=np.int32)


def _labelled(plan: Plan, batch: pa.RecordBatch, own: slice) -> _Group:
    ids = [clip.clip_id for clip in plan.clips[own]]
    bounds = np.array([clip.bounds for clip in plan.clips[own]], np.int64)
    # turns: the file's convention applied where the reader did not place them
    at, spooled = flat_lists(batch.column("turns"))
    owner = np.repeat(np.arange(len(ids)), np.diff(at))
    frames = zip(("start_frame", "end_frame"), labels.NO_FRAMES, strict=True)
    start, end = (spooled.field(name).fill_null(none).to_numpy() for name, none in frames)
    placed = batch.column("convention").is_valid().to_numpy(zero_copy_only=False)[owner]
    as_they_are = placed | (end == labels.NO_FRAMES[1])
    ranges = zip((start, end), labels.canonical(plan.convention, start, end), strict=True)
    turns = labels.Turns(owner, spooled.field("role").to_numpy(), *(np.where(as_they_are, a, b) for a, b in ranges))
    # ranges that nobody annotated, cut to their clips
    at, spooled = flat_lists(batch.column("unlabelled"))
    owner = np.repeat(np.arange(len(ids)), np.diff(at))
    start, end = (np.clip(spooled.field(n).to_numpy(), *bounds[owner].T) for n in ("start_frame", "end_frame"))
    unlabelled = labels.Ranges(*(column[start < end] for column in (owner, start, end)))
    rule = labels.label_rule(
        turns,
        unlabelled,
        starts=bounds[:, 0],
        sizes=bounds[:, 1] - bounds[:, 0],
        seeds=np.array([sampling_seed(plan.options.seed, name) for name in ids], np.uint64),
        rates=np.array([plan.options.rate(plan.split, rate) for rate in batch.column("neg_rate").to_pylist()]),
        steps=np.diff(batch.column("steps").offsets.to_numpy()),
        onset=np.full(len(ids), plan.options.positive == "onset"),
    )
    return _Group(batch, pa.array(ids), turns, unlabelled, rule, labels.epoch_labels(rule, 0))


def _frames_batch(group: _Group, first_clip: int) -> pa.RecordBatch:
    sizes = group.rule.sizes
    clip = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    frame = labels.end_to_end(group.rule.starts, sizes)
    columns = [
        pa.DictionaryArray.from_arrays(pa.array(clip), group.ids),
        clip + np.int32(first_clip),
        frame.astype(np.int32),
        (frame / group.batch.column("fps").to_numpy()[clip]).astype(np.float32),
        *group.labels,
    ]
    return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=FRAMES_WRITTEN)


def _clips_batch(group: _Group, plan: Plan, own: slice) -> pa.RecordBatch:
    batch, rule = group.batch, group.rule
    unlabelled: list[list[Range]] = [[] for _ in rule.sizes]
    for clip, start, end in zip(*(column.tolist() for column in group.unlabelled), strict=True):
        unlabelled[clip].append((start, end))
    columns = {
        **{name: batch.column(name) for name in batch.schema.names if name in CLIPS.names},
        "clip_id": group.ids,
        "clip": np.arange(plan.first_clip + own.start, plan.first_clip + own.stop, dtype=np.int32),
        "start_frame": rule.starts.astype(np.int32),
        "end_frame": (rule.starts + rule.sizes).astype(np.int32),
        "num_frames": rule.sizes.astype(np.int32),
        "initial_state": _initial_states(batch, [clip.state for clip in plan.clips[own]]),
        "turns": _turns_column(batch.column("turns"), group.turns),
        "sampling_seed": rule.seeds,
        "neg_rate": rule.rates,
        "unlabelled": unlabelled,
        "positive": [plan.options.positive] * len(rule.sizes),
        "frame_convention": batch.column("convention").fill_null(plan.convention),
        "n_speaking": group.per_clip(group.labels[SPEAKING] == 1),
        "n_dst_update": group.per_clip(group.labels[DST_UPDATE] == 1),
        "n_supervised": group.per_clip((group.labels != NOT_SAMPLED).any(axis=0)),
    }
    return pa.RecordBatch.from_pydict(columns, CLIPS)


def _initial_states(batch: pa.RecordBatch, replayed: list[Mapping[str, str] | None]) -> pa.Array:
    """Replayed states hold every step of the clip; given ones are as the source has them."""
    column = batch.column("initial_state")
    if not any(state is not None for state in replayed):
        return column
    rows: list[Any] = column.to_pylist()
    for i, (steps, state) in enumerate(zip(batch.column("steps").to_pylist(), replayed, strict=True)):
        if state is not None:
            rows[i] = [{"id": k, "state": v} for k, v in initial_state((step["id"] for step in steps), state).items()]
    return pa.array(rows, column.type)


def _turns_column(spooled: pa.ListArray, turns: labels.Turns) -> pa.ListArray:
    """The turns of the clips with the ranges of their events."""
    type_ = CLIPS.field("turns").type
    at, structs = flat_lists(spooled)
    absent = turns.end == labels.NO_FRAMES[1]
    changed = {
        "role": pa.array(ROLES).take(structs.field("role")),
        "start_frame": pa.array(turns.start.astype(np.int32), mask=absent),
        "end_frame": pa.array(np.minimum(turns.end, 2**31 - 1).astype(np.int32), mask=absent),
    }
    fields = list(type_.value_type)
    children = [changed.get(field.name, structs.field(field.name)) for field in fields]
    struct = pa.StructArray.from_arrays(children, fields=fields)
    return pa.ListArray.from_arrays(pa.array(at), struct, type=type_)


# ---- counts ------------------------------------------------------------------------------------------


def _count(group: _Group, positive: str, counts: Counts) -> None:
    """Add the group's counts: what the report and the hazards are made of."""
    rule, fps = group.rule, group.batch.column("fps").to_numpy()
    ones, known = group.labels == 1, group.labels != NOT_SAMPLED
    annotated = rule.sizes if rule.unlabelled is None else group.per_clip(~rule.unlabelled)  # frames [C]
    first = np.cumsum(rule.sizes) - rule.sizes
    numbers: dict[str, Any] = {
        "clips": len(group.ids),
        "frames": int(rule.sizes.sum()),
        "speaking_clips": int((annotated > 0).sum()),
        "speaking_frames": int(annotated.sum()),
        "dst_update_clips": int((rule.tracked & (annotated > 0)).sum()),
        "dst_update_frames": int(annotated[rule.tracked].sum()),
        "supervised": int(known.any(axis=0).sum()),
        "speaking_supervised": int(known[SPEAKING].sum()),
        "dst_update_supervised": int(known[DST_UPDATE].sum()),
        "speaking_positive": int(ones[SPEAKING].sum()),
        "dst_update_positive": int(ones[DST_UPDATE].sum()),
        "both_positive": int(ones.all(axis=0).sum()),
        "first_frame_positive": int(ones[:, first].any(axis=0).sum()),
        "seconds": float((rule.sizes / fps).sum()),
    }
    counts["counts"].update(numbers)
    counts["neg_rates"].update(rule.rates.tolist())
    for head, own in zip(HEADS, ones, strict=True):
        frames = np.flatnonzero(own)
        clip = np.searchsorted(first, frames, side="right") - 1
        quiet = np.diff(frames) - 1
        between = (quiet > 0) & (np.diff(clip) == 0)
        seconds = np.round(quiet[between] / fps[clip[1:][between]], 3)
        counts[head].update(dict(zip(*(a.tolist() for a in np.unique(seconds, return_counts=True)), strict=True)))
    events = np.isin(group.turns.role, [ROLES.index(role) for role in ROLE_OF.values()])
    owner, _, start, end = (column[events] for column in group.turns)
    low, high = rule.starts[owner], (rule.starts + rule.sizes)[owner]
    reasons = labels.drops(start, end, low, high, positive)
    summaries = int(group.batch.column("summaries").to_numpy().sum())  # assistant turns without frames, not speech
    for code, reason in enumerate(labels.DROP_REASONS):
        counts["drops"][reason] += int((reasons == code).sum()) - (summaries if code == 0 else 0)
    counts["drops"]["summary, not speech"] += summaries
    cut_off = (reasons == -1) & ((start < low) | (end > high))
    counts["counts"].update(event_turns=len(reasons), turns_cut=int(cut_off.sum()))
