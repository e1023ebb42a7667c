"""Cached features: a window's own rows, provenance, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch
from by_hand import clip_example
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.errors import InputError
from trainer import vision
from trainer.features import CachedFeatures, FeatureFile, Provenance, feature_path, kept_layer, write_features

TOWER = "0123456789abcdef"


def numbered(frames, k: int = 1, stored: str = "float16") -> np.ndarray:
    """[N, k, 3]: frame f, token t, value j is f + t / 10 + j / 100."""
    frames = np.asarray(frames)[:, None, None]
    return (frames + np.arange(k)[:, None] / 10 + np.arange(3) / 100).astype(stored)


def provenance(video: str = "v", k: int = 1, stored: str = "float16", fps: float = 2.0) -> Provenance:
    return Provenance(video, fps, f"{video}.mp4", 1234, "org/model", "c0ffee", TOWER, k, 64, "float32", stored)


def write(folder, frames, **more):
    facts = provenance(**more)
    path = feature_path(folder, facts.video_uid, facts.fps)
    write_features(path, facts, np.array(frames, np.int32), numbered(frames, facts.k, facts.stored))
    return path


def clip(video: str = "v", fps: float = 2.0):
    return dataclasses.replace(clip_example([], video=video), fps=fps)


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_a_window_gets_its_own_rows(tmp_path, stored):
    write(tmp_path, [*range(5, 12), *range(20, 30)], stored=stored)
    source = CachedFeatures(tmp_path, TOWER)
    for start, end in ((21, 24), (5, 12)):
        assert source.load(clip(), start, end).dtype == stored
        assert np.array_equal(source.load(clip(), start, end), numbered(range(start, end), stored=stored))


def test_a_file_says_where_it_comes_from_and_has_the_same_bytes_each_time(tmp_path):
    path = write(tmp_path, [3, 4], k=4)
    content = path.read_bytes()
    assert write(tmp_path, [3, 4], k=4).read_bytes() == content
    assert {name: tuple(t.shape) for name, t in load_file(path).items()}["features"] == (2, 4, 3)
    assert FeatureFile(path).header == provenance(k=4).header()
    assert FeatureFile(path).frames.tolist() == [3, 4]


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    """Its header has a key for each fact."""
    path = write(tmp_path, range(4))
    save_file(load_file(path), path, provenance().header())
    assert np.array_equal(CachedFeatures(tmp_path, TOWER).load(clip(), 1, 3), numbered([1, 2]))


def test_more_tokens_than_asked_for_are_pooled(tmp_path):
    write(tmp_path, range(4), k=16)
    found = CachedFeatures(tmp_path, TOWER, 4).load(clip(), 1, 3)
    # of a 4x4 grid the top left quarter is 0, 1, 4, 5: mean 2.5; then 4.5, 10.5, 12.5
    assert found.dtype == np.float32
    assert np.allclose(found[0, :, 0], [1.25, 1.45, 2.05, 2.25], atol=2e-3)
    whole = torch.from_numpy(numbered([1, 2], 16)).float()
    assert np.allclose(CachedFeatures(tmp_path, TOWER, 1).load(clip(), 1, 3), vision.pool(whole, 1).numpy(), atol=1e-6)
    for k in (9, 64):
        with pytest.raises(InputError, match=f"16 tokens per frame, .* to {k}; .*--tokens-per-frame {k}"):
            CachedFeatures(tmp_path, TOWER, k).load(clip(), 1, 3)


def test_what_is_missing_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder.*prospect-dst encode"):
        kept_layer(tmp_path / "nowhere")
    write(tmp_path, [0, 1, 2, 5, 6])
    source = CachedFeatures(tmp_path, TOWER)
    with pytest.raises(InputError, match=r"clip c0: no features of its video at .*w\.2fps\.safetensors; run"):
        source.load(clip("w"), 0, 1)
    for start, end, missing in ((1, 6, 3), (6, 9, 7), (7, 8, 7)):
        with pytest.raises(InputError, match=rf"v\.2fps\.safetensors: 5 frames, but not {missing} of clip c0; run"):
            source.load(clip(), start, end)
    with pytest.raises(InputError, match=rf"vision tower {TOWER} \(org/model\), but this model's is fedc.*encode"):
        CachedFeatures(tmp_path, "fedcba9876543210").load(clip(), 0, 2)
    with pytest.raises(InputError, match="features of the layer vision, but others in this folder of connector"):
        CachedFeatures(tmp_path, TOWER, layer="connector").load(clip(), 0, 2)
    with pytest.raises(InputError, match="leads out of"):
        source.load(clip("a/../../v"), 0, 1)


def test_damaged_files_are_named(tmp_path):
    path = write(tmp_path, range(4))
    content = path.read_bytes()
    other = content.replace(b'format\\": \\"2', b'format\\": \\"9')
    assert other != content
    for damaged in (content[:-2], b"", b"hello", other):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"v\.2fps\.safetensors: no features .*run prospect-dst encode"):
            CachedFeatures(tmp_path, TOWER).load(clip(), 0, 1)


def test_a_write_that_fails_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    path = write(tmp_path, range(4))
    before = path.read_bytes()

    def full(tensors, new, metadata):
        new.write_bytes(b"part of it")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("trainer.features.save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write(tmp_path, range(9))
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_video_at_two_rates_has_two_files_and_a_long_name_is_cut(tmp_path):
    rates = [2.0, float(np.float32(29.97)), float(np.float32(30000 / 1001))]
    assert len({feature_path(tmp_path, "v", rate) for rate in rates}) == 3
    long = [feature_path(tmp_path, "n" * 250 + end, 2.0) for end in "ab"]
    assert long[0] != long[1]
    assert max(len(path.name) for path in long) < 200


def test_a_source_goes_to_a_worker_and_open_files_take_no_descriptors(tmp_path):
    source, before = CachedFeatures(tmp_path, TOWER), len(os.listdir("/proc/self/fd"))
    for i in range(4):
        write(tmp_path, range(i, i + 4), video=f"v{i}")
        source.load(clip(f"v{i}"), i, i + 4)
    assert len(os.listdir("/proc/self/fd")) == before
    sent = pickle.loads(pickle.dumps(source))
    assert not sent._open
    assert np.array_equal(sent.load(clip("v3"), 3, 5), numbered([3, 4]))
