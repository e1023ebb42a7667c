from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from by_hand import NoisyFrames, clip_example, dst, turn

from pipeline.dataset import ClipExample
from pipeline.errors import InputError, NotFiniteError
from trainer.arms import ARMS
from trainer.config import TrainConfig
from trainer.live.rollout import self_fed
from trainer.live.session import DecodingConfig
from trainer.model import DecisionHeads, ProspectModel, load_model
from trainer.packing import make_pack, windows_of
from trainer.sequence import Window, prompt_ids, user_texts, utterance
from trainer.tokenizer import Tokens, train_tiny_tokens

FRAMES = NoisyFrames()
OPENING = 24  # tokens of "You are a helpful assistant.", which opens every prompt
NEVER = DecodingConfig({"speaking": np.inf, "dst_update": np.inf})
ALWAYS = DecodingConfig({"speaking": -np.inf, "dst_update": -np.inf}, refractory_s=0, most_text=3)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return train_tiny_tokens(["S1: Put the base down", "S1->complete, S2->start", "well done", "and now?"] * 3)


def tiny(tokens: Tokens, arm: str, k: int = 1, **more) -> tuple[ProspectModel, TrainConfig]:
    config = TrainConfig(arm=arm, tokens_per_frame=k, **more)
    vlm = load_model("tiny", len(tokens))
    if k > 1:
        vlm.config.scale_factor = 1  # 4 x 4 tokens per frame
        vlm = type(vlm)(vlm.config)
    heads = DecisionHeads(128)
    torch.manual_seed(1)
    torch.nn.init.normal_(heads.speak.weight)
    torch.nn.init.normal_(heads.dst.weight)
    return ProspectModel(vlm, heads, config, tokens.end), config


def run(model_and_config, tokens: Tokens, *clips: ClipExample, live: DecodingConfig = NEVER, script=None, slots=None):
    model, config = model_and_config
    return list(self_fed(model, tokens, clips, FRAMES, config, live, script, slots))


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


def example(turns=TURNS, frames: int = 26, start: int = 100, **more) -> ClipExample:
    return clip_example(turns, start, frames, goal="A toy", **more)


def reference(clip: ClipExample, frame: int) -> dict[str, str]:
    """What the annotation says after each frame, which is what training puts there."""
    said: dict[str, list[str]] = {}
    for t in clip.turns:
        if t.role in ("DST_UPDATE", "assistant") and t.start_frame == frame:
            said.setdefault(t.role, []).append(t.text)
    return {role: (", " if role == "DST_UPDATE" else " ").join(texts) for role, texts in said.items()}


def packed(model: ProspectModel, windows: list[Window]) -> np.ndarray:
    """[2, F] of the windows' own frames: the forward pass that training does."""
    with torch.inference_mode():
        logits = [model.eval()(make_pack([w], FRAMES)).decisions[:, w.context :] for w in windows]
    return torch.cat(logits, 1).numpy()


def streamed(scored) -> np.ndarray:
    return np.stack([scored.logits[head] for head in ("speaking", "dst_update") if head in scored.logits])


@pytest.fixture
def one_by_one(monkeypatch):
    """One frame a pass."""
    monkeypatch.setattr("trainer.live.rollout.AHEAD", 1)


class Reads:
    """What the text model has read, as ids, one list per context; `kept`: how many of them it began with, before its
    first own frame. A frame's token reads <image>."""

    def __init__(self, model: ProspectModel, tokens: Tokens) -> None:
        self.ids: list[list[int]] = []
        self.first: list[int] = []
        self.current: list[list[int]] = []  # the contexts of the last call, in its order
        self._in_slot: dict[int, list[int]] = {}
        self._table, self._image = model.body.embed_tokens.weight.detach(), tokens.image
        model.body.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, given) -> None:
        if given.get("reading") is None:
            return  # a packed pass
        same = (given["inputs_embeds"][0][:, None] == self._table).all(-1)  # [L, V]
        ids = torch.where(same.any(1), same.int().argmax(1), self._image).tolist()
        self.current = []
        for row in given["reading"].rows:
            if row.start == 0:
                self._in_slot[row.slot] = []
                self.ids.append(self._in_slot[row.slot])
                self.first.append(row.length)
            context = self._in_slot[row.slot]
            context[row.start :] = ids[row.offset : row.offset + row.length]  # what stood there was forgotten
            self.current.append(context)

    def text(self, tokens: Tokens) -> list[str]:
        return [short(tokens, ids) for ids in self.ids]


