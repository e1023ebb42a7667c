from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example, dst, turn
from torch._dynamo.testing import CompileCounter
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

import trainer.attention
from pipeline.errors import InputError
from trainer import vision
from trainer.attention import packed_attention
from trainer.config import TrainConfig
from trainer.model import DecisionHeads, ProspectModel, load_model, part_of, tiny_config
from trainer.packing import ends_of, make_pack, pack_windows, plan
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
    return ProspectModel(vlm, heads, TrainConfig(**more))


def pooling(vlm, k: int) -> ProspectModel:
    return ProspectModel(vlm, DecisionHeads(128), TrainConfig(tokens_per_frame=k))


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


def gradient(model: ProspectModel, packs) -> torch.Tensor:
    model.zero_grad()
    for pack in packs:
        scores = model(pack)
        (scores.decisions.square().sum() + scores.text.float().square().mean(1).sum()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def loop_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, seg_lens=None, **_):
    """Written out: softmax(q k / sqrt(d)) v for each window by itself, each query head with its group's keys."""
    out = torch.zeros_like(query)
    groups, first = query.shape[1] // key.shape[1], 0
    for length in seg_lens.tolist():
        for head in range(query.shape[1]):
            for i in range(first, first + length):
                k, v = (t[0, head // groups, first : i + 1] for t in (key, value))
                weights = (query[0, head, i] @ k.mT / query.shape[-1] ** 0.5).softmax(-1)
                out[0, head, i] = weights @ v
        first += length
    return out.transpose(1, 2).contiguous(), None


def test_packed_attention_is_attention_within_each_window():
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    for lengths in ([9], [1, 5, 3], [4, 4, 1]):
        given = {"seg_lens": torch.tensor(lengths)}
        found, _ = packed_attention(None, query, key, value, None, 8**-0.5, **given)
        expected, _ = loop_attention(None, query, key, value, None, **given)
        assert torch.allclose(found, expected, atol=1e-6)


def test_attention_refuses_to_run_without_lengths_or_with_a_mask():
    q = torch.randn(1, 4, 9, 8)
    with pytest.raises(ValueError, match="needs seg_lens and no mask"):
        packed_attention(None, q, q, q, None)
    with pytest.raises(ValueError, match="needs seg_lens and no mask"):
        packed_attention(None, q, q, q, torch.ones(1, 9), seg_lens=torch.tensor([9]))
    with pytest.raises(ValueError, match=r"lengths \[4, 4\] for 9 queries"):
        packed_attention(None, q, q, q, None, seg_lens=torch.tensor([4, 4]))


def test_the_text_model_does_not_run_unpacked(tokens):
    with pytest.raises(ValueError, match="needs seg_lens"):
        tiny(tokens).body(inputs_embeds=torch.randn(1, 5, 128), use_cache=False)


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 5, 5)])
def test_a_mask_is_refused_not_dropped(tokens, shape):
    given = {"inputs_embeds": torch.randn(1, 5, 128), "use_cache": False, "seg_lens": torch.tensor([5])}
    with pytest.raises(ValueError, match="packed_attention: takes no mask"):
        tiny(tokens).body(attention_mask=torch.ones(shape), **given)
    with pytest.raises(ValueError, match="packed_attention: takes no mask"):
        tiny(tokens).body(None, torch.ones(shape), **given)


