"""Many live runs in one forward pass: each is a plain generator that asks for what it wants read, and waits.

    logits = yield Read([prompt, user, frame], after=0, ends=[40])     what it decides at the 40th of these tokens
    token = yield Read([[marker]], after=40, ends=None)                what it writes next

Whoever runs one clip, or a camera, writes it down as if it were alone; the engine collects what all of them ask for,
reads it in one pass over a cache with a slot for each (`kv_cache`), and answers. One may be writing while others
look, and a slot that is done goes to the next. So a live stream and an evaluation of a thousand clips are one code,
and the second is many times faster (benchmarks/stream). The price: a logit's last digits depend on what else is read in
the pass (1e-6).

    B generators that ask    L tokens that they ask for    H hidden    V vocabulary
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.attention import use_packed
from trainer.config import TrainConfig
from trainer.live.cuda_graph import FixedPass
from trainer.live.kv_cache import Cache, Row, bytes_per_token, download, upload, use_slots
from trainer.model import ProspectModel
from trainer.tokenizer import Tokens

MOST_SLOTS = 64
MOST_BYTES = 2 << 30  # of keys and values together, where several clips run at once on a CPU
SHARE = 0.5  # on a GPU: of the memory that is free
GRAPHED = ("cuda",)  # devices on which a single stream's short reads are one graph
SMALL = 512  # hidden width below which threads of a CPU wait longer than they work (tiny: 1 is 3 times as fast as 2)
Floats = npt.NDArray[np.float32]
Part = Sequence[int] | Tensor  # ids, or a frame's features [k, H]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Read:
    """A wish: to read these tokens after the first `after` of what was read before; the rest of that is forgotten.

    ends: to be told both heads' logits, float32 [n, 2], at the last of so many of the tokens, for each of these n
    counts. None: to be told the id of the likeliest token after all of them that may be written.
    """

    parts: Sequence[Part]
    after: int
    ends: Sequence[int] | None

    def __len__(self) -> int:
        """Tokens to be read."""
        return sum(map(len, self.parts))


Steps = Generator[Read, Any, Result]  # yields wishes, is sent the answers, returns its result


class Engine:
    """A model with room for `slots` contexts of `capacity` tokens each. To be used within `streaming`."""

    def __init__(self, model: ProspectModel, tokens: Tokens, slots: int, capacity: int) -> None:
        self.model = model
        self._cache = Cache(model.vlm, slots, capacity, _dtype(model))
        self._slots = range(slots)
        self._unwritten = _unwritten(tokens, model.vlm.lm_head.weight)
        graphed = slots == 1 and model.device.type in GRAPHED
        self._fixed = FixedPass(model, self._cache, self._unwritten) if graphed else None

    def run(self, steps: Steps[Result]) -> Result:
        """The result of one alone; what the one before it read may be read on."""
        return next(self.run_all(iter([steps])))

    def run_all(self, waiting: Iterator[Steps[Result]]) -> Iterator[Result]:
        """Results in the order of `waiting`, of which as many run at once as there are slots."""
        running: dict[int, tuple[int, Steps[Result], Read]] = {}  # slot -> number, steps, what they wish
        done: dict[int, Result] = {}
        numbered, given = enumerate(waiting), 0

        def go_on(slot: int, number: int, steps: Steps[Result], answer: Any) -> None:
            try:
                running[slot] = number, steps, steps.send(answer)
            except StopIteration as end:
                running.pop(slot, None)
                done[number] = end.value

        while True:
            for slot in self._slots:
                while slot not in running and (following := next(numbered, None)) is not None:
                    go_on(slot, *following, None)
            while given in done:
                yield done.pop(given)
                given += 1
            if not running:
                return
            for slot, answer in self._answers({slot: wish for slot, (_, _, wish) in running.items()}).items():
                number, steps, _ = running[slot]
                go_on(slot, number, steps, answer)

    def _answers(self, wishes: Mapping[int, Read]) -> dict[int, Floats | int]:
        if self._fixed is not None and (answer := self._fixed_answer(wishes[0])) is not None:
            return {0: answer}
        slots = sorted(wishes)
        lengths = [len(wishes[slot]) for slot in slots]
        offsets = [sum(lengths[:i]) for i in range(len(slots))]
        rows = [Row(s, wishes[s].after, length, at) for s, length, at in zip(slots, lengths, offsets, strict=True)]
        looking = {row: ends for row in rows if (ends := wishes[row.slot].ends) is not None}
        writing = [row for row in rows if row not in looking]
        looks = [row.offset + end - 1 for row, ends in looking.items() for end in ends]
        lasts = [row.offset + row.length - 1 for row in writing]
        hidden, looks_, lasts_ = self._read(rows, [part for s in slots for part in wishes[s].parts], looks, lasts)
        found: list[Tensor] = []
        if looks:
            found.append(self.model.decisions(_at(hidden, looks, looks_)).T.flatten())
        if lasts:
            following = self.model.vlm.lm_head(_at(hidden, lasts, lasts_)) + self._unwritten
            found.append(following.argmax(-1).float())  # ids are below 2**24
        host = download(torch.cat(found))
        logits, written = host[: 2 * len(looks)].reshape(-1, 2), host[2 * len(looks) :]
        split = np.split(logits, np.cumsum([len(ends) for ends in looking.values()])[:-1])
        answers: dict[int, Floats | int] = {row.slot: own for row, own in zip(looking, split, strict=False)}
        return answers | {row.slot: int(token) for row, token in zip(writing, written, strict=True)}

    def _fixed_answer(self, wish: Read) -> Floats | int | None:
        """None where it has to be read otherwise: it is too long, or no graph can be made."""
        assert self._fixed is not None
        if not self._fixed.works or len(wish) > self._fixed.width:
            return None
        found = self._fixed.read(wish.parts, wish.after)
        if found is None or wish.ends is None:
            return found and found[1]
        return found[0][:, [end - 1 for end in wish.ends]].T

    def _read(
        self, rows: Sequence[Row], parts: Sequence[Part], looks: list[int], lasts: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(the hidden states of all that is read [L, H]; `looks` and `lasts` on the device)."""
        ids: list[int] = []
        places: list[int] = []  # of the frames' tokens
        for part in parts:
            if isinstance(part, Tensor):
                places += range(len(ids), len(ids) + len(part))
                ids += [0] * len(part)
            else:
                ids += part
        reading = self._cache.plan(rows)
        given = (np.array(column, np.int64) for column in (ids, places, looks, lasts))
        ids_, places_, looks_, lasts_ = upload(self.model.device, *given)
        embedded = self.model.body.embed_tokens(ids_)  # [L, H]
        if places:
            frames = torch.cat([part for part in parts if isinstance(part, Tensor)])
            embedded = embedded.index_copy(0, places_, frames.to(embedded.dtype))
        out = self.model.body(
            inputs_embeds=embedded[None], position_ids=reading.positions[None], use_cache=False, reading=reading
        )
        return out.last_hidden_state[0], looks_, lasts_


