"""The model against transformers' own forward pass; causality, pooling, precision, frozen parts, loading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example, dst, turn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration

from pipeline.errors import InputError
from trainer.config import TrainConfig
from trainer.features import most_tokens, pool, run_connector, run_tower
from trainer.model import DecisionHeads, ProspectModel, load_model, part_of, tiny_config
from trainer.packing import make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import Tokens

FRAMES = NoisyFrames()


def tiny(tokens: Tokens, seed: int = 0, **more) -> ProspectModel:
    vlm = load_model("tiny", len(tokens), seed)
    heads = DecisionHeads(128)
    torch.nn.init.normal_(heads.speak.weight)
    torch.nn.init.normal_(heads.dst.weight)
    return ProspectModel(vlm, heads, TrainConfig(**more))


def clips(n: int):
    return [
        clip_example(
            [turn("user", "hi " * i, 2, 3), dst(4, 6, ("S1", "complete")), turn("assistant", "well " * i, 4, 5)],
            0, 7 + 3 * i, clip_id=f"c{i}", video=f"v{i}", clip=i,
        )
        for i in range(n)
    ]  # fmt: skip


def windows(tokens: Tokens, n: int = 4):
    return [w for clip in clips(n) for w in build_windows(clip, tokens, 1, 1000)]


def gradient(model: ProspectModel, packs) -> torch.Tensor:
    model.zero_grad()
    for pack in packs:
        scores = model(pack)
        (scores.decisions.square().sum() + scores.text.float().square().mean(1).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def pixels() -> torch.Tensor:
    return torch.from_numpy(FRAMES.load(clips(1)[0], 0, 3))


def test_equals_the_whole_smolvlm(tokens):
    """Our way (tower, connector, text model, selected rows) against transformers' own forward pass."""
    model, window = tiny(tokens).eval(), windows(tokens)[1]
    model.vlm.config.image_token_id = model.vlm.model.image_token_id = tokens.image
    pack = make_pack([window], FRAMES)
    with torch.no_grad():
        values = (pack.frames()[None].float() / 255 - 0.5) / 0.5
        expected = model(pack).text
        model.vlm.set_attn_implementation({"text_config": "sdpa"})
        whole = model.vlm(input_ids=pack.input_ids[None], pixel_values=values, use_cache=False).logits
        assert torch.allclose(expected, whole[0, pack.lm_index], atol=1e-5)


def test_a_decision_sees_its_own_frame_and_nothing_that_comes_later(tokens):
    model, window = tiny(tokens), windows(tokens)[2]
    pack = make_pack([window], FRAMES)
    expected, changed = model(pack).decisions, pack.frames()
    pack.input_ids[int(window.frame_positions[4, -1]) + 1 :] = 55
    assert torch.allclose(model(pack).decisions[:, :5], expected[:, :5], atol=1e-6)
    changed[3] = 255 - changed[3]
    object.__setattr__(pack, "frames", lambda: changed)
    moved = (model(pack).decisions - expected).abs().max(0).values
    assert (moved[:3] < 1e-6).all()
    assert moved[3] > 1e-3


# ---- precision and memory ----------------------------------------------------------------------------


def test_float32_on_a_gpu_is_not_tf32(tokens):
    tiny(tokens)
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_bf16_computes_in_bfloat16_and_scores_in_float32(tokens):
    plain, rounded = tiny(tokens), tiny(tokens, bf16=True)
    pack = make_pack(windows(tokens), FRAMES)
    expected, found = plain(pack), rounded(pack)
    assert (found.text.dtype, found.decisions.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    error = (found.decisions - expected.decisions).norm() / expected.decisions.norm()
    assert 1e-6 < error.item() < 0.05


# ---- frames ------------------------------------------------------------------------------------------


def test_no_frame_is_dropped(tokens):
    """TRAPS 26: transformers' image path drops frames that are 0 after normalisation."""
    model, grey = tiny(tokens), torch.full((5, 3, 64, 64), 127.5)  # no uint8 is exactly 0 afterwards; this is
    grey[1] = 200.0
    features = run_connector(model.vlm, run_tower(model.vlm, grey, 1))
    assert features.shape == (5, 1, 128)
    assert torch.equal(features[0], features[4])
    assert not torch.equal(features[0], features[1])


@pytest.mark.parametrize(("side", "patch"), [(384, 14), (64, 16)])
def test_a_patch_s_position_is_its_number_as_the_library_has_it(side, patch):
    """TRAPS 32."""
    config = tiny_config(8)
    config.vision_config.image_size, config.vision_config.patch_size = side, patch
    config.scale_factor = 1
    vlm = SmolVLMForConditionalGeneration(config).eval()
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, side, side), np.uint8))
    with torch.no_grad():
        whole = vlm.model.vision_model(pixel_values=(frames.float() / 255 - 0.5) / 0.5).last_hidden_state
        assert torch.equal(run_tower(vlm, frames, most_tokens(vlm)), whole)


def test_features_are_pooled_to_k_tokens_before_the_connector_as_after_it(tokens):
    config = tiny_config(len(tokens))
    config.scale_factor = 1  # 4 x 4 tokens per frame
    vlm = SmolVLMForConditionalGeneration(config)
    full, quarter, one = (
        ProspectModel(vlm, DecisionHeads(128), TrainConfig(tokens_per_frame=k)).frame_features(pixels())
        for k in (16, 4, 1)
    )
    assert torch.allclose(quarter[:, 0], full[:, [0, 1, 4, 5]].mean(1), atol=1e-6)
    assert torch.allclose(one[:, 0], full.mean(1), atol=1e-6)
    normalised = (pixels().float() / 255 - 0.5) / 0.5
    after = pool(vlm.model.connector(vlm.model.vision_model(pixel_values=normalised).last_hidden_state), 4)
    assert torch.allclose(quarter, after, atol=1e-6)


# ---- parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [("vision",), ("vision", "connector", "text")])
def test_frozen_parts_get_no_gradient_and_the_others_do(tokens, freeze):
    model = tiny(tokens, freeze=freeze)
    gradient(model, [make_pack(windows(tokens), FRAMES)])
    learning = {part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learning == {"vision", "connector", "text", "heads"} - set(freeze)
    assert {part_of(n) for n, p in model.named_parameters() if p.grad is None} == set(freeze)


# ---- loading -----------------------------------------------------------------------------------------


def test_an_idefics3_loads_as_the_smolvlm_that_it_is(tmp_path):
    """SmolVLM 1 says model_type idefics3: the same architecture, the same names of weights."""
    values = tiny_config(60).to_dict() | {"model_type": "idefics3"}
    values["vision_config"]["model_type"] = "idefics3_vision"
    before = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(values)).eval()
    before.save_pretrained(tmp_path)
    after = load_model(str(tmp_path), 60).eval()
    seen = {"input_ids": torch.tensor([[0, 5, 6, 7]]), "pixel_values": torch.rand(1, 1, 3, 64, 64)}
    with torch.no_grad():
        assert torch.equal(before(**seen).logits, after(**seen).logits)


def test_a_model_that_is_no_smolvlm_says_so_in_one_line(tmp_path):
    tiny_config(60).text_config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no SmolVLM could be loaded \(a llama, expected a smolvlm or an idefics3\)"):
        load_model(str(tmp_path), 60)
