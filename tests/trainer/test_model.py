from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example, dst, turn

from trainer.batch import collate, micro_batches
from trainer.errors import TrainerError
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.sequence import build_windows
from trainer.tokenizer import Tokens, train_tiny_tokens

FRAMES = NoisyFrames()


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return train_tiny_tokens(["Put the base down", "S1->complete", "well done"] * 3)


def tiny(tokens: Tokens, seed: int = 0, **more) -> ProspectModel:
    vlm = load_model("tiny", len(tokens), seed)
    heads = DecisionHeads(128)
    torch.nn.init.normal_(heads.speak.weight)
    torch.nn.init.normal_(heads.dst.weight)
    return ProspectModel(vlm, heads, **more)


def clips(n: int):
    return [
        clip_example(
            [turn("user", "hi " * i, 2, 3), dst(4, 6, ("S1", "complete")), turn("assistant", "well " * i, 4, 5)],
            0, 7 + 3 * i, clip_id=f"c{i}", video=f"v{i}", clip=i,
        )
        for i in range(n)
    ]  # fmt: skip


def windows(tokens: Tokens, n: int = 4, k: int = 1):
    return [w for clip in clips(n) for w in build_windows(clip, tokens, k, 1000)]


def test_padded_batch_equals_sequences_one_by_one(tokens):
    model, chosen = tiny(tokens), windows(tokens)
    assert len({len(w.input_ids) for w in chosen}) == 4
    together = model(collate(chosen, FRAMES))
    alone = [model(collate([w], FRAMES)) for w in chosen]
    decisions, text = (torch.cat(parts, dim) for parts, dim in zip(zip(*alone, strict=True), (1, 0), strict=True))
    assert torch.allclose(together.decisions, decisions, atol=1e-5)
    assert torch.allclose(together.text, text, atol=1e-5)


