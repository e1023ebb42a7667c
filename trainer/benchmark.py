"""`prospect-dst benchmark`: train and evaluate arms on the same data; say, with its uncertainty, what differs.

    OUT/runs/ARM/seed-S/            a run of train; scores/ holds what evaluate wrote of it
    OUT/results.parquet             arm, seed, mode, metric, value
    OUT/arms.parquet                the same over seeds, with 95% intervals
    OUT/comparisons.parquet         each pair, metric and mode: difference, interval, p, Holm's p, power
    OUT/benchmark.json              what was asked, data, versions, hashes
    OUT/report.html, figures/       the answer

All arms see the same clips in the same order with the same draws, for the same number of steps under the same loss
balance. A finished run is recognised by the hashes of its checkpoint, data and settings; one that was stopped is
resumed. The question (pair, metric, mode) is settled before anything is trained: `primary`. Holm's correction is over
the pairs compared on one metric in one mode.

    S seeds    B draws of the recordings
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.cluster import available_cores
from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import DST_UPDATE, SPEAKING
from pipeline.storage import make_folder, naming, replacing, write_json
from trainer.arms import ARMS, find_arm
from trainer.checkpoint import run_hash
from trainer.config import MODES, SELF_FED, TEACHER_FORCED, RunOptions, Settings, TrainConfig
from trainer.evaluate import can_live, evaluate
from trainer.evaluation.benchmark_folder import read_benchmark
from trainer.evaluation.bootstrap import Floats, Weights, compare_of, draw_recordings, holm, interval_of, replicate
from trainer.evaluation.conclusions import headline
from trainer.evaluation.evaluate_scores import METRICS_FILE, EvalSplits, hold
from trainer.evaluation.metrics import METRICS, Thresholds, estimators, look_up
from trainer.evaluation.read_scores import read_scores
from trainer.evaluation.report import write_report
from trainer.loader import end_with
from trainer.run_folder import check_resume, lock_folder, run_options
from trainer.run_log import read_metrics
from trainer.train import train

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

Job = tuple[str, int]  # (arm, seed)
Measured = dict[tuple[str, str], dict[str, Floats]]  # (arm, mode) -> each metric's `replicate`, [S, 1 + B]


@dataclass(frozen=True)
class Plan:
    """What a benchmark is a function of, with its data."""

    data: Path
    out: Path
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: tuple[int, ...] = (0, 1, 2)
    config: TrainConfig = field(default_factory=TrainConfig)  # of all arms; its arm and seed are not used
    settings: Settings = field(default_factory=Settings)
    split: str = "test"
    frames_root: Path | None = None
    features: Path | None = None
    live: bool = True  # also free-running
    draws: int = 10_000  # of the recordings
    jobs: int = 0  # runs at a time; 0: one per GPU, without any one per core
    command: str = ""  # that asked for it, for the report
    hazards: tuple[str, ...] = ()  # of the data, for the report


def benchmark(plan: Plan, report_line: Callable[[str], None] = lambda line: None) -> Path:
    """Do what is not done yet, compare, and write the report; its path. `report_line` gets a line per finished run.

    InputError before anything is trained where no threshold could be chosen, where another process works in the same
    folder, and where runs are there that were started otherwise.
    """
    splits, trained_on = hold(plan.data, plan.split), Split(plan.data, "train")
    _check(plan, splits, trained_on)
    jobs: list[Job] = [(arm, seed) for seed, arm in product(plan.seeds, plan.arms)]
    with naming(plan.out), ExitStack() as held:
        make_folder(plan.out)
        lock_folder(plan.out, held)
        left = [job for job in jobs if not is_done(plan, job, splits, trained_on)]
        if len(left) < len(jobs):
            report_line(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
        for count, ((arm, seed), seconds, notes) in enumerate(_run_all(plan, left), len(jobs) - len(left) + 1):
            metrics, primary = _metrics(plan, (arm, seed)), METRICS[PRIMARY]
            values = {mode: look_up(metrics[mode], primary) for mode in MODES if mode in metrics}
            words = [f"{mode} {'undefined' if v is None else f'{v:.3f}'}" for mode, v in values.items()]
            done = f"({seconds:.0f} s, {count} of {len(jobs)})"
            report_line(f"{arm} seed {seed}: {primary.label} {', '.join(words)} {done}")
            for note in notes:
                report_line(f"{arm} seed {seed}: {note}")
        compare_runs(plan, jobs, splits.test)
        return write_report(plan.out)


def answer_of(out: Path) -> str:
    """The answer in one sentence, as it opens the report."""
    return headline(read_benchmark(out))


def _check(plan: Plan, splits: EvalSplits, trained_on: Split) -> None:
    """InputError where the plan makes no sense, or the data can't answer, whatever is trained on it."""
    for name, chosen in (("arms", plan.arms), ("seeds", plan.seeds)):
        if not chosen or len(set(chosen)) < len(chosen):
            raise InputError(f"{name}: {', '.join(map(str, chosen)) or 'none'}, expected one or more, each once")
    if splits.val is None:
        chosen_there = "thresholds are chosen there, and nowhere else; preprocess one"
        raise InputError(f"{plan.data}: no val split beside {plan.split}: {chosen_there}")
    for split in splits.all.values():
        if not split.statistics().counts[SPEAKING, 1]:
            what = f"the assistant never speaks in {split.name}: nothing to measure; choose other data"
            raise InputError(f"{plan.data}: {what}")
    updating = [arm for arm in plan.arms if find_arm(arm).dst_head]
    if updating and not trained_on.statistics().counts[DST_UPDATE, 1]:
        others = ",".join(arm.name for arm in ARMS.values() if not arm.dst_head)
        raise InputError(
            f"{plan.data}: the state never changes in train, so {', '.join(updating)} have nothing to learn from; "
            f"give data with dialog state, or --arms {others}"
        )


