"""Write an annotation file of the public data's size: 28,000 clips, 17M frames, 1.1 GB of JSON (13 s, 80 MB).

Key names, their order and their types are those of the real clip (`shared/real/prospect_clip.json`), role by
role, and so is the layout of its frames: event ranges of two frames, `start <= time * fps < end`, the first
event at the clip's start and the last at its end. Sizes follow the public set: 258-1200 frames and 28-164
turns a clip, 8.8% of frames speaking, 3% with a state change; three clips (camera views) share a recording.

Clip `i` is a pure function of (seed, i // 3, i), so a smaller file is a prefix of a larger one. The text is
assembled from word lists: it compresses better than real speech, so sizes on disk are indicative only.

    python benchmarks/preprocess/generate.py --clips 28000 --out /tmp/bench/train_training.json
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

FPS = 2
SPAN = 2  # frames of an event range
MIN_FRAMES, MAX_FRAMES = 258, 1200
MIN_TURNS, MAX_TURNS = 28, 164
FULL_SIZE = 28_000  # clips
CHUNK = 200  # clips encoded and written at once: bounds the memory

VIEWS = ("HMC_84355350_mono10bit", "HMC_21179183_mono10bit", "HMC_21110305_mono10bit")
SYSTEM = (
    "You are a helpful and proactive assistant. Always be ready to assist and provide useful information ahead of time."
)
TOYS = [
    "roller", "truck", "excavator", "crane", "bulldozer", "mixer", "tractor", "loader", "tanker",
    "trailer", "jeep", "digger",
]  # fmt: skip
PARTS = [
    "chassis", "rear body", "front body", "cabin window", "arm connector", "first wheel",
    "second wheel", "roller", "hook", "bumper", "turntable", "water tank", "ladder", "dump bed",
    "engine cover", "light bar", "excavator arm", "blade", "interior", "figurine", "rear roof",
    "front axle", "track", "bucket",
]  # fmt: skip
VERBS = [
    "attach", "screw", "position", "align", "hold", "insert", "tighten", "inspect", "place", "push",
    "rotate", "clip", "press", "remove",
]  # fmt: skip
OPENINGS = [
    "Great!", "Now,", "Next,", "Well done!", "Good progress so far.", "Almost there.",
    "Perfect, that fits.", "Okay,", "Nice work on that.", "Take your time here.",
    "Be careful with this one.", "You are doing great.",
]  # fmt: skip
HOWS = [
    "Use the screwdriver and turn it until it stops",
    "Make sure that it sits flat and does not wobble",
    "Hold it with your left hand while you work with the right",
    "The notch has to face the front of the toy",
    "You should hear a small click when it is in place",
    "Check both sides before you go on",
    "Do not tighten it all the way yet, we will come back to it",
    "It should look the same on the other side",
]
ENDINGS = [
    "Let me know when you are done with it.",
    "Show me the result when it is ready, please.",
    "After that we are nearly finished with this step.",
    "Then we will go on with the next part.",
]
ASKS = [
    "Where does the {} go?",
    "Is the {} in the right place?",
    "I have finished with the {}, what is next?",
    "Do I need the screwdriver for the {}?",
    "The {} does not seem to fit.",
    "How many screws for the {}?",
]


@dataclass
class Totals:
    """What a file holds; the sides' outputs are compared with it."""

    clips: int = 0
    frames: int = 0
    turns: int = 0
    speaking: int = 0  # frames, counted once
    dst_update: int = 0


def pick(rng: random.Random, options: tuple[str, ...] | list[str]) -> str:
    return options[int(rng.random() * len(options))]


def instruction(rng: random.Random) -> str:
    first = f"{pick(rng, VERBS)} the {pick(rng, PARTS)} to the {pick(rng, PARTS)}"
    then = f"{pick(rng, VERBS)} it to the {pick(rng, PARTS)}"
    head = f"{pick(rng, OPENINGS)} Please {first}. {pick(rng, HOWS)}, then {then}."
    return f"{head} {pick(rng, HOWS)}. {pick(rng, ENDINGS)}"


def step_name(rng: random.Random) -> str:
    return f"{pick(rng, VERBS).title()} the {pick(rng, PARTS)}: {instruction(rng)} {pick(rng, HOWS)}."


