"""DESIGN.md's Inputs and Labels read a second time: slow, pure Python, one frame and one rule at a time.

It shares nothing with `pipeline` but the sampling draw, and trades all speed for being checkable by eye
against the contract (about 0.2 million frames a second). Input is well-formed clips, as `json.loads` gives them (what
makes one malformed: test_malformed.py). Where DESIGN.md leaves a choice open, the choice made is marked "reading:".

    clip     dict as parsed            head     "speaking" | "dst_update"
    range    half-open [start, end)    state    step id -> state; a step left out is not started
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from pipeline.schema import draws, rate_threshold, sampling_seed

TOLERANCE = 1e-6
MAX_FRAMES = 1_000_000
MAX_FRAME = 2**31 - 1
TRANSITIONS = {
    "start": "in_progress", "complete": "completed", "pause": "paused", "resume": "in_progress",
    "cancel": "cancelled", "reset": "not_started", "fail": "failed",
}  # fmt: skip
HEAD_OF = {"assistant": "speaking", "DST_UPDATE": "dst_update"}
OTHER = {"speaking": "dst_update", "dst_update": "speaking"}


class Undecided(Exception):
    """No convention reaches 90% in a file of five or more voting turns."""


@dataclass
class Reading:
    """What one surviving clip must look like on disk."""

    file: int
    index: int
    clip: dict
    convention: str
    start: int
    end: int
    dst_speaks: bool
    turns: list  # (role, canonical range or None) in order, `frames` left out
    state: dict  # before the clip; steps that are not started are left out
    positives: dict = field(default_factory=dict)  # head -> set of frames
    rest: dict = field(default_factory=dict)  # head -> set of frames (onset only)
    unlabelled: list = field(default_factory=list)  # ranges that nobody annotated, cut to the clip

    @property
    def changes(self) -> list[tuple[str, str]]:
        """(step, transition) of all DST_UPDATE turns, in order."""
        turns = [t for t in self.clip["conversation"] if t["role"] == "DST_UPDATE"]
        return [pair for turn in turns for pair in pairs(turn["content"])]

    @property
    def updates(self) -> list[tuple[int, str, str]]:
        """(event frame, step, transition) of the DST_UPDATE turns that have frames, in order."""
        said = [t for t in self.clip.get("conversation") or [] if t["role"] != "frames"]
        return [
            (span[0], *pair)
            for turn, (role, span) in zip(said, self.turns, strict=False)
            if role == "DST_UPDATE" and span is not None
            for pair in pairs(turn["content"])
        ]

    def expected(self, clip_id: str, seed: int, rate: float) -> dict[str, list[int]]:
        frames = np.arange(self.start, self.end, dtype=np.int64)
        return self.labels(draws(sampling_seed(seed, clip_id), 0, frames).tolist(), rate)

    def labels(self, drawn: list[int], rate: float) -> dict[str, list[int]]:
        """Per head one label a frame of the clip, in order; `drawn` holds one uint32 a frame."""
        threshold, frames = rate_threshold(rate), range(self.start, self.end)
        return {
            head: [self._label(head, f, d < threshold) for f, d in zip(frames, drawn, strict=True)]
            for head in HEAD_OF.values()
        }

    def _label(self, head: str, frame: int, sampled: bool) -> int:
        if any(start <= frame < end for start, end in self.unlabelled):
            return -100
        if head == "dst_update" and not self.dst_speaks:
            return -100
        if frame in self.positives[head]:
            return 1
        if frame in self.rest[head]:
            return -100
        if frame in self.positives[OTHER[head]]:
            return 0
        return 0 if sampled else -100


# ---- fields ------------------------------------------------------------------------------------------


def schema_of(clip: dict) -> str:
    if "video_intervals" in clip:
        return "egoproactive"
    return "proassist" if any(t["role"] == "frames" for t in clip["conversation"]) else "prospect"


def fps_of(clip: dict) -> float:
    return 2 if clip.get("fps") is None else clip["fps"]


def uid_of(clip: dict) -> str:
    """The video's name; of EgoProactive's video_path the file name without its ending."""
    return clip["video_uid"] if schema_of(clip) != "egoproactive" else PurePosixPath(clip["video_path"]).stem


def user_of(clip: dict) -> str | None:
    return (clip.get("metadata") or {}).get("user_id")


def rate_of(clip: dict, split: str, option: float | None) -> float:
    if option is not None:
        return option
    if split != "train":
        return 1.0
    own = clip.get("neg_frame_sampling_rate")
    return 0.5 if own is None or own == -1 else float(own)


def has_steps(clip: dict) -> bool:
    """Of `dst`, or of what is nested under `dst.steps`."""
    steps = clip.get("dst")
    return bool(steps.get("steps") if isinstance(steps, dict) else steps)


def summary_only(clip: dict) -> bool:
    """A ProAssist clip of a summary file: its assistant turns were taken out."""
    said = (clip.get("metadata") or {}).get("summary_only") is True or clip.get("neg_frame_sampling_rate") == -1
    return schema_of(clip) == "proassist" and said


def pairs(content) -> list[tuple[str, str]]:
    """(step, transition) of a DST_UPDATE's content."""
    if isinstance(content, str):
        split = [piece.split("->") for piece in content.split(",")]
        return [(step.strip(), transition.strip()) for step, transition in split]
    return [(u["id"], u["transition"]) for u in content]


