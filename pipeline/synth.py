"""Synthetic task videos with conversations, in the same files a user has: something to try every command on.

    OUT/{train,val,test}_training.json    clips in the prospect schema, `event` frame convention
    OUT/frames/nusar-*.arrow              one video each: Arrow IPC stream, column `frame`, base64 JPEG

A recording is one task of 8 to 12 steps, filmed by several cameras (`views`): same events, other pictures.
Before a moving background with coloured clutter and a passing hand, three things happen, 5 to 8 frames apart:

    placement   a white jig with a coloured part is in view for 3 frames. One frame after it appears the step is
                complete and the next one starts (two DST_UPDATE turns)
    lamp        a magenta lamp lights up for 3 frames; the assistant speaks one frame after it appears
    question    the user asks; the assistant answers one frame later. Nothing to see

Clips are cut from mid-task, in the quiet around their events; no picture shows how far the task has come.
What tells when the assistant speaks is drawn for each step from the shares in `tells`:

    vision     a coin decides whether the completed step is spoken about; the lamp shows it
    state      the toy's plan decides (three toys, one each): the step is called "Fit the axle aloud" or "... quietly"
    user       the user speaks, to the assistant, which answers one frame later, or to others: what is said tells
    history    the user asks; the assistant answers one frame later and speaks again FOLLOW_UPS frames after that
    nothing    it speaks REMARKS times a frame, on average, whatever happens

Lamps of their own and answered questions stand between the steps of `vision` and `state` alone.

    F frames of a video, P pixels of a side
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.errors import UsageError
from pipeline.state import Update, replay
from pipeline.storage import is_vacant, make_folder

SPLITS: Final = ("train", "val", "test")
SOURCES: Final = ("state", "vision", "user", "history", "nothing")  # of what tells when to speak
CUE_FRAMES: Final = 3  # a cue is in view for frame, frame + 1, frame + 2
FOLLOW_UPS: Final = (6, 14)  # frames
REMARKS: Final = 0.1  # per frame
ROWS_PER_BATCH: Final = 100

_PARTS: Final = tuple(
    "axle wheel gear lever spring bolt plate handle hook ring cap tube crank panel hinge pin".split()  # noqa: SIM905
)
# Which of a toy's steps are spoken about (a) and which pass quietly (q), where the plan decides.
_PLANS: Final = {"Crane": "aaqaqqqaaqaqaqqa", "Truck": "qaqqaaaqqaqaqaaq", "Robot": "aqqaaqaqaaqqqaqa"}
_QUESTIONS: Final = ("Is this right?", "Can I go on?", "Does it fit?")
_ASIDES: Final = ("Where is my tea, Tom?", "What a day, Ann!", "Did you call her, Tom?")
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
    fps: float = 2.0
    difficulty: float = 0.25  # clutter, its speed, noise, contrast; from 0.5 clutter in the cues' colours
    tells: Mapping[str, float] = field(default_factory=lambda: {"vision": 1.0})
    jpeg_quality: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        counts, steps, events = dict(self.recordings), self.steps, self.events_per_clip
        known = bool(counts) and set(counts) <= set(SPLITS) and min(counts.values()) >= 1
        for name, holds, expected in (
            ("recordings", known, f"1 or more for some of {', '.join(SPLITS)}"),
            ("views", self.views >= 1, "1 or more"),
            ("steps", 3 <= steps[0] <= steps[1] <= len(_PARTS), f"3 <= fewest <= most <= {len(_PARTS)}"),
            ("events_per_clip", 2 <= events[0] <= events[1], "2 <= fewest <= most"),
            ("px", 32 <= self.px <= 1024, "32 to 1024"),
            ("fps", 0.1 <= self.fps <= 60, "0.1 to 60"),
            ("difficulty", 0 <= self.difficulty <= 1, "a number from 0 to 1"),
            ("tells", self._shares_hold(), f"shares of {', '.join(SOURCES)} that add up to 1"),
            ("jpeg_quality", 1 <= self.jpeg_quality <= 95, "1 to 95"),
            ("seed", 0 <= self.seed < 2**63, "0 <= seed < 2**63"),
        ):
            if not holds:
                raise UsageError(f"{name}: found {getattr(self, name)}; expected {expected}")

    def _shares_hold(self) -> bool:
        shares = self.tells.values()
        return set(self.tells) <= set(SOURCES) and all(share >= 0 for share in shares) and abs(sum(shares) - 1) < 1e-9


def parse_tells(text: str) -> dict[str, float]:
    """'user', or shares such as 'state=0.7,vision=0.3'. UsageError where it is neither."""
    items = [item.partition("=") for item in text.split(",")]
    try:
        return {name.strip(): float(share) if equals else 1.0 for name, equals, share in items}
    except ValueError:
        raise UsageError(f"--tells {text!r}: expected a name, or name=share items with commas") from None


@dataclass
class SplitCounts:
    """`bytes` are those of the split's JSON and Arrow files."""

    recordings: int
    videos: int
    clips: int = 0
    frames: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class SynthReport:
    """What was written, per split, and how long it took."""

    splits: dict[str, SplitCounts]
    seconds: float


