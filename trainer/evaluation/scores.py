"""The scores Parquet: one row per frame of a split, from any model and program, in any order.

Every frame of every clip must be there once, and labels, where the file has them, must be those of the shards.

    F frames of a clip    N frames of all clips of a split, clips by clip_id
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.special import logit as logit_of

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from pipeline.schema import HEADS, NOT_SAMPLED
from pipeline.storage import replacing

INFO: Final = b"prospect-dst"  # the key of the file's metadata that holds `info`, as JSON
ROW_GROUP: Final = 1 << 20
LARGEST: Final = 1e30  # infinite logits become this, so that differences stay finite in float32

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Updates = tuple[tuple[str, str], ...]  # (step id, transition)


@dataclass(frozen=True, eq=False)
class ScoredClip:
    """One clip with a model's scores. `said` and `updates` are a free-running model's, and its events."""

    clip: ClipExample  # labels int8 [2, F], every frame supervised (rate 1.0)
    logits: dict[str, Singles]  # by head [F]; a head that the model lacks is absent
    probabilities: dict[str, Singles]  # by head [F], corrected for sampling; absent where unknown
    said: list[str | None] | None = None  # per frame the text spoken after it, None: silent
    updates: list[Updates | None] | None = None  # per frame the state update written after it, None: no update


_UPDATES: Final = pa.list_(pa.struct([pa.field("id", pa.string()), pa.field("transition", pa.string())]))
_COLUMNS: Final = (  # name, type, nullable, description
    ("split", pa.string(), False, "train, val, test, ..."),
    ("clip_id", pa.string(), False, "the clip, as in the shards"),
    ("recording_id", pa.string(), False, "one real-world take; resample by this"),
    ("frame", pa.int32(), False, "absolute frame number in the video, from 0"),
    ("time_s", pa.float32(), False, "frame / fps, seconds from the video's start"),
    ("speaking_logit", pa.float32(), True, "higher: rather speak; null: no such head"),
    ("dst_update_logit", pa.float32(), True, "higher: rather update the state; null: no such head"),
    ("speaking_probability", pa.float32(), True, "corrected for sampling; null: unknown"),
    ("dst_update_probability", pa.float32(), True, "corrected for sampling; null: unknown"),
    ("speaking_label", pa.int8(), False, "1 the assistant speaks here, 0 silence, -100 says nothing"),
    ("dst_update_label", pa.int8(), False, "1 the state changes here, 0 it does not, -100 says nothing"),
    ("said", pa.string(), True, "what the assistant said at this frame; null: silent"),
    ("updates", _UPDATES, True, "the state update made at this frame; null: none; empty: one that says nothing"),
)

_READ: Final = {name for name, *_ in _COLUMNS} - {"recording_id", "time_s"} | {"clip"}


def write_scores(path: Path, splits: Mapping[str, Sequence[ScoredClip]], info: dict[str, Any]) -> None:
    """One row per frame, by (split, clip as given, frame); renamed into place when complete. `info` is any JSON. `said`
    and `updates` are columns where the clips have them: all of them, or none."""
    clips = [(split, scored) for split in sorted(splits) for scored in splits[split]]
    optional = {name for name in ("said", "updates") if all(getattr(scored, name) is None for _, scored in clips)}
    schema = pa.schema(
        pa.field(name, type_, nullable=nullable, metadata={"doc": doc})
        for name, type_, nullable, doc in _COLUMNS
        if name not in optional
    )
    tables = [schema.empty_table()]
    for split, scored in clips:
        clip, n = scored.clip, scored.clip.num_frames
        frames = np.arange(clip.start_frame, clip.end_frame, dtype=np.int32)
        columns: dict[str, Any] = {
            "split": pa.repeat(split, n),
            "clip_id": pa.repeat(clip.clip_id, n),
            "recording_id": pa.repeat(clip.recording_id, n),
            "frame": frames,
            "time_s": (frames / clip.fps).astype(np.float32),
            "said": scored.said,
            "updates": scored.updates,
        }
        for row, head in enumerate(HEADS):
            columns[f"{head}_logit"] = scored.logits.get(head, pa.nulls(n, pa.float32()))
            columns[f"{head}_probability"] = scored.probabilities.get(head, pa.nulls(n, pa.float32()))
            columns[f"{head}_label"] = clip.labels[row]
        tables.append(pa.table({name: columns[name] for name in schema.names}, schema=schema))
    metadata = {INFO: json.dumps(info, sort_keys=True, allow_nan=False)}
    table = pa.concat_tables(tables).replace_schema_metadata(metadata).combine_chunks()
    with replacing(path) as new:
        pq.write_table(table, new, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True)


# ---- reading -----------------------------------------------------------------------------------------


def read_info(path: Path) -> dict[str, Any]:
    """The `info` given to `write_scores`; {} for other programs' files. InputError where it is no Parquet file."""
    try:
        return dict(json.loads((pq.read_metadata(path).metadata or {}).get(INFO, b"{}")))
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}); expected per-frame scores") from None


