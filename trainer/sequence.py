"""A clip -> the token sequences that the model reads: pure, no torch, no files.

    [system ... [step] S1: name [state] ... end] image*k image*k [user ... end] image*k image*k
    [DST ... end] [assistant ... end] image*k ...

User text stands before the first frame of its range, DST and assistant text after the last of theirs (after the onset
frame where labels are onsets), so no event's text precedes a frame that is positive for it. A role's texts at one frame
are joined, in order; a turn without frames, or wholly outside the clip, gives no text. Live decoding builds its context
from the same pieces: `prompt_ids`, `Block`, `utterance`, `to_repeat`. A clip over the token budget becomes windows, of
which each repeats up to CONTEXT of the budget from before its own frames. Every frame is supervised in exactly one.

    L tokens    F frames of the window    k tokens per frame    T supervised text tokens
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.dataset import ClipExample, Turn
from pipeline.errors import InputError
from pipeline.schema import NOT_SAMPLED
from pipeline.state import initial_state, replay, write_updates
from trainer.arms import ARMS, Arm
from trainer.tokenizer import Tokens

CONTEXT = 0.25  # share of a window's room for frames that repeats what came before
ROLE = "You are a helpful assistant."  # opens every prompt
REPLIES = ("DST_UPDATE", "assistant")  # in this order where both stand after one frame
DEFAULT_ARM = ARMS["speak+dst"]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Window:
    """One sequence. Its first `context` frames only give context; labels there are -100."""

    clip: ClipExample
    first_frame: int  # absolute number of the window's first frame
    context: int
    input_ids: Ints  # [L]
    frame_positions: Ints  # [F, k] where each frame's image tokens stand; both heads read at the last
    lm_positions: Ints  # [T] positions whose *next* token is a supervised text token
    labels: npt.NDArray[np.int8]  # [2, F]

    @property
    def end_frame(self) -> int:
        return self.first_frame + len(self.frame_positions)


@dataclass
class Block:
    """A frame with the texts around it, as ids."""

    before: list[int] = field(default_factory=list)
    replies: list[list[int]] = field(default_factory=list)

    def cost(self, k: int) -> int:
        return len(self.before) + k + sum(map(len, self.replies))


def build_windows(clip: ClipExample, tokens: Tokens, k: int, max_tokens: int, arm: Arm = DEFAULT_ARM) -> list[Window]:
    """The clip's windows, in order; InputError where the prompt and one frame with its texts exceed `max_tokens`."""
    blocks = _blocks(clip, tokens, arm)
    costs = np.array([block.cost(k) for block in blocks], np.int64)
    prompt = _prompt(clip, tokens, clip.start_frame, arm)
    room = max_tokens - len(prompt)
    if costs.max() > room:
        worst = f"frame {clip.start_frame + int(costs.argmax())}: {costs.max()} tokens with its texts"
        leaves = f"max_tokens {max_tokens} leaves {room} beside the prompt; raise --max-tokens"
        raise InputError(f"clip {clip.clip_id} {worst}, but {leaves}")
    windows = []
    for first, own, end in cut_windows(costs, room):
        ids = list(prompt if first == 0 else _prompt(clip, tokens, clip.start_frame + first, arm))
        frames: list[range] = []
        supervised: list[int] = []
        for i in range(first, end):
            ids += blocks[i].before
            frames.append(range(len(ids), len(ids) + k))
            ids += [tokens.image] * k
            for reply in blocks[i].replies:
                if i >= own:
                    supervised += range(len(ids), len(ids) + len(reply) - 1)
                ids += reply
        labels = clip.labels[:, first:end].copy()
        labels[:, : own - first] = NOT_SAMPLED
        places = np.array(frames, np.int64), np.array(supervised, np.int64)
        windows.append(Window(clip, clip.start_frame + first, own - first, np.array(ids, np.int64), *places, labels))
    return windows


def cut_windows(costs: Ints, room: int) -> list[tuple[int, int, int]]:
    """(first, own, end) of each window, as indices into `costs` [F]: [first, own) is context, [own, end) its own."""
    total = np.concatenate([[0], np.cumsum(costs)])
    cuts: list[tuple[int, int, int]] = []
    own = 0
    while own < len(costs):
        first = int(np.searchsorted(total, total[own] - to_repeat(room, int(costs[own])))) if own else 0
        end = int(np.searchsorted(total, total[first] + room, side="right")) - 1
        cuts.append((first, own, end))
        own = end
    return cuts


def to_repeat(room: int, next_cost: int) -> int:
    """Tokens of earlier frames that a new window may repeat before its first own frame, which costs `next_cost`."""
    return min(int(CONTEXT * room), room - next_cost)


class _ByteTokens:
    """In place of Tokens, gives at least as many ids as any tokenizer: one per byte, one for a space in front."""

    marker: Mapping[str, int] = defaultdict(int)
    end = 0

    def encode(self, text: str) -> list[int]:
        return [0] * (1 + len(text.encode()))


