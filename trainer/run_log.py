"""Every step of a run where you can see it: RUN/metrics.jsonl, TensorBoard, and a bar or plain lines on stderr.

metrics.jsonl is the record. Each line is flushed as it comes: kill -9 costs at most the line being written, and
`rewind` takes the file back to the checkpoint that a resumed run starts from. What depends on the clock stands
apart, under "clock"; the rest is the same, bit for bit, whether a run was interrupted or not. Strict JSON: what is
not finite is null. wandb and trackio get the same numbers, if asked for. 0.4 ms a step, TensorBoard included.

    {"step": 3, "loss": 1.2, "speaking": 0.6, "dst_update": 0.4, "lm": 0.2, "n_speaking": 390.0, ..., "grad_norm": 0.9,
     "lr": 2e-3, "tokens": 3400, "padding": 0.01, "clock": {"seconds": 0.8, "tokens_per_s": 4250.0}}
    {"step": 50, "evaluation": {"split": "val", "speaking": {"ap": 0.7, "chance": 0.1, ...}, "dst_update": {...}, ...}}
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from pipeline.errors import InputError
from pipeline.storage import replacing

Line = dict[str, Any]
Write = Callable[[Line], None]

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"
LOGGERS: Final = ("wandb", "trackio")
LOSSES: Final = {"loss": "loss/total", "speaking": "loss/speaking", "dst_update": "loss/dst_update", "lm": "loss/lm"}
_RECENT_STEPS, _QUIET_S = 20, 30.0


class Metrics:
    """Hands each line to all that want it. `Metrics()` hands it to nobody: what ranks above 0 hold."""

    def __init__(self, writes: Sequence[Write] = ()) -> None:
        self._writes = tuple(writes)

    def step(self, line: Line) -> None:
        """Take an optimizer step's numbers: `step` counts from 1, `padding` in 0..1, `seconds` by the clock."""
        self._write(_clocked(line))

    def evaluation(self, line: Line) -> None:
        """Take {"step": steps done, "evaluation": EvalReport.to_json()}, with `seconds` if it was timed."""
        self._write(_clocked(line))

    def _write(self, line: Line) -> None:
        for write in self._writes:
            write(line)


@contextmanager
def open_metrics(
    run: Path,
    total_steps: int,
    start_step: int = 0,
    logger: str | None = None,
    shown: bool = True,
    config: dict[str, Any] | None = None,
) -> Iterator[Metrics]:
    """Metrics of the run in the folder `run`, which has done `start_step` steps; what was logged later is dropped.

    `logger`: 'wandb' or 'trackio', told `config`. `shown`: progress on stderr, a bar on a terminal, else plain lines.
    Raises InputError where the logger cannot be used; OSError, also later, where the disk is full.
    """
    package = find_logger(logger)
    rewind(run, start_step)
    console = Console(stderr=True, highlight=False, quiet=not shown)
    with ExitStack() as stack:
        # the tracker starts first, for it may refuse, and writes last
        tracked = [stack.enter_context(_tracked(package, run, config or {}))] if package else []
        sinks = [_json_lines(run / METRICS), _tensorboard(run / TENSORBOARD, start_step, console)]
        if shown:
            sinks.append((_bar if console.is_terminal else _plain_lines)(console, total_steps, start_step))
        yield Metrics([*(stack.enter_context(sink) for sink in sinks), *tracked])


# ---- metrics.jsonl -----------------------------------------------------------------------------------


def read_metrics(run: Path) -> list[Line]:
    """All lines of RUN/metrics.jsonl, less a last one that was cut off; none where there is no file.

    Raises InputError where another line is damaged.
    """
    return [line for _, line in _lines_of(run / METRICS)]


def rewind(run: Path, step: int) -> None:
    """Drop from RUN/metrics.jsonl the lines of later steps, and a last one that was cut off.

    The rest keeps its bytes; the file is replaced whole. Raises InputError where another line is damaged.
    """
    path = run / METRICS
    if not path.exists():
        return
    kept = b"".join(text for text, line in _lines_of(path) if line["step"] <= step)
    with replacing(path) as new:
        new.write_bytes(kept)


