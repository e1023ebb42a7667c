"""Keys and values of many contexts, read on by any of them at once: what training's packing is, with a memory.

The new tokens of all contexts lie end to end in one row, as windows do in a pack: every linear layer sees one matrix,
and nothing is padded. Only attention knows whose they are: each context has a slot of a slab per layer, and contexts
with few new tokens (frames, a written token) attend in one call; many (a prompt, a context that starts over) go alone.
To forget, all or the end, is to write over it: nothing is moved. Slabs double when a context outgrows them, up to
`capacity`: no more is allocated after that, for hours. The price: all slots are as long as the longest, and a row's
last digits depend on what else is in the pass.

    B contexts    L new tokens of all    w new tokens of one    T tokens of the longest
    H heads    G of them that share keys and values    D width of a head
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
SHORT = 16  # new tokens: contexts with no more may attend together, padded to the most that one of them has
ALONE = 16  # what a call for one context costs, in new tokens of those together
FIRST = 256  # tokens that a slot is made for
Indices = npt.NDArray[np.int64]


class Row(NamedTuple):
    """What one context reads."""

    slot: int
    start: int  # tokens that it has read before
    length: int  # new ones
    offset: int  # of its first among all L


class _Together(NamedTuple):
    """Contexts whose queries are padded to the most that one has; n of the L tokens are theirs.

    All indices are integers that the host worked out: a boolean index would make the host wait for the GPU.
    """

    slots: slice | Tensor
    tokens: Tensor  # int64 [B, w] which of the L; past a context's own, its first
    which: Tensor  # int64 [n] row of `tokens` of each that is no padding ...
    column: Tensor  # int64 [n] ... and column
    places: Tensor  # int64 [n] which of the L
    owner: Tensor  # int64 [n] the slot of each ...
    positions: Tensor  # int64 [n] ... and its place in it
    end: int  # T
    mask: Tensor | None  # bool [B, 1, G * w, T] what each may see; None: everything


class Reading(NamedTuple):
    """One forward pass: worked out once, used by all layers."""

    slabs: list[tuple[Tensor, Tensor]]  # by layer: keys, values [slots, H/G, capacity, D]
    rows: Sequence[Row]
    positions: Tensor  # int64 [L] in its context
    alone: Sequence[Row]
    together: _Together | None


class FixedReading(NamedTuple):
    """One forward pass over W tokens of the only slot, where the device alone knows which (`cuda_graph`)."""

    slabs: list[tuple[Tensor, Tensor]]
    positions: Tensor  # int64 [W]
    mask: Tensor  # [1, 1, G * W, T] 0 for what each may see, -inf else; in the slabs' dtype, as SDPA would make it


class Cache:
    """`slots` contexts of at most `capacity` tokens for a SmolVLM's text model."""

    def __init__(self, vlm: Any, slots: int, capacity: int, dtype: torch.dtype) -> None:
        text = vlm.config.text_config
        none = torch.zeros(slots, text.num_key_value_heads, 0, width(vlm), dtype=dtype, device=vlm.device)
        self._slabs = [(none, none)] * text.num_hidden_layers
        self.shared = text.num_attention_heads // text.num_key_value_heads  # G
        self._room, self._device, self.capacity = 0, vlm.device, capacity

    def plan(self, rows: Sequence[Row]) -> Reading:
        """That these (slots ascending) are read; what a slot held from a row's start on is forgotten.

        Raises ValueError where one has no room for it.
        """
        self._make_room(max(row.start + row.length for row in rows))
        positions = np.concatenate([np.arange(row.start, row.start + row.length) for row in rows])
        widest = _widest([row.length for row in rows])
        short = [row for row in rows if row.length <= widest]
        if len(short) < 2:
            return Reading(self._slabs, rows, upload(self._device, positions)[0], rows, None)
        alone = [row for row in rows if row.length > widest]
        return self._with_together(rows, positions, alone, _without_gaps(short))

    def reserve(self, more: int) -> list[tuple[Tensor, Tensor]]:
        """The slabs (see Reading) at full size, and at least `more` tokens past it: they stay where they are."""
        self._grow(-(-(self.capacity + more) // 8) * 8)  # a mask of other lengths would be copied by SDPA
        return self._slabs

    def _make_room(self, needed: int) -> None:
        if needed > self.capacity:
            raise ValueError(f"{needed} tokens in a context of at most {self.capacity}")
        if needed > self._room:
            self._grow(min(self.capacity, max(FIRST, 2 * self._room, needed)))

    def _grow(self, room: int) -> None:
        more, self._room = room - self._room, room
        for layer, (keys, values) in enumerate(self._slabs):
            # by zeros: what is masked is still multiplied by 0, which NaN survives; so may no NaN be read
            self._slabs[layer] = F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))

    def _with_together(self, rows: Sequence[Row], new: Indices, alone: Sequence[Row], short: Sequence[Row]) -> Reading:
        slots, starts, lengths, offsets = np.array(short, np.int64).T[:, :, None]  # [B, 1] each
        place, end = np.arange(lengths.max())[None], int((starts + lengths).max())  # [1, w]
        filled = place < lengths
        tokens, positions = offsets + place * filled, starts + place  # [B, w]
        owner = np.broadcast_to(slots, filled.shape)
        sees_all = positions.min() >= end - 1
        new_, tokens_, which, column, places, owner_, positions_, slots_, standing = upload(
            self._device, new, tokens, *filled.nonzero(), tokens[filled], owner[filled], positions[filled],
            slots[:, 0], positions[:0] if sees_all else positions,
        )  # fmt: skip
        mask = None
        if not sees_all:
            seen = torch.arange(end, device=self._device) <= standing[..., None]  # [B, w, T]
            mask = seen[:, None].repeat(1, 1, self.shared, 1)
        first, last = short[0].slot, short[-1].slot
        given = slice(first, last + 1) if last - first < len(short) else slots_
        together = _Together(given, tokens_, which, column, places, owner_, positions_, end, mask)
        return Reading(self._slabs, rows, new_, alone, together)


