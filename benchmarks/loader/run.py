"""The loader alone against HF streaming, MosaicML Streaming and litdata: 28,000 clips / 17M frames, all in one run.

What a trainer would wait for: labels, redrawn for the epoch, and turns, as torch tensors of 16 shuffled clips; no text,
no frames. Every case is a fresh process, alone, pinned to the same single core (this script samples from another one),
threads limited to one, page cache warm; the sides take turns, `--reps` times, and medians are reported with their
range. A small unmeasured round comes first. Reported per side:

    seconds     of opening (imports not counted) and of two epochs, wall and CPU, by the process's own clock
    asleep      what it spent in time.sleep: HF streaming sleeps 5 s at the end of a shuffled epoch
    RssAnon     peak private memory of the process tree, sampled from outside every 20 ms
    streaming   the most private memory in the counted epoch, less what the process held once it had imported torch
                and its loader, both by its own look

A claim is judged by (opening + two epochs) of the side over ours, sleep taken out, and met only if wall and CPU both
say so. Each peer stands twice: as its documentation shows it, and `-bare`, tuned. What is unfair to whom: `sides.py`.

    uv run --group bench python benchmarks/loader/run.py             # the full run: 15 minutes on a quiet machine
    uv run --group bench python benchmarks/loader/run.py --clips 3000 --reps 1 --sides ours,litdata

MosaicML Streaming wants transformers 4: it and litdata get an environment of their own below --work, made with uv (1 GB
where torch is not in uv's cache). The full run writes `results.md` beside this file; a smaller one prints only, unless
`--results` names a file.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.preprocess import run as stage1  # noqa: E402  one way to measure, and its input

FULL_SIZE, TINY = 28_000, 300  # clips
TENTH = 10  # memory is compared with that of a tenth of the clips
OURS = "ours"
PEERS = {
    "hf": "HF `datasets` streaming",
    "mds": "MosaicML Streaming",
    "litdata": "litdata",
}
SIDES = {
    OURS: "**prospect-dst labels without texts, torch DataLoader**",
    "hf": "HF `datasets` streaming: lists, shuffle(1024), numpy, torch DataLoader",
    "mds": "MosaicML Streaming: arrays, torch DataLoader",
    "litdata": "litdata: arrays, its StreamingDataLoader",
    "ours-bare": "prospect-dst, bare",
    "hf-bare": "HF, samples as bytes, bare",
    "mds-bare": "MosaicML, samples as bytes, bare",
    "litdata-bare": "litdata, samples as bytes, bare",
    "ours-texts": "prospect-dst `epoch`, bare: with every turn's text",
    "floor": "floor: numpy in memory (opening reads it all), permuted, redrawn, bare",
}
STORED = [f"{peer}{form}" for form in ("", "-bare") for peer in PEERS]  # sides with a store of their own
IN_PEERS = ("mds", "litdata")
BARS = {"hf": 15.0, "mds": 3.0, "litdata": 3.0}
WINDOW = 1024  # clips that ours shuffles among, and holds
GROWTH = 1 / 3  # bounded memory: of what ten times the clips' labels and turns would take if they were held
PACKAGES = ("torch", "numpy", "pyarrow", "datasets", "mosaicml-streaming", "litdata")


@dataclass
class Case:
    """One repetition of one side: [wall, CPU, asleep] seconds per phase; MB."""

    phases: dict[str, list[float]]
    peak_mb: float
    streaming_mb: float

    def seconds(self, which: int) -> float:
        """Opening and two epochs, without sleep: wall (0) or CPU (1)."""
        parts = [self.phases[name] for name in ("open", "epoch 1", "epoch 2")]
        return sum(part[which] - (0 if which else part[2]) for part in parts)

    @property
    def asleep(self) -> float:
        return sum(part[2] for name, part in self.phases.items() if name.startswith("epoch"))


Cases = dict[str, list[Case]]


# --- what is run ----------------------------------------------------------------------------------------


class Bench:
    """Where things are, and how a side is run."""

    def __init__(self, work: Path, scratch: Path, core: int) -> None:
        self.work, self.scratch, self.core = work, scratch, core
        self.peers = peers_python(work)
        self.env: Mapping[str, str] = stage1.environment(scratch) | {"PYTHONPATH": str(ROOT)}
        self.supervised: dict[int, int] = {}  # frames, by number of clips; the first side says it

    def shards(self, clips: int) -> Path:
        """The generated input of so many clips, preprocessed by ours; skipped where that was done."""
        source = stage1.generated(self.work, clips)
        out = self.work / f"loader-shards-{clips}"
        tool = str(Path(sys.executable).with_name("prospect-dst"))
        command = [tool, "preprocess", str(source), "--out", str(out), "--workers", "1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return out

    def run(self, side: str, shards: Path, clips: int) -> dict[str, Any]:
        """What `sides.py` reported, with the peak of RssAnon; RuntimeError where it failed."""
        name = side.removeprefix("write-")
        python = str(self.peers) if name.startswith(IN_PEERS) else sys.executable
        log = self.scratch / f"{side}.log"
        command = [python, str(HERE / "sides.py"), side, str(shards), str(self.store(name, clips))]
        found = stage1.measure(command, self.core, log, self.env)
        report: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
        return report | {"peak_mb": found.anon_mb}

    def store(self, side: str, clips: int) -> Path:
        return self.scratch / f"{side}-{clips}"

    def case(self, side: str, clips: int) -> Case:
        report = self.run(side, self.work / f"loader-shards-{clips}", clips)
        self.expect_same(side, clips, report["found"])
        return Case(report["phases"], report["peak_mb"], report["streaming_mb"] - report["imports_mb"])

    def expect_same(self, side: str, clips: int, found: dict[str, int]) -> None:
        """Stop unless a side delivered what was generated, and as many supervised frames as the others."""
        made = json.loads(stage1.generated(self.work, clips).with_suffix(".totals.json").read_text())
        made |= {"supervised": self.supervised.setdefault(clips, found["supervised"])}
        if found != made:
            raise RuntimeError(f"{side} delivered {found}, but there are {made}")


def peers_python(work: Path) -> Path:
    """The interpreter of the environment that MosaicML Streaming and litdata share; made where it is missing."""
    python = work / "loader-peers" / "bin" / "python"
    if not python.exists():
        same = [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in ("torch", "pyarrow")]
        version = ".".join(platform.python_version_tuple()[:2])
        subprocess.run(["uv", "venv", "-q", "--python", version, str(python.parents[1])], check=True)
        install = ["uv", "pip", "install", "-q", "--python", str(python), *same, "mosaicml-streaming", "litdata"]
        subprocess.run(install, check=True)
    return python


def run_all(bench: Bench, sides: list[str], clips: int, reps: int) -> tuple[Cases, dict[str, tuple[float, float]]]:
    """(cases per side, {side: (seconds of writing its store, MB of it)})."""
    tenth = clips // TENTH
    written = {side: write(bench, side, clips) for side in sides if side in STORED}
    for side in sides:
        if side in STORED:
            write(bench, side, TINY)
        bench.case(side, TINY)
    cases: Cases = {}
    for rep in range(reps):
        for side, n in [*((side, clips) for side in sides), *([(OURS, tenth)] if OURS in sides else [])]:
            load = os.getloadavg()[0]
            case = bench.case(side, n)
            cases.setdefault(side if n == clips else f"{side} {tenth}", []).append(case)
            line = f"rep {rep + 1} {side:13} {n:6} clips  wall {case.seconds(0):7.3f}  cpu {case.seconds(1):7.3f}"
            print(f"{line}  anon {case.peak_mb:5.0f} MB  load before {load:.1f}", flush=True)
    return cases, written


def write(bench: Bench, side: str, clips: int) -> tuple[float, float]:
    report = bench.run(f"write-{side}", bench.work / f"loader-shards-{clips}", clips)
    files = [path for path in bench.store(side, clips).rglob("*") if path.is_file()]
    return report["phases"]["write"][0], sum(path.stat().st_size for path in files) / 1e6


# --- the report -----------------------------------------------------------------------------------------


def spread(cases: list[Case], value: Callable[[Case], float], digits: int = 2) -> str:
    values = sorted(map(value, cases))
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})"


def middle(cases: list[Case], which: int) -> float:
    return statistics.median(case.seconds(which) for case in cases)


def row(side: str, cases: Cases, written: dict[str, tuple[float, float]], clips: int) -> str:
    runs = cases[side]
    ratios = [f"{middle(runs, k) / middle(cases[OURS], k):.1f}x" if OURS in cases else "" for k in (0, 1)]
    per_clip = 1e6 / (2 * clips)
    cells = [
        SIDES[side],
        f"{2 * clips / middle(runs, 0):,.0f}",
        *(spread(runs, lambda case, p=phase: case.phases[p][0] - case.phases[p][2]) for phase in PHASES),
        f"{middle(runs, 1) * per_clip:.0f}",
        *ratios,
        f"{statistics.median(case.asleep for case in runs):.1f}",
        f"{max(case.peak_mb for case in runs):,.0f}",
        f"{max(case.streaming_mb for case in runs):,.0f}",
        *(f"{value:,.1f}" for value in written.get(side, ())),
    ]
    return "| " + " | ".join(cells) + " |" + " | |" * (side not in written)


PHASES = ("open", "epoch 1", "epoch 2")


def table(cases: Cases, written: dict[str, tuple[float, float]], clips: int) -> list[str]:
    head = "side;clips/s;open s;epoch 1 s;epoch 2 s;CPU us/clip;wall / ours;CPU / ours;asleep s;RssAnon MB"
    head += ";streaming MB;write s;store MB"
    lines = ["| " + head.replace(";", " | ") + " |", "|---" + "|---:" * head.count(";") + "|"]
    return lines + [row(side, cases, written, clips) for side in cases if side in SIDES]


def ratios(cases: Cases, side: str, ours: str) -> tuple[float, float]:
    return tuple(middle(cases[side], k) / middle(cases[ours], k) for k in (0, 1))  # type: ignore[return-value]


def ratio_bar(cases: Cases, peer: str) -> str:
    claim = f"at least {BARS[peer]:.0f}x {PEERS[peer]}"
    if OURS not in cases or peer not in cases:
        return f"- {claim}: not run"
    wall, cpu = ratios(cases, peer, OURS)
    verdict = "met" if min(wall, cpu) >= BARS[peer] else "**NOT met**"
    line = f"- {claim}: {verdict}, {wall:.1f}x by wall, {cpu:.1f}x by CPU"
    asleep = statistics.median(case.asleep for case in cases[peer])
    if asleep > 1:
        line += f", {(middle(cases[peer], 0) + asleep) / middle(cases[OURS], 0):.0f}x by wall with its sleep"
    if f"{peer}-bare" in cases and f"{OURS}-bare" in cases:
        tuned = ratios(cases, f"{peer}-bare", f"{OURS}-bare")
        line += f"; both bare, its samples as bytes: {tuned[0]:.1f}x by wall, {tuned[1]:.1f}x by CPU"
    return line


def memory_bar(cases: Cases, made: dict[str, int]) -> str:
    clips, tenth = made["clips"], made["clips"] // TENTH
    if OURS not in cases or tenth < WINDOW:
        return f"- bounded memory: not run (needs {WINDOW * TENTH:,} clips: a tenth must fill our window)"
    held = (2 * made["frames"] + 12 * made["turns"]) * (1 - 1 / TENTH) / 1e6  # of the clips that the tenth lacks
    large, small = (max(case.streaming_mb for case in cases[name]) for name in (OURS, f"{OURS} {tenth}"))
    verdict = "met" if large - small < GROWTH * held else "**NOT met**"
    return (
        f"- bounded memory: {verdict}, streaming takes {large:.0f} MB beyond imports at {clips:,} clips and "
        f"{small:.0f} MB at {tenth:,}; to hold what the others say would take {held:.0f} MB (allowed: a third)"
    )


VERSIONS = """
import importlib.metadata, json, sys
found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print(", ".join(f"{name} {found[name]}" for name in sys.argv[1:] if name in found))
"""


def versions(peers: Path) -> str:
    def of(python: str) -> str:
        command = [python, "-c", VERSIONS, *PACKAGES]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return f"Python {platform.python_version()}, {of(sys.executable)}; for MosaicML and litdata: {of(str(peers))}"


def contention(cases: Cases) -> str:
    shares = {s: max(c.seconds(0) / c.seconds(1) for c in runs) for s, runs in cases.items()}
    slow = [f"{side} {share:.2f}" for side, share in shares.items() if share > stage1.CONTENDED]
    if not slow:
        return "The core was ours alone: wall is within 15% of CPU seconds for every side."
    return f"**Contended or waiting** (largest wall / CPU): {', '.join(slow)}. Trust CPU seconds there."


def report(bench: Bench, cases: Cases, written: dict[str, tuple[float, float]], options: argparse.Namespace) -> str:
    made = json.loads(stage1.generated(bench.work, options.clips).with_suffix(".totals.json").read_text())
    small = "" if options.clips == FULL_SIZE else " **A small run: indicative, not the claim.**"
    ours = bench.work / f"loader-shards-{options.clips}"
    size = sum(path.stat().st_size for path in ours.rglob("*.parquet")) / 1e6
    lines = [
        "# The loader alone",
        "",
        f"{made['clips']:,} clips, {made['frames']:,} frames, {made['turns']:,} turns; our shards, texts among them: "
        f"{size:.1f} MB.{small}",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC).date().isoformat()}; medians (min-max) of {options.reps} "
        f"repetitions, memory the maximum",
        f"- machine: {stage1.machine()}",
        f"- versions: {versions(bench.peers)}",
        f"- command: `uv run --group bench python benchmarks/loader/run.py --clips {options.clips} "
        f"--reps {options.reps} --sides {','.join(side for side in cases if side in SIDES)}`",
        f"- checked, from every side: every clip once an epoch, {made['speaking']:,} speaking and "
        f"{made['dst_update']:,} DST-positive frames as generated, {bench.supervised[options.clips]:,} supervised "
        f"labels in epoch 3",
        "",
        *table(cases, written, options.clips),
        "",
        "Seconds without sleep; clips/s: two epochs' clips over opening and both epochs. `write s`: from memory, our "
        "shards come from JSON (`benchmarks/preprocess`).",
        "",
        "The bars (opening and two epochs; met only if wall and CPU both say so):",
        "",
        *(ratio_bar(cases, peer) for peer in PEERS),
        memory_bar(cases, made),
        "",
        contention(cases),
        "",
        "How it is measured: `run.py`; what each side does, and what is unfair to whom: `sides.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = stage1.parse(__doc__, SIDES)
    sides = [side for side in SIDES if side in options.sides.split(",")]
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="loader-") as scratch:
        bench = Bench(options.work, Path(scratch), stage1.pin())
        for clips in (options.clips, options.clips // TENTH, TINY):
            bench.shards(clips)
        cases, written = run_all(bench, sides, options.clips, options.reps)
        text = report(bench, cases, written, options)
    complete = options.clips == FULL_SIZE and len(sides) == len(SIDES)
    stage1.publish(text, options.results or (HERE / "results.md" if complete else None))


if __name__ == "__main__":
    main()
