from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from by_hand import clip_example
from safetensors import safe_open

from pipeline.errors import InputError
from trainer import vision
from trainer.features import CachedFeatures, Provenance, feature_path, open_features, write_features

TOWER = "0123456789abcdef"


def about(video: str = "v", k: int = 1, stored: str = "float16", fps: float = 2.0) -> Provenance:
    return Provenance(video, fps, f"{video}.mp4", 1234, "org/model", "c0ffee", TOWER, k, 64, "float32", stored)


def numbered(frames, k: int = 1, stored: str = "float16", width: int = 3) -> np.ndarray:
    """[N, k, width]: frame f, token t, value j is f + t / 10 + j / 100."""
    frames = np.asarray(frames)[:, None, None]
    return (frames + np.arange(k)[:, None] / 10 + np.arange(width) / 100).astype(stored)


def write(folder, frames, *, cut: int = 4, **more):
    facts = about(**more)
    path = feature_path(folder, facts.video_uid, facts.fps)
    values = numbered(frames, facts.k, facts.stored)
    blocks = (values[i : i + cut] for i in range(0, len(values), cut))
    write_features(path, facts, np.array(frames, np.int32), 3, blocks)
    return path


def clip(video: str = "v", fps: float = 2.0):
    return dataclasses.replace(clip_example([], video=video), fps=fps)


@pytest.mark.parametrize("stored", ["float16", "float32"])
def test_a_window_gets_its_own_rows(tmp_path, stored):
    write(tmp_path, [*range(5, 12), *range(20, 30)], stored=stored)
    found = CachedFeatures(tmp_path, TOWER).load(clip(), 21, 24)
    assert found.dtype == stored
    assert found.shape == (3, 1, 3)
    assert np.array_equal(found, numbered([21, 22, 23], stored=stored))
    assert np.array_equal(CachedFeatures(tmp_path, TOWER).load(clip(), 5, 12), numbered(range(5, 12), stored=stored))


def test_a_file_is_plain_safetensors_and_says_where_it_comes_from(tmp_path):
    path = write(tmp_path, [0, 1], k=4)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"features", "frames", "checksums"}
        assert file.get_tensor("features").dtype == torch.float16
        assert file.get_tensor("features").shape == (2, 4, 3)
        assert file.get_tensor("frames").tolist() == [0, 1]
        assert file.metadata() == {
            "video_uid": "v", "fps": "2.0", "source": "v.mp4", "source_bytes": "1234", "model": "org/model",
            "revision": "c0ffee", "fingerprint": TOWER, "k": "4", "side": "64", "computed": "float32",
            "stored": "float16", "layer": "vision", "format": "2",
        }  # fmt: skip


def test_a_block_at_a_time_is_all_that_is_held(tmp_path):
    written = write(tmp_path / "a", range(9), cut=9).read_bytes()
    assert write(tmp_path / "b", range(9), cut=1).read_bytes() == written


def test_features_of_another_tower_are_refused(tmp_path):
    write(tmp_path, range(4))
    with pytest.raises(InputError, match=rf"vision tower {TOWER} \(org/model\), but this model's is fedc.*encode"):
        CachedFeatures(tmp_path, "fedcba9876543210").load(clip(), 0, 4)


def test_more_tokens_than_asked_for_are_pooled(tmp_path):
    write(tmp_path, range(4), k=16)
    found = CachedFeatures(tmp_path, TOWER, 4).load(clip(), 1, 3)
    # of a 4x4 grid the top left quarter is 0, 1, 4, 5: mean 2.5; then 4.5, 10.5, 12.5
    assert found.dtype == np.float32
    assert np.allclose(found[0, :, 0], [1.25, 1.45, 2.05, 2.25], atol=2e-3)
    whole = torch.from_numpy(numbered([1, 2], 16)).float()
    assert np.allclose(found, vision.pool(whole, 4).numpy(), atol=1e-6)
    assert np.allclose(CachedFeatures(tmp_path, TOWER, 1).load(clip(), 1, 3), vision.pool(whole, 1).numpy(), atol=1e-6)
    for k in (9, 64):
        with pytest.raises(InputError, match=f"16 tokens per frame, .* to {k}; .*--tokens-per-frame {k}"):
            CachedFeatures(tmp_path, TOWER, k).load(clip(), 1, 3)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such folder.*prospect-dst encode"):
        CachedFeatures(tmp_path / "nowhere", TOWER)
    write(tmp_path, [0, 1, 2, 5, 6])
    source = CachedFeatures(tmp_path, TOWER)
    with pytest.raises(InputError, match=r"clip c0: no features of its video at .*w\.2fps\.safetensors; run"):
        source.load(clip("w"), 0, 1)
    with pytest.raises(InputError, match=r"v\.2fps\.safetensors: 5 frames, but not 3 of clip c0; run"):
        source.load(clip(), 1, 6)
    with pytest.raises(InputError, match=r"5 frames, but not 7 of clip c0"):
        source.load(clip(), 6, 9)


