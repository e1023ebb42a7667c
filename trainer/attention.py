"""Attention over windows that lie end to end in one row: each attends to itself, causally, and to nothing else.

On CUDA in half precision all windows go through one launch of torch's `varlen_attn` (FlashAttention), which neither
pads nor copies grouped keys. Everywhere else SDPA is called once per window: no padding, no mask tensor. The library's
own packing fails silently (sequences see each other), and a dense mask costs 2 to 4 times the time.

    L tokens of the row    W windows    H heads    G key-value heads    D head width
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "packed_attention"
# torch 2.15 requires this where heads share keys; 2.11 infers it and has no such argument
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    seg_lens: Tensor | None = None,
    seg_ends: Tensor | None = None,
    longest: int = 0,
    **_: Any,
) -> tuple[Tensor, None]:
    """([1, L, H, D], None) of query [1, H, L, D], key and value [1, G, L, D].

    seg_lens: int64 [W] on the CPU, adding up to L. seg_ends: int32 [W + 1] on the device, 0 and each window's end;
    longest: tokens of the longest window. All three come with the pack, so that no layer waits for the GPU.
    Raises ValueError without them: never falls back to attending to all.
    """
    if seg_lens is None or attention_mask is not None:
        raise ValueError(f"{NAME}: needs seg_lens and no mask; call the text model with seg_lens=..., use_cache=False")
    if seg_ends is None or not takes_varlen(value):
        return _by_window(query, key, value, scaling, seg_lens), None
    # RoPE's float32 cosines made q and k float32 again, and autocast does not know the operator
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # [L, H or G, D]
    grouped = GROUPED if q.shape[1] != k.shape[1] else {}
    ends = seg_ends, seg_ends  # of queries and of keys, the same tensor: torch 2.15 compares them by identity
    out = varlen_attn(q, k, v, *ends, longest, longest, scale=scaling, window_size=(-1, 0), **grouped)
    return cast(Tensor, out)[None], None


def takes_varlen(value: Tensor) -> bool:
    """Whether a flash kernel takes it. Values come from a linear layer, so under autocast they are in its type."""
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16)


@torch.compiler.disable
def _by_window(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, seg_lens: Tensor) -> Tensor:
    lengths = seg_lens.tolist()
    windows = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(windows, 2).transpose(1, 2).contiguous()


def use_packed(vlm: Any) -> None:
    """Make the text model of a SmolVLM attend by `packed_attention`; the vision tower stays as it is."""
    # without a mask function of that name, which would look through `position_ids` in every pass and wait for the GPU
    AttentionInterface.register(NAME, packed_attention)
    vlm.set_attn_implementation({"text_config": NAME})


def refuse_mask(body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before the text model: without a mask function the library would drop a 2-D mask in silence."""
    name = body.config._attn_implementation  # type: ignore[union-attr]
    if (len(args) > 1 or kwargs.get("attention_mask") is not None) and name not in AttentionMaskInterface():
        raise ValueError(f"{name}: takes no mask; call the text model without one")
