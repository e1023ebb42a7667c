from __future__ import annotations

import base64
import dataclasses
import json
import pickle
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from by_hand import clip_example, jpeg, write_frames
from PIL import Image

from pipeline.errors import InputError
from pipeline.media import (
    ArrowFrames,
    count_frames,
    find_frames,
    fit,
    images_in,
    read_base64,
    read_frames,
)
from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.video import Video, VideoTimes, read_times
from trainer.frame_source import PixelFrames, open_frames


def decode(text, side):
    return fit(read_base64(text), side)


DRIVE = Path(__file__).parents[3] / "shared" / "real" / "drive.mp4"


def grey(value: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def clip(**more):
    return clip_example([], start=3, frames=4, video="cam_nusar-1", **more)


def at(fps: float, video: str = "v"):
    """A clip of that video, at that rate."""
    return dataclasses.replace(clip_example([], video=video), fps=fps)


def shades(found: np.ndarray, step: int = 8) -> list[int]:
    """Each frame's number, which `video` and `images` paint as a shade of grey."""
    return [round(float(frame.mean()) / step) for frame in found]


def video(
    path: Path,
    count: int,
    rate: Fraction | int = 30,
    *,
    step: int = 8,
    codec: str = "libx264",
    pts: Sequence[int] | None = None,  # milliseconds
    gop: int = 12,
    side: int = 64,
    pix_fmt: str = "yuv420p",
    **options: str,
) -> Path:
    """Picture i is grey, `step` * i bright."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = side, side, pix_fmt
        stream.options = {"qp": "1", **options}
        stream.codec_context.gop_size = gop
        base = 1 / Fraction(rate) if pts is None else Fraction(1, 1000)
        stream.codec_context.time_base = base
        for i in range(count):
            picture = av.VideoFrame.from_ndarray(grey(step * i, side, side), "rgb24")
            picture.pts, picture.time_base = (i if pts is None else pts[i]), base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def images(folder: Path, names: Sequence[str]) -> Path:
    """The i-th image of the list is `10 * i` bright."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(grey(10 * i)).save(folder / name)
    return folder


# ---- Arrow files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", [False, True])
def test_row_i_is_frame_i_of_the_video(tmp_path, file_format):
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(10 * i) for i in range(20)], file_format)
    found = PixelFrames(tmp_path, 64).load(clip(), 3, 7)
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
    assert len(PixelFrames(tmp_path, 64).load(clip(), 3, 7)) == 4


def test_missing_files_and_frames_say_where_and_how_many(tmp_path):
    with pytest.raises(InputError, match=r"no such folder.*--frames-root"):
        PixelFrames(tmp_path / "nowhere", 64)
    with pytest.raises(InputError, match="clip c0: no frames of cam_nusar-1 below"):
        PixelFrames(tmp_path, 64).load(clip(), 3, 7)
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(0)] * 5)
    with pytest.raises(InputError, match=r"cam_nusar-1.arrow: 5 frames, but clip c0 needs frame 6"):
        PixelFrames(tmp_path, 64).load(clip(), 3, 7)


@pytest.mark.parametrize(
    "content",
    ["no base64!", base64.b64encode(b"no JPEG").decode(), jpeg(grey(1))[:-200], "", None],
)
def test_a_broken_frame_is_named(tmp_path, content):
    path = tmp_path / "cam_nusar-1.arrow"
    table = pa.table({"frame": pa.array([jpeg(grey(1)), content], pa.string())})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    source = PixelFrames(tmp_path, 64)
    assert len(source.load(clip(), 0, 1)) == 1
    with pytest.raises(InputError, match=r"cam_nusar-1.arrow frame 1: no base64 JPEG"):
        source.load(clip(), 0, 2)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.video.MAX_PIXELS", 100 * 100)
    with pytest.raises(ValueError, match="101 x 100 pixels"):
        decode(jpeg(grey(0, 100, 101)), 64)


def test_files_that_are_no_arrow_or_have_no_frame_column_are_named(tmp_path):
    path = tmp_path / "cam_nusar-1.arrow"
    for content in (b"", b"hello", b"ARROW1 but not really"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cam_nusar-1.arrow: not an Arrow IPC file"):
            PixelFrames(tmp_path, 64).load(clip(), 3, 4)
    table = pa.table({"image": ["x"]})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="columns image, expected one named frame"):
        PixelFrames(tmp_path, 64).load(clip(), 3, 4)


