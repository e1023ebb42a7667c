"""The packs of each optimizer step, built in this process or ahead of it by workers, and copied ahead to a GPU.

What step i reads is a pure function of i, so any worker may build it; it sends packs with their frames through shared
memory. On CUDA copies in both directions have a stream of their own and go through pinned memory, so neither the host
nor the compute stream waits; the price is that memory of a copy comes back late. On a CPU nothing overlaps.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.cluster import available_cores
from pipeline.dataset import Split
from pipeline.errors import InputError
from trainer.config import TrainConfig
from trainer.frame_source import FrameSource
from trainer.packing import Loaded, Pack, pack_windows, upload, windows_of
from trainer.sampler import Sampler
from trainer.tokenizer import Tokens

SHARED_MEMORY = Path("/dev/shm")
MOST_WORKERS = 8  # by default on a GPU
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine


@dataclass
class StepData:
    """Item i: this rank's packs of optimizer step i."""

    split: Split
    tokens: Tokens
    frames: FrameSource
    config: TrainConfig
    rank: int = 0
    size: int = 1

    @cached_property
    def sampler(self) -> Sampler:
        return Sampler(self.split, self.config.seed)

    def places(self, step: int) -> list[tuple[int, int]]:
        return self.sampler.places(step, self.config.clips_per_step, self.rank, self.size)

    def __getitem__(self, step: int) -> list[Pack]:
        clips = [self.split.clip(*place) for place in self.places(step)]
        return pack_windows(windows_of(clips, self.tokens, self.config), self.frames, self.config.micro_batch_tokens)


@dataclass
class _Ahead(Dataset[list[Pack] | InputError]):
    """Items of `data` with their frames; errors as they are, without a worker's traceback."""

    data: StepData

    def __getitem__(self, step: int) -> list[Pack] | InputError:
        try:
            return [pack.loaded() for pack in self.data[step]]
        except InputError as error:
            return error


