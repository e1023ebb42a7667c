"""What the GPU benchmark measures, a function per part; `say` keeps and prints a row as soon as it is known.

Seconds are the clock's, between two synchronisations of the card. Shares are model FLOP/s (what is counted:
`benchmarks/trainer/limits.py`) of the bf16 matmul rate measured in the same process. Models have the released
sizes and random weights, sequences the lengths of `benchmarks/trainer/shared.py`; a smoke run takes tiny ones of both.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import limits
import numpy as np
import pytest
import sides
import torch
from shared import CachedNoise, Case, build, make_window, pool_lengths

import trainer.body_graph
import trainer.live.engine
from trainer.checkpoint import LoadedRun, load_run, load_state, save_checkpoint
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.encode import Tower
from trainer.features import frame_side, run_tower
from trainer.live.engine import Engine, streaming
from trainer.live.session import DecodingConfig, FrameInput, Session, token_budget
from trainer.loader import Transfer, uploaded
from trainer.model import ProspectModel
from trainer.packing import Pack, make_pack, pack_windows
from trainer.sequence import Window
from trainer.tokenizer import Tokens, train_tiny_tokens
from trainer.train import make_optimizer, train_step

ROOT = Path(__file__).resolve().parents[2]
SMOKE = bool(os.environ.get("SMOKE"))
SCRATCH = Path(os.environ.get("SCRATCH", "/tmp/gpu-benchmark"))
ROWS = Path(os.environ.get("OUT", ".")) / "rows.jsonl"
PACKAGES = ("torch", "transformers", "triton", "numpy", "accelerate", "tokenizers", "pyarrow", "msgspec")
VOCABULARY = 512 if SMOKE else 49280  # the latter: of the released models
NEVER = DecodingConfig({"speaking": np.inf, "dst_update": np.inf}, max_text=16)


def say(part: str, name: str, **values: Any) -> None:
    """A row: kept in ROWS, printed."""
    row = {"part": part, "name": name, **values}
    with ROWS.open("a") as file:
        file.write(json.dumps(row, default=float) + "\n")
    shown = (f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())
    print(f"{part} | {name} | {' '.join(shown)}", flush=True)


@lru_cache
def device() -> str:
    """Only ever called in a part's own process: the one that starts them must not touch CUDA."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any]) -> float:
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def memory_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if device() == "cuda" else 0.0


def clear() -> None:
    gc.collect()
    torch._dynamo.reset()
    if device() == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ---- env, tests ------------------------------------------------------------------------------------------


def env() -> None:
    cuda = device() == "cuda"
    torch.ones(8, device=device()).sum().item()  # raises where a fork has lost the driver
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _has(name)}
    path = ROOT / ".gpu" / "commit"
    card = torch.cuda.get_device_name() if cuda else "no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else 0.0
    say(
        "env", "machine", device=device(), card=card, card_gb=memory, cores=os.cpu_count(), smoke=SMOKE,
        python=platform.python_version(), cuda=str(torch.version.cuda), cudnn=str(torch.backends.cudnn.version()),
        commit=path.read_text().strip() if path.exists() else "unknown", at=time.strftime("%Y-%m-%d"), **found,
    )  # fmt: skip
    if cuda:
        query = "name,driver_version,clocks.sm,clocks.mem,power.draw"
        subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], check=False)
    say("env", "bf16 matmul", tflops=limits.matmul_rate(device()) / 1e12)


