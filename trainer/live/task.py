"""What is being done in a video that nobody has annotated: goal, steps, and the state that they start from.

Told by a small JSON file, by a clip of a conversations file as it is, or by a clip of preprocess's output, which has
its user's lines, too. All become a clip, as that is what prompts are built from (`trainer.sequence`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset import ClipExample, Split, read_manifest
from pipeline.errors import InputError
from pipeline.readers.checks import text as text_of
from pipeline.schema import NOT_SAMPLED, STATES, TRANSITIONS
from pipeline.state import contradicts
from pipeline.terminal import command
from trainer.live.video_input import Feed, Seen
from trainer.sequence import user_texts

MOST_BYTES = 256 << 20  # of a file


@dataclass(frozen=True)
class Task:
    """What is done in a video: a clip whose prompt a stream starts with, and what is known of its frames."""

    clip: ClipExample
    frames: range | None = None  # absolute; None: all that come
    lines: Mapping[int, Sequence[str]] = field(default_factory=dict)  # frame -> what the user says before it

    @property
    def fps(self) -> float:
        return self.clip.fps

    @property
    def first(self) -> int:
        """The frame that it starts at."""
        return self.frames.start if self.frames else 0

    def cut(self, feed: Feed) -> Iterator[Seen]:
        """The frames of the feed that are the task's; InputError at the end where the feed is shorter."""
        last = None if self.frames is None else self.frames.stop - 1
        number = -1
        for seen in feed:
            number = seen.frame
            if last is None or number <= last:
                yield seen
            if last is not None and number >= last:
                return
        if last is not None:
            raise InputError(f"{feed.name}: ends at frame {number}, but its clip at {last}; get the whole file")

    def heard(self, seen: Seen) -> Sequence[str]:
        """What the clip's user says before a frame, and before those that were skipped for it."""
        return [text for n in range(seen.frame - seen.skipped, seen.frame + 1) for text in self.lines.get(n, ())]


def find_task(path: Path | None, clip: str | None, video: str, fps: float | None, trained: float) -> Task:
    """The task that `path` tells: a JSON file, or `clip` of a folder of preprocess, with its frames and its user.

    fps: that the user asks for; None: as `trained`, or as the clip has it. InputError where it tells none.
    """
    if clip is not None and path is None:
        raise InputError(f"clip {clip!r}: of what? name its file or folder with --task")
    if path is None or not path.is_dir():
        return Task(read_task(path, Path(video).name, clip, trained if fps is None else fps))
    if clip is None:
        raise InputError(f"{path}: a folder; say which of its clips is meant: --clip test:0")
    found = clip_of(path, clip)
    if fps not in (None, found.fps):
        raise InputError(f"clip {found.clip_id}: has {found.fps:g} frames/s, not {fps:g}; leave --fps out")
    if video.isascii() and video.isdigit():
        raise InputError(f"camera {video}: a clip of {path} is a part of a video; name a JSON file with --task")
    return Task(found, range(found.start_frame, found.end_frame), user_texts(found))


def read_task(path: Path | None, name: str, clip: str | None, fps: float) -> ClipExample:
    """What is being done, as a clip without turns that starts at frame 0: goal, steps, the state that it starts from.

    path: a JSON file with `goal`, `knowledge`, `steps` ([{id, name}], or names), `initial_state` ({id: state}),
    all of them optional, or a clip of a conversations file (of several the one whose id or number is `clip`).
    None: nothing is known. name: what the task is called in messages. InputError where the file says something else.
    """
    told = {} if path is None else _read_json(path, clip)
    dst = told.get("dst")
    dst = dst.get("steps") if isinstance(dst, dict) else dst
    steps = tuple(_steps(path, told.get("steps", dst) or []))
    state = told.get("initial_state", _given_state(told)) or {}
    known = dict(steps)
    if not isinstance(state, dict) or any(step not in known or of not in STATES for step, of in state.items()):
        raise InputError(
            f"{path} initial_state: expected an object of its steps' ids with one of {', '.join(STATES)} each"
        )
    texts = {key: told.get(key, text_of(told.get(f"inferred_{key}"), key, [])) for key in ("goal", "knowledge")}
    for key, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise InputError(f"{path} {key}: found {text!r:.60}, expected text")
    return _task(name, fps, texts["goal"], texts["knowledge"], steps, tuple(state.items()))


