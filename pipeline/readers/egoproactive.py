"""EgoProactive, Meta's benchmark (`facebook/wearable-ai`): one session a line, decisions in chunks of mostly 8 s.

`video_intervals` are the chunks in seconds, `answers` what is said in each. A chunk with `$interrupt$TEXT` is an
assistant event over all its frames, TEXT stands after them; frames in no chunk were annotated by nobody. There is no
dialog state. `dialog`, the history before each chunk, is not used: where it grows tells the answers, which is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, Final

import msgspec

from pipeline.readers import checks
from pipeline.readers.clip import MAX_FRAME, Clip, ClipError, Range, Reader, brief, columns
from pipeline.readers.index import parse

INTERRUPT: Final = "$interrupt$"


class Record(msgspec.Struct, gc=False):
    video_path: str
    video_intervals: list[tuple[float, float]]
    answers: list[str]
    query: Any = None
    duration_in_sec: float | None = None
    fps: float | str | None = None
    task: Any = None
    dialog: Any = None


_RECORD = msgspec.json.Decoder(Record)


def read(raw: bytes, fps: float | None) -> Clip:
    record = parse(raw, _RECORD)
    ignored: list[str] = []
    path = record.video_path.removeprefix("./")
    checks.path(path, "video_path")
    fps, _ = checks.fps(record.fps, fps)
    chunks = chunk_frames(record.video_intervals, fps)
    if len(record.answers) != len(chunks):
        raise ClipError("answers", str(len(record.answers)), f"one for each of the {len(chunks)} video_intervals")
    # what each answer says; None: silence. White space around the tag is ignored
    answers = [answer.lstrip() for answer in record.answers]
    said = [a.removeprefix(INTERRUPT).strip() if a.startswith(INTERRUPT) else None for a in answers]
    turns: list[tuple[Any, ...]] = []
    if query := checks.text(record.query, "query", ignored):
        turns.append(("user", query, record.video_intervals[0][0], chunks[0][0], chunks[0][0] + 1))
    for (start, _), frames, text in zip(record.video_intervals, chunks, said, strict=True):
        if text is not None:
            turns.append(("assistant", text, start, *frames))
    seconds = max(record.duration_in_sec or 0.0, 0.0)
    edges = [0, *(edge for chunk in chunks for edge in chunk), MAX_FRAME]
    clip = Clip(
        schema="egoproactive",
        video_uid=PurePosixPath(path).stem,
        turns=columns(turns),
        fps=fps,
        start_frame=0,
        end_frame=max(chunks[-1][1], checks.frame_after(seconds, fps, "duration_in_sec")),
        convention="event",
        dataset="egoproactive",
        frames_file=path,
        goal=checks.text(record.task, "task", ignored),
        unlabelled=[(end, start) for end, start in zip(edges[::2], edges[1::2], strict=True) if end < start],
        ignored=ignored,
        given_away=_given_away(record.dialog, [text is not None for text in said]),
    )
    checks.path(clip.video_uid, "video_uid")
    return checks.bounds(clip)


READER: Final = Reader(
    "egoproactive",
    "video_path, video_intervals [[start_s, end_s], ...], answers ($silent$ or $interrupt$TEXT), query",
    lambda names, raw: "video_intervals" in names,
    read,
)


def chunk_frames(intervals: Sequence[tuple[float, float]], fps: float) -> list[Range]:
    """The frames [ceil(start * fps), ceil(end * fps)) of each chunk in seconds. Raises ClipError."""
    if not intervals:
        raise ClipError("video_intervals", "no chunk", "at least one [start, end] in seconds")
    before = 0.0
    for number, (start, end) in enumerate(intervals):
        if not (before <= start <= end and math.isfinite(end)):
            field, expected = f"video_intervals[{number}]", "seconds, ascending, after the chunk before"
            raise ClipError(field, brief([start, end]), expected)
        before = end
    edges = (checks.frame_after(edge, fps, "video_intervals") for pair in intervals for edge in pair)
    return list(zip(edges, edges, strict=True))


def _given_away(dialog: Any, interrupts: list[bool]) -> tuple[int, int]:
    """(chunks whose answer shows in the growth of `dialog` after them, of how many).

    A session's chunks count where `dialog` gains assistant turns exactly after its interrupts.
    """
    if not isinstance(dialog, list) or not all(isinstance(history, list) for history in dialog):
        return 0, 0
    said = [
        sum(isinstance(turn, dict) and turn.get("role") == "assistant" for turn in history)
        for history in dialog[: len(interrupts)]
    ]
    grows = [after > before for before, after in pairwise(said)]
    return len(grows) if any(grows) and grows == interrupts[: len(grows)] else 0, len(grows)
