"""The log of a run: RUN/metrics.jsonl, TensorBoard, wandb if asked for, and progress on stderr.

metrics.jsonl is the record: each line is flushed, so kill -9 costs at most the line being written, and `rewind` cuts it
to the checkpoint that a resumed run starts from. What depends on the clock stands apart under "clock"; the rest is the
same, bit for bit, whether a run was interrupted or not. Strict JSON: what is not finite is null.

    {"step": 3, "loss": 1.2, "speaking": 0.6, "dst_update": 0.4, "lm": 0.2, "n_speaking": 390.0, ..., "grad_norm": 0.9,
     "lr": 2e-3, "tokens": 3400, "padding": 0.01, "clock": {"seconds": 0.8, "tokens_per_s": 4250.0}}
    {"step": 50, "evaluation": {"split": "val", "speaking": {"ap": 0.7, "chance": 0.1, ...}, "dst_update": {...}, ...}}
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import msgspec

from pipeline.errors import InputError
from pipeline.schema import HEADS
from pipeline.storage import replacing
from pipeline.terminal import clock, progress_bar

Line = dict[str, Any]
Log = Callable[[Line], object]

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
LOSSES: Final = {"loss": "loss/total", **{term: f"loss/{term}" for term in (*HEADS, "lm")}}
_QUIET_S: Final = 30.0


@contextmanager
def open_log(
    run: Path,
    total_steps: int,
    done: int = 0,
    tracker: str | None = None,
    shown: bool = True,
    config: Line | None = None,
) -> Iterator[Log]:
    """A function that logs a line: a step's numbers (`step` from 1, `seconds`, ...), or {"step", "evaluation"}.

    What was logged after step `done` is dropped. tracker: 'wandb', which gets `config`; a resumed run is a new one of
    the same name and group there. shown: progress on stderr. InputError where the tracker can't be used; OSError, also
    later, where the disk is full.
    """
    wandb: Any = find_tracker(tracker)
    rewind(run, done)
    logs: list[Log] = []
    with ExitStack() as stack:
        if wandb is not None:  # first, as it may refuse
            name, project = run.resolve().name, os.environ.get("WANDB_PROJECT", "prospect-dst")
            try:
                wandb.init(project=project, name=name, group=name, config=config or {}, dir=str(run))
            except Exception as error:
                why = " ".join(str(error).split())
                raise InputError(
                    f"--log wandb: it does not start ({why}); see its manual, or leave --log out"
                ) from None
            stack.push(lambda error, *_: wandb.finish(exit_code=int(error is not None)))
            logs.append(lambda line: wandb.log(scalars(line), step=line["step"]))
        file = stack.enter_context((run / METRICS).open("ab", buffering=0))
        logs.append(lambda line: file.write(msgspec.json.encode(line) + b"\n"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if shown:
                missing = f"no {run / TENSORBOARD}: tensorboard is not installed; {METRICS} has the same numbers"
                print(missing, file=sys.stderr)
        else:  # purge_step: what a killed run logged after its checkpoint is not shown
            board: Any = SummaryWriter(str(run / TENSORBOARD), purge_step=done + 1, flush_secs=30)  # type: ignore[no-untyped-call]
            stack.enter_context(board)
            logs.append(lambda line: [board.add_scalar(*value, line["step"]) for value in scalars(line).items()])
        if shown:
            logs.append(stack.enter_context(_progress(total_steps, done)))

        def log(line: Line) -> None:
            line = dict(line)
            if (seconds := line.pop("seconds", None)) is not None:
                speed = {"tokens_per_s": round(line["tokens"] / seconds, 1)} if seconds > 0 and "tokens" in line else {}
                line["clock"] = {"seconds": round(seconds, 4), **speed}
            for write in logs:
                write(line)

        yield log


def find_tracker(name: str | None) -> ModuleType | None:
    """The package wandb for 'wandb', None for None; InputError where it is another name, or not installed."""
    if name is None:
        return None
    if name != "wandb":
        raise InputError(f"--log {name}: expected wandb, or leave --log out")
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError("--log wandb: wandb is not installed; pip install wandb, or leave --log out") from None


def scalars(line: Line) -> dict[str, float]:
    """A line's numbers under the names they have in TensorBoard: loss/, supervised/, train/ or eval/SPLIT/.

    Left out: what is not finite or not known, and a loss term with nothing to supervise (it is 0, not learnt).
    """
    named = {}
    if "evaluation" in line:
        found = line["evaluation"]
        named = {f"{head}_{key}": found.get(head, {}).get(key) for head in HEADS for key in ("ap", "chance")}
        named = {f"eval/{found['split']}/{name}": v for name, v in {**named, "lm_loss": found.get("lm_loss")}.items()}
    else:
        for name, value in {**line, **line.get("clock", {})}.items():
            if name != "step" and line.get(f"n_{name}") != 0:
                plain = f"supervised/{name[2:]}" if name.startswith("n_") else f"train/{name}"
                named[LOSSES.get(name, plain)] = value
    return {name: float(v) for name, v in named.items() if isinstance(v, (int, float)) and math.isfinite(v)}


# ---- metrics.jsonl -----------------------------------------------------------------------------------


def read_metrics(run: Path) -> list[Line]:
    """All lines of RUN/metrics.jsonl, less a last one that was cut off; none where there is no file.

    InputError where another line is damaged.
    """
    return [line for _, line in _lines_of(run / METRICS)]


def rewind(run: Path, step: int) -> None:
    """Drop from RUN/metrics.jsonl the lines of later steps, and a last one that was cut off; the file is replaced."""
    path = run / METRICS
    if path.exists():
        kept = b"".join(text for text, line in _lines_of(path) if line["step"] <= step)
        with replacing(path) as new:
            new.write_bytes(kept)


def _lines_of(path: Path) -> Iterator[tuple[bytes, Line]]:
    """(bytes, parsed) of every line that ends in a newline."""
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else (), 1):
        if not text.endswith(b"\n"):
            return
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, KeyError, TypeError):
            what = "found something else than one step's numbers, expected a JSON object with a step"
            raise InputError(f"{path} line {number}: {what}; remove that line and run again") from None
        yield text, line


# ---- on stderr ---------------------------------------------------------------------------------------


@contextmanager
def _progress(total: int, done: int) -> Iterator[Log]:
    """A bar on a terminal; a line for the first step, the last, each tenth of the run, and after 30 s without."""
    from torch import cuda

    began = time.monotonic()
    tenth, said, tokens, seconds = -1, 0.0, 0, 0.0
    with progress_bar() as bar:

        def write(line: Line) -> None:
            nonlocal tenth, said, tokens, seconds
            step, now = line["step"], time.monotonic()
            if "evaluation" in line:
                found = line["evaluation"]
                known = ((head, found[head]) for head in HEADS if head in found)
                heads = (f"{head} AP {short(of['ap'])} (chance {short(of['chance'])})" for head, of in known)
                print(f"step {step}/{total}  on {found['split']}: {'  '.join(heads)}", file=sys.stderr)
                return
            tokens, seconds = tokens + line.get("tokens", 0), seconds + line.get("clock", {}).get("seconds", 0.0)
            pace = [f"{tokens / seconds:,.0f} tok/s"] if tokens and seconds else []
            pace.append(f"eta {clock(round((total - step) * (now - began) / (step - done)))}")
            if cuda.is_initialized():
                pace.append(f"peak {cuda.max_memory_allocated() / 2**30:.1f} GiB")
            bar("train", step, total, "  ".join([f"loss {short(line['loss'])}", *pace]))
            if tenth != step * 10 // total or now - said >= _QUIET_S:
                tenth, said = step * 10 // total, now
                losses = {name: line[name] for name in LOSSES if name in line}  # of nothing supervised: a dash
                shown = [f"{name} {'-' if line.get(f'n_{name}') == 0 else short(v)}" for name, v in losses.items()]
                print("  ".join([f"step {step}/{total}", *shown, *pace]), file=sys.stderr)

        yield write


def short(value: float | None) -> str:
    """Three decimals, or a power of ten below 0.01; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
