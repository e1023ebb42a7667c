"""What a benchmark was asked to do: its plan, its runs' folders, and the commands that do the same by hand."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import DST_UPDATE, SPEAKING
from trainer.arms import ARMS, DEFAULT_RUNGS, RUNGS, find_rung
from trainer.config import Settings, TrainConfig

Job = tuple[str, int]  # (rung, seed)
MOST_SEEDS: Final = 1000  # as many as a clock allows


@dataclass(frozen=True)
class Plan:
    """What a benchmark is a function of, with its data."""

    data: Path
    out: Path
    rungs: tuple[str, ...] = DEFAULT_RUNGS  # of all kinds, in the ladder's order
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


def ladder(names: Collection[str]) -> tuple[str, ...]:
    """The rungs of these names ('all': every one), and the controls, which cost seconds, in the ladder's order."""
    for name in names:
        if name != "all":
            find_rung(name)
    return tuple(rung.name for rung in RUNGS if rung.kind == "control" or rung.name in names or "all" in names)


def check_plan(plan: Plan) -> None:
    """InputError where the plan makes no sense, or the data can't answer, whatever is trained on it."""
    for name, chosen in (("rungs", plan.rungs), ("seeds", plan.seeds)):
        if not chosen or len(set(chosen)) < len(chosen):
            raise InputError(f"{name}: {', '.join(map(str, chosen)) or 'none'}, expected one or more, each once")
    for rung in map(find_rung, plan.rungs):
        if rung.kind == "scripted" and rung.below not in plan.rungs:
            raise InputError(
                f"rungs: {rung.name} is made of {rung.below}'s checkpoint, which is not among them; add it"
            )
    measured, train = Split(plan.data, plan.split), Split(plan.data, "train")
    if plan.split == "val" or "val" not in measured.manifest["splits"]:
        chosen_there = "thresholds are chosen there, and nowhere else; preprocess one"
        raise InputError(f"{plan.data}: no val split beside {plan.split}: {chosen_there}")
    for split in (Split(plan.data, "val"), measured):
        if not split.statistics().counts[SPEAKING, 1]:
            what = f"the assistant never speaks in {split.name}: nothing to measure; choose other data"
            raise InputError(f"{plan.data}: {what}")
    updating = [name for name in plan.rungs if name in ARMS and ARMS[name].dst_head]
    if updating and not train.statistics().counts[DST_UPDATE, 1]:
        others = ",".join(arm.name for arm in ARMS.values() if not arm.dst_head)
        raise InputError(
            f"{plan.data}: the state never changes in train, so {', '.join(updating)} have nothing to learn from; "
            f"give data with dialog state, or --rungs {others}"
        )


def run_of(plan: Plan, job: Job) -> Path:
    """OUT/runs/RUNG/seed-S."""
    return plan.out / "runs" / job[0] / f"seed-{job[1]}"


def jobs_with(plan: Plan, file: str = "scores/metrics.json") -> list[Job]:
    """The runs in OUT, asked for or not, that have such a file or folder, by rung and seed: one look at the disk."""
    found = [path.relative_to(plan.out / "runs").parts for path in (plan.out / "runs").glob(f"*/seed-*/{file}")]
    return sorted((rung, int(seed[5:])) for rung, seed, *_ in found if seed[5:].isdecimal())


def config_of(plan: Plan, job: Job) -> TrainConfig:
    return replace(plan.config, arm=job[0], seed=job[1])


def commands_of(plan: Plan, job: Job) -> list[str]:
    """The two commands that do what `carry_out` does."""
    run, data = str(run_of(plan, job)), str(plan.data)
    sources = {"--frames-root": plan.frames_root, "--features": plan.features}
    more = [word for option, path in sources.items() if path is not None for word in (option, str(path))]
    fit = ["train", data, "--run", run, *_options(config_of(plan, job), TrainConfig()), *more]
    score = ["evaluate", run, data, "--split", plan.split, "--out", f"{run}/scores", "--draws", "0", *more]
    score += _options(plan.settings, Settings()) + ([] if plan.live else ["--no-self-fed"])
    return [shlex.join(["prospect-dst", *words]) for words in (fit, score)]


def _options(config: Any, defaults: Any) -> list[str]:
    """Command-line options for the fields of a config that are not its defaults."""
    words: list[str] = []
    for name, value in asdict(config).items():
        option = name.replace("_", "-")
        if isinstance(value, dict):
            value = tuple(f"{key}={number}" for key, number in value.items())
        if getattr(config, name) == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", ",".join(value) if isinstance(value, (list, tuple)) else str(value)]
    return words