def spoken(clip: dict) -> list[dict]:
    """A prospect clip's non-system turns."""
    return [t for t in clip["conversation"] if t["role"] not in ("system", "frames")]


def framed(clip: dict) -> list[dict]:
    """Non-system turns with both frame numbers (reading: one of the two is none)."""
    return [t for t in spoken(clip) if t.get("start_frame") is not None and t.get("end_frame") is not None]


def by_time(clip: dict) -> bool:
    """Whether the turns have times but no frames, so that their frames are floor(time * fps)."""
    prospect = schema_of(clip) == "prospect"
    return prospect and not framed(clip) and any(t.get("time") is not None for t in spoken(clip))


def placed(clip: dict) -> bool:
    """Whether the schema says where turns happen, so that no convention is voted on."""
    return schema_of(clip) != "prospect" or by_time(clip)


def floor_frame(time: float, fps: float) -> int:
    return math.floor(time * fps + TOLERANCE)


def ceil_frame(time: float, fps: float) -> int:
    return math.ceil(time * fps - TOLERANCE)


# ---- the vote ----------------------------------------------------------------------------------------


def given_bounds(clip: dict) -> tuple[int | None, int | None]:
    start, end = clip.get("start_frame_idx"), clip.get("end_frame_idx")
    return (None if start is None else int(start)), (None if end is None else int(end))


def says_nothing(clip: dict) -> bool:
    """Bounds 0..0 of a clip without DST updates: none were given."""
    there = framed(clip)
    no_updates = not any(t["role"] == "DST_UPDATE" for t in there)
    return given_bounds(clip) == (0, 0) and no_updates and any(t["end_frame"] > 0 for t in there)


def spans_dst(clip: dict) -> bool:
    """Whether the bounds are those of the DST_UPDATE turns alone."""
    updates = [t for t in framed(clip) if t["role"] == "DST_UPDATE"]
    extent = (min(t["start_frame"] for t in updates), max(t["end_frame"] for t in updates)) if updates else None
    return says_nothing(clip) or given_bounds(clip) == extent


def vote(clips: list[dict]) -> tuple[int, dict[str, int]]:
    """(number of voting turns, votes per convention) over the clips of one file.

    Reading: a clip of no frames has no vote, as its being valid hangs on the vote's outcome.
    """
    voters, votes = 0, {"lead-in": 0, "event": 0, "window": 0}
    for clip in clips:
        start, end = (None, None) if placed(clip) or says_nothing(clip) else given_bounds(clip)
        if placed(clip) or (start is not None and start == end):
            continue
        if spans_dst(clip) or start is None:
            start = min((t["start_frame"] for t in framed(clip)), default=None)
        previous = start
        for turn in framed(clip):
            if turn.get("time") is None:
                continue
            start, end, at = turn["start_frame"], turn["end_frame"], floor_frame(turn["time"], fps_of(clip))
            voters += 1
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


def dst_alone(clips: list[dict]) -> bool:
    """The file's vote: 90% of the bounds are those of DST updates alone, and some other turn lies outside."""
    bounded = [c for c in clips if not placed(c) and None not in given_bounds(c)]
    alone = [c for c in bounded if spans_dst(c)]
    outside = any(
        says_nothing(c) or t["start_frame"] < c["start_frame_idx"] or t["end_frame"] > c["end_frame_idx"]
        for c in alone
        for t in framed(c)
    )
    return outside and 10 * len(alone) >= 9 * len(bounded)


def turns_extent(clip: dict, convention: str) -> tuple[int, int] | None:
    """[start, end) that holds the ranges of all non-system turns, and the frames of their events.

    Reading: of all that have frames, timed or not.
    """
    if schema_of(clip) == "egoproactive":
        last = max(chunk[1] for chunk in chunks(clip))
        return 0, max(last, ceil_frame(clip.get("duration_in_sec") or 0, fps_of(clip)))
    if schema_of(clip) == "proassist":
        marks = [(t.get("start"), t.get("end")) for t in clip["conversation"] if t["role"] == "frames"]
        ranges = [(int(start), int(end)) for start, end in marks if start is not None and end is not None]
    else:
        ranges = [span for t in spoken(clip) if (span := canonical(t, convention, clip)) is not None]
        ranges += [(int(t["start_frame"]), int(t["end_frame"])) for t in framed(clip)]
    return (min(s for s, _ in ranges), max(e for _, e in ranges)) if ranges else None


