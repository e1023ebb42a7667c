"""Free-running evaluation: the model conditions on its own generated text.

Of the reference it is given the user's texts and the state at the clip's start, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch

from pipeline.dataset import ClipExample
from pipeline.errors import NotFiniteError
from trainer.config import TrainConfig
from trainer.evaluation.scores import ScoredClip
from trainer.frame_source import FrameSource
from trainer.live.engine import Engine, Steps, slots_for, streaming
from trainer.live.session import DecodingConfig, FrameInput, FrameOutput, Session, token_budget
from trainer.model import ProspectModel
from trainer.sequence import texts_at
from trainer.tokenizer import Tokens

VISION_BATCH = 64  # frames that go through the vision tower together
READ_AHEAD = 4  # frames that are read in one pass, as long as the model is silent
Script = Callable[[ClipExample, int], Mapping[str, str]]  # clip, absolute frame -> role -> text after it


def free_running(
    model: ProspectModel,
    tokens: Tokens,
    clips: Sequence[ClipExample],
    frames: FrameSource,
    config: TrainConfig,
    decoding: DecodingConfig,
    script: Script | None = None,
    slots: int | None = None,
) -> Iterator[ScoredClip]:
    """Each clip with its logits, texts and updates, in the order of `clips`; `probabilities` are the caller's.

    script: texts that are given, beside those that the model writes where a threshold is reached; the arm decides what
    of them enters the context. slots: clips at once, at most (None: as many as memory allows).

    Raises InputError where the prompt and one frame exceed the budget, NotFiniteError where a logit is not finite.
    """
    _, capacity = token_budget(model, config, decoding)
    engine = Engine(model, tokens, min(len(clips), slots or slots_for(model, capacity)), capacity)
    sessions = (_run(Session(model, tokens, clip, config, decoding), model, frames, script) for clip in clips)
    scored = engine.run_all(sessions)
    while True:
        with streaming(model):
            following = next(scored, None)
        if following is None:
            return
        yield following


def _run(session: Session, model: ProspectModel, source: FrameSource, script: Script | None) -> Steps[ScoredClip]:
    clip, texts = session.task, texts_at(session.task, "user")

    def read() -> Iterator[FrameInput]:
        for start in range(clip.start_frame, clip.end_frame, VISION_BATCH):
            loaded = source.load(clip, start, min(start + VISION_BATCH, clip.end_frame))
            features = model.frame_features(torch.from_numpy(loaded).to(model.device))  # [n, k, H]
            for frame, one in enumerate(features, start):
                yield FrameInput(frame, texts.get(frame, []), one, script(clip, frame) if script else {})

    inputs = read()
    outputs: list[FrameOutput] = []
    waiting: list[FrameInput] = []
    ahead = 1
    while waiting := [*waiting, *islice(inputs, max(0, ahead - len(waiting)))]:
        new = yield from session.step(waiting)
        outputs += new
        waiting = waiting[len(new) :]
        ahead = 1 if waiting else min(2 * ahead, READ_AHEAD)  # silence is likely to go on
    logits = np.stack([output.logits for output in outputs], 1)  # [2, F]
    if not np.isfinite(logits[: len(session.heads)]).all():
        raise NotFiniteError(f"clip {clip.clip_id}: its scores are not finite; train again with a lower --lr")
    by_head, said = dict(zip(session.heads, logits, strict=False)), [output.assistant_text for output in outputs]
    updates = [output.updates for output in outputs] if "dst_update" in session.heads else None
    return ScoredClip(clip=clip, logits=by_head, probabilities={}, said=said, updates=updates)
