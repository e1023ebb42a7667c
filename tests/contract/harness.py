"""Runs `prospect-dst preprocess` in this process and reads what it left, trusting nothing but DESIGN.md's file layout.

Labels come back as one numpy array a clip, so that millions of comparisons stay cheap.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from fields import fps_of, goal_of, knowledge_of, pairs, schema_of, steps_of, text
from reference import Reading, rate_of, session_turns, uid_of

from pipeline.cli import main
from pipeline.schema import sampling_seed

REAL = next((f for p in Path(__file__).parents if (f := p / "shared/real").is_dir()), Path("shared/real"))


@dataclass
class Ran:
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


def preprocess(*args: object) -> Ran:
    """Status, stdout and stderr of the command; an error that escapes is the test's."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["preprocess", "--workers", "1", *map(str, args)])
    assert status in (0, 1, 2, 3), err.getvalue()
    assert "this is a bug" not in err.getvalue(), err.getvalue()
    return Ran(status, out.getvalue(), err.getvalue())


@dataclass
class Shards:
    """A split as it lies on disk: clip rows in order, and per clip its frame rows in order."""

    clips: list[dict]
    frames: list[pl.DataFrame]  # one a clip


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
        assert table["clip"].is_sorted(), f"{path}: a clip's frames are not together"
        clips += rows
        frames += per_clip
    return Shards(clips, frames)


def quarantine(out: Path) -> list[dict]:
    path = out / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- comparing with the reference --------------------------------------------------------------------


def differences(
    found: Shards, readings: list[Reading], *, split: str, positive: str, seed: int, rate: float | None
) -> list[str]:
    """What is on disk and should not be, over every clip, label, bound, turn, state and count."""
    if len(found.clips) != len(readings):
        return [f"{len(found.clips)} clips on disk, {len(readings)} expected"]
    ids = [row["clip_id"] for row in found.clips]
    wrong = ["a clip_id twice"] * (len(set(ids)) < len(ids))
    wrong += ["positions are not 0, 1, 2..."] * ([r["clip"] for r in found.clips] != list(range(len(ids))))
    for row, frames, reading in zip(found.clips, found.frames, readings, strict=True):
        own_rate = rate_of(reading.clip, split, rate)
        labels = reading.expected(row["clip_id"], seed, own_rate)
        expected = {"positive": positive, "neg_rate": own_rate, "sampling_seed": sampling_seed(seed, row["clip_id"])}
        expected |= expected_row(reading, labels)
        state = {step["id"]: step["state"] for step in row["initial_state"] if step["state"] != "not_started"}
        at = f"file {reading.file} clip {reading.index} ({reading.convention})"
        wrong += [f"{at}: {k} is {row[k]!r}, not {v!r}" for k, v in expected.items() if row[k] != v]
        wrong += [f"{at}: {what}" for what in frame_differences(frames, reading, row["clip_id"], labels)]
        wrong += [f"{at}: {what}" for what in turn_differences(row["turns"], reading)]
        wrong += [f"{at}: state {state}, not {reading.state}"] * (state != reading.state)
    return wrong


def expected_row(reading: Reading, labels: dict[str, list[int]]) -> dict:
    clip = reading.clip
    row = {
        "video_uid": uid_of(clip),
        "fps": fps_of(clip),
        "start_frame": reading.start,
        "end_frame": reading.end,
        "num_frames": reading.end - reading.start,
        "frames_file": clip.get("video_path", clip.get("frames_file")),
        "n_speaking": labels["speaking"].count(1),
        "n_dst_update": labels["dst_update"].count(1),
        "n_supervised": sum(pair != (-100, -100) for pair in zip(*labels.values(), strict=True)),
        "steps": steps_of(clip),
        "goal": goal_of(clip),
        "knowledge": knowledge_of(clip),
        "unlabelled": [{"start_frame": start, "end_frame": end} for start, end in reading.unlabelled],
    }
    if schema_of(clip) == "prospect":
        row |= {"frame_convention": reading.convention, "dataset": text(clip.get("dataset")) or "unknown"}
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
    if not np.allclose(frames["time_s"].to_numpy(), numbers / fps_of(reading.clip), rtol=1e-6, atol=0):
        wrong.append("time_s is not frame / fps")
    for head, right in labels.items():
        bad = np.flatnonzero(frames[f"{head}_label"].to_numpy() != np.array(right))
        if len(bad):
            wrong.append(f"{head}: {len(bad)} labels are wrong, the first at {numbers[bad[0]]}: not {right[bad[0]]}")
    return wrong


def turn_differences(turns: list[dict], reading: Reading) -> list[str]:
    if schema_of(reading.clip) == "egoproactive":
        source = [(role, said, [], time) for role, said, time, _ in session_turns(reading.clip)]
    else:
        source = []
        for turn in reading.clip["conversation"]:
            changes = pairs(turn["content"]) if turn["role"] == "DST_UPDATE" else []
            said = turn.get("content") if isinstance(turn.get("content"), str) else ""
            said = ", ".join(f"{step}->{transition}" for step, transition in changes) or said
            updates = [{"id": step, "transition": transition} for step, transition in changes]
            source += [(turn["role"], said, updates, turn.get("time"))] * (turn["role"] != "frames")
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
