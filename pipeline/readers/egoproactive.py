"""EgoProactive, Meta's benchmark (`facebook/wearable-ai`): one session a line, decisions in chunks of mostly 8 s.

`video_intervals` are the chunks in seconds, `answers` what is said in each. A chunk with `$interrupt$TEXT` is an
assistant event over all its frames, TEXT stands after them; frames in no chunk were annotated by nobody. There is no
dialog state. `dialog`, the history before each chunk, is not used: where it grows tells the answers, which is counted.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any, Final

import msgspec

from pipeline.readers.clip import MAX_FRAME, Clip, ClipError, Reader, check_path, columns, fps_of, frame_after, text_of
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


def read(raw: bytes, fps: float | None) -> Clip:
    record = parse(raw, Record)
    ignored: list[str] = []
    path = record.video_path.removeprefix("./")
    check_path(path, "video_path")
    fps, _ = fps_of(record.fps, fps)
    seconds = [second for chunk in record.video_intervals for second in chunk]
    if not seconds or 2 * len(record.answers) != len(seconds):
        found = f"{len(record.answers)}, {len(record.video_intervals)}"
        raise ClipError("answers, video_intervals", found, "as many of one as of the other, and at least one")
    for before, after in pairwise(seconds):
        if after < before:
            raise ClipError("video_intervals", f"{after:g} after {before:g}", "seconds, ascending from chunk to chunk")
    edges = [frame_after(second, fps, "video_intervals") for second in seconds]
    chunks = list(zip(seconds[::2], edges[::2], edges[1::2], strict=True))
    answers = [answer.lstrip() for answer in record.answers]
    turns: list[tuple[Any, ...]] = []
    if query := text_of(record.query, "query", ignored):
        turns.append(("user", query, seconds[0], edges[0], edges[0] + 1))
    for answer, chunk in zip(answers, chunks, strict=True):
        if answer.startswith(INTERRUPT):
            turns.append(("assistant", answer.removeprefix(INTERRUPT).strip(), *chunk))
    gaps = zip([0, *edges[1::2]], [*edges[::2], MAX_FRAME], strict=True)
    return Clip(
        schema="egoproactive",
        video_uid=PurePosixPath(path).stem,
        turns=columns(turns),
        fps=fps,
        start_frame=0,
        end_frame=max(edges[-1], frame_after(max(record.duration_in_sec or 0.0, 0.0), fps, "duration_in_sec")),
        convention="event",
        dataset="egoproactive",
        frames_file=path,
        goal=text_of(record.task, "task", ignored),
        unlabelled=[(end, start) for end, start in gaps if end < start],
        ignored=ignored,
        given_away=_given_away(record.dialog, [answer.startswith(INTERRUPT) for answer in answers]),
    )


_NEEDS: Final = "video_path, video_intervals [[start_s, end_s], ...], answers ($silent$ or $interrupt$TEXT), query"
READER: Final = Reader("egoproactive", lambda names, raw: "video_intervals" in names, read, _NEEDS)


def _given_away(dialog: Any, interrupts: list[bool]) -> tuple[int, int]:
    """(chunks that `dialog` gives away: all, where it gains assistant turns exactly after interrupts; of how many)."""
    try:
        spoken = [sum(turn["role"] == "assistant" for turn in history) for history in dialog[: len(interrupts)]]
    except (TypeError, LookupError):
        return 0, 0
    grows = [after > before for before, after in pairwise(spoken)]
    return len(grows) if any(grows) and grows == interrupts[: len(grows)] else 0, len(grows)
