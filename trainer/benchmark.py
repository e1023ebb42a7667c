"""Trains and evaluates arms on the same data, and says with its uncertainty what differs: `prospect-dst benchmark`.

    OUT/runs/ARM/seed-S/            a run of train; scores/ holds what evaluate wrote of it
    OUT/results.parquet             arm, seed, mode, metric, value
    OUT/arms.parquet                the same over seeds, with 95% intervals
    OUT/comparisons.parquet         each pair of interest, metric and mode: difference, interval, p, Holm's p, power
    OUT/benchmark.json              what was asked, data, versions, hashes
    OUT/report.html, figures/       the answer

All arms see the same clips in the same order with the same draws, for the same number of steps under the same loss
balance. Runs are independent and can go side by side, one per GPU; a run that is finished is recognised by the hashes
of its checkpoint, data and settings, one that was stopped goes on. The question (pair, metric, mode) is settled before
anything is trained: `primary`. Holm's correction is over the pairs compared on one metric in one mode.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import DST_UPDATE, SPEAKING
from pipeline.storage import make_folder, naming, replacing, write_json
from trainer.arms import ARMS, find_arm
from trainer.checkpoint import run_hash
from trainer.config import RunOptions, Settings, TrainConfig
from trainer.evaluate import can_live, evaluate
from trainer.evaluation.benchmark_folder import read_benchmark
from trainer.evaluation.bootstrap import Floats, Weights, compare_of, draw_recordings, holm, interval_of, replicate
from trainer.evaluation.conclusions import headline
from trainer.evaluation.evaluate_scores import METRICS_FILE, MODES, SELF_FED, TEACHER_FORCED, EvalSplits, hold
from trainer.evaluation.metrics import METRICS, Thresholds, estimators, look_up
from trainer.evaluation.read_scores import read_scores
from trainer.evaluation.report import write_report
from trainer.loader import end_with
from trainer.run_folder import SOURCES, lock_folder, read_options, run_options
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
    live: bool = True  # also self-fed
    draws: int = 10_000  # of the recordings
    jobs: int = 0  # runs at a time; 0: one per GPU, without any one per core
    command: str = ""  # that asked for it, for the report
    hazards: tuple[str, ...] = ()  # of the data, for the report

    def __post_init__(self) -> None:
        for arm in self.arms:
            find_arm(arm)
        for name, chosen in (("arms", self.arms), ("seeds", self.seeds)):
            if not chosen or len(set(chosen)) < len(chosen):
                raise InputError(f"{name}: {', '.join(map(str, chosen)) or 'none'}, expected one or more, each once")

    @property
    def mode(self) -> str:
        """The mode that the answer is about."""
        return SELF_FED if self.live else TEACHER_FORCED

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of interest that can be compared; the first is the question."""
        known = [pair for pair in PAIRS if set(pair) <= set(self.arms)]
        return known or [(arm, self.arms[0]) for arm in self.arms[1:]]


@dataclass(frozen=True)
class Job:
    """One run: an arm and a seed."""

    plan: Plan
    arm: str
    seed: int

    @property
    def run(self) -> Path:
        return self.plan.out / "runs" / self.arm / f"seed-{self.seed}"

    @property
    def config(self) -> TrainConfig:
        return replace(self.plan.config, arm=self.arm, seed=self.seed)

    @property
    def name(self) -> str:
        return f"{self.arm} seed {self.seed}"

    @property
    def commands(self) -> list[str]:
        """The two commands that do the same."""
        plan = self.plan
        where = {"--frames-root": plan.frames_root, "--features": plan.features}
        more = [word for name, path in where.items() if path is not None for word in (name, str(path))]
        run, data = str(self.run), str(plan.data)
        fit = ["train", data, "--run", run, *_options(self.config, TrainConfig()), *more]
        score = ["evaluate", run, data, "--split", plan.split, "--out", f"{run}/scores", *more]
        score += _options(plan.settings, Settings()) + ([] if plan.live else ["--no-self-fed"])
        return [shlex.join(["prospect-dst", *words]) for words in (fit, score)]


def _options(values: Any, defaults: Any) -> list[str]:
    """Command-line options for the fields of a config that are not its defaults."""
    words: list[str] = []
    for one in fields(values):
        value = getattr(values, one.name)
        if value == getattr(defaults, one.name):
            continue
        option = f"--{one.name.replace('_', '-')}"
        if isinstance(value, dict):
            value = ",".join(f"{part}={number}" for part, number in value.items())
        option = f"--no-{option[2:]}" if value is False else option
        words += (
            [option]
            if isinstance(value, bool)
            else [option, ",".join(value) if isinstance(value, tuple) else str(value)]
        )
    return words