def test_the_cache_is_bounded_and_changes_nothing(tmp_path):
    write_frames(tmp_path / "cam_nusar-1.arrow", [grey(10 * i) for i in range(20)])
    cached, plain = PixelFrames(tmp_path, 64, cache_bytes=2 * 3 * 64 * 64), PixelFrames(tmp_path, 64, 0)
    for _ in range(2):
        assert np.array_equal(cached.load(clip(), 3, 7), plain.load(clip(), 3, 7))
    assert len(cached._cache) == 2
    assert not plain._cache


def test_the_root_comes_from_the_manifest_unless_given(tmp_path):
    manifest = {"options": {"frames_root": str(tmp_path)}}
    assert open_frames(manifest, None, 64).root == tmp_path
    (tmp_path / "other").mkdir()
    assert open_frames(manifest, tmp_path / "other", 64).root == tmp_path / "other"
    with pytest.raises(InputError, match="--frames-root"):
        open_frames({"options": {"frames_root": None}}, None, 64)


# ---- video files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov", "webm", "avi"])
def test_a_video_is_sampled_by_time(tmp_path, ending):
    if ending == "webm":
        video(tmp_path / "v.webm", 30, codec="libvpx-vp9", lossless="1")
    else:
        video(tmp_path / f"v.{ending}", 30, bf="0")
    source = PixelFrames(tmp_path, 64)
    assert shades(source.load(at(2), 0, 2)) == [0, 15]
    assert shades(source.load(at(10), 0, 10)) == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert shades(source.load(at(30), 0, 30)) == list(range(30))
    assert shades(source.load(at(60), 0, 6)) == [0, 0, 1, 1, 2, 2]


def test_a_rate_of_29_97_neither_drifts_nor_jumps(tmp_path):
    video(tmp_path / "v.mp4", 64, Fraction(30000, 1001), step=4)
    source = PixelFrames(tmp_path, 64)
    # 0, 14.985, 29.97, 44.955 and 59.94 pictures after the first
    assert shades(source.load(at(2), 0, 5), 4) == [0, 14, 29, 44, 59]
    for rate in (30000 / 1001, float(np.float32(29.97))):  # as the shards keep it
        assert shades(source.load(at(rate), 0, 64), 4) == list(range(64))


def test_a_variable_rate_shows_what_a_player_shows(tmp_path):
    times = [0, 100, 480, 500, 1600, 1700, 3100]
    for ending in ("mkv", "mp4"):
        video(tmp_path / ending / f"v.{ending}", 7, pts=times, step=30)
        # 0, 0.5, 1, 1.5, 2, 2.5 and 3 seconds
        assert shades(PixelFrames(tmp_path / ending, 64).load(at(2), 0, 7), 30) == [0, 3, 3, 3, 5, 5, 5]


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_time_starts_with_the_first_picture(tmp_path, ending):
    video(tmp_path / f"v.{ending}", 4, pts=[7300, 7800, 8300, 8800], step=60)
    source = PixelFrames(tmp_path, 64)
    assert shades(source.load(at(2), 0, 4), 60) == [0, 1, 2, 3]
    with pytest.raises(InputError, match=r"v.*: 4 frames at 2 fps, but clip c0 needs frame 4"):
        source.load(at(2), 0, 5)


def test_the_number_of_frames_is_those_before_the_end(tmp_path):
    path = video(tmp_path / "v.mp4", 31, step=4)  # 1.0333 seconds
    assert [count_frames(path, fps) for fps in (2, 1, 30, 60, 0.5)] == [3, 2, 31, 62, 1]
    assert count_frames(video(tmp_path / "w.mkv", 30), 2) == 2  # frame 2 would be at 1.0, the end


def test_rounded_times_do_not_shift_a_frame():
    matroska = VideoTimes(np.array([0, 33, 67, 100, 133, 167]), np.array([0]), 0.001, 200)
    assert [matroska.picture(i, 30.0) for i in range(6)] == [0, 1, 2, 3, 4, 5]
    assert matroska.count(30.0) == 6
    assert matroska.count(5.0) == 1
    coarse = VideoTimes(np.array([10, 11, 12, 13]), np.array([0]), 1 / 30, 14)
    assert [coarse.picture(i, 40.0) for i in range(4)] == [0, 0, 1, 2]  # 0, 0.75, 1.5 and 2.25 ticks
    assert coarse.picture(99, 40.0) == 3


