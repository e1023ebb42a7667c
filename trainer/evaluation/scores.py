"""The scores Parquet: one row per frame of a split, from any model. Any program may write it; ours does.

Rows may stand in any order: `read_scores` places each by clip and frame. Every frame of every clip must be there once,
and labels, where the shards have them, too, must be equal.

    F frames of a clip    N frames of all clips of a split, clips by clip_id
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
SAME_ORDER: Final = 1e-6  # a probability may fall by this much as its logit rises: float32 rounding
LARGEST: Final = 1e30  # infinite logits become this, so that differences stay finite in float32

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Updates = tuple[tuple[str, str], ...]  # (step id, transition)


@dataclass(frozen=True, eq=False)
class ScoredClip:
    """One clip with a model's scores at each of its F frames.

    A clip with `said` (or `updates`) is from a free-running model, and those are its events. Otherwise events come from
    thresholding the logits.
    """

    clip: ClipExample  # labels int8 [2, F], every frame supervised (rate 1.0)
    logits: dict[str, Singles]  # by head [F]; a head that the model lacks is absent
    probabilities: dict[str, Singles]  # by head [F], corrected for sampling; absent where unknown
    said: list[str | None] | None = None  # per frame the text spoken after it, None: silent
    updates: list[Updates | None] | None = None  # per frame the state update written after it, None: no update


def canonical(clips: Iterable[ScoredClip]) -> list[ScoredClip]:
    """The clips by clip_id: sums in this order do not depend on the order given."""
    return sorted(clips, key=lambda scored: scored.clip.clip_id)


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


def write_scores(path: Path, splits: Mapping[str, Sequence[ScoredClip]], info: dict[str, Any]) -> None:
    """One row per frame, by (split, clip as given, frame); renamed into place when complete. `info` is any JSON.

    `said` and `updates` are columns where the clips have them: all of them, or none.
    """
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

_READ_AS: Final = (
    {"split": pa.string(), "clip_id": pa.string(), "clip": pa.int64(), "frame": pa.int64()}
    | {f"{head}_{kind}": pa.float64() for head in HEADS for kind in ("logit", "probability")}
    | {f"{head}_label": pa.int64() for head in HEADS}
    | {"said": pa.string(), "updates": _UPDATES}
)
_Refuse = Callable[..., None]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns an error of the file as such into an InputError."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else f"not a readable Parquet file ({error})"
        raise InputError(f"{path}: {' '.join(reason.split())}; expected per-frame scores as Parquet") from None


def read_info(path: Path) -> dict[str, Any]:
    """The `info` given to `write_scores`; {} for other programs' files. InputError where it is no Parquet file."""
    with _readable(path), pq.ParquetFile(path) as file:
        return dict(json.loads((file.metadata.metadata or {}).get(INFO, b"{}")))


def read_scores(path: Path, splits: Mapping[str, Split], optional: Collection[str] = ()) -> dict[str, list[ScoredClip]]:
    """Each split's clips, by clip_id, with their scores from a file of any program.

    Needed: `clip_id` (or `clip`, the clip's position in its split), `frame`, and `speaking_logit` or
    `speaking_probability`; `split` too where several are asked for. Other columns are ignored. Infinite logits become
    +-LARGEST. From probabilities alone, logits are log(p / (1 - p)). `optional` splits are left out where the file has
    no rows of them.

    Raises InputError where a frame is missing, double or unknown, a score NaN, a label not the shards', or where
    logits and probabilities contradict each other.
    """
    table = _read_table(path, needs_split=len(set(splits) - set(optional)) > 1)
    of_split = table["split"].cast(pa.string()) if "split" in table.column_names else None
    found = None if of_split is None else sorted({*pc.unique(of_split).to_pylist()} - {None})
    scored = {}
    for name, split in splits.items():
        if name in optional and name not in (found or ()):
            continue
        if of_split is not None and name not in (found or ()):
            there = ", ".join(found or ()) or "none"
            raise InputError(f"{path}: no rows of split {name!r}, found: {there}; score that split, or rename it")
        whole = of_split is None or (found == [name] and not of_split.null_count)
        rows = table if whole else table.filter(pc.equal(of_split, name))
        scored[name] = _read_split(f"{path} split {name}", rows, split)
    table = of_split = rows = None
    pa.default_memory_pool().release_unused()  # a third of a large evaluation's memory
    return scored


