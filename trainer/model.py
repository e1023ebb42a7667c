"""SmolVLM with two decision heads, and the three ways to get one: random weights, a folder, a name on the hub.

Frames become features (features.py), then `text_model(inputs_embeds=...)` reads a whole pack. The language-model
head runs on supervised text rows only (a third less memory and a quarter less time per step at 256M than on all rows),
and on decision rows where the arm decides by it (`lm-eos`, `token`).

    L tokens of a pack    N frames    H hidden    k tokens per frame    S side in pixels    T text rows    V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.utils import logging as transformers_logging

from pipeline.errors import InputError
from trainer import body_graph
from trainer.arms import find_arm
from trainer.attention import refuse_mask, use_packed
from trainer.config import TrainConfig
from trainer.features import feature_width, frame_side, most_tokens, run_connector, run_tower
from trainer.hub import loading, model_folder
from trainer.packing import Pack

transformers_logging.disable_progress_bar()  # stderr is the caller's
GREY = 128  # of each colour, 0 to 255: what an arm without images sees
RANDOM = {  # config.RANDOM_MODELS: hidden, layers, scale
    "tiny": (128, 4, 4),  # 1.1M parameters, frames of 64 x 64 pixels
    "nano": (64, 2, 2),  # 0.25M, 32 x 32, a quarter of tiny's cost: for studies of a hundred runs
}


class Scores(NamedTuple):
    decisions: Tensor  # float [2 or 3, N], see `ProspectModel.decisions`
    text: Tensor  # float [T, V] logits of the token after each of Pack.lm_index


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
        """float32 [2, N] of [N, H]: in full precision also under autocast, so that no two scores tie by rounding."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.float()
            return torch.cat([self.speak(hidden), self.dst(hidden)], dim=-1).mT.contiguous()


class RMSNorm(LlamaRMSNorm):
    """On a GPU under autocast in one kernel, and in bfloat16, to which each linear layer after it would cast it."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not (hidden.is_cuda and torch.is_autocast_enabled("cuda")):
            return super().forward(hidden)
        exact = F.rms_norm(hidden.float(), self.weight.shape, self.weight, self.variance_epsilon)
        return exact.to(torch.bfloat16)


class ProspectModel(nn.Module):
    """A SmolVLM and its heads. `choices`: `Tokens.choices`, by which the arms lm-eos and token decide."""

    def __init__(
        self,
        vlm: SmolVLMForConditionalGeneration,
        heads: DecisionHeads,
        config: TrainConfig,
        choices: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.vlm, self.heads, self.choices = vlm, heads, choices
        self.arm, self.tokens_per_frame, self._bf16 = find_arm(config.arm), config.tokens_per_frame, config.bf16
        self.side, self.hidden = frame_side(vlm), int(vlm.config.text_config.hidden_size)  # S, H
        if (k := config.tokens_per_frame) > (most := most_tokens(vlm)):
            raise InputError(f"tokens_per_frame is {k}, but this model has {most} per frame; lower --tokens-per-frame")
        exact_float32()
        use_packed(vlm)
        self.body.register_forward_pre_hook(refuse_mask, with_kwargs=True)
        if config.lora_rank:
            _add_adapters(self.body, config)
        for name, parameter in self.named_parameters():
            part = part_of(name)
            adapts = not config.lora_rank or part != "text" or ".lora_" in name
            parameter.requires_grad_(part not in config.freeze and adapts)
        self._vision_learns = "vision" not in config.freeze
        if config.checkpointing:
            enable = getattr(vlm, "activation_checkpointing_enable", vlm.gradient_checkpointing_enable)  # 5.17: the old
            enable({"use_reentrant": False})
        for layer in self.body.layers:
            layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = RMSNorm
        self._graph = body_graph.BodyGraph(self.body, config)
        if config.compile:
            for layer in self.body.layers:
                layer.compile(dynamic=True)

    @property
    def body(self) -> Any:
        """The text model: embeddings, layers, norm."""
        return self.vlm.model.text_model

    @property
    def device(self) -> torch.device:
        return next(self.heads.parameters()).device

    @property
    def bf16(self) -> bool:
        return self.device.type == "cuda" if self._bf16 is None else self._bf16

    def forward(self, pack: Pack) -> Scores:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden = self._hidden_states(pack)
            text = self.vlm.lm_head(hidden.index_select(0, pack.lm_index))
            return Scores(self.decisions(hidden.index_select(0, pack.frame_index[:, -1])), text)

    def decisions(self, hidden: Tensor) -> Tensor:
        """float32 [2, N] of [N, H] at decision tokens: logits that say *speak* and *DST update*, whatever the arm.

        lm-eos: the log-odds of any next token but silence's. token: of the softmax over the three `choices`, the
        log-odds of speech and of update; for the loss alone a third row says *not silence*.
        """
        logits = self.heads(hidden)
        if self.arm.decides == "direct":
            return logits
        if self.arm.decides == "inverted":
            return torch.stack([-logits[0], logits[1]])
        with torch.autocast(hidden.device.type, enabled=False):  # as the heads: no two scores tie by rounding
            if self.arm.decides == "lm-eos":
                following = self.vlm.lm_head(hidden.float()).float()  # [N, V]
                others = following.clone()
                others[:, self.choices[0]] = -torch.inf
                speaks = others.logsumexp(-1) - following[:, self.choices[0]]
                return torch.stack([speaks + 0 * logits[0], logits[1]])  # 0: each weight has a gradient on each rank
            rows = torch.stack([self.vlm.lm_head.weight[token] for token in self.choices])  # [3, H]
            silence, speech, update = F.linear(hidden.float(), rows.float()).unbind(-1)
            odds = [speech - torch.logaddexp(silence, update), update - torch.logaddexp(silence, speech)]
            return torch.stack([*odds, torch.logaddexp(speech, update) - silence]) + 0 * logits.sum(0)

    def _hidden_states(self, pack: Pack) -> Tensor:
        """[L, H] after the last layer and norm."""
        embedded = self.body.embed_tokens(pack.input_ids)  # [L, H]
        features = self.frame_features(pack.frames()).to(embedded.dtype)  # [N, k, H]
        filled = embedded.index_copy(0, pack.frame_index.flatten(), features.flatten(0, 1))
        learns = self.training and torch.is_grad_enabled() and self.bf16 and self.device.type in body_graph.GRAPHED
        if learns and not (self._graph.off or torch.distributed.is_initialized()):
            return self._graph(filled, pack)
        out = self.body(
            inputs_embeds=filled[None], position_ids=pack.position_ids[None], use_cache=False,
            seg_lens=pack.seg_lens, seg_ends=pack.seg_ends, longest=pack.longest,
        )  # fmt: skip
        return out.last_hidden_state[0]

    def frame_features(self, frames: Tensor) -> Tensor:
        """[N, k, H] of pixels uint8 [N, 3, S, S], or of what `encode` kept: [N, k, D], or already [N, k, H]."""
        count = len(frames)
        if not self.arm.images:  # each frame is GREY, and goes through the tower once
            frames = torch.full((1, 3, self.side, self.side), GREY, dtype=torch.uint8, device=frames.device)
        if frames.dtype == torch.uint8:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_learns):
                frames = run_tower(self.vlm, frames, self.tokens_per_frame)
        projected = frames.shape[-1] != feature_width(self.vlm)  # `encode` keeps nothing else of another width
        features = frames.float() if projected else run_connector(self.vlm, frames.float())
        return features if self.arm.images else features.expand(count, -1, -1)


def exact_float32() -> None:
    """Make float32 mean float32 on a GPU, not TF32; no cuDNN attention, which plans anew for each shape."""
    torch.backends.cudnn.allow_tf32 = False  # the old switch as well: torch raises where the two disagree
    backends: Any = torch.backends
    for part in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul):
        part.fp32_precision = "ieee"
    torch.backends.cuda.enable_cudnn_sdp(False)


def part_of(name: str) -> str:
    """Which of config.PARTS a parameter of ProspectModel belongs to."""
    starts = {"vlm.model.vision_model.": "vision", "vlm.model.connector.": "connector", "heads.": "heads"}
    return next((part for start, part in starts.items() if name.startswith(start)), "text")


def _add_adapters(body: nn.Module, config: TrainConfig) -> None:
    """LoRA on every linear layer of the text body; the base weights keep their values."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("lora_rank needs peft, which is not installed; pip install 'prospect-dst[lora]'") from None
    torch.manual_seed(config.seed)
    targets = sorted({name.rsplit(".", 1)[-1] for name, m in body.named_modules() if isinstance(m, nn.Linear)})
    inject_adapter_in_model(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets), body)


