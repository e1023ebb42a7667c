"""A stream on a terminal: events scroll by, the newest curves and the state stay in a panel below them.

Each frame is one block of a row; a full row scrolls away like the events, so that what is above the panel is the
whole timeline. The panel holds the last rows of the screen by a scroll region (as apt's progress bar does): what
the user types stays in its last row, which is never redrawn under the typing. Where there is no terminal, events
alone are printed, each on one line.
"""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from typing import Final, Self

from PIL import Image
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.summary import HUES
from pipeline.terminal import clock, plain
from trainer.live.sinks import (
    HEAD_NAMES,
    MARKS,
    About,
    Closing,
    Event,
    Moment,
    events,
    height,
    thresholds,
)

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS: Final = "_..-=+*#"
_RULES: Final = {False: "─╌", True: "--"}  # by whether the terminal has ASCII alone: above the panel, above a row
_HUE: Final = {"speaking": HUES["speaking"], "dst_update": HUES["DST"]}
_KIND: Final = {"user": "bold green", "says": f"bold {HUES['speaking']}", "state": f"bold {HUES['DST']}"}
_TIME, _NAME = 9, 9  # columns of an event's time and kind
_REDRAW_S: Final = 0.05
_LEAST_SCROLLING: Final = 5  # rows; a terminal with fewer gets the log alone
_BIN: Final = math.log(1.01)  # width of the latency histogram's bins


class Tally:
    """Counts of a stream; latencies in bins 1% wide, so that hours of them stay a few hundred numbers."""

    def __init__(self) -> None:
        self.frames = self.spoke = self.updates = self.rebuilt = self.skipped = 0
        self.end_s = 0.0
        self.bins: Counter[int] = Counter()

    def add(self, moment: Moment, fps: float) -> None:
        self.frames += 1
        self.spoke += moment["said"] is not None
        self.updates += len(moment["updates"] or ())
        self.rebuilt += bool(moment["started_over"])
        self.skipped += moment["skipped"]
        self.end_s = moment["time_s"] + 1 / fps
        self.bins[round(math.log(max(moment["seconds"], 1e-6)) / _BIN)] += 1

    def latency_s(self, share: float) -> float:
        """The latency that this share of the moments did not exceed, to half a percent."""
        left = math.ceil(share * self.frames)
        for code in sorted(self.bins):
            left -= self.bins[code]
            if left <= 0:
                return math.exp(code * _BIN)
        return math.nan

    def __str__(self) -> str:
        parts = [
            f"{_count(self.frames, 'frame')} ({clock(self.end_s)})",
            f"spoke {_count(self.spoke, 'time')}",
            f"median {_ms(self.latency_s(0.5))} a frame, p99 {_ms(self.latency_s(0.99))}",
        ]
        if self.rebuilt:
            parts.insert(2, f"context rebuilt {_count(self.rebuilt, 'time')}")
        if self.updates:
            parts.insert(2, _count(self.updates, "state change"))
        if self.skipped:
            parts.insert(1, f"{self.skipped:,} skipped")
        return "; ".join(parts)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:,.0f} ms"


