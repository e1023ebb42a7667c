"""The rivals: the free-running loop by the library's cache, and one frame live with the library's cache or without any.

Stock attention, transformers' own `DynamicCache`, one clip at a time, one forward pass per frame and per written token.
Prompts, texts, thresholds and what a context keeps when it starts over are ours, so that both sides read the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from pipeline.dataset import ClipExample
from pipeline.schema import HEADS
from pipeline.state import parse_updates, replay
from trainer.config import TrainConfig
from trainer.evaluation.scores import ScoredClip, Updates
from trainer.frame_source import FrameSource
from trainer.live.engine import streaming, token_bias
from trainer.live.kv_cache import use_slots
from trainer.live.rollout import VISION_BATCH
from trainer.live.session import HEAD_OF, DecodingConfig, Session, token_budget
from trainer.model import ProspectModel
from trainer.sequence import prompt_ids, state_before, texts_at, to_repeat, utterance
from trainer.tokenizer import Tokens

Part = Sequence[int] | Tensor  # ids, or a frame's features [k, H]


@contextmanager
def stock(model: ProspectModel) -> Iterator[None]:
    """The library's attention; within `streaming`."""
    model.vlm.set_attn_implementation({"text_config": "sdpa"})
    try:
        yield
    finally:
        use_slots(model.vlm)


def embedded(model: ProspectModel, parts: Sequence[Part]) -> Tensor:
    """[1, L, H]"""
    table = model.body.embed_tokens

    def one(part: Part) -> Tensor:
        found = part if isinstance(part, Tensor) else table(torch.tensor(part, dtype=torch.int64, device=model.device))
        return found.to(table.weight.dtype)

    return torch.cat([one(part) for part in parts])[None]


# ---- one frame live ----------------------------------------------------------------------------------


def live(context: Session, model: ProspectModel, frames: int) -> tuple[list[float], np.ndarray]:
    """(seconds, logits [2, frames]) of the last frames of what `context` has read, one by one after all before them."""
    held = context._frames
    prompt = prompt_ids(context.task, context.tokens, context._state if context.arm.state else None)
    before = [prompt, *(part for one in held[:-frames] for part in one.parts)]
    seconds, logits, cache = [], [], DynamicCache()
    with stock(model):
        model.body(inputs_embeds=embedded(model, before), past_key_values=cache, use_cache=True)
        for one in held[-frames:]:
            started = time.perf_counter()
            out = model.body(inputs_embeds=embedded(model, one.parts), past_key_values=cache, use_cache=True)
            logits.append(model.decisions(out.last_hidden_state[0, -1:])[:, 0].cpu().numpy())
            seconds.append(time.perf_counter() - started)
    return seconds, np.stack(logits, 1)


def again(context: Session, model: ProspectModel) -> tuple[float, np.ndarray]:
    """(seconds, logits [2]) of the last frame, everything before it read once more."""
    prompt = prompt_ids(context.task, context.tokens, context._state if context.arm.state else None)
    started = time.perf_counter()
    with stock(model):
        parts = [prompt, *(part for one in context._frames for part in one.parts)]
        out = model.body(inputs_embeds=embedded(model, parts), use_cache=False)
        logits = model.decisions(out.last_hidden_state[0, -1:])[:, 0].cpu().numpy()
    return time.perf_counter() - started, logits


# ---- a clip at a time ----------------------------------------------------------------------------------


def free_running(
    model: ProspectModel,
    tokens: Tokens,
    clips: Sequence[ClipExample],
    frames: FrameSource,
    config: TrainConfig,
    live: DecodingConfig,
) -> Iterator[ScoredClip]:
    """What `trainer.live.rollout.free_running` gives."""
    for clip in clips:
        with streaming(model), stock(model):
            scored = _run(_Context(model, tokens, clip, config, live), frames)
        yield scored


