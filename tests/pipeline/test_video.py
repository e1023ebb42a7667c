"""The picture that a player shows, at the player's time. Expected values are written by hand; where an ffmpeg binary is
installed (imageio-ffmpeg), its frames must be the same."""

from __future__ import annotations

import base64
import io
import json
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from av.stream import Disposition
from PIL import Image

from pipeline.media import count_and_delay, count_frames, open_pictures
from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.video import VideoTimes

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (240, 240, 240)
NAMES = {RED: "R", GREEN: "G", BLUE: "B", WHITE: "W"}


def quarters(side: int = 32) -> np.ndarray:
    """Red and green above blue and white."""
    picture = np.zeros((2 * side, 2 * side, 3), np.uint8)
    for i, colour in enumerate(NAMES):
        row, column = divmod(i, 2)
        picture[row * side :, column * side :] = colour
    return picture


def seen(image: Image.Image | np.ndarray) -> str:
    """The colours of the quarters, row by row."""
    pixels = np.asarray(image).astype(int)
    height, width = pixels.shape[:2]
    places = [(height // 4, width // 4), (height // 4, -width // 4), (-height // 4, width // 4)]
    found = [pixels[place] for place in [*places, (-height // 4, -width // 4)]]
    return "".join(NAMES[min(NAMES, key=lambda name: abs(np.array(name) - one).sum())] for one in found)


def video(
    path: Path, pictures, rate=10, codec="libx264", pix_fmt="yuv444p", source="rgb24", pts=None, audio_s=0.0, **set_
):
    """A video of RGB arrays or VideoFrames; `set_` are attributes of the encoder."""
    with av.open(str(path), "w") as container:
        options = {"qp": "1", "preset": "ultrafast", "bf": "0"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=rate, options=options)
        frames = [p if isinstance(p, av.VideoFrame) else av.VideoFrame.from_ndarray(p, source) for p in pictures]
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        stream.codec_context.time_base = 1 / Fraction(rate)
        for name, value in set_.items():
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


def greys(count: int) -> list[np.ndarray]:
    """Picture i is 20 + 6 i bright."""
    return [np.full((32, 32, 3), 20 + 6 * i, np.uint8) for i in range(count)]


def shown(path: Path, fps: float, frames) -> list[int]:
    """Which of `greys` each frame shows."""
    opened = open_pictures(path)
    found = [round((float(np.asarray(opened.image(i, fps)).mean()) - 20) / 6) for i in frames]
    opened.close()
    return found


def first(path: Path) -> Image.Image:
    opened = open_pictures(path)
    image = opened.image(0, 2.0)
    opened.close()
    return image


def by_ffmpeg(path: Path, width: int, height: int, *before: str, after: tuple[str, ...] = ()) -> np.ndarray:
    """The first frame that the ffmpeg program gives, RGB."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    call = [
        ffmpeg,
        "-v",
        "error",
        *before,
        "-i",
        path,
        *after,
        "-frames:v",
        "1",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    content = subprocess.run(call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True, timeout=60).stdout
    return np.frombuffer(content, np.uint8).reshape(height, width, 3)


def in_folder_and_arrow(folder: Path, content: bytes, ending: str) -> list[np.ndarray]:
    """What a folder of images and an Arrow file with that image give."""
    (folder / "v").mkdir()
    (folder / "v" / f"0.{ending}").write_bytes(content)
    table = pa.table({"frame": [base64.b64encode(content).decode()]})
    with pa.ipc.new_stream(str(folder / "v.arrow"), table.schema) as writer:
        writer.write_table(table)
    return [np.asarray(first(folder / name)) for name in ("v", "v.arrow")]


def saved(image: Image.Image, kind: str, orientation: int | None = None, **more) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, kind, exif=exif, **more)
    return file.getvalue()


# ---- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [(1, None), (2, 0), (3, 3), (4, 1), (5, 5), (6, 2), (7, 6), (8, 4)],  # how PIL's transpose makes it of the upright
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_turns_a_picture_in_a_folder_and_in_an_arrow_file(tmp_path, orientation, stored, kind):
    upright = Image.fromarray(quarters()[:, :48])
    lying = upright if stored is None else upright.transpose(Image.Transpose(stored))
    for found in in_folder_and_arrow(tmp_path, saved(lying, kind, orientation), kind.lower()):
        assert found.shape == (64, 48, 3)
        assert [
            NAMES[min(NAMES, key=lambda n: abs(np.array(n) - found[y, x]).sum())]
            for y, x in ((8, 8), (8, 40), (56, 8), (56, 40))
        ] == [*"RGBW"]


def test_damaged_exif_turns_nothing(tmp_path):
    content = (
        saved(Image.fromarray(quarters()), "JPEG", 6)
        .replace(b"Exif\0\0MM", b"Exif\0\0XX")
        .replace(b"Exif\0\0II", b"Exif\0\0XX")
    )
    assert all(seen(found) == "RGBW" for found in in_folder_and_arrow(tmp_path, content, "jpg"))


def test_16_bits_of_grey_are_scaled_and_turned(tmp_path):
    grey = np.array([[0, 0], [13107, 39321], [62258, 65535]], np.uint16).repeat(8, 0).repeat(8, 1)
    content = saved(Image.fromarray(grey), "PNG", 3)
    for found in in_folder_and_arrow(tmp_path, content, "png"):
        assert found[::8, ::8].tolist() == [[[v] * 3 for v in row] for row in ([255, 242], [153, 51], [0, 0])]


def transparent() -> dict[str, tuple[Image.Image, dict]]:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (200, 100, 50, 255)
    rgba[:, 4:] = (200, 100, 50, 0)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([200, 100, 50, 255, 255, 255])
    palette.paste(0, (0, 0, 4, 8))
    rgb = Image.fromarray(np.where(rgba[..., 3:] > 0, rgba[..., :3], np.uint8(255)))
    grey = Image.merge("LA", [Image.new("L", (8, 8), 117), Image.fromarray(rgba[..., 3])])
    return {
        "RGBA": (Image.fromarray(rgba), {}),
        "palette": (palette, {"transparency": 1}),
        "colour key": (rgb, {"transparency": (255, 255, 255)}),
        "LA": (grey, {}),
    }


@pytest.mark.parametrize("kind", ["RGBA", "palette", "colour key", "LA"])
def test_what_is_transparent_is_black(tmp_path, kind):
    image, options = transparent()[kind]
    for found in in_folder_and_arrow(tmp_path, saved(image, "PNG", **options), "png"):
        assert found[0].tolist() == [[117] * 3 if kind == "LA" else [200, 100, 50]] * 4 + [[0, 0, 0]] * 4


def test_half_transparent_is_half_as_bright(tmp_path):
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 128))
    for found in in_folder_and_arrow(tmp_path, saved(half, "PNG"), "png"):
        assert np.abs(found[0, 0].astype(int) - (100, 50, 25)).max() <= 1


# ---- videos: as --------------------------------------------------------------------------------------

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


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    content = bytearray(path.read_bytes())
    a, b, c, d = (one << 16 for one in matrix)
    place = content.index(b"tkhd") + 44
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", MATRICES)
def test_a_display_matrix_turns_and_mirrors(tmp_path, name):
    matrix, expected = MATRICES[name]
    path = with_matrix(video(tmp_path / "v.mp4", [quarters()]), matrix)
    assert seen(first(path)) == expected


@pytest.mark.parametrize("name", MATRICES)
def test_ffmpeg_turns_and_mirrors_alike(tmp_path, name):
    path = with_matrix(video(tmp_path / "v.mp4", [quarters()]), MATRICES[name][0])
    theirs = by_ffmpeg(path, 64, 64)
    assert seen(theirs) == MATRICES[name][1]
    assert np.abs(np.asarray(first(path)).astype(int) - theirs).max() <= 3


@pytest.mark.parametrize(("aspect", "size"), [((4, 3), (64, 32)), ((1, 2), (48, 64)), ((1, 1), (48, 32))])
def test_pixels_that_are_not_square_are_made_so(tmp_path, aspect, size):
    picture = np.full((32, 48, 3), 100, np.uint8)
    for ending in ("mp4", "mkv"):
        path = video(tmp_path / f"v.{ending}", [picture], sample_aspect_ratio=Fraction(*aspect))
        assert first(path).size == size
    turned = with_matrix(video(tmp_path / "t.mp4", [picture], sample_aspect_ratio=Fraction(*aspect)), (0, 1, -1, 0))
    assert first(turned).size == size[::-1]


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


COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (128, 128, 128), (16, 16, 16), (240, 240, 240)]
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
    theirs = by_ffmpeg(path, 64, 64)
    assert np.abs(np.asarray(opened.image(0, 10.0)).astype(int) - theirs).max() <= 3


@pytest.mark.parametrize(
    ("width", "height", "space"), [(64, 64, "BT.601"), (720, 576, "BT.601"), (1280, 720, "BT.709")]
)
def test_colours_without_a_matrix_are_taken_by_size_as_players_do(tmp_path, width, height, space):
    _, red, blue = SPACES[space]
    path = video(tmp_path / "v.mp4", [coded(COLOURS[1], red, blue, False, width, height)])
    assert np.abs(np.asarray(first(path))[height // 2, width // 2].astype(int) - COLOURS[1]).max() <= 3


def test_motion_jpeg_is_full_range_601_at_any_size(tmp_path):
    path = video(
        tmp_path / "v.avi",
        [np.full((720, 1280, 3), COLOURS[1], np.uint8)],
        codec="mjpeg",
        pix_fmt="yuvj420p",
        color_range=2,
    )
    assert np.abs(np.asarray(first(path))[360, 640].astype(int) - COLOURS[1]).max() <= 6


def test_a_video_may_have_alpha_or_16_bits(tmp_path):
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[:, :16] = (200, 100, 50, 255)
    picture[:, 16:] = (200, 100, 50, 0)
    path = video(tmp_path / "a.mkv", [picture], codec="ffv1", pix_fmt="bgra", source="rgba")
    assert np.asarray(first(path))[0, ::16].tolist() == [[200, 100, 50], [0, 0, 0]]
    grey = np.full((32, 32), 39321, np.uint16)
    path = video(tmp_path / "g.mkv", [grey], codec="ffv1", pix_fmt="gray16le", source="gray16le")
    assert np.abs(np.asarray(first(path)).astype(int) - 153).max() <= 1


# ---- videos: which and when --------------------------------------------------------------------------


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
        for i, stream in enumerate(streams):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 + 40 * i, np.uint8), "rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 10)
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())
    return path


NONE, DEFAULT, COVER = Disposition(0), Disposition.default, Disposition.attached_pic


@pytest.mark.parametrize(
    ("dispositions", "taken"),
    [((NONE, DEFAULT), 1), ((DEFAULT, NONE), 0), ((NONE, NONE, DEFAULT), 2), ((NONE, NONE), 0)],
)
def test_the_default_track_is_taken(tmp_path, dispositions, taken):
    path = tracks(tmp_path / "v.mkv", *dispositions)
    assert abs(float(np.asarray(first(path)).mean()) - (20 + 40 * taken)) < 6


def test_a_cover_is_no_video(tmp_path):
    path = tracks(tmp_path / "v.mp4", COVER, DEFAULT)
    assert abs(float(np.asarray(first(path)).mean()) - 60) < 6
    assert count_frames(path, 10) == 1
    assert count_frames(tracks(tmp_path / "w.mp4", COVER), 10) is None


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


@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_an_encoders_delay_is_no_late_start(tmp_path, ending):
    path = video(tmp_path / f"v.{ending}", greys(20), rate=50, pts=range(3, 23), audio_s=1)  # 60 ms
    assert shown(path, 50, range(20)) == list(range(20))
    assert count_and_delay(path, 50) == (20, 0.0)


def test_an_edit_list_cuts_the_start_off(tmp_path):
    path = video(tmp_path / "v.mp4", greys(30), gop_size=12)
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 12
    content[place : place + 8] = struct.pack(">2I", 2300, 7 * 1024)  # 2.3 s from the eighth picture on
    path.write_bytes(content)
    assert count_frames(path, 10) == 23
    assert shown(path, 10, range(23)) == list(range(7, 30))
    assert np.abs(np.asarray(first(path)).astype(int) - by_ffmpeg(path, 32, 32)).max() <= 2


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)])
def test_rational_rates_stay_exact_for_hours(rate):
    """Matroska writes whole milliseconds, mp4 exact ticks."""
    numbers = np.arange(3 * 3600 * 24)
    milliseconds = np.floor(numbers * (1000 / float(rate)) + 0.5).astype(np.int64)
    matroska = VideoTimes(milliseconds, np.zeros(1, np.int64), 1e-3, int(milliseconds[-1]) + 17)
    mp4 = VideoTimes(numbers * 1001, np.zeros(1, np.int64), 1 / rate.numerator, (int(numbers[-1]) + 1) * 1001)
    for number in (*range(0, len(numbers), 211), len(numbers) - 1):
        assert matroska.picture(number, float(rate)) == mp4.picture(number, float(rate)) == number
    assert mp4.count(float(rate)) == len(numbers)


def test_preprocess_says_which_videos_start_late(tmp_path):
    (tmp_path / "frames").mkdir()
    video(tmp_path / "frames" / "v.mp4", greys(20), pts=range(20, 40), audio_s=4)
    turns = [{"role": "assistant", "content": "x", "start_frame": 2, "end_frame": 3, "time": 1.0}]
    clip = {"video_uid": "v", "conversation": turns, "dst": [], "fps": 2, "start_frame_idx": 0, "end_frame_idx": 8}
    (tmp_path / "train_x.json").write_text(json.dumps([clip]))
    manifest, _ = preprocess(
        [tmp_path / "train_x.json"], tmp_path / "out", Options(frames_root=str(tmp_path / "frames"))
    )
    told = {hazard["name"]: hazard["text"] for hazard in manifest["hazards"]}
    assert "e.g. v (at 2 s; frames before it show it, too)" in told["first picture comes late"]
    assert "annotations longer than the frames" not in told
