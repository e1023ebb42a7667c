"""DESIGN.md's Inputs and Labels read a second time: slow, pure Python, one frame and one rule at a time.

It shares nothing with `pipeline` but the sampling draw, and trades all speed for being checkable by eye
against the contract (about 0.2 million frames a second). Input is what `json.loads` gives; bytes and syntax
are test_malformed's business. Where DESIGN.md leaves a choice open, the choice made is marked "reading:".

    clip     dict as parsed            head     "speaking" | "dst_update"
    range    half-open [start, end)    problem  (turn index or None, field) that makes a clip malformed
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from pipeline.schema import draws, rate_threshold, sampling_seed

TOLERANCE = 1e-6
MAX_FRAMES = 1_000_000
MAX_FRAME = 2**31 - 1
ROLES = ("system", "user", "assistant", "DST_UPDATE")
TRANSITIONS = ("start", "complete", "pause", "resume", "cancel", "reset", "fail")
HEAD_OF = {"assistant": "speaking", "DST_UPDATE": "dst_update"}
OTHER = {"speaking": "dst_update", "dst_update": "speaking"}


class Undecided(Exception):
    """No convention reaches 90% in a file of five or more voting turns."""


@dataclass
class Refused:
    file: int
    index: int
    problems: list[tuple[int | None, str]]


@dataclass
class Reading:
    """What one surviving clip must look like on disk."""

    file: int
    index: int
    clip: dict
    convention: str
    proassist: bool
    start: int = 0
    end: int = 0
    positives: dict = field(default_factory=dict)  # head -> set of frames
    rest: dict = field(default_factory=dict)  # head -> set of frames (onset only)
    dst_speaks: bool = True
    turns: list = field(default_factory=list)  # (role, canonical range or None) in order, `frames` left out
    dropped: dict = field(default_factory=dict)  # reason -> turns that label nothing

    @property
    def fps(self) -> float:
        return fps_of(self.clip)

    def labels(self, drawn: list[int], rate: float) -> dict[str, list[int]]:
        """Per head one label a frame of the clip, in order; `drawn` holds one uint32 a frame."""
        threshold = rate_threshold(rate)
        return {
            head: [self._label(head, f, d < threshold) for f, d in zip(self._frames(), drawn, strict=True)]
            for head in HEAD_OF.values()
        }

    def expected(self, clip_id: str, seed: int, rate: float) -> dict[str, list[int]]:
        frames = np.arange(self.start, self.end, dtype=np.int64)
        return self.labels(draws(sampling_seed(seed, clip_id), 0, frames).tolist(), rate)

    def _frames(self) -> range:
        return range(self.start, self.end)

    def _label(self, head: str, frame: int, sampled: bool) -> int:
        if head == "dst_update" and not self.dst_speaks:
            return -100
        if frame in self.positives[head]:
            return 1
        if frame in self.rest[head]:
            return -100
        if frame in self.positives[OTHER[head]]:
            return 0
        return 0 if sampled else -100


@dataclass
class FileReading:
    convention: str
    votes: dict[str, int]
    voters: int


# ---- types -------------------------------------------------------------------------------------------


def get(mapping: dict, key: str):
    """The value, or None where it is absent or null."""
    return mapping.get(key)


def is_number(x) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def is_finite(x) -> bool:
    if not is_number(x):
        return False
    try:
        return math.isfinite(float(x))
    except OverflowError:
        return False


def is_frame(x) -> bool:
    return is_finite(x) and float(x).is_integer() and 0 <= x <= MAX_FRAME


def stays_inside(path: str) -> bool:
    windows = PureWindowsPath(path)
    climbs = ".." in PurePosixPath(path).parts or ".." in windows.parts
    absolute = PurePosixPath(path).is_absolute() or bool(windows.drive) or bool(windows.root)
    return not climbs and not absolute and "\0" not in path and path != ""


def fps_of(clip: dict) -> float:
    return 2 if get(clip, "fps") is None else clip["fps"]


def is_proassist(clip: dict) -> bool:
    return any(turn["role"] == "frames" for turn in clip["conversation"])


# ---- malformed, whatever the convention --------------------------------------------------------------


def problems(clip) -> list[tuple[int | None, str]]:
    """Every reason to refuse a clip that can be told without its file's convention."""
    if not isinstance(clip, dict):
        return [(None, "")]
    found = [*_clip_problems(clip), *_bounds_problems(clip)]
    conversation = get(clip, "conversation")
    if not isinstance(conversation, list):
        return [*found, (None, "conversation")]
    for i, turn in enumerate(conversation):
        found += [(i, name) for name in _turn_problems(turn)]
    return found


