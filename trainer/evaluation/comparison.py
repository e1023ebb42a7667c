"""Compares the finished runs of a benchmark: results, arms, comparisons (Parquet) and benchmark.json.

Holm's correction is over the pairs compared on one metric in one mode.

    S seeds    B draws of the recordings
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.dataset import Split
from pipeline.storage import replacing, write_json
from trainer.checkpoint import run_hash
from trainer.config import MODES, SELF_FED, TEACHER_FORCED
from trainer.evaluation.bootstrap import Floats, Weights, compare_of, draw_recordings, holm, interval_of, replicate
from trainer.evaluation.evaluate_scores import METRICS_FILE
from trainer.evaluation.metrics import METRICS, Thresholds, estimators, look_up
from trainer.evaluation.read_scores import read_scores
from trainer.evaluation.sequential import always_valid
from trainer.plan import Job, Plan, commands_of, run_of
from trainer.run_log import read_metrics

PAIRS: Final = (  # of interest, the question first; those whose arms were trained are compared
    ("speak+dst", "speak"),
    ("speak+dst", "speak+markers"),
    ("speak+dst", "speak+dst-head"),
    ("speak+markers", "speak"),
    ("speak+dst-head", "speak"),
    ("speak", "lm-eos"),
    ("speak", "silence"),
)
PRIMARY: Final = "event_f1"
PACKAGES: Final = ("prospect-dst", "torch", "transformers", "numpy", "scipy", "scikit-learn", "pyarrow")

Measured = dict[tuple[str, str], dict[str, Floats]]  # (arm, mode) -> each metric's `replicate`, [S, 1 + B]


def metrics_of(plan: Plan, job: Job) -> dict[str, Any]:
    """What evaluate wrote of the run; {} where it is missing or damaged: then the run is evaluated again."""
    try:
        return dict(json.loads((run_of(plan, job) / "scores" / METRICS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def compare_runs(plan: Plan, jobs: Sequence[Job], split: Split) -> None:
    """Write OUT's tables and benchmark.json from the finished runs."""
    recordings = sorted({clip.recording_id for clip in split.in_order()})
    draws, count = draw_recordings(len(recordings), plan.draws), len(recordings)
    metrics = {job: metrics_of(plan, job) for job in jobs}
    measured: Measured = {}
    for arm, mode in product(plan.arms, MODES):
        runs = [(arm, seed) for seed in plan.seeds]
        if all(mode in metrics[run] for run in runs):
            chosen = [Thresholds(**metrics[run]["thresholds"]) for run in runs]
            seeds = [
                _replicates(plan, run, mode, at, split, recordings, draws) for run, at in zip(runs, chosen, strict=True)
            ]
            measured[arm, mode] = {metric: np.concatenate([of_seed[metric] for of_seed in seeds]) for metric in METRICS}
    _write_table(plan.out / "results.parquet", _RESULTS, _result_rows(metrics, count))
    _write_table(plan.out / "arms.parquet", _INTERVALS, _interval_rows(measured, count))
    _write_table(plan.out / "comparisons.parquet", _COMPARISONS, _comparison_rows(plan, measured, count))
    write_json(plan.out / "benchmark.json", _summary(plan, jobs, split, count))


def _replicates(
    plan: Plan, job: Job, mode: str, thresholds: Thresholds, split: Split, recordings: Sequence[str], draws: Weights
) -> dict[str, Floats]:
    """Each metric's [1, 1 + B] of one run."""
    clips = read_scores(run_of(plan, job) / "scores" / f"{mode}.parquet", {split.name: split})[split.name]
    found = estimators(clips, thresholds, plan.settings, recordings)
    return {metric: replicate([estimator], draws) for metric, estimator in found.items()}


def _result_rows(metrics: dict[Job, dict[str, Any]], recordings: int) -> Iterator[dict[str, Any]]:
    for ((arm, seed), of_run), mode in product(metrics.items(), MODES):
        for metric in METRICS.values() if mode in of_run else ():
            row = {"arm": arm, "seed": seed, "mode": mode, "metric": metric.name, "recordings": recordings}
            yield row | {"value": look_up(of_run[mode], metric)}


