"""What `benchmark` left on disk, read for the report: its tables, what guessing gets, and the curves over seeds.

Works from the Parquet files alone, without the shards or a model. Holds one arm's columns at a time: 3 million frames
(5,000 clips of 5 minutes) take 120 MB and 3.5 s a seed, most of it for sorting.

    N frames of a split    B bins    S seeds    P parts of a clip
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import precision_recall_curve

from pipeline.errors import InputError
from pipeline.terminal import command
from trainer.evaluation.plots import MODES, NEVER, Curve, Line, Values, number
from trainer.run_log import read_metrics

Row = dict[str, Any]

SUMMARY, RUNS = "benchmark.json", "runs"
LEAST_IN_BIN: Final = 20  # frames; a point of the reliability curve with fewer is noise
_RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Benchmark:
    """OUT as the contract has it; the tables as rows."""

    out: Path
    info: Row
    arms: list[Row]  # arm, mode, metric, value, low, high, seeds, recordings
    comparisons: list[Row]  # a, b, mode, metric, difference, low, high, p_*, detectable, [seed_share,] seeds, ...
    results: list[Row]  # arm, seed, mode, metric, value, recordings
    metrics: dict[tuple[str, int], Row]  # (arm, seed) -> its metrics.json; a run that has none is absent

    @property
    def modes(self) -> list[str]:
        """The modes that were measured, teacher-forced first."""
        found = {row["mode"] for row in self.arms}
        return [mode for mode in MODES if mode in found] + sorted(found - set(MODES))

    @property
    def mode(self) -> str:
        """The mode of the answer: the primary one where it was measured."""
        wanted = str(self.info["primary"]["mode"])
        return wanted if wanted in self.modes or not self.modes else self.modes[-1]

    def run(self, arm: str, seed: int) -> Path:
        return self.out / RUNS / arm / f"seed-{seed}"

    def scores(self, arm: str, seed: int, mode: str) -> Path:
        return self.run(arm, seed) / "scores" / f"{mode}.parquet"

    def arm(self, arm: str, mode: str, metric: str) -> Row | None:
        return _find(self.arms, arm=arm, mode=mode, metric=metric)

    def value(self, arm: str, mode: str, metric: str) -> float | None:
        row = self.arm(arm, mode, metric)
        return None if row is None else row["value"]

    def comparison(self, a: str, b: str, mode: str, metric: str) -> Row | None:
        """a against b; None where it was not made that way round."""
        return _find(self.comparisons, a=a, b=b, mode=mode, metric=metric)

    def threshold(self, arm: str, seed: int) -> float | None:
        """The logit at which the run speaks; None where none could be chosen, or nothing was measured."""
        return look(self.metrics.get((arm, seed)), "thresholds", "event", "speaking")

    def measured(self, arm: str, mode: str, *path: str) -> list[Any]:
        """What stands at `path` in the arm's metrics in `mode`: one a seed that has it."""
        found = [look(self.metrics.get((arm, seed)), mode, *path) for seed in self.info["seeds"]]
        return [one for one in found if one is not None]

    def anywhere(self, mode: str, *path: str) -> Any:
        """The first of all arms' `measured`: for what depends on the reference alone."""
        return next((one for arm in self.info["arms"] for one in self.measured(arm, mode, *path)), None)


def _find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row[key] == value for key, value in wanted.items())), None)


def look(found: Any, *path: str) -> Any:
    """What stands at `path` in nested dictionaries; None where that is not there."""
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def read_benchmark(out: Path) -> Benchmark:
    """What is in OUT; InputError where it is no benchmark's folder."""
    try:
        info = json.loads((out / SUMMARY).read_bytes())
        tables = [pq.read_table(out / f"{name}.parquet") for name in ("arms", "comparisons", "results")]
        metrics = _all_metrics(out, info)
    except (OSError, ValueError, pa.ArrowException) as error:
        what = str(error).splitlines()[0]
        raise InputError(
            f"{out}: not what benchmark leaves ({what}); run {command('benchmark', 'DATA', '--out', out)}"
        ) from None
    arms, comparisons, results = (_rows(table) for table in tables)
    return Benchmark(out, info, arms, comparisons, results, metrics)


def _all_metrics(out: Path, info: Row) -> dict[tuple[str, int], Row]:
    runs = {(arm, seed): out / RUNS / arm / f"seed-{seed}" for arm, seed in product(info["arms"], info["seeds"])}
    paths = {key: run / "scores" / "metrics.json" for key, run in runs.items()}
    return {key: json.loads(path.read_bytes()) for key, path in paths.items() if path.is_file()}


def _rows(table: pa.Table) -> list[Row]:
    """NaN, which is no value, as None."""
    return [{k: None if isinstance(v, float) and v != v else v for k, v in row.items()} for row in table.to_pylist()]


# ---- what guessing gets ------------------------------------------------------------------------------

