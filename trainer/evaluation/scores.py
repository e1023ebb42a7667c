"""The scores Parquet: one row per frame of a split, whoever's model wrote it, bound to the shards when it is read.

Everything else here starts from this file and needs no model. A file of ours and a stranger's pass the same door:
every frame of every clip exactly once, labels equal to the shards' wherever both speak. Trades speed for that: a row
is placed by (clip, frame), never by its order: 600,000 rows in 0.4 s, five times as long as reading them alone.

    C clips    F frames of a clip    N frames of all clips of a split, end to end, clips by clip_id
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from pipeline.schema import NOT_SAMPLED
from pipeline.storage import replacing

HEADS: Final = ("speaking", "dst_update")  # by row of a clip's labels: SPEAK, DST
INFO: Final = b"prospect-dst"  # the key of the file's metadata that holds `info`, as JSON
ROW_GROUP: Final = 1 << 20
SAME_ORDER: Final = 1e-6  # a probability may fall by this much as its logit rises: float32 sigmoids do
LARGEST: Final = 1e30  # an infinite logit becomes this: differences stay finite in float32

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Updates = tuple[tuple[str, str], ...]  # (step id, transition)


@dataclass(frozen=True, eq=False)
class ScoredClip:
    """One clip and what a model gave at each of its F frames.

    A clip with `said` (or `updates`) is live: the model ran on its own text, and those are its events. Without, events
    come from thresholding the logits.
    """

    clip: ClipExample  # labels int8 [2, F], every frame supervised (rate 1.0)
    logits: dict[str, Singles]  # by head [F]; a head that the model lacks is absent
    probabilities: dict[str, Singles]  # by head [F], corrected for sampling; absent where unknown
    said: list[str | None] | None = None  # per frame the text spoken there, None: silent
    updates: list[Updates | None] | None = None  # per frame the state update made there, None: no update


def canonical(clips: Iterable[ScoredClip]) -> list[ScoredClip]:
    """The clips by clip_id: what is summed in this order does not depend on how they came."""
    return sorted(clips, key=lambda scored: scored.clip.clip_id)


# ---- columns -----------------------------------------------------------------------------------------


def _field(name: str, type_: pa.DataType, doc: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, type_, nullable=nullable, metadata={"doc": doc})


_SAID = _field("said", pa.string(), "what the assistant said at this frame; null: silent", nullable=True)
_UPDATES = _field(
    "updates",
    pa.list_(pa.struct([pa.field("id", pa.string()), pa.field("transition", pa.string())])),
    "the state update made at this frame; null: none; empty: one that says nothing",
    nullable=True,
)
SCORES: Final = pa.schema(
    [
        _field("split", pa.string(), "train, val, test, ..."),
        _field("clip_id", pa.string(), "the clip, as in the shards"),
        _field("recording_id", pa.string(), "one real-world take; resample by this"),
        _field("frame", pa.int32(), "absolute frame number in the video, from 0"),
        _field("time_s", pa.float32(), "frame / fps, seconds from the video's start"),
        _field("speaking_logit", pa.float32(), "higher: rather speak; null: no such head", nullable=True),
        _field("dst_update_logit", pa.float32(), "higher: rather update the state; null: no such head", nullable=True),
        _field("speaking_probability", pa.float32(), "corrected for sampling; null: unknown", nullable=True),
        _field("dst_update_probability", pa.float32(), "corrected for sampling; null: unknown", nullable=True),
        _field("speaking_label", pa.int8(), "1 the assistant speaks here, 0 silence, -100 says nothing"),
        _field("dst_update_label", pa.int8(), "1 the state changes here, 0 it does not, -100 says nothing"),
    ]
)  # fmt: skip


# ---- writing -----------------------------------------------------------------------------------------


def write_scores(path: Path, splits: Mapping[str, Sequence[ScoredClip]], info: dict[str, Any]) -> None:
    """One row per frame, by (split, clip as given, frame); renamed into place when complete. `info` is any JSON."""
    clips = [(split, scored) for split in sorted(splits) for scored in splits[split]]
    live = [
        field
        for field in (_SAID, _UPDATES)
        if any(getattr(scored, field.name) is not None for _, scored in clips)
    ]  # fmt: skip
    schema = pa.schema([*SCORES, *live])
    rows = pa.concat_tables([_rows(split, scored, schema) for split, scored in clips] or [schema.empty_table()])
    rows = rows.replace_schema_metadata({INFO: json.dumps(info, sort_keys=True, allow_nan=False)})
    with replacing(path) as new:
        table = rows.combine_chunks()
        pq.write_table(table, new, compression="zstd", row_group_size=ROW_GROUP, write_page_checksum=True)


def _rows(split: str, scored: ScoredClip, schema: pa.Schema) -> pa.Table:
    clip, n = scored.clip, scored.clip.num_frames
    frames = np.arange(clip.start_frame, clip.end_frame, dtype=np.int32)
    columns: dict[str, Any] = {
        "split": pa.repeat(split, n),
        "clip_id": pa.repeat(clip.clip_id, n),
        "recording_id": pa.repeat(clip.recording_id, n),
        "frame": frames,
        "time_s": (frames / clip.fps).astype(np.float32),
    }
    for row, head in enumerate(HEADS):
        columns[f"{head}_logit"] = scored.logits.get(head, pa.nulls(n, pa.float32()))
        columns[f"{head}_probability"] = scored.probabilities.get(head, pa.nulls(n, pa.float32()))
        columns[f"{head}_label"] = clip.labels[row]
    if "said" in schema.names:
        assert scored.said is not None, "a file is live for all of its clips, or for none"
        columns["said"] = scored.said
    if "updates" in schema.names:
        assert scored.updates is not None, "a file is live for all of its clips, or for none"
        columns["updates"] = [None if update is None else [_struct(u) for u in update] for update in scored.updates]
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _struct(update: tuple[str, str]) -> dict[str, str]:
    return {"id": update[0], "transition": update[1]}


# ---- reading -----------------------------------------------------------------------------------------


def read_info(path: Path) -> dict[str, Any]:
    """What `write_scores` was told of the file; {} for a stranger's. InputError where it is no Parquet file."""
    with _readable(path), pq.ParquetFile(path) as file:
        return dict(json.loads((file.metadata.metadata or {}).get(INFO, b"{}")))


