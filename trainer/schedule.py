"""Which run a benchmark does next, what still fits before its clock ends, and what would narrow its interval: no torch.

Order: the controls without a model, which cost seconds, once. Then at each seed the question's two arms, and what is
made of their checkpoints; after every second seed of that pair one seed of each other rung, in the ladder's order. So
the answer has two seeds before anything else is trained, and then twice as many as the other rungs.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, Final

from scipy import stats

from pipeline.terminal import clock, counted
from trainer.arms import find_rung
from trainer.plan import Job

Unit = tuple[Job, ...]  # runs that are begun together, or not at all
KINDS: Final = ("control", "arm", "scripted")
FIRST_STEPS: Final = 10  # of a run, that its duration is predicted from


def in_order(rungs: Sequence[str], pair: Sequence[str], seeds: Sequence[int]) -> list[Unit]:
    """All runs of the rungs, which are in the ladder's order; `pair`: the question's arms among them."""
    controls, arms, scripted = ([name for name in rungs if find_rung(name).kind == kind] for kind in KINDS)
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
    """Times are in seconds, of one clock; without an end everything is done, in order."""

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
            if self._fits(left, now):
                self.begun[left[0]] = now
                return left[0]
            too_long.add(rungs)
        return None

    def finish(self, job: Job, seconds: float) -> None:
        del self.begun[job]
        self.done.add(job)
        self.seconds[job] = seconds

    def ends_unit(self, job: Job) -> bool:
        """Whether all that was begun together with a finished run is finished, too."""
        return any(job in unit and self.done.issuperset(unit) for unit in self.units)

    def report_is_due(self, job: Job, now: float) -> bool:
        """After a finished run: at the end of each of the question's pairs, and of other units while reports take at
        most a twentieth of the time."""
        return self.ends_unit(job) and (job[0] in self.pair or now - self.updated > 20 * self.update_s)

    def cost(self, job: Job) -> float | None:
        """Predicted seconds: the mean of the rung's runs, else of its kind's longest rung; None: not known."""
        kind, known = find_rung(job[0]).kind, dict[str, list[float]]()
        for (rung, _), seconds in self.seconds.items():
            if find_rung(rung).kind == kind:
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
        rung, seed = find_rung(job[0]), job[1]
        if rung.kind == "scripted":
            return (rung.below, seed) in self.done
        if rung.kind == "control" or rung.name in self.pair:
            return True
        return all((arm, seed) in self.done or (arm, seed) in self.begun for arm in self.pair)

    def _fits(self, jobs: Sequence[Job], now: float) -> bool:
        if self.until == math.inf:
            return True
        end = self.end(jobs, now)
        if end is None:  # nothing was measured: one pair is begun to find out
            return all(job[0] in self.pair for job in jobs) and len({seed for _, seed in [*jobs, *self.begun]}) == 1
        return end <= self.until


def run_seconds(first: Sequence[float], steps: int, evaluation: float) -> float:
    """Of a whole run: `first`: seconds of the steps that it has done; `evaluation`: what that costs, in steps."""
    return median(first[-FIRST_STEPS:]) * (steps + evaluation)


def what_narrows(row: Mapping[str, Any], pair_s: float) -> str:
    """The question's half-width, and what it would be after twice as many runs or recordings, the better first.

    row: of comparisons.parquet, with an interval; pair_s: seconds of such a pair. Seeds and recordings are taken as
    independent: the part due to seeds goes with Student's t over the root of their number, the other with the root.
    """
    seeds, recordings = row["seeds"], row["recordings"]
    if seeds == 1:
        return f"a second pair of runs, about {clock(round(pair_s))}, would tell how much seeds differ"
    half = (row["high"] - row["low"]) / 2
    by_recording = half * (1 - row["seed_share"])
    by_seed = math.sqrt(half**2 - by_recording**2)
    shrunk = by_seed * _seed_factor(2 * seeds) / _seed_factor(seeds)
    choices = [
        (
            math.hypot(shrunk, by_recording),
            f"{counted(seeds, 'more pair')} of runs, about {clock(round(seeds * pair_s))}",
        ),
        (math.hypot(by_seed, by_recording / math.sqrt(2)), f"twice the {counted(recordings, 'recording')}"),
    ]
    return f"\u00b1{half:.3f} now; " + "; ".join(f"with {what}: \u00b1{width:.3f}" for width, what in sorted(choices))


def _seed_factor(seeds: int) -> float:
    return float(stats.t.ppf(0.975, seeds - 1)) / math.sqrt(seeds)