def read_scores(path: Path, splits: Mapping[str, Split], optional: Collection[str] = ()) -> dict[str, list[ScoredClip]]:
    """Each split's clips, by clip_id, with their scores from a file of any program.

    Needed: `clip_id` (or `clip`, the clip's position in its split), `frame`, and `speaking_logit` or
    `speaking_probability`; `split` too where several are asked for. Infinite logits become +-LARGEST. From
    probabilities alone, logits are log(p / (1 - p)). `optional` splits are left out where the file has no rows of them.

    Raises InputError, naming the first, where a frame is missing, double or unknown, a score NaN, or a label not the
    shards'.
    """
    names = pq.read_schema(path).names
    key = "clip" if "clip" in names and "clip_id" not in names else "clip_id"
    needed = {key, "frame", *(["split"] if len(set(splits) - set(optional)) > 1 else [])}
    if needed - {*names} or not {"speaking_logit", "speaking_probability"} & {*names}:
        expected = f"{', '.join(sorted(needed))}, and speaking_logit or speaking_probability"
        raise InputError(f"{path}: its columns are {', '.join(names)}; expected {expected}")
    texts = [name for name in ("clip_id", "split") if name in names]
    try:
        with pq.ParquetFile(path, read_dictionary=texts, page_checksum_verification=True) as file:
            table = file.read([name for name in names if name in _READ])
        for name, type_ in (("said", pa.string()), ("updates", _UPDATES)):  # DataFusion and polars have string views
            if name in names:
                table = table.set_column(table.column_names.index(name), name, table[name].cast(type_))
        of_split = table["split"].cast(pa.string()) if "split" in names else None
        present = set(splits) - set(optional) if of_split is None else {*pc.unique(of_split).to_pylist()} - {None}
        if lacking := set(splits) - set(optional) - present:
            available = ", ".join(sorted(present)) or "none"
            raise InputError(f"{path}: no rows of split {min(lacking)}, found: {available}; score it, or rename it")
        scored = {}
        for name in (name for name in splits if name in present):
            whole = of_split is None or (len(present) == 1 and not of_split.null_count)
            rows = table if whole else table.filter(pc.equal(of_split, name))
            scored[name] = _read_split(f"{path} split {name}", rows, splits[name])
    except pa.ArrowException as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}; expected columns of numbers, and ids") from None
    table = of_split = rows = None
    pa.default_memory_pool().release_unused()  # a third of a large evaluation's memory
    return scored


