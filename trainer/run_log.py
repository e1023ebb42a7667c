"""The log of a run: RUN/metrics.jsonl, TensorBoard, wandb if asked for, and progress on stderr.

Each line of metrics.jsonl is flushed, so kill -9 costs at most the line being written; a resumed run cuts it to its
checkpoint. What depends on the clock stands apart under "clock"; the rest is the same, bit for bit, whether a run was
interrupted or not. What is not finite is null.

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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from pipeline.errors import InputError
from pipeline.schema import HEADS
from pipeline.storage import replacing
from pipeline.terminal import clock, progress_bar

Line = dict[str, Any]
Log = Callable[[Line], object]

METRICS: Final = "metrics.jsonl"
LOSSES: Final = {"loss": "loss/total", **{term: f"loss/{term}" for term in (*HEADS, "lm")}}


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
    the same name and group there. shown: progress on stderr.
    """
    kept = [text for text, line in _whole_lines(run) if line["step"] <= done]
    with replacing(run / METRICS) as new:
        new.write_bytes(b"".join(kept))
    with ExitStack() as stack:
        file = stack.enter_context((run / METRICS).open("ab", buffering=0))
        board: Any = None
        with suppress(ImportError):  # metrics.jsonl has the same numbers
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: what a killed run logged after its checkpoint is not shown
            board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1, flush_secs=30)  # type: ignore[no-untyped-call]
            stack.enter_context(board)
        progress = stack.enter_context(_progress(total_steps, done)) if shown else None
        if wandb := find_tracker(tracker):
            name, project = run.resolve().name, os.environ.get("WANDB_PROJECT", "prospect-dst")
            try:
                wandb.init(project=project, name=name, group=name, config=config or {}, dir=str(run))
            except Exception as error:
                why = " ".join(str(error).split())
                raise InputError(f"--log wandb: does not start ({why}); see its manual, or leave it out") from None
            stack.push(lambda error, *_: wandb.finish(exit_code=int(error is not None)))

        def log(line: Line) -> None:
            line = dict(line)
            if seconds := line.pop("seconds", None):
                line["clock"] = {"seconds": round(seconds, 4), "tokens_per_s": round(line["tokens"] / seconds, 1)}
            file.write(msgspec.json.encode(line) + b"\n")
            numbers = scalars(line)
            for name, value in numbers.items() if board else ():
                board.add_scalar(name, value, line["step"])
            if wandb:
                wandb.log(numbers, step=line["step"])
            if progress:
                progress(line)

        yield log


def find_tracker(name: str | None) -> Any:
    """The package wandb for 'wandb', None for None; InputError where it is another name, or not installed."""
    if name is None:
        return None
    with suppress(ImportError):
        if name == "wandb":
            return importlib.import_module(name)
    raise InputError(f"--log {name}: expected wandb, installed (pip install wandb); or leave --log out")


def scalars(line: Line) -> dict[str, float]:
    """A line's numbers under the names they have in TensorBoard: loss/, supervised/, train/ or eval/SPLIT/.

    Left out: what is not finite or not known, and a loss term with nothing to supervise (it is 0, not learnt).
    """
    named = {}
    if "evaluation" in line:
        evaluation = line["evaluation"]
        named = {f"{head}_{key}": evaluation.get(head, {}).get(key) for head in HEADS for key in ("ap", "chance")}
        named = {
            f"eval/{evaluation['split']}/{name}": v
            for name, v in {**named, "lm_loss": evaluation.get("lm_loss")}.items()
        }
    else:
        for name, value in {**line, **line.get("clock", {})}.items():
            if name != "step" and line.get(f"n_{name}") != 0:
                plain = f"supervised/{name[2:]}" if name.startswith("n_") else f"train/{name}"
                named[LOSSES.get(name, plain)] = value
    return {name: float(v) for name, v in named.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def read_metrics(run: Path) -> list[Line]:
    """All lines of RUN/metrics.jsonl, less a last one that was cut off; none where there is no file.

    InputError where another line is damaged.
    """
    return [line for _, line in _whole_lines(run)]


def _whole_lines(run: Path) -> Iterator[tuple[bytes, Line]]:
    """(bytes, parsed) of every line that ends in a newline."""
    path = run / METRICS
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, text in enumerate(lines, 1):
        if text.endswith(b"\n"):
            try:
                line = json.loads(text)
                line["step"] = int(line["step"])
            except (ValueError, KeyError, TypeError):
                problem = "damaged, expected a JSON object with a step; remove that line and run again"
                raise InputError(f"{path} line {number}: {problem}") from None
            yield text, line


@contextmanager
def _progress(total: int, done: int) -> Iterator[Log]:
    """A bar on a terminal; a line for the first step, each tenth of the run, and the last."""
    began = time.monotonic()
    with progress_bar() as bar:

        def write(line: Line) -> None:
            step = line["step"]
            if "evaluation" in line:
                evaluation = line["evaluation"]
                heads = (
                    f"{head} AP {short(evaluation[head]['ap'])} (chance {short(evaluation[head]['chance'])})"
                    for head in HEADS
                )
                print(f"step {step}/{total}  on {evaluation['split']}: {'  '.join(heads)}", file=sys.stderr)
                return
            eta = clock(round((total - step) * (time.monotonic() - began) / (step - done)))
            pace = f"{line['clock']['tokens_per_s']:,.0f} tok/s  eta {eta}"
            bar("train", step, total, f"loss {short(line['loss'])}  {pace}")
            if step in (done + 1, total) or step % max(1, total // 10) == 0:
                terms = (f"{name} {short(line[name] if line[f'n_{name}'] else None)}" for name in (*HEADS, "lm"))
                print(f"step {step}/{total}  loss {short(line['loss'])}  {'  '.join(terms)}  {pace}", file=sys.stderr)

        yield write


def short(value: float | None) -> str:
    """Three decimals, or a power of ten below 0.01; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
