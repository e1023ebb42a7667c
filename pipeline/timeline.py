"""One clip to look at: its labels on a ruler, its turns, and the state that they lead to.

Reads one row group of the shards. Each sign on the tracks means one thing, so that a timeline reads without
colour too; where a clip is too long for the screen, one column shows the strongest label of several frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from pipeline.dataset import ClipExample, Split, Turn, read_manifest
from pipeline.errors import InputError
from pipeline.labels import DROP_REASONS, drops
from pipeline.schema import HEAD_TITLES, NOT_SAMPLED
from pipeline.state import initial_state, replay
from pipeline.summary import HUES
from pipeline.terminal import clock, plain


def clip_index(folder: Path) -> pl.DataFrame:
    """clip, clip_id and split of every clip, in order."""
    paths = {split: sorted(folder.glob(f"clips/split={split}/*.parquet")) for split in read_manifest(folder)["splits"]}
    return pl.concat(
        pl.scan_parquet(of_split, hive_partitioning=False, glob=False).select("clip", "clip_id", split=pl.lit(split))
        for split, of_split in paths.items()
    ).collect()


def find_clip(folder: Path, clip: str) -> tuple[str, ClipExample]:
    """(split, clip) with this id, number, or unique part of an id; `val:` before it looks in one split alone."""
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
        return row["split"], Split(folder, row["split"]).clip(row["clip"])
    rows = (fitting if fitting.height else index).head(4).iter_rows(named=True)
    some = ", ".join(f"{row['split']}:{plain(row['clip_id'])}" for row in rows)
    raise InputError(f"{plain(folder)}: {fitting.height:,} clips fit {plain(clip)!r}, expected one, e.g. {some}")


def states_of(clip: ClipExample) -> list[dict[str, str]]:
    """State of every step before the first turn and after each turn; a step nothing is said of is not started.

    Updates count in the order of time, also where the source has turns in another; a turn without a time stays behind
    the one before it.
    """
    state = initial_state((step for step, _ in clip.steps), clip.initial_state)
    times = [0.0]
    for turn in clip.turns:
        seconds = turn_seconds(clip, turn)
        times.append(times[-1] if seconds is None else seconds)
    states = [state] * len(times)
    for i in sorted(range(len(clip.turns)), key=lambda i: times[i + 1]):
        states[i + 1] = state = replay(state, clip.turns[i].updates)
    return states


def turn_seconds(clip: ClipExample, turn: Turn) -> float | None:
    """A turn's own time, else that of its first frame."""
    return turn.start_frame / clip.fps if turn.time_s is None and turn.start_frame is not None else turn.time_s


def turn_note(clip: ClipExample, turn: Turn) -> str:
    """Why a turn that could label frames of the clip labels none, or only some; '' where it labels all of its own."""
    start, end = turn.start_frame, turn.end_frame
    if turn.role not in ("assistant", "DST_UPDATE"):
        return ""
    if start is None or end is None:
        return "(no frames: labels nothing)"
    reason = drops(start, end, clip.start_frame, clip.end_frame, clip.positive)
    if reason >= 0:
        return f"({DROP_REASONS[reason]}: labels nothing)"
    return "(cut to the clip)" if start < clip.start_frame or end > clip.end_frame else ""


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
    """A clip of a split as rich prints it: header, both heads' labels on a ruler, turns with the state they lead to."""

    split: str
    clip: ClipExample

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        clip, fps = self.clip, self.clip.fps
        speaking, updates = (clip.labels == 1).sum(axis=1)
        supervised = (clip.labels != NOT_SAMPLED).any(axis=0).sum()
        counts = f"{speaking:,} speaking, {updates:,} DST, {supervised:,} supervised"
        rule = f"{clip.frame_convention} convention, {clip.positive} positives, rate {clip.neg_rate:g}"
        times = f"{clock(clip.start_frame / fps)} to {clock(clip.end_frame / fps)}"
        facts = {
            "clip": f"{clip.clip_id}  ({self.split}, number {clip.clip})",
            "video": clip.video_uid,
            "recording": clip.recording_id,
            "frames": f"{clip.start_frame}..{clip.end_frame}, {clip.num_frames:,} at {fps:g} fps, {times}",
            "labels": f"{counts}; {rule}",
            "goal": clip.goal,
        }
        grid = Table.grid(Column(min_width=_MARGIN + 1, style="dim"), Column(overflow="fold"))
        for name, value in facts.items():
            if value:
                grid.add_row(name, Text(plain(value)))
        yield grid
        glyphs = dict(zip(LABELS, "#-." if options.ascii_only else "█─·", strict=True))
        columns = max(20, (min(options.max_width, 170) - _MARGIN) // 20 * 20)
        per_column = -(-clip.num_frames // (columns * _MAX_ROWS))
        legend = "   ".join(f"{glyphs[label]} {name}" for label, name in LABELS.items())
        many = f"\none column = {per_column:,} frames, the strongest label shown" if per_column > 1 else ""
        yield Text(f"\n{legend}   numbers: turns below{many}\n", style="dim")
        yield from _tracks(clip, glyphs, columns, per_column)
        yield _turns(clip)


def _tracks(clip: ClipExample, glyphs: Mapping[int, str], columns: int, per_column: int) -> Iterator[Text]:
    """Wrapped rows of a ruler, the turns' numbers and both heads' labels, then an empty line."""
    edges = np.arange(0, clip.num_frames, per_column)
    begins: dict[int, list[int]] = {}  # column -> numbers of the turns that begin there
    for number, turn in enumerate(clip.turns, 1):
        if turn.start_frame is not None:
            begins.setdefault((turn.start_frame - clip.start_frame) // per_column, []).append(number)
    numbers = {column: f"{n[0]}-{n[-1]}" if len(n) > 1 else str(n[0]) for column, n in begins.items()}
    for left in range(0, len(edges), columns):
        right = min(left + columns, len(edges))
        frames = {column: clip.start_frame + column * per_column for column in range(left, right, 20)}
        ticks = {column: f"╷{frame} {clock(frame / clip.fps)}" for column, frame in frames.items()}
        yield Text(f"{'frame':<{_MARGIN}}{_place(ticks, left, columns)}", style="dim")
        yield Text(f"{'turn':<{_MARGIN}}{_place(numbers, left, right - left)}", style="dim")
        for head, labels in zip(HEAD_TITLES.values(), clip.labels, strict=True):
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


def _turns(clip: ClipExample) -> Table:
    right, left = (partial(Column, no_wrap=True, justify=justify) for justify in ("right", "left"))
    text = Column("text", overflow="fold", ratio=1)
    columns = (right("#", style="dim"), right("time"), left("frames"), left("role"), text)
    table = Table(*columns, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    hues = {"assistant": HUES["speaking"], "DST_UPDATE": HUES["DST"]}
    for number, (turn, state) in enumerate(zip(clip.turns, states_of(clip)[1:], strict=True), 1):
        time = turn_seconds(clip, turn)
        words = Text(plain(", ".join(f"{step}→{transition}" for step, transition in turn.updates) or turn.text))
        for note in (turn_note(clip, turn), state_line(state) if turn.updates else ""):
            words.append(f"\n{plain(note)}" if note else "", style="dim")
        seconds = "-" if time is None else clock(time, tenths=True)
        frames = "-" if turn.start_frame is None else f"{turn.start_frame}..{turn.end_frame}"
        table.add_row(str(number), seconds, frames, Text(turn.role, style=hues.get(turn.role, "")), words)
    return table
