"""`trainer.train_step` against the Hugging Face Trainer: same sequences, same weights, same machine, one run.

Every repetition of a side is a fresh process, alone on one pinned core with one thread (on a GPU: alone on the
card); the sides take turns, medians are reported with their range. Before anything is timed a further process
checks, per case, that both models give the same loss and gradient norm on the same sequences. Measured:

    tokens    real ones, padding not counted, of the steps after a short warm-up step
    CPU s     `process_time` of the training process: what neighbours on the machine disturb least; on a GPU wall s
    memory    peak of private memory (RssAnon, sampled every 10 ms from outside) over what the process held with
              model and sequences made and no optimizer yet; on a GPU torch's own high-water mark, likewise

    uv run --group bench python benchmarks/trainer/run.py                            # CPU, and GPU where there is one
    uv run --group bench python benchmarks/trainer/run.py --size tiny --device cpu   # all code paths, two minutes
    uv run --group bench python benchmarks/trainer/run.py --device cuda --results FILE

The CPU part takes ten CPU-minutes of measured steps beside start-ups and checks, and 10.2 GB over the
base at its largest. A full run writes `results.md` beside this file; a smaller one prints only,
unless `--results` names a file. Models, sequences: `shared.py`; sides: `sides.py`; ceiling: `limits.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))  # a GPU machine does not have the project installed

from shared import AS_IT_COMES, Case, pool_efficiency  # noqa: E402

from benchmarks.preprocess import run as stage1  # noqa: E402

SAMPLE_S = 0.01
SIDES = {
    "ours": "**prospect-dst**: packs, LM head on supervised rows",
    "hf": "HF Trainer as it comes: random batches of 8",
    "hf-grouped": "HF Trainer at its best: length-grouped",
}
V = 49280  # of the released models
TINY = Case("tiny", 512, steps=2)
MID, MID_8K = Case("mid", V, steps=3), Case("mid", 8192, steps=3)
TRUE = Case("256M", V, bf16=True, steps=2)
GPU = Case("256M", V, bf16=True, device="cuda", steps=20, clips=64, batch=32, budget=16384)
GPU_LARGE = Case("2.2B", V, bf16=True, device="cuda", steps=8, clips=32, batch=32, budget=8192)
GOALS = {("256M", "rate"): 0.25, ("2.2B", "rate"): 0.40, ("256M", "encode"): 0.50, ("2.2B", "encode"): 0.50}
ONE_THREAD = tuple(f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS"))
PACKAGES = ["prospect-dst", "torch", "transformers", "accelerate", "numpy"]

UNFAIR = """\
What is unfair to HF: it can do more than `model(labels=...)` if one writes it. It could pack, too (a flattening
collator with a variable-length attention kernel; there is none for the CPU), slice the hidden states before the LM
head (which is our second idea), or use a fused cross-entropy kernel on a GPU. Its memory is that of its batch shape:
measured apart on 2026-11-23 (mid, V=49280, one repetition), length-grouped batches of 4 and 2 took 2,651 and 1,984 MB
at 538 and 516 tokens/CPU-s, ours on the same sequences 907 and 882 MB at 1,467 and 1,558. Against batches of 2 the
memory bar would be missed (0.44x). Newer releases also have `batch_rebalance`, which sorts the 16 sequences of
a step into micro-batches of even cost: over the same pool its real share is 0.64, 0.82 and 0.94 with 2, 4 and 8
micro-batches a step (length-grouped: 0.98), and its largest micro-batch is smaller; it was not run. Nearly all of the
gain over the length-grouped side is the LM head on a tenth of the rows, so it shrinks with the vocabulary and with the
body's share of the work: the 8k table shows that.

What is unfair to ours: the length-grouped side gets its batches ready-made, chosen from an epoch of 4000 sequences by
the library's own function, so the sampler costs it nothing and its optimizer steps see sequences of one length (which
biases them; ours sees random ones). HF's model returns the loss alone; with logits, as most people write it, bf16
would copy them to float32. Ours also normalises over the whole step and looks for non-finite losses; HF averages
micro-batch means.

