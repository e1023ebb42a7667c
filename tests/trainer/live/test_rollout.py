"""Free-running decoding: the numbers of training and of each other way to compute them; what is read and when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import dst, turn
from live_model import ALWAYS, FRAMES, TURNS, Reads, Writes, example, logits_of, often, run, tiny, tokens

from pipeline.dataset import ClipExample
from pipeline.errors import NotFiniteError
from trainer.arms import ARMS
from trainer.live.engine import StaticPass
from trainer.live.session import DecodingConfig
from trainer.model import ProspectModel
from trainer.packing import make_pack, windows_of
from trainer.sequence import Window, texts_at

OPENING = 24  # tokens of "You are a helpful assistant.", which opens every prompt


@pytest.fixture
def reads(monkeypatch) -> Reads:
    return Reads(monkeypatch)


def writer(reads: Reads, arm: str, texts: dict[str, str], likelier=(), **more):
    """A model that writes `texts` when a head fires."""
    model, config = tiny(arm, **more)
    model.vlm.lm_head = Writes(reads, texts, likelier)
    return model, config


def reference(clip: ClipExample, frame: int) -> dict[str, str]:
    """The annotated texts after a frame, which is what training puts there."""
    roles = {t.role for t in clip.turns if t.start_frame == frame} - {"user"}
    texts = {role: [t.text for t in clip.turns if (t.role, t.start_frame) == (role, frame)] for role in roles}
    return {role: (", " if role == "DST_UPDATE" else " ").join(parts) for role, parts in texts.items()}


def packed(model: ProspectModel, windows: list[Window]) -> np.ndarray:
    """[2, F] of the windows' own frames: the forward pass that training does."""
    with torch.inference_mode():
        logits = [model.eval()(make_pack([w], FRAMES)).decisions[:, w.context :] for w in windows]
    return torch.cat(logits, 1).numpy()


def agree(one, other) -> None:
    assert np.abs(logits_of(one) - logits_of(other)).max() < 1e-4
    assert (one.said, one.updates) == (other.said, other.updates)


# ---- the same numbers as in training -------------------------------------------------------------------


@pytest.mark.parametrize(  # contexts of 90 and 155 tokens end at silent frames
    ("arm", "k", "budget"),
    [*((arm, 1, 90) for arm in ARMS), ("speak+dst", 1, 900), *((arm, 4, 155) for arm in ("speak+dst", "token"))],
)
def test_with_the_reference_s_texts_the_logits_are_those_of_the_training_windows(arm, k, budget):
    early = [t for t in TURNS if arm != "speak+markers" or t.role != "DST_UPDATE"]  # markers can't be replayed
    late = [dst(157, 158, ("S1", "fail")), turn("assistant", "done", 158, 159)]
    clip = example([*early, *late], 60)
    model, config = tiny(arm, k, max_tokens=OPENING + budget)
    windows = windows_of([clip], tokens(), config)
    assert (len(windows) > 1) == (budget < 900)
    [scored] = run((model, config), clip, script=reference)
    logits = logits_of(scored)
    assert logits.shape == (1 + ARMS[arm].dst_head, 60)
    assert logits.std(1).min() > 0.1
    assert np.abs(logits - packed(model, windows)[: len(logits)]).max() < 1e-4


@pytest.mark.parametrize(("arm", "k"), [*((arm, 1) for arm in ARMS), ("speak+dst", 4), ("token", 4)])
def test_with_its_own_texts_the_logits_are_those_of_one_pass_over_what_it_read(arm, k, reads, monkeypatch):
    monkeypatch.setattr("trainer.live.rollout.READ_AHEAD", 1)
    model, config = tiny(arm, k, max_tokens=OPENING + 70 + 20 * k)
    clip = example(frames=60)
    decoding = often((model, config), clip)
    reads.ids, reads.first = [], []
    [scored] = run((model, config), clip, decoding=decoding)
    assert len(reads.ids) > 1
    assert 2 < sum(text is not None for text in scored.said) < 30
    windows, first = [], clip.start_frame
    for ids, in_first_request in zip(reads.ids, reads.first, strict=True):
        context = ids[:in_first_request].count(tokens().image) // k - 1
        frames = np.flatnonzero(np.array(ids) == tokens().image).reshape(-1, k)
        labels = np.zeros((2, len(frames)), np.int8)
        windows.append(Window(clip, first - context, context, np.array(ids), frames, np.zeros(0, np.int64), labels))
        first = windows[-1].end_frame
    assert first == clip.end_frame
    logits = logits_of(scored)
    assert np.abs(logits - packed(model, windows)[: len(logits)]).max() < 1e-4


