"""Pass 2: one spooled part -> per-frame labels, its `frames` and `clips` shards, and the counts for the report.

A pure function of its Plan: no other part, clock or worker can change a byte. A group of at most 256 clips is one
row group in both tables. Costs some 100 us a clip, half of it in the Parquet encoders.

    K clips of a part, C clips of a group, T turns, F frames of the group
"""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import labels
from pipeline.dataset import flat_lists
from pipeline.extract import cut
from pipeline.options import Options
from pipeline.readers.clip import Clip, Range
from pipeline.schema import CLIPS, FRAMES, HEADS, NOT_SAMPLED, ROLE_OF, ROLES, sampling_seed, shard_path
from pipeline.state import initial_state
from pipeline.storage import sha256

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
    clips: list[Clip]


Counts = defaultdict[str, Counter[Any]]  # "counts", "drops" (by reason), and for each head its gaps (by seconds)
Written = tuple[str, list[dict[str, Any]], Counts]  # a part's split, its shards' manifest entries, its counts


def write_part(plan: Plan) -> Written:
    """Label and write one part: beside the spool, then renamed, so that two tries of it on a cluster do not meet."""
    new = {table: Path(f"{plan.spool}.{secrets.token_hex(4)}.{table}") for table in ("frames", "clips")}
    counts: Counts = defaultdict(Counter)
    first = done = 0  # rows of the spool, clips of the plan before the batch
    writers = _parquet_writer(new["frames"], "frames"), _parquet_writer(new["clips"], "clips")
    with pa.memory_map(plan.spool) as source, writers[0] as frames, writers[1] as clips:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            kept = plan.rows[done:][plan.rows[done:] < first + batch.num_rows] - first
            first += batch.num_rows
            if len(kept) < batch.num_rows:
                batch = batch.take(pa.array(kept))
            infos = plan.clips[done : done + len(kept)]
            for begin, end in cut([info.bounds[1] - info.bounds[0] for info in infos], len(infos), GROUP_FRAMES):
                group = _labelled(plan, batch.slice(begin, end - begin), infos[begin:end])
                rows, clip_rows = _batches(group, plan, plan.first_clip + done + begin)
                frames.write_batch(rows, max(1, rows.num_rows))
                clips.write_batch(clip_rows, clip_rows.num_rows)
                _count(group, plan.options.positive, counts)
            done += len(kept)
    entries = []
    for table, file in new.items():
        name, rows = shard_path(table, plan.split, plan.part), counts["counts"][table]
        entry = {"path": name, "table": table, "split": plan.split, "part": plan.part, "rows": rows}
        entry |= {"clips": counts["counts"]["clips"], "bytes": file.stat().st_size, "sha256": sha256(file)}
        file.rename(Path(plan.staging) / name)
        entries.append(entry)
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


# Ids of frames are written from a dictionary. Encodings are chosen, not defaulted: 17 million frames take 8 MB
# instead of 116, in half the time.
FRAMES_WRITTEN: Final = FRAMES.set(0, pa.field("clip_id", pa.dictionary(pa.int32(), pa.string()), nullable=False))
_FRAMES_OPTIONS: dict[str, Any] = {
    "use_dictionary": ["clip_id", "clip", "speaking_label", "dst_update_label"],
    "column_encoding": {"frame": "DELTA_BINARY_PACKED", "time_s": "BYTE_STREAM_SPLIT"},
    "write_statistics": ["clip", "frame", "time_s"],  # those of ids and labels let no reader skip anything
}
# Text never repeats: looking for a dictionary, and keeping its longest value as statistics, only costs.
_REPEAT = ("dataset", "positive", "frame_convention", "goal", "knowledge", "role", "transition", "id", "name")


def _leaves(fields: Iterable[pa.Field], above: str = "") -> Iterator[str]:
    """Parquet paths of the leaf columns, e.g. turns.list.element.role."""
    for field in fields:
        if pa.types.is_list(field.type):
            yield from _leaves(field.type.value_type, f"{above}{field.name}.list.element.")
        else:
            yield above + field.name


_CLIPS_OPTIONS: dict[str, Any] = {
    "use_dictionary": [leaf for leaf in _leaves(CLIPS) if leaf.rpartition(".")[2] in _REPEAT],
    "write_statistics": [leaf for leaf in _leaves(CLIPS) if leaf not in ("turns.list.element.text", "knowledge")],
}