@pytest.mark.parametrize(("ending", "options"), [("mp4", {}), ("mkv", {"x264-params": "open-gop=1"}), ("mov", {})])
def test_jumps_and_reordered_pictures_change_nothing(tmp_path, monkeypatch, ending, options):
    video(tmp_path / f"v.{ending}", 63, step=4, gop=6, bf="3", **options)
    in_order = PixelFrames(tmp_path, 64).load(at(30), 0, 63)
    assert shades(in_order, 4) == list(range(63))
    monkeypatch.setattr("pipeline.video.WORTH_A_JUMP", 4)
    source = PixelFrames(tmp_path, 64, cache_bytes=0)
    for number in (62, 3, 50, 7, 6, 61, 0, 40, 41, 12, 5, 60):
        assert np.array_equal(source.load(at(30), number, number + 1)[0], in_order[number])


def test_windows_in_order_decode_a_file_once(tmp_path, monkeypatch):
    video(tmp_path / "v.mp4", 120, step=2)
    decoded = []
    monkeypatch.setattr("pipeline.video.Video._decode", _counting(decoded))
    source = PixelFrames(tmp_path, 64, cache_bytes=0)
    for start in range(0, 40, 5):
        source.load(at(10), start, start + 5)
    assert len(decoded) == 119  # the last frame asked for is picture 117, and the next is looked at


def _counting(decoded):
    original = Video._decode

    def counted(self, key):
        for place, picture in original(self, key):
            decoded.append(place)
            yield place, picture

    return counted


def test_a_phone_held_upright_is_turned(tmp_path):
    path = tmp_path / "v.mp4"
    half = grey(0)
    half[:, 32:] = 255  # stored: white on the right
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(half, "rgb24")))
        container.mux(stream.encode())
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # x' = -y, y' = x: what was right is below
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 64 << 16, 0, 1 << 30)
    path.write_bytes(content)
    frame = PixelFrames(tmp_path, 64).load(at(2), 0, 1)[0]
    assert frame[:, :28].max() < 20
    assert frame[:, 36:].min() > 235


@pytest.mark.skipif(not DRIVE.is_file(), reason="shared/real is not here")
def test_a_real_video_at_its_own_rate_gives_its_pictures():
    with av.open(str(DRIVE)) as container:
        pictures = [np.asarray(picture.to_image().resize((64, 64), 2)) for picture in container.decode(video=0)]
    assert count_frames(DRIVE, 2) == len(pictures) == 33
    found = PixelFrames(DRIVE.parent, 64).load(at(2, "drive"), 5, 33)
    assert np.array_equal(found, np.stack(pictures[5:]).transpose(0, 3, 1, 2))


# ---- what can be wrong with a video ------------------------------------------------------------------


