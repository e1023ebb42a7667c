"""Reads what `benchmark` left on disk: its tables, the level of each metric without a model, and curves over seeds.

Works from the Parquet files alone, without the shards or a model; holds one run's scores at a time.

    B bins    S seeds    P parts of a clip
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from sklearn.metrics import precision_recall_curve

from pipeline.errors import InputError
from pipeline.terminal import command
from trainer.arms import RUNGS
from trainer.config import MODES
from trainer.evaluation.metrics import METRICS, value_at
from trainer.evaluation.plots import NEVER, Curve, Line, format_number
from trainer.evaluation.tables import BASELINES
from trainer.run_log import read_metrics

Row = dict[str, Any]
MIN_FRAMES_PER_BIN: Final = 20  # a point of the reliability curve with fewer is noise


@dataclass(frozen=True)
class Benchmark:
    """OUT's tables, NaN as None."""

    out: Path
    info: Row  # benchmark.json
    scores: dict[tuple[str, str, str], Row]  # (rung, mode, metric) -> value, low, high, seeds, recordings
    comparisons: dict[tuple[str, str, str, str], Row]  # (rung, rung, mode, metric) -> difference, low, high, p_*, ...
    windows: pl.DataFrame  # rung, seed, mode, width_s, early_s, late_s, f1, metronome_f1
    groups: list[Row]  # by, group, rung, mode, value, low, high, seeds, recordings, events
    metrics: dict[tuple[str, int], Row]  # (rung, seed) -> its metrics.json; a run that has none is absent

    @property
    def pair(self) -> tuple[str, str]:
        """The rungs of the question that was fixed beforehand."""
        return tuple(self.info["primary"]["pair"])

    @property
    def rungs(self) -> list[str]:
        """Those that were measured, from the lowest."""
        return list(self.info["rungs"])

    @property
    def trained(self) -> list[str]:
        """Those of them that are models of their own."""
        return [rung for rung in self.rungs if RUNGS[rung].kind == "arm"]

    @property
    def margin(self) -> float:
        """Differences of event F1 up to it do not matter: settled before any run."""
        return float(self.info["margin"])

    @property
    def modes(self) -> list[str]:
        """The modes that were measured."""
        return [mode for mode in MODES if any(mode == measured for _, measured, _ in self.scores)]

    @property
    def mode(self) -> str:
        """The mode of the answer: the primary one where it was measured."""
        wanted = str(self.info["primary"]["mode"])
        return wanted if wanted in self.modes or not self.modes else self.modes[-1]

    def run(self, rung: str, seed: int) -> Path:
        return self.out / "runs" / rung / f"seed-{seed}"

    def score(self, rung: str, mode: str, metric: str) -> Row:
        """The rung's row of rungs.parquet; {} where there is none."""
        return self.scores.get((rung, mode, metric), {})

    def comparison(self, a: str, b: str, mode: str, metric: str) -> Row:
        """a minus b; {} where the pair was not compared that way round."""
        return self.comparisons.get((a, b, mode, metric), {})

    def of_seeds(self, rung: str, mode: str, path: str) -> list[Any]:
        """What the rung's metrics.json hold at `path` in `mode`, one per seed that has it."""
        values = [value_at(self.metrics.get((rung, seed)), f"{mode}.{path}") for seed in self.info["seeds"]]
        return [value for value in values if value is not None]

    def of_reference(self, mode: str, path: str) -> Any:
        """The same of any run: for what depends on the reference alone."""
        return next((value for rung in self.rungs for value in self.of_seeds(rung, mode, path)), None)


