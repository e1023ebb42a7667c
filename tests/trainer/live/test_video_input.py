from __future__ import annotations

import dataclasses
import io
import math
import os
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from by_hand import clip_example, write_frames
from live_model import grey, write_video
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


def write_images(folder: Path, names: list[str]) -> Path:
    """The i-th image is 10 * i bright."""
    folder.mkdir()
    for i, name in enumerate(names):
        Image.fromarray(grey(10 * i)).save(folder / name)
    return folder


def read(where: Path | str, fps: float = 2, side: int = 64, **more) -> list[VideoFrame]:
    with open_video_input(str(where), fps, side, **more) as frames:
        return list(frames)


def numbers(found: list[VideoFrame]) -> list[int]:
    """The number of each of `write_images`'s pictures."""
    return [round(float(one.pixels.mean()) / 10) for one in found]


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "rate", "fps"), [("mp4", 30, 7.3), ("mp4", 30, 45), ("mkv", "30000/1001", 2)])
def test_a_video_gives_the_frames_that_training_reads(tmp_path, ending, rate, fps):
    write_video(tmp_path / f"v.{ending}", 61, Fraction(rate), step=4, bf="3")
    source, clip = PixelFrames(tmp_path, 48), dataclasses.replace(clip_example([], video="v"), fps=fps)
    count = source.count(clip)
    frames = read(tmp_path / f"v.{ending}", fps, 48)
    assert [(one.frame, one.time_s, one.skipped) for one in frames] == [(i, i / fps, 0) for i in range(count)]
    assert np.array_equal(np.stack([one.pixels for one in frames]), source.load(clip, 0, count))


