"""SmolVLM as released, without its weights: sizes, leftovers of its config.json, and its token layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

LANGUAGE_MODEL = 49152  # tokens of SmolLM2; SmolVLM's own come after
SPECIAL = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    *(f"<|reserved_special_token_{i}|>" for i in range(88)),
    "<end_of_utterance>",
)  # 49152 .. 49279, in the released order

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


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """SmolVLM's 49,280 ids without SmolLM2's merges: bytes, filler, and the special tokens where they belong."""
    vocabulary = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary += [f"<unused {i}>" for i in range(LANGUAGE_MODEL - len(vocabulary))]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
