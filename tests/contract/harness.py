"""Runs `prospect-dst preprocess` in this process and compares what it left with `reference.py`, trusting nothing but
DESIGN.md's file layout."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from reference import Reading, fps_of, rate_of, uid_of

from pipeline.cli import main
from pipeline.schema import sampling_seed

REAL = next((f for p in Path(__file__).parents if (f := p / "shared/real").is_dir()), Path("shared/real"))


@dataclass
class Ran:
    status: int
    err: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.strip()]


def preprocess(*args: object) -> Ran:
    """Status and stderr of the command; an error that escapes is the test's."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = main(["preprocess", "--workers", "1", *map(str, args)])
    assert "this is a bug" not in err.getvalue(), err.getvalue()
    return Ran(status, err.getvalue())


@dataclass
class Shards:
    """A split as it lies on disk: clip rows in order, and per clip its frame rows in order."""

    clips: list[dict]
    frames: list[pl.DataFrame]  # one a clip


def shards(out: Path, split: str = "train") -> Shards:
    """Read a split in file order, checking that part k of both tables holds the same clips."""
    found = Shards([], [])
    paths = sorted((out / "clips" / f"split={split}").glob("part-*.parquet"))
    assert len(paths) == len(list((out / "frames" / f"split={split}").glob("part-*.parquet")))
    for path in paths:
        rows = pl.read_parquet(path, hive_partitioning=False).to_dicts()
        table = pl.read_parquet(out / "frames" / f"split={split}" / path.name, hive_partitioning=False)
        per_clip = table.partition_by("clip", maintain_order=True)
        assert [part["clip"][0] for part in per_clip] == [row["clip"] for row in rows], path
        assert table["clip"].is_sorted(), f"{path}: a clip's frames are not together"
        found.clips += rows
        found.frames += per_clip
    return found


def quarantine(out: Path) -> list[dict]:
    path = out / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def differences(
    found: Shards, readings: list[Reading], *, split: str = "train", positive: str = "span", seed: int = 0, rate=None
) -> list[str]:
    """What is on disk and should not be, over every clip, label, bound, turn's frames, state and count."""
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
    row = {
        "video_uid": uid_of(reading.clip),
        "fps": fps_of(reading.clip),
        "start_frame": reading.start,
        "end_frame": reading.end,
        "num_frames": reading.end - reading.start,
        "n_speaking": labels["speaking"].count(1),
        "n_dst_update": labels["dst_update"].count(1),
        "n_supervised": sum(pair != (-100, -100) for pair in zip(*labels.values(), strict=True)),
        "unlabelled": [{"start_frame": start, "end_frame": end} for start, end in reading.unlabelled],
    }
    return row | ({"clip_id": str(reading.clip["id"])} if "id" in reading.clip else {})


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
    """All turns are there, in order; what labels frames has the frames of its event."""
    roles = ["assistant" if role == "summary" else role for role, _ in reading.turns]
    if [t["role"] for t in turns] != roles:
        return [f"roles {[t['role'] for t in turns]}, not {roles}"]
    return [
        f"turn {i} ({role}): frames {turn['start_frame']}, {turn['end_frame']}, not {span}"
        for i, (turn, (role, span)) in enumerate(zip(turns, reading.turns, strict=True))
        if role in ("assistant", "DST_UPDATE") and (turn["start_frame"], turn["end_frame"]) != (span or (None, None))
    ]
