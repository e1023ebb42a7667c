"""Outputs of a stream: JSON lines, a log of events for the terminal, and the page of `stream --html`.

A sink is a context manager that gets one StreamFrame and its picture at a time. What it has written is whole and valid
up to the last frame when it is closed, also by an error or Ctrl-C. A stream without a frame leaves no file.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final, Self

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

MAX_STEPS: Final = 12  # on one line of the log
PICTURE_BYTES: Final = 5_000_000  # of pictures every PICTURE_S, thinned out
EVENT_PICTURE_BYTES: Final = 3_000_000  # of pictures of events, thinned out
PICTURE_S: Final = 2.0
PICTURE_SIDE: Final = 192  # pixels
_MARKS: Final = {"not_started": "[ ]", "in_progress": "[>]", "completed": "[x]"}
_STYLES: Final = {"user": "bold green", "says": f"bold {HUES['speaking']}", "state": f"bold {HUES['DST']}"}


class Sink(AbstractContextManager["Sink"]):
    def show(self, frame: StreamFrame, image: Image.Image) -> None:
        raise NotImplementedError

    def __exit__(self, *error: object) -> None:
        pass


class JsonLines(Sink):
    """One JSON object per frame and line, flushed."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def show(self, frame: StreamFrame, image: Image.Image) -> None:
        self._file.write(json.dumps(asdict(frame)) + "\n")
        self._file.flush()


# ---- the terminal --------------------------------------------------------------------------------------


class TerminalLog(Sink):
    """One line per event; counts at the end."""

    def __init__(self, console: Console, info: StreamInfo) -> None:
        self._console, self._info = console, info
        self._seconds: list[float] = []  # by frame
        self._spoken = self._updates = self._restarts = self._skipped = 0
        self._end_s = 0.0

    def __enter__(self) -> Self:
        info = self._info
        self._print(Text(f"{plain(info.video)}: {info.arm} of {plain(info.run)}, {info.fps:g} frames/s"))
        return self

    def show(self, frame: StreamFrame, image: Image.Image) -> None:
        self._seconds.append(frame.seconds)
        self._spoken += frame.assistant_text is not None
        self._updates += len(frame.updates or ())
        self._restarts += frame.started_over
        self._skipped += frame.skipped
        self._end_s = frame.time_s + 1 / self._info.fps
        for kind, text, note in events_at(frame):
            line = Text(f"{clock(frame.time_s, tenths=True):>9}  ", "dim")
            line.append(f"{kind:<9}", _STYLES.get(kind, "dim")).append(text, "not dim")
            self._print(line.append(f"  {note}" if note else ""))

    def __exit__(self, *error: object) -> None:
        if not self._seconds:
            return
        median, p99 = np.percentile(self._seconds, (50, 99), method="inverted_cdf")
        parts = [
            f"{counted(len(self._seconds), 'frame')} ({clock(self._end_s)})",
            f"{self._skipped:,} skipped" if self._skipped else "",
            f"spoke {counted(self._spoken, 'time')}",
            counted(self._updates, "state change") if self._updates else "",
            f"context rebuilt {counted(self._restarts, 'time')}" if self._restarts else "",
            f"median {_ms(median)} a frame, p99 {_ms(p99)}",
        ]
        self._print(Text("; ".join(filter(None, parts))))

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)


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


class HtmlRecorder(Sink):
    """Collects a stream for the HTML viewer and writes the page at the end."""

    def __init__(self, path: Path, info: StreamInfo) -> None:
        """InputError or OSError where `path` cannot be a file."""
        if path.is_dir():
            raise InputError(f"{plain(path)}: is a folder; --html wants the name of a file, e.g. {path}/stream.html")
        make_folder(path.parent)
        self._path, self._info = path, info
        self._rows: list[list[Any]] = []  # frames since the last, tokens, ms, probabilities in 1/10,000, events
        self._frame, self._state = -1, dict[str, str]()
        self._pictures, self._event_pictures = _Pictures(PICTURE_BYTES), _Pictures(EVENT_PICTURE_BYTES)
        self._next_picture_s = -math.inf

    def show(self, frame: StreamFrame, image: Image.Image) -> None:
        shares = [round(10_000 * frame.probabilities[head]) for head in self._info.heads]
        row = [frame.frame - self._frame, frame.tokens, round(1000 * frame.seconds, 1), *shares]
        more: dict[str, Any] = {}
        if events := [[kind, short(text), note] for kind, text, note in events_at(frame)]:
            more = {"events": events, "changes": len(frame.updates or ()), "lost": frame.skipped}
        if frame.state != self._state:
            more["state"] = {short(step): name for step, name in frame.state.items()}
        self._rows.append([*row, more] if more else row)
        if more or len(self._rows) == 1:
            self._event_pictures.offer(frame.frame, image)
        elif frame.time_s >= self._next_picture_s:
            self._next_picture_s = frame.time_s + PICTURE_S
            self._pictures.offer(frame.frame, image)
        self._frame, self._state = frame.frame, frame.state

    def __exit__(self, *error: object) -> None:
        if not self._rows:
            return
        info, jpegs = self._info, self._event_pictures.kept | self._pictures.kept
        about = {
            "video": plain(info.video), "run": plain(info.run), "arm": info.arm, "fps": info.fps,
            "heads": info.heads, "goal": short(info.goal or ""),
            "steps": [[short(step), short(name)] for step, name in info.steps],
            "thresholds": [info.threshold_probabilities[head] for head in info.heads],
        }  # fmt: skip
        pictures = {str(frame): base64.b64encode(jpegs[frame]).decode() for frame in sorted(jpegs)}
        data = {"page": "stream", "about": about, "frames": self._rows, "pictures": pictures}
        before, after = page_around_data(f"{plain(info.video)} - stream")
        write_text(self._path, before + coded(data) + after)


@dataclass
class _Pictures:
    """JPEGs by frame: every `stride`-th that is offered; the stride doubles when they pass `max_bytes`."""

    max_bytes: int
    stride: int = 1
    offered: int = 0
    kept: dict[int, bytes] = field(default_factory=dict)

    def offer(self, frame: int, image: Image.Image) -> None:
        if self.offered % self.stride == 0:
            self.kept[frame] = _jpeg(image)
            while sum(map(len, self.kept.values())) > self.max_bytes and len(self.kept) > 1:
                self.kept = dict(list(self.kept.items())[::2])
                self.stride *= 2
        self.offered += 1


def _jpeg(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    file = BytesIO()
    small.save(file, "JPEG", quality=68)
    return file.getvalue()
