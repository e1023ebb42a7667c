"""A model runs over a clip as it would live: frame by frame, and what it reads of itself is what it wrote itself.

    prompt | [user ... end] image*k -> both heads decide | [DST ... end] [assistant ... end] | image*k -> ...

Both logits are read at a frame's last token, before any text of that frame. Where one reaches its threshold and its
refractory time is over, its text is written (greedily) and stands in the context from then on. Of the reference it is
given the user's texts and the state at the clip's start, nothing else: only this says what a user would get.
Plain on purpose: one clip at a time, one forward per frame and per written token, the library's attention and cache.
At tiny size 500 frames per CPU-second in silence and 2 ms per written token (600 frames, one thread of a busy machine);
the packed pass over the same frames takes an eighth of that.

A context that is full starts over as a training window does: the prompt with the state before the oldest frame that is
kept (the model's own replay), then the last quarter of the room, as it was read. Every decision is made within
`max_tokens`; only the texts after a context's last frame may run past it.

    F frames of a clip    k tokens per frame    H hidden    L tokens of one forward
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.schema import TRANSITIONS
from trainer.attention import use_packed
from trainer.clips import ClipExample
from trainer.config import TrainConfig
from trainer.errors import NotFiniteError, TrainerError
from trainer.evaluation.scores import HEADS, ScoredClip, Updates
from trainer.frames import FrameSource
from trainer.model import ProspectModel
from trainer.sequence import CONTEXT, REPLIES, prompt_ids, state_before, user_texts, utterance
from trainer.tokenizer import Tokens

HEAD_OF = {"DST_UPDATE": "dst_update", "assistant": "speaking"}  # role -> the head that it waits for
LOOK = 64  # frames that are loaded and looked at together
Floats = npt.NDArray[np.float32]
Script = Callable[[ClipExample, int], Mapping[str, str]]  # clip, absolute frame -> role -> what it says there


@dataclass(frozen=True)
class Live:
    """When a text is written, and how long it may be."""

    thresholds: Mapping[str, float]  # logits, for "speaking" and, where the arm has that head, "dst_update"; >= fires
    refractory_s: float = 2.0  # a head that fired is silent for so long
    most_text: int = 64  # tokens of one text; then its end is forced


def self_fed(
    model: ProspectModel,
    tokens: Tokens,
    clips: Iterator[ClipExample],
    frames: FrameSource,
    config: TrainConfig,
    live: Live,
    script: Script | None = None,
) -> Iterator[ScoredClip]:
    """Each clip with its logits, what was said and which updates were made, in the order of `clips`.

    Probabilities are left out: the correction for sampling is the caller's. `script` replaces the thresholds and the
    writing: what each role says after a frame (absolute) of a clip, by role; the arm still decides what enters the
    context. The model is as before whenever a clip is given out, and afterwards.

    Raises TrainerError where the prompt and one frame exceed the budget, NotFiniteError where a logit is.
    """
    for clip in clips:
        with _streaming(model, config):
            scored = _run(_Context(model, tokens, clip, config, live), frames, script)
        yield scored


@contextmanager
def _streaming(model: ProspectModel, config: TrainConfig) -> Iterator[None]:
    """Stock attention, which takes a cache, instead of the packed one; nothing is trained or compiled."""
    training = model.training
    model.eval()
    model.vlm.set_attn_implementation({"text_config": "sdpa"})
    try:
        with ExitStack() as stack:
            if config.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # lengths differ at every call
            stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16))
            yield
    finally:
        use_packed(model.vlm)
        model.train(training)


# ---- one clip ----------------------------------------------------------------------------------------


def _run(context: _Context, frames: FrameSource, script: Script | None) -> ScoredClip:
    clip, heads = context.clip, _heads(context.model)
    heard = {frame: utterance("user", texts, context.tokens) for frame, texts in user_texts(clip).items()}
    trigger = _Trigger(context.live, heads, clip.fps)
    logits = np.zeros((2, clip.num_frames), np.float32)
    said: list[str | None] = [None] * clip.num_frames
    updates: list[Updates | None] = [None] * clip.num_frames
    for i, seen in enumerate(_look(context.model, frames, clip)):
        frame = clip.start_frame + i
        logits[:, i] = context.see(heard.get(frame, []), seen)
        texts = script(clip, frame) if script else dict.fromkeys(trigger.fire(logits[:, i], frame))
        if "DST_UPDATE" in texts:  # first, as in training
            updates[i] = context.update(texts["DST_UPDATE"])
        if "assistant" in texts:
            said[i] = context.reply("assistant", texts["assistant"])
    if not np.isfinite(logits[: len(heads)]).all():
        raise NotFiniteError(f"clip {clip.clip_id}: its scores are not finite; train anew with a lower --lr")
    return ScoredClip(
        clip=clip,
        logits=dict(zip(heads, logits, strict=False)),
        probabilities={},
        said=said,
        updates=updates if "dst_update" in heads else None,
    )


def _heads(model: ProspectModel) -> tuple[str, ...]:
    """Those that the arm has, by row of the logits."""
    return HEADS if model.arm.dst_head else HEADS[:1]


def _look(model: ProspectModel, frames: FrameSource, clip: ClipExample) -> Iterator[Tensor]:
    """Each frame's features [k, H], in order."""
    for start in range(clip.start_frame, clip.end_frame, LOOK):
        loaded = frames.load(clip, start, min(start + LOOK, clip.end_frame))
        yield from model.frame_features(torch.from_numpy(loaded).to(model.device))


