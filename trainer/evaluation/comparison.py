"""Compares the runs of a benchmark that are finished, and writes its tables.

    results.parquet        arm, seed, mode, metric, value
    arms.parquet           the same over seeds, with 95% intervals
    comparisons.parquet    each pair, metric and mode: difference, interval, p, Holm's p, power, verdict
    windows.parquet        event F1 over the width of the matching window; groups.parquet by data set and task
    benchmark.json         what was asked, data, versions, hashes, cost

A pair is compared on the seeds that both have. Holm's correction is over the pairs of interest on one metric in one
mode; `p_holm` is null for the ladder's other pairs, which only say how high one has to climb.

    B draws of the recordings
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.storage import replacing, write_json
from pipeline.terminal import counted
from trainer.arms import RUNGS, find_rung
from trainer.config import MODES, SELF_FED, TEACHER_FORCED, Settings
from trainer.evaluation.bootstrap import Floats, always_valid, compare_of, holm, interval_of, power_before
from trainer.evaluation.breakdown import HEAD, Matches, count_matches, group_rows, metronomes, window_rows
from trainer.evaluation.evaluate_scores import METRICS_FILE
from trainer.evaluation.event_metrics import references
from trainer.evaluation.ladder import PRIMARY, ladder_pairs, pairs_of, question_of, verdict_of
from trainer.evaluation.metrics import METRICS, Thresholds, look_up, replicates
from trainer.evaluation.scores import read_scores
from trainer.plan import MOST_SEEDS, Job, Plan, commands_of, run_of
from trainer.run_log import read_metrics

PACKAGES: Final = ("prospect-dst", "torch", "transformers", "numpy", "scipy", "scikit-learn", "pyarrow")

Runs = dict[int, dict[str, Floats]]  # seed -> each metric's `replicate`, [1, 1 + B]
Measured = dict[tuple[str, str], Runs]  # by (rung, mode)


def metrics_of(plan: Plan, job: Job) -> dict[str, Any]:
    """What evaluate wrote of the run; {} where it is missing or damaged: then the run is evaluated again."""
    try:
        return dict(json.loads((run_of(plan, job) / "scores" / METRICS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def settle(plan: Plan) -> None:
    """Write down, before any run, the question and the margin. InputError where it was begun with another margin."""
    path = plan.out / "benchmark.json"
    try:
        begun = json.loads(path.read_bytes()).get("margin", plan.margin)
    except (OSError, ValueError):
        write_json(path, {"margin": plan.margin, "primary": _question(plan)})
        return
    if begun != plan.margin:
        what = f"--margin {plan.margin:g}: this benchmark was begun with {begun:g}"
        raise InputError(f"{what}; a margin is settled before any run: keep it, or choose another --out")


def _question(plan: Plan) -> dict[str, Any]:
    return {"metric": PRIMARY, "mode": primary_mode(plan), "pair": list(question_of(plan.arms))}


def power_line(plan: Plan, split: Split) -> str:
    """What the question's runs could show, from the data and from what pairs of them are there already (a pilot)."""
    clips, (a, b) = list(split.in_order()), question_of(plan.arms)
    events = sum(len(references(clip, "assistant")) for clip in clips)
    recordings = len({clip.recording_id for clip in clips})
    reports = [[metrics_of(plan, (arm, seed)).get(primary_mode(plan), {}) for arm in (a, b)] for seed in plan.seeds]
    values = [[look_up(report, METRICS[PRIMARY]) for report in of_seed] for of_seed in reports]
    pilot = [first - second for first, second in values if first is not None and second is not None]
    on = f"On {counted(recordings, 'recording')} with {counted(events, 'event')}"
    if len(pilot) < 2:
        least = f"{power_before(recordings, events, len(plan.seeds)):.2f}"
        return f"{on} a difference in event F1 under about {least} will hardly be shown, however alike the seeds are"
    counts = [len(plan.seeds)] if len(plan.seeds) < MOST_SEEDS else [3, 6, 12]
    sizes = [f"{power_before(recordings, events, count, pilot):.2f} with {counted(count, 'seed')}" for count in counts]
    found = f"as {len(pilot)} pairs of runs differ"
    return f"{on} a difference in event F1 could be shown of about {', '.join(sizes)}, {found}"