def short(tokens: Tokens, ids: list[int]) -> str:
    """F for a frame's token, . for the end, [role] for a marker, text as it is."""
    names = {number: f"[{name}]" for name, number in tokens.marker.items()} | {tokens.image: "F", tokens.end: "."}
    return "".join(names[i] if i in names else tokens.decode([i]) for i in ids)


class Writes(torch.nn.Module):
    """Stands in for the LM head: after `[role]` comes the text of that role, token by token, then `then`."""

    def __init__(self, tokens: Tokens, reads: Reads, texts: dict[str, str], then: list[int]) -> None:
        super().__init__()
        self.weight = torch.zeros(len(tokens) + 5, 128)  # more rows than tokens, as SmolVLM's may have
        self.tokens, self.reads, self.texts, self.then = tokens, reads, texts, then

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        read = self.reads.current
        if read[0][-1] == self.tokens.image:
            return torch.zeros(len(hidden), len(self.weight))  # lm-eos decides
        return torch.stack([self._after(ids) for ids in read])

    def _after(self, ids: list[int]) -> torch.Tensor:
        role, at = next(
            (r, i) for i in reversed(range(len(ids))) for r in self.texts if ids[i] == self.tokens.marker[r]
        )
        wanted = [*self.tokens.encode(self.texts[role]), self.tokens.end]
        logits = torch.zeros(len(self.weight))
        logits[torch.tensor(self.then, dtype=torch.int64)] = 9
        logits[wanted[min(len(ids) - at - 1, len(wanted) - 1)]] = 5
        return logits


def writer(tokens: Tokens, arm: str, texts: dict[str, str], then=(), **more):
    """A model that writes `texts` when asked to; its reads."""
    model, config = tiny(tokens, arm, **more)
    reads = Reads(model, tokens)
    model.vlm.lm_head = Writes(tokens, reads, texts, list(then))
    return (model, config), reads


# ---- the same numbers as in training -------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("k", [1, 4])
def test_with_the_reference_s_texts_the_logits_are_those_of_the_training_window(tokens, arm, k):
    model, config = tiny(tokens, arm, k)
    clip = example()
    windows = windows_of([clip], tokens, config)
    assert len(windows) == 1
    expected = packed(model, windows)
    [scored] = run((model, config), tokens, clip, script=reference)
    found = streamed(scored)
    assert found.shape == (2 if "dst" in arm or "markers" in arm else 1, 26)
    assert found.std(1).min() > 0.1
    assert np.abs(found - expected[: len(found)]).max() < 1e-4


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("k", "budget"), [(1, 90), (4, 155)])  # where windows end at frames without texts
def test_a_context_that_starts_over_is_the_next_training_window(tokens, arm, k, budget):
    early = [t for t in TURNS if arm != "speak+markers" or t.role != "DST_UPDATE"]  # markers can't be replayed
    late = [dst(157, 158, ("S1", "fail")), turn("assistant", "done", 158, 159)]
    clip = example([*early, *late], 60)
    model, config = tiny(tokens, arm, k, max_tokens=OPENING + budget)
    windows = windows_of([clip], tokens, config)
    assert len(windows) > 1
    assert windows[1].context > 3
    [scored] = run((model, config), tokens, clip, script=reference)
    found = streamed(scored)
    assert np.abs(found - packed(model, windows)[: len(found)]).max() < 1e-4


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("k", [1, 4])
def test_with_its_own_texts_the_logits_are_those_of_one_pass_over_what_it_read(tokens, arm, k, one_by_one):
    model, config = tiny(tokens, arm, k, max_tokens=OPENING + 70 + 20 * k)
    reads = Reads(model, tokens)
    live = DecodingConfig({"speaking": 0.0, "dst_update": 0.0}, refractory_s=2, most_text=4)
    clip = example(frames=50)
    [scored] = run((model, config), tokens, clip, live=live)
    assert len(reads.ids) > 1
    assert 4 < sum(said is not None for said in scored.said) < 20
    windows, first = [], clip.start_frame
    for ids, read_first in zip(reads.ids, reads.first, strict=True):
        kept = ids[:read_first].count(tokens.image) // k - 1
        windows.append(window_of(clip, ids, first - kept, kept, k, tokens))
        first = windows[-1].end_frame
    assert first == clip.end_frame
    found = streamed(scored)
    assert np.abs(found - packed(model, windows)[: len(found)]).max() < 1e-4


