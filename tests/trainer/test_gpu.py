"""What only a GPU can show; skipped elsewhere. Written without one at hand: never run so far."""

from __future__ import annotations

import pytest
import torch
from by_hand import NoisyFrames
from small_run import CONFIG, clip, curve, go, go_until, write_data

from trainer.checkpoint import load_run
from trainer.config import TrainConfig
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.pack import make_pack
from trainer.sequence import build_windows
from trainer.tokenizer import train_tiny_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_gpu_gives_the_cpu_s_logits_and_packs_stay_apart():
    tokens = train_tiny_tokens(["What now?", "Well done.", "S1->complete"] * 3)
    heads = DecisionHeads(128)
    torch.nn.init.normal_(heads.speak.weight)
    model = ProspectModel(load_model("tiny", len(tokens)), heads, TrainConfig()).eval()
    windows = [w for i in range(4) for w in build_windows(clip(i), tokens, 1, 200)]
    expected = torch.cat([model(make_pack([w], NoisyFrames())).decisions for w in windows], 1)
    found = model.cuda()(make_pack(windows, NoisyFrames()).to(torch.device("cuda"))).decisions
    assert torch.allclose(found.cpu(), expected, atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"bf16": True, "compile": True, "checkpointing": True}])
def test_a_run_on_the_gpu_learns_and_resumes(tmp_path, monkeypatch, more):
    data = write_data(tmp_path / "data")
    report = go(data, tmp_path / "run", **more)
    assert report.loss < 0.7 * curve(tmp_path / "run")[0]["loss"]
    assert load_run(tmp_path / "run").info["step"] == CONFIG.steps
    go_until(5, data, tmp_path / "cut", monkeypatch, **more)
    assert go(data, tmp_path / "cut", resume=True, **more).resumed_from == 4
    assert curve(tmp_path / "cut")[-2]["loss"] == pytest.approx(curve(tmp_path / "run")[-2]["loss"], rel=1e-2)
