from __future__ import annotations

import io
import math
import os
import threading
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from by_hand import write_frames
from PIL import Image
from test_frames import DRIVE, at, grey, images, shades, video

from pipeline.errors import InputError
from trainer.frame_source import PixelFrames
from trainer.live import video_input as feed
from trainer.live.video_input import Listener, Seen, open_feed


class Clock:
    """Stands for the module `time`: sleeping is all that makes time go by."""

    def __init__(self, monkeypatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(feed, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def seen(where: Path | str, fps: float = 2, side: int = 64, **more) -> list[Seen]:
    with open_feed(str(where), fps, side, **more) as frames:
        return list(frames)


def numbers(found: list[Seen], step: int = 8) -> list[int]:
    return shades(np.stack([one.pixels for one in found]), step)


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [2, 7.3, 29.97, 30, 45])
@pytest.mark.parametrize(("ending", "rate"), [("mp4", 30), ("mkv", Fraction(30000, 1001))])
def test_a_video_streams_the_frames_that_training_reads(tmp_path, ending, rate, fps):
    video(tmp_path / f"v.{ending}", 61, rate, step=4, bf="3")
    source = PixelFrames(tmp_path, 48)
    count = source.count(at(fps))
    with open_feed(str(tmp_path / f"v.{ending}"), fps, 48) as frames:
        found = list(frames)
    assert [one.frame for one in found] == list(range(count))
    assert [one.time_s for one in found] == [i / fps for i in range(count)]
    assert not any(one.skipped for one in found)
    assert np.array_equal(np.stack([one.pixels for one in found]), source.load(at(fps), 0, count))


@pytest.mark.skipif(not DRIVE.is_file(), reason="shared/real is not here")
def test_a_real_video_streams_whole():
    found = seen(DRIVE)
    assert len(found) == 33
    assert found[0].image.size == (384, 384)
    assert np.array_equal(found[32].pixels, PixelFrames(DRIVE.parent, 64).load(at(2, "drive"), 32, 33)[0])


def test_a_video_of_one_picture_has_one_frame(tmp_path):
    assert numbers(seen(video(tmp_path / "v.mp4", 1, step=0))) == [0]


def test_images_are_frames_or_sampled_by_the_rate_they_were_taken_at(tmp_path):
    folder = images(tmp_path / "v", [f"{i}.png" for i in range(1, 13)])
    assert numbers(seen(folder), 10) == list(range(12))
    assert numbers(seen(folder, 29.97), 10) == list(range(12))
    # at 0, 0.5, 1 .. seconds, of one picture each 0.2 s: 0, 2.5, 5, 7.5, 10; 12.5 is over
    assert numbers(seen(folder, 2, source_fps=5), 10) == [0, 2, 5, 7, 10]
    assert numbers(seen(folder, 4, source_fps=2), 10) == [i // 2 for i in range(24)]
    assert numbers(seen(folder, 29.97, source_fps=29.97), 10) == list(range(12))


def test_rows_of_an_arrow_file_are_frames(tmp_path):
    path = write_frames(tmp_path / "v.arrow", [grey(10 * i) for i in range(6)])
    assert numbers(seen(path), 10) == list(range(6))
    assert numbers(seen(path, 1, source_fps=2), 10) == [0, 2, 4]


def test_a_file_is_read_from_the_frame_that_is_asked_for(tmp_path):
    video(tmp_path / "v.mp4", 31, 10, step=6)
    whole = seen(tmp_path / "v.mp4")
    with open_feed(str(tmp_path / "v.mp4"), 2, 64, first=4) as frames:
        found = list(frames)
    assert [(one.frame, one.time_s, one.skipped) for one in found] == [(4, 2.0, 0), (5, 2.5, 0), (6, 3.0, 0)]
    assert all(np.array_equal(one.pixels, whole[one.frame].pixels) for one in found)
    with pytest.raises(InputError, match=r"v.mp4: 7 frames at 2 fps, expected more than 7"):
        open_feed(str(tmp_path / "v.mp4"), 2, 64, first=7)


def test_people_see_the_whole_picture_and_the_model_its_middle(tmp_path):
    (tmp_path / "v").mkdir()
    wide = grey(0, 900, 1800)
    wide[:, 450:1350] = np.random.default_rng(0).integers(200, 256, (900, 900, 3))
    Image.fromarray(wide).save(tmp_path / "v" / "0.png")
    (one,) = seen(tmp_path / "v")
    assert one.image.size == (640, 320)
    assert one.image.mode == "RGB"
    assert one.image.getpixel((10, 160)) == (0, 0, 0)
    assert one.pixels.shape == (3, 64, 64)
    assert one.pixels[..., 2:-2].min() > 200
    assert np.array_equal(one.pixels, PixelFrames(tmp_path, 64).load(at(2), 0, 1)[0])  # not of the smaller one


def test_frames_before_a_damaged_picture_are_given_then_one_line(tmp_path):
    folder = images(tmp_path / "v", [f"{i}.png" for i in range(4)])
    (folder / "2.png").write_bytes(b"nothing")
    with open_feed(str(folder), 2, 64) as frames:
        coming = iter(frames)
        assert [next(coming).frame, next(coming).frame] == [0, 1]
        with pytest.raises(InputError, match=r"v frame 2: no JPEG or PNG .*; get the file again$"):
            next(coming)


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (lambda path: path / "nowhere.mp4", "nowhere.mp4: no such file or folder"),
        (lambda path: path / "nowhere", "nowhere: no such file or folder"),
        (lambda path: path, r"test_.*: holds no frame; expected images"),
        (lambda path: images(path / "gap", ["1.jpg", "3.jpg"]), "gap: no image has the number 2"),
        (lambda path: _written(path / "a.mp4", b"hello"), "a.mp4: not a video that can be read"),
        (lambda path: _written(path / "a.mp4", b""), "a.mp4: not a video that can be read"),
        (lambda path: _written(path / "a.txt", b"hello"), r"a.txt: ends in neither .arrow nor .mp4"),
        (lambda path: _written(path / "a.arrow", b"hello"), "a.arrow: not an Arrow IPC file"),
        (lambda path: _written(path / "a.mkv", b"#EXTM3U\n/etc/passwd\n"), "a.mkv: not a video"),
        (lambda path: _sound(path / "a.mp4"), "a.mp4: no video in it"),
        (lambda path: write_frames(path / "a.arrow", []), "a.arrow: holds no frame"),
        (lambda path: _pipe(path / "a.mp4"), "a.mp4: not a regular file"),
    ],
)
def test_what_is_no_stream_of_frames_is_told_in_one_line(tmp_path, make, wrong):
    with pytest.raises(InputError, match=wrong) as error:
        open_feed(str(make(tmp_path)), 2, 64)
    assert "\n" not in str(error.value)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9])
