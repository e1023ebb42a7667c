"""Attention over windows that lie end to end in one row: each sees itself, causally, and nothing else.

`packed_sdpa` splits queries, keys and values at the windows' lengths and calls SDPA once per window: no padding, no
mask tensor, 5e-7 from attending to each alone (a prototype, float32). The library's own packing is off by default and
fails silently (sequences see each other: logits off by 4e-2, gradients by 99%), and a dense mask costs 2 to 4 times the
time.
It is for training and scoring; what reads on from keys and values that it kept is `trainer.cache`.

    L tokens of the row    W windows    H heads    D head width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "packed_sdpa"


@torch.compiler.disable
def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    seg_lens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """([1, L, H, D], None) of query [1, H, L, D], key and value [1, fewer H, L, D].

    `seg_lens`: int64 [W] on the CPU, a tensor so that `torch.compile` does not specialise on the lengths; they add
    up to L. Raises ValueError without them, with a mask, or with a cache: never falls back to attending to all.
    """
    if seg_lens is None or attention_mask is not None:
        raise ValueError(f"{NAME}: needs seg_lens and no mask; call the text model with seg_lens=..., use_cache=False")
    lengths = seg_lens.tolist()
    if not query.shape[2] == key.shape[2] == sum(lengths):
        raise ValueError(f"{NAME}: lengths {lengths} for {query.shape[2]} queries and {key.shape[2]} keys")
    seen = [
        F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(seen, 2).transpose(1, 2).contiguous(), None


def use_packed(vlm: Any) -> None:
    """Make the text model of a SmolVLM attend by `packed_sdpa`; the vision tower stays as it is."""
    AttentionInterface.register(NAME, packed_sdpa)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    vlm.set_attn_implementation({"text_config": NAME})
