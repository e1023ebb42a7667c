"""What the labels look like, read back from the shards alone: a table per split, a timeline per clip.

`summarise` asks polars for one row per clip and for the positive frames, never for the whole table: 17M
frames take 0.7 s on two cores, and memory grows with clips and positives. `timeline` reads one row group.
`verify` comes before both: a shard that is not the one the manifest was written for is named, not read.
Text from the data may hold anything, escape sequences too: everything shown goes through `plain`.

    F frames of a clip, K frames in one terminal column
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from pipeline.errors import InputError
from pipeline.schema import MANIFEST, NOT_SAMPLED, SCHEMA_HASH, SCHEMA_VERSION, TRANSITIONS, is_inside

HEADS: Final = {"speaking": "speaking_label", "DST": "dst_update_label"}
HUES: Final = {"speaking": "dodger_blue1", "DST": "dark_orange"}
TOO_POSITIVE = 0.5  # a head positive on more than this share of frames was probably read wrongly
MOST_CLIPS = 0.5  # events on the first frame of more than this share of clips: a position shortcut
COINCIDE = 0.8  # of one head's positives also positive for the other: comparisons will mean little
REDO: Final = "run `prospect-dst preprocess ... --out {folder}` again"


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
    return Summary(splits, distinct, [*_hazards(splits), *_shared(recordings)])


def split_names(folder: Path) -> list[str]:
    """Splits in the folder: train, val, test first, then others by name."""
    order = {"train": 0, "val": 1, "test": 2}
    found = {p.parent.name.removeprefix("split=") for p in folder.glob("clips/split=*/part-*.parquet")}
    if not found:
        raise InputError(f"{plain(folder)}: no shards here; {REDO.format(folder=plain(folder))}")
    return sorted(found, key=lambda name: (order.get(name, 3), name))


def _scan(folder: Path, table: str, split: str) -> pl.LazyFrame:
    parts = sorted((folder / table / f"split={split}").glob("part-*.parquet"))
    return pl.scan_parquet(parts, hive_partitioning=False)


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


# ---- hazards -----------------------------------------------------------------------------------------
# Named and bounded as in `report`, which also knows the inputs; `all_hazards` tells each name once per split.


def _hazards(splits: Iterable[Split]) -> Iterator[dict[str, str]]:
    for split in splits:
        for name, text in (*_head_hazards(split), *_clip_hazards(split)):
            yield {"name": name, "split": split.name, "text": text}


def _head_hazards(split: Split) -> Iterator[tuple[str, str]]:
    for name, head in split.heads.items():
        if not head.clips:
            yield "head without positives", f"no clip says anything about {name}: nothing to learn there"
        elif not head.positives:
            yield "head without positives", f"no frame is positive for {name}: nothing to learn there"
        elif head.before > TOO_POSITIVE:
            text = f"{percent(head.before)} of frames are positive for {name}: look at a timeline (--clip)"
            yield "implausible positive rate", f"{text}, then perhaps set --frame-convention"


def _clip_hazards(split: Split) -> Iterator[tuple[str, str]]:
    if split.first > MOST_CLIPS * split.clips:
        text = f"the first frame is an event in {split.first:,} of {split.clips:,} clips"
        yield "events at the first frame", f"{text}: a model can learn the position; --pad-s widens the clips"
    name, head = min(split.heads.items(), key=lambda item: item[1].positives)
    if head.positives and split.both >= COINCIDE * head.positives:
        share = percent(split.both / head.positives)
        text = f"{split.both:,} of {head.positives:,} {name} frames ({share}) are positive for both heads"
        yield "heads coincide", f"{text}: judge speak-only, DST-only and both apart"


def _shared(recordings: Mapping[str, set[str]]) -> Iterator[dict[str, str]]:
    where = {
        name: [split for split, found in recordings.items() if name in found]
        for name in set().union(*recordings.values())
    }
    together = Counter(tuple(splits) for splits in where.values() if len(splits) > 1)
    for splits, count in sorted(together.items()):
        example = plain(min(name for name, found in where.items() if tuple(found) == splits))
        text = (
            f"{count:,} of the recordings are in {' and '.join(splits)}, e.g. {example}: results will flatter"
        )
        yield {"name": "recording in several splits", "split": "+".join(sorted(splits)), "text": text}


def all_hazards(summary: Summary, manifest: Mapping[str, Any]) -> list[dict[str, str]]:
    """The manifest's hazards (some need the inputs) and what the shards show beyond them, by split."""
    told = list(manifest.get("hazards") or [])
    names = {(h.get("name"), h.get("split")) for h in told}
    found = told + [h for h in summary.hazards if (h["name"], h["split"]) not in names]
    order = {split.name: i for i, split in enumerate(summary.splits)}
    return sorted(found, key=lambda h: order.get(h.get("split", ""), len(order)))


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
    for source in manifest.get("inputs") or []:
        facts = (
            [f"{source['clips']:,} clip{'' if source['clips'] == 1 else 's'}"] if "clips" in source else []
        )
        facts += [f"{source['frame_convention']} convention"] if source.get("frame_convention") else []
        facts += [f"{source['quarantined']:,} quarantined"] if source.get("quarantined") else []
        yield Text(
            f"{plain(Path(str(source.get('path', '?'))).name)}: {plain(', '.join(facts))}", style="dim"
        )