def window_of(clip, ids: list[int], first: int, context: int, k: int, tokens: Tokens) -> Window:
    frames = np.flatnonzero(np.array(ids) == tokens.image).reshape(-1, k)
    none = np.zeros(0, np.int64)
    return Window(clip, first, context, np.array(ids), frames, none, np.zeros((2, len(frames)), np.int8))


@pytest.mark.parametrize("arm", ["speak+dst", "lm-eos", "speak+markers"])
@pytest.mark.parametrize("slots", [2, 3, None])
def test_many_clips_at_once_give_what_each_gives_alone(tokens, arm, slots):
    model = tiny(tokens, arm, max_tokens=OPENING + 110)
    live = DecodingConfig({"speaking": 5.0, "dst_update": 5.0}, most_text=4)
    clips = [
        example(TURNS[: 2 + i], 30 - 4 * i, 100 + i, clip_id=f"c{i}", video=f"v{i}") for i in (0, 3, 1, 5, 2, 0, 6)
    ]
    alone = [scored for clip in clips for scored in run(model, tokens, clip, live=live, slots=1)]
    together = run(model, tokens, *clips, live=live, slots=slots)
    assert sum(said is not None for scored in alone for said in scored.said) > 10
    assert len(together) == 7
    for clip, one, found in zip(clips, alone, together, strict=True):
        assert found.clip is clip
        assert np.abs(streamed(found) - streamed(one)).max() < 1e-4
        assert (found.said, found.updates) == (one.said, one.updates)


@pytest.mark.parametrize("k", [1, 4])
def test_frames_read_ahead_change_nothing(tokens, k, monkeypatch):
    model, clip = tiny(tokens, "speak+dst", k, max_tokens=OPENING + 70 + 20 * k), example(frames=60)
    live, reads = DecodingConfig({"speaking": 5.0, "dst_update": 5.0}, most_text=4), Reads(model[0], tokens)

    def ahead(frames: int):
        monkeypatch.setattr("trainer.live.rollout.AHEAD", frames)
        reads.ids = []
        [scored] = run(model, tokens, clip, live=live)
        return scored, reads.ids

    one, read_one = ahead(1)
    assert 4 < sum(said is not None for said in one.said) < 30
    for frames in (2, 4, 60):
        found, read = ahead(frames)
        assert np.abs(streamed(found) - streamed(one)).max() < 1e-4
        assert (found.said, found.updates) == (one.said, one.updates)
        # of a context that ends, a frame that was looked at too early may be left
        assert [ids[: len(same)] for ids, same in zip(read, read_one, strict=True)] == read_one


# ---- who knows what, and when --------------------------------------------------------------------------


def test_the_user_is_heard_before_the_frame_and_no_other_turn_of_the_reference_is_read(tokens):
    model, config = tiny(tokens, "speak+dst")
    reads = Reads(model, tokens)
    clip = example([dst(99, 100, ("S1", "start")), *TURNS], 14)
    run((model, config), tokens, clip)
    [text] = reads.text(tokens)
    assert text == (
        "[system]You are a helpful assistant.\nA toy"
        "[step]S1: Put the base down[in_progress][step]S2: Attach the wheel[not_started]."
        "FF[user]and now?.FFFFFFFFF[user]well? done?.FFF"
    )