def benchmark(plan: Plan, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Do what is not done yet, compare, and write the report; its path. `tell` gets a line per finished run.

    Raises InputError before anything is trained where no threshold could be chosen, where another process works in
    the same folder, and where runs are there that were begun otherwise.
    """
    held, learned = hold(plan.data, plan.split), Split(plan.data, "train")
    _check_data(plan, held, learned)
    jobs = [Job(plan, arm, seed) for seed, arm in product(plan.seeds, plan.arms)]
    with naming(plan.out), ExitStack() as held_open:
        make_folder(plan.out)
        lock_folder(plan.out, held_open)
        left = [job for job in jobs if not is_done(job, held, learned)]
        if len(left) < len(jobs):
            tell(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
        for count, (job, found) in enumerate(_carry_out(left, plan.jobs), len(jobs) - len(left) + 1):
            tell(f"{job.name}: {_said(job)} ({found.seconds:.0f} s, {count} of {len(jobs)})")
            for note in found.notes:
                tell(f"{job.name}: {note}")
        compare_runs(plan, jobs, held.test)
        return write_report(plan.out)


def _check_data(plan: Plan, held: EvalSplits, learned: Split) -> None:
    """InputError where the data can't answer, whatever is trained on it."""
    if held.val is None:
        raise InputError(
            f"{plan.data}: no val split beside {plan.split}: thresholds are chosen there, and nowhere else; "
            f"preprocess one"
        )
    for split in held.all.values():
        if not split.statistics().counts[SPEAKING, 1]:
            raise InputError(
                f"{plan.data}: the assistant never speaks in {split.name}: nothing to measure; choose other data"
            )
    updating = [arm for arm in plan.arms if find_arm(arm).dst_head]
    if updating and not learned.statistics().counts[DST_UPDATE, 1]:
        without = ",".join(arm.name for arm in ARMS.values() if not arm.dst_head)
        raise InputError(
            f"{plan.data}: the state never changes in train, so {', '.join(updating)} have nothing to learn from; "
            f"give data with dialog state, or --arms {without}"
        )


def _said(job: Job) -> str:
    """The primary metric of a run."""
    metrics = _metrics(job)
    found = {mode: look_up(metrics[mode], METRICS[PRIMARY]) for mode in MODES if mode in metrics}
    words = [f"{mode} {'undefined' if value is None else f'{value:.3f}'}" for mode, value in found.items()]
    return f"{METRICS[PRIMARY].label} {', '.join(words)}"


# ---- runs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What became of a job, beside its files."""

    seconds: float
    notes: tuple[str, ...]


def is_done(job: Job, held: EvalSplits, learned: Split) -> bool:
    """Whether the job's scores are there and are of its checkpoint, this data, these options and settings.

    learned: the train split, opened (and hashed) once for all jobs.

    Raises InputError where the run's folder was begun with other options.
    """
    scores, plan = job.run / "scores", job.plan
    if not (scores / METRICS_FILE).is_file() or not (job.run / "last").is_dir():
        return False
    begun = read_options(job.run)
    config = job.config.on("cuda" if torch.cuda.is_available() else "cpu")
    changed = config.differences(TrainConfig.from_json(begun["config"]))
    if changed:
        raise InputError(f"{job.run}: {'; '.join(changed)}; benchmark into a new --out")
    eval_split = held.all.get(plan.config.eval_split)
    now = run_options(job.config, learned, eval_split, plan.features) if eval_split else begun
    metrics = _metrics(job)
    if not metrics:
        return False
    modes = [TEACHER_FORCED, *([SELF_FED] if plan.live and can_live(Thresholds(**metrics["thresholds"])) else [])]
    return bool(
        metrics.get("model") == run_hash(job.run)
        and metrics["data_key"] == {name: split.key for name, split in held.all.items()}
        and metrics["settings"] == asdict(plan.settings)
        and all(begun[source] == now[source] for source in SOURCES)
        and all(mode in metrics and (scores / f"{mode}.parquet").is_file() for mode in modes)
    )


def do(job: Job) -> Done:
    """Train, or go on training, and evaluate."""
    began, plan = time.monotonic(), job.plan
    options = RunOptions(progress=False)
    train(plan.data, job.run, job.config, plan.frames_root, plan.features, options, resume=True)
    found = evaluate(
        job.run, plan.data, plan.split, job.run / "scores", plan.frames_root, plan.features, plan.settings, plan.live
    )
    return Done(time.monotonic() - began, found.notes)


def _carry_out(jobs: Sequence[Job], at_once: int) -> Iterator[tuple[Job, Done]]:
    """The jobs as they are finished; each process has a GPU, or its share of the cores, to itself.

    The share depends on `at_once` alone, not on how many jobs are left: another number of threads rounds otherwise.
    """
    gpus, cores = _gpus(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = at_once or len(gpus) or cores
    threads = max(1, cores // at_once)
    if at_once == 1:
        yield from ((job, do(job)) for job in jobs)
        return
    context = get_context("spawn")
    places = context.Queue()
    for worker in range(at_once):
        places.put(gpus[worker % len(gpus)] if gpus else None)
    todo = list(reversed(jobs))
    with ProcessPoolExecutor(at_once, context, _settle, (places, threads, os.getpid())) as pool:
        try:
            running = {pool.submit(do, job): job for job in _take(todo, at_once)}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job, done = running.pop(future), future.result()
                    running |= {pool.submit(do, job): job for job in _take(todo, 1)}
                    yield job, done
        except BrokenProcessPool:
            raise InputError("a run's process was killed (memory?); run again, or with --jobs 1") from None
        except BaseException:
            for process in active_children():  # the other runs go on from their checkpoints next time
                process.terminate()
            raise


def _take(jobs: list[Job], count: int) -> list[Job]:
    return [jobs.pop() for _ in range(min(count, len(jobs)))]


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [*named, *map(str, range(len(named), torch.cuda.device_count()))][: torch.cuda.device_count()]


def _settle(places: Any, threads: int, owner: int) -> None:
    """In a new process: take a GPU, or a share of the cores; end when the benchmark does, however that ends."""
    end_with(owner)
    gpu = places.get()
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA has not been started here yet


def _metrics(job: Job) -> dict[str, Any]:
    """What evaluate wrote of the run; {} where it is damaged: then it is to be evaluated again."""
    try:
        return dict(json.loads((job.run / "scores" / METRICS_FILE).read_bytes()))
    except (ValueError, TypeError):
        return {}


# ---- what they show ----------------------------------------------------------------------------------

Measured = dict[tuple[str, str], dict[str, Floats]]  # (arm, mode) -> each metric's `replicate`, [S, 1 + B]


def compare_runs(plan: Plan, jobs: Sequence[Job], split: Split) -> None:
    """Write OUT's tables and benchmark.json from the finished runs."""
    recordings = sorted({clip.recording_id for clip in split.in_order()})
    measured = _measured(plan, split, recordings)
    _write_table(plan.out / "results.parquet", RESULTS, _result_rows(jobs, len(recordings)))
    _write_table(plan.out / "arms.parquet", INTERVALS, _interval_rows(measured, len(recordings)))
    _write_table(plan.out / "comparisons.parquet", COMPARISONS, _comparison_rows(plan, measured, len(recordings)))
    write_json(plan.out / "benchmark.json", _about(plan, jobs, split, len(recordings)))


def answer_of(out: Path) -> str:
    """The answer in one sentence, as it opens the report."""
    return headline(read_benchmark(out))


def _measured(plan: Plan, split: Split, recordings: Sequence[str]) -> Measured:
    """One run's scores are held at a time."""
    draws, measured = draw_recordings(len(recordings), plan.draws), {}
    for arm, mode in product(plan.arms, MODES):
        jobs = [Job(plan, arm, seed) for seed in plan.seeds]
        if all(mode in _metrics(job) for job in jobs):
            seeds = [_replicates(job, mode, split, recordings, draws) for job in jobs]
            measured[arm, mode] = {metric: np.concatenate([of[metric] for of in seeds]) for metric in METRICS}
    return measured


def _replicates(job: Job, mode: str, split: Split, recordings: Sequence[str], draws: Weights) -> dict[str, Floats]:
    """Each metric's [1, 1 + B] of one run."""
    clips = read_scores(job.run / "scores" / f"{mode}.parquet", {split.name: split})[split.name]
    found = estimators(clips, Thresholds(**_metrics(job)["thresholds"]), job.plan.settings, recordings)
    return {metric: replicate([estimator], draws) for metric, estimator in found.items()}


def _result_rows(jobs: Iterable[Job], recordings: int) -> Iterator[dict[str, Any]]:
    for job in jobs:
        metrics = _metrics(job)
        for mode, metric in product(MODES, METRICS.values()):
            if mode in metrics:
                value = look_up(metrics[mode], metric)
                found = {"metric": metric.name, "value": value, "recordings": recordings}
                yield {"arm": job.arm, "seed": job.seed, "mode": mode, **found}


def _interval_rows(measured: Measured, recordings: int) -> Iterator[dict[str, Any]]:
    for ((arm, mode), values), metric in product(measured.items(), METRICS):
        found = interval_of(values[metric], recordings, METRICS[metric].bounds)
        counts = {"seeds": len(values[metric]), "recordings": recordings}
        yield {"arm": arm, "mode": mode, "metric": metric, **asdict(found), **counts}


def _comparison_rows(plan: Plan, measured: Measured, recordings: int) -> Iterator[dict[str, Any]]:
    for mode, metric in product(MODES, METRICS):
        pairs = [pair for pair in plan.pairs if all((arm, mode) in measured for arm in pair)]
        found = [
            compare_of(measured[a, mode][metric], measured[b, mode][metric], recordings, METRICS[metric].bounds)
            for a, b in pairs
        ]
        corrected = holm([one.p_value for one in found])
        for (a, b), one, p in zip(pairs, found, corrected, strict=True):
            primary = (a, b) == plan.pairs[0] and mode == plan.mode and metric == PRIMARY
            yield {"a": a, "b": b, "mode": mode, "metric": metric, **asdict(one), "p_holm": p, "primary": primary}


def _about(plan: Plan, jobs: Sequence[Job], split: Split, recordings: int) -> dict[str, Any]:
    first = next(split.in_order())
    clips, frames = (sum(s[key] for s in split.manifest["shards"] if s["split"] == split.name and s["table"] == table)
                     for key, table in (("clips", "clips"), ("rows", "frames")))  # fmt: skip
    return {
        "arms": list(plan.arms),
        "seeds": list(plan.seeds),
        "primary": {"metric": PRIMARY, "mode": plan.mode, "pair": list((*plan.pairs, *PAIRS)[0])},
        "split": split.name,
        "recordings": recordings,
        "clips": clips,
        "frames": frames,
        "data": str(plan.data.resolve()),
        "data_key": {name: Split(plan.data, name).key for name in sorted(split.manifest["splits"])},
        "label_rule": first.positive,
        "config": {name: value for name, value in plan.config.to_json().items() if name not in ("arm", "seed")},
        "settings": asdict(plan.settings),
        "draws": plan.draws,
        "commands": [*([plan.command] if plan.command else []), *(line for job in jobs for line in job.commands)],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hazards": list(plan.hazards),
        "hashes": {f"{job.arm}/seed-{job.seed}": run_hash(job.run) for job in jobs},
        "machine": _machine(),
        "seconds": round(sum(_training_seconds(job) for job in jobs)),
    }


def _training_seconds(job: Job) -> float:
    return sum(line["clock"]["seconds"] for line in read_metrics(job.run) if "clock" in line)


def _machine() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([platform.platform(), f"{os.cpu_count()} cores", *gpus])


# ---- tables ------------------------------------------------------------------------------------------

_WHERE = [("mode", pa.string()), ("metric", pa.string())]
_COUNTS = [("seeds", pa.int32()), ("recordings", pa.int32())]
RESULTS: Final = pa.schema(
    [("arm", pa.string()), ("seed", pa.int32()), *_WHERE, ("value", pa.float64()), ("recordings", pa.int32())]
)
INTERVALS: Final = pa.schema(
    [("arm", pa.string()), *_WHERE, *((name, pa.float64()) for name in ("value", "low", "high")), *_COUNTS]
)
COMPARISONS: Final = pa.schema(
    [
        *(("a", pa.string()), ("b", pa.string())), *_WHERE,
        *((name, pa.float64()) for name in ("difference", "low", "high", "p_direction", "p_value", "p_holm")),
        ("detectable", pa.float64()), *_COUNTS, ("undefined", pa.int32()), ("seed_share", pa.float64()),
        ("primary", pa.bool_()),
    ]
)  # fmt: skip


def _write_table(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as new:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), new, compression="zstd")
