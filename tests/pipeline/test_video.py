"""The picture that a player shows, at the player's time. Expected values are written by hand."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from made_up import quarters, seen

from pipeline.media import Video, count_frames, open_pictures

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (128, 128, 128), (16, 16, 16), (240, 240, 240)]


def video(path, pictures, rate=10, codec="libx264", pts=None, audio_s=0.0, **more):
    """A video of RGB arrays or VideoFrames; pts in pictures. `more`: attributes of the encoder, or `options`."""
    with av.open(str(path), "w") as container:
        options = {"qp": "1", "preset": "ultrafast", "bf": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=options | more.pop("options", {}))
        frames = [p if isinstance(p, av.VideoFrame) else av.VideoFrame.from_ndarray(p, "rgb24") for p in pictures]
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv444p"
        stream.codec_context.time_base = 1 / Fraction(rate)
        for name, value in more.items():
            setattr(stream.codec_context, name, value)
        if audio_s:
            sound = container.add_stream("aac", rate=16000, layout="mono")
            for at in range(0, int(audio_s * 16000), 1024):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silence.sample_rate, silence.pts, silence.time_base = 16000, at, Fraction(1, 16000)
                container.mux(sound.encode(silence))
            container.mux(sound.encode())
        for i, frame in enumerate(frames):
            frame.pts, frame.time_base = (i if pts is None else pts[i]), 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(count: int, step: int = 6) -> list[np.ndarray]:
    """Picture i is 20 + step * i bright."""
    return [np.full((32, 32, 3), 20 + step * i, np.uint8) for i in range(count)]


def shown(path: Path, fps: float, frames, step: int = 6) -> list[int]:
    """Which of `greys` each frame shows."""
    opened = open_pictures(path)
    return [round((float(np.asarray(opened.image(i, fps)).mean()) - 20) / step) for i in frames]


def first(path: Path) -> np.ndarray:
    return np.asarray(open_pictures(path).image(0, 10.0)).astype(int)


MATRICES = {  # x' = a x + c y, y' = b x + d y: what is shown of red, green above blue, white
    "as stored": ((1, 0, 0, 1), "RGBW"),
    "hflip": ((-1, 0, 0, 1), "GRWB"),
    "180": ((-1, 0, 0, -1), "WBGR"),
    "90 clockwise": ((0, 1, -1, 0), "BRWG"),
    "90 counterclockwise": ((0, -1, 1, 0), "GWRB"),
    "transpose": ((0, 1, 1, 0), "RBGW"),
}


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    whole = path.read_bytes()
    place = whole.index(b"tkhd") + 44
    a, b, c, d = (one << 16 for one in matrix)
    path.write_bytes(whole[:place] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + whole[place + 36 :])
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_turns_and_mirrors_the_picture(tmp_path, name):
    matrix, expected = MATRICES[name]
    assert seen(first(with_matrix(video(tmp_path / "v.mp4", [quarters(32, 32)]), matrix))) == expected


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    for aspect, size in ((Fraction(4, 3), (64, 32)), (Fraction(1, 2), (48, 64))):
        path = video(tmp_path / "v.mp4", [np.zeros((32, 48, 3), np.uint8)], sample_aspect_ratio=aspect)
        assert first(path).shape[1::-1] == size
        assert first(with_matrix(path, (0, 1, -1, 0))).shape[:2] == size


def coded(colour, red: float, blue: float, full: bool, width=64, height=64) -> av.VideoFrame:
    """The colour in YCbCr with these weights of red and blue, as BT.601, 709 and 2020 define it."""
    r, g, b = (one / 255 for one in colour)
    y = red * r + (1 - red - blue) * g + blue * b
    parts = y, (b - y) / (2 - 2 * blue), (r - y) / (2 - 2 * red)
    scale, offset = ((255, 255, 255), (0, 128, 128)) if full else ((219, 224, 224), (16, 128, 128))
    frame = av.VideoFrame(width, height, "yuv444p")
    for plane, part, times, plus in zip(frame.planes, parts, scale, offset, strict=True):
        plane.update(bytes([round(part * times + plus)]) * plane.buffer_size)
    return frame


SPACES = {"BT.601": (5, 0.299, 0.114), "BT.709": (1, 0.2126, 0.0722), "BT.2020": (9, 0.2627, 0.0593)}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_colours_are_of_the_files_matrix_and_range(tmp_path, space, full):
    number, red, blue = SPACES[space]
    frames = [coded(colour, red, blue, full) for colour in COLOURS]
    for frame in frames:
        frame.colorspace, frame.color_range = number, 2 if full else 1
    path = video(tmp_path / "v.mp4", frames, colorspace=number, color_range=2 if full else 1)
    opened = open_pictures(path)
    for i, colour in enumerate(COLOURS):
        assert np.abs(np.asarray(opened.image(i, 10.0))[32, 32].astype(int) - colour).max() <= 3


@pytest.mark.parametrize(("width", "height", "space"), [(720, 576, "BT.601"), (1280, 720, "BT.709")])
def test_colours_without_a_matrix_are_taken_by_size_as_players_do(tmp_path, width, height, space):
    path = video(tmp_path / "v.mp4", [coded(COLOURS[1], *SPACES[space][1:], False, width, height)])
    assert np.abs(first(path)[height // 2, width // 2] - COLOURS[1]).max() <= 3


@pytest.mark.parametrize("ending", ["MP4", "mkv", "webm", "avi"])
def test_a_video_is_sampled_by_time(tmp_path, ending):
    codec = {"codec": "libvpx-vp9", "options": {"lossless": "1"}} if ending == "webm" else {}
    path = video(tmp_path / f"v.{ending}", greys(30), 30, **codec)
    assert shown(path, 2, range(2)) == [0, 15]
    assert shown(path, 10, range(10)) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert shown(path, 30, range(30)) == list(range(30))
    assert shown(path, 60, range(6)) == [0, 0, 1, 1, 2, 2]
    assert [count_frames(path, fps)[0] for fps in (2, 1, 30, 60, 0.5)] == [2, 1, 30, 60, 1]


def test_a_rate_of_29_97_and_a_variable_rate(tmp_path):
    path = video(tmp_path / "v.mp4", greys(64, 3), Fraction(30000, 1001))
    assert shown(path, 2, range(5), 3) == [0, 14, 29, 44, 59]  # 14.985, 29.97, ... pictures after the first
    for rate in (30000 / 1001, float(np.float32(29.97))):  # as the shards keep it
        assert shown(path, rate, range(64), 3) == list(range(64))
    path = video(tmp_path / "w.mkv", greys(7, 30), 1000, pts=[0, 100, 480, 500, 1600, 1700, 3100])
    assert shown(path, 2, range(7), 30) == [0, 3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_track_that_starts_late_is_shown_at_the_players_time(tmp_path, ending):
    path = video(tmp_path / f"v.{ending}", greys(20), pts=range(20, 40), audio_s=4)
    assert shown(path, 2, range(8)) == [0, 0, 0, 0, 0, 5, 10, 15]  # the first picture at 2.0 s
    assert shown(path, 10, (19, 20, 21, 39)) == [0, 0, 1, 19]
    frames, late_s = count_frames(path, 10)
    assert (frames, round(late_s, 3)) == (40, 2.0)


@pytest.mark.parametrize(("ending", "options"), [("mp4", {}), ("mkv", {"x264-params": "open-gop=1"})])
def test_jumps_and_reordered_pictures_change_nothing(tmp_path, monkeypatch, ending, options):
    path = video(tmp_path / f"v.{ending}", greys(63, 3), gop_size=6, options={"bf": "3", **options})
    assert shown(path, 10, range(63), 3) == list(range(63))
    monkeypatch.setattr(Video, "_worth_a_jump", 4)
    numbers = [62, 3, 50, 7, 6, 61, 0, 40, 41, 12, 5, 60]
    assert shown(path, 10, numbers, 3) == numbers