_EVENT_F1 = {"event_f1": "speaking", "dst_event_f1": "dst_update"}
_AP = {
    "speaking_ap": ("speaking", "frames", "chance"),
    "speaking_ap_alone": ("speaking", "frames", "alone", "chance"),
    "dst_ap": ("dst_update", "frames", "chance"),
}


@dataclass(frozen=True)
class Guess:
    """The value of a metric that needs no model, and who gets it: 'a metronome, every 6 s'."""

    value: float
    who: str


def guess(bench: Benchmark, mode: str, metric: str) -> Guess | None:
    """What is had without seeing anything; None where nobody measured it, or the metric has no such level."""
    if metric in _EVENT_F1:
        found = metronome(bench, mode, _EVENT_F1[metric])
        return found and Guess(found[1], f"a metronome, every {found[0]:g} s")
    if metric in _AP:
        return _guess(bench.anywhere(mode, *_AP[metric]), "guessing")
    if metric in ("speaking_auroc", "speaking_balanced_accuracy") and bench.anywhere(mode, "speaking", "frames"):
        return Guess(0.5, "guessing")
    if metric == "joint_state_accuracy":
        return _guess(bench.anywhere(mode, "state", "joint_accuracy_never_updating"), "never updating")
    return None


def _guess(value: float | None, who: str) -> Guess | None:
    return None if value is None else Guess(value, who)


def metronome(bench: Benchmark, mode: str, head: str) -> tuple[float, float] | None:
    """(seconds, event F1) of an assistant that sees nothing and fires that often, the period chosen on val."""
    period, f1 = (bench.anywhere(mode, head, "events", "metronome", key) for key in ("period_s", "f1"))
    return None if period is None or f1 is None else (period, f1)


# ---- what is missing ---------------------------------------------------------------------------------


def why_missing(bench: Benchmark, arm: str, mode: str) -> str | None:
    """What follows 'ARM was' where the arm has no numbers in `mode`: 'not ..., why'; None where every seed has them."""
    lacking = [seed for seed in bench.info["seeds"] if mode not in bench.metrics.get((arm, seed), {})]
    if not lacking:
        return None
    if any((arm, seed) not in bench.metrics for seed in lacking):
        return f"not evaluated ({_seeds(lacking)}); run the benchmark again"
    if mode != MODES[1]:
        return f"not scored {mode} ({_seeds(lacking)}); run the benchmark again"
    blind = [seed for seed in lacking if bench.threshold(arm, seed) is None]
    if blind:
        return f"not self-fed: no threshold could be chosen, as val has no frame to speak at ({_seeds(blind)})"
    return f"not self-fed ({_seeds(lacking)}), though there is a threshold to speak at; run the benchmark again"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


# ---- scores ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One run's speaking scores on the split that is reported, in the file's order."""

    clip_ids: pa.ChunkedArray
    frames: Values
    logits: Values  # [N]
    probabilities: Values | None  # [N], corrected for sampling
    labels: Values  # [N]: 1, 0, or -100


def read_scored(bench: Benchmark, arm: str, seed: int, mode: str) -> Scored | None:
    """The run's scores in `mode`; None where there is no file."""
    path = bench.scores(arm, seed, mode)
    if not path.is_file():
        return None
    columns = ["clip_id", "frame", "speaking_logit", "speaking_probability", "speaking_label"]
    table = pq.read_table(path, columns=columns, filters=[("split", "=", bench.info["split"])])
    numbers = [table[name].cast(pa.float64()).to_numpy() for name in columns[1:]]
    frames, logits, probabilities, labels = numbers
    return Scored(table["clip_id"], frames, logits, None if np.isnan(probabilities).any() else probabilities, labels)


def greatest_difference(bench: Benchmark, a: str, b: str, mode: str) -> float | None:
    """Between two arms' raw speaking probabilities, over all frames and seeds; None where they can't be compared."""
    greatest = None
    for seed in bench.info["seeds"]:
        first, second = (read_scored(bench, arm, seed, mode) for arm in (a, b))
        if first is None or second is None or not first.clip_ids.equals(second.clip_ids):
            return None
        if not np.array_equal(first.frames, second.frames) or not len(first.frames):
            return None
        apart = float(np.abs(sigmoid(first.logits) - sigmoid(second.logits)).max())
        greatest = apart if greatest is None else max(greatest, apart)
    return greatest


def sigmoid(logits: Values) -> Values:
    """Probabilities [N] of logits [N], without overflow."""
    return np.exp(-np.logaddexp(0.0, -logits))


def precision_recall(bench: Benchmark, mode: str) -> tuple[list[Curve], float | None]:
    """(a curve an arm that has scores in `mode`; chance, which is the share of positive frames)"""
    curves, chance = [], None
    for arm in bench.info["arms"]:
        found = list(_each_seed(bench, arm, mode))
        lines = [line for scored in found if (line := _precisions(scored)) is not None]
        if lines:
            chance = float((found[0].labels == 1).sum() / (found[0].labels >= 0).sum())
            note = number(bench.value(arm, mode, "speaking_ap"))
            curves.append(Curve(arm, lines, (_RECALLS, np.mean([y for _, y in lines], axis=0)), note))
    return curves, chance


