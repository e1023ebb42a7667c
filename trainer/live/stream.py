"""A trained model on one video, frame by frame, for as long as frames come.

A clip streamed with its own user's texts gives the numbers of free-running evaluation: both run `session`. A frame and
each written token cost one forward pass; memory is that of one context. Thresholds are those that `evaluate` chose on
val for this checkpoint, or the user's; there is no default.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from pipeline.dataset import ClipExample
from pipeline.errors import InputError, NotFiniteError
from pipeline.schema import HEADS
from pipeline.state import Updates
from pipeline.terminal import command
from trainer.checkpoint import LoadedRun, run_hash
from trainer.config import Settings
from trainer.distributed import best_device
from trainer.live.engine import Engine, StaticVision, streaming
from trainer.live.session import DecodingConfig, FrameInput, Session, token_budget
from trainer.live.video_input import VideoFrame
from trainer.sequence import utterance

ELLIPSIS_TOKENS = 8  # room for the end of a user text that is cut


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


@dataclass(frozen=True)
class StreamInfo:
    video: str
    run: str
    arm: str
    fps: float  # of the model's frames
    heads: Sequence[str]  # "speaking" and, where the arm has it, "dst_update"
    threshold_probabilities: dict[str, float]  # by head; 1 where it never fires
    steps: Sequence[tuple[str, str]]  # id and name; none for an arm without state
    goal: str | None


class Stream:
    """One run over one video; a context manager. `task`: the clip whose prompt it starts with (`trainer.live.task`).

    max_tokens: of the context, instead of those that the run was trained with.
    """

    def __init__(
        self, run: LoadedRun, task: ClipExample, decoding: DecodingConfig, max_tokens: int | None = None
    ) -> None:
        run.model.to(best_device())
        self.run, self.task, self.decoding = run, task, decoding
        self._config = replace(run.config, max_tokens=max_tokens or run.config.max_tokens)
        _, capacity = token_budget(run.model, self._config, decoding)
        self._engine = Engine(run.model, run.tokens, 1, capacity)
        self._vision = StaticVision(run.model)
        self._session = Session(run.model, run.tokens, task, self._config, decoding)
        self._has_state = run.model.arm.dst_text == "content"
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(streaming(self.run.model, self._config))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def step(self, video_frame: VideoFrame, user_texts: Sequence[str] = ()) -> StreamFrame:
        """One frame's result. User texts that do not fit an empty context with the frame are cut to their beginning,
        with an ellipsis.

        NotFiniteError where a logit is not finite.
        """
        started, session, tokens = time.perf_counter(), self._session, self.run.tokens
        restarts, room = session.restarts, session.room - session.k
        if user_texts and len(utterance("user", user_texts, tokens)) > room:
            ids = tokens.encode(" ".join(user_texts))
            user_texts = [tokens.decode(ids[: max(0, room - 2 - ELLIPSIS_TOKENS)]) + "…"]
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
        return float(1 / (1 + np.exp(-np.float64(logit + (self.run.logit_correction or 0.0)))))

    def info(self, video: str, run: str) -> StreamInfo:
        heads = self._session.heads
        at = {head: self.probability(self.decoding.thresholds.get(head, math.inf)) for head in heads}
        steps = self.task.steps if self._has_state else ()
        return StreamInfo(video, run, self.run.config.arm, self.task.fps, heads, at, steps, self.task.goal)


def evaluated_thresholds(run: Path) -> tuple[dict[str, float], float]:
    """(logit by head, refractory time in seconds) that `evaluate` chose on val for the checkpoint in `run`.

    InputError where the run has no evaluation, or none of this checkpoint with a threshold for speaking.
    """
    checkpoint, problem = run_hash(run), "was not evaluated, so no threshold was chosen on val"
    metrics_files = (path for folder in (run, run.parent) for path in sorted(folder.glob("evaluation-*/metrics.json")))
    for path in [*metrics_files, run / "scores" / "metrics.json"]:  # a benchmark's runs have the latter
        if not path.exists():
            continue
        metrics = json.loads(path.read_bytes())
        thresholds = metrics["thresholds"]["event"]
        if metrics.get("model") != checkpoint:
            problem = f"{path} is of another checkpoint"
        elif "speaking" in thresholds:
            return thresholds, metrics["settings"]["refractory_s"]
        else:
            reason = "nobody speaks in val, or val itself was measured, or there is none"
            problem = f"evaluated, but {path} has no threshold for speaking: {reason}; preprocess another val"
            break
    again = command("evaluate", run, "DATA")
    raise InputError(f"{run}: {problem}; run {again}, or give --threshold speaking=LOGIT")


def decoding_config(run: Path, thresholds: Mapping[str, float], refractory_s: float | None) -> DecodingConfig:
    """The evaluation's thresholds and refractory time, or what is given instead. A head without one never fires."""
    for head, value in thresholds.items():
        if head not in HEADS or math.isnan(value):
            raise InputError(f"threshold {head}={value:g}: expected a logit of one of {', '.join(HEADS)}")
    try:
        chosen, rest = evaluated_thresholds(run)
    except InputError:
        if "speaking" not in thresholds:
            raise
        chosen, rest = {}, Settings.refractory_s
    chosen = dict.fromkeys(HEADS, math.inf) | chosen | dict(thresholds)
    return DecodingConfig(chosen, rest if refractory_s is None else refractory_s)
