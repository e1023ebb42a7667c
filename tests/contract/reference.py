"""DESIGN.md's Inputs and Labels read a second time: slow, pure Python, one frame and one rule at a time.

It shares nothing with `pipeline` but the sampling draw, and trades all speed for being checkable by eye
against the contract (about 0.2 million frames a second). Input is what `json.loads` gives; bytes and syntax
are test_malformed's business. Where DESIGN.md leaves a choice open, the choice made is marked "reading:".

    clip     dict as parsed            head     "speaking" | "dst_update"
    range    half-open [start, end)    problem  (turn index or None, field) that makes a clip malformed
    state    step id -> state; a step left out is not started
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath

import numpy as np

from pipeline.schema import draws, rate_threshold, sampling_seed

TOLERANCE = 1e-6
MAX_FRAMES = 1_000_000
MAX_FRAME = 2**31 - 1
ROLES = ("system", "user", "assistant", "DST_UPDATE")
TRANSITIONS = {
    "start": "in_progress", "complete": "completed", "pause": "paused", "resume": "in_progress",
    "cancel": "cancelled", "reset": "not_started", "fail": "failed",
}  # fmt: skip
HEAD_OF = {"assistant": "speaking", "DST_UPDATE": "dst_update"}
STATES = tuple(TRANSITIONS.values())
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
    start: int = 0
    end: int = 0
    positives: dict = field(default_factory=dict)  # head -> set of frames
    rest: dict = field(default_factory=dict)  # head -> set of frames (onset only)
    dst_speaks: bool = True
    turns: list = field(default_factory=list)  # (role, canonical range or None) in order, `frames` left out
    unlabelled: list = field(default_factory=list)  # ranges that nobody annotated, cut to the clip
    state: dict = field(default_factory=dict)  # before the clip; steps that are not started are left out
    dropped: dict = field(default_factory=dict)  # reason -> turns that label nothing

    @property
    def fps(self) -> float:
        return fps_of(self.clip)

    @property
    def schema(self) -> str:
        return schema_of(self.clip)

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


@dataclass
class FileReading:
    convention: str
    votes: dict[str, int]
    voters: int
    widened: int = 0  # clips whose bounds were widened
    contradicted: int = 0  # clips whose given state the replay, or their own updates, contradict


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


def schema_of(clip: dict) -> str:
    if "video_intervals" in clip:
        return "egoproactive"
    turns = get(clip, "conversation")
    frames = [t for t in turns if isinstance(t, dict) and get(t, "role") == "frames"] if isinstance(turns, list) else []
    return "proassist" if frames else "prospect"


def is_proassist(clip: dict) -> bool:
    return schema_of(clip) == "proassist"


def text(value) -> str | None:
    """A descriptive field: a list of strings by lines; nothing where it is empty or of any other type."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    return value if isinstance(value, str) and value else None


def metadata_of(clip: dict) -> dict:
    found = get(clip, "metadata")
    return found if isinstance(found, dict) else {}


def user_of(clip: dict) -> str | None:
    user = get(metadata_of(clip), "user_id")
    return str(user) if isinstance(user, int) and not isinstance(user, bool) else text(user)


def goal_of(clip: dict) -> str | None:
    if schema_of(clip) == "egoproactive":
        return text(get(clip, "task"))
    return text(get(clip, "inferred_goal")) or text(get(metadata_of(clip), "task_goal"))


def knowledge_of(clip: dict) -> str | None:
    if schema_of(clip) == "proassist" and metadata_of(clip).get("add_knowledge") is False:
        return None
    return text(get(clip, "inferred_knowledge")) or text(get(metadata_of(clip), "knowledge"))


def steps_of(clip: dict) -> list[dict]:
    """The task's steps, {id, name}, also nested under `dst.steps`."""
    steps = get(clip, "dst")
    steps = get(steps, "steps") if isinstance(steps, dict) else steps
    return [{"id": str(s["id"]), "name": text(get(s, "name")) or ""} for s in steps or []]