def _run(context: _Context, frames: FrameSource) -> ScoredClip:
    clip, model = context.clip, context.model
    heads = HEADS if model.arm.dst_head else HEADS[:1]
    heard = {frame: utterance("user", texts, context.tokens) for frame, texts in texts_at(clip, "user").items()}
    last = {role: -np.inf for role, head in HEAD_OF.items() if head in heads}
    logits = np.zeros((2, clip.num_frames), np.float32)
    said: list[str | None] = [None] * clip.num_frames
    updates: list[Updates | None] = [None] * clip.num_frames
    for i, seen in enumerate(_look(model, frames, clip)):
        frame = clip.start_frame + i
        logits[:, i] = context.step(heard.get(frame, []), seen)
        firing = [
            role
            for role in last
            if (frame - last[role]) / clip.fps >= context.live.refractory_s - 1e-6
            and logits[HEADS.index(HEAD_OF[role]), i] >= context.live.thresholds[HEAD_OF[role]]
        ]
        last |= dict.fromkeys(firing, frame)
        if "DST_UPDATE" in firing:
            updates[i] = context.update()
        if "assistant" in firing:
            said[i] = context.reply("assistant")
    return ScoredClip(
        clip, dict(zip(heads, logits, strict=False)), {}, said, updates if "dst_update" in heads else None
    )


def _look(model: ProspectModel, frames: FrameSource, clip: ClipExample) -> Iterator[Tensor]:
    for start in range(clip.start_frame, clip.end_frame, VISION_BATCH):
        loaded = frames.load(clip, start, min(start + VISION_BATCH, clip.end_frame))
        yield from model.frame_features(torch.from_numpy(loaded).to(model.device))


class _Context:
    """What the model has read of a clip, what it will read with the next frame, and the frames by themselves."""

    def __init__(
        self, model: ProspectModel, tokens: Tokens, clip: ClipExample, config: TrainConfig, live: DecodingConfig
    ) -> None:
        self.model, self.tokens, self.clip, self.live = model, tokens, clip, live
        self.budget, _ = token_budget(model, config, live)
        self.state = state_before(clip, clip.start_frame) if model.arm.state else None
        self.blocks: list[list[Part]] = []  # by frame: user text, features, replies
        self.updates: list[Updates] = []  # by frame
        self.written = token_bias(tokens, model.vlm.lm_head.weight)
        self._start_over(0)

    def step(self, heard: list[int], frame: Tensor) -> np.ndarray:
        cost = len(heard) + len(frame)
        if int(self.cache.get_seq_length()) + sum(map(len, self.unread)) + cost > self.budget:
            self._start_over(cost)
        self.blocks.append([heard, frame])
        self.updates.append(())
        self.unread += [heard, frame]
        return self.model.decisions(self._read()[None])[:, 0].cpu().numpy()

    def update(self) -> Updates:
        if self.model.arm.dst_text != "content":
            raise ValueError("an arm whose updates are text is measured")
        self.updates[-1] = parse_updates(self.reply("DST_UPDATE"))
        return self.updates[-1]

    def reply(self, role: str) -> str:
        ids: list[int] = []
        self.unread.append([self.tokens.marker[role]])
        while len(ids) < self.live.max_text:
            likeliest = int((self.model.vlm.lm_head(self._read()) + self.written).argmax())
            if likeliest == self.tokens.end:
                break
            ids.append(likeliest)
            self.unread.append([likeliest])
        self.unread.append([self.tokens.end])
        self.blocks[-1].append([self.tokens.marker[role], *ids, self.tokens.end])
        return self.tokens.decode(ids)

    def _read(self) -> Tensor:
        given, self.unread = embedded(self.model, self.unread), []
        out = self.model.body(inputs_embeds=given, past_key_values=self.cache, use_cache=True)
        return out.last_hidden_state[0, -1]

    def _start_over(self, cost: int) -> None:
        left = to_repeat(self.budget - len(prompt_ids(self.clip, self.tokens, self.state)), cost)
        kept = len(self.blocks)
        while kept and (left := left - sum(map(len, self.blocks[kept - 1]))) >= 0:
            kept -= 1
        if self.state is not None:
            self.state = replay(self.state, [update for made in self.updates[:kept] for update in made])
        self.blocks, self.updates = self.blocks[kept:], self.updates[kept:]
        self.cache = DynamicCache()
        self.unread: list[Part] = [prompt_ids(self.clip, self.tokens, self.state)]
        self.unread += [part for block in self.blocks for part in block]
