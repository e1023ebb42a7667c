"""Packed attention against attention written out, one window at a time."""

from __future__ import annotations

import pytest
import torch
from by_hand import NoisyFrames
from test_model import gradient, tiny, windows
from torch._dynamo.testing import CompileCounter

import trainer.attention
from trainer.attention import packed_attention
from trainer.packing import make_pack

FRAMES = NoisyFrames()


def loop_attention(query, key, value, seg_lens):
    """Written out: softmax(q k / sqrt(d)) v for each window by itself, each query head with its group's keys."""
    out = torch.zeros_like(query)
    groups, first = query.shape[1] // key.shape[1], 0
    for length in seg_lens:
        for head in range(query.shape[1]):
            for i in range(first, first + length):
                k, v = (t[0, head // groups, first : i + 1] for t in (key, value))
                weights = (query[0, head, i] @ k.mT / query.shape[-1] ** 0.5).softmax(-1)
                out[0, head, i] = weights @ v
        first += length
    return out.transpose(1, 2)


def test_packed_attention_is_attention_within_each_window():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    for lengths in ([9], [1, 5, 3], [4, 4, 1]):
        found, _ = packed_attention(None, query, key, value, None, 8**-0.5, seg_lens=torch.tensor(lengths))
        assert torch.allclose(found, loop_attention(query, key, value, lengths), atol=1e-6)


def test_attention_refuses_to_run_without_lengths_or_with_a_mask(tokens):
    q = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match="needs seg_lens and no mask"):
        packed_attention(None, q, q, q, None)
    with pytest.raises(ValueError, match="needs seg_lens and no mask"):
        packed_attention(None, q, q, q, torch.ones(1, 9), seg_lens=torch.tensor([9]))
    with pytest.raises(ValueError, match=r"lengths \[4, 4\] for 9 queries"):
        packed_attention(None, q, q, q, None, seg_lens=torch.tensor([4, 4]))
    with pytest.raises(ValueError, match="needs seg_lens"):
        tiny(tokens).body(inputs_embeds=torch.randn(1, 5, 128), use_cache=False)


def test_a_mask_is_refused_not_dropped(tokens):
    body, mask = tiny(tokens).body, torch.ones(1, 5)
    given = {"inputs_embeds": torch.randn(1, 5, 128), "use_cache": False, "seg_lens": torch.tensor([5])}
    for call in (lambda: body(attention_mask=mask, **given), lambda: body(None, mask[:, None, None], **given)):
        with pytest.raises(ValueError, match="packed_attention: takes no mask"):
            call()


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


@pytest.fixture
def one_launch(monkeypatch):
    """As on CUDA: all windows in one call under bfloat16. The list gets an item per call."""
    calls = []

    def counted(*args, **more):
        calls.append(args)
        return varlen_by_hand(*args, **more)

    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: value.dtype == torch.bfloat16)
    monkeypatch.setattr(trainer.attention, "varlen_attn", counted)
    return calls


def test_a_bfloat16_pack_attends_in_one_launch_per_layer_and_float32_by_windows(tokens, one_launch, monkeypatch):
    model, packs = tiny(tokens, bf16=True), [make_pack(windows(tokens), FRAMES)]
    launched, by_launch = model(packs[0]).decisions.detach(), gradient(model, packs)
    assert len(one_launch) == 2 * 4  # two passes of four layers
    tiny(tokens)(packs[0])
    assert len(one_launch) == 8
    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: False)
    looped, by_loop = model(packs[0]).decisions.detach(), gradient(model, packs)
    assert float((launched - looped).norm() / looped.norm()) < 1e-2
    assert float((by_launch - by_loop).norm() / by_loop.norm()) < 2e-2


@pytest.mark.slow
def test_layers_compile_whole_and_once_for_any_number_and_length_of_windows(tokens, monkeypatch):
    @torch.library.custom_op("prospect_test::varlen", mutates_args=())
    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        return varlen_by_hand(q, k, v, ends, ends, longest, longest, scale=32**-0.5, window_size=(-1, 0))

    varlen.register_fake(lambda q, k, v, ends, longest: torch.empty_like(q))
    monkeypatch.setattr(
        trainer.attention, "varlen_attn", lambda q, k, v, ends, _, longest, *__, **___: varlen(q, k, v, ends, longest)
    )
    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: value.dtype == torch.bfloat16)
    model, compiled = tiny(tokens, bf16=True).eval(), CompileCounter()
    packs = [make_pack(windows(tokens, n), FRAMES) for n in (2, 3, 5)]
    with torch.no_grad():
        expected = [model(pack).decisions for pack in packs]
        torch._dynamo.reset()
        for layer in model.body.layers:
            layer.compile(dynamic=True, fullgraph=True, backend=compiled)
        assert all(torch.allclose(model(p).decisions, e, atol=1e-2) for p, e in zip(packs, expected, strict=True))
    assert compiled.frame_count <= 4  # once per layer at most