def merge_adapters(vlm: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The SmolVLM's state dict `state` without LoRA adapters: each is added into the weight that it adapts."""
    deltas = {
        f"{name}.base_layer.weight": module.get_delta_weight("default")
        for name, module in vlm.named_modules()
        if hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")
    }
    return {
        name.replace(".base_layer.", "."): value + deltas[name].to(value) if name in deltas else value
        for name, value in state.items()
        if ".lora_" not in name
    }


def load_model(name: str, vocabulary: int, seed: int = 0) -> SmolVLMForConditionalGeneration:
    """A SmolVLM in float32: 'tiny' or 'nano' (for a `vocabulary`, random weights from `seed`), or the weights of a
    folder, a run or a hub name; InputError where it can't be loaded."""
    exact_float32()
    if name in RANDOM:
        torch.manual_seed(seed)
        return SmolVLMForConditionalGeneration(tiny_config(vocabulary, *RANDOM[name]))
    name = model_folder(name)
    with loading(name, "SmolVLM") as where:
        config = AutoConfig.from_pretrained(name, **where)  # first: without, the library builds the full-size model
        if config.model_type == "idefics3":  # SmolVLM 1: the same architecture, its weights have the same names
            values = config.to_dict() | {"model_type": "smolvlm"}
            values["vision_config"] |= {"model_type": "smolvlm_vision"}
            config = SmolVLMConfig.from_dict(values)
        if not isinstance(config, SmolVLMConfig):
            raise ValueError(f"a {config.model_type}, expected a smolvlm or an idefics3")
        vlm, info = SmolVLMForConditionalGeneration.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **where
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name}: {len(missing)} weights missing, {missing[0]} first; get the model again")
    return vlm


def tiny_config(vocabulary: int, hidden: int = 128, layers: int = 4, scale: int = 4) -> SmolVLMConfig:
    """SmolVLM's layout at width `hidden`; its connector makes one token of a frame of 16 x scale pixels."""
    # weights start at 1/sqrt(hidden), as SmolVLM's do; the library's 0.02 learns poorly at this width
    text: dict[str, Any] = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 32, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 8192, "initializer_range": hidden**-0.5, "rms_norm_eps": 1e-5,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
        "image_size": 16 * scale, "patch_size": 16, "initializer_range": 64**-0.5,
    }  # fmt: skip
    return SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=scale, image_token_id=0, tie_word_embeddings=False
    )
