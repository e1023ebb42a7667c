from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example
from small_run import clip, curve, go

import trainer
from trainer.config import TrainConfig
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import make_pack
from trainer.sequence import build_windows
from trainer.teacher_forced import report
from trainer.train import make_optimizer, schedule, train_step

FRAMES = NoisyFrames()
TINY = TrainConfig(steps=2, clips_per_step=3, warmup_steps=1, max_tokens=200, micro_batch_tokens=200)


@pytest.fixture
def model(tokens) -> ProspectModel:
    return ProspectModel(load_model("tiny", len(tokens)), DecisionHeads(128, (0.2, 0.1)), TINY)


@pytest.fixture
def windows(tokens):
    return [w for i in range(5) for w in build_windows(clip(i, rate=0.3), tokens, 1, 200)]


# ---- the step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, TrainConfig(balance="mean", reweigh=True)])
def test_micro_batches_give_the_gradient_of_one_big_batch(model, windows, config):
    """TRAPS 18."""
    gradients, steps = [], []
    for groups in ([windows], [[w] for w in windows], [windows[3:], windows[:3]]):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = train_step(model, optimizer, [make_pack(g, FRAMES) for g in groups], config)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        steps.append(step)
    for other, gradient in zip(steps[1:], gradients[1:], strict=True):
        assert other.__dict__ == pytest.approx(steps[0].__dict__, rel=1e-5)
        assert float((gradient - gradients[0]).norm() / gradients[0].norm()) < 1e-6


def test_the_first_loss_is_that_of_the_prior(tokens, model, windows):
    step = train_step(model, make_optimizer(model, TINY), [make_pack(windows, FRAMES)], TINY)
    labels = np.concatenate([w.labels for w in windows], 1)
    expected = [
        np.where(row[row >= 0] == 1, -math.log(p), -math.log(1 - p)).mean()
        for row, p in zip(labels, (0.2, 0.1), strict=True)
    ]
    assert (step.speaking, step.dst_update) == pytest.approx(tuple(expected), rel=1e-5)
    assert step.n_speaking == (labels[0] >= 0).sum()
    assert step.n_lm == sum(len(w.lm_positions) for w in windows)
    assert step.lm < 3 * math.log(len(tokens))


def test_a_step_without_anything_to_supervise_is_zero_and_moves_nothing(tokens, model):
    """TRAPS 17."""
    silent = clip_example([], 0, 5, rate=0.0)
    assert (silent.labels == -100).all()
    batch = make_pack(build_windows(silent, tokens, 1, 200), FRAMES)
    before = [p.detach().clone() for p in model.parameters()]
    config = TrainConfig(weight_decay=0.0)
    step = train_step(model, make_optimizer(model, config), [batch, batch], config)
    assert (step.loss, step.n_speaking, step.n_dst_update, step.n_lm, step.grad_norm) == (0, 0, 0, 0, 0)
    assert all(map(torch.equal, model.parameters(), before))


def test_warm_up_rises_and_the_cosine_falls_to_zero():
    config = TrainConfig(lr=1.0, warmup_steps=4, steps=10)
    rates = [schedule(step, config) for step in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[7] == pytest.approx(0.5)
    assert schedule(10, config) == pytest.approx(0)


def test_parts_have_their_own_peak_rates_and_biases_and_norms_do_not_decay(model):
    config = TrainConfig(lr=1e-3, lr_by_part={"heads": 1e-2, "vision": 1e-5})
    groups = make_optimizer(model, config).param_groups
    decays = {(p.ndim > 1, group["weight_decay"]) for group in groups for p in group["params"]}
    assert decays == {(True, 0.01), (False, 0)}
    peaks = {id(p): group["peak"] for group in groups for p in group["params"]}
    assert set(peaks) == {id(p) for p in model.parameters()}
    assert peaks[id(model.heads.speak.weight)] == 1e-2
    assert peaks[id(model.vlm.model.vision_model.post_layernorm.bias)] == 1e-5
    assert peaks[id(model.vlm.model.connector.modality_projection.proj.weight)] == 1e-3
    assert peaks[id(model.vlm.lm_head.weight)] == 1e-3


# ---- a run -------------------------------------------------------------------------------------------


def test_a_run_logs_each_step_and_each_evaluation_and_says_what_it_is(whole, data):
    lines = curve(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10]
    written = {"metrics.jsonl", "curves.svg", "tensorboard", "options.json", "last", "best"}
    assert {p.name for p in whole.iterdir()} - {".lock"} == written
    run = trainer.load(whole)
    scored = list(run.score(data, "val"))
    labels = np.concatenate([clip(i, "val", rate=1.0).labels for i in range(3)], 1)
    assert np.array_equal(np.concatenate([s.clip.labels for s in scored], 1), labels)
    found = report("val", scored, run.model.arm)
    assert (found["clips"], found["speaking"]["frames"]) == (3, labels.shape[1])
    assert found["speaking"]["chance"] == pytest.approx(6 / labels.shape[1])
    assert (found["speaking_only"], found["dst_update_only"], found["both"]) == (6, 3, 0)
    assert lines[-1]["evaluation"] == found


def test_training_learns_white_frames(data, tmp_path):
    more = {"steps": 40, "clips_per_step": 6, "warmup_steps": 5, "micro_batch_tokens": 1000, "eval_every": 0}
    report = go(data, tmp_path / "run", save_every=0, **more)
    assert report.loss < 0.3 * curve(tmp_path / "run")[0]["loss"]
    assert report.evaluation["speaking"]["ap"] > 0.9
    assert report.evaluation["dst_update"]["ap"] > 0.9
