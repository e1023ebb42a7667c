"""How sure one may be of a number: recordings are drawn again, never clips, and seeds count as well.

A bootstrap clustered by recording: all camera views of a recording are drawn or left out together, with one matrix of
draws for all arms, metrics and seeds, so that differences are paired. Two corrections, measured in
`benchmarks/coverage`. With few recordings a plain percentile interval is too narrow (8 recordings: it covers the truth
in 83 to 90 of 100 data sets, for 95), so deviations are widened from the normal to Student's t with R - 1 degrees of
freedom (89 to 96). Drawing 2 to 5 seeds again understates what a seed matters (3 seeds that matter twice as much as
recordings: 85), so each draw gets a t deviate of S - 1 degrees of freedom on top, times the standard error of the
seeds' mean (97). What it trades: with 2 seeds the interval is wide, for two seeds say little about a third. The draws
and deviates come from fixed seeds: same input, same digits.

    B draws    R recordings    S seeds
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import stats

Weights = npt.NDArray[np.int64]  # [B, R] how often each recording is drawn; recordings sorted by id
Floats = npt.NDArray[np.float64]
Estimator = Callable[[Weights], Floats]  # [B, R] -> [B], NaN where undefined

FEW_RECORDINGS: Final = 5  # under so many no interval is to be trusted
_UNDEFINED = 0.05  # the largest share of draws that may be undefined
_TAILS = (0.025, 0.975)
_ANY = (-math.inf, math.inf)
_ROUNDING = 12  # decimals: what differs less is the order of a sum
_EQUAL = 5e-7  # what is told as equal
_DETECTABLE = float((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / stats.norm.ppf(0.975))  # 1.43 half-widths


@dataclass(frozen=True)
class Interval:
    """One arm's value, the mean over its seeds, and its 95% interval. None: undefined, or one recording alone."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One arm minus another, paired by recording and seed: the mean over seeds and its 95% interval.

    `p_direction`: how sure its sign is, 0.5 (not at all) to 1. `p_value`: two-sided, of no difference, uncorrected.
    `detectable`: the true difference that would have been seen in 4 of 5 such experiments (measured: 79-81%; with 2 or
    3 seeds that matter as much as recordings 66 and 76%). `undefined`: how many draws had no value. `seed_share`: how
    much of the interval's width comes from having few seeds (0 to 1). All but the counts are None where the difference
    is undefined; where it is defined, but in more than 5% of the draws is not, or there is one recording, the
    difference alone is there.
    """

    difference: float | None
    low: float | None
    high: float | None
    p_direction: float | None
    p_value: float | None
    detectable: float | None
    recordings: int
    seeds: int
    undefined: int = 0
    seed_share: float | None = None


# ---- draws -------------------------------------------------------------------------------------------


def draw_recordings(num_recordings: int, num_draws: int = 10_000, seed: int = 0) -> Weights:
    """How often each recording is drawn, int64 [B, R]: each row sums to R. One matrix for all that is compared."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.multinomial(num_recordings, np.full(num_recordings, 1 / num_recordings), size=num_draws)


def replicate(estimators: Sequence[Estimator], draws: Weights) -> Floats:
    """float64 [S, 1 + B], every seed's value: of the recordings as they are, then of each draw. 24 kB a seed and 1,000
    draws, where an estimator can hold a split's frames."""
    weights = np.concatenate([np.ones_like(draws[:1]), draws])
    return np.stack([np.asarray(estimator(weights), np.float64) for estimator in estimators])


@lru_cache(maxsize=8)
def _widening(num_recordings: int, num_draws: int) -> Floats:
    """[B] factors that make the bootstrap's deviations, near normal and sqrt((R-1)/R) too small, Student's t."""
    variances = stats.chi2.ppf(_shuffled_ranks(num_draws, 1), num_recordings - 1)
    return np.sqrt(num_recordings / variances)


