"""One live session: what the model has read of a clip or a video, when its heads fire, what it writes then.

    prompt | [user ... end] image*k -> both heads decide | [DST ... end] [assistant ... end] | image*k -> ...

Where a head's logit at a frame's last token reaches its threshold and its refractory time is over, its text is decoded
greedily and stays in the context. A full context starts over as a training window does (`trainer.sequence`): the prompt
with the state replayed up to the oldest repeated frame, then the last quarter of the room.

    k tokens per frame    H hidden
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from pipeline.schema import HEAD_OF, HEADS
from pipeline.state import Updates, parse_updates, replay
from trainer.config import TrainConfig
from trainer.live.engine import Part, ReadRequest, Steps
from trainer.model import ProspectModel
from trainer.sequence import REPLIES, Block, prompt_ids, state_before, to_repeat, utterance
from trainer.tokenizer import Tokens


@dataclass(frozen=True)
class DecodingConfig:
    """When a text is written, and how long it may be."""

    thresholds: Mapping[str, float]  # logits by head; >= fires, and a head without one never does
    refractory_s: float = 2.0  # seconds in which a head does not fire again
    max_text: int = 64  # tokens of one text; then its end is forced


class FrameInput(NamedTuple):
    frame: int  # absolute
    user_texts: Sequence[str]  # before the frame
    features: Tensor  # [k, H]
    script: Mapping[str, str] = {}  # by role the text after it, beside those that the model writes


class FrameOutput(NamedTuple):
    logits: npt.NDArray[np.float32]  # [2]
    assistant_text: str | None = None  # None: silent; "": it spoke, but its arm writes no texts
    dst_text: str | None = None  # None: no update, or an arm that writes none
    updates: Updates | None = None  # None: no update


@dataclass
class _ContextFrame:
    """One frame of the context, by itself: a new context reads the last ones again."""

    block: Block
    features: Tensor  # [k, H]
    updates: Updates = ()  # of steps that the task has

    @property
    def parts(self) -> list[Part]:
        return [self.block.before, self.features, *self.block.replies]


class Session:
    """One stream of `task`, whose prompt it starts with. InputError where the prompt exceeds the token budget."""

    _cached: int  # tokens that the slot holds
    _unread: list[Part]  # to be read with the next frame
    room: int  # tokens of the budget beside the prompt

    def __init__(
        self, model: ProspectModel, tokens: Tokens, task: ClipExample, config: TrainConfig, decoding: DecodingConfig
    ) -> None:
        self.arm, self.tokens, self.task, self.decoding = model.arm, tokens, task, decoding
        self.k = model.tokens_per_frame
        self.heads = HEADS if self.arm.dst_head else HEADS[:1]  # those that the arm has, by row of the logits
        self.budget, _ = token_budget(model, config, decoding)
        self.restarts = -1  # how often the context was full
        self._last_fired = {role: -np.inf for role, head in HEAD_OF.items() if head in self.heads}  # frame
        self._state = state_before(task, task.start_frame)  # before the oldest frame of the context
        self._frames: list[_ContextFrame] = []
        self._start_over(None)

    @property
    def used(self) -> int:
        return self._cached + sum(map(len, self._unread))

    @property
    def state(self) -> dict[str, str]:
        """Step id -> state, after all updates of the model."""
        return replay(self._state, (update for frame in self._frames for update in frame.updates))

    def step(self, frames: Sequence[FrameInput]) -> Steps[list[FrameOutput]]:
        """Outputs of the first of these frames and of those after it, up to one at which a head fires."""
        added: list[_ContextFrame] = []
        for frame in frames:  # as many as fit; for the first the context starts over if it must
            heard = frame.user_texts if self.arm.texts else ()
            new = _ContextFrame(Block(utterance("user", heard, self.tokens) if heard else []), frame.features)
            if self.used + sum(one.block.cost(self.k) for one in [*added, new]) > self.budget:
                if added:
                    break
                self._start_over(new)
            added.append(new)
        ends = (self.used - self._cached + np.cumsum([one.block.cost(self.k) for one in added])).tolist()
        logits = yield ReadRequest([*self._unread, *(p for one in added for p in one.parts)], self._cached, ends)
        texts: Mapping[str, str | None] = {}
        count = 0
        while count < len(added) and not texts:
            texts = self._due_texts(frames[count], logits[count])
            count += 1
        self._frames += added[:count]  # frames read ahead past the one that fires are forgotten
        self._cached, self._unread = self._cached + ends[count - 1], []
        assistant_text = dst_text = None
        updates: Updates | None = () if "DST_UPDATE" in texts else None
        if updates is not None and self.arm.dst_text == "content":  # the update first, as in training
            dst_text = yield from self._write("DST_UPDATE", texts["DST_UPDATE"])
            updates = parse_updates(dst_text)
            self._frames[-1].updates = tuple((step, move) for step, move in updates if step in self._state)
        elif updates is not None and self.arm.dst_text == "markers":
            yield from self._write("DST_UPDATE", "")
        if "assistant" in texts:
            assistant_text = (yield from self._write("assistant", texts["assistant"])) if self.arm.texts else ""
        last = FrameOutput(logits[count - 1], assistant_text, dst_text, updates)
        return [*map(FrameOutput, logits[: count - 1]), last]

    def _due_texts(self, frame: FrameInput, logits: npt.NDArray[np.float32]) -> Mapping[str, str | None]:
        """By role, what stands after a frame; None: what the model writes."""
        due: dict[str, str | None] = {}
        for role, last in self._last_fired.items():
            rested = (frame.frame - last) / self.task.fps >= self.decoding.refractory_s - 1e-6
            threshold = self.decoding.thresholds.get(HEAD_OF[role], np.inf)
            if rested and float(logits[HEADS.index(HEAD_OF[role])]) >= threshold:
                due[role] = None
        self._last_fired |= dict.fromkeys(due, frame.frame)
        return {**due, **frame.script}

    def _write(self, role: str, text: str | None) -> Steps[str]:
        """A text after the last frame; None: greedy decoding until END or `max_text` tokens."""
        if text is not None:
            given = utterance(role, [text], self.tokens)
            self._frames[-1].block.replies.append(given)
            self._unread.append(given)
            return text
        ids: list[int] = []
        self._unread.append([self.tokens.marker[role]])
        while len(ids) < self.decoding.max_text:
            request = ReadRequest(self._unread, self._cached)
            self._cached, self._unread = self.used, []
            token = yield request
            if token == self.tokens.end:
                break
            ids.append(token)
            self._unread.append([token])
        self._unread.append([self.tokens.end])
        self._frames[-1].block.replies.append([self.tokens.marker[role], *ids, self.tokens.end])
        return self.tokens.decode(ids)

    def _start_over(self, next_frame: _ContextFrame | None) -> None:
        """Forget all but the last frames: as many as a training window repeats before the `next_frame`."""
        cost = 0 if next_frame is None else next_frame.block.cost(self.k)
        left, first = to_repeat(self.room, cost) if self._frames else 0, len(self._frames)
        while first and (left := left - self._frames[first - 1].block.cost(self.k)) >= 0:
            first -= 1
        self._state = replay(self._state, (update for frame in self._frames[:first] for update in frame.updates))
        self._frames = self._frames[first:]
        self._cached, self.restarts = 0, self.restarts + 1
        prompt = prompt_ids(self.task, self.tokens, self._state if self.arm.state else None)
        self._unread = [prompt, *(part for frame in self._frames for part in frame.parts)]
        self.room = self.budget - len(prompt)
        if self.room < max(cost, 1):
            has = f"prompt and a frame with the user's text take {len(prompt) + cost} tokens"
            raise InputError(f"clip {self.task.clip_id}: {has}, max_tokens leaves {self.budget}; raise --max-tokens")


def token_budget(model: ProspectModel, config: TrainConfig, decoding: DecodingConfig) -> tuple[int, int]:
    """(tokens of a context up to its last frame, with the texts that may follow)."""
    texts = len(REPLIES) * (decoding.max_text + 2)
    budget = min(config.max_tokens, model.vlm.config.text_config.max_position_embeddings - texts)
    return budget, budget + texts
