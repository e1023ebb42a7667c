"""What a benchmark was asked to do: its plan, its runs' folders, and the commands that do the same by hand."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.arms import ARMS
from trainer.config import Settings, TrainConfig

Job = tuple[str, int]  # (arm, seed)


@dataclass(frozen=True)
class Plan:
    """What a benchmark is a function of, with its data."""

    data: Path
    out: Path
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    config: TrainConfig = field(default_factory=TrainConfig)  # of all arms; its arm and seed are not used
    settings: Settings = field(default_factory=Settings)
    split: str = "test"
    frames_root: Path | None = None
    features: Path | None = None
    live: bool = True  # also free-running
    draws: int = 10_000  # of the recordings
    margin: float = 0.05  # of event F1: smaller differences do not matter; settled before any run
    jobs: int = 0  # runs at a time; 0: one per GPU, without any one per core
    command: str = ""  # that asked for it, for the report
    hazards: tuple[str, ...] = ()  # of the data, for the report


def run_of(plan: Plan, job: Job) -> Path:
    """OUT/runs/ARM/seed-S."""
    return plan.out / "runs" / job[0] / f"seed-{job[1]}"


def config_of(plan: Plan, job: Job) -> TrainConfig:
    return replace(plan.config, arm=job[0], seed=job[1])


def commands_of(plan: Plan, job: Job) -> list[str]:
    """The two commands that do what `carry_out` does."""
    run, data = str(run_of(plan, job)), str(plan.data)
    sources = {"--frames-root": plan.frames_root, "--features": plan.features}
    more = [word for option, path in sources.items() if path is not None for word in (option, str(path))]
    fit = ["train", data, "--run", run, *_options(config_of(plan, job), TrainConfig()), *more]
    score = ["evaluate", run, data, "--split", plan.split, "--out", f"{run}/scores", *more]
    score += _options(plan.settings, Settings()) + ([] if plan.live else ["--no-self-fed"])
    return [shlex.join(["prospect-dst", *words]) for words in (fit, score)]


def _options(config: Any, defaults: Any) -> list[str]:
    """Command-line options for the fields of a config that are not its defaults."""
    words: list[str] = []
    for name, value in asdict(config).items():
        option = name.replace("_", "-")
        if value == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
            continue
        items = [f"{key}={number}" for key, number in value.items()] if isinstance(value, dict) else value
        words += [f"--{option}", ",".join(items) if isinstance(items, (list, tuple)) else str(items)]
    return words