@lru_cache(maxsize=8)
def _student(num_seeds: int, num_draws: int) -> Floats:
    """[B] Student's t deviates of S - 1 degrees of freedom, in an order unrelated to the draws."""
    return stats.t.ppf(_shuffled_ranks(num_draws, 2), num_seeds - 1)


def _shuffled_ranks(count: int, key: int) -> Floats:
    """The middles of `count` equal parts of 0..1: quantiles taken at them are a sample without sampling noise."""
    return (np.random.Generator(np.random.PCG64([count, key])).permutation(count) + 0.5) / count


def _plausible(replicates: Floats, num_recordings: int, count_seeds: bool = True) -> Floats:
    """[B] where the truth may lie, seen from S seeds' [S, 1 + B] values; NaN where a draw has none."""
    seeds, draws = replicates.shape[0], replicates.shape[1] - 1
    mean = replicates.mean(axis=0)
    found = mean[0] + (mean[1:] - mean[0]) * _widening(num_recordings, draws)
    if seeds > 1 and count_seeds:
        found += replicates[:, 0].std(ddof=1) / math.sqrt(seeds) * _student(seeds, draws)
    return found


def _enough(plausible: Floats) -> bool:
    return bool(np.isnan(plausible).mean() <= _UNDEFINED)


def _limits(plausible: Floats, value: float) -> tuple[float, float]:
    """The 95% interval, which always holds the value."""
    low, high = (float(limit) for limit in np.quantile(plausible, _TAILS))
    return min(low, value), max(high, value)


# ---- what one asks -----------------------------------------------------------------------------------


def interval(estimators: Sequence[Estimator], draws: Weights, bounds: tuple[float, float] | None = None) -> Interval:
    """An arm's value and 95% interval, from one estimator per seed; `bounds`: what values there can be, None: any."""
    return interval_of(replicate(estimators, draws), draws.shape[1], bounds)


def interval_of(replicates: Floats, recordings: int, bounds: tuple[float, float] | None = None) -> Interval:
    """`interval` from what `replicate` gave."""
    value = float(replicates[:, 0].mean())
    if math.isnan(value):
        return Interval(None, None, None)
    if recordings < 2 or not _enough(plausible := _plausible(replicates, recordings)):
        return Interval(value, None, None)
    least, most = bounds or _ANY
    low, high = _limits(plausible[~np.isnan(plausible)], value)
    return Interval(value, max(low, least), min(high, most))


def compare(
    a: Sequence[Estimator],
    b: Sequence[Estimator],
    draws: Weights,
    bounds: tuple[float, float] | None = None,
) -> Comparison:
    """`a` minus `b`, one estimator per seed each, the same seeds in the same order; `bounds`: of their values."""
    assert len(a) == len(b) > 0, f"paired by seed, but {len(a)} against {len(b)}"
    return compare_of(replicate(a, draws), replicate(b, draws), draws.shape[1], bounds)


def compare_of(a: Floats, b: Floats, recordings: int, bounds: tuple[float, float] | None = None) -> Comparison:
    """`compare` from what `replicate` gave of each arm."""
    replicates, seeds = np.round(a - b, _ROUNDING), len(a)
    value = float(replicates[:, 0].mean())
    undefined = int(np.isnan(replicates[:, 1:]).any(axis=0).sum())
    if math.isnan(value):
        return Comparison(None, None, None, None, None, None, recordings, seeds, undefined)
    if recordings < 2 or not _enough(plausible := _plausible(replicates, recordings)):
        return Comparison(value, None, None, None, None, None, recordings, seeds, undefined)
    plausible = plausible[~np.isnan(plausible)]
    low, high = _limits(plausible, value)
    least, most = bounds or _ANY
    widest = most - least
    return Comparison(
        difference=value,
        low=max(low, -widest),
        high=min(high, widest),
        p_direction=_p_direction(plausible, value),
        p_value=_p_value(plausible),
        detectable=min((high - low) / 2 * _DETECTABLE, widest),
        recordings=recordings,
        seeds=seeds,
        undefined=undefined,
        seed_share=_seed_share(replicates, recordings, high - low),
    )


