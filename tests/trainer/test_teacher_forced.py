"""Teacher-forced scores: one window a pass on a CPU, packs on a GPU, the same scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames
from small_run import clip
from test_model import tiny

from trainer.checkpoint import LoadedRun
from trainer.config import TrainConfig
from trainer.loss import lm_sum
from trainer.packing import make_pack
from trainer.sequence import build_windows
from trainer.teacher_forced import score_clips

MORE = {"max_tokens": 90, "micro_batch_tokens": 300, "bf16": False}  # several windows a clip, and a pack
CLIPS = [clip(i) for i in range(5)]


@pytest.fixture
def model(tokens):
    model = tiny(tokens, **MORE)
    torch.nn.init.normal_(model.heads.speak.weight, std=0.1)  # logits of about 1
    return model


def scores(model, tokens, budget=None):
    run = LoadedRun(model, tokens, TrainConfig(**MORE), {})
    return list(score_clips(run, iter(CLIPS), NoisyFrames(), budget))


@torch.inference_mode()
def test_on_a_cpu_a_clip_has_the_digits_of_its_windows_alone(model, tokens):
    model.train()
    found = scores(model, tokens)
    assert model.training
    model.eval()
    assert [one.clip.clip_id for one in found] == [clip.clip_id for clip in CLIPS]
    for one in found:
        windows = build_windows(one.clip, tokens, 1, 90)
        assert len(windows) > 1
        packs = [make_pack([window], NoisyFrames()) for window in windows]
        logits = [model(p).decisions.numpy()[:, w.context :] for p, w in zip(packs, windows, strict=True)]
        assert np.array_equal(one.logits, np.concatenate(logits, 1))
        assert one.lm_loss == sum(float(lm_sum(model(pack).text, pack.lm_targets)) for pack in packs)
        assert one.lm_tokens == sum(len(window.lm_positions) for window in windows)


def test_packs_give_the_scores_of_windows_alone(model, tokens):
    passes = []
    hook = model.register_forward_pre_hook(lambda module, args: passes.append(len(args[0].seg_lens)))
    found = scores(model, tokens, budget=270)
    hook.remove()
    assert max(passes) > 1
    for one, alone in zip(found, scores(model, tokens), strict=True):
        assert np.abs(one.logits - alone.logits).max() < 1e-5
        assert one.lm_loss == pytest.approx(alone.lm_loss, rel=1e-5)
        assert (one.clip.clip_id, one.lm_tokens) == (alone.clip.clip_id, alone.lm_tokens)
