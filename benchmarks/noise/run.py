"""How narrow is the answer's interval for the CPU time it takes? One setting of training on data sets of known effect.

    uv run python benchmarks/noise/run.py --work WORK --steps 300 --seeds 2                    # as README had it
    uv run python benchmarks/noise/run.py --work WORK --steps 200 --seeds 3 --optimizer muon   # as many CPU seconds

Data as of `benchmark synth` (300 recordings to train on, 40 to test on, only the state tells when to speak), once per
data seed; the question's two arms, speak+dst and speak. What is finished in WORK is kept. Prints a table row per data
seed; results.md beside this file is written by hand from such rows.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.synth import SynthConfig, synth
from trainer.benchmark import benchmark
from trainer.config import Settings, TrainConfig
from trainer.demo import RECORDINGS
from trainer.evaluation.comparison import read_benchmark
from trainer.plan import Plan

ARMS = ("speak", "speak+dst")
WINDOW = Settings(early_s=1, late_s=1)


def made_data(folder: Path, seed: int) -> Path:
    raw, data = folder / "raw", folder / "data"
    if not raw.exists():
        synth(raw, SynthConfig(recordings=RECORDINGS, views=1, tells={"state": 1.0}, seed=seed))
    preprocess([raw], data, Options(frames_root=str(raw), positive="onset"))
    return data


def row(work: Path, data_seed: int, config: TrainConfig, seeds: int) -> str:
    """| data seed | difference | half-width | always-valid half-width | F1 by seed of both arms | CPU s |"""
    out = work / f"data-{data_seed}" / f"{config.optimizer}-{config.steps}-{config.lr:g}"
    data, began = made_data(out.parent, data_seed), time.process_time()
    benchmark(Plan(data, out, ARMS, tuple(range(seeds)), config, WINDOW, jobs=1), lambda line: print(line, flush=True))
    bench = read_benchmark(out)
    found = bench.comparison("speak+dst", "speak", "free-running", "event_f1")
    half, always = (
        "-" if found[low] is None else f"{(found[high] - found[low]) / 2:.3f}"
        for low, high in (("low", "high"), ("always_low", "always_high"))
    )
    f1s = ["; ".join(f"{f1:.3f}" for f1 in bench.of_seeds(arm, "free-running", "speaking.events.f1")) for arm in ARMS]
    cells = [str(data_seed), f"{found['difference']:+.3f}", half, always, *f1s, f"{time.process_time() - began:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=int, nargs="+", default=[0, 1, 2], help="seeds of the data")
    parser.add_argument("--seeds", type=int, default=2, help="of training")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--optimizer", default="adamw")
    asked = parser.parse_args()
    config = TrainConfig(steps=asked.steps, lr=asked.lr, optimizer=asked.optimizer)
    rows = [row(asked.work, seed, config, asked.seeds) for seed in asked.data]
    print("| data seed | difference | half-width | always valid | speak | speak+dst | CPU s |\n" + "|---" * 7 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
