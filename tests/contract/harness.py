"""Runs `prospect-dst preprocess` and reads what it left, trusting nothing but DESIGN.md's file layout.

In-process (the command's own `main` with sys.argv, about 50 ms a run) or as a subprocess with limits on
memory and time. Labels come back as one numpy array a clip, so that 16 million comparisons stay cheap.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from fields import goal_of, knowledge_of, pairs, steps_of, text
from reference import Reading, rate_of, session_turns, uid_of

from pipeline.schema import sampling_seed

HEADS = ("speaking", "dst_update")
REAL = Path(__file__).resolve().parents[2].parent / "shared" / "real"


@dataclass
class Ran:
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


def preprocess(*args: object) -> Ran:
    """Status, stdout and stderr of the command, run in this process; -1 for an escaped exception."""
    from trainer.cli import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["prospect-dst", "preprocess", *map(str, args)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main() or 0  # type: ignore[func-returns-value]
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        status = -1
        err.write(traceback.format_exc())
    finally:
        sys.argv = argv
    return Ran(status, out.getvalue(), err.getvalue())


@dataclass
class Shards:
    """A split as it lies on disk: clip rows in order, and per clip its frame rows in order."""

    clips: list[dict]
    frames: list[pl.DataFrame]  # one a clip
    parts: int


def shards(out: Path, split: str = "train") -> Shards:
    """Read a split in file order, checking that part k of both tables holds the same clips."""
    clips: list[dict] = []
    frames: list[pl.DataFrame] = []
    paths = sorted((out / "clips" / f"split={split}").glob("part-*.parquet"))
    assert len(paths) == len(list((out / "frames" / f"split={split}").glob("part-*.parquet")))
    for path in paths:
        rows = pl.read_parquet(path, hive_partitioning=False).to_dicts()
        table = pl.read_parquet(out / "frames" / f"split={split}" / path.name, hive_partitioning=False)
        per_clip = table.partition_by("clip", maintain_order=True)
        assert [part["clip"][0] for part in per_clip] == [row["clip"] for row in rows], path
        runs = table.select((pl.col("clip").diff() != 0).sum()).item() or 0
        assert runs == len(rows) - 1, f"{path}: a clip's frames are not together"
        clips += rows
        frames += per_clip
    return Shards(clips, frames, len(paths))


def quarantine(out: Path) -> list[dict]:
    path = out / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- comparing with the reference --------------------------------------------------------------------


def told(turn: dict) -> tuple[str, list[dict]]:
    """Text and updates of a source turn, as the clips table's column docs describe them."""
    if turn["role"] != "DST_UPDATE":
        return turn["content"] if isinstance(turn["content"], str) else "", []
    updates = [{"id": step, "transition": transition} for step, transition in pairs(turn["content"])]
    return ", ".join(f"{u['id']}->{u['transition']}" for u in updates), updates


def differences(
    found: Shards, readings: list[Reading], *, split: str, positive: str, seed: int, rate: float | None
) -> tuple[list[str], int]:
    """(What is on disk and should not be, frames compared), over every clip, label, bound and count."""
    wrong: list[str] = []
    if len(found.clips) != len(readings):
        return [f"{len(found.clips)} clips on disk, {len(readings)} expected"], 0
    ids = [row["clip_id"] for row in found.clips]
    wrong += [f"clip_id {i} twice" for i, n in Counter(ids).items() if n > 1]
    wrong += ["positions are not 0, 1, 2..."] * ([r["clip"] for r in found.clips] != list(range(len(ids))))
    total = 0
    for row, frames, reading in zip(found.clips, found.frames, readings, strict=True):
        own_rate = rate_of(reading.clip, split, rate)
        labels = reading.expected(row["clip_id"], seed, own_rate)
        options = {"positive": positive, "seed": seed, "rate": own_rate}
        expected = expected_row(reading, labels, clip_id=row["clip_id"], **options)
        at = f"file {reading.file} clip {reading.index} ({reading.convention})"
        wrong += [f"{at}: {k} is {row[k]!r}, not {v!r}" for k, v in expected.items() if row[k] != v]
        wrong += [f"{at}: {what}" for what in frame_differences(frames, reading, row["clip_id"], labels)]
        wrong += [f"{at}: {what}" for what in turn_differences(row["turns"], reading)]
        state = {step["id"]: step["state"] for step in row["initial_state"] if step["state"] != "not_started"}
        wrong += [f"{at}: state {state}, not {reading.state}"] * (state != reading.state)
        total += reading.end - reading.start
    return wrong, total