def bounds(clip: dict, convention: str, widen: str) -> tuple[int, int] | None:
    """[start, end) of a clip, inferred where not given; None where that can't be, is empty or too long.

    widen: `given` bounds stay, as far as they say something; `widened` to all turns; those of the `turns` alone.
    """
    extent = turns_extent(clip, convention)
    start, end = given_bounds(clip)
    if schema_of(clip) == "egoproactive" or (not placed(clip) and says_nothing(clip)):
        start = end = None
    elif convention == "window" and not placed(clip) and end is not None:
        end += 1
    if extent is not None and not placed(clip) and widen == "turns":
        start, end = extent
    if extent is not None and not placed(clip) and widen == "widened":
        start = extent[0] if start is None else min(start, extent[0])
        end = extent[1] if end is None else max(end, extent[1])
    if extent is not None:
        start = extent[0] if start is None else start
        end = extent[1] if end is None else end
    if start is None or end is None or not 0 < end - start <= MAX_FRAMES or end > MAX_FRAME:
        return None
    return start, end


def canonical(turn: dict, convention: str, clip: dict) -> tuple[int, int] | None:
    """The half-open range of the event a prospect turn stands for; None without both frame numbers."""
    if by_time(clip):
        at = None if turn.get("time") is None else floor_frame(turn["time"], fps_of(clip))
        return None if at is None else (at, at + 1)
    if turn.get("start_frame") is None or turn.get("end_frame") is None:
        return None
    start, end = int(turn["start_frame"]), int(turn["end_frame"])
    event = max(end - 1, 0)
    return {"event": (start, end), "window": (start, end + 1), "lead-in": (event, event + 1)}[convention]


def chunks(clip: dict) -> list[tuple[int, int]]:
    """The frames of an EgoProactive session's chunks."""
    return [(ceil_frame(s, fps_of(clip)), ceil_frame(e, fps_of(clip))) for s, e in clip["video_intervals"]]


def session_turns(clip: dict) -> list[tuple[str, tuple[int, int]]]:
    """(role, range) of an EgoProactive session: the query, then what is said in interrupt chunks."""
    own = chunks(clip)
    turns = [("user", (own[0][0], own[0][0] + 1))] if clip.get("query") else []
    said = zip(own, clip["answers"], strict=True)
    return turns + [("assistant", span) for span, answer in said if answer.lstrip().startswith("$interrupt$")]


def unlabelled(clip: dict, start: int, end: int) -> list[tuple[int, int]]:
    """The ranges of [start, end) that nobody annotated."""
    if summary_only(clip):
        return [(start, end)]
    if schema_of(clip) != "egoproactive":
        return []
    gaps, at = [], start
    for low, high in [*chunks(clip), (end, end)]:
        if at < low:
            gaps.append((at, min(low, end)))
        at = max(at, high)
    return gaps


def events(clip: dict, convention: str) -> list[tuple[str, tuple[int, int] | None]]:
    """(role, canonical range or None) of each turn but `frames`, in order; a summary's role is 'summary'."""
    if schema_of(clip) == "egoproactive":
        return session_turns(clip)
    found, here, summarize = [], None, False
    for turn in clip["conversation"]:
        role = turn["role"]
        if role == "frames":
            at = turn.get("end") if turn.get("start") is not None else None
            here = None if at is None else (max(int(at) - 1, 0), max(int(at) - 1, 0) + 1)
        elif schema_of(clip) == "proassist":
            found.append(("summary" if role == "assistant" and summarize else role, here))
        else:
            found.append((role, canonical(turn, convention, clip)))
        summarize = role == "system" and str(turn.get("content")).startswith("Please summarize")
    return found


def apply_turns(reading: Reading, positive: str) -> None:
    """Fill positives and rest from the turns, one frame at a time."""
    reading.positives = {"speaking": set(), "dst_update": set()}
    reading.rest = {"speaking": set(), "dst_update": set()}
    for role, span in reading.turns:
        if role not in HEAD_OF or span is None:
            continue
        start, end = span
        for frame in range(max(start, reading.start), min(end, reading.end)):
            kind = reading.positives if positive == "span" or frame == start else reading.rest
            kind[HEAD_OF[role]].add(frame)


# ---- the state before a clip -------------------------------------------------------------------------