def _has(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def tests() -> None:
    """The tests marked gpu, four at a time on a GPU."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    workers = ["-n", "4"] if device() == "cuda" else []
    options = ["-m", "gpu", "-rfE", "-p", "no:cacheprovider", "--timeout", "100", "--durations", "5", *workers]
    ended = pytest.main([*options, f"--rootdir={ROOT}", *files], plugins=[_Counts()])
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {ended!r}")


class _Counts:
    """A plugin of pytest that makes a row of what passed and what did not."""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        found = terminalreporter.stats
        counts = {kind: len(found.get(kind, [])) for kind in ("passed", "failed", "error", "skipped")}
        failed = [report.nodeid for kind in ("failed", "error") for report in found.get(kind, [])]
        ran = {} if counts["passed"] + len(failed) == 0 else {"which_failed": failed}
        say("tests", "marked gpu", **counts, **ran)


# ---- parity ----------------------------------------------------------------------------------------------


def parity() -> None:
    """Packed against unpacked, in both precisions; the same step twice; a run that is stopped and resumed."""
    vlm, heads = build(case_of("256M"))
    frames = CachedNoise(vlm)
    windows = [
        make_window(i, n, VOCABULARY) for i, n in enumerate([61, 48, 100] if SMOKE else [300, 48, 900, 61, 220, 129])
    ]
    exact = None
    for kind in ("float32", "bf16"):
        config = TrainConfig(freeze=("vision",), bf16=kind == "bf16")
        model = ProspectModel(vlm, heads, config).train()
        packed, again, alone = (
            _gradients(model, [make_pack(group, frames) for group in groups], config)
            for groups in ([windows], [windows], [[window] for window in windows])
        )
        exact = exact or alone
        apart, noise = _apart(packed, alone), _apart(alone, exact)  # bf16 is allowed its own distance from float32
        most = (1e-3, 1e-3) if kind == "float32" else (2 * noise[0], 2 * noise[1])
        say(
            "parity", f"packed against unpacked, {kind}", logits_apart=apart[0], gradient_apart=apart[1],
            logits_off_float32=noise[0], gradient_off_float32=noise[1], ok=apart[0] <= most[0] and apart[1] <= most[1],
            same_bits_twice=all(map(torch.equal, packed[1], again[1])),
        )  # fmt: skip
    del exact, packed, again, alone, model, vlm, heads
    clear()
    _resume()


Gradients = tuple[torch.Tensor, list[torch.Tensor]]  # logits [2, N], a gradient per parameter


def _gradients(model: ProspectModel, packs: Sequence[Pack], config: TrainConfig) -> Gradients:
    """Of one step's loss over all `packs` together."""
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), packs, replace(config, grad_clip=1e9), world())
    with torch.no_grad():
        logits = [model(pack.to(torch.device(device()))).decisions for pack in packs]
    return torch.cat(logits, 1), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _apart(one: Gradients, other: Gradients) -> tuple[float, float]:
    """(largest difference of logits, of gradients in relation to their norm)."""
    squares = [((a - b).square().sum(), b.square().sum()) for a, b in zip(one[1], other[1], strict=True)]
    difference, norm = (torch.stack(column).sum().sqrt() for column in zip(*squares, strict=True))
    return float((one[0] - other[0]).abs().max()), float(difference / norm)


def _resume() -> None:
    """Four steps, the last two of them once more from a checkpoint."""
    config = replace(_config(), clips_per_step=4, micro_batch_tokens=1024, warmup_steps=0)
    vlm, heads = build(case_of("256M"))
    model, tokens = ProspectModel(vlm, heads, config).train(), some_tokens()
    optimizer, frames = make_optimizer(model, config), CachedNoise(vlm)
    data = [pack_windows([make_window(4 * s + i, 150, VOCABULARY) for i in range(4)], frames, 1024) for s in range(4)]
    labels = {head: {"negative": 1, "positive": 1, "not_sampled": 0} for head in ("speaking", "dst_update")}
    info = {"step": 2, "best": -1.0, "data_key": "", "labels": labels, "neg_rate": 0.5, "fps": 2.0}
    losses = []
    for step, packs in enumerate(data):
        if step == 2:
            save_checkpoint(SCRATCH / "resume" / "last", LoadedRun(model, tokens, config, info), optimizer)
        losses.append(train_step(model, optimizer, packs, config, world()).loss)
    resumed = load_run(SCRATCH / "resume", to_train=True).model.to(device()).train()
    optimizer = make_optimizer(resumed, config)
    load_state(SCRATCH / "resume" / "last", resumed, optimizer)
    again = [train_step(resumed, optimizer, packs, config, world()).loss for packs in data[2:]]
    kept = dict(resumed.named_parameters())
    apart = max(float((kept[name] - p).abs().max()) for name, p in model.named_parameters())
    off = max(abs(a - b) / b for a, b in zip(again, losses[2:], strict=True))
    say("parity", "resumed after 2 of 4 steps", loss_off=off, weights_apart=apart, same_bits=apart == 0, ok=off < 1e-2)


