"""One clip to look at: its labels on a ruler, its turns, and the state that they lead to.

Reads one row group of the shards. Each sign on the tracks means one thing, so that a timeline reads without
colour too; where a clip is too long for the screen, one column shows the strongest label of several frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from pipeline.errors import InputError
from pipeline.labels import DROP_REASONS, drops
from pipeline.schema import LABEL_COLUMNS, NOT_SAMPLED
from pipeline.state import NOT_STARTED, replay
from pipeline.summary import HUES, split_order
from pipeline.terminal import clock, plain


class ClipView(NamedTuple):
    """A row of the clips table with its labels, int8 [frames] each."""

    split: str
    row: dict[str, Any]  # columns of schema.CLIPS
    speaking: np.ndarray
    dst: np.ndarray


def read_clips(folder: Path, split: str, part: str, clips: list[int]) -> Iterator[ClipView]:
    """The given clips of one part (a file name), in order."""
    rows, frames = (
        pl.scan_parquet(folder / table / f"split={split}" / part, hive_partitioning=False, glob=False)
        .filter(pl.col("clip").is_in(clips))
        .select(columns)
        .collect()
        for table, columns in (("clips", pl.all()), ("frames", pl.col("clip", *LABEL_COLUMNS)))
    )
    for row in rows.iter_rows(named=True):
        own = frames.filter(pl.col("clip") == row["clip"])
        yield ClipView(split, row, *(own[column].to_numpy() for column in LABEL_COLUMNS))


def clip_index(folder: Path) -> pl.DataFrame:
    """clip, clip_id, split and part (a file name) of every clip, in order."""
    paths = [(path.parent.name.removeprefix("split="), path) for path in folder.glob("clips/split=*/part-*.parquet")]
    return pl.concat(
        pl.scan_parquet(path, hive_partitioning=False, glob=False)
        .select("clip", "clip_id")
        .with_columns(split=pl.lit(split), part=pl.lit(path.name))
        for split, path in sorted(paths, key=lambda item: (*split_order(item[0]), item[1].name))
    ).collect()


def find_clip(folder: Path, clip: str) -> ClipView:
    """The clip with this id, number, or unique part of an id; `val:` before it looks in one split alone."""
    index = clip_index(folder)
    split, colon, rest = clip.partition(":")
    needle = clip
    if colon and rest and split in set(index["split"]):
        index, needle = index.filter(pl.col("split") == split), rest
    by_id, by_number = pl.col("clip_id").is_in([clip, needle]), pl.col("clip").cast(pl.String) == needle
    by_part = pl.col("clip_id").str.contains(needle, literal=True)
    fitting = next((some for by in (by_id, by_number, by_part) if (some := index.filter(by)).height), index.clear())
    if fitting.height == 1:
        row = fitting.row(0, named=True)
        return next(read_clips(folder, row["split"], row["part"], [row["clip"]]))
    rows = (fitting if fitting.height else index).head(4).iter_rows(named=True)
    some = ", ".join(f"{row['split']}:{plain(row['clip_id'])}" for row in rows)
    raise InputError(f"{plain(folder)}: {fitting.height:,} clips fit {plain(clip)!r}, expected one, e.g. {some}")


def states_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """State of every step before the first turn and after each turn; a step nothing is said of is not started."""
    state = {step["id"]: NOT_STARTED for step in row["steps"]}
    states = [state | {step["id"]: step["state"] for step in row["initial_state"]}]
    for turn in row["turns"]:
        states.append(replay(states[-1], ((u["id"], u["transition"]) for u in turn["updates"])))
    return states


def turn_seconds(row: Mapping[str, Any], turn: Mapping[str, Any]) -> float | None:
    """A turn's own time, else that of its first frame."""
    start, time = turn["start_frame"], turn["time_s"]
    return start / row["fps"] if time is None and start is not None else time


def turn_note(row: Mapping[str, Any], turn: Mapping[str, Any]) -> str:
    """Why a turn that could label frames of the clip labels none, or only some; '' where it labels all of its own."""
    start, end = turn["start_frame"], turn["end_frame"]
    if turn["role"] not in ("assistant", "DST_UPDATE"):
        return ""
    if start is None:
        return "(no frames: labels nothing)"
    reason = drops(start, end, row["start_frame"], row["end_frame"], row["positive"])
    if reason >= 0:
        return f"({DROP_REASONS[reason]}: labels nothing)"
    return "(cut to the clip)" if start < row["start_frame"] or end > row["end_frame"] else ""


def state_line(state: Mapping[str, str]) -> str:
    """'state: completed S1 S2 | in progress S3 | not started S4', steps in order."""
    order = {"completed": 0, "in_progress": 1, "not_started": 3}
    names = sorted(dict.fromkeys(state.values()), key=lambda name: order.get(name, 2))
    steps = {name: " ".join(step for step, its in state.items() if its == name) for name in names}
    return "state: " + " | ".join(f"{name.replace('_', ' ')} {steps[name]}" for name in names)


# ---- in a terminal -----------------------------------------------------------------------------------

