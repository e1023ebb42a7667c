"""Confidence intervals over recordings and seeds: a bootstrap clustered by recording, widened to Student's t.

One matrix of draws serves all arms, metrics and seeds, so differences are paired. Deviations are scaled to Student's t
with R - 1 degrees of freedom, and each draw gets a t deviate of S - 1 degrees of freedom times the standard error of
the seeds' mean; what that covers is measured in `benchmarks/coverage`. A 95% interval is right for a number of seeds
that was settled, or that the clock decided; `always_valid` also if it is looked at after every pair of runs, at 1.3 to
2.8 times the width.

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

from pipeline.terminal import counted

Weights = npt.NDArray[np.number]  # [B, R] how often each recording is drawn; recordings sorted by id
Floats = npt.NDArray[np.float64]
Estimator = Callable[[Weights], Floats]  # [B, R] -> [B], NaN where undefined
Bounds = tuple[float, float]  # of a metric

ANY: Final[Bounds] = (-math.inf, math.inf)
BLOCK: Final = 256  # draws at a time: bounds the memory
MAX_UNDEFINED: Final = 0.05  # the largest share of draws that may be undefined
DECIMALS: Final = 12  # smaller differences come from the order of a sum
EQUAL: Final = 5e-7  # differences below this are reported as equal
DETECTABLE: Final = float((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / stats.norm.ppf(0.975))  # 1.43 half-widths
ALPHA_SEEDS: Final = 0.04  # of `always_valid`, over all looks together
ALPHA_RECORDINGS: Final = 0.01  # once: every look is at the same recordings
SPREAD: Final = 20.0  # variance of the prior over effects in a seed's standard deviations: narrow at 3 to 12 seeds
FEW_RECORDINGS: Final = 5  # with fewer no interval is to be trusted
DISCORDANT: Final = 0.1  # share of events on which two arms differ: in all seeds, and again in each; measured on synth


@dataclass(frozen=True)
class Interval:
    value: float | None  # one arm's, the mean over its seeds; None: undefined
    low: float | None  # 95%; None: undefined, or one recording only
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """One arm minus another, paired by recording and seed: the mean over seeds and its 95% interval.

    None: undefined; all but the difference with one recording, or where over 5% of the draws are undefined.
    """

    difference: float | None
    low: float | None
    high: float | None
    p_direction: float | None  # probability of the difference's sign, 0.5 to 1
    p_value: float | None  # two-sided, of no difference, uncorrected
    detectable: float | None  # true difference found with 80% power (measured: 79-81%; 2 or 3 unlike seeds 66, 76%)
    recordings: int
    seeds: int
    undefined: int = 0  # draws without a value
    seed_share: float | None = None  # share of the interval's width that is due to having few seeds, 0 to 1


def draw_recordings(num_recordings: int, num_draws: int = 10_000) -> Weights:
    """How often each recording is drawn, int16 [B, R]: each row sums to R."""
    generator, chance = np.random.default_rng(0), np.full(num_recordings, 1 / num_recordings)
    draws = np.empty((num_draws, num_recordings), np.int16)
    for first in range(0, num_draws, BLOCK):
        rows = draws[first : first + BLOCK]
        rows[:] = generator.multinomial(num_recordings, chance, size=len(rows))
    return draws


def replicate(estimators: Sequence[Estimator], draws: Weights) -> Floats:
    """float64 [S, ..., 1 + B]: each estimator's value on the recordings as they are, then on each draw. An estimator is
    given BLOCK draws in float64 at a time, and may give several values, [..., B]."""
    blocks = [np.ones_like(draws[:1]), *(draws[first : first + BLOCK] for first in range(0, len(draws), BLOCK))]
    by_block = ([estimator(weights) for estimator in estimators] for weights in (b.astype(np.float64) for b in blocks))
    return np.concatenate([np.array(values, np.float64) for values in by_block], axis=-1)


@lru_cache(maxsize=8)
def _student(num_recordings: int, num_seeds: int, num_draws: int) -> tuple[Floats, Floats]:
    """([B] factors that turn the draws' deviations, near normal and sqrt((R-1)/R) too small, into Student's t; [B] t
    deviates with S - 1 degrees of freedom): shuffled quantiles, without sampling noise."""
    generators = (np.random.default_rng([num_draws, seed]) for seed in (1, 2))
    first, second = ((generator.permutation(num_draws) + 0.5) / num_draws for generator in generators)
    widening = np.sqrt(num_recordings / stats.chi2.ppf(first, num_recordings - 1))
    return widening, stats.t.ppf(second, max(1, num_seeds - 1))


def _limits(replicates: Floats, recordings: int, count_seeds: bool = True) -> tuple[float, float, Floats] | None:
    """(low, high, [up to B] draws of the true value); None with one recording or too many undefined draws."""
    if recordings < 2:
        return None
    seeds, draws = replicates.shape[0], replicates.shape[1] - 1
    mean = replicates.mean(axis=0)
    widening, deviates = _student(recordings, seeds, draws)
    values = mean[0] + (mean[1:] - mean[0]) * widening
    if seeds > 1 and count_seeds:
        values += replicates[:, 0].std(ddof=1) / math.sqrt(seeds) * deviates
    undefined = np.isnan(values)
    if undefined.mean() > MAX_UNDEFINED:
        return None
    values = values[~undefined]
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    return min(low, float(mean[0])), max(high, float(mean[0])), values


def interval_of(replicates: Floats, recordings: int, bounds: Bounds = ANY) -> Interval:
    """One arm's value and 95% interval from the result of `replicate`, cut to `bounds`, the metric's range."""
    value = float(replicates[:, 0].mean())
    if math.isnan(value) or (limits := _limits(replicates, recordings)) is None:
        return Interval(None if math.isnan(value) else value, None, None)
    return Interval(value, max(limits[0], bounds[0]), min(limits[1], bounds[1]))


def compare_of(a: Floats, b: Floats, recordings: int, bounds: Bounds = ANY) -> Comparison:
    """`a` minus `b` from the results of `replicate`, the same seeds in the same order; `bounds`: the metric's range."""
    replicates, seeds = np.round(a - b, DECIMALS), len(a)
    value = float(replicates[:, 0].mean())
    undefined = int(np.isnan(replicates[:, 1:]).any(axis=0).sum())
    if math.isnan(value) or (limits := _limits(replicates, recordings)) is None:
        known = None if math.isnan(value) else value
        return Comparison(known, None, None, None, None, None, recordings, seeds, undefined)
    low, high, values = limits
    alone_low, alone_high, _ = _limits(replicates, recordings, count_seeds=False) or limits
    widest = bounds[1] - bounds[0]
    beyond = min((values <= 0).mean(), (values >= 0).mean())  # 0 itself counts on both sides
    return Comparison(
        difference=value,
        low=max(low, -widest),
        high=min(high, widest),
        p_direction=float((values * value > 0).mean()) if value else 0.5,
        p_value=float(np.clip(2 * beyond, 1 / (len(values) + 1), 1)),
        detectable=min((high - low) / 2 * DETECTABLE, widest),
        recordings=recordings,
        seeds=seeds,
        undefined=undefined,
        seed_share=max(0.0, 1 - (alone_high - alone_low) / (high - low)) if high > low else 0.0,
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for as many tests as there are p-values; None, no test, stays None."""
    tests = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(tests):
        adjusted[place] = highest = max(highest, min(1.0, (len(tests) - rank) * p))
    return adjusted


def answer(comparison: Comparison, a: str, b: str, mode: str) -> str:
    """The result of comparing the event F1 of arms `a` and `b` in one sentence that claims no more than its interval
    does: the better arm comes first, and the numbers are its own minus the other's."""
    difference, low, high = comparison.difference, comparison.low, comparison.high
    where = f"on {counted(comparison.recordings, 'recording')}, {counted(comparison.seeds, 'seed')} ({mode})"
    caveats = "; too few recordings for an interval to be trusted" if comparison.recordings < FEW_RECORDINGS else ""
    caveats += "; one seed: says nothing about others" if comparison.seeds == 1 else ""
    if difference is None:
        return f"No answer: event F1 is undefined for {a}, {b} or both, {where}"
    if low is None or high is None:
        why = "for one recording" if comparison.recordings == 1 else f"undefined in {comparison.undefined} draws"
        statement = f"{a} minus {b} is {difference:+.3f} event F1 {where}"
        return f"No answer: {statement}, but without an interval ({why}){caveats}"
    if max(abs(difference), abs(low), abs(high)) < EQUAL:
        return f"{a} and {b} came out equal in event F1, to 6 decimals, {where}{caveats}"
    digits = next(d for d in range(3, 16) if all(round(x, d) for x in (low, high) if abs(x) > 1e-12) or d == 15)
    if high < 0:
        a, b, difference, low, high = b, a, -difference, -high, -low
    limits = f"[{low + 0.0:.{digits}f}, {high + 0.0:.{digits}f}]"
    numbers = f"{round(difference, digits) + 0.0:+.{digits}f} event F1 {limits}"
    if low > 0:
        return f"{a} beats {b} by {numbers} {where}{caveats}"
    power = f"a true difference under {comparison.detectable or 0.0:.{digits}f} could well have been missed"
    return f"No difference between {a} and {b} could be shown: {numbers} {where}; {power}{caveats}"


def t_bound(seeds: int) -> float:
    """c such that |t| < c at every number of seeds at once, with probability 1 - ALPHA_SEEDS: inf below 3 seeds.

    The t statistic's Bayes factor for effects N(0, SPREAD) against none is a test martingale whatever the standard
    deviation (Lai 1976, "On confidence sequences"; Wang & Ramdas, "Anytime-valid t-tests", arXiv 2310.03722): by
    Ville's inequality it ever exceeds 1 / ALPHA_SEEDS, as it does at c, with that probability at most.
    """
    ratio = 1 + seeds * SPREAD
    most = (math.sqrt(ratio) / ALPHA_SEEDS) ** (2 / seeds)
    return math.sqrt((seeds - 1) * (most - 1) / (1 - most / ratio)) if seeds > 1 and most < ratio else math.inf


def always_valid(replicates: Floats, recordings: int, bounds: Bounds = ANY) -> tuple[float, float] | tuple[None, None]:
    """(low, high) of a difference `replicates` [S, 1 + B] by seed: 95% for all numbers of seeds together.

    The recordings are common to all looks. Their 99% interval and the seeds' 96% confidence sequence are added as right
    angles are: a false claim needs (recordings' error / its half-width)^2 + (seeds' / theirs)^2 > 1 at some look, with
    normal errors under 5% for 3 to 30 looks (simulated). (None, None) with fewer than 3 seeds or 2 recordings.
    """
    seeds = len(replicates)
    limits = _limits(replicates, recordings, count_seeds=False)
    if math.isinf(bound := t_bound(seeds)) or limits is None:
        return None, None
    value, reach = float(replicates[:, 0].mean()), bound * float(replicates[:, 0].std(ddof=1)) / math.sqrt(seeds)
    down, up = np.abs(np.quantile(limits[2], (ALPHA_RECORDINGS / 2, 1 - ALPHA_RECORDINGS / 2)) - value).tolist()
    widest = bounds[1] - bounds[0]
    return max(value - math.hypot(down, reach), -widest), min(value + math.hypot(up, reach), widest)


def power_before(recordings: int, events: int, seeds: int, pilot: Sequence[float] = ()) -> float:
    """The difference in event F1 that `seeds` pairs of runs could show with 80% power: of the data alone a guess.

    pilot: differences of two or more pairs of runs, whose spread is added; without it seeds are taken to be alike.
    """
    unlike = DISCORDANT * (1 + 1 / seeds) / max(events, 1)
    half = stats.t.ppf(0.975, max(recordings - 1, 1)) * math.sqrt(unlike)
    if len(pilot) > 1:
        spread = stats.t.ppf(0.975, max(seeds - 1, 1)) * float(np.std(pilot, ddof=1)) / math.sqrt(seeds)
        half = math.hypot(half, spread)
    return min(float(half) * DETECTABLE, 1.0)
