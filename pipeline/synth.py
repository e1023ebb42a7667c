"""Made-up task videos with conversations, in the same files a user has: something to try every command on.

    OUT/{train,val,test}_training.json    clips in the prospect schema, `event` frame convention
    OUT/frames/nusar-*.arrow              one video each: Arrow IPC stream, column `frame`, base64 JPEG

A recording is one task of 8 to 12 steps, filmed by several cameras (`views`): same events, other pictures.
Before a moving background with coloured clutter and a passing hand, three things happen, 5 to 8 frames apart:

    placement   a white jig with a coloured part is in view for 3 frames, then gone for good. One frame after
                it appears the step is complete and the next one starts (two DST_UPDATE turns)
    lamp        a magenta lamp lights up for 3 frames; the assistant speaks one frame after it appears
    question    the user asks; the assistant answers one frame later. Nothing to see

The picture never shows how far the task has come, and clips are cut from mid-task (`initial_dst_state` says
where), in the quiet around their events, so that no event is known by its place in the clip.

Whether a completed step is spoken about is told by the plan with probability `state_tells`, drawn for each step,
else by the lamp. So at

    0   the lamp lights up beside the jig where the assistant speaks (a fair coin), and steps are called "Fit the
        axle": the state says nothing about when to speak that the picture does not say
    1   no jig comes with a lamp, and steps are called "Fit the axle aloud" or "Fit the axle quietly": to know
        when to speak is to know which step was completed. Lamps alone and questions, which need no state,
        thin out from 35% to 15% of all events

There are three toys, and each has one plan of loud and quiet steps, so that "S3 of the crane" says enough. With a
plan drawn for each recording the word must be looked up in the prompt: after 400 steps a tiny model (0.9M) was at
speaking AP 0.83 if updates name ids alone, at 1.00 if they name the steps too; with three plans, ids give 0.998.

The heads differ by construction: at 0 half of what is said goes with no update, and half of the completed
steps pass in silence. The price of being fast and sure: a handful of sentences, and no scene worth the name.
One task is left out because it does *not* work at this scale: to speak when the placed part is not the one
that the plan expects (compare a colour with a word). Tiny models took 750 steps for it, or missed it in 1100.

Defaults: 220 recordings, 440 videos, 1,150 clips of 40 frames, 57,700 frames, 86 MB, 12 s on one core.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.errors import UsageError
from pipeline.schema import TRANSITIONS
from pipeline.storage import is_vacant, make_folder

SPLITS: Final = ("train", "val", "test")
CUE_FRAMES: Final = 3  # a cue is in view for frame, frame + 1, frame + 2
ROWS_PER_BATCH: Final = 100

_PARTS = (
    *("axle", "wheel", "gear", "lever", "spring", "bolt", "plate", "handle"),
    *("hook", "ring", "cap", "tube", "crank", "panel", "hinge", "pin"),
)
# which of a toy's steps are spoken about (a) and which pass quietly (q), where the plan tells
_PLANS: Final = {"Crane": "aaqaqqqaaqaqaqqa", "Truck": "qaqqaaaqqaqaqaaq", "Robot": "aqqaaqaqaaqqqaqa"}
_SYSTEM = "You are a helpful assistant."
_QUESTIONS = ("Is this right?", "Can I go on?", "Does it fit?")
_ANSWERS = ("Yes, go on.", "Yes, it is fine.")
_PRAISE = ("Good, that part is in.", "Well done, next part.")
_WARNINGS = ("Mind the lamp.", "The lamp is on, wait.")
_COLOURS = np.array(
    [(200, 40, 40), (40, 150, 60), (50, 80, 200), (220, 170, 40), (230, 120, 40), (40, 160, 170)], np.float32
)
_HAND = np.array((205, 150, 120), np.float32)
_JIG = np.array((250, 250, 250), np.float32)
_LAMP = np.array((240, 40, 220), np.float32)


@dataclass(frozen=True)
class SynthConfig:
    """What to make. `difficulty` (of seeing) and `state_tells` (when to speak) run from 0 to 1."""

    recordings: Mapping[str, int] = field(default_factory=lambda: {"train": 190, "val": 15, "test": 15})
    views: int = 2  # cameras per recording
    steps: tuple[int, int] = (8, 12)  # fewest and most of a task
    events_per_clip: tuple[int, int] = (4, 6)  # fewest and most; a video's last clip can have a few more
    px: int = 64  # side of the square frames
    fps: float = 2.0
    difficulty: float = 0.25  # clutter, its speed, noise, contrast; from 0.5 clutter in the cues' colours
    state_tells: float = 0.0
    jpeg_quality: int = 80
    seed: int = 0

    def __post_init__(self) -> None:
        counts = dict(self.recordings)
        known = bool(counts) and set(counts) <= set(SPLITS) and min(counts.values()) >= 1
        _expect(known, "recordings", counts, f"1 or more for some of {', '.join(SPLITS)}")
        _expect(self.views >= 1, "views", self.views, "1 or more")
        low, high = self.steps
        _expect(3 <= low <= high <= len(_PARTS), "steps", self.steps, f"3 <= fewest <= most <= {len(_PARTS)}")
        low, high = self.events_per_clip
        _expect(2 <= low <= high, "events_per_clip", self.events_per_clip, "2 <= fewest <= most")
        _expect(32 <= self.px <= 1024, "px", self.px, "32 to 1024")
        _expect(0.1 <= self.fps <= 60, "fps", self.fps, "0.1 to 60")
        _expect(0 <= self.difficulty <= 1, "difficulty", self.difficulty, "a number from 0 to 1")
        _expect(0 <= self.state_tells <= 1, "state_tells", self.state_tells, "a number from 0 to 1")
        _expect(1 <= self.jpeg_quality <= 95, "jpeg_quality", self.jpeg_quality, "1 to 95")
        _expect(0 <= self.seed < 2**63, "seed", self.seed, "0 <= seed < 2**63")


def _expect(holds: bool, name: str, found: object, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name}: found {found}; expected {expected}")


@dataclass(frozen=True)
class SplitCounts:
    """What one split holds; `bytes` are those of its JSON and Arrow files."""

    recordings: int
    videos: int
    clips: int
    frames: int
    bytes: int


@dataclass(frozen=True)
class SynthReport:
    """What was written, per split, and how long it took."""

    splits: dict[str, SplitCounts]
    seconds: float


# ---- what happens in a recording ---------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something at `frame`: a placement (of step `step`, from 0), a lamp, or a question."""

    kind: str
    frame: int
    step: int = -1
    speaks: bool = True  # the assistant says something
    lamp: bool = False  # and the picture shows it

    @property
    def turn_frame(self) -> int:
        """First frame of the turns that follow from it, one after the cue (or question) appears."""
        return self.frame + 1


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
    told = rng.random(num_steps) < config.state_tells
    spoken = np.where(told, planned, rng.random(num_steps) < 0.5)
    kinds = _kinds(rng, told, spoken, 0.35 - 0.2 * config.state_tells)
    cuts = _cuts(rng, kinds, config)
    events, clips, num_frames = _on_a_clock(rng, kinds, cuts)
    parts = [_PARTS[i] for i in rng.permutation(len(_PARTS))[:num_steps]]
    words = [(" aloud" if s else " quietly") if t else "" for t, s in zip(told, spoken, strict=True)]
    return Recording(
        name=name,
        goal=f"Building a Toy {toy}",
        step_names=[f"Fit the {part}{word}" for part, word in zip(parts, words, strict=True)],
        events=events,
        clips=clips,
        num_frames=num_frames,
    )