# ---- what happens in a recording ---------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something at `frame`: a placement (of step `step`, from 0), a lamp, a question, an aside of the user's to others,
    a remark of the assistant's. Its turns start one later, an aside and a question at once."""

    kind: str
    frame: int = 0
    step: int = -1
    speaks: bool = True  # the assistant says something
    lamp: bool = False  # and the picture shows it
    follow_ups: tuple[int, ...] = ()  # it speaks again, frames after it spoke


@dataclass(frozen=True)
class Recording:
    """One take: what every camera sees and hears. `clips` are half-open frame ranges."""

    name: str  # nusar-train-0007
    goal: str
    step_names: list[str]
    events: list[Event]
    clips: list[tuple[int, int]]
    num_frames: int


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def plan_recording(name: str, rng: np.random.Generator, config: SynthConfig) -> Recording:
    """A recording's plan, events and clips: a pure function of the generator's state and the config."""
    num_steps = _between(rng, *config.steps)
    toy = _pick(rng, tuple(_PLANS))
    planned = np.array([letter == "a" for letter in _PLANS[toy][:num_steps]])
    shares = np.cumsum([config.tells.get(source, 0.0) for source in SOURCES])
    shares[-1] = 1.0
    source = np.array(SOURCES)[np.searchsorted(shares, rng.random(num_steps), side="right")]
    by_plan, by_lamp = source == "state", source == "vision"
    spoken = np.where(by_plan, planned, (rng.random(num_steps) < 0.5) & by_lamp)
    events: list[Event] = []
    for step in range(num_steps):
        events += _between_steps(str(source[step]), rng, config)
        speaks = bool(spoken[step])
        events.append(Event("placement", 0, step, speaks, lamp=speaks and bool(by_lamp[step])))
    clips, num_frames = _place(events, rng, config)
    if remarks := config.tells.get("nothing", 0.0) * REMARKS:
        events = sorted([*events, *_remarks(events, clips, remarks, rng)], key=lambda event: event.frame)

    parts = [_PARTS[i] for i in rng.permutation(len(_PARTS))[:num_steps]]
    words = [(" aloud" if s else " quietly") if p else "" for p, s in zip(by_plan, spoken, strict=True)]
    names = [f"Fit the {part}{word}" for part, word in zip(parts, words, strict=True)]
    return Recording(name, f"Building a Toy {toy}", names, events, clips, num_frames)


def _between_steps(source: str, rng: np.random.Generator, config: SynthConfig) -> Iterator[Event]:
    """What happens before the placement of a step of that source."""
    state, vision = (config.tells.get(name, 0.0) for name in ("state", "vision"))
    while rng.random() < 0.35 * (state + vision) - 0.2 * state:
        yield Event("question") if rng.random() < 0.5 else Event("lamp", lamp=True)
    if source == "history":
        yield Event("question", follow_ups=FOLLOW_UPS)
    if source == "user":
        for _ in range(_between(rng, 1, 2)):
            yield Event("question") if rng.random() < 0.5 else Event("aside", speaks=False)


