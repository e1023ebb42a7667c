"""encode: the live tower's features on disk, whatever is killed, broken, shared between machines, or there already."""

from __future__ import annotations

import dataclasses
import pickle
import re

import numpy as np
import pytest
import torch
from by_hand import clip_example, write_frames, write_shards
from PIL import Image
from transformers import SmolVLMForConditionalGeneration

from pipeline.errors import InputError
from pipeline.storage import lock
from trainer import encode as module
from trainer import vision
from trainer.encode import encode
from trainer.features import CachedFeatures, FeatureFile
from trainer.frame_source import PixelFrames
from trainer.model import tiny_config

# video: its clips' (start, frames) by split. Needed: v0 0..7 and 12..19, v1 0..8, v2 3..9
CLIPS = {"train": [("v0", 0, 6), ("v0", 4, 4), ("v1", 0, 9), ("v0", 12, 8)], "val": [("v2", 3, 7), ("v0", 13, 2)]}
NEEDED = {"v0": [*range(8), *range(12, 20)], "v1": [*range(9)], "v2": [*range(3, 10)]}
NAMES = [f"{video}.2fps.safetensors" for video in NEEDED]


def a_model(scale: int) -> SmolVLMForConditionalGeneration:
    """Random, with 16 / scale^2 tokens a frame of 64 * scale^2 values before the connector and 128 after it."""
    torch.manual_seed(0)
    config = tiny_config(64)
    config.scale_factor = scale
    return SmolVLMForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def vlm():
    return a_model(1)


@pytest.fixture(scope="module")
def model(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vlm.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """One whose connector makes features smaller, and its folder."""
    vlm, folder = a_model(2), tmp_path_factory.mktemp("narrow")
    vlm.save_pretrained(folder)
    return vlm, str(folder)


@pytest.fixture
def root(tmp_path):
    """20 frames of noise of each video: two Arrow files and a folder of images."""
    rng = np.random.default_rng(0)
    for name in ("v0", "v1"):
        write_frames(tmp_path / "frames" / f"{name}.arrow", list(rng.integers(0, 256, (20, 64, 64, 3), np.uint8)))
    (tmp_path / "frames" / "v2").mkdir()
    for i in range(20):
        frame = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
        frame.save(tmp_path / "frames" / "v2" / f"{i + 1:04d}.png")
    return tmp_path / "frames"


@pytest.fixture
def data(root, tmp_path):
    return shards(tmp_path / "data", CLIPS, root)


def shards(out, clips, root):
    made = {
        split: [
            clip_example([], start, frames, clip_id=f"{split}{i}", clip=i, video=video)
            for i, (video, start, frames) in enumerate(chosen)
        ]
        for split, chosen in clips.items()
    }
    return write_shards(out, made, root)


def files(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(".lock")}


def live(vlm, root, video, frames, k=1, keep="vision") -> np.ndarray:
    source = PixelFrames(root, 64)
    pixels = np.concatenate([source.load(clip_example([], video=video), n, n + 1) for n in frames])
    with torch.inference_mode():
        features = vision.look(vlm, torch.from_numpy(pixels), k)
        return (vision.project(vlm, features) if keep == "connector" else features).numpy()


def cached(vlm, out, video, frames, k=1, keep="vision") -> np.ndarray:
    source = CachedFeatures(out, vision.fingerprint(vlm, keep), k, keep)
    return np.concatenate([source.load(clip_example([], video=video), n, n + 1) for n in frames])


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("store", "tolerance"), [("float16", 1e-3), ("float32", 1e-6)])
def test_cached_features_are_the_live_ones(vlm, model, root, data, tmp_path, store, tolerance):
    report = encode(data, tmp_path / "out", model, 4, dtype="float32", store=store, batch=3)
    assert (report.videos, report.skipped, report.frames, report.refused) == (3, 0, 32, [])
    assert report.bytes == sum(map(len, files(tmp_path / "out").values()))
    for video, frames in NEEDED.items():
        assert FeatureFile(tmp_path / "out" / f"{video}.2fps.safetensors").frames.tolist() == frames
        found = cached(vlm, tmp_path / "out", video, frames, 4)
        assert (found.shape, found.dtype) == ((len(frames), 4, 64), store)
        assert apart(found, live(vlm, root, video, frames, 4)) < tolerance
    assert apart(cached(vlm, tmp_path / "out", "v0", [3, 14]), live(vlm, root, "v0", [3, 14])) < 2 * tolerance
    header = FeatureFile(tmp_path / "out" / NAMES[0]).header
    assert (header["source"], header["computed"], header["side"]) == ("v0.arrow", "float32", "64")


