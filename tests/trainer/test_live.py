"""What one pass of the live engine costs the host on a GPU, and the pass of fixed shape that a CUDA graph replays.

There is no GPU here: fake CUDA tensors show which operations run where, and what would be a graph runs as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import smollm2
import torch
from by_hand import NoisyFrames
from counting import Waits
from test_selffed import example, streamed, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import SmolVLMForConditionalGeneration

from trainer.arms import ARMS
from trainer.config import TrainConfig
from trainer.live.cuda_graph import FixedLook, FixedPass
from trainer.live.engine import Engine, Read, slots_for, streaming
from trainer.live.rollout import self_fed
from trainer.live.session import DecodingConfig
from trainer.model import DecisionHeads, ProspectModel, tiny_config
from trainer.tokenizer import Tokens, train_tiny_tokens


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return train_tiny_tokens(["S1: Put the base down", "S1->complete, S2->start", "well done", "and now?"] * 3)


# ---- the pass of fixed shape ---------------------------------------------------------------------------


@pytest.fixture
def fixed(monkeypatch) -> list[int]:
    """A single stream's short reads have a fixed shape on the CPU too; the tokens of each."""
    read, lengths = FixedPass.read, []

    def noted(self, parts, after):
        lengths.append(sum(map(len, parts)))
        return read(self, parts, after)

    monkeypatch.setattr("trainer.live.engine.GRAPHED", ("cpu",))
    monkeypatch.setattr(FixedPass, "read", noted)
    return lengths


def talkative(model: ProspectModel, config: TrainConfig, tokens: Tokens, **more):
    """A clip in which the context starts over, and the model speaks and keeps a state by itself."""
    live = DecodingConfig({"speaking": 0.0, "dst_update": 0.0}, refractory_s=2, most_text=4)
    [scored] = self_fed(model, tokens, [example(frames=60)], NoisyFrames(), config, live, **more)
    return scored


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("k", [1, 4])
def test_a_pass_of_fixed_shape_has_the_numbers_and_texts_of_the_engine(tokens, arm, k, request):
    model, config = tiny(tokens, arm, k, max_tokens=70 + 20 * k)
    expected = talkative(model, config, tokens)
    lengths = request.getfixturevalue("fixed")
    found = talkative(model, config, tokens)
    assert np.abs(streamed(found) - streamed(expected)).max() < 1e-4
    assert (found.said, found.updates) == (expected.said, expected.updates)
    assert sum(said is not None for said in found.said) > 4
    assert {1, 2 * k} <= set(lengths)  # a written token, or a frame; two frames, read ahead
    assert max(lengths) <= 16


def test_what_a_slab_holds_past_the_context_is_never_seen(tokens, fixed, monkeypatch):
    model, config = tiny(tokens, "speak+dst", max_tokens=90)
    expected = talkative(model, config, tokens)
    made = FixedPass.__init__

    def filled(self, *args):
        made(self, *args)
        for slab in self._slabs:
            for tensor in slab:
                tensor.fill_(1e3)

    monkeypatch.setattr(FixedPass, "__init__", filled)
    assert np.array_equal(streamed(talkative(model, config, tokens)), streamed(expected))


def test_in_bfloat16_it_is_as_near_as_bfloat16_is(tokens, request):
    model, config = tiny(tokens, "speak+dst", bf16=True)
    never = DecodingConfig({"speaking": np.inf, "dst_update": np.inf})

    def logits():
        [scored] = self_fed(model, tokens, [example()], NoisyFrames(), config, never, slots=1)
        return streamed(scored)

    expected = logits()
    lengths = request.getfixturevalue("fixed")
    assert np.abs(logits() - expected).max() < 0.1
    assert len(lengths) > 5


def test_where_no_graph_can_be_made_the_engine_reads_as_it_does_elsewhere(tokens, fixed, monkeypatch):
    model, config = tiny(tokens, "speak+dst", max_tokens=90)
    tried: list[int] = []

    def fails(self, parts, after):
        tried.append(after)
        self._graph.failed = True

    monkeypatch.setattr(FixedPass, "read", fails)
    found = talkative(model, config, tokens)
    monkeypatch.setattr("trainer.live.engine.GRAPHED", ())
    assert np.array_equal(streamed(found), streamed(talkative(model, config, tokens)))
    assert len(tried) == 1


def test_several_streams_and_long_texts_are_read_otherwise(tokens, fixed):
    model, config = tiny(tokens, "speak+dst")
    clips = [example(frames=3, clip_id=name, video=name) for name in "ab"]
    never = DecodingConfig({"speaking": np.inf, "dst_update": np.inf})
    list(self_fed(model, tokens, clips, NoisyFrames(), config, never))
    assert fixed == []
    list(self_fed(model, tokens, clips, NoisyFrames(), config, never, slots=1))
    assert fixed
    assert max(fixed) <= 16


def test_a_context_that_is_full_is_an_error(tokens, fixed):
    model, config = tiny(tokens, "speak+dst")

    def steps():
        yield Read([[5] * 20], 0, [20])
        yield Read([[5] * 5], 20, [5])

    with streaming(model, config), pytest.raises(ValueError, match="25 tokens in a context of at most 24"):
        Engine(model, tokens, 1, 24).run(steps())


# ---- what the host waits for ---------------------------------------------------------------------------


