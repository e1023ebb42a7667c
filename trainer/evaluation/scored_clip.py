"""What a model learned, as a picture: one held-out clip, its frames, the scores of both heads, and the truth.

Reads a scores Parquet (one row per frame: clip_id, frame, {speaking,dst_update}_{logit,label}) and the shards'
turns; draws an SVG that needs nothing but itself, and the same as rows of blocks for a terminal. Scores are
sigmoid(logit), not corrected for the negative rate they were trained at.

    F frames of the clip
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from rich.text import Text

from pipeline.errors import InputError
from pipeline.media import find_frames, read_frames
from pipeline.summary import HUES
from pipeline.terminal import clock, plain
from pipeline.timeline import ClipView, find_clip

WIDTH: Final = 1200
_LEFT, _RIGHT, _TOP, _PANEL, _GAP = 96, 24, 64, 90, 34
_MOST_THUMBNAILS: Final = 40
_COLOURS: Final = {"speaking": "#2563eb", "DST": "#d97706"}
_BLOCKS: Final = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Scored:
    """A clip with its scores, float [F] in 0..1, and labels, int8 [F], of each head."""

    view: ClipView
    scores: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]


def telling_clip(folder: Path, scores: Path, split: str) -> Scored:
    """The clip of a scores file with the most moments of both kinds; the first of equals."""
    table = pl.scan_parquet(scores, glob=False).filter(pl.col("split") == split)
    busy = (
        table.group_by("clip_id", maintain_order=True)
        .agg(s=(pl.col("speaking_label") == 1).sum(), d=(pl.col("dst_update_label") == 1).sum())
        .select("clip_id", busy=pl.min_horizontal("s", "d") * 1000 + pl.col("s") + pl.col("d"))
        .collect()
    )
    if busy.is_empty():
        raise InputError(f"{scores}: found no scored frame, expected some")
    name = busy.row(int(busy["busy"].arg_max() or 0))[0]
    mine = table.filter(pl.col("clip_id") == name).sort("frame").collect()
    logits = {"speaking": mine["speaking_logit"].to_numpy(), "DST": mine["dst_update_logit"].to_numpy()}
    return Scored(
        find_clip(folder, f"{split}:{name}"),
        {head: 1 / (1 + np.exp(-logit.astype(np.float64))) for head, logit in logits.items()},
        {"speaking": mine["speaking_label"].to_numpy(), "DST": mine["dst_update_label"].to_numpy()},
    )


# ---- for a terminal ----------------------------------------------------------------------------------


def blocks(scored: Scored, columns: int = 88) -> Iterator[Text]:
    """Per head one row of scores as blocks and one of the truth, for the clip's first `columns` frames."""
    row = scored.view.row
    yield Text(f"held-out clip {plain(row['clip_id'])}: score per frame, and below it where it should speak", "dim")
    for head, score in scored.scores.items():
        heights = np.clip((score[:columns] * 8).round().astype(int), 0, 8).tolist()
        truth = "".join("█" if label == 1 else "·" for label in scored.labels[head][:columns].tolist())
        yield Text.assemble((f"{head:>9} ", HUES[head]), ("".join(_BLOCKS[h] for h in heights), HUES[head]))
        yield Text.assemble((f"{'truth':>9} ", "dim"), (truth, "dim"))


# ---- as SVG ------------------------------------------------------------------------------------------


def svg(scored: Scored, frames_root: Path | None, captions: dict[str, str], title: str) -> str:
    """The picture; `captions` stand beside each head's name, e.g. 'AP 0.99, chance 0.12'."""
    count = len(next(iter(scored.scores.values())))
    size = (WIDTH - _LEFT - _RIGHT) / min(count, _MOST_THUMBNAILS)
    panels_at = _TOP + size + 44
    turns_at = panels_at + 2 * (_PANEL + _GAP) + 26
    turns = list(_turns(scored, turns_at))
    height = turns_at + 10 * len(turns) + 10  # two elements a line
    body = [
        f'<text class="title" x="{_LEFT}" y="28">{html.escape(title)}</text>',
        f'<text class="note" x="{_LEFT}" y="48">{html.escape(_about(scored))}</text>',
        *_thumbnails(scored, frames_root, size),
    ]
    for i, head in enumerate(scored.scores):
        body += _panel(scored, head, captions.get(head, ""), panels_at + i * (_PANEL + _GAP))
    body += _axis(scored, panels_at + 2 * (_PANEL + _GAP) - _GAP)
    return _SVG.format(width=WIDTH, height=round(height), style=_STYLE, body="\n".join([*body, *turns]))