def _interval_rows(measured: Measured, recordings: int) -> Iterator[dict[str, Any]]:
    for ((arm, mode), values), metric in product(measured.items(), METRICS):
        row = {"arm": arm, "mode": mode, "metric": metric, "seeds": len(values[metric]), "recordings": recordings}
        yield row | asdict(interval_of(values[metric], recordings, METRICS[metric].bounds))


def _comparison_rows(plan: Plan, measured: Measured, recordings: int) -> Iterator[dict[str, Any]]:
    question = (*pairs_of(plan), *PAIRS)[0]
    for mode, metric in product(MODES, METRICS):
        pairs = [(a, b) for a, b in pairs_of(plan) if (a, mode) in measured and (b, mode) in measured]
        bounds = METRICS[metric].bounds
        compared = [
            compare_of(measured[a, mode][metric], measured[b, mode][metric], recordings, bounds) for a, b in pairs
        ]
        corrected = holm([one.p_value for one in compared])
        for (a, b), one, p_holm in zip(pairs, compared, corrected, strict=True):
            primary = (a, b) == question and mode == primary_mode(plan) and metric == PRIMARY
            row = {"a": a, "b": b, "mode": mode, "metric": metric, "p_holm": p_holm, "primary": primary}
            replicates = measured[a, mode][metric] - measured[b, mode][metric]
            row["always_low"], row["always_high"] = always_valid(replicates, recordings, bounds)
            yield row | asdict(one)


def primary_mode(plan: Plan) -> str:
    """The mode that the answer is about."""
    return SELF_FED if plan.live else TEACHER_FORCED


def pairs_of(plan: Plan) -> list[tuple[str, str]]:
    """The pairs of interest that can be compared; the first is the question."""
    known = [pair for pair in PAIRS if set(pair) <= set(plan.arms)]
    return known or [(arm, plan.arms[0]) for arm in plan.arms[1:]]


_RESULTS = "arm seed mode metric value recordings"
_INTERVALS = "arm mode metric value low high seeds recordings"
_COMPARISONS = (
    "a b mode metric difference low high p_direction p_value p_holm detectable seeds recordings undefined seed_share "
    "always_low always_high primary"
)
_TYPES: Final = {  # of columns; the others are float64
    **dict.fromkeys(("arm", "a", "b", "mode", "metric"), pa.string()),
    **dict.fromkeys(("seed", "seeds", "recordings", "undefined"), pa.int32()),
    "primary": pa.bool_(),
}


def _write_table(path: Path, columns: str, rows: Iterator[dict[str, Any]]) -> None:
    schema = pa.schema([(name, _TYPES.get(name, pa.float64())) for name in columns.split()])
    with replacing(path) as new:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), new, compression="zstd")


def _summary(plan: Plan, jobs: Sequence[Job], split: Split, recordings: int) -> dict[str, Any]:
    """The content of benchmark.json."""
    config = {name: value for name, value in plan.config.to_json().items() if name not in ("arm", "seed")}
    shards = [shard for shard in split.manifest["shards"] if shard["split"] == split.name]
    lines = [line for job in jobs for line in read_metrics(run_of(plan, job))]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "arms": list(plan.arms),
        "seeds": list(plan.seeds),
        "primary": {"metric": PRIMARY, "mode": primary_mode(plan), "pair": list((*pairs_of(plan), *PAIRS)[0])},
        "split": split.name,
        "recordings": recordings,
        "clips": sum(shard["clips"] for shard in shards if shard["table"] == "clips"),
        "frames": sum(shard["rows"] for shard in shards if shard["table"] == "frames"),
        "data": str(plan.data.resolve()),
        "data_key": {name: Split(plan.data, name).key for name in sorted(split.manifest["splits"])},
        "label_rule": next(split.in_order()).positive,
        "config": config,
        "settings": asdict(plan.settings),
        "draws": plan.draws,
        "commands": [*filter(None, [plan.command]), *(line for job in jobs for line in commands_of(plan, job))],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hazards": list(plan.hazards),
        "hashes": {f"{arm}/seed-{seed}": run_hash(run_of(plan, (arm, seed))) for arm, seed in jobs},
        "machine": ", ".join([platform.platform(), f"{os.cpu_count()} cores", *gpus]),
        "seconds": round(sum(line["clock"]["seconds"] for line in lines if "clock" in line)),
    }
