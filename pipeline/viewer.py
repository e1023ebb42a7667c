"""One self-contained page about an output folder: numbers, charts, and timelines to hover over.

The page is `inspect.html` (style and script, no libraries, no network) with one block of JSON put in. All
text from the data reaches the page as JSON and is set with `textContent`, never as markup; a content policy
with the script's own hash lets nothing else run. Labels are run-length coded, about 1 byte per frame at rate
0.5, and the timelines stop at 5 MB: 200 clips of 5 minutes with their text take 1.3.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.resources import files
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.errors import InputError
from pipeline.html_page import coded, policy
from pipeline.inspect import summarise
from pipeline.output import verify
from pipeline.schema import NOT_SAMPLED, TRANSITIONS
from pipeline.storage import write_text
from pipeline.summary import Split, Summary, all_hazards, drops_by_reason
from pipeline.terminal import plain
from pipeline.timeline import ClipView, clip_index, read_clips, turn_note

MAX_BYTES: Final = 5_000_000  # of timelines; at least one is always shown
MAX_FRAMES: Final = 20_000  # shown of one clip
MAX_TURNS: Final = 400  # shown of one clip
MAX_TEXT: Final = 400  # characters shown of one turn
GAP_EDGES: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # seconds; the last bin is open


def write_page(folder: Path, out: Path, max_clips: int = 200, manifest: Mapping[str, Any] | None = None) -> None:
    """Write the page to `out`, whole or not at all; `manifest`: what `verify` gave, if it was called already."""
    manifest = verify(folder) if manifest is None else manifest
    data = page_data(folder, manifest, summarise(folder), max_clips)
    page = fill(files("pipeline").joinpath("inspect.html").read_text(encoding="utf-8"), data)
    if out.is_dir():
        raise InputError(f"{plain(out)}: is a folder; --html wants the name of a file, e.g. {plain(out)}/labels.html")
    write_text(out, page)


def fill(template: str, data: Mapping[str, Any]) -> str:
    """The template with its title, content policy and data; `<`, `>` and `&` of the data become \\uXXXX."""
    title = html.escape(f"{data['folder']} - labels")
    for mark, text in (
        ("POLICY", policy(template)),
        ("TITLE", title),
        ("DATA", coded(data)),
    ):  # data last: it may hold marks
        before, after = template.split("{{" + mark + "}}", 1)
        template = before + text + after
    return template


def page_data(folder: Path, manifest: Mapping[str, Any], summary: Summary, max_clips: int) -> dict[str, Any]:
    """Everything the page shows, as JSON types."""
    order = {split.name: i for i, split in enumerate(summary.splits)}
    clips = list(_within(MAX_BYTES, _clips(folder, max_clips)))
    return {
        "folder": plain(folder.resolve().name),
        "recordings": summary.recordings,
        "edges": GAP_EDGES,
        "splits": [_split(split, manifest) for split in summary.splits],
        "hazards": all_hazards(summary, manifest),
        "inputs": [_input(source) for source in manifest.get("inputs") or []],
        "transitions": TRANSITIONS,
        "clips": sorted(clips, key=lambda clip: (order[clip["split"]], clip["clip"])),
    }


def _input(source: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("clips", "quarantined", "frame_convention", "sha256")
    return {"name": Path(str(source.get("path", "?"))).name} | {k: source[k] for k in kept if k in source}


def _split(split: Split, manifest: Mapping[str, Any]) -> dict[str, Any]:
    data = asdict(split)
    for name, head in split.heads.items():
        data["heads"][name] |= {"median": head.median_gap, "gaps": _bins(head.gaps)}
    return data | {"drops": {reason: n for reason, (n,) in drops_by_reason([split], manifest).items()}}


def _bins(gaps: Mapping[float, int]) -> list[int]:
    """How many gaps lie in each of [edge, next edge)."""
    found = np.searchsorted(GAP_EDGES, list(gaps), side="right") - 1
    return np.bincount(found, weights=list(gaps.values()), minlength=len(GAP_EDGES)).astype(int).tolist()


def _within(budget: int, clips: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Clips until their JSON has used up `budget` bytes; the first in any case."""
    spent = 0
    for clip in clips:
        size = len(json.dumps(clip))
        if spent and spent + size > budget:
            return
        spent += size
        yield clip


