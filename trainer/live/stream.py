"""A trained model on one video, frame by frame, for as long as frames come: its task, its steps, its outputs.

A clip streamed with its own user's texts gives the numbers of free-running evaluation: both run `session`. A frame and
each written token cost one forward pass; memory is that of one context. Thresholds are those that `evaluate` chose on
val for this checkpoint, or the user's; there is no default.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text
from scipy.special import expit

from pipeline.dataset import ClipExample
from pipeline.errors import InputError, NotFiniteError
from pipeline.readers.clip import text_of
from pipeline.schema import HEADS, NOT_SAMPLED, TRANSITIONS, State
from pipeline.state import Updates, contradicts
from pipeline.storage import make_folder
from pipeline.summary import HUES
from pipeline.terminal import clock, command, counted, plain
from trainer.checkpoint import LoadedRun, run_hash
from trainer.config import Settings, check_thresholds
from trainer.distributed import best_device
from trainer.live.engine import Engine, StaticVision, streaming
from trainer.live.session import DecodingConfig, FrameInput, Session, token_budget
from trainer.live.video_input import VideoFrame
from trainer.sequence import texts_at, utterance

MAX_PICTURES: Final = 1500  # of a page: one every 2 s and one per event: the first 50 minutes of a quiet stream
_MARKS: Final = {"not_started": "[ ]", "in_progress": "[>]", "completed": "[x]"}
_STYLES: Final = {"user": "bold green", "says": f"bold {HUES['speaking']}", "state": f"bold {HUES['DST']}"}


@dataclass(frozen=True)
class StreamFrame:
    """An object of `stream --json`."""

    frame: int  # of the model's, from 0
    time_s: float  # frame / fps
    logits: dict[str, float]  # by head: "speaking" and, where the arm has that head, "dst_update"
    probabilities: dict[str, float]  # by head, corrected for sampling where that is known
    user_texts: tuple[str, ...]  # before the frame
    updates: Updates | None  # (step id, transition) after it; None: the head did not fire
    dst_text: str | None  # the update as the model wrote it; None: nothing was written
    assistant_text: str | None  # after it; None: silent
    state: dict[str, str]  # step id -> state, after it; {} where the arm keeps none
    tokens: int  # in the context, afterwards
    started_over: bool  # the context was full: the prompt was rebuilt before this frame
    skipped: int  # frames that were due since the one before
    seconds: float  # from having the frame to having all its texts

    @property
    def known_updates(self) -> Updates:
        """Those of steps that the task has."""
        return tuple(update for update in self.updates or () if update[0] in self.state)


@dataclass(frozen=True)
class StreamInfo:  # all text is safe to show
    video: str
    run: str
    arm: str
    fps: float  # of the model's frames
    heads: Sequence[str]  # "speaking" and, where the arm has it, "dst_update"
    goal: str
    steps: Sequence[tuple[str, str]]  # id and name; none for an arm without state
    thresholds: Sequence[float]  # probabilities, of heads; 1 where it never fires


class Stream(ExitStack):
    """One run over one video; a context manager. `task`: the clip whose prompt it starts with (`find_task`)."""

    def __init__(
        self, run: LoadedRun, task: ClipExample, decoding: DecodingConfig, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        run.model.to(best_device())
        self.run, self.task, self.decoding = run, task, decoding
        self._config = replace(run.config, max_tokens=max_tokens or run.config.max_tokens)
        _, capacity = token_budget(run.model, self._config, decoding)
        self._engine = Engine(run.model, run.tokens, 1, capacity)
        self._vision = StaticVision(run.model)
        self._session = Session(run.model, run.tokens, task, self._config, decoding)
        self._has_state = run.model.arm.dst_text == "content"

    def __enter__(self) -> Self:
        self.enter_context(streaming(self.run.model))
        return self

    def step(self, video_frame: VideoFrame, user_texts: Sequence[str] = ()) -> StreamFrame:
        """One frame's result. User texts that do not fit an empty context with the frame are cut, with an ellipsis.

        NotFiniteError where a logit is not finite.
        """
        started, session, tokens = time.perf_counter(), self._session, self.run.tokens
        restarts, room = session.restarts, session.room - session.k
        if user_texts and len(utterance("user", user_texts, tokens)) > room:
            ids = tokens.encode(" ".join(user_texts))
            user_texts = [tokens.decode(ids[: max(0, room - 10)]) + "…"]  # two markers, up to 8 for the ellipsis
        features = self._vision(video_frame.pixels)
        [output] = self._engine.run(session.step([FrameInput(video_frame.frame, user_texts, features)]))
        logits = dict(zip(session.heads, output.logits.tolist(), strict=False))
        if not all(map(math.isfinite, logits.values())):
            raise NotFiniteError(f"frame {video_frame.frame}: the scores are not finite; train again with a lower --lr")
        probabilities = {head: self.probability(logit) for head, logit in logits.items()}
        state = session.state if self._has_state else {}
        return StreamFrame(
            video_frame.frame, video_frame.time_s, logits, probabilities, tuple(user_texts), output.updates,
            output.dst_text, output.assistant_text, state, session.used, session.restarts > restarts,
            video_frame.skipped, time.perf_counter() - started,
        )  # fmt: skip

    def probability(self, logit: float) -> float:
        """Of a head's logit, corrected for sampling where that is known (LoadedRun.logit_correction)."""
        return float(expit(logit + (self.run.logit_correction or 0.0)))

    def info(self, video: str, run: str) -> StreamInfo:
        heads = self._session.heads
        thresholds = [self.probability(self.decoding.thresholds.get(head, math.inf)) for head in heads]
        steps = [(plain(step), plain(name)) for step, name in self.task.steps] if self._has_state else []
        arm, goal = self.run.config.arm, plain(self.task.goal or "")
        return StreamInfo(plain(video), plain(run), arm, self.task.fps, heads, goal, steps, thresholds)