@pytest.fixture
def static_reads(monkeypatch) -> list[int]:
    """A single session's short reads have a fixed shape on the CPU, too; the tokens of each."""
    read, lengths = StaticPass.read, []

    def noted(self, request):
        lengths.append(len(request))
        return read(self, request)

    monkeypatch.setattr("trainer.live.engine.GRAPHED", ("cpu",))
    monkeypatch.setattr(StaticPass, "read", noted)
    return lengths


@pytest.mark.parametrize(("arm", "k"), [("speak+dst", 1), ("lm-eos", 1), ("frames", 4)])
def test_a_pass_of_fixed_shape_has_the_numbers_and_texts_of_the_engine(arm, k, request):
    model, clip = tiny(arm, k, max_tokens=70 + 20 * k), example(frames=40)
    decoding = often(model, clip)
    [expected] = run(model, clip, decoding=decoding)
    lengths = request.getfixturevalue("static_reads")
    [scored] = run(model, clip, decoding=decoding)
    agree(scored, expected)
    assert sum(text is not None for text in scored.said) > 4
    assert {1 if ARMS[arm].texts else k, 2 * k} <= set(lengths)  # a written token, or a frame; two frames, read ahead


def test_many_clips_at_once_give_what_each_gives_alone():
    model = tiny(max_tokens=OPENING + 110)
    decoding = DecodingConfig({"speaking": 5.0, "dst_update": 5.0}, max_text=4)
    clips = [
        example(TURNS[: 2 + i], 30 - 4 * i, 100 + i, clip_id=f"c{i}", video=f"v{i}") for i in (0, 3, 1, 5, 2, 0, 6)
    ]
    alone = [scored for clip in clips for scored in run(model, clip, decoding=decoding, slots=1)]
    together = run(model, *clips, decoding=decoding, slots=3)
    assert sum(text is not None for scored in alone for text in scored.said) > 10
    for clip, one, other in zip(clips, alone, together, strict=True):
        assert other.clip is clip
        agree(other, one)


def test_user_texts_stand_before_their_frame_and_no_other_turn_of_the_reference_is_read(reads):
    run(tiny(), example([dst(99, 100, ("S1", "start")), *TURNS], 14))
    assert reads.texts == [
        "[system]You are a helpful assistant.\nA toy"
        "[step]S1: Put the base down[in_progress][step]S2: Attach the wheel[not_started]."
        "FF[user]and now?.FFFFFFFFF[user]well? done?.FFF"
    ]


def test_the_reference_s_updates_stand_where_training_puts_them_and_speech_is_the_model_s(reads):
    """Two updates that end at one frame are one text after it, S3's no text, as it has no frames."""
    turns = [dst(102, 105, ("S1", "start")), dst(104, 105, ("S2", "start")), dst(None, None, ("S3", "start"))]
    clip = example([*turns, turn("assistant", "not this", 102, 104)], 8)
    updates = {frame: ", ".join(texts) for frame, texts in texts_at(clip, "DST_UPDATE").items()}
    assert updates == {104: "S1->start, S2->start"}
    decoding = DecodingConfig({"speaking": -np.inf, "dst_update": np.inf}, refractory_s=99)
    script = lambda clip, frame: {"DST_UPDATE": updates[frame]} if frame in updates else {}  # noqa: E731
    model = writer(reads, "speak+dst", {"assistant": "well"})
    [scored] = run(model, clip, decoding=decoding, script=script)
    assert reads.texts[0].endswith("[not_started].F[assistant]well.FFFF[DST_UPDATE]S1->start, S2->start.FFF")
    assert scored.said == ["well", *[None] * 7]
    assert [i for i, update in enumerate(scored.updates) if update] == [4]


@pytest.mark.parametrize(("role", "changed_from"), [("user", 3), ("assistant", 4), ("DST_UPDATE", 4)])
def test_a_text_changes_the_decisions_after_it_alone(role, changed_from):
    def logits(text: str) -> np.ndarray:
        if role == "user":
            return logits_of(run(tiny(), example([turn("user", text, 103, 105)], 8))[0])
        script = lambda clip, frame: {role: text} if frame == 103 else {}  # noqa: E731
        return logits_of(run(tiny(), example([], 8), script=script)[0])

    same = logits("S1->start") == logits("S2->start")
    assert same[:, :changed_from].all()
    assert not same[:, changed_from:].any()


