"""`prospect-dst preprocess` against its rivals on 28,000 clips / 17M frames / 1.1 GB of JSON, all in one run.

Every case is a fresh process, alone, pinned to the same single core (this script samples from another one),
threads limited to one, page cache warm; the sides take turns, `--reps` times, and medians are reported with
their range. A small unmeasured round comes first: nobody pays for cold imports or for compiling bytecode.
Measured from outside:

    wall      from spawn to exit: interpreter start and imports count, for every side
    CPU       user + system of the process and the children it waited for
    RssAnon   peak private memory of the process tree, sampled every 20 ms: what the machine must really have
    maxrss    the kernel's high-water mark of one process; it counts mapped file pages, which can be dropped
    output    bytes left behind, caches not counted

After every repetition a further process counts frames, turns and positives in what a side wrote; a side that
disagrees with the generator stops the run. What is unfair, in either direction, is in `sides.py`.

    uv run --group bench python benchmarks/preprocess/run.py          # the full run: 10-25 minutes
    uv run --group bench python benchmarks/preprocess/run.py --clips 3000 --reps 1 --sides ours,plan

The full run needs 16 GB of free memory for `hf` (checked, skipped if not there), 8 GB for the rest, and
5 GB of disk. It writes `results.md`
beside this file; a smaller one prints only, unless `--results` names a file.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FULL_SIZE = 28_000  # clips
TINY = 30  # clips of the unmeasured round
SAMPLE_S = 0.02
TIMEOUT_S = 1800.0
OURS = "ours"
# side -> (what it is, free memory it needs in bytes per byte of input)
SIDES = {
    OURS: ("**prospect-dst preprocess --workers 1**", 0.5),
    "plan": ("the plan: json.load, frame loop, torch.where, Parquet", 7.0),
    "hf": ("HF load_dataset, map(numpy), to_parquet", 14.3),
    "hf-gen": ("HF from_generator(json.load), map(numpy), to_parquet", 7.0),
    "orjson": ("orjson.loads alone", 7.5),
    "orjson-nogc": ("orjson.loads alone, gc off", 7.5),
    "read": ("read(2) alone: the floor", 0.1),
}
WRITERS = (OURS, "plan", "hf", "hf-gen")
ONE_THREAD = tuple(f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "RAYON"))
ONE_THREAD += ("POLARS_MAX_THREADS", "ARROW_IO_THREADS")
PACKAGES = ["prospect-dst", "msgspec", "numpy", "pyarrow", "polars", "torch", "datasets", "pandas", "orjson"]
CONTENDED = 1.15  # wall / CPU above this: something else had the core


@dataclass
class Measured:
    """One repetition of one side."""

    wall_s: float
    cpu_s: float
    anon_mb: float
    maxrss_mb: float
    output_mb: float = 0.0
    phases: dict[str, list[float]] = field(default_factory=dict)  # name -> [wall, CPU] seconds


Results = dict[str, list[Measured]]


# --- measuring a process --------------------------------------------------------------------------------


def status_kb(pid: int, key: str) -> int:
    """A field of /proc/PID/status in kB; 0 once the process is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return 0


