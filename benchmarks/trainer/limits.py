"""How much of the card is used: model FLOP/s of our training step and of the vision tower against its matmul rate.

The ceiling is measured, not taken from a data sheet: bf16 `torch.matmul` of N x N, the best of several rounds
(N = 8192 on a GPU, 128 on a CPU, where this only shows that the code runs). Counted are the multiply-adds that the
model asks for, 2 FLOP each; recomputation, casts, the optimizer and softmax are work too, but not counted:

    step     6 x (weights of the text body's linear layers) x tokens          forward 2, backward 4
           + 6 x layers x (heads x head width) x sum of length^2              causal: half of the square
           + 6 x V x H x supervised text rows + 4 x D x H x frames            the connector's input needs no gradient
    encode   2 x (weights of the tower's layers) x patches + 4 x layers x H_v x patches^2, per frame

    V vocabulary    H hidden    H_v that of the tower    D width of a cached feature
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from shared import Case, build, model_config, windows_of
from torch import nn
from transformers import SmolVLMForConditionalGeneration

from trainer.features import feature_width, frame_side, run_tower
from trainer.sequence import Window

ROUNDS = 5


def of_step(case: Case) -> dict[str, float]:
    """FLOP of all measured steps of a case, and the ceiling."""
    with torch.device("meta"):
        vlm = SmolVLMForConditionalGeneration(model_config(case.size, case.vocabulary))
    windows = windows_of(case, grouped=False)[case.clips :]
    return {"flop": step_flop(vlm, windows), "ceiling": matmul_rate(case.device)}


def encode(case: Case, clock: Any) -> dict[str, float]:
    """Frames/s and FLOP/s of the frozen tower under bf16 autocast, and the ceiling."""
    vlm, _ = build(case)
    vlm.eval()
    number = 64 * case.steps if case.device == "cuda" else 2 * case.steps
    side = frame_side(vlm)
    pixels = torch.randint(0, 256, (number, 3, side, side), dtype=torch.uint8, device=case.device)
    clock.base()
    with torch.inference_mode(), torch.autocast(case.device, torch.bfloat16):
        run_tower(vlm, pixels[:64], 1)
        clock.start()
        run_tower(vlm, pixels, 1)
        clock.stop()
    return clock.found | {"frames": number, "flop": number * look_flop(vlm), "ceiling": matmul_rate(case.device)}


def step_flop(vlm: Any, windows: Sequence[Window]) -> float:
    body, text = vlm.model.text_model, vlm.config.text_config
    lengths = [len(w.input_ids) for w in windows]
    attention = text.num_hidden_layers * text.num_attention_heads * text.head_dim * sum(n * n for n in lengths)
    rows = sum(len(w.lm_positions) for w in windows)
    frames = sum(len(w.frame_positions) for w in windows)
    hidden = text.hidden_size
    head, connector = text.vocab_size * hidden * rows, feature_width(vlm) * hidden * frames
    return 6.0 * (linear_weights(body.layers) * sum(lengths) + attention + head) + 4.0 * connector


def look_flop(vlm: Any) -> float:
    """Of one frame."""
    tower, sizes = vlm.model.vision_model, vlm.config.vision_config
    patches = (sizes.image_size // sizes.patch_size) ** 2
    weights = linear_weights(tower) + tower.embeddings.patch_embedding.weight.numel()
    return 2.0 * weights * patches + 4.0 * sizes.num_hidden_layers * sizes.hidden_size * patches**2


def linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def matmul_rate(device: str) -> float:
    """FLOP/s of a bf16 matrix product: the best of ROUNDS."""
    n, repeats = (8192, 20) if device == "cuda" else (128, 3)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return max(_timed_matmul(a, b, repeats) for _ in range(ROUNDS))


def _timed_matmul(a: torch.Tensor, b: torch.Tensor, repeats: int) -> float:
    a @ b
    wait = torch.cuda.synchronize if a.is_cuda else lambda: None
    wait()
    began = time.monotonic()
    for _ in range(repeats):
        a @ b
    wait()
    return 2.0 * len(a) ** 3 * repeats / (time.monotonic() - began)