def decoding_config(run: Path, thresholds: Mapping[str, float], refractory_s: float | None) -> DecodingConfig:
    """The thresholds (logits) and the refractory time that `evaluate` chose on val for the checkpoint in `run`, or was
    given; `thresholds` count instead, head by head. A head without one never fires; InputError where that is speaking.
    """
    check_thresholds(thresholds)
    chosen, rest, checkpoint = {}, Settings.refractory_s, run_hash(run)
    paths = [path for folder in (run, run.parent) for path in sorted(folder.glob("evaluation-*/metrics.json"))]
    for path in [*paths, *run.glob("scores/metrics.json")]:  # a benchmark's runs have the latter
        with suppress(ValueError):  # of an evaluation that was cut off
            metrics = json.loads(path.read_bytes())
            if metrics.get("model") == checkpoint:
                chosen, rest = metrics["thresholds"]["event"], metrics["settings"]["refractory_s"]
                break
    chosen = chosen | dict(thresholds)
    if "speaking" not in chosen:
        again = f"run {command('evaluate', run, 'DATA')}, with speech in val, or give --threshold speaking=LOGIT"
        raise InputError(f"{run}: no evaluation of this checkpoint has a threshold for speaking; {again}")
    rest = Settings(refractory_s=rest if refractory_s is None else refractory_s).refractory_s  # checked
    return DecodingConfig(dict.fromkeys(HEADS, math.inf) | chosen, rest)


# ---- the task ------------------------------------------------------------------------------------------


class _Step(msgspec.Struct):
    id: str | int
    name: str


class _TaskFile(msgspec.Struct):
    goal: str | None = None
    knowledge: str | None = None
    steps: list[_Step | str] = []  # names alone are S1, S2, ...
    initial_state: dict[str, State] = {}  # by id


def find_task(
    path: Path | None, clip: str | None, video: str, fps: float | None, trained_fps: float
) -> tuple[ClipExample, dict[int, list[str]]]:
    """A clip from whose fields prompts are built, and the user's texts by the frame that they stand before.

    path: an output folder of preprocess, of which `clip` is one; or, for a clip without frames, a JSON file: a task, or
    conversations, of which `clip` is an id or a number; None: nothing is known.
    """
    if path is not None and path.is_dir():
        if clip is None:
            raise InputError(f"{path}: is a folder; name one of its clips: --clip test:0")
        from pipeline.timeline import find_clip  # polars, which a GPU machine may not have

        _, example = find_clip(path, clip)
        if video.isascii() and video.isdigit():
            raise InputError(f"camera {video}: a clip of {path} is a part of a video; name a JSON file with --task")
        if fps not in (None, example.fps):
            raise InputError(f"clip {example.clip_id}: has {example.fps:g} frames/s, not {fps:g}; leave --fps out")
        return example, texts_at(example, "user")
    if clip is not None and path is None:
        raise InputError(f"clip {clip!r}: --clip needs --task, the file or folder that the clip is in")
    try:
        task = _TaskFile() if path is None else msgspec.convert(_task_fields(_read_clip(path, clip)), _TaskFile)
    except msgspec.ValidationError as error:
        form = '{"goal": "Tea", "knowledge": "", "steps": ["Boil water", "Pour"], "initial_state": {"S1": "completed"}}'
        raise InputError(f"{path}: {error}; expected something like {form}") from None
    steps = dict((f"S{i}", s) if isinstance(s, str) else (str(s.id), s.name) for i, s in enumerate(task.steps, 1))
    if len(steps) < len(task.steps) or not task.initial_state.keys() <= steps.keys():
        raise InputError(f"{path}: expected steps of different ids, and initial_state by them: {', '.join(steps)}")
    name = Path(video).name
    example = ClipExample(
        clip_id=name, clip=0, video_uid=name, recording_id=name, fps=fps or trained_fps, start_frame=0, num_frames=0,
        frames_file=None, goal=task.goal, knowledge=task.knowledge, steps=tuple(steps.items()),
        initial_state=tuple(task.initial_state.items()), turns=(), sampling_seed=0, neg_rate=0.0, positive="onset",
        labels=np.full((2, 0), NOT_SAMPLED, np.int8),
    )  # fmt: skip
    return example, {}