def summary_only(clip: dict) -> bool:
    """A ProAssist clip of a summary file: its assistant turns were taken out."""
    told = metadata_of(clip).get("summary_only") is True or get(clip, "neg_frame_sampling_rate") == -1
    return schema_of(clip) == "proassist" and told


# ---- malformed, whatever the convention --------------------------------------------------------------


def problems(clip) -> list[tuple[int | None, str]]:
    """Every reason to refuse a clip that can be told without its file's convention."""
    if not isinstance(clip, dict):
        return [(None, "")]
    if schema_of(clip) == "egoproactive":
        return _session_problems(clip)
    found = [*_clip_problems(clip), *_bounds_problems(clip)]
    conversation = get(clip, "conversation")
    if not isinstance(conversation, list):
        return [*found, (None, "conversation")]
    for i, turn in enumerate(conversation):
        found += [(i, name) for name in _turn_problems(turn)]
    if not found and by_time(clip):
        found = [(None, "fps")] if get(clip, "fps") is None else []
        times = [(i, get(turn, "time")) for i, turn in enumerate(conversation)]
        found += [(i, "time") for i, t in times if t is not None and not is_frame(floor_frame(t, fps_of(clip)))]
    return found


def _clip_problems(clip: dict) -> list[tuple[int | None, str]]:
    texts = ("video_uid", "frames_file")
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
    if rate is not None and not (is_finite(rate) and 0 <= rate <= 1) and not (rate == -1 and summary_only(clip)):
        bad.append("neg_frame_sampling_rate")
    steps = get(clip, "dst")
    steps = get(steps, "steps") if isinstance(steps, dict) else steps
    if steps is not None and not (isinstance(steps, list) and all(isinstance(s, dict) and _is_id(s) for s in steps)):
        bad.append("dst")
    state = get(clip, "initial_dst_state")
    if state is not None and not (isinstance(state, dict) and set(map(str, state.values())) <= set(STATES)):
        bad.append("initial_dst_state")
    return [(None, name) for name in bad]


def _is_id(step: dict) -> bool:
    """Reading: a number will do, as in nested steps."""
    return isinstance(get(step, "id"), (str, int)) and not isinstance(step["id"], bool)


def _bounds_problems(clip: dict) -> list[tuple[int | None, str]]:
    given = [(name, get(clip, name)) for name in ("start_frame_idx", "end_frame_idx")]
    bad = [(None, name) for name, value in given if value is not None and not is_frame(value)]
    (_, start), (_, end) = given
    if not bad and start is not None and end is not None and not 0 <= end - start <= MAX_FRAMES:
        bad = [(None, "end_frame_idx"), (None, "start_frame_idx")]
    return bad  # one frame, or none: that hangs on the convention


def _session_problems(clip: dict) -> list[tuple[int | None, str]]:
    """Of an EgoProactive session."""
    intervals, answers, path = (get(clip, name) for name in ("video_intervals", "answers", "video_path"))
    bad = []
    if not isinstance(path, str) or not stays_inside(path):
        bad.append("video_path")
    if get(clip, "fps") is not None and not (is_finite(clip["fps"]) and clip["fps"] > 0):
        bad.append("fps")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        bad.append("answers")
    pairs_ok = isinstance(intervals, list) and all(isinstance(i, list) and len(i) == 2 for i in intervals)
    edges = [edge for pair in intervals for edge in pair] if pairs_ok else []
    if not edges or not all(is_finite(e) and e >= 0 for e in edges) or sorted(edges) != edges:
        bad.append("video_intervals")
    elif isinstance(answers, list) and len(answers) != len(intervals):
        bad += ["answers", "video_intervals"]
    length = get(clip, "duration_in_sec")
    if length is not None and not is_finite(length):
        bad.append("duration_in_sec")
    return [(None, name) for name in bad]


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
    if role == "system":
        return True  # it is not read
    if role != "DST_UPDATE":
        return isinstance(content, str)
    if isinstance(content, str):
        pairs = [piece.split("->") for piece in content.split(",")]
        return all(len(p) == 2 and p[0].strip() and p[1].strip() in TRANSITIONS for p in pairs)
    return isinstance(content, list) and all(
        isinstance(u, dict) and isinstance(get(u, "id"), str) and _is_transition(get(u, "transition")) for u in content
    )