LABELS: Final = {1: "positive", 0: "supervised silence", NOT_SAMPLED: "not sampled"}
_MARGIN, _MAX_ROWS = 9, 20  # width of the track names; wrapped rows: of a longer clip a column shows several frames


@dataclass(frozen=True)
class Timeline:
    """A clip as rich prints it: header, labels of both heads on a ruler, turns with the state they lead to."""

    view: ClipView

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        row = self.view.row
        start, end, fps = row["start_frame"], row["end_frame"], row["fps"]
        counts = f"{row['n_speaking']:,} speaking, {row['n_dst_update']:,} DST, {row['n_supervised']:,} supervised"
        rule = f"{row['frame_convention']} convention, {row['positive']} positives, rate {row['neg_rate']:g}"
        times = f"{clock(start / fps)} to {clock(end / fps)}"
        facts = {
            "clip": f"{row['clip_id']}  ({self.view.split}, number {row['clip']})",
            "video": row["video_uid"],
            "recording": row["recording_id"],
            "frames": f"{start}..{end}, {row['num_frames']:,} at {fps:g} fps, {times}",
            "labels": f"{counts}; {rule}",
            "goal": row["goal"],
        }
        grid = Table.grid(Column(min_width=_MARGIN + 1, style="dim"), Column(overflow="fold"))
        for name, value in facts.items():
            if value:
                grid.add_row(name, Text(plain(value)))
        yield grid
        glyphs = dict(zip(LABELS, "#-." if options.ascii_only else "█─·", strict=True))
        columns = max(20, (min(options.max_width, 170) - _MARGIN) // 20 * 20)
        per_column = -(-len(self.view.speaking) // (columns * _MAX_ROWS))
        legend = "   ".join(f"{glyphs[label]} {name}" for label, name in LABELS.items())
        many = f"\none column = {per_column:,} frames, the strongest label shown" if per_column > 1 else ""
        yield Text(f"\n{legend}   numbers: turns below{many}\n", style="dim")
        yield from _tracks(self.view, glyphs, columns, per_column)
        yield _turns(row)


def _tracks(view: ClipView, glyphs: Mapping[int, str], columns: int, per_column: int) -> Iterator[Text]:
    """Wrapped rows of a ruler, the turns' numbers and both heads' labels, then an empty line."""
    start, fps = view.row["start_frame"], view.row["fps"]
    edges = np.arange(0, len(view.speaking), per_column)
    begins: dict[int, list[int]] = {}  # column -> numbers of the turns that begin there
    for number, turn in enumerate(view.row["turns"], 1):
        if turn["start_frame"] is not None:
            begins.setdefault((turn["start_frame"] - start) // per_column, []).append(number)
    numbers = {column: f"{n[0]}-{n[-1]}" if len(n) > 1 else str(n[0]) for column, n in begins.items()}
    for left in range(0, len(edges), columns):
        right = min(left + columns, len(edges))
        ticks = {c: f"╷{(frame := start + c * per_column)} {clock(frame / fps)}" for c in range(left, right, 20)}
        yield Text(f"{'frame':<{_MARGIN}}{_place(ticks, left, columns)}", style="dim")
        yield Text(f"{'turn':<{_MARGIN}}{_place(numbers, left, right - left)}", style="dim")
        for head, labels in (("speaking", view.speaking), ("DST", view.dst)):
            track = Text.assemble((f"{head:<{_MARGIN}}", HUES[head]))
            for label in np.maximum.reduceat(labels, edges)[left:right].tolist():
                track.append(glyphs[label], style=f"bold {HUES[head]}" if label == 1 else "dim")
            yield track
        yield Text("")


def _place(labels: Mapping[int, str], left: int, width: int) -> str:
    """One line with each label at its column less `left`; one that would touch the one before is left out."""
    line = ""
    for column in sorted(c for c in labels if left <= c < left + width):
        at = column - left
        if at >= len(line) + bool(line):
            line = line.ljust(at) + labels[column]
    return line


def _turns(row: Mapping[str, Any]) -> Table:
    right, left = (partial(Column, no_wrap=True, justify=justify) for justify in ("right", "left"))
    text = Column("text", overflow="fold", ratio=1)
    columns = (right("#", style="dim"), right("time"), left("frames"), left("role"), text)
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    hues = {"assistant": HUES["speaking"], "DST_UPDATE": HUES["DST"]}
    for number, (turn, state) in enumerate(zip(row["turns"], states_of(row)[1:], strict=True), 1):
        start, time = turn["start_frame"], turn_seconds(row, turn)
        what = Text(plain(", ".join(f"{u['id']}→{u['transition']}" for u in turn["updates"]) or turn["text"]))
        for note in (turn_note(row, turn), state_line(state) if turn["updates"] else ""):
            what.append(f"\n{plain(note)}" if note else "", style="dim")
        seconds = "-" if time is None else clock(time, tenths=True)
        frames = "-" if start is None else f"{start}..{turn['end_frame']}"
        table.add_row(str(number), seconds, frames, Text(turn["role"], style=hues.get(turn["role"], "")), what)
    return table