def test_files_that_are_no_video_are_named(tmp_path):
    whole = video(tmp_path / "whole.mp4", 30).read_bytes()
    cases = {"empty": b"", "text": b"hello", "cut": whole[: len(whole) // 2]}
    for name, content in cases.items():
        (tmp_path / f"{name}.mp4").write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}.mp4: .*get the file again$"):
            PixelFrames(tmp_path, 64).load(at(2, name), 0, 1)
        assert count_frames(tmp_path / f"{name}.mp4") is None


def test_a_playlist_does_not_lead_to_other_files(tmp_path):
    other = video(tmp_path / "private" / "other.mp4", 30)
    (tmp_path / "a.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n")
    (tmp_path / "b.mkv").write_text("ffconcat version 1.0\nfile private/other.mp4\n")
    for name in ("a", "b"):
        with pytest.raises(InputError, match="not a video"):
            PixelFrames(tmp_path, 64).load(at(2, name), 0, 1)


def test_a_damaged_picture_is_refused_and_others_are_not(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.gop_size = 10
        for _ in range(30):
            noise = rng.integers(0, 256, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, "rgb24")))
        container.mux(stream.encode())
    whole = PixelFrames(tmp_path, 64).load(at(30), 0, 30)
    with av.open(str(path)) as container:
        places = {packet.pts // 512: packet.pos for packet in container.demux(video=0) if packet.size}
    content = bytearray(path.read_bytes())
    content[places[14] : places[14] + 400] = bytes(400)
    path.write_bytes(content)
    source = PixelFrames(tmp_path, 64)
    with pytest.raises(InputError, match=r"v.mp4 frame 1[0-4]: can't be decoded"):  # threads read ahead
        source.load(at(30), 0, 30)
    with pytest.raises(InputError, match=r"v.mp4 frame 16: can't be decoded"):  # built on the damaged one
        source.load(at(30), 16, 17)
    assert np.array_equal(source.load(at(30), 0, 8), whole[:8])
    assert np.array_equal(source.load(at(30), 25, 30), whole[25:])


def test_an_avi_that_hides_the_order_of_its_pictures_is_refused(tmp_path):
    video(tmp_path / "v.avi", 30, bf="3")
    with pytest.raises(InputError, match=r"v.avi: does not say when its pictures are shown; convert it: ffmpeg"):
        PixelFrames(tmp_path, 64).load(at(2), 0, 1)


def test_a_video_with_enormous_pictures_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    video(tmp_path / "v.mp4", 2)
    monkeypatch.setattr("pipeline.video.MAX_PIXELS", 64 * 63)
    with pytest.raises(InputError, match=r"v.mp4: 64 x 64 pixels, at most 4032 are decoded"):
        PixelFrames(tmp_path, 64).load(at(2), 0, 1)


def test_packets_are_counted_without_keeping_them(tmp_path):
    times = read_times(video(tmp_path / "v.mp4", 30, gop=10, bf="2"))
    assert len(times.pts) == 30
    assert list(np.diff(times.pts)) == [512] * 29  # in display order
    assert times.keys[0] == 0
    assert len(times.keys) >= 3


# ---- folders of images -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        [f"frame_{i:06d}.jpg" for i in range(1, 13)],  # ffmpeg's
        [f"frame_{i:06d}.png" for i in range(12)],
        [f"cam2 take 7 {i}.JPEG" for i in range(12)],  # 10 comes after 9, not after 1
        [f"{i}.jpg" if i % 2 else f"{i}.png" for i in range(12)],
        [f"{letter}.jpg" for letter in "abcdefghijkl"],
    ],
)
def test_images_are_frames_by_the_last_number_in_their_names(tmp_path, names):
    folder = images(tmp_path / "v", names)
    (folder / "._frame_000001.jpg").write_bytes(b"what a Mac leaves behind")
    (folder / "notes.txt").write_text("none of ours")
    assert shades(PixelFrames(tmp_path, 64).load(at(2), 0, 12), 10) == list(range(12))
    assert count_frames(folder) == 12


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["f1.jpg", "f2.jpg", "f4.jpg"], "no image has the number 3"),
        (["f193.jpg", "f194.jpg"], "no image has the number 1, .*193 is the smallest"),
        (["f0.jpg", "f1.jpg", "f1.png"], "f1.jpg and f1.png have the same last number"),
        (["f1_cam2.jpg", "f2_cam2.jpg"], "f1_cam2.jpg and f2_cam2.jpg have the same last number"),
        (["cover.jpg", "f1.jpg", "f2.jpg"], "cover.jpg has no number"),
    ],
)
def test_names_that_would_shift_frames_are_refused(tmp_path, names, wrong):
    folder = images(tmp_path / "v", names)
    with pytest.raises(InputError, match=f"v: .*{wrong}"):
        PixelFrames(tmp_path, 64).load(at(2), 0, 1)
    with pytest.raises(ValueError, match=wrong):
        images_in(folder)
    assert count_frames(folder) is None


def test_short_folders_and_broken_images_are_named(tmp_path):
    folder = images(tmp_path / "v", ["1.jpg", "2.png", "3.jpg"])
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
    (folder / "3.jpg").write_bytes(b"GIF89a: not what its name says")
    source = PixelFrames(tmp_path, 64)
    for number in (1, 2):
        with pytest.raises(InputError, match=rf"v frame {number}: no JPEG or PNG"):
            source.load(at(2), number, number + 1)
    with pytest.raises(InputError, match="v: 3 frames, but clip c0 needs frame 3"):
        source.load(at(2), 0, 4)


# ---- which file --------------------------------------------------------------------------------------