def test_no_layer_of_a_pass_waits(tokens, fixed, monkeypatch):
    """On real tensors, as transformers looks at the positions of real ones only."""
    counting, passes, body = Waits("cpu"), [0], torch.nn.Module.__call__

    def counted(self, *args, **given):
        if "reading" not in given or "inputs_embeds" not in given:
            return body(self, *args, **given)
        passes[0] += 1
        with counting:
            return body(self, *args, **given)

    model, config = tiny(tokens, "speak+dst", max_tokens=90)
    clips = [example(frames=20 + 3 * i, clip_id=f"c{i}", video=f"v{i}") for i in range(3)]
    live = DecodingConfig({"speaking": 0.0, "dst_update": 0.0}, refractory_s=2, most_text=4)
    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    for slots in (1, 3):
        list(self_fed(model, tokens, clips, NoisyFrames(), config, live, slots=slots))
    assert passes[0] > 50
    assert counting.found == []


@contextmanager
def fake_gpu(monkeypatch):
    """CUDA tensors without data; what a pass downloads is counted, and zeros."""
    downloads: list[int] = []

    def download(found: torch.Tensor) -> np.ndarray:
        assert found.device.type == "cuda"
        downloads.append(len(found))
        return np.zeros(len(found), np.float32)

    monkeypatch.setattr("trainer.live.engine.download", download)
    monkeypatch.setattr("trainer.live.cuda_graph.download", download)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr("trainer.live.cuda_graph._Graph.run", lambda self, step: step())
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("torch._subclasses.fake_tensor.CONSTANT_NUMEL_LIMIT", 0)  # one value has no value either
    dynamic = ShapeEnv(allow_dynamic_output_shape_ops=True)  # transformers 5.17 looks for the patches that are there
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=dynamic):
        yield downloads


def test_the_counter_counts(monkeypatch):
    with fake_gpu(monkeypatch):
        values = torch.zeros(4, device="cuda")
        for wait in (
            lambda: values[values > 0],
            lambda: values.cpu(),
            lambda: values.to("cpu", non_blocking=True),
            lambda: torch.zeros(4).to("cuda"),
            lambda: torch.tensor([1, 2], device="cuda"),
            lambda: values.__setitem__(values > 0, values),
        ):
            with Waits("cuda") as counting, suppress(Exception):  # fake values have no sizes
                wait()
            assert len(counting.found) == 1
        with Waits("cuda") as counting:
            torch.zeros(4).to("cuda", non_blocking=True)
            values[:, None].expand(4, 4).index_select(0, values.long())
        assert counting.found == []


def stream_of(features: torch.Tensor, prompt: int):
    """A prompt, frames, a written text, and that the context starts over."""
    k = len(features)

    def steps():
        for _ in range(2):
            yield Read([[5] * prompt], 0, [prompt])
            yield Read([features], prompt, [k])
            yield Read([features, features], prompt + k, [k, 2 * k])
            yield Read([[5]], prompt + 3 * k, None)
            yield Read([[5], features], prompt + 3 * k + 1, [k + 1])

    return steps()


def fake_engine_waits(config, tokens: Tokens, monkeypatch, slots: int, graphed: Sequence[str], arm: str = "speak+dst"):
    """(waits beside the downloads, downloads, passes) of streams on a fake GPU and of a look at a frame."""
    monkeypatch.setattr("trainer.live.engine.GRAPHED", graphed)
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.float32  # as weights are loaded
    passes = [0]
    with fake_gpu(monkeypatch) as downloads:
        train = TrainConfig(arm=arm, bf16=True)
        with torch.device("cuda"):
            vlm = SmolVLMForConditionalGeneration(config)
            model = ProspectModel(vlm, DecisionHeads(config.text_config.hidden_size), train, tokens.end).eval()
        model.body.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
        with streaming(model, train):
            engine, look = Engine(model, tokens, slots, 300), FixedLook(model)
            look(np.zeros((3, model.side, model.side), np.uint8))  # makes room for a frame
            with Waits("cuda") as counting:
                features = look(np.zeros((3, model.side, model.side), np.uint8))
                streams = [stream_of(features, 30 + 10 * i) for i in range(slots)]
                assert len(list(engine.run_all(iter(streams)))) == slots
    return counting.found, len(downloads), passes[0]


@pytest.mark.parametrize(
    ("slots", "graphed", "arm"), [(1, (), "speak+dst"), (1, ("cuda",), "lm-eos"), (3, ("cuda",), "lm-eos")]
)
def test_a_pass_on_a_gpu_waits_once_for_its_result(tokens, slots, graphed, arm, monkeypatch):
    found = fake_engine_waits(tiny_config(len(tokens)), tokens, monkeypatch, slots, graphed, arm)
    assert found == ([], 10, 10)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["256M", "2.2B"])
@pytest.mark.parametrize(("slots", "graphed"), [(1, ("cuda",)), (2, ("cuda",))])
def test_the_released_sizes_run_on_a_gpu_without_data(tokens, size, slots, graphed, monkeypatch, tmp_path):
    config = smollm2.released_config(size, tmp_path)
    assert fake_engine_waits(config, tokens, monkeypatch, slots, graphed) == ([], 10, 10)


# ---- memory --------------------------------------------------------------------------------------------


def test_half_of_a_gpu_s_free_memory_is_for_keys_and_values(tokens, monkeypatch):
    model, _ = tiny(tokens, "speak+dst")
    assert slots_for(model, 1000) == 64
    monkeypatch.setattr(ProspectModel, "device", torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20_000_000, 80_000_000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 9_000_000)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 4_000_000)
    assert slots_for(model, 1000) == 12  # 12.5 MB; 4 layers of keys and values, 2 heads, 32 bfloat16: 1,024 B a token
    assert slots_for(model, 10_000) == 1
