"""PixelFrames: a clip's frames, from files that are opened when needed, cached, and named in errors."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from by_hand import clip_example, grey, write_frames

from pipeline.errors import InputError
from trainer.frame_source import PixelFrames


def clip(video: str = "cam_nusar-1"):
    return clip_example([], start=3, frames=4, video=video)


def shades(found: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in found]


@pytest.mark.parametrize("file_format", [False, True])
def test_row_i_is_frame_i_of_the_video_also_in_a_worker_which_gets_no_frames(tmp_path, file_format):
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(10 * i) for i in range(20)], file_format)
    source = PixelFrames(tmp_path, 64)
    found = source.load(clip(), 3, 7)
    assert (found.shape, found.dtype, shades(found)) == ((4, 3, 64, 64), np.uint8, [3, 4, 5, 6])
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert shades(pickle.loads(sent).load(clip(), 0, 3)) == [0, 1, 2]


def test_missing_files_and_frames_say_where_and_how_many(tmp_path):
    write_frames(tmp_path / "frames" / "nusar-1.arrow", [grey(10 * i) for i in range(20)])
    with pytest.raises(InputError, match=r"no such folder.*--frames-root"):
        PixelFrames(tmp_path / "nowhere", 64)
    source = PixelFrames(tmp_path, 64)
    for call in (source.find, lambda clip: source.load(clip, 3, 7)):
        with pytest.raises(InputError, match="clip c0: no frames of v below"):
            call(clip("v"))
    with pytest.raises(InputError, match=r"nusar-1.arrow: 20 frames, but clip c0 needs frame 20"):
        source.load(clip(), 18, 21)
