"""What a benchmark is asked to do, in which order, and what still fits before its clock ends: no torch.

Order: the controls without a model, which cost seconds, once. Then at each seed the question's two arms, and what is
made of their checkpoints; after every second seed of that pair one seed of each other rung, in the ladder's order. So
the answer has two seeds before anything else is trained, and then twice as many as the other rungs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Final

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import DST_UPDATE, SPEAKING
from trainer.arms import ARMS, DEFAULT_RUNGS, RUNGS
from trainer.config import Settings, TrainConfig

Job = tuple[str, int]  # (rung, seed)
Unit = tuple[Job, ...]  # runs that are begun together, or not at all
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
    if unknown := [name for name in names if name not in RUNGS and name != "all"]:
        raise InputError(f"rung {unknown[0]!r}: not known, expected one of {', '.join(RUNGS)}")
    return tuple(name for name, rung in RUNGS.items() if rung.kind == "control" or name in names or "all" in names)


def check_plan(plan: Plan) -> None:
    """InputError where a rung or the data can't answer, whatever is trained."""
    for rung in [RUNGS[name] for name in plan.rungs if RUNGS[name].kind == "scripted"]:
        if rung.below not in plan.rungs:
            raise InputError(f"rungs: {rung.name} is made of {rung.below}'s checkpoint; add that rung")
    measured, train = Split(plan.data, plan.split), Split(plan.data, "train")
    if plan.split == "val" or "val" not in measured.manifest["splits"]:
        raise InputError(f"{plan.data}: no val split beside {plan.split}: thresholds are chosen there; preprocess one")
    for split in (Split(plan.data, "val"), measured):
        if not split.statistics().counts[SPEAKING, 1]:
            raise InputError(f"{plan.data}: the assistant never speaks in {split.name}; choose other data")
    updating = [name for name in plan.rungs if name in ARMS and ARMS[name].dst_head]
    if updating and not train.statistics().counts[DST_UPDATE, 1]:
        raise InputError(
            f"{plan.data}: the state never changes in train, so {', '.join(updating)} have nothing to learn from; "
            "give data with dialog state, or --rungs texts,speak"
        )


def run_of(plan: Plan, job: Job) -> Path:
    """OUT/runs/RUNG/seed-S."""
    return plan.out / "runs" / job[0] / f"seed-{job[1]}"


def jobs_with(plan: Plan, file: str = "scores/metrics.json") -> list[Job]:
    """The runs in OUT, asked for or not, that have such a file or folder, by rung and seed: one look at the disk."""
    places = [path.relative_to(plan.out / "runs").parts for path in (plan.out / "runs").glob(f"*/seed-*/{file}")]
    return sorted((rung, int(seed[5:])) for rung, seed, *_ in places if seed[5:].isdecimal())  # no copy, seed-0-old