def read_scores(path: Path, splits: Mapping[str, Split]) -> dict[str, list[ScoredClip]]:
    """Each split's clips, by clip_id, with the scores that anybody's file gives them.

    Needed: `clip_id` (or `clip`, the clip's position in its split), `frame`, and `speaking_logit` or
    `speaking_probability`; `split` too where several are asked for. Rows in any order, other columns are ignored.
    Infinite logits become the largest finite float32. From probabilities alone, logits are log(p / (1 - p)).

    Raises InputError where a frame is missing, double or unknown, a score NaN, a label not the shards', or where
    logits and probabilities contradict each other.
    """
    read_info(path)
    with _readable(path):
        schema = pq.read_schema(path)
    columns = _needed(path, schema.names, len(splits))
    texts = [name for name in ("split", "clip_id") if name in columns and pa.types.is_string(schema.field(name).type)]
    with _readable(path), pq.ParquetFile(path, read_dictionary=texts, page_checksum_verification=True) as file:
        table = file.read(columns=columns)
    for at, field in enumerate(table.schema):
        if "string_view" in str(field.type):  # DataFusion's texts; Arrow takes no rows of them
            plain = _UPDATES.type if field.name == "updates" else pa.string()
            table = table.set_column(at, field.name, _cast(f"{path}", table[at], field.name, plain))
    return {name: _read_split(path, table, name, split) for name, split in splits.items()}


