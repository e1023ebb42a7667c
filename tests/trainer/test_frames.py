from __future__ import annotations

import base64

import numpy as np
import pyarrow as pa
import pytest
from by_hand import clip_example, jpeg, write_frames

from trainer.errors import TrainerError
from trainer.frames import ArrowFrames, decode, open_frames


def grey(value: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def clip(**more):
    return clip_example([], start=3, frames=4, video="cam_nusar-1", **more)


@pytest.mark.parametrize("file_format", [False, True])
def test_row_i_is_frame_i_of_the_video(tmp_path, file_format):
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(10 * i) for i in range(20)], file_format)
    found = ArrowFrames(tmp_path, 64).load(clip(), 3, 7)
    assert found.shape == (4, 3, 64, 64)
    assert found.dtype == np.uint8
    assert [int(f.mean()) for f in found] == [30, 40, 50, 60]


def test_channels_come_first_and_are_rgb(tmp_path):
    red = grey(0)
    red[..., 0] = 255
    pixels = decode(jpeg(red), 64)
    assert pixels[0].min() > 250
    assert pixels[1:].max() < 5


def test_frames_are_cropped_to_the_centre_and_resized():
    wide = grey(0, 32, 96)
    wide[:, 32:64] = 255  # the centre square
    assert decode(jpeg(wide), 64)[:, 8:-8, 8:-8].min() > 240
    assert decode(jpeg(grey(7, 10, 10)), 64).shape == (3, 64, 64)


def test_a_file_without_the_prefix_is_found(tmp_path):
    write_frames(tmp_path / "frames" / "nusar-1.arrow", [grey(9)] * 8)
    assert len(ArrowFrames(tmp_path, 64).load(clip(), 3, 7)) == 4


def test_missing_files_and_frames_say_where_and_how_many(tmp_path):
    with pytest.raises(TrainerError, match=r"no such folder.*--frames-root"):
        ArrowFrames(tmp_path / "nowhere", 64)
    with pytest.raises(TrainerError, match="clip c0: no frames of cam_nusar-1 below"):
        ArrowFrames(tmp_path, 64).load(clip(), 3, 7)
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(0)] * 5)
    with pytest.raises(TrainerError, match=r"cam_nusar-1.arrow: 5 frames, but clip c0 needs frame 6"):
        ArrowFrames(tmp_path, 64).load(clip(), 3, 7)


@pytest.mark.parametrize(
    "content",
    ["no base64!", base64.b64encode(b"no JPEG").decode(), jpeg(grey(1))[:-200], "", None],
)
def test_a_broken_frame_is_named(tmp_path, content):
    path = tmp_path / "cam_nusar-1.arrow"
    table = pa.table({"frame": pa.array([jpeg(grey(1)), content], pa.string())})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    source = ArrowFrames(tmp_path, 64)
    assert len(source.load(clip(), 0, 1)) == 1
    with pytest.raises(TrainerError, match=r"cam_nusar-1.arrow frame 1: no base64 JPEG"):
        source.load(clip(), 0, 2)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.frames.MAX_PIXELS", 100 * 100)
    with pytest.raises(ValueError, match="101 x 100 pixels"):
        decode(jpeg(grey(0, 100, 101)), 64)


def test_files_that_are_no_arrow_or_have_no_frame_column_are_named(tmp_path):
    path = tmp_path / "cam_nusar-1.arrow"
    for content in (b"", b"hello", b"ARROW1 but not really"):
        path.write_bytes(content)
        with pytest.raises(TrainerError, match=r"cam_nusar-1.arrow: not an Arrow IPC file"):
            ArrowFrames(tmp_path, 64).load(clip(), 3, 4)
    table = pa.table({"image": ["x"]})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(TrainerError, match="columns image, expected one named frame"):
        ArrowFrames(tmp_path, 64).load(clip(), 3, 4)


def test_the_cache_is_bounded_and_changes_nothing(tmp_path):
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(10 * i) for i in range(20)])
    cached, plain = ArrowFrames(tmp_path, 64, cache_bytes=2 * 3 * 64 * 64), ArrowFrames(tmp_path, 64, 0)
    for _ in range(2):
        assert np.array_equal(cached.load(clip(), 3, 7), plain.load(clip(), 3, 7))
    assert len(cached._cache) == 2
    assert not plain._cache


def test_the_root_comes_from_the_manifest_unless_given(tmp_path):
    manifest = {"options": {"frames_root": str(tmp_path)}}
    assert open_frames(manifest, None, 64).root == tmp_path
    (tmp_path / "other").mkdir()
    assert open_frames(manifest, tmp_path / "other", 64).root == tmp_path / "other"
    with pytest.raises(TrainerError, match="--frames-root"):
        open_frames({"options": {"frames_root": None}}, None, 64)
