"""Packed attention: what it refuses, and one launch for all windows against one each (parity: `test_packing`)."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from by_hand import NoisyFrames
from test_model import gradient, tiny, windows

import trainer.attention
from trainer.attention import packed_attention
from trainer.live.engine import streaming
from trainer.packing import make_pack

FRAMES = NoisyFrames()


def test_attention_refuses_to_run_without_lengths_or_with_a_mask(tokens):
    q = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match="needs seg_lens and no mask"):
        packed_attention(None, q, q, q, None)
    with pytest.raises(ValueError, match="needs seg_lens and no mask"):
        packed_attention(None, q, q, q, torch.ones(1, 9), seg_lens=torch.tensor([9]))
    model = tiny(tokens)
    body, given = model.body, {"inputs_embeds": torch.randn(1, 5, 128), "use_cache": False}
    with pytest.raises(ValueError, match="needs seg_lens"):
        body(**given)
    with pytest.raises(ValueError, match="packed_attention: takes no mask"):  # not dropped in silence
        body(attention_mask=torch.ones(1, 5), seg_lens=torch.tensor([5]), **given)
    with streaming(model), pytest.raises(ValueError, match="slot_sdpa: takes no mask"):
        body(attention_mask=torch.ones(1, 5), **given)
    with streaming(model), pytest.raises(ValueError, match="slot_sdpa: needs plan"):
        body(**given)


def varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """`varlen_attn` as its documentation has it, for [L, H, D]; asserts what its kernels need."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert window_size == (-1, 0)  # causal
    group, outputs = query.shape[1] // key.shape[1], []
    for q, k, v in zip(*(x.float().split(cu_seq_q.diff().tolist()) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(outputs).to(query.dtype)


def test_a_bfloat16_pack_attends_in_one_launch_per_layer_as_by_windows(tokens, monkeypatch):
    """As on CUDA: all windows in one call."""
    launches = Mock(side_effect=varlen_by_hand)
    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: value.dtype == torch.bfloat16)
    monkeypatch.setattr(trainer.attention, "varlen_attn", launches)
    model, packs = tiny(tokens, bf16=True), [make_pack(windows(tokens), FRAMES)]
    launched, by_launch = model(packs[0]).decisions.detach(), gradient(model, packs)
    assert launches.call_count == 2 * 4  # two passes of four layers
    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: False)
    looped, by_loop = model(packs[0]).decisions.detach(), gradient(model, packs)
    assert float((launched - looped).norm() / looped.norm()) < 1e-2
    assert float((by_launch - by_loop).norm() / by_loop.norm()) < 2e-2
