"""Compares the runs of a benchmark that are finished, and writes its tables; reads them, scores and logs back.

    results.parquet        rung, seed, mode, metric, value
    rungs.parquet          the same over seeds, with 95% intervals
    comparisons.parquet    each pair, metric and mode: difference, interval, p, Holm's p, power, verdict
    windows.parquet        event F1 over the width of the matching window; groups.parquet by data set and task
    benchmark.json         what was asked, data, versions, hashes, cost

Holm's correction is over the pairs of interest on one metric in one mode; the ladder's other pairs, which only say how
high one has to climb, have no `p_holm`. A verdict is of one 95% interval; that it lies within the margin means "no
larger effect" (two one-sided tests at 2.5%, stricter than the usual TOST, whose 90% interval would have to).

    B draws of the recordings
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy import stats

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.storage import replacing, write_json
from pipeline.terminal import clock, command, counted
from trainer.arms import RUNGS
from trainer.config import FREE_RUNNING, MODES, TEACHER_FORCED, Settings
from trainer.evaluation.bootstrap import Floats, always_valid, compare_of, holm, interval_of, power_before
from trainer.evaluation.event_metrics import count_matches, group_rows, metronomes, references, window_rows
from trainer.evaluation.metrics import METRICS, METRICS_FILE, EvalSplits, Thresholds, replicates, value_at
from trainer.evaluation.plots import Curve, format_number
from trainer.evaluation.scores import Ints, read_scores
from trainer.evaluation.tables import BASELINES
from trainer.plan import MOST_SEEDS, Job, Plan, jobs_with, run_of
from trainer.run_log import read_metrics

PRIMARY: Final = "event_f1"
QUESTION: Final = ("speak+dst", "speak")
CONTROL_PAIRS: Final = (("speak+dst", "speak+markers"), ("speak+dst", "speak+dst-head"))  # what else explains a gain
CHAIN: Final = ("metronome", "history", "texts", "speak", "speak+dst")  # one source of information after another
BEATS, WORSE, UNDECIDED = "beats it", "is worse", "undecided"
SMALL, NO_LARGER = "smaller than the margin, but not zero", "no effect larger than the margin"
ROUNDING: Final = 1e-9
PACKAGES: Final = ("prospect-dst", "torch", "transformers", "numpy", "scipy", "scikit-learn", "pyarrow")
TABLES: Final = {  # columns of OUT's tables
    "results": "rung seed mode metric value recordings",
    "rungs": "rung mode metric value low high seeds recordings",
    "comparisons": "a b mode metric difference low high p_direction p_value p_holm detectable seeds recordings "
    "undefined seed_share always_low always_high primary verdict",
    "windows": "rung seed mode width_s early_s late_s f1 metronome_f1",
    "groups": "by group rung mode value low high seeds recordings events",
}
TYPES: Final = {  # of columns; the others are float64
    **dict.fromkeys(("rung", "a", "b", "mode", "metric", "verdict", "by", "group"), pa.string()),
    **dict.fromkeys(("seed", "seeds", "recordings", "undefined", "events"), pa.int32()),
    "primary": pa.bool_(),
}

Row = dict[str, Any]
Runs = dict[int, dict[str, Floats]]  # seed -> each metric's `replicate`, [1, 1 + B]
Measured = dict[tuple[str, str], Runs]  # by (rung, mode)


# ---- the ladder --------------------------------------------------------------------------------------


def steps_of(rungs: Sequence[str]) -> dict[str, str]:
    """Each rung -> the nearest one below it that is among `rungs`, from the lowest up; left out where there is none."""
    steps = {}
    for rung in (name for name in RUNGS if name in rungs):
        below = RUNGS[rung].below
        while below is not None and below not in rungs:
            below = RUNGS[below].below
        if below is not None:
            steps[rung] = below
    return steps


def question_of(rungs: Sequence[str]) -> tuple[str, str]:
    """The pair that is to be answered: speak+dst against speak, else the highest rung against the one below it."""
    return QUESTION if set(QUESTION) <= set(rungs) else [QUESTION, *steps_of(rungs).items()][-1]


def pairs_of(rungs: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of interest: the question, each rung against the one below it, and the controls of the question."""
    pairs = dict.fromkeys([question_of(rungs), *steps_of(rungs).items(), *CONTROL_PAIRS])
    return [pair for pair in pairs if set(pair) <= set(rungs)]