def compare_runs(plan: Plan, jobs: Sequence[Job], split: Split) -> None:
    """Write OUT's tables and benchmark.json from those of the jobs that are finished."""
    metrics = {job: found for job in jobs if (found := metrics_of(plan, job))}
    count = len({clip.recording_id for clip in split.in_order()})
    measured: Measured = {}
    matches: dict[tuple[str, str], dict[int, Matches]] = {}
    for rung, mode in product([rung.name for rung in RUNGS], MODES):
        for seed in sorted(seed for name, seed in metrics if name == rung and mode in metrics[name, seed]):
            chosen, path = metrics[rung, seed]["thresholds"], run_of(plan, (rung, seed)) / "scores" / f"{mode}.parquet"
            stamp = (path, path.stat().st_mtime_ns)
            run = _read_run(stamp, json.dumps(chosen), split, plan.settings, plan.draws)
            measured.setdefault((rung, mode), {})[seed] = run[0]
            if run[1] is not None:
                matches.setdefault((rung, mode), {})[seed] = run[1]
    val = Split(plan.data, "val") if "val" in split.manifest["splits"] else None
    of_widths = window_rows(matches, plan.settings, metronomes(split, val, plan.settings))
    _write_table(plan.out / "results.parquet", _RESULTS, _result_rows(metrics, count))
    _write_table(plan.out / "arms.parquet", _INTERVALS, _interval_rows(measured, count))
    _write_table(plan.out / "comparisons.parquet", _COMPARISONS, _comparison_rows(plan, measured, count))
    _write_table(plan.out / "windows.parquet", _WINDOWS, of_widths)
    _write_table(plan.out / "groups.parquet", _GROUPS, group_rows(matches, split, plan.settings, plan.draws))
    write_json(plan.out / "benchmark.json", _summary(plan, metrics, split, count))


@cache
def _read_run(
    file: tuple[Path, int], thresholds: str, split: Split, settings: Settings, draws: int
) -> tuple[dict[str, Floats], Matches | None]:
    """(each metric's [1, 1 + B], its events if it has a threshold) of a scores file, named with its time: read once."""
    found, clips = json.loads(thresholds), read_scores(file[0], {split.name: split})[split.name]
    chosen = Thresholds(found["frame"], found["event"])
    return replicates(clips, chosen, settings, draws), count_matches(clips, chosen.event.get(HEAD), settings)


def _result_rows(metrics: dict[Job, dict[str, Any]], recordings: int) -> Iterator[dict[str, Any]]:
    for ((arm, seed), of_run), mode in product(metrics.items(), MODES):
        for metric in METRICS.values() if mode in of_run else ():
            row = {"arm": arm, "seed": seed, "mode": mode, "metric": metric.name, "recordings": recordings}
            yield row | {"value": look_up(of_run[mode], metric)}


def _interval_rows(measured: Measured, recordings: int) -> Iterator[dict[str, Any]]:
    for ((arm, mode), runs), metric in product(measured.items(), METRICS):
        row = {"arm": arm, "mode": mode, "metric": metric, "seeds": len(runs), "recordings": recordings}
        values = np.concatenate([run[metric] for run in runs.values()])
        yield row | asdict(interval_of(values, recordings, METRICS[metric].bounds))


def _comparison_rows(plan: Plan, measured: Measured, recordings: int) -> Iterator[dict[str, Any]]:
    for mode, metric in product(MODES, METRICS):
        rungs = [rung for rung, known in measured if known == mode]
        found = [
            row for a, b in pairs_of(rungs) if (row := _compared(plan, measured, (a, b), mode, metric, recordings))
        ]
        for row, p_holm in zip(found, holm([row["p_value"] for row in found]), strict=True):
            yield row | {"p_holm": p_holm}
        for pair in ladder_pairs(rungs) if metric == PRIMARY else ():
            yield from filter(None, [_compared(plan, measured, pair, mode, metric, recordings)])


