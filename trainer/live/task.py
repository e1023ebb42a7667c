"""The task of a stream: goal, steps and the state at its start, as a clip, from which prompts are built.

It comes from a small JSON file, from a clip of a conversations file, or from a clip of preprocess's output, which also
gives its range of frames and its user's texts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from pipeline.readers.clip import text_of
from pipeline.schema import NOT_SAMPLED, TRANSITIONS, State
from pipeline.state import contradicts
from pipeline.timeline import find_clip
from trainer.sequence import texts_at


@dataclass(frozen=True)
class Task:
    clip: ClipExample  # with goal, steps and state
    frames: range | None = None  # absolute; None: all of the video
    user_texts: Mapping[int, Sequence[str]] = field(default_factory=dict)  # by the frame that they stand before

    def texts_before(self, frame: int, skipped: int) -> list[str]:
        """The user's texts before a frame and before the `skipped` frames that precede it."""
        return [text for n in range(frame - skipped, frame + 1) for text in self.user_texts.get(n, ())]


class _Step(msgspec.Struct):
    id: str
    name: str


class _TaskFile(msgspec.Struct):
    goal: str | None = None
    knowledge: str | None = None
    steps: list[_Step | str] = []  # names alone are S1, S2, ...
    initial_state: dict[str, State] = {}


def find_task(path: Path | None, clip: str | None, video: str, fps: float | None, trained_fps: float) -> Task:
    """The task in `path`: a JSON file, or `clip` of a folder of preprocess, with its frames and its user's texts.

    fps: asked for by the user; None: as trained, or as the clip has it. Raises InputError.
    """
    if clip is not None and path is None:
        raise InputError(f"clip {clip!r}: --clip needs --task, the file or folder that the clip is in")
    if path is None or not path.is_dir():
        return Task(read_task(path, Path(video).name, clip, trained_fps if fps is None else fps))
    if clip is None:
        raise InputError(f"{path}: is a folder; name one of its clips: --clip test:0")
    view = find_clip(path, clip)
    example = Split(path, view.split).clip(view.row["clip"], rate=1.0)
    if fps not in (None, example.fps):
        raise InputError(f"clip {example.clip_id}: has {example.fps:g} frames/s, not {fps:g}; leave --fps out")
    if video.isascii() and video.isdigit():
        raise InputError(f"camera {video}: a clip of {path} is a part of a video; name a JSON file with --task")
    return Task(example, range(example.start_frame, example.end_frame), texts_at(example, "user"))


def read_task(path: Path | None, name: str, clip: str | None, fps: float) -> ClipExample:
    """A clip without turns from frame 0 on, with the goal, knowledge, steps and initial state of a JSON file.

    path: a task, or a file of clips, of which `clip` is an id or a number; None: nothing is known. Raises InputError.
    """
    try:
        task = _TaskFile() if path is None else msgspec.convert(_task_fields(_read_clip(path, clip)), _TaskFile)
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}; expected goal, steps as names or {{id, name}}, initial_state") from None
    steps = dict((f"S{i}", s) if isinstance(s, str) else (s.id, s.name) for i, s in enumerate(task.steps, 1))
    if len(steps) < len(task.steps):
        raise InputError(f"{path} steps: two have the same id, expected different ones")
    if unknown := [step for step in task.initial_state if step not in steps]:
        raise InputError(f"{path} initial_state: {unknown[0]!r} is none of the steps, expected their ids")
    return ClipExample(
        clip_id=name, clip=0, video_uid=name, recording_id=name, fps=fps, start_frame=0, num_frames=0,
        frames_file=None, goal=task.goal, knowledge=task.knowledge, steps=tuple(steps.items()),
        initial_state=tuple(task.initial_state.items()), turns=(), sampling_seed=0, neg_rate=0.0, positive="onset",
        labels=np.full((2, 0), NOT_SAMPLED, np.int8),
    )  # fmt: skip


def _read_clip(path: Path, clip: str | None) -> dict[str, Any]:
    """The object that `clip` names in a JSON array, a single object, or a file with one object per line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected JSON with goal and steps, or clips")
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        try:
            value = json.loads(content)
        except json.JSONDecodeError:
            value = [json.loads(line) for line in content.split(b"\n") if line.strip()]
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); expected goal and steps, or clips") from None
    clips = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]
    names = [str(one.get("id", one.get("video_uid", number))) for number, one in enumerate(clips)]
    chosen = [one for i, one in enumerate(clips) if clip in (None, names[i], str(i))]
    if len(chosen) != 1:
        some = f"name it with --clip, e.g. {', '.join(names[:4])}" if names else "give an object with goal and steps"
        raise InputError(f"{path}: {len(chosen)} clips fit, expected one; {some}")
    return chosen[0]


def _task_fields(clip: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of _TaskFile; of a clip of a conversations file they have other names.

    A given state that the clip's own updates contradict is left out: generators write the one at the clip's end.
    """
    dst, given = clip.get("dst"), clip.get("initial_dst_state") or {}
    contents = (turn.get("content") for turn in clip.get("conversation") or () if isinstance(turn, dict))
    updates = [u for content in contents if isinstance(content, list) for u in content if isinstance(u, dict)]
    known = [(u.get("id", ""), u["transition"]) for u in updates if u.get("transition") in TRANSITIONS]
    if isinstance(given, dict) and contradicts(given, known):
        given = {}
    return {
        "goal": clip.get("goal", text_of(clip.get("inferred_goal"), "", [])),
        "knowledge": clip.get("knowledge", text_of(clip.get("inferred_knowledge"), "", [])),
        "steps": clip.get("steps", dst.get("steps") if isinstance(dst, dict) else dst) or [],
        "initial_state": clip.get("initial_state", given) or {},
    }