def varlen_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """`varlen_attn` as its documentation has it, for [L, H, D]; asserts what its kernels need."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    assert cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert window_size == (-1, 0)  # causal
    group, windows = query.shape[1] // key.shape[1], []
    for q, k, v in zip(*(x.float().split(cu_seq_q.diff().tolist()) for x in (query, key, value)), strict=True):
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        windows.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(windows).to(query.dtype)


@pytest.fixture
def one_launch(monkeypatch):
    """As on CUDA: all windows in one call under bfloat16. The list gets an item per call."""
    calls = []
    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: value.dtype == torch.bfloat16)
    monkeypatch.setattr(
        trainer.attention, "varlen_attn", lambda *args, **more: (calls.append(args), varlen_by_hand(*args, **more))[1]
    )
    return calls


def test_one_launch_for_all_windows_equals_one_each_to_bfloat16(one_launch):
    torch.manual_seed(0)
    given = [torch.randn(1, heads, 12, 8) for heads in (4, 2, 2)]
    upstream = torch.randn(1, 12, 4, 8)
    for lengths in ([12], [1, 8, 3]):
        lens = torch.tensor(lengths)
        found = {}
        for way, more in {"loop": {}, "launch": {"seg_ends": ends_of(lens), "longest": max(lengths)}}.items():
            query, key, value = (x.clone().requires_grad_() for x in given)  # RoPE gives float32 queries and keys
            with torch.autocast("cpu", torch.bfloat16):
                out, _ = packed_attention(None, query, key, value.bfloat16(), None, 8**-0.5, seg_lens=lens, **more)
            found[way] = [out, *torch.autograd.grad(out, (query, key, value), upstream.to(out.dtype))]
        for a, b in zip(found["launch"], found["loop"], strict=True):
            a, b = a.detach(), b.detach()
            assert a.shape == b.shape
            assert float((a.float() - b.float()).norm() / b.float().norm()) < 1e-2
    assert len(one_launch) == 2


def test_a_bfloat16_pack_attends_in_one_launch_per_layer(tokens, one_launch, monkeypatch):
    model, packs = tiny(tokens, bf16=True), [make_pack(windows(tokens), FRAMES)]
    launched, by_launch = model(packs[0]).decisions.detach(), gradient(model, packs)
    assert len(one_launch) == 2 * 4  # two passes of four layers
    monkeypatch.setattr(trainer.attention, "takes_varlen", lambda value: False)
    looped, by_loop = model(packs[0]).decisions.detach(), gradient(model, packs)
    assert float((launched - looped).norm() / looped.norm()) < 1e-2
    assert float((by_launch - by_loop).norm() / by_loop.norm()) < 2e-2


def test_float32_attends_by_windows(tokens, one_launch):
    tiny(tokens)(make_pack(windows(tokens), FRAMES))
    assert not one_launch


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


@pytest.mark.parametrize("more", [{}, {"checkpointing": True}])
def test_a_pack_equals_its_windows_one_by_one(tokens, more):
    model, chosen = tiny(tokens, **more).train(), windows(tokens)
    assert len({len(w.input_ids) for w in chosen}) == 4
    together = model(make_pack(chosen, FRAMES))
    alone = [model(make_pack([w], FRAMES)) for w in chosen]
    decisions, text = (torch.cat(parts, dim) for parts, dim in zip(zip(*alone, strict=True), (1, 0), strict=True))
    assert torch.allclose(together.decisions, decisions, atol=1e-5)
    assert torch.allclose(together.text, text, atol=1e-5)


def test_the_gradient_of_a_pack_equals_that_of_its_windows(tokens):
    model, chosen = tiny(tokens), windows(tokens)
    together = gradient(model, [make_pack(chosen, FRAMES)])
    alone = gradient(model, [make_pack([w], FRAMES) for w in chosen])
    assert float((together - alone).norm() / alone.norm()) < 1e-5


def test_a_pack_equals_the_library_s_attention_on_each_window(tokens):
    """Not our attention on one window, but transformers' own sdpa."""
    model, chosen = tiny(tokens).eval(), windows(tokens)
    packed = model(make_pack(chosen, FRAMES)).decisions
    model.vlm.set_attn_implementation({"text_config": "sdpa"})
    alone = torch.cat([model(make_pack([w], FRAMES)).decisions for w in chosen], 1)
    assert torch.allclose(packed, alone, atol=1e-5)


