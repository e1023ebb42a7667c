"""What one pass of the live engine costs the host on a GPU, and the pass of fixed shape that a CUDA graph replays.

There is no GPU here: fake CUDA tensors show which operations run where, and what would be a graph runs as it is.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import smollm2
import torch
from counting import Waits
from live_model import example, logits_of, often, run, tiny, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import SmolVLMForConditionalGeneration

from trainer.arms import ARMS
from trainer.config import TrainConfig
from trainer.live.cuda_graph import StaticPass, StaticVision
from trainer.live.engine import Engine, ReadRequest, slots_for, streaming
from trainer.live.session import DecodingConfig
from trainer.model import DecisionHeads, ProspectModel, tiny_config

TALKATIVE = DecodingConfig({"speaking": 0.0, "dst_update": 0.0}, refractory_s=2, max_text=4)


# ---- the pass of fixed shape ---------------------------------------------------------------------------


@pytest.fixture
def static_reads(monkeypatch) -> list[int]:
    """A single session's short reads have a fixed shape on the CPU, too; the tokens of each."""
    read, lengths = StaticPass.read, []

    def noted(self, parts, prefix):
        lengths.append(sum(map(len, parts)))
        return read(self, parts, prefix)

    monkeypatch.setattr("trainer.live.engine.GRAPHED", ("cpu",))
    monkeypatch.setattr(StaticPass, "read", noted)
    return lengths


@pytest.mark.parametrize(("arm", "k"), [("speak+dst", 1), ("speak+dst", 4), ("lm-eos", 1), ("token", 1), ("frames", 4)])
def test_a_pass_of_fixed_shape_has_the_numbers_and_texts_of_the_engine(arm, k, request):
    model, clip = tiny(arm, k, max_tokens=70 + 20 * k), example(frames=60)
    decoding = often(model, clip)
    [expected] = run(model, clip, decoding=decoding)
    lengths = request.getfixturevalue("static_reads")
    [scored] = run(model, clip, decoding=decoding)
    assert np.abs(logits_of(scored) - logits_of(expected)).max() < 1e-4
    assert (scored.said, scored.updates) == (expected.said, expected.updates)
    assert sum(text is not None for text in scored.said) > 4
    assert {1 if ARMS[arm].texts else k, 2 * k} <= set(lengths)  # a written token, or a frame; two frames, read ahead
    assert max(lengths) <= 16


def test_what_a_slab_holds_past_the_session_is_never_seen(static_reads, monkeypatch):
    model, clip = tiny(max_tokens=90), example(frames=30)
    [expected] = run(model, clip, decoding=TALKATIVE)
    construct = StaticPass.__init__

    def filled(self, *args):
        construct(self, *args)
        for keys, values in self._slabs:
            keys.fill_(1e3)
            values.fill_(1e3)

    monkeypatch.setattr(StaticPass, "__init__", filled)
    [scored] = run(model, clip, decoding=TALKATIVE)
    assert np.array_equal(logits_of(scored), logits_of(expected))


def test_where_no_graph_can_be_made_the_engine_reads_without(static_reads, monkeypatch):
    monkeypatch.setattr(StaticPass, "read", lambda self, parts, prefix: static_reads.append(prefix))
    model, clip = tiny(max_tokens=90), example(frames=30)
    [scored] = run(model, clip, decoding=TALKATIVE)
    assert static_reads
    monkeypatch.setattr("trainer.live.engine.GRAPHED", ())
    assert np.array_equal(logits_of(scored), logits_of(run(model, clip, decoding=TALKATIVE)[0]))


def test_several_sessions_and_long_texts_are_read_without_it(static_reads):
    clips = [example(frames=3, clip_id=name, video=name) for name in "ab"]
    run(tiny(), *clips)
    assert static_reads == []
    run(tiny(), *clips, slots=1)
    assert 0 < max(static_reads) <= 16


# ---- what the host waits for ---------------------------------------------------------------------------


