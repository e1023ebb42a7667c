"""The HTML viewer: one self-contained page (viewer.html) for `inspect --html` and `stream --html`.

The template holds style and script, without libraries and without network; Python adds one block of JSON. Text from the
data reaches the page as JSON and is set with `textContent`, never as markup, and a content policy with the script's own
hash lets nothing else run. Labels are run-length coded (about 1 byte a frame at rate 0.5), timelines stop at MAX_BYTES.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import polars as pl

from pipeline.dataset import verify
from pipeline.errors import InputError
from pipeline.schema import HEADS, NOT_SAMPLED
from pipeline.storage import write_text
from pipeline.terminal import plain
from pipeline.timeline import ClipView, clip_index, read_clips, state_line, states_of, turn_note, turn_seconds

MAX_BYTES: Final = 5_000_000  # of timelines; at least one is always shown
MAX_FRAMES: Final = 20_000  # shown of one clip
MAX_TURNS: Final = 400  # shown of one clip
MAX_TEXT: Final = 400  # characters shown of one text
GAP_EDGES: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # seconds; the last bin is open


# ---- any page ----------------------------------------------------------------------------------------


def page_around_data(title: str) -> tuple[str, str]:
    """What stands before and after the page's JSON, which may be long and is written by the caller (`coded`)."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("pipeline", "."), autoescape=True)
    page = environment.get_template("viewer.html").render(title=plain(title), policy="\1", data="\0")
    policy = "default-src 'none'; img-src data:"
    for tag in ("script", "style"):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[0]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
    before, after = page.replace("\1", policy).split("\0")
    return before, after


def coded(data: Any) -> str:
    """Data as JSON for a script element: ASCII, on one line, `<`, `>` and `&` as \\uXXXX; ValueError on NaN."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def short(text: str) -> str:
    """Text to show, at most MAX_TEXT characters of it."""
    text = plain(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


# ---- the page of an output folder --------------------------------------------------------------------


def write_page(folder: Path, out: Path, max_clips: int = 200, manifest: Mapping[str, Any] | None = None) -> None:
    """Write the page to `out`, whole or not at all; `manifest`: what `verify` gave, if it was called already."""
    manifest = verify(folder) if manifest is None else manifest
    before, after = page_around_data(f"{folder.resolve().name} - labels")
    page = before + coded(page_data(folder, manifest, max_clips)) + after
    if out.is_dir():
        raise InputError(f"{plain(out)}: is a folder; --html wants the name of a file, e.g. {plain(out)}/labels.html")
    write_text(out, page)


def page_data(folder: Path, manifest: Mapping[str, Any], max_clips: int) -> dict[str, Any]:
    """Everything the page shows, as JSON types."""
    order = list(manifest["splits"])
    recordings = pl.scan_parquet(folder / "clips" / "**" / "*.parquet").select(pl.col("recording_id").n_unique())
    clips: list[dict[str, Any]] = []
    spent = 0
    for clip in _clips(folder, max_clips):
        spent += len(json.dumps(clip))
        if clips and spent > MAX_BYTES:
            break
        clips.append(clip)
    kept = ("clips", "quarantined", "frame_convention", "sha256")
    return {
        "page": "labels",
        "folder": plain(folder.resolve().name),
        "recordings": recordings.collect().item(),
        "edges": GAP_EDGES,
        "splits": [_split(*item) for item in manifest["splits"].items()],
        "hazards": manifest["hazards"],
        "inputs": [
            {"name": Path(source["path"]).name} | {k: source[k] for k in kept if k in source}
            for source in manifest.get("inputs") or []
        ],
        "clips": sorted(clips, key=lambda clip: (order.index(clip["split"]), clip["clip"])),
    }


def _split(name: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    """A split of the manifest, whose frames fall into five cells; `silence` is supervised for at least one head."""
    heads = {}
    for head in HEADS:
        gaps = dict(counts[f"{head}_gaps"])  # seconds -> how often
        bins, _ = np.histogram(list(gaps), [*GAP_EDGES, np.inf], weights=list(gaps.values()))
        median = statistics.median_low(Counter(gaps).elements()) if gaps else None
        own = {"positives": counts[f"{head}_positive"], "median": median, "gaps": bins.astype(int).tolist()}
        heads[head] = own | {key: counts[f"{head}_{key}"] for key in ("frames", "supervised")}
    both = counts["both_positive"]
    speak_only, dst_only = (counts[f"{head}_positive"] - both for head in HEADS)
    return {
        "name": name,
        **{key: counts[key] for key in ("clips", "recordings", "frames", "hours", "drops")},
        "speak_only": speak_only,
        "dst_only": dst_only,
        "both": both,
        "silence": counts["supervised"] - both - speak_only - dst_only,
        "not_sampled": counts["frames"] - counts["supervised"],
        "first": counts["first_frame_positive"],
        "rates": counts["neg_rates"],
        "heads": heads,
    }


def _clips(folder: Path, max_clips: int) -> Iterator[dict[str, Any]]:
    """Clips of all splits in turn, so that a page cut short has lost from each."""

    def views(rows: list[tuple[str, str, int]]) -> Iterator[ClipView]:
        for (split, part), wanted in groupby(rows, key=lambda row: row[:2]):
            yield from read_clips(folder, split, part, [clip for *_, clip in wanted])

    rows = clip_index(folder).select("split", "part", "clip").rows()
    by_split = [list(of_split) for _, of_split in groupby(rows, key=lambda row: row[0])]
    for clips in zip_longest(*map(views, spread(by_split, max_clips))):
        yield from (clip_data(view) for view in clips if view)


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
    """A clip's labels, turns and states; a turn is [role, text, start, end, seconds, updates, note, state after it]."""
    row, states = view.row, states_of(view.row)
    turns = []
    for turn, state in list(zip(row["turns"], states[1:], strict=True))[:MAX_TURNS]:
        start, end = turn["start_frame"], turn["end_frame"]
        updates = [[short(u["id"]), u["transition"]] for u in turn["updates"][:100]]
        shown = [turn["role"], short(turn["text"]), start, end, turn_seconds(row, turn), updates, turn_note(row, turn)]
        turns.append([*shown, short(state_line(state)) if updates else ""])
    return {
        "id": short(row["clip_id"]),
        "split": view.split,
        "clip": row["clip"],
        "recording": short(row["recording_id"]),
        "goal": short(row["goal"] or ""),
        "fps": row["fps"],
        "start": row["start_frame"],
        "frames": row["num_frames"],
        "initial": short(state_line(states[0])) if row["steps"] else "",
        "steps": [[short(step["id"]), short(step["name"])] for step in row["steps"][:100]],
        "turns": turns,
        "more_turns": max(0, len(row["turns"]) - MAX_TURNS),
        "labels": run_lengths(view.speaking[:MAX_FRAMES], view.dst[:MAX_FRAMES]),
    }


def run_lengths(speaking: np.ndarray, dst_update: np.ndarray) -> str:
    """Labels [F] of both heads as 'a2e7i': a letter and, above 1, how often it repeats.

    The letter is abc def ghi[3 * rank(speaking) + rank(dst_update)], ranks 0 positive, 1 supervised, 2 not sampled.
    """
    ranks = [np.select([labels == 1, labels == NOT_SAMPLED], [0, 2], 1) for labels in (speaking, dst_update)]
    letters = (ord("a") + 3 * ranks[0] + ranks[1]).astype(np.uint8).tobytes().decode()
    return re.sub(r"(.)\1+", lambda run: f"{run[1]}{len(run[0])}", letters)
