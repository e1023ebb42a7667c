"""What each arm reads, where it decides, and the check of the harness: an inverted head learns the same bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from by_hand import clip_example, dst, turn
from small_run import CONFIG, curve, go, write_data

import trainer
from pipeline.errors import InputError
from trainer.arms import ARMS, find_arm
from trainer.config import TrainConfig
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.sequence import build_windows
from trainer.tokenizer import MARKERS, train_tiny_tokens

CLIP = clip_example(
    [dst(2, 3, ("S1", "complete")), turn("assistant", "good", 2, 3)], frames=4, initial=[("S1", "in_progress")]
)
TOKENS = train_tiny_tokens(["good", "S1->complete"])
PLAIN = "[system] You are a helpful assistant. [step] S1: Put the base down [step] S2: Attach the wheel ."
TOLD = (
    "[system] You are a helpful assistant. [step] S1: Put the base down [in_progress] "
    "[step] S2: Attach the wheel [not_started] ."
)


def reads(arm: str) -> str:
    """The whole sequence; F a frame, a full stop the end."""
    (window,) = build_windows(CLIP, TOKENS, 1, 500, find_arm(arm))
    words, text = [], []
    names = {TOKENS.marker[name]: f"[{name}]" for name in MARKERS} | {TOKENS.image: "F", TOKENS.end: "."}
    for token in [*window.input_ids.tolist(), None]:
        if token is None or token in names:
            words += [TOKENS.decode(text).strip()] * bool(text)
            words, text = [*words, names.get(token, "")], []
        else:
            text.append(token)
    return " ".join(words).strip()


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("silence", f"{PLAIN} F F F [assistant] good . F"),
        ("lm-eos", f"{PLAIN} F F F [assistant] good . F"),
        ("speak", f"{PLAIN} F F F [assistant] good . F"),
        ("speak+dst-head", f"{PLAIN} F F F [assistant] good . F"),
        ("speak+dst", f"{TOLD} F F F [DST_UPDATE] S1->complete . [assistant] good . F"),
        ("speak+markers", f"{TOLD} F F F [DST_UPDATE] . [assistant] good . F"),
    ],
)
def test_what_an_arm_reads(arm, expected):
    assert reads(arm) == expected


@pytest.mark.parametrize("balance", ["none", "mean"])
def test_silence_and_speak_give_the_same_probabilities(tmp_path, balance):
    """BCE(x, y) = BCE(-x, 1 - y): what differs between these two arms is the harness."""
    data = write_data(tmp_path / "data")
    scores = {}
    for arm in ("silence", "speak"):
        go(data, tmp_path / arm, arm=arm, balance=balance)
        scores[arm] = np.concatenate([s.logits[0] for s in trainer.load(tmp_path / arm).score(data, "val")])
        head = trainer.load(tmp_path / arm).model.heads.speak
        assert head.weight.any()
        assert arm == "speak" or head.bias > 0 or balance == "mean"  # it does say silence
    assert np.array_equal(scores["silence"], scores["speak"])
    assert len(np.unique(scores["speak"])) > 10  # and it did learn something
    kept = [[(line.get("loss"), line.get("grad_norm")) for line in curve(tmp_path / arm)] for arm in scores]
    assert kept[0] == kept[1]


def test_an_lm_eos_model_speaks_where_the_end_is_not_the_next_token():
    config = TrainConfig(arm="lm-eos")
    model = ProspectModel(load_model("tiny", len(TOKENS)), DecisionHeads(128), config, silence=TOKENS.end)
    hidden = torch.randn(5, 128)
    chances = model.vlm.lm_head(hidden).softmax(-1)[:, TOKENS.end]
    expected = [math.log((1 - p) / p) for p in chances.tolist()]
    assert model.decisions(hidden)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_every_arm_trains_on_the_same_frames_in_the_same_order_and_on_the_heads_that_it_has(tmp_path):
    data, counts = write_data(tmp_path / "data"), set()
    for name, arm in ARMS.items():
        go(data, tmp_path / name, arm=name, steps=3)
        *steps, last = curve(tmp_path / name)
        counts.add(tuple(line["n_speaking"] for line in steps))
        assert all((line["n_dst_update"] > 0) == arm.dst_head for line in steps)
        assert (last["evaluation"]["dst_update"]["ap"] is not None) == arm.dst_head
    assert len(counts) == 1
    assert len(counts.pop()) == 3


def test_a_run_resumes_as_the_arm_it_was_begun_as(tmp_path):
    data = write_data(tmp_path / "data")
    go(data, tmp_path / "run", arm="lm-eos", steps=2)
    assert trainer.load(tmp_path / "run").model.arm == ARMS["lm-eos"]
    with pytest.raises(InputError, match="arm is 'speak', the run has 'lm-eos'"):
        go(data, tmp_path / "run", arm="speak", steps=2, resume=True)
    assert CONFIG.arm == "speak+dst"
