"""Trains and evaluates arms on the same data, and says with its uncertainty what differs: `prospect-dst benchmark`.

    OUT/runs/ARM/seed-S/            a run of train; scores/ holds what evaluate wrote of it
    OUT/results.parquet             arm, seed, mode, metric, value
    OUT/arms.parquet                the same over seeds, with 95% intervals
    OUT/comparisons.parquet         each pair of interest, metric and mode: difference, interval, p, Holm's p, power
    OUT/benchmark.json              what was asked, data, versions, hashes
    OUT/report.html, figures/       the answer

All arms see the same clips in the same order with the same draws, for the same number of steps under the same loss
balance. Runs are independent, so any number of processes may share them out; a run that is finished is recognised by
the hashes of its checkpoint, data and settings, one that was stopped goes on, bit for bit. The question (pair, metric,
mode) is settled before anything is trained: `primary`. Holm's correction is over all tests in the comparisons.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trainer.arms import ARMS, find_arm
from trainer.checkpoint import run_hash
from trainer.config import RunOptions, Settings, TrainConfig
from trainer.errors import TrainerError
from trainer.evaluate import METRICS_FILE, MODES, SELF_FED, TEACHER_FORCED, evaluate
from trainer.evaluation.measure import METRICS, Estimator, Thresholds, estimators, look_up
from trainer.evaluation.report import write_report
from trainer.evaluation.scores import read_scores
from trainer.evaluation.statistics import Comparison, answer, compare, draw_recordings, holm, interval, remember
from trainer.shards import Split
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
                raise TrainerError(f"{name}: {', '.join(map(str, chosen)) or 'none'}, expected one or more, each once")

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
        words += [option] if value is True else [option, ",".join(value) if isinstance(value, tuple) else str(value)]
    return words


def benchmark(plan: Plan, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Do what is not done yet, compare, and write the report; its path. `tell` gets a line per finished run."""
    began = time.monotonic()
    split = Split(plan.data, plan.split)
    jobs = [Job(plan, arm, seed) for seed, arm in product(plan.seeds, plan.arms)]
    left = [job for job in jobs if not is_done(job, split)]
    if len(left) < len(jobs):
        tell(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
    for count, (job, seconds) in enumerate(_carry_out(left, plan.jobs), len(jobs) - len(left) + 1):
        tell(f"{job.name}: {_said(job)} ({seconds:.0f} s, {count} of {len(jobs)})")
    compare_runs(plan, jobs, split, time.monotonic() - began)
    return write_report(plan.out)


def _said(job: Job) -> str:
    """The primary metric of a run."""
    metrics = _metrics(job)
    found = {mode: look_up(metrics[mode], METRICS[PRIMARY]) for mode in MODES if mode in metrics}
    words = [f"{mode} {'undefined' if value is None else f'{value:.3f}'}" for mode, value in found.items()]
    return f"{METRICS[PRIMARY].label} {', '.join(words)}"


# ---- runs --------------------------------------------------------------------------------------------


def is_done(job: Job, split: Split) -> bool:
    """Whether the job's scores are there and are of its checkpoint, this data, these options and settings.

    Raises TrainerError where the run's folder was begun with other options.
    """
    path = job.run / "scores" / METRICS_FILE
    if not path.is_file() or not (job.run / "last").is_dir():
        return False
    metrics = _metrics(job)
    begun = json.loads((job.run / "options.json").read_bytes())
    changed = job.config.differences(TrainConfig.from_json(begun["config"]))
    if changed:
        raise TrainerError(f"{job.run}: {'; '.join(changed)}; benchmark into a new --out")
    return bool(
        metrics.get("model") == run_hash(job.run)
        and metrics["data_key"].get(split.name) == split.key
        and metrics["settings"] == asdict(job.plan.settings)
        and begun["train data"] == Split(job.plan.data, "train").key
        and (SELF_FED in metrics or not job.plan.live or _never_live(metrics))
    )


def _never_live(metrics: dict[str, Any]) -> bool:
    """Whether no threshold could be chosen, so that the run can't be self-fed however often it is tried."""
    return "speaking" not in metrics["thresholds"]["event"]


def do(job: Job) -> float:
    """Train, or go on training, and evaluate; the seconds it took."""
    began, plan = time.monotonic(), job.plan
    options = RunOptions(progress=False)
    train(plan.data, job.run, job.config, plan.frames_root, plan.features, options, resume=True)
    scores = job.run / "scores"
    evaluate(job.run, plan.data, plan.split, scores, plan.frames_root, plan.features, plan.settings, plan.live)
    return time.monotonic() - began


def _carry_out(jobs: Sequence[Job], at_once: int) -> Iterator[tuple[Job, float]]:
    """The jobs as they are finished; each process has a GPU, or its share of the cores, to itself."""
    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    workers = min(at_once or gpus or cores, len(jobs))
    if workers <= 1:
        yield from ((job, do(job)) for job in jobs)
        return
    context = get_context("spawn")
    places = context.Queue()
    for worker in range(workers):
        places.put(worker % gpus if gpus else None)
    with ProcessPoolExecutor(workers, context, _settle, (places, max(1, cores // workers))) as pool:
        todo = {pool.submit(do, job): job for job in jobs}
        try:
            for done in as_completed(todo):
                yield todo[done], done.result()
        except BrokenProcessPool:
            raise TrainerError("a run's process was killed (memory?); run again, or with --jobs 1") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _settle(places: Any, threads: int) -> None:
    """In a new process: take a GPU, or a share of the cores."""
    gpu = places.get()
    torch.set_num_threads(threads)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)  # CUDA has not been started here yet


def _metrics(job: Job) -> dict[str, Any]:
    return dict(json.loads((job.run / "scores" / METRICS_FILE).read_bytes()))


# ---- what they show ----------------------------------------------------------------------------------

Measured = dict[tuple[str, str], list[dict[str, Estimator]]]  # (arm, mode) -> per seed, each metric's estimator


def compare_runs(plan: Plan, jobs: Sequence[Job], split: Split, seconds: float) -> None:
    """Write OUT's tables and benchmark.json from the finished runs."""
    recordings = sorted({clip.recording_id for clip in split.in_order()})
    measured = _measured(plan, split, recordings)
    draws = draw_recordings(len(recordings), plan.draws)
    _write_table(plan.out / "results.parquet", RESULTS, _result_rows(jobs, len(recordings)))
    _write_table(plan.out / "arms.parquet", INTERVALS, _interval_rows(measured, draws))
    _write_table(plan.out / "comparisons.parquet", COMPARISONS, _comparison_rows(plan, measured, draws))
    info = _about(plan, jobs, split, len(recordings), seconds)
    (plan.out / "benchmark.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")


def answer_of(out: Path) -> str:
    """The answer in one sentence, from the tables."""
    rows = pq.read_table(out / "comparisons.parquet", filters=[("primary", "=", True)]).to_pylist()
    if not rows:
        return "No answer: one arm alone has nothing to be compared with"
    row = rows[0]
    metric = METRICS[row["metric"]]
    found = Comparison(**{one.name: row[one.name] for one in fields(Comparison)})
    return answer(found, row["a"], row["b"], metric.label, metric.unit, row["mode"], metric.higher_is_better)


def _measured(plan: Plan, split: Split, recordings: Sequence[str]) -> Measured:
    measured: Measured = {}
    for arm, mode in product(plan.arms, MODES):
        jobs = [Job(plan, arm, seed) for seed in plan.seeds]
        files = [job.run / "scores" / f"{mode}.parquet" for job in jobs]
        if all(path.is_file() and mode in _metrics(job) for path, job in zip(files, jobs, strict=True)):
            measured[arm, mode] = [
                _of_run(job, path, split, plan.settings, recordings) for job, path in zip(jobs, files, strict=True)
            ]
    return measured


def _of_run(job: Job, path: Path, split: Split, settings: Settings, recordings: Sequence[str]) -> dict[str, Estimator]:
    clips = read_scores(path, {split.name: split})[split.name]
    thresholds = Thresholds(**_metrics(job)["thresholds"])
    found = estimators(clips, thresholds, settings, recordings)
    return {name: remember(estimator) for name, estimator in found.items()}


def _result_rows(jobs: Iterable[Job], recordings: int) -> Iterator[dict[str, Any]]:
    for job in jobs:
        metrics = _metrics(job)
        for mode, metric in product(MODES, METRICS.values()):
            if mode in metrics:
                value = look_up(metrics[mode], metric)
                found = {"metric": metric.name, "value": value, "recordings": recordings}
                yield {"arm": job.arm, "seed": job.seed, "mode": mode, **found}


def _interval_rows(measured: Measured, draws: Any) -> Iterator[dict[str, Any]]:
    for ((arm, mode), seeds), metric in product(measured.items(), METRICS):
        found = interval([of[metric] for of in seeds], draws, METRICS[metric].bounds)
        counts = {"seeds": len(seeds), "recordings": draws.shape[1]}
        yield {"arm": arm, "mode": mode, "metric": metric, **asdict(found), **counts}


def _comparison_rows(plan: Plan, measured: Measured, draws: Any) -> Iterator[dict[str, Any]]:
    """Holm's correction is over the pairs that are compared on the same metric in the same mode."""
    for mode, metric in product(MODES, METRICS):
        pairs = [pair for pair in plan.pairs if all((arm, mode) in measured for arm in pair)]
        found = [_compare(measured, pair, mode, metric, draws) for pair in pairs]
        corrected = holm([one.p_value for one in found])
        for (a, b), one, p in zip(pairs, found, corrected, strict=True):
            primary = (a, b) == plan.pairs[0] and mode == plan.mode and metric == PRIMARY
            yield {"a": a, "b": b, "mode": mode, "metric": metric, **asdict(one), "p_holm": p, "primary": primary}


def _compare(measured: Measured, pair: tuple[str, str], mode: str, metric: str, draws: Any) -> Comparison:
    one, other = ([of[metric] for of in measured[arm, mode]] for arm in pair)
    return compare(one, other, draws, METRICS[metric].bounds)


def _about(plan: Plan, jobs: Sequence[Job], split: Split, recordings: int, seconds: float) -> dict[str, Any]:
    first = next(split.in_order())
    clips, frames = (sum(s[key] for s in split.manifest["shards"] if s["split"] == split.name and s["table"] == table)
                     for key, table in (("clips", "clips"), ("rows", "frames")))  # fmt: skip
    return {
        "arms": list(plan.arms),
        "seeds": list(plan.seeds),
        "primary": {"metric": PRIMARY, "mode": plan.mode, "pair": list(plan.pairs[0]) if plan.pairs else []},
        "split": split.name,
        "recordings": recordings,
        "clips": clips,
        "frames": frames,
        "data": str(plan.data.resolve()),
        "data_key": {name: Split(plan.data, name).key for name in sorted(split.manifest["splits"])},
        "label_rule": first.positive,
        "config": plan.config.to_json(),
        "settings": asdict(plan.settings),
        "draws": plan.draws,
        "commands": [*([plan.command] if plan.command else []), *(line for job in jobs for line in job.commands)],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hazards": list(plan.hazards),
        "hashes": {f"{job.arm}/seed-{job.seed}": run_hash(job.run) for job in jobs},
        "machine": _machine(),
        "seconds": round(seconds),
    }


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
        ("detectable", pa.float64()), *_COUNTS, ("undefined", pa.int32()), ("primary", pa.bool_()),
    ]
)  # fmt: skip


def _write_table(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    new = path.with_name(f".{path.name}.new")
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), new, compression="zstd")
    new.rename(path)
