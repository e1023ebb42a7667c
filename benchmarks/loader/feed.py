"""How many tokens a second one core makes ready for training: label, tokenise, pack, and read cached features.

A card eats a known number of tokens a second (256M at 25% of an H100: 283,000), so this says how many workers feed it.
Clips are `benchmarks/preprocess/generate.py`'s (258 to 1,200 frames, 28 to 164 turns), the tokenizer is tiny's, a
feature file per video is noise; all of it lies in memory (`--work`, /dev/shm by default), as a warm page cache would.
CPU seconds of one process and one thread; the last column is those of a DataLoader worker and the process that gets its
packs, through shared memory, together.

    uv run --group bench python benchmarks/loader/feed.py       # minutes, 1.5 GB below --work; prints a table (feed.md)

    D length of a feature    k = 1 token per frame
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.preprocess import generate  # noqa: E402
from pipeline.dataset import Split  # noqa: E402
from trainer.config import TrainConfig  # noqa: E402
from trainer.features import CachedFeatures, feature_path, write_features  # noqa: E402
from trainer.loader import StepData, step_packs  # noqa: E402
from trainer.tokenizer import train_tiny_tokens  # noqa: E402

MARK = "PROSPECT_DST_FEED"
SIDES = {"no frames": 0, "connector's features, D = 576": 576, "the tower's features, D = 12,288": 12_288}


class NoFrames:
    def load(self, clip: Any, start: int, end: int) -> np.ndarray:
        return np.zeros((end - start, 1, 0), np.float16)


def shards(work: Path, clips: int) -> Path:
    source, out = work / "train_made.json", work / "shards"
    generate.write(source, clips)
    tool = str(Path(sys.executable).with_name("prospect-dst"))
    subprocess.run([tool, "preprocess", str(source), "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
    return out


def features(folder: Path, split: Split, width: int) -> CachedFeatures:
    """A file of noise for every video."""
    ends: dict[tuple[str, float], int] = {}
    for clip in split.in_order(rate=None):
        video = clip.video_uid, clip.fps
        ends[video] = max(ends.get(video, 0), clip.end_frame)
    noise = np.random.default_rng(0).standard_normal((64, 1, width), np.float32).astype(np.float16)
    for (video, fps), end in ends.items():
        about = {"model": "noise", "fingerprint": "0" * 16, "k": 1, "layer": "vision"}
        values = noise[np.arange(end) % len(noise)]
        write_features(feature_path(folder, video, fps), about, np.arange(end, dtype=np.int32), values)
    return CachedFeatures(folder, "0" * 16)


def in_process(data: StepData, steps: int) -> tuple[float, float, float]:
    """(tokens / CPU-s, frames / CPU-s, frames / tokens) of making packs with their frames, after one step's warm-up."""
    tokens = frames = 0
    for step in range(steps + 1):
        if step == 1:
            tokens, frames, began = 0, 0, time.process_time()
        for pack in data[step]:
            pack = pack.loaded()
            tokens, frames = tokens + len(pack.input_ids), frames + pack.labels.shape[1]
    took = time.process_time() - began
    return tokens / took, frames / took, frames / tokens


def from_worker(data: StepData, steps: int) -> float:
    """tokens / CPU-s of a worker and this process together: making packs, sending and receiving them. (Two steps' work
    falls before the count begins.)"""
    coming: Iterator[Any] = step_packs(data, 0, 1)
    tokens = 0
    with closing(coming):
        for step in range(steps + 1):
            packs = next(coming)
            if step == 0:
                began = cpu_seconds()
            else:
                tokens += sum(len(pack.input_ids) for pack in packs)
        return tokens / (cpu_seconds() - began)


def cpu_seconds() -> float:
    """Of this process and those that it has started, also through the fork server: they have its environment."""
    ticks, mark = 0, f"{MARK}={os.getpid()}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes() or folder.name == str(os.getpid()):
                ticks += sum(map(int, (folder / "stat").read_text().rpartition(")")[2].split()[11:13]))
        except OSError:  # it has ended
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--steps", type=int, default=12, help="of 16 clips")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ[MARK] = str(os.getpid())
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        split = Split(shards(work, options.clips), "train")
        tokens = train_tiny_tokens(split.texts())
        config = TrainConfig(steps=options.steps + 3, warmup_steps=0, micro_batch_tokens=16_384, max_tokens=8192)
        print("| frames | tokens / CPU-s | frames / CPU-s | tokens that are frames | tokens / CPU-s through a worker |")
        print("|---|---:|---:|---:|---:|")
        for name, width in SIDES.items():
            source = features(work / f"features-{width}", split, width) if width else NoFrames()
            data = StepData(split, tokens, source, config)
            found = [in_process(data, options.steps) for _ in range(options.reps)]
            made, seen, share = (statistics.median(column) for column in zip(*found, strict=True))
            low, high = min(f[0] for f in found), max(f[0] for f in found)
            sent = statistics.median(from_worker(data, options.steps) for _ in range(options.reps))
            print(f"| {name} | {made:,.0f} ({low:,.0f}-{high:,.0f}) | {seen:,.0f} | {share:.0%} | {sent:,.0f} |")


if __name__ == "__main__":
    main()