_SCORE_COLUMNS: Final = tuple(f"{head}_{kind}" for head in HEADS for kind in ("logit", "probability", "label"))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what goes wrong with the file as such into a InputError."""
    try:
        yield
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: text that is none, in the footer
        reason = (
            "not found" if isinstance(error, FileNotFoundError) else f"not a Parquet file that can be read ({error})"
        )
        raise InputError(f"{path}: {' '.join(reason.split())}; expected per-frame scores as Parquet") from None


def _needed(path: Path, names: Sequence[str], num_splits: int) -> list[str]:
    """The columns to read; InputError where one is missing, or two have the same name."""
    key = "clip_id" if "clip_id" in names else "clip"
    missing = [name for name in (key, "frame") if name not in names]
    if not {"speaking_logit", "speaking_probability"} & set(names):
        missing.append("speaking_logit (or speaking_probability)")
    if num_splits > 1 and "split" not in names:
        missing.append("split")
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(missing)}, found {', '.join(names)}; rename or add it and run again"
        )
    wanted = [name for name in ("split", key, "frame", *_SCORE_COLUMNS, "said", "updates") if name in names]
    twice = [name for name in wanted if list(names).count(name) > 1]
    if twice:
        raise InputError(f"{path}: two columns named {twice[0]}, expected one; drop the other")
    return wanted


class _Frames(NamedTuple):
    """All frames that a file must give, end to end."""

    where: str  # for messages: the file and the split
    clips: list[ClipExample]  # by clip_id
    first: Ints  # [C + 1] where each clip's frames begin, among all N

    def name(self, at: int) -> str:
        number = int(np.searchsorted(self.first, at, side="right")) - 1
        clip = self.clips[number]
        return f"clip {clip.clip_id} frame {clip.start_frame + at - int(self.first[number])}"


def _read_split(path: Path, table: pa.Table, name: str, split: Split) -> list[ScoredClip]:
    clips = sorted(split.in_order(), key=lambda clip: clip.clip_id)
    first = np.concatenate([[0], np.cumsum([clip.num_frames for clip in clips])]).astype(np.int64)
    frames = _Frames(f"{path} split {name}", clips, first)
    rows = _of_split(path, table, name)
    place = _places(frames, rows)
    inverse = np.empty_like(place)
    inverse[place] = np.arange(len(place))  # the row of each frame
    rows = rows.take(pa.array(inverse))
    _check_labels(frames, rows)
    scores = {head: _scores(frames, rows, head) for head in HEADS}
    if scores["speaking"][0] is None:
        raise InputError(f"{frames.where}: the speaking scores are null throughout, expected one at every frame")
    said, updates = _said(frames, rows), _updates(frames, rows)
    return [
        ScoredClip(
            clip,
            logits={head: logit[a:b] for head, (logit, _) in scores.items() if logit is not None},
            probabilities={head: p[a:b] for head, (_, p) in scores.items() if p is not None},
            said=None if said is None else said[a:b],
            updates=None if updates is None else updates[a:b],
        )
        for clip, a, b in zip(clips, first[:-1].tolist(), first[1:].tolist(), strict=True)
    ]


def _of_split(path: Path, table: pa.Table, name: str) -> pa.Table:
    if "split" not in table.column_names:
        return table
    codes, names = _codes(f"{path}", table, "split")
    if name not in names:
        found = ", ".join(sorted(names)) or "none"
        raise InputError(f"{path}: no rows of split {name!r}, found: {found}; score that split, or rename it")
    return table.filter(pa.array(codes == names.index(name)))


def _codes(where: str, table: pa.Table, name: str) -> tuple[Ints, list[str]]:
    """(index [N] into the texts, -1 for null; the texts) of a column of any kind of text."""
    column = table[name]
    if not pa.types.is_dictionary(column.type):
        column = _cast(where, column, name, pa.string()).dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # of no rows
        return np.zeros(0, np.int64), []
    texts = _cast(where, encoded.dictionary, name, pa.string()).to_pylist()
    return np.asarray(encoded.indices.cast(pa.int64()).fill_null(-1)), texts


def _cast(where: str, column: Any, name: str, type_: pa.DataType) -> Any:
    try:
        return column.cast(type_)
    except pa.ArrowException as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{where}: {name} is {column.type}, expected {type_} ({reason}); convert it") from None


def _integers(where: str, column: Any, name: str, null: int) -> Ints:
    return np.asarray(_cast(where, column, name, pa.int64()).fill_null(null).combine_chunks())


def _places(frames: _Frames, rows: pa.Table) -> Ints:
    """int64 [N]: which of the N frames each row is. InputError unless each is there once."""
    clip = _clip_numbers(frames, rows)
    number = _integers(frames.where, rows["frame"], "frame", -1)
    start = np.array([c.start_frame for c in frames.clips])[clip]
    end = np.array([c.end_frame for c in frames.clips])[clip]
    stray = np.flatnonzero((number < start) | (number >= end))
    if len(stray):
        i = int(stray[0])
        raise InputError(
            f"{frames.where}: {len(stray)} rows are of no frame of their clip, the first is clip "
            f"{frames.clips[clip[i]].clip_id} frame {number[i]}, expected {start[i]} to {end[i] - 1}; "
            f"frames are absolute, as in the shards"
        )
    place = frames.first[clip] + number - start
    times = np.bincount(place, minlength=int(frames.first[-1]))
    for wrong, what in ((times > 1, "have several rows"), (times == 0, "have no row")):
        if wrong.any():
            raise InputError(
                f"{frames.where}: {int(wrong.sum())} frames {what}, the first is {frames.name(int(wrong.argmax()))}; "
                f"expected one row for each frame of the split"
            )
    return place


def _clip_numbers(frames: _Frames, rows: pa.Table) -> Ints:
    """int64 [N]: each row's clip, by its place in clip_id order."""
    if "clip_id" in rows.column_names:
        codes, texts = _codes(frames.where, rows, "clip_id")
        known = {clip.clip_id: i for i, clip in enumerate(frames.clips)}
        found = np.array([*(known.get(text, -1) for text in texts), -1])[codes]
        named: Any = rows["clip_id"]
    else:
        known_at = np.full(len(frames.clips) + 1, -1)
        known_at[[clip.clip for clip in frames.clips]] = np.arange(len(frames.clips))
        position = _integers(frames.where, rows["clip"], "clip", -1)
        found = known_at[np.where((position < 0) | (position >= len(frames.clips)), len(frames.clips), position)]
        named = rows["clip"]
    unknown = np.flatnonzero(found < 0)
    if len(unknown):
        raise InputError(
            f"{frames.where}: {len(unknown)} rows are of clips that the shards lack, the first is clip "
            f"{named[int(unknown[0])].as_py()}; score the clips of this split"
        )
    return found.astype(np.int64)


