"""The scores Parquet: one row per frame of a split, from any model. `read_scores` reads it back.

F frames of a clip    N frames of all clips of a split, clips by clip_id
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataset import ClipExample
from pipeline.schema import HEADS
from pipeline.storage import replacing

INFO: Final = b"prospect-dst"  # the key of the file's metadata that holds `info`, as JSON
ROW_GROUP: Final = 1 << 20

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


UPDATES_TYPE: Final = pa.list_(pa.struct([pa.field("id", pa.string()), pa.field("transition", pa.string())]))
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
    ("updates", UPDATES_TYPE, True, "the state update made at this frame; null: none; empty: one that says nothing"),
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
    rows = pa.concat_tables([schema.empty_table(), *(_rows(split, scored, schema) for split, scored in clips)])
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
        "said": scored.said,
        "updates": scored.updates,
    }
    for row, head in enumerate(HEADS):
        columns[f"{head}_logit"] = scored.logits.get(head, pa.nulls(n, pa.float32()))
        columns[f"{head}_probability"] = scored.probabilities.get(head, pa.nulls(n, pa.float32()))
        columns[f"{head}_label"] = clip.labels[row]
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)