def test_other_words_of_the_user_change_the_decisions_from_their_frame_on(tokens):
    model = tiny(tokens, "speak+dst")
    [one], [other] = (
        run(model, tokens, example([turn("user", text, 103, 105)], 8)) for text in ("and now?", "well done")
    )
    same = streamed(one) == streamed(other)
    assert same[:, :3].all()
    assert not same[:, 3:].any()


@pytest.mark.parametrize("role", ["assistant", "DST_UPDATE"])
def test_a_text_is_seen_by_later_frames_only(tokens, role):
    model, clip = tiny(tokens, "speak+dst"), example([], 8)

    def script(text):
        return lambda clip, frame: {role: text} if frame == 103 else {}

    [one], [other] = (run(model, tokens, clip, script=script(text)) for text in ("S1->start", "S2->start"))
    same = streamed(one) == streamed(other)
    assert same[:, :4].all()
    assert not same[:, 4:].any()


@pytest.mark.parametrize(
    ("arm", "expected", "updates"),
    [
        ("silence", "F[assistant]well done.F", None),
        ("lm-eos", "F[assistant]well done.F", None),
        ("speak", "F[assistant]well done.F", None),
        ("speak+dst-head", "F[assistant]well done.F", [(), ()]),
        ("speak+dst", "F[DST_UPDATE]S1->complete.[assistant]well done.F", [(("S1", "complete"),)] * 2),
        ("speak+markers", "F[DST_UPDATE].[assistant]well done.F", [(), ()]),
    ],
)
def test_an_arm_reads_of_its_own_updates_what_it_may_the_update_first(tokens, arm, expected, updates):
    texts = {"DST_UPDATE": "S1->complete", "assistant": "well done"}
    model, reads = writer(tokens, arm, texts)
    live = DecodingConfig(ALWAYS.thresholds, refractory_s=0)
    [scored] = run(model, tokens, example([], 2), live=live)
    [text] = reads.text(tokens)
    assert text.split(".", 2)[2].startswith(expected)
    assert scored.said == ["well done"] * 2
    assert scored.updates == updates


# ---- when it fires -------------------------------------------------------------------------------------


def fired(events: list) -> list[int]:
    return [i for i, event in enumerate(events) if event is not None]


def constant(tokens: Tokens, speaking: float, dst_update: float):
    """A model whose logits are always these."""
    model, config = tiny(tokens, "speak+dst")
    for head, value in ((model.heads.speak, speaking), (model.heads.dst, dst_update)):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, value)
    return model, config


def test_a_head_fires_at_its_threshold_and_not_below(tokens):
    model = constant(tokens, 0.5, -0.5)
    for speaking, dst_update, expected in ((0.5, -0.49, (True, False)), (0.51, -0.5, (False, True))):
        live = DecodingConfig({"speaking": speaking, "dst_update": dst_update}, refractory_s=0, most_text=1)
        [scored] = run(model, tokens, example([], 3), live=live)
        assert (fired(scored.said) == [0, 1, 2], fired(scored.updates) == [0, 1, 2]) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, [0, 1, 2, 3, 4, 5, 6, 7, 8]), (0.5, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
                              (1.0000005, [0, 2, 4, 6, 8]), (1.4, [0, 3, 6]), (2, [0, 4, 8]), (2.1, [0, 5]), (99, [0])],
)  # fmt: skip
def test_after_firing_a_head_is_silent_for_its_refractory_time(tokens, seconds, expected):
    live = DecodingConfig({"speaking": 0.0, "dst_update": 0.0}, refractory_s=seconds, most_text=1)
    [scored] = run(constant(tokens, 1, 1), tokens, example([], 9), live=live)  # 2 frames a second
    assert fired(scored.said) == fired(scored.updates) == expected


