"""Random valid clips of each schema and convention, as files have them: absolute offsets, turns of one moment, turns
that are empty, outside the clip, without frames or without a time, ranges that end with the clip, 193.0 for 193.

About 4% of the votes do not obey their file's convention. Each function takes a `random.Random`, its seed.
"""

from __future__ import annotations

import copy
import json
import math
import random
from itertools import pairwise

CONVENTIONS = ("event", "window", "lead-in")
KINDS = (*CONVENTIONS, "proassist", "egoproactive", "generated", "timed", "mixed")
OFFSETS = (0, 1, 7, 193, 5000, 2**31 - 3000)
TEXTS = ("Now attach it.", "", "çé ✓ 部品", 'a "quoted" \\ back', "line\nbreak")
STATES = ("not_started", "in_progress", "completed", "paused", "cancelled", "failed")
TRANSITIONS = ("start", "complete", "pause", "resume", "cancel", "reset", "fail")


def _chance(rng: random.Random, p: float) -> bool:
    return rng.random() < p


def _content(rng: random.Random, role: str):
    if role != "DST_UPDATE":
        return rng.choice(TEXTS)
    pairs = [(f"S{rng.randint(1, 9)}", rng.choice(TRANSITIONS)) for _ in range(rng.randint(1, 3))]
    if _chance(rng, 0.3):
        return ", ".join(f"{step}->{transition}" for step, transition in pairs)
    return [{"id": step, "transition": transition} for step, transition in pairs]


def _moment(rng: random.Random, low: int, high: int, fps: float) -> tuple[float, int]:
    """(time in s, its frame): on a frame's edge, inside it, just beside, or rounded as the sources do."""
    frame = rng.randint(low, max(low, high - 1))
    time = (frame + rng.choice((0.0, 0.0, 0.5, 0.25, 0.999, 1e-9, 1 - 1e-7))) / fps
    time = round(time, 1) if _chance(rng, 0.3) else time
    return time, math.floor(time * fps + 1e-6)


def _span(rng: random.Random, convention: str, frame: int, previous: int, clip_end: int) -> tuple[int, int]:
    """start_frame, end_frame of a turn at `frame` after one that ended at `previous`."""
    if convention == "lead-in":
        return previous, max(previous, frame + rng.randint(0, 1))
    if convention == "window":
        return max(0, frame - rng.randint(0, 3)), frame
    stop = clip_end if frame < clip_end and _chance(rng, 0.2) else frame + 1 + rng.choice((0, 0, 1, 2, 7))
    return max(0, frame - rng.choice((0, 0, 1, 2, 7))), stop


def _turns(rng: random.Random, convention: str, start: int, end: int, fps: float) -> list[dict]:
    """Moments of one to three turns (often DST, DST, assistant), some before and after the clip's bounds."""
    reach = rng.choice((0, 0, 0, 6))
    low = start if convention == "lead-in" else max(0, start - reach)
    moments = sorted(_moment(rng, low, end + reach, fps) for _ in range(rng.choice((0, 1, 2, 3, 5, 8))))
    common = (["DST_UPDATE", "DST_UPDATE", "assistant"], ["assistant"], ["user", "assistant"], ["DST_UPDATE"])
    turns, previous = [], start
    for time, frame in moments:
        for role in rng.choice(common):
            first, last = span = _span(rng, convention, frame, previous, end)
            turn = {"role": role, "content": _content(rng, role), "time": time}
            turn |= {"start_frame": first, "end_frame": float(last) if _chance(rng, 0.1) else last}
            if _chance(rng, 0.1):  # no vote: no time, and other frames or none
                at = rng.randint(start, end)
                other = rng.choice((span, (at, at), (end, end), (max(0, start - 5), start), (end - 1, end), None))
                turn = {"role": role, "content": turn["content"]}
                turn |= {} if other is None else dict(zip(("start_frame", "end_frame"), other, strict=True))
            else:
                previous = last
                if _chance(rng, 0.04):
                    turn["time"] += 30
            turns.append(turn)
    return turns


