"""Intervals and the sentence that reports them; coverage as in `benchmarks/coverage/run.py`, on fewer data sets."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.evaluation.bootstrap import (
    ANY,
    Comparison,
    always_valid,
    answer,
    compare_of,
    draw_recordings,
    holm,
    interval_of,
    power_before,
    replicate,
    t_bound,
)

DRAWS = draw_recordings(40, 2_000)


def interval(arm, draws=DRAWS, bounds=ANY):
    return interval_of(replicate(arm, draws), draws.shape[1], bounds)


def compare(a, b, bounds=ANY):
    return compare_of(replicate(a, DRAWS), replicate(b, DRAWS), DRAWS.shape[1], bounds)


def mean_of(values):
    return lambda weights: weights @ values / weights.sum(axis=1)


def constant(value):
    return lambda weights: np.full(len(weights), value)


def noise(seed):
    return np.random.default_rng(seed).standard_normal(40)


def test_every_draw_has_as_many_recordings_as_there_are():
    draws = draw_recordings(7, 500)
    assert (draws.shape, draws.dtype, set(draws.sum(axis=1))) == ((500, 7), np.int16, {7})
    assert 0.3 < (draws == 0).mean() < 0.38  # (6/7)^7 = 0.34
    assert np.array_equal(draws, draw_recordings(7, 500))


def test_a_mean_has_students_interval():
    """t of 39 degrees of freedom is 2.0227; plain percentiles of 40 numbers are 4.5% narrower."""
    values = noise(1)
    found = interval([mean_of(values)], draw_recordings(40, 20_000))
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 2.0227 * values.std(ddof=1) / math.sqrt(40), rel=0.03)


def test_seeds_that_differ_widen_the_interval_by_what_a_mean_of_three_can_tell():
    """No recording differs, so that the seeds are all there is: 1, 2, 3 have mean 2, sd 1, and t 4.3027 / sqrt(3)."""
    found, half = interval([constant(1), constant(2), constant(3)], draw_recordings(40, 10_000)), 4.3027 / math.sqrt(3)
    assert (found.low, found.value, found.high) == pytest.approx((2 - half, 2, 2 + half), abs=0.01)


def test_an_interval_stays_within_the_values_there_can_be():
    arm, other = [constant(0.8), constant(0.95)], [constant(0.2), constant(0.1)]
    found = interval(arm, bounds=(0, 1))
    assert (found.low, found.high) == (0, 1)
    assert (compare(arm, other, bounds=(0, 1)).high, compare(arm, other).high > 1) == (1, True)


def test_a_pair_is_compared_within_recordings_and_seeds():
    """Recordings, or seeds, differ by 1, the arms by 0.1 everywhere: unpaired nothing could be seen."""
    found = compare([mean_of(noise(3) + 0.1)], [mean_of(noise(3))])
    assert (found.difference, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (found.p_value, found.p_direction) == (pytest.approx(1 / 2001), 1)
    found = compare([constant(0.1), constant(1.1)], [constant(0), constant(1)])
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert compare([constant(0.1), constant(1.1)], [constant(1), constant(0)]).low < -5


def test_arms_that_are_equal_differ_by_nothing_at_all():
    """Rounding, as between BCE(x, y) and BCE(-x, 1 - y), is no difference."""
    a = mean_of(noise(10))
    found = compare([a, a], [a, lambda weights: a(weights) + 1e-15])
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert (found.p_value, found.p_direction, found.detectable) == (1, 0.5, 0)


@pytest.mark.parametrize("shift", [-0.8, 0, 0.3])
def test_interval_p_value_direction_and_power_agree(shift):
    found = compare([mean_of(noise(11) + shift)], [constant(0)])
    assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
    assert found.p_direction == pytest.approx(1 - found.p_value / 2, abs=0.001)
    half = (found.high - found.low) / 2
    assert found.detectable == pytest.approx(half * (1.95996 + 0.84162) / 1.95996, rel=1e-4)  # 80% power


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    """By hand, and as statsmodels' multipletests: 0.01 x 4, 0.02 x 3, 0.03 x 2 (no less than 0.06), 0.04 (no less)."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, None, 0.001, 0.5]) == pytest.approx([1.0, None, 0.003, 1.0])


ON = "on 37 recordings, 3 seeds (free-running)"