def test_gradients_of_a_padded_batch_equal_those_one_by_one(tokens):
    model, chosen = tiny(tokens), windows(tokens)

    def gradient(batches):
        model.zero_grad()
        for batch in batches:
            scores = model(batch)
            (scores.decisions.square().sum() + scores.text.square().mean(1).sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    together = gradient([collate(chosen, FRAMES)])
    alone = gradient([collate([w], FRAMES) for w in chosen])
    assert float((together - alone).norm() / alone.norm()) < 1e-5


def test_what_padding_holds_changes_nothing(tokens):
    model = tiny(tokens)
    batch = collate(windows(tokens), FRAMES)
    expected = model(batch)
    lengths = torch.tensor([len(w.input_ids) for w in batch.windows])
    padding = torch.arange(batch.input_ids.shape[1]) >= lengths[:, None]
    assert padding.any()
    batch.input_ids[padding] = 99
    found = model(batch)
    assert torch.equal(found.decisions, expected.decisions)
    assert torch.equal(found.text, expected.text)


def test_a_decision_does_not_see_what_comes_later(tokens):
    model, window = tiny(tokens), windows(tokens)[2]
    batch = collate([window], FRAMES)
    expected = model(batch).decisions
    cut = int(window.decision_positions[4]) + 1
    batch.input_ids[:, cut:] = 55
    assert torch.allclose(model(batch).decisions[:, :5], expected[:, :5], atol=1e-6)


def test_a_decision_sees_its_own_frame(tokens):
    model, window = tiny(tokens), windows(tokens)[0]
    batch = collate([window], FRAMES)
    expected = model(batch).decisions
    pixels = batch.pixels()
    pixels[3] = 255 - pixels[3]
    object.__setattr__(batch, "pixels", lambda: pixels)
    moved = (model(batch).decisions - expected).abs().max(0).values
    assert (moved[:3] < 1e-6).all()
    assert moved[3] > 1e-3


def test_equals_the_whole_smolvlm(tokens):
    """Our way (tower, connector, text model, selected rows) against transformers' own forward pass."""
    model, window = tiny(tokens).eval(), windows(tokens)[1]
    model.vlm.config.image_token_id = model.vlm.model.image_token_id = tokens.image
    batch = collate([window], FRAMES)
    with torch.no_grad():
        pixels = (batch.pixels()[None].float() / 255 - 0.5) / 0.5
        whole = model.vlm(input_ids=batch.input_ids, pixel_values=pixels, use_cache=False).logits
        assert torch.allclose(model(batch).text, whole[0, batch.lm_index], atol=1e-5)


def test_no_frame_is_dropped(tokens):
    """TRAPS 26: transformers' image path drops frames that are 0 after normalisation."""
    model = tiny(tokens)
    pixels = torch.full((5, 3, 64, 64), 127.5)  # no uint8 is exactly 0 afterwards; this is
    pixels[1] = 200.0
    features = model.frame_features(pixels)
    assert features.shape == (5, 1, 128)
    assert torch.equal(features[0], features[4])
    assert not torch.equal(features[0], features[1])


def test_frames_of_another_size_are_a_defect(tokens):
    with pytest.raises(AssertionError, match="side 64"):
        tiny(tokens).frame_features(torch.zeros(1, 3, 32, 128, dtype=torch.uint8))


def test_more_tokens_per_frame_than_there_are_is_the_users_error(tokens):
    with pytest.raises(TrainerError, match="tokens_per_frame is 4, but this model has 1 per frame"):
        tiny(tokens, tokens_per_frame=4)


def test_features_are_pooled_to_k_tokens(tokens):
    config = load_model("tiny", len(tokens)).config
    config.scale_factor = 1  # 4 x 4 tokens per frame
    vlm = type(load_model("tiny", len(tokens)))(config)
    pixels = torch.from_numpy(FRAMES.load(clips(1)[0], 0, 3))
    full = ProspectModel(vlm, DecisionHeads(128), 16).frame_features(pixels)
    quarter = ProspectModel(vlm, DecisionHeads(128), 4).frame_features(pixels)
    assert torch.allclose(quarter[:, 0], full[:, [0, 1, 4, 5]].mean(1), atol=1e-6)
    single = ProspectModel(vlm, DecisionHeads(128), 1)
    assert torch.allclose(single.frame_features(pixels)[:, 0], full.mean(1), atol=1e-6)
    pooled = collate(windows(tokens, k=4), FRAMES)
    assert ProspectModel(vlm, DecisionHeads(128), 4)(pooled).decisions.shape == (2, pooled.labels.shape[1])


@pytest.mark.parametrize(
    ("image", "patch", "scale", "given", "k"), [(512, 16, 4, 64, 4), (384, 14, 3, 81, 9), (512, 16, 4, 64, 1)]
)
def test_the_geometry_of_the_released_models(tokens, image, patch, scale, given, k):
    """256M and 500M give 64 tokens per frame, 2.2B gives 81; pooled to k, each quadrant (or ninth) by itself."""
    config = load_model("tiny", len(tokens)).config
    vision = config.vision_config
    vision.image_size, vision.patch_size, vision.hidden_size, vision.intermediate_size = image, patch, 16, 16
    config.scale_factor = scale
    model = ProspectModel(type(load_model("tiny", len(tokens)))(config), DecisionHeads(128), k)
    pixels = torch.randint(0, 256, (2, 3, image, image), dtype=torch.uint8)
    every = ProspectModel(model.vlm, DecisionHeads(128), given).frame_features(pixels)
    found = model.frame_features(pixels)
    assert every.shape == (2, given, 128)
    assert found.shape == (2, k, 128)
    assert torch.allclose(found.mean(1), every.mean(1), atol=1e-5)


def test_heads_start_at_the_prior():
    heads = DecisionHeads(8, (0.1, 0.02))
    logits = heads(torch.randn(5, 8))
    assert logits.shape == (2, 5)
    assert torch.allclose(logits[0], torch.tensor(math.log(0.1 / 0.9)))
    assert torch.allclose(logits[1].sigmoid(), torch.tensor(0.02))


def test_tiny_weights_depend_on_the_seed_alone(tokens):
    def weights(seed):
        return torch.cat([p.flatten() for p in load_model("tiny", len(tokens), seed).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_frozen_tower_does_not_learn_and_gives_the_same_features(tokens):
    frozen, live = tiny(tokens, freeze_vision=True), tiny(tokens)
    batch = collate(windows(tokens), FRAMES)
    frozen(batch).decisions.sum().backward()
    towers = [p for n, p in frozen.named_parameters() if "vision_model" in n or "connector" in n]
    assert towers
    assert all(p.grad is None for p in towers)
    assert torch.equal(frozen.frame_features(batch.pixels()), live.frame_features(batch.pixels()))


def test_an_unknown_model_is_the_users_error(tmp_path):
    with pytest.raises(TrainerError, match="no SmolVLM could be loaded"):
        load_model(str(tmp_path), 10)


# ---- batches -----------------------------------------------------------------------------------------


def test_batch_indices_point_at_frames_and_texts(tokens):
    chosen = windows(tokens)
    batch = collate(chosen, FRAMES)
    flat = batch.input_ids.flatten()
    assert (flat[batch.frame_index] == tokens.image).all()
    images = sum(int((window.input_ids == tokens.image).sum()) for window in chosen)
    assert images == batch.frame_index.numel()
    assert torch.equal(flat[batch.lm_index + 1], batch.lm_targets)
    assert np.array_equal(batch.labels.numpy(), np.concatenate([w.labels for w in chosen], 1))
    assert batch.pixels().shape == (batch.labels.shape[1], 3, 64, 64)
    assert torch.equal(batch.decision_index, batch.frame_index[:, -1])


def test_micro_batches_keep_every_window_within_the_budget(tokens):
    chosen = windows(tokens, 7)
    for budget in (1, 150, 10_000):
        batches = micro_batches(chosen, FRAMES, budget)
        assert sorted(w.name for b in batches for w in b.windows) == sorted(w.name for w in chosen)
        assert all(b.input_ids.numel() <= budget or len(b.windows) == 1 for b in batches)
    assert len(micro_batches(chosen, FRAMES, 10_000)) == 1