def _is_transition(x) -> bool:
    return isinstance(x, str) and x in TRANSITIONS


def pairs(content) -> list[tuple[str, str]]:
    """(step, transition) of a DST_UPDATE's content."""
    if isinstance(content, str):
        split = [piece.split("->") for piece in content.split(",")]
        return [(step.strip(), transition.strip()) for step, transition in split]
    return [(u["id"], u["transition"]) for u in content]


# ---- the vote ----------------------------------------------------------------------------------------


def spoken(clip: dict) -> list[dict]:
    """A prospect clip's non-system turns."""
    return [t for t in clip["conversation"] if t["role"] not in ("system", "frames")]


def framed(clip: dict) -> list[dict]:
    """Non-system turns with both frame numbers (reading: one of the two is none)."""
    return [t for t in spoken(clip) if get(t, "start_frame") is not None and get(t, "end_frame") is not None]


def by_time(clip: dict) -> bool:
    """Whether the turns have times but no frames, so that their frames are floor(time * fps)."""
    turns = [] if schema_of(clip) != "prospect" else spoken(clip)
    return not framed(clip) and any(get(t, "time") is not None for t in turns) if turns else False


def placed(clip: dict) -> bool:
    """Whether the schema says where turns happen, so that no convention is voted on."""
    return schema_of(clip) != "prospect" or by_time(clip)


def floor_frame(time: float, fps: float) -> int | None:
    """floor(time * fps), tolerant of 1e-6; None where the product is not finite."""
    product = float(time) * float(fps)
    return math.floor(product + TOLERANCE) if math.isfinite(product) else None


def given_bounds(clip: dict) -> tuple[int | None, int | None]:
    start, end = get(clip, "start_frame_idx"), get(clip, "end_frame_idx")
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
    """(number of voting turns, votes per convention) over well-formed clips of one file.

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


def dst_alone(clips: list[dict]) -> bool:
    """The file's vote: 90% of the bounds are those of DST updates alone, and some other turn lies outside."""
    bounded = [c for c in clips if not placed(c) and None not in given_bounds(c)]
    alone = [c for c in bounded if spans_dst(c)]
    outside = [
        t
        for c in alone
        for t in framed(c)
        if says_nothing(c) or t["start_frame"] < c["start_frame_idx"] or t["end_frame"] > c["end_frame_idx"]
    ]
    return bool(outside) and 10 * len(alone) >= 9 * len(bounded)


def turns_extent(clip: dict, convention: str) -> tuple[int, int] | None:
    """[start, end) that holds the ranges of all non-system turns, and the frames of their events.

    Reading: of all that have frames, timed or not.
    """
    if schema_of(clip) == "egoproactive":
        last = max(chunk[1] for chunk in chunks(clip))
        return 0, max(last, ceil_frame(get(clip, "duration_in_sec") or 0, fps_of(clip)))
    if is_proassist(clip):
        marks = [t for t in clip["conversation"] if t["role"] == "frames"]
        marks = [t for t in marks if get(t, "start") is not None and get(t, "end") is not None]
        ranges = [(int(t["start"]), int(t["end"])) for t in marks]
    else:
        ranges = [span for t in spoken(clip) if (span := canonical(t, convention, clip)) is not None]
        ranges += [(int(t["start_frame"]), int(t["end_frame"])) for t in framed(clip)]
    return (min(s for s, _ in ranges), max(e for _, e in ranges)) if ranges else None


def bounds(clip: dict, convention: str, widen: str = "given") -> tuple[int, int] | None:
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


def other_bounds(clip: dict, convention: str, span: tuple[int, int]) -> bool:
    """Whether a clip that gives bounds has got others."""
    start, end = given_bounds(clip)
    given = (start, end + (convention == "window")) if end is not None else None
    return not placed(clip) and given is not None and start is not None and span != given