class TerminalSink(Closing):
    def __init__(self, console: Console, about: About) -> None:
        self.console, self.about = console, about
        self.at = thresholds(about)
        self.tally = Tally()
        self.ascii = console.options.ascii_only
        self.rows: dict[str, list[tuple[float, bool]]] = {head: [] for head in about["heads"]}  # height, fired
        self.row_begins = self.row_ends = self.drawn = self.last = self.pace = 0.0
        self.panel: Panel | None = None
        rows = 2 + len(about["heads"]) + bool(about["steps"])
        screen = console.is_terminal and console.file.isatty() and not console.is_dumb_terminal
        if screen and console.height >= rows + _LEAST_SCROLLING:
            self.panel = Panel(console, rows, typing=sys.stdin is not None and sys.stdin.isatty())

    def __enter__(self) -> Self:
        if self.panel:
            self.panel.open()
        about = self.about
        of = f"{plain(about['arm'])} of {plain(about['run'])}"
        self._line(f"{plain(about['video'])}: {of}, {about['fps']:g} frames/s")
        if self.panel:
            self._line("threshold at half height: " + ", ".join(f"{HEAD_NAMES[h]} {p:.2g}" for h, p in self.at.items()))
            for name, text in (("goal", about["goal"]), ("steps", _steps(about))):
                if text:
                    self._line(f"{name}: {plain(text)}")
        return self

    def _line(self, text: str) -> None:
        if self.panel:
            self.panel.print(Text(text, "dim"))
        else:
            self.console.print(Text(text), soft_wrap=True)

    def show(self, moment: Moment, image: Image.Image) -> None:
        self.tally.add(moment, self.about["fps"])
        for event in events(moment):
            self._event(event, moment["time_s"])
        if self.panel:
            self._live(moment)

    def close(self) -> None:
        if self.panel:
            self._scroll_row()
            self.panel.close()
        if self.tally.frames:
            self.console.print(Text(str(self.tally)), soft_wrap=self.panel is None)

    # ---- events

    def _event(self, event: Event, time_s: float) -> None:
        when = f"{clock(time_s, tenths=True):>{_TIME}}"
        if self.panel is None:
            note = f"  {event.note}" if event.note else ""
            self.console.print(Text(f"{when}  {event.kind:<{_NAME}}{event.text}{note}"), soft_wrap=True)
            return
        text = Text.assemble(event.text, (f"  {event.note}" if event.note else "", "dim"))
        style = _KIND.get(event.kind, "dim")
        self.panel.print(_indented(Text(when, "dim"), Text(event.kind, style), text))

    # ---- curves

    def _live(self, moment: Moment) -> None:
        columns = max(20, self.console.width - _TIME - 2 - 12)
        if len(next(iter(self.rows.values()))) >= columns:
            self._scroll_row()
        fired = {"speaking": moment["said"] is not None, "dst_update": moment["updates"] is not None}
        for head, row in self.rows.items():
            if not row:
                self.row_begins = moment["time_s"]
            self.row_ends = moment["time_s"]
            row.append((height(moment["probabilities"].get(head), self.at[head]), fired[head]))
        now = time.monotonic()
        if self.last:
            self.pace = 0.9 * self.pace + 0.1 * (now - self.last) if self.pace else now - self.last
        self.last = now
        if now - self.drawn >= _REDRAW_S:
            self.drawn = now
            assert self.panel is not None
            rule = Text(_RULES[self.ascii][0] * (self.console.width - 1), "dim")
            self.panel.draw([rule, *self._curves(moment), *self._status(moment)], typed=bool(moment["heard"]))

    def _curves(self, moment: Moment) -> list[Text]:
        lines = []
        for head, row in self.rows.items():
            p = moment["probabilities"].get(head)
            value = f"  {p:.3f}" if p is not None and math.isfinite(p) else "  -"
            lines.append(Text.assemble(self._strip(head, row), (value, "bold" if row[-1][1] else "dim")))
        return lines

    def _strip(self, head: str, row: list[tuple[float, bool]]) -> Text:
        """A head's row: upper half at or over the threshold, bold where the head fired."""
        blocks = _ASCII_BLOCKS if self.ascii else _BLOCKS
        text = Text(f"{HEAD_NAMES[head]:>{_TIME}}  ", _HUE[head])
        for level, fired in row:
            text.append(blocks[min(7, int(level * 8))], f"bold {_HUE[head]}" if fired else "dim")
        return text

    def _scroll_row(self) -> None:
        """Let a row of curves scroll away, under the time of its first frame."""
        if self.panel and self.rows and (count := len(next(iter(self.rows.values())))):
            begin, end = (clock(time_s, tenths=True) for time_s in (self.row_begins, self.row_ends))
            ruler = f"{begin:>{_TIME}}  {_RULES[self.ascii][1] * (count - len(end) - 1)} {end}"
            lines = [Text(ruler, "dim"), *(self._strip(head, row) for head, row in self.rows.items())]
            self.panel.print(Text("\n").join(lines))
            for row in self.rows.values():
                row.clear()

    def _status(self, moment: Moment) -> list[Text]:
        names = dict(self.about["steps"])
        state = moment["state"]
        steps = [f"{MARKS.get(how, '[-]')} {step} {names.get(step, '')}".strip() for step, how in state.items()]
        now = [step for step in steps if step.startswith("[>]")]
        done = sum(how == "completed" for how in state.values())
        line = "  ".join(steps)
        if len(line) > self.console.width - _TIME - 3:
            line = "  ".join([f"{done} of {len(steps)} done", *now])
        pace = f"{1 / self.pace:.1f} frames/s" if self.pace else ""
        parts = [clock(moment["time_s"], tenths=True), f"{moment['tokens']:,} tokens", pace, _ms(moment["seconds"])]
        if self.tally.skipped:
            parts.append(f"{self.tally.skipped:,} skipped")
        status = Text(f"{parts[0]:>{_TIME}}  " + ", ".join(part for part in parts[1:] if part), "dim")
        return [Text(f"{'state':>{_TIME}}  {plain(line)}"), status] if steps else [status]


