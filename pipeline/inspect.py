"""What the labels look like, read back from the shards alone: a table per split, a timeline per clip.

`summarise` asks polars for one row per clip and for the positive frames, never for the whole table: 17M
frames take 0.7 s on two cores, and memory grows with clips and positives. `shards.verify` comes before: a shard
that is not the one the manifest was written for is named, not read. Text from the data may hold anything,
escape sequences too: everything shown goes through `terminal.plain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import polars as pl
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline import hazards
from pipeline.errors import InputError
from pipeline.schema import NOT_SAMPLED
from pipeline.shards import REDO
from pipeline.terminal import percent, plain

HEADS: Final = {"speaking": "speaking_label", "DST": "dst_update_label"}
HUES: Final = {"speaking": "dodger_blue1", "DST": "dark_orange"}


# ---- the numbers -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """One head's labels in one split; clips that say nothing about the head are left out."""

    positives: int
    frames: int  # before sampling: all frames of those clips
    supervised: int  # after sampling: frames with a 0 or a 1
    clips: int
    first: int  # clips whose first frame is positive
    gaps: dict[float, int]  # quiet seconds between two events of a clip -> how often

    @property
    def before(self) -> float:
        return self.positives / self.frames if self.frames else 0.0

    @property
    def after(self) -> float:
        return self.positives / self.supervised if self.supervised else 0.0

    @property
    def median_gap(self) -> float | None:
        return weighted_median(self.gaps)


@dataclass(frozen=True, slots=True)
class Split:
    """One split. The five cells add up to `frames`; `silence` is supervised for at least one head."""

    name: str
    clips: int
    recordings: int
    frames: int
    hours: float
    speak_only: int
    dst_only: int
    both: int
    silence: int
    not_sampled: int
    first: int  # clips whose first frame is positive for either head
    heads: dict[str, Head]  # by the names in HEADS
    rates: list[float]  # distinct negative rates, ascending
    conventions: list[str]
    positive: list[str]

    @property
    def supervised(self) -> float:
        return 1 - self.not_sampled / self.frames if self.frames else 0.0


@dataclass(frozen=True, slots=True)
class Summary:
    splits: list[Split]
    recordings: int  # distinct, over all splits
    hazards: list[dict[str, str]]  # name, split, text: those the shards themselves can show


def weighted_median(counts: Mapping[float, int]) -> float | None:
    """Lower median of values given as value -> count; None of nothing."""
    half, seen = (sum(counts.values()) + 1) // 2, 0
    for value in sorted(counts):
        seen += counts[value]
        if seen >= half:
            return value
    return None


def summarise(folder: Path) -> Summary:
    """The summary of an output folder, from its Parquet files alone."""
    names = split_names(folder)
    splits = [_split(folder, name) for name in names]
    recordings = {name: _recordings(folder, name) for name in names}
    distinct = len(set().union(*recordings.values()))
    found = [hazard for split in splits for hazard in _hazards(split)]
    return Summary(splits, distinct, [*found, *hazards.of_recordings(recordings)])


def split_names(folder: Path) -> list[str]:
    """Splits in the folder: train, val, test first, then others by name."""
    order = {"train": 0, "val": 1, "test": 2}
    found = {p.parent.name.removeprefix("split=") for p in folder.glob("clips/split=*/part-*.parquet")}
    if not found:
        raise InputError(f"{plain(folder)}: no shards here; {REDO.format(folder=plain(folder))}")
    return sorted(found, key=lambda name: (order.get(name, 3), name))


def _scan(folder: Path, table: str, split: str) -> pl.LazyFrame:
    parts = sorted((folder / table / f"split={split}").glob("part-*.parquet"))
    return pl.scan_parquet(parts, hive_partitioning=False, glob=False)