def test_the_connector_s_output_can_be_kept_instead(narrow, root, data, tmp_path):
    vlm, model = narrow
    for skipped in (0, 3):
        report = encode(data, tmp_path / "out", model, 4, dtype="float32", keep="connector")
        assert report.skipped == skipped
    for k in (4, 1):
        found = cached(vlm, tmp_path / "out", "v1", range(2, 5), k, "connector")
        assert found.shape == (3, k, 128)
        assert apart(found, live(vlm, root, "v1", range(2, 5), k, "connector")) < 2e-3
    with pytest.raises(InputError, match=r"features of the layer connector, and kept; choose another --out, or --ke"):
        encode(data, tmp_path / "out", model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("keep", ["vision", "connector"])
def test_a_gpu_encodes_what_a_cpu_does_also_where_copies_overlap(narrow, root, data, tmp_path, keep):
    vlm, model = narrow
    encode(data, tmp_path / "out", model, 4, dtype="float32", store="float32", batch=2, keep=keep)
    for video, frames in NEEDED.items():
        expected = live(vlm, root, video, frames, 4, keep)
        assert apart(cached(vlm, tmp_path / "out", video, frames, 4, keep), expected) < 1e-3
    assert encode(data, tmp_path / "auto", model, batch=2, keep=keep).computed == "bfloat16"


def test_a_killed_run_goes_on_where_it_was(vlm, model, root, data, tmp_path, monkeypatch):
    out, passes, original = tmp_path / "out", [], module.Tower._look

    def until_killed(tower, pixels):
        passes.append(len(pixels))
        if len(passes) == 6:
            raise KeyboardInterrupt
        return original(tower, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(module.Tower, "_look", until_killed)
        with pytest.raises(KeyboardInterrupt):
            encode(data, out, model, batch=4)
    assert passes == [4, 4, 4, 4, 4, 4]  # v0 takes four, v1 three
    assert list(files(out)) == NAMES[:1]
    (out / f".{NAMES[1]}.89abcdef.new").write_bytes(b"what kill -9 leaves")
    report = encode(data, out, model, batch=4)
    assert (report.videos, report.skipped, report.frames) == (2, 1, 16)
    assert list(files(out)) == NAMES
    assert apart(cached(vlm, out, "v1", range(9)), live(vlm, root, "v1", range(9))) < 1e-3


def test_a_second_run_does_only_what_is_new_damaged_or_better(vlm, model, root, data, tmp_path):
    out = tmp_path / "out"
    assert encode(data, out, model, dtype="bfloat16").computed == "bfloat16"
    assert 1e-5 < apart(cached(vlm, out, "v1", range(9)), live(vlm, root, "v1", range(9))) < 3e-2
    assert encode(data, out, model, dtype="float32").videos == 3
    assert encode(data, out, model, dtype="bfloat16").skipped == 3
    more = shards(tmp_path / "more", {"train": [("v1", 5, 10), ("v2", 4, 2)]}, root)
    report = encode(more, out, model)
    assert (report.videos, report.skipped, report.frames) == (1, 1, 15)  # v1 0..14: the old ones stay
    content = bytearray((out / NAMES[0]).read_bytes())
    content[-9] ^= 1
    (out / NAMES[0]).write_bytes(content)
    report = encode(data, out, model)
    assert (report.videos, report.skipped) == (1, 2)
    assert encode(data, out, model, 4).videos == 3
    write_frames(root / "v1.arrow", [np.zeros((64, 64, 3), np.uint8)] * 20)  # another file than before
    assert encode(data, out, model, 4).videos == 1
    assert apart(cached(vlm, out, "v1", [2], 4), live(vlm, root, "v1", [2], 4)) < 1e-2


def test_features_of_another_tower_are_kept_and_refused(model, data, tmp_path):
    encode(data, tmp_path / "out", model)
    before, other = files(tmp_path / "out"), a_model(1)
    with torch.no_grad():
        other.model.vision_model.post_layernorm.weight.mul_(1e6)
    other.save_pretrained(tmp_path / "run" / "last")  # a run is a model
    with pytest.raises(InputError, match=r"v0.2fps.safetensors: made by another vision tower \(.*\), and kept"):
        encode(data, tmp_path / "out", str(tmp_path / "run"))
    assert files(tmp_path / "out") == before
    with pytest.raises(InputError, match=r"video v0: features that are too large for float16.*use --store float32"):
        encode(data, tmp_path / "loud", str(tmp_path / "run"))
    assert not files(tmp_path / "loud")
    assert encode(data, tmp_path / "loud", str(tmp_path / "run"), store="float32").videos == 3


def test_videos_that_cannot_be_read_are_named_and_the_rest_is_done(model, root, data, tmp_path):
    (root / "v0.arrow").unlink()
    (root / "v2" / "0006.png").write_bytes(b"no image")
    report = encode(data, tmp_path / "out", model, batch=2)
    assert (report.videos, report.frames) == (1, 9)
    assert list(files(tmp_path / "out")) == NAMES[1:2]
    missing, broken = report.refused
    assert missing.startswith("video v0: clip train0: no frames of v0 below")
    assert broken.startswith("video v2: ")
    assert "v2 frame 5: no JPEG or PNG" in broken
    (root / "v1.arrow").write_bytes(b"no Arrow file")
    with pytest.raises(InputError, match="none of 3 videos can be encoded; video v0: clip train0: no frames"):
        encode(data, tmp_path / "other", model)


def test_of_a_short_video_what_is_there_is_encoded_and_the_rest_is_named(model, root, data, tmp_path):
    """TRAPS 7: annotations longer than the frames cost the clips that reach beyond, not the whole video."""
    write_frames(root / "v0.arrow", [np.zeros((64, 64, 3), np.uint8)] * 15)
    report = encode(data, tmp_path / "out", model, batch=2)
    assert report.refused == ["video v0: 15 frames, but its clips need 20; those that are there are encoded"]
    assert FeatureFile(tmp_path / "out" / NAMES[0]).frames.max() == 14


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "tiny"}, "model is tiny: its tower knows nothing"),
        ({"k": 3}, "tokens_per_frame is 3, expected a square number"),
        ({"k": 25}, "tokens_per_frame is 25, but .* has 16"),
        ({"dtype": "float16"}, "dtype is 'float16', expected one of auto, float32, bfloat16"),
        ({"store": "int8"}, "store is 'int8', expected one of float16, float32"),
        ({"keep": "text"}, "keep is 'text', expected one of vision, connector"),
        ({"keep": "connector"}, "keep is connector, but .* has 128 values after it and 64 before; use --keep vision"),
        ({"batch": 0}, "batch is 0, expected above 0"),
        ({"part": (5, 4)}, "part is 5/4, expected 1/N to N/N"),
    ],
)
def test_wrong_options_are_named_before_anything_is_done(model, data, tmp_path, wrong, message):
    with pytest.raises(InputError, match=message):
        encode(data, tmp_path / "out", **{"model": model, **wrong})
    assert not (tmp_path / "out").exists()