def canonical(turn: dict, convention: str, clip: dict) -> tuple[int, int] | None:
    """The half-open range of the event a prospect turn stands for; None without both frame numbers."""
    if by_time(clip):
        at = None if get(turn, "time") is None else floor_frame(turn["time"], fps_of(clip))
        return None if at is None else (at, at + 1)
    if get(turn, "start_frame") is None or get(turn, "end_frame") is None:
        return None
    start, end = int(turn["start_frame"]), int(turn["end_frame"])
    event = max(end - 1, 0)
    return {"event": (start, end), "window": (start, end + 1), "lead-in": (event, event + 1)}[convention]


def ceil_frame(time: float, fps: float) -> int:
    return math.ceil(time * fps - TOLERANCE)


def chunks(clip: dict) -> list[tuple[int, int]]:
    """The frames of an EgoProactive session's chunks."""
    return [(ceil_frame(s, fps_of(clip)), ceil_frame(e, fps_of(clip))) for s, e in clip["video_intervals"]]


def session_turns(clip: dict) -> list[tuple[str, str, float, tuple[int, int]]]:
    """(role, text, time, range) of an EgoProactive session: the query, then what is said in interrupt chunks."""
    own, times = chunks(clip), [s for s, _ in clip["video_intervals"]]
    query = text(get(clip, "query"))
    turns = [("user", query, times[0], (own[0][0], own[0][0] + 1))] if query else []
    for span, time, answer in zip(own, times, clip["answers"], strict=True):
        if answer.lstrip().startswith("$interrupt$"):
            turns.append(("assistant", answer.lstrip()[len("$interrupt$") :].strip(), time, span))
    return turns


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
        return [(role, span) for role, _, _, span in session_turns(clip)]
    found, here, before = [], None, None
    proassist = is_proassist(clip)
    for turn in clip["conversation"]:
        role = turn["role"]
        if role == "frames":
            at = get(turn, "end") if get(turn, "start") is not None else None
            here = None if at is None else (max(int(at) - 1, 0), max(int(at) - 1, 0) + 1)
        elif proassist:
            found.append(("summary" if role == "assistant" and _asks_for_summary(before) else role, here))
        else:
            found.append((role, canonical(turn, convention, clip)))
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


def after(state: dict, updates: list[tuple[str, str]]) -> dict:
    for step, transition in updates:
        state = state | {step: TRANSITIONS[transition]}
    return state


def told(state: dict) -> dict:
    return {step: name for step, name in state.items() if name != "not_started"}


def conversations(readings: list[Reading]) -> list[list[Reading]]:
    """Clips of one conversation: same video and user (and data set). Where a clip_idx comes twice there, several
    conversations follow each other, and one that does not rise begins the next."""
    by_name: dict = {}
    for reading in readings:
        clip = reading.clip
        name = (clip.get("video_uid"), user_of(clip), text(get(clip, "dataset")))
        by_name.setdefault(name, []).append(reading)
    found = []
    for members in by_name.values():
        numbers = [get(r.clip, "clip_idx") for r in members]
        if len(set(numbers)) == len(numbers) or set(numbers) == {None}:
            found.append(members)
            continue
        for i, reading in enumerate(members):
            if i == 0 or None in (numbers[i], numbers[i - 1]) or numbers[i] <= numbers[i - 1]:
                found.append([])
            found[-1].append(reading)
    return found


def replay(members: list[Reading]) -> int:
    """Set the state before each clip of a conversation; how many given ones were wrong.

    The updates of earlier clips up to the clip's first turn, but for those that the clip repeats (same moment, step and
    transition), in order of time, on top of the first clip's given state. Reading: time is the event's first frame.
    """
    first_turn = {}
    for reading in members:
        own = [span[0] for role, span in reading.turns if role != "system" and span is not None]
        first_turn[id(reading)] = min(own, default=reading.start)
    given = {}
    for r in members:
        state = get(r.clip, "initial_dst_state") or {}
        given[id(r)] = {} if impossible(state, r.changes) else state
    ordered = sorted(members, key=lambda r: first_turn[id(r)])
    least = first_turn[id(ordered[0])]
    openers = [r for r in ordered if first_turn[id(r)] == least]
    base = next((given[id(r)] for r in openers if given[id(r)]), {})
    wrong = 0
    for reading in members:
        now = first_turn[id(reading)]
        past: list = []
        for other in ordered:
            if first_turn[id(other)] < now:
                past += [u for u in other.updates if u[0] <= now and u not in reading.updates and u not in past]
        before = after(base, [u[1:] for u in sorted(past, key=lambda u: u[0])])
        if now == least:
            before = given[id(reading)] or base
        reading.state = told(before)
        own = get(reading.clip, "initial_dst_state")
        wrong += own is not None and (told(own) != reading.state or (own != {} and impossible(own, reading.changes)))
    return wrong


