"""Synthetic task videos with conversations, in the same files a user has: something to try every command on.

A recording is one task of 8 to 12 steps, filmed by several cameras (`views`): same events, other pictures. Before a
moving background with clutter and a passing hand, three things happen, 5 to 8 frames apart: a *placement* (a white jig
with a coloured part is in view for 3 frames; one frame after it appears the step is complete, the next one starts), a
*lamp* (magenta; the assistant speaks one frame after it appears), a *question* of the user's, answered one frame later.
What tells when the assistant speaks is drawn for each step from the shares in `tells`:

    vision     a coin decides whether the completed step is spoken about; the lamp shows it
    state      the toy's plan decides (three toys, one each): the step is called "Fit the axle aloud" or "... quietly"
    user       the user speaks, to the assistant, which answers one frame later, or to others: what is said tells
    history    the user asks; the assistant answers one frame later and speaks again FOLLOW_UPS frames after that
    nothing    it speaks REMARKS times a frame, on average, whatever happens

Clips are cut from mid-task, in the quiet around their events: no picture shows how far the task has come. Lamps of
their own and answered questions stand between the steps of `vision` and `state` alone.

    F frames of a video, P pixels of a side
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.random import Generator, default_rng
from PIL import Image

from pipeline.errors import UsageError
from pipeline.state import replay
from pipeline.storage import is_vacant, make_folder

SPLITS: Final = ("train", "val", "test")
SOURCES: Final = ("state", "vision", "user", "history", "nothing")  # of what tells when to speak
FPS: Final = 2
CUE_FRAMES: Final = 3  # a cue is in view for frame, frame + 1, frame + 2
FOLLOW_UPS: Final = (6, 14)  # frames
REMARKS: Final = 0.1  # per frame

_PARTS: Final = "axle wheel gear lever spring bolt plate handle hook ring cap tube crank panel hinge pin".split()  # noqa: SIM905
# Which of a toy's steps are spoken about (a) and which pass quietly (q), where the plan decides.
_PLANS: Final = {"Crane": "aaqaqqqaaqaqaqqa", "Truck": "qaqqaaaqqaqaqaaq", "Robot": "aqqaaqaqaaqqqaqa"}
_SAID: Final = {  # by the user in a question or an aside to others, by the assistant
    "question": ("Is this right?", "Can I go on?", "Does it fit?"),
    "aside": ("Where is my tea, Tom?", "What a day, Ann!", "Did you call her, Tom?"),
}
_REPLIES: Final = {
    "placement": ("Good, that part is in.", "Well done, next part."),
    "lamp": ("Mind the lamp.", "The lamp is on, wait."),
    "question": ("Yes, go on.", "Yes, it is fine."),
    "follow-up": ("Still going well?", "Take your time."),
    "remark": ("Nice weather today.", "Time flies."),
}
_COLOURS: Final = np.array(
    [(200, 40, 40), (40, 150, 60), (50, 80, 200), (220, 170, 40), (230, 120, 40), (40, 160, 170)], np.float32
)
_HAND, _JIG, _LAMP = np.array([(205, 150, 120), (250, 250, 250), (240, 40, 220)], np.float32)


@dataclass(frozen=True)
class SynthConfig:
    """What to write. `difficulty` of seeing runs from 0 to 1; `tells`: shares of SOURCES, which add up to 1."""

    recordings: Mapping[str, int] = field(default_factory=lambda: {"train": 190, "val": 15, "test": 15})
    views: int = 2  # cameras per recording
    steps: tuple[int, int] = (8, 12)  # fewest and most of a task
    events_per_clip: tuple[int, int] = (4, 6)  # fewest and most; a video's last clip can have a few more
    px: int = 64  # side of the square frames
    difficulty: float = 0.25  # clutter, its speed, noise, contrast; from 0.5 clutter in the cues' colours
    tells: Mapping[str, float] = field(default_factory=lambda: {"vision": 1.0})
    seed: int = 0


def parse_tells(text: str) -> dict[str, float]:
    """'user', or shares such as 'state=0.7,vision=0.3'. UsageError where they are no shares of SOURCES."""
    items = [item.partition("=") for item in text.split(",")]
    try:
        shares = {name.strip(): float(share) if equals else 1.0 for name, equals, share in items}
    except ValueError:
        shares = {}
    known, positive = set(shares) <= {*SOURCES}, min(shares.values(), default=-1) >= 0
    if not (known and positive and abs(sum(shares.values()) - 1) < 1e-9):
        raise UsageError(f"--tells {text!r}: expected {', '.join(SOURCES)}, or NAME=SHARE,... that add up to 1")
    return shares


# ---- what happens in a recording ---------------------------------------------------------------------


@dataclass
class Event:
    """Its turns start one frame later, an aside's and a question's at once."""

    kind: str  # placement, lamp, question, aside (the user speaks to others) or remark (of the assistant)
    frame: int = 0
    step: int = -1  # of a placement, from 0
    speaks: bool = True  # the assistant says something
    lamp: bool = False  # and the picture shows it
    follow_ups: tuple[int, ...] = ()  # it speaks again, frames after it spoke


class Recording(NamedTuple):
    """One take: what every camera sees and hears. `clips` are half-open frame ranges."""

    name: str  # nusar-train-0007
    goal: str
    step_names: list[str]
    events: list[Event]
    clips: list[tuple[int, int]]
    num_frames: int


def _between(rng: Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def plan_recording(name: str, rng: Generator, config: SynthConfig) -> Recording:
    """A recording's plan, events and clips: a pure function of the generator's state and the config."""
    num_steps = _between(rng, *config.steps)
    toy = str(rng.choice(list(_PLANS)))
    share = {source: config.tells.get(source, 0.0) for source in SOURCES}
    sources = rng.choice(SOURCES, num_steps, p=list(share.values())).tolist()
    coins = (rng.random(num_steps) < 0.5).tolist()
    events: list[Event] = []
    words = []  # that tell of a step whether it is spoken about, where the plan decides
    for step, (source, coin, plan) in enumerate(zip(sources, coins, _PLANS[toy], strict=False)):
        while rng.random() < 0.35 * (share["state"] + share["vision"]) - 0.2 * share["state"]:
            events.append(Event("question") if rng.random() < 0.5 else Event("lamp", lamp=True))
        if source == "history":
            events.append(Event("question", follow_ups=FOLLOW_UPS))
        if source == "user":
            questions = [rng.random() < 0.5 for _ in range(_between(rng, 1, 2))]
            events += [Event("question") if one else Event("aside", speaks=False) for one in questions]
        speaks = plan == "a" if source == "state" else coin and source == "vision"
        events.append(Event("placement", 0, step, speaks, lamp=coin and source == "vision"))
        words.append((" aloud" if speaks else " quietly") if source == "state" else "")
    low, high = config.events_per_clip
    cuts = [_between(rng, 0, min(3, max(0, len(events) - low)))]  # events at which clips start
    while (rest := len(events) - cuts[-1]) > high + 2 and rest >= 2 * low:
        cuts.append(cuts[-1] + _between(rng, low, min(high, rest - low)))
    cuts.append(len(events))
    clips: list[tuple[int, int]] = []
    start, frame = -1, _between(rng, 6, 12)
    for number, event in enumerate(events):
        if number in cuts:
            if start >= 0:
                clips.append((start, frame))
                frame += _between(rng, 0, 4)  # between two clips
            start = frame
            frame += _between(rng, 2, 6)  # before a clip's first event
        event.frame = frame
        frame += max(event.follow_ups, default=0)
        frame += CUE_FRAMES + (_between(rng, 3, 7) if number + 1 in cuts else _between(rng, 2, 5))
    clips.append((start, frame))
    num_frames = frame + _between(rng, 1, 4)
    if rate := share["nothing"] * REMARKS:  # a Poisson process; no two turns of the assistant share a frame
        taken = {event.frame + after for event in events if event.speaks for after in (0, *event.follow_ups)}
        for start, end in clips:
            for frame in (start - 1 + np.flatnonzero(rng.random(end - start - 2) < rate)).tolist():
                if not taken & {frame - 1, frame, frame + 1}:
                    taken.add(frame)
                    events.append(Event("remark", frame))
        events.sort(key=lambda event: event.frame)
    parts = rng.permutation(len(_PARTS))[:num_steps]
    names = [f"Fit the {_PARTS[part]}{word}" for part, word in zip(parts, words, strict=True)]
    return Recording(name, f"Building a Toy {toy}", names, events, clips, num_frames)


# ---- what a camera sees ------------------------------------------------------------------------------


def draw_view(recording: Recording, rng: Generator, config: SynthConfig) -> np.ndarray:
    """uint8 frames [F, P, P, 3] of one camera: its own background, clutter, noise and places of the cues."""
    px, hard, count = config.px, config.difficulty, recording.num_frames
    # a window that wanders over a smooth texture of twice its side, duller than parts and cues
    coarse = rng.uniform(30, 110, (8, 8, 3))
    coarse = 0.5 * coarse + 0.5 * coarse.mean(axis=2, keepdims=True)
    smooth = Image.fromarray(coarse.astype(np.uint8)).resize((2 * px, 2 * px), Image.Resampling.BICUBIC)
    texture = np.asarray(smooth, np.float32)
    path = _walk(rng, count, px / 2, px / 64 * (0.5 + 2 * hard)).clip(0, px).astype(np.int64)  # [F, 2]
    frames = np.stack([texture[top : top + px, left : left + px] for top, left in path.tolist()])
    # clutter and a hand (the last) that move through the picture and come round again
    colours = _COLOURS if hard < 0.5 else np.concatenate([_COLOURS, _JIG[None], _LAMP[None]])
    for radius in (*rng.uniform(2, 5, 2 + round(6 * hard)), 8.0):
        path = _walk(rng, count, rng.uniform(0, px), px / 64 * (1 + 3 * hard))
        colour = _HAND if radius == 8.0 else colours[rng.integers(len(colours))]
        _add_disc(frames, path % (1.5 * px) - px / 4, radius * px / 64, colour)
    strength = 1 - 0.5 * hard  # of cues: at 1 half of what was there shines through
    for event in recording.events:
        cue = frames[event.frame : event.frame + CUE_FRAMES]
        if event.kind == "placement":  # a white square with a coloured disc in the lower three quarters
            side = int(rng.uniform(0.45, 0.55) * px)
            top, left = int(rng.integers(px // 4, px - side + 1)), int(rng.integers(px - side + 1))
            square = cue[:, top : top + side, left : left + side]
            square += strength * (_JIG - square)
            middle = np.tile([top + side / 2, left + side / 2], (len(cue), 1))
            _add_disc(cue, middle, side / 4, _COLOURS[rng.integers(len(_COLOURS))])
        if event.lamp:  # a bar in the upper quarter
            left = int(rng.integers(px // 2 + 1))
            bar = cue[:, px // 32 : px // 4 - px // 32, left : left + px // 2]
            bar += strength * (_LAMP - bar)
    noise = rng.normal(0, 1 + 8 * hard, (2 * px, 2 * px)).astype(np.float32)
    shift = rng.integers(0, px, (count, 2))  # of one sheet: drawing each frame's noise anew costs 4 times as much
    for frame, (top, left) in zip(frames, shift.tolist(), strict=True):
        frame += noise[top : top + px, left : left + px, None]
    return frames.clip(0, 255).astype(np.uint8)


def _walk(rng: Generator, num_frames: int, start: float, speed: float) -> np.ndarray:
    """float [F, 2]: a path whose velocity changes slowly."""
    velocity = rng.normal(0, speed, (num_frames // 6 + 2, 2))
    return start + np.cumsum(np.repeat(velocity, 6, axis=0)[:num_frames], axis=0)


def _add_disc(frames: np.ndarray, centre: np.ndarray, radius: float, colour: np.ndarray) -> None:
    """Paint a disc at centre [F, 2] (row, column) into frames [F, P, P, 3]."""
    squared = ((np.arange(frames.shape[1]) - centre[:, :, None]) ** 2).astype(np.float32)  # [F, 2, P]
    frame, row, column = np.nonzero(squared[:, 0, :, None] + squared[:, 1, None, :] < radius**2)
    frames[frame, row, column] = colour


# ---- what is said, and the clips ---------------------------------------------------------------------


def make_clips(recording: Recording, view: int, rng: Generator) -> list[dict[str, Any]]:
    """The recording's clips in the prospect schema. The generator chooses words and times."""
    turns = [turn for event in recording.events for turn in _turns(event, len(recording.step_names), rng)]
    ends = [turn["time"] for turn in turns for _, transition in _updates(turn) if transition == "complete"]
    steps = [
        {"type": "step", "id": f"S{number}", "start_ts": start, "end_ts": end, "name": name}
        for number, (start, end, name) in enumerate(zip([0.0, *ends[:-1]], ends, recording.step_names, strict=True), 1)
    ]
    uid = f"synth_{recording.name}__view{view}"
    numbered = [f"{i}. {name}" for i, name in enumerate(recording.step_names, 1)]
    system = {"role": "system", "content": "You are a helpful assistant.", "start_frame": 0, "end_frame": 1}
    clips = []
    for number, (start, end) in enumerate(recording.clips):
        initial = state = {"S1": "in_progress"}  # the first step began with the video
        own_turns: list[dict[str, Any]] = []
        for turn in (turn for turn in turns if turn["start_frame"] < end):
            if turn["start_frame"] >= start:
                unseen = {step: "not_started" for step, _ in _updates(turn) if step not in state}
                own_turns.append(turn | {"dst_state": state | unseen})
            state = replay(state, _updates(turn))
            initial = initial if own_turns else state
        clip = {
            "id": f"{uid}_{number}",
            "video_uid": uid,
            "inferred_goal": recording.goal,
            "inferred_knowledge": "\n".join([recording.goal, *numbered]),
            "video_labels": {},
            "conversation": [system | {"labels": "system|generic"}, *own_turns],
            "dst": steps,
            "initial_dst_state": initial,
            "frames_file": f"frames/{recording.name}__view{view}.arrow",
            "start_frame_idx": start,
            "end_frame_idx": end,
            "seq_len": end - start,
            "dataset": "synth",
            "clip_idx": number,
        }
        clips.append(clip | {"max_seq_len": 4096, "num_tokens_per_img": 1, "fps": FPS, "quality": 5.0})
    return clips