def _about(scored: Scored) -> str:
    row = scored.view.row
    return (
        f"clip {plain(row['clip_id'])}, not seen in training. Line: the head's score at each frame. "
        "Band: where the answer is yes."
    )


def _x(scored: Scored, frame: float) -> float:
    """Pixel of the left edge of a frame, counted from the clip's start."""
    count = len(next(iter(scored.scores.values())))
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * frame / count


def _thumbnails(scored: Scored, root: Path | None, size: float) -> Iterator[str]:
    row = scored.view.row
    path = find_frames(root, row["video_uid"], row["frames_file"], row["dataset"]) if root else None
    if path is None:
        return
    which = np.linspace(0, row["num_frames"] - 1, min(row["num_frames"], _MOST_THUMBNAILS)).round().astype(int)
    for place, jpeg in enumerate(read_frames(path, (row["start_frame"] + which).tolist())):
        yield (
            f'<image x="{_LEFT + place * size:.1f}" y="{_TOP}" width="{size - 1:.1f}" height="{size - 1:.1f}" '
            f'href="data:image/jpeg;base64,{html.escape(jpeg)}"/>'
        )


def _panel(scored: Scored, head: str, caption: str, top: float) -> Iterator[str]:
    colour, score, labels = _COLOURS[head], scored.scores[head], scored.labels[head]
    width = _x(scored, 1) - _x(scored, 0)
    yield f'<text class="head" x="{_LEFT}" y="{top - 8:.0f}" style="fill:{colour}">{head}</text>'
    yield f'<text class="note" x="{_LEFT + 90}" y="{top - 8:.0f}">{html.escape(caption)}</text>'
    for frame in np.flatnonzero(labels == 1).tolist():
        x = _x(scored, frame)
        yield f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{_PANEL}" fill="{colour}" opacity="0.22"/>'
    for share in (0, 0.5, 1):
        y = top + _PANEL * (1 - share)
        yield f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>'
    steps = [f"{_x(scored, at):.1f},{top + _PANEL * (1 - s):.1f}" for i, s in enumerate(score) for at in (i, i + 1)]
    yield f'<polyline points="{" ".join(steps)}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _axis(scored: Scored, y: float) -> Iterator[str]:
    row = scored.view.row
    step = max(1, round(row["num_frames"] / 10))
    for frame in range(0, row["num_frames"], step):
        label = clock((row["start_frame"] + frame) / row["fps"])
        x = _x(scored, frame + 0.5)
        yield f'<text class="tick" x="{x:.1f}" y="{y + 16:.0f}" text-anchor="middle">{label}</text>'


def _turns(scored: Scored, top: float, most: int = 14) -> Iterator[str]:
    """What was said and when, one line per moment and role; the reference, not the model's own words."""
    row = scored.view.row
    said: dict[tuple[int, str], list[str]] = {}
    for turn in row["turns"]:
        if _inside(turn, row):
            said.setdefault((turn["start_frame"], turn["role"]), []).append(plain(turn["text"]))
    for i, ((start, role), texts) in enumerate(list(said.items())[:most]):
        hue = {"assistant": _COLOURS["speaking"], "DST_UPDATE": _COLOURS["DST"]}.get(role, "#57606a")
        y = top + 20 * i
        time = clock(start / row["fps"], tenths=True)
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y:.0f}" text-anchor="end">{time}</text>'
        yield (
            f'<text class="turn" x="{_LEFT}" y="{y:.0f}"><tspan style="fill:{hue}">{role}</tspan> '
            f"{html.escape(', '.join(texts)[:140])}</text>"
        )


def _inside(turn: dict[str, Any], row: dict[str, Any]) -> bool:
    start = turn["start_frame"]
    return turn["role"] != "system" and start is not None and row["start_frame"] <= start < row["end_frame"]


_STYLE = """text{font-family:system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1f2328}
.title{font-size:19px;font-weight:600}.note{font-size:13px;fill:#57606a}.tick{font-size:11.5px;fill:#57606a}
.head{font-size:14px;font-weight:600}.turn{font-size:13px}.grid{stroke:#d0d7de;stroke-width:1}"""
_SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">
<style>{style}</style>
<rect width="100%" height="100%" fill="#ffffff"/>
{body}
</svg>
"""