# ---- runs --------------------------------------------------------------------------------------------


def run_of(plan: Plan, job: Job) -> Path:
    """OUT/runs/ARM/seed-S."""
    return plan.out / "runs" / job[0] / f"seed-{job[1]}"


def config_of(plan: Plan, job: Job) -> TrainConfig:
    return replace(plan.config, arm=job[0], seed=job[1])


def is_done(plan: Plan, job: Job, splits: EvalSplits, trained_on: Split) -> bool:
    """Whether the job's scores are there and are of its checkpoint, this data and these settings.

    InputError where the run was started with other options.
    """
    run, metrics = run_of(plan, job), _metrics(plan, job)
    if not metrics or not (run / "last").is_dir():
        return False
    config = config_of(plan, job).on("cuda" if torch.cuda.is_available() else "cpu")
    held_out = {"train": trained_on, **splits.all}.get(config.eval_split)
    check_resume(run, run_options(config, trained_on, held_out, plan.features))
    modes = [TEACHER_FORCED, *([SELF_FED] if plan.live and can_live(Thresholds(**metrics["thresholds"])) else [])]
    return bool(
        metrics.get("model") == run_hash(run)
        and metrics["data_key"] == {name: split.key for name, split in splits.all.items()}
        and metrics["settings"] == asdict(plan.settings)
        and all(mode in metrics and (run / "scores" / f"{mode}.parquet").is_file() for mode in modes)
    )


def carry_out(plan: Plan, job: Job) -> tuple[Job, float, tuple[str, ...]]:
    """Train, or resume, and evaluate; (job, seconds, notes of the evaluation)."""
    began, run = time.monotonic(), run_of(plan, job)
    options = RunOptions(progress=False)
    train(plan.data, run, config_of(plan, job), plan.frames_root, plan.features, options, resume=True)
    evaluation = evaluate(
        run, plan.data, plan.split, run / "scores", plan.frames_root, plan.features, plan.settings, plan.live
    )
    return job, time.monotonic() - began, evaluation.notes