# ---- a whole split -----------------------------------------------------------------------------------


def read_files(
    files: list[list],
    *,
    convention: str | None = None,
    positive: str = "span",
    pad_s: float = 0.0,
    bounds_option: str = "auto",
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
        file = FileReading(convention or decide(voters, counts), counts, voters)
        votes.append(file)
        widen = {"auto": "widened" if dst_alone([c for _, c in valid]) else "given"}.get(bounds_option, bounds_option)
        mine = []
        for index, clip in valid:
            span = bounds(clip, file.convention, widen)
            if span is None:
                refused.append(Refused(number, index, [(None, "end_frame_idx"), (None, "start_frame_idx")]))
                continue
            mine.append(_reading(number, index, clip, file.convention, span))
            file.widened += other_bounds(clip, file.convention, span)
        for members in conversations([r for r in mine if r.dst_speaks]):
            file.contradicted += replay(members)
        kept += mine
    _pad(kept, pad_s)
    for reading in kept:
        reading.unlabelled = unlabelled(reading.clip, reading.start, reading.end)
        apply_turns(reading, positive)
    return kept, sorted(refused, key=lambda r: (r.file, r.index)), votes


def identity(clip: dict):
    """What makes two clips the same one: their `id`, else video, clip number, user, bounds and what is said."""
    if get(clip, "id") is not None:
        return ("id", str(clip["id"]))
    if schema_of(clip) == "egoproactive":
        return ("built", json.dumps({k: v for k, v in clip.items() if k != "dialog"}, sort_keys=True))
    said = json.dumps(clip["conversation"], sort_keys=True)
    return ("built", clip["video_uid"], get(clip, "clip_idx"), user_of(clip), given_bounds(clip), said)


def _reading(number: int, index: int, clip: dict, convention: str, span: tuple[int, int]) -> Reading:
    turns = get(clip, "conversation") or []
    steps = steps_of(clip) if schema_of(clip) != "egoproactive" else []
    has_dst = bool(steps) or any(t["role"] == "DST_UPDATE" for t in turns)
    convention = "event" if by_time(clip) else convention
    state = told(get(clip, "initial_dst_state") or {}) if schema_of(clip) != "egoproactive" else {}
    turns = events(clip, convention)
    return Reading(number, index, clip, convention, *span, dst_speaks=has_dst, turns=turns, state=state)


def _pad(kept: list[Reading], pad_s: float) -> None:
    """Widen by pad_s on both sides, not below frame 0 and not into a neighbour's own (unpadded) range."""
    own = [(uid_of(r.clip), r.start, r.end) for r in kept]
    for reading, (video, start, end) in zip(kept, own, strict=True):
        extra = math.floor(pad_s * reading.fps + TOLERANCE)
        before = [e for v, _, e in own if v == video and e <= start]
        after = [s for v, s, _ in own if v == video and s >= end]
        reading.start = max([0, start - extra, *before])
        reading.end = min([end + extra, MAX_FRAME, *after])


def uid_of(clip: dict) -> str:
    """The video's name; of EgoProactive's video_path the file name without its ending."""
    if schema_of(clip) != "egoproactive":
        return clip["video_uid"]
    return PurePosixPath(clip["video_path"]).stem


def rate_of(clip: dict, split: str, option: float | None) -> float:
    if option is not None:
        return option
    if split != "train":
        return 1.0
    own = get(clip, "neg_frame_sampling_rate")
    return 0.5 if own is None or own == -1 else float(own)