def _per_clip(folder: Path, split: str) -> pl.DataFrame:
    """One row per clip: its frames by cell; per head: supervised, first frame positive, says anything."""
    speak, dst = (pl.col(column) for column in HEADS.values())
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
    onsets = {f"{head}_onset": pl.col("frame").filter(pl.col(column) == 1) for head, column in HEADS.items()}
    per_clip = _scan(folder, "frames", split).group_by("clip").agg(
        pl.len().cast(pl.Int64).alias("frames"),
        pl.col("frame").min().alias("start"),
        *[expr.sum().cast(pl.Int64).alias(name) for name, expr in cells.items()],
        *[frames.min().alias(name) for name, frames in onsets.items()],
    )  # fmt: skip
    first = {f"{head}_first": (pl.col(f"{head}_onset") == pl.col("start")).fill_null(False) for head in HEADS}
    steps = _scan(folder, "clips", split).select("clip", steps=pl.col("steps").list.len())
    # A clip without DST is -100 throughout for that head: it says nothing, rather than "never".
    says = {"speaking_says": pl.lit(True), "DST_says": (pl.col("steps") > 0) | (pl.col("DST_supervised") > 0)}
    return per_clip.join(steps, on="clip").with_columns(**first, **says).collect(engine="streaming")


def _split(folder: Path, name: str) -> Split:
    clips = _scan(folder, "clips", name).select(
        clips=pl.len(),
        recordings=pl.col("recording_id").n_unique(),
        hours=(pl.col("num_frames") / pl.col("fps").cast(pl.Float64)).sum() / 3600,
        rates=pl.col("neg_rate").unique().sort().implode(),
        conventions=pl.col("frame_convention").unique().sort().implode(),
        positive=pl.col("positive").unique().sort().implode(),
    )  # fmt: skip
    per_clip = _per_clip(folder, name)
    cells = ["frames", "speak_only", "dst_only", "both", "silence", "not_sampled"]
    return Split(
        name=name,
        **clips.collect().row(0, named=True),
        **per_clip.select(pl.col(cells).sum()).row(0, named=True),
        first=per_clip.select(pl.any_horizontal(f"{head}_first" for head in HEADS).sum()).item(),
        heads={head: _head(folder, name, head, per_clip) for head in HEADS},
    )


def _head(folder: Path, split: str, head: str, per_clip: pl.DataFrame) -> Head:
    says = per_clip.filter(f"{head}_says")
    own = {"speaking": "speak_only", "DST": "dst_only"}[head]
    return Head(
        **says.select(
            positives=(pl.col(own) + pl.col("both")).sum(),
            frames=pl.col("frames").sum(),
            supervised=pl.col(f"{head}_supervised").sum(),
            clips=pl.len(),
            first=pl.col(f"{head}_first").sum(),
        ).row(0, named=True),
        gaps=_gaps(folder, split, HEADS[head]),
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
        .select(seconds=(pl.col("quiet") / pl.col("fps").cast(pl.Float64)).round(3))
    )
    return dict(quiet.group_by("seconds").len().sort("seconds").collect().iter_rows())


def _recordings(folder: Path, split: str) -> set[str]:
    found = _scan(folder, "clips", split).select(pl.col("recording_id").unique()).collect()
    return set(found.to_series().to_list())


def _hazards(split: Split) -> list[hazards.Hazard]:
    heads = {n: hazards.HeadCounts(h.clips, h.frames, h.positives) for n, h in split.heads.items()}
    counts = hazards.LabelCounts(split.clips, split.first, split.both, heads)
    return list(hazards.of_labels(split.name, counts))


def all_hazards(summary: Summary, manifest: Mapping[str, Any]) -> list[hazards.Hazard]:
    """The manifest's hazards (some need the inputs) and what the shards show beyond them, by split."""
    told = [*(manifest.get("hazards") or []), *summary.hazards]
    return hazards.merged(told, [split.name for split in summary.splits])


# ---- the table ---------------------------------------------------------------------------------------


def render_summary(summary: Summary, manifest: Mapping[str, Any]) -> RenderableType:
    """A table (one column per split), then the inputs and hazards the manifest tells of; 100 columns wide."""
    tables = [_table(summary.splits[i : i + 5], manifest) for i in range(0, len(summary.splits), 5)]
    lines = [*_input_lines(manifest), *_hazard_lines(all_hazards(summary, manifest))]
    return Group(*tables, *([Text(""), *lines] if lines else []))