def _place(events: list[Event], rng: np.random.Generator, config: SynthConfig) -> tuple[list[tuple[int, int]], int]:
    """Gives the events their frames; (the clips, the number of frames)."""
    low, high = config.events_per_clip
    cuts = [_between(rng, 0, min(3, max(0, len(events) - low)))]  # events at which clips start
    while (rest := len(events) - cuts[-1]) > high + 2 and rest >= 2 * low:
        cuts.append(cuts[-1] + _between(rng, low, min(high, rest - low)))
    cuts.append(len(events))

    starts: list[int] = []
    clips: list[tuple[int, int]] = []
    frame = _between(rng, 6, 12)
    for number, event in enumerate(events):
        if number in cuts:
            if starts:
                clips.append((starts[-1], frame))
                frame += _between(rng, 0, 4)  # between two clips
            starts.append(frame)
            frame += _between(rng, 2, 6)  # before a clip's first event
        events[number] = replace(event, frame=frame)
        frame += max(event.follow_ups, default=0)
        frame += CUE_FRAMES + (_between(rng, 3, 7) if number + 1 in cuts else _between(rng, 2, 5))
    clips.append((starts[-1], frame))
    return clips, frame + _between(rng, 1, 4)


def _remarks(
    events: list[Event], clips: list[tuple[int, int]], rate: float, rng: np.random.Generator
) -> Iterator[Event]:
    """Remarks at random frames, as a Poisson process; no two turns of the assistant share a frame."""
    taken = {event.frame + after for event in events if event.speaks for after in (0, *event.follow_ups)}
    for start, end in clips:
        for frame in (start - 1 + np.flatnonzero(rng.random(end - start - 2) < rate)).tolist():
            if not taken & {frame - 1, frame, frame + 1}:
                taken.add(frame)
                yield Event("remark", frame)


# ---- what a camera sees ------------------------------------------------------------------------------


def draw_view(recording: Recording, rng: np.random.Generator, config: SynthConfig) -> np.ndarray:
    """uint8 frames [F, P, P, 3] of one camera: its own background, clutter, noise and places of the cues."""
    px, strength = config.px, 1 - 0.5 * config.difficulty  # of cues: at 1 half of what was there shines through
    frames = _background(rng, recording.num_frames, config)
    _add_movers(frames, rng, config)
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
    noise = rng.normal(0, 1 + 8 * config.difficulty, (2 * px, 2 * px)).astype(np.float32)
    shift = rng.integers(0, px, (len(frames), 2))  # of one sheet: drawing each frame's noise anew costs 4 times as much
    for frame, (top, left) in zip(frames, shift.tolist(), strict=True):
        frame += noise[top : top + px, left : left + px, None]
    return frames.clip(0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, num_frames: int, config: SynthConfig) -> np.ndarray:
    """float32 [F, P, P, 3]: a window that wanders over a smooth, dull texture of twice its side."""
    px = config.px
    coarse = rng.uniform(30, 110, (8, 8, 3))
    coarse = 0.5 * coarse + 0.5 * coarse.mean(axis=2, keepdims=True)  # duller than parts and cues
    texture = Image.fromarray(coarse.astype(np.uint8)).resize((2 * px, 2 * px), Image.Resampling.BICUBIC)
    speed = px / 64 * (0.5 + 2 * config.difficulty)
    path = _walk(rng, num_frames, px / 2, speed).clip(0, px).astype(np.int64)  # [F, 2]
    whole = np.asarray(texture, np.float32)
    return np.stack([whole[top : top + px, left : left + px] for top, left in path.tolist()])


