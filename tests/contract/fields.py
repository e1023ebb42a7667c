"""DESIGN.md's Inputs read a second time: what a clip's fields say, which clips are malformed, and a file's vote.

The first half of `reference.py`, which says what is in both and how to read it.
"""

from __future__ import annotations

import math
from pathlib import PurePosixPath, PureWindowsPath

TOLERANCE = 1e-6
MAX_FRAMES = 1_000_000
MAX_FRAME = 2**31 - 1
ROLES = ("system", "user", "assistant", "DST_UPDATE")
TRANSITIONS = {
    "start": "in_progress", "complete": "completed", "pause": "paused", "resume": "in_progress",
    "cancel": "cancelled", "reset": "not_started", "fail": "failed",
}  # fmt: skip
HEAD_OF = {"assistant": "speaking", "DST_UPDATE": "dst_update"}
OTHER = {"speaking": "dst_update", "dst_update": "speaking"}


class Undecided(Exception):
    """No convention reaches 90% in a file of five or more voting turns."""


# ---- types -------------------------------------------------------------------------------------------


def is_finite(x) -> bool:
    if not isinstance(x, (int, float)) or isinstance(x, bool):
        return False
    try:
        return math.isfinite(float(x))
    except OverflowError:
        return False


def is_frame(x) -> bool:
    return is_finite(x) and float(x).is_integer() and 0 <= x <= MAX_FRAME


def is_name(x) -> bool:
    """Reading: a number will do for an id."""
    return isinstance(x, (str, int)) and not isinstance(x, bool)


def stays_inside(path: str) -> bool:
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    climbs = ".." in posix.parts or ".." in windows.parts
    absolute = posix.is_absolute() or bool(windows.drive) or bool(windows.root)
    return not climbs and not absolute and "\0" not in path and path != ""


def fps_of(clip: dict) -> float:
    return 2 if clip.get("fps") is None else clip["fps"]


def schema_of(clip: dict) -> str:
    if "video_intervals" in clip:
        return "egoproactive"
    turns = clip.get("conversation")
    frames = isinstance(turns, list) and any(isinstance(t, dict) and t.get("role") == "frames" for t in turns)
    return "proassist" if frames else "prospect"


def text(value) -> str | None:
    """A descriptive field: a list of strings by lines; nothing where it is empty or of any other type."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    return value if isinstance(value, str) and value else None


def metadata_of(clip: dict) -> dict:
    return clip["metadata"] if isinstance(clip.get("metadata"), dict) else {}


def user_of(clip: dict) -> str | None:
    user = metadata_of(clip).get("user_id")
    return str(user) if isinstance(user, int) and not isinstance(user, bool) else text(user)


def goal_of(clip: dict) -> str | None:
    if schema_of(clip) == "egoproactive":
        return text(clip.get("task"))
    return text(clip.get("inferred_goal")) or text(metadata_of(clip).get("task_goal"))


def knowledge_of(clip: dict) -> str | None:
    if schema_of(clip) == "proassist" and metadata_of(clip).get("add_knowledge") is False:
        return None
    return text(clip.get("inferred_knowledge")) or text(metadata_of(clip).get("knowledge"))


def raw_steps(clip: dict):
    """`dst`, or what is nested under `dst.steps`."""
    steps = clip.get("dst")
    return steps.get("steps") if isinstance(steps, dict) else steps


def steps_of(clip: dict) -> list[dict]:
    return [{"id": str(s["id"]), "name": text(s.get("name")) or ""} for s in raw_steps(clip) or []]


def summary_only(clip: dict) -> bool:
    """A ProAssist clip of a summary file: its assistant turns were taken out."""
    told = metadata_of(clip).get("summary_only") is True or clip.get("neg_frame_sampling_rate") == -1
    return schema_of(clip) == "proassist" and told


# ---- malformed, whatever the convention --------------------------------------------------------------


def problems(clip) -> list[tuple[int | None, str]]:
    """Every reason to refuse a clip that can be told without its file's convention."""
    if not isinstance(clip, dict):
        return [(None, "")]
    if schema_of(clip) == "egoproactive":
        return [(None, name) for name in _session_problems(clip)]
    found = [(None, name) for name in [*_clip_problems(clip), *_bounds_problems(clip)]]
    conversation = clip.get("conversation")
    if not isinstance(conversation, list):
        return [*found, (None, "conversation")]
    for i, turn in enumerate(conversation):
        found += [(i, name) for name in _turn_problems(turn)]
    if not found and by_time(clip):
        found = [(None, "fps")] if clip.get("fps") is None else []
        times = [(i, turn.get("time")) for i, turn in enumerate(conversation)]
        found += [(i, "time") for i, t in times if t is not None and not is_frame(floor_frame(t, fps_of(clip)))]
    return found


