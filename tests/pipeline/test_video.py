"""The picture that a player shows, at the player's time. Expected values are written by hand; where an ffmpeg binary is
installed (imageio-ffmpeg), its frames must be the same."""

from __future__ import annotations

import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from pipeline.errors import InputError
from pipeline.media import count_and_delay, count_frames, open_pictures

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (128, 128, 128), (16, 16, 16), (240, 240, 240)]
NAMES = {(220, 30, 30): "R", (30, 200, 30): "G", (30, 30, 220): "B", (240, 240, 240): "W"}


def video(path, pictures, rate=10, codec="libx264", pix_fmt="yuv444p", source="rgb24", pts=None, audio_s=0.0, **more):
    """A video of RGB arrays or VideoFrames; pts in pictures. `more`: attributes of the encoder, or `options`."""
    with av.open(str(path), "w", options=more.pop("container", {})) as container:
        options = {"qp": "1", "preset": "ultrafast", "bf": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=options | more.pop("options", {}))
        frames = [p if isinstance(p, av.VideoFrame) else av.VideoFrame.from_ndarray(p, source) for p in pictures]
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
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


def greys(count: int, step: int = 6, side: int = 32) -> list[np.ndarray]:
    """Picture i is 20 + step * i bright."""
    return [np.full((side, side, 3), 20 + step * i, np.uint8) for i in range(count)]


def shown(path: Path, fps: float, frames, step: int = 6) -> list[int]:
    """Which of `greys` each frame shows."""
    opened = open_pictures(path)
    return [round((float(np.asarray(opened.image(i, fps)).mean()) - 20) / step) for i in frames]


def first(path: Path) -> np.ndarray:
    return np.asarray(open_pictures(path).image(0, 10.0)).astype(int)


def quarters() -> np.ndarray:
    """Red and green above blue and white."""
    return np.array(list(NAMES), np.uint8).reshape(2, 2, 3).repeat(32, 0).repeat(32, 1)


def seen(pixels: np.ndarray) -> str:
    """The colours of the quarters, row by row."""
    places = pixels.astype(int)[16::32, 16::32].reshape(4, 3)
    return "".join(NAMES[min(NAMES, key=lambda name: abs(np.array(name) - one).sum())] for one in places)