def verdict_of(low: float | None, high: float | None, margin: float) -> str:
    """What a difference's 95% interval says; its ends belong to it, and so do the margin's."""
    if low is None or high is None:
        return UNDECIDED
    within = max(-low, high) <= margin + ROUNDING
    if low <= 0 <= high:
        return NO_LARGER if within else UNDECIDED
    return SMALL if within else BEATS if low > 0 else WORSE


# ---- before and between runs -------------------------------------------------------------------------


def metrics_of(plan: Plan, job: Job) -> Row:
    """What evaluate wrote of the run; {} where it is missing or damaged: then the run is evaluated again."""
    try:
        return dict(json.loads((run_of(plan, job) / "scores" / METRICS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def settle(plan: Plan) -> None:
    """Write down, before any run, the question and the margin. InputError where it was begun with another margin."""
    path = plan.out / "benchmark.json"
    if not path.exists():
        write_json(path, {"margin": plan.margin, "primary": _question(plan)})
    elif (begun := json.loads(path.read_bytes())["margin"]) != plan.margin:
        problem = f"--margin {plan.margin:g}: this benchmark was begun with {begun:g}"
        raise InputError(f"{problem}; a margin is settled before any run: keep it, or choose another --out")


def _question(plan: Plan) -> Row:
    mode = FREE_RUNNING if plan.live else TEACHER_FORCED
    return {"metric": PRIMARY, "mode": mode, "pair": list(question_of(plan.rungs))}


def power_line(plan: Plan, split: Split) -> str:
    """What the question's runs could show, from the data and from what pairs of them are there already (a pilot)."""
    clips, mode, (a, b) = list(split.in_order()), _question(plan)["mode"], question_of(plan.rungs)
    events = sum(len(references(clip, "assistant")) for clip in clips)
    recordings = len({clip.recording_id for clip in clips})
    values = {job: value_at(metrics_of(plan, job).get(mode, {}), METRICS[PRIMARY].path) for job in jobs_with(plan)}
    pairs = [(values.get((a, seed)), values.get((b, seed))) for seed in plan.seeds]
    pilot = [first - second for first, second in pairs if first is not None and second is not None]
    counts = [len(plan.seeds)] if len(plan.seeds) < MOST_SEEDS else [3, 6, 12]
    sizes = [f"{power_before(recordings, events, count, pilot):.2f} with {counted(count, 'seed')}" for count in counts]
    how = f"as {len(pilot)} pairs of runs differ" if len(pilot) > 1 else "at best: were all seeds alike"
    on = f"On {counted(recordings, 'recording')} with {counted(events, 'event')}"
    return f"{on} a difference in event F1 could be shown of about {', '.join(sizes)}, {how}"


def what_narrows(row: Mapping[str, Any], pair_s: float) -> str:
    """The question's half-width, and what it would be after twice as many runs or recordings, the better first.

    row: of comparisons.parquet, with an interval; pair_s: seconds of such a pair. Seeds and recordings are taken as
    independent: the part due to seeds goes with Student's t over the root of their number, the other with the root.
    """
    seeds, recordings = row["seeds"], row["recordings"]
    if seeds == 1:
        return f"a second pair of runs, about {clock(round(pair_s))}, would tell how much seeds differ"
    half = (row["high"] - row["low"]) / 2
    by_recording = half * (1 - row["seed_share"])
    factor, doubled = (float(stats.t.ppf(0.975, n - 1)) / math.sqrt(n) for n in (seeds, 2 * seeds))
    by_seed = math.sqrt(half**2 - by_recording**2)
    more = f"{counted(seeds, 'more pair')} of runs, about {clock(round(seeds * pair_s))}"
    choices = [
        (math.hypot(by_seed * doubled / factor, by_recording), more),
        (math.hypot(by_seed, by_recording / math.sqrt(2)), f"twice the {counted(recordings, 'recording')}"),
    ]
    return f"±{half:.3f} now; " + "; ".join(f"with {option}: ±{width:.3f}" for width, option in sorted(choices))


# ---- tables ------------------------------------------------------------------------------------------


def compare_runs(plan: Plan, jobs: Sequence[Job], held: EvalSplits) -> None:
    """Write OUT's tables and benchmark.json from those of the jobs that are finished."""
    split = held.test
    metrics = {job: of_run for job in jobs if (of_run := metrics_of(plan, job))}
    recordings = len({clip.recording_id for clip in split.in_order()})
    measured: Measured = {}
    matches: dict[tuple[str, str], dict[int, Ints]] = {}
    for rung, mode in product(RUNGS, MODES):
        for seed in sorted(seed for name, seed in metrics if name == rung and mode in metrics[name, seed]):
            chosen, path = metrics[rung, seed]["thresholds"], run_of(plan, (rung, seed)) / "scores" / f"{mode}.parquet"
            stamp = (path, path.stat().st_mtime_ns)
            values, events = _read_run(stamp, json.dumps(chosen), split, plan.settings, plan.draws)
            measured.setdefault((rung, mode), {})[seed] = values
            if events is not None:
                matches.setdefault((rung, mode), {})[seed] = events
    results = (
        {"rung": rung, "seed": seed, "mode": mode, "metric": metric.name, "recordings": recordings}
        | {"value": value_at(of_run[mode], metric.path)}
        for ((rung, seed), of_run), mode in product(metrics.items(), MODES)
        for metric in (METRICS.values() if mode in of_run else ())
    )
    intervals = (
        {"rung": rung, "mode": mode, "metric": name, "seeds": len(runs), "recordings": recordings}
        | asdict(interval_of(np.concatenate([run[name] for run in runs.values()]), recordings, metric.bounds))
        for ((rung, mode), runs), (name, metric) in product(measured.items(), METRICS.items())
    )
    rows: dict[str, Iterable[Row]] = {
        "results": results,
        "rungs": intervals,
        "comparisons": _comparison_rows(plan, measured, recordings),
        "windows": window_rows(matches, plan.settings, metronomes(split, held.val, plan.settings)),
        "groups": group_rows(matches, split, plan.settings, plan.draws),
    }
    for table, columns in TABLES.items():
        schema = pa.schema([(name, TYPES.get(name, pa.float64())) for name in columns.split()])
        with replacing(plan.out / f"{table}.parquet") as new:
            pq.write_table(pa.Table.from_pylist(list(rows[table]), schema=schema), new, compression="zstd")
    write_json(plan.out / "benchmark.json", _summary(plan, metrics, split, recordings))


@cache
def _read_run(
    file: tuple[Path, int], thresholds: str, split: Split, settings: Settings, draws: int
) -> tuple[dict[str, Floats], Ints | None]:
    """(each metric's [1, 1 + B], its events if it has a threshold) of a scores file, named with its time: read once."""
    by_kind, clips = json.loads(thresholds), read_scores(file[0], {split.name: split})[split.name]
    chosen = Thresholds(by_kind["frame"], by_kind["event"])
    return replicates(clips, chosen, settings, draws), count_matches(clips, chosen.event.get("speaking"), settings)


def _comparison_rows(plan: Plan, measured: Measured, recordings: int) -> Iterator[Row]:
    """Each pair on the seeds that both have: those of interest, and by the primary metric the others of CHAIN, as a
    rung may beat the next lower one and not the lowest. A control has no model and no seeds: any run of it serves."""
    question = _question(plan)
    for mode, metric in product(MODES, METRICS):
        rungs, bounds, rows = [rung for rung, known in measured if known == mode], METRICS[metric].bounds, []
        interest, chain = pairs_of(rungs), [rung for rung in CHAIN if rung in rungs and metric == PRIMARY]
        others = [(high, low) for low, high in combinations(chain, 2) if (high, low) not in interest]
        for pair in [*interest, *others]:
            runs = [measured[rung, mode] for rung in pair]
            having = [set(by_seed) for rung, by_seed in zip(pair, runs, strict=True) if RUNGS[rung].kind != "control"]
            if not (seeds := sorted(set.intersection(*having or map(set, runs)))):
                continue
            a, b = (
                np.concatenate([by_seed.get(seed, next(iter(by_seed.values())))[metric] for seed in seeds])
                for by_seed in runs
            )
            one, (low, high) = compare_of(a, b, recordings, bounds), always_valid(a - b, recordings, bounds)
            row = {"a": pair[0], "b": pair[1], "mode": mode, "metric": metric, "always_low": low, "always_high": high}
            row["primary"] = {"metric": metric, "mode": mode, "pair": list(pair)} == question
            row["verdict"] = verdict_of(one.low, one.high, plan.margin) if metric == PRIMARY else None
            rows.append(row | asdict(one))
        tested = [row for row in rows if (row["a"], row["b"]) in interest]
        for row, p_holm in zip(tested, holm([row["p_value"] for row in tested]), strict=True):
            row["p_holm"] = p_holm
        yield from rows


def _summary(plan: Plan, metrics: dict[Job, Row], split: Split, recordings: int) -> Row:
    """The content of benchmark.json."""
    config = {name: value for name, value in asdict(plan.config).items() if name not in ("arm", "seed")}
    shards = [shard for shard in split.manifest["shards"] if shard["split"] == split.name]
    trained = [job for job in metrics if RUNGS[job[0]].kind == "arm"]
    cost: dict[str, dict[str, float]] = {}  # of training, as the runs logged it
    for rung, seed in trained:
        lines = [line for line in read_metrics(run_of(plan, (rung, seed))) if "evaluation" not in line]
        total = cost.setdefault(rung, {"runs": 0, "steps": 0, "tokens": 0, "seconds": 0})
        total["runs"] += 1
        total["steps"] += max((line["step"] for line in lines), default=0)
        total["tokens"] += sum(line["tokens"] for line in lines)
        total["seconds"] += sum(line["clock"]["seconds"] for line in lines)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "rungs": [rung for rung in RUNGS if rung in {name for name, _ in metrics}],
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
        "commands": [*filter(None, [plan.command])],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hazards": list(plan.hazards),
        "hashes": {f"{rung}/seed-{seed}": of_run["model"] for (rung, seed), of_run in metrics.items()},
        "machine": ", ".join([platform.platform(), f"{os.cpu_count()} cores", *gpus]),
        "cost": cost,
        "seconds": round(sum(total["seconds"] for total in cost.values())),
    }


# ---- what is there afterwards ------------------------------------------------------------------------


@dataclass
class Benchmark:
    """OUT's tables, NaN as None."""

    out: Path
    info: Row  # benchmark.json
    scores: dict[tuple[str, str, str], Row]  # (rung, mode, metric) -> value, low, high, seeds, recordings
    comparisons: dict[tuple[str, str, str, str], Row]  # (rung, rung, mode, metric) -> difference, low, high, p_*, ...
    windows: pl.DataFrame  # rung, seed, mode, width_s, early_s, late_s, f1, metronome_f1
    groups: list[Row]  # by, group, rung, mode, value, low, high, seeds, recordings, events
    metrics: dict[tuple[str, int], Row]  # (rung, seed) -> its metrics.json; a run that has none is absent

    def __post_init__(self) -> None:
        self.pair: tuple[str, str] = tuple(self.info["primary"]["pair"])  # of the question that was fixed beforehand
        self.rungs: list[str] = list(self.info["rungs"])  # that were measured, from the lowest
        self.modes = [mode for mode in MODES if any(mode == measured for _, measured, _ in self.scores)]  # measured
        wanted = str(self.info["primary"]["mode"])  # `mode`, the answer's, is the primary one where it was measured
        self.mode = wanted if wanted in self.modes or not self.modes else self.modes[-1]

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
        problem, again = str(error).splitlines()[0], command("benchmark", "DATA", "--out", out)
        raise InputError(f"{out}: not what benchmark leaves ({problem}); run {again}") from None
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
    return f"not evaluated {mode}: no threshold could be chosen, as val has no frame to speak at {where}"


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