def _kinds(rng: np.random.Generator, told: np.ndarray, spoken: np.ndarray, other: float) -> list[Event]:
    """The events in order, all at frame 0; a share of `other` are lamps and questions."""
    events: list[Event] = []
    for step, (is_told, speaks) in enumerate(zip(told.tolist(), spoken.tolist(), strict=True)):
        while rng.random() < other:
            asked = rng.random() < 0.5
            events.append(Event("question", 0) if asked else Event("lamp", 0, lamp=True))
        events.append(Event("placement", 0, step, speaks, lamp=speaks and not is_told))
    return events


def _cuts(rng: np.random.Generator, kinds: list[Event], config: SynthConfig) -> list[int]:
    """Numbers of the events at which clips start, then one past the last; up to 3 events lie before all."""
    low, high = config.events_per_clip
    cuts = [_between(rng, 0, min(3, max(0, len(kinds) - low)))]
    while (rest := len(kinds) - cuts[-1]) > high + 2 and rest >= 2 * low:
        cuts.append(cuts[-1] + _between(rng, low, min(high, rest - low)))
    return [*cuts, len(kinds)]


def _on_a_clock(
    rng: np.random.Generator, kinds: list[Event], cuts: list[int]
) -> tuple[list[Event], list[tuple[int, int]], int]:
    """Events with frames, clip ranges, number of frames.

    A clip begins 2 to 6 frames before its first event and ends 3 to 7 frames after its last turn; up to 4
    frames lie between two clips of a video.
    """
    events: list[Event] = []
    starts: list[int] = []
    clips: list[tuple[int, int]] = []
    frame = _between(rng, 6, 12)
    for number, kind in enumerate(kinds):
        if number in cuts:
            if starts:
                clips.append((starts[-1], frame))
                frame += _between(rng, 0, 4)
            starts.append(frame)
            frame += _between(rng, 2, 6)
        events.append(Event(kind.kind, frame, kind.step, kind.speaks, kind.lamp))
        last = number + 1 in cuts
        frame += CUE_FRAMES + (_between(rng, 3, 7) if last else _between(rng, 2, 5))
    clips.append((starts[-1], frame))
    return events, clips, frame + _between(rng, 1, 4)