# ---- training --------------------------------------------------------------------------------------------

CASES = {  # sequences a step and tokens a pack as in benchmarks/trainer
    "256M": Case("256M", 49280, bf16=True, device="cuda", steps=20, clips=64, batch=32, budget=16384),
    "2.2B": Case("2.2B", 49280, bf16=True, device="cuda", steps=6, clips=32, batch=8, budget=8192),
}
SIZES = ("256M",) if SMOKE else ("256M", "2.2B")


def case_of(size: str) -> Case:
    # a CPU without matrix units for bf16 is a hundred times slower in it
    if SMOKE:
        return Case("tiny", VOCABULARY, bf16=False, device=device(), steps=1, clips=4, batch=2, budget=512)
    return replace(CASES[size], device=device())


def world() -> World:
    return World(device=torch.device(device()))


def _config(**more: Any) -> TrainConfig:
    return TrainConfig(freeze=("vision",), bf16=not SMOKE, lr=1e-4, **more)


def steps(size: str) -> None:
    """A training step as a user has it, without CUDA graphs, with --compile, and at 256M in smaller packs."""
    part, ceiling = f"step-{size}", limits.matmul_rate(device())
    say(part, "bf16 matmul", tflops=ceiling / 1e12)
    case = case_of(size)
    smaller = [("graphs", 4096)] if size == "256M" else []
    runs = [("graphs", case.budget), ("graphs, compile", case.budget), *smaller, ("plain", case.budget)]
    if SMOKE:
        torch.compiler.set_stance("force_eager")  # compiling for a CPU takes a minute and says nothing of a GPU
    failed = []
    for kind, budget in runs:
        name = f"{kind}, packs of {budget}"
        try:
            clear()
            with patch.object(trainer.body_graph, "GRAPHED", () if kind == "plain" else ("cuda", "cpu")):
                say(part, name, **_step(replace(case, budget=budget), "compile" in kind, ceiling))
        except Exception as error:  # out of memory, say: the others are still worth their time
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            say(part, name, error=failed[-1])
    if failed:
        raise RuntimeError("; ".join(failed))


def _step(case: Case, compiles: bool, ceiling: float) -> dict[str, Any]:
    vlm, heads = build(case)
    config = replace(case.train_config(), compile=compiles)
    model, frames = ProspectModel(vlm, heads, config).train(), CachedNoise(vlm)
    optimizer, number = make_optimizer(model, config), min(case.steps, 5)
    data = [_windows(step, case) for step in range(number)]
    packs = [[pack.loaded() for pack in pack_windows(windows, frames, case.budget)] for windows in data]
    if device() == "cuda":  # as workers send them
        packs = [[pack.pin_memory() for pack in one] for one in packs]
    coming, loss = uploaded([*packs, *packs, packs[-1]], Transfer(world().device)), 0.0

    def step() -> None:
        nonlocal loss
        loss = train_step(model, optimizer, next(coming), config, world()).loss

    first = [seconds_of(step) for _ in range(number)]  # the same steps: compiles, and records their graphs
    took = [seconds_of(step) for _ in range(number)]
    rates = sorted(sum(len(w.input_ids) for w in of_step) / t for of_step, t in zip(data, took, strict=True))
    used = statistics.median(
        limits.step_flop(vlm, of_step) / t / ceiling for of_step, t in zip(data, took, strict=True)
    )
    found = {
        "tokens_per_s": statistics.median(rates), "used": used, "slowest": rates[0], "fastest": rates[-1],
        "packs": len(packs[-1]), "graphs": len(model._graph._rows), "ms": 1e3 * statistics.median(took),
        "first_s": first[0], "to_warm_s": sum(first),
    }  # fmt: skip
    found |= launches(step)
    if "kernel_ms" in found:
        found["card_busy"] = found["kernel_ms"] / found["ms"]
    return found | {"peak_gb": memory_gb(), "loss": loss}


