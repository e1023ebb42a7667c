"""A model runs over clips as it would live, frame by frame, and what it reads of itself is what it wrote itself.

Of the reference it is given the user's texts and the state at the clip's start, nothing else: only this says what a
user would get. It is what `stream` does (`trainer.live.session`), over many clips at once (`trainer.live.engine`).

    F frames of a clip    k tokens per frame    H hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from pipeline.dataset import ClipExample
from pipeline.errors import NotFiniteError
from trainer.config import TrainConfig
from trainer.evaluation.scores import ScoredClip
from trainer.frame_source import FrameSource
from trainer.live.engine import Engine, Steps, slots_for, streaming
from trainer.live.session import Context, DecodingConfig, FrameInput, FrameOutput, lengths
from trainer.model import ProspectModel
from trainer.sequence import user_texts
from trainer.tokenizer import Tokens

LOOK = 64  # frames that are loaded and looked at together
AHEAD = 4  # frames that are read in one pass, as long as the model is silent
Script = Callable[[ClipExample, int], Mapping[str, str]]  # clip, absolute frame -> role -> what it says there


def self_fed(
    model: ProspectModel,
    tokens: Tokens,
    clips: Sequence[ClipExample],
    frames: FrameSource,
    config: TrainConfig,
    live: DecodingConfig,
    script: Script | None = None,
    slots: int | None = None,
) -> Iterator[ScoredClip]:
    """Each clip with its logits, what was said and which updates were made, in the order of `clips`.

    Probabilities are left out: the correction for sampling is the caller's. `script` replaces the thresholds and the
    writing: what each role says after a frame (absolute) of a clip, by role; the arm still decides what enters the
    context. `slots`: clips at once, at most (None: as many as memory allows). The model is as before whenever a clip is
    given out, and afterwards.

    Raises InputError where the prompt and one frame exceed the budget, NotFiniteError where a logit is.
    """
    _, capacity = lengths(model, config, live)
    most = min(len(clips), slots or slots_for(model, capacity))
    engine = Engine(model, tokens, most, capacity)
    scored = engine.run_all(_run(Context(model, tokens, clip, config, live), model, frames, script) for clip in clips)
    while True:
        with streaming(model, config):
            following = next(scored, None)
        if following is None:
            return
        yield following


def _run(context: Context, model: ProspectModel, frames: FrameSource, script: Script | None) -> Steps[ScoredClip]:
    clip, heard = context.task, user_texts(context.task)
    coming = (
        FrameInput(frame, heard.get(frame, []), seen, script(clip, frame) if script else None)
        for frame, seen in enumerate(_look(model, frames, clip), clip.start_frame)
    )
    happened: list[FrameOutput] = []
    waiting: list[FrameInput] = []
    ahead = 1
    while waiting := [*waiting, *islice(coming, max(0, ahead - len(waiting)))]:
        found = yield from context.see(waiting)
        happened += found
        waiting = waiting[len(found) :]
        ahead = 1 if waiting else min(2 * ahead, AHEAD)  # silence is likely to go on
    logits = np.stack([moment.logits for moment in happened], 1)  # [2, F]
    if not np.isfinite(logits[: len(context.heads)]).all():
        raise NotFiniteError(f"clip {clip.clip_id}: its scores are not finite; train anew with a lower --lr")
    return ScoredClip(
        clip=clip,
        logits=dict(zip(context.heads, logits, strict=False)),
        probabilities={},
        said=[moment.said for moment in happened],
        updates=[moment.updates for moment in happened] if "dst_update" in context.heads else None,
    )


def _look(model: ProspectModel, frames: FrameSource, clip: ClipExample) -> Iterator[Tensor]:
    """Each frame's features [k, H], in order."""
    for start in range(clip.start_frame, clip.end_frame, LOOK):
        loaded = frames.load(clip, start, min(start + LOOK, clip.end_frame))
        yield from model.frame_features(torch.from_numpy(loaded).to(model.device))