def _clip_problems(clip: dict) -> list[tuple[int | None, str]]:
    texts = ("video_uid", "dataset", "frames_file", "inferred_goal", "inferred_knowledge")
    bad = [name for name in texts if get(clip, name) is not None and not isinstance(clip[name], str)]
    paths = [name for name in ("video_uid", "frames_file") if isinstance(get(clip, name), str)]
    bad += [name for name in paths if not stays_inside(clip[name])]
    if get(clip, "video_uid") is None:
        bad.append("video_uid")
    name = get(clip, "id")
    if name is not None and (not isinstance(name, (str, int)) or isinstance(name, bool)):
        bad.append("id")
    if get(clip, "clip_idx") is not None and not is_frame(clip["clip_idx"]):
        bad.append("clip_idx")
    if not is_finite(fps_of(clip)) or fps_of(clip) <= 0:
        bad.append("fps")
    rate = get(clip, "neg_frame_sampling_rate")
    if rate is not None and not (is_finite(rate) and 0 <= rate <= 1):
        bad.append("neg_frame_sampling_rate")
    steps = get(clip, "dst")
    if steps is not None and not (
        isinstance(steps, list) and all(isinstance(s, dict) and isinstance(get(s, "id"), str) for s in steps)
    ):
        bad.append("dst")
    return [(None, name) for name in bad]


def _bounds_problems(clip: dict) -> list[tuple[int | None, str]]:
    given = [(name, get(clip, name)) for name in ("start_frame_idx", "end_frame_idx")]
    bad = [(None, name) for name, value in given if value is not None and not is_frame(value)]
    (_, start), (_, end) = given
    if not bad and start is not None and end is not None and not 0 < end - start <= MAX_FRAMES:
        bad = [(None, "end_frame_idx"), (None, "start_frame_idx")]
    return bad


def _turn_problems(turn) -> list[str]:
    if not isinstance(turn, dict):
        return [""]
    role, bad = get(turn, "role"), []
    if role != "frames" and role not in ROLES:
        return ["role"]
    if role != "frames" and not _content_ok(role, get(turn, "content")):
        bad.append("content")
    if get(turn, "time") is not None and not is_finite(turn["time"]):
        bad.append("time")
    start, end = ("start", "end") if role == "frames" else ("start_frame", "end_frame")
    frames_bad = [name for name in (start, end) if get(turn, name) is not None and not is_frame(turn[name])]
    both = get(turn, start) is not None and get(turn, end) is not None
    if not frames_bad and both and turn[end] < turn[start]:
        frames_bad = [end, start]
    return bad + frames_bad


def _content_ok(role: str, content) -> bool:
    if role != "DST_UPDATE":
        return isinstance(content, str)
    if isinstance(content, str):
        pairs = [piece.split("->") for piece in content.split(",")]
        return all(len(p) == 2 and p[0].strip() and p[1].strip() in TRANSITIONS for p in pairs)
    return isinstance(content, list) and all(
        isinstance(u, dict) and isinstance(get(u, "id"), str) and get(u, "transition") in TRANSITIONS for u in content
    )


# ---- the vote ----------------------------------------------------------------------------------------


