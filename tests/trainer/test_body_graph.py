"""Text layers as graphs, where it is tested without graphs: padding changes nothing, gradients add up over packs."""

from __future__ import annotations

import pytest
import torch
from by_hand import NoisyFrames
from small_run import clip

from trainer.config import TrainConfig
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import train_tiny_tokens


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("more", [{}, {"freeze": ("vision", "connector"), "lora_rank": 4}, {"compile": True}])
def test_padded_rows_give_the_logits_and_gradients_of_the_packs(monkeypatch, device, more):
    if device == "cpu" and "compile" in more:
        torch.compiler.set_stance("force_eager")
    tokens = train_tiny_tokens(["What now?", "Well done.", "S1->complete"] * 3)
    config = TrainConfig(bf16=True, micro_batch_tokens=400, **more)
    heads = DecisionHeads(64)
    torch.nn.init.normal_(heads.speak.weight, std=0.1)
    model = ProspectModel(load_model("nano", len(tokens)), heads, config).train().to(device)
    windows = [w for i in range(4) for w in build_windows(clip(i), tokens, 1, 100)]
    packs = [make_pack(part, NoisyFrames(32)).to(torch.device(device)) for part in (windows[:3], windows[3:])]

    def step(graphed):
        monkeypatch.setattr("trainer.body_graph.GRAPHED", (device,) if graphed else ())
        model.zero_grad()
        logits = []
        for pack in packs:
            scores = model(pack)
            logits.append(scores.decisions.detach().clone())
            (scores.decisions.square().sum() + scores.text.float().square().mean()).backward()
        return torch.cat(logits, 1), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = step(graphed=False)
    for _ in range(2):
        for one, other in zip(step(graphed=True), expected, strict=True):
            assert (one - other).norm() < 5e-3 * other.norm()
    assert not model._graph.off
