"""What a training step asks of a GPU, without one: waits of the host, devices and shapes at the released sizes.

Fake CUDA tensors know their device and shape and have no data; autograd cannot run on them, so `backward` is left out
there, and its waits are counted on real tensors of the CPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import smollm2
import torch
from by_hand import NoisyFrames, clip_example, dst, turn
from counting import Waits
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from transformers import SmolVLMForConditionalGeneration

import trainer.packing
import trainer.train
from pipeline.errors import InputError
from trainer import vision
from trainer.arms import ARMS, find_arm
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.loss import supervise
from trainer.model import DecisionHeads, ProspectModel, load_model, tiny_config
from trainer.packing import Loaded, Pack, make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import Tokens
from trainer.train import make_optimizer, memory_line, sum_terms, train_step


def pack_of(tokens: Tokens, frames=None) -> Pack:
    """Three windows of 8 to 10 frames."""
    turns = [turn("user", "What now?", 1, 2), dst(4, 5, ("S1", "complete")), turn("assistant", "Well done.", 4, 6)]
    clips = [clip_example(turns, 0, 8 + i, clip_id=f"c{i}", video=f"v{i}", clip=i) for i in range(3)]
    return make_pack([w for clip in clips for w in build_windows(clip, tokens, 1, 1000)], frames or NoisyFrames())


@pytest.mark.parametrize("arm", ARMS)
def test_a_pack_makes_the_host_wait_for_nothing(tokens, arm):
    config = TrainConfig(arm=arm, reweigh=True, checkpointing=arm == "speak+dst")
    model = ProspectModel(load_model("tiny", len(tokens)), DecisionHeads(128), config, tokens.choices).train()
    pack = pack_of(tokens)
    chosen = supervise(pack.labels, pack.neg_rate, find_arm(arm), config.reweigh)
    with Waits("cpu") as counting:
        sum_terms(model, pack, chosen).sum().backward()
    assert counting.found == []
    assert counting.launches > 100


def fake_step(vlm_config, tokens: Tokens, monkeypatch, pixels: bool, bf16: bool | None = None) -> Waits:
    """Two packs and an optimizer step on a fake GPU."""
    waits = Waits("cuda")

    def tolist(self):
        assert self.device.type == "cuda"
        waits.found.append("tolist")
        return [1.0] * len(self)

    def on_the_host(*args):
        with unset_fake_temporarily():
            return supervise(*args)

    monkeypatch.setattr(FakeTensor, "tolist", tolist)
    monkeypatch.setattr(trainer.train, "supervise", on_the_host)
    monkeypatch.setattr(trainer.packing, "pinned", lambda value: value)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("trainer.body_graph.GRAPHED", ())
    vlm_config.dtype = vlm_config.text_config.dtype = vlm_config.vision_config.dtype = torch.float32  # as when loaded
    side, given = vlm_config.vision_config.image_size, vlm_config.text_config.hidden_size
    packs = [pack_of(tokens, NoisyFrames(side)) for _ in range(2)]
    if not pixels:
        wide = vlm_config.vision_config.hidden_size * vlm_config.scale_factor**2
        packs = [
            trainer.packing.replace(p, frames=Loaded(torch.zeros(p.labels.shape[1], 1, wide).half())) for p in packs
        ]
    config = TrainConfig(bf16=bf16, freeze=() if pixels else ("vision",))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = ProspectModel(SmolVLMForConditionalGeneration(vlm_config), DecisionHeads(given), config)
        model.train()

        def backward(self):
            assert self.device.type == "cuda"
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        optimizer = make_optimizer(model, config)
        with waits:
            result = train_step(model, optimizer, packs, config, World(device=torch.device("cuda", 0)))
    assert model.bf16 is (bf16 is not False)
    assert all(p.device.type == "cuda" for p in model.parameters())
    assert result.loss == result.grad_norm == 1.0
    return waits


@pytest.mark.parametrize(("pixels", "bf16"), [(True, None), (False, False)])
def test_a_step_makes_the_host_wait_once(tokens, monkeypatch, pixels, bf16):
    assert fake_step(tiny_config(len(tokens)), tokens, monkeypatch, pixels, bf16).found == ["tolist"]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "pixels"), [("256M", True), ("2.2B", False)])
def test_a_step_at_the_released_sizes(tokens, monkeypatch, tmp_path, size, pixels):
    assert fake_step(smollm2.released_config(size, tmp_path), tokens, monkeypatch, pixels).found == ["tolist"]


@pytest.mark.parametrize(("side", "patch"), [(512, 16), (384, 14), (364, 14), (64, 16)])
def test_a_patch_s_position_is_its_number_as_the_library_has_it(side, patch):
    config = tiny_config(8)
    config.vision_config.image_size, config.vision_config.patch_size = side, patch
    config.scale_factor = 1
    vlm = SmolVLMForConditionalGeneration(config).eval()
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, side, side), np.uint8))
    with torch.no_grad():
        whole = vlm.model.vision_model(pixel_values=(pixels.float() / 255 - 0.5) / 0.5).last_hidden_state
        assert torch.equal(vision.look(vlm, pixels, vision.most_tokens(vlm)), whole)


# ---- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "bf16", "mb"), [("tiny", True, 0.041), ("256M", True, 378), ("2.2B", False, 1402)])
def test_what_a_learning_tower_keeps_of_a_frame(tokens, tmp_path, size, bf16, mb):
    """Against what autograd saves on fake tensors; 1 to 3% of it, at tiny 40%, is small things left out."""
    config = tiny_config(len(tokens)) if size == "tiny" else smollm2.released_config(size, tmp_path)
    config.dtype = config.vision_config.dtype = torch.float32
    kept = {}

    def keep(value):
        kept[value.untyped_storage()._cdata] = value
        return value

    with FakeTensorMode():
        vlm = SmolVLMForConditionalGeneration(config).train()
        totals = []
        for frames in (1, 2):
            kept.clear()
            pixels = torch.zeros(frames, 3, vision.side(vlm), vision.side(vlm), dtype=torch.uint8)
            saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
            with saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                vision.look(vlm, pixels, 1)
            totals.append(sum(value.untyped_storage().nbytes() for value in kept.values()))
    estimate = vision.bytes_to_learn(vlm, bf16)
    assert estimate / 1e6 == pytest.approx(mb, rel=0.01)
    assert (0.5 if size == "tiny" else 0.97) < estimate / (totals[1] - totals[0]) <= 1


def test_pixels_that_do_not_fit_are_refused_beforehand(tokens):
    model = ProspectModel(load_model("tiny", len(tokens)), DecisionHeads(128), TrainConfig(bf16=True))
    weights = 16 * sum(p.numel() for p in model.parameters())
    frame = 16 * (24 * 64 + 4 * 256)  # one layer of 16 patches
    assert "0 MB a frame, 50 frames in a pack" in memory_line(model, 50, weights + 50 * frame)
    with pytest.raises(InputError, match=r"of the GPU's .* GB; add --freeze vision or --checkpointing, or lower"):
        memory_line(model, 51, weights + 50 * frame)
    assert memory_line(model, 50, weights // 2 + 50 * frame, ranks=2)
