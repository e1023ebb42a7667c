"""What a user sees of a stream, and keeps of it: sinks, fed one moment and its picture at a time.

A moment is plain data (the trainer's `Moment` as a dict), so that nothing here needs a model. Every sink holds a
bounded amount however long the stream is, and is whole and valid up to the last moment when it is closed, also by
an error or Ctrl-C. A file takes its name when it is closed; a stream without a moment leaves no file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol, Self, TypedDict

from PIL import Image
from rich.console import Console

from pipeline.errors import InputError
from pipeline.storage import make_folder
from pipeline.terminal import plain

Moment = Mapping[str, Any]  # fields of trainer.live.stream.Moment


class About(TypedDict):
    """What a recording says of its stream."""

    video: str
    run: str
    arm: str
    fps: float  # of the model's frames
    heads: list[str]  # "speaking" and, where the arm has it, "dst_update"
    thresholds: dict[str, float]  # by head, of the logit
    threshold_probabilities: dict[str, float]  # by head, the same as a probability
    steps: list[tuple[str, str]]  # id and name; none for an arm without state
    goal: str | None


class Sink(Protocol):
    """Where moments go. Use as a context manager; leaving it closes the sink, whatever ended the stream."""

    def show(self, moment: Moment, image: Image.Image) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: Any) -> None: ...


class Closing:
    """A sink's context: leaving it calls `close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


# ---- the sinks ---------------------------------------------------------------------------------------


def terminal(console: Console, about: About) -> Sink:
    """A line per event."""
    from trainer.live.terminal_sink import TerminalSink

    return TerminalSink(console, about)


def json_lines(file: IO[str]) -> Sink:
    """One JSON object per moment and line, all fields of it, flushed; ASCII, and null for a number not finite."""
    return _JsonLines(file)


def html(path: Path, about: About) -> Sink:
    """One self-contained page. InputError where the file cannot be written."""
    from trainer.live.html_sink import HtmlSink

    return HtmlSink(path, about)


class _JsonLines(Closing):
    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def show(self, moment: Moment, image: Image.Image) -> None:
        self.file.write(json.dumps(finite(moment), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.flush()


def finite(value: Any) -> Any:
    """The value with None in place of each number that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [finite(held) for held in value]
    return value


# ---- words -------------------------------------------------------------------------------------------

MARKS: Final = {"not_started": "[ ]", "in_progress": "[>]", "completed": "[x]"}
_MOST_STEPS: Final = 12  # on one line


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at a moment. `kind`: user, says, state, context or lost."""

    kind: str
    text: str
    note: str = ""


def events(moment: Moment) -> Iterator[Event]:
    """What happened at a moment, in order; all text safe to show."""
    if moment["skipped"]:
        yield Event("lost", f"{moment['skipped']:,} frame{'s' * (moment['skipped'] > 1)} that came too fast")
    if moment["started_over"]:
        yield Event("context", "full; the prompt was rebuilt" + (" with the state" if moment["state"] else ""))
    for text in moment["heard"]:
        yield Event("user", plain(text))
    if moment["updates"]:
        changes = ", ".join(f"{plain(step)} {plain(change)}" for step, change in moment["updates"])
        yield Event("state", changes, state_marks(moment["state"]))
    elif moment["updates"] is not None:
        wrote = plain(moment["dst_text"] or "")
        yield Event("state", f"fired, but changes nothing: {wrote}" if wrote else "fired, without a text")
    if moment["said"] is not None:
        yield Event("says", plain(moment["said"]) or "(nothing)")


def state_marks(state: Mapping[str, str]) -> str:
    """'[x] S1 [>] S2 [ ] S3'; of many steps those under way, after how many are done."""
    if len(state) <= _MOST_STEPS:
        return " ".join(f"{MARKS.get(name, '[-]')} {plain(step)}" for step, name in state.items())
    done = sum(name == "completed" for name in state.values())
    shown = [step for step, name in state.items() if name not in ("completed", "not_started")][:_MOST_STEPS]
    return f"{done} of {len(state)} done" + "".join(f" {MARKS.get(state[step], '[-]')} {plain(step)}" for step in shown)


def thresholds(about: About) -> dict[str, float]:
    """Of each head the probability at which it fires; 1 where none is known."""
    found = {head: about["threshold_probabilities"].get(head, 1.0) for head in about["heads"]}
    return {head: p if math.isfinite(p) else 1.0 for head, p in found.items()}


def prepare(path: Path, option: str) -> None:
    """Make the folder that a recording goes to; InputError where there can be no such file."""
    if path.is_dir():
        hint = plain(path / f"stream.{option}")
        raise InputError(f"{plain(path)}: is a folder; --{option} wants the name of a file, e.g. {hint}")
    try:
        make_folder(path.parent)
    except NotADirectoryError as error:
        raise InputError(
            f"{plain(path)}: {plain(path.parent)} is no folder; name another file for --{option}"
        ) from error