def recording(seed: int, number: int) -> dict[str, Any]:
    """What the camera views of one recording share: its name, its goal and how dense its talk is."""
    rng = random.Random(f"{seed}:{number}")
    toy = f"{pick(rng, TOYS)} {pick(rng, TOYS)}"
    day = f"20{20 + number % 3}-{1 + int(rng.random() * 12):02d}-{1 + int(rng.random() * 28):02d}"
    person = 9000 + int(rng.random() * 99)
    return {
        "name": f"nusar-2021_action_both_{person}-{number:05x}_{person}_user_id_{day}_{number:06d}",
        "goal": f"Assembling a toy {toy} with {pick(rng, PARTS)}, {pick(rng, PARTS)} and {pick(rng, PARTS)}",
        "length": rng.betavariate(1.5, 2.65),
        "steps": [step_name(rng) for _ in range(64)],
    }


def event_starts(rng: random.Random, first: int, frames: int, moments: int) -> list[int]:
    """First frames of the events, two apart or more; the clip begins with one and ends with one."""
    between = rng.sample(range(1, (frames - SPAN) // SPAN), moments - 2)
    return [first, *(first + SPAN * k for k in sorted(between)), first + frames - SPAN]


def step_groups(rng: random.Random, changes: int) -> list[list[int]]:
    """Steps (from 1) that each state change starts, one or two at a time; the last change starts none."""
    groups: list[list[int]] = []
    step = 1
    for _ in range(changes - 1):
        size = 1 if rng.random() < 0.65 else 2
        groups.append(list(range(step, step + size)))
        step += size
    return [*groups, []]


def budget(rng: random.Random, frames: int, updates: int) -> tuple[int, int]:
    """(assistant turns, user turns) of a clip with so many DST turns, inside MIN_TURNS..MAX_TURNS."""
    speaking = max(8, round(frames * 0.0437 * (0.35 + 1.3 * rng.random())))
    speaking = min(speaking, MAX_TURNS - 4 - updates)
    users = max(1, round(speaking * 0.25 * rng.random()))
    users = max(users, min(speaking, MIN_TURNS - 1 - updates - speaking))
    users = min(users, MAX_TURNS - 1 - updates - speaking)
    return max(speaking, MIN_TURNS - 1 - updates - users), users


def clip_moments(rng: random.Random, changes: int, speaking: int) -> tuple[list[bool], list[bool]]:
    """Per moment: does the state change, does the assistant speak? The last one completes the last step."""
    alone = max(1, changes // 4)  # state changes that nobody comments, the last among them
    moments = max(changes, speaking + alone)
    inner = set(rng.sample(range(1, moments - 1), changes - 2))
    change = [k in inner or k in (0, moments - 1) for k in range(moments)]
    silent = set(rng.sample(sorted(inner), min(len(inner), moments - speaking - 1))) | {moments - 1}
    return change, [k not in silent for k in range(moments)]


def update_turn(step: int, what: str, at: dict[str, Any], state: dict[str, str]) -> dict[str, Any]:
    state.setdefault(f"S{step}", "not_started")
    turn = {
        "role": "DST_UPDATE",
        "content": [{"id": f"S{step}", "transition": what}],
        **at,
        "dst_state": dict(state),  # the state before the turn, steps not yet seen left out
        "labels": f"initiative|dst_update,dst_{what},steps_1",
    }
    state[f"S{step}"] = "in_progress" if what == "start" else "completed"
    return turn


def updates(groups: list[list[int]], number: int, at: dict[str, Any], state: dict[str, str]) -> list[dict[str, Any]]:
    """State change `number` of a clip: it completes the steps in progress and starts the next ones."""
    done = [update_turn(step, "complete", at, state) for step in (groups[number - 1] if number else [])]
    return done + [update_turn(step, "start", at, state) for step in groups[number]]


def user_turn(rng: random.Random, at: dict[str, Any], state: dict[str, str]) -> dict[str, Any]:
    text = pick(rng, ASKS).format(pick(rng, PARTS))
    return {"role": "user", "content": text, **at, "dst_state": dict(state), "labels": "user|generic"}


def assistant_turn(rng: random.Random, at: dict[str, Any], state: dict[str, str]) -> dict[str, Any]:
    frames = {"start_frame": at["start_frame"], "end_frame": at["end_frame"]}
    head = {"role": "assistant", "content": instruction(rng), "time": at["time"]}
    return {**head, "labels": "assistant|generic", **frames, "dst_state": dict(state)}


def conversation(rng: random.Random, first: int, frames: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(turns in order of time, steps with their times)."""
    changes = max(5, round(frames * 0.0151 * (0.7 + 0.6 * rng.random())))
    groups = step_groups(rng, changes)
    speaking, users = budget(rng, frames, 2 * sum(map(len, groups)))
    change, speak = clip_moments(rng, changes, speaking)
    asked = {0, *rng.sample([k for k, s in enumerate(speak) if s and k], users - 1)}
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": SYSTEM, "start_frame": 0, "end_frame": 1, "labels": "system|generic"}
    ]
    state: dict[str, str] = {}
    times: list[float] = []  # of the state changes
    for k, start in enumerate(event_starts(rng, first, frames, len(change))):
        seconds = (5 * (start + 1) + int(rng.random() * 5)) / 10  # floor(time * fps) == start + 1
        at = {"time": seconds, "start_frame": start, "end_frame": start + SPAN}
        if change[k]:
            turns.extend(updates(groups, len(times), at, state))
            times.append(seconds)
        if k in asked:
            turns.append(user_turn(rng, at, state))
        if speak[k]:
            turns.append(assistant_turn(rng, at, state))
    spans = [(step, a, b) for group, a, b in zip(groups, times, times[1:], strict=False) for step in group]
    return turns, [{"type": "step", "id": f"S{step}", "start_ts": a, "end_ts": b} for step, a, b in spans]


def count(frames: int, turns: list[dict[str, Any]]) -> Totals:
    """What one clip adds to the totals. Events never overlap: two share a range or are apart."""
    spoken = {turn["start_frame"] for turn in turns if turn["role"] == "assistant"}
    changed = {turn["start_frame"] for turn in turns if turn["role"] == "DST_UPDATE"}
    return Totals(1, frames, len(turns), SPAN * len(spoken), SPAN * len(changed))


def make_clip(seed: int, index: int, shared: dict[str, Any]) -> tuple[dict[str, Any], Totals]:
    """Clip `index` of a file, in the real clip's key order, with what it holds."""
    rng = random.Random(f"{seed}:{index // 3}:{index}")
    share = min(1.0, shared["length"] * (0.9 + 0.2 * rng.random()))
    frames = MIN_FRAMES + round((MAX_FRAMES - MIN_FRAMES) * share)
    first = 20 + int(rng.random() * 400)
    turns, steps = conversation(rng, first, frames)
    names = shared["steps"][: len(steps)]
    uid = f"assembly_{shared['name']}__{VIEWS[index % 3]}"
    listed = "\n".join(f"{k}. {name}" for k, name in enumerate(names, 1))
    clip = {
        "video_uid": uid,
        "inferred_goal": shared["goal"],
        "inferred_knowledge": f"{shared['goal']}\n{listed}",
        "video_labels": {},
        "conversation": turns,
        "dst": [{**step, "name": name} for step, name in zip(steps, names, strict=True)],
        "frames_file": f"data/assembly101/frames/{uid}.arrow",
        "start_frame_idx": first,
        "end_frame_idx": first + frames,
        "seq_len": frames + 40 * len(turns),
        "dataset": "assembly101",
        "clip_idx": 0,
        "max_seq_len": 4096,
        "num_tokens_per_img": 1,
        "fps": FPS,
        "quality": int(rng.random() * 41 + 10) / 10,
    }
    return clip, count(frames, turns)


def make_clips(seed: int, clips: int, totals: Totals) -> Iterator[dict[str, Any]]:
    """The clips of a file in order; `totals` is added to."""
    shared: dict[str, Any] = {}
    for index in range(clips):
        if index % 3 == 0:
            shared = recording(seed, index // 3)
        clip, own = make_clip(seed, index, shared)
        for key, value in asdict(own).items():
            setattr(totals, key, getattr(totals, key) + value)
        yield clip


def write(path: Path, clips: int, seed: int = 0) -> Totals:
    """Write the file (the bytes of `json.dump(..., indent=2)`) and return what it holds."""
    totals, part = Totals(), path.with_suffix(".part")
    source = make_clips(seed, clips, totals)
    with part.open("wb") as file:
        file.write(b"[")
        for done in range(0, clips, CHUNK):
            chunk = [next(source) for _ in range(min(CHUNK, clips - done))]
            body = orjson.dumps(chunk, option=orjson.OPT_INDENT_2)
            file.write(b",\n" if done else b"\n")
            file.write(memoryview(body)[2:-2])  # without its own "[\n" and "\n]"
        file.write(b"\n]")
    path.with_suffix(".totals.json").write_bytes(orjson.dumps(asdict(totals)))
    part.replace(path)
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=FULL_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    totals = write(options.out, options.clips, options.seed)
    size = options.out.stat().st_size / 1e6
    print(f"{options.out}: {size:,.1f} MB in {time.perf_counter() - began:.1f} s; {totals}")


if __name__ == "__main__":
    main()
