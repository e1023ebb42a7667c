"""What the labels look like, read back from the shards alone: one summary per split.

`summarise` asks polars for one row per clip and for the positive frames, never for the whole table: 17M
frames take 0.7 s on two cores, and memory grows with clips and positives. `shards.verify` comes before: a shard
that is not the one the manifest was written for is named, not read. Text from the data may hold anything,
escape sequences too: everything shown goes through `terminal.plain`.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from pipeline import hazards
from pipeline import output as shards
from pipeline.errors import InputError
from pipeline.schema import HEADS, LABEL_COLUMNS, NOT_SAMPLED
from pipeline.summary import Head, Split, Summary, all_hazards, split_order
from pipeline.terminal import plain


def summarise(folder: Path) -> Summary:
    """The summary of an output folder, from its Parquet files alone."""
    names = split_names(folder)
    splits = [_split(folder, name) for name in names]
    recordings = {name: _recordings(folder, name) for name in names}
    distinct = len(set().union(*recordings.values()))
    found = [hazard for split in splits for hazard in hazards.of_labels(split)]
    return Summary(splits, distinct, [*found, *hazards.of_recordings(recordings)])


def told_hazards(folder: Path) -> list[str]:
    """What one should know of the data before one trusts a number that was measured on it, a line each."""
    manifest = shards.verify(folder)
    return [
        plain(f"{h.get('split') or 'all'}: {h.get('text') or h.get('name')}")
        for h in all_hazards(summarise(folder), manifest)
    ]


def split_names(folder: Path) -> list[str]:
    """Splits in the folder: train, val, test first, then others by name."""
    found = {p.parent.name.removeprefix("split=") for p in folder.glob("clips/split=*/part-*.parquet")}
    if not found:
        raise InputError(f"{plain(folder)}: no shards here; run preprocess again")
    return sorted(found, key=split_order)


def _scan(folder: Path, table: str, split: str) -> pl.LazyFrame:
    parts = sorted((folder / table / f"split={split}").glob("part-*.parquet"))
    return pl.scan_parquet(parts, hive_partitioning=False, glob=False)


def _per_clip(folder: Path, split: str) -> pl.DataFrame:
    """One row per clip: its frames by cell; per head: supervised, first frame positive, says anything."""
    speak, dst = (pl.col(column) for column in LABEL_COLUMNS)
    drawn = (speak != NOT_SAMPLED) | (dst != NOT_SAMPLED)
    positive = (speak == 1) | (dst == 1)
    cells = {
        "speak_only": (speak == 1) & (dst != 1),
        "dst_only": (dst == 1) & (speak != 1),
        "both": (speak == 1) & (dst == 1),
        "silence": drawn & ~positive,
        "not_sampled": ~drawn,
    }
    for head, label in zip(HEADS, (speak, dst), strict=True):
        cells[f"{head}_supervised"] = label != NOT_SAMPLED
    per_clip = _scan(folder, "frames", split).group_by("clip").agg(
        pl.len().cast(pl.Int64).alias("frames"),
        pl.col("frame").min().alias("start"),
        *[expr.sum().cast(pl.Int64).alias(name) for name, expr in cells.items()],
        pl.col("frame").filter(positive).min().alias("onset"),
    )  # fmt: skip
    first = (pl.col("onset") == pl.col("start")).fill_null(False)
    nobody = pl.col("unlabelled").list.eval(pl.element().struct["end_frame"] - pl.element().struct["start_frame"])
    about = _scan(folder, "clips", split).select("clip", steps=pl.col("steps").list.len(), unlabelled=nobody.list.sum())
    # A clip without DST, or that nobody annotated, is -100 throughout: it says nothing, rather than "never".
    annotated = pl.col("frames") - pl.col("unlabelled")
    dst = (annotated > 0) & ((pl.col("steps") > 0) | (pl.col("dst_update_supervised") > 0))
    says = {"speaking_says": annotated > 0, "dst_update_says": dst, "annotated": annotated}
    return per_clip.join(about, on="clip").with_columns(first=first, **says).collect(engine="streaming")


def _split(folder: Path, name: str) -> Split:
    clips = _scan(folder, "clips", name).select(
        clips=pl.len(),
        recordings=pl.col("recording_id").n_unique(),
        hours=(pl.col("num_frames") / pl.col("fps")).sum() / 3600,
        rates=pl.col("neg_rate").unique().sort().implode(),
    )  # fmt: skip
    per_clip = _per_clip(folder, name)
    cells = ["frames", "speak_only", "dst_only", "both", "silence", "not_sampled"]
    return Split(
        name=name,
        **clips.collect().row(0, named=True),
        **per_clip.select(pl.col(cells).sum()).row(0, named=True),
        first=per_clip["first"].sum(),
        heads={head: _head(folder, name, head, per_clip) for head in HEADS},
    )


def _head(folder: Path, split: str, head: str, per_clip: pl.DataFrame) -> Head:
    says = per_clip.filter(f"{head}_says")
    own = {"speaking": "speak_only", "dst_update": "dst_only"}[head]
    gaps = _gaps(folder, split, f"{head}_label")
    return Head(
        **says.select(
            positives=(pl.col(own) + pl.col("both")).sum(),
            frames=pl.col("annotated").sum(),
            supervised=pl.col(f"{head}_supervised").sum(),
            clips=pl.len(),
        ).row(0, named=True),
        gaps=gaps,
        usual_gap=hazards.usual_gap(gaps),
    )


def _gaps(folder: Path, split: str, column: str) -> dict[float, int]:
    """Seconds without a positive frame between two runs of them in one clip -> how often."""
    fps = _scan(folder, "clips", split).select("clip", "fps")
    quiet = (
        _scan(folder, "frames", split)
        .filter(pl.col(column) == 1)
        .select("clip", quiet=pl.col("frame").diff() - 1, same=pl.col("clip").diff() == 0)
        .filter(pl.col("same") & (pl.col("quiet") > 0))
        .join(fps, on="clip")
        .select(seconds=(pl.col("quiet") / pl.col("fps")).round(3))
    )
    return dict(quiet.group_by("seconds").len().sort("seconds").collect().iter_rows())


def _recordings(folder: Path, split: str) -> set[str]:
    found = _scan(folder, "clips", split).select(pl.col("recording_id").unique()).collect()
    return set(found.to_series().to_list())
