"""`prospect-dst benchmark`: run the ladder's rungs on the same data; say, with its uncertainty, what differs.

    OUT/runs/RUNG/seed-S/           a run of train, where the rung has one; scores/ holds what evaluate wrote of it
    OUT/*.parquet, benchmark.json   tables (trainer.evaluation.comparison)
    OUT/report.html, figures/       the answer so far
    OUT/seconds.json                what each run took, to predict others

All arms see the same clips in the same order with the same draws, for the same number of steps. A finished run is
recognised by the hashes of its checkpoint, data and settings; one that was stopped is resumed. Tables and report are a
function of the finished runs; which runs a clock leaves time for depends on the machine, their numbers do not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from pipeline.cluster import available_cores
from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.storage import make_folder, naming, write_json, write_text
from pipeline.terminal import clock
from trainer.arms import RUNGS
from trainer.checkpoint import check_resume, lock_folder, run_hash, run_options
from trainer.config import MODES, RunOptions
from trainer.controls import control_key, score_control
from trainer.distributed import best_device
from trainer.evaluate import evaluate
from trainer.evaluation.comparison import (
    PRIMARY,
    compare_runs,
    metrics_of,
    power_line,
    question_of,
    read_benchmark,
    settle,
    what_narrows,
)
from trainer.evaluation.conclusions import opening
from trainer.evaluation.metrics import METRICS, EvalSplits, hold, value_at
from trainer.evaluation.plots import format_number
from trainer.evaluation.report import FIRST_PAGE, PAGE, write_report
from trainer.loader import end_with
from trainer.plan import MOST_SEEDS, Job, Plan, Schedule, check_plan, in_order, jobs_with, run_of
from trainer.run_log import read_metrics
from trainer.train import train

Result = tuple[float, tuple[str, ...]]  # seconds of the whole run, notes of its evaluation
POLL_S: Final = 1.0  # between looks at the clock and at a first run's steps
FIRST_STEPS: Final = 10  # of a run, that its duration is predicted from
SECONDS: Final = "seconds.json"


def benchmark(plan: Plan, report_line: Callable[[str], None] = lambda line: None, until: float = math.inf) -> Path:
    """Do what is not done yet, the most telling first, with a new report after each pair; the report's path.

    until: of time.monotonic(): no run is begun that would end later, and one that still runs then is stopped.
    report_line: gets a line per finished run, and what would narrow the interval. Whatever stops it but a kill, there
    is a report of all finished runs. InputError before anything is trained where the data can't answer, where another
    process works in the folder, and where runs were started otherwise; later where no pair of runs would end in time.
    """
    check_plan(plan)
    splits, trained_on = hold(plan.data, plan.split), Split(plan.data, "train")
    with naming(plan.out), ExitStack() as held:
        make_folder(plan.out)
        lock_folder(plan.out, held)
        settle(plan)
        schedule = _schedule(plan, splits, trained_on, until)
        count, finished = sum(map(len, schedule.units)), len(schedule.done)
        out_of = f" of {count}" if len(plan.seeds) < MOST_SEEDS else ""
        update = partial(_update, plan, schedule, splits, report_line)
        if not (plan.out / PAGE).exists():
            write_text(plan.out / PAGE, FIRST_PAGE)
        try:
            if finished:
                report_line(f"{finished}{out_of} runs are there already")
            if finished < count:
                report_line(power_line(plan, splits.test))
                if finished:  # a kill may have come between the end of a run and its report
                    update(in_progress=True)
            with closing(_run_all(plan, schedule, splits)) as results:
                for job, (seconds, notes) in results:
                    metrics, name = metrics_of(plan, job), f"{job[0]} seed {job[1]}"
                    values = {mode: value_at(metrics[mode], METRICS[PRIMARY].path) for mode in MODES if mode in metrics}
                    words = ", ".join(f"{mode} {format_number(value)}" for mode, value in values.items())
                    report_line(f"{name}: event F1 {words} ({seconds:.0f} s, {len(schedule.done)}{out_of})")
                    for note in notes:
                        report_line(f"{name}: {note}")
                    if schedule.report_is_due(job, time.monotonic()) and len(schedule.done) < count:
                        update(in_progress=True)
        finally:
            if schedule.done:
                update()
        if not schedule.done:
            raise InputError(f"{plan.out}: no run ended in the time given; call again to go on, or give more time")
        return plan.out / PAGE


def answer_of(out: Path) -> str:
    """The answer in two sentences, as it opens the report."""
    return " ".join(opening(read_benchmark(out)))


def _update(
    plan: Plan, schedule: Schedule, splits: EvalSplits, report_line: Callable[[str], None], in_progress: bool = False
) -> None:
    """Tables and report of the runs that are done; the page of a benchmark in progress reloads itself."""
    began = time.monotonic()
    compare_runs(plan, [job for unit in schedule.units for job in unit if job in schedule.done], splits)
    bench = read_benchmark(plan.out)
    row = bench.comparison(*bench.pair, bench.mode, PRIMARY)
    narrowing = what_narrows(row, schedule.pair_seconds()) if row and row["low"] is not None else ""
    write_report(plan.out, narrowing, in_progress)
    schedule.updated = time.monotonic()
    schedule.update_s = max(schedule.update_s, schedule.updated - began)
    if narrowing:
        report_line(f"{' minus '.join(bench.pair)}: {row['difference']:+.3f} {narrowing}")


def _schedule(plan: Plan, splits: EvalSplits, trained_on: Split, until: float) -> Schedule:
    """With what is in the folder already; a clock's plan has a thousand seeds, so only runs that are there are read."""
    arms = [rung for rung in plan.rungs if RUNGS[rung].kind == "arm"]
    pair = [arm for arm in arms if arm in question_of(plan.rungs)] or arms[:1]
    units = in_order(plan.rungs, pair, plan.seeds)
    wanted = {job for unit in units for job in unit}
    done = {job for job in jobs_with(plan) if job in wanted and is_done(plan, job, splits, trained_on)}
    schedule = Schedule(units, pair, done, plan.jobs or len(_gpus()) or available_cores(), until)
    with suppress(OSError, ValueError):  # without it the first run is measured anew
        kept = {(rung, seed): seconds for rung, seed, seconds in json.loads((plan.out / SECONDS).read_bytes())}
        schedule.seconds = {job: kept[job] for job in done if job in kept}
    begun = [job for job in jobs_with(plan, "last") if job in wanted - done]
    schedule.left = {job: 1 - len(_step_seconds(plan, job)) / plan.config.steps for job in begun}
    return schedule


