"""Cached features: a window's own rows, provenance, and what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from by_hand import clip_example

from pipeline.errors import InputError
from trainer.features import CachedFeatures, FeatureFile, feature_path, kept_layer, pool, write_features

TOWER = "0123456789abcdef"


def numbered(frames, k: int = 1, stored: str = "float16") -> np.ndarray:
    """[N, k, 3]: frame f, token t, value j is f + t / 10 + j / 100."""
    frames = np.asarray(frames)[:, None, None]
    return (frames + np.arange(k)[:, None] / 10 + np.arange(3) / 100).astype(stored)


def write(folder, frames, video="v", k=1, stored="float16"):
    path = feature_path(folder, video, 2.0)
    header = {"model": "org/model", "fingerprint": TOWER, "k": k, "layer": "vision"}
    write_features(path, header, np.array(frames, np.int32), numbered(frames, k, stored))
    return path


def clip(video: str = "v"):
    return clip_example([], video=video)


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_a_window_gets_its_own_rows_also_in_a_worker(tmp_path, stored):
    path = write(tmp_path, [*range(5, 12), *range(20, 30)], stored=stored)
    header = {"model": "org/model", "fingerprint": TOWER, "k": "1", "layer": "vision", "format": "2"}
    assert FeatureFile(path).header == header
    source = CachedFeatures(tmp_path, TOWER)
    for start, end in ((21, 24), (5, 12)):
        assert source.load(clip(), start, end).dtype == stored
        assert np.array_equal(source.load(clip(), start, end), numbered(range(start, end), stored=stored))
    assert np.array_equal(pickle.loads(pickle.dumps(source)).load(clip(), 5, 6), numbered([5], stored=stored))


def test_more_tokens_than_asked_for_are_pooled(tmp_path):
    write(tmp_path, range(4), k=16)
    found = CachedFeatures(tmp_path, TOWER, 4).load(clip(), 1, 3)
    # of a 4x4 grid the top left quarter is 0, 1, 4, 5: mean 2.5; then 4.5, 10.5, 12.5
    assert found.dtype == np.float32
    assert np.allclose(found[0, :, 0], [1.25, 1.45, 2.05, 2.25], atol=2e-3)
    whole = torch.from_numpy(numbered([1, 2], 16)).float()
    assert np.allclose(CachedFeatures(tmp_path, TOWER, 1).load(clip(), 1, 3), pool(whole, 1).numpy(), atol=1e-6)
    with pytest.raises(InputError, match=r"16 tokens per frame, .* to 9; .*--tokens-per-frame 9"):
        CachedFeatures(tmp_path, TOWER, 9).load(clip(), 1, 3)


def test_what_is_missing_damaged_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder.*prospect-dst encode"):
        kept_layer(tmp_path / "nowhere")
    path = write(tmp_path, [0, 1, 2, 5, 6])
    source = CachedFeatures(tmp_path, TOWER)
    with pytest.raises(InputError, match=r"w\.2fps\.safetensors: no features .*run prospect-dst encode on this data"):
        source.load(clip("w"), 0, 1)
    for start, end, missing in ((1, 6, 3), (6, 9, 7)):
        with pytest.raises(InputError, match=rf"v\.2fps\.safetensors: 5 frames, but not {missing} of clip c0; run"):
            source.load(clip(), start, end)
    with pytest.raises(
        InputError, match=rf"made by vision weights {TOWER} \(org/model\), this model's are fedc.*encode"
    ):
        CachedFeatures(tmp_path, "fedcba9876543210").load(clip(), 0, 2)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"v\.2fps\.safetensors: no features .*run prospect-dst encode"):
        CachedFeatures(tmp_path, TOWER).load(clip(), 0, 1)


def test_a_name_too_long_for_a_file_is_cut_and_still_its_own(tmp_path):
    for video in ("a/" + "é" * 120 + "1", "a/" + "é" * 120 + "2"):
        path = write(tmp_path, [0, 1], video=video)
        assert CachedFeatures(tmp_path, TOWER).load(clip(video), 0, 2).shape == (2, 1, 3)
    assert path.parent == tmp_path / "a"
    assert len(list(path.parent.iterdir())) == 2
