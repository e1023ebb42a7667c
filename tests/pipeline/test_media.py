"""Which file holds a video's frames, and what images show, in a folder and in an Arrow file alike."""

import base64
import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_up import quarters, seen
from PIL import Image

from pipeline.errors import InputError
from pipeline.media import count_frames, find_frames, fit, images_in, open_pictures


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize("ending", [".arrow", ".MKV", "/1.jpg"])
@pytest.mark.parametrize("folder", ["", "frames", "holoassist", "holoassist/frames"])
@pytest.mark.parametrize("name", ["R1", "holoassist-R1"])
def test_every_layout_is_found(tmp_path, folder, name, ending):
    path = touch(tmp_path / folder / f"{name}{ending}")
    expected = path.parent if ending == "/1.jpg" else path
    for frames_file in (None, "frames/R{}.arrow"):
        found = [find_frames(tmp_path, f"R{i}", frames_file and frames_file.format(i), "holoassist") for i in (1, 2)]
        assert found == [expected, None]


@pytest.mark.parametrize("dataset", ["assembly101", "assembly", "unknown", None])
def test_a_prefix_may_be_on_either_name(tmp_path, dataset):
    file = touch(tmp_path / "frames" / "nusar-1__view.arrow")
    for uid in ("assembly_nusar-1__view", "disassembly_nusar-1__view", "nusar-1__view"):
        assert find_frames(tmp_path, uid, None, dataset) == file
    assert find_frames(tmp_path, "x", "data/assembly101/frames/assembly_nusar-1__view.arrow", "assembly101") == file
    assert find_frames(tmp_path, "assembly_nusar-2__view", None, dataset) is None
    grp = touch(tmp_path / "frames" / "9.arrow")
    assert find_frames(tmp_path, "grp-9", None, dataset) == grp


def test_each_data_set_below_one_root_has_its_own_frames(tmp_path):
    files = {dataset: touch(tmp_path / dataset / "frames" / "1.arrow") for dataset in ("a", "b")}
    files["c"] = touch(tmp_path / "1.mp4")
    assert {dataset: find_frames(tmp_path, "1", "frames/1.arrow", dataset) for dataset in files} == files


def test_a_bare_name_that_several_videos_share_is_not_enough(tmp_path):
    """Case faults/35: two videos of one bare name, one of them not copied yet."""
    touch(tmp_path / "rgb.mp4")
    touch(tmp_path / "frames" / "rgb.mp4")
    first = touch(tmp_path / "P01" / "rgb.mp4")
    assert find_frames(tmp_path, "kitchen-P01", "P01/rgb.mp4", "kitchen") == first
    for named in ("P02/rgb.mp4", "frames/P02/rgb.mp4", "data/P02/frames/rgb.mp4"):
        assert find_frames(tmp_path, "kitchen-P02", named, "kitchen") is None


@pytest.mark.parametrize("outside", ["../outside", "/outside", "a/../../outside"])
def test_no_name_leads_out_of_the_root(tmp_path, outside):
    touch(tmp_path / "outside.arrow")
    root = tmp_path / "root"
    (root / "frames").mkdir(parents=True)
    outside = str(tmp_path / "outside") if outside.startswith("/") else outside
    assert find_frames(root, outside, None, "d") is None
    assert find_frames(root, "x", f"{outside}.arrow", "d") is None
    assert find_frames(root, "outside", None, outside) is None


@pytest.mark.parametrize(
    "names",
    [
        [f"frame_{i:06d}.jpg" for i in range(1, 13)],  # ffmpeg's
        [f"cam2 take 7 {i}.JPEG" for i in range(12)],  # 10 comes after 9, not after 1
        [f"{letter}.jpg" for letter in "abcdefghijkl"],
    ],
)
def test_images_are_frames_by_the_last_number_in_their_names(tmp_path, names):
    for name in (*names, "._frame_000001.jpg", "notes.txt"):
        touch(tmp_path / name)
    assert [path.name for path in images_in(tmp_path)] == names
    assert count_frames(tmp_path)[0] == 12