def _hazard_lines(hazards: Iterable[Mapping[str, str]]) -> Iterator[Text]:
    for hazard in hazards:
        yield Text.assemble(
            ("hazard", "bold red"),
            f" [{plain(hazard.get('split') or 'all')}] ",
            plain(hazard.get("text") or hazard.get("name") or ""),
        )


# ---- is it what was written? ---------------------------------------------------------------------------


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, once every shard proves to be the one it lists; InputError names the damage otherwise."""
    manifest = _manifest(folder)
    redo = REDO.format(folder=plain(folder))
    listed = set()
    for shard in manifest["shards"]:
        _verify_shard(folder, shard, redo)
        listed.add(folder / shard["path"])
    for path in sorted(folder.glob("*/split=*/*.parquet")):
        if path not in listed:
            raise InputError(f"{plain(path)}: a shard that {MANIFEST} does not list; remove it, or {redo}")
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    path, redo = folder / MANIFEST, REDO.format(folder=plain(folder))
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        how = f"run `prospect-dst preprocess ... --out {plain(folder)}`"
        raise InputError(f"no {MANIFEST} in {plain(folder)}: not a finished output; {how}") from None
    except ValueError as e:
        raise InputError(f"{plain(path)}: not readable as JSON ({plain(e)}); {redo}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise InputError(f"{plain(path)}: not a manifest of prospect-dst (no list of shards); {redo}")
    found = (manifest.get("schema_version"), manifest.get("schema_hash"))
    if found != (SCHEMA_VERSION, SCHEMA_HASH):
        wrote, reads = f"schema {found[0]} ({found[1]})", f"{SCHEMA_VERSION} ({SCHEMA_HASH})"
        raise InputError(f"{plain(path)}: written for {plain(wrote)}, this version reads {reads}; {redo}")
    return manifest


def _verify_shard(folder: Path, shard: Any, redo: str) -> None:
    name = shard.get("path") if isinstance(shard, dict) else None
    if not isinstance(name, str) or not is_inside(name):
        raise InputError(f"{plain(folder / MANIFEST)}: lists a shard at {plain(name)}; {redo}")
    path = folder / name
    if not path.is_file():
        raise InputError(f"{plain(path)}: listed in {MANIFEST}, but missing; {redo}")
    if path.stat().st_size != shard.get("bytes"):
        found = f"{path.stat().st_size:,} bytes, expected {shard.get('bytes')}"
        raise InputError(f"{plain(path)}: damaged or edited, found {plain(found)}; {redo}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.get("sha256"):
        text = f"damaged or edited, found sha256 {digest}, expected {plain(shard.get('sha256'))}"
        raise InputError(f"{plain(path)}: {text}; {redo}")


# ---- one clip ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClipView:
    """A row of the clips table with its labels, int8 [F] each."""

    split: str
    row: dict[str, Any]  # columns of schema.CLIPS
    speaking: np.ndarray
    dst: np.ndarray


def read_clips(folder: Path, split: str, part: str, clips: list[int]) -> Iterator[ClipView]:
    """The given clips of one part (a file name), in order."""
    rows = pl.scan_parquet(folder / "clips" / f"split={split}" / part, hive_partitioning=False)
    frames = pl.scan_parquet(folder / "frames" / f"split={split}" / part, hive_partitioning=False)
    wanted = pl.col("clip").is_in(clips)
    labels = frames.filter(wanted).select("clip", *HEADS.values()).collect()
    by_clip = {int(key[0]): f for key, f in labels.partition_by("clip", as_dict=True).items()}
    for row in rows.filter(wanted).collect().iter_rows(named=True):
        speaking, dst = (by_clip[row["clip"]][column].to_numpy() for column in HEADS.values())
        yield ClipView(split, row, speaking, dst)


def clip_index(folder: Path) -> pl.DataFrame:
    """clip, clip_id, split and part (a file name) of every clip, in order."""
    found = []
    for split in split_names(folder):
        for path in sorted((folder / "clips" / f"split={split}").glob("part-*.parquet")):
            ids = pl.scan_parquet(path, hive_partitioning=False).select("clip", "clip_id")
            found.append(ids.with_columns(split=pl.lit(split), part=pl.lit(path.name)))
    return pl.concat(found).collect()


def find_clip(folder: Path, clip: str) -> ClipView:
    """The clip with this id, number, or unique part of an id; `val:` before it looks in one split alone."""
    index = clip_index(folder)
    split, colon, rest = clip.partition(":")
    needle = clip
    if colon and rest and split in set(index["split"]):
        index, needle = index.filter(pl.col("split") == split), rest
    for matches in (
        index.filter(pl.col("clip_id").is_in([clip, needle])),
        index.filter(pl.col("clip").cast(pl.String) == needle),
        index.filter(pl.col("clip_id").str.contains(needle, literal=True)),
    ):
        if matches.height > 1:
            short = f"{matches['split'][0]}:{matches['clip'][0]}"
            found = f"{matches.height:,} clips: {_some(matches)}"
            raise InputError(f"clip {plain(clip)!r} fits {found}; name one of them, like {plain(short)}")
        if matches.height:
            row = matches.row(0, named=True)
            return next(read_clips(folder, row["split"], row["part"], [row["clip"]]))
    raise InputError(f"no clip {plain(clip)!r} in {plain(folder)}; there are e.g. {_some(index)}")


def _some(index: pl.DataFrame, count: int = 4) -> str:
    names = [f"{row['split']}:{plain(row['clip_id'])}" for row in index.head(count).iter_rows(named=True)]
    return ", ".join(names) + (", ..." if index.height > count else "")


def replay(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """State of every step after each turn, one dict per turn; a step nothing is said of is not started."""
    state = {step["id"]: "not_started" for step in row["steps"]}
    state |= {step["id"]: step["state"] for step in row["initial_state"]}
    states = []
    for turn in row["turns"]:
        state = state | {u["id"]: TRANSITIONS.get(u["transition"], u["transition"]) for u in turn["updates"]}
        states.append(state)
    return states


def timeline(folder: Path, clip: str) -> RenderableType:
    """One clip to look at: header, labels of both heads on a ruler, turns with the state they lead to."""
    return Timeline(find_clip(folder, clip))


GLYPHS: Final = {1: "█", 0: "─", NOT_SAMPLED: "·"}
ASCII_GLYPHS: Final = {1: "#", 0: "-", NOT_SAMPLED: "."}
_MARGIN = 9  # width of the track names


class Timeline:
    """Rich renderable of a clip. Each sign means one thing, so that it reads without colour too.

    One column is one frame; past `max_rows` wrapped rows a column holds K frames and shows the strongest.
    """

    def __init__(self, view: ClipView, max_rows: int = 20) -> None:
        self.view = view
        self.max_rows = max_rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = ASCII_GLYPHS if options.ascii_only else GLYPHS
        columns = max(20, (min(options.max_width, 170) - _MARGIN) // 20 * 20)
        per_column = -(-len(self.view.speaking) // (columns * self.max_rows))
        yield _header(self.view)
        yield _legend(glyphs, per_column)
        yield from _tracks(self.view, glyphs, columns, per_column)
        yield _turns(self.view)


def _header(view: ClipView) -> Table:
    row = view.row
    start, end, fps = row["start_frame"], row["end_frame"], row["fps"]
    times = f"{clock(start / fps)} to {clock(end / fps)}"
    span = f"{start}..{end}, {row['num_frames']:,} at {fps:g} fps, {times}"
    read = f"{row['frame_convention']} convention, {row['positive']} positives, rate {row['neg_rate']:g}"
    n = f"{row['n_speaking']:,} speaking, {row['n_dst_update']:,} DST, {row['n_supervised']:,} supervised"
    grid = Table.grid()
    grid.add_column(min_width=_MARGIN + 1, style="dim")
    grid.add_column(overflow="fold")
    for name, value in (
        ("clip", f"{row['clip_id']}  ({view.split}, number {row['clip']})"),
        ("video", row["video_uid"]),
        ("recording", row["recording_id"]),
        ("frames", span),
        ("labels", f"{n}; {read}"),
        ("goal", row["goal"]),
    ):
        if value:
            grid.add_row(name, Text(plain(value)))
    return grid


def _legend(glyphs: Mapping[int, str], per_column: int) -> Text:
    names = {1: "positive", 0: "supervised silence", NOT_SAMPLED: "not sampled"}
    text = "   ".join(f"{glyphs[label]} {name}" for label, name in names.items())
    many = f"\none column = {per_column:,} frames, the strongest label shown" if per_column > 1 else ""
    return Text(f"\n{text}   numbers: turns below{many}\n", style="dim")


def _tracks(view: ClipView, glyphs: Mapping[int, str], columns: int, per_column: int) -> Iterator[Text]:
    """Wrapped rows of a ruler, the turns' numbers and both heads' labels, then an empty line."""
    start, fps = view.row["start_frame"], view.row["fps"]
    edges = np.arange(0, len(view.speaking), per_column)
    tracks = {
        "speaking": np.maximum.reduceat(view.speaking, edges),
        "DST": np.maximum.reduceat(view.dst, edges),
    }
    marks = _marks(view, per_column)
    for left in range(0, len(edges), columns):
        right = min(left + columns, len(edges))
        ticks = {c: f"╷{(f := start + c * per_column)} {clock(f / fps)}" for c in range(left, right, 20)}
        yield Text(f"{'frame':<{_MARGIN}}{_place(ticks, left, columns)}", style="dim")
        yield Text(f"{'turn':<{_MARGIN}}{_place(marks, left, right - left)}", style="dim")
        for head, labels in tracks.items():
            name = (f"{head:<{_MARGIN}}", HUES[head])
            yield Text.assemble(name, _track(labels[left:right], glyphs, HUES[head]))
        yield Text("")


def _track(labels: np.ndarray, glyphs: Mapping[int, str], hue: str) -> Text:
    text = Text()
    for label in labels.tolist():
        text.append(glyphs[label], style=f"bold {hue}" if label == 1 else "dim")
    return text


def _marks(view: ClipView, per_column: int) -> dict[int, str]:
    """Column -> number of the turn that begins there; '3-5' where several do."""
    begins: dict[int, list[int]] = {}
    for number, turn in enumerate(view.row["turns"], 1):
        if turn["start_frame"] is not None:
            column = (turn["start_frame"] - view.row["start_frame"]) // per_column
            begins.setdefault(column, []).append(number)
    return {column: f"{n[0]}-{n[-1]}" if len(n) > 1 else str(n[0]) for column, n in begins.items()}


def _place(labels: Mapping[int, str], left: int, width: int) -> str:
    """One line with each label at its column less `left`; one that would touch the one before is left out."""
    line = ""
    for column in sorted(c for c in labels if left <= c < left + width):
        at = column - left
        if at >= len(line) + bool(line):
            line = line.ljust(at) + labels[column]
    return line


def _turns(view: ClipView) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True, header_style="dim")
    table.add_column("#", justify="right", style="dim")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("frames", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("text", overflow="fold", ratio=1)
    hues = {"assistant": HUES["speaking"], "DST_UPDATE": HUES["DST"]}
    for number, (turn, state) in enumerate(zip(view.row["turns"], replay(view.row), strict=True), 1):
        start, end = turn["start_frame"], turn["end_frame"]
        time = turn["time_s"] if turn["time_s"] is not None or start is None else start / view.row["fps"]
        text = Text(_updates(turn))
        for note in (turn_note(view.row, turn), state_line(state) if turn["updates"] else ""):
            text.append(f"\n{plain(note)}" if note else "", style="dim")
        table.add_row(
            str(number),
            "-" if time is None else clock(time, tenths=True),
            "-" if start is None else f"{start}..{end}",
            Text(plain(turn["role"]), style=hues.get(turn["role"], "")),
            text,
        )
    return table


def _updates(turn: Mapping[str, Any]) -> str:
    if not turn["updates"]:
        return plain(turn["text"])
    return plain(", ".join(f"{u['id']}→{u['transition']}" for u in turn["updates"]))


def turn_note(row: Mapping[str, Any], turn: Mapping[str, Any]) -> str:
    """Why a turn that could label frames of the clip labels none, or only some; '' where it does its work."""
    start, end = turn["start_frame"], turn["end_frame"]
    if turn["role"] not in ("assistant", "DST_UPDATE"):
        return ""
    if start is None:
        return "(no frames: labels nothing)"
    if start >= end:
        return "(empty range: labels nothing)"
    if end <= row["start_frame"] or start >= row["end_frame"]:
        return "(outside the clip: labels nothing)"
    if row["positive"] == "onset" and start < row["start_frame"]:
        return "(its onset is outside the clip: labels nothing)"
    return "(cut to the clip)" if start < row["start_frame"] or end > row["end_frame"] else ""


def state_line(state: Mapping[str, str]) -> str:
    """'state: completed S1 S2 | in progress S3 | not started S4', steps in order."""
    steps: dict[str, list[str]] = {}
    for step, name in state.items():
        steps.setdefault(name, []).append(step)
    order = Counter({"completed": 3, "in_progress": 2, "not_started": -1})
    names = sorted(steps, key=lambda name: -order[name])
    return "state: " + " | ".join(f"{name.replace('_', ' ')} {' '.join(steps[name])}" for name in names)


# ---- words ---------------------------------------------------------------------------------------------


def plain(value: object) -> str:
    """Text on one line with nothing a terminal obeys: controls and direction overrides show as \ufffd."""
    text = " ".join(str(value).split())
    if text.isprintable():
        return text
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in _BIDI else c for c in text)


_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def percent(share: float) -> str:
    return f"{share:.2%}" if 0 < share < 0.001 else f"{share:.1%}"


def clock(seconds: float, *, tenths: bool = False) -> str:
    """m:ss, h:mm:ss from an hour on, with tenths where there are any or they are asked for."""
    minutes, rest = divmod(round(seconds * 10), 600)
    second = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 or tenths else "")
    return f"{minutes // 60}:{minutes % 60:02d}:{second}" if minutes >= 60 else f"{minutes}:{second}"


def write_html(folder: Path, out: Path, max_clips: int = 200) -> None:
    """One self-contained page about the folder, with at most `max_clips` timelines, spread evenly."""
    from pipeline.inspect_html import write_page  # it reads clips through this module

    write_page(folder, out, max_clips)