@contextlib.contextmanager
def _parquet_writer(path: Path, table: str) -> Iterator[pq.ParquetWriter]:
    """Write one shard of `frames` (batches of FRAMES_WRITTEN) or `clips` (of CLIPS).

    The Arrow schema that readers restore is put there by hand: it says plain string of ids that were a dictionary.
    """
    frames = table == "frames"
    written, options = (FRAMES_WRITTEN, _FRAMES_OPTIONS) if frames else (CLIPS, _CLIPS_OPTIONS)
    writer = pq.ParquetWriter(path, written, compression="zstd", compression_level=1, store_schema=False, **options)
    try:
        yield writer
        schema = base64.b64encode((FRAMES if frames else CLIPS).serialize().to_pybytes()).decode()
        writer.add_key_value_metadata({"ARROW:schema": schema})
        writer.close()
    finally:
        writer.is_open = False  # after a failure: the file stays as it is, unfinished


class _Group(NamedTuple):
    """A row group: its clips' turns and labels as flat arrays, end to end."""

    batch: pa.RecordBatch  # as spooled
    clips: list[Clip]
    turns: labels.Turns
    unlabelled: labels.Ranges
    rule: labels.LabelRule
    labels: np.ndarray  # int8 [2, F]

    def per_clip(self, mask: np.ndarray) -> np.ndarray:
        """int32 [C]: each clip's frames where `mask` [F] is true."""
        return np.add.reduceat(mask, np.cumsum(self.rule.sizes) - self.rule.sizes, dtype=np.int32)


def _labelled(plan: Plan, batch: pa.RecordBatch, clips: list[Clip]) -> _Group:
    bounds = np.array([clip.bounds for clip in clips], np.int64)
    # turns: the file's convention applied where the reader did not place them
    at, spooled = flat_lists(batch.column("turns"))
    owner = np.repeat(np.arange(len(clips)), np.diff(at))
    frames = zip(("start_frame", "end_frame"), labels.NO_FRAMES, strict=True)
    start, end = (spooled.field(name).fill_null(none).to_numpy() for name, none in frames)
    placed = batch.column("convention").is_valid().to_numpy(zero_copy_only=False)[owner]
    as_they_are = placed | (end == labels.NO_FRAMES[1])
    ranges = zip((start, end), labels.canonical(plan.convention, start, end), strict=True)
    turns = labels.Turns(owner, spooled.field("role").to_numpy(), *(np.where(as_they_are, a, b) for a, b in ranges))
    # ranges that nobody annotated, cut to their clips
    at, spooled = flat_lists(batch.column("unlabelled"))
    owner = np.repeat(np.arange(len(clips)), np.diff(at))
    start, end = (np.clip(spooled.field(n).to_numpy(), *bounds[owner].T) for n in ("start_frame", "end_frame"))
    unlabelled = labels.Ranges(*(column[start < end] for column in (owner, start, end)))
    rule = labels.label_rule(
        turns,
        unlabelled,
        starts=bounds[:, 0],
        sizes=bounds[:, 1] - bounds[:, 0],
        seeds=np.array([sampling_seed(plan.options.seed, clip.clip_id) for clip in clips], np.uint64),
        rates=np.array([plan.options.rate(plan.split, rate) for rate in batch.column("neg_rate").to_pylist()]),
        steps=np.diff(batch.column("steps").offsets.to_numpy()),
        onset=np.full(len(clips), plan.options.positive == "onset"),
    )
    return _Group(batch, clips, turns, unlabelled, rule, labels.epoch_labels(rule, 0))


