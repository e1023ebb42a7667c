"""Does the harness find what is there, and only that? Whole benchmarks on made-up data in which the effect is known.

    uv run python benchmarks/truth/run.py --work WORK            # hours on two cores; finished runs are kept
    uv run python benchmarks/truth/run.py --work WORK --repeats 2 --setting nothing --no-write

    nothing   state_tells 0: the picture shows when to speak, the state adds nothing. 20 data sets, two arms, two seeds,
              nano. Its 95% interval must cover 0 in at least 17
    tells     state_tells 1: who knows which step was completed knows when to speak, the picture does not tell. Six
              arms, three seeds, tiny. speak+dst must be found to help

Both go through `trainer.benchmark`, whose folders stay in WORK. results.md is written beside this file from what lies
there: the truth first, then what the harness said.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow.parquet as pq

from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.synth import SynthConfig, synth
from trainer.benchmark import answer_of, benchmark
from trainer.config import Settings, TrainConfig
from trainer.demo import synthetic_data
from trainer.plan import Plan

HERE = Path(__file__).resolve().parent
QUESTION = ("speak+dst", "speak")
SHOWN = (("self-fed", "event_f1"), ("self-fed", "speaking_ap"), ("teacher-forced", "speaking_ap"))
ENOUGH = 17  # of 20
WINDOW = Settings(early_s=1, late_s=1)  # events are 2.5 to 4 s apart: at the default window a metronome gets 0.77
NANO = TrainConfig(model="nano", steps=250, lr=3e-3, eval_every=50)
TINY = TrainConfig(steps=400, eval_every=50)


def nothing(work: Path, repeat: int) -> Path:
    """One benchmark on data of its own, where the state tells nothing."""
    folder = work / "null" / f"repeat-{repeat:02d}"
    raw, data = folder / "raw", folder / "data"
    if not raw.exists():
        recordings = {"train": 300, "val": 20, "test": 40}
        made = SynthConfig(recordings, views=1, steps=(6, 6), events_per_clip=(3, 4), px=32, seed=1000 + repeat)
        synth(raw, made)
    preprocess([raw], data, Options(frames_root=str(raw), positive="onset", seed=1000 + repeat))
    out = folder / "answer"
    plan = Plan(data, out, QUESTION[::-1], (0, 1), NANO, WINDOW, jobs=1)
    benchmark(plan, report_line=lambda line: print(repeat, line, flush=True))
    return out


def tells(work: Path) -> Path:
    """The benchmark of all arms on data where only the state tells."""
    out = work / "effect"
    data = synthetic_data(out, 1.0, echo=print)
    benchmark(Plan(data, out, config=TINY, settings=WINDOW), report_line=lambda line: print(line, flush=True))
    return out


# ---- what they said ----------------------------------------------------------------------------------


def rows(out: Path, table: str, **wanted: Any) -> list[dict[str, Any]]:
    found = pq.read_table(out / f"{table}.parquet").to_pylist()
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def covers(row: dict[str, Any]) -> bool:
    """Whether no effect is found: the interval holds 0, or every draw is 0."""
    return row["low"] is None or row["low"] <= 0 <= row["high"]


def about_nothing(outs: list[Path]) -> Iterator[str]:
    yield "## The state tells nothing"
    yield ""
    yield f"{len(outs)} data sets (state_tells 0), speak+dst minus speak, 40 test recordings, 2 seeds, nano, 250 steps."
    yield ""
    yield "| metric | 0 in the 95% interval | mean difference (standard error over data sets) | median half-width |"
    yield "|---|---|---|---|"
    for mode, metric in SHOWN:
        found = [rows(out, "comparisons", a=QUESTION[0], b=QUESTION[1], mode=mode, metric=metric)[0] for out in outs]
        differences = [row["difference"] for row in found]
        error = stdev(differences) / len(found) ** 0.5 if len(found) > 1 else math.nan
        halves = sorted((row["high"] - row["low"]) / 2 for row in found)
        inside = sum(map(covers, found))
        told = f"{fmean(differences):+.4f} ({error:.4f})"
        yield f"| {metric}, {mode} | {inside} of {len(found)} | {told} | {halves[len(halves) // 2]:.4f} |"
    yield ""
    primary = [rows(out, "comparisons", primary=True)[0] for out in outs]
    inside = sum(map(covers, primary))
    verdict = "met" if inside >= ENOUGH / 20 * len(outs) else "NOT met"
    yield f"- at least {ENOUGH} of 20 must hold 0 (self-fed event F1, the primary): {verdict}, {inside} of {len(outs)}"
    yield ""
    yield "| data set | speak | speak+dst | difference [95%], self-fed event F1 |"
    yield "|---|---|---|---|"
    for i, (out, row) in enumerate(zip(outs, primary, strict=True)):
        arms = [_seeds(out, arm) for arm in QUESTION[::-1]]
        yield f"| {i} | {arms[0]} | {arms[1]} | {row['difference']:+.3f} [{row['low']:.3f}, {row['high']:.3f}] |"
    yield ""


def _seeds(out: Path, arm: str, mode: str = "self-fed", metric: str = "event_f1") -> str:
    return ", ".join(f"{row['value']:.3f}" for row in rows(out, "results", arm=arm, mode=mode, metric=metric))


def _metronome(out: Path) -> float:
    """What one gets who sees nothing: of every run the same."""
    path = next((out / "runs").glob("*/seed-0/scores/metrics.json"))
    return float(json.loads(path.read_bytes())["self-fed"]["speaking"]["events"]["metronome"]["f1"])


def about_tells(out: Path) -> Iterator[str]:
    info = json.loads((out / "benchmark.json").read_bytes())
    yield "## Only the state tells"
    yield ""
    counts = f"{info['recordings']} test recordings, {len(info['seeds'])} seeds"
    yield f"One data set (state_tells 1), {counts}, tiny, 400 steps; a metronome gets event F1 {_metronome(out):.3f}."
    yield ""
    yield f"> {answer_of(out)}"
    yield ""
    for mode, metric in (("teacher-forced", "speaking_ap"), ("self-fed", "speaking_ap"), ("self-fed", "event_f1")):
        yield f"| {metric}, {mode} | mean [95%] | by seed |"
        yield "|---|---|---|"
        for row in rows(out, "arms", mode=mode, metric=metric):
            interval = f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            yield f"| {row['arm']} | {interval} | {_seeds(out, row['arm'], mode, metric)} |"
        yield ""
    yield "| pair | teacher-forced AP | self-fed AP | self-fed event F1 |"
    yield "|---|---|---|---|"
    for a, b in dict.fromkeys((row["a"], row["b"]) for row in rows(out, "comparisons")):
        cells = []
        for mode, metric in (("teacher-forced", "speaking_ap"), ("self-fed", "speaking_ap"), ("self-fed", "event_f1")):
            (row,) = rows(out, "comparisons", a=a, b=b, mode=mode, metric=metric)
            cells.append(f"{row['difference']:+.3f} [{row['low']:.3f}, {row['high']:.3f}]")
        yield f"| {a} minus {b} | {' | '.join(cells)} |"
    yield ""


def report(outs: list[Path], effect: Path | None, command: str) -> str:
    window = f"events are in time from {WINDOW.early_s:g} s before to {WINDOW.late_s:g} s after"
    head = [
        "# Does the harness find what is there, and only that?",
        "",
        f"- date: {datetime.date.today()}; machine: {platform.platform()}, no GPU",
        f"- command: `{command}`; {window}",
        "",
    ]
    body = [*(about_nothing(outs) if outs else ()), *(about_tells(effect) if effect else ())]
    return "\n".join([*head, *body]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs; what is finished is kept")
    parser.add_argument("--setting", choices=("both", "nothing", "tells"), default="both")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-write", action="store_true", help="print, and leave results.md as it is")
    options = parser.parse_args()
    outs = [nothing(options.work, i) for i in range(options.repeats)] if options.setting != "tells" else []
    effect = tells(options.work) if options.setting != "nothing" else None
    text = report(outs, effect, "uv run python benchmarks/truth/run.py --work WORK")
    print(text)
    if not options.no_write:
        (HERE / "results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
