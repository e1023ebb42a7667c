"""A checkpoint: opened with transformers alone, opened with `trainer.load`, damaged, and with adapters."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import smollm2
import torch
from by_hand import NoisyFrames, clip_example, dst, turn, write_frames, write_shards
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    SmolVLMForConditionalGeneration,
)

import trainer
from pipeline.errors import InputError
from trainer.checkpoint import LoadedRun, model_card, save_checkpoint
from trainer.config import RunOptions, TrainConfig
from trainer.frame_source import PixelFrames
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import Pack, make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import Tokens, train_tiny_tokens
from trainer.train import train

CONFIG = TrainConfig(
    steps=2, clips_per_step=2, warmup_steps=1, max_tokens=200, micro_batch_tokens=200, eval_split="test"
)
INFO = {"step": 3, "best": -1.0, "neg_rate": 0.25, "positive_rates": [0.5, 0.5]}
FRAMES = NoisyFrames()
BODY = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def clip(i: int, split: str):
    """12 frames: asked at 1, S1 done at 4, speaks at 5 and 6."""
    turns = [
        turn("user", "What now?", 1, 2),
        dst(4, 5, ("S1", "complete")),
        turn("assistant", "Well done.", 5, 7),
    ]
    return clip_example(turns, 0, 12, clip_id=f"{split}{i}", clip=i, video=f"{split}-v{i}")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data")
    splits = {split: [clip(i, split) for i in range(n)] for split, n in (("train", 4), ("test", 2))}
    for clips in splits.values():
        for c in clips:
            frames = FRAMES.load(c, 0, 12).transpose(0, 2, 3, 1)
            write_frames(out / "frames-on-disk" / f"{c.video_uid}.arrow", list(frames))
    return write_shards(out, splits, frames_root=out / "frames-on-disk")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(data, folder, CONFIG, options=RunOptions(progress=False))
    return folder


@pytest.fixture
def copy(run, tmp_path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def pack(run) -> Pack:
    tokens = trainer.load(run).tokens
    return make_pack(build_windows(clip(0, "test"), tokens, 1, 200), FRAMES)


def noisy_heads(model: ProspectModel) -> ProspectModel:
    torch.manual_seed(5)
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter)
    return model


def tiny(**more) -> tuple[Tokens, ProspectModel]:
    tokens = train_tiny_tokens(["What now?", "Well done.", "S1->complete"] * 3)
    config = TrainConfig(**more)
    return tokens, noisy_heads(ProspectModel(load_model("tiny", len(tokens)), DecisionHeads(128), config))


def toy_pack(tokens: Tokens) -> Pack:
    return make_pack(build_windows(clip(0, "test"), tokens, 1, 200), FRAMES)


def as_transformers_takes_it(pack: Pack) -> dict[str, torch.Tensor]:
    pixels = (pack.frames().float() / 255 - 0.5) / 0.5
    return {"input_ids": pack.input_ids[None], "pixel_values": pixels[None]}


def test_a_checkpoint_lists_every_file_with_its_hash_and_last_alone_can_be_resumed(run):
    scores = {*BODY, "heads.safetensors", "run.json", "README.md"}
    assert {p.name for p in (run / "best").iterdir()} == scores
    assert {p.name for p in (run / "last").iterdir()} == {*scores, "state.safetensors"}
    for folder in (run / "last", run / "best"):
        listed = json.loads((folder / "run.json").read_bytes())["files"]
        assert set(listed) == {p.name for p in folder.iterdir()} - {"run.json", "README.md"}
        for file, entry in listed.items():
            content = (folder / file).read_bytes()
            assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_run_json_says_what_the_scores_depend_on(run):
    """Four clips of 12 frames: 2 speak, 1 updates the state, and each is silence for the other head."""
    info = json.loads((run / "last" / "run.json").read_bytes())
    assert TrainConfig.from_json(info["config"]) == CONFIG.on("cpu")
    assert (info["step"], info["neg_rate"]) == (2, 0.5)
    drawn = sum(int((clip(i, "train").labels == 0).all(0).sum()) for i in range(4))
    assert 0 < drawn < 4 * 9
    assert info["labels"] == {
        "speaking": {"positive": 8, "negative": 4 + drawn, "not_sampled": 36 - drawn},
        "dst_update": {"positive": 4, "negative": 8 + drawn, "not_sampled": 36 - drawn},
    }
    assert info["positive_rates"] == pytest.approx([8 / (12 + drawn), 4 / (12 + drawn)])


# ---- with transformers alone -------------------------------------------------------------------------


@pytest.mark.parametrize("which", [SmolVLMForConditionalGeneration, AutoModelForImageTextToText])
def test_transformers_gives_our_text_logits_and_generates(run, pack, which):
    """Its whole forward pass: placeholder tokens, image path, its own attention, LM head on every token."""
    theirs, loading = which.from_pretrained(run / "last", attn_implementation="sdpa", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = as_transformers_takes_it(pack)
    with torch.no_grad():
        found = theirs.eval()(**inputs, use_cache=False).logits[0]
        ours = trainer.load(run).model(pack)
    assert len(ours.text) > 5
    assert torch.allclose(found[pack.lm_index], ours.text, atol=1e-5)
    assert theirs.generate(**inputs, max_new_tokens=2, do_sample=False).shape == (1, pack.num_tokens + 2)


def test_the_bare_model_and_the_heads_file_give_our_decisions(run, pack):
    """What somebody without this project does: AutoModel's hidden states, times the matrices in heads.safetensors."""
    body = AutoModel.from_pretrained(run / "last", attn_implementation="sdpa").eval()
    heads = load_file(run / "last" / "heads.safetensors")
    with torch.no_grad():
        hidden = body(**as_transformers_takes_it(pack), use_cache=False).last_hidden_state[0]
        at_frames = hidden[(pack.input_ids == trainer.load(run).tokens.image).nonzero()[:, 0]]
        found = torch.stack([at_frames @ heads[f"{h}.weight"][0] + heads[f"{h}.bias"] for h in ("speak", "dst")])
        ours = trainer.load(run).model(pack).decisions
    assert found.shape == (2, 12)
    assert torch.allclose(found, ours, atol=1e-5)


