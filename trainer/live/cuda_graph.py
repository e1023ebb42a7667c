"""A single stream as CUDA graphs: a frame or a written token costs one launch instead of 1,500.

A graph replays the same kernels on the same addresses, so everything that changes from pass to pass lies in buffers on
the device: the token ids, the frames' features, the position, and keys and values in slabs of full length, of which a
mask hides what is not read yet. Each pass is padded to W tokens and attends over the whole slab: more arithmetic than
the engine does otherwise, which one stream on a GPU does not notice, as it waits for launches and weights. What
the padding writes lies past the context's end and is overwritten before it is seen.

The same code runs without the graph on a CPU, where it is tested.

    W tokens of a pass    T tokens of a slab    H hidden    G heads that share keys and values
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call

from trainer.live.kv_cache import Cache, FixedReading, download
from trainer.model import ProspectModel

WIDTH = 16  # W, or more where a frame has as many tokens
BESIDE = 8  # tokens that fit beside a frame: the end of a text, a short line of the user


class FixedPass:
    """Reads up to `width` tokens on in slot 0 of the cache, whose slabs it takes at full length.

    The weights are those at the time of construction. To be used within `streaming`.
    """

    def __init__(self, model: ProspectModel, cache: Cache, unwritten: Tensor) -> None:
        """`unwritten`: float [V], added to the LM head's logits of the token to be written."""
        body, device = model.body, model.device
        self._model, self._unwritten, self._capacity, self._shared = model, unwritten, cache.capacity, cache.shared
        self.width = max(WIDTH, model.tokens_per_frame + BESIDE)
        self._slabs = cache.reserve(self.width)
        self._weights = _in_bfloat16(body) if model.bf16 else {}
        host = torch.zeros(self.width + 2, dtype=torch.int64)
        self._host = host.pin_memory() if device.type == "cuda" else host
        self._given = self._host.to(device)  # ids, -1 for a frame's token; tokens read before; number of the last new
        self._features = torch.zeros(self.width, model.hidden, dtype=body.embed_tokens.weight.dtype, device=device)
        self._places = torch.arange(self._slabs[0][0].shape[2], device=device)  # [T]
        self._graph = _Graph()

    @property
    def works(self) -> bool:
        """False where no graph could be made; the caller reads otherwise."""
        return not self._graph.failed

    def read(self, parts: Sequence[Sequence[int] | Tensor], after: int) -> tuple[npt.NDArray[np.float32], int] | None:
        """(decision logits at each token [2, W], id of the likeliest token to be written after the last).

        None where no graph can be made. Raises ValueError where the context has no room.
        """
        ids: list[int] = []
        for part in parts:
            if isinstance(part, Tensor):
                self._features[len(ids) : len(ids) + len(part)].copy_(part)
                ids += [-1] * len(part)
            else:
                ids += part
        if after + len(ids) > self._capacity:
            raise ValueError(f"{after + len(ids)} tokens in a context of at most {self._capacity}")
        padding = [0] * (self.width - len(ids))
        self._host.copy_(torch.tensor([*ids, *padding, after, len(ids) - 1]))
        self._given.copy_(self._host, non_blocking=True)  # the host waits for each pass's result, so it may write again
        found = self._step() if self._given.device.type == "cpu" else self._graph.run(self._step)
        if found is None:
            return None
        logits_and_id = download(found)
        return logits_and_id[:-1].reshape(2, self.width), int(logits_and_id[-1])

    def _step(self) -> Tensor:
        """float32 [2 * W + 1]: decision logits, likeliest id. Nothing here may wait for the device."""
        model, width = self._model, self.width
        ids, after, last = self._given.split([width, 1, 1])
        positions = after + self._places[:width]
        unseen = (self._places > positions[:, None]).repeat(self._shared, 1)[None, None]  # [1, 1, G * W, T]
        mask = torch.zeros_like(unseen, dtype=self._slabs[0][0].dtype).masked_fill(unseen, -torch.inf)
        reading = FixedReading(self._slabs, positions, mask)
        # without autocast's cache, whose copies of weights would be freed before the graph is
        with torch.autocast(positions.device.type, torch.bfloat16, enabled=model.bf16, cache_enabled=False):
            text = model.body.embed_tokens(ids.clamp(min=0))  # [W, H]
            embedded = torch.where((ids < 0)[:, None], self._features, text)
            given = {"inputs_embeds": embedded[None], "position_ids": positions[None], "use_cache": False}
            out = functional_call(model.body, self._weights, (), {**given, "reading": reading}, tie_weights=False)
            states = out.last_hidden_state[0]  # [W, H]
            likeliest = (model.vlm.lm_head(states.index_select(0, last)) + self._unwritten).argmax(-1)
            return torch.cat([model.decisions(states).flatten(), likeliest.float()])  # ids are below 2**24


class FixedLook:
    """Features of one live frame after the other, all of one shape. To be used within `streaming`."""

    def __init__(self, model: ProspectModel) -> None:
        self._model, self._graph, self._frame = model, _Graph(), torch.empty(0)

    def __call__(self, frame: npt.NDArray[Any]) -> Tensor:
        """[k, H] of a frame as ProspectModel.frame_features takes it, without the first dimension."""
        given = torch.from_numpy(frame)[None]
        if self._model.device.type == "cpu":
            return self._model.frame_features(given)[0]
        if self._frame.shape != given.shape:
            self._frame, self._graph = given.to(self._model.device), _Graph()
        self._frame.copy_(given.pin_memory(), non_blocking=True)
        found = self._graph.run(self._step)
        return self._step() if found is None else found.clone()  # the next frame's will stand there

    def _step(self) -> Tensor:
        with torch.autocast(self._frame.device.type, torch.bfloat16, enabled=self._model.bf16, cache_enabled=False):
            return self._model.frame_features(self._frame)[0]


class _Graph:
    """A CUDA graph of a step that reads and writes the same tensors in every call, and has no others."""

    def __init__(self) -> None:
        self.failed = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._found = torch.empty(0)

    def run(self, step: Callable[[], Tensor]) -> Tensor | None:
        """What `step` gives, in the same place in every call; None where no graph of it can be made.

        The first call runs it more than once.
        """
        if self._graph is None and not self.failed:
            try:
                self._capture(step)
            except RuntimeError as error:
                self.failed = True
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                warnings.warn(f"no CUDA graph of a live pass could be made ({reason}); slower without", stacklevel=3)
        if self._graph is None:
            return None
        self._graph.replay()
        return self._found

    def _capture(self, step: Callable[[], Tensor]) -> None:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose kernels and take memory before
                step()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._found = step()
        self._graph = graph


def _in_bfloat16(body: nn.Module) -> dict[str, Tensor]:
    """Linear layers' weights as autocast would make them, once instead of in every pass."""
    layers = ((name, module) for name, module in body.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight": layer.weight.detach().bfloat16() for name, layer in layers}