def is_done(plan: Plan, job: Job, splits: EvalSplits, trained_on: Split) -> bool:
    """Whether the job's scores are there and are of its checkpoint, this data and these settings.

    InputError where the run was started with other options.
    """
    run, metrics = run_of(plan, job), metrics_of(plan, job)
    if not metrics:
        return False
    rung, seed = RUNGS[job[0]], job[1]
    if rung.kind == "control":
        model = control_key(rung.name, trained_on, seed)
    else:
        trained = run if rung.kind == "arm" else run_of(plan, (str(rung.below), seed))
        if not (trained / "last").is_dir():
            return False
        if rung.kind == "arm":
            config = replace(plan.config, arm=rung.name, seed=seed).on(best_device().type)
            held_out = {"train": trained_on, **splits.all}.get(config.eval_split)
            check_resume(run, run_options(config, trained_on, held_out, plan.features))
        model = run_hash(trained)
    modes = MODES if plan.live and "speaking" in metrics["thresholds"]["event"] else MODES[:1]
    return bool(
        metrics.get("model") == model
        and metrics["data_key"] == {name: split.key for name, split in splits.all.items()}
        and metrics["settings"] == asdict(plan.settings)
        and all(mode in metrics and (run / "scores" / f"{mode}.parquet").is_file() for mode in modes)
    )


