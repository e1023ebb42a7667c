"""kill -9 at random moments of a `benchmark --minutes`: is there a report each time, and the same result at the end?

    uv run python benchmarks/kill/run.py --work WORK --kills 20

The main process alone is killed; its worker has to notice. After each kill the same benchmark is begun again in its
folder; where it ends before its moment, its tables are compared with those of an undisturbed one, and a new folder is
begun. Moments are uniform over the time that an undisturbed one takes. Processes are forked from one that has all
imports, so that moments fall on the work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq
import torch

from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.synth import SynthConfig, synth
from trainer import benchmark as harness
from trainer.config import TrainConfig
from trainer.evaluation.comparison import read_benchmark
from trainer.plan import Plan

TABLES = ("results", "rungs", "comparisons", "windows", "groups")


def begin(plan: Plan) -> int:
    """The benchmark in a process of its own, which has all imports already."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            harness.benchmark(plan, until=time.monotonic() + 3600)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait_until(pid: int, moment: float) -> bool:
    """Whether it ended well before its moment; else it is killed."""
    while time.monotonic() < moment:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"exit status {status}"
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def apart(function: Callable[..., str], *given: Path) -> str:
    """The function's result, from a process of its own: a fork of one that has used polars waits for ever."""
    with get_context("fork").Pool(1) as pool:
        return pool.apply(function, given)


def differing(out: Path, other: Path) -> str:
    """Names of the tables that differ."""
    return ", ".join(table for table in TABLES if rows(out, table) != rows(other, table))


def look(out: Path) -> str:
    """What is there after a kill; an AssertionError where it can't be opened."""
    finished = len(list(out.glob("runs/*/seed-*/scores/metrics.json")))
    if not (out / "report.html").exists():
        return f"{finished} runs, no page yet"
    page = (out / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    if not (out / "results.parquet").exists():
        return f"{finished} runs, a page that says none has ended"
    read_benchmark(out)
    return f"{finished} runs, a report of {len({(r['rung'], r['seed']) for r in rows(out, 'results')})}"


def rows(out: Path, table: str) -> list[dict[str, object]]:
    return pq.read_table(out / f"{table}.parquet").to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    harness.get_context = lambda method: get_context("fork")  # type: ignore[assignment]
    raw, data, chance = options.work / "raw", options.work / "data", random.Random(options.seed)
    if not raw.exists():
        synth(raw, SynthConfig({"train": 8, "val": 4, "test": 6}, views=1, px=32, steps=(6, 6), events_per_clip=(3, 4)))
    preprocess([raw], data, Options(frames_root=str(raw), positive="onset"))
    config = TrainConfig(model="nano", steps=10, lr=3e-3, warmup_steps=2, clips_per_step=4, eval_every=5)
    rungs = ("metronome", "speak", "speak+dst")
    plan = Plan(data, options.work / "whole", rungs, (0, 1), config, draws=200, jobs=1)
    began = time.monotonic()
    assert wait_until(begin(plan), math.inf)
    whole, seen, compared, folder = time.monotonic() - began, Counter[str](), 0, 0
    print(f"undisturbed: {whole:.0f} s", flush=True)
    while seen.total() < options.kills:
        out = options.work / f"killed-{folder}"
        moment = chance.uniform(0, whole)
        if wait_until(begin(replace(plan, out=out)), time.monotonic() + moment):
            differ = apart(differing, out, plan.out)
            assert not differ, f"{out}: other {differ}"
            compared, folder = compared + 1, folder + 1
            continue
        there = apart(look, out)
        seen[there] += 1
        print(f"killed after {moment:.1f} s: {there}", flush=True)
    print(json.dumps({"kills": seen.total(), "compared": compared, "what was there": dict(seen)}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
