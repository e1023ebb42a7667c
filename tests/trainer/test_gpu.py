"""What only a GPU can show; skipped elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames
from PIL import Image
from small_run import CONFIG, clip, curve, go, go_until, write_data
from test_model import gradient

import trainer.attention
from trainer.checkpoint import LoadedRun, load_run
from trainer.config import TrainConfig
from trainer.live.engine import StaticVision, streaming
from trainer.live.rollout import free_running
from trainer.live.session import DecodingConfig
from trainer.live.stream import Stream
from trainer.live.video_input import VideoFrame
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import Tokens, train_tiny_tokens

pytestmark = pytest.mark.gpu


def small(config: TrainConfig) -> tuple[ProspectModel, Tokens]:
    tokens = train_tiny_tokens(["What now?", "Well done.", "S1->complete"] * 3)
    heads = DecisionHeads(128)
    torch.nn.init.normal_(heads.speak.weight)
    return ProspectModel(load_model("tiny", len(tokens)), heads, config, tokens.choices).eval(), tokens


def test_the_gpu_gives_the_cpu_s_logits_and_packs_stay_apart():
    model, tokens = small(TrainConfig(bf16=False))
    windows = [w for i in range(4) for w in build_windows(clip(i), tokens, 1, 200)]
    expected = torch.cat([model(make_pack([w], NoisyFrames())).decisions for w in windows], 1)
    found = model.cuda()(make_pack(windows, NoisyFrames()).to(torch.device("cuda"))).decisions
    assert torch.allclose(found.cpu(), expected, atol=1e-3)


def test_one_launch_for_all_windows_gives_the_gradient_of_one_each(monkeypatch):
    model, tokens = small(TrainConfig(bf16=True))
    model.cuda()
    windows = [w for i in range(4) for w in build_windows(clip(i), tokens, 1, 200)]
    pack = make_pack(windows, NoisyFrames()).to(torch.device("cuda"))
    calls, varlen = [], trainer.attention.varlen_attn
    monkeypatch.setattr(
        trainer.attention, "varlen_attn", lambda *args, **more: (calls.append(args), varlen(*args, **more))[1]
    )
    launched = gradient(model, [pack])
    assert len(calls) == len(model.body.layers)
    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: False)
    looped = gradient(model, [pack])
    assert float((launched - looped).norm() / looped.norm()) < 2e-2


@pytest.mark.parametrize("more", [{}, {"bf16": False}, {"compile": True, "checkpointing": True}])
def test_a_run_on_the_gpu_learns_and_resumes(tmp_path, monkeypatch, more):
    data = write_data(tmp_path / "data")
    report = go(data, tmp_path / "run", **more)
    assert report.loss < 0.7 * curve(tmp_path / "run")[0]["loss"]
    assert load_run(tmp_path / "run").info["step"] == CONFIG.steps
    go_until(5, data, tmp_path / "cut", **more)
    assert go(data, tmp_path / "cut", resume=True, **more).resumed_from == 4
    assert curve(tmp_path / "cut")[-2]["loss"] == pytest.approx(curve(tmp_path / "run")[-2]["loss"], rel=1e-2)


def test_clips_at_once_on_the_gpu_have_the_cpu_s_logits_also_where_contexts_start_over():
    config = TrainConfig(max_tokens=90, bf16=False)  # a prompt takes 73, the rest of a clip more than 17
    model, tokens = small(config)
    never = DecodingConfig({"speaking": np.inf, "dst_update": np.inf})

    def says(clip, frame):
        return {"DST_UPDATE": "S1->complete"} if frame == 4 else {"assistant": "Well done."} if frame == 7 else {}

    def logits() -> np.ndarray:
        clips = [clip(i) for i in range(6)]
        scored = free_running(model, tokens, clips, NoisyFrames(), config, never, says)
        return np.concatenate([np.stack([one.logits["speaking"], one.logits["dst_update"]]) for one in scored], 1)

    expected = logits()
    model.cuda()
    assert np.abs(logits() - expected).max() < 1e-3


@pytest.mark.parametrize(("bf16", "most"), [(False, 1e-3), (True, 0.1)])
@pytest.mark.parametrize("arm", ["speak+dst", "lm-eos"])
def test_a_stream_as_a_cuda_graph_has_the_numbers_of_the_engine(monkeypatch, recwarn, arm, bf16, most):
    config = TrainConfig(max_tokens=90, bf16=bf16, arm=arm)
    model, tokens = small(config)
    model.cuda()
    never = DecodingConfig({"speaking": np.inf, "dst_update": np.inf})

    def says(clip, frame):
        return {"assistant": None} if frame % 5 == 4 else {}  # the model's own words

    def scored():
        return next(iter(free_running(model, tokens, [clip(0)], NoisyFrames(), config, never, says)))

    monkeypatch.setattr("trainer.live.engine.GRAPHED", ())
    expected = scored()
    monkeypatch.setattr("trainer.live.engine.GRAPHED", ("cuda",))
    found = scored()
    assert not [each for each in recwarn if "CUDA graph" in str(each.message)]
    assert np.abs(found.logits["speaking"] - expected.logits["speaking"]).max() < most
    if not bf16:
        assert found.said == expected.said


@pytest.mark.parametrize(("bf16", "most"), [(False, 1e-4), (True, 0.05)])
def test_a_frame_s_features_from_a_cuda_graph_are_those_without(recwarn, bf16, most):
    config = TrainConfig(bf16=bf16)
    model, _ = small(config)
    look = StaticVision(model.cuda())
    frames = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), np.uint8)
    with streaming(model):
        expected = model.frame_features(torch.from_numpy(frames).cuda())
        found = [look(frame) for frame in frames]
    assert not [each for each in recwarn if "CUDA graph" in str(each.message)]
    assert (torch.stack(found) - expected).norm() < most * expected.norm()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stream_on_the_gpu_takes_no_more_memory_with_time(bf16):
    config = TrainConfig(max_tokens=300, bf16=bf16)
    model, tokens = small(config)
    run = LoadedRun(model, tokens, config, {"neg_rate": 1.0})
    live = DecodingConfig({"speaking": -np.inf, "dst_update": -np.inf}, refractory_s=10, max_text=8)
    frames = np.random.default_rng(0).integers(0, 256, (16, 3, 64, 64), np.uint8)
    held, restarts = [], 0
    with Stream(run, clip(0), live) as stream:
        for number in range(1500):
            seen = VideoFrame(number, number / 2, frames[number % 16], Image.new("RGB", (8, 8)), 0)
            restarts += stream.step(seen).started_over
            if number % 500 == 499:
                torch.cuda.synchronize()
                held.append(torch.cuda.memory_reserved())
    assert restarts >= 6
    assert held[0] == held[1] == held[2]