Fair to both: SDPA, no cache, no logging, no saving, no evaluation, no worker processes, the same fused AdamW,
clipping, cached features, connector and heads, tower frozen. Sequences are noise with realistic lengths and shares;
nothing is learnt."""


@dataclass
class Measured:
    """One repetition of one side."""

    tokens: int
    computed: int  # with padding
    cpu_s: float
    wall_s: float
    memory_mb: float  # peak over base
    rate: float  # real tokens per CPU second, or per second on a GPU


@dataclass
class Results:
    sides: dict[Case, dict[str, list[Measured]]] = field(default_factory=dict)
    checks: dict[Case, dict[str, float]] = field(default_factory=dict)
    limits: dict[tuple[Case, str], dict[str, float]] = field(default_factory=dict)


# --- one process ----------------------------------------------------------------------------------------


class Anon(threading.Thread):
    """(time, private memory in MB) of a process, sampled until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.status, self.samples = Path(f"/proc/{pid}/status"), list[tuple[float, float]]()

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):  # the process is gone
            while True:
                kb = int(self.status.read_text().split("RssAnon:")[1].split()[0])
                self.samples.append((time.monotonic(), kb * 1024 / 1e6))
                time.sleep(SAMPLE_S)

    def peak_over_base(self, base_at: float, end_at: float) -> float:
        base = [mb for at, mb in self.samples if at <= base_at][-1]
        return max(mb for at, mb in self.samples if base_at <= at <= end_at) - base


