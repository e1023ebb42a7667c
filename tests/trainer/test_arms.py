"""What each arm reads, where it decides, and the check of the harness: an inverted head learns the same bits."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example, dst, turn
from small_run import curve, go, write_data

import trainer
from trainer.arms import ARMS, find_arm
from trainer.checkpoint import LoadedRun
from trainer.config import TrainConfig
from trainer.evaluate import evaluate
from trainer.live.rollout import free_running
from trainer.live.session import DecodingConfig
from trainer.loss import bce_sums, combine, supervise
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.sequence import build_windows
from trainer.teacher_forced import score_clips
from trainer.tokenizer import MARKERS, train_tiny_tokens

TURNS = [dst(2, 3, ("S1", "complete")), turn("assistant", "good", 2, 3)]
CLIP = clip_example(TURNS, frames=4, initial=[("S1", "in_progress")])
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
        ("texts", f"{PLAIN} F F F [assistant] good . F"),
        ("frames", f"{PLAIN} F F F F"),
        ("token", f"{TOLD} F F F [DST_UPDATE] S1->complete . [assistant] good . F"),
        ("speak", f"{PLAIN} F F F [assistant] good . F"),
        ("speak+dst-head", f"{PLAIN} F F F [assistant] good . F"),
        ("speak+dst", f"{TOLD} F F F [DST_UPDATE] S1->complete . [assistant] good . F"),
        ("speak+markers", f"{TOLD} F F F [DST_UPDATE] . [assistant] good . F"),
    ],
)
def test_what_an_arm_reads(arm, expected):
    assert reads(arm) == expected


def test_the_frames_arm_hears_nothing_learns_no_text_and_is_asked_at_every_frame():
    heard = clip_example([turn("user", "what now?", 1, 2), *TURNS], frames=4)
    (window,) = build_windows(heard, TOKENS, 1, 500, find_arm("frames"))
    (silent,) = build_windows(clip_example([], frames=4), TOKENS, 1, 500, find_arm("frames"))
    assert window.input_ids.tolist() == silent.input_ids.tolist()
    assert window.lm_positions.tolist() == []
    assert window.labels.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("arm", ["texts", "speak"])
def test_what_is_in_the_pictures_changes_no_score_of_the_texts_arm(arm):
    """Teacher-forced and free-running, from pixels and from cached features."""
    config = TrainConfig(arm=arm)
    model = ProspectModel(load_model("tiny", len(TOKENS)), DecisionHeads(128), config, TOKENS.choices)
    torch.nn.init.ones_(model.heads.speak.weight)
    clips, never = [CLIP, replace(CLIP, video_uid="other")], DecodingConfig({"speaking": math.inf})
    forced = score_clips(LoadedRun(model, TOKENS, config, {}), iter(clips), NoisyFrames())
    live = free_running(model, TOKENS, clips, NoisyFrames(), config, never)
    for one, other in ([s.logits[0] for s in forced], [s.logits["speaking"] for s in live]):
        assert np.allclose(one, other, atol=1e-5) == (arm == "texts")
    features = [model.frame_features(frames) for frames in (torch.rand(2, 1, 1024), torch.zeros(2, 3, 64, 64).byte())]
    assert torch.equal(*features) == (arm == "texts")


def test_the_texts_arm_looks_for_no_video(tmp_path):
    data = write_data(tmp_path / "data")
    shutil.rmtree(data / "frames-on-disk")
    go(data, tmp_path / "run", arm="texts", steps=2)
    assert "teacher-forced" in evaluate(tmp_path / "run", data, "val").metrics


def test_silence_and_speak_give_the_same_probabilities(data, tmp_path):
    """TRAPS 37: BCE(x, y) = BCE(-x, 1 - y): what differs between these two arms is the harness."""
    scores = {}
    for arm in ("silence", "speak"):
        go(data, tmp_path / arm, arm=arm, steps=4)
        run = trainer.load(tmp_path / arm)
        scores[arm] = np.concatenate([s.logits[0] for s in run.score(data, "val")])
        assert run.model.heads.speak.weight.any()
        assert arm == "speak" or run.model.heads.speak.bias > 0  # it does say silence
    assert np.array_equal(scores["silence"], scores["speak"])
    assert len(np.unique(scores["speak"])) > 10  # and it did learn something
    kept = [[(line.get("loss"), line.get("grad_norm")) for line in curve(tmp_path / arm)] for arm in scores]
    assert kept[0] == kept[1]


def test_the_token_arm_decides_by_three_next_tokens_and_learns_one_of_them_at_each_frame():
    """p of silence, speech, update at each frame: 1/2, 1/4, 1/4. Their labels by hand: update where it comes first."""
    model = ProspectModel(load_model("tiny", len(TOKENS)), DecisionHeads(128), TrainConfig(arm="token"), TOKENS.choices)
    assert [TOKENS.tokenizer.convert_ids_to_tokens(i) for i in TOKENS.choices] == [
        "<end_of_utterance>", "<|reserved_special_token_2|>", "<|reserved_special_token_3|>",
    ]  # fmt: skip
    model.vlm.lm_head.weight.data.zero_()
    for token, logit in zip(TOKENS.choices, (1.0, 1 - math.log(2), 1 - math.log(2)), strict=True):
        model.vlm.lm_head.weight.data[token, 0] = logit
    logits = model.decisions(torch.ones(7, 128))
    assert logits[:, 0].tolist() == pytest.approx([math.log(1 / 3), math.log(1 / 3), 0.0], abs=1e-6)
    labels = torch.tensor(
        [[0, 1, 0, 1, 0, -100, -100], [0, 0, 1, 1, -100, 0, -100]], dtype=torch.int8
    )  # silence, speech, update, both, perhaps an update, perhaps speech, nobody knows
    expected = [-math.log(p) for p in (1 / 2, 1 / 4, 1 / 4, 1 / 4, 3 / 4, 3 / 4)]
    supervised = supervise(labels, torch.full((7,), 0.5), ARMS["token"])
    sums, counts = torch.cat([bce_sums(logits, supervised), torch.zeros(1)]), torch.tensor([*supervised.counts(), 0])
    assert counts.tolist() == [3, 3, 0, 0, 0]
    loss, terms = combine(sums, counts, TrainConfig(arm="token"))
    assert (loss.item(), terms["dst_update"].item()) == (pytest.approx(sum(expected) / 6, abs=1e-6), 0)
    reweighed = supervise(labels, torch.full((7,), 0.5), ARMS["token"], reweigh=True)
    assert reweighed.counts().tolist() == [6, 3, 0, 0]


def test_every_arm_trains_on_the_same_frames_in_the_same_order_and_on_the_heads_that_it_has(data, tmp_path):
    counts = set()
    for name, arm in ARMS.items():
        go(data, tmp_path / name, arm=name, model="nano", steps=2)
        *steps, last = curve(tmp_path / name)
        counts.add(tuple(line["n_speaking"] for line in steps))
        assert all((line["n_dst_update"] > 0) == (arm.dst_head and name != "token") for line in steps)
        assert (last["evaluation"]["dst_update"]["ap"] is not None) == arm.dst_head
    assert len(counts) == 1