# ---- several machines --------------------------------------------------------------------------------


def test_the_parts_together_write_what_one_run_writes(model, data, tmp_path):
    encode(data, tmp_path / "whole", model, batch=3)
    reports = [encode(data, tmp_path / "parts", model, batch=3, part=(i + 1, 4)) for i in range(4)]
    assert sum(report.videos for report in reports) == 3  # none twice, also where parts are left without any
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert encode(data, tmp_path / "parts", model).skipped == 3


def test_parts_write_into_one_folder_at_once_but_no_part_twice(model, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with lock(out / ".lock-1-of-4", InputError("taken")):
        for name in NAMES:  # v0 and v1 fall to part 1, v2 to part 3
            (out / f".{name}.0123abcd.new").write_bytes(b"half")
        assert encode(data, out, model, part=(3, 4)).videos == 1
        assert list(files(out)) == [f".{NAMES[0]}.0123abcd.new", f".{NAMES[1]}.0123abcd.new", NAMES[2]]
        with pytest.raises(InputError, match="out: another run of part 1/4 is writing there; choose another --out"):
            encode(data, out, model, part=(1, 4))
    encode(data, out, model, part=(1, 4))
    assert list(files(out)) == NAMES


def test_a_mapper_gets_a_task_per_video_and_the_result_is_the_same(narrow, root, data, tmp_path):
    """Each task in a process that knows nothing: what it needs goes through pickle. Each is done twice."""
    (root / "v2" / "0006.png").write_bytes(b"no image")
    called = []

    def mapper(function, calls):
        for call in calls:
            called.append(function.__name__)
            yield [pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(call))))) for _ in range(2)][1]

    def counts(report) -> dict:
        """All but how long; Pillow names an object's address."""
        return dataclasses.asdict(report) | {"seconds": 0, "refused": [re.sub("0x.*?>", "", r) for r in report.refused]}

    here = encode(data, tmp_path / "here", narrow[1], batch=2, keep="connector")
    there = encode(data, tmp_path / "there", narrow[1], batch=2, keep="connector", mapper=mapper)
    assert called == ["_device_type", *["_encode_there"] * 3]
    assert counts(there) == counts(here)
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert list(files(tmp_path / "here")) == NAMES[:2]