def impossible(state: dict, updates: list[tuple[str, str]]) -> bool:
    """Reading: some step's first update changes nothing of `state`, or starts what is completed there."""
    seen = set()
    for step, transition in updates:
        was = state.get(step, "not_started")
        if step not in seen and (was == TRANSITIONS[transition] or (was, transition) == ("completed", "start")):
            return True
        seen.add(step)
    return False


def told(state: dict) -> dict:
    return {step: name for step, name in state.items() if name != "not_started"}


def conversations(readings: list[Reading]) -> list[list[Reading]]:
    """Clips of one conversation: same video and user (and data set). Where a clip_idx comes twice there, several
    conversations follow each other, and one that does not rise begins the next."""
    by_name: dict = {}
    for reading in readings:
        clip = reading.clip
        by_name.setdefault((clip.get("video_uid"), user_of(clip), clip.get("dataset")), []).append(reading)
    found = []
    for members in by_name.values():
        numbers = [r.clip.get("clip_idx") for r in members]
        if len(set(numbers)) == len(numbers) or set(numbers) == {None}:
            found.append(members)
            continue
        for i, reading in enumerate(members):
            if i == 0 or None in (numbers[i], numbers[i - 1]) or numbers[i] <= numbers[i - 1]:
                found.append([])
            found[-1].append(reading)
    return found


def replay(members: list[Reading]) -> None:
    """Set the state before each clip of a conversation.

    The updates of earlier clips up to the clip's first turn, but for those that the clip repeats (same moment, step and
    transition), in order of time, on top of the first clip's given state. Reading: time is the event's first frame.
    """
    first_turn, given = {}, {}
    for reading in members:
        own = [span[0] for role, span in reading.turns if role != "system" and span is not None]
        first_turn[id(reading)] = min(own, default=reading.start)
        state = reading.clip.get("initial_dst_state") or {}
        given[id(reading)] = {} if impossible(state, reading.changes) else state
    ordered = sorted(members, key=lambda r: first_turn[id(r)])
    least = first_turn[id(ordered[0])]
    base = next((given[id(r)] for r in ordered if first_turn[id(r)] == least and given[id(r)]), {})
    for reading in members:
        now = first_turn[id(reading)]
        past: list = []
        for other in ordered:
            if first_turn[id(other)] < now:
                past += [u for u in other.updates if u[0] <= now and u not in reading.updates and u not in past]
        before = dict(base)
        for _, step, transition in sorted(past, key=lambda u: u[0]):
            before[step] = TRANSITIONS[transition]
        reading.state = told(given[id(reading)] or base if now == least else before)


# ---- a whole split -----------------------------------------------------------------------------------


def read_files(
    files: list[list[dict]], *, convention: str | None = None, positive: str = "span", pad_s: float = 0.0, widen="auto"
) -> tuple[list[Reading], list[tuple[int, int]]]:
    """Surviving clips in input order, and (file, index) of those whose bounds are refused. All of one split.

    Raises Undecided where a file's vote has no winner and `convention` is None.
    """
    kept, refused = [], []
    for number, clips in enumerate(files):
        meant = convention or decide(*vote(clips))
        how = {"auto": "widened" if dst_alone(clips) else "given"}.get(widen, widen)
        mine = []
        for index, clip in enumerate(clips):
            span = bounds(clip, meant, how)
            if span is None:
                refused.append((number, index))
            else:
                mine.append(_reading(number, index, clip, meant, span))
        for members in conversations([r for r in mine if r.dst_speaks]):
            replay(members)
        kept += mine
    _pad(kept, pad_s)
    for reading in kept:
        reading.unlabelled = unlabelled(reading.clip, reading.start, reading.end)
        apply_turns(reading, positive)
    return kept, refused


def _reading(number: int, index: int, clip: dict, convention: str, span: tuple[int, int]) -> Reading:
    has_dst = has_steps(clip) or any(t["role"] == "DST_UPDATE" for t in clip.get("conversation") or [])
    convention = "event" if by_time(clip) else convention
    state = told(clip.get("initial_dst_state") or {})
    return Reading(number, index, clip, convention, *span, has_dst, events(clip, convention), state)


def _pad(kept: list[Reading], pad_s: float) -> None:
    """Widen by pad_s on both sides, not below frame 0 and not into a neighbour's own (unpadded) range."""
    own = [(uid_of(r.clip), r.start, r.end) for r in kept]
    for reading, (video, start, end) in zip(kept, own, strict=True):
        extra = math.floor(pad_s * fps_of(reading.clip) + TOLERANCE)
        before = [e for v, _, e in own if v == video and e <= start]
        after = [s for v, s, _ in own if v == video and s >= end]
        reading.start = max([0, start - extra, *before])
        reading.end = min([end + extra, MAX_FRAME, *after])
