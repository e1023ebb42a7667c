"""The packs of each optimizer step, built in this process or ahead of it by workers.

What step i reads is a pure function of i, so any worker may build it. Workers send packs with their frames through
shared memory. A step of pixels is gigabytes (786 KB a frame at 512 x 512), so the bytes loaded and not yet used are
bounded by what /dev/shm had free: workers wait, instead of dying of a bus error.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import tempfile
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.cluster import available_cores
from pipeline.dataset import Split
from pipeline.errors import InputError
from trainer.config import TrainConfig
from trainer.frame_source import FrameSource
from trainer.packing import Pack, pack_windows, windows_of
from trainer.sampler import Sampler
from trainer.tokenizer import Tokens

SHARED_MEMORY = Path("/dev/shm")
MOST_WORKERS = 8  # by default on a GPU


@dataclass
class StepData(Dataset[list[Pack]]):
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

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> list[Pack]:
        clips = self.sampler.step(step, self.config.clips_per_step, self.rank, self.size)
        return pack_windows(windows_of(clips, self.tokens, self.config), self.frames, self.config.micro_batch_tokens)


def default_workers(device: torch.device) -> int:
    """0 on a CPU, whose cores are busy training; on a GPU this rank's cores less one, between 1 and MOST_WORKERS."""
    return min(MOST_WORKERS, max(1, available_cores() // _local_ranks() - 1)) if device.type == "cuda" else 0


def step_packs(data: StepData, first: int, workers: int, pin: bool = False) -> Generator[list[Pack]]:
    """The packs of step `first`, `first` + 1, ...; the same whatever the number of `workers`. Close it to end them.

    pin: packs of workers come in pinned memory. Raises what reading a step raises.
    """
    steps = range(first, len(data))
    if not workers:
        yield from (data[step] for step in steps)
        return
    processes = _fork_server()
    # half of it, shared by this machine's ranks: what else runs here needs some, too
    flight = InFlight(processes, first, _free_shared_memory() / 2 / _local_ranks())
    ahead = DataLoader(
        _Ahead(data, flight),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context=processes,
        worker_init_fn=partial(end_with, os.getpid()),
        generator=torch.Generator(),  # its own: the global one's state is the run's
    )
    try:
        for step, result in zip(steps, ahead, strict=True):
            if isinstance(result, InputError):
                raise result
            packs, size = result
            yield packs
            flight.used(step, size)
    except RuntimeError as error:  # torch's words where a tensor's file descriptor could not be received
        if "ancdata" not in str(error):
            raise
        raise InputError("too few files may be open (ulimit -n); raise the limit, or use --workers 0") from None
    finally:
        flight.used(len(data), 0)  # no worker waits any longer


class _Ahead(Dataset[tuple[list[Pack], int] | InputError]):
    """Items of `data` with their frames, and the bytes of those; errors as they are, without a worker's traceback."""

    def __init__(self, data: StepData, flight: InFlight) -> None:
        self.data, self.flight = data, flight

    def __getitem__(self, step: int) -> tuple[list[Pack], int] | InputError:
        try:
            packs = self.data[step]
            first = [pack.loaded() for pack in packs[:1]]  # says how large a frame is
            size = first[0].frames()[0].nbytes * sum(pack.labels.shape[1] for pack in packs) if packs else 0
            self.flight.wait(step, size)
            return [*first, *(pack.loaded() for pack in packs[1:])], size
        except InputError as error:
            return error


class InFlight:
    """Bytes that workers have loaded and training has not used yet: at most `limit`.

    The step that is due next may exceed it, if there is room: all others wait for it.
    """

    def __init__(self, processes: BaseContext, first: int, limit: float) -> None:
        self.limit = limit
        self._lock = processes.Lock()
        self._bytes, self._due = (processes.Value("q", value, lock=False) for value in (0, first))

    def wait(self, step: int, size: int) -> None:
        """In a worker: until `size` bytes more may be loaded. InputError where they will never fit.

        It looks again and again: a condition's `notify` would wait for ever for a worker that was killed.
        """
        while True:
            with self._lock:
                if step <= self._due.value or self._bytes.value + size <= self.limit:
                    if size > (free := _free_shared_memory()):
                        raise InputError(
                            f"step {step + 1}: its frames take {size / 1e6:,.0f} MB, {SHARED_MEMORY} has "
                            f"{free / 1e6:,.0f} MB free; give it more (docker: --shm-size), lower --clips-per-step, "
                            f"or use --workers 0"
                        )
                    self._bytes.value += size
                    return
            time.sleep(0.02)

    def used(self, step: int, size: int) -> None:
        """In the training process: the packs of this step have left shared memory, and the next step is due."""
        with self._lock:
            self._bytes.value -= size
            self._due.value = step + 1


def _free_shared_memory() -> float:
    """Bytes; infinite where the system has no /dev/shm."""
    if not SHARED_MEMORY.is_dir():
        return math.inf
    disk = os.statvfs(SHARED_MEMORY)
    return disk.f_bavail * disk.f_frsize


def _local_ranks() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


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


def _fork_server() -> BaseContext:
    """The process that workers are forked from, with this module imported: forked from one with threads, they can hang.

    Every tensor that a worker sends is an open file, so their limit is raised; sockets below a long TMPDIR would have
    names of over 107 bytes. PYTHONSAFEPATH: else a trainer.py in the working folder would be imported instead of ours.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if len(os.fsencode(tempfile.gettempdir())) > 60:
        os.environ["TMPDIR"] = tempfile.tempdir = "/tmp"
    forkserver.set_forkserver_preload(["trainer.loader"])
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONSAFEPATH"]
    return multiprocessing.get_context("forkserver")