def _walk(rng: np.random.Generator, num_frames: int, start: float, speed: float) -> np.ndarray:
    """float [F, 2]: a path whose velocity changes slowly."""
    velocity = rng.normal(0, speed, (num_frames // 6 + 2, 2))
    return start + np.cumsum(np.repeat(velocity, 6, axis=0)[:num_frames], axis=0)


def _add_movers(frames: np.ndarray, rng: np.random.Generator, config: SynthConfig) -> None:
    """Clutter discs and a hand that move through the picture and come round again."""
    px = config.px
    colours = _COLOURS if config.difficulty < 0.5 else np.concatenate([_COLOURS, _JIG[None], _LAMP[None]])
    sizes = [*rng.uniform(2, 5, 2 + round(6 * config.difficulty)), 8.0]  # the hand last
    for number, radius in enumerate(sizes, 1):
        path = _walk(rng, len(frames), rng.uniform(0, px), px / 64 * (1 + 3 * config.difficulty))
        colour = _HAND if number == len(sizes) else colours[rng.integers(len(colours))]
        _add_disc(frames, path % (1.5 * px) - px / 4, radius * px / 64, colour)


def _add_disc(frames: np.ndarray, centre: np.ndarray, radius: float, colour: np.ndarray) -> None:
    """Paint a disc at centre [F, 2] (row, column) into frames [F, P, P, 3]."""
    squared = ((np.arange(frames.shape[1]) - centre[:, :, None]) ** 2).astype(np.float32)  # [F, 2, P]
    frame, row, column = np.nonzero(squared[:, 0, :, None] + squared[:, 1, None, :] < radius**2)
    frames[frame, row, column] = colour


# ---- what is said, and the clips ---------------------------------------------------------------------


def make_clips(recording: Recording, view: int, rng: np.random.Generator, config: SynthConfig) -> list[dict[str, Any]]:
    """The recording's clips in the prospect schema. The generator chooses words and times."""
    turns = [turn for event in recording.events for turn in _turns(event, recording, rng, config)]
    ends = [turn["time"] for turn in turns for _, transition in _updates(turn) if transition == "complete"]
    steps = [
        {"type": "step", "id": f"S{number}", "start_ts": start, "end_ts": end, "name": name}
        for number, (start, end, name) in enumerate(zip([0.0, *ends[:-1]], ends, recording.step_names, strict=True), 1)
    ]
    uid, file = f"synth_{recording.name}__view{view}", f"frames/{recording.name}__view{view}.arrow"
    knowledge = "\n".join([recording.goal, *(f"{i}. {name}" for i, name in enumerate(recording.step_names, 1))])
    goal = {"inferred_goal": recording.goal, "inferred_knowledge": knowledge, "video_labels": {}}
    system = {"role": "system", "content": "You are a helpful assistant.", "start_frame": 0, "end_frame": 1}
    fps = int(config.fps) if config.fps == int(config.fps) else config.fps
    rest = {"max_seq_len": 4096, "num_tokens_per_img": 1, "fps": fps, "quality": 5.0}
    clips = []
    for number, (start, end) in enumerate(recording.clips):
        earlier = [update for turn in turns if turn["start_frame"] < start for update in _updates(turn)]
        state = initial = replay({"S1": "in_progress"}, earlier)  # the first step began with the video
        conversation = [system | {"labels": "system|generic"}]
        for turn in turns:
            if start <= turn["start_frame"] < end:
                updates = _updates(turn)
                before = {**{step: "not_started" for step, _ in updates}, **state}
                before = {step: before[step] for step in sorted(before, key=lambda step: int(step[1:]))}
                conversation.append({**turn, "dst_state": before})
                state = replay(state, updates)
        texts = {"conversation": conversation, "dst": steps, "initial_dst_state": initial, "frames_file": file}
        bounds = {"start_frame_idx": start, "end_frame_idx": end, "seq_len": end - start}
        place = {"dataset": "synth", "clip_idx": number}
        clips.append({"id": f"{uid}_{number}", "video_uid": uid, **goal, **texts, **bounds, **place, **rest})
    return clips


def _turns(
    event: Event, recording: Recording, rng: np.random.Generator, config: SynthConfig
) -> Iterator[dict[str, Any]]:
    """An event's turns, in order: complete, start, assistant; or user, assistant."""

    def seconds(start: int) -> float:
        """A time in the second of a turn's two frames, as in the real clip: start < time * fps < start + 2."""
        return round((start + 1 + 0.2 * _between(rng, 1, 4)) / config.fps, 3)

    def turn(role: str, content: Any, start: int, time: float, labels: str) -> dict[str, Any]:
        frames = {"start_frame": start, "end_frame": start + 2}
        return {"role": role, "content": content, "time": time, **frames, "labels": labels}

    start = event.frame + 1
    time = seconds(start)
    if event.kind in ("question", "aside"):
        said = _pick(rng, _QUESTIONS if event.kind == "question" else _ASIDES)
        yield turn("user", said, event.frame, seconds(event.frame), "user|generic")
    if event.kind == "placement":
        for step, transition in ((event.step, "complete"), (event.step + 1, "start")):
            if step < len(recording.step_names):
                content = [{"id": f"S{step + 1}", "transition": transition}]
                labels = f"initiative|dst_update,dst_{transition},steps_1"
                yield turn("DST_UPDATE", content, start, time, labels)
    if event.speaks:
        yield turn("assistant", _pick(rng, _REPLIES[event.kind]), start, time, "assistant|generic")
    for again in (start + after for after in event.follow_ups):
        yield turn("assistant", _pick(rng, _REPLIES["follow-up"]), again, seconds(again), "assistant|generic")


def _updates(turn: dict[str, Any]) -> list[Update]:
    return [(u["id"], u["transition"]) for u in turn["content"]] if turn["role"] == "DST_UPDATE" else []


# ---- files -------------------------------------------------------------------------------------------


def synth(out: Path, config: SynthConfig | None = None) -> SynthReport:
    """Write a data set into the folder `out`, the same bytes for the same config, whatever the process.

    Written inside `out` and renamed into place at the end. UsageError where `out` holds something already.
    """
    config = config or SynthConfig()
    began = time.perf_counter()
    is_new = not out.exists()
    if not is_new and not (out.is_dir() and is_vacant(out)):
        raise UsageError(f"{out}: is there and not empty; expected a new or empty folder; name another")
    make_folder(out)
    for left in out.glob(".*.new"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
    building = out / f".{os.getpid()}.new"  # in it, as it may be a mount point
    try:
        (building / "frames").mkdir(parents=True)
        splits = {name: _write_split(building, name, config) for name in SPLITS if name in config.recordings}
        for path in sorted(building.iterdir()):
            path.rename(out / path.name)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if is_new:
            with suppress(OSError):
                out.rmdir()  # of a run that failed
    return SynthReport(splits, round(time.perf_counter() - began, 3))


def _write_split(folder: Path, split: str, config: SynthConfig) -> SplitCounts:
    count = config.recordings[split]
    counts = SplitCounts(count, count * config.views)
    clips: list[dict[str, Any]] = []
    for number in range(count):
        # a generator of its own for the plan (0), the words (1) and each view (2 and on)
        key = [config.seed, SPLITS.index(split), number]
        recording = plan_recording(f"nusar-{split}-{number:04d}", np.random.default_rng([*key, 0]), config)
        for view in range(config.views):
            clips += make_clips(recording, view, np.random.default_rng([*key, 1]), config)
            pixels = draw_view(recording, np.random.default_rng([*key, 2 + view]), config)
            path = folder / "frames" / f"{recording.name}__view{view}.arrow"
            write_frames(path, pixels, config.jpeg_quality)
            counts.frames += len(pixels)
            counts.bytes += path.stat().st_size
    path = folder / f"{split}_training.json"
    path.write_text(json.dumps(clips, indent=2) + "\n", encoding="utf-8")
    counts.clips, counts.bytes = len(clips), counts.bytes + path.stat().st_size
    return counts


def write_frames(path: Path, frames: np.ndarray, quality: int = 80) -> None:
    """Write uint8 frames [F, P, P, 3] as ProAssist does: an Arrow IPC stream, `frame` base64 JPEG."""
    schema = pa.schema([pa.field("frame", pa.string())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(frames), ROWS_PER_BATCH):
            encoded = []
            for frame in frames[first : first + ROWS_PER_BATCH]:
                buffer = io.BytesIO()
                Image.fromarray(frame).save(buffer, "JPEG", quality=quality, optimize=True)  # 18% smaller
                encoded.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
            writer.write_batch(pa.record_batch([pa.array(encoded, pa.string())], schema=schema))