def _read_table(path: Path, needs_split: bool) -> pa.Table:
    """The columns of `_READ_AS` that the file has, in those types or smaller ones, ids as a dictionary."""
    with _readable(path):
        schema = pq.read_schema(path)
        names = schema.names
    unused = "clip" if "clip_id" in names else "clip_id"
    needed = {"clip_id", "clip", "frame", "split"} - {unused} - (set() if needs_split else {"split"})
    missing = sorted(needed - set(names))
    if not {"speaking_logit", "speaking_probability"} & set(names):
        missing.append("speaking_logit (or speaking_probability)")
    if missing:
        found = ", ".join(names)
        raise InputError(f"{path}: no column {', '.join(missing)}, found {found}; rename or add it and run again")
    texts = [name for name in ("split", "clip_id") if name in names and pa.types.is_string(schema.field(name).type)]
    with _readable(path), pq.ParquetFile(path, read_dictionary=texts, page_checksum_verification=True) as file:
        table = file.read([name for name in _READ_AS if name in names and name != unused])
    small = (pa.int8(), pa.int16(), pa.int32())
    for at, (name, type_) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        floats = pa.types.is_floating(type_) and pa.types.is_floating(_READ_AS[name])
        if floats or pa.types.is_dictionary(type_) or (type_ in small and _READ_AS[name] == pa.int64()):
            continue  # as it is, which takes less memory
        try:
            table = table.set_column(at, name, table[name].cast(_READ_AS[name]))
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: {name} is {type_}, expected {_READ_AS[name]} ({reason}); convert it") from None
    return table


def _read_split(where: str, rows: pa.Table, split: Split) -> list[ScoredClip]:
    clips = sorted(split.in_order(), key=lambda clip: clip.clip_id)
    first = np.cumsum([0, *(clip.num_frames for clip in clips)])  # [C + 1] where each clip's frames begin

    def refuse(bad: Any, message: str, **values: Any) -> None:
        """InputError if some of the N frames are `bad`. `message` is a template of the first one's name and values,
        and of their number."""
        if bad.any():
            at = int(bad.argmax())
            i = int(np.searchsorted(first, at, side="right")) - 1
            name = f"clip {clips[i].clip_id} frame {clips[i].start_frame + at - first[i]}"
            text = message.format(frame=name, count=int(bad.sum()), **{key: value[at] for key, value in values.items()})
            raise InputError(f"{where}: {text}")

    rows = _place(where, rows, clips, first, refuse)
    for head, expected in zip(HEADS, np.concatenate([clip.labels for clip in clips], axis=1), strict=True):
        if (name := f"{head}_label") in rows.column_names:
            label = rows[name].fill_null(NOT_SAMPLED).to_numpy()
            bad = (label >= 0) & (expected >= 0) & (label != expected)
            message = f"{{frame}}: {name} is {{value}}, the shards say {{expected}} ({{count}} frames differ); "
            refuse(bad, message + "score these shards, with frames in their order", value=label, expected=expected)
    scores = {head: found for head in HEADS if (found := _scores(rows, head, refuse)) is not None}
    if "speaking" not in scores:
        raise InputError(f"{where}: the speaking scores are null throughout, expected one at every frame")
    said = rows["said"].to_pylist() if "said" in rows.column_names else None
    updates: list[Any] | None = rows["updates"].to_pylist() if "updates" in rows.column_names else None
    if updates is not None:
        updates = [None if one is None else tuple((u["id"], u["transition"]) for u in one) for one in updates]
    return [
        ScoredClip(
            clip,
            logits={head: logit[a:b] for head, (logit, _) in scores.items()},
            probabilities={head: p[a:b] for head, (_, p) in scores.items() if p is not None},
            said=None if said is None else said[a:b],
            updates=None if updates is None else updates[a:b],
        )
        for clip, a, b in zip(clips, first[:-1].tolist(), first[1:].tolist(), strict=True)
    ]


