"""Reads the scores Parquet of any program, and joins it to the shards' clips.

Rows may stand in any order: each is placed by clip and frame. Every frame of every clip must be there once, and labels,
where both sides have them, must be equal.

    F frames of a clip    N frames of all clips of a split, clips by clip_id
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import logit as logit_of

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from pipeline.schema import HEADS
from trainer.evaluation.scores import INFO, UPDATES_TYPE, Ints, ScoredClip, Singles

SAME_ORDER: Final = 1e-6  # a probability may fall by this much as its logit rises: float32 rounding
LARGEST: Final = 1e30  # infinite logits become this, so that differences stay finite in float32

_READ_AS: Final = (
    {"split": pa.string(), "clip_id": pa.string(), "clip": pa.int64(), "frame": pa.int64()}
    | {f"{head}_{kind}": pa.float64() for head in HEADS for kind in ("logit", "probability")}
    | {f"{head}_label": pa.int64() for head in HEADS}
    | {"said": pa.string(), "updates": UPDATES_TYPE}
)
_SMALL: Final = (pa.int8(), pa.int16(), pa.int32())


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
    found = sorted(table["split"].unique().drop_nulls().cast(pl.String)) if "split" in table.columns else None
    scored = {}
    for name, split in splits.items():
        if name in optional and name not in (found or ()):
            continue
        whole = found is None or (found == [name] and not table["split"].null_count())
        rows = table if whole else table.filter(pl.col("split") == name)
        if found is not None and rows.is_empty():
            there = ", ".join(found or ()) or "none"
            raise InputError(f"{path}: no rows of split {name!r}, found: {there}; score that split, or rename it")
        scored[name] = _read_split(f"{path} split {name}", rows, split)
    return scored


def _read_table(path: Path, needs_split: bool) -> pl.DataFrame:
    """The columns of `_READ_AS` that the file has, in those types."""
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
    for at, (name, type_) in enumerate(zip(table.column_names, table.schema.types, strict=True)):
        floats = pa.types.is_floating(type_) and pa.types.is_floating(_READ_AS[name])
        if floats or pa.types.is_dictionary(type_) or (type_ in _SMALL and _READ_AS[name] == pa.int64()):
            continue  # as it is, which takes less memory
        try:
            table = table.set_column(at, name, table[name].cast(_READ_AS[name]))
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: {name} is {type_}, expected {_READ_AS[name]} ({reason}); convert it") from None
    return pl.DataFrame(pl.from_arrow(table))


def _read_split(where: str, rows: pl.DataFrame, split: Split) -> list[ScoredClip]:
    clips = sorted(split.in_order(), key=lambda clip: clip.clip_id)
    first = np.cumsum([0, *(clip.num_frames for clip in clips)])  # [C + 1] where each clip's frames begin
    rows = _place(where, rows, clips, first)
    for head, expected in zip(HEADS, np.concatenate([clip.labels for clip in clips], axis=1), strict=True):
        if (label := f"{head}_label") in rows.columns:
            both = rows.with_columns(expected=pl.Series(expected))
            bad = (pl.min_horizontal(label, "expected") >= 0) & (pl.col(label) != pl.col("expected"))
            message = "{frame_name}: {name} is {value}, the shards say {expected} ({count} frames differ); "
            _refuse(where, both, bad, message + "score these shards, with frames in their order", label)
    scores = {head: found for head in HEADS if (found := _scores(where, rows, head)) is not None}
    if "speaking" not in scores:
        raise InputError(f"{where}: the speaking scores are null throughout, expected one at every frame")
    said = rows["said"].to_list() if "said" in rows.columns else None
    updates: list[Any] | None = rows["updates"].to_list() if "updates" in rows.columns else None
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


def _refuse(where: str, rows: pl.DataFrame, bad: pl.Expr, message: str, name: str = "frame") -> None:
    """InputError if some rows are `bad`. `message` is a template of their `count` and, of the first of them, its
    columns, its `frame_name`, and the `name` and `value` of one column."""
    found = rows.filter(bad)
    if len(found):
        row = found.row(0, named=True)
        frame_name = f"clip {row.get('clip_id', row.get('clip'))} frame {row['frame']}"
        text = message.format(**row, count=len(found), frame_name=frame_name, name=name, value=row[name])
        raise InputError(f"{where}: {text}")


def _place(where: str, rows: pl.DataFrame, clips: Sequence[ClipExample], first: Ints) -> pl.DataFrame:
    """The rows in the order of clips and frames, N of them. InputError unless each frame is there once."""
    if "clip_id" in rows.columns:
        key, names = "clip_id", pl.Enum([clip.clip_id for clip in clips])
        clip = rows[key].cast(names, strict=False).to_physical()  # the clip's place in `clips`, null where unknown
    else:
        key, places = "clip", {clip.clip: i for i, clip in enumerate(clips)}
        clip = rows[key].replace_strict(places, default=None, return_dtype=pl.UInt32)
    unknown = "{count} rows are of clips that the shards lack, the first is clip {value}; score the clips of this split"
    _refuse(where, rows, pl.lit(clip.is_null()), unknown, key)
    bounds = ([getattr(one, name) for one in clips] for name in ("start_frame", "end_frame"))
    start, last = (pl.Series(values, dtype=pl.Int32).gather(clip) for values in bounds)
    rows = rows.with_columns(start=start, last=last - 1, at=pl.Series(first[:-1]).gather(clip) - start + rows["frame"])
    stray = "{count} rows are of no frame of their clip, the first is {frame_name}, expected {start} to {last}; "
    inside = pl.col("frame").is_between("start", "last").fill_null(False)
    _refuse(where, rows, ~inside, stray + "frames are absolute, as in the shards")
    if not rows["at"].is_sorted():
        rows = rows.sort("at")
    once = "expected one row for each frame of the split"
    double = "{count} rows are of a frame that has one already, the first is {frame_name}; "
    _refuse(where, rows, pl.col("at") == pl.col("at").shift(), double + once)
    if len(rows) < first[-1]:
        missing = np.flatnonzero(np.bincount(rows["at"], minlength=int(first[-1])) == 0)
        i = int(np.searchsorted(first, missing[0], side="right")) - 1
        name = f"clip {clips[i].clip_id} frame {clips[i].start_frame + missing[0] - first[i]}"
        raise InputError(f"{where}: {len(missing)} frames have no row, the first is {name}; {once}")
    return rows.drop("start", "last", "at")


def _scores(where: str, rows: pl.DataFrame, head: str) -> tuple[Singles, Singles | None] | None:
    """(logits [N], probabilities [N] or None) of one head; None where it has no scores."""
    logit, p = f"{head}_logit", f"{head}_probability"
    given = [name for name in (logit, p) if name in rows.columns and rows[name].null_count() < len(rows)]
    for name in given:
        message = "{frame_name}: {name} is NaN or null ({count} such frames), expected a number at every frame; "
        bad = pl.col(name).is_null() | pl.col(name).is_nan()
        _refuse(where, rows, bad, message + "score them, or drop the column", name)
    if p in given:
        message = "{frame_name}: {name} is {value:g}, expected 0 to 1; if these are logits, name the column "
        _refuse(where, rows, ~pl.col(p).is_between(0, 1), message + logit, p)
    if len(given) == 2:
        order = np.lexsort((rows[p].to_numpy(), rows[logit].to_numpy()))
        rising = rows[p].to_numpy()[order]
        highest = np.maximum.accumulate(rising)
        bad = np.flatnonzero(highest - rising > SAME_ORDER)
        message = f"{logit} and {p} order the frames differently ({{frame_name}} has {{value:g}}, a frame of a lower "
        message += f"logit {{highest:g}}); drop the column {p}, or {logit} if the probability is what you mean"
        _refuse(where, rows[order[bad]].with_columns(highest=highest[bad]), pl.lit(True), message, p)
    if not given:
        return None
    probabilities = rows[p].to_numpy() if p in given else None
    logits = rows[logit].to_numpy() if logit in given else logit_of(probabilities)
    single = np.clip(logits, -LARGEST, LARGEST).astype(np.float32)
    return single, None if probabilities is None else probabilities.astype(np.float32)