def _run_all(plan: Plan, jobs: Sequence[Job]) -> Iterator[tuple[Job, float, tuple[str, ...]]]:
    """The jobs as they are finished; each process has a GPU, or its share of the cores, to itself.

    The share depends on `plan.jobs` alone, not on how many jobs are left: another number of threads rounds otherwise.
    """
    gpus, cores = _gpus(), available_cores()
    at_once = plan.jobs or len(gpus) or cores
    if at_once == 1:
        yield from (carry_out(plan, job) for job in jobs)
        return
    context = get_context("spawn")
    places = context.Queue()
    for worker in range(at_once):
        places.put(gpus[worker % len(gpus)] if gpus else None)
    settings = (places, max(1, cores // at_once), os.getpid())
    with ProcessPoolExecutor(at_once, context, _start_worker, settings) as pool:
        try:
            for future in as_completed([pool.submit(carry_out, plan, job) for job in jobs]):
                yield future.result()
        except BrokenProcessPool:
            raise InputError("a run's process was killed (memory?); run again, or with --jobs 1") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():  # the other runs are resumed from their checkpoints next time
                process.terminate()
            raise


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [*named, *map(str, range(len(named), torch.cuda.device_count()))][: torch.cuda.device_count()]


def _start_worker(places: Any, threads: int, owner: int) -> None:
    """In a new process: take a GPU, or a share of the cores; end when the benchmark does, however that ends."""
    end_with(owner)
    gpu = places.get()
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA has not been started here yet


def _metrics(plan: Plan, job: Job) -> dict[str, Any]:
    """What evaluate wrote of the run; {} where it is missing or damaged: then the run is evaluated again."""
    try:
        return dict(json.loads((run_of(plan, job) / "scores" / METRICS_FILE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


# ---- comparison --------------------------------------------------------------------------------------


def compare_runs(plan: Plan, jobs: Sequence[Job], split: Split) -> None:
    """Write OUT's tables and benchmark.json from the finished runs."""
    recordings = sorted({clip.recording_id for clip in split.in_order()})
    draws, count = draw_recordings(len(recordings), plan.draws), len(recordings)
    metrics = {job: _metrics(plan, job) for job in jobs}
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
        compared = [
            compare_of(measured[a, mode][metric], measured[b, mode][metric], recordings, METRICS[metric].bounds)
            for a, b in pairs
        ]
        corrected = holm([one.p_value for one in compared])
        for (a, b), one, p_holm in zip(pairs, compared, corrected, strict=True):
            primary = (a, b) == question and mode == primary_mode(plan) and metric == PRIMARY
            row = {"a": a, "b": b, "mode": mode, "metric": metric, "p_holm": p_holm, "primary": primary}
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
    "primary"
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


def commands_of(plan: Plan, job: Job) -> list[str]:
    """The two commands that do what `carry_out` does."""
    run, data = str(run_of(plan, job)), str(plan.data)
    sources = {"--frames-root": plan.frames_root, "--features": plan.features}
    more = [word for option, path in sources.items() if path is not None for word in (option, str(path))]
    fit = ["train", data, "--run", run, *_options(config_of(plan, job), TrainConfig()), *more]
    score = ["evaluate", run, data, "--split", plan.split, "--out", f"{run}/scores", *more]
    score += _options(plan.settings, Settings()) + ([] if plan.live else ["--no-self-fed"])
    return [shlex.join(["prospect-dst", *words]) for words in (fit, score)]


def _options(config: Any, defaults: Any) -> list[str]:
    """Command-line options for the fields of a config that are not its defaults."""
    words: list[str] = []
    for name, value in asdict(config).items():
        option = name.replace("_", "-")
        if value == getattr(defaults, name):
            continue
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
            continue
        items = [f"{key}={number}" for key, number in value.items()] if isinstance(value, dict) else value
        words += [f"--{option}", ",".join(items) if isinstance(items, (list, tuple)) else str(items)]
    return words
