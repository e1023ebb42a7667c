"""A tiny model with a clip for the tests of live decoding, what its sessions read, and videos."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from by_hand import NoisyFrames, clip_example, dst, grey, turn

from pipeline.dataset import ClipExample
from pipeline.schema import HEADS
from trainer.config import TrainConfig
from trainer.live.engine import Engine
from trainer.live.rollout import free_running
from trainer.live.session import DecodingConfig
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.tokenizer import Tokens, train_tiny_tokens

FRAMES = NoisyFrames()
NEVER = DecodingConfig({"speaking": np.inf, "dst_update": np.inf})
ALWAYS = DecodingConfig({"speaking": -np.inf, "dst_update": -np.inf}, refractory_s=0)
TURNS = (
    turn("user", "and now?", 102, 103),
    dst(103, 104, ("S1", "start")),
    turn("assistant", "Put the base down.", 103, 104),
    dst(108, 109, ("S1", "complete")),
    dst(108, 109, ("S2", "start")),
    turn("user", "well?", 111, 112),
    turn("user", "done?", 111, 112),
    turn("assistant", "well done", 112, 113),
    dst(121, 122, ("S2", "complete")),
    turn("assistant", "done", 121, 122),
)


@cache
def tokens() -> Tokens:
    return train_tiny_tokens(["S1: Put the base down", "S1->complete, S2->start", "well done", "and now?"] * 3)


def example(turns=TURNS, frames: int = 26, start: int = 100, **more) -> ClipExample:
    return clip_example(turns, start, frames, goal="A toy", **more)


def tiny(arm: str = "speak+dst", k: int = 1, **more) -> tuple[ProspectModel, TrainConfig]:
    config = TrainConfig(arm=arm, tokens_per_frame=k, **more)
    vlm = load_model("tiny", len(tokens()))
    if k > 1:
        vlm.config.scale_factor = 1  # 4 x 4 tokens per frame
        vlm = type(vlm)(vlm.config)
    heads = DecisionHeads(128)
    torch.manual_seed(1)
    torch.nn.init.normal_(heads.speak.weight)
    torch.nn.init.normal_(heads.dst.weight)
    return ProspectModel(vlm, heads, config, tokens().choices), config


def run(model_and_config, *clips: ClipExample, decoding: DecodingConfig = NEVER, **more):
    model, config = model_and_config
    return list(free_running(model, tokens(), clips, FRAMES, config, decoding, **more))


def logits_of(scored) -> np.ndarray:
    return np.stack([scored.logits[head] for head in ("speaking", "dst_update") if head in scored.logits])


def often(model_and_config, clip: ClipExample) -> DecodingConfig:
    """Each head fires at about half of the frames, but for its refractory time."""
    median = np.median(logits_of(run(model_and_config, clip)[0]), 1)
    return DecodingConfig(dict(zip(HEADS, median.tolist(), strict=False)), refractory_s=2, max_text=4)


class Reads:
    """The ids that sessions read, one list per context; `first`: how many of them its first request had."""

    def __init__(self, monkeypatch) -> None:
        self.ids: list[list[int]] = []
        self.first: list[int] = []
        self.current: list[list[int]] = []  # the contexts of the last pass, by slot
        in_slot: dict[int, list[int]] = {}
        answers = Engine._answers

        def noted(engine, requests):
            self.current = []
            for slot, request in sorted(requests.items()):
                if request.prefix == 0:
                    in_slot[slot] = []
                    self.ids.append(in_slot[slot])
                    self.first.append(len(request))
                parts = (p if isinstance(p, list) else [tokens().image] * len(p) for p in request.parts)
                in_slot[slot][request.prefix :] = [i for part in parts for i in part]
                self.current.append(in_slot[slot])
            return answers(engine, requests)

        monkeypatch.setattr(Engine, "_answers", noted)

    @property
    def texts(self) -> list[str]:
        """F for a frame's token, . for the end, [role] for a marker, text as it is."""
        names = {number: f"[{name}]" for name, number in tokens().marker.items()}
        names |= {tokens().image: "F", tokens().end: "."}
        return ["".join(names[i] if i in names else tokens().decode([i]) for i in ids) for ids in self.ids]


class Writes(torch.nn.Module):
    """Stands in for the LM head: after `[role]` comes the text of that role, token by token; `likelier`: more so."""

    def __init__(self, reads: Reads, texts: dict[str, str], likelier=()) -> None:
        super().__init__()
        self.weight = torch.zeros(len(tokens()) + 5, 128)  # more rows than tokens, as SmolVLM's may have
        self.reads, self.texts, self.likelier = reads, texts, list(likelier)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.reads.current[0][-1] == tokens().image:
            return torch.zeros(len(hidden), len(self.weight))  # lm-eos decides
        return torch.stack([self._after(ids) for ids in self.reads.current])

    def _after(self, ids: list[int]) -> torch.Tensor:
        markers = {tokens().marker[role]: text for role, text in self.texts.items()}
        at = max(i for i in range(len(ids)) if ids[i] in markers)
        wanted = [*tokens().encode(markers[ids[at]]), tokens().end]
        logits = torch.zeros(len(self.weight))
        logits[torch.tensor(self.likelier, dtype=torch.int64)] = 9
        logits[wanted[min(len(ids) - at - 1, len(wanted) - 1)]] = 5
        return logits


# ---- videos ------------------------------------------------------------------------------------------


def write_video(path: Path, count: int, rate: Fraction | int = 30, step: int = 1, **options: str) -> Path:
    """Picture i is `step` * i bright."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.options = "yuv420p", {"qp": "1", **options}
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(step * i), "rgb24")))
        container.mux(stream.encode())
    return path