def _clip_problems(clip: dict) -> list[str]:
    rate, state, steps = (clip.get("neg_frame_sampling_rate"), clip.get("initial_dst_state"), raw_steps(clip))
    paths = {name: clip.get(name) for name in ("video_uid", "frames_file")}
    bad = [name for name, path in paths.items() if path is not None and not isinstance(path, str)]
    bad += [name for name, path in paths.items() if isinstance(path, str) and not stays_inside(path)]
    wrong = {
        "video_uid": paths["video_uid"] is None,
        "id": clip.get("id") is not None and not is_name(clip["id"]),
        "clip_idx": clip.get("clip_idx") is not None and not is_frame(clip["clip_idx"]),
        "fps": not is_finite(fps_of(clip)) or fps_of(clip) <= 0,
        "neg_frame_sampling_rate": rate is not None
        and not (is_finite(rate) and 0 <= rate <= 1)
        and not (rate == -1 and summary_only(clip)),
        "dst": steps is not None
        and not (isinstance(steps, list) and all(isinstance(s, dict) and is_name(s.get("id")) for s in steps)),
        "initial_dst_state": state is not None
        and not (isinstance(state, dict) and set(map(str, state.values())) <= set(TRANSITIONS.values())),
    }
    return bad + [name for name, is_wrong in wrong.items() if is_wrong]


def _bounds_problems(clip: dict) -> list[str]:
    start, end = (clip.get(name) for name in ("start_frame_idx", "end_frame_idx"))
    bad = [f"{name}_frame_idx" for name, x in (("start", start), ("end", end)) if x is not None and not is_frame(x)]
    if not bad and start is not None and end is not None and not 0 <= end - start <= MAX_FRAMES:
        bad = ["end_frame_idx", "start_frame_idx"]
    return bad  # one frame, or none: that hangs on the convention


def _session_problems(clip: dict) -> list[str]:
    """Of an EgoProactive session."""
    intervals, answers, path = (clip.get(name) for name in ("video_intervals", "answers", "video_path"))
    bad = [] if isinstance(path, str) and stays_inside(path) else ["video_path"]
    if clip.get("fps") is not None and not (is_finite(clip["fps"]) and clip["fps"] > 0):
        bad.append("fps")
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        bad.append("answers")
    pairs_ok = isinstance(intervals, list) and all(isinstance(i, list) and len(i) == 2 for i in intervals)
    edges = [edge for pair in intervals for edge in pair] if pairs_ok else []
    if not edges or not all(is_finite(e) and e >= 0 for e in edges) or sorted(edges) != edges:
        bad.append("video_intervals")
    elif isinstance(answers, list) and len(answers) != len(intervals):
        bad += ["answers", "video_intervals"]
    if clip.get("duration_in_sec") is not None and not is_finite(clip["duration_in_sec"]):
        bad.append("duration_in_sec")
    return bad


def _turn_problems(turn) -> list[str]:
    if not isinstance(turn, dict):
        return [""]
    role, bad = turn.get("role"), []
    if role != "frames" and role not in ROLES:
        return ["role"]
    if role != "frames" and not _content_ok(role, turn.get("content")):
        bad.append("content")
    if turn.get("time") is not None and not is_finite(turn["time"]):
        bad.append("time")
    names = ("start", "end") if role == "frames" else ("start_frame", "end_frame")
    start, end = (turn.get(name) for name in names)
    frames_bad = [name for name in names if turn.get(name) is not None and not is_frame(turn[name])]
    if not frames_bad and start is not None and end is not None and end < start:
        frames_bad = list(names)
    return bad + frames_bad


def _content_ok(role: str, content) -> bool:
    if role == "system":
        return True  # it is not read
    if role != "DST_UPDATE":
        return isinstance(content, str)
    if isinstance(content, str):
        split = [piece.split("->") for piece in content.split(",")]
        return all(len(p) == 2 and p[0].strip() and p[1].strip() in TRANSITIONS for p in split)
    return isinstance(content, list) and all(
        isinstance(u, dict) and isinstance(u.get("id"), str) and u.get("transition") in list(TRANSITIONS)
        for u in content
    )


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
    return [t for t in spoken(clip) if t.get("start_frame") is not None and t.get("end_frame") is not None]


def by_time(clip: dict) -> bool:
    """Whether the turns have times but no frames, so that their frames are floor(time * fps)."""
    prospect = schema_of(clip) == "prospect"
    return prospect and not framed(clip) and any(t.get("time") is not None for t in spoken(clip))


def placed(clip: dict) -> bool:
    """Whether the schema says where turns happen, so that no convention is voted on."""
    return schema_of(clip) != "prospect" or by_time(clip)


def floor_frame(time: float, fps: float) -> int | None:
    """floor(time * fps), tolerant of 1e-6; None where the product is not finite."""
    product = float(time) * float(fps)
    return math.floor(product + TOLERANCE) if math.isfinite(product) else None


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
            if turn.get("time") is None:
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