def _windows(step: int, case: Case) -> list[Window]:
    found = pool_lengths()
    return [make_window(i, found[i], case.vocabulary) for i in range(step * case.clips, (step + 1) * case.clips)]


def launches(call: Callable[[], Any]) -> dict[str, Any]:
    """Of one call: kernels, what the host launched and waited for, milliseconds in kernels; on a CPU the operators."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device() == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        call()
        wait()
    events = seen.events()
    if not cuda:
        return {"operators": sum(event.name.startswith("aten::") for event in events)}
    host = Counter(event.name for event in events if event.device_type == DeviceType.CPU)
    on_card = (event for event in events if event.device_type == DeviceType.CUDA)
    kernels = [e.time_range.elapsed_us() for e in on_card if not e.name.startswith(("Memcpy", "Memset"))]
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
    return {
        "launches": sum(n for name, n in host.items() if "Launch" in name),
        "waits": sum(host[name] for name in waits),
        "kernel_ms": sum(kernels) / 1e3,
    }


def hf() -> None:
    """Ours and the HF Trainer's length-grouped batches, on the same sequences."""
    case = case_of("256M")
    say("hf", "one batch, both models", **sides.check(case))
    rates = {}
    for side in ("ours", "hf-grouped"):
        clear()
        clock = sides.Clock(case)
        counted = sides.ours(case, clock) if side == "ours" else sides.hf(case, clock, grouped=True)
        rates[side] = counted["tokens"] / clock.found["wall_s"]
        real = counted["tokens"] / counted["computed"]
        memory = clock.found.get("memory_mb", 0.0) / 1e3
        say("hf", side, tokens_per_s=rates[side], real_share=real, gb_over_base=memory)
    say("hf", "ratio", ours_is_faster_by=rates["ours"] / rates["hf-grouped"])


# ---- the tower -------------------------------------------------------------------------------------------


def encode() -> None:
    """The vision tower as `encode` runs it, from pixels in the host's memory to features there."""
    ceiling = limits.matmul_rate(device())
    for size in SIZES:
        clear()
        _encode(size, ceiling)


def _encode(size: str, ceiling: float) -> None:
    vlm, _ = build(case_of(size))
    vlm.model.text_model = vlm.lm_head = None
    vlm.eval()
    side, count = frame_side(vlm), 2 if SMOKE else 30
    blocks = np.random.default_rng(0).integers(0, 256, (4, 2 if SMOKE else 32, 3, side, side), np.uint8)
    tower = Tower(vlm, "random", k=1, keep="vision", store="float16", computed="bfloat16")
    read = [torch.from_numpy(b).pin_memory() if tower.transfer.overlaps else torch.from_numpy(b) for b in blocks]
    ready = read[0].to(device())

    def whole() -> None:
        for _ in tower.features(read[i % len(read)] for i in range(count)):
            pass

    def look() -> None:
        with torch.inference_mode(), torch.autocast(device(), torch.bfloat16):
            for _ in range(count):
                run_tower(vlm, ready, 1)

    look()
    whole()
    for name, call in (("as encode does", whole), ("pixels on the card", look)):
        took = seconds_of(call)
        used = limits.look_flop(vlm) * count * len(ready) / took / ceiling
        rate = count * len(ready) / took
        say("encode", f"{size}, {name}", frames_per_s=rate, used=used, peak_gb=memory_gb())


