"""`prospect-dst benchmark`: train and evaluate arms on the same data; say, with its uncertainty, what differs.

    OUT/runs/ARM/seed-S/            a run of train; scores/ holds what evaluate wrote of it
    OUT/results.parquet             arm, seed, mode, metric, value
    OUT/arms.parquet                the same over seeds, with 95% intervals
    OUT/comparisons.parquet         each pair, metric and mode: difference, interval, p, Holm's p, power
    OUT/benchmark.json              what was asked, data, versions, hashes
    OUT/report.html, figures/       the answer

All arms see the same clips in the same order with the same draws, for the same number of steps under the same loss
balance. A finished run is recognised by the hashes of its checkpoint, data and settings; one that was stopped is
resumed. The question (pair, metric, mode) is settled before anything is trained: `primary`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from pipeline.cluster import available_cores
from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import DST_UPDATE, SPEAKING
from pipeline.storage import make_folder, naming
from trainer.arms import ARMS, find_arm
from trainer.checkpoint import run_hash
from trainer.config import MODES, SELF_FED, TEACHER_FORCED, RunOptions
from trainer.evaluate import can_live, evaluate
from trainer.evaluation.benchmark_folder import read_benchmark
from trainer.evaluation.comparison import compare_runs, metrics_of, settle
from trainer.evaluation.conclusions import headline
from trainer.evaluation.evaluate_scores import EvalSplits, hold
from trainer.evaluation.ladder import PRIMARY
from trainer.evaluation.metrics import METRICS, Thresholds, look_up
from trainer.evaluation.report import write_report
from trainer.loader import end_with
from trainer.plan import Job, Plan, config_of, run_of
from trainer.run_folder import check_resume, lock_folder, run_options
from trainer.train import train


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
        settle(plan)
        left = [job for job in jobs if not is_done(plan, job, splits, trained_on)]
        if len(left) < len(jobs):
            report_line(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
        for count, ((arm, seed), seconds, notes) in enumerate(_run_all(plan, left), len(jobs) - len(left) + 1):
            metrics, primary = metrics_of(plan, (arm, seed)), METRICS[PRIMARY]
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


def is_done(plan: Plan, job: Job, splits: EvalSplits, trained_on: Split) -> bool:
    """Whether the job's scores are there and are of its checkpoint, this data and these settings.

    InputError where the run was started with other options.
    """
    run, metrics = run_of(plan, job), metrics_of(plan, job)
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
