"""Seeded generators of hostile input files, one per convention, and mutations that make a clip malformed.

Each takes a `random.Random`, so the same code serves seeded bulk tests and hypothesis
(`st.randoms(use_true_random=False)`, which shrinks). Files mostly obey their convention (about 4% of the
votes do not), and are nasty everywhere else: absolute offsets up to 2**31, co-timed turns, empty, outside,
unframed and untimed turns, ranges that end exactly at the clip's end, 193.0 for 193.

    rng   random.Random      clip   dict, as in DESIGN.md      f   absolute frame
"""

from __future__ import annotations

import copy
import json
import math
import random
from itertools import pairwise

FPS = (None, 1, 2, 2.0, 5, 29.97)
OFFSETS = (0, 1, 7, 193, 5000, 999_999, 2**31 - 3000)
LENGTHS = (1, 2, 3, 5, 20, 60, 200)
CONVENTIONS = ("event", "window", "lead-in")
KINDS = (*CONVENTIONS, "proassist", "egoproactive", "generated", "timed", "mixed")
KNOWLEDGE = (None, "", [], ["one"], ["1. one", "2. two"], "k\nk", 7, [1], {"a": "b"})  # of any type: never a reason
TEXTS = ("Now attach it.", "", "çé ✓ 部品", 'a "quoted" \\ back', "line\nbreak\ttab", "} ] , {", "\u2028x")
STATES = ("not_started", "in_progress", "completed", "paused", "cancelled", "failed")
TRANSITIONS = ("start", "complete", "pause", "resume", "cancel", "reset", "fail")


# ---- turns -------------------------------------------------------------------------------------------


def _chance(rng: random.Random, p: float) -> bool:
    return rng.random() < p


def _number(rng: random.Random, value: int):
    """A frame number, now and then as a whole float."""
    return float(value) if _chance(rng, 0.1) else value


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
    if _chance(rng, 0.3):
        time = round(time, 1)
    if _chance(rng, 0.1):
        time = math.floor(time)
    return time, math.floor(time * fps + 1e-6)


def _turn(rng: random.Random, role: str, time: float | None, start: int, end: int) -> dict:
    turn = {"role": role, "content": _content(rng, role)}
    if time is not None:
        turn["time"] = time
    elif _chance(rng, 0.3):
        turn["time"] = None
    if start <= end and start >= 0:
        turn |= {"start_frame": _number(rng, start), "end_frame": _number(rng, end)}
    if _chance(rng, 0.3):
        turn |= {"labels": "x|y", "dst_state": {"S1": "not_started"}, "progress": None}
    return turn


def _noise(rng: random.Random, turn: dict, start: int, end: int) -> dict:
    """A turn with odd frames that do not make the clip malformed; mostly untimed, so that it has no vote."""
    at, most = rng.randint(start, end), 2**31 - 2
    odd = [
        {}, {"start_frame": at}, {"end_frame": at}, {"start_frame": None, "end_frame": None},
        *({"start_frame": min(a, most), "end_frame": min(b, most)} for a, b in (
            (at, at), (end, end), (max(0, start - 5), start), (end, end + 4), (0, most), (max(0, start - 3), end + 3),
            (start, end), (end - 1, end),
        )),
    ]  # fmt: skip
    gone = ("start_frame", "end_frame", "time") if _chance(rng, 0.85) else ("start_frame", "end_frame")
    return {name: value for name, value in turn.items() if name not in gone} | rng.choice(odd)


def _turns(rng: random.Random, convention: str, start: int, end: int, fps: float) -> list[dict]:
    """Moments of one to three turns (often DST, DST, assistant); ranges often end with the clip."""
    reach = rng.choice((0, 0, 0, 6))  # some clips have turns before and after their bounds
    low, high = start if convention == "lead-in" else max(0, start - reach), end + reach
    moments = sorted(_moment(rng, low, high, fps) for _ in range(rng.choice((0, 1, 2, 3, 5, 8))))
    common = (["DST_UPDATE", "DST_UPDATE", "assistant"], ["assistant"], ["user", "assistant"], ["DST_UPDATE"])
    turns, previous = [], start
    for time, frame in moments:
        step = rng.randint(0, 1)
        for role in rng.choice((*common, rng.choices(("user", "assistant", "DST_UPDATE"), k=2))):
            stop = frame + 1 + rng.choice((0, 0, 1, 2, 7))
            if frame < end and _chance(rng, 0.2):
                stop = max(end + rng.choice((0, 0, 1, -1)), frame + 1)
            span = {
                "lead-in": (previous, max(previous, frame + step)),
                "window": (max(0, frame - rng.randint(0, 3)), frame),
                "event": (max(0, frame - rng.choice((0, 0, 1, 2, 7))), stop),
            }[convention]
            turn = _turn(rng, role, None if _chance(rng, 0.1) else time, *span)
            if _chance(rng, 0.08):
                turn = _noise(rng, turn, start, end)
            elif turn.get("time") is not None and "end_frame" in turn:
                previous = span[1]
            turns.append(turn)
    return turns