def check_budget(clips: Iterable[ClipExample], tokens: Tokens, k: int, max_tokens: int, longest: int, arm: Arm) -> None:
    """InputError where `build_windows` would refuse a clip; it names the budget that would do, if the model reads that
    many tokens (`longest`). Only clips whose bytes could exceed `max_tokens` are tokenized."""

    def needed(clip: ClipExample, tokens: Any) -> int:
        prompt = _prompt(clip, tokens, clip.start_frame, arm)
        return len(prompt) + max(block.cost(k) for block in _blocks(clip, tokens, arm))

    suspects = (clip for clip in clips if needed(clip, _ByteTokens()) > max_tokens)
    size, worst = max(((needed(clip, tokens), clip.clip_id) for clip in suspects), default=(0, ""))
    if size > max_tokens:
        has = f"prompt and one frame with its texts have {size} tokens, max_tokens is {max_tokens}"
        hint = f"use --max-tokens {size}" if size <= longest else f"the model reads {longest}: shorten its texts"
        raise InputError(f"clip {worst}: {has}; {hint}")


def _text_frame(turn: Turn, clip: ClipExample) -> int | None:
    """The frame that a turn's text stands at (before it for a user, else after it), or None without frames."""
    if turn.start_frame is None or turn.end_frame is None or turn.start_frame >= turn.end_frame:
        return None
    if turn.start_frame >= clip.end_frame or turn.end_frame <= clip.start_frame:
        return turn.start_frame
    if turn.role == "user":
        return max(turn.start_frame, clip.start_frame)
    return turn.start_frame if clip.positive == "onset" else min(turn.end_frame, clip.end_frame) - 1


def _blocks(clip: ClipExample, tokens: Tokens, arm: Arm) -> list[Block]:
    """One block per frame of the clip [F]."""
    blocks = [Block() for _ in range(clip.num_frames)]
    if not arm.texts:
        return blocks
    for frame, texts in texts_at(clip, "user").items():
        blocks[frame - clip.start_frame].before = utterance("user", texts, tokens)
    for role in ("assistant",) if arm.dst_text == "none" else REPLIES:
        for frame, texts in texts_at(clip, role).items():
            content = [] if role == "DST_UPDATE" and arm.dst_text == "markers" else texts
            blocks[frame - clip.start_frame].replies.append(utterance(role, content, tokens))
    return blocks


def texts_at(clip: ClipExample, role: str) -> dict[int, list[str]]:
    """A role's texts by absolute frame, in order. User texts stand before that frame, others after it."""
    texts: dict[int, list[str]] = {}
    for turn in clip.turns:
        frame = _text_frame(turn, clip) if turn.role == role else None
        if frame is not None and clip.start_frame <= frame < clip.end_frame:
            texts.setdefault(frame, []).append(write_updates(turn.updates) if role == "DST_UPDATE" else turn.text)
    return texts


def utterance(role: str, texts: Sequence[str], tokens: Tokens) -> list[int]:
    """Ids of a role's marker, its texts joined, and the end."""
    joined = (", " if role == "DST_UPDATE" else " ").join(texts)
    return [tokens.marker[role], *tokens.encode(joined), tokens.end]


def state_before(clip: ClipExample, frame: int) -> dict[str, str]:
    """State of each step just before `frame`: the initial one, with the transitions whose text stands earlier."""
    placed: list[tuple[int, tuple[tuple[str, str], ...]]] = []
    at = clip.end_frame  # a transition without frames counts from the next turn that has some: no future leaks in
    for turn in reversed(clip.turns):
        own = _text_frame(turn, clip)
        at = at if own is None else own
        placed.insert(0, (at, turn.updates))
    placed.sort(key=lambda item: item[0])
    updates = (update for at, of_turn in placed if at < frame for update in of_turn)
    return replay(initial_state((step for step, _ in clip.steps), clip.initial_state), updates)


def _prompt(clip: ClipExample, tokens: Tokens, frame: int, arm: Arm) -> list[int]:
    """The prompt with the state before `frame`; its length is the same for any frame, as a state is one token."""
    # an arm whose updates carry no content gets the state at the clip's start: live, it could not replay them either
    known = frame if arm.dst_text == "content" else clip.start_frame
    return prompt_ids(clip, tokens, state_before(clip, known) if arm.state else None)


def prompt_ids(clip: ClipExample, tokens: Tokens, state: Mapping[str, str] | None) -> list[int]:
    """Ids of role, goal and steps, each with its `state` (None: without); of the recipe where there are no steps."""
    recipe = None if clip.steps else clip.knowledge
    task = [ROLE, *(text for text in (clip.goal, recipe) if text)]
    ids = [tokens.marker["system"], *tokens.encode("\n".join(task))]
    for step, name in clip.steps:
        ids += [tokens.marker["step"], *tokens.encode(f"{step}: {name}")]
        ids += [] if state is None else [tokens.marker[state[step]]]
    return [*ids, tokens.end]