def test_each_head_has_its_own_refractory_time(tokens, one_by_one):
    model, config = constant(tokens, 1, 1)
    model.decisions = lambda hidden, rows=iter(range(9)): torch.tensor([[1.0], [float(next(rows) >= 2)]])
    live = DecodingConfig({"speaking": 0.5, "dst_update": 0.5}, refractory_s=2, most_text=1)
    [scored] = run((model, config), tokens, example([], 9), live=live)
    assert (fired(scored.said), fired(scored.updates)) == ([0, 4, 8], [2, 6])


def test_a_model_that_never_fires_says_nothing(tokens):
    [scored] = run(tiny(tokens, "speak+dst"), tokens, example())
    assert scored.said == scored.updates == [None] * 26
    assert scored.probabilities == {}


# ---- what is written -----------------------------------------------------------------------------------


def test_a_text_without_an_end_gets_one(tokens):
    model, reads = writer(tokens, "speak", {"assistant": "well done and now"})
    [scored] = run(model, tokens, example([], 2), live=DecodingConfig(ALWAYS.thresholds, refractory_s=0, most_text=2))
    assert reads.text(tokens)[0].split(".", 2)[2].startswith(f"F[assistant]{scored.said[0]}.F[assistant]")
    assert tokens.encode(scored.said[0]) == tokens.encode("well done and now")[:2]


def test_a_text_that_ends_at_once_is_an_event_of_no_words(tokens):
    model, reads = writer(tokens, "speak", {"assistant": ""})
    [scored] = run(model, tokens, example([], 2), live=ALWAYS)
    assert scored.said == ["", ""]
    assert reads.text(tokens)[0].split(".", 2)[2] == "F[assistant].F[assistant]"


def test_images_markers_and_rows_without_a_token_are_never_written(tokens):
    unwanted = [tokens.image, *tokens.marker.values(), *range(len(tokens), len(tokens) + 5)]
    model, _ = writer(tokens, "speak", {"assistant": "well done"}, then=unwanted)
    [scored] = run(model, tokens, example([], 2), live=DecodingConfig(ALWAYS.thresholds, refractory_s=0))
    assert scored.said == ["well done", "well done"]


def test_the_last_text_of_a_clip_is_told_though_no_frame_follows(tokens):
    model, _ = writer(tokens, "speak", {"assistant": "well done"})
    [scored] = run(model, tokens, example([], 1), live=DecodingConfig(ALWAYS.thresholds))
    assert scored.said == ["well done"]


# ---- the context's budget ------------------------------------------------------------------------------


@pytest.mark.parametrize(("arm", "state"), [("speak+dst", "[completed]"), ("speak+markers", "[not_started]")])
def test_a_new_context_tells_the_state_that_the_model_itself_made(tokens, arm, state):
    """The reference completes nothing here. Markers say nothing, so nothing can be replayed from them."""
    model, reads = writer(tokens, arm, {"DST_UPDATE": "S1->complete", "assistant": "well"}, max_tokens=OPENING + 70)
    live = DecodingConfig({"speaking": np.inf, "dst_update": -np.inf}, refractory_s=99)
    run(model, tokens, example([dst(104, 105, ("S2", "fail"))], 40), live=live)
    first, second, *_ = reads.text(tokens)
    assert first.startswith(
        "[system]You are a helpful assistant.\nA toy[step]S1: Put the base down[not_started][step]S2: Attach the wheel"
    )
    assert second.startswith(
        "[system]You are a helpful assistant.\nA toy"
        f"[step]S1: Put the base down{state}[step]S2: Attach the wheel[not_started].F"
    )


def test_an_update_among_the_frames_that_are_kept_is_not_told_twice(tokens):
    model, config = tiny(tokens, "speak+dst", max_tokens=OPENING + 85)
    reads, clip = Reads(model, tokens), example([], 120)

    def texts(at: int) -> list[str]:
        reads.ids.clear()
        run(
            (model, config), tokens, clip, script=lambda _, frame: {"DST_UPDATE": "S1->complete"} if frame == at else {}
        )
        return reads.text(tokens)

    end = clip.start_frame + texts(at=-1)[0].count("F")
    _, second, third, *_ = texts(at=end - 8)  # within the quarter that the second context repeats
    assert "down[not_started][step]" in second
    assert second.count("[DST_UPDATE]S1->complete.") == 1
    assert "down[completed][step]" in third
    assert "S1->complete" not in third