# ---- clips -------------------------------------------------------------------------------------------


def prospect_clip(rng: random.Random, convention: str, serial: int) -> dict:
    """A valid clip of the prospect schema whose turns mostly obey the convention."""
    fps, start = rng.choice(FPS), rng.choice(OFFSETS) + rng.randint(0, 3)
    end = start + rng.choice(LENGTHS)
    turns = _turns(rng, convention, start, end, 2 if fps is None else fps)
    name = rng.choice(("nusar-2021_{}__HMC_1_mono", "a..b {}", "dir/sub {}", "vid_{}"))
    clip = {"conversation": turns, "video_uid": name.format(serial // 3)}
    clip |= rng.choice(({"id": f"clip/{serial}"}, {"id": serial, "clip_idx": serial % 3}, {"clip_idx": serial % 3}))
    if _chance(rng, 0.7):
        system = {"role": "system", "content": "You help.", "start_frame": 0, "end_frame": 1}
        if _chance(rng, 0.2):
            system["time"] = 0.0
        turns.insert(rng.choice((0, 0, 0, len(turns))), system)
    if fps is not None:
        clip["fps"] = fps
    if _chance(rng, 0.6):
        clip["dst"] = [{"type": "step", "id": f"S{i}", "name": f"{i}", "start_ts": 1.0} for i in range(1, 4)]
    elif _chance(rng, 0.5):
        clip["dst"] = rng.choice(([], None, {}, {"steps": [{"id": 1, "name": "x"}]}, {"steps": None}))
    if _chance(rng, 0.2):
        states = {f"S{i}": rng.choice(STATES) for i in rng.sample(range(1, 5), rng.randint(0, 3))}
        clip["initial_dst_state"] = rng.choice((states, states, None))
    if _chance(rng, 0.4):
        clip["neg_frame_sampling_rate"] = rng.choice((0, 0.0, 0.1, 0.7, 1, 1.0, None))
    if _chance(rng, 0.3):
        clip |= {"quality": rng.choice((3.5, None, [1])), "video_labels": {}, "seq_len": 818, "dataset": "d"}
    if _chance(rng, 0.3):
        clip |= {"inferred_goal": rng.choice(("g", "", None, 3)), "inferred_knowledge": rng.choice(KNOWLEDGE)}
        clip["frames_file"] = "f/a.arrow"
    if _chance(rng, 0.2):
        about = {"user_id": rng.choice(("a_0", "a_0", 3)), "knowledge": rng.choice(KNOWLEDGE), "task_goal": "t"}
        clip["metadata"] = rng.choice((about, about, None, [], "text"))
    # bounds, or one or both left out where they can be inferred without emptiness
    frames = [(t.get("start_frame"), t.get("end_frame")) for t in turns if t["role"] != "system"]
    spans = [span for span in frames if None not in span]
    low, high = (min(s for s, _ in spans), max(e for _, e in spans)) if spans else (0, 0)
    both = {"start_frame_idx": _number(rng, start), "end_frame_idx": _number(rng, end)}
    if 0 < high - low < 20_000 and high < 2**31 - 1 and low < end and _chance(rng, 0.25):
        first = {"start_frame_idx": start} if high > start else both
        both = rng.choice((first, {"end_frame_idx": end}, {}, dict.fromkeys(both)))
    items = list((clip | both).items())
    rng.shuffle(items)
    return dict(items)


def proassist_clip(rng: random.Random, serial: int) -> dict:
    """A valid clip of the ProAssist schema; three conversations share a video and a clip number."""
    start = rng.choice(OFFSETS) + rng.randint(0, 3)
    turns, at = [{"role": "system", "content": "You are proactive."}], start
    if _chance(rng, 0.2):
        turns.append({"role": rng.choice(("assistant", "user")), "content": "before any frame"})
    for _ in range(rng.choice((1, 2, 3, 6, 10))):
        upto = at + rng.choice((1, 1, 2, 5, 30))
        turns.append({"role": "frames", "start": _number(rng, at), "end": _number(rng, upto)})
        at = upto
        for role in rng.choices(("user", "assistant", "assistant"), k=rng.choice((0, 1, 1, 1, 2, 3))):
            turns += [{"role": role, "time": at / 2, "content": rng.choice(TEXTS), "labels": ""}]
        if _chance(rng, 0.1):
            turns.append({"role": "system", "content": "Please summarize the progress."})
            turns.append({"role": "assistant", "content": "The summary."})
        if _chance(rng, 0.05):
            turns.append({"role": "DST_UPDATE", "content": _content(rng, "DST_UPDATE")})
    quality = math.nan if _chance(rng, 0.03) else 9.0  # not read, so harmless
    clip = {
        "dataset": "assembly101", "video_uid": f"pro_{serial // 3}", "clip_idx": 0, "conversation": turns,
        "frames_file": "frames/x.arrow", "metadata": {"user_id": f"talk_{serial % 3}", "quality": quality},
    }  # fmt: skip
    clip["metadata"] |= {"knowledge": rng.choice(KNOWLEDGE), "add_knowledge": rng.choice((True, False, None))}
    if _chance(rng, 0.15):
        clip["metadata"]["summary_only"] = True
    elif _chance(rng, 0.1):
        clip["neg_frame_sampling_rate"] = rng.choice((-1, -1.0))
    if _chance(rng, 0.7):
        shift = rng.choice((0, 0, 1))  # a clip that is a frame shorter than its turns
        clip |= {"start_frame_idx": start, "end_frame_idx": max(start + 1, at - shift)}
    if _chance(rng, 0.5):
        clip["fps"] = 2
    if _chance(rng, 0.1):
        clip["dst"] = [{"id": "S1", "name": "one"}]
    return clip


def egoproactive_clip(rng: random.Random, serial: int) -> dict:
    """A valid session: chunks with and without gaps between them, some of no length; answers with the tag or none."""
    at, intervals = rng.choice((0.0, 0.0, 0.25, 3.1)), []
    for _ in range(rng.choice((1, 2, 5, 12))):
        start = at + rng.choice((0.0, 0.0, 0.0, 2.5, 16.3))
        at = start + rng.choice((8.0, 8.0, 8.0, 3.7, 0.4, 0.0))
        intervals.append([round(start, 2), round(at, 2)])
    intervals[-1][1] = max(intervals[-1][1], 0.6)
    said = ("$silent$", "$silent$", "$interrupt$Now.", "$interrupt$ Ja, üb. ", "\n $interrupt$x", "$interrupt$", "x")
    answers, history, dialog = [rng.choice(said) for _ in intervals], [], []
    for answer in answers:
        dialog.append(list(history))
        history = history + [{"role": "assistant", "text": answer}] * ("$interrupt$" in answer)
    clip = {"video_path": f"val/s{serial}.mp4", "video_intervals": intervals, "answers": answers, "dialog": dialog}
    length = intervals[-1][1] + rng.choice((0, 0, 0, 5.2, -3))
    clip |= {"domain": "d", "task": rng.choice(("t", None, ["a", "b"], 5)), "duration_in_sec": length}
    return clip | rng.choice(({}, {"query": None}, {"query": "How?"}, {"query": "How?"}))


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
        segments = []
        for low, high in pairwise(cuts):
            times = moments[max(0, low - (low > 0)) : high]  # with the moment before
            segments.append([t for t in turns if t["time"] in times])
        for i, segment in enumerate(segments):
            updates = [u for t in segment if t["role"] == "DST_UPDATE" for u in t["content"]]
            state = state | {u["id"]: became[u["transition"]] for u in updates}
            clip = {"video_uid": video, "clip_idx": i, "id": f"gen {number}", "fps": 2, "dataset": "d"}
            spans = [(t["start_frame"], t["end_frame"]) for t in segment if t["role"] == "DST_UPDATE"] or [(0, 0)]
            clip |= {"start_frame_idx": min(s for s, _ in spans), "end_frame_idx": max(e for _, e in spans)}
            clip["dst"] = [{"type": "step", "id": f"S{k}", "name": f"{k}"} for k in range(1, 5)]
            clip["metadata"] = {"user_id": user, "knowledge": [], "summary_only": False}
            system = {"role": "system", "content": f"Step states - {state}", "start_frame": 0, "end_frame": 1}
            clip["conversation"] = [system, *copy.deepcopy(segment)]
            if len(segments) > 1 and _chance(rng, 0.9):
                clip["initial_dst_state"] = {} if i == len(segments) - 1 else dict(state)
            if _chance(rng, 0.04):  # a clip of another origin
                clip |= {"start_frame_idx": 0, "end_frame_idx": 400}
            if _chance(rng, 0.9):  # else lost on the way
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
        if _chance(rng, 0.8):
            said.append(("assistant", rng.choice(TEXTS)))
        for role, content in said:
            frame = math.floor(time * 2 + 1e-6)
            span = {
                "event": (max(0, frame - 1), frame + 1),
                "window": (max(0, frame - 3), frame),
                "lead-in": (previous, max(previous, frame)),
            }[convention]
            previous = span[1]
            turn = {"role": role, "content": content, "time": time}
            turns.append(turn | {"start_frame": span[0], "end_frame": span[1]})
        time = round(time + rng.choice((0.1, 0.3, 1.0, 2.5, 7.9)), 1)
    return turns or [{"role": "user", "content": "hi", "time": time, "start_frame": 0, "end_frame": 1}]


def timed_clip(rng: random.Random, serial: int) -> dict:
    """A valid clip whose turns have times but no frames."""
    clip = prospect_clip(rng, "event", serial) | {"fps": rng.choice((1, 2, 29.97))}
    clip = {name: value for name, value in clip.items() if not name.endswith("_frame_idx")}
    time = rng.choice((0, 0.4, 200.0))
    for turn in clip["conversation"]:
        turn.pop("start_frame", None)
        turn.pop("end_frame", None)
        if turn.get("time") is not None or turn["role"] != "system":
            turn["time"] = time = time + rng.choice((0, 0, 0.3, 1.5, 20.2))
    if not any(turn["role"] != "system" for turn in clip["conversation"]):
        clip["conversation"].append({"role": "user", "content": "hi", "time": 3.0})
    if _chance(rng, 0.3):
        clip |= {"start_frame_idx": 0, "end_frame_idx": rng.choice((5, 500))}
    return clip


def clips(rng: random.Random, kind: str, count: int, base: int = 0) -> list[dict]:
    """`count` valid clips of one kind, with ids that do not repeat from `base` on."""
    convention = rng.choice(CONVENTIONS)
    if kind == "generated":
        return generated(rng, convention, base, count)
    make = {
        "proassist": proassist_clip,
        "egoproactive": egoproactive_clip,
        "timed": timed_clip,
        "prospect": lambda rng, serial: prospect_clip(rng, convention if kind == "mixed" else kind, serial),
    }
    others = rng.choices(("prospect", "proassist", "egoproactive", "timed"), (6, 3, 1, 1), k=count)
    kinds = others if kind == "mixed" else [kind if kind in make else "prospect"] * count
    return [make[kinds[i]](rng, base + i) for i in range(count)]


def file_of(rng: random.Random, kind: str, count: int, bad: float = 0.15, base: int = 0) -> list:
    """A file's clips with malformed ones in between (a share `bad` of the good ones)."""
    result: list = []
    for clip in clips(rng, kind, count, base):
        result.append(clip)
        if _chance(rng, bad):
            result.append(broken(rng, clip))
    return result


def dump(rng: random.Random, found: list) -> bytes:
    """The file's bytes: an array (compact or indented), JSON Lines, or one object where there is one clip."""
    ascii_only = _chance(rng, 0.5)
    if len(found) == 1 and isinstance(found[0], dict) and _chance(rng, 0.5):
        return json.dumps(found[0], indent=rng.choice((None, 1)), ensure_ascii=ascii_only).encode()
    if all(isinstance(c, dict) for c in found) and _chance(rng, 0.4):
        ending = rng.choice(("\n", "\r\n"))
        text = ending.join(json.dumps(c, ensure_ascii=ascii_only) for c in found)
        return (text + rng.choice(("", ending))).encode()
    return json.dumps(found, indent=rng.choice((None, None, 1)), ensure_ascii=ascii_only).encode()


# ---- malformed ---------------------------------------------------------------------------------------

GONE = object()  # the field is left out
MUTATIONS = [  # fields of a clip
    *({"video_uid": uid} for uid in (GONE, None, "../up", "a\\..\\..\\up", "/etc/passwd", "a\0b")),
    *({"frames_file": path} for path in ("data/../../x.arrow", 1)),
    *({"conversation": turns} for turns in (GONE, None)),
    *({"start_frame_idx": 0, "end_frame_idx": end} for end in (1_000_001, 10**9)),
    *({"start_frame_idx": start, "end_frame_idx": 5} for start in (5, 9, 1.5, True)),
    {"start_frame_idx": 2**31, "end_frame_idx": 2**31 + 5},
    *({"fps": fps} for fps in (0, "2", math.nan)),
    *({"neg_frame_sampling_rate": rate} for rate in (1.5, math.nan)),
    *({"dst": steps} for steps in ("S1", [{"name": "one"}])),
    {"initial_dst_state": {"S1": "exploded"}},
    {"id": ["x"]},
    {"clip_idx": 0.5},
    *({"conversation": [{"role": "user", "content": "hi", "time": time}], "fps": fps, "start_frame_idx": 0,
       "end_frame_idx": 9} for time, fps in ((3.0, None), (-3.0, 2))),
    *({"+": turn} for turn in ("hi", None)),
    *({"+": {"role": role}} for role in (GONE, "robot")),
    *({"+": {"content": content}} for content in (GONE, ["hi"])),
    *({"+": {"role": "DST_UPDATE", "content": content}} for content in (
        "what a day", 3, ["S1->start"], [{"transition": "start"}], [{"id": 1, "transition": "start"}],
        [{"id": "S1", "transition": "explode"}],
    )),
    *({"+": {"time": time}} for time in (math.nan, math.inf, "3.0")),
]  # fmt: skip
TURN_MUTATIONS = [  # only where turns carry start_frame/end_frame: a ProAssist turn has none to read
    *({"+": {"start_frame": start}} for start in (-1, 6.5, 9)),
    *({"+": {"start_frame": 0, "end_frame": end}} for end in (True, math.inf, 2**31, 2**64 + 5)),
    {"+": {"start_frame": -3, "end_frame": -1}},
    {"+": {"role": "system", "start_frame": -1, "end_frame": 1}},
]
FRAMES_MUTATIONS = [
    {"+": {"role": "frames", "start": start, "end": end}} for start, end in ((9, 8), (1.5, 8), (1, True), (1, 2**31))
]
SESSION_MUTATIONS = [
    *({"video_path": path} for path in (GONE, "../x.mp4")),
    *({"video_intervals": chunks, "answers": ["$silent$"] * len(chunks)} for chunks in (
        [], [[8, 0]], [[8, 16], [0, 8]], [[0, 8], [7, 16]], [[0, math.nan]],
    )),
    *({"answers": answers} for answers in (GONE, [])),
    {"fps": 0},
]  # fmt: skip
NOT_A_CLIP = (None, 3, "clip", [{"video_uid": "x", "conversation": []}])


def mutated(clip: dict, change: dict) -> dict:
    """A copy of a valid clip with other fields, or ("+") with one more turn; its id is its own: it is no duplicate."""
    result = copy.deepcopy(clip)
    result["id"] = f"bad {change} of {clip.get('id')} {clip.get('video_uid')} {clip.get('clip_idx')}"
    result |= {name: value for name, value in change.items() if name != "+"}
    turn = change.get("+")
    if isinstance(turn, dict) and turn.get("role") != "frames":
        turn = {"role": "user", "content": "hi", "time": 3.0, "start_frame": 6, "end_frame": 7} | turn
        turn = {name: value for name, value in turn.items() if value is not GONE}
    result["conversation"] = (
        [*clip.get("conversation", []), turn] if "+" in change else result.get("conversation", GONE)
    )
    return {name: value for name, value in result.items() if value is not GONE}


def broken(rng: random.Random, clip: dict):
    """A malformed neighbour of a clip: mutated, no object at all, or its duplicate."""
    kind = rng.randint(0, 9)
    if kind == 0:
        return rng.choice(NOT_A_CLIP)
    if kind == 1:
        return copy.deepcopy(clip)  # an exact duplicate: the first is kept
    if "video_intervals" in clip:
        return mutated(clip, rng.choice(SESSION_MUTATIONS))
    proassist = any(t["role"] == "frames" for t in clip["conversation"])
    return mutated(clip, rng.choice(MUTATIONS + (FRAMES_MUTATIONS if proassist else TURN_MUTATIONS)))
