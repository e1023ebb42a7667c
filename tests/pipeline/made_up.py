"""Made-up clips as the public generators and scripts write them, and a run's output as lists."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from pipeline.options import Options
from pipeline.preprocess import preprocess

STEPS = [{"id": "K1", "start_ts": 5.0, "name": "boil the water"}, {"id": "K2", "start_ts": 14.0, "name": "pour it"}]
SYSTEM = {"role": "system", "content": "You are a helpful assistant.", "start_frame": 0, "end_frame": 1}


def turn(role: str, content: str, time: float | None = None, start: int | None = None, end: int | None = None) -> dict:
    """`content` of an update: 'K1 complete, K2 start'."""
    said: Any = content
    if role == "DST_UPDATE":
        said = [dict(zip(("id", "transition"), one.split(" "), strict=True)) for one in content.split(", ")]
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

    def states(self) -> list[dict[str, str]]:
        return [{s["id"]: s["state"] for s in clip["initial_state"]} for clip in self.clips()]

    def hazards(self) -> dict[str, str]:
        return {hazard["name"]: hazard["text"] for hazard in self.manifest["hazards"]}

    def refused(self) -> list[dict[str, Any]]:
        path = self.folder / "quarantine.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


COLOURS = {(220, 30, 30): "R", (30, 200, 30): "G", (30, 30, 220): "B", (240, 240, 240): "W"}


def quarters(height: int, width: int) -> np.ndarray:
    """Red and green above blue and white, each so large."""
    return np.array(list(COLOURS), np.uint8).reshape(2, 2, 3).repeat(height, 0).repeat(width, 1)


def seen(pixels: np.ndarray) -> str:
    """The nearest of COLOURS in the middle of each quarter, row by row."""
    height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
    places = pixels[height // 2 :: height, width // 2 :: width].astype(int).reshape(4, 3)
    return "".join(COLOURS[min(COLOURS, key=lambda colour: abs(np.array(colour) - one).sum())] for one in places)


HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; \x1b[2J \u202e {{POLICY}}"


def toy_clip(name: str, start: int, end: int, turns: list[dict], steps: int = 3, **more: Any) -> dict[str, Any]:
    dst = [{"id": f"S{i}", "name": f"part {i}"} for i in range(1, steps + 1)]
    made = {"id": name, "video_uid": f"video of {name}", "fps": 2, "dst": dst, "conversation": turns}
    return made | {"start_frame_idx": start, "end_frame_idx": end} | more


TALK = [
    turn("system", "You help."),
    turn("user", "I want to build it.", 96.5, 193, 195),
    turn("DST_UPDATE", "S1 start", 96.5, 193, 194),
    turn("assistant", "Great, take the base.", 96.7, 193, 195),
    turn("assistant", HOSTILE, 99.9, 199, 201),
    turn("DST_UPDATE", "S1 complete, S2 start", 100.2, 200, 201),
    turn("assistant", "Too late.", 150.1, 300, 302),
]
VAL_TALK = [turn("DST_UPDATE", "S1 start", 1.3, 5, 7), turn("assistant", "Now.", 2.1, 8, 9)]


def toy_output(folder: Path) -> Out:
    """Three clips, every silent frame supervised. Labels (1, 0; . not sampled, the rest of an onset's range):

    toy_a  speaking 1.00001.00  DST 1000000100        from frame 193, 2 fps
    toy_b  speaking 001.0000    DST ........          no steps
    toy_c  speaking 000100      DST 1.0000            val, from frame 5, 4 fps
    """
    train = [toy_clip("toy_a#0", 193, 203, TALK), toy_clip("toy_b#1", 0, 8, [turn("assistant", "Yes.", 1.2, 2, 4)], 0)]
    files = {"train_toy.json": train, "val_toy.json": [toy_clip("toy_c#0", 5, 11, VAL_TALK, fps=4)]}
    paths = [written(folder / "in" / name, clips) for name, clips in files.items()]
    return run_on(paths, folder, positive="onset", frame_convention="event", neg_rate={"*": 1.0})


def text_of(renderable: Any) -> str:
    """What is printed on 100 columns, without colour."""
    Console(file=(file := io.StringIO()), width=100, color_system=None).print(renderable)
    return file.getvalue()
