"""Intervals and what is said of them. Coverage is that of `benchmarks/coverage/run.py`, with fewer data sets."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from trainer.evaluation.bootstrap import (
    Comparison,
    Estimator,
    Interval,
    answer,
    compare_of,
    draw_recordings,
    holm,
    interval_of,
    replicate,
)

DRAWS = draw_recordings(40, 2_000)


def interval(arm: Sequence[Estimator], draws: np.ndarray, bounds: tuple[float, float] | None = None) -> Interval:
    return interval_of(replicate(arm, draws), draws.shape[1], bounds)


def compare(
    a: Sequence[Estimator], b: Sequence[Estimator], draws: np.ndarray, bounds: tuple[float, float] | None = None
) -> Comparison:
    return compare_of(replicate(a, draws), replicate(b, draws), draws.shape[1], bounds)


def mean_of(values: np.ndarray) -> Estimator:
    return lambda weights: weights @ values / weights.sum(axis=1)


def constant(value: float) -> Estimator:
    return lambda weights: np.full(len(weights), value)


def noise(seed: int, recordings: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(recordings)


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "coverage" / "run.py"
    spec = importlib.util.spec_from_file_location("coverage_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---- draws -------------------------------------------------------------------------------------------


def test_every_draw_has_as_many_recordings_as_there_are() -> None:
    draws = draw_recordings(7, 500)
    assert draws.shape == (500, 7)
    assert draws.dtype == np.int64
    assert set(draws.sum(axis=1)) == {7}
    assert 0.9 < draws.mean(axis=0).min() < draws.mean(axis=0).max() < 1.1
    assert 0.3 < (draws == 0).mean() < 0.38  # (6/7)^7 = 0.34


def test_the_same_seed_draws_the_same() -> None:
    assert np.array_equal(draw_recordings(7, 50, seed=3), draw_recordings(7, 50, seed=3))
    assert not np.array_equal(draw_recordings(7, 50, seed=3), draw_recordings(7, 50, seed=4))


# ---- intervals ---------------------------------------------------------------------------------------


def test_a_mean_has_students_interval() -> None:
    """40 normal numbers: scipy's t interval, to within the draws' noise; plain percentiles are 4.5% narrower."""
    values = noise(1)
    found = interval([mean_of(values)], draw_recordings(40, 20_000))
    half = 2.0227 * values.std(ddof=1) / math.sqrt(40)  # 2.0227: the 97.5% quantile of t, 39 degrees of freedom
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03 * half)


def test_few_recordings_widen_the_interval_as_student_does() -> None:
    values = noise(2, recordings=6)
    found = interval([mean_of(values)], draw_recordings(6, 20_000))
    half = 2.5706 * values.std(ddof=1) / math.sqrt(6)  # t of 5 degrees of freedom
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_seeds_that_differ_widen_the_interval_by_what_a_mean_of_three_can_tell() -> None:
    """No recording differs, so that the seeds are all there is: 1, 2, 3 have mean 2, sd 1, and t 4.3027 / sqrt(3)."""
    found = interval([constant(1), constant(2), constant(3)], draw_recordings(40, 10_000))
    assert found.value == 2
    assert found.low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=0.01)
    assert found.high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=0.01)


def test_an_interval_stays_within_the_values_there_can_be() -> None:
    arm = [constant(0.8), constant(0.95)]
    found = interval(arm, DRAWS, bounds=(0, 1))
    assert found.high == 1
    assert found.low == 0
    compared = compare(arm, [constant(0.2), constant(0.1)], DRAWS, bounds=(0, 1))
    assert compared.low == pytest.approx(0.725 - 12.706 * 0.125, rel=0.03)  # t of 1 degree of freedom
    assert (compared.high, compared.detectable) == (1, 1)
    assert compare(arm, [constant(0.2), constant(0.1)], DRAWS).high > 1  # type: ignore[operator]


def test_one_recording_has_a_value_and_no_interval() -> None:
    draws = draw_recordings(1, 100)
    assert interval([constant(0.5)], draws) == Interval(0.5, None, None)
    found = compare([constant(0.5)], [constant(0.25)], draws)
    assert found == Comparison(0.25, None, None, None, None, None, recordings=1, seeds=1)


# ---- comparisons ---------------------------------------------------------------------------------------


def test_a_pair_is_compared_within_recordings() -> None:
    """Recordings differ by 1, the arms by 0.1 everywhere: unpaired nothing could be seen."""
    values = noise(3)
    found = compare([mean_of(values + 0.1)], [mean_of(values)], DRAWS)
    assert found.difference == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert found.p_value == pytest.approx(1 / 2001)
    assert found.p_direction == 1


def test_a_pair_is_compared_within_seeds() -> None:
    """Seeds differ by 1 and more, the arms by 0.1 in each."""
    found = compare([constant(0.1), constant(1.1)], [constant(0), constant(1)], DRAWS)
    assert (found.low, found.high) == (pytest.approx(0.1), pytest.approx(0.1))
    swapped = compare([constant(0.1), constant(1.1)], [constant(1), constant(0)], DRAWS)
    assert swapped.difference == pytest.approx(0.1)
    assert swapped.low is not None
    assert swapped.low < -5


def test_swapping_the_arms_mirrors_the_comparison() -> None:
    a, b = [mean_of(noise(4) + 0.3)], [mean_of(noise(5))]
    one, other = compare(a, b, DRAWS), compare(b, a, DRAWS)
    assert one.difference == -other.difference  # type: ignore[operator]
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))  # type: ignore[operator]
    assert (one.p_value, one.p_direction) == (other.p_value, other.p_direction)
    assert one.detectable == pytest.approx(other.detectable)


def test_the_same_input_gives_the_same_digits() -> None:
    a, b = [mean_of(noise(6)), mean_of(noise(7))], [mean_of(noise(8)), mean_of(noise(9))]
    assert compare(a, b, DRAWS) == compare(a, b, draw_recordings(40, 2_000))


def test_arms_that_are_equal_differ_by_nothing_at_all() -> None:
    """Rounding, as between BCE(x, y) and BCE(-x, 1 - y), is no difference."""
    a = mean_of(noise(10))
    found = compare([a, a], [a, lambda weights: a(weights) + 1e-15], DRAWS)
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert (found.p_value, found.p_direction, found.detectable) == (1, 0.5, 0)


def test_interval_p_value_and_direction_agree() -> None:
    for shift in np.linspace(-0.8, 0.8, 17):
        found = compare([mean_of(noise(11) + shift)], [constant(0)], DRAWS)
        assert found.low is not None
        assert found.high is not None
        assert found.p_value is not None
        assert found.p_direction is not None
        assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
        assert found.p_direction == pytest.approx(1 - found.p_value / 2, abs=0.001)


def test_detectable_is_the_half_width_and_what_80_percent_power_adds() -> None:
    found = compare([mean_of(noise(12))], [constant(0)], DRAWS)
    assert found.low is not None
    assert found.high is not None
    assert found.detectable == pytest.approx((found.high - found.low) / 2 * (1.95996 + 0.84162) / 1.95996, rel=1e-4)


def test_a_value_that_is_undefined_is_not_compared() -> None:
    found = compare([constant(math.nan), constant(1)], [constant(0), constant(0)], DRAWS)
    assert found == Comparison(None, None, None, None, None, None, recordings=40, seeds=2, undefined=2_000)
    assert interval([constant(math.nan)], DRAWS) == Interval(None, None, None)


def undefined_in(share: float) -> Estimator:
    """The mean of noise, undefined in the last so many of the draws, but not of the data as they are."""

    def estimate(weights: np.ndarray) -> np.ndarray:
        values = mean_of(noise(13))(weights)
        values[len(values) - round(share * 2_000) :] = math.nan
        return values

    return estimate


def test_a_few_draws_without_a_value_are_dropped_and_counted() -> None:
    found, whole = (compare([undefined_in(share)], [constant(0)], DRAWS) for share in (0.04, 0))
    assert (found.undefined, whole.undefined) == (80, 0)
    assert found.low == pytest.approx(whole.low, abs=0.03)
    assert interval([undefined_in(0.04)], DRAWS).low == pytest.approx(found.low)


def test_many_draws_without_a_value_leave_no_interval() -> None:
    found = compare([undefined_in(0.06)], [constant(0)], DRAWS)
    assert found.difference == pytest.approx(noise(13).mean())
    assert (found.low, found.high, found.p_value, found.undefined) == (None, None, None, 120)
    assert interval([undefined_in(0.06)], DRAWS).high is None


def test_seeds_must_come_in_pairs() -> None:
    with pytest.raises(AssertionError, match="paired by seed, but 2 against 1"):
        compare([constant(1), constant(2)], [constant(1)], DRAWS)


# ---- Holm --------------------------------------------------------------------------------------------


def test_holm_multiplies_the_smallest_by_all_and_never_falls() -> None:
    """By hand, and as statsmodels' multipletests: 0.01 x 4, 0.02 x 3, 0.03 x 2 (no less than 0.06), 0.04 (no less)."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_stops_at_one_and_leaves_what_was_no_test() -> None:
    assert holm([0.6, None, 0.001, 0.5]) == pytest.approx([1.0, None, 0.003, 1.0])
    assert holm([None]) == [None]
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


