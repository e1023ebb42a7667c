from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from by_hand import clip_example, grey, write_frames
from live_model import write_video
from PIL import Image

from pipeline.errors import InputError
from trainer.frame_source import PixelFrames
from trainer.live import video_input
from trainer.live.video_input import UserInput, VideoFrame, open_video_input


class Clock:
    """Stands for the module `time`: sleeping is all that makes time go by."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(video_input, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def write_images(folder: Path, count: int) -> Path:
    """The i-th image is 10 * i bright."""
    folder.mkdir()
    for i in range(count):
        Image.fromarray(grey(10 * i)).save(folder / f"{i}.png")
    return folder


def read(where: Path | str, fps: float = 2, side: int = 64, **more) -> list[VideoFrame]:
    with open_video_input(str(where), fps, side, **more) as frames:
        return list(frames)


def numbers(found: list[VideoFrame]) -> list[int]:
    """The number of each of `write_images`'s pictures."""
    return [round(float(one.pixels.mean()) / 10) for one in found]


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "rate", "fps"), [("mp4", 30, 7.3), ("mkv", "30000/1001", 2)])
def test_a_video_gives_the_frames_that_training_reads(tmp_path, ending, rate, fps):
    write_video(tmp_path / f"v.{ending}", 61, Fraction(rate), step=4, bf="3")
    source, clip = PixelFrames(tmp_path, 48), dataclasses.replace(clip_example([], video="v"), fps=fps)
    count = source.count(clip)
    frames = read(tmp_path / f"v.{ending}", fps, 48)
    assert [(one.frame, one.time_s, one.skipped) for one in frames] == [(i, i / fps, 0) for i in range(count)]
    assert np.array_equal(np.stack([one.pixels for one in frames]), source.load(clip, 0, count))


def test_each_image_and_each_row_is_a_frame(tmp_path):
    assert numbers(read(write_images(tmp_path / "v", 12), 29.97)) == list(range(12))
    assert numbers(read(write_frames(tmp_path / "v.arrow", [grey(10 * i) for i in range(6)]))) == list(range(6))


def test_a_part_of_a_file_is_read(tmp_path):
    path = write_video(tmp_path / "v.mp4", 31, 10, step=6)
    whole, part = read(path), read(path, frames=range(4, 6))
    assert [(one.frame, one.time_s, one.skipped) for one in part] == [(4, 2.0, 0), (5, 2.5, 0)]
    assert np.array_equal(part[0].pixels, whole[4].pixels)
    with pytest.raises(InputError, match=r"v.mp4: has 7 frames, expected 8 or more; get the whole file"):
        read(path, frames=range(4, 8))


def test_in_real_time_no_frame_is_early_and_late_ones_are_counted(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    folder = write_images(tmp_path / "v", 7)
    model_s = {0: 0.1, 1: 1.7, 4: 0.5, 5: 0.0, 6: 9.0}  # seconds that the model takes, by frame
    given = []
    with open_video_input(str(folder), 2, 64, realtime=True) as frames:
        for one in frames:
            given.append((one.frame, round(clock.now - 100, 3), one.skipped))
            clock.sleep(model_s[one.frame])
    # after frame 1 it is 2.2 s: frames 2 and 3 went by, 4 is due since 2.0
    assert given == [(0, 0.0, 0), (1, 0.5, 0), (4, 2.2, 2), (5, 2.7, 0), (6, 3.0, 0)]


def test_what_is_nowhere_or_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"hello")
    for name, wrong in (("nowhere.mp4", ".*No such file"), ("a.mp4", "not a video"), ("", "has 0 frames")):
        with pytest.raises(InputError, match=f"{name}: {wrong}"):
            read(tmp_path / name)


# ---- cameras -----------------------------------------------------------------------------------------


class Camera(contextlib.nullcontext):
    """Stands for PyAV's container: gives a picture when the test puts one."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.shades = queue.Queue()
        monkeypatch.setattr(av, "open", lambda device, format: self)

    def decode(self, video: int):
        while (shade := self.shades.get(timeout=20)) is not None:
            yield av.VideoFrame.from_ndarray(grey(shade), "rgb24")


def test_a_camera_gives_its_newest_picture_at_each_tick_until_it_stops(monkeypatch):
    shades, clock = Camera(monkeypatch).shades, Clock(monkeypatch)
    with open_video_input("0", 2, 64) as frames:
        shades.put(10)
        found = [next(frames)]
        camera = frames.gi_frame.f_locals["image"].__self__
        shades.put(40)
        while camera.image(0).getpixel((0, 0))[0] < 35:  # until the thread has it
            time.sleep(0.005)
        clock.sleep(1.7)  # the model's time: frame 3 is due
        found += [next(frames), next(frames)]
        shades.put(None)
        camera._thread.join(20)
        with pytest.raises(InputError, match="camera 0: gives no picture; is it still plugged in"):
            next(frames)
    assert numbers(found) == [1, 4, 4]
    assert [(one.frame, one.skipped) for one in found] == [(0, 0), (3, 2), (4, 0)]


# ---- the user's lines ----------------------------------------------------------------------------------


def due(path: Path, text: str) -> list[list[str]]:
    path.write_text(text)
    with path.open() as file:
        user = UserInput(file)
    return [user.due(time) for time in (0.0, 0.5, 1.0, math.inf)]


def test_a_script_s_lines_are_due_at_their_times_and_else_at_once(tmp_path):
    assert UserInput(None).due(0.0) == []
    script = "what now?\n\n  \n@0.5 and now?\nplease\n@0.7   later\n@.2 soon\n@9 never\n@1 done"
    expected = [["what now?", "please"], ["soon", "and now?"], ["later", "done"], ["never"]]
    assert due(tmp_path / "script", script) == expected
    lines = ["@joe hello", "@ 5 hello", "@nan hello", "@5hello"]
    assert due(tmp_path / "script", "\n".join(lines))[0] == lines  # only a time is a time