def test_no_layer_of_a_pass_waits(static_reads, monkeypatch):
    """On real tensors, as transformers looks at the positions of real ones only."""
    counting, passes, call = Waits("cpu"), [], torch.nn.Module.__call__

    def counted(self, *args, **kwargs):
        if "plan" not in kwargs or "inputs_embeds" not in kwargs:
            return call(self, *args, **kwargs)
        passes.append(self)
        with counting:
            return call(self, *args, **kwargs)

    model = tiny(max_tokens=90)
    clips = [example(frames=10 + 3 * i, clip_id=f"c{i}", video=f"v{i}") for i in range(3)]
    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    for slots in (1, 3):
        run(model, *clips, decoding=TALKATIVE, slots=slots)
    assert len(passes) > 30
    assert counting.found == []


@contextmanager
def fake_gpu(monkeypatch):
    """CUDA tensors without data; what a pass downloads is counted, and zeros."""
    downloads: list[int] = []

    def download(result: torch.Tensor) -> np.ndarray:
        assert result.device.type == "cuda"
        downloads.append(len(result))
        return np.zeros(len(result), np.float32)

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


def requests(features: torch.Tensor, prompt: int):
    """A prompt, frames, a written text, and a context that starts over: ten reads."""
    k = len(features)
    for _ in range(2):
        yield ReadRequest([[5] * prompt], 0, [prompt])
        yield ReadRequest([features], prompt, [k])
        yield ReadRequest([features, features], prompt + k, [k, 2 * k])
        yield ReadRequest([[5]], prompt + 3 * k)
        yield ReadRequest([[5], features], prompt + 3 * k + 1, [k + 1])


def counts_on_a_fake_gpu(config, monkeypatch, slots: int, graphed: tuple[str, ...], arm: str):
    """(waits beside the downloads, downloads, passes) of sessions on a fake GPU and of one frame's features."""
    monkeypatch.setattr("trainer.live.engine.GRAPHED", graphed)
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.float32  # as weights are loaded
    passes: list[object] = []
    with fake_gpu(monkeypatch) as downloads:
        train = TrainConfig(arm=arm, bf16=True)
        with torch.device("cuda"):
            vlm = SmolVLMForConditionalGeneration(config)
            model = ProspectModel(vlm, DecisionHeads(config.text_config.hidden_size), train, tokens().choices).eval()
        model.body.register_forward_pre_hook(lambda module, _: passes.append(module))
        with streaming(model, train):
            engine, vision = Engine(model, tokens(), slots, 300), StaticVision(model)
            frame = np.zeros((3, model.side, model.side), np.uint8)
            vision(frame)  # allocates
            with Waits("cuda") as counting:
                features = vision(frame)
                sessions = [requests(features, 30 + 10 * i) for i in range(slots)]
                assert len(list(engine.run_all(iter(sessions)))) == slots
    return counting.found, len(downloads), len(passes)


@pytest.mark.parametrize(
    ("slots", "graphed", "arm"), [(1, (), "speak+dst"), (1, ("cuda",), "lm-eos"), (3, ("cuda",), "lm-eos")]
)
def test_a_pass_on_a_gpu_waits_once_for_its_result(slots, graphed, arm, monkeypatch):
    assert counts_on_a_fake_gpu(tiny_config(len(tokens())), monkeypatch, slots, graphed, arm) == ([], 10, 10)


@pytest.mark.parametrize(("size", "slots"), [("256M", 2), ("2.2B", 1)])
def test_the_released_shapes_run_on_a_gpu_without_data(size, slots, monkeypatch, tmp_path):
    config = smollm2.released_config(size, tmp_path)
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 2  # all layers are alike
    assert counts_on_a_fake_gpu(config, monkeypatch, slots, ("cuda",), "speak+dst") == ([], 10, 10)


def test_half_of_a_gpu_s_free_memory_is_for_keys_and_values(monkeypatch):
    model, _ = tiny()
    assert slots_for(model, 1000) == 64
    monkeypatch.setattr(ProspectModel, "device", torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (20_000_000, 80_000_000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 9_000_000)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 4_000_000)
    assert slots_for(model, 1000) == 12  # 12.5 MB; 4 layers of keys and values, 2 heads, 32 bfloat16: 1,024 B a token
    assert slots_for(model, 10_000) == 1
