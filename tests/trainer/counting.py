"""What training or streaming asks of a GPU, counted without one: as if the tensors of a device type were there."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view", "resize_")


class Waits(TorchDispatchMode):
    """Operations for which the host would wait for a GPU: reading a value, sizes that depend on values, copies.

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
        source, target = (args[1], args[0]) if name == "copy_" else (args and args[0], out)
        if name in ("_to_copy", "to", "copy_") and self._there(source) != self._there(target):
            blocking = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            if blocking or self._there(source):
                self.found.append(f"{name} to {target.device}")
        if name == "lift_fresh" and self.device == "cuda" and self._there(args[0]):
            self.found.append("a list to the GPU")
        return out

    def _there(self, tensor) -> bool:
        return isinstance(tensor, torch.Tensor) and tensor.device.type == self.device