@pytest.mark.slow
def test_compiled_layers_give_the_same_logits_and_gradients(tokens):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    plain, compiled = tiny(tokens), tiny(tokens, compile=True)
    for n in (2, 3):  # other lengths, other numbers of windows
        packs = [make_pack(windows(tokens, n), FRAMES)]
        assert torch.allclose(plain(packs[0]).decisions, compiled(packs[0]).decisions, atol=1e-5)
        expected, found = gradient(plain, packs), gradient(compiled, packs)
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_checkpointing_changes_no_gradient(tokens):
    packs = [make_pack(windows(tokens), FRAMES)]
    plain, thrifty = tiny(tokens).train(), tiny(tokens, checkpointing=True).train()
    assert thrifty.body.layers[0].gradient_checkpointing
    assert torch.allclose(gradient(plain, packs), gradient(thrifty, packs), atol=1e-6)


def test_float32_on_a_gpu_is_not_tf32_and_torch_s_old_and_new_switches_agree(tokens):
    tiny(tokens)
    assert torch.backends.cudnn.conv.fp32_precision == torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with torch.backends.cudnn.flags(deterministic=True):  # reads all of them
        pass


def test_bf16_computes_in_bfloat16_and_scores_in_float32(tokens):
    plain, rounded = tiny(tokens), tiny(tokens, bf16=True)
    pack = make_pack(windows(tokens), FRAMES)
    expected, found = plain(pack), rounded(pack)
    assert found.text.dtype == torch.bfloat16
    assert found.decisions.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in rounded.parameters())
    error = (found.decisions - expected.decisions).norm() / expected.decisions.norm()
    assert 1e-6 < error.item() < 0.05


def test_a_decision_does_not_see_what_comes_later(tokens):
    model, window = tiny(tokens), windows(tokens)[2]
    batch = make_pack([window], FRAMES)
    expected = model(batch).decisions
    cut = int(window.decision_positions[4]) + 1
    batch.input_ids[cut:] = 55
    assert torch.allclose(model(batch).decisions[:, :5], expected[:, :5], atol=1e-6)


def test_a_decision_sees_its_own_frame(tokens):
    model, window = tiny(tokens), windows(tokens)[0]
    batch = make_pack([window], FRAMES)
    expected = model(batch).decisions
    pixels = batch.frames()
    pixels[3] = 255 - pixels[3]
    object.__setattr__(batch, "frames", lambda: pixels)
    moved = (model(batch).decisions - expected).abs().max(0).values
    assert (moved[:3] < 1e-6).all()
    assert moved[3] > 1e-3


def test_equals_the_whole_smolvlm(tokens):
    """Our way (tower, connector, text model, selected rows) against transformers' own forward pass."""
    model, window = tiny(tokens).eval(), windows(tokens)[1]
    model.vlm.config.image_token_id = model.vlm.model.image_token_id = tokens.image
    batch = make_pack([window], FRAMES)
    with torch.no_grad():
        pixels = (batch.frames()[None].float() / 255 - 0.5) / 0.5
        expected = model(batch).text
        model.vlm.set_attn_implementation({"text_config": "sdpa"})
        whole = model.vlm(input_ids=batch.input_ids[None], pixel_values=pixels, use_cache=False).logits
        assert torch.allclose(expected, whole[0, batch.lm_index], atol=1e-5)


def test_no_frame_is_dropped(tokens):
    """TRAPS 26: transformers' image path drops frames that are 0 after normalisation."""
    model = tiny(tokens)
    pixels = torch.full((5, 3, 64, 64), 127.5)  # no uint8 is exactly 0 afterwards; this is
    pixels[1] = 200.0
    features = vision.project(model.vlm, vision.look(model.vlm, pixels, 1))
    assert features.shape == (5, 1, 128)
    assert torch.equal(features[0], features[4])
    assert not torch.equal(features[0], features[1])


def test_frames_of_another_size_are_a_defect(tokens):
    with pytest.raises(AssertionError, match="side 64"):
        tiny(tokens).frame_features(torch.zeros(1, 3, 32, 128, dtype=torch.uint8))


def test_more_tokens_per_frame_than_there_are_is_the_users_error(tokens):
    with pytest.raises(InputError, match="tokens_per_frame is 4, but this model has 1 per frame"):
        tiny(tokens, tokens_per_frame=4)


