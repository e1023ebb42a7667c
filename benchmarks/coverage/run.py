"""Does a 95% interval cover the truth in 95 of 100 experiments? 2,000 simulated data sets per row, truths known.

What is tested is `trainer.evaluation.bootstrap` itself, `interval_of` and `compare_of`. Beside it stand other
ways that one may take: clips drawn instead of recordings, plain percentiles, seeds drawn again, seeds left out.

    uv run python benchmarks/coverage/run.py            # some minutes on one core; writes results.md beside this file
    uv run python benchmarks/coverage/run.py --sets 100 # a look: prints, writes nothing

The data sets: R recordings with 4 camera views (clips) each. Half of the variance of whatever makes clips differ
belongs to the recording (ICC 0.5), half to the view. Two arms see the same clips; half of what makes clips differ is
common to both.

    mean    one number a view
    F1      events of a view: references, hits (how likely: by clip), false alarms (how many: by clip); counts pooled
    AP      6 frames a view, 1 in 5 positive; margin and level of the scores differ by clip; all frames pooled

The truth of F1 and AP is that of one sample of 200,000 recordings.

    R recordings    V views (4)    F frames of a view (6)    B draws    S seeds
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from trainer.evaluation.bootstrap import (
    Comparison,
    Estimator,
    Interval,
    always_valid,
    compare_of,
    draw_recordings,
    interval_of,
    replicate,
)

HERE = Path(__file__).resolve().parent
FULL_SIZE = 2_000  # data sets per row
DRAWS = 1_000  # of a data set; `benchmark` takes 10,000
VIEWS, FRAMES = 4, 6
HUGE = 200_000  # recordings of the sample that is the truth
SEED_RECORDINGS = 40


# ---- data sets -----------------------------------------------------------------------------------------


def clip_effects(rng: np.random.Generator, recordings: int, arms: int) -> np.ndarray:
    """[arms, R, V] of variance 1: ICC 0.5 within a recording, half of all of it common to the arms."""

    def of(count: int) -> np.ndarray:
        return rng.standard_normal((count, recordings, 1)) + rng.standard_normal((count, recordings, VIEWS))

    return (of(1) + of(arms)) / 2


def mean_data(rng: np.random.Generator, recordings: int) -> np.ndarray:
    """[2, R, V, 1] a number per view; both arms' truth is 0."""
    return clip_effects(rng, recordings, 2)[..., None]


def f1_data(rng: np.random.Generator, recordings: int) -> np.ndarray:
    """[2, R, V, 3] hits, predictions, references of each view; the first arm hits more."""
    references = 1 + rng.poisson(3, (recordings, VIEWS))
    better = np.array([0.5, 0.0])[:, None, None]
    likely = 1 / (1 + np.exp(-(0.3 + better + 1.2 * clip_effects(rng, recordings, 2))))
    hits = rng.binomial(references, likely)
    alarms = rng.poisson(1.5 * np.exp(0.7 * clip_effects(rng, recordings, 2)))
    return np.stack([hits, hits + alarms, np.broadcast_to(references, hits.shape)], axis=-1).astype(float)


def ap_data(rng: np.random.Generator, recordings: int) -> np.ndarray:
    """[2, R, V, F, 2] score and label of each frame; the first arm's margin is larger."""
    positive = rng.random((recordings, VIEWS, FRAMES)) < 0.2
    margin = np.array([2.0, 1.5])[:, None, None] + clip_effects(rng, recordings, 2)
    level, noise = 1.5 * clip_effects(rng, recordings, 2), 0.5 * rng.standard_normal((2, *positive.shape))
    score = positive * margin[..., None] + level[..., None] + noise
    return np.stack([score, np.broadcast_to(positive, score.shape)], axis=-1)


# ---- estimators: of [U, ...], the data of U units that are drawn together --------------------------------