# ---- what a camera sees ------------------------------------------------------------------------------


def draw_view(recording: Recording, rng: np.random.Generator, config: SynthConfig) -> np.ndarray:
    """uint8 frames [F, P, P, 3] of one camera: its own background, clutter, noise and places of the cues."""
    frames = _background(rng, recording.num_frames, config)
    _add_movers(frames, rng, config)
    for event in recording.events:
        cue = frames[event.frame : event.frame + CUE_FRAMES]
        if event.kind == "placement":
            _add_jig(cue, rng, config)
        if event.lamp:
            _add_lamp(cue, rng, config)
    _add_noise(frames, rng, 1 + 8 * config.difficulty)
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
    for number, radius in enumerate(sizes):
        hand = number == len(sizes) - 1
        path = _walk(rng, len(frames), rng.uniform(0, px), px / 64 * (1 + 3 * config.difficulty))
        colour = _HAND if hand else colours[rng.integers(len(colours))]
        _add_disc(frames, path % (1.5 * px) - px / 4, radius * px / 64, colour)


def _add_disc(frames: np.ndarray, centre: np.ndarray, radius: float, colour: np.ndarray) -> None:
    """Paint a disc at centre [F, 2] (row, column) into frames [F, P, P, 3]."""
    squared = ((np.arange(frames.shape[1]) - centre[:, :, None]) ** 2).astype(np.float32)  # [F, 2, P]
    frame, row, column = np.nonzero(squared[:, 0, :, None] + squared[:, 1, None, :] < radius**2)
    frames[frame, row, column] = colour


