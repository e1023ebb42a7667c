"""The text layers of a training pass as two CUDA graphs, forward and backward: two launches instead of 4,500.

A graph reads and writes the same memory in every replay, so a pack is padded: with tokens up to a multiple of an eighth
of the budget, which are windows of their own and have gradient 0, and with empty windows. Each length is recorded when
it first comes. On a CPU, where it is tested, the same code runs without graphs.

    L tokens of a pack    M of its padded row    H hidden
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.packing import Pack, ends_of, upload

GRAPHED = ("cuda",)  # devices on which text layers that learn are graphs
Step = Callable[[], None]


def record(steps: Sequence[Step], pool: Any = None) -> Sequence[Step]:
    """For each step a function that replays it; the steps themselves, with a warning, where no graph can be made.

    All read and write the same tensors in every call. They run in order, three times. pool: memory that other graphs
    use, too, none of which holds a result when these are replayed.
    """
    side, pool = torch.cuda.Stream(), pool or torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in steps]
    try:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for step in [*steps, *steps]:  # libraries choose kernels and take memory before the capture
                step()
        torch.cuda.current_stream().wait_stream(side)
        for step, graph in zip(steps, graphs, strict=True):
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                step()
    except RuntimeError as error:
        warnings.warn(f"no CUDA graph could be made ({str(error).partition(chr(10))[0]}); slower without", stacklevel=2)
        return steps
    return [graph.replay for graph in graphs]


class BodyGraph:
    """The text layers of `body`, whose parameters learn under bfloat16 autocast, in one process."""

    def __init__(self, body: Any, config: TrainConfig) -> None:
        self.body, budget = body, config.micro_batch_tokens
        self.parameters = [p for part in (body.layers, body.norm) for p in part.parameters() if p.requires_grad]
        self.off = config.checkpointing or not self.parameters
        self._gradients: list[Tensor] = []  # the parameters' own, made with the first pack
        self._step = max(budget // 8, 1)
        self._room = [max(budget // 256, 1), config.max_tokens]  # windows, tokens of one: grow to powers of two
        self._rows: dict[int, _Row] = {}  # by M
        self.pool: Any = None

    def __call__(self, embedded: Tensor, pack: Pack) -> Tensor:
        """[L, H] after the last layer and norm, of the pack's embedded tokens [L, H]."""
        count, longest = embedded.shape[0], pack.longest
        size = -(-count // self._step) * self._step
        fill = size - count
        lengths = [*pack.seg_lens.tolist(), *[longest] * (fill // longest), fill % longest]
        for i, needed in enumerate((len(lengths), longest)):
            if needed > self._room[i]:
                self._room[i] = 1 << (needed - 1).bit_length()
                self._rows = {}  # and a new pool with the next
        if self.parameters[0].grad is None:  # each step starts from 0, in the memory to which the graphs add
            self._gradients = self._gradients or [torch.zeros_like(p) for p in self.parameters]
            torch._foreach_zero_(self._gradients)
            for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
                parameter.grad = gradient
        if not self._rows and embedded.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()
        if size not in self._rows:
            self._rows[size] = _Row(self, embedded.new_zeros(size, embedded.shape[1]), *self._room)
        row = self._rows[size]
        ends = ends_of(torch.tensor(lengths + [0] * (self._room[0] - len(lengths))))
        row.replay(embedded.detach(), pack.position_ids, upload(ends, embedded.device))
        if not embedded.requires_grad:  # or autograd would not come by
            embedded = embedded.detach().requires_grad_()
        return _Replayed.apply(embedded, row)  # type: ignore[no-untyped-call, no-any-return]


class _Row:
    """What the graphs of one length read and write."""

    def __init__(self, owner: BodyGraph, embedded: Tensor, windows: int, longest: int) -> None:
        device = embedded.device
        self.owner, self.embedded, self.longest = owner, embedded.requires_grad_(), longest
        self.positions = torch.zeros(len(embedded), dtype=torch.int64, device=device)
        self.ends = torch.zeros(windows + 1, dtype=torch.int32, device=device)
        self.of_hidden = torch.zeros_like(embedded, requires_grad=False)  # the gradient
        self.hidden = self.of_hidden
        self.of_embedded: Tensor | None = None
        self.steps: Sequence[Step] = ()

    def replay(self, embedded: Tensor, positions: Tensor, ends: Tensor) -> None:
        """Read embedded [L, H], positions [L] and the ends of all windows."""
        self.embedded.detach()[: len(embedded)].copy_(embedded)
        self.positions[: len(positions)].copy_(positions)
        self.ends.copy_(ends)
        if not self.steps:
            steps = [self._forward, self._backward]
            self.steps = record(steps, self.owner.pool) if embedded.is_cuda else steps
        self.steps[0]()

    def _forward(self) -> None:
        autocast = torch.autocast(self.embedded.device.type, torch.bfloat16, cache_enabled=False)
        with torch.enable_grad(), autocast:  # a cached copy of a weight would be freed before the graph is
            out = self.owner.body(
                inputs_embeds=self.embedded[None], position_ids=self.positions[None], use_cache=False,
                seg_lens=self.ends.diff(), seg_ends=self.ends, longest=self.longest,
            )  # fmt: skip
        self.hidden = out.last_hidden_state[0]

    def _backward(self) -> None:
        self.embedded.grad = None
        self.hidden.backward(self.of_hidden)  # type: ignore[no-untyped-call]
        self.of_embedded = self.embedded.grad
        self.hidden = self.hidden.detach()  # its nodes would keep the stream that they were recorded on


class _Replayed(torch.autograd.Function):
    """A row's hidden states, as a function of what it read. Its graph adds the parameters' gradients itself."""

    @staticmethod
    def forward(ctx: Any, embedded: Tensor, row: _Row) -> Tensor:
        ctx.row = row
        return row.hidden.detach()[: len(embedded)]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        row = ctx.row
        del ctx.row  # graphs that have been replaced are freed before others are recorded
        row.of_hidden[: len(gradient)].copy_(gradient)
        row.of_hidden[len(gradient) :].zero_()
        row.steps[1]()
        return row.of_embedded[: len(gradient)], None
