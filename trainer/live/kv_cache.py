"""Batched KV cache with one slot per session, and the attention function that extends and reads it.

The new tokens of all sessions lie end to end in one row: linear layers need no padding. Attention takes sessions that
read few tokens (frames, a written token) in one padded call, each that reads many (a prompt) in its own.

    L new tokens of all sessions    B batched slots    w new tokens of one    T tokens of the longest, with the cached
    H heads    G heads that share keys and values    D head width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "slot_sdpa"
MAX_BATCHED = 16  # new tokens: sessions with more get a call of their own
CALL_COST = 16  # of a session's own call, in padded tokens of the batched call
FIRST_CAPACITY = 256  # tokens that a slot is made for
Slabs = list[tuple[Tensor, Tensor]]  # by layer: keys, values [slots, H/G, allocated tokens, D]


class CacheRow(NamedTuple):
    """The new tokens of one session."""

    slot: int
    start: int  # cached tokens that are kept
    length: int  # new tokens
    offset: int  # of the first new token among all L


class BatchedRows(NamedTuple):
    """Slots with w queries each; sessions with fewer repeat their last one, slots between them any."""

    slots: slice | Tensor
    slot: Tensor  # int64 [B, 1]
    positions: Tensor  # int64 [B, w] in the slot
    tokens: Tensor | None  # int64 [B, w] in 0..L; None: all L tokens are of one slot
    kept: Tensor | None  # int64 [n] in 0..B * w: the queries that are no repetition
    end: int  # T
    mask: Tensor  # [B or 1, 1, G * w, T] bool, or added to the scores in the slabs' dtype


class AttentionPlan(NamedTuple):
    """One forward pass: computed once, used by all layers."""

    slabs: Slabs
    positions: Tensor  # int64 [L] in their sessions
    single: Sequence[CacheRow]  # one call each
    batched: BatchedRows | None


class KVCache:
    """`slots` sessions of at most `capacity` tokens for the text model of a SmolVLM."""

    def __init__(self, vlm: Any, slots: int, capacity: int, dtype: torch.dtype) -> None:
        text = vlm.config.text_config
        empty = torch.zeros(slots, text.num_key_value_heads, 0, text.head_dim, dtype=dtype, device=vlm.device)
        self._slabs: Slabs = [(empty, empty)] * text.num_hidden_layers
        self.heads_per_kv = text.num_attention_heads // text.num_key_value_heads  # G
        self._device, self.capacity = vlm.device, capacity

    def plan(self, rows: Sequence[CacheRow]) -> AttentionPlan:
        """A pass over these new tokens, slots ascending; what a slot held from a row's start on is overwritten."""
        needed, allocated = max(row.start + row.length for row in rows), self._slabs[0][0].shape[2]
        if needed > allocated:
            self.reserve(min(self.capacity, max(FIRST_CAPACITY, 2 * allocated, needed)))
        lengths = [row.length for row in rows]
        costs = {  # new tokens of the batched call's longest session -> its padded tokens, and the others' own calls
            limit: sum(limit if length <= limit else CALL_COST + length for length in lengths)
            for limit in {*lengths}
            if limit <= MAX_BATCHED
        }
        limit = min(costs, key=costs.__getitem__, default=0)
        short = [row for row in rows if row.length <= limit]
        positions = np.concatenate([np.arange(row.start, row.start + row.length) for row in rows])
        if len(short) < 2:
            return AttentionPlan(self._slabs, upload(self._device, positions)[0], rows, None)
        by_slot = {row.slot: row if row.length <= limit else row._replace(length=0) for row in rows}
        near = range(short[0].slot, short[-1].slot + 1)
        dense = len(near) < 2 * len(short)  # then slots in between attend, too: a slice of a slab is no copy
        batch = [by_slot.get(slot, CacheRow(slot, 0, 0, 0)) for slot in near] if dense else short
        slots, starts, lengths, offsets = np.array(batch, np.int64).T[:, :, None]  # [B, 1] each
        place = np.arange(lengths.max())[None]
        repeated = np.minimum(place, np.maximum(lengths - 1, 0))  # [B, w]
        kept = np.flatnonzero(place < lengths)
        own = (slots, starts + repeated, offsets + repeated, kept)
        all_positions, slot, batch_positions, tokens, kept_ = upload(self._device, positions, *own)
        end = int((starts + lengths).max())
        visible = torch.arange(end, device=self._device) <= batch_positions[..., None]  # [B, w, T]
        mask = visible[:, None].repeat(1, 1, self.heads_per_kv, 1)
        chosen = slice(near.start, near.stop) if dense else slot[:, 0]
        batched = BatchedRows(chosen, slot, batch_positions, tokens, kept_, end, mask)
        return AttentionPlan(self._slabs, all_positions, [row for row in rows if row.length > limit], batched)

    def reserve(self, size: int) -> Slabs:
        """The slabs, grown to `size` tokens; from the capacity on they are not moved again."""
        more = size - self._slabs[0][0].shape[2]  # zeros: what is masked is still multiplied by 0, so never NaN
        for layer, (keys, values) in enumerate(self._slabs):
            self._slabs[layer] = F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))
        return self._slabs