def tree(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                yield from tree(int(child))


class PeakAnon(threading.Thread):
    """Samples the summed RssAnon of a process tree until `stop` is set; `peak_mb` is the largest sum."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.stop, self.peak_mb = pid, threading.Event(), 0.0

    def run(self) -> None:
        while True:
            total = sum(status_kb(pid, "RssAnon") for pid in tree(self.pid))
            self.peak_mb = max(self.peak_mb, total * 1024 / 1e6)
            if self.stop.wait(SAMPLE_S):
                return


def environment(scratch: Path) -> dict[str, str]:
    own = {
        "HF_HOME": str(scratch / "hf-home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TMPDIR": str(scratch),
        "PYTHONPYCACHEPREFIX": str(scratch.parent / "pycache"),  # filled by the unmeasured round
    }
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return inherited | dict.fromkeys(ONE_THREAD, "1") | own


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # its own session: our child and nobody else


def measure(command: list[str], core: int, log: Path, env: Mapping[str, str]) -> Measured:
    """Run one command on one core and wait for it. Raises RuntimeError if it fails."""
    with log.open("wb") as stream:
        began = time.perf_counter()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        sampler = PeakAnon(child.pid)
        sampler.start()
        alarm = threading.Timer(TIMEOUT_S, kill_group, [child.pid])
        alarm.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            kill_group(child.pid)
            raise
        finally:
            wall = time.perf_counter() - began
            alarm.cancel()
            sampler.stop.set()
        child.returncode = os.waitstatus_to_exitcode(status)
    sampler.join()
    if child.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}\nexit status {child.returncode}\n{tail}")
    return Measured(wall, usage.ru_utime + usage.ru_stime, sampler.peak_mb, usage.ru_maxrss * 1024 / 1e6)


# --- one case -------------------------------------------------------------------------------------------


def command_of(side: str, source: Path, out: Path) -> list[str]:
    if side == OURS:
        tool = str(Path(sys.executable).with_name("prospect-dst"))
        return [tool, "preprocess", str(source), "--out", str(out), "--workers", "1"]
    return [sys.executable, str(HERE / "sides.py"), side, str(source), str(out)]


def warm(path: Path) -> None:
    """Read the file, so that it lies in the page cache; flush what the last case has written."""
    os.sync()
    buffer = bytearray(4 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def output_bytes(out: Path) -> int:
    files = [path for path in out.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files if "cache" not in path.relative_to(out).parts)


def last_json_line(log: Path) -> dict[str, list[float]]:
    lines = log.read_text(errors="replace").splitlines()
    return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


def expect_same(side: str, source: Path, out: Path, core: int, env: Mapping[str, str]) -> None:
    """Stop unless a side's output holds as many clips, frames, turns and positives as were generated."""
    measure(command_of("check", source, out), core, out / "check.log", env)
    found = json.loads((out / "found.json").read_text())
    made = json.loads(source.with_suffix(".totals.json").read_text())
    if found != made:
        raise RuntimeError(f"{side} wrote {found}, but the input holds {made}")


def one_case(side: str, source: Path, scratch: Path, core: int) -> Measured:
    """Run a side once into a new folder, check what it wrote, and remove it."""
    out, log, env = scratch / "out", scratch / f"{side}.log", environment(scratch)
    shutil.rmtree(out, ignore_errors=True)
    if side != OURS:  # ours makes its own folder
        out.mkdir(parents=True)
    warm(source)
    result = measure(command_of(side, source, out), core, log, env)
    result.output_mb = output_bytes(out) / 1e6 if side in WRITERS else 0.0
    result.phases = last_json_line(log)
    if side in WRITERS:
        expect_same(side, source, out, core, env)
    shutil.rmtree(out, ignore_errors=True)
    return result


# --- the run --------------------------------------------------------------------------------------------


def free_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def fits(side: str, source: Path) -> bool:
    """Is there memory for a side? Says so if not: it would be killed, and its neighbours with it."""
    needed, free = SIDES[side][1] * source.stat().st_size, free_memory()
    if needed > free:
        print(
            f"{side}: skipped, needs {needed / 1e9:.1f} GB of free memory, there are {free / 1e9:.1f}",
            flush=True,
        )
    return needed <= free


def generated(work: Path, clips: int) -> Path:
    """The input file of so many clips; made again only if the generator has changed."""
    version = hashlib.sha256((HERE / "generate.py").read_bytes()).hexdigest()[:12]
    source = work / f"input-{clips}-{version}" / "train_training.json"
    if not source.exists():
        make = [sys.executable, str(HERE / "generate.py"), "--clips", str(clips), "--out", str(source)]
        subprocess.run(make, check=True)
    return source


def pin() -> int:
    """The core for the measured processes; this one moves to the others, where there are any."""
    cores = sorted(os.sched_getaffinity(0))
    if cores[1:]:
        os.sched_setaffinity(0, cores[:-1])
    return cores[-1]


def run_all(sides: list[str], source: Path, tiny: Path, scratch: Path, reps: int) -> Results:
    core = pin()
    for side in sides:
        one_case(side, tiny, scratch, core)
    results: Results = {side: [] for side in sides}
    for rep in range(reps):
        for side in sides:
            if not fits(side, source):
                continue
            load = os.getloadavg()[0]
            found = one_case(side, source, scratch, core)
            results[side].append(found)
            line = f"rep {rep + 1} {side:12} wall {found.wall_s:7.2f}  cpu {found.cpu_s:7.2f}"
            print(f"{line}  anon {found.anon_mb:8.0f} MB  load before {load:.1f}", flush=True)
    return {side: runs for side, runs in results.items() if runs}


# --- the report -----------------------------------------------------------------------------------------


def middle(runs: list[Measured], value: Callable[[Measured], float]) -> float:
    return statistics.median(map(value, runs))


def phase(runs: list[Measured], name: str, which: int) -> float:
    """Median seconds of a side's phase: wall (0) or CPU (1)."""
    return statistics.median(run.phases[name][which] for run in runs)


def wall(run: Measured) -> float:
    return run.wall_s


def cpu(run: Measured) -> float:
    return run.cpu_s


def spread(runs: list[Measured], value: Callable[[Measured], float]) -> str:
    values = sorted(map(value, runs))
    digits = 2 if values[0] < 20 else 1
    return f"{statistics.median(values):.{digits}f} ({values[0]:.{digits}f}-{values[-1]:.{digits}f})"


def phase_text(runs: list[Measured]) -> str:
    names = runs[0].phases
    return ", ".join(f"{name} {phase(runs, name, 1):.1f}" for name in names)


def row(side: str, results: Results) -> str:
    runs, ours = results[side], results.get(OURS)
    ratios = [f"{middle(runs, key) / middle(ours, key):.1f}x" if ours else "" for key in (wall, cpu)]
    output = f"{middle(runs, lambda run: run.output_mb):.1f}" if side in WRITERS else ""
    memory = [f"{max(run.anon_mb for run in runs):,.0f}", f"{max(run.maxrss_mb for run in runs):,.0f}"]
    cells = [
        SIDES[side][0],
        spread(runs, wall),
        spread(runs, cpu),
        *memory,
        output,
        *ratios,
        phase_text(runs),
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: Results) -> list[str]:
    head = "side;wall s;CPU s;peak RssAnon MB;maxrss MB;output MB;wall / ours;CPU / ours;of which, CPU s"
    lines = ["| " + head.replace(";", " | ") + " |", "|---" + "|---:" * 7 + "|---|"]
    return lines + [row(side, results) for side in results]


def ratio_bar(results: Results, side: str, bar: float, claim: str) -> str:
    if side not in results or OURS not in results:
        return f"- {claim}: not run"
    runs, ours = results[side], results[OURS]
    ratio, by_cpu = (middle(runs, key) / middle(ours, key) for key in (wall, cpu))
    worst = min(run.wall_s for run in runs) / max(run.wall_s for run in ours)
    verdict = "met" if min(ratio, by_cpu) >= bar else "**NOT met**"
    at_worst = f"{worst:.1f}x at worst: its fastest, our slowest"
    return f"- {claim}: {verdict}, {ratio:.1f}x by wall ({at_worst}), {by_cpu:.1f}x by CPU"


def call(runs: list[Measured]) -> str:
    """`orjson.loads` by itself, without the start and the end of its process."""
    return f"{phase(runs, 'orjson.loads', 0):.2f} s (CPU {phase(runs, 'orjson.loads', 1):.2f})"


def orjson_bar(results: Results) -> str:
    claim = "less time than `orjson.loads` of the file"
    if "orjson" not in results or OURS not in results:
        return f"- {claim}: not run"
    mine, default = results[OURS], results["orjson"]
    less = all(middle(mine, key) < phase(default, "orjson.loads", k) for k, key in enumerate((wall, cpu)))
    whole = f"our whole process {middle(mine, wall):.2f} s (CPU {middle(mine, cpu):.2f})"
    line = f"- {claim}: {'met' if less else '**NOT met**'}, {whole}, its call alone {call(default)}"
    if "orjson-nogc" in results:
        line += f"; with gc off, not the default, {call(results['orjson-nogc'])}"
    return line


def memory_bar(results: Results) -> str:
    if OURS not in results:
        return "- peak RssAnon under 300 MB: not run"
    peak = max(run.anon_mb for run in results[OURS])
    return f"- peak RssAnon under 300 MB: {'met' if peak < 300 else '**NOT met**'}, {peak:.0f} MB at most"


def bars(results: Results) -> list[str]:
    """The issue's four claims. A claim about time is met only if wall and CPU seconds both say so."""
    return [
        ratio_bar(results, "plan", 6.0, "at least 6x the plan's path (goal 10x)"),
        ratio_bar(results, "hf", 20.0, "at least 20x HF load_dataset, map, to_parquet"),
        orjson_bar(results),
        memory_bar(results),
    ]


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in reversed(info) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    name, family, model = (facts.get(key, "?") for key in ("model name", "cpu family", "model"))
    chip = f"{name} (family {family} model {model}), {os.cpu_count()} cores"
    return f"{chip}, {memory:.0f} GB, Linux {platform.release()}; one core used"


def versions(packages: Collection[str]) -> str:
    """Of Python and those of `packages` that are installed (on a GPU machine the project itself may not be)."""
    found = [f"Python {platform.python_version()}"]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


def contention(results: Results) -> str:
    shares = {s: max(r.wall_s / r.cpu_s for r in runs) for s, runs in results.items() if runs[0].cpu_s > 0.5}
    slow = [f"{side} {share:.2f}" for side, share in shares.items() if share > CONTENDED]
    if not slow:
        return "The core was ours alone: wall is within 15% of CPU seconds for every side."
    return f"**Contended or waiting for disk** (largest wall / CPU): {', '.join(slow)}. Trust CPU seconds there."


def report(results: Results, source: Path, options: argparse.Namespace) -> str:
    made: dict[str, Any] = json.loads(source.with_suffix(".totals.json").read_text())
    small = "" if options.clips == FULL_SIZE else " **A small run: indicative, not the claim.**"
    size = f"{source.stat().st_size / 1e6:,.1f} MB of JSON"
    what = f"{made['clips']:,} clips, {made['frames']:,} frames, {made['turns']:,} turns, {size}"
    marked = f"{made['speaking']:,} speaking and {made['dst_update']:,} DST-positive frames from every side"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        "# Stage 1: JSON to Parquet",
        "",
        f"{what}.{small}",
        "",
        f"- date: {today}; medians (min-max) of {options.reps} repetitions, memory the maximum",
        f"- machine: {machine()}",
        f"- versions: {versions(PACKAGES)}",
        f"- command: `uv run --group bench python benchmarks/preprocess/run.py --clips {options.clips} "
        f"--reps {options.reps} --sides {','.join(results)}`",
        f"- checked against the generator: {marked}",
        "",
        *table(results),
        "",
        "The bars (met only if wall and CPU both say so):",
        "",
        *bars(results),
        "",
        contention(results),
        "",
        "How it is measured: `run.py`; what each rival does, and what is unfair to whom: `sides.py`.",
    ]
    return "\n".join(lines) + "\n"


