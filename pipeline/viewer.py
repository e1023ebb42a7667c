"""The HTML viewer: one self-contained page (viewer.html) for `inspect --html` and `stream --html`.

The template holds style and script, without libraries and without network; Python adds one block of JSON. Text from the
data reaches the page as JSON and is set with `textContent`, never as markup, and a content policy with the script's own
hash lets nothing else run. Labels are run-length coded: about 1 byte a frame at rate 0.5.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import polars as pl

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from pipeline.schema import HEADS, NOT_SAMPLED
from pipeline.storage import write_text
from pipeline.terminal import plain
from pipeline.timeline import clip_index, state_line, states_of, turn_note, turn_seconds

MAX_CLIPS: Final = 200  # shown, evenly spaced, at least one of each split
GAP_EDGES: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # seconds; the last bin is open


def write_page(path: Path, title: str, data: Mapping[str, Any]) -> None:
    """Write a page as a whole: `data` is JSON of one of the two kinds that viewer.html shows. ValueError on NaN."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; --html wants the name of a file, e.g. {path}/page.html")
    environment = jinja2.Environment(loader=jinja2.PackageLoader("pipeline", "."), autoescape=True)
    page = environment.get_template("viewer.html").render(title=plain(title), policy="\1", data="\0")
    policy = "default-src 'none'; img-src data:"
    for tag in ("script", "style"):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[0]
        policy += f"; {tag}-src 'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
    coded = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        coded = coded.replace(sign, f"\\u{ord(sign):04x}")
    write_text(path, page.replace("\1", policy).replace("\0", coded))


def labels_page(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Data of the page of an output folder, as JSON types; `manifest`: what `dataset.verify` gave."""
    recordings = pl.scan_parquet(folder / "clips" / "**" / "*.parquet").select(pl.col("recording_id").n_unique())
    kept = ("clips", "quarantined", "frame_convention", "sha256")
    index, clips = clip_index(folder), []
    every = -(-index.height // MAX_CLIPS)
    for (name,), rows in index.group_by("split", maintain_order=True):
        split = Split(folder, str(name))
        clips += [_clip(split.name, split.clip(number)) for number in rows["clip"].gather_every(every)]
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
        "clips": clips,
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


def _clip(split: str, clip: ClipExample) -> dict[str, Any]:
    """A clip's labels, turns and states; a turn is [role, text, start, end, seconds, updates, note, state after it]."""
    states, turns = states_of(clip), []
    for turn, state in zip(clip.turns, states[1:], strict=True):
        updates = [[plain(step), transition] for step, transition in turn.updates]
        shown = [turn.role, plain(turn.text), turn.start_frame, turn.end_frame, turn_seconds(clip, turn)]
        turns.append([*shown, updates, turn_note(clip, turn), plain(state_line(state)) if updates else ""])
    return {
        "id": plain(clip.clip_id),
        "split": split,
        "clip": clip.clip,
        "recording": plain(clip.recording_id),
        "goal": plain(clip.goal or ""),
        "fps": clip.fps,
        "start": clip.start_frame,
        "frames": clip.num_frames,
        "initial": plain(state_line(states[0])) if clip.steps else "",
        "steps": [[plain(step), plain(name)] for step, name in clip.steps],
        "turns": turns,
        "labels": run_lengths(*clip.labels),
    }


def run_lengths(speaking: np.ndarray, dst_update: np.ndarray) -> str:
    """Labels [F] of both heads as 'a2e7i': a letter and, above 1, how often it repeats.

    The letter is abc def ghi[3 * rank(speaking) + rank(dst_update)], ranks 0 positive, 1 supervised, 2 not sampled.
    """
    ranks = [np.select([labels == 1, labels == NOT_SAMPLED], [0, 2], 1) for labels in (speaking, dst_update)]
    letters = (ord("a") + 3 * ranks[0] + ranks[1]).astype(np.uint8).tobytes().decode()
    return re.sub(r"(.)\1+", lambda run: f"{run[1]}{len(run[0])}", letters)