def upload(device: torch.device, *arrays: npt.NDArray[np.int64]) -> list[Tensor]:
    """The arrays on the device, in one copy that the host does not wait for."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    parts = flat.pin_memory().to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def use_slots(vlm: Any) -> None:
    """Make the text model of a SmolVLM attend by `slot_sdpa`, which has no mask function (`attention.use_packed`)."""
    AttentionInterface.register(NAME, slot_sdpa)
    vlm.set_attn_implementation({"text_config": NAME})


@torch.compiler.disable
def slot_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    plan: AttentionPlan | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """([1, L, H, D], None) of query [1, H, L, D], key and value [1, H/G, L, D], which it adds to the slabs.

    Raises ValueError without a plan, or with a mask.
    """
    if plan is None or attention_mask is not None:
        raise ValueError(f"{NAME}: needs plan and no mask; call the text model with plan=..., use_cache=False")
    keys, values = plan.slabs[int(module.layer_idx)]  # type: ignore[arg-type]
    query, key, value = (new[0].transpose(0, 1).to(keys.dtype) for new in (query, key, value))  # [L, H or H/G, D]
    out = torch.empty_like(query)
    if (rows := plan.batched) is not None:
        if rows.tokens is None:
            return _batched(query[None], key[None], value[None], keys, values, rows, scaling), None
        new = query[rows.tokens], key[rows.tokens], value[rows.tokens]
        out[rows.tokens.flatten()[rows.kept]] = _batched(*new, keys, values, rows, scaling).flatten(0, 1)[rows.kept]
    for slot, start, length, offset in plan.single:
        own, end, mask = slice(offset, offset + length), start + length, None
        keys[slot, :, start:end] = key[own].transpose(0, 1)
        values[slot, :, start:end] = value[own].transpose(0, 1)
        if start and length > 1:
            mask = torch.ones(length, end, dtype=torch.bool, device=query.device).tril(start)
        cached = keys[slot, None, :, :end], values[slot, None, :, :end]
        options: dict[str, Any] = {"is_causal": not start, "scale": scaling, "enable_gqa": True}
        attended = F.scaled_dot_product_attention(query[own].transpose(0, 1)[None], *cached, mask, **options)
        out[own] = attended[0].transpose(0, 1)
    return out[None], None


def _batched(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, rows: BatchedRows, scaling: float | None
) -> Tensor:
    """[B, w, H, D] of new tokens [B, w, H or H/G, D]. Heads that share keys form one query, so keys are read once."""
    keys[rows.slot, :, rows.positions] = key
    values[rows.slot, :, rows.positions] = value
    cached = keys[rows.slots, :, : rows.end], values[rows.slots, :, : rows.end]
    count, w, heads, d = query.shape
    folded = query.transpose(1, 2).reshape(count, keys.shape[1], -1, d)  # [B, H/G, G * w, D]
    attended = F.scaled_dot_product_attention(folded, *cached, rows.mask, scale=scaling)
    return attended.reshape(count, heads, w, d).transpose(1, 2)