def _steps(about: About) -> str:
    return ", ".join(f"{step} {name}" for step, name in about["steps"])


def _indented(*cells: Text) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=_TIME, no_wrap=True)
    grid.add_column(width=_NAME - 2, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(*cells)
    return grid


class Panel:
    """The last rows of a terminal, kept while the rest scrolls; with `typing` the last of all is the user's."""

    def __init__(self, console: Console, rows: int, typing: bool) -> None:
        self.console, self.rows, self.typing = console, rows + typing, typing
        self.size = (0, 0)

    def open(self) -> None:
        self._write("\n" * self.rows)
        self._fit()

    def print(self, what: RenderableType) -> None:
        """Scroll something in above the panel."""
        self._fit()
        text = self._ansi(what).rstrip("\n")
        self._write(f"{_SAVE}{_at(self._bottom)}\n{text}{_BACK}")

    def draw(self, lines: list[Text], typed: bool) -> None:
        """Replace the panel's lines; `typed`: what the user wrote was heard, so that row is free again."""
        self._fit()
        drawn = ""
        for i, line in enumerate(lines[: self.rows - self.typing]):
            line.truncate(self.console.width - 1, overflow="ellipsis")
            drawn += f"{_at(self._bottom + 1 + i)}{_CLEAR_LINE}{self._ansi(line).rstrip()}"
        self._write(f"{_SAVE}{drawn}{_BACK}" + (self._prompt() if typed else ""))

    def close(self) -> None:
        """Give the rows back; what is printed next stands below what scrolled."""
        self._write(f"{_ALL_SCROLLS}{_at(self._bottom + 1)}{_CLEAR_BELOW}{_SHOW_CURSOR}")

    @property
    def _bottom(self) -> int:
        """The last row that scrolls, from 1."""
        return max(2, self.size[1] - self.rows)

    def _fit(self) -> None:
        """Set the scroll region, again after the window's size changed."""
        size = (self.console.width, self.console.height)
        if size != self.size:
            first = min(self._bottom, size[1] - self.rows) if self.size[1] else size[1] - self.rows
            self.size = size
            self._write(f"{_ALL_SCROLLS}{_at(first + 1)}{_CLEAR_BELOW}\x1b[1;{self._bottom}r{self._prompt()}")

    def _prompt(self) -> str:
        return f"{_at(self.size[1])}{_CLEAR_LINE}" + ("you > " if self.typing else _HIDE_CURSOR)

    def _ansi(self, what: RenderableType) -> str:
        with self.console.capture() as held:
            self.console.print(what)
        return held.get()

    def _write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()


_SAVE: Final = "\x1b7"
_BACK: Final = "\x1b8"
_CLEAR_LINE: Final = "\x1b[2K"
_CLEAR_BELOW: Final = "\x1b[J"
_ALL_SCROLLS: Final = "\x1b[r"
_HIDE_CURSOR: Final = "\x1b[?25l"
_SHOW_CURSOR: Final = "\x1b[?25h"


def _at(row: int) -> str:
    return f"\x1b[{max(1, row)};1H"