def test_the_frames_that_are_kept_are_read_again_as_they_were(tokens):
    model, reads = writer(tokens, "speak", {"assistant": "well done"}, max_tokens=OPENING + 80)
    live = DecodingConfig({"speaking": -np.inf}, refractory_s=2)
    run(model, tokens, example([], 60), live=live)
    first, second = (text.partition("wheel.")[2] for text in reads.text(tokens)[:2])
    assert first.count("[assistant]well done.") > 4
    assert re.fullmatch(r"F{0,4}(\[assistant\]well done\.F{4})+(\[assistant\]well done\.?F{0,3})?", second)


@pytest.mark.parametrize("budget", range(84, 89))
def test_every_decision_is_made_within_the_budget(tokens, budget):
    model, reads = writer(tokens, "speak", {"assistant": "done"}, max_tokens=budget)
    run(model, tokens, example([], 20), live=DecodingConfig({"speaking": -np.inf}, refractory_s=0))
    lengths = [max(j for j, i in enumerate(ids) if i == tokens.image) + 1 for ids in reads.ids]
    assert len(lengths) > 2
    assert all(budget - 5 < length <= budget for length in lengths[:-1])  # a frame with its text has 5 tokens at most


def test_the_budget_leaves_room_for_texts_within_the_model_s_positions(tokens):
    model, config = tiny(tokens, "speak+dst", max_tokens=2000)
    model.vlm.config.text_config.max_position_embeddings = 80
    reads = Reads(model, tokens)
    run(
        (model, config), tokens, example(frames=30), live=DecodingConfig(ALWAYS.thresholds, refractory_s=2, most_text=6)
    )
    assert len(reads.ids) > 2
    assert max(map(len, reads.ids)) <= 80


def test_a_prompt_that_leaves_no_room_for_a_frame_is_the_users_to_mend(tokens):
    clip = example([turn("user", "and now? " * 20, 102, 103)])
    size = len(prompt_ids(clip, tokens, None)) + len(utterance("user", user_texts(clip)[102], tokens)) + 1
    run(tiny(tokens, "speak", max_tokens=size), tokens, clip)
    with pytest.raises(InputError, match=f"clip c0: .* take {size} tokens, but .* {size - 1}; raise --max-tokens"):
        run(tiny(tokens, "speak", max_tokens=size - 1), tokens, clip)


# ---- the model afterwards ------------------------------------------------------------------------------


@contextmanager
def unchanged(model: ProspectModel, clip: ClipExample, tokens: Tokens, config: TrainConfig) -> Iterator[None]:
    """It trains on, attends by segments (only that needs their lengths), and a packed pass gives the same numbers."""
    windows = windows_of([clip], tokens, config)
    before = packed(model, windows)
    model.train()
    yield
    assert model.training
    with pytest.raises(ValueError, match="needs seg_lens"):
        model.body(inputs_embeds=torch.randn(1, 5, 128), use_cache=False)
    assert np.array_equal(packed(model, windows), before)


def test_the_model_is_as_before_whenever_a_clip_is_given_out(tokens):
    model, config = tiny(tokens, "speak+dst")
    clip = example(frames=6)
    with unchanged(model, clip, tokens, config):
        passes = self_fed(model, tokens, [clip, clip], FRAMES, config, NEVER)
        next(passes)


def test_the_model_is_as_before_after_an_error(tokens):
    model, config = tiny(tokens, "speak+dst")
    clip = example(frames=6)
    with unchanged(model, clip, tokens, config), pytest.raises(InputError, match="raise --max-tokens"):
        run((model, TrainConfig(max_tokens=5)), tokens, clip)


def test_a_score_that_is_not_finite_is_named(tokens):
    model = constant(tokens, float("nan"), 0)
    with pytest.raises(NotFiniteError, match="clip c0: its scores are not finite"):
        run(model, tokens, example())
