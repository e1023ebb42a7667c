"""Continuous batching: each session yields read requests; one forward pass serves all of them.

    logits = yield ReadRequest([prompt, user_text, frame], prefix=0, decide_at=[40])  # decisions at the 40th token
    token = yield ReadRequest([[marker]], prefix=40)                                  # the next token to write

A session is a generator written as if it ran alone. When one has finished, its slot of the KV cache goes to the next.
On a GPU a single session's frames and written tokens are replayed as CUDA graphs: one launch each instead of 1,500.

    L tokens of all requests    H hidden    V vocabulary    k tokens per frame
    W tokens of a pass of fixed shape    T tokens of a slot    G heads that share keys and values
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer.attention import use_packed
from trainer.body_graph import Step, record
from trainer.live.kv_cache import AttentionPlan, BatchedRows, CacheRow, KVCache, upload, use_slots
from trainer.model import ProspectModel
from trainer.tokenizer import Tokens

MAX_SLOTS = 64
CACHE_BYTES = 2 << 30  # of keys and values together, on a CPU
FREE_SHARE = 0.5  # on a GPU: of the memory that is free
GRAPHED = ("cuda",)  # devices on which a single session's short reads are one graph
WIDTH = 16  # W, or more where a frame has as many tokens
BESIDE = 8  # tokens that fit beside a frame: the end of a text, a short user text
SMALL_HIDDEN = 512  # below it threads of a CPU wait longer than they work (tiny: 1 is 3 times as fast as 2)
Floats = npt.NDArray[np.float32]
Part = Sequence[int] | Tensor  # ids, or a frame's features [k, H]
Result = TypeVar("Result")


@dataclass(frozen=True)
class ReadRequest:
    """Read `parts` after the first `prefix` tokens of the slot, and forget what it holds past those.

    The answer: both heads' logits [n, 2] after each number of tokens in `decide_at`, or the likeliest next token's id.
    """

    parts: Sequence[Part]
    prefix: int
    decide_at: Sequence[int] | None = None

    def __len__(self) -> int:
        """Tokens to be read."""
        return sum(map(len, self.parts))


Steps = Generator[ReadRequest, Any, Result]  # yields requests, is sent the answers, returns its result


class Engine:
    """A model with `slots` slots of `capacity` tokens. To be used within `streaming`."""

    def __init__(self, model: ProspectModel, tokens: Tokens, slots: int, capacity: int) -> None:
        self.model = model
        self._cache = KVCache(model.vlm, slots, capacity, torch.bfloat16 if model.bf16 else torch.float32)
        self._slots = range(slots)
        self._token_bias = token_bias(tokens, model.vlm.lm_head.weight)
        graphed = slots == 1 and model.device.type in GRAPHED
        self._static = StaticPass(model, self._cache, self._token_bias) if graphed else None

    def run(self, session: Steps[Result]) -> Result:
        """The result of one alone; it may read on after what the one before it read."""
        return next(self.run_all(iter([session])))

    def run_all(self, sessions: Iterator[Steps[Result]]) -> Iterator[Result]:
        """Results in the order of `sessions`, of which as many run at once as there are slots."""
        active: dict[int, tuple[int, Steps[Result], ReadRequest]] = {}  # slot -> number, session, its request
        finished: dict[int, Result] = {}
        waiting, due = enumerate(sessions), 0

        def advance(slot: int, number: int, session: Steps[Result], answer: Any) -> None:
            try:
                active[slot] = number, session, session.send(answer)
            except StopIteration as end:
                active.pop(slot, None)
                finished[number] = end.value

        while True:
            for slot in self._slots:
                while slot not in active and (following := next(waiting, None)) is not None:
                    advance(slot, *following, None)
            while due in finished:
                yield finished.pop(due)
                due += 1
            if not active:
                return
            for slot, answer in self._answers({slot: request for slot, (_, _, request) in active.items()}).items():
                advance(slot, *active[slot][:2], answer)

    def _answers(self, requests: Mapping[int, ReadRequest]) -> dict[int, Floats | int]:
        """By slot: what one forward pass says to all requests."""
        if self._static is not None and len(requests[0]) <= self._static.width:
            return {0: self._static.read(requests[0])}
        rows: list[CacheRow] = []
        for slot, request in sorted(requests.items()):
            rows.append(CacheRow(slot, request.prefix, len(request), rows[-1].offset + rows[-1].length if rows else 0))
        ends = [row.offset + end - 1 for row in rows for end in requests[row.slot].decide_at or ()]
        lasts = [row.offset + row.length - 1 for row in rows if requests[row.slot].decide_at is None]
        ids: list[int] = []
        image: list[int] = []  # places of the frames' tokens
        frames: list[Tensor] = []
        for part in (part for row in rows for part in requests[row.slot].parts):
            if isinstance(part, Tensor):
                image += range(len(ids), len(ids) + len(part))
                frames.append(part)
            ids += [0] * len(part) if isinstance(part, Tensor) else part
        plan = self._cache.plan(rows)
        columns = (np.array(column, np.int64) for column in (ids, image, [*ends, *lasts]))
        ids_, image_, read_at = upload(self.model.device, *columns)
        embedded = self.model.body.embed_tokens(ids_)  # [L, H]
        if frames:
            embedded = embedded.index_copy(0, image_, torch.cat(frames).to(embedded.dtype))
        inputs = {"inputs_embeds": embedded[None], "position_ids": plan.positions[None], "use_cache": False}
        hidden = self.model.body(**inputs, plan=plan).last_hidden_state[0][read_at]
        results: list[Tensor] = []
        if ends:
            results.append(self.model.decisions(hidden[: len(ends)])[:2].T.flatten())
        if lasts:
            following = self.model.vlm.lm_head(hidden[len(ends) :]) + self._token_bias
            results.append(following.argmax(-1).float())  # ids are below 2**24
        host = torch.cat(results).cpu().numpy()  # the one thing that the host waits for
        decided, written = iter(host[: 2 * len(ends)].reshape(-1, 2)), iter(host[2 * len(ends) :])
        answers: dict[int, Floats | int] = {}
        for row in rows:
            counts = requests[row.slot].decide_at
            answers[row.slot] = int(next(written)) if counts is None else np.stack([next(decided) for _ in counts])
        return answers


# ---- passes of fixed shape, as CUDA graphs -----------------------------------------------------------


class StaticPass:
    """Reads at most `width` tokens in slot 0, padded to W past the session's end, which attend over all T under a mask.

    The weights are those at construction. For use within `streaming`."""

    def __init__(self, model: ProspectModel, cache: KVCache, token_bias: Tensor) -> None:
        body, device = model.body, model.device
        self._model, self._token_bias, self._group = model, token_bias, cache.heads_per_kv
        self.width = max(WIDTH, model.tokens_per_frame + BESIDE)
        # past the capacity, so that they stay where they are; SDPA would copy a mask of a length that 8 does not divide
        self._slabs = cache.reserve(-(-(cache.capacity + self.width) // 8) * 8)
        layers = [(name, part) for name, part in body.named_modules() if isinstance(part, nn.Linear) and model.bf16]
        self._weights = {f"{name}.weight": layer.weight.detach().bfloat16() for name, layer in layers}  # cast once
        host = torch.zeros(self.width + 2, dtype=torch.int64)
        self._host = host.pin_memory() if device.type == "cuda" else host
        self._inputs = self._host.to(device)  # ids, -1 for a frame's token; cached tokens; place of the last new one
        self._features = torch.zeros(self.width, model.hidden, dtype=body.embed_tokens.weight.dtype, device=device)
        self._places = torch.arange(self._slabs[0][0].shape[2], device=device)  # [T]
        self._slot = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._result = torch.empty(0)  # of `_step`, in the same memory in every replay
        self._replay: Step | None = None

    def read(self, request: ReadRequest) -> Floats | int:
        ids: list[int] = []
        for part in request.parts:
            if isinstance(part, Tensor):
                self._features[len(ids) : len(ids) + len(part)].copy_(part)
                ids += [-1] * len(part)
            else:
                ids += part
        padding = [0] * (self.width - len(ids))
        self._host.copy_(torch.tensor([*ids, *padding, request.prefix, len(ids) - 1]))
        self._inputs.copy_(self._host, non_blocking=True)  # the host waits for each result before it writes again
        if self._replay is None:
            [self._replay] = record([self._step]) if self._inputs.is_cuda else [self._step]
        self._replay()
        result = self._result.cpu().numpy()
        if request.decide_at is None:
            return int(result[-1])
        return result[:-1].reshape(2, self.width).T[[end - 1 for end in request.decide_at]]

    def _step(self) -> None:
        """The result, float32 [2 * W + 1]: decision logits, likeliest id. Nothing here may wait for the device."""
        model, width = self._model, self.width
        ids, prefix, last = self._inputs.split([width, 1, 1])
        positions = prefix + self._places[:width]
        hidden = (self._places > positions[:, None]).repeat(self._group, 1)[None, None]  # [1, 1, G * W, T]
        mask = torch.zeros_like(hidden, dtype=self._slabs[0][0].dtype).masked_fill(hidden, -torch.inf)
        rows = BatchedRows(slice(0, 1), self._slot, positions[None], None, None, len(self._places), mask)
        plan = AttentionPlan(self._slabs, positions, (), rows)
        # without autocast's cache, whose copies of weights would be freed before the graph is
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=model.bf16, cache_enabled=False):
            text = model.body.embed_tokens(ids.clamp(min=0))  # [W, H]
            embedded = torch.where((ids < 0)[:, None], self._features, text)
            inputs = {"inputs_embeds": embedded[None], "position_ids": positions[None], "use_cache": False}
            out = functional_call(model.body, self._weights, (), {**inputs, "plan": plan}, tie_weights=False)
            states = out.last_hidden_state[0]  # [W, H]
            likeliest = (model.vlm.lm_head(states.index_select(0, last)) + self._token_bias).argmax(-1)
            self._result = torch.cat([model.decisions(states)[:2].flatten(), likeliest.float()])  # ids are below 2**24


class StaticVision:
    """Features of one live frame after the other, all of one shape. For use within `streaming`."""

    def __init__(self, model: ProspectModel) -> None:
        self._model, self._frame, self._result = model, torch.empty(0), torch.empty(0)

    def __call__(self, frame: npt.NDArray[Any]) -> Tensor:
        """[k, H] of one frame as ProspectModel.frame_features takes it, without the first dimension."""
        pixels = torch.from_numpy(frame)[None]
        if self._model.device.type == "cpu":
            return self._model.frame_features(pixels)[0]
        if self._frame.shape != pixels.shape:
            self._frame = pixels.to(self._model.device)
            [self._replay] = record([self._step])
        self._frame.copy_(pixels.pin_memory(), non_blocking=True)
        self._replay()
        return self._result.clone()  # the next frame's will stand there

    def _step(self) -> None:
        with torch.autocast(self._frame.device.type, torch.bfloat16, enabled=self._model.bf16, cache_enabled=False):
            self._result = self._model.frame_features(self._frame)[0]


def slots_for(model: ProspectModel, capacity: int) -> int:
    """How many sessions to run at once."""
    budget = CACHE_BYTES
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # kept by torch
        budget = int(FREE_SHARE * (free + unused))
    text = model.vlm.config.text_config
    values = 2 * capacity * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return max(1, min(MAX_SLOTS, budget // (values * (2 if model.bf16 else 4))))


@contextmanager
def streaming(model: ProspectModel) -> Iterator[None]:
    """Inference with the KV cache's attention instead of the packed one; afterwards all is as before."""
    threads = torch.get_num_threads()
    if model.device.type == "cpu" and model.hidden < SMALL_HIDDEN:
        torch.set_num_threads(1)
    use_slots(model.vlm)
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
            yield
    finally:
        use_packed(model.vlm)
        torch.set_num_threads(threads)


def token_bias(tokens: Tokens, lm_head: Tensor) -> Tensor:
    """float [V]: -inf for images, markers, other special tokens, unused rows; 0 for ordinary tokens and END."""
    bias = torch.full((len(lm_head),), -torch.inf, device=lm_head.device)
    bias[: len(tokens)] = 0
    added = tokens.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    bias[[number for number, token in added.items() if token.special]] = -torch.inf
    bias[tokens.end] = 0
    return bias