def mean_of(values: np.ndarray) -> Estimator:
    """The mean of [U, n, 1]."""
    sums, count = values.sum(axis=(1, 2)), values.shape[1]
    return lambda weights: weights @ sums / (weights.sum(axis=1) * count)


def f1_of(counts: np.ndarray) -> Estimator:
    """2 hits / (predictions + references) of [U, n, 3]."""
    sums = counts.sum(axis=1)

    def estimate(weights: np.ndarray) -> np.ndarray:
        hits, predictions, references = (weights @ sums).T
        return 2 * hits / (predictions + references)

    return estimate


def ap_of(frames: np.ndarray) -> Estimator:
    """Average precision of [U, n, F, 2]: precision at each positive, by falling score. No two scores are equal."""
    unit = np.repeat(np.arange(len(frames)), frames[0].size // 2)
    score, label = frames.reshape(-1, 2).T
    order = np.argsort(-score)
    unit, label = unit[order], label[order].astype(np.float32)

    def of_some(weights: np.ndarray) -> np.ndarray:
        drawn = weights.astype(np.float32)[:, unit]
        positive = drawn * label
        so_far, all_so_far = positive.cumsum(axis=1), drawn.cumsum(axis=1)
        return (positive * so_far / np.maximum(all_so_far, 1)).sum(axis=1) / so_far[:, -1]

    # 64 draws at a time stay in the cache
    return lambda weights: np.concatenate([of_some(weights[k : k + 64]) for k in range(0, len(weights), 64)])


class Metric(NamedTuple):
    name: str
    data: Callable[[np.random.Generator, int], np.ndarray]
    estimator: Callable[[np.ndarray], Estimator]


METRICS = (Metric("mean", mean_data, mean_of), Metric("F1", f1_data, f1_of), Metric("AP", ap_data, ap_of))


@cache
def truths(metric: Metric, recordings: int) -> tuple[float, float]:
    """Each arm's value in a huge sample, in parts of 10,000 recordings; the mean's is known."""
    if metric.name == "mean":
        return 0.0, 0.0
    rng = np.random.default_rng([recordings, 1])
    data = np.concatenate([metric.data(rng, 10_000) for _ in range(recordings // 10_000)], axis=1)
    first, second = (exact(metric, arm) for arm in data)
    return first, second


def exact(metric: Metric, arm: np.ndarray) -> float:
    """The estimator's value in float64 (its float32 sums would lose digits in a huge sample)."""
    if metric.name == "F1":
        hits, predictions, references = arm.sum(axis=(0, 1))
        return float(2 * hits / (predictions + references))
    score, label = arm.reshape(-1, 2).T
    ranked = label[np.argsort(-score)]
    return float((ranked * ranked.cumsum() / np.arange(1, len(ranked) + 1)).sum() / ranked.sum())


# ---- what is counted -------------------------------------------------------------------------------------


@dataclass
class Tally:
    """How often a kind of interval covered the truth, and how wide it was."""

    covered: list[bool] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)

    def add(self, found: tuple[float | None, float | None], truth: float) -> None:
        low, high = found
        assert low is not None
        assert high is not None
        self.covered.append(low <= truth <= high)
        self.widths.append(high - low)

    @property
    def coverage(self) -> float:
        return float(np.mean(self.covered))

    @property
    def width(self) -> float:
        return float(np.median(self.widths))


def plain(estimators: Sequence[Estimator], draws: np.ndarray) -> Interval:
    """The percentile interval as it is mostly done; seeds averaged."""
    values = np.mean([estimator(draws) for estimator in estimators], axis=0)
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def limits(found: Interval) -> tuple[float | None, float | None]:
    return found.low, found.high


def minus(a: Estimator, b: Estimator) -> Estimator:
    return lambda weights: a(weights) - b(weights)


# ---- (a) and (c): what is drawn, recordings or clips, and how many ------------------------------------------


def interval(arm: Sequence[Estimator], draws: np.ndarray) -> Interval:
    return interval_of(replicate(arm, draws), draws.shape[1])


def compare(a: Sequence[Estimator], b: Sequence[Estimator], draws: np.ndarray) -> Comparison:
    return compare_of(replicate(a, draws), replicate(b, draws), draws.shape[1])


def clustered_and_not(
    metric: Metric, recordings: int, sets: int, draws: int = DRAWS, huge: int = HUGE
) -> dict[tuple[str, str], Tally]:
    """(what is estimated, how) -> Tally, over so many data sets; the truth is that of `huge` recordings."""
    tallies = {(what, how): Tally() for what in ("one arm", "difference") for how in HOWS}
    by_recording, by_clip = draw_recordings(recordings, draws), draw_recordings(recordings * VIEWS, draws)
    truth = truths(metric, huge)
    for number in range(sets):
        data = metric.data(np.random.default_rng([recordings, number]), recordings)
        a, b = (metric.estimator(arm) for arm in data)
        clip_a, clip_b = (metric.estimator(arm.reshape(-1, 1, *arm.shape[2:])) for arm in data)
        compared, naive = compare([a], [b], by_recording), compare([clip_a], [clip_b], by_clip)
        found = {
            ("one arm", OURS): limits(interval([a], by_recording)),
            ("one arm", PLAIN): limits(plain([a], by_recording)),
            ("one arm", BY_CLIP): limits(interval([clip_a], by_clip)),
            ("difference", OURS): (compared.low, compared.high),
            ("difference", PLAIN): limits(plain([minus(a, b)], by_recording)),
            ("difference", BY_CLIP): (naive.low, naive.high),
        }
        for (what, how), ends in found.items():
            tallies[what, how].add(ends, truth[0] if what == "one arm" else truth[0] - truth[1])
    return tallies


OURS, PLAIN, BY_CLIP = "**recordings, widened: ours**", "recordings, plain percentiles", "clips"
HOWS = (OURS, PLAIN, BY_CLIP)


# ---- (b): seeds --------------------------------------------------------------------------------------------

ADDED, WELCH, AGAIN, LEFT_OUT = "**a t deviate added: ours**", "Welch", "seeds drawn again", "seeds left out"
SEED_HOWS = (ADDED, WELCH, AGAIN, LEFT_OUT)


def seed_differences(rng: np.random.Generator, seeds: int, matters: float, recordings: int) -> np.ndarray:
    """[S, R] a difference of two arms whose truth is 0. The mean over seeds has, from the seeds, `matters` times the
    standard deviation that it has from the recordings; seed and recording also interact, at half of the latter."""
    recording, both = rng.standard_normal(recordings), 0.5 * rng.standard_normal((seeds, recordings))
    return recording + both + matters * np.sqrt(seeds / recordings) * rng.standard_normal((seeds, 1))


def nothing(weights: np.ndarray) -> np.ndarray:
    return np.zeros(len(weights))


def of_recordings(values: np.ndarray) -> Estimator:
    """The mean of [R]."""
    return lambda weights: weights @ values / weights.sum(axis=1)


def drawn_again(values: np.ndarray, draws: np.ndarray, picked: np.ndarray) -> tuple[float, float]:
    """Percentiles where each draw also draws S of the S seeds, `picked` [B, S]."""
    each = draws @ values.T / draws.shape[1]  # [B, S]
    low, high = np.quantile(np.take_along_axis(each, picked, axis=1).mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def welch(values: np.ndarray) -> tuple[float, float]:
    """Recordings' and seeds' variances added, degrees of freedom by Satterthwaite. For a mean: no bootstrap needed."""
    seeds, recordings = values.shape
    parts = np.array([values.mean(axis=0).var(ddof=1) / recordings, values.mean(axis=1).var(ddof=1) / seeds])
    freedom = parts.sum() ** 2 / (parts**2 / np.array([recordings - 1, seeds - 1])).sum()
    half = stats.t.ppf(0.975, freedom) * np.sqrt(parts.sum())
    return float(values.mean() - half), float(values.mean() + half)


def with_seeds(seeds: int, matters: float, sets: int, draws: int = DRAWS) -> dict[str, Tally]:
    """How seeds are treated -> Tally, over so many data sets of 40 recordings."""
    tallies = {how: Tally() for how in SEED_HOWS}
    matrix = draw_recordings(SEED_RECORDINGS, draws)
    picked = np.random.default_rng(0).integers(0, seeds, (draws, seeds))
    for number in range(sets):
        rng = np.random.default_rng([seeds, int(10 * matters), number])
        values = seed_differences(rng, seeds, matters, SEED_RECORDINGS)
        ours = compare([of_recordings(seed) for seed in values], [nothing] * seeds, matrix)
        pooled = compare([of_recordings(values.mean(axis=0))], [nothing], matrix)
        tallies[ADDED].add((ours.low, ours.high), 0.0)
        tallies[WELCH].add(welch(values), 0.0)
        tallies[AGAIN].add(drawn_again(values, matrix, picked), 0.0)
        tallies[LEFT_OUT].add((pooled.low, pooled.high), 0.0)
    return tallies


# ---- (d): is what is called detectable detected? And how often is something found where there is nothing? ----


class Power(NamedTuple):
    """Of data sets with no difference: the share with p < 0.05 and p < 0.005; and of those with the median
    `detectable` as true difference, or half of an interval's width: the share whose interval is above 0."""

    false_05: float
    false_005: float
    at_detectable: float
    at_half_width: float


def power(recordings: int, seeds: int, matters: float, sets: int, draws: int = 4 * DRAWS) -> Power:
    matrix = draw_recordings(recordings, draws)
    found = []
    for number in range(sets):
        rng = np.random.default_rng([recordings, seeds, int(10 * matters), number])
        values = seed_differences(rng, seeds, matters, recordings)
        found.append(compare([of_recordings(seed) for seed in values], [nothing] * seeds, matrix))
    p_values, lows = np.array([c.p_value for c in found]), np.array([c.low for c in found])
    halves = np.array([c.high - c.low for c in found if c.high is not None and c.low is not None]) / 2
    shifts = np.median([c.detectable for c in found if c.detectable is not None]), np.median(halves)
    at_detectable, at_half = (float((lows + shift > 0).mean()) for shift in shifts)
    return Power(float((p_values < 0.05).mean()), float((p_values < 0.005).mean()), at_detectable, at_half)


# ---- (e): who stops when he likes --------------------------------------------------------------------------

MOST_SEEDS = 12
FAILING = "1 in 5 runs fails"  # what a seed gives is not normal: -2 in a fifth of the runs, else 0.5


class Stopped(NamedTuple):
    """Of data sets with no difference, of which somebody looks at 2, 3, ... 12 seeds and stops at the first interval
    without 0: the share that stops, by either interval; the share in which the last look alone claims something."""

    always_valid: float
    fixed: float
    fixed_at_end: float
    wider_at_3: float  # median width of the always-valid interval, as a multiple of the other's
    wider_at_12: float


def stopped_at_will(matters: float | str, sets: int, draws: int = DRAWS) -> Stopped:
    matrix = draw_recordings(SEED_RECORDINGS, draws)
    weights = np.concatenate([np.ones_like(matrix[:1]), matrix])
    claims, widths = np.zeros((2, sets, MOST_SEEDS + 1), bool), np.full((2, sets, MOST_SEEDS + 1), np.nan)
    key = int(10 * matters) if isinstance(matters, float) else 999
    values = [looked_at(np.random.default_rng([99, key, number]), matters) for number in range(sets)]
    for seeds, number in product(range(2, MOST_SEEDS + 1), range(sets)):
        seen = (weights @ values[number][:seeds].T / SEED_RECORDINGS).T  # [S, 1 + B]
        always = always_valid(seen, SEED_RECORDINGS)
        fixed = compare_of(seen, np.zeros_like(seen), SEED_RECORDINGS)
        for row, (low, high) in enumerate((always, (fixed.low, fixed.high))):
            if low is not None and high is not None:
                claims[row, number, seeds], widths[row, number, seeds] = not low <= 0 <= high, high - low
    ratio = np.median(widths[0] / widths[1], axis=0)
    ever = claims.any(axis=2).mean(axis=1)
    return Stopped(ever[0], ever[1], claims[1, :, MOST_SEEDS].mean(), ratio[3], ratio[MOST_SEEDS])


def looked_at(rng: np.random.Generator, matters: float | str) -> np.ndarray:
    """[12, R]: of each seed, from the same recordings; a seed's deviation is `matters` times what the recordings give
    the mean over 4 seeds."""
    recording = rng.standard_normal(SEED_RECORDINGS)
    both = 0.5 * rng.standard_normal((MOST_SEEDS, SEED_RECORDINGS))
    if matters == FAILING:
        seed = np.where(rng.random((MOST_SEEDS, 1)) < 0.2, -2.0, 0.5)
    else:
        seed = float(matters) * np.sqrt(4 / SEED_RECORDINGS) * rng.standard_normal((MOST_SEEDS, 1))
    return recording + both + seed


# ---- the report --------------------------------------------------------------------------------------------


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    names = head.split(";")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def percent(share: float) -> str:
    return f"{share:.1%}"


def clustered_rows(recordings: Sequence[int], sets: int) -> Iterator[tuple[str, ...]]:
    for count in recordings:
        for metric in METRICS:
            tallies = clustered_and_not(metric, count, sets)
            for what in ("one arm", "difference"):
                cells = [percent(tallies[what, how].coverage) for how in HOWS]
                wide = [f"{tallies[what, how].width:.3f}" for how in (OURS, BY_CLIP)]
                yield (str(count), metric.name, what, *cells, *wide)
            print(f"{count} recordings, {metric.name}: done", flush=True)


def seed_rows(sets: int) -> Iterator[tuple[str, ...]]:
    for seeds in (2, 3, 5):
        for matters in (0.0, 0.5, 1.0, 2.0, 5.0):
            tallies = with_seeds(seeds, matters, sets)
            cells = [f"{percent(tallies[how].coverage)} ({tallies[how].width:.2f})" for how in SEED_HOWS]
            yield (str(seeds), f"{matters:g}", *cells)
        print(f"{seeds} seeds: done", flush=True)


def power_rows(sets: int) -> Iterator[tuple[str, ...]]:
    cases = [(8, 1, 0.0), (15, 1, 0.0), (40, 1, 0.0), (40, 2, 1.0), (40, 3, 0.0), (40, 3, 1.0), (40, 5, 1.0)]
    for recordings, seeds, matters in cases:
        shares = power(recordings, seeds, matters, sets)
        yield (str(recordings), str(seeds), f"{matters:g}" if seeds > 1 else "", *(percent(share) for share in shares))


def stopped_rows(sets: int) -> Iterator[tuple[str, ...]]:
    for matters in (0.0, 0.5, 1.0, 2.0, 5.0, FAILING):
        found = stopped_at_will(matters, sets)
        wider = (f"{found.wider_at_3:.2f}", f"{found.wider_at_12:.2f}")
        yield (f"{matters:g}" if isinstance(matters, float) else matters, *map(percent, found[:3]), *wider)
        print(f"stopped at will, seeds matter {matters}: done", flush=True)


def verdict(rows: Sequence[Sequence[str]]) -> str:
    """The bar: 92-98% with 40 recordings of 4 views."""
    ours, clips = ([float(row[k].rstrip("%")) for row in rows if row[0] == "40"] for k in (3, 5))
    met = "met" if min(ours) >= 92 and max(ours) <= 98 else "**NOT met**"
    found, naive = (f"{min(shares):.1f} to {max(shares):.1f}%" for shares in (ours, clips))
    return f"92-98% at 40 recordings of 4 views: {met}, {found}; with clips drawn instead: {naive}"


def versions() -> str:
    names = ("prospect-dst", "numpy", "scipy")
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"Python {platform.python_version()}, {found}"


def report(sets: int) -> str:
    began = time.process_time()
    clustered, seeds = list(clustered_rows((40, 15, 8), sets)), list(seed_rows(sets))
    powers, stopped = list(power_rows(sets)), list(stopped_rows(sets))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    noise = 196 * np.sqrt(0.95 * 0.05 / sets)
    seed_head = f"seeds;seeds matter;{';'.join(SEED_HOWS)}"
    clip_head = f"recordings;metric;of;{';'.join(HOWS)};width: ours;width: clips"
    stop_head = "seeds matter;always valid;fixed;fixed, at 12 seeds alone;wider at 3 seeds;wider at 12"
    power_head = "recordings;seeds;seeds matter;p < 0.05;p < 0.005;found at `detectable`;found at half a width"
    return f"""# Does a 95% interval cover the truth?

{sets:,} simulated data sets per row, of {DRAWS:,} draws each ({4 * DRAWS:,} for what is called
detectable). A share of 95% is seen to within {noise:.1f} points. What the data sets are, and the other ways: `run.py`.

- date: {today}; {time.process_time() - began:.0f} s of CPU on one core
- versions: {versions()}
- command: `uv run python benchmarks/coverage/run.py --sets {sets}`
- {verdict(clustered)}

## What is drawn: recordings or clips

4 views of each recording, ICC 0.5. How often the interval held the truth, by what is drawn; widths are medians.

{table(clip_head, clustered)}

An AP of few recordings is by itself higher than that of many, which no width mends; in a difference of two arms most of
it cancels.

## Seeds

40 recordings. How often the interval held the truth (its median width). *Seeds matter*: the standard deviation that the
seeds give the mean over seeds, as a multiple of what the recordings give it. At 0, seed and recording still interact.

{table(seed_head, seeds)}

{lowest(seeds)}
Ours pays for its coverage in width: with 2 seeds much, with 5 little. Welch is the narrower choice, and claims more
than it holds where seeds are few and matter.

## False finds, and what is called detectable

Without a true difference, p under 0.05 and 0.005 should be as rare as that. With a true difference of the median
`detectable` 80% of the data sets should find it, with one of half an interval's width 50%.

{table(power_head, powers)}

With 2 or 3 seeds that matter an interval's width is itself uncertain: less than 80% are found, and false finds are
rarer than claimed.

## Who stops when he likes

No true difference; somebody looks after 2, 3, ... 12 seeds and stops at the first interval without 0. How often that
happens (asked of the always-valid interval: 5% at most), beside an end at 12 seeds settled beforehand; and how many
times as wide the always-valid interval is. *Seeds matter*: as above, at 4 seeds. In the last row seeds are not normal.

{table(stop_head, stopped)}
"""


def lowest(rows: Sequence[Sequence[str]]) -> str:
    """The worst coverage in each column of the seeds' table, in a sentence."""
    worst = [min(float(row[k + 2].split("%")[0]) for row in rows) for k in range(len(SEED_HOWS))]
    named = zip(("ours", *(how.lower() for how in SEED_HOWS[1:])), worst, strict=True)
    return f"The lowest coverage is {', '.join(f'{share:.1f}% ({how})' for how, share in named)}."


def publish(text: str, target: Path | None) -> None:
    """Print the report, and write it where it belongs, if anywhere."""
    print("\n" + text)
    if target:
        target.write_text(text, encoding="utf-8")
        print(f"written: {target}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=FULL_SIZE, help="data sets per row")
    parser.add_argument("--results", type=Path, help="default: results.md beside this file, for a full run")
    return parser.parse_args()


def main() -> None:
    options = parse()
    target = options.results or (HERE / "results.md" if options.sets >= FULL_SIZE else None)
    publish(report(options.sets), target)


if __name__ == "__main__":
    main()