def _read_clip(path: Path, clip: str | None) -> dict[str, Any]:
    """The object that `clip` names in a JSON array, a single object, or a file with one object per line."""
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


# ---- outputs, given one frame and its picture at a time; whole also after an error or Ctrl-C -------------

Show = Callable[[StreamFrame, Image.Image], None]


def json_lines(frame: StreamFrame, image: Image.Image) -> None:
    """One JSON object per frame and line on stdout."""
    print(json.dumps(asdict(frame)), flush=True)


def events_at(frame: StreamFrame) -> Iterator[tuple[str, str, str]]:
    """(kind, text, note) of what happened at a frame, in order; all text safe to show."""
    if frame.skipped:
        yield "lost", f"{counted(frame.skipped, 'frame')} that came too fast", ""
    if frame.started_over:
        yield "context", "full; the prompt was rebuilt" + (" with the state" if frame.state else ""), ""
    for text in frame.user_texts:
        yield "user", plain(text), ""
    if known := frame.known_updates:
        changes = ", ".join(f"{plain(step)} {transition}" for step, transition in known)
        yield "state", changes, " ".join(f"{_MARKS.get(s, '[-]')} {plain(step)}" for step, s in frame.state.items())
    elif frame.updates is not None:
        text = plain(frame.dst_text or "")
        yield "state", f"fired, but changes nothing: {text}" if text else "fired, without a text", ""
    if frame.assistant_text is not None:
        yield "says", plain(frame.assistant_text) or "(nothing)", ""


@contextmanager
def terminal_log(console: Console, info: StreamInfo) -> Iterator[Show]:
    """One line per event; counts at the end."""
    seconds: list[float] = []  # by frame
    counts = Counter[str]()

    def show(frame: StreamFrame, image: Image.Image) -> None:
        seconds.append(frame.seconds)
        spoken, changes = frame.assistant_text is not None, len(frame.known_updates)
        counts.update(spoken=spoken, changes=changes, restarts=frame.started_over, skipped=frame.skipped)
        counts["end"] = frame.frame + 1
        for kind, text, note in events_at(frame):
            line = Text(f"{clock(frame.time_s, tenths=True):>9}  ", "dim")
            line.append(f"{kind:<9}", _STYLES.get(kind, "dim")).append(text, "not dim")
            console.print(line.append(f"  {note}" if note else ""), soft_wrap=True)

    console.print(Text(f"{info.video}: {info.arm} of {info.run}, {info.fps:g} frames/s"), soft_wrap=True)
    try:
        yield show
    finally:
        if seconds:
            ms = np.percentile(seconds, (50, 99), method="inverted_cdf") * 1000
            median, p99 = (f"{one:.2g} ms" if one < 10 else f"{one:,.0f} ms" for one in ms)
            parts = [
                f"{counted(len(seconds), 'frame')} ({clock(counts['end'] / info.fps)})",
                f"{counts['skipped']:,} skipped" if counts["skipped"] else "",
                f"spoke {counted(counts['spoken'], 'time')}",
                counted(counts["changes"], "state change") if counts["changes"] else "",
                f"context rebuilt {counted(counts['restarts'], 'time')}" if counts["restarts"] else "",
                f"median {median} a frame, p99 {p99}",
            ]
            console.print(Text("; ".join(filter(None, parts))), soft_wrap=True)


@contextmanager
def html_page(path: Path, info: StreamInfo) -> Iterator[Show]:
    """Collects a stream for the HTML viewer; writes the page at the end, if there was a frame."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; --html wants the name of a file, e.g. {path}/stream.html")
    make_folder(path.parent)
    rows: list[list[Any]] = []  # frames since the last, tokens, ms, probabilities in 1/10,000, events
    last, state, picture_due_s = -1, dict[str, str](), -math.inf
    pictures: dict[str, str] = {}  # base64 JPEG by frame

    def show(frame: StreamFrame, image: Image.Image) -> None:
        nonlocal last, state, picture_due_s
        shares = [round(10_000 * frame.probabilities[head]) for head in info.heads]
        row = [frame.frame - last, frame.tokens, round(1000 * frame.seconds, 1), *shares]
        more: dict[str, Any] = {}
        if events := list(map(list, events_at(frame))):
            more = {"events": events, "changes": len(frame.known_updates), "lost": frame.skipped}
        if frame.state != state:
            more["state"] = {plain(step): name for step, name in frame.state.items()}
        if (more or frame.time_s >= picture_due_s) and len(pictures) < MAX_PICTURES:
            picture_due_s = picture_due_s if more else frame.time_s + 2
            small, file = image.convert("RGB"), BytesIO()
            small.thumbnail((192, 192), Image.Resampling.BILINEAR, reducing_gap=2.0)
            small.save(file, "JPEG", quality=68)
            pictures[str(frame.frame)] = base64.b64encode(file.getvalue()).decode()
        rows.append([*row, more] if more else row)
        last, state = frame.frame, frame.state

    try:
        yield show
    finally:
        if rows:
            data = {"page": "stream", "about": asdict(info), "frames": rows, "pictures": pictures}
            from pipeline.viewer import write_page

            write_page(path, f"{info.video} - stream", data)