def carry_out(plan: Plan, job: Job) -> Result:
    """Train, or resume, and evaluate."""
    began, before, run, (name, seed) = time.monotonic(), 0.0, run_of(plan, job), job
    rung, scores, sources = RUNGS[name], run / "scores", (plan.frames_root, plan.features)
    if rung.kind == "control":
        evaluation = score_control(name, plan.data, plan.split, scores, seed, plan.settings, plan.live)
        return time.monotonic() - began, evaluation.notes
    updates = "own"
    if rung.kind == "scripted":
        run, updates = run_of(plan, (str(rung.below), seed)), "reference"
    else:
        options = RunOptions(progress=False, save_every=max(1, min(RunOptions.save_every, plan.config.steps // 10)))
        config = replace(plan.config, arm=name, seed=seed)
        report = train(plan.data, run, config, *sources, options, resume=True)
        before = sum(_step_seconds(plan, job)[: report.resumed_from])
    evaluation = evaluate(run, plan.data, plan.split, scores, *sources, plan.settings, plan.live, updates=updates)
    return before + time.monotonic() - began, evaluation.notes


def _step_seconds(plan: Plan, job: Job) -> list[float]:
    return [line["clock"]["seconds"] for line in read_metrics(run_of(plan, job)) if "clock" in line]


def _run_all(plan: Plan, schedule: Schedule, splits: EvalSplits) -> Generator[tuple[Job, Result]]:
    """The jobs as they are finished; each process has a GPU, or its share of the cores, to itself.

    The share depends on `plan.jobs` alone, not on how many jobs are left: another number of threads rounds otherwise.
    """

    def finish(job: Job, result: Result) -> tuple[Job, Result]:
        schedule.finish(job, result[0])
        write_json(plan.out / SECONDS, [[*job, seconds] for job, seconds in schedule.seconds.items()])
        return job, result

    if schedule.workers == 1 and schedule.until == math.inf:  # in this process
        while job := schedule.next(time.monotonic()):
            yield finish(job, carry_out(plan, job))
        return
    running, ended, too_slow = dict[Future[Result], Job](), list[tuple[Job, Result]](), ""
    with _workers(schedule.workers) as pool:
        while not too_slow:
            while len(running) < schedule.workers and (job := schedule.next(time.monotonic())):
                running[pool.submit(carry_out, plan, job)] = job
            yield from ended  # after that, as a report takes seconds
            if not running or time.monotonic() > schedule.until:
                return  # what still runs is resumed from its checkpoint next time
            done = wait(running, POLL_S if schedule.until < math.inf else None, FIRST_COMPLETED).done
            ended = [finish(running.pop(future), future.result()) for future in done]
            if schedule.until < math.inf:
                too_slow = _predict(plan, schedule, splits)
    for job in schedule.begun.keys() - schedule.left.keys():  # with fewer steps, they could not go on
        shutil.rmtree(run_of(plan, job), ignore_errors=True)
    raise InputError(too_slow)


def _predict(plan: Plan, schedule: Schedule, splits: EvalSplits) -> str:
    """From the first steps of the first runs: what a run takes. Where no pair would end in time: that, in words.

    First steps may take twice what later ones do, as frames are decoded: until a fifth of them is done, half counts.
    """
    steps, config, now = plan.config.steps, plan.config, time.monotonic()
    clips = sum(map(len, splits.all.values())) + len(splits.val or ()) * (steps // (config.eval_every or steps))
    evaluation = (clips + 3 * len(splits.test) * plan.live) / config.clips_per_step  # free-running: frame by frame
    measured = any(RUNGS[rung].kind == "arm" for rung, _ in schedule.seconds)
    for job in [] if measured else [job for job in schedule.begun if RUNGS[job[0]].kind == "arm"]:
        first = _step_seconds(plan, job)
        if len(first) < min(FIRST_STEPS, steps):
            continue
        schedule.guess = median(first[-FIRST_STEPS:]) * (steps + evaluation)
        pair = [(arm, job[1]) for arm in schedule.pair if (arm, job[1]) not in schedule.done]
        takes, left = (schedule.end(pair, now) or now) - now, schedule.until - now
        if takes * (1.0 if len(first) >= steps / 5 else 0.5) > left:
            need = f"need about {clock(max(round(takes), round(left) + 1))} more, {clock(round(left))} are left"
            fewer = f"lower --steps to about {int(steps * left / takes)}"
            fewer += "" if config.model == "nano" else ", take --model nano"
            return (
                f"no pair of runs would end in time: {' and '.join(schedule.pair)} {need}; {fewer}, or give more time"
            )
    return ""


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that do runs one after the other, frames decoded once in each; at the end they are stopped."""
    gpus, context = _gpus(), get_context("spawn")
    places = context.Queue()
    for worker in range(count):
        places.put(gpus[worker % len(gpus)] if gpus else None)
    settings = (places, max(1, available_cores() // count), os.getpid())
    pool = ProcessPoolExecutor(count, context, _start_worker, settings)
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError("a run's process was killed (memory?); run again, or with --jobs 1") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
            process.join()


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that this process may use."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return named.split(",")[:count]


def _start_worker(places: Any, threads: int, owner: int) -> None:
    """In a new process: take a GPU, or a share of the cores; end when the benchmark does, however that ends."""
    end_with(owner)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's business
    gpu = places.get()
    torch.set_num_threads(min(threads, torch.get_num_threads()))  # OMP_NUM_THREADS may ask for fewer
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA has not been started here yet