class _Trigger:
    """Thresholds and refractory times of one clip's heads."""

    def __init__(self, live: Live, heads: tuple[str, ...], fps: float) -> None:
        self.live, self.fps = live, fps
        self.last = {role: -np.inf for role, head in HEAD_OF.items() if head in heads}  # role -> frame it fired at

    def fire(self, logits: Floats, frame: int) -> list[str]:
        """The roles whose texts stand after `frame`."""
        firing = [role for role in self.last if self._fires(role, float(logits[HEADS.index(HEAD_OF[role])]), frame)]
        self.last |= dict.fromkeys(firing, frame)
        return firing

    def _fires(self, role: str, logit: float, frame: int) -> bool:
        rested = (frame - self.last[role]) / self.fps >= self.live.refractory_s - 1e-6
        return rested and logit >= self.live.thresholds[HEAD_OF[role]]


# ---- what the model has read -------------------------------------------------------------------------


@dataclass
class _Block:
    """One frame as it was read: user text, features [k, H], replies."""

    parts: list[list[int] | Tensor]
    updates: Updates = ()

    @property
    def cost(self) -> int:
        return sum(map(len, self.parts))


class _Context:
    """What the model has read of a clip: a cache of it, what it will read with the next frame, and the frames by
    themselves, from which the end is read again when the room is full."""

    cache: DynamicCache
    unread: list[list[int] | Tensor]

    def __init__(
        self, model: ProspectModel, tokens: Tokens, clip: ClipExample, config: TrainConfig, live: Live
    ) -> None:
        self.model, self.tokens, self.clip, self.live = model, tokens, clip, live
        texts = len(REPLIES) * (live.most_text + 2)  # may follow the last frame that fits
        self.budget = min(config.max_tokens, model.vlm.config.text_config.max_position_embeddings - texts)
        self.state = state_before(clip, clip.start_frame) if model.arm.state else None
        self.blocks: list[_Block] = []
        self.written = _may_be_written(tokens, model.vlm.lm_head.weight)
        self._start_over(0)

    @property
    def used(self) -> int:
        """Tokens of the context, with those that are not read yet."""
        return int(self.cache.get_seq_length()) + sum(map(len, self.unread))

    def see(self, heard: list[int], frame: Tensor) -> Floats:
        """Logits float32 [2] at the end of `frame` [k, H], before which the ids `heard` stand."""
        block = _Block([heard, frame])
        if self.used + block.cost > self.budget:
            self._start_over(block.cost)
        self.blocks.append(block)
        self.unread += block.parts
        return self.model.decisions(self._read()[None])[:, 0].cpu().numpy()

    def update(self, text: str | None) -> Updates:
        """A state update after the last frame, in the words that the arm uses for it: what it says."""
        if self.model.arm.dst_text == "none":
            return ()
        if self.model.arm.dst_text == "markers":
            self._add(utterance("DST_UPDATE", [], self.tokens))
            return ()
        self.blocks[-1].updates = parse_updates(self.reply("DST_UPDATE", text))
        return self.blocks[-1].updates

    def reply(self, role: str, text: str | None) -> str:
        """A text after the last frame, written by the model where it is None."""
        if text is None:
            ids = self._write(role)
            self.blocks[-1].parts.append([self.tokens.marker[role], *ids, self.tokens.end])
            return self.tokens.decode(ids)
        self._add(utterance(role, [text], self.tokens))
        return text

    def _write(self, role: str) -> list[int]:
        """The likeliest token, one by one, until END or `most_text`; END is left to be read with the next frame."""
        ids: list[int] = []
        self.unread.append([self.tokens.marker[role]])
        while len(ids) < self.live.most_text:
            likeliest = int((self.model.vlm.lm_head(self._read()) + self.written).argmax())
            if likeliest == self.tokens.end:
                break
            ids.append(likeliest)
            self.unread.append([likeliest])
        self.unread.append([self.tokens.end])
        return ids

    def _add(self, ids: list[int]) -> None:
        self.blocks[-1].parts.append(ids)
        self.unread.append(ids)

    def _read(self) -> Tensor:
        """Reads what is unread; the hidden state [H] of its last token."""
        embed = self.model.body.embed_tokens
        parts = [part if isinstance(part, Tensor) else embed(self._ids(part)) for part in self.unread]
        embedded = torch.cat([part.to(embed.weight.dtype) for part in parts])[None]  # [1, L, H]
        self.unread = []
        out = self.model.body(inputs_embeds=embedded, past_key_values=self.cache, use_cache=True)
        hidden: Tensor = out.last_hidden_state[0, -1]
        return hidden

    def _ids(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self.model.device)

    def _start_over(self, cost: int) -> None:
        """Forget all but the last frames: CONTEXT of the room, or less where the next frame's `cost` needs it."""
        room = self.budget - len(prompt_ids(self.clip, self.tokens, self.state))
        if room < max(cost, 1):
            raise TrainerError(
                f"clip {self.clip.clip_id}: its prompt and a frame with what the user says take "
                f"{self.budget - room + cost} tokens, but max_tokens leaves {self.budget}; raise --max-tokens"
            )
        left, kept = min(int(CONTEXT * room), room - cost), 0
        while kept < len(self.blocks) and self.blocks[-1 - kept].cost <= left:
            left -= self.blocks[-1 - kept].cost
            kept += 1
        forgotten, self.blocks = self.blocks[: len(self.blocks) - kept], self.blocks[len(self.blocks) - kept :]
        if self.state is not None:
            self.state = replay(self.state, [update for block in forgotten for update in block.updates])
        self.cache = DynamicCache()
        self.unread = [prompt_ids(self.clip, self.tokens, self.state)]
        self.unread += [part for block in self.blocks for part in block.parts]


def _may_be_written(tokens: Tokens, lm_head: Tensor) -> Tensor:
    """float [V]: 0 for ordinary tokens and END; -inf for images, markers, other special tokens, unused rows."""
    allowed = torch.full((len(lm_head),), -torch.inf, device=lm_head.device)
    allowed[: len(tokens)] = 0
    added = tokens.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    allowed[[number for number, token in added.items() if token.special]] = -torch.inf
    allowed[tokens.end] = 0
    return allowed


# ---- what a state update says ------------------------------------------------------------------------


def parse_updates(text: str) -> Updates:
    """The (step id, transition) pairs of 'S1->complete, S2->start', in order; what does not read so is left out."""
    pairs = [[half.strip() for half in piece.rpartition("->")[::2]] for piece in text.split(",")]
    return tuple((step, transition) for step, transition in pairs if step and transition in TRANSITIONS)


def replay(state: Mapping[str, str], updates: Iterable[tuple[str, str]]) -> dict[str, str]:
    """The state after `updates`; those of steps that it does not have change nothing."""
    return dict(state) | {step: TRANSITIONS[transition] for step, transition in updates if step in state}