def by_ffmpeg(path: Path, width: int, height: int, *before: str) -> np.ndarray:
    """The first frame that the ffmpeg program gives, RGB."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    raw = ["-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    call = [ffmpeg, "-v", "error", *before, "-i", path, *raw]
    content = subprocess.run(call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    return np.frombuffer(content, np.uint8).reshape(height, width, 3)


# ---- as ----------------------------------------------------------------------------------------------

MATRICES = {  # x' = a x + c y, y' = b x + d y: what is shown of red, green above blue, white
    "as stored": ((1, 0, 0, 1), "RGBW"),
    "hflip": ((-1, 0, 0, 1), "GRWB"),
    "vflip": ((1, 0, 0, -1), "BWRG"),
    "180": ((-1, 0, 0, -1), "WBGR"),
    "90 clockwise": ((0, 1, -1, 0), "BRWG"),
    "90 counterclockwise": ((0, -1, 1, 0), "GWRB"),
    "transpose": ((0, 1, 1, 0), "RBGW"),
    "transverse": ((0, -1, -1, 0), "WGBR"),
}


def patch(path: Path, after: bytes, offset: int, content: bytes) -> Path:
    whole = bytearray(path.read_bytes())
    place = whole.index(after) + offset
    whole[place : place + len(content)] = content
    path.write_bytes(whole)
    return path


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    a, b, c, d = (one << 16 for one in matrix)
    return patch(path, b"tkhd", 44, struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_turns_and_mirrors_as_ffmpeg_does(tmp_path, name):
    matrix, expected = MATRICES[name]
    path = with_matrix(video(tmp_path / "v.mp4", [quarters()]), matrix)
    assert seen(first(path)) == expected
    assert np.abs(first(path) - by_ffmpeg(path, 64, 64)).max() <= 3


@pytest.mark.parametrize(("aspect", "size"), [((4, 3), (64, 32)), ((1, 2), (48, 64)), ((1, 1), (48, 32))])
def test_pixels_that_are_not_square_are_made_so(tmp_path, aspect, size):
    picture = np.full((32, 48, 3), 100, np.uint8)
    for ending in ("mp4", "mkv"):
        path = video(tmp_path / f"v.{ending}", [picture], sample_aspect_ratio=Fraction(*aspect))
        assert first(path).shape[1::-1] == size
    assert first(with_matrix(tmp_path / "v.mp4", (0, 1, -1, 0))).shape[:2] == size


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
    assert np.abs(first(path) - by_ffmpeg(path, 64, 64)).max() <= 3


@pytest.mark.parametrize(
    ("width", "height", "space"), [(64, 64, "BT.601"), (720, 576, "BT.601"), (1280, 720, "BT.709")]
)
def test_colours_without_a_matrix_are_taken_by_size_as_players_do(tmp_path, width, height, space):
    path = video(tmp_path / "v.mp4", [coded(COLOURS[1], *SPACES[space][1:], False, width, height)])
    assert np.abs(first(path)[height // 2, width // 2] - COLOURS[1]).max() <= 3


# ---- which track -------------------------------------------------------------------------------------

NONE, DEFAULT, COVER = Disposition(0), Disposition.default, Disposition.attached_pic


def tracks(path: Path, *dispositions: Disposition) -> Path:
    """Video tracks of one picture each, track i is 20 + 40 i bright."""
    with av.open(str(path), "w", options={"default_mode": "passthrough"} if path.suffix == ".mkv" else {}) as container:
        streams = []
        for disposition in dispositions:
            cover = Disposition.attached_pic in disposition
            streams.append(container.add_stream("mjpeg" if cover else "mpeg4", rate=10))
            stream = streams[-1]
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p" if cover else "yuv420p"
            stream.disposition = disposition.value
        for stream, picture in zip(streams, greys(len(streams), 40), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 10)
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("dispositions", "taken"),
    [((NONE, DEFAULT), 1), ((DEFAULT, NONE), 0), ((NONE, NONE, DEFAULT), 2), ((NONE, NONE), 0)],
)
def test_the_default_track_is_taken(tmp_path, dispositions, taken):
    assert shown(tracks(tmp_path / "v.mkv", *dispositions), 10, [0], 40) == [taken]


# ---- when --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov", "webm", "avi", "MP4"])
def test_a_video_is_sampled_by_time(tmp_path, ending):
    codec = {"codec": "libvpx-vp9", "options": {"lossless": "1"}} if ending == "webm" else {}
    path = video(tmp_path / f"v.{ending}", greys(30), 30, **codec)
    assert shown(path, 2, range(2)) == [0, 15]
    assert shown(path, 10, range(10)) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert shown(path, 30, range(30)) == list(range(30))
    assert shown(path, 60, range(6)) == [0, 0, 1, 1, 2, 2]
    assert [count_frames(path, fps) for fps in (2, 1, 30, 60, 0.5)] == [2, 1, 30, 60, 1]


def test_fragments_a_rate_of_29_97_and_a_variable_rate(tmp_path):
    fragments = {"container": {"movflags": "frag_keyframe+empty_moov"}, "gop_size": 5}
    assert shown(video(tmp_path / "f.mp4", greys(20), 30, **fragments), 30, range(20)) == list(range(20))
    path = video(tmp_path / "v.mp4", greys(64, 3), Fraction(30000, 1001))
    assert shown(path, 2, range(5), 3) == [0, 14, 29, 44, 59]  # 14.985, 29.97, ... pictures after the first
    for rate in (30000 / 1001, float(np.float32(29.97))):  # as the shards keep it
        assert shown(path, rate, range(64), 3) == list(range(64))
    for ending in ("mkv", "mp4"):
        path = video(tmp_path / f"w.{ending}", greys(7, 30), 1000, pts=[0, 100, 480, 500, 1600, 1700, 3100])
        assert shown(path, 2, range(7), 30) == [0, 3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_a_track_that_starts_late_is_shown_at_the_players_time(tmp_path, ending):
    path = video(tmp_path / f"v.{ending}", greys(20), pts=range(20, 40), audio_s=4)
    assert shown(path, 2, range(8)) == [0, 0, 0, 0, 0, 5, 10, 15]  # the first picture at 2.0 s
    assert shown(path, 10, (19, 20, 21, 39)) == [0, 0, 1, 19]
    frames, late_s = count_and_delay(path, 10)
    assert (frames, round(late_s, 3)) == (40, 2.0)
    for at in (2.0, 3.0):
        ours = np.asarray(open_pictures(path).image(int(at * 10), 10.0)).astype(int)
        assert np.abs(ours - by_ffmpeg(path, 32, 32, "-ss", str(at))).max() <= 2


def test_an_edit_list_cuts_the_start_off(tmp_path):
    path = video(tmp_path / "v.mp4", greys(30), gop_size=12)
    patch(path, b"elst", 12, struct.pack(">2I", 2300, 7 * 1024))  # 2.3 s from the eighth picture on
    assert count_frames(path, 10) == 23
    assert shown(path, 10, range(23)) == list(range(7, 30))
    assert np.abs(first(path) - by_ffmpeg(path, 32, 32)).max() <= 2


# ---- decoding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "options"), [("mp4", {}), ("mkv", {"x264-params": "open-gop=1"}), ("mov", {})])
def test_jumps_and_reordered_pictures_change_nothing(tmp_path, monkeypatch, ending, options):
    path = video(tmp_path / f"v.{ending}", greys(63, 3), gop_size=6, options={"bf": "3", **options})
    assert shown(path, 10, range(63), 3) == list(range(63))
    monkeypatch.setattr("pipeline.video.WORTH_A_JUMP", 4)
    numbers = [62, 3, 50, 7, 6, 61, 0, 40, 41, 12, 5, 60]
    assert shown(path, 10, numbers, 3) == numbers


def test_a_damaged_picture_is_refused_and_others_are_not(tmp_path):
    rng = np.random.default_rng(0)
    path = video(tmp_path / "v.mp4", [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(30)], gop_size=10)
    whole = open_pictures(path)
    good = [np.asarray(whole.image(i, 10.0)) for i in range(30)]
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    content[places[14] : places[14] + 400] = bytes(400)
    path.write_bytes(content)
    opened = open_pictures(path)
    for number in (14, 16):  # built on the damaged one
        with pytest.raises(ValueError, match=r"damaged|Invalid data"):
            opened.image(number, 10.0)
    for number in (25, 29, 0, 7):
        assert np.array_equal(np.asarray(opened.image(number, 10.0)), good[number])


# ---- what is refused ---------------------------------------------------------------------------------


def test_what_is_no_video_or_too_long_or_leads_elsewhere_is_refused(tmp_path, monkeypatch):
    path = video(tmp_path / "v.mp4", greys(30))
    whole = path.read_bytes()
    for content, why in (
        (b"", "not a video that can be read"),
        (whole[: len(whole) // 2], "get the file again"),
        (b"ffconcat version 1.0\nfile whole.mp4\n", "not a video that can be read"),
        (whole.replace(b"avc1", b"zzzz"), "coded as nothing that FFmpeg knows; convert it"),
    ):
        path.write_bytes(content)
        assert count_frames(path) is None
        with pytest.raises(InputError, match=f"v.mp4: .*{why}"):
            open_pictures(path)
    path.write_bytes(whole)
    monkeypatch.setattr("pipeline.video.MAX_PICTURES", 29)
    with pytest.raises(InputError, match="more than 29 pictures; cut it into parts"):
        open_pictures(path)