def clip_of(data: Path, clip: str) -> ClipExample:
    """A clip of a folder of preprocess, by its id or number or `split:` and either. InputError without one."""
    splits = dict.fromkeys(shard["split"] for shard in read_manifest(data)["shards"] if shard["clips"])
    only, _, rest = clip.partition(":")
    wanted = {only: (rest,)} if only in splits else dict.fromkeys(splits, (clip,))
    found = [
        example
        for split, names in wanted.items()
        for example in Split(data, split).in_order()
        if example.clip_id in (*names, clip) or str(example.clip) in names
    ]
    if len(found) != 1:
        which = "no clip" if not found else f"{len(found)} clips"
        raise InputError(f"{data}: {which} {clip!r}; name one like test:0, {command('inspect', data)} shows them")
    return found[0]


def _task(
    name: str,
    fps: float,
    goal: str | None,
    knowledge: str | None,
    steps: tuple[tuple[str, str], ...],
    state: tuple[tuple[str, str], ...],
) -> ClipExample:
    return ClipExample(
        clip_id=name, clip=0, video_uid=name, recording_id=name, fps=fps, start_frame=0, num_frames=0,
        frames_file=None, goal=goal, knowledge=knowledge, steps=steps, initial_state=state, turns=(),
        sampling_seed=0, neg_rate=0.0, positive="onset", labels=np.full((2, 0), NOT_SAMPLED, np.int8),
    )  # fmt: skip


def _read_json(path: Path, clip: str | None) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: no such file, or none to be read; expected JSON with goal and steps, or clips")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path}: over {MOST_BYTES >> 20} MB; run preprocess on it, and name one clip of its output")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    try:
        several = _clips(text)
        json.dumps(several, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); expected goal and steps, or clips") from None
    if not all(isinstance(one, dict) for one in several):
        raise InputError(f"{path}: found {text!r:.60}, expected an object with goal and steps, or a list of clips")
    chosen = [
        one for number, one in enumerate(several) if clip is None or clip in (str(number), str(_id(one)))
    ]  # fmt: skip
    if len(chosen) != 1:
        some = ", ".join(str(_id(one) or number) for number, one in enumerate(several[:4]))
        raise InputError(f"{path}: {len(chosen)} clips fit, expected one; name it with --clip, e.g. of {some}")
    return dict(chosen[0])


def _clips(text: str) -> list[Any]:
    """Of a JSON array, an object, or one object per line; lines end at "\n" alone: a text may hold U+2028."""
    try:
        told = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return told if isinstance(told, list) else [told]


def _id(told: Any) -> Any:
    return told.get("id", told.get("video_uid")) if isinstance(told, dict) else None


def _given_state(told: Mapping[str, Any]) -> Any:
    """A generated clip's initial state, unless its own updates contradict it: generators write the one at its end."""
    given = told.get("initial_dst_state")
    updates: list[tuple[Any, Any]] = []
    for turn in told.get("conversation") or ():
        if isinstance(turn, dict) and turn.get("role") == "DST_UPDATE" and isinstance(turn.get("content"), list):
            updates += [(one.get("id"), one.get("transition")) for one in turn["content"] if isinstance(one, dict)]
    known = [(step, transition) for step, transition in updates if transition in TRANSITIONS]
    return {} if isinstance(given, dict) and contradicts(given, known) else given


def _steps(path: Path | None, told: Any) -> Sequence[tuple[str, str]]:
    """(id, name) of [{id, name}], or of names, which are then S1, S2, ..."""
    steps: list[tuple[str, str]] = []
    if not isinstance(told, list):
        raise InputError(f"{path} steps: found {told!r:.60}, expected a list")
    for number, step in enumerate(told, 1):
        named = {"id": f"S{number}", "name": step} if isinstance(step, str) else step
        if not isinstance(named, dict) or not all(isinstance(named.get(key), str) for key in ("id", "name")):
            raise InputError(f"{path} steps.{number}: found {step!r:.60}, expected a name, or an id and a name")
        steps.append((named["id"], named["name"]))
    if len(dict(steps)) < len(steps):
        raise InputError(f"{path} steps: an id twice, expected one of its own for each")
    return steps