def read_benchmark(out: Path) -> Benchmark:
    """What is in OUT. InputError where it is no benchmark's folder."""
    try:
        info = json.loads((out / "benchmark.json").read_bytes())
        names = ("rungs", "comparisons", "windows", "groups")
        tables = [pl.read_parquet(out / f"{name}.parquet", glob=False).fill_nan(None) for name in names]
        scores = {(row["rung"], row["mode"], row["metric"]): row for row in tables[0].to_dicts()}
        comparisons = {(row["a"], row["b"], row["mode"], row["metric"]): row for row in tables[1].to_dicts()}
        bench = Benchmark(out, info, scores, comparisons, tables[2], tables[3].to_dicts(), {})
        for rung, seed in product(info["rungs"], info["seeds"]):
            path = bench.run(rung, seed) / "scores" / "metrics.json"
            if path.is_file():
                bench.metrics[rung, seed] = json.loads(path.read_bytes())
    except (OSError, ValueError, KeyError, pl.exceptions.PolarsError) as error:
        what, again = str(error).splitlines()[0], command("benchmark", "DATA", "--out", out)
        raise InputError(f"{out}: not what benchmark leaves ({what}); run {again}") from None
    return bench


def baseline(bench: Benchmark, mode: str, metric: str) -> tuple[float, str] | None:
    """(value, 'a metronome every 6 s'): what a metric is without a model. None where it was not measured, or the
    metric has no such level. The metronome was chosen on val."""
    if metric in ("speaking_auroc", "speaking_balanced_accuracy"):
        return (0.5, "chance") if bench.of_reference(mode, "speaking.frames") else None
    path, name = BASELINES.get(METRICS[metric].path, ("", ""))
    value = bench.of_reference(mode, path)
    if value is not None and "metronome" in path:
        name += f" every {bench.of_reference(mode, path.replace('f1', 'period_s')):g} s"
    return None if value is None else (value, name)


def why_missing(bench: Benchmark, rung: str, mode: str) -> str | None:
    """What follows 'RUNG was' where it has no numbers in `mode`: 'not ..., why'; None where every seed has them."""
    lacking = [seed for seed in bench.info["seeds"] if mode not in bench.metrics.get((rung, seed), {})]
    unmeasured = [seed for seed in lacking if (rung, seed) not in bench.metrics]
    if RUNGS[rung].kind == "control":  # one run serves for all seeds
        lacking, unmeasured = [seed for seed in lacking if seed not in unmeasured], []
    if not lacking:
        return None
    seeds = unmeasured or lacking
    named = ", ".join(map(str, seeds[:5])) + (f" and {len(seeds) - 5} more" if len(seeds) > 5 else "")
    where = f"(seed{'s' if len(seeds) > 1 else ''} {named})"
    if unmeasured:
        return f"not evaluated {where}; run the benchmark again"
    return f"not {mode}: no threshold could be chosen, as val has no frame to speak at {where}"


# ---- curves ------------------------------------------------------------------------------------------


def speaking_scores(bench: Benchmark, arm: str, mode: str) -> Iterator[pl.DataFrame]:
    """Per seed that has them, clip, frame, and speaking's logit, probability and label on the split reported."""
    columns = ["clip_id", "frame", "speaking_logit", "speaking_probability", "speaking_label"]
    for seed in bench.info["seeds"]:
        path = bench.run(arm, seed) / "scores" / f"{mode}.parquet"
        if path.is_file():
            rows = pl.scan_parquet(path, glob=False).filter(pl.col("split") == bench.info["split"])
            yield rows.select(columns).with_columns(pl.col("^speaking.*$").cast(pl.Float64)).collect()


def precision_recall(bench: Benchmark, mode: str) -> tuple[list[Curve], float | None]:
    """(a curve per arm that has scores in `mode`; chance, which is the share of positive frames)

    Precision at each of 101 recalls is that of the highest threshold that reaches it.
    """
    curves, chance, recalls = [], None, np.linspace(0, 1, 101)
    for arm in bench.trained:
        lines = []
        for scores in speaking_scores(bench, arm, mode):
            known = scores.filter(pl.col("speaking_label") >= 0)
            positive = known["speaking_label"].to_numpy() == 1
            if positive.any() and not positive.all():
                chance = float(positive.mean())
                precision, recall, _ = precision_recall_curve(positive, known["speaking_logit"].to_numpy())
                reaching = np.searchsorted(-recall[:-1], -recalls, side="right") - 1  # the last has no threshold
                lines.append((recalls, precision[reaching]))
        if lines:
            mean = np.mean([precision for _, precision in lines], axis=0)
            note = format_number(bench.score(arm, mode, "speaking_ap").get("value"))
            curves.append(Curve(arm, lines, (recalls, mean), note))
    return curves, chance


