"""When one may stop: an interval that holds at every number of seeds at once, and what a benchmark can show beforehand.

A 95% interval is right for a number of seeds that was settled, or that the clock decided. Who looks after each pair of
runs and stops at the first interval without 0 claims in up to 21 of 100 cases what is not there (`benchmarks/coverage`,
2 to 12 seeds). `always_valid` may be looked at after every pair, at the price of 1.3 to 2.8 times the width.

    B draws    R recordings    S seeds
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from scipy import stats

from trainer.evaluation.bootstrap import _DETECTABLE, Floats, _limits

ALPHA_SEEDS: Final = 0.04  # over all looks together
ALPHA_RECORDINGS: Final = 0.01  # once: every look is at the same recordings
SPREAD: Final = 20.0  # variance of the prior over effects in a seed's standard deviations: narrow at 3 to 12 seeds
DISCORDANT: Final = 0.1  # of events, that arms decide differently in all seeds, and again in one seed each: as in synth


def t_bound(seeds: int, alpha: float = ALPHA_SEEDS) -> float:
    """c such that |t| < c at every number of seeds at once, with probability 1 - alpha: inf below 3 seeds.

    The t statistic's Bayes factor for effects N(0, SPREAD) against none, Haar's prior on the standard deviation, is a
    test martingale whatever that deviation is (Lai 1976, "On confidence sequences"; Wang & Ramdas, "Anytime-valid
    t-tests", arXiv 2310.03722): by Ville's inequality it ever exceeds 1 / alpha with
    probability alpha at most. c is where it does.
    """
    ratio = 1 + seeds * SPREAD
    most = (math.sqrt(ratio) / alpha) ** (2 / seeds)
    return math.sqrt((seeds - 1) * (most - 1) / (1 - most / ratio)) if seeds > 1 and most < ratio else math.inf


def always_valid(
    replicates: Floats, recordings: int, bounds: tuple[float, float] | None = None
) -> tuple[float | None, float | None]:
    """(low, high) of a difference `replicates` [S, 1 + B] by seed: 95% for all numbers of seeds together.

    The recordings are drawn once and common to all looks. Their 99% interval and the seeds' 96% confidence sequence are
    added as right angles are. A false claim needs (recordings' error / its half-width)^2 + (seeds' / theirs)^2 > 1 at
    some look (Cauchy-Schwarz): with normal errors under 5% for 3 to 30 looks, whatever part either has (simulated).
    (None, None) with fewer than 3 seeds or 2 recordings. bounds: the metric's range.
    """
    seeds = len(replicates)
    limits = _limits(replicates, recordings, count_seeds=False)
    if math.isinf(bound := t_bound(seeds)) or limits is None:
        return None, None
    value, reach = float(replicates[:, 0].mean()), bound * float(replicates[:, 0].std(ddof=1)) / math.sqrt(seeds)
    down, up = np.abs(np.quantile(limits[2], (ALPHA_RECORDINGS / 2, 1 - ALPHA_RECORDINGS / 2)) - value).tolist()
    least, most = bounds or (-math.inf, math.inf)
    return max(value - math.hypot(down, reach), least - most), min(value + math.hypot(up, reach), most - least)


def power_before(recordings: int, events: int, seeds: int, pilot: Sequence[float] = ()) -> float:
    """The difference in event F1 that `seeds` pairs of runs could show with 80% power.

    Of the data alone it is a guess of what recordings leave open. (Measured on synth, 40 recordings, 256 events: 0.053
    and 0.058 half-widths with 1 seed, 0.036 with 2; here 0.057, 0.049.) pilot: differences of two or more pairs of runs
    that are there already, whose spread is added; without it seeds are taken to be all alike.
    """
    unlike = DISCORDANT * (1 + 1 / seeds) / max(events, 1)
    half = stats.t.ppf(0.975, max(recordings - 1, 1)) * math.sqrt(unlike)
    if len(pilot) > 1:
        spread = stats.t.ppf(0.975, max(seeds - 1, 1)) * float(np.std(pilot, ddof=1)) / math.sqrt(seeds)
        half = math.hypot(half, spread)
    return min(float(half) * _DETECTABLE, 1.0)
