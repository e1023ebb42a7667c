"""PixelFrames: a clip's frames, from files that are opened when needed, cached, and named in errors."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pyarrow as pa
import pytest
from by_hand import clip_example, jpeg, write_frames

from pipeline.errors import InputError
from trainer.frame_source import PixelFrames, open_frames


def grey(value: int) -> np.ndarray:
    return np.full((64, 64, 3), value, np.uint8)


def clip(video: str = "cam_nusar-1", fps: float = 2.0):
    return dataclasses.replace(clip_example([], start=3, frames=4, video=video), fps=fps)


def shades(found: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in found]


@pytest.fixture
def root(tmp_path):
    """Row i is 10 i bright."""
    write_frames(tmp_path / "frames" / "nusar-1.arrow", [grey(10 * i) for i in range(20)])
    return tmp_path


@pytest.mark.parametrize("file_format", [False, True])
def test_row_i_is_frame_i_of_the_video(tmp_path, file_format):
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(10 * i) for i in range(20)], file_format)
    found = PixelFrames(tmp_path, 64).load(clip(), 3, 7)
    assert (found.shape, found.dtype, shades(found)) == ((4, 3, 64, 64), np.uint8, [3, 4, 5, 6])


def test_missing_files_and_frames_say_where_and_how_many(root):
    with pytest.raises(InputError, match=r"no such folder.*--frames-root"):
        PixelFrames(root / "nowhere", 64)
    source = PixelFrames(root, 64)
    for call in (source.check, source.count, lambda clip: source.load(clip, 3, 7)):
        with pytest.raises(InputError, match="clip c0: no frames of v below"):
            call(clip("v"))
    with pytest.raises(InputError, match=r"nusar-1.arrow: 20 frames, but clip c0 needs frame 20"):
        source.load(clip(), 18, 21)


@pytest.mark.parametrize("content", ["no base64!", jpeg(grey(1))[:-200], "", None])
def test_a_broken_frame_is_named(tmp_path, content):
    table = pa.table({"frame": pa.array([jpeg(grey(10)), content], pa.string())})
    with pa.ipc.new_stream(str(tmp_path / "v.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = PixelFrames(tmp_path, 64)
    assert shades(source.load(clip("v"), 0, 1)) == [1]
    with pytest.raises(InputError, match=r"v.arrow frame 1: no base64 JPEG \(.*\); get the file again"):
        source.load(clip("v"), 0, 2)


def test_the_root_comes_from_the_manifest_unless_given(tmp_path):
    manifest = {"options": {"frames_root": str(tmp_path)}}
    assert open_frames(manifest, None, 64).root == tmp_path
    (tmp_path / "other").mkdir()
    assert open_frames(manifest, tmp_path / "other", 64).root == tmp_path / "other"
    with pytest.raises(InputError, match="--frames-root"):
        open_frames({"options": {"frames_root": None}}, None, 64)


def test_a_source_goes_to_a_worker_without_its_files(root):
    source = PixelFrames(root, 64)
    source.load(clip(), 0, 10)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert shades(pickle.loads(sent).load(clip(), 0, 3)) == [0, 1, 2]
