"""A checkpoint: opened with transformers alone, opened with `trainer.load`, damaged, and with adapters."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames
from safetensors.torch import load_file
from small_run import CONFIG, clip
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

import trainer
from pipeline.errors import InputError
from trainer.checkpoint import LoadedRun, model_card, save_checkpoint
from trainer.config import TrainConfig
from trainer.frame_source import PixelFrames
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import Pack, make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import Tokens

INFO = {"step": 3, "best": -1.0, "neg_rate": 0.25}


def pack_of(tokens: Tokens) -> Pack:
    return make_pack(build_windows(clip(0, "val"), tokens, 1, 200), NoisyFrames())


@pytest.fixture(scope="module")
def pack(whole) -> Pack:
    return pack_of(trainer.load(whole).tokens)


@torch.no_grad()
def scores(run: LoadedRun, pack: Pack):
    return run.model(pack)


@torch.no_grad()
def theirs(folder: Path, pack: Pack, which=AutoModelForImageTextToText):
    """What transformers' own forward pass gives of the pack's frames and tokens, with its own attention."""
    model, loading = which.from_pretrained(folder, attn_implementation="sdpa", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "mismatched_keys"))
    pixels = (pack.frames().float() / 255 - 0.5) / 0.5
    return model.eval()(input_ids=pack.input_ids[None], pixel_values=pixels[None], use_cache=False)


def test_run_json_says_what_the_scores_depend_on(whole):
    """Seven clips of 12 to 14 frames: 2 speak, 1 updates the state, and each is silence for the other head."""
    info = json.loads((whole / "last" / "run.json").read_bytes())
    assert TrainConfig.from_json(info["config"]) == CONFIG.on("cpu")
    assert (info["step"], info["neg_rate"]) == (10, 0.5)
    frames, drawn = 3 * 12 + 2 * 13 + 2 * 14, sum(int((clip(i).labels == 0).all(0).sum()) for i in range(7))
    assert 0 < drawn < frames - 21
    assert info["labels"] == {
        "speaking": {"positive": 14, "negative": 7 + drawn, "not_sampled": frames - 21 - drawn},
        "dst_update": {"positive": 7, "negative": 14 + drawn, "not_sampled": frames - 21 - drawn},
    }
    rate = 14 / (21 + drawn)
    assert f"labels of training: speaking {rate:.4f}, dst_update " in (whole / "last" / "README.md").read_text()


# ---- with transformers alone -------------------------------------------------------------------------


def test_transformers_gives_our_text_logits_and_token_ids(whole, pack):
    run = trainer.load(whole)
    text, tokenizer = scores(run, pack).text, AutoTokenizer.from_pretrained(whole / "last")
    assert len(text) > 5
    assert torch.allclose(theirs(whole / "last", pack).logits[0, pack.lm_index], text, atol=1e-5)
    assert tokenizer.encode("What now?", add_special_tokens=False) == run.tokens.encode("What now?")
    assert tokenizer.convert_tokens_to_ids(["<image>", "<end_of_utterance>"]) == [run.tokens.image, run.tokens.end]


def test_the_bare_model_and_the_heads_file_give_our_decisions(whole, pack):
    """What somebody without this project does: AutoModel's hidden states, times the matrices in heads.safetensors."""
    run, heads = trainer.load(whole), load_file(whole / "last" / "heads.safetensors")
    hidden = theirs(whole / "last", pack, AutoModel).last_hidden_state[0]
    at_frames = hidden[(pack.input_ids == run.tokens.image).nonzero()[:, 0]]
    found = torch.stack([at_frames @ heads[f"{h}.weight"][0] + heads[f"{h}.bias"] for h in ("speak", "dst")])
    assert found.shape == (2, 12)
    assert torch.allclose(found, scores(run, pack).decisions, atol=1e-5)


# ---- with trainer.load -------------------------------------------------------------------------------