def test_a_changed_number_is_an_error_of_the_frames_that_are_read(tmp_path):
    path = write(tmp_path, range(6))
    content = bytearray(path.read_bytes())
    content[-6 * 4 - 1] ^= 1  # the last byte of frame 5's features; the six checksums follow
    path.write_bytes(content)
    source = CachedFeatures(tmp_path, TOWER)
    assert np.array_equal(source.load(clip(), 0, 5), numbered(range(5)))
    with pytest.raises(InputError, match=r"v\.2fps\.safetensors: damaged in the frames 4 to 5 .*delete it, run"):
        source.load(clip(), 4, 6)
    assert not open_features(path).sound()


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    def blocks():
        yield numbered(range(2))
        raise OSError(28, "No space left on device")  # as write() says it: without a name

    path = feature_path(tmp_path, "v", 2.0)
    with pytest.raises(OSError, match="No space left") as caught:
        write_features(path, about(), np.arange(4, dtype=np.int32), 3, blocks())
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


def test_another_video_s_file_is_refused(tmp_path):
    write(tmp_path, range(4), video="w").rename(feature_path(tmp_path, "v", 2.0))
    with pytest.raises(InputError, match=r"v\.2fps\.safetensors: of the video w at 2\.0 fps, expected v at 2\.0"):
        CachedFeatures(tmp_path, TOWER).load(clip(), 0, 4)


def test_a_video_at_two_rates_has_two_files(tmp_path):
    rates = [2.0, float(np.float32(29.97)), float(np.float32(30000 / 1001))]
    assert len({write(tmp_path, range(i + 1), fps=rate) for i, rate in enumerate(rates)}) == 3
    for i, rate in enumerate(rates):
        assert len(CachedFeatures(tmp_path, TOWER).load(clip(fps=rate), 0, i + 1)) == i + 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other"])
def test_damaged_files_are_named(tmp_path, damage):
    path = write(tmp_path, range(4))
    content = path.read_bytes()
    path.write_bytes(
        {
            "cut": content[:-2],
            "empty": b"",
            "text": b"hello, this is no safetensors file",
            "other": content.replace(b'"format": "2"', b'"format": "9"'),
        }[damage]
    )
    with pytest.raises(InputError, match=r"v\.2fps\.safetensors: .*run prospect-dst encode"):
        CachedFeatures(tmp_path, TOWER).load(clip(), 0, 1)


@pytest.mark.parametrize("name", ["../v", "/v", "a/../../v"])
def test_names_do_not_lead_out_of_the_folder(tmp_path, name):
    with pytest.raises(InputError, match="leads out of"):
        CachedFeatures(tmp_path, TOWER).load(clip(name), 0, 1)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = write(tmp_path, range(4))
    before = path.read_bytes()

    def blocks():
        yield numbered(range(2))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(path, about(), np.arange(9, dtype=np.int32), 3, blocks())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == before


def test_a_source_goes_to_a_worker_and_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.features.OPEN_FILES", 2)
    for i in range(4):
        write(tmp_path, range(i, i + 4), video=f"v{i}")
    source = CachedFeatures(tmp_path, TOWER)
    for i in range(4):
        source.load(clip(f"v{i}"), i, i + 4)
        assert len(source._open) <= 2
    sent = pickle.loads(pickle.dumps(source))
    assert not sent._open
    assert np.array_equal(sent.load(clip("v3"), 3, 5), numbered([3, 4]))
    assert open_features(tmp_path / "v0.2fps.safetensors").frames.tolist() == [0, 1, 2, 3]
