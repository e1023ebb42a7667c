"""Made-up clips as the public generators and scripts write them, and a run's output as lists."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.options import Options
from pipeline.preprocess import preprocess

STEPS = [{"id": "K1", "start_ts": 5.0, "name": "boil the water"}, {"id": "K2", "start_ts": 14.0, "name": "pour it"}]
SYSTEM = {"role": "system", "content": "You are a helpful assistant.", "start_frame": 0, "end_frame": 1}


def turn(role: str, content: str, time: float | None = None, start: int | None = None, end: int | None = None) -> dict:
    """`content` of an update: 'K1 start'."""
    step, _, transition = content.partition(" ")
    said = [{"id": step, "transition": transition}] if role == "DST_UPDATE" else content
    made = {"role": role, "content": said, "time": time, "start_frame": start, "end_frame": end}
    return {name: value for name, value in made.items() if value is not None}


# Lead-in turns, from turn to turn; speaking at 3, 9, 18, 27, 41 and updates at 9, 27, 35 (each range's last frame).
TEA = [
    turn("user", "How do I make tea?", 2.0, 0, 4),
    turn("assistant", "Fill the kettle.", 2.0, 4, 4),
    turn("DST_UPDATE", "K1 start", 5.0, 4, 10),
    turn("assistant", "Switch it on.", 5.0, 10, 10),
    turn("assistant", "Wait for the click.", 9.5, 10, 19),
    turn("DST_UPDATE", "K1 complete", 14.0, 19, 28),
    turn("DST_UPDATE", "K2 start", 14.0, 28, 28),
    turn("assistant", "Pour.", 14.0, 28, 28),
    turn("DST_UPDATE", "K2 complete", 18.0, 28, 36),
    turn("assistant", "Enjoy.", 21.0, 36, 42),
]


def tea(turns: list[dict[str, Any]], start: int | None = None, end: int | None = None, **more: Any) -> dict[str, Any]:
    """A generated clip of these turns; bounds only where given."""
    bounds = {"start_frame_idx": start, "end_frame_idx": end}
    clip = {"video_uid": "kitchen-1", "dataset": "d", "clip_idx": 0, "fps": 2, "id": "t1", "dst": STEPS}
    clip |= {name: value for name, value in bounds.items() if value is not None}
    return clip | {"conversation": [SYSTEM, *turns]} | more


def proassist(uid: str = "cup-1", **metadata: Any) -> dict[str, Any]:
    """A prepared clip of 16 frames: it speaks at 8 and 15."""
    marks = [{"role": "frames", "start": a, "end": b} for a, b in ((0, 5), (5, 9), (9, 16))]
    asked, told = turn("user", "What now?", 2.6), turn("assistant", "Wash it.", 4.6)
    turns = [turn("system", "Be proactive."), marks[0], asked, marks[1], told, marks[2], turn("assistant", "Done.")]
    about = {"user_type": "no_talk", "user_id": "no_talk_0", "task_goal": "wash a cup", "knowledge": "soap first"}
    clip = {"dataset": "wtag", "video_uid": uid, "clip_idx": 0, "frames_file": f"frames/{uid}.arrow", "fps": 2}
    clip |= {"start_frame_idx": 0, "end_frame_idx": 16, "conversation": turns}
    return clip | {"metadata": about | {"summary_only": False, "add_knowledge": True} | metadata}


@dataclass
class Out:
    manifest: dict[str, Any]
    folder: Path

    def frames(self, split: str = "train") -> pl.DataFrame:
        return pl.read_parquet(self.folder / f"frames/split={split}/*.parquet", hive_partitioning=False)

    def clips(self, split: str = "train") -> list[dict[str, Any]]:
        return pl.read_parquet(self.folder / f"clips/split={split}/*.parquet", hive_partitioning=False).to_dicts()

    def labels(self, split: str = "train", clip: int = 0) -> dict[str, dict[int, int]]:
        """Per head frame -> label."""
        rows = self.frames(split).filter(pl.col("clip") == clip)
        heads = ("speaking", "dst_update")
        return {h: dict(zip(rows["frame"].to_list(), rows[f"{h}_label"].to_list(), strict=True)) for h in heads}

    def ones(self, split: str = "train", clip: int = 0) -> tuple[list[int], list[int]]:
        """Frames labelled 1 of either head."""
        speaking, dst = ([f for f, x in head.items() if x == 1] for head in self.labels(split, clip).values())
        return speaking, dst

    def bounds(self, split: str = "train") -> list[tuple[int, int]]:
        return [(clip["start_frame"], clip["end_frame"]) for clip in self.clips(split)]

    def states(self, split: str = "train") -> list[dict[str, str]]:
        return [{s["id"]: s["state"] for s in clip["initial_state"]} for clip in self.clips(split)]

    def hazards(self) -> dict[str, str]:
        return {hazard["name"]: hazard["text"] for hazard in self.manifest["hazards"]}

    def refused(self) -> list[dict[str, Any]]:
        path = self.folder / "quarantine.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def written(path: Path, clips: list[dict[str, Any]]) -> Path:
    """An array, or lines where the name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, clips)) if lines else json.dumps(clips))
    return path


def run(folder: Path, clips: list[dict[str, Any]], name: str = "train.json", **options: Any) -> Out:
    return run_on([written(folder / "in" / name, clips)], folder, **options)


def run_on(inputs: list[Path], folder: Path, **options: Any) -> Out:
    manifest, _ = preprocess(inputs, folder / "out", Options(**options))
    return Out(manifest, folder / "out")
