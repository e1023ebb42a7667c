"""The ladder: which rungs are compared, what each comparison says, and how high one has to climb.

Each rung is compared with the one below it, which has one source of information less. A verdict is of one 95% interval;
that an interval lies within the margin means "no larger effect" (two one-sided tests at 2.5%, stricter than the usual
TOST, whose 90% interval would have to).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Final

from trainer.arms import RUNGS, find_rung

if TYPE_CHECKING:
    from trainer.evaluation.benchmark_folder import Benchmark

PRIMARY: Final = "event_f1"
QUESTION: Final = ("speak+dst", "speak")
CONTROL_PAIRS: Final = (("speak+dst", "speak+markers"), ("speak+dst", "speak+dst-head"))  # what else explains a gain
BEATS, WORSE, UNDECIDED = "beats it", "is worse", "undecided"
SMALL, NO_LARGER = "smaller than the margin, but not zero", "no effect larger than the margin"
_ROUNDING: Final = 1e-9


def _chain(rung: str) -> tuple[str, ...]:
    below = find_rung(rung).below
    return (*(_chain(below) if below else ()), rung)


CHAIN: Final = _chain(QUESTION[0])  # from the clock to the model's own state, one source after another


def below_of(rung: str, measured: Sequence[str]) -> str | None:
    """The nearest rung below that was measured; None where there is none."""
    below = find_rung(rung).below
    return below if below is None or below in measured else below_of(below, measured)


def question_of(rungs: Sequence[str]) -> tuple[str, str]:
    """The pair that is to be answered: speak+dst against speak, else the highest rung against the one below it."""
    steps = [(rung.name, below) for rung in RUNGS if rung.name in rungs and (below := below_of(rung.name, rungs))]
    return steps[-1] if steps and not set(QUESTION) <= set(rungs) else QUESTION


def pairs_of(rungs: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of interest: the question, each rung against the one below it, and the controls of the question."""
    steps = [(rung.name, below) for rung in RUNGS if rung.name in rungs and (below := below_of(rung.name, rungs))]
    pairs = dict.fromkeys([question_of(rungs), *steps, *CONTROL_PAIRS])
    return [pair for pair in pairs if set(pair) <= set(rungs)]


def ladder_pairs(rungs: Sequence[str]) -> list[tuple[str, str]]:
    """The other pairs of CHAIN, higher minus lower: a rung may beat the one below it, but not the one below that."""
    below = combinations([rung for rung in CHAIN if rung in rungs], 2)
    return [(high, low) for low, high in below if (high, low) not in pairs_of(rungs)]


def verdict_of(low: float | None, high: float | None, margin: float) -> str:
    """What a difference's 95% interval says; its ends belong to it, and so do the margin's."""
    if low is None or high is None:
        return UNDECIDED
    within = max(-low, high) <= margin + _ROUNDING
    if low <= 0 <= high:
        return NO_LARGER if within else UNDECIDED
    return SMALL if within else BEATS if low > 0 else WORSE


@dataclass(frozen=True)
class Step:
    """A rung, and what it has more than the one below it; no numbers of a step for the lowest."""

    rung: str
    below: str | None
    value: float | None  # event F1
    low: float | None = None  # of the difference, as `high`
    high: float | None = None
    difference: float | None = None  # to `below`
    verdict: str = ""

    @property
    def adds(self) -> bool:
        """Whether it is shown to be better than the rung below it."""
        return (self.low or 0.0) > 0


def ladder_steps(bench: Benchmark, mode: str | None = None) -> list[Step]:
    """Every rung measured in `mode` (None: that of the answer), from the lowest up."""
    mode = mode or bench.mode
    measured = [rung for rung in bench.rungs if bench.arm(rung, mode, PRIMARY)]
    steps = []
    for rung in measured:
        value, below = bench.arm(rung, mode, PRIMARY)["value"], below_of(rung, measured)
        row = bench.comparison(rung, below, mode, PRIMARY) if below else {}
        ends, verdict = (row.get("low"), row.get("high")), ""
        if below:
            verdict = verdict_of(*ends, bench.margin)
        steps.append(Step(rung, below, value, *ends, row.get("difference"), verdict))
    return steps


@dataclass(frozen=True)
class Top:
    """How far up the ladder one has to climb; rungs of CHAIN, scripted ones and variants left out."""

    rung: str  # the lowest that no higher rung is shown to beat
    within: str  # the lowest that no higher rung beats by more than the margin, and shown so; at worst the highest
    decided: bool  # whether the rungs above `rung` are shown to add no more than the margin to it
    chain: tuple[str, ...]  # the rungs measured, from the lowest


def _beats(bench: Benchmark, high: str, low: str, mode: str) -> bool:
    """Whether `high` is shown to be better than `low`, or than another of CHAIN below `high` whose value is no less.

    So a rung with few seeds, against which little can be shown, does not hide what is shown against a better one.
    """
    value = bench.arm(low, mode, PRIMARY).get("value")
    for rung in CHAIN[: CHAIN.index(high)]:
        other = bench.arm(rung, mode, PRIMARY).get("value")
        as_good = rung == low or (value is not None and other is not None and other >= value)
        if as_good and (bench.comparison(high, rung, mode, PRIMARY).get("low") or 0.0) > 0:
            return True
    return False


def top_rung(bench: Benchmark, mode: str | None = None) -> Top | None:
    """The lowest rung that reaches the top; None where fewer than two rungs of CHAIN were measured."""
    mode = mode or bench.mode
    chain = tuple(rung for rung in CHAIN if bench.arm(rung, mode, PRIMARY).get("value") is not None)
    if len(chain) < 2:
        return None
    unbeaten, within = [], []
    for place, rung in enumerate(chain):
        rows = [bench.comparison(higher, rung, mode, PRIMARY) for higher in chain[place + 1 :]]
        if not any(_beats(bench, higher, rung, mode) for higher in chain[place + 1 :]):
            unbeaten.append(rung)
        if all(row.get("high") is not None and row["high"] <= bench.margin + _ROUNDING for row in rows):
            within.append(rung)
    return Top(unbeaten[0], within[0], unbeaten[0] in within, chain)


def tells(bench: Benchmark, mode: str | None = None) -> list[str]:
    """The rungs of CHAIN whose source of information is shown to tell: better than every rung below them."""
    mode = mode or bench.mode
    chain = [rung for rung in CHAIN if bench.arm(rung, mode, PRIMARY).get("value") is not None]
    return [
        rung
        for place, rung in enumerate(chain)
        if place and all(_beats(bench, rung, low, mode) for low in chain[:place])
    ]