def prospect_clip(rng: random.Random, convention: str, serial: int) -> dict:
    """A clip of the prospect schema; its bounds, or one of them, may be left out where they can be inferred."""
    fps, start = rng.choice((None, 1, 2, 2.0, 5, 29.97)), rng.choice(OFFSETS)
    end = start + rng.choice((1, 2, 3, 5, 20, 60, 200))
    turns = _turns(rng, convention, start, end, fps or 2)
    clip = {"conversation": turns, "video_uid": f"nusar-2021_{serial // 3}__HMC_1_mono", "fps": fps}
    clip |= rng.choice(({"id": f"clip/{serial}"}, {"id": serial, "clip_idx": serial % 3}, {"clip_idx": serial % 3}))
    clip["metadata"] = rng.choice(({"user_id": "a_0", "knowledge": []}, None))
    steps = [{"type": "step", "id": f"S{i}", "name": f"{i}"} for i in range(1, 4)]
    clip["dst"] = rng.choice((steps, steps, {"steps": steps}, [], None))
    if _chance(rng, 0.2):
        clip["initial_dst_state"] = {f"S{i}": rng.choice(STATES) for i in rng.sample(range(1, 5), rng.randint(0, 3))}
    if _chance(rng, 0.4):
        clip["neg_frame_sampling_rate"] = rng.choice((0, 0.1, 0.7, 1.0))
    spans = [(t["start_frame"], t["end_frame"]) for t in turns if "end_frame" in t]
    if spans and max(e for _, e in spans) > max(start, min(s for s, _ in spans)) and _chance(rng, 0.2):
        clip |= rng.choice(({"start_frame_idx": start}, {}))
    else:
        clip |= {"start_frame_idx": start, "end_frame_idx": end}
    turns[:0] = [{"role": "system", "content": "You help.", "start_frame": 0, "end_frame": 1}] * rng.randint(0, 1)
    return clip


def proassist_clip(rng: random.Random, serial: int) -> dict:
    """A clip of the ProAssist schema; three conversations share a video and a clip number."""
    start = at = rng.choice(OFFSETS)
    turns = [{"role": "system", "content": "You are proactive."}]
    turns += [{"role": "user", "content": "before any frame"}] * rng.choice((0, 0, 0, 1))
    for _ in range(rng.choice((1, 2, 3, 6, 10))):
        upto = at + rng.choice((1, 1, 2, 5, 30))
        turns.append({"role": "frames", "start": at, "end": upto})
        at = upto
        for role in rng.choices(("user", "assistant", "assistant"), k=rng.choice((0, 1, 1, 1, 2, 3))):
            turns += [{"role": role, "time": at / 2, "content": rng.choice(TEXTS), "labels": ""}]
        if _chance(rng, 0.1):
            turns.append({"role": "system", "content": "Please summarize the progress."})
            turns.append({"role": "assistant", "content": "The summary."})
    clip = {"dataset": "assembly101", "video_uid": f"pro_{serial // 3}", "clip_idx": 0, "conversation": turns}
    clip["metadata"] = {"user_id": f"talk_{serial % 3}", "knowledge": ["one"], "summary_only": _chance(rng, 0.15)}
    if _chance(rng, 0.1):
        clip["neg_frame_sampling_rate"] = -1
    if _chance(rng, 0.7):  # now and then a frame shorter than its turns
        clip |= {"start_frame_idx": start, "end_frame_idx": max(start + 1, at - rng.choice((0, 0, 1)))}
    return clip


def egoproactive_clip(rng: random.Random, serial: int) -> dict:
    """A session: chunks with and without gaps between them, some of no length; answers with the tag or none."""
    at, intervals = rng.choice((0.0, 0.0, 0.25, 3.1)), []
    for _ in range(rng.choice((1, 2, 5, 12))):
        start = at + rng.choice((0.0, 0.0, 0.0, 2.5, 16.3))
        at = start + rng.choice((8.0, 8.0, 8.0, 3.7, 0.4, 0.0))
        intervals.append([round(start, 2), round(at, 2)])
    intervals[-1][1] = max(intervals[-1][1], 0.6)
    said = ("$silent$", "$silent$", "$interrupt$Now.", "\n $interrupt$x", "$interrupt$", "x")
    clip = {"video_path": f"val/s{serial}.mp4", "video_intervals": intervals, "domain": "d", "task": "t"}
    clip |= {"answers": [rng.choice(said) for _ in intervals], "dialog": [[] for _ in intervals]}
    clip["duration_in_sec"] = intervals[-1][1] + rng.choice((0, 0, 0, 5.2, -3))
    return clip | rng.choice(({}, {"query": None}, {"query": "How?"}))


def timed_clip(rng: random.Random, serial: int) -> dict:
    """A clip whose turns have times but no frames."""
    clip = prospect_clip(rng, "event", serial) | {"fps": rng.choice((1, 2, 29.97))}
    clip = {name: value for name, value in clip.items() if not name.endswith("_frame_idx")}
    roles = ["user", *rng.choices(("user", "assistant", "DST_UPDATE"), k=rng.randint(0, 6))]
    time, clip["conversation"] = rng.choice((0, 0.4, 200.0)), []
    for role in roles:
        time += rng.choice((0, 0, 0.3, 1.5, 20.2))
        clip["conversation"].append({"role": role, "content": _content(rng, role), "time": time})
    return clip | ({"start_frame_idx": 0, "end_frame_idx": rng.choice((5, 500))} if _chance(rng, 0.3) else {})