def upload(device: torch.device, *arrays: Indices) -> list[Tensor]:
    """Each on the device, all in one copy that the host does not wait for."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    parts = flat.pin_memory().to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def download(found: Tensor) -> npt.NDArray[np.float32]:
    """The result of a pass: the one thing in it that the host waits for."""
    return found.cpu().numpy()


def _widest(lengths: Sequence[int]) -> int:
    """New tokens of the longest context that attends with others: where padding and calls for one cost least."""

    def cost(widest: int) -> int:
        return sum(widest if length <= widest else ALONE + length for length in lengths)

    return min((length for length in {*lengths} if length <= SHORT), key=cost, default=0)


def _without_gaps(rows: Sequence[Row]) -> Sequence[Row]:
    """Contexts that read nothing in between, where few are missing: a slice of a slab needs no copy."""
    given = {row.slot: row for row in rows}
    slots = range(rows[0].slot, rows[-1].slot + 1)
    return [given.get(slot, Row(slot, 0, 0, 0)) for slot in slots] if len(slots) < 2 * len(rows) else rows


def bytes_per_token(vlm: Any, dtype: torch.dtype) -> int:
    """Of keys and values in all layers."""
    text = vlm.config.text_config
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * width(vlm) * dtype.itemsize)


def width(vlm: Any) -> int:
    """D: width of one head."""
    text = vlm.config.text_config
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def use_slots(vlm: Any) -> None:
    """Make the text model of a SmolVLM attend by `slot_sdpa`.

    It has no mask function: with one, transformers scans the positions in every pass, for which the host waits.
    """
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
    reading: Reading | FixedReading | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """([1, L, H, D], None) of query [1, H, L, D], key and value [1, H/G, L, D], which it adds to the slabs.

    Raises ValueError without a plan of the reading, or with a mask.
    """
    if reading is None or attention_mask is not None:
        raise ValueError(f"{NAME}: needs reading and no mask; call the text model with reading=..., use_cache=False")
    keys, values = reading.slabs[int(module.layer_idx)]  # type: ignore[arg-type]
    query, key, value = query[0].to(keys.dtype), key[0].to(keys.dtype), value[0].to(values.dtype)  # [H or H/G, L, D]
    if isinstance(reading, FixedReading):
        keys[0].index_copy_(1, reading.positions, key)
        values[0].index_copy_(1, reading.positions, value)
        folded = query.reshape(1, len(key), -1, query.shape[-1])  # [1, H/G, G * W, D]
        found = F.scaled_dot_product_attention(folded, keys, values, reading.mask, scale=scaling)
        return found.reshape(query.shape).transpose(0, 1)[None], None
    seen = torch.empty_like(query)
    if reading.together is not None:
        rows = reading.together
        keys[rows.owner, :, rows.positions] = key[:, rows.places].transpose(0, 1)
        values[rows.owner, :, rows.positions] = value[:, rows.places].transpose(0, 1)
        seen[:, rows.places] = _together(query, keys, values, rows, scaling)[:, rows.which, rows.column]
    for row in reading.alone:
        own = slice(row.offset, row.offset + row.length)
        keys[row.slot, :, row.start : row.start + row.length] = key[:, own]
        values[row.slot, :, row.start : row.start + row.length] = value[:, own]
        seen[:, own] = _alone(query[:, own], keys, values, row, scaling)
    return seen.transpose(0, 1)[None], None


def _together(query: Tensor, keys: Tensor, values: Tensor, rows: _Together, scaling: float | None) -> Tensor:
    """[H, B, w, D]: heads that share keys stand as queries of one, so that these are read once."""
    asked = query[:, rows.tokens].transpose(0, 1)  # [B, H, w, D]
    count, heads, w, d = asked.shape
    folded = asked.reshape(count, keys.shape[1], -1, d)  # [B, H/G, G * w, D]
    own = keys[rows.slots, :, : rows.end], values[rows.slots, :, : rows.end]
    found = F.scaled_dot_product_attention(folded, *own, rows.mask, scale=scaling)
    return found.reshape(count, heads, w, d).transpose(0, 1)


def _alone(query: Tensor, keys: Tensor, values: Tensor, row: Row, scaling: float | None) -> Tensor:
    """[H, w, D] of one context."""
    end, mask = row.start + row.length, None
    if row.start and row.length > 1:
        places = torch.arange(end, device=query.device)
        mask = places <= places[row.start :, None]  # [w, T]
    own = keys[row.slot, :, :end][None], values[row.slot, :, :end][None]
    return F.scaled_dot_product_attention(
        query[None], *own, mask, is_causal=not row.start, scale=scaling, enable_gqa=True
    )[0]