def test_images_and_rows_are_frames_or_sampled_by_the_rate_they_were_taken_at(tmp_path):
    folder = write_images(tmp_path / "v", [f"{i}.png" for i in range(1, 13)])
    assert numbers(read(folder, 29.97)) == numbers(read(folder, 29.97, source_fps=29.97)) == list(range(12))
    # at 0, 0.5, 1 .. seconds, of one picture each 0.2 s: 0, 2.5, 5, 7.5, 10; 12.5 is over
    assert numbers(read(folder, 2, source_fps=5)) == [0, 2, 5, 7, 10]
    assert numbers(read(folder, 4, source_fps=2)) == [i // 2 for i in range(24)]
    path = write_frames(tmp_path / "v.arrow", [grey(10 * i) for i in range(6)])
    assert numbers(read(path)) == list(range(6))
    assert numbers(read(path, 1, source_fps=2)) == [0, 2, 4]


def test_a_part_of_a_file_is_read(tmp_path):
    path = write_video(tmp_path / "v.mp4", 31, 10, step=6)
    whole, part = read(path), read(path, frames=range(4, 6))
    assert [(one.frame, one.time_s, one.skipped) for one in part] == [(4, 2.0, 0), (5, 2.5, 0)]
    assert np.array_equal(part[0].pixels, whole[4].pixels)
    with pytest.raises(InputError, match=r"v.mp4: ends at frame 6, but its clip at 7; get the whole file"):
        read(path, frames=range(4, 8))


def test_people_see_the_whole_picture_and_the_model_its_middle(tmp_path):
    (tmp_path / "v").mkdir()
    wide = np.zeros((900, 1800, 3), np.uint8)
    wide[:, 450:1350] = np.random.default_rng(0).integers(200, 256, (900, 900, 3))
    Image.fromarray(wide).save(tmp_path / "v" / "0.png")
    [one] = read(tmp_path / "v")
    assert (one.image.size, one.image.mode, one.image.getpixel((10, 160))) == ((640, 320), "RGB", (0, 0, 0))
    trained_on = PixelFrames(tmp_path, 64).load(clip_example([], video="v"), 0, 1)[0]
    assert np.array_equal(one.pixels, trained_on)  # of the picture, not of the smaller one


def test_frames_before_a_damaged_picture_are_given(tmp_path):
    folder = write_images(tmp_path / "v", [f"{i}.png" for i in range(3)])
    (folder / "1.png").write_bytes(b"nothing")
    with open_video_input(str(folder), 2, 64) as frames:
        assert next(frames).frame == 0
        with pytest.raises(InputError, match=r"v frame 1: no JPEG or PNG .*; get the file again$"):
            next(frames)


@pytest.mark.parametrize(
    ("name", "options", "wrong"),
    [
        ("nowhere.mp4", {}, "nowhere.mp4: no such file or folder"),
        ("", {}, "holds no frame; expected images"),
        ("a.mp4", {}, "a.mp4: not a video that can be read"),
        ("a.txt", {}, r"a.txt: ends in neither .arrow nor .mp4"),
        ("a.arrow", {}, "a.arrow: not an Arrow IPC file"),
        ("v.mp4", {"source_fps": 30}, "a video has the times of its pictures"),
        ("", {"fps": math.nan}, r"fps nan, expected 0.01 to 1000"),
        ("", {"source_fps": 1e9}, "source fps 1e[+]09"),
        ("987", {}, r"camera 987: no /dev/video987, cameras: .*; for a file .* \./987$"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, monkeypatch, name, options, wrong):
    monkeypatch.setattr(video_input.sys, "platform", "linux")
    if name == "v.mp4":
        write_video(tmp_path / name, 2)
    elif name.startswith("a."):
        (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(InputError, match=wrong) as error:
        read(name if name.isdigit() else tmp_path / name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("realtime", [False, True])
def test_in_real_time_no_frame_is_early_and_late_ones_are_counted(tmp_path, monkeypatch, realtime):
    clock = Clock(monkeypatch)
    folder = write_images(tmp_path / "v", [f"{i}.png" for i in range(7)])
    model_s = {0: 0.1, 1: 1.7, 2: 0, 3: 0, 4: 0.5, 5: 0.0, 6: 9.0}  # seconds that the model takes, by frame
    given = []
    with open_video_input(str(folder), 2, 64, realtime) as frames:
        for one in frames:
            given.append((one.frame, round(clock.now - 100, 3), one.skipped))
            clock.sleep(model_s[one.frame])
    if realtime:  # after frame 1 it is 2.2 s: frames 2 and 3 went by, 4 is due since 2.0
        assert given == [(0, 0.0, 0), (1, 0.5, 0), (4, 2.2, 2), (5, 2.7, 0), (6, 3.0, 0)]
    else:
        assert [(frame, skipped) for frame, _, skipped in given] == [(i, 0) for i in range(7)]


# ---- cameras -----------------------------------------------------------------------------------------


class Camera:
    """Stands for PyAV's container: gives a picture when the test lets it."""

    def __init__(self, monkeypatch) -> None:
        self.closed = threading.Event()
        self._given, self._next = threading.Semaphore(0), None
        monkeypatch.setattr(video_input, "_open_camera", lambda index: self)

    def show(self, shade: int | BaseException | None) -> None:
        self._next = shade
        self._given.release()

    def decode(self, video: int):
        while self._given.acquire(timeout=20):
            if self._next is None:
                return
            if isinstance(self._next, BaseException):
                raise self._next
            yield av.VideoFrame.from_ndarray(grey(self._next), "rgb24")

    def close(self) -> None:
        self.closed.set()


def test_a_camera_gives_its_newest_picture_at_each_tick_and_is_closed(monkeypatch):
    camera, clock = Camera(monkeypatch), Clock(monkeypatch)
    with open_video_input("0", 2, 64) as frames:
        camera.show(10)
        found = [next(frames)]
        camera.show(40)
        while frames.gi_frame.f_locals["self"].image().getpixel((0, 0))[0] < 35:  # until the thread has it
            time.sleep(0.005)
        found.append(next(frames))
        clock.sleep(1.7)  # the model takes until 2.2 s, so frame 4 is due
        found += [next(frames), next(frames)]
        assert clock.now == 102.5
        threading.Timer(0.05, camera.show, [20]).start()
    assert camera.closed.wait(5)  # it would wait 20 for the next picture
    assert numbers(found) == [1, 4, 4, 4]
    assert [(one.frame, one.skipped) for one in found] == [(0, 0), (1, 0), (4, 2), (5, 0)]


@pytest.mark.parametrize(
    ("last", "wrong"),
    [
        (None, "it gave its last picture; is it still plugged in"),
        (OSError(19, "No such device"), "No such device"),
        ("silent", "no picture for 6 seconds"),
    ],
)
def test_a_camera_that_stops_or_is_silent_is_an_error(monkeypatch, last, wrong):
    camera, clock = Camera(monkeypatch), Clock(monkeypatch)
    with open_video_input("3", 100, 64) as frames:
        camera.show(10)
        next(frames)
        if last == "silent":
            clock.sleep(6)
        else:
            camera.show(last)
            assert camera.closed.wait(20)
        with pytest.raises(InputError, match=f"camera 3: {wrong}"):
            next(frames)
        camera.show(None)


# ---- the user's lines ----------------------------------------------------------------------------------


def due(text: str, times=(0.0, 0.5, 1.0, math.inf)) -> list[list[str]]:
    user = UserInput(io.StringIO(text))
    return [user.due(time) for time in times]


def test_a_script_s_lines_are_due_at_their_times_and_else_at_once():
    assert UserInput(None).due(0.0) == []
    script = "what now?\n\n  \n@0.5 and now?\nplease\n@0.7   later\n@.2 soon\n@9 never\n@1 done"
    assert due(script) == [["what now?", "please"], ["soon", "and now?"], ["later", "done"], ["never"]]
    lines = ["@joe hello", "@ 5 hello", "@nan hello", "@inf hello", "@1e3 hello", "@-1 hello", "@5", "@5hello"]
    assert due("\n".join(lines))[0] == lines  # only a time is a time
    assert due("x" * 100_000 + "\r\nshort\r\n" + "y" * 5000)[0] == ["x" * 1000, "short", "y" * 1000]


def test_a_pipe_s_lines_are_due_when_they_come_and_a_file_is_read_first(tmp_path):
    (tmp_path / "script.txt").write_bytes(b"hello\n\xff\n")
    with (tmp_path / "script.txt").open() as stream:
        assert UserInput(stream).due(0.0) == ["hello", "\ufffd"]
    reading, writing = os.pipe()
    with open(reading) as stream:
        user = UserInput(stream)
        assert user.due(0.0) == []
        os.write(writing, b"hello\n@9 later\nyou")
        os.close(writing)
        while len(user._lines) < 3:
            time.sleep(0.005)
        assert user.due(0.5) == ["hello", "you"]
