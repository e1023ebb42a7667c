"""What a model that runs live has read, says, and knows of the state: one frame after the other.

    prompt | [user ... end] image*k -> both heads decide | [DST ... end] [assistant ... end] | image*k -> ...

Both logits are read at a frame's last token, before any text of that frame. Where one reaches its threshold and its
refractory time is over, its text is written (greedily) and stands in the context from then on. What stands where is
training's (`trainer.sequence`): its prompt, its blocks, its rule of what a new window repeats.

A context that is full starts over as a training window does: the prompt with the state before the oldest frame that is
kept (the model's own replay), then the last quarter of the room, as it was read. So memory is bounded for hours, which
is what the state is for. Every decision is made within `max_tokens` and the model's positions; only the texts after a
context's last frame may run past the former. The steps here ask an `Engine` to read for them.

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
from pipeline.state import replay
from pipeline.updates import parse_updates
from trainer.config import TrainConfig
from trainer.evaluation.scores import HEADS, Updates
from trainer.live.engine import Part, Read, Steps
from trainer.model import ProspectModel
from trainer.sequence import REPLIES, Block, prompt_ids, state_before, to_repeat, utterance
from trainer.tokenizer import Tokens

HEAD_OF = {"DST_UPDATE": "dst_update", "assistant": "speaking"}  # role -> the head that it waits for
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DecodingConfig:
    """When a text is written, and how long it may be."""

    thresholds: Mapping[str, float]  # logits, for "speaking" and, where the arm has that head, "dst_update"; >= fires
    refractory_s: float = 2.0  # a head that fired is silent for so long
    most_text: int = 64  # tokens of one text; then its end is forced


class FrameInput(NamedTuple):
    """One frame."""

    frame: int  # absolute
    heard: Sequence[str]  # what the user says before it
    features: Tensor  # [k, H]
    script: Mapping[str, str] | None = None  # instead of thresholds and writing: what each role says after it


class FrameOutput(NamedTuple):
    """At one frame."""

    logits: Floats  # [2]
    said: str | None = None  # None: silent
    dst_text: str | None = None  # None: no update, or an arm that writes none
    updates: Updates | None = None  # None: no update


class Context:
    """One stream: what the model has read of `task`, whose prompt it starts with, and its last frames by themselves,
    from which the end is read again when the room is full."""

    room: int  # tokens beside the prompt, whose length no state changes
    _read: int  # tokens
    _unread: list[Part]

    def __init__(
        self, model: ProspectModel, tokens: Tokens, task: ClipExample, config: TrainConfig, live: DecodingConfig
    ) -> None:
        self.arm, self.tokens, self.task, self.live = model.arm, tokens, task, live
        self.k = model.tokens_per_frame
        self.heads = HEADS if self.arm.dst_head else HEADS[:1]  # those that the arm has, by row of the logits
        self.budget, _ = lengths(model, config, live)
        self.restarts = -1  # how often it was full
        self._last = {role: -np.inf for role, head in HEAD_OF.items() if head in self.heads}  # frame it fired at
        self._state = state_before(task, task.start_frame)  # before the oldest frame of the context
        self._held: list[_Held] = []
        self._start_over(0)

    @property
    def used(self) -> int:
        """Tokens of the context, with those that are not read yet."""
        return self._read + sum(map(len, self._unread))

    @property
    def state(self) -> dict[str, str]:
        """Step id -> state, after all updates that the model made."""
        return replay(self._state, (update for held in self._held for update in held.updates))

    def see(self, coming: Sequence[FrameInput]) -> Steps[list[FrameOutput]]:
        """What the model makes of the first of these frames and of those after it, up to one at which it fires.

        What is read past that one is forgotten again: as it is mostly silent, several frames cost one pass.
        """
        held = self._fitting(coming)
        ends = np.cumsum([new.block.cost(self.k) for new in held])
        unread = sum(map(len, self._unread))
        parts = [*self._unread, *(part for new in held for part in new.parts)]
        logits: Floats = yield Read(parts, self._read, (unread + ends).tolist())
        texts: Mapping[str, str | None] = {}
        count = 0
        while count < len(held) and not texts:
            texts = self._texts(coming[count], logits[count])
            count += 1
        self._held += held[:count]
        self._read, self._unread = self._read + unread + int(ends[count - 1]), []
        answered = yield from self._answer(texts)
        return [FrameOutput(row) for row in logits[: count - 1]] + [FrameOutput(logits[count - 1], *answered)]

    # ---- decisions ---------------------------------------------------------------------------------------

    def _texts(self, seen: FrameInput, logits: Floats) -> Mapping[str, str | None]:
        """What each role says after a frame; None: what the model writes."""
        if seen.script is not None:
            return seen.script
        firing = [role for role in self._last if self._fires(role, logits, seen.frame)]
        self._last |= dict.fromkeys(firing, seen.frame)
        return dict.fromkeys(firing)

    def _fires(self, role: str, logits: Floats, frame: int) -> bool:
        head = HEAD_OF[role]
        rested = (frame - self._last[role]) / self.task.fps >= self.live.refractory_s - 1e-6
        return rested and float(logits[HEADS.index(head)]) >= self.live.thresholds[head]

    # ---- what is read ------------------------------------------------------------------------------------

    def _fitting(self, coming: Sequence[FrameInput]) -> list[_Held]:
        """Those of the frames that fit, at least the first: for that one the context starts over."""
        fitting: list[_Held] = []
        left = self.budget - self.used
        for new in coming:
            heard = utterance("user", new.heard, self.tokens) if new.heard else []
            held = _Held(Block(heard), new.features)
            cost = held.block.cost(self.k)
            if cost > left:
                if fitting:
                    break
                self._start_over(cost)
                left = self.budget - self.used
            fitting.append(held)
            left -= cost
        return fitting

    def _answer(self, texts: Mapping[str, str | None]) -> Steps[tuple[str | None, str | None, Updates | None]]:
        """(said, text of the update, updates) after the last frame; the update first, as in training."""
        said = dst_text = updates = None
        if "DST_UPDATE" in texts:
            dst_text, updates = yield from self._update(texts["DST_UPDATE"])
        if "assistant" in texts:
            said = yield from self._reply("assistant", texts["assistant"])
        return said, dst_text, updates

    def _update(self, text: str | None) -> Steps[tuple[str | None, Updates]]:
        """A state update after the last frame, in the words that the arm uses for it: its text, what that says."""
        if self.arm.dst_text == "none":
            return None, ()
        if self.arm.dst_text == "markers":
            self._add(utterance("DST_UPDATE", [], self.tokens))
            return None, ()
        text = yield from self._reply("DST_UPDATE", text)
        made = parse_updates(text)
        self._held[-1].updates = tuple(update for update in made if update[0] in self._state)
        return text, made

    def _reply(self, role: str, text: str | None) -> Steps[str]:
        """A text after the last frame, written by the model where it is None."""
        if text is None:
            ids = yield from self._write(role)
            self._held[-1].block.replies.append([self.tokens.marker[role], *ids, self.tokens.end])
            return self.tokens.decode(ids)
        self._add(utterance(role, [text], self.tokens))
        return text

    def _write(self, role: str) -> Steps[list[int]]:
        """The likeliest token, one by one, until END or `most_text`; END is left to be read with the next frame."""
        ids: list[int] = []
        self._unread.append([self.tokens.marker[role]])
        while len(ids) < self.live.most_text:
            wish = Read(self._unread, self._read, None)
            self._read, self._unread = self.used, []
            likeliest = yield wish
            if likeliest == self.tokens.end:
                break
            ids.append(likeliest)
            self._unread.append([likeliest])
        self._unread.append([self.tokens.end])
        return ids

    def _add(self, ids: list[int]) -> None:
        self._held[-1].block.replies.append(ids)
        self._unread.append(ids)

    def _start_over(self, cost: int) -> None:
        """Forget all but the last frames, as many as a training window would repeat before one that costs `cost`."""
        state = self._state if self.arm.state else None
        prompt = len(prompt_ids(self.task, self.tokens, state))
        self.room = self.budget - prompt
        if self.room < max(cost, 1):
            raise InputError(
                f"clip {self.task.clip_id}: its prompt and a frame with what the user says take "
                f"{prompt + cost} tokens, but max_tokens leaves {self.budget}; raise --max-tokens"
            )
        left, kept = to_repeat(self.room, cost), len(self._held)
        while kept and (left := left - self._held[kept - 1].block.cost(self.k)) >= 0:
            kept -= 1
        forgotten, self._held = self._held[:kept], self._held[kept:]
        self._state = replay(self._state, (update for held in forgotten for update in held.updates))
        self._read, self.restarts = 0, self.restarts + 1
        self._unread = [prompt_ids(self.task, self.tokens, self._state if self.arm.state else None)]
        self._unread += (part for held in self._held for part in held.parts)


@dataclass
class _Held:
    """One frame of the context as it was read."""

    block: Block
    frame: Tensor  # [k, H]
    updates: Updates = ()  # of steps that the task has

    @property
    def parts(self) -> list[Part]:
        return list(self.block.parts(self.frame))


def lengths(model: ProspectModel, config: TrainConfig, live: DecodingConfig) -> tuple[int, int]:
    """(tokens of a context up to its last frame, and with the texts that may follow)."""
    texts = len(REPLIES) * (live.most_text + 2)
    budget = min(config.max_tokens, model.vlm.config.text_config.max_position_embeddings - texts)
    return budget, budget + texts