def test_of_several_kinds_arrow_comes_first_and_a_folder_last(tmp_path):
    folder = images(tmp_path / "frames" / "v", ["1.jpg"])
    assert find_frames(tmp_path, "v", None) == folder
    film = video(tmp_path / "frames" / "v.MP4", 2)
    assert find_frames(tmp_path, "v", None) == film
    arrow = write_frames(tmp_path / "frames" / "v.arrow", [grey(0)])
    assert find_frames(tmp_path, "v", None) == arrow
    assert find_frames(tmp_path, "v", "frames/v") == folder  # named, so that one
    assert find_frames(tmp_path, "v", "elsewhere/v.mkv") == arrow  # the name, whatever the ending


def test_a_folder_without_images_is_not_taken_for_a_video(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "notes.txt").write_text("")
    assert find_frames(tmp_path, "v", "v") is None


def test_names_do_not_lead_out_of_the_root(tmp_path):
    images(tmp_path / "outside", ["1.jpg"])
    video(tmp_path / "outside.mp4", 2)
    root = tmp_path / "root"
    root.mkdir()
    for name in ("../outside", "../outside.mp4", str(tmp_path / "outside"), "..", "a/../../outside"):
        assert find_frames(root, name, None) is None
        assert find_frames(root, "x", name) is None


def test_preprocess_holds_videos_and_folders_against_the_annotations(tmp_path):
    root = tmp_path / "frames"
    video(root / "film.mp4", 61, step=4)  # 2.03 s: frames 0..4
    images(root / "folder", [f"{i}.jpg" for i in range(1, 9)])
    images(root / "gap", ["1.jpg", "3.jpg"])
    turns = [{"role": "assistant", "content": "x", "start_frame": 2, "end_frame": 3, "time": 1.0}]
    made = [
        {"id": name, "video_uid": name, "conversation": turns, "dst": [], "fps": 2, "start_frame_idx": 0}
        | {"end_frame_idx": 9}
        for name in ("film", "folder", "gap")
    ]
    (tmp_path / "train_x.json").write_text(json.dumps(made))
    manifest, _ = preprocess([tmp_path / "train_x.json"], tmp_path / "out", Options(frames_root=str(root)))
    told = {h["name"]: h["text"] for h in manifest["hazards"]}
    assert "film (annotated to 9, has 5)" in told["annotations longer than the frames"]
    assert "folder (annotated to 9, has 8)" in told["annotations longer than the frames"]
    assert "gap" in told["frames unreadable"]
    assert [read_frames(root / name, [0]) for name in ("film.mp4", "folder")] == [[], []]


# ---- processes ---------------------------------------------------------------------------------------


def test_a_source_goes_to_a_worker_without_its_files(tmp_path):
    video(tmp_path / "v.mp4", 30)
    source = PixelFrames(tmp_path, 64)
    expected = source.load(at(10), 0, 10)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent).load(at(10), 0, 10), expected)


def test_the_number_of_open_files_is_bounded(tmp_path):
    for i in range(4):
        video(tmp_path / f"v{i}.mp4", 6, step=10 + i)
    source = PixelFrames(tmp_path, 64, cache_bytes=0, open_files=2)
    for i in (0, 1, 2, 3, 0):
        assert shades(source.load(at(30, f"v{i}"), 0, 6), 10 + i) == list(range(6))
        assert len(source._open) <= 2
    source.close()
    assert not source._open
    assert shades(source.load(at(30, "v1"), 5, 6), 11) == [5]


# ---- files that mean harm ----------------------------------------------------------------------------


def arrow(path: Path, column: pa.Array, **options) -> Path:
    table = pa.table({"frame": column})
    with pa.ipc.new_stream(str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("offsets", [(0, 2**31 - 1, 1, 2, 12), (0, -(2**30), 1, 2, 12), (0, 9, 4, 2, 12)])
def test_an_arrow_file_that_lies_about_where_its_rows_are_crashes_nobody(tmp_path, offsets):
    path = arrow(tmp_path / "v.arrow", pa.array(["aaa", "bbb", "ccc", "ddd"]))
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<5i", 0, 3, 6, 9, 12))
    content[place : place + 20] = struct.pack("<5i", *offsets)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"v.arrow: not an Arrow IPC file .*offset"):
        PixelFrames(tmp_path, 64).load(at(2), 0, 1)
    assert count_frames(path) is None