def _lines_of(path: Path) -> Iterator[tuple[bytes, Line]]:
    """(bytes, parsed) of every line that ends in a newline."""
    texts = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, text in enumerate(texts[:-1], 1):
        try:
            line = json.loads(text)
            line["step"] = int(line["step"])
        except (ValueError, KeyError, TypeError):
            what = "found something else than one step's numbers, expected a JSON object with a step"
            raise InputError(f"{path} line {number}: {what}; remove that line and run again") from None
        yield text + b"\n", line


@contextmanager
def _json_lines(path: Path) -> Iterator[Write]:
    with path.open("a", encoding="utf-8") as file:

        def write(line: Line) -> None:
            file.write(json.dumps(_strict(line), allow_nan=False) + "\n")
            file.flush()

        yield write


def _strict(value: Any) -> Any:
    """`value` with null for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _strict(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _clocked(line: Line) -> Line:
    """The line with `seconds`, and the speed that follows from it, under `clock`."""
    rest = {name: value for name, value in line.items() if name != "seconds"}
    seconds = line.get("seconds")
    if seconds is None:
        return rest
    clock = {"seconds": round(seconds, 4)}
    if seconds > 0 and "tokens" in line:
        clock["tokens_per_s"] = round(line["tokens"] / seconds, 1)
    return {**rest, "clock": clock}


# ---- TensorBoard, wandb, trackio ---------------------------------------------------------------------


def scalars(line: Line) -> dict[str, float]:
    """A line's numbers under the names they have in TensorBoard: loss/, supervised/, train/ or eval/SPLIT/.

    Left out: what is not finite or not known, and a loss term with nothing to supervise (it is 0, not learnt).
    """
    named = _of_evaluation(line["evaluation"]) if "evaluation" in line else _of_step(line)
    return {name: float(v) for name, v in named.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def _of_step(line: Line) -> Line:
    values = {name: value for name, value in {**line, **line.get("clock", {})}.items() if name != "step"}
    named = {}
    for name, value in values.items():
        if name in LOSSES and values.get(f"n_{name}") == 0:
            continue
        plain = f"supervised/{name[2:]}" if name.startswith("n_") else f"train/{name}"
        named[LOSSES.get(name, plain)] = value
    return named


def _of_evaluation(found: Line) -> Line:
    heads = {
        f"{head}_{what}": found.get(head, {}).get(what)
        for head in ("speaking", "dst_update")
        for what in ("ap", "chance")
    }
    return {f"eval/{found['split']}/{name}": v for name, v in {**heads, "lm_loss": found.get("lm_loss")}.items()}


@contextmanager
def _tensorboard(folder: Path, start_step: int, console: Console) -> Iterator[Write]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print(f"no {folder}: tensorboard is not installed; {METRICS} has the same numbers", soft_wrap=True)
        yield lambda line: None
        return
    # purge_step: what a killed run logged after its checkpoint is not shown
    writer = SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=30)  # type: ignore[no-untyped-call]

    def write(line: Line) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])  # type: ignore[no-untyped-call]

    try:
        yield write
    finally:
        writer.close()  # type: ignore[no-untyped-call]


def find_logger(name: str | None) -> ModuleType | None:
    """The package called `name`, None for None; InputError where it is unknown or not installed."""
    if name is None:
        return None
    if name not in LOGGERS:
        raise InputError(f"--log {name}: expected one of {', '.join(LOGGERS)}, or leave --log out")
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"--log {name}: {name} is not installed; pip install {name}, or leave --log out") from None


@contextmanager
def _tracked(package: ModuleType, run: Path, config: dict[str, Any]) -> Iterator[Write]:
    """wandb's and trackio's common ground; a resumed run is a new one of the same name and group."""
    which, name = package.__name__, run.resolve().name
    project = os.environ.get(f"{which.upper()}_PROJECT", "prospect-dst")
    place = {"dir": str(run)} if which == "wandb" else {}
    try:
        package.init(project=project, name=name, group=name, config=config, **place)
    except Exception as error:
        why = " ".join(str(error).split())
        raise InputError(f"--log {which}: it does not start ({why}); see its manual, or leave --log out") from None
    try:
        yield lambda line: package.log(scalars(line), step=line["step"])
    except BaseException:
        package.finish(**({"exit_code": 1} if which == "wandb" else {}))
        raise
    package.finish()


# ---- on stderr ---------------------------------------------------------------------------------------


class _Bar(Progress):
    """A progress bar with a line of losses under it."""

    losses = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.losses, overflow="ellipsis", no_wrap=True)


@contextmanager
def _bar(console: Console, total: int, start: int) -> Iterator[Write]:
    """For a terminal: the bar stays when all is done; evaluations are printed above it."""
    speed = TextColumn("{task.fields[speed]}", markup=False, table_column=Column(no_wrap=True))
    columns = (TextColumn("train"), BarColumn(bar_width=None), MofNCompleteColumn(), speed)
    pace = _Pace(total)
    with _Bar(*columns, console=console, expand=True, refresh_per_second=4) as bar:
        task = bar.add_task("train", total=total, completed=start, speed="")

        def write(line: Line) -> None:
            if "evaluation" in line:
                bar.print(_evaluation_text(line, total), markup=False, soft_wrap=True)
                return
            bar.losses = _losses_text(line)
            bar.update(task, completed=line["step"], speed=pace.after(line))

        yield write


@contextmanager
def _plain_lines(console: Console, total: int, start: int) -> Iterator[Write]:
    """For a log file: the first step, the last, each tenth of the run, and one whenever 30 s have passed without."""
    pace = _Pace(total)
    tenth, said = -1, 0.0

    def write(line: Line) -> None:
        nonlocal tenth, said
        if "evaluation" in line:
            console.print(_evaluation_text(line, total), markup=False, soft_wrap=True)
            return
        step, now, speed = line["step"], time.monotonic(), pace.after(line)
        if tenth == step * 10 // total and now - said < _QUIET_S:
            return
        tenth, said = step * 10 // total, now
        parts = (f"step {step}/{total}", _losses_text(line), speed)
        console.print("  ".join(part for part in parts if part), markup=False, soft_wrap=True)

    yield write


class _Pace:
    """Tokens a second over the last 20 steps; time left at the mean pace since the first step, evaluations included."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS)  # tokens, seconds
        self._first: tuple[int, float] | None = None  # step, and when it was done

    def after(self, line: Line) -> str:
        """What there is to say after a step: speed, padding, time left, and on a GPU the peak of its memory."""
        seconds = line.get("clock", {}).get("seconds", 0.0)
        self._recent.append((line.get("tokens", 0), seconds))
        tokens, spent = (sum(column) for column in zip(*self._recent, strict=True))
        parts = [f"{tokens / spent:,.0f} tok/s" if tokens and spent else ""]
        parts.append(f"padding {line['padding']:.1%}" if "padding" in line else "")
        parts.append(f"eta {_duration(self._left(line['step'], seconds))}")
        return "  ".join(part for part in (*parts, _peak_memory()) if part)

    def _left(self, step: int, seconds: float) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first, since = self._first
        return (self._total - step) * (seconds if step <= first else (now - since) / (step - first))


def _losses_text(line: Line) -> str:
    """A term with nothing to supervise is shown as a dash: its 0 would look like success."""
    shown = {name: line[name] for name in LOSSES if name in line}
    return "  ".join(f"{name} {'-' if line.get(f'n_{name}') == 0 else short(v)}" for name, v in shown.items())


def _evaluation_text(line: Line, total: int) -> str:
    found = line["evaluation"]
    known = [(name, found[name]) for name in ("speaking", "dst_update") if name in found]
    heads = [f"{name} AP {short(head['ap'])} (chance {short(head['chance'])})" for name, head in known]
    return f"step {line['step']}/{total}  on {found['split']}: {'  '.join(heads)}"


def short(value: float | None) -> str:
    """Three decimals, or a power of ten below 0.01; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}" if minutes >= 60 else f"{minutes}:{second:02d}"


def _peak_memory() -> str:
    from torch import cuda

    return f"peak {cuda.max_memory_allocated() / 2**30:.1f} GiB" if cuda.is_initialized() else ""
