"""SmolVLM's vision tower: frames -> k feature vectors each, in two halves that may run on different days.

    look     pixels -> tower -> pixel shuffle -> pooled to k        frozen: run once by `encode`, kept on disk
    project  features -> the connector's one linear layer           cheap: run in every step, may be trained

The connector has no bias and no activation, so pooling before it gives the same numbers as after it (to float
rounding) at 1/64 of its cost for k = 1, and what is cached still lets the connector learn. The price is size:
D is 12,288 values a token at 256M (24 KB in float16) where the connector's output has 576.
The tower's parts are called directly: the model's own image path drops frames that are exactly zero after
normalisation, waits for the GPU to look whether patches are masked, and in bfloat16 transformers 5.17 gives them wrong
positions. Here every patch of a square frame is there, and its position is its number.

    N frames    S side in pixels    k tokens per frame    D = vision width x scale factor^2    H hidden
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import SmolVLMForConditionalGeneration

VISION_CHUNK = 64  # frames per pass of the vision tower


def side(vlm: SmolVLMForConditionalGeneration) -> int:
    """S: side of the square frames it takes, in pixels."""
    return int(vlm.config.vision_config.image_size)


def width(vlm: SmolVLMForConditionalGeneration, layer: str = "vision") -> int:
    """D: length of one feature vector; H after the layer "connector"."""
    if layer == "connector":
        return int(vlm.config.text_config.hidden_size)
    return int(vlm.config.vision_config.hidden_size) * int(vlm.config.scale_factor) ** 2


def look(vlm: SmolVLMForConditionalGeneration, pixels: Tensor, k: int, chunk: int = VISION_CHUNK) -> Tensor:
    """float [N, k, D] of RGB pixels 0..255 [N, 3, S, S], `chunk` frames at a time."""
    assert pixels.shape[1:] == (3, side(vlm), side(vlm)), f"frames {tuple(pixels.shape)}, side {side(vlm)}"
    return torch.cat([_look(vlm, part, k) for part in pixels.split(chunk)])


def _look(vlm: SmolVLMForConditionalGeneration, pixels: Tensor, k: int) -> Tensor:
    normalised = (pixels.float() / 255 - 0.5) / 0.5
    tower = vlm.model.vision_model
    # [N, P, H_v], contiguous: strided additions and copies of all layers took 20 of 63 ms on an H100 (64 frames)
    patches = tower.embeddings.patch_embedding(normalised).flatten(2).mT.contiguous()
    positions = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)
    placed = patches + tower.embeddings.position_embedding(positions)
    hidden = tower.post_layernorm(tower.encoder(inputs_embeds=placed, attention_mask=None).last_hidden_state)
    return pool(vlm.model.connector.pixel_shuffle(hidden, vlm.config.scale_factor), k)


def project(vlm: SmolVLMForConditionalGeneration, features: Tensor) -> Tensor:
    """[N, k, H] of `look`'s features [N, k, D]."""
    return vlm.model.connector.modality_projection(features)


def pool(features: Tensor, k: int) -> Tensor:
    """[N, n, D] -> [N, k, D]: the n vectors, row by row of a square grid, averaged down to k."""
    old, new = math.isqrt(features.shape[1]), math.isqrt(k)
    grid = features.mT.unflatten(2, (old, old))  # [N, D, old, old]
    return F.adaptive_avg_pool2d(grid, new).flatten(2).mT


def most_tokens(vlm: SmolVLMForConditionalGeneration) -> int:
    """Tokens a frame has before pooling: 64 or 81 for the released models, 1 for tiny."""
    vision, scale = vlm.config.vision_config, vlm.config.scale_factor
    return int(vision.image_size // vision.patch_size // scale) ** 2


def fingerprint(vlm: SmolVLMForConditionalGeneration, layer: str = "vision") -> str:
    """16 hex digits of a SHA-256 over the tower's weights, and for the layer "connector" the connector's."""
    digest = hashlib.sha256()
    parts = [vlm.model.vision_model, *([vlm.model.connector] if layer == "connector" else [])]
    for name, value in (item for part in parts for item in sorted(part.state_dict().items())):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