def generated(rng: random.Random, convention: str, base: int, count: int) -> list[dict]:
    """About `count` clips as the public generators cut conversations: a later clip repeats the last turns of the one
    before, bounds span the DST updates alone, initial states are those of the clip's end, or none."""
    found: list[dict] = []
    number, became = base, {"start": "in_progress", "complete": "completed"}
    while len(found) < count:
        video, user = f"nusar-{rng.randint(0, 3)}__gen{base}", rng.choice(("no_talk_0", "talk_0"))
        turns = _conversation(rng, convention)
        moments = sorted({t["time"] for t in turns})
        cuts = [0, *sorted(rng.sample(range(1, len(moments)), min(rng.randint(0, 3), len(moments) - 1))), len(moments)]
        state: dict[str, str] = {}
        for i, (low, high) in enumerate(pairwise(cuts)):
            times = moments[max(0, low - (low > 0)) : high]  # with the moment before
            segment = [t for t in turns if t["time"] in times]
            updates = [u for t in segment if t["role"] == "DST_UPDATE" for u in t["content"]]
            state = state | {u["id"]: became[u["transition"]] for u in updates}
            clip = {"video_uid": video, "clip_idx": i, "id": f"gen {number}", "fps": 2, "dataset": "d"}
            spans = [(t["start_frame"], t["end_frame"]) for t in segment if t["role"] == "DST_UPDATE"] or [(0, 0)]
            clip |= {"start_frame_idx": min(s for s, _ in spans), "end_frame_idx": max(e for _, e in spans)}
            clip["dst"] = [{"type": "step", "id": f"S{k}", "name": f"{k}"} for k in range(1, 5)]
            clip["metadata"] = {"user_id": user, "knowledge": [], "summary_only": False}
            system = {"role": "system", "content": f"Step states - {state}", "start_frame": 0, "end_frame": 1}
            clip["conversation"] = [system, *copy.deepcopy(segment)]
            if len(cuts) > 2:
                clip["initial_dst_state"] = {} if high == cuts[-1] else dict(state)
            if _chance(rng, 0.04):  # a clip of another origin
                clip |= {"start_frame_idx": 0, "end_frame_idx": 400}
            found.append(clip)
            number += 1
    if _chance(rng, 0.2):
        rng.shuffle(found)
    return found


def _conversation(rng: random.Random, convention: str) -> list[dict]:
    """Timed turns of one conversation, updates first at each moment; 2 frames a second."""
    time, previous, running, turns = rng.choice((0.0, 0.0, 0.3, 4.7)), 0, 0, []
    for number in range(rng.randint(1, 14)):
        said = [("user", "hi")] if number == 0 else []
        if _chance(rng, 0.6) and running < 4:
            changes = [("start", running + 1)] if not running else [("complete", running), ("start", running + 1)]
            said += [("DST_UPDATE", [{"id": f"S{step}", "transition": what}]) for what, step in changes]
            running += 1
        said += [("assistant", rng.choice(TEXTS))] * _chance(rng, 0.8)
        for role, content in said:
            frame = math.floor(time * 2 + 1e-6)
            start, previous = {
                "event": (max(0, frame - 1), frame + 1),
                "window": (max(0, frame - 3), frame),
                "lead-in": (previous, max(previous, frame)),
            }[convention]
            turns.append({"role": role, "content": content, "time": time, "start_frame": start, "end_frame": previous})
        time = round(time + rng.choice((0.1, 0.3, 1.0, 2.5, 7.9)), 1)
    return turns


def clips(rng: random.Random, kind: str, count: int, base: int = 0) -> list[dict]:
    """`count` clips of one kind, with ids that do not repeat from `base` on."""
    convention = kind if kind in CONVENTIONS else rng.choice(CONVENTIONS)
    if kind == "generated":
        return generated(rng, convention, base, count)
    make = {"proassist": proassist_clip, "egoproactive": egoproactive_clip, "timed": timed_clip}
    mixed = rng.choices(("prospect", *make), (6, 3, 1, 1), k=count)
    kinds = enumerate(mixed if kind == "mixed" else [kind] * count, base)
    return [make[k](rng, i) if k in make else prospect_clip(rng, convention, i) for i, k in kinds]


def dump(rng: random.Random, found: list[dict]) -> bytes:
    """The file's bytes: an array, compact or indented, or JSON Lines."""
    if _chance(rng, 0.4):
        return "\n".join(json.dumps(clip, ensure_ascii=False) for clip in found).encode()
    return json.dumps(found, indent=rng.choice((None, 1))).encode()
