"""The ladder: which rungs are compared, what each comparison says, and how high one has to climb.

Each rung is compared with the one below it, which has one source of information less. A verdict is of one 95% interval;
that an interval lies within the margin means "no larger effect" (two one-sided tests at 2.5%, stricter than the usual
TOST, whose 90% interval would have to).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Final, NamedTuple

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


def _steps(rungs: Sequence[str]) -> list[tuple[str, str]]:
    return [(rung.name, below) for rung in RUNGS if rung.name in rungs and (below := below_of(rung.name, rungs))]


def question_of(rungs: Sequence[str]) -> tuple[str, str]:
    """The pair that is to be answered: speak+dst against speak, else the highest rung against the one below it."""
    return QUESTION if set(QUESTION) <= set(rungs) else [QUESTION, *_steps(rungs)][-1]


def pairs_of(rungs: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of interest: the question, each rung against the one below it, and the controls of the question."""
    pairs = dict.fromkeys([question_of(rungs), *_steps(rungs), *CONTROL_PAIRS])
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
    """A rung, and what it adds to the one below it; the lowest has no numbers of a step."""

    rung: str
    below: str | None
    value: float | None  # event F1
    low: float | None = None  # of the difference, as `high`
    high: float | None = None
    difference: float | None = None  # to `below`
    verdict: str = ""


def ladder_steps(bench: Benchmark, mode: str | None = None) -> list[Step]:
    """Every rung measured in `mode` (None: that of the answer), from the lowest up."""
    mode = mode or bench.mode
    steps, measured = [], [rung for rung in bench.rungs if bench.score(rung, mode, PRIMARY)]
    for rung in measured:
        value, below = bench.score(rung, mode, PRIMARY)["value"], below_of(rung, measured)
        row = bench.comparison(rung, below, mode, PRIMARY) if below else {}
        low, high = row.get("low"), row.get("high")
        verdict = verdict_of(low, high, bench.margin) if below else ""
        steps.append(Step(rung, below, value, low, high, row.get("difference"), verdict))
    return steps


class Top(NamedTuple):
    """How far up the ladder one has to climb; scripted rungs and variants of a rung are left out."""

    rung: str  # the lowest that no higher rung is shown to beat
    decided: bool  # whether the rungs above `rung` are shown to add no more than the margin to it
    chain: list[str]  # the rungs of CHAIN that were measured


def _measured_chain(bench: Benchmark, mode: str) -> list[str]:
    return [rung for rung in CHAIN if bench.score(rung, mode, PRIMARY).get("value") is not None]


def _beats(bench: Benchmark, high: str, low: str, mode: str) -> bool:
    """Whether `high` is shown to be better than `low`, or than another rung below `high` whose value is no less.

    Else a rung with few seeds, whose intervals are wide, would hide a gain that is shown over a better rung.
    """
    values = {rung: bench.score(rung, mode, PRIMARY)["value"] for rung in _measured_chain(bench, mode)}
    return any(
        values[rung] >= values[low] and (bench.comparison(high, rung, mode, PRIMARY).get("low") or 0.0) > 0
        for rung in CHAIN[: CHAIN.index(high)]
        if rung in values
    )


def top_rung(bench: Benchmark, mode: str | None = None) -> Top | None:
    """The lowest rung that reaches the top; None where fewer than two rungs of CHAIN were measured."""
    mode = mode or bench.mode
    chain = _measured_chain(bench, mode)
    for place, rung in enumerate(chain if len(chain) > 1 else ()):
        above = chain[place + 1 :]
        if not any(_beats(bench, higher, rung, mode) for higher in above):
            ends = [bench.comparison(higher, rung, mode, PRIMARY).get("high") for higher in above]
            return Top(rung, all(end is not None and end <= bench.margin + _ROUNDING for end in ends), chain)
    return None


def tells(bench: Benchmark) -> list[str]:
    """The rungs of CHAIN whose source of information is shown to tell: better than every rung below them."""
    chain = _measured_chain(bench, bench.mode)
    return [
        rung
        for place, rung in enumerate(chain)
        if place and all(_beats(bench, rung, low, bench.mode) for low in chain[:place])
    ]
