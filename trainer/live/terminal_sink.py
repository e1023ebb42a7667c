"""A stream on the terminal: one line per event, and counts at the end."""

from __future__ import annotations

from typing import Final, Self

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from pipeline.summary import HUES
from pipeline.terminal import clock, plain
from trainer.live.sinks import About, Closing, Moment, events

_STYLES: Final = {"user": "bold green", "says": f"bold {HUES['speaking']}", "state": f"bold {HUES['DST']}"}


class TerminalSink(Closing):
    def __init__(self, console: Console, about: About) -> None:
        self.console, self.about = console, about
        self.seconds: list[float] = []  # by frame
        self.spoke = self.updates = self.rebuilt = self.skipped = 0
        self.end_s = 0.0

    def __enter__(self) -> Self:
        about = self.about
        of = f"{plain(about['arm'])} of {plain(about['run'])}"
        self.console.print(Text(f"{plain(about['video'])}: {of}, {about['fps']:g} frames/s"), soft_wrap=True)
        return self

    def show(self, moment: Moment, image: Image.Image) -> None:
        self.seconds.append(moment["seconds"])
        self.spoke += moment["said"] is not None
        self.updates += len(moment["updates"] or ())
        self.rebuilt += bool(moment["started_over"])
        self.skipped += moment["skipped"]
        self.end_s = moment["time_s"] + 1 / self.about["fps"]
        for event in events(moment):
            line = Text(f"{clock(moment['time_s'], tenths=True):>9}  ", "dim")
            line.append(f"{event.kind:<9}", _STYLES.get(event.kind, "dim")).append(event.text, "not dim")
            self.console.print(line.append(f"  {event.note}" if event.note else ""), soft_wrap=True)

    def close(self) -> None:
        if not self.seconds:
            return
        median, p99 = np.percentile(self.seconds, (50, 99), method="inverted_cdf")
        parts = [
            f"{_count(len(self.seconds), 'frame')} ({clock(self.end_s)})",
            f"{self.skipped:,} skipped" if self.skipped else "",
            f"spoke {_count(self.spoke, 'time')}",
            _count(self.updates, "state change") if self.updates else "",
            f"context rebuilt {_count(self.rebuilt, 'time')}" if self.rebuilt else "",
            f"median {_ms(median)} a frame, p99 {_ms(p99)}",
        ]
        self.console.print(Text("; ".join(filter(None, parts))), soft_wrap=True)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:,.0f} ms"
