"""Process group, DDP and FSDP2 wrapping, collectives. Without torchrun the world is one rank, and each call is free.

Ranks can hold different numbers of packs: those that run out take blank ones, so that every parameter gets a gradient
on every rank, without which the collective would hang. All ranks call each method of `World`, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.errors import InputError

CPU = torch.device("cpu")
TIMEOUT = timedelta(minutes=30)  # of one collective: an evaluation on another rank may take a while


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def most(self, count: int) -> int:
        if self.size == 1:
            return count
        value = torch.tensor(count, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's object, by rank, on each of them."""
        if self.size == 1:
            return [mine]
        objects: list[Any] = [None] * self.size
        dist.all_gather_object(objects, mine)
        return objects

    def wrap(self, model: Any, sharded: bool) -> nn.Module:
        """`model`, a ProspectModel, on this rank's device: under DDP, or `sharded` by FSDP2, in place, layer by layer.

        Under bf16 FSDP gathers layers in it, half the bytes; gradients are added, and heads computed, in float32.
        """
        if self.size == 1:
            return cast(nn.Module, model.to(self.device))
        if not sharded:
            return DistributedDataParallel(model.to(self.device), gradient_as_bucket_view=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if model.bf16 else MixedPrecisionPolicy()
        for layer in model.body.layers:  # the tower as a whole: ranks run it for different numbers of chunks
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, reshard_after_forward=False)  # type: ignore[no-any-return]


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun's environment describes, until the end."""
    size, cuda, device = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available(), CPU
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size == 1:
        yield World(device=device)
        return
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)
    try:
        yield World(dist.get_rank(), size, device)
    except RuntimeError as error:  # also what a collective says when another rank has gone
        reason = str(error).partition("\n")[0]
        hint = "where this tells of a connection, another rank stopped, and its message says why"
        raise InputError(f"rank {dist.get_rank()}: {reason}; {hint}") from error
    finally:
        dist.destroy_process_group()


@contextmanager
def synced(model: nn.Module, now: bool) -> Iterator[None]:
    """Backward passes in here exchange gradients only if `now`; otherwise they add up on each rank."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        cast(Any, model).set_requires_gradient_sync(now)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not now else nullcontext():
        yield
