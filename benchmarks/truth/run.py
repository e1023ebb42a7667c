"""Does the report name what tells when to speak? Whole benchmarks on made-up data in which the answer is known.

    uv run python benchmarks/truth/run.py --work WORK --controls         # rungs without a model, minutes
    uv run python benchmarks/truth/run.py --work WORK                    # all rungs, hours; finished runs are kept
    uv run python benchmarks/truth/run.py --work WORK --worlds user --repeats 1 --no-write

Five worlds (`synth --tells`), N data sets of each. In each the lowest rung that reaches the top is known (TRUTH). Asked
of each world: the right rung is named in 9 of 10 data sets, and at most 1 of 10 has a false claim: a rung above the
right one that beats it or one between, or "no effect larger than the margin" for the step to the right rung.
results.md is written beside this file from what lies in WORK, finished or not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cluster import available_cores
from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.synth import SynthConfig, make_clips, plan_recording, synth
from trainer.benchmark import answer_of, carry_out
from trainer.config import FREE_RUNNING, Settings, TrainConfig
from trainer.controls import CONTROLS, score_control
from trainer.evaluation.comparison import (
    CHAIN,
    NO_LARGER,
    PRIMARY,
    Benchmark,
    compare_runs,
    metrics_of,
    read_benchmark,
    settle,
)
from trainer.evaluation.conclusions import ladder_steps, top_rung
from trainer.evaluation.metrics import hold
from trainer.evaluation.report import write_report
from trainer.plan import Plan

HERE = Path(__file__).resolve().parent
TRUTH = {"nothing": "metronome", "history": "history", "user": "texts", "vision": "speak", "state": "speak+dst"}
RECORDINGS = {"train": 300, "val": 20, "test": 40}
RUNGS = ("metronome", "history", "texts", "speak", "speak+dst")  # the chain
FEWER = {"metronome": 1, "history": 1, "texts": 2}  # seeds: controls have none
WINDOW = Settings(early_s=1, late_s=1)  # events are 2.5 to 4 s apart: at the default window a metronome gets 0.77
NANO = TrainConfig(model="nano", optimizer="muon", lr=4e-3, clips_per_step=8, warmup_steps=20, steps=100)
STEPS = {"user": 150, "vision": 300, "state": 300}  # of the worlds that take more
HEADS = {"w_speak": 3.0, "w_dst": 3.0}  # so weighted more runs learn to see
MORE: dict[str, dict[str, Any]] = {"vision": HEADS | {"clips_per_step": 4}, "state": HEADS | {"lr": 2e-3}}
SEEDS = {"vision": 6, "state": 6}  # of speak and speak+dst, in the worlds in which runs differ; 2 elsewhere


def config_of(world: str, repeat: int) -> SynthConfig:
    return SynthConfig(
        RECORDINGS, views=1, steps=(6, 6), events_per_clip=(3, 4), px=32, tells={world: 1.0}, seed=1000 + repeat
    )


def score_controls(folder: Path, world: str, repeat: int) -> None:
    """The controls' scores on one data set, whose pictures they do not need and which are not made."""
    raw, config = folder / "raw", config_of(world, repeat)
    if all((folder / name / "metrics.json").exists() for name in CONTROLS):
        return
    raw.mkdir(parents=True, exist_ok=True)
    for place, (split, count) in enumerate(RECORDINGS.items()):
        clips: list[dict[str, Any]] = []
        for number in range(count):  # as `synth` draws them
            rngs = [np.random.default_rng([config.seed, place, number, part]) for part in (0, 1)]
            clips += make_clips(plan_recording(f"nusar-{split}-{number:04d}", rngs[0], config), 0, rngs[1])
        (raw / f"{split}_training.json").write_text(json.dumps(clips))
    preprocess([raw], folder / "data", Options(positive="onset", seed=config.seed))
    for name in CONTROLS:
        score_control(name, folder / "data", "test", folder / name, 0, WINDOW)


def answer(folder: Path, world: str, repeat: int) -> str:
    """The runs of one benchmark on data of its own, in this process, with one report at the end; its first sentence."""
    torch.set_num_threads(1)
    raw, data, out, config = folder / "raw", folder / "data", folder / "answer", config_of(world, repeat)
    training = replace(NANO, steps=STEPS.get(world, NANO.steps), **MORE.get(world, {}))
    recipe = json.dumps({"training": asdict(training), "seeds": SEEDS.get(world, 2)})
    if (made := out / "recipe.json").exists() and made.read_text() != recipe:
        raise SystemExit(f"{out}: made with other settings; name another --work")
    if not (out / "report.html").exists():
        if not raw.exists():
            synth(raw, config)
        preprocess([raw], data, Options(frames_root=str(raw), positive="onset", seed=config.seed))
        plan = Plan(data, out, RUNGS, tuple(range(SEEDS.get(world, 2))), training, WINDOW, jobs=1)
        out.mkdir(parents=True, exist_ok=True)
        made.write_text(recipe)
        settle(plan)
        jobs = [(rung, seed) for seed in plan.seeds for rung in RUNGS if seed < FEWER.get(rung, len(plan.seeds))]
        for job in jobs:
            if not metrics_of(plan, job):
                carry_out(plan, job)
        compare_runs(plan, jobs, hold(data, plan.split))
        write_report(out)
    return f"{world} {repeat}: {answer_of(out)}"


