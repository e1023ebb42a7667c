"""Packs: indices into one row, the token budget, and parity with each window by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames
from test_model import clips, gradient, tiny, windows

from trainer.packing import blank_pack, make_pack, pack_windows, plan

FRAMES = NoisyFrames()


def test_pack_indices_point_at_frames_and_texts(tokens):
    chosen = windows(tokens)
    pack = make_pack(chosen, FRAMES)
    assert (pack.input_ids[pack.frame_index] == tokens.image).all()
    assert sum(int((w.input_ids == tokens.image).sum()) for w in chosen) == pack.frame_index.numel()
    assert torch.equal(pack.input_ids[pack.lm_index + 1], pack.lm_targets)
    assert np.array_equal(pack.labels.numpy(), np.concatenate([w.labels for w in chosen], 1))
    assert pack.frames().shape == (pack.labels.shape[1], 3, 64, 64)
    lengths = [len(w.input_ids) for w in chosen]
    assert (pack.seg_lens.tolist(), pack.seg_ends.tolist()) == (lengths, [0, *np.cumsum(lengths)])
    assert pack.seg_ends.dtype == torch.int32
    assert pack.longest == max(lengths)
    assert (pack.position_ids == 0).sum() == 4


def test_packs_keep_to_the_budget_and_fill_it(tokens):
    assert plan([50, 30, 20, 60, 40], 100) == [[3, 4], [0, 1, 2]]
    assert plan([500, 30], 100) == [[0], [1]]
    assert plan([], 100) == []
    chosen = windows(tokens, 7)
    packs = pack_windows(chosen, FRAMES, 300)
    assert sum(len(pack.input_ids) for pack in packs) == sum(len(w.input_ids) for w in chosen)  # none is padding


@pytest.mark.parametrize("more", [{}, {"checkpointing": True}])
def test_a_pack_equals_the_library_s_attention_on_each_window(tokens, more):
    """Not our attention on one window, but transformers' own sdpa."""
    model, chosen = tiny(tokens, **more).train(), windows(tokens)
    assert len({len(w.input_ids) for w in chosen}) == 4
    together = model(make_pack(chosen, FRAMES))
    model.vlm.set_attn_implementation({"text_config": "sdpa"})
    alone = [model(make_pack([w], FRAMES)) for w in chosen]
    decisions, text = (torch.cat(parts, dim) for parts, dim in zip(zip(*alone, strict=True), (1, 0), strict=True))
    assert torch.allclose(together.decisions, decisions, atol=1e-5)
    assert torch.allclose(together.text, text, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"checkpointing": True}])
def test_the_gradient_of_a_pack_equals_that_of_its_windows(tokens, more):
    chosen = windows(tokens)
    together = gradient(tiny(tokens, **more).train(), [make_pack(chosen, FRAMES)])
    alone = gradient(tiny(tokens).train(), [make_pack([w], FRAMES) for w in chosen])
    assert float((together - alone).norm() / alone.norm()) < 1e-5


def test_a_blank_pack_gives_every_parameter_a_gradient_of_zero(tokens):
    model = tiny(tokens)
    scores = model(blank_pack(clips(1)[0], tokens, FRAMES, 1))
    assert scores.text.shape[0] == 0
    (scores.text.sum() + scores.decisions[:, :0].sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