def _batches(group: _Group, plan: Plan, first: int) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """The rows of `frames` and of `clips`; first: number of the group's first clip in its split."""
    batch, rule, sizes = group.batch, group.rule, group.rule.sizes
    ids = pa.array([clip.clip_id for clip in group.clips])
    clip, frame = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes), labels.end_to_end(rule.starts, sizes)
    seconds = (frame / batch.column("fps").to_numpy()[clip]).astype(np.float32)
    by_id = pa.DictionaryArray.from_arrays(pa.array(clip), ids)
    rows = [by_id, *map(pa.array, (clip + np.int32(first), frame.astype(np.int32), seconds, *group.labels))]
    at, steps = flat_lists(batch.column("steps"))
    names = steps.field("id").to_pylist()
    states = [  # as the source has them; replayed ones hold every step of the clip
        one.initial_state or {} if one.state is None else initial_state(names[begin:stop], one.state)
        for one, (begin, stop) in zip(group.clips, pairwise(at.tolist()), strict=True)
    ]
    unlabelled: list[list[Range]] = [[] for _ in sizes]
    for owner, *bounds in zip(*(column.tolist() for column in group.unlabelled), strict=True):
        unlabelled[owner].append(tuple(bounds))
    at, turns = flat_lists(batch.column("turns"))
    absent = group.turns.end == labels.NO_FRAMES[1]
    changed = {
        "role": pa.array(ROLES).take(turns.field("role")),
        "start_frame": pa.array(group.turns.start.astype(np.int32), mask=absent),
        "end_frame": pa.array(np.minimum(group.turns.end, 2**31 - 1).astype(np.int32), mask=absent),
    }
    type_ = CLIPS.field("turns").type
    fields = list(type_.value_type)
    turns = pa.StructArray.from_arrays([changed.get(f.name, turns.field(f.name)) for f in fields], fields=fields)
    columns = {name: batch.column(name) for name in batch.schema.names if name in CLIPS.names} | {
        "clip_id": ids,
        "clip": np.arange(first, first + len(sizes), dtype=np.int32),
        "start_frame": rule.starts.astype(np.int32),
        "end_frame": (rule.starts + sizes).astype(np.int32),
        "num_frames": sizes.astype(np.int32),
        "initial_state": [list(state.items()) for state in states],
        "turns": pa.ListArray.from_arrays(pa.array(at), turns, type=type_),
        "sampling_seed": rule.seeds,
        "neg_rate": rule.rates,
        "unlabelled": unlabelled,
        "positive": [plan.options.positive] * len(sizes),
        "frame_convention": batch.column("convention").fill_null(plan.convention),
        **{f"n_{head}": group.per_clip(own == 1) for head, own in zip(HEADS, group.labels, strict=True)},
        "n_supervised": group.per_clip((group.labels != NOT_SAMPLED).any(axis=0)),
    }
    return pa.RecordBatch.from_arrays(rows, schema=FRAMES_WRITTEN), pa.RecordBatch.from_pydict(columns, CLIPS)


def _count(group: _Group, positive: str, counts: Counts) -> None:
    """Add the group's counts: what the report and the hazards are made of."""
    rule, fps = group.rule, group.batch.column("fps").to_numpy()
    ones, known = group.labels == 1, group.labels != NOT_SAMPLED
    annotated = rule.sizes if rule.unlabelled is None else group.per_clip(~rule.unlabelled)  # frames [C]
    first = np.cumsum(rule.sizes) - rule.sizes
    counts["neg_rates"].update(rule.rates.tolist())
    for head, own, supervised, labelled in zip(HEADS, ones, known, (annotated > 0, rule.tracked), strict=True):
        counts["counts"][f"{head}_clips"] += int((labelled & (annotated > 0)).sum())
        counts["counts"][f"{head}_frames"] += int(annotated[labelled].sum())
        counts["counts"][f"{head}_supervised"] += int(supervised.sum())
        counts["counts"][f"{head}_positive"] += int(own.sum())
        frames = np.flatnonzero(own)
        clip = np.searchsorted(first, frames, side="right") - 1
        quiet = np.diff(frames) - 1
        between = (quiet > 0) & (np.diff(clip) == 0)
        counts[head].update(np.round(quiet[between] / fps[clip[1:][between]], 3).tolist())
    events = np.isin(group.turns.role, [ROLES.index(role) for role in ROLE_OF.values()])
    owner, _, start, end = (column[events] for column in group.turns)
    low, high = rule.starts[owner], (rule.starts + rule.sizes)[owner]
    reasons = labels.drops(start, end, low, high, positive)
    for code, reason in enumerate(labels.DROP_REASONS):
        counts["drops"][reason] += int((reasons == code).sum())
    summaries = int(group.batch.column("summaries").to_numpy().sum())  # assistant turns without frames, not speech
    counts["drops"][labels.DROP_REASONS[0]] -= summaries
    counts["drops"]["summary, not speech"] += summaries
    counts["counts"].update(  # type: ignore[call-overload]
        clips=len(group.clips),
        frames=int(rule.sizes.sum()),
        supervised=int(known.any(axis=0).sum()),
        both_positive=int(ones.all(axis=0).sum()),
        first_frame_positive=int(ones[:, first].any(axis=0).sum()),
        seconds=float((rule.sizes / fps).sum()),
        event_turns=len(reasons),
        turns_cut=int(((reasons == -1) & ((start < low) | (end > high))).sum()),
    )