def _each_seed(bench: Benchmark, arm: str, mode: str) -> Iterator[Scored]:
    found = (read_scored(bench, arm, seed, mode) for seed in bench.info["seeds"])
    return (scored for scored in found if scored is not None)


def _precisions(scored: Scored) -> Line | None:
    """Precision at each of 101 recalls: that of the highest threshold that reaches it. None without both classes."""
    known = scored.labels >= 0
    truth = scored.labels[known] == 1
    if not truth.any() or truth.all():
        return None
    precision, recall, _ = precision_recall_curve(truth, scored.logits[known])
    at = np.searchsorted(-recall[:-1], -_RECALLS, side="right") - 1  # recall falls; its last, 0, is no threshold's
    return _RECALLS, precision[at]


def reliability(bench: Benchmark, mode: str) -> list[Curve]:
    """An arm's curve of share positive over mean probability; thick: the frames of all seeds together."""
    curves = []
    for arm in bench.info["arms"]:
        bins = [_bins(scored, bench.info["settings"]["bins"]) for scored in _each_seed(bench, arm, mode)]
        known = [found for found in bins if found is not None]
        if known:
            note = number(bench.value(arm, mode, "speaking_ece"))
            curves.append(Curve(arm, [_points(found) for found in known], _points(np.sum(known, axis=0)), note))
    return curves


def _bins(scored: Scored, count: int) -> Values | None:
    """[3, B]: frames, sum of probabilities, positives; None where probabilities are not known."""
    if scored.probabilities is None:
        return None
    known = scored.labels >= 0
    p, truth = scored.probabilities[known], scored.labels[known] == 1
    at = np.minimum((p * count).astype(int), count - 1)
    return np.stack([np.bincount(at, weights, count) for weights in (None, p, truth)])


def _points(bins: Values) -> Line:
    """(mean probability, share positive) of the bins with enough frames."""
    frames, probability, positive = bins[:, bins[0] >= LEAST_IN_BIN]
    return probability / frames, positive / frames


# ---- state -------------------------------------------------------------------------------------------


def state_over_time(bench: Benchmark, mode: str) -> list[Curve]:
    """Each arm's joint state accuracy over P equal parts of the clips, in % of their length; last, never updating.

    Empty where no arm's updates tell of the state.
    """
    curves = [
        _over_parts(arm, shares, bench.value(arm, mode, "joint_state_accuracy"))
        for arm in bench.info["arms"]
        if (shares := bench.measured(arm, mode, "state", "over_time"))
    ]
    never = bench.anywhere(mode, "state", "over_time_never_updating")
    if not curves or never is None:
        return curves
    return [*curves, _over_parts(NEVER, [never], bench.anywhere(mode, "state", "joint_accuracy_never_updating"))]


def _over_parts(name: str, shares: Sequence[Sequence[float | None]], whole: float | None) -> Curve:
    """shares: [S][P], None in a part without frames."""
    values = np.array(shares, np.float64)
    middles = (np.arange(values.shape[1]) + 0.5) * 100 / values.shape[1]
    return Curve(name, [(middles, line) for line in values], (middles, values.mean(axis=0)), number(whole))


# ---- training ----------------------------------------------------------------------------------------


def training(bench: Benchmark, head: str) -> tuple[list[Curve], str]:
    """(each arm's average precision over optimizer steps as its runs logged it, `head` 'speaking' or 'dst_update'; the split)"""
    curves, splits = [], ["val"]
    for arm in bench.info["arms"]:
        runs = [_evaluations(bench.run(arm, seed)) for seed in bench.info["seeds"]]
        splits += [line["split"] for run in runs for line in run.values()]
        seeds = [{step: line[head]["ap"] for step, line in run.items() if _known(line, head)} for run in runs]
        if any(seeds):
            curves.append(_over_steps(arm, [found for found in seeds if found]))
    return curves, splits[-1]


def _evaluations(run: Path) -> dict[int, Row]:
    """By step; of one that was logged twice, the later."""
    return {line["step"]: line["evaluation"] for line in read_metrics(run) if "evaluation" in line}


def _known(evaluation: Row, head: str) -> bool:
    return (evaluation.get(head) or {}).get("ap") is not None


def _over_steps(arm: str, seeds: Sequence[dict[int, float]]) -> Curve:
    """The mean where every seed was evaluated."""
    common = sorted(set.intersection(*(set(found) for found in seeds)))
    mean = [float(np.mean([found[step] for found in seeds])) for step in common]
    lines = [(np.array(sorted(found), float), np.array([found[step] for step in sorted(found)])) for found in seeds]
    return Curve(arm, lines, (np.array(common, float), np.array(mean)), number(mean[-1]) if mean else "")