def _clips(folder: Path, max_clips: int) -> Iterator[dict[str, Any]]:
    """Clips of all splits in turn, so that a page cut short has lost from each."""
    index = clip_index(folder)
    rows = index.select("split", "part", "clip").rows()
    by_split = [list(found) for _, found in groupby(rows, key=lambda row: row[0])]
    streams = [_views(folder, picked) for picked in spread(by_split, max_clips)]
    for clips in zip_longest(*streams):
        yield from (clip_data(view) for view in clips if view)


def _views(folder: Path, rows: list[tuple[str, str, int]]) -> Iterator[ClipView]:
    for (split, part), wanted in groupby(rows, key=lambda row: row[:2]):
        yield from read_clips(folder, split, part, [clip for *_, clip in wanted])


def spread(by_split: list[list[Any]], most: int) -> list[list[Any]]:
    """At most `most` rows, evenly spaced: equal shares for the splits, what small ones leave for others."""
    picked: list[list[Any]] = [[] for _ in by_split]
    left = most
    for rank, i in enumerate(sorted(range(len(by_split)), key=lambda i: len(by_split[i]))):
        rows = by_split[i]
        share = min(len(rows), left // (len(by_split) - rank))
        left -= share
        picked[i] = [rows[k * len(rows) // share] for k in range(share)]
    return picked


def clip_data(view: ClipView) -> dict[str, Any]:
    row = view.row
    return {
        "id": _short(row["clip_id"]),
        "split": view.split,
        "clip": row["clip"],
        "recording": _short(row["recording_id"]),
        "goal": _short(row["goal"] or ""),
        "fps": row["fps"],
        "start": row["start_frame"],
        "frames": row["num_frames"],
        "rate": row["neg_rate"],
        "steps": [[_short(step["id"]), _short(step["name"])] for step in row["steps"][:100]],
        "initial": {_short(step["id"]): _short(step["state"]) for step in row["initial_state"][:100]},
        "turns": [_turn(row, turn) for turn in row["turns"][:MAX_TURNS]],
        "more_turns": max(0, len(row["turns"]) - MAX_TURNS),
        "labels": run_lengths(view.speaking[:MAX_FRAMES], view.dst[:MAX_FRAMES]),
    }


def _turn(row: Mapping[str, Any], turn: Mapping[str, Any]) -> list[Any]:
    """[role, text, start, end, seconds, updates, note]"""
    start, time = turn["start_frame"], turn["time_s"]
    seconds = start / row["fps"] if time is None and start is not None else time
    updates = [[_short(u["id"]), u["transition"]] for u in turn["updates"][:100]]
    return [
        turn["role"],
        _short(turn["text"]),
        start,
        turn["end_frame"],
        seconds,
        updates,
        turn_note(row, turn),
    ]


def _short(text: str) -> str:
    text = plain(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def run_lengths(speaking: np.ndarray, dst: np.ndarray) -> str:
    """Labels [F] of both heads as 'a2e7i': a letter and, above 1, how often it repeats.

    The letter is abc def ghi[3 * rank(speaking) + rank(dst)], ranks 0 positive, 1 supervised, 2 not sampled.
    """
    if not len(speaking):
        return ""
    code = 3 * _rank(speaking) + _rank(dst)
    starts = np.flatnonzero(np.r_[True, code[1:] != code[:-1]])
    runs = zip(code[starts].tolist(), np.diff(np.r_[starts, len(code)]).tolist(), strict=True)
    return "".join("abcdefghi"[c] + (str(n) if n > 1 else "") for c, n in runs)


def _rank(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == 1, 0, np.where(labels == NOT_SAMPLED, 2, 1))