# ---- what they said ----------------------------------------------------------------------------------


def false_claims(bench: Benchmark, right: str) -> list[str]:
    """What the report says that is not so."""
    above = [rung for rung in CHAIN if rung in bench.rungs and CHAIN.index(rung) >= CHAIN.index(right)]
    beaten = [
        f"{high} beats {low}"
        for low, high in combinations(above, 2)
        if (bench.comparison(high, low, FREE_RUNNING, PRIMARY).get("low") or 0.0) > 0
    ]
    missed = [step for step in ladder_steps(bench) if step.rung == right and step.verdict == NO_LARGER]
    return [*beaten, *(f"{step.rung} adds nothing" for step in missed)]


def about_world(world: str, folders: list[Path]) -> Iterator[str]:
    benches, right = [read_benchmark(folder / "answer") for folder in folders], TRUTH[world]
    rungs = [rung for rung in benches[0].rungs if all(bench.score(rung, FREE_RUNNING, PRIMARY) for bench in benches)]
    yield f"## {world}: the right answer is {right}"
    yield ""
    yield f"| data set | seeds | {' | '.join(rungs)} | named | false claims |"
    yield "|---" * (len(rungs) + 4) + "|"
    named = wrong = 0
    for folder, bench in zip(folders, benches, strict=True):
        top, false = top_rung(bench), false_claims(bench, right)
        rung = top.rung if top else "none"
        named, wrong = named + (rung == right), wrong + bool(false)
        values = " | ".join(f"{bench.score(name, FREE_RUNNING, PRIMARY)['value']:.3f}" for name in rungs)
        yield f"| {folder.name} | {len(bench.info['seeds'])} | {values} | {rung} | {'; '.join(false) or '-'} |"
    yield ""
    yield f"- right rung named: {named} of {len(benches)}; data sets with a false claim: {wrong} of {len(benches)}"
    yield ""


def about_controls(work: Path) -> Iterator[str]:
    yield "## Rungs without a model"
    yield ""
    yield "Event F1 over data sets: mean (lowest to highest)."
    yield ""
    yield "| world | data sets | metronome | history, teacher-forced | history, free-running | ahead of the metronome |"
    yield "|---|---|---|---|---|---|"
    for world in TRUTH:
        found = [
            [json.loads((folder / name / "metrics.json").read_bytes()) for name in CONTROLS]
            for folder in sorted((work / "controls" / world).glob("*"))
            if all((folder / name / "metrics.json").exists() for name in CONTROLS)
        ]
        if found:
            f1 = np.array(
                [
                    [of[mode]["speaking"]["events"]["f1"] for of, mode in zip((clock, past, past), MODES, strict=True)]
                    for clock, past in found
                ]
            )
            cells = [f"{v.mean():.3f} ({v.min():.3f} to {v.max():.3f})" for v in f1.T]
            ahead = f"{(f1[:, 2] > f1[:, 0]).sum()} of {len(f1)}"
            yield f"| {world} | {len(f1)} | {' | '.join(cells)} | {ahead} |"
    yield ""


MODES = (FREE_RUNNING, "teacher-forced", FREE_RUNNING)  # of the table's columns


def report(work: Path) -> str:
    window = f"events are in time from {WINDOW.early_s:g} s before to {WINDOW.late_s:g} s after"
    lines = [
        "# Does the report name what tells when to speak?",
        "",
        f"- date: {datetime.date.today()}; machine: {platform.platform()}, {available_cores()} cores, no GPU",
        "- command: `uv run python benchmarks/truth/run.py --work WORK`; " + window,
        f"- {RECORDINGS['train']} recordings to train on, {RECORDINGS['test']} to test on; model {NANO.model}, "
        f"{NANO.steps} steps ({', '.join(f'{world}: {steps}' for world, steps in STEPS.items())}; {MORE}); "
        "event F1, free-running",
        "",
        *about_controls(work),
    ]
    for world in TRUTH:
        folders = [path.parents[1] for path in sorted((work / world).glob("*/answer/rungs.parquet"))]
        lines += about_world(world, folders) if folders else ()
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs; what is finished is kept")
    parser.add_argument("--worlds", default=",".join(TRUTH), help="some of them, with commas")
    parser.add_argument("--repeats", type=int, default=10, help="data sets of each world")
    parser.add_argument("--jobs", type=int, default=available_cores(), help="data sets at a time, a core each")
    parser.add_argument("--controls", action="store_true", help="the rungs without a model alone")
    parser.add_argument("--no-write", action="store_true", help="print, and leave results.md as it is")
    options = parser.parse_args()
    work, worlds = options.work, options.worlds.split(",")
    todo = [(world, repeat) for world in worlds for repeat in range(options.repeats)]
    if options.controls:
        for world, repeat in todo:
            score_controls(work / "controls" / world / f"{repeat:02d}", world, repeat)
    elif todo:
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            given = [(work / world / f"{repeat:02d}", world, repeat) for world, repeat in todo]
            for said in pool.map(answer, *zip(*given, strict=True)):
                print(time.strftime("%H:%M"), said, flush=True)
    text = report(options.work)
    print(text)
    if not options.no_write:
        (HERE / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