def default_workers(device: torch.device) -> int:
    """0 on a CPU, whose cores are busy training; on a GPU this rank's cores less one, between 1 and MOST_WORKERS."""
    return min(MOST_WORKERS, max(1, available_cores() // LOCAL_RANKS - 1)) if device.type == "cuda" else 0


def step_packs(
    data: StepData, first: int, workers: int, pin: bool = False, asked: bool = True
) -> Generator[list[Pack]]:
    """The packs of step `first`, `first` + 1, ...; the same whatever the number of `workers`. Close it to end them.

    pin: packs of workers come in pinned memory. asked: by the user; else there may be no worker where memory is small.
    Raises what reading a step raises.
    """
    steps = range(first, data.config.steps)
    workers = _workers_that_fit(data, steps, workers, asked) if workers and steps else 0
    if not workers:
        yield from map(data.__getitem__, steps)
        return
    ahead = DataLoader(
        _Ahead(data),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context=_fork_server(),
        worker_init_fn=partial(end_with, os.getpid()),
        generator=torch.Generator(),  # its own: the global one's state is the run's
    )
    try:
        for packs in ahead:
            if isinstance(packs, InputError):
                raise packs
            yield packs
    except (RuntimeError, EOFError) as error:  # torch's, where a tensor's file could not be received, or none be opened
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in ("ancdata", "ulimit -n")):
            raise
        raise InputError("too few files may be open (ulimit -n); raise the limit, or use --workers 0") from None


def _workers_that_fit(data: StepData, steps: range, workers: int, asked: bool) -> int:
    """As many as can be two steps ahead in half of /dev/shm, where a worker without room dies of a bus error.

    Prints a line where fewer than `workers` fit; InputError where the user `asked` for workers and none fits.
    """
    if not SHARED_MEMORY.is_dir():
        return workers
    disk = os.statvfs(SHARED_MEMORY)
    free = disk.f_bavail * disk.f_frsize / LOCAL_RANKS
    some = steps[:100]  # the largest of which is taken for the largest of all
    frames = max(sum(data.split.num_frames(number) for number, _ in data.places(step)) for step in some)
    clip = data.split.clip(0)
    size = frames * data.frames.load(clip, clip.start_frame, clip.start_frame + 1).nbytes
    needed = max(4 * size, 1)  # two steps of one worker, one in use, one about to be
    fit = 0 if needed > free else min(workers, max(1, int(free / needed) - 1))
    if fit < workers:
        needs = f"a step's frames take up to {size / 1e6:,.0f} MB, a worker {needed / 1e6:,.0f} MB"
        has = f"{needs}, but {SHARED_MEMORY} has {free / 1e6:,.0f} MB free"
        hint = "give it more (docker: --shm-size), lower --clips-per-step, or use --workers 0"
        if asked and not fit:
            raise InputError(f"{has}; {hint}")
        if data.rank == 0:
            print(f"{has}: {fit} workers, not {workers}", file=sys.stderr)
    return fit


def end_with(owner: int, worker: int = 0) -> None:
    """In a worker: end soon after `owner`, also where that was killed. (Torch watches the parent, the fork server.)"""

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(owner, 0)
            except OSError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _fork_server() -> Any:
    """What workers are forked from, with this module imported: forked from a process with threads, they can hang."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each tensor that a worker sends is an open file
    if len(os.fsencode(tempfile.gettempdir())) > 60:  # a socket's name has at most 107 bytes
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    os.environ["PYTHONSAFEPATH"] = "1"  # else a trainer.py in the working folder would be imported instead of ours
    forkserver.set_forkserver_preload(["trainer.loader"])
    forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


# ---- copies between the host and the device ----------------------------------------------------------


class Transfer:
    """Copies to and from `device`. All methods start a copy and return a function that gives its result."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.overlaps = device.type == "cuda"
        self._up, self._down = (torch.cuda.Stream(device) if self.overlaps else None for _ in range(2))

    def up(self, values: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """To the device. The stream that takes the result waits for the copy, the host does not."""
        if self._up is None:
            moved = [value.to(self.device) for value in values]
            return lambda: moved
        with torch.cuda.stream(self._up):
            moved = [upload(value, self.device) for value in values]
            copied = self._up.record_event()

        def take() -> list[Tensor]:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for value in moved:
                value.record_stream(stream)
            return moved

        return take

    def pack(self, pack: Pack) -> Callable[[], Pack]:
        """A pack, frames included, to the device."""
        moving = pack.device_tensors
        take = self.up([pack.frames(), *moving.values()])

        def taken() -> Pack:
            frames, *moved = take()
            values: dict[str, Any] = dict(zip(moving, moved, strict=True))
            return replace(pack, frames=Loaded(frames), **values)

        return taken

    def down(self, value: Tensor) -> Callable[[], Tensor]:
        """To the host. Taking the result waits for what the current stream was given before, not since."""
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


def fetched(started: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """What each gives, one late: a GPU is given the next pass before the result of the last one is fetched."""
    waiting: deque[Callable[[], Any]] = deque()
    for take in started:
        waiting.append(take)
        if len(waiting) > 1:
            yield waiting.popleft()()
    yield from (take() for take in waiting)


@dataclass(frozen=True, eq=False)
class Prefetched(Pack):
    """A pack that moves to the device before it is asked for: `to` gives it there, and starts the next one's copy."""

    take: Callable[[], Pack]

    def to(self, device: torch.device) -> Pack:
        return self.take().to(device)


def uploaded(steps: Iterable[list[Pack]], transfer: Transfer) -> Iterator[list[Pack]]:
    """The steps, whose packs are copied to the device while the one before each is computed: used once, in order."""
    if not transfer.overlaps:
        yield from steps
        return
    waiting: deque[Pack] = deque()
    started: deque[Callable[[], Pack]] = deque()

    def start() -> None:
        if waiting:
            started.append(transfer.pack(waiting.popleft()))

    def take() -> Pack:
        moved = started.popleft()()
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
        yield [Prefetched(**pack.__dict__, take=take) for pack in step]
