"""Intervals for who stops when he likes, and power beforehand; false claims as in benchmarks/coverage, fewer nulls."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trainer.evaluation.sequential import always_valid, power_before, t_bound


def by_seed(*differences: float) -> np.ndarray:
    """[S, 1 + 100] of recordings that are all alike."""
    return np.repeat(np.array(differences)[:, None], 101, axis=1)


def test_bound_of_four_seeds_is_what_a_hand_finds():
    # ratio 1 + 4 * 20 = 81, (9 / 0.04) ** (2 / 4) = 15, t ** 2 = 3 * 14 / (1 - 15 / 81)
    assert t_bound(4) == pytest.approx(math.sqrt(42 * 81 / 66))
    assert t_bound(2) == math.inf


def test_bound_is_crossed_at_any_number_of_seeds_in_few_of_a_thousand_nulls():
    values = np.random.default_rng(0).standard_normal((2_000, 12))
    ever = np.zeros(2_000, bool)
    for seeds in range(3, 13):
        drawn = values[:, :seeds]
        ever |= abs(drawn.mean(1)) > t_bound(seeds) * drawn.std(1, ddof=1) / math.sqrt(seeds)
    assert 0 < ever.mean() < 0.04


def test_interval_adds_what_seeds_and_recordings_leave_open():
    low, high = always_valid(by_seed(0.1, 0.2, 0.3, 0.4), 40)
    assert (low, high) == pytest.approx((0.25 - 0.4634, 0.25 + 0.4634), abs=1e-4)  # 7.1795 * 0.1291 / 2
    assert always_valid(by_seed(0.1, 0.2, 0.3, 0.4), 40, (0.0, 0.5)) == pytest.approx((-0.2134, 0.5), abs=1e-4)
    unsure = by_seed(0.1, 0.2, 0.3, 0.4)
    unsure[:, 1:] += np.linspace(-0.1, 0.1, 100)
    low, high = always_valid(unsure, 1_000_000)
    assert (low, high) == pytest.approx((0.25 - 0.4738, 0.25 + 0.4738), abs=1e-3)  # the root of 0.4634^2 + 0.099^2


def test_too_few_seeds_or_recordings_have_no_interval():
    assert always_valid(by_seed(0.1, 0.2), 40) == (None, None)
    assert always_valid(by_seed(0.1, 0.2, 0.3), 1) == (None, None)


def test_power_beforehand_counts_events_and_a_pilot():
    # t(40) 2.021 * sqrt(0.1 * (1 + 1 / 4) / 300) = 0.0413, and 1.4294 half-widths
    assert power_before(41, 300, 4) == pytest.approx(0.0590, abs=1e-4)
    # t(3) 3.182 * 0.1414 / 2 = 0.2250 beside it
    assert power_before(41, 300, 4, (0.1, 0.3)) == pytest.approx(0.3270, abs=1e-4)
