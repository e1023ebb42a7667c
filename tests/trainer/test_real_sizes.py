"""SmolVLM at its real sizes and with its real token layout."""

from __future__ import annotations

import pytest
import smollm2
import torch
from by_hand import NoisyFrames, clip_example, dst, turn
from torch import Tensor
from transformers import SmolVLMForConditionalGeneration

from trainer.config import TrainConfig
from trainer.model import DecisionHeads, ProspectModel, load_model, part_of, tiny_config
from trainer.packing import make_pack
from trainer.sequence import Window, build_windows
from trainer.tokenizer import Tokens, load_tokens
from trainer.train import make_optimizer, train_step


def window_of(tokens: Tokens, frames: int = 5, k: int = 1) -> Window:
    """Frames 10..; the assistant is asked at 11 and speaks at 12, where step S1 is done."""
    turns = [
        turn("user", "What is next?", 11, 12),
        dst(12, 13, ("S1", "complete")),
        turn("assistant", "Attach the wheel to the base.", 12, 13),
    ]
    (window,) = build_windows(clip_example(turns, 10, frames, goal="A toy", rate=1.0), tokens, k, 2048)
    return window


@pytest.mark.parametrize(
    ("size", "parts", "tokens_per_frame", "feature", "side", "hidden"),
    [
        ("256M", (86_433_024, 7_077_888, 162_974_016), 64, 12288, 512, 576),
        ("500M", (86_433_024, 11_796_480, 409_252_800), 64, 12288, 512, 960),
        ("2.2B", (412_987_248, 21_233_664, 1_812_563_968), 81, 10368, 384, 2048),
    ],
)
def test_the_released_sizes(tmp_path, size, parts, tokens_per_frame, feature, side, hidden):
    """Vision, connector, text (with embeddings and LM head), counted by hand from the layers; without memory."""
    config = smollm2.released_config(size, tmp_path)
    with torch.device("meta"):
        vlm = SmolVLMForConditionalGeneration(config)
        model = ProspectModel(vlm, DecisionHeads(hidden), TrainConfig(tokens_per_frame=tokens_per_frame))
        with pytest.raises(ValueError, match=f"this model has {tokens_per_frame} per frame"):
            ProspectModel(vlm, DecisionHeads(hidden), TrainConfig(tokens_per_frame=100))
    found = dict.fromkeys(("vision", "connector", "text", "heads"), 0)
    for name, parameter in model.named_parameters():
        found[part_of(name)] += parameter.numel()
    assert tuple(found.values()) == (*parts, 2 * (hidden + 1))
    assert sum(parts) == vlm.num_parameters()
    assert (model.side, model.hidden) == (side, hidden)
    assert vlm.model.connector.modality_projection.proj.in_features == feature
    assert vlm.lm_head.weight.shape == vlm.get_input_embeddings().weight.shape == (49280, hidden)


@pytest.mark.slow
def test_one_step_at_the_width_of_256m(tmp_path):
    """All parts learn, one frame of 512 px at all its 64 tokens; 2 of 12 and of 30 layers."""
    config = smollm2.released_config("256M", tmp_path)
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
    model = ProspectModel(smollm2.random_smolvlm(config), DecisionHeads(576), TrainConfig(tokens_per_frame=64, lr=1e-4))
    tokens = Tokens(smollm2.stand_in_tokenizer())
    assert (len(tokens), tokens.image, tokens.end) == (49280, 49190, 49279)
    assert list(tokens.marker.values()) == list(range(49191, 49202))
    pack = make_pack([window_of(tokens, 3, 64)], NoisyFrames(512))
    assert (pack.input_ids == 49190).sum() == 3 * 64
    watched = {part_of(name): (name, p.detach().clone()) for name, p in model.named_parameters() if p.ndim == 2}
    step = train_step(model, make_optimizer(model, TrainConfig(lr=1e-4)), [pack], TrainConfig())
    assert (step.n_speaking, step.n_dst_update, step.n_lm) == (3, 3, len(pack.lm_targets))
    assert (step.speaking, step.dst_update) == pytest.approx((0.6931, 0.6931), abs=1e-4)  # heads that say 0.5
    assert step.lm == pytest.approx(10.8, abs=1.5)  # ln 49280
    now = dict(model.named_parameters())
    assert {part for part, (name, was) in watched.items() if not torch.equal(now[name], was)} == set(watched)
    assert set(watched) == {"vision", "connector", "text", "heads"}


def logits(vlm: SmolVLMForConditionalGeneration, tokens: Tokens) -> Tensor:
    model = ProspectModel(vlm, DecisionHeads(vlm.config.text_config.hidden_size), TrainConfig()).eval()
    with torch.no_grad():
        return model(make_pack([window_of(tokens)], NoisyFrames())).text


@pytest.mark.parametrize(("tied", "grown"), [(True, True), (False, False)])
def test_a_saved_model_gives_the_same_logits_tied_or_not_resized_or_not(tmp_path, tied, grown):
    """TRAPS 29."""
    tokenizer = smollm2.stand_in_tokenizer()
    config = tiny_config(len(tokenizer))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    vlm = SmolVLMForConditionalGeneration(config)
    if grown:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<leading>"]})
        vlm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tokens = Tokens(tokenizer)
    expected = logits(vlm, tokens)
    vlm.save_pretrained(tmp_path)
    tokens.tokenizer.save_pretrained(tmp_path)
    again = load_tokens(tmp_path)
    vlm_again = load_model(str(tmp_path), len(again))
    assert torch.equal(logits(vlm_again, again), expected)
    assert (vlm_again.lm_head.weight is vlm_again.get_input_embeddings().weight) is tied
    assert expected.shape[1] == (49281 if grown else 49280)
    assert again.encode("hi") == tokens.encode("hi")
