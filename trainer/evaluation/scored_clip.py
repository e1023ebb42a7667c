"""One held-out clip with the scores of both heads and its labels: a figure, and rows of blocks for a terminal.

Reads a scores Parquet and the shards. Scores are sigmoid(logit), not corrected for the negative rate of training.

    F frames of the clip
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from matplotlib.figure import Figure
from rich.text import Text
from scipy.special import expit

from pipeline.errors import InputError
from pipeline.media import find_frames, fit, open_pictures
from pipeline.schema import HEAD_TITLES, HEADS
from pipeline.summary import HUES
from pipeline.terminal import clock, plain
from pipeline.timeline import find_clip
from trainer.evaluation.plots import DST, MUTED, SPEAKING, Values, new_figure, printable, render

COLOURS: Final = {"speaking": SPEAKING, "DST": DST, "assistant": SPEAKING, "DST_UPDATE": DST}
MAX_THUMBNAILS, THUMBNAIL_SIDE, MAX_TURNS = 40, 48, 14
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"


class HeldOutClip(NamedTuple):
    """A clip with its scores, float [F] in 0..1, and labels, int8 [F], by the titles in HEAD_TITLES."""

    row: dict[str, Any]  # of the clips table
    scores: dict[str, Values]
    labels: dict[str, np.ndarray]


def busiest_clip(folder: Path, scores: Path, split: str) -> HeldOutClip:
    """The clip of a scores file with the most positive frames of both heads; the first of equals."""
    table = pl.scan_parquet(scores, glob=False).filter(pl.col("split") == split)
    speaking, updates = ((pl.col(f"{head}_label") == 1).sum() for head in HEADS)
    rank = pl.min_horizontal(speaking, updates) * 1000 + speaking + updates
    ranked = table.group_by("clip_id", maintain_order=True).agg(rank=rank).collect()
    if ranked.is_empty():
        raise InputError(f"{scores}: found no scored frame, expected some")
    clip_id = ranked.row(int(ranked["rank"].arg_max() or 0))[0]
    frames = table.filter(pl.col("clip_id") == clip_id).sort("frame").collect()
    return HeldOutClip(
        find_clip(folder, f"{split}:{clip_id}").row,
        {name: expit(frames[f"{head}_logit"].to_numpy().astype(np.float64)) for head, name in HEAD_TITLES.items()},
        {name: frames[f"{head}_label"].to_numpy() for head, name in HEAD_TITLES.items()},
    )


def blocks(clip: HeldOutClip, columns: int = 88) -> Iterator[Text]:
    """Per head one row of scores as blocks and one of the labels, for the clip's first `columns` frames."""
    yield Text(f"held-out clip {plain(clip.row['clip_id'])}: score per frame, and below it the label", "dim")
    for head, score in clip.scores.items():
        heights = np.clip((score[:columns] * 8).round().astype(int), 0, 8).tolist()
        labels = "".join("█" if label == 1 else "·" for label in clip.labels[head][:columns].tolist())
        yield Text.assemble((f"{head:>9} {''.join(_BLOCKS[height] for height in heights)}", HUES[head]))
        yield Text(f"{'label':>9} {labels}", "dim")


def render_clip(clip: HeldOutClip, frames_root: Path | None, captions: dict[str, str], title: str) -> str:
    """The SVG; `captions` stand beside each head's name, e.g. 'AP 0.99, chance 0.12'."""
    return render(partial(_make_figure, clip, frames_root, captions, title))[0]


def _make_figure(clip: HeldOutClip, frames_root: Path | None, captions: dict[str, str], title: str) -> Figure:
    row = clip.row
    by_frame: dict[tuple[int, str], list[str]] = {}  # the texts of one frame and role stand in one line
    for turn in row["turns"]:
        start = turn["start_frame"]
        if turn["role"] != "system" and start is not None and row["start_frame"] <= start < row["end_frame"]:
            by_frame.setdefault((start, turn["role"]), []).append(plain(turn["text"]))
    turns = list(by_frame.items())[:MAX_TURNS]
    heights = [30, *[100] * len(clip.scores), 22 * len(turns)]
    figure = new_figure(sum(heights) + 170, width=1200)
    pictures, *panels, texts = figure.subplots(len(heights), height_ratios=heights)
    figure.suptitle(title, x=0.02, ha="left", size=19, weight="bold")
    about = "not seen in training. Line: the head's score at each frame. Band: frames labelled positive."
    pictures.set_title(f"clip {printable(row['clip_id'], 60)}, {about}", size=13, weight="normal", color=MUTED)
    path = find_frames(frames_root, row["video_uid"], row["frames_file"], row["dataset"]) if frames_root else None
    which = np.linspace(0, row["num_frames"] - 1, min(row["num_frames"], MAX_THUMBNAILS)).round().astype(int)
    if path:
        with closing(open_pictures(path)) as opened:
            numbers = [n for n in (row["start_frame"] + which).tolist() if n < opened.count(row["fps"])]
            images = [fit(opened.image(number, row["fps"]), THUMBNAIL_SIDE).transpose(1, 2, 0) for number in numbers]
        if images:
            pictures.imshow(np.concatenate(images, axis=1), extent=(0, 1, 0, 1), aspect="auto")
    pictures.set_axis_off()
    edges = (row["start_frame"] + np.arange(row["num_frames"] + 1)) / row["fps"]
    for axes, (head, score) in zip(panels, clip.scores.items(), strict=True):
        axes.set_title(head, color=COLOURS[head], size=14)
        axes.set_title(captions.get(head, ""), loc="right", size=13, weight="normal", color=MUTED)
        axes.stairs(clip.labels[head] == 1, edges, fill=True, color=COLOURS[head], alpha=0.22)
        axes.stairs(score, edges, baseline=None, color=COLOURS[head], linewidth=2, clip_on=False)
        axes.set(ylim=(0, 1), yticks=[0, 0.5, 1], xlim=(edges[0], edges[-1]))
        axes.set_xticks(edges[:: max(1, round(row["num_frames"] / 10))])
        axes.xaxis.set_major_formatter(lambda second, _: clock(second))
    texts.set_axis_off()
    texts.set_ylim(max(1, len(turns)), 0)
    style: dict[str, Any] = {"size": 13, "va": "top", "transform": texts.get_yaxis_transform()}
    for y, ((frame, role), lines) in enumerate(turns):
        texts.text(0.045, y, clock(frame / row["fps"], tenths=True), ha="right", color=MUTED, **style)
        texts.text(0.055, y, role, color=COLOURS.get(role, MUTED), **style)
        texts.text(0.16, y, printable(", ".join(lines), 140), **style)
    return figure