def test_rows_are_found_in_all_batches_and_may_be_null(tmp_path):
    path = tmp_path / "v.arrow"
    rows = [None, "b", *"cdefghijklmno", None, "p"]
    table = pa.table({"frame": pa.array(rows, pa.large_string()), "x": list(range(17))})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    found = ArrowFrames(path)
    assert found.count() == count_frames(path) == 17
    assert [bytes(found.row(i)).decode() for i in range(1, 15)] == list("bcdefghijklmno")
    for null in (0, 15):
        with pytest.raises(ValueError, match="null"):
            found.row(null)


@pytest.mark.parametrize("column", [pa.array([1]), pa.nulls(3), pa.array([["x"]]), pa.array([{"bytes": b""}])])
def test_a_column_of_something_else_is_refused(tmp_path, column):
    arrow(tmp_path / "v.arrow", column)
    with pytest.raises(InputError, match=r"v.arrow: column frame is of .*, expected string or binary"):
        PixelFrames(tmp_path, 64).load(at(2), 0, 1)


def test_pictures_of_too_many_bytes_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.media.MAX_BYTES", 300)
    (images(tmp_path / "v", ["1.jpg"]) / "1.jpg").write_bytes(b"x" * 301)
    arrow(tmp_path / "w.arrow", pa.array(["A" * 404]))
    with pytest.raises(InputError, match=r"v frame 0: .*301 bytes, at most 300 are read"):
        PixelFrames(tmp_path, 64).load(at(2), 0, 1)
    with pytest.raises(InputError, match=r"w.arrow frame 0: .*404 characters, at most 400 are read"):
        PixelFrames(tmp_path, 64).load(at(2, "w"), 0, 1)


def patched(path: Path, box: bytes, offset: int, *numbers: int) -> Path:
    """The mp4 with 32-bit numbers written `offset` after a box's name."""
    content = bytearray(path.read_bytes())
    struct.pack_into(f">{len(numbers)}I", content, content.index(box) + offset, *numbers)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("length", [(0xFFFFFFFF,), (1, 0x6D6F6F76, 0x7FFFFFFF, 0xFFFFFFFF), (7,), (0,)])
def test_an_mp4_whose_index_lies_about_its_length_is_refused_or_read(tmp_path, length):
    path = video(tmp_path / "v.mp4", 30)
    patched(path, b"moov", -4, *length)
    assert count_frames(path, 2) in (None, 2)


def test_an_mp4_in_fragments_is_read(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w", options={"movflags": "frag_keyframe+empty_moov"}) as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.gop_size = 5
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(8 * i), "rgb24")))
        container.mux(stream.encode())
    assert shades(PixelFrames(tmp_path, 64).load(at(30), 0, 20)) == list(range(20))


def test_a_video_whose_codec_nobody_knows_is_refused(tmp_path):
    path = video(tmp_path / "v.mp4", 2)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(InputError, match=r"v.mp4: its pictures are coded as nothing that FFmpeg knows; convert it"):
        PixelFrames(tmp_path, 64).load(at(2), 0, 1)


def test_a_video_that_changes_its_size_stays_within_bounds(tmp_path, monkeypatch):
    small, large = (
        video(tmp_path / f"{side}.mkv", 5, step=40, side=side, bf="0", **{"x264-params": "repeat-headers=1"})
        for side in (64, 128)
    )
    with av.open(str(tmp_path / "v.mkv"), "w") as made, av.open(str(small)) as first, av.open(str(large)) as second:
        stream = made.add_stream_from_template(first.streams.video[0])
        for start, part in ((0, first), (6000, second)):
            for packet in part.demux(video=0):
                if packet.size:
                    packet.pts = packet.dts = packet.pts + start
                    packet.stream = stream
                    made.mux(packet)
    source = PixelFrames(tmp_path, 64)
    assert shades(source.load(at(30), 0, 5), 40) == [0, 1, 2, 3, 4]
    assert shades(source.load(at(30), 180, 185), 40) == [0, 1, 2, 3, 4]
    monkeypatch.setattr("pipeline.video.MAX_PIXELS", 100 * 100)
    with pytest.raises(InputError, match=r"v.mkv: 128 x 128 pixels"):
        PixelFrames(tmp_path, 64).load(at(30), 0, 1)