def _seed_share(replicates: Floats, recordings: int, width: float) -> float:
    """How much narrower, as a share of `width`, the interval would be if other seeds gave the same."""
    alone = _plausible(replicates, recordings, count_seeds=False)
    low, high = _limits(alone[~np.isnan(alone)], float(replicates[:, 0].mean()))
    return max(0.0, 1 - (high - low) / width) if width else 0.0


def _p_direction(plausible: Floats, value: float) -> float:
    """The share that has the value's sign; a half where the value has none."""
    return float((plausible * value > 0).mean()) if value else 0.5


def _p_value(plausible: Floats) -> float:
    """Twice the smaller share beyond 0; 0 itself counts on both sides. At least 1 / (B + 1)."""
    beyond = min((plausible <= 0).mean(), (plausible >= 0).mean())
    return float(np.clip(2 * beyond, 1 / (len(plausible) + 1), 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for as many tests as there are p-values; None, which was no test, stays None."""
    tests = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        adjusted[place] = largest
    return adjusted


# ---- in one sentence ---------------------------------------------------------------------------------


def answer(
    comparison: Comparison,
    a: str,
    b: str,
    metric_label: str,
    unit: str,
    mode: str,
    higher_is_better: bool = True,
) -> str:
    """What a comparison of the arms `a` and `b` shows, in one sentence that claims no more than its interval does.

    `metric_label`: 'event F1'; `unit`: 's', or '' if it has none; `mode`: 'self-fed'. Who wins stands first, and the
    numbers are the winner's minus the loser's.
    """
    where = f"on {_count(comparison.recordings, 'recording')}, {_count(comparison.seeds, 'seed')} ({mode})"
    difference, low, high = comparison.difference, comparison.low, comparison.high
    what = f"{unit} {metric_label}".strip()
    caveats = _caveats(comparison)
    if difference is None:
        return f"No answer: {metric_label} is undefined for {a}, {b} or both, {where}"
    if low is None or high is None:
        return f"No answer: {a} minus {b} is {_signed(difference, 3)} {what} {where}, but without an interval{caveats}"
    if max(abs(difference), abs(low), abs(high)) < _EQUAL:
        return f"{a} and {b} came out equal in {metric_label}, to 6 decimals, {where}{caveats}"
    if low <= 0 <= high:
        missed = f"{comparison.detectable or 0.0:.{_digits(low, high)}f} {unit}".strip()
        power = f"; a true difference under {missed} could well have been missed"
        numbers = _numbers(difference, low, high, what)
        return f"No difference between {a} and {b} could be shown: {numbers} {where}{power}{caveats}"
    if (difference > 0) != higher_is_better:
        a, b, difference, low, high = b, a, -difference, -high, -low
    less = "" if higher_is_better else " (less is better)"
    return f"{a} beats {b} by {_numbers(difference, low, high, what)}{less} {where}{caveats}"


def _caveats(comparison: Comparison) -> str:
    """What else must be said, each with a semicolon before it."""
    said = []
    if comparison.low is None and comparison.recordings > 1:
        said.append(f"undefined in {comparison.undefined} draws of the recordings")
    if comparison.recordings < FEW_RECORDINGS:
        said.append("too few recordings for an interval to be trusted")
    if comparison.seeds == 1:
        said.append("one seed: says nothing about others")
    return "".join(f"; {text}" for text in said)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _numbers(difference: float, low: float, high: float, what: str) -> str:
    """'+0.042 event F1 [0.011, 0.071]'"""
    digits = _digits(low, high)
    return f"{_signed(difference, digits)} {what} [{low + 0.0:.{digits}f}, {high + 0.0:.{digits}f}]"


def _digits(*limits: float) -> int:
    """Decimals, 3 or more, at which a limit that is not 0 does not look like 0."""
    return next(d for d in range(3, 16) if all(round(x, d) for x in limits if abs(x) > 10**-_ROUNDING) or d == 15)


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"
