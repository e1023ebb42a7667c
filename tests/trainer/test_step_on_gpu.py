"""What a training step asks of a GPU, counted on tensors of the CPU: waits of the host, and memory."""

from __future__ import annotations

import pytest
from by_hand import NoisyFrames, clip_example, dst, turn
from counting import Waits

from pipeline.errors import InputError
from trainer.arms import find_arm
from trainer.config import TrainConfig
from trainer.loss import supervise
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import make_pack
from trainer.sequence import build_windows
from trainer.train import memory_line, sum_terms


@pytest.mark.parametrize("arm", ["speak+dst", "lm-eos", "token"])
def test_a_pack_makes_the_host_wait_for_nothing(tokens, arm):
    config = TrainConfig(arm=arm, reweigh=True, checkpointing=arm == "speak+dst")
    model = ProspectModel(load_model("tiny", len(tokens)), DecisionHeads(128), config, tokens.choices).train()
    turns = [turn("user", "What now?", 1, 2), dst(4, 5, ("S1", "complete")), turn("assistant", "Well done.", 4, 6)]
    clips = [clip_example(turns, 0, 8 + i, clip_id=f"c{i}", video=f"v{i}", clip=i) for i in range(3)]
    pack = make_pack([w for clip in clips for w in build_windows(clip, tokens, 1, 1000)], NoisyFrames())
    chosen = supervise(pack.labels, pack.neg_rate, find_arm(arm), config.reweigh)
    with Waits("cpu") as counting:
        sum_terms(model, pack, chosen).sum().backward()
    assert counting.found == []
    assert counting.launches > 100


def test_pixels_that_do_not_fit_are_refused_beforehand(tokens):
    model = ProspectModel(load_model("tiny", len(tokens)), DecisionHeads(128), TrainConfig(bf16=True))
    weights = 16 * sum(p.numel() for p in model.parameters())
    frame = 16 * (24 * 64 + 4 * 256)  # one layer of 16 patches
    assert "0 MB a frame, 50 frames in a pack" in memory_line(model, 50, weights + 50 * frame)
    with pytest.raises(InputError, match=r"of the GPU's .* GB; add --freeze vision or --checkpointing, or lower"):
        memory_line(model, 51, weights + 50 * frame)
    assert memory_line(model, 50, weights // 2 + 50 * frame, ranks=2)