def in_order(rungs: Sequence[str], pair: Sequence[str], seeds: Sequence[int]) -> list[Unit]:
    """All runs of the rungs, which are in the ladder's order; `pair`: the question's arms among them."""
    kinds = ("control", "arm", "scripted")
    controls, arms, scripted = ([name for name in rungs if RUNGS[name].kind == kind] for kind in kinds)
    others = [name for name in arms if name not in pair]
    units: list[Unit] = [((name, seeds[0]),) for name in controls]  # other seeds would come out alike
    for place, seed in enumerate(seeds):
        units += [tuple((name, seed) for name in pair)]
        units += [((name, seed),) for name in scripted]
        units += [((name, seeds[place // 2]),) for name in others if place % 2]
    return units + [((name, seed),) for seed in seeds[len(seeds) // 2 :] for name in others]


def ends_in(seconds: Sequence[float], busy: Sequence[float]) -> float:
    """When runs that take so many seconds are all done, begun in this order by workers that are free in `busy` s."""
    free, last = list(busy), 0.0
    heapq.heapify(free)
    for each in seconds:
        last = max(last, free[0] + each)
        heapq.heapreplace(free, free[0] + each)
    return last


@dataclass
class Schedule:
    """Which run is next. Times are in seconds, of one clock; without an end everything is done, in order."""

    units: Sequence[Unit]
    pair: Sequence[str]  # the question's arms
    done: set[Job] = field(default_factory=set)
    workers: int = 1
    until: float = math.inf  # the end of the clock
    update_s: float = 0.0  # what the tables and the report take after the last run
    updated: float = -math.inf  # when they were last written
    seconds: dict[Job, float] = field(default_factory=dict)  # of whole runs that were measured
    guess: float | None = None  # of a run, as long as none was measured
    left: dict[Job, float] = field(default_factory=dict)  # share of the steps of a run that was stopped
    begun: dict[Job, float] = field(default_factory=dict)  # runs in progress -> when they began

    def next(self, now: float) -> Job | None:
        """The run that a free worker begins now; None where nothing is ready, or nothing fits."""
        too_long = set()  # rungs: at other seeds they take as long
        for unit in self.units:
            left = [job for job in unit if job not in self.done and job not in self.begun]
            rungs = tuple(rung for rung, _ in left)
            if not left or rungs in too_long or not all(map(self._ready, left)):
                continue
            end = math.inf if self.until == math.inf else self.end(left, now)
            if end is None:  # nothing was measured: one pair is begun to find out
                fits = set(rungs) <= set(self.pair) and len({seed for _, seed in [*left, *self.begun]}) == 1
            else:
                fits = end <= self.until
            if fits:
                self.begun[left[0]] = now
                return left[0]
            too_long.add(rungs)
        return None

    def finish(self, job: Job, seconds: float) -> None:
        del self.begun[job]
        self.done.add(job)
        self.seconds[job] = seconds

    def report_is_due(self, job: Job, now: float) -> bool:
        """After a finished run: at the end of each of the question's pairs, and of other units while reports take at
        most a twentieth of the time."""
        ended = any(job in unit and self.done.issuperset(unit) for unit in self.units)
        return ended and (job[0] in self.pair or now - self.updated > 20 * self.update_s)

    def cost(self, job: Job) -> float | None:
        """Predicted seconds: the mean of the rung's runs, else of its kind's longest rung; None: not known."""
        kind, known = RUNGS[job[0]].kind, dict[str, list[float]]()
        for (rung, _), seconds in self.seconds.items():
            if RUNGS[rung].kind == kind:
                known.setdefault(rung, []).append(seconds)
        means = {rung: fmean(seconds) for rung, seconds in known.items()}
        cost = means.get(job[0], max(means.values(), default=self.guess if kind == "arm" else 0.0))
        return None if cost is None else cost * self.left.get(job, 1.0)

    def end(self, jobs: Sequence[Job], now: float) -> float | None:
        """When `jobs`, begun or not, are all done, and shown in the report; None: not known."""
        costs = {job: self.cost(job) for job in [*self.begun, *jobs]}
        known = {job: cost for job, cost in costs.items() if cost is not None}
        if len(known) < len(costs):
            return None
        busy = {job: max(0.0, at + known[job] - now) for job, at in self.begun.items()}
        free = [*busy.values(), *[0.0] * (self.workers - len(busy))]
        mine = [busy[job] for job in jobs if job in busy]
        return now + max([ends_in([known[job] for job in jobs if job not in busy], free), *mine]) + self.update_s

    def pair_seconds(self) -> float:
        """What another pair of runs takes, at best; 0 where that is not known."""
        return ends_in([self.cost((arm, -1)) or 0.0 for arm in self.pair], [0.0] * self.workers) + self.update_s

    def _ready(self, job: Job) -> bool:
        """A checkpoint must be there; another rung is worth its time at a seed that the question's pair has, too."""
        rung, seed = RUNGS[job[0]], job[1]
        if rung.kind == "scripted":
            return (rung.below, seed) in self.done
        if rung.kind == "control" or rung.name in self.pair:
            return True
        return all((arm, seed) in self.done or (arm, seed) in self.begun for arm in self.pair)
