"""A single live session as CUDA graphs: a frame or a written token costs one launch instead of 1,500.

A graph replays the same kernels on the same addresses, so what changes lies in buffers on the device: token ids, frame
features, position, and the KV cache at full length under a mask. Each pass is padded to W tokens, which lie past the
session's end, and attends over all T: a single stream waits for launches and weights, not for arithmetic. On a CPU,
where it is tested, the same code runs without the graph.

    W tokens of a pass    T tokens of a slot    H hidden    G heads that share keys and values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer.body_graph import Step, record
from trainer.live.kv_cache import AttentionPlan, BatchedRows, KVCache, download
from trainer.model import ProspectModel

WIDTH = 16  # W, or more where a frame has as many tokens
BESIDE = 8  # tokens that fit beside a frame: the end of a text, a short user text


class StaticPass:
    """Reads at most `width` tokens in slot 0. The weights are those at construction. For use within `streaming`."""

    def __init__(self, model: ProspectModel, cache: KVCache, token_bias: Tensor) -> None:
        """`token_bias`: float [V], added to the LM head's logits of the token to write."""
        body, device = model.body, model.device
        self._model, self._token_bias, self._group = model, token_bias, cache.heads_per_kv
        self.width = max(WIDTH, model.tokens_per_frame + BESIDE)
        self._slabs = cache.reserve(self.width)
        self._weights = _linear_weights_in_bfloat16(body) if model.bf16 else {}
        host = torch.zeros(self.width + 2, dtype=torch.int64)
        self._host = host.pin_memory() if device.type == "cuda" else host
        self._inputs = self._host.to(device)  # ids, -1 for a frame's token; cached tokens; place of the last new one
        self._features = torch.zeros(self.width, model.hidden, dtype=body.embed_tokens.weight.dtype, device=device)
        self._places = torch.arange(self._slabs[0][0].shape[2], device=device)  # [T]
        self._slot = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._graph = _Graph()

    def read(self, parts: Sequence[Sequence[int] | Tensor], prefix: int) -> tuple[npt.NDArray[np.float32], int] | None:
        """(decision logits at each token [W, 2], likeliest id after the last); None where no graph can be made."""
        if self._graph.failed:
            return None
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Tensor):
                self._features[len(ids) : len(ids) + len(part)].copy_(part)
                ids += [-1] * len(part)
            else:
                ids += part
        padding = [0] * (self.width - len(ids))
        self._host.copy_(torch.tensor([*ids, *padding, prefix, len(ids) - 1]))
        self._inputs.copy_(self._host, non_blocking=True)  # the host waits for each result before it writes again
        result = self._step() if self._inputs.device.type == "cpu" else self._graph.run(self._step)
        if result is None:
            return None
        logits_and_id = download(result)
        return logits_and_id[:-1].reshape(2, self.width).T, int(logits_and_id[-1])

    def _step(self) -> Tensor:
        """float32 [2 * W + 1]: decision logits, likeliest id. Nothing here may wait for the device."""
        model, width = self._model, self.width
        ids, prefix, last = self._inputs.split([width, 1, 1])
        positions = prefix + self._places[:width]
        hidden = (self._places > positions[:, None]).repeat(self._group, 1)[None, None]  # [1, 1, G * W, T]
        mask = torch.zeros_like(hidden, dtype=self._slabs[0][0].dtype).masked_fill(hidden, -torch.inf)
        rows = BatchedRows(slice(0, 1), self._slot, positions[None], None, None, len(self._places), mask)
        plan = AttentionPlan(self._slabs, positions, (), rows)
        # without autocast's cache, whose copies of weights would be freed before the graph is
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=model.bf16, cache_enabled=False):
            text = model.body.embed_tokens(ids.clamp(min=0))  # [W, H]
            embedded = torch.where((ids < 0)[:, None], self._features, text)
            inputs = {"inputs_embeds": embedded[None], "position_ids": positions[None], "use_cache": False}
            out = functional_call(model.body, self._weights, (), {**inputs, "plan": plan}, tie_weights=False)
            states = out.last_hidden_state[0]  # [W, H]
            likeliest = (model.vlm.lm_head(states.index_select(0, last)) + self._token_bias).argmax(-1)
            return torch.cat([model.decisions(states)[:2].flatten(), likeliest.float()])  # ids are below 2**24


class StaticVision:
    """Features of one live frame after the other, all of one shape. For use within `streaming`."""

    def __init__(self, model: ProspectModel) -> None:
        self._model, self._graph, self._frame = model, _Graph(), torch.empty(0)

    def __call__(self, frame: npt.NDArray[Any]) -> Tensor:
        """[k, H] of one frame as ProspectModel.frame_features takes it, without the first dimension."""
        pixels = torch.from_numpy(frame)[None]
        if self._model.device.type == "cpu":
            return self._model.frame_features(pixels)[0]
        if self._frame.shape != pixels.shape:
            self._frame, self._graph = pixels.to(self._model.device), _Graph()
        self._frame.copy_(pixels.pin_memory(), non_blocking=True)
        features = self._graph.run(self._step)
        return self._step() if features is None else features.clone()  # the next frame's will stand there

    def _step(self) -> Tensor:
        with torch.autocast(self._frame.device.type, torch.bfloat16, enabled=self._model.bf16, cache_enabled=False):
            return self._model.frame_features(self._frame)[0]


class _Graph:
    """A CUDA graph of a step that reads and writes the same tensors in every call."""

    def __init__(self) -> None:
        self.failed = False
        self._replay: list[Step] = []
        self._result = torch.empty(0)

    def run(self, step: Callable[[], Tensor]) -> Tensor | None:
        """The step's result, in the same memory in every call; None where no graph can be made."""

        def keep() -> None:
            self._result = step()

        if not self._replay and not self.failed:
            self._replay = record([keep]) or []
            self.failed = not self._replay
        if self.failed:
            return None
        self._replay[0]()
        return self._result


def _linear_weights_in_bfloat16(body: nn.Module) -> dict[str, Tensor]:
    """Linear layers' weights as autocast would make them, once instead of in every pass."""
    layers = ((name, module) for name, module in body.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight": layer.weight.detach().bfloat16() for name, layer in layers}