@pytest.mark.parametrize(
    ("names", "wrong"),
    [
        (["f1.jpg", "f2.jpg", "f4.jpg"], "f4.jpg: expected number 3"),
        (["cover.jpg", "f1.jpg", "f2.jpg"], "cover.jpg: expected number 1"),
    ],
)
def test_names_that_would_shift_frames_are_refused(tmp_path, names, wrong):
    for name in names:
        touch(tmp_path / "v" / name)
    with pytest.raises(InputError, match=f"v: .*{wrong}"):
        open_pictures(tmp_path / "v")
    assert count_frames(tmp_path / "v")[0] is None


def saved(image: Image.Image, kind: str, orientation: int = 0) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(file, kind, exif=exif)
    return file.getvalue()


def arrow(path: Path, column: pa.Array) -> Path:
    table = pa.table({"x": pa.nulls(len(column)), "frame": column})
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def shown(folder: Path, content: bytes) -> list[np.ndarray]:
    """What a folder of images and an Arrow file with that image give."""
    touch(folder / "v" / "0.png").write_bytes(content)
    arrow(folder / "v.arrow", pa.array([base64.b64encode(content).decode()]))
    return [np.asarray(open_pictures(folder / name).image(0, 2.0)) for name in ("v", "v.arrow")]


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [(1, None), (2, 0), (3, 3), (4, 1), (5, 5), (6, 2), (7, 6), (8, 4)],  # how PIL's transpose makes it of the upright
)
def test_exif_turns_a_picture(tmp_path, orientation, stored):
    upright = Image.fromarray(quarters(32, 24))
    lying = upright if stored is None else upright.transpose(Image.Transpose(stored))
    for found in shown(tmp_path, saved(lying, "JPEG", orientation)):
        assert (found.shape, seen(found)) == ((64, 48, 3), "RGBW")


def test_what_is_transparent_is_black_and_16_bits_are_scaled_to_8(tmp_path):
    rgba = np.full((8, 8, 4), (200, 100, 50, 255), np.uint8)
    rgba[:, 4:, 3] = 0
    for found in shown(tmp_path, saved(Image.fromarray(rgba), "PNG")):
        assert found[0].tolist() == [[200, 100, 50]] * 4 + [[0, 0, 0]] * 4
    for found in shown(tmp_path, saved(Image.fromarray(np.full((8, 8), 257 * 99, np.uint16)), "PNG")):
        assert found[0].tolist() == [[99, 99, 99]] * 8


def test_frames_are_cropped_to_the_centre_and_resized_with_channels_first():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64, 0] = 255  # red in the centre square
    found = fit(Image.fromarray(wide), 64)
    assert (found.shape, found.dtype) == ((3, 64, 64), np.uint8)
    assert found[0, :, 8:-8].min() > 240
    assert found[1:].max() == 0


@pytest.mark.parametrize("kind", [pa.string(), pa.large_binary()])
def test_rows_are_found_in_all_batches_and_may_be_null(tmp_path, kind):
    grey = [base64.b64encode(saved(Image.new("L", (8, 8), 10 * i), "PNG")).decode() for i in range(16)]
    table = pa.table({"frame": pa.array([None, *grey], pa.string()).cast(kind), "x": list(range(17))})
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        path = tmp_path / "v.arrow"
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
        assert count_frames(path)[0] == 17
        opened = open_pictures(path)
        assert [opened.image(1 + i, 2.0).getpixel((0, 0))[0] for i in range(16)] == [10 * i for i in range(16)]
        with pytest.raises(TypeError, match="NoneType"):
            opened.image(0, 2.0)


def test_arrow_files_that_are_cut_lie_about_their_rows_or_hold_no_pictures_are_named(tmp_path):
    path = arrow(tmp_path / "v.arrow", pa.array(["aaa", "bbb", "ccc", "ddd"]))
    content = path.read_bytes()
    offsets = (struct.pack("<5i", *ends) for ends in ((0, 3, 6, 9, 12), (0, 2**31 - 1, 1, 2, 12)))
    for damaged in (b"", content[:-60], content.replace(*offsets)):  # the last would crash the process
        path.write_bytes(damaged)
        assert count_frames(path)[0] is None
        with pytest.raises(InputError, match=r"v.arrow: no Arrow file .*get it again"):
            open_pictures(path)
    with pytest.raises(InputError, match=r"v.arrow: no Arrow file with a column frame"):
        open_pictures(arrow(path, pa.array([1])))