def _check_labels(frames: _Frames, rows: pa.Table) -> None:
    """InputError where a label in the file is not the shards': the silent misalignment."""
    for head, name in enumerate(f"{head}_label" for head in HEADS):
        if name not in rows.column_names:
            continue
        told = _integers(frames.where, rows[name], name, NOT_SAMPLED)
        ours = np.concatenate([clip.labels[head] for clip in frames.clips])
        wrong = (told >= 0) & (ours >= 0) & (told != ours)
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(
                f"{frames.where} {frames.name(at)}: {name} is {told[at]}, the shards say {ours[at]} "
                f"({int(wrong.sum())} frames differ); score these shards, with frames in their order"
            )


# ---- the columns of scores, in the frames' order ---------------------------------------------------------


def _scores(frames: _Frames, rows: pa.Table, head: str) -> tuple[Singles | None, Singles | None]:
    """(logits [N], probabilities [N]) of one head, each None where it is not given."""
    logit, p = (_floats(frames, rows, f"{head}_{kind}") for kind in ("logit", "probability"))
    if p is not None and (bad := (p < 0) | (p > 1)).any():
        at = int(bad.argmax())
        raise InputError(
            f"{frames.where} {frames.name(at)}: {head}_probability is {p[at]:g}, expected 0 to 1; "
            f"if these are logits, name the column {head}_logit"
        )
    if logit is not None and p is not None:
        _check_order(frames, logit, p, head)
    if logit is None and p is not None:
        with np.errstate(divide="ignore"):
            logit = np.log(p) - np.log1p(-p)
    finite = None if logit is None else np.clip(logit, -LARGEST, LARGEST).astype(np.float32)
    return finite, None if p is None else p.astype(np.float32)


def _floats(frames: _Frames, rows: pa.Table, name: str) -> Floats | None:
    """float64 [N] of a column, None where it is missing or all null; InputError on some null, or NaN."""
    if name not in rows.column_names or rows[name].null_count == len(rows):
        return None
    values = np.asarray(_cast(frames.where, rows[name], name, pa.float64()).fill_null(np.nan).combine_chunks())
    bad = np.isnan(values)
    if bad.any():
        raise InputError(
            f"{frames.where} {frames.name(int(bad.argmax()))}: {name} is NaN or null ({int(bad.sum())} such frames), "
            f"expected a number at every frame; score them, or drop the column"
        )
    return values


def _check_order(frames: _Frames, logit: Floats, p: Floats, head: str) -> None:
    """InputError where a higher logit has a lower probability, beyond float32's rounding."""
    order = np.lexsort((p, logit))
    highest = np.maximum.accumulate(p[order])
    falls = highest - p[order] > SAME_ORDER
    if falls.any():
        at = int(falls.argmax())
        above, below = int(order[at]), int(order[int((p[order] == highest[at]).argmax())])
        raise InputError(
            f"{frames.where}: {head}_logit and {head}_probability order the frames differently ({frames.name(above)}: "
            f"{logit[above]:g}, {p[above]:g}; {frames.name(below)}: {logit[below]:g}, {p[below]:g}); drop the column "
            f"{head}_probability, or {head}_logit if the probability is what you mean"
        )


def _said(frames: _Frames, rows: pa.Table) -> list[str | None] | None:
    if "said" not in rows.column_names:
        return None
    return list(_cast(frames.where, rows["said"], "said", pa.string()).to_pylist())


def _updates(frames: _Frames, rows: pa.Table) -> list[Updates | None] | None:
    if "updates" not in rows.column_names:
        return None
    column = _cast(frames.where, rows["updates"], "updates", _UPDATES.type)
    inside = pc.list_flatten(column).combine_chunks()
    if inside.null_count or any(part.null_count for part in inside.flatten()):
        raise InputError(f"{frames.where}: updates holds a null id or transition, expected text; drop that update")
    return [
        None if update is None else tuple((u["id"], u["transition"]) for u in update) for update in column.to_pylist()
    ]