def test_a_loaded_run_scores_every_frame_with_the_model_s_logit(whole, data):
    loaded = trainer.load(str(whole))
    scored = list(loaded.score(str(data), "val"))
    assert [s.clip.clip_id for s in scored] == ["val0", "val1", "val2"]
    assert all(s.logits.shape == s.clip.labels.shape and s.logits.dtype == np.float32 for s in scored)
    assert scored[0].clip.labels.tolist() == [[0] * 4 + [1] * 2 + [0] * 6, [0] * 3 + [1] + [0] * 8]
    windows = build_windows(scored[0].clip, loaded.tokens, 1, 200)
    seen = make_pack(windows, PixelFrames(data / "frames-on-disk", 64))
    loaded.model.cpu()
    assert np.allclose(scored[0].logits, scores(loaded, seen).decisions, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "neg_rate", "correction", "in_words"),
    [
        ({}, 0.25, -1.386294, "add -1.3863 to the logit first"),
        ({"reweigh": True}, 0.25, 0.0, "add 0.0000 to the logit first"),
        ({"balance": "mean"}, 0.25, None, "calibrate it on held-out clips"),
    ],
)
def test_the_logit_correction_is_ln_of_the_rate_unless_the_loss_made_up_for_it(more, neg_rate, correction, in_words):
    """TRAPS 22."""
    run = LoadedRun(None, None, TrainConfig(**more), {**INFO, "neg_rate": neg_rate})
    assert run.logit_correction == (correction if correction is None else pytest.approx(correction, abs=1e-6))
    assert in_words in " ".join(model_card(run).split())


def test_the_card_has_yaml_that_the_hub_reads_and_code_that_runs(whole, data, capsys):
    from huggingface_hub import ModelCard

    card = ModelCard.load(whole / "last" / "README.md")
    assert card.data.library_name == "transformers"
    assert "Silent frames were sampled at rate 0.5" in card.text
    code = "\n".join(line.strip() for line in card.text.splitlines() if line.startswith("    "))
    code = code.replace('"this folder"', repr(str(whole))).replace('"labels", "test"', f'"{data}", "val"')
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "val0 (2, 12)\nval1 (2, 13)\nval2 (2, 14)\n"


def test_a_flipped_bit_or_missing_heads_are_refused_by_name(whole, tmp_path):
    """TRAPS 28."""
    shutil.copytree(whole / "last", tmp_path / "last")
    path = tmp_path / "last" / "heads.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"heads\.safetensors: damaged"):
        trainer.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=r"heads\.safetensors: not found; train again, or get the whole folder"):
        trainer.load(tmp_path)
    os.truncate(tmp_path / "last" / "run.json", 100)
    with pytest.raises(InputError, match=r"run\.json: damaged; train again, or get the whole folder"):
        trainer.load(tmp_path)


# ---- adapters ----------------------------------------------------------------------------------------


def test_merged_adapters_are_the_base_plus_scaled_b_a_and_open_without_peft(tokens, tmp_path, monkeypatch):
    """Rank 4, alpha 8, and adapters that are not 0."""
    pytest.importorskip("peft")
    config = TrainConfig(lora_rank=4, lora_alpha=8)
    model = ProspectModel(load_model("tiny", len(tokens)), DecisionHeads(128), config)
    run, pack = LoadedRun(model.eval(), tokens, config, INFO), pack_of(tokens)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or name.startswith("heads"):
            torch.nn.init.normal_(parameter, std=0.1)
    save_checkpoint(tmp_path / "last", run)
    saved, now = load_file(tmp_path / "last" / "model.safetensors"), run.model.vlm.state_dict()
    bases = [name for name in now if ".base_layer." in name]
    assert len(bases) == 4 * 7
    for name in bases:
        a, b = (now[name.replace("base_layer", f"lora_{x}.default")] for x in "AB")
        expected = now[name] + 8 / 4 * (b @ a)
        assert float((saved.pop(name.replace(".base_layer", "")) - expected).abs().max()) < 1e-6
        assert float((expected - now[name]).abs().max()) > 1e-2
    assert saved.keys() == {key for key in now if ".lora_" not in key and ".base_layer." not in key}
    assert all(torch.equal(saved[key], now[key]) for key in saved)

    expected = scores(run, pack)
    monkeypatch.setitem(sys.modules, "peft", None)  # now `import peft` fails
    loaded = trainer.load(tmp_path)
    assert torch.allclose(theirs(tmp_path / "last", pack).logits[0, pack.lm_index], expected.text, atol=1e-4)
    assert torch.allclose(scores(loaded, pack).decisions, expected.decisions, atol=1e-4)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    assert loaded.config.lora_rank == 4  # how it was trained