def _read_split(where: str, rows: pa.Table, split: Split) -> list[ScoredClip]:
    clips = sorted(split.in_order(), key=lambda clip: clip.clip_id)
    first = np.cumsum([0, *(clip.num_frames for clip in clips)])  # [C + 1] where each clip's frames begin

    def refuse(bad: Any, problem: str) -> None:
        """InputError, naming the first, if some of the N frames are `bad`."""
        if bad.any():
            at = int(bad.argmax())
            i = int(np.searchsorted(first, at, side="right")) - 1
            name = f"clip {clips[i].clip_id} frame {clips[i].start_frame + at - first[i]}"
            raise InputError(f"{where}: {bad.sum()} frames {problem}; the first is {name}")

    key = "clip_id" if "clip_id" in rows.column_names else "clip"
    ids = rows[key].combine_chunks()
    ids = ids if pa.types.is_dictionary(ids.type) else ids.dictionary_encode()
    places = {getattr(clip, key): i for i, clip in enumerate(clips)}
    place_of = np.array([*(places.get(value, -1) for value in ids.dictionary.to_pylist()), -1])  # the last: of a null
    place = place_of[ids.indices.cast(pa.int64()).fill_null(-1).to_numpy()]
    start, end = (np.array([getattr(clip, name) for clip in clips]) for name in ("start_frame", "end_frame"))
    frame = rows["frame"].cast(pa.int64()).fill_null(-1).to_numpy()
    unknown = (place < 0) | (frame < start[place]) | (frame >= end[place])
    if unknown.any():
        i = int(unknown.argmax())
        first_one = f"the first is clip {ids[i]} frame {frame[i]} (frames are absolute, as in the shards)"
        raise InputError(f"{where}: {unknown.sum()} rows are of frames that the shards lack; {first_one}")
    position = first[place] - start[place] + frame  # of each row among the N frames
    times = np.bincount(position, minlength=int(first[-1]))
    refuse(times == 0, "have no row")
    refuse(times > 1, "have more than one row")
    if (np.diff(position) < 0).any():
        rows = rows.take(np.argsort(position))
    for head, expected in zip(HEADS, np.concatenate([clip.labels for clip in clips], axis=1), strict=True):
        if (name := f"{head}_label") in rows.column_names:
            label = rows[name].cast(pa.int64()).fill_null(NOT_SAMPLED).to_numpy()
            differ = (label >= 0) & (expected >= 0) & (label != expected)
            refuse(differ, f"have another {name} in the shards")
    logits, probabilities = {}, {}
    for head in HEADS:
        logit, p = (_numbers(rows, f"{head}_{kind}", refuse) for kind in ("logit", "probability"))
        if p is not None:
            refuse((p < 0) | (p > 1), f"have a {head}_probability beyond 0 to 1: are these logits?")
            probabilities[head] = p.astype(np.float32)
        if logit is not None or p is not None:
            logits[head] = np.clip(logit_of(p) if logit is None else logit, -LARGEST, LARGEST).astype(np.float32)
    said = rows["said"].to_pylist() if "said" in rows.column_names else None
    updates: list[Any] | None = rows["updates"].to_pylist() if "updates" in rows.column_names else None
    if updates is not None:
        updates = [None if one is None else tuple((u["id"], u["transition"]) for u in one) for one in updates]
    return [
        ScoredClip(
            clip,
            logits={head: values[a:b] for head, values in logits.items()},
            probabilities={head: values[a:b] for head, values in probabilities.items()},
            said=None if said is None else said[a:b],
            updates=None if updates is None else updates[a:b],
        )
        for clip, a, b in zip(clips, first[:-1].tolist(), first[1:].tolist(), strict=True)
    ]


def _numbers(rows: pa.Table, name: str, refuse: Callable[[Any, str], None]) -> Any:
    """[N] floats as they are, else float64; None where there are none."""
    if name not in rows.column_names or rows[name].null_count == len(rows):
        return None
    values = rows[name] if pa.types.is_floating(rows[name].type) else rows[name].cast(pa.float64())
    refuse(np.isnan(values.to_numpy()), f"have no {name}")  # null becomes NaN
    return values.to_numpy()