def test_the_configuration_is_plain_and_the_tokenizer_has_the_same_ids(run):
    text = (run / "last" / "config.json").read_text()
    config = json.loads(text)
    assert "attn" not in text
    assert (config["architectures"], config["dtype"]) == (["SmolVLMForConditionalGeneration"], "float32")
    theirs, ours = AutoTokenizer.from_pretrained(run / "last"), trainer.load(run).tokens
    assert theirs.encode("What now?", add_special_tokens=False) == ours.encode("What now?")
    assert theirs.convert_tokens_to_ids(["<image>", "<end_of_utterance>"]) == [ours.image, ours.end]
    assert AutoConfig.from_pretrained(run / "last").image_token_id == ours.image


def test_released_ids_and_tied_embeddings_outlive_a_checkpoint(tmp_path):
    tokens = Tokens(smollm2.stand_in_tokenizer())
    config = load_model("tiny", len(tokens)).config
    config.image_token_id, config.text_config.pad_token_id = 49190, 2
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = noisy_heads(ProspectModel(SmolVLMForConditionalGeneration(config), DecisionHeads(128), TrainConfig()))
    save_checkpoint(tmp_path / "last", LoadedRun(model, tokens, TrainConfig(), INFO))
    loaded, pack = trainer.load(tmp_path), toy_pack(tokens)
    with torch.no_grad():
        expected, found = model.eval()(pack), loaded.model(pack)
    assert torch.equal(found.text, expected.text)
    assert torch.equal(found.decisions, expected.decisions)
    assert loaded.model.vlm.lm_head.weight is loaded.model.vlm.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(tmp_path / "last" / "model.safetensors")  # stored once
    assert (loaded.tokens.image, loaded.tokens.end, loaded.tokens.marker["system"]) == (49190, 49279, 49191)
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "last", attn_implementation="sdpa")
    assert (theirs.config.image_token_id, theirs.config.text_config.pad_token_id) == (49190, 2)
    with torch.no_grad():
        logits = theirs(**as_transformers_takes_it(pack), use_cache=False).logits[0, pack.lm_index]
    assert torch.allclose(logits, expected.text, atol=1e-5)


# ---- with trainer.load -------------------------------------------------------------------------------


def test_a_loaded_run_scores_every_frame_with_the_model_s_logit(run, data):
    loaded = trainer.load(str(run))
    scored = list(loaded.score(str(data), "test"))
    assert [s.clip.clip_id for s in scored] == ["test0", "test1"]
    assert all(s.logits.shape == s.labels.shape == (2, 12) and s.logits.dtype == np.float32 for s in scored)
    assert scored[0].labels.tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
    ]
    window = build_windows(scored[0].clip, loaded.tokens, 1, 200)
    with torch.no_grad():
        pack = make_pack(window, PixelFrames(data / "frames-on-disk", 64))
        assert np.allclose(scored[0].logits, loaded.model.cpu()(pack).decisions, atol=1e-5)


