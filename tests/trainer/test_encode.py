"""encode: the live tower's features on disk, whatever is killed, broken, split into parts, or there already."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from by_hand import clip_example, write_frames, write_shards
from PIL import Image
from transformers import SmolVLMForConditionalGeneration

from trainer.encode import encode
from trainer.features import CachedFeatures, FeatureFile, fingerprint, run_connector, run_tower
from trainer.frame_source import PixelFrames
from trainer.model import tiny_config

# video: its clips' (start, frames) by split. Needed: v0 0..7 and 12..19, v1 0..8, v2 3..9
CLIPS = {"train": [("v0", 0, 6), ("v0", 4, 4), ("v1", 0, 9), ("v0", 12, 8)], "val": [("v2", 3, 7), ("v0", 13, 2)]}
NEEDED = {"v0": [*range(8), *range(12, 20)], "v1": [*range(9)], "v2": [*range(3, 10)]}
NAMES = [f"{video}.2fps.safetensors" for video in NEEDED]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random one and its folder; 4 tokens a frame, of 256 values before the connector and 128 after it."""
    torch.manual_seed(0)
    config = tiny_config(64)
    config.scale_factor = 2
    vlm, folder = SmolVLMForConditionalGeneration(config).eval(), tmp_path_factory.mktemp("model")
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
        features = run_tower(vlm, torch.from_numpy(pixels), k)
        return (run_connector(vlm, features) if keep == "connector" else features).numpy()


def cached(vlm, out, video, frames, k=1, keep="vision") -> np.ndarray:
    source = CachedFeatures(out, fingerprint(vlm, keep), k)
    return np.concatenate([source.load(clip_example([], video=video), n, n + 1) for n in frames])


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("keep", "store", "tolerance"),
    [("vision", "float16", 1e-3), ("vision", "float32", 1e-6), ("connector", "float16", 2e-3)],
)
def test_cached_features_are_the_live_ones(model, root, data, tmp_path, keep, store, tolerance):
    (vlm, folder), out = model, tmp_path / "out"
    report = encode(data, out, folder, 4, dtype="float32", store=store, batch=3, keep=keep)
    assert (report.videos, report.skipped, report.frames, report.refused) == (3, 0, 32, [])
    assert report.bytes == sum(map(len, files(out).values()))
    for (video, frames), name in zip(NEEDED.items(), NAMES, strict=True):
        assert FeatureFile(out / name).frames.tolist() == frames
        found = cached(vlm, out, video, frames, 4, keep)
        assert (found.shape, found.dtype) == ((len(frames), 4, 256 if keep == "vision" else 128), store)
        assert apart(found, live(vlm, root, video, frames, 4, keep)) < tolerance
    pooled = cached(vlm, out, "v0", [3, 14], 1, keep)
    assert apart(pooled, live(vlm, root, "v0", [3, 14], 1, keep)) < 2 * tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["vision", "connector"])
def test_a_gpu_encodes_what_a_cpu_does_also_where_copies_overlap(model, root, data, tmp_path, keep):
    vlm, folder = model
    encode(data, tmp_path / "out", folder, 4, dtype="float32", store="float32", batch=2, keep=keep)
    for video, frames in NEEDED.items():
        expected = live(vlm, root, video, frames, 4, keep)
        assert apart(cached(vlm, tmp_path / "out", video, frames, 4, keep), expected) < 1e-3
    assert encode(data, tmp_path / "auto", folder, batch=2, keep=keep).computed == "bfloat16"


def test_a_second_run_does_only_what_is_new_damaged_or_of_other_options(model, root, data, tmp_path):
    (vlm, folder), out = model, tmp_path / "out"
    out.mkdir()
    (out / f".{NAMES[1]}.89abcdef.new").write_bytes(b"what kill -9 leaves")
    assert encode(data, out, folder, dtype="bfloat16").computed == "bfloat16"
    assert not list(out.glob("*.new"))
    assert 1e-5 < apart(cached(vlm, out, "v1", range(9)), live(vlm, root, "v1", range(9))) < 3e-2
    assert encode(data, out, folder, dtype="float32").videos == 3
    assert encode(data, out, folder, dtype="float32").skipped == 3
    more = shards(tmp_path / "more", {"train": [("v1", 5, 10), ("v2", 4, 2)]}, root)
    report = encode(more, out, folder)
    assert (report.videos, report.skipped, report.frames) == (1, 1, 15)  # v1 0..14: the old ones stay
    content = bytearray((out / NAMES[0]).read_bytes())
    content[-9] ^= 1
    (out / NAMES[0]).write_bytes(content)
    write_frames(root / "v1.arrow", [np.zeros((64, 64, 3), np.uint8)] * 20)  # another file than before
    report = encode(data, out, folder)
    assert (report.videos, report.skipped) == (2, 1)
    assert apart(cached(vlm, out, "v1", [2]), live(vlm, root, "v1", [2])) < 1e-2


def test_videos_that_cannot_be_read_or_are_short_are_named_and_the_rest_is_done(model, root, data, tmp_path):
    """TRAPS 7: annotations longer than the frames cost the clips that reach beyond, not the whole video."""
    write_frames(root / "v0.arrow", [np.zeros((64, 64, 3), np.uint8)] * 15)
    (root / "v1.arrow").unlink()
    (root / "v2" / "0006.png").write_bytes(b"no image")
    report = encode(data, tmp_path / "out", model[1], batch=2)
    assert (report.videos, list(files(tmp_path / "out"))) == (1, NAMES[:1])
    assert FeatureFile(tmp_path / "out" / NAMES[0]).frames.max() == 14
    short, missing, broken = report.refused
    assert short == "video v0: 15 frames, but its clips need 20; those that are there are encoded"
    assert missing.startswith("video v1: clip train2: no frames of v1 below")
    assert "v2 frame 5: no JPEG or PNG" in broken


def test_the_parts_or_a_mapper_s_tasks_together_write_what_one_run_writes(model, data, tmp_path):
    """The mapper has a task per video; what it needs goes through pickle, to a process that knows nothing."""

    def mapper(function, calls):
        for call in calls:
            yield pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(call)))))

    kept = {"model": model[1], "batch": 3, "keep": "connector"}
    encode(data, tmp_path / "whole", **kept)
    reports = [encode(data, tmp_path / "parts", part=f"{i + 1}/4", **kept) for i in range(4)]
    assert sum(report.videos for report in reports) == 3  # none twice, also where parts are left without any
    assert encode(data, tmp_path / "there", mapper=mapper, **kept).frames == 32
    assert files(tmp_path / "parts") == files(tmp_path / "there") == files(tmp_path / "whole")
