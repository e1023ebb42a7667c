"""Copies between the host and the model's device that overlap with what is computed there.

On CUDA both directions have a stream of their own and go through pinned memory, so neither the host nor the compute
stream waits for the other; the price is that memory of a copy comes back late (`record_stream`). On a CPU nothing is
copied and nothing overlaps: the same calls give what they were given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from trainer.packing import Loaded, Pack, pinned

Result = TypeVar("Result")


class Transfer:
    """Copies to and from `device`. Both methods start a copy and return a function that gives its result."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.overlaps = device.type == "cuda"
        self._up, self._down = (torch.cuda.Stream(device) if self.overlaps else None for _ in range(2))

    def up(self, values: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """To the device. The stream that takes the result waits for the copy; the host does not."""
        if self._up is None:
            moved = [value.to(self.device) for value in values]
            return lambda: moved
        with torch.cuda.stream(self._up):
            moved = [pinned(value).to(self.device, non_blocking=True) for value in values]
            copied = self._up.record_event()

        def take() -> list[Tensor]:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for value in moved:
                value.record_stream(stream)
            return moved

        return take

    def down(self, value: Tensor) -> Callable[[], Tensor]:
        """To the host, once what the current stream has been given so far is done. Taking the result waits for that
        alone, not for what the stream was given since."""
        if self._down is None:
            fetched = value.cpu()
            return lambda: fetched
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            host.copy_(value, non_blocking=True)
            value.record_stream(self._down)
            copied = self._down.record_event()

        def take() -> Tensor:
            copied.synchronize()
            return host

        return take


def fetched(started: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """What each gives, one late: a GPU is given the next pass before the result of the last one is fetched."""
    waiting: deque[Callable[[], Result]] = deque()
    for take in started:
        waiting.append(take)
        if len(waiting) > 1:
            yield waiting.popleft()()
    yield from (take() for take in waiting)


# ---- packs -------------------------------------------------------------------------------------------


def upload(pack: Pack, transfer: Transfer) -> Callable[[], Pack]:
    """Start to move a pack, frames included; the function gives it on the device."""
    moving = pack.device_tensors
    take = transfer.up([pack.frames(), *moving.values()])

    def taken() -> Pack:
        frames, *moved = take()
        values: dict[str, Any] = dict(zip(moving, moved, strict=True))
        return replace(pack, frames=Loaded(frames), **values)

    return taken


@dataclass(frozen=True, eq=False)
class Prefetched(Pack):
    """A pack that moves to the device before it is asked for: `to` gives it there, and starts the next one's copy."""

    take: Callable[[], Pack]

    def to(self, device: torch.device) -> Pack:
        return self.take().to(device)


def uploaded(steps: Iterable[list[Pack]], transfer: Transfer) -> Iterator[list[Pack]]:
    """The steps, whose packs are copied to the device while the one before each is computed; on a CPU as they are.

    Packs must be used once, in order. A step is fetched when the one before it is given out; at most two packs are on
    the device at a time.
    """
    if not transfer.overlaps:
        yield from steps
        return
    waiting: deque[Pack] = deque()
    started: deque[tuple[Pack, Callable[[], Pack]]] = deque()

    def start() -> None:
        if waiting:
            pack = waiting.popleft()
            started.append((pack, upload(pack, transfer)))

    def take(pack: Pack) -> Pack:
        first, copied = started.popleft()
        assert first is pack, "packs are used in order"
        moved = copied()
        start()
        return moved

    source = iter(steps)
    ahead = next(source, None)
    waiting.extend(ahead or [])
    while ahead is not None:
        step, ahead = ahead, next(source, None)
        waiting.extend(ahead or [])
        if not started:
            start()
        yield [Prefetched(**pack.__dict__, take=partial(take, pack)) for pack in step]