# ---- live ------------------------------------------------------------------------------------------------


def live() -> None:
    """Decisions/s of one stream with ready features, its context half full; then memory over several full contexts."""
    for size in SIZES:
        clear()
        run = _loaded(size)
        logits = []
        for kind in ("graph", "plain"):
            with patch.object(trainer.live.engine, "GRAPHED", ("cuda", "cpu") if kind == "graph" else ()):
                logits.append(_live(f"{size}, {kind}", Camera(run)))
        say("live", f"{size}, graph against plain", logits_apart=np.abs(logits[0] - logits[1]).max())
        del run
    clear()
    _flat(_loaded("256M"))


def _loaded(size: str) -> LoadedRun:
    vlm, heads = build(case_of(size))
    config = _config(max_tokens=300 if SMOKE else 2048)
    return LoadedRun(ProspectModel(vlm, heads, config).eval(), some_tokens(), config, {"neg_rate": 1.0})


def _live(name: str, stream: Camera) -> np.ndarray:
    """The logits [2, N] of the frames that were timed."""
    with streaming(stream.model):
        stream.step(stream.config.max_tokens // 2, at_once=64)
        stream.step(5)  # a graph is made of the first
        took, logits = stream.step(20 if SMOKE else 200)
        rate, found = len(took) / sum(took), launches(lambda: stream.step(1))
    ms, worst = 1e3 * statistics.median(took), 1e3 * max(took)
    graph = stream.engine._static is not None and device() == "cuda"  # on a CPU the same without one
    say("live", name, decisions_per_s=rate, ms=ms, worst_ms=worst, context=stream.context.used, graph=graph, **found)
    return logits


def _flat(run: LoadedRun) -> None:
    """The card's memory each time that a context of half the size has started over."""
    stream, held = Camera(replace(run, config=replace(run.config, max_tokens=run.config.max_tokens // 2))), []
    with streaming(stream.model):
        while len(held) < 4:
            before = stream.context.restarts
            while stream.context.restarts == before:
                stream.step(16)
            wait()
            held.append(torch.cuda.memory_reserved() / 1e6 if device() == "cuda" else 0.0)
    say("live", "256M, memory reserved by context", mb=held, frames=stream.number, growth_mb=held[-1] - held[0])


class Camera:
    """One stream whose frames are ready features; nothing is ever said."""

    def __init__(self, run: LoadedRun) -> None:
        _, capacity = token_budget(run.model, run.config, NEVER)
        self.model, self.config, self.number = run.model, run.config, 0
        self.features = run.model.frame_features(torch.from_numpy(CachedNoise(run.model.vlm).table).to(device()))
        self.engine = Engine(run.model, run.tokens, 1, capacity)
        task = make_window(0, 600, VOCABULARY).clip
        self.context = Session(run.model, run.tokens, task, run.config, NEVER)

    def step(self, frames: int, at_once: int = 1) -> tuple[list[float], np.ndarray]:
        """(seconds of each pass, until its logits are on the host; logits [2, frames])."""
        took, logits, end = [], list[np.ndarray](), self.number + frames
        while self.number < end:
            numbers = range(self.number, min(end, self.number + at_once))
            coming = [FrameInput(n, (), self.features[n % len(self.features)]) for n in numbers]
            began = time.perf_counter()
            happened = self.engine.run(self.context.step(coming))
            took.append(time.perf_counter() - began)
            logits += [one.logits for one in happened]
            self.number += len(happened)
        return took, np.stack(logits, 1)


def some_tokens() -> Tokens:
    return train_tiny_tokens(["Put the base down.", "Attach the wheel.", "S1->complete", "What now?"] * 3)


# ---- from conversations to an answer -----------------------------------------------------------------------


def e2e() -> None:
    import e2e as whole

    whole.go(SCRATCH / "e2e", case_of("256M"), SMOKE, say)
