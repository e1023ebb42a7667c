"""Where output goes and how it is said: a console on stdout, progress bars on stderr, text made safe to show."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Callable, Iterator

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text


def console() -> Console:
    """For results."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def table(first: str, *others: str) -> Table:
    """An empty table with these column headings; all but the first column are right-aligned."""
    columns = [Column(Text(first)), *(Column(Text(name), justify="right") for name in others)]
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[..., None]]:
    """Yields report(stage, done, total, note=""); the bar is on stderr, and only where that is a terminal."""
    stderr = Console(stderr=True)
    note = TextColumn("{task.fields[note]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), note)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        tasks: dict[str, int] = {}

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, note=note)
            bar.update(tasks[stage], completed=done, total=total, note=note)  # type: ignore[arg-type]

        yield report


_OBEYED = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


def plain(value: object) -> str:
    """Text on one line with nothing a terminal obeys: controls and direction overrides show as \ufffd."""
    return _OBEYED.sub("\ufffd", " ".join(str(value).split()))


def command(*words: object) -> str:
    """A command of ours to paste into a shell."""
    return shlex.join(["prospect-dst", *map(str, words)])


def counted(number: int, thing: str) -> str:
    """'1 clip', '2,000 clips'."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    return f"{share:.2%}" if 0 < share < 0.001 else f"{share:.1%}"


def clock(seconds: float, *, tenths: bool = False) -> str:
    """m:ss, h:mm:ss from an hour on, with tenths where there are any or they are asked for."""
    minutes, rest = divmod(round(seconds * 10), 600)
    second = f"{rest // 10:02d}" + (f".{rest % 10}" if rest % 10 or tenths else "")
    return f"{minutes // 60}:{minutes % 60:02d}:{second}" if minutes >= 60 else f"{minutes}:{second}"