def test_features_are_pooled_to_k_tokens(tokens):
    config = load_model("tiny", len(tokens)).config
    config.scale_factor = 1  # 4 x 4 tokens per frame
    vlm = type(load_model("tiny", len(tokens)))(config)
    pixels = torch.from_numpy(FRAMES.load(clips(1)[0], 0, 3))
    full = pooling(vlm, 16).frame_features(pixels)
    quarter = pooling(vlm, 4).frame_features(pixels)
    assert torch.allclose(quarter[:, 0], full[:, [0, 1, 4, 5]].mean(1), atol=1e-6)
    single = pooling(vlm, 1)
    assert torch.allclose(single.frame_features(pixels)[:, 0], full.mean(1), atol=1e-6)
    pooled = make_pack(windows(tokens, k=4), FRAMES)
    assert pooling(vlm, 4)(pooled).decisions.shape == (2, pooled.labels.shape[1])


@pytest.mark.parametrize(
    ("image", "patch", "scale", "given", "k"), [(512, 16, 4, 64, 4), (384, 14, 3, 81, 9), (512, 16, 4, 64, 1)]
)
def test_the_geometry_of_the_released_models(tokens, image, patch, scale, given, k):
    """256M and 500M give 64 tokens per frame, 2.2B gives 81; pooled to k, each quadrant (or ninth) by itself."""
    config = load_model("tiny", len(tokens)).config
    vision = config.vision_config
    vision.image_size, vision.patch_size, vision.hidden_size, vision.intermediate_size = image, patch, 16, 16
    config.scale_factor = scale
    model = pooling(type(load_model("tiny", len(tokens)))(config), k)
    pixels = torch.randint(0, 256, (2, 3, image, image), dtype=torch.uint8)
    every = pooling(model.vlm, given).frame_features(pixels)
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
    frozen, live = tiny(tokens, freeze=("vision", "connector")), tiny(tokens)
    batch = make_pack(windows(tokens), FRAMES)
    frozen(batch).decisions.sum().backward()
    towers = [p for n, p in frozen.named_parameters() if "vision_model" in n or "connector" in n]
    assert towers
    assert all(p.grad is None for p in towers)
    assert torch.equal(frozen.frame_features(batch.frames()), live.frame_features(batch.frames()))


def test_an_unknown_model_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match="no SmolVLM could be loaded"):
        load_model(str(tmp_path), 10)