def _turns(event: Event, num_steps: int, rng: Generator) -> Iterator[dict[str, Any]]:
    """An event's turns, in order: complete, start, assistant; or user, assistant."""

    def seconds(start: int) -> float:
        """A time in the second of a turn's two frames, as in the real clip: start < time * FPS < start + 2."""
        return round((start + 1 + 0.2 * _between(rng, 1, 4)) / FPS, 3)

    def turn(role: str, content: Any, start: int, time: float, labels: str) -> dict[str, Any]:
        frames = {"start_frame": start, "end_frame": start + 2}
        return {"role": role, "content": content, "time": time, **frames, "labels": labels}

    start = event.frame + 1
    time = seconds(start)
    if event.kind in _SAID:
        yield turn("user", str(rng.choice(_SAID[event.kind])), event.frame, seconds(event.frame), "user|generic")
    if event.kind == "placement":
        for step, transition in ((event.step, "complete"), (event.step + 1, "start")):
            if step < num_steps:
                content = [{"id": f"S{step + 1}", "transition": transition}]
                yield turn("DST_UPDATE", content, start, time, f"initiative|dst_update,dst_{transition},steps_1")
    if event.speaks:
        yield turn("assistant", str(rng.choice(_REPLIES[event.kind])), start, time, "assistant|generic")
    for again in (start + after for after in event.follow_ups):
        yield turn("assistant", str(rng.choice(_REPLIES["follow-up"])), again, seconds(again), "assistant|generic")