def _add_jig(cue: np.ndarray, rng: np.random.Generator, config: SynthConfig) -> None:
    """A white square with a coloured part in the lower three quarters; its side is half the picture's."""
    px = config.px
    side = int(rng.uniform(0.45, 0.55) * px)
    top, left = int(rng.integers(px // 4, px - side + 1)), int(rng.integers(px - side + 1))
    _blend(cue[:, top : top + side, left : left + side], _JIG, config)
    middle = np.tile([top + side / 2, left + side / 2], (len(cue), 1))
    _add_disc(cue, middle, side / 4, _COLOURS[rng.integers(len(_COLOURS))])


def _add_lamp(cue: np.ndarray, rng: np.random.Generator, config: SynthConfig) -> None:
    """A magenta bar in the upper quarter, where no jig is."""
    px = config.px
    left = int(rng.integers(px // 2 + 1))
    _blend(cue[:, px // 32 : px // 4 - px // 32, left : left + px // 2], _LAMP, config)


def _blend(patch: np.ndarray, colour: np.ndarray, config: SynthConfig) -> None:
    """Paint over; the harder, the more of what was there shines through (half at difficulty 1)."""
    patch += (1 - 0.5 * config.difficulty) * (colour - patch)


def _add_noise(frames: np.ndarray, rng: np.random.Generator, sigma: float) -> None:
    """Grey noise: one sheet, shifted anew for every frame (drawing each anew costs 4 times as much)."""
    px = frames.shape[1]
    sheet = rng.normal(0, sigma, (2 * px, 2 * px)).astype(np.float32)
    shift = rng.integers(0, px, (len(frames), 2))
    for frame, (top, left) in zip(frames, shift.tolist(), strict=True):
        frame += sheet[top : top + px, left : left + px, None]


# ---- what is said, and the clips ---------------------------------------------------------------------


def make_clips(recording: Recording, view: int, rng: np.random.Generator, config: SynthConfig) -> list[dict[str, Any]]:
    """The recording's clips as the prospect schema has them. The generator chooses words and times."""
    turns = [turn for event in recording.events for turn in _turns(event, recording, rng, config)]
    steps = _dst_steps(recording, turns)
    knowledge = "\n".join([recording.goal, *(f"{i}. {s['name']}" for i, s in enumerate(steps, 1))])
    uid = f"synth_{recording.name}__view{view}"
    clips = []
    for number, (start, end) in enumerate(recording.clips):
        state = _state_before(turns, start)
        initial = dict(state)
        inside = [turn for turn in turns if start <= turn["start_frame"] < end]
        conversation = [_system_turn(), *(_with_state(turn, state) for turn in inside)]
        clips.append(
            {
                "id": f"{uid}_{number}",
                "video_uid": uid,
                "inferred_goal": recording.goal,
                "inferred_knowledge": knowledge,
                "video_labels": {},
                "conversation": conversation,
                "dst": steps,
                "initial_dst_state": initial,
                "frames_file": f"frames/{recording.name}__view{view}.arrow",
                "start_frame_idx": start,
                "end_frame_idx": end,
                "seq_len": end - start,
                "dataset": "synth",
                "clip_idx": number,
                "max_seq_len": 4096,
                "num_tokens_per_img": 1,
                "fps": _plain(config.fps),
                "quality": 5.0,
            }
        )
    return clips


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _system_turn() -> dict[str, Any]:
    return {
        "role": "system",
        "content": _SYSTEM,
        "start_frame": 0,
        "end_frame": 1,
        "labels": "system|generic",
    }


def _turns(
    event: Event, recording: Recording, rng: np.random.Generator, config: SynthConfig
) -> Iterator[dict[str, Any]]:
    """An event's turns, in order: complete, start, assistant; or user, assistant."""
    start = event.turn_frame
    seconds = _seconds(rng, start, config)
    if event.kind == "question":
        yield _turn("user", _pick(rng, _QUESTIONS), event.frame, _seconds(rng, event.frame, config), "user|generic")
    if event.kind == "placement":
        yield _update(event.step, "complete", start, seconds)
        if event.step + 1 < len(recording.step_names):
            yield _update(event.step + 1, "start", start, seconds)
    if event.speaks:
        says = {"placement": _PRAISE, "lamp": _WARNINGS, "question": _ANSWERS}[event.kind]
        yield _turn("assistant", _pick(rng, says), start, seconds, "assistant|generic")


def _seconds(rng: np.random.Generator, start: int, config: SynthConfig) -> float:
    """A time in the second of a turn's two frames, as in the real clip: start < time * fps < start + 2."""
    return round((start + 1 + 0.2 * _between(rng, 1, 4)) / config.fps, 3)


def _turn(role: str, content: Any, start: int, seconds: float, labels: str) -> dict[str, Any]:
    return {
        "role": role,
        "content": content,
        "time": seconds,
        "start_frame": start,
        "end_frame": start + 2,
        "labels": labels,
    }


def _update(step: int, transition: str, start: int, seconds: float) -> dict[str, Any]:
    content = [{"id": f"S{step + 1}", "transition": transition}]
    return _turn("DST_UPDATE", content, start, seconds, f"initiative|dst_update,dst_{transition},steps_1")


def _updates(turn: dict[str, Any]) -> list[dict[str, str]]:
    return turn["content"] if turn["role"] == "DST_UPDATE" else []


def _state_before(turns: list[dict[str, Any]], frame: int) -> dict[str, str]:
    """State at `frame`: the first step began with the video, the turns before it have happened."""
    state = {"S1": "in_progress"}
    for turn in turns:
        if turn["start_frame"] < frame:
            state |= {u["id"]: TRANSITIONS[u["transition"]] for u in _updates(turn)}
    return state


def _with_state(turn: dict[str, Any], state: dict[str, str]) -> dict[str, Any]:
    """The turn with the state before it (its own steps in, later ones out); moves `state` past it."""
    before = {**{u["id"]: "not_started" for u in _updates(turn)}, **state}
    before = {step: before[step] for step in sorted(before, key=lambda step: int(step[1:]))}
    state |= {u["id"]: TRANSITIONS[u["transition"]] for u in _updates(turn)}
    return {**turn, "dst_state": before}


def _dst_steps(recording: Recording, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The whole task's steps; one ends, and the next starts, at the time of its `complete`."""
    ends = {u["id"]: turn["time"] for turn in turns for u in _updates(turn) if u["transition"] == "complete"}
    steps = []
    start = 0.0
    for number, name in enumerate(recording.step_names, 1):
        end = ends[f"S{number}"]
        steps.append({"type": "step", "id": f"S{number}", "start_ts": start, "end_ts": end, "name": name})
        start = end
    return steps


# ---- files -------------------------------------------------------------------------------------------


def synth(out: Path, config: SynthConfig | None = None) -> SynthReport:
    """Counts of what was written to `out`, the same bytes for the same config, whatever the process.

    Written beside `out` and renamed into place at the end. Raises UsageError (a ValueError) if `out` holds
    something already.
    """
    config = config or SynthConfig()
    began = time.perf_counter()
    if out.exists() and (not out.is_dir() or not is_vacant(out)):
        raise UsageError(f"{out}: is there and not empty; expected a new or empty folder; name another")
    made = not out.exists()
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
        if made:
            with suppress(OSError):
                out.rmdir()  # of a run that failed
    return SynthReport(splits, round(time.perf_counter() - began, 3))


def _rng(config: SynthConfig, split: str, recording: int, use: int) -> np.random.Generator:
    """Its own generator for each recording and use (0: plan, 1: words, 2 and on: views)."""
    return np.random.default_rng([config.seed, SPLITS.index(split), recording, use])


def _write_split(folder: Path, split: str, config: SynthConfig) -> SplitCounts:
    clips: list[dict[str, Any]] = []
    frames = size = 0
    for number in range(config.recordings[split]):
        recording = plan_recording(f"nusar-{split}-{number:04d}", _rng(config, split, number, 0), config)
        for view in range(config.views):
            clips += make_clips(recording, view, _rng(config, split, number, 1), config)
            pixels = draw_view(recording, _rng(config, split, number, 2 + view), config)
            path = folder / "frames" / f"{recording.name}__view{view}.arrow"
            write_frames(path, pixels, config.jpeg_quality)
            frames += len(pixels)
            size += path.stat().st_size
    path = folder / f"{split}_training.json"
    path.write_text(json.dumps(clips, indent=2) + "\n", encoding="utf-8")
    recordings = config.recordings[split]
    return SplitCounts(recordings, recordings * config.views, len(clips), frames, size + path.stat().st_size)


def write_frames(path: Path, frames: np.ndarray, quality: int = 80) -> None:
    """Write uint8 frames [F, P, P, 3] as ProAssist does: an Arrow IPC stream, `frame` base64 JPEG."""
    schema = pa.schema([pa.field("frame", pa.string())])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for first in range(0, len(frames), ROWS_PER_BATCH):
            encoded = [_jpeg(frame, quality) for frame in frames[first : first + ROWS_PER_BATCH]]
            writer.write_batch(pa.record_batch([pa.array(encoded, pa.string())], schema=schema))


def _jpeg(frame: np.ndarray, quality: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality, optimize=True)  # 18% smaller
    return base64.b64encode(buffer.getvalue()).decode("ascii")