def framed(clip: dict) -> list[dict]:
    """Non-system turns with both frame numbers (reading: one of the two is none)."""
    return [
        t
        for t in clip["conversation"]
        if t["role"] not in ("system", "frames")
        and get(t, "start_frame") is not None
        and get(t, "end_frame") is not None
    ]


def floor_frame(time: float, fps: float) -> int | None:
    """floor(time * fps), tolerant of 1e-6; None where the product is not finite."""
    product = float(time) * float(fps)
    return math.floor(product + TOLERANCE) if math.isfinite(product) else None


def first_frame(clip: dict) -> int | None:
    """The clip's start as given, else of its earliest turn."""
    if get(clip, "start_frame_idx") is not None:
        return int(clip["start_frame_idx"])
    spans = _source_spans(clip)
    return min(s for s, _ in spans) if spans else None


def _source_spans(clip: dict) -> list[tuple[int, int]]:
    if is_proassist(clip):
        marks = [t for t in clip["conversation"] if t["role"] == "frames"]
        marks = [t for t in marks if get(t, "start") is not None and get(t, "end") is not None]
        return [(int(t["start"]), int(t["end"])) for t in marks]
    return [(int(t["start_frame"]), int(t["end_frame"])) for t in framed(clip)]


def vote(clips: list[dict]) -> tuple[int, dict[str, int]]:
    """(number of voting turns, votes per convention) over well-formed clips of one file."""
    voters, votes = 0, {"lead-in": 0, "event": 0, "window": 0}
    for clip in clips:
        if is_proassist(clip):
            continue
        previous = first_frame(clip)
        for turn in framed(clip):
            if get(turn, "time") is None:
                continue
            start, end, at = turn["start_frame"], turn["end_frame"], floor_frame(turn["time"], fps_of(clip))
            voters += 1
            if at is not None:
                votes["lead-in"] += start == previous and end in (at, at + 1)
                votes["event"] += start <= at < end
                votes["window"] += end == at
            previous = end
    return voters, votes


def decide(voters: int, votes: dict[str, int]) -> str:
    if voters < 5:
        return "event"
    for convention in ("lead-in", "event", "window"):
        if 10 * votes[convention] >= 9 * voters:
            return convention
    raise Undecided(f"{voters} turns, {votes}")


# ---- bounds and events -------------------------------------------------------------------------------


def bounds(clip: dict, convention: str) -> tuple[int, int] | None:
    """[start, end) of a clip, inferred where not given; None where that can't be, is empty or too long."""
    spans = _source_spans(clip)
    inclusive = convention == "window" and not is_proassist(clip)
    start, end = first_frame(clip), get(clip, "end_frame_idx")
    if end is None and spans:
        end = max(e for _, e in spans) + (1 if inclusive else 0)
    if start is None or end is None or not 0 < end - start <= MAX_FRAMES or end > MAX_FRAME:
        return None
    return int(start), int(end)


def canonical(turn: dict, convention: str) -> tuple[int, int] | None:
    """The half-open range of the event a prospect turn stands for; None without both frame numbers."""
    if get(turn, "start_frame") is None or get(turn, "end_frame") is None:
        return None
    start, end = int(turn["start_frame"]), int(turn["end_frame"])
    return {"event": (start, end), "window": (start, end + 1), "lead-in": (end - 1, end)}[convention]


def events(clip: dict, convention: str) -> list[tuple[str, tuple[int, int] | None]]:
    """(role, canonical range or None) of each turn but `frames`, in order; a summary's role is 'summary'."""
    found, here, before = [], None, None
    proassist = is_proassist(clip)
    for turn in clip["conversation"]:
        role = turn["role"]
        if role == "frames":
            at = get(turn, "end") if get(turn, "start") is not None else None
            here = None if at is None else (int(at) - 1, int(at))
        elif proassist:
            found.append(("summary" if role == "assistant" and _asks_for_summary(before) else role, here))
        else:
            found.append((role, canonical(turn, convention)))
        before = turn
    return found


