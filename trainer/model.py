"""SmolVLM with two decision heads, and the three ways to get one: tiny, a folder, a name on the hub.

Frames go through the vision tower and the connector directly, in float32: the model's own image path
drops frames that are exactly zero after normalisation and resamples video. Then
`text_model(inputs_embeds=...)`: the same call in transformers 5.17 and 5.23. The language-model head runs
on supervised text rows only, which at a vocabulary of 49k makes its loss nearly free (a prototype at 256M took a
third less memory and a quarter less time per step than on all rows).

    B windows    L tokens    N frames    H hidden    k tokens per frame    S side in pixels
    T text rows    V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.utils import logging as transformers_logging

from trainer.batch import Batch
from trainer.errors import TrainerError

transformers_logging.disable_progress_bar()  # stderr is the caller's

VISION_CHUNK = 64  # frames per pass of the vision tower


class Scores(NamedTuple):
    decisions: Tensor  # float [2, N] logits of speaking and DST update
    text: Tensor  # float [T, V] logits of the token after each of Batch.lm_index


class DecisionHeads(nn.Module):
    """Two linear readouts of a frame's last token. A logit above 0 says: the event happens at this frame."""

    def __init__(self, hidden: int, rates: Sequence[float] = (0.5, 0.5)) -> None:
        """`rates`: how often each head's label is 1; biases start there, so the first loss is the entropy."""
        super().__init__()
        self.speak = nn.Linear(hidden, 1)
        self.dst = nn.Linear(hidden, 1)
        for head, rate in zip((self.speak, self.dst), rates, strict=True):
            rate = min(max(rate, 1e-4), 1 - 1e-4)
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, math.log(rate / (1 - rate)))

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [2, N]."""
        return torch.cat([self.speak(hidden), self.dst(hidden)], dim=-1).mT


class ProspectModel(nn.Module):
    """A SmolVLM and its heads; `tokens_per_frame` k is pooled from the connector's (64 or 81; tiny has 1)."""

    def __init__(
        self,
        vlm: SmolVLMForConditionalGeneration,
        heads: DecisionHeads,
        tokens_per_frame: int = 1,
        freeze_vision: bool = False,
    ) -> None:
        super().__init__()
        self.vlm, self.heads, self.tokens_per_frame = vlm, heads, tokens_per_frame
        self.freeze_vision = freeze_vision
        self._check_geometry()
        for part in (vlm.model.vision_model, vlm.model.connector):
            part.requires_grad_(not freeze_vision)

    @property
    def side(self) -> int:
        """S: side of the square frames it takes, in pixels."""
        return int(self.vlm.config.vision_config.image_size)

    @property
    def hidden(self) -> int:
        return int(self.vlm.config.text_config.hidden_size)

    def forward(self, batch: Batch) -> Scores:
        hidden = self.hidden_states(batch).flatten(0, 1)  # [B*L, H]
        text = self.vlm.lm_head(hidden[batch.lm_index])
        return Scores(self.heads(hidden[batch.decision_index]), text)

    def hidden_states(self, batch: Batch) -> Tensor:
        """[B, L, H] after the last layer; what padding holds there means nothing."""
        text_model = self.vlm.model.text_model
        embedded = text_model.embed_tokens(batch.input_ids)  # [B, L, H]
        features = self.frame_features(batch.pixels()).to(embedded.dtype)  # [N, k, H]
        flat = embedded.flatten(0, 1).index_copy(0, batch.frame_index.flatten(), features.flatten(0, 1))
        out = text_model(inputs_embeds=flat.view_as(embedded), use_cache=False)
        return out.last_hidden_state

    def frame_features(self, pixels: Tensor) -> Tensor:
        """float32 [N, k, H] of uint8 RGB pixels [N, 3, S, S]."""
        assert pixels.shape[1:] == (3, self.side, self.side), f"frames {tuple(pixels.shape)}, side {self.side}"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_vision):
            features = torch.cat([self._features(chunk) for chunk in pixels.split(VISION_CHUNK)])
        assert features.shape == (len(pixels), self.tokens_per_frame, self.hidden)
        return features

    def _features(self, pixels: Tensor) -> Tensor:
        normalised = (pixels.float() / 255 - 0.5) / 0.5
        seen = self.vlm.model.vision_model(pixel_values=normalised).last_hidden_state
        features = self.vlm.model.connector(seen)  # [n, side*side, H]
        side, k = math.isqrt(features.shape[1]), math.isqrt(self.tokens_per_frame)
        grid = features.mT.unflatten(2, (side, side))  # [n, H, side, side]
        return F.adaptive_avg_pool2d(grid, k).flatten(2).mT

    def _check_geometry(self) -> None:
        vision, scale = self.vlm.config.vision_config, self.vlm.config.scale_factor
        grid = vision.image_size // vision.patch_size
        assert grid % scale == 0, f"grid of {grid} patches, scale factor {scale}"
        given = (grid // scale) ** 2
        if self.tokens_per_frame > given:
            raise TrainerError(
                f"tokens_per_frame is {self.tokens_per_frame}, but this model has {given} per frame; "
                f"lower --tokens-per-frame"
            )


def load_model(name: str, vocabulary: int, seed: int = 0) -> SmolVLMForConditionalGeneration:
    """A SmolVLM in float32: 'tiny' (random weights from `seed`), a folder or a hub name (pretrained weights).

    Raises TrainerError where the name can't be loaded or has fewer embeddings than the `vocabulary` needs.
    """
    if name == "tiny":
        torch.manual_seed(seed)
        return SmolVLMForConditionalGeneration(tiny_config(vocabulary))
    try:
        config = AutoConfig.from_pretrained(name)  # first: without one, the library builds the full-size model
        if not isinstance(config, SmolVLMConfig):
            raise ValueError(f"a {config.model_type}, not a smolvlm")
        vlm, loading = SmolVLMForConditionalGeneration.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainerError(f"{name}: no SmolVLM could be loaded ({reason}); give a folder, or tiny") from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise TrainerError(f"{name}: {len(missing)} weights missing, {missing[0]} first; get the model again")
    if vlm.get_input_embeddings().num_embeddings < vocabulary:
        raise TrainerError(f"{name}: fewer embeddings than its tokenizer's {vocabulary} tokens; get it again")
    return vlm


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tiny_config(vocabulary: int) -> SmolVLMConfig:
    """About 1.1M parameters. The connector itself yields one token per 64x64 frame, with its layout kept.

    Weights start at 1/sqrt(hidden), as SmolVLM's do; the library's 0.02 learns poorly at this width.
    """
    text: dict[str, Any] = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 8192, "initializer_range": 128**-0.5, "rms_norm_eps": 1e-5,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": 64, "patch_size": 16, "initializer_range": 64**-0.5,
    }  # fmt: skip
    return SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=4, image_token_id=0, tie_word_embeddings=False
    )