# ---- parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze", "learning"),
    [
        ((), {"vision", "connector", "text", "heads"}),
        (("vision",), {"connector", "text", "heads"}),
        (("vision", "connector", "text"), {"heads"}),
    ],
)
def test_frozen_parts_get_no_gradient_and_the_others_do(tokens, freeze, learning):
    model = tiny(tokens, freeze=freeze)
    gradient(model, [make_pack(windows(tokens), FRAMES)])
    found = {part_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found == learning
    assert {part_of(n) for n, p in model.named_parameters() if p.grad is None} == set(freeze)


def test_adapters_learn_alone_and_start_at_nothing(tokens):
    pytest.importorskip("peft")
    plain, adapted = tiny(tokens), tiny(tokens, lora_rank=4, freeze=("vision",))
    pack = make_pack(windows(tokens), FRAMES)
    assert torch.equal(adapted(pack).decisions, plain(pack).decisions)
    gradient(adapted, [pack])
    learning = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert {part_of(n) for n in learning} == {"connector", "text", "heads"}
    assert all(".lora_" in n for n in learning if part_of(n) == "text")
    assert sum(".lora_A." in n for n in learning) == 4 * 7  # layers x (q, k, v, o, gate, up, down)


def test_cached_features_stand_in_for_frames(tokens):
    model = tiny(tokens, freeze=("vision",))
    pixels = torch.from_numpy(FRAMES.load(clips(1)[0], 0, 3))
    features = vision.look(model.vlm, pixels, 1)
    assert features.shape == (3, 1, vision.width(model.vlm)) == (3, 1, 64 * 16)
    assert torch.equal(model.frame_features(features), model.frame_features(pixels))


def test_pooling_commutes_with_the_connector(tokens):
    config = load_model("tiny", len(tokens)).config
    config.scale_factor = 1
    vlm = type(load_model("tiny", len(tokens)))(config)
    pixels = torch.from_numpy(FRAMES.load(clips(1)[0], 0, 3))
    before = vision.project(vlm, vision.look(vlm, pixels, 4))
    normalised = (pixels.float() / 255 - 0.5) / 0.5
    after = vision.pool(vlm.model.connector(vlm.model.vision_model(pixel_values=normalised).last_hidden_state), 4)
    assert torch.allclose(before, after, atol=1e-6)


def test_a_fingerprint_is_of_the_tower_alone(tokens):
    first, second = load_model("tiny", len(tokens)), load_model("tiny", len(tokens))
    with torch.no_grad():
        second.lm_head.weight += 1
    assert vision.fingerprint(first) == vision.fingerprint(second)
    with torch.no_grad():
        second.model.vision_model.post_layernorm.bias[0] += 1e-3
    assert vision.fingerprint(first) != vision.fingerprint(second)


# ---- packs -------------------------------------------------------------------------------------------


def test_pack_indices_point_at_frames_and_texts(tokens):
    chosen = windows(tokens)
    pack = make_pack(chosen, FRAMES)
    assert (pack.input_ids[pack.frame_index] == tokens.image).all()
    images = sum(int((window.input_ids == tokens.image).sum()) for window in chosen)
    assert images == pack.frame_index.numel()
    assert torch.equal(pack.input_ids[pack.lm_index + 1], pack.lm_targets)
    assert np.array_equal(pack.labels.numpy(), np.concatenate([w.labels for w in chosen], 1))
    assert pack.frames().shape == (pack.labels.shape[1], 3, 64, 64)
    assert torch.equal(pack.decision_index, pack.frame_index[:, -1])
    lengths = [len(w.input_ids) for w in chosen]
    assert pack.seg_lens.tolist() == lengths
    assert pack.seg_ends.tolist() == [0, *np.cumsum(lengths)]
    assert pack.seg_ends.dtype == torch.int32
    assert pack.longest == max(lengths)
    assert (pack.position_ids == 0).sum() == 4


def test_no_token_is_padding(tokens):
    chosen = windows(tokens, 7)
    packs = pack_windows(chosen, FRAMES, 300)
    assert sum(pack.num_tokens for pack in packs) == sum(len(w.input_ids) for w in chosen)


def test_packs_keep_to_the_budget_and_fill_it():
    assert plan([50, 30, 20, 60, 40], 100) == [[3, 4], [0, 1, 2]]
    assert plan([500, 30], 100) == [[0], [1]]
    assert plan([], 100) == []


def test_a_pack_goes_to_a_worker_and_back(tokens):
    import pickle

    pack = make_pack(windows(tokens), FRAMES)
    again = pickle.loads(pickle.dumps(pack.loaded()))
    assert torch.equal(again.frames(), pack.frames())
    assert torch.equal(again.input_ids, pack.input_ids)


def test_a_blank_pack_gives_every_parameter_a_gradient_of_zero(tokens):
    model = tiny(tokens)
    scores = model(model.blank_pack(tokens.image, cached=False))
    assert scores.text.shape[0] == 0
    (scores.text.sum() + scores.decisions[:, :0].sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_idefics3_loads_as_the_smolvlm_that_it_is(tmp_path):
    """SmolVLM 1 says model_type idefics3: the same architecture, the same names of weights."""
    told = tiny_config(60).to_dict() | {"model_type": "idefics3"}
    told["vision_config"]["model_type"] = "idefics3_vision"
    before = Idefics3ForConditionalGeneration(Idefics3Config.from_dict(told)).eval()
    before.save_pretrained(tmp_path)
    after = load_model(str(tmp_path), 60).eval()
    seen = {"input_ids": torch.tensor([[0, 5, 6, 7]]), "pixel_values": torch.rand(1, 1, 3, 64, 64)}
    with torch.no_grad():
        assert torch.equal(before(**seen).logits, after(**seen).logits)