@pytest.mark.parametrize(
    ("arm", "expected", "updates"),
    [
        ("lm-eos", "F[assistant]well done.F", None),
        ("speak", "F[assistant]well done.F", None),
        ("speak+dst-head", "F[assistant]well done.F", [(), ()]),
        ("speak+dst", "F[DST_UPDATE]S1->complete.[assistant]well done.F", [(("S1", "complete"),)] * 2),
        ("speak+markers", "F[DST_UPDATE].[assistant]well done.F", [(), ()]),
    ],
)
def test_an_arm_reads_its_own_texts_the_update_first(arm, expected, updates, reads):
    model = writer(reads, arm, {"DST_UPDATE": "S1->complete", "assistant": "well done"})
    [scored] = run(model, example([], 2), decoding=ALWAYS)
    assert reads.texts[0].split(".", 2)[2].startswith(expected)
    assert (scored.said, scored.updates) == (["well done"] * 2, updates)


def constant(speaking: float, dst_update: float):
    """A model whose logits are always these."""
    model, config = tiny()
    for head, value in ((model.heads.speak, speaking), (model.heads.dst, dst_update)):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, value)
    return model, config


@pytest.mark.parametrize(
    ("speaking", "seconds", "expected"),
    [
        (0.51, 0, []),
        (0.5, 0.5, [*range(9)]),
        (0.5, 1.0000005, [0, 2, 4, 6, 8]),
        (0.5, 2, [0, 4, 8]),
        (0.5, 2.1, [0, 5]),
    ],
)
def test_a_head_fires_at_its_threshold_and_is_silent_for_its_refractory_time(speaking, seconds, expected):
    decoding = DecodingConfig({"speaking": speaking, "dst_update": -0.49}, refractory_s=seconds, max_text=1)
    [scored] = run(constant(0.5, -0.5), example([], 9), decoding=decoding)  # 2 frames a second
    assert [i for i, text in enumerate(scored.said) if text is not None] == expected
    assert scored.updates == [None] * 9


def test_a_logit_that_is_not_finite_is_an_error():
    with pytest.raises(NotFiniteError, match="clip c0: its scores are not finite"):
        run(constant(float("nan"), 0), example())


def test_a_text_without_an_end_gets_one_and_images_markers_and_rows_without_a_token_are_never_written(reads):
    unwanted = [tokens().image, *tokens().marker.values(), *range(len(tokens()), len(tokens()) + 5)]
    model = writer(reads, "speak", {"assistant": "well done and now"}, unwanted)
    [scored] = run(model, example([], 2), decoding=replace(ALWAYS, max_text=2))
    assert tokens().encode(scored.said[0]) == tokens().encode("well done and now")[:2]
    assert reads.texts[0].split(".", 2)[2].startswith(f"F[assistant]{scored.said[0]}.F[assistant]")


@pytest.mark.parametrize(("arm", "state"), [("speak+dst", "[completed]"), ("speak+markers", "[not_started]")])
def test_a_new_context_has_the_state_replayed_from_the_model_s_own_updates(arm, state, reads):
    """The reference completes nothing here. Markers say nothing, so nothing can be replayed from them."""
    model = writer(reads, arm, {"DST_UPDATE": "S9->start, S1->complete", "assistant": "well"}, max_tokens=OPENING + 90)
    decoding = DecodingConfig({"speaking": np.inf, "dst_update": -np.inf}, refractory_s=99)
    run(model, example([dst(104, 105, ("S2", "fail"))], 60), decoding=decoding)
    opening = "[system]You are a helpful assistant.\nA toy[step]S1: Put the base down"
    assert reads.texts[0].startswith(f"{opening}[not_started][step]S2: Attach the wheel[not_started].F")
    assert reads.texts[1].startswith(f"{opening}{state}[step]S2: Attach the wheel[not_started].F")


def test_an_update_among_the_repeated_frames_is_not_in_the_prompt_as_well(reads):
    model, clip = tiny(max_tokens=OPENING + 85), example([], 100)

    def texts(at: int) -> list[str]:
        reads.ids.clear()
        run(model, clip, script=lambda _, frame: {"DST_UPDATE": "S1->complete"} if frame == at else {})
        return reads.texts

    end = clip.start_frame + texts(at=-1)[0].count("F")
    _, second, third, *_ = texts(at=end - 8)  # within the quarter that the second context repeats
    assert "down[not_started][step]" in second
    assert second.count("[DST_UPDATE]S1->complete.") == 1
    assert "down[completed][step]" in third
    assert "S1->complete" not in third