def test_a_checkpoint_moves_without_the_model_that_it_came_from(tmp_path):
    tokens, model = tiny()
    model.vlm.save_pretrained(tmp_path / "base")
    tokens.save(tmp_path / "base")
    config = TrainConfig(model=str(tmp_path / "base"))
    save_checkpoint(tmp_path / "a" / "last", LoadedRun(model, tokens, config, INFO))
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "a").rename(tmp_path / "b")
    pack = toy_pack(tokens)
    with torch.no_grad():
        assert torch.equal(trainer.load(tmp_path / "b").model(pack).decisions, model.eval()(pack).decisions)


@pytest.mark.parametrize(
    ("more", "neg_rate", "correction", "in_words"),
    [
        ({}, 0.25, -1.386294, "first add -1.3863 to the logit"),
        ({}, 0.0, -22.180710, "first add -22.1807"),
        ({"reweigh": True}, 0.25, 0.0, "A sigmoid may be read as a probability"),
        ({"balance": "mean"}, 0.25, None, "a sigmoid is no probability until it is calibrated"),
    ],
)
def test_the_logit_correction_is_ln_of_the_rate_unless_the_loss_made_up_for_it(more, neg_rate, correction, in_words):
    run = LoadedRun(None, None, TrainConfig(**more), {**INFO, "neg_rate": neg_rate})
    assert run.logit_correction == (correction if correction is None else pytest.approx(correction, abs=1e-6))
    assert in_words in " ".join(model_card(run).split())


def test_the_card_has_yaml_that_the_hub_reads_and_code_that_runs(run, data, capsys):
    from huggingface_hub import ModelCard

    card = ModelCard.load(run / "last" / "README.md")
    assert card.data.library_name == "transformers"
    assert "Silent frames were sampled at rate 0.5" in card.text
    code = "\n".join(line.strip() for line in card.text.splitlines() if line.startswith("    "))
    assert code.count("\n") == 2
    code = code.replace('"this folder"', repr(str(run))).replace('"labels"', repr(str(data)))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "test0 (2, 12)\ntest1 (2, 12)\n"


# ---- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BODY, "heads.safetensors"])
def test_a_flipped_bit_or_a_missing_file_is_refused_by_name(copy, name):
    path = copy / "last" / name
    content = path.read_bytes()
    for at in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(InputError, match=f"{name}: damaged"):
            trainer.load(copy)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: not found; train again, or get the whole folder"):
        trainer.load(copy)


# ---- adapters ----------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tmp_path) -> tuple[Path, Tokens, ProspectModel]:
    """Rank 4, alpha 8, and adapters that are not 0."""
    pytest.importorskip("peft")
    tokens, model = tiny(lora_rank=4, lora_alpha=8)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    save_checkpoint(tmp_path / "last", LoadedRun(model, tokens, TrainConfig(lora_rank=4, lora_alpha=8), INFO))
    return tmp_path, tokens, model


def test_merged_weights_are_the_base_plus_scaled_b_a(adapted):
    folder, _, model = adapted
    saved, now = load_file(folder / "last" / "model.safetensors"), model.vlm.state_dict()
    bases = [name for name in now if ".base_layer." in name]
    assert len(bases) == 4 * 7
    for name in bases:
        a, b = (now[name.replace("base_layer", f"lora_{x}.default")] for x in "AB")
        expected = now[name] + 8 / 4 * (b @ a)
        assert float((saved.pop(name.replace(".base_layer", "")) - expected).abs().max()) < 1e-6
        assert float((expected - now[name]).abs().max()) > 1e-2
    others = {key for key in now if ".lora_" not in key and ".base_layer." not in key}
    assert set(saved) == others
    assert all(torch.equal(saved[key], now[key]) for key in others)


def test_merged_weights_open_without_peft(adapted, monkeypatch):
    folder, tokens, model = adapted
    pack = toy_pack(tokens)
    with torch.no_grad():
        expected = model.eval()(pack)
    monkeypatch.setitem(sys.modules, "peft", None)  # now `import peft` fails
    theirs = AutoModelForImageTextToText.from_pretrained(folder / "last", attn_implementation="sdpa").eval()
    loaded = trainer.load(folder)
    with torch.no_grad():
        logits = theirs(**as_transformers_takes_it(pack), use_cache=False).logits[0, pack.lm_index]
        found = loaded.model(pack)
    assert torch.allclose(logits, expected.text, atol=1e-4)
    assert torch.allclose(found.decisions, expected.decisions, atol=1e-4)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert loaded.config.lora_rank == 4  # how it was trained
