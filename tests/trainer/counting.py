"""What training or streaming asks of a GPU, counted on tensors of the CPU as if they were there."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view", "resize_")


class Waits(TorchDispatchMode):
    """`found`: operations for which the host would wait for a GPU: reading a value, sizes that depend on values.

    `launches`: how many operators ran on the device that are no view of what was there: each launches a kernel or more.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.found, self.launches = device, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero") and self._there(args[0]):
            self.found.append(name)
        if name in ("index", "index_put", "index_put_", "_unsafe_index") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.found.append(f"{name} by bool")
        out = function(*args, **(kwargs or {}))
        self.launches += name not in NO_KERNEL and not function.is_view and any(map(self._there, tree_leaves(out)))
        return out

    def _there(self, tensor) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.device.type == self.device