def _compared(
    plan: Plan, measured: Measured, pair: tuple[str, str], mode: str, metric: str, recordings: int
) -> dict[str, Any]:
    """A row of comparisons.parquet; {} where the two have no seed in common.

    A control without a model has no seeds: where it lacks one, any run of it serves, as each comes out the same.
    """
    (a, b), runs = pair, [measured[rung, mode] for rung in pair]
    having = [set(of) for rung, of in zip(pair, runs, strict=True) if find_rung(rung).kind != "control"]
    if not (seeds := sorted(set.intersection(*having or [set(of) for of in runs]))):
        return {}
    first, second = (np.concatenate([of.get(seed, next(iter(of.values())))[metric] for seed in seeds]) for of in runs)
    bounds = METRICS[metric].bounds
    one = compare_of(first, second, recordings, bounds)
    always = dict(zip(("always_low", "always_high"), always_valid(first - second, recordings, bounds), strict=True))
    primary = pair == question_of(plan.arms) and mode == primary_mode(plan) and metric == PRIMARY
    verdict = verdict_of(one.low, one.high, plan.margin) if metric == PRIMARY else None
    row = {"a": a, "b": b, "mode": mode, "metric": metric, "primary": primary, "verdict": verdict}
    return row | always | asdict(one)


def primary_mode(plan: Plan) -> str:
    """The mode that the answer is about."""
    return SELF_FED if plan.live else TEACHER_FORCED


_RESULTS = "arm seed mode metric value recordings"
_INTERVALS = "arm mode metric value low high seeds recordings"
_COMPARISONS = (
    "a b mode metric difference low high p_direction p_value p_holm detectable seeds recordings undefined seed_share "
    "always_low always_high primary verdict"
)
_WINDOWS = "rung seed mode width_s early_s late_s f1 metronome_f1"
_GROUPS = "by group rung mode value low high seeds recordings events"
_TYPES: Final = {  # of columns; the others are float64
    **dict.fromkeys(("arm", "rung", "a", "b", "mode", "metric", "verdict", "by", "group"), pa.string()),
    **dict.fromkeys(("seed", "seeds", "recordings", "undefined", "events"), pa.int32()),
    "primary": pa.bool_(),
}


def _write_table(path: Path, columns: str, rows: Iterator[dict[str, Any]]) -> None:
    schema = pa.schema([(name, _TYPES.get(name, pa.float64())) for name in columns.split()])
    with replacing(path) as new:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), new, compression="zstd")


def _summary(plan: Plan, metrics: dict[Job, dict[str, Any]], split: Split, recordings: int) -> dict[str, Any]:
    """The content of benchmark.json."""
    config = {name: value for name, value in plan.config.to_json().items() if name not in ("arm", "seed")}
    shards = [shard for shard in split.manifest["shards"] if shard["split"] == split.name]
    trained = [job for job in metrics if find_rung(job[0]).kind == "arm"]
    cost = {job: _cost_of(plan, job) for job in trained}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "rungs": [rung.name for rung in RUNGS if rung.name in {name for name, _ in metrics}],
        "planned": list(plan.arms),
        "seeds": list(plan.seeds) if len(plan.seeds) < MOST_SEEDS else sorted({seed for _, seed in metrics}),
        "margin": plan.margin,
        "primary": _question(plan),
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
        "commands": [*filter(None, [plan.command]), *(line for job in trained for line in commands_of(plan, job))],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hazards": list(plan.hazards),
        "hashes": {f"{rung}/seed-{seed}": of_run["model"] for (rung, seed), of_run in metrics.items()},
        "machine": ", ".join([platform.platform(), f"{os.cpu_count()} cores", *gpus]),
        "cost": {
            rung: {"runs": len(runs)}
            | {name: sum(run[name] for run in runs) for name in ("steps", "tokens", "seconds")}
            for rung in dict.fromkeys(rung for rung, _ in trained)
            if (runs := [of for (name, _), of in cost.items() if name == rung])
        },
        "seconds": round(sum(of["seconds"] for of in cost.values())),
    }


def _cost_of(plan: Plan, job: Job) -> dict[str, float]:
    """What training the run took, as it logged it."""
    lines = [line for line in read_metrics(run_of(plan, job)) if "evaluation" not in line]
    totals = {
        "tokens": sum(line["tokens"] for line in lines),
        "steps": max((line["step"] for line in lines), default=0),
    }
    return totals | {"seconds": sum(line["clock"]["seconds"] for line in lines)}