# ---- in one sentence ---------------------------------------------------------------------------------


def told(
    difference: float | None,
    low: float | None,
    high: float | None,
    *,
    detectable: float | None = None,
    label: str = "event F1",
    unit: str = "",
    recordings: int = 37,
    seeds: int = 3,
    undefined: int = 0,
    higher_is_better: bool = True,
) -> str:
    found = Comparison(difference, low, high, 0.9, 0.1, detectable, recordings, seeds, undefined)
    return answer(found, "speak+dst", "speak", label, unit, "self-fed", higher_is_better)


def test_an_interval_above_zero_names_the_winner() -> None:
    sentence = "speak+dst beats speak by +0.042 event F1 [0.011, 0.071] on 37 recordings, 3 seeds (self-fed)"
    assert told(0.042, 0.011, 0.071, detectable=0.043) == sentence


def test_an_interval_below_zero_names_the_other_one_as_winner() -> None:
    sentence = "speak beats speak+dst by +0.042 event F1 [0.011, 0.071] on 37 recordings, 3 seeds (self-fed)"
    assert told(-0.042, -0.071, -0.011) == sentence


def test_where_less_is_better_it_says_so() -> None:
    latency = told(-0.31, -0.52, -0.1, label="median latency", unit="s", higher_is_better=False)
    assert latency == (
        "speak+dst beats speak by -0.310 s median latency [-0.520, -0.100] (less is better) "
        "on 37 recordings, 3 seeds (self-fed)"
    )
    assert told(0.31, 0.1, 0.52, higher_is_better=False).startswith("speak beats speak+dst by -0.310 event F1 [-0.520")