def test_rates_that_make_no_sense_are_refused(tmp_path, fps):
    folder = images(tmp_path / "v", ["1.png"])
    with pytest.raises(InputError, match=r"v: fps .*, expected 0.01 to 1000"):
        open_feed(str(folder), fps, 64)
    with pytest.raises(InputError, match="v: source fps"):
        open_feed(str(folder), 2, 64, source_fps=fps)


def test_a_video_needs_no_source_rate(tmp_path):
    with pytest.raises(InputError, match="a video says itself when its pictures are shown"):
        open_feed(str(video(tmp_path / "v.mp4", 2)), 2, 64, source_fps=30)


# ---- in real time ------------------------------------------------------------------------------------


def test_in_real_time_no_frame_is_early_and_late_ones_are_counted(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    folder = images(tmp_path / "v", [f"{i}.png" for i in range(10)])
    given = []
    thought = {0: 0.1, 1: 1.7, 4: 0.5, 5: 0.0, 6: 9.0}  # seconds that the model takes, by frame
    with open_feed(str(folder), 2, 64, realtime=True) as frames:
        for one in frames:
            given.append((one.frame, round(clock.now - 100, 3), one.skipped))
            clock.sleep(thought[one.frame])
    # after frame 1 it is 2.2 s: frames 2 and 3 went by, 4 is due since 2.0; after frame 6 all is over
    assert given == [(0, 0.0, 0), (1, 0.5, 0), (4, 2.2, 2), (5, 2.7, 0), (6, 3.0, 0)]


def test_without_it_a_slow_model_misses_nothing(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    folder = images(tmp_path / "v", [f"{i}.png" for i in range(4)])
    with open_feed(str(folder), 2, 64) as frames:
        found = [(one.frame, one.skipped, clock.sleep(9)) for one in frames]
    assert [one[:2] for one in found] == [(0, 0), (1, 0), (2, 0), (3, 0)]


# ---- cameras -----------------------------------------------------------------------------------------


class Camera:
    """Stands for PyAV's container: gives a picture when the test lets it."""

    def __init__(self, monkeypatch) -> None:
        self.closed = threading.Event()
        self._given, self._next = threading.Semaphore(0), None
        monkeypatch.setattr(feed, "_open_camera", lambda index: self)

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


def _until_read(camera_feed, shade: int) -> None:
    """Wait until the feed's thread has that picture."""
    newest = camera_feed._close.__self__
    with newest._new:
        assert newest._new.wait_for(lambda: newest._picture and newest._picture.to_ndarray()[0, 0, 0] == shade, 20)


def test_a_camera_gives_its_newest_picture_at_each_tick(monkeypatch):
    camera, clock = Camera(monkeypatch), Clock(monkeypatch)
    with open_feed("0", 2, 64) as frames:
        assert (frames.name, frames.fps) == ("camera 0", 2)
        camera.show(10)
        coming = iter(frames)
        found = [next(coming)]
        for shade in (20, 30, 40):  # all within the first half second
            camera.show(shade)
            _until_read(frames, shade)
        found.append(next(coming))
        assert clock.now == 100.5
        clock.sleep(1.7)  # the model thinks: 2.2 s, so frame 4 is due
        found += [next(coming), next(coming)]
        assert clock.now == 102.5
    assert numbers(found, 10) == [1, 4, 4, 4]
    assert [(one.frame, one.skipped) for one in found] == [(0, 0), (1, 0), (4, 2), (5, 0)]


def test_the_camera_is_let_go(monkeypatch):
    camera = Camera(monkeypatch)
    with open_feed("0", 100, 64) as frames:
        camera.show(10)
        next(iter(frames))
        threading.Timer(0.05, camera.show, [20]).start()
    assert camera.closed.wait(5)  # it would wait 20 for the next picture


@pytest.mark.parametrize(
    ("last", "wrong"),
    [(None, "it gave its last picture"), (OSError(19, "No such device"), "No such device")],
)
def test_a_camera_that_stops_is_told_in_one_line(monkeypatch, last, wrong):
    camera = Camera(monkeypatch)
    with open_feed("3", 100, 64) as frames:
        camera.show(10)
        coming = iter(frames)
        next(coming)
        camera.show(last)
        assert camera.closed.wait(20)
        with pytest.raises(InputError, match=f"camera 3: {wrong}; is it still plugged in"):
            next(coming)


def test_a_camera_that_falls_silent_is_told_in_one_line(monkeypatch):
    camera, clock = Camera(monkeypatch), Clock(monkeypatch)
    with open_feed("0", 2, 64) as frames:
        camera.show(10)
        coming = iter(frames)
        next(coming)
        clock.sleep(6)
        with pytest.raises(InputError, match="camera 0: no picture for 6 seconds"):
            next(coming)


def test_a_camera_that_never_starts_is_told_in_one_line(monkeypatch):
    Camera(monkeypatch)
    monkeypatch.setattr(feed, "FIRST_PICTURE_S", 0.01)
    with open_feed("0", 2, 64) as frames, pytest.raises(InputError, match="camera 0: no picture for 0 seconds"):
        next(iter(frames))


def test_a_camera_that_is_not_there_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(feed.sys, "platform", "linux")
    with pytest.raises(InputError, match=r"camera 987: no /dev/video987, cameras there: .*; for a file .* \./987$"):
        open_feed("987", 2, 64)


# ---- what the user says ------------------------------------------------------------------------------


def heard(text: str, times=(0.0, 0.5, 1.0)) -> list[list[str]]:
    listener = Listener(io.StringIO(text))
    return [listener.heard(time) for time in times] + [listener.heard(math.inf)]


def test_nobody_talks():
    assert Listener(None).heard(0.0) == []


def test_a_script_is_heard_at_its_times_and_else_at_once():
    script = "what now?\n\n  \n@0.5 and now?\nplease\n@0.7   later\n@.2 soon\n@9 never\n@1 done"
    assert heard(script) == [["what now?", "please"], ["soon", "and now?"], ["later", "done"], ["never"]]


def test_only_a_time_is_a_time():
    lines = ["@joe hello", "@ 5 hello", "@nan hello", "@inf hello", "@1e3 hello", "@-1 hello", "@5", "@5hello"]
    assert heard("\n".join(lines)) == [lines, [], [], []]
    assert heard("@" + "9" * 400 + " hello") == [[], [], [], ["hello"]]


def test_long_lines_are_cut_and_odd_ends_are_ends():
    assert heard("x" * 100_000 + "\r\nshort\r\n" + "y" * 5000) == [["x" * 1000, "short", "y" * 1000], [], [], []]


def test_a_flood_is_read_only_so_far_ahead():
    class Flood(io.StringIO):
        taken = 0

        def read(self, size: int = -1) -> str:
            self.taken += size
            return "y\n" * (size // 2)

    flood = Flood()
    listener = Listener(flood)
    assert listener.heard(0.0) == ["y"] * feed.WAITING
    assert listener.heard(0.5) == ["y"] * feed.WAITING
    assert flood.taken < 10 * feed.WAITING


def test_lines_for_later_do_not_keep_all_others_waiting(monkeypatch):
    monkeypatch.setattr(feed, "WAITING", 3)
    assert heard("@9 a\n@9 b\nnow\n@8 c\n@7 d\n") == [["now"], [], [], ["c", "a", "b"]]


def test_a_pipe_is_heard_when_it_says_something():
    reading, writing = os.pipe()
    with open(reading) as stream:
        listener = Listener(stream)
        assert listener.heard(0.0) == []
        os.write(writing, b"hello\nyou")
        with listener._changed:
            assert listener._changed.wait_for(lambda: listener._lines, 20)
        assert listener.heard(0.5) == ["hello"]
        os.close(writing)
        with listener._changed:
            assert listener._changed.wait_for(lambda: listener._ended, 20)
        assert listener.heard(1.0) == ["you"]


def test_a_file_is_a_script(tmp_path):
    path = tmp_path / "said.txt"
    path.write_text("hello\n" * 3)
    with path.open() as stream:
        assert Listener(stream).heard(0.0) == ["hello"] * 3


def test_a_stream_that_cannot_be_read_is_nobody():
    class Refuses(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            raise OSError("no")

    assert Listener(Refuses()).heard(0.0) == []
