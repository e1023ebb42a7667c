"""How well can the demo's question be answered without seeing? Trains as the demo does, with every frame grey.

    uv run prospect-dst demo && uv run python benchmarks/blind/run.py demo

What is left are the texts in the context and their timing. A head must beat this, not only chance, before one may
say that it has learned to see. Takes as long as the demo's training (some two minutes on two cores).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from pipeline.media import count_frames
from pipeline.schema import HEADS
from pipeline.synth import write_frames
from trainer.config import TrainConfig
from trainer.evaluate import evaluate
from trainer.train import train


def main(demo: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        grey, run = Path(scratch) / "grey", Path(scratch) / "run"
        (grey / "frames").mkdir(parents=True)
        for video in sorted((demo / "raw" / "frames").glob("*.arrow")):
            count = count_frames(video) or 0
            write_frames(grey / "frames" / video.name, np.full((count, 64, 64, 3), 128, np.uint8))
        train(demo / "data", run, TrainConfig(), grey)
        found = evaluate(run, demo / "data", "test", frames_root=grey, live=False).metrics["teacher-forced"]
    for head in HEADS:
        frames = found[head]["frames"]
        print(f"{head}: average precision {frames['ap']:.3f} without seeing, by chance {frames['chance']:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