def reliability(bench: Benchmark, mode: str) -> list[Curve]:
    """Per arm the share of positives over the mean probability, in bins; thick: the frames of all seeds together."""
    curves, count = [], bench.info["settings"]["bins"]

    def shares(bins: Any) -> Line:  # [3, B]: frames, sum of their probabilities, positives
        frames, probability, positive = bins[:, bins[0] >= MIN_FRAMES_PER_BIN]
        return probability / frames, positive / frames

    for arm in bench.trained:
        bins = []
        for scores in speaking_scores(bench, arm, mode):
            known = scores.filter(pl.col("speaking_label") >= 0)
            p, label = known["speaking_probability"], known["speaking_label"]
            if not p.has_nulls():
                at = np.minimum((p.to_numpy() * count).astype(int), count - 1)
                bins.append(np.stack([np.bincount(at, weights, count) for weights in (None, p, label)]))
        if bins:
            note = format_number(bench.score(arm, mode, "speaking_ece").get("value"))
            curves.append(Curve(arm, [*map(shares, bins)], shares(sum(bins)), note))
    return curves


def state_over_time(bench: Benchmark, mode: str) -> list[Curve]:
    """Each arm's joint state accuracy over P equal parts of the clips, in % of their length; last, never updating.

    Empty where no arm writes updates that tell the state.
    """
    level = baseline(bench, mode, "joint_state_accuracy")
    parts = [(rung, bench.of_seeds(rung, mode, "state.over_time"),
              bench.score(rung, mode, "joint_state_accuracy").get("value")) for rung in bench.rungs]  # fmt: skip
    parts = [part for part in parts if part[1]]
    if parts and level and (never := bench.of_reference(mode, "state.over_time_never_updating")):
        parts.append((NEVER, [never], level[0]))
    curves = []
    for rung, shares, whole in parts:
        by_seed = np.array(shares, np.float64)  # [S, P], NaN in a part without frames
        middles = (np.arange(by_seed.shape[1]) + 0.5) * 100 / by_seed.shape[1]
        mean = (middles, by_seed.mean(axis=0))
        curves.append(Curve(rung, [(middles, line) for line in by_seed], mean, format_number(whole)))
    return curves


def training_curves(bench: Benchmark, head: str) -> tuple[list[Curve], str]:
    """(each arm's average precision of `head` over optimizer steps, as its runs logged it; the split)

    The mean is over steps at which every seed was evaluated; of a step that was logged twice, the later counts.
    """
    curves, split = [], "val"
    for arm in bench.rungs:
        seeds = []
        for seed in bench.info["seeds"]:
            lines = [line for line in read_metrics(bench.run(arm, seed)) if "evaluation" in line]
            aps = {line["step"]: value_at(line["evaluation"], f"{head}.ap") for line in lines}
            seeds.append({step: ap for step, ap in sorted(aps.items()) if ap is not None})
            split = lines[-1]["evaluation"]["split"] if lines else split
        if seeds := [aps for aps in seeds if aps]:
            steps = sorted(set.intersection(*map(set, seeds)))
            mean = np.array([np.mean([aps[step] for aps in seeds]) for step in steps])
            each = [(np.array([*aps], float), np.array([*aps.values()])) for aps in seeds]
            note = format_number(float(mean[-1])) if steps else ""
            curves.append(Curve(arm, each, (np.array(steps, float), mean), note))
    return curves, split