def expected_row(
    reading: Reading, labels: dict[str, list[int]], *, positive: str, seed: int, rate: float, clip_id: str
) -> dict:
    clip = reading.clip
    both = list(zip(labels["speaking"], labels["dst_update"], strict=True))
    row = {
        "video_uid": uid_of(clip),
        "fps": reading.fps,
        "start_frame": reading.start,
        "end_frame": reading.end,
        "num_frames": reading.end - reading.start,
        "frames_file": clip.get("video_path", clip.get("frames_file")),
        "sampling_seed": sampling_seed(seed, clip_id),
        "neg_rate": rate,
        "positive": positive,
        "n_speaking": labels["speaking"].count(1),
        "n_dst_update": labels["dst_update"].count(1),
        "n_supervised": sum(pair != (-100, -100) for pair in both),
        "steps": steps_of(clip),
        "goal": goal_of(clip),
        "knowledge": knowledge_of(clip),
        "unlabelled": [{"start_frame": start, "end_frame": end} for start, end in reading.unlabelled],
    }
    if reading.schema == "prospect":
        row["frame_convention"] = reading.convention
        row["dataset"] = text(clip.get("dataset")) or "unknown"
    if clip.get("id") is not None:
        row["clip_id"] = str(clip["id"])
    if clip.get("clip_idx") is not None:
        row["clip_idx"] = clip["clip_idx"]
    return row


def frame_differences(frames: pl.DataFrame, reading: Reading, clip_id: str, labels: dict) -> list[str]:
    numbers = np.arange(reading.start, reading.end)
    if frames["frame"].to_list() != numbers.tolist():
        return [f"frames {frames['frame'].to_list()[:3]}..., expected {numbers[:3]}... ({len(numbers)})"]
    wrong = [f"frames carry clip_id {i!r}" for i in frames["clip_id"].unique() if i != clip_id]
    if not np.allclose(frames["time_s"].to_numpy(), numbers / reading.fps, rtol=1e-6, atol=0):
        wrong.append("time_s is not frame / fps")
    for head in HEADS:
        disk, right = frames[f"{head}_label"].to_numpy(), np.array(labels[head])
        bad = np.flatnonzero(disk != right)
        if len(bad):
            i = bad[0]
            wrong.append(f"{head} {len(bad)} wrong, first at {numbers[i]}: {disk[i]}, not {right[i]}")
    return wrong


def turn_differences(turns: list[dict], reading: Reading) -> list[str]:
    if reading.schema == "egoproactive":
        source = [(role, said, [], time) for role, said, time, _ in session_turns(reading.clip)]
    else:
        given = [t for t in reading.clip["conversation"] if t["role"] != "frames"]
        source = [(t["role"], *told(t), t.get("time")) for t in given]
    if [t["role"] for t in turns] != [role for role, *_ in source]:
        return [f"roles {[t['role'] for t in turns]}, not {[role for role, *_ in source]}"]
    wrong = []
    for i, (turn, right, (role, span)) in enumerate(zip(turns, source, reading.turns, strict=True)):
        found = (turn["role"], turn["text"], turn["updates"], turn["time_s"])
        wrong += [f"turn {i}: {found}, not {right}"] * (found != right)
        frames = (turn["start_frame"], turn["end_frame"])
        if role in ("assistant", "DST_UPDATE") and frames != (span or (None, None)):
            wrong.append(f"turn {i} ({role}): frames {frames}, not {span}")
    return wrong