def publish(text: str, target: Path | None) -> None:
    """Print the report, and write it where it belongs, if anywhere."""
    print("\n" + text)
    if target:
        target.write_text(text, encoding="utf-8")
        print(f"written: {target}")


def parse(description: str | None, every: Collection[str]) -> argparse.Namespace:
    """The command line of a benchmark whose sides are among `every`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=FULL_SIZE)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--sides", default=",".join(every), help="comma-separated, of: " + ", ".join(every))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bench")
    parser.add_argument("--results", type=Path, help="default: results.md beside this file, for a full run")
    options = parser.parse_args()
    if unknown := set(options.sides.split(",")) - set(every):
        parser.error(f"--sides: {', '.join(sorted(unknown))} not among {', '.join(every)}")
    return options


def main() -> None:
    options = parse(__doc__, SIDES)
    sides = [side for side in SIDES if side in options.sides.split(",")]
    options.work.mkdir(parents=True, exist_ok=True)
    source, tiny = generated(options.work, options.clips), generated(options.work, TINY)
    with tempfile.TemporaryDirectory(dir=options.work, prefix="run-") as scratch:
        results = run_all(sides, source, tiny, Path(scratch), options.reps)
    text = report(results, source, options)
    complete = options.clips == FULL_SIZE and len(results) == len(SIDES)
    publish(text, options.results or (HERE / "results.md" if complete else None))


if __name__ == "__main__":
    main()