def test_an_interval_around_zero_shows_nothing_and_says_what_could_have_been_missed() -> None:
    assert told(0.012, -0.020, 0.044, detectable=0.0457) == (
        "No difference between speak+dst and speak could be shown: +0.012 event F1 [-0.020, 0.044] "
        "on 37 recordings, 3 seeds (self-fed); a true difference under 0.046 could well have been missed"
    )
    assert told(-0.1, -0.4, 0.2, detectable=0.43, unit="s", label="median latency") == (
        "No difference between speak+dst and speak could be shown: -0.100 s median latency [-0.400, 0.200] "
        "on 37 recordings, 3 seeds (self-fed); a true difference under 0.430 s could well have been missed"
    )


def test_an_interval_that_touches_zero_shows_nothing() -> None:
    assert told(0.02, 0.0, 0.044, detectable=0.03).startswith("No difference")


def test_a_limit_close_to_zero_does_not_look_like_zero() -> None:
    assert "+0.02000 event F1 [0.00004, 0.04100]" in told(0.02, 0.00004, 0.041)


def test_one_seed_and_few_recordings_are_said() -> None:
    assert told(0.042, 0.011, 0.071, seeds=1).endswith("1 seed (self-fed); one seed: says nothing about others")
    assert told(0.2, 0.1, 0.3, recordings=4, seeds=2).endswith(
        "on 4 recordings, 2 seeds (self-fed); too few recordings for an interval to be trusted"
    )
    assert "trusted" not in told(0.2, 0.1, 0.3, recordings=5)


def test_arms_without_a_difference_are_told_as_equal() -> None:
    sentence = "speak+dst and speak came out equal in event F1, to 6 decimals, on 37 recordings, 3 seeds (self-fed)"
    assert told(0.0, 0.0, 0.0, detectable=0.0) == sentence
    assert told(1e-9, 1e-10, 2e-9, detectable=1e-9) == sentence


def test_what_is_undefined_is_no_answer() -> None:
    assert told(None, None, None) == (
        "No answer: event F1 is undefined for speak+dst, speak or both, on 37 recordings, 3 seeds (self-fed)"
    )
    assert told(0.1, None, None, undefined=900) == (
        "No answer: speak+dst minus speak is +0.100 event F1 on 37 recordings, 3 seeds (self-fed), "
        "but without an interval; undefined in 900 draws of the recordings"
    )
    assert told(0.1, None, None, recordings=1, seeds=1) == (
        "No answer: speak+dst minus speak is +0.100 event F1 on 1 recording, 1 seed (self-fed), "
        "but without an interval; too few recordings for an interval to be trusted; one seed: says nothing about others"
    )


# ---- coverage: a small version of the benchmark --------------------------------------------------------
# Seeds are fixed, so that these pass or fail for good; the bounds are where 300 sets of 95% do not come by chance.


@pytest.mark.parametrize("name", ["mean", "F1"])
def test_recordings_cover_the_truth_and_clips_do_not(coverage: ModuleType, name: str) -> None:
    metric = next(metric for metric in coverage.METRICS if metric.name == name)
    tallies = coverage.clustered_and_not(metric, 40, sets=300, draws=400, huge=20_000)
    for what in ("one arm", "difference"):
        ours, clips = (tallies[what, how].coverage for how in (coverage.OURS, coverage.BY_CLIP))
        assert 0.91 <= ours <= 0.985, what
        assert clips <= ours - 0.04, what


def test_average_precision_is_covered(coverage: ModuleType) -> None:
    tallies = coverage.clustered_and_not(coverage.METRICS[2], 20, sets=60, draws=200, huge=20_000)
    assert 0.86 <= tallies["difference", coverage.OURS].coverage <= 1


def test_seeds_must_be_counted_as_seeds(coverage: ModuleType) -> None:
    tallies = coverage.with_seeds(3, matters=2.0, sets=300, draws=400)
    assert 0.93 <= tallies[coverage.ADDED].coverage <= 1
    assert tallies[coverage.AGAIN].coverage < 0.9
    assert tallies[coverage.LEFT_OUT].coverage < 0.8


def test_what_is_called_detectable_is_detected(coverage: ModuleType) -> None:
    found = coverage.power(40, 1, 0.0, sets=300, draws=400)
    assert 0.72 <= found.at_detectable <= 0.88
    assert 0.4 <= found.at_half_width <= 0.6
    assert found.false_05 <= 0.09
