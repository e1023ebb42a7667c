"""A run lives: it sees one frame after the other, speaks, keeps the state, and hears its user; for hours.

What it reads, when it fires and how its context starts over is `session`'s, as in the self-fed evaluation: a
clip streamed with its own user's lines gives the evaluation's numbers (unless a line is too long for its context). One
frame costs one forward pass over its k tokens and what was said before it, and each written token another; all memory
is that of one context. Thresholds are those that `evaluate` chose on val for this very checkpoint, or the user's;
never a default.

    k tokens per frame    S side of the model's square input in pixels
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from pipeline.dataset import ClipExample
from pipeline.errors import InputError, NotFiniteError
from pipeline.terminal import command
from trainer.checkpoint import LoadedRun, run_hash
from trainer.config import Settings
from trainer.evaluation.scores import HEADS, Updates
from trainer.live.cuda_graph import FixedLook
from trainer.live.engine import Engine, streaming
from trainer.live.session import Context, DecodingConfig, FrameInput, lengths
from trainer.live.video_input import Seen

USER_SHARE = 0.25  # of the context beside its prompt: what the user says at one frame is cut to it


@dataclass(frozen=True)
class Moment:
    """What happened at one frame."""

    frame: int  # of the model's, from 0
    time_s: float  # frame / fps
    logits: dict[str, float]  # by head: "speaking" and, where the arm has that head, "dst_update"
    probabilities: dict[str, float]  # likewise, corrected for sampling where that is known
    heard: tuple[str, ...]  # what the user said before it
    updates: Updates | None  # (step id, transition) made after it; None: the head did not fire
    dst_text: str | None  # what the update said, as written; None: nothing was written
    said: str | None  # what the assistant said after it; None: silent
    state: dict[str, str]  # step id -> state, after it; {} where the arm keeps none
    tokens: int  # in the context, afterwards
    started_over: bool  # the context was full: the prompt was rebuilt before this frame
    skipped: int  # frames that went by since the one before
    seconds: float  # from having the frame to having all its texts


class Stream:
    """One run over one video; a context manager. `task`: a clip whose prompt it starts with (`trainer.live.task`).

    max_tokens: of the context, instead of those that the run was trained with.
    """

    def __init__(self, run: LoadedRun, task: ClipExample, live: DecodingConfig, max_tokens: int | None = None) -> None:
        run.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.run, self.task, self.live = run, task, live
        self._config = replace(run.config, max_tokens=max_tokens or run.config.max_tokens)
        _, capacity = lengths(run.model, self._config, live)
        self._engine = Engine(run.model, run.tokens, 1, capacity)
        self._look = FixedLook(run.model)
        self._context = Context(run.model, run.tokens, task, self._config, live)
        self._open = ExitStack()

    @property
    def heads(self) -> Sequence[str]:
        """Those that the arm has."""
        return self._context.heads

    def see(self, seen: Seen, heard: Sequence[str] = ()) -> Moment:
        """What the model makes of a frame, before which the user said `heard`. NotFiniteError where it makes nothing.

        What the user says is cut to USER_SHARE of the context's room, and then ends in an ellipsis.
        """
        started, restarts = time.perf_counter(), self._context.restarts
        heard = self._cut(heard)
        coming = FrameInput(seen.frame, heard, self._look(seen.pixels))
        [found] = self._engine.run(self._context.see([coming]))
        logits = dict(zip(self.heads, found.logits.tolist(), strict=False))
        if not all(map(math.isfinite, logits.values())):
            raise NotFiniteError(f"frame {seen.frame}: the scores are not finite; train anew with a lower --lr")
        return Moment(
            frame=seen.frame,
            time_s=seen.time_s,
            logits=logits,
            probabilities={head: self.probability(logit) for head, logit in logits.items()},
            heard=tuple(heard),
            updates=found.updates,
            dst_text=found.dst_text,
            said=found.said,
            state=self._context.state if self.run.model.arm.dst_text == "content" else {},
            tokens=self._context.used,
            started_over=self._context.restarts > restarts,
            skipped=seen.skipped,
            seconds=time.perf_counter() - started,
        )

    def probability(self, logit: float) -> float:
        """Of a head's logit, corrected for sampling where that is known (LoadedRun.logit_correction)."""
        return float(torch.tensor(logit + (self.run.logit_correction or 0.0), dtype=torch.float64).sigmoid())

    def about(self, video: str) -> dict[str, Any]:
        """What a recording says of its stream."""
        thresholds = {head: self.live.thresholds.get(head, math.inf) for head in self.heads}
        return {
            "video": video,
            "arm": self.run.config.arm,
            "fps": self.task.fps,
            "heads": list(self.heads),
            "thresholds": thresholds,
            "threshold_probabilities": {head: self.probability(logit) for head, logit in thresholds.items()},
            "steps": list(self.task.steps) if self.run.model.arm.dst_text == "content" else [],
            "goal": self.task.goal,
        }

    def __enter__(self) -> Self:
        self._open.enter_context(streaming(self.run.model, self._config))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def _cut(self, heard: Sequence[str]) -> Sequence[str]:
        tokens, left, kept = self.run.tokens, int(USER_SHARE * self._context.room), []
        for text in heard:
            ids = tokens.encode(text)
            kept.append(text if len(ids) <= left else tokens.decode(ids[: max(0, left - 4)]) + "…")
            left -= len(ids)
            if left <= 0:
                break
        return kept


# ---- when it fires -------------------------------------------------------------------------------------


def thresholds_of(run: Path) -> tuple[dict[str, float], float]:
    """(logit by head, refractory time in seconds) that `evaluate` chose on val for the checkpoint in `run`.

    Raises InputError where it was not evaluated, or was another checkpoint then.
    """
    known, wrong = run_hash(run), "was not evaluated, so no threshold was chosen on val"
    found = (path for folder in (run, run.parent) for path in sorted(folder.glob("evaluation-*/metrics.json")))
    for path in [*found, run / "scores" / "metrics.json"]:  # a benchmark's runs have the latter
        try:
            metrics = json.loads(path.read_bytes())
            chosen = {str(head): float(logit) for head, logit in metrics["thresholds"]["event"].items()}
            refractory = float(metrics["settings"]["refractory_s"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if metrics.get("model") != known:
            wrong = f"{path} is of another checkpoint"
        elif "speaking" in chosen:
            return chosen, refractory
        else:
            silent = "nobody speaks in val, or val itself was measured, or there is none"
            wrong = f"evaluated, but {path} has no threshold for speaking: {silent}; preprocess another val"
            break
    again = command("evaluate", run, "DATA")
    raise InputError(f"{run}: {wrong}; run {again}, or give --threshold speaking=LOGIT")


def live_of(run: Path, given: Mapping[str, float], refractory_s: float | None) -> DecodingConfig:
    """When texts are written: by val's thresholds, those that are `given` instead. A head without one never fires."""
    for head, value in given.items():
        if head not in HEADS or math.isnan(value):
            raise InputError(f"threshold {head}={value:g}: expected a logit of one of {', '.join(HEADS)}")
    if refractory_s is not None:
        Settings(refractory_s=refractory_s)  # checks it
    try:
        chosen, rest = thresholds_of(run)
    except InputError:
        if "speaking" not in given:
            raise
        chosen, rest = {}, Settings.refractory_s
    never = dict.fromkeys(HEADS, math.inf)
    return DecodingConfig(never | chosen | dict(given), rest if refractory_s is None else refractory_s)