def _at(hidden: Tensor, places: list[int], on_device: Tensor) -> Tensor:
    return hidden if places == list(range(len(hidden))) else hidden[on_device]


def slots_for(model: ProspectModel, capacity: int) -> int:
    """How many contexts to run at once: at most MOST_SLOTS, in MOST_BYTES, or a SHARE of what is free on a GPU."""
    most = MOST_BYTES
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        kept = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)  # by torch, unused
        most = int(SHARE * (free + kept))
    return max(1, min(MOST_SLOTS, most // (capacity * bytes_per_token(model.vlm, _dtype(model)))))


@contextmanager
def streaming(model: ProspectModel, config: TrainConfig) -> Iterator[None]:
    """Attention that remembers, instead of the packed one; nothing is trained or compiled. As before afterwards."""
    training, threads = model.training, torch.get_num_threads()
    if model.device.type == "cpu" and model.hidden < SMALL:
        torch.set_num_threads(1)
    if training:  # walking over all modules takes longer than a frame does
        model.eval()
    use_slots(model.vlm)
    try:
        with ExitStack() as stack:
            if config.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))  # lengths differ at every call
            stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16))
            yield
    finally:
        use_packed(model.vlm)
        torch.set_num_threads(threads)
        if training:
            model.train()


def _dtype(model: ProspectModel) -> torch.dtype:
    """Of keys and values."""
    return torch.bfloat16 if model.bf16 else model.vlm.dtype


def _unwritten(tokens: Tokens, lm_head: Tensor) -> Tensor:
    """float [V]: -inf for images, markers, other special tokens, unused rows; 0 for ordinary tokens and END."""
    banned = torch.full((len(lm_head),), -torch.inf, device=lm_head.device)
    banned[: len(tokens)] = 0
    added = tokens.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    banned[[number for number, token in added.items() if token.special]] = -torch.inf
    banned[tokens.end] = 0
    return banned