def _asks_for_summary(turn: dict | None) -> bool:
    return turn is not None and turn["role"] == "system" and turn["content"].startswith("Please summarize")


def apply_turns(reading: Reading, positive: str) -> None:
    """Fill positives, rest and drop counts from the turns, one frame at a time."""
    reading.positives = {"speaking": set(), "dst_update": set()}
    reading.rest = {"speaking": set(), "dst_update": set()}
    reading.dropped = {"no frames": 0, "empty": 0, "outside": 0}
    for role, span in reading.turns:
        if role not in HEAD_OF:
            continue
        if span is None:
            reading.dropped["no frames"] += 1
            continue
        start, end = span
        if start == end:
            reading.dropped["empty"] += 1
            continue
        inside = range(max(start, reading.start), min(end, reading.end))
        reading.dropped["outside"] += len(inside) == 0
        for frame in inside:
            kind = reading.positives if positive == "span" or frame == start else reading.rest
            kind[HEAD_OF[role]].add(frame)


# ---- a whole split -----------------------------------------------------------------------------------


def read_files(
    files: list[list], *, convention: str | None = None, positive: str = "span", pad_s: float = 0.0
) -> tuple[list[Reading], list[Refused], list[FileReading]]:
    """Surviving clips in input order, refused clips, and what each file's vote said. All of one split.

    Raises Undecided where a file's vote has no winner and `convention` is None.
    """
    kept, refused, votes, taken = [], [], [], set()
    for number, clips in enumerate(files):
        valid = []
        for index, clip in enumerate(clips):
            found = problems(clip)
            if not found and identity(clip) in taken:
                found = [(None, "id"), (None, "clip_id")]
            if found:
                refused.append(Refused(number, index, found))
            else:
                taken.add(identity(clip))
                valid.append((index, clip))
        voters, counts = vote([clip for _, clip in valid])
        chosen = convention or decide(voters, counts)
        votes.append(FileReading(chosen, counts, voters))
        for index, clip in valid:
            span = bounds(clip, chosen)
            if span is None:
                refused.append(Refused(number, index, [(None, "end_frame_idx"), (None, "start_frame_idx")]))
                continue
            kept.append(_reading(number, index, clip, chosen, span))
    _pad(kept, pad_s)
    for reading in kept:
        apply_turns(reading, positive)
    return kept, sorted(refused, key=lambda r: (r.file, r.index)), votes


def identity(clip: dict):
    """What makes two clips the same one: their `id`, else video, clip number and conversation."""
    if get(clip, "id") is not None:
        return ("id", str(clip["id"]))
    metadata = get(clip, "metadata") or {}
    return ("built", clip["video_uid"], get(clip, "clip_idx") or 0, get(metadata, "user_id"))


def _reading(number: int, index: int, clip: dict, convention: str, span: tuple[int, int]) -> Reading:
    has_dst = bool(get(clip, "dst")) or any(t["role"] == "DST_UPDATE" for t in clip["conversation"])
    return Reading(
        number, index, clip, convention, is_proassist(clip), *span,
        dst_speaks=has_dst, turns=events(clip, convention),
    )  # fmt: skip


def _pad(kept: list[Reading], pad_s: float) -> None:
    """Widen by pad_s on both sides, not below frame 0 and not into a neighbour's own (unpadded) range."""
    own = [(r.clip["video_uid"], r.start, r.end) for r in kept]
    for reading, (video, start, end) in zip(kept, own, strict=True):
        extra = math.floor(pad_s * reading.fps + TOLERANCE)
        before = [e for v, _, e in own if v == video and e <= start]
        after = [s for v, s, _ in own if v == video and s >= end]
        reading.start = max([0, start - extra, *before])
        reading.end = min([end + extra, MAX_FRAME, *after])


def rate_of(clip: dict, split: str, option: float | None) -> float:
    if option is not None:
        return option
    if split != "train":
        return 1.0
    own = get(clip, "neg_frame_sampling_rate")
    return 0.5 if own is None else float(own)