def _place(where: str, rows: pa.Table, clips: Sequence[ClipExample], first: Ints, refuse: _Refuse) -> pa.Table:
    """The rows in the order of clips and frames, N of them. InputError unless each frame is there once."""
    key = "clip_id" if "clip_id" in rows.column_names else "clip"
    ids = rows[key].combine_chunks()
    ids = ids if pa.types.is_dictionary(ids.type) else ids.dictionary_encode()
    places = {getattr(clip, key): i for i, clip in enumerate(clips)}
    place_of = np.array([*(places.get(value, -1) for value in ids.dictionary.to_pylist()), -1])  # the last: of a null
    place = place_of[ids.indices.cast(pa.int64()).fill_null(-1).to_numpy()]
    if (unknown := place < 0).any():
        name = f"the first is clip {ids[int(unknown.argmax())]}; score the clips of this split"
        raise InputError(f"{where}: {unknown.sum()} rows are of clips that the shards lack, {name}")
    start, end = (np.array([getattr(clip, name) for clip in clips]) for name in ("start_frame", "end_frame"))
    frame = rows["frame"].fill_null(-1).to_numpy()
    if (stray := (frame < start[place]) | (frame >= end[place])).any():
        i, (at, clip) = int(stray.argmax()), (frame[stray][0], clips[place[stray][0]])
        name = f"the first is clip {ids[i]} frame {at}, expected {clip.start_frame} to {clip.end_frame - 1}"
        raise InputError(f"{where}: {stray.sum()} rows are of no frame of their clip, {name}; "
                         "frames are absolute, as in the shards")  # fmt: skip
    position = first[place] - start[place] + frame
    times = np.bincount(position, minlength=int(first[-1]))
    once = "the first is {frame}; expected one row for each frame of the split"
    if (times > 1).any():
        refuse(times > 1, f"{len(rows) - (times > 0).sum()} rows are of a frame that has one already, {once}")
    refuse(times == 0, "{count} frames have no row, " + once)
    return rows if (np.diff(position) > 0).all() else rows.take(np.argsort(position))


def _scores(rows: pa.Table, head: str, refuse: _Refuse) -> tuple[Singles, Singles | None] | None:
    """(logits [N], probabilities [N] or None) of one head; None where it has no scores."""
    logit, p = f"{head}_logit", f"{head}_probability"
    names = [name for name in (logit, p) if name in rows.column_names and rows[name].null_count < len(rows)]
    given = {name: rows[name].to_numpy() for name in names}  # null becomes NaN
    for name, values in given.items():
        message = f"{{frame}}: {name} is NaN or null ({{count}} such frames), expected a number at every frame; "
        refuse(np.isnan(values), message + "score them, or drop the column")
    if p in given:
        message = f"{{frame}}: {p} is {{value:g}}, expected 0 to 1; if these are logits, name the column {logit}"
        refuse((given[p] < 0) | (given[p] > 1), message, value=given[p])
    if len(given) == 2:
        order = np.lexsort((given[p], given[logit]))
        highest = np.empty_like(given[p])
        highest[order] = np.maximum.accumulate(given[p][order])
        message = f"{logit} and {p} order the frames differently ({{frame}} has {{value:g}}, a frame of a lower logit "
        message += f"{{highest:g}}); drop the column {p}, or {logit} if the probability is what you mean"
        refuse(highest - given[p] > SAME_ORDER, message, value=given[p], highest=highest)
    if not given:
        return None
    logits = given[logit] if logit in given else logit_of(given[p])
    single = np.clip(logits, -LARGEST, LARGEST).astype(np.float32)
    return single, given[p].astype(np.float32) if p in given else None