@pytest.mark.parametrize(
    ("numbers", "more", "sentence"),
    [
        ((0.042, 0.011, 0.071), {}, f"speak+dst beats speak by +0.042 event F1 [0.011, 0.071] {ON}"),
        ((-0.31, -0.52, -0.1), {}, f"speak beats speak+dst by +0.310 event F1 [0.100, 0.520] {ON}"),
        ((0.02, 0.0, 0.044), {"detectable": 0.03},  # touches zero
         f"No difference between speak+dst and speak could be shown: +0.020 event F1 [0.000, 0.044] {ON}; "
         "a true difference under 0.030 could well have been missed"),
        ((0.02, 0.00004, 0.041), {},  # a limit close to zero does not look like zero
         f"speak+dst beats speak by +0.02000 event F1 [0.00004, 0.04100] {ON}"),
        ((0.0, 0.0, 0.0), {}, f"speak+dst and speak came out equal in event F1, to 6 decimals, {ON}"),
        ((0.2, 0.1, 0.3), {"recordings": 4, "seeds": 1},
         "speak+dst beats speak by +0.200 event F1 [0.100, 0.300] on 4 recordings, 1 seed (free-running); "
         "too few recordings for an interval to be trusted; one seed: says nothing about others"),
    ],
)  # fmt: skip
def test_the_answer_claims_no_more_than_the_interval_does(numbers, more, sentence):
    found = Comparison(*numbers, 0.9, 0.1, **{"detectable": None, "recordings": 37, "seeds": 3, **more})
    assert answer(found, "speak+dst", "speak", "free-running") == sentence


# ---- coverage: seeds are fixed; 200 sets of 95% do not leave the bounds by chance ------------------------


@pytest.fixture(scope="module")
def coverage():
    path = Path(__file__).parents[3] / "benchmarks" / "coverage" / "run.py"
    spec = importlib.util.spec_from_file_location("coverage_run", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recordings_cover_the_truth_and_clips_do_not(coverage):
    metric = next(metric for metric in coverage.METRICS if metric.name == "F1")
    tallies = coverage.clustered_and_not(metric, 40, sets=200, draws=300, huge=20_000)
    for what in ("one arm", "difference"):
        ours, clips = (tallies[what, how].coverage for how in (coverage.OURS, coverage.BY_CLIP))
        assert 0.91 <= ours <= 0.985, what
        assert clips <= ours - 0.04, what


def test_seeds_must_be_counted_as_seeds(coverage):
    tallies = coverage.with_seeds(3, matters=2.0, sets=200, draws=300)
    assert 0.93 <= tallies[coverage.ADDED].coverage <= 1
    assert tallies[coverage.AGAIN].coverage < 0.9
    assert tallies[coverage.LEFT_OUT].coverage < 0.8


def test_what_is_called_detectable_is_detected(coverage):
    found = coverage.power(40, 1, 0.0, sets=300, draws=400)
    assert 0.72 <= found.at_detectable <= 0.88
    assert 0.4 <= found.at_half_width <= 0.6
    assert found.false_05 <= 0.09


# ---- for who stops when he likes, and power beforehand ---------------------------------------------------


def by_seed(*differences):
    """[S, 1 + 100] of recordings that are all alike."""
    return np.repeat(np.array(differences)[:, None], 101, axis=1)


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
    unsure = by_seed(0.1, 0.2, 0.3, 0.4)
    unsure[:, 1:] += np.linspace(-0.1, 0.1, 100)
    low, high = always_valid(unsure, 1_000_000)
    assert (low, high) == pytest.approx((0.25 - 0.4738, 0.25 + 0.4738), abs=1e-3)  # the root of 0.4634^2 + 0.099^2
    assert always_valid(by_seed(0.1, 0.2), 40) == always_valid(by_seed(0.1, 0.2, 0.3), 1) == (None, None)


def test_power_beforehand_counts_events_and_a_pilot():
    # t(40) 2.021 * sqrt(0.1 * (1 + 1 / 4) / 300) = 0.0413, and 1.4294 half-widths
    assert power_before(41, 300, 4) == pytest.approx(0.0590, abs=1e-4)
    # t(3) 3.182 * 0.1414 / 2 = 0.2250 beside it
    assert power_before(41, 300, 4, (0.1, 0.3)) == pytest.approx(0.3270, abs=1e-4)
