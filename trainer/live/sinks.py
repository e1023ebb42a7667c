"""Outputs of a stream: JSON lines, a log of events for the terminal, and the page of `stream --html`.

A sink is a context manager that yields a function, called with one StreamFrame and its picture at a time. What it has
written is whole and valid up to the last frame when it is left, also by an error or Ctrl-C. A stream without a frame
leaves no file.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from pipeline.errors import InputError
from pipeline.storage import make_folder, write_text
from pipeline.summary import HUES
from pipeline.terminal import clock, counted, plain
from pipeline.viewer import coded, page_around_data, short
from trainer.live.stream import StreamFrame, StreamInfo

Show = Callable[[StreamFrame, Image.Image], None]
MAX_STEPS: Final = 12  # on one line of the log
PICTURE_BYTES: Final = 5_000_000  # of pictures every PICTURE_S, thinned out
EVENT_PICTURE_BYTES: Final = 3_000_000  # of pictures of events, thinned out
PICTURE_S: Final = 2.0
PICTURE_SIDE: Final = 192  # pixels
_MARKS: Final = {"not_started": "[ ]", "in_progress": "[>]", "completed": "[x]"}
_STYLES: Final = {"user": "bold green", "says": f"bold {HUES['speaking']}", "state": f"bold {HUES['DST']}"}


@contextmanager
def json_lines(file: IO[str]) -> Iterator[Show]:
    """One JSON object per frame and line, flushed."""

    def show(frame: StreamFrame, image: Image.Image) -> None:
        file.write(json.dumps(asdict(frame)) + "\n")
        file.flush()

    yield show


# ---- the terminal --------------------------------------------------------------------------------------


@contextmanager
def terminal_log(console: Console, info: StreamInfo) -> Iterator[Show]:
    """One line per event; counts at the end."""
    seconds: list[float] = []  # by frame
    counts, end_s = Counter[str](), 0.0

    def show(frame: StreamFrame, image: Image.Image) -> None:
        nonlocal end_s
        seconds.append(frame.seconds)
        counts["spoken"] += frame.assistant_text is not None
        counts["changes"] += len(frame.updates or ())
        counts["restarts"] += frame.started_over
        counts["skipped"] += frame.skipped
        end_s = frame.time_s + 1 / info.fps
        for kind, text, note in events_at(frame):
            line = Text(f"{clock(frame.time_s, tenths=True):>9}  ", "dim")
            line.append(f"{kind:<9}", _STYLES.get(kind, "dim")).append(text, "not dim")
            console.print(line.append(f"  {note}" if note else ""), soft_wrap=True)

    first = f"{plain(info.video)}: {info.arm} of {plain(info.run)}, {info.fps:g} frames/s"
    console.print(Text(first), soft_wrap=True)
    try:
        yield show
    finally:
        if seconds:
            median, p99 = np.percentile(seconds, (50, 99), method="inverted_cdf")
            parts = [
                f"{counted(len(seconds), 'frame')} ({clock(end_s)})",
                f"{counts['skipped']:,} skipped" if counts["skipped"] else "",
                f"spoke {counted(counts['spoken'], 'time')}",
                counted(counts["changes"], "state change") if counts["changes"] else "",
                f"context rebuilt {counted(counts['restarts'], 'time')}" if counts["restarts"] else "",
                f"median {_ms(median)} a frame, p99 {_ms(p99)}",
            ]
            console.print(Text("; ".join(filter(None, parts))), soft_wrap=True)


def events_at(frame: StreamFrame) -> Iterator[tuple[str, str, str]]:
    """(kind, text, note) of what happened at a frame, in order; all text safe to show."""
    if frame.skipped:
        yield "lost", f"{counted(frame.skipped, 'frame')} that came too fast", ""
    if frame.started_over:
        yield "context", "full; the prompt was rebuilt" + (" with the state" if frame.state else ""), ""
    for text in frame.user_texts:
        yield "user", plain(text), ""
    if frame.updates:
        changes = ", ".join(f"{plain(step)} {transition}" for step, transition in frame.updates)
        yield "state", changes, state_line(frame.state)
    elif frame.updates is not None:
        text = plain(frame.dst_text or "")
        yield "state", f"fired, but changes nothing: {text}" if text else "fired, without a text", ""
    if frame.assistant_text is not None:
        yield "says", plain(frame.assistant_text) or "(nothing)", ""


def state_line(state: Mapping[str, str]) -> str:
    """'[x] S1 [>] S2 [ ] S3'; of many steps those under way, after how many are done."""
    shown = {step: f"{_MARKS.get(name, '[-]')} {plain(step)}" for step, name in state.items()}
    if len(state) <= MAX_STEPS:
        return " ".join(shown.values())
    under_way = [shown[step] for step, name in state.items() if name not in ("completed", "not_started")]
    done = sum(name == "completed" for name in state.values())
    return " ".join([f"{done} of {len(state)} done", *under_way[:MAX_STEPS]])


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:,.0f} ms"


# ---- the page ------------------------------------------------------------------------------------------


@contextmanager
def html_page(path: Path, info: StreamInfo) -> Iterator[Show]:
    """Collects a stream for the HTML viewer; writes the page at the end. InputError where `path` can't be a file."""
    if path.is_dir():
        raise InputError(f"{plain(path)}: is a folder; --html wants the name of a file, e.g. {path}/stream.html")
    make_folder(path.parent)
    rows: list[list[Any]] = []  # frames since the last, tokens, ms, probabilities in 1/10,000, events
    last, state, next_picture_s = -1, dict[str, str](), -math.inf
    pictures, event_pictures = Pictures(PICTURE_BYTES), Pictures(EVENT_PICTURE_BYTES)

    def show(frame: StreamFrame, image: Image.Image) -> None:
        nonlocal last, state, next_picture_s
        shares = [round(10_000 * frame.probabilities[head]) for head in info.heads]
        row = [frame.frame - last, frame.tokens, round(1000 * frame.seconds, 1), *shares]
        more: dict[str, Any] = {}
        if events := [[kind, short(text), note] for kind, text, note in events_at(frame)]:
            more = {"events": events, "changes": len(frame.updates or ()), "lost": frame.skipped}
        if frame.state != state:
            more["state"] = {short(step): name for step, name in frame.state.items()}
        if more or not rows:
            event_pictures.offer(frame.frame, image)
        elif frame.time_s >= next_picture_s:
            next_picture_s = frame.time_s + PICTURE_S
            pictures.offer(frame.frame, image)
        rows.append([*row, more] if more else row)
        last, state = frame.frame, frame.state

    try:
        yield show
    finally:
        if rows:
            about = {
                "video": plain(info.video), "run": plain(info.run), "arm": info.arm, "fps": info.fps,
                "heads": info.heads, "goal": short(info.goal or ""),
                "steps": [[short(step), short(name)] for step, name in info.steps],
                "thresholds": [info.threshold_probabilities[head] for head in info.heads],
            }  # fmt: skip
            jpegs = sorted((event_pictures.kept | pictures.kept).items())
            shown = {str(frame): base64.b64encode(jpeg).decode() for frame, jpeg in jpegs}
            data = {"page": "stream", "about": about, "frames": rows, "pictures": shown}
            before, after = page_around_data(f"{plain(info.video)} - stream")
            write_text(path, before + coded(data) + after)


class Pictures:
    """JPEGs by frame: every `stride`-th that is offered; the stride doubles when they pass `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.stride, self.offered = max_bytes, 1, 0
        self.kept: dict[int, bytes] = {}

    def offer(self, frame: int, image: Image.Image) -> None:
        if self.offered % self.stride == 0:
            small, file = image.convert("RGB"), BytesIO()
            small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
            small.save(file, "JPEG", quality=68)
            self.kept[frame] = file.getvalue()
            while sum(map(len, self.kept.values())) > self.max_bytes and len(self.kept) > 1:
                self.kept = dict(list(self.kept.items())[::2])
                self.stride *= 2
        self.offered += 1