def _table(splits: list[Split], manifest: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    for split in splits:
        table.add_column(Text(plain(split.name)), justify="right")
    columns = [list(_cells(split)) for split in splits]
    for row in zip(*columns, strict=True):
        label, section, style = row[0][0], row[0][2], row[0][3]
        table.add_row(Text(label, style=style), *[value for _, value, *_ in row], end_section=section)
    for reason, counts in drops_by_reason(splits, manifest).items():
        table.add_row(Text(f"dropped: {plain(reason)}"), *[f"{n:,}" if n else "-" for n in counts])
    return table


def _cells(split: Split) -> Iterator[tuple[str, str, bool, str]]:
    """(label, value, whether a rule follows, style) down one split's column."""
    yield "clips", f"{split.clips:,}", False, ""
    yield "recordings", f"{split.recordings:,}", False, ""
    yield "frames", f"{split.frames:,}", False, ""
    yield "hours", f"{split.hours:,.2f}", False, ""
    yield "supervised frames", percent(split.supervised), True, ""
    for name, head in split.heads.items():
        yield f"{name} positives", f"{head.positives:,}", False, HUES[name]
        yield "  of frames, before sampling", percent(head.before) if head.frames else "-", False, ""
        yield "  of supervised, after sampling", percent(head.after) if head.supervised else "-", False, ""
        gap = head.median_gap
        yield "  median quiet between events", "-" if gap is None else f"{gap:g} s", True, ""
    yield "frames: speaking only", f"{split.speak_only:,}", False, ""
    yield "        DST only", f"{split.dst_only:,}", False, ""
    yield "        both", f"{split.both:,}", False, ""
    yield "        neither", f"{split.silence + split.not_sampled:,}", False, ""
    yield "clips that begin on an event", percent(split.first / split.clips), True, ""


def drops_by_reason(splits: list[Split], manifest: Mapping[str, Any]) -> dict[str, list[int]]:
    """Reason -> count per split, for reasons that occur."""
    told = manifest.get("splits") or {}
    drops = [(told.get(split.name) or {}).get("drops") or {} for split in splits]
    reasons = dict.fromkeys(reason for d in drops for reason, n in d.items() if n)
    return {reason: [d.get(reason, 0) for d in drops] for reason in reasons}


def _input_lines(manifest: Mapping[str, Any]) -> Iterator[Text]:
    """Per input file: what was found, and what was assumed."""
    for source in manifest.get("inputs") or []:
        facts = [f"{source['clips']:,} clip{'' if source['clips'] == 1 else 's'}"] if "clips" in source else []
        facts += [f"{source['frame_convention']} convention"] if source.get("frame_convention") else []
        if source.get("turns_not_fitting"):
            facts.append(f"{source['turns_not_fitting']:,} of {source['votes']['turns']:,} turns do not fit it")
        facts += [f"fps absent in {source['fps_assumed']:,} clips, 2 assumed"] if source.get("fps_assumed") else []
        facts += [f"{source['quarantined']:,} quarantined"] if source.get("quarantined") else []
        yield Text(f"{plain(Path(str(source.get('path', '?'))).name)}: {plain(', '.join(facts))}", style="dim")


def _hazard_lines(hazards: Iterable[Mapping[str, str]]) -> Iterator[Text]:
    for hazard in hazards:
        yield Text.assemble(
            ("hazard", "bold red"),
            f" [{plain(hazard.get('split') or 'all')}] ",
            plain(hazard.get("text") or hazard.get("name") or ""),
        )


def write_html(folder: Path, out: Path, max_clips: int = 200) -> None:
    """One self-contained page about the folder, with at most `max_clips` timelines, spread evenly."""
    from pipeline.inspect_html import write_page  # it reads clips through this module

    write_page(folder, out, max_clips)
