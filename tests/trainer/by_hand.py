"""Builds, without `pipeline`'s writers, what `preprocess` writes and what frames look like: an independent second
opinion on the format. Labels come from DESIGN.md's rules, spelt out frame by frame.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.dataset import ClipExample, Turn
from pipeline.schema import CLIPS, FRAMES, SCHEMA_HASH, SCHEMA_VERSION, draws, rate_threshold, sampling_seed, shard_path
from trainer.tokenizer import MARKERS

STEPS = (("S1", "Put the base down"), ("S2", "Attach the wheel"))
HEADS = {"assistant": 0, "DST_UPDATE": 1}


def turn(role: str, text: str, start: int | None = None, end: int | None = None, *updates: tuple[str, str]) -> Turn:
    return Turn(role, text, start, end, None, updates)


def dst(start: int | None, end: int | None, *updates: tuple[str, str]) -> Turn:
    return turn("DST_UPDATE", ", ".join(f"{i}->{t}" for i, t in updates), start, end, *updates)


def positives(turns: Sequence[Turn], start: int, frames: int, positive: str) -> np.ndarray:
    """bool [2, F]"""
    out = np.zeros((2, frames), bool)
    for t in turns:
        if t.role in HEADS and t.start_frame is not None and t.end_frame is not None:
            last = t.end_frame if positive == "span" else min(t.end_frame, t.start_frame + 1)
            for frame in range(t.start_frame, last):
                if start <= frame < start + frames:
                    out[HEADS[t.role], frame - start] = True
    return out


def labels_by_hand(clip: ClipExample, where: np.ndarray, epoch: int, rate: float) -> np.ndarray:
    """int8 [2, F], one frame and head at a time."""
    out = np.full((2, clip.num_frames), -100, np.int8)
    drawn = draws(clip.sampling_seed, epoch, np.arange(clip.start_frame, clip.end_frame))
    for head, role in enumerate(("assistant", "DST_UPDATE")):
        for i in range(clip.num_frames):
            frame = clip.start_frame + i
            in_rest = clip.positive == "onset" and any(
                t.role == role and t.start_frame is not None and t.start_frame < frame < t.end_frame for t in clip.turns
            )
            if where[head, i]:
                out[head, i] = 1
            elif in_rest:
                out[head, i] = -100
            elif where[1 - head, i] or int(drawn[i]) < rate_threshold(rate):
                out[head, i] = 0
    if not clip.steps and not any(t.role == "DST_UPDATE" for t in clip.turns):
        out[1] = -100
    for first, end in clip.unlabelled:
        out[:, first - clip.start_frame : end - clip.start_frame] = -100
    return out


def clip_example(
    turns: Sequence[Turn] = (),
    start: int = 0,
    frames: int = 8,
    *,
    clip_id: str = "c0",
    clip: int = 0,
    steps: Sequence[tuple[str, str]] = STEPS,
    initial: Sequence[tuple[str, str]] = (),
    rate: float = 0.5,
    positive: str = "span",
    video: str = "v0",
    goal: str | None = None,
    knowledge: str | None = None,
    unlabelled: Sequence[tuple[int, int]] = (),
) -> ClipExample:
    example = ClipExample(
        clip_id=clip_id, clip=clip, video_uid=video, recording_id=video, fps=2.0, start_frame=start,
        num_frames=frames, frames_file=None, goal=goal, knowledge=knowledge, steps=tuple(steps),
        initial_state=tuple(initial), turns=tuple(turns), sampling_seed=sampling_seed(0, clip_id),
        neg_rate=rate, positive=positive, labels=np.zeros((2, 0), np.int8), unlabelled=tuple(unlabelled),
    )  # fmt: skip
    labels = labels_by_hand(example, positives(turns, start, frames, positive), 0, rate)
    return ClipExample(**{**example.__dict__, "labels": labels})


def _clip_table(clips: Sequence[ClipExample]) -> pa.Table:
    def row(clip: ClipExample) -> dict[str, Any]:
        return {name: getattr(clip, name, None) for name in CLIPS.names} | {
            "clip_idx": clip.clip,
            "frame_convention": "event",
            "steps": [{"id": i, "name": name} for i, name in clip.steps],
            "initial_state": [{"id": i, "state": state} for i, state in clip.initial_state],
            "unlabelled": [{"start_frame": a, "end_frame": b} for a, b in clip.unlabelled],
            "turns": [
                {**t._asdict(), "updates": [{"id": i, "transition": what} for i, what in t.updates]} for t in clip.turns
            ],
            "n_speaking": int((clip.labels[0] == 1).sum()),
            "n_dst_update": int((clip.labels[1] == 1).sum()),
            "n_supervised": int((clip.labels != -100).any(0).sum()),
        }

    return pa.Table.from_pylist([row(clip) for clip in clips], schema=CLIPS)


def _frame_table(clips: Sequence[ClipExample]) -> pa.Table:
    def columns(clip: ClipExample) -> dict[str, list[Any]]:
        numbers = list(range(clip.start_frame, clip.end_frame))
        return {
            "clip_id": [clip.clip_id] * len(numbers),
            "clip": [clip.clip] * len(numbers),
            "frame": numbers,
            "time_s": [n / clip.fps for n in numbers],
            "speaking_label": clip.labels[0].tolist(),
            "dst_update_label": clip.labels[1].tolist(),
        }

    return pa.concat_tables(pa.table(columns(c), schema=FRAMES) for c in clips).combine_chunks()


def write_shards(
    out: Path,
    splits: dict[str, Sequence[ClipExample]],
    frames_root: Path | None = None,
    group: int = 256,
    part: int = 2048,
) -> Path:
    """A preprocessed folder: `group` clips per row group, `part` clips per shard."""
    shards = []
    for split, clips in splits.items():
        for number, first in enumerate(range(0, len(clips), part)):
            chosen = clips[first : first + part]
            for table, schema, table_of in (("frames", FRAMES, _frame_table), ("clips", CLIPS, _clip_table)):
                path = out / shard_path(table, split, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                    for i in range(0, len(chosen), group):
                        writer.write_table(table_of(chosen[i : i + group]))
                entry = {"path": path.relative_to(out).as_posix(), "table": table, "split": split, "part": number}
                entry |= {"rows": pq.read_metadata(path).num_rows, "clips": len(chosen), "bytes": path.stat().st_size}
                shards.append(entry | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "schema_hash": SCHEMA_HASH,
        "options": {"frames_root": None if frames_root is None else str(frames_root)},
        "splits": {split: {"clips": len(clips)} for split, clips in splits.items()},
        "shards": shards,
    }
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def grey(value: int) -> np.ndarray:
    return np.full((64, 64, 3), value, np.uint8)


def jpeg(pixels: np.ndarray) -> str:
    """base64 JPEG of uint8 [H, W, 3]"""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return base64.b64encode(buffer.getvalue()).decode()


def write_frames(path: Path, frames: Sequence[np.ndarray], file_format: bool = False) -> Path:
    """Arrow IPC, as datasets' ArrowWriter writes it (stream), or the IPC file format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("frame", pa.string())])
    with (pa.ipc.new_file if file_format else pa.ipc.new_stream)(str(path), schema) as writer:
        for i in range(0, len(frames), 5):
            writer.write_batch(pa.record_batch([[jpeg(f) for f in frames[i : i + 5]]], schema=schema))
    return path


class NoisyFrames:
    """A frame source of noise that depends on video and frame number alone."""

    def __init__(self, side: int = 64) -> None:
        self.side = side

    def load(self, clip: ClipExample, start: int, end: int) -> np.ndarray:
        def frame(number: int) -> np.ndarray:
            seed = sampling_seed(number, clip.video_uid)
            return np.random.default_rng(seed).integers(0, 256, (3, self.side, self.side), np.uint8)

        return np.stack([frame(number) for number in range(start, end)])


class Words:
    """Stands in for trainer.tokenizer.Tokens: one token a word, readable back; F is a frame's token, . the end."""

    def __init__(self) -> None:
        self.words = ["F", "."]
        self.image, self.end = 0, 1
        self.marker = {name: self._id(f"[{name}]") for name in MARKERS}

    def encode(self, text: str) -> list[int]:
        return [self._id(word) for word in text.split()]

    def show(self, ids: Sequence[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def _id(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)