def _updates(turn: dict[str, Any]) -> list[tuple[str, str]]:
    return [(u["id"], u["transition"]) for u in turn["content"]] if turn["role"] == "DST_UPDATE" else []


# ---- files -------------------------------------------------------------------------------------------


def synth(out: Path, config: SynthConfig) -> dict[str, int]:
    """Write a data set into the new folder `out`, the same bytes for the same config; the number of clips by split.

    OUT/{split}_training.json, and one OUT/frames/nusar-*.arrow per video, written into OUT/.synth.new and then renamed.
    """
    if not is_vacant(out):
        raise UsageError(f"{out}: is there and not empty; expected a new or empty folder; name another")
    created, new = not out.exists(), out / ".synth.new"  # in it, as it may be a mount point
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
    make_folder(out)
    (new / "frames").mkdir(parents=True)
    counts = {split: 0 for split in SPLITS if split in config.recordings}
    try:
        for split in counts:
            clips: list[dict[str, Any]] = []
            for number in range(config.recordings[split]):
                # a generator of its own for the plan (0), the words (1) and each view (2 and on)
                key = [config.seed, SPLITS.index(split), number]
                recording = plan_recording(f"nusar-{split}-{number:04d}", default_rng([*key, 0]), config)
                for view in range(config.views):
                    clips += make_clips(recording, view, default_rng([*key, 1]))
                    pixels = draw_view(recording, default_rng([*key, 2 + view]), config)
                    write_frames(new / "frames" / f"{recording.name}__view{view}.arrow", pixels)
            (new / f"{split}_training.json").write_text(json.dumps(clips, indent=2) + "\n", encoding="utf-8")
            counts[split] = len(clips)
        for path in sorted(new.iterdir()):
            path.replace(out / path.name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if created:
            with suppress(OSError):
                out.rmdir()  # of a run that failed
    return counts


def write_frames(path: Path, frames: np.ndarray) -> None:
    """Write uint8 frames [F, P, P, 3] as ProAssist does: an Arrow IPC stream, `frame` base64 JPEG."""
    schema = pa.schema([pa.field("frame", pa.string())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(frames), 100):
            encoded = []
            for frame in frames[first : first + 100]:
                buffer = io.BytesIO()
                Image.fromarray(frame).save(buffer, "JPEG", quality=80, optimize=True)  # 18% smaller
                encoded.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
            writer.write_batch(pa.record_batch([pa.array(encoded, pa.string())], schema=schema))