def run_side(side: str, case: Case, core: int | None) -> tuple[dict[str, float], Anon]:
    """What one side printed, in a process of its own. Raises RuntimeError with the end of its log if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    if core is not None:
        env |= dict.fromkeys(ONE_THREAD, "1")
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, str(HERE / "sides.py"), side, case.to_json()],
            stdout=subprocess.PIPE, stderr=log, env=env, text=True,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )  # fmt: skip
        memory = Anon(child.pid)
        memory.start()
        out, _ = child.communicate()
        memory.join()
        if child.returncode:
            log.seek(0)
            raise RuntimeError(f"{side} on {case.name}: exit status {child.returncode}\n{log.read()[-3000:]}")
    return json.loads(out.splitlines()[-1]), memory


def measure(side: str, case: Case, core: int | None) -> Measured:
    found, memory = run_side(side, case, core)
    peak = found.get("memory_mb") or memory.peak_over_base(found["base_at"], found["end_at"])
    tokens, seconds = int(found["tokens"]), found["cpu_s" if case.device == "cpu" else "wall_s"]
    return Measured(tokens, int(found["computed"]), found["cpu_s"], found["wall_s"], peak, tokens / seconds)


def check(case: Case, core: int | None) -> dict[str, float]:
    """Stop unless both models give the same loss and gradient norm on the same sequences."""
    found, _ = run_side("check", case, core)
    for what, tolerance in (("loss", 1e-2 if case.bf16 else 1e-5), ("norm", 5e-2 if case.bf16 else 1e-4)):
        ours, hf = found[f"ours_{what}"], found[f"hf_{what}"]
        if abs(ours - hf) > tolerance * abs(hf):
            raise RuntimeError(f"{case.name}: {what} is {ours} for ours and {hf} for HF on the same sequences")
    return found


# --- the run --------------------------------------------------------------------------------------------


def compare(case: Case, reps: dict[str, int], core: int | None, results: Results) -> None:
    """All sides of a case, taking turns; `reps`: repetitions per side."""
    results.checks[case] = check(case, core)
    print(f"{case.name}: same work {results.checks[case]}", flush=True)
    found = results.sides[case] = {side: [] for side in SIDES}
    for rep in range(max(reps.values())):
        for side in SIDES:
            if rep < reps[side]:
                load = os.getloadavg()[0]
                run = measure(side, case, core)
                found[side].append(run)
                line = f"{case.name}  rep {rep + 1} {side:10}  {run.rate:8.0f} tok/s  {run.memory_mb:7.0f} MB"
                print(f"{line}  cpu {run.cpu_s:6.1f}  wall {run.wall_s:6.1f}  load {load:.1f}", flush=True)


def look_up_limits(cases: Sequence[Case], core: int | None, results: Results) -> None:
    for case in cases:
        for kind in ("rate", "encode"):
            found, memory = run_side(kind, case, core)
            if "memory_mb" not in found:  # a GPU's is torch's own count
                found["memory_mb"] = memory.peak_over_base(found["base_at"], found["end_at"])
            results.limits[case, kind] = found
            print(f"{case.name}  {kind}  {found}", flush=True)


def run_all(options: argparse.Namespace) -> Results:
    results, core = Results(), stage1.pin()
    reps = dict.fromkeys(SIDES, options.reps)
    if options.size == "tiny":
        case = Case(**{**TINY.__dict__, "device": options.device if options.device != "both" else "cpu"})
        compare(case, reps, core, results)
        look_up_limits([Case(**{**case.__dict__, "bf16": True})], core, results)
        return results
    if options.device in ("cpu", "both"):
        for case in (MID, MID_8K, TRUE):
            if options.size in ("all", case.size):
                fewer = {side: min(options.reps, 1 if side == "hf" else 2) for side in SIDES}
                compare(case, fewer if case is TRUE else reps, core, results)
    if options.device in ("cuda", "both"):
        if options.size in ("all", "256M"):
            compare(GPU, reps, None, results)
        look_up_limits([c for c in (GPU, GPU_LARGE) if options.size in ("all", c.size)], None, results)
    return results


# --- the report -----------------------------------------------------------------------------------------


def middle(runs: Sequence[Measured], value: Callable[[Measured], float]) -> float:
    return statistics.median(map(value, runs))


def rate_of(run: Measured) -> float:
    return run.rate


def memory_of(run: Measured) -> float:
    return run.memory_mb


def faster(found: dict[str, list[Measured]], side: str) -> float:
    return middle(found["ours"], rate_of) / middle(found[side], rate_of)


def leaner(found: dict[str, list[Measured]], side: str) -> float:
    return middle(found["ours"], memory_of) / middle(found[side], memory_of)


def row(side: str, found: dict[str, list[Measured]]) -> str:
    runs = found[side]
    rates = sorted(map(rate_of, runs))
    cells = [
        SIDES[side],
        f"{statistics.median(rates):,.0f} ({rates[0]:,.0f}-{rates[-1]:,.0f}, n={len(runs)})",
        f"{middle(runs, lambda run: run.tokens / run.wall_s):,.0f}",
        f"{runs[0].tokens / runs[0].computed:.2f}",
        f"{middle(runs, memory_of):,.0f}",
        "" if side == "ours" else f"{faster(found, side):.2f}x",
        "" if side == "ours" else f"{leaner(found, side):.2f}x",
    ]
    return "| " + " | ".join(cells) + " |"


def comparison(case: Case, results: Results) -> list[str]:
    found, checked = results.sides[case], results.checks[case]
    unit = "CPU-s" if case.device == "cpu" else "s"
    head = f"side;real tokens / {unit};/ wall s;real share;peak MB over base;ours is faster by;ours needs of its memory"
    random, grouped = pool_efficiency(case.batch, case.clips)
    tokens = found["ours"][0].tokens
    return [
        f"### {case.name}",
        "",
        f"{case.steps} optimizer steps of {case.clips} sequences, {tokens:,} real tokens; grouped batches of "
        f"{case.batch}, our packs at most {case.budget} tokens. Same work: on the same {AS_IT_COMES} sequences ours "
        f"and HF's model give loss {checked['ours_loss']:.6f} and {checked['hf_loss']:.6f}, gradient norm "
        f"{checked['ours_norm']:.5f} and {checked['hf_norm']:.5f}. The real share over the whole pool is {random:.2f} "
        f"at random, {grouped:.2f} grouped.",
        "",
        "| " + head.replace(";", " | ") + " |",
        "|---" + "|---:" * 6 + "|",
        *(row(side, found) for side in SIDES),
        "",
    ]


def verdict(met: bool) -> str:
    return "met" if met else "**NOT met**"


def speed_bar(case: Case, side: str, bar: float, results: Results) -> str:
    claim = f"- {case.name}: at least {bar}x {SIDES[side]}"
    if case not in results.sides:
        return f"{claim}: not run"
    found = results.sides[case]
    ratio = faster(found, side)
    worst = min(map(rate_of, found["ours"])) / max(map(rate_of, found[side]))
    return f"{claim}: {verdict(ratio >= bar)}, {ratio:.2f}x ({worst:.2f}x at worst: our slowest, its fastest)"


def memory_bar(case: Case, side: str, bar: float, results: Results) -> str:
    claim = f"- {case.name}: at most {bar}x the memory of {SIDES[side]}"
    if case not in results.sides:
        return f"{claim}: not run"
    ratio = leaner(results.sides[case], side)
    return f"{claim}: {verdict(ratio <= bar)}, {ratio:.2f}x"


def bars(results: Results) -> list[str]:
    return [
        speed_bar(MID, "hf", 4.0, results),
        speed_bar(MID, "hf-grouped", 2.0, results),
        memory_bar(MID, "hf", 0.4, results),
        memory_bar(MID, "hf-grouped", 0.4, results),
        speed_bar(MID_8K, "hf", 4.0, results),
        speed_bar(MID_8K, "hf-grouped", 2.0, results),
        memory_bar(MID_8K, "hf", 0.4, results),
        memory_bar(MID_8K, "hf-grouped", 0.4, results),
        speed_bar(TRUE, "hf-grouped", 1.2, results),
        speed_bar(GPU, "hf-grouped", 1.5, results),
    ]


def limit_row(case: Case, kind: str, results: Results) -> str:
    what = f"{case.size} text body, step" if kind == "rate" else f"{case.size} tower, encode"
    goal = GOALS.get((case.size, kind))
    aim = "" if goal is None else f"{goal:.0%}"
    if (case, kind) not in results.limits:
        return f"| {what} | not run | | | | | {aim} |"
    found = results.limits[case, kind]
    speed = found["flop"] / found["wall_s"]
    number, unit = (found["tokens"], "tokens/s") if kind == "rate" else (found["frames"], "frames/s")
    cells = [
        what, f"{number / found['wall_s']:,.0f} {unit}", f"{found['memory_mb']:,.0f}", f"{speed / 1e12:.2f}",
        f"{found['ceiling'] / 1e12:.2f}", f"{speed / found['ceiling']:.1%}", aim,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def ceilings(results: Results) -> list[str]:
    cases = list(dict.fromkeys(case for case, _ in results.limits)) or [GPU, GPU_LARGE]
    return [
        "## How much of the card is used",
        "",
        "Model FLOP/s (what is counted: `limits.py`) against the measured bf16 matmul rate, bf16 autocast.",
        "" if results.limits else "\nNot run: no GPU here. `--device cuda` runs it.\n",
        "| what | rate | peak MB over base | model TFLOP/s | matmul TFLOP/s | used | goal |",
        "|---" + "|---:" * 6 + "|",
        *(limit_row(case, kind, results) for case in cases for kind in ("rate", "encode")),
    ]


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(info))}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    name, family, model = (facts.get(key, "?") for key in ("model name", "cpu family", "model"))
    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    chip = f"{name} (family {family} model {model}), {os.cpu_count()} cores"
    return f"{chip}, {memory:.0f} GB{card}; CPU sides use one core"


def contention(results: Results) -> str:
    runs = [run for case, found in results.sides.items() if case.device == "cpu" for s in SIDES for run in found[s]]
    shares = [run.wall_s / run.cpu_s for run in runs]
    if max(shares, default=1.0) < 1.15:
        return "the core was ours alone: wall is within 15% of CPU seconds"
    spread = f"{min(shares):.2f} to {max(shares):.2f}"
    return f"**the core was shared with other work** (wall / CPU seconds: {spread}): read the CPU columns, not wall"


def report(results: Results, options: argparse.Namespace) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    command = f"benchmarks/trainer/run.py --device {options.device} --size {options.size} --reps {options.reps}"
    lines = [
        "# The trainer against the Hugging Face Trainer",
        "",
        f"- date: {today}; medians (min-max) of the repetitions named in each row",
        f"- machine: {machine()}",
        f"- versions: {stage1.versions(PACKAGES)}",
        f"- command: `uv run --group bench python {command}`",
        f"- {contention(results)}",
        "",
        "The bars; the mid-size body's are meant at the released models' vocabulary, 49,280. At 8k the LM head is a",
        "smaller share of the work, and so is what can be saved there:",
        "",
        *bars(results),
        "",
        "## Same sequences, one run",
        "",
        *(line for case in results.sides for line in comparison(case, results)),
        *ceilings(results),
        "",
        "## What is unfair to whom",
        "",
        UNFAIR,
    ]
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = "both" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda", "both"), default=found)
    parser.add_argument("--size", choices=("all", "tiny", "mid", "256M", "2.2B"), default="all")
    parser.add_argument("--reps", type=int, default=3, help="at 256M on the CPU: at most 2, as it comes 1")
    parser.add_argument("--results", type=Path, help="default: results.md beside this file, for a full run")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results = run_all(options)
    text = report(results, options)
    complete = options.size == "all" and options.device != "cuda" and options.reps >= 3
    stage1.publish(text, options.results or (HERE / "results.md" if complete else None))


if __name__ == "__main__":
    main()
