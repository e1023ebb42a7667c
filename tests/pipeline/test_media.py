"""Which file holds a video's frames, below one root with one or several data sets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.media import find_frames
from pipeline.options import Options
from pipeline.preprocess import preprocess


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def write_clip(path: Path, uid: str, frames: int = 4, **more) -> Path:
    """One clip with an assistant turn at frame 2."""
    turn = {"role": "assistant", "content": "x", "time": 1.0, "start_frame": 2, "end_frame": 3}
    clip = {"id": uid, "video_uid": uid, "fps": 2, "start_frame_idx": 0, "end_frame_idx": frames, "dst": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**clip, "conversation": [turn], **more}) + "\n")
    return path


def write_images(folder: Path, count: int = 4) -> Path:
    """A folder with so many images; nothing decodes them."""
    for number in range(count):
        touch(folder / f"{number}.png")
    return folder


# ---- layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".arrow", ".mp4", ".MKV", "/1.jpg"])
@pytest.mark.parametrize("folder", ["", "frames", "holoassist", "holoassist/frames"])
@pytest.mark.parametrize("name", ["R1", "holoassist_R1", "holoassist-R1"])
def test_every_layout_is_found(tmp_path, folder, name, ending):
    path = touch(tmp_path / folder / f"{name}{ending}")
    expected = path.parent if ending == "/1.jpg" else path
    assert find_frames(tmp_path, "R1", None, "holoassist") == expected
    assert find_frames(tmp_path, "R1", "frames/R1.arrow", "holoassist") == expected
    assert find_frames(tmp_path, "R2", None, "holoassist") is None
    assert find_frames(tmp_path, "R2", "frames/R2.arrow", "holoassist") is None


@pytest.mark.parametrize("dataset", ["assembly101", "assembly", "unknown", None])
@pytest.mark.parametrize("folder", ["", "frames"])
def test_assembly101_is_found_with_and_without_its_prefix(tmp_path, folder, dataset):
    file = touch(tmp_path / folder / "nusar-1__view.arrow")
    for uid in ("assembly_nusar-1__view", "disassembly_nusar-1__view", "nusar-1__view"):
        assert find_frames(tmp_path, uid, None, dataset) == file
    assert find_frames(tmp_path, "x", "data/assembly101/frames/assembly_nusar-1__view.arrow", "assembly101") == file
    assert find_frames(tmp_path, "assembly_nusar-2__view", None, dataset) is None


def test_the_prefix_may_be_on_either_name(tmp_path):
    file = touch(tmp_path / "frames" / "assembly_7.arrow")
    assert find_frames(tmp_path, "7", None, "assembly101") == file
    file = touch(tmp_path / "frames" / "8.arrow")
    assert find_frames(tmp_path, "assembly101_8", None, "assembly101") == file


def test_frames_file_may_begin_with_folders_that_the_root_already_stands_for(tmp_path):
    file = touch(tmp_path / "processed_data" / "wtag" / "frames" / "sub" / "T1.arrow")
    for root in ("", "processed_data", "processed_data/wtag", "processed_data/wtag/frames"):
        named = "processed_data/wtag/frames/sub/T1.mp4"  # converted since
        assert find_frames(tmp_path / root, "video 1", named, "wtag") == file
    file = touch(tmp_path / "frames" / "T2.arrow")  # made of that video
    assert find_frames(tmp_path, "wtag/videos/T2", "wtag/videos/T2.mp4", "wtag") == file


def test_each_data_set_below_one_root_has_its_own_frames(tmp_path):
    for dataset in ("a", "b"):
        touch(tmp_path / dataset / "frames" / "1.arrow")
    stray = touch(tmp_path / "1.mp4")
    for dataset in ("a", "b"):
        found = find_frames(tmp_path, "1", "frames/1.arrow", dataset)
        assert found == tmp_path / dataset / "frames" / "1.arrow"
    assert find_frames(tmp_path, "1", "frames/1.arrow", "c") == stray
    stray.unlink()
    assert find_frames(tmp_path, "1", "frames/1.arrow", "c") is None


def test_a_bare_name_that_several_videos_share_is_not_enough(tmp_path):
    touch(tmp_path / "rgb.mp4")
    touch(tmp_path / "frames" / "rgb.mp4")
    first = touch(tmp_path / "P01" / "rgb.mp4")
    assert find_frames(tmp_path, "kitchen-P01", "P01/rgb.mp4", "kitchen") == first
    for named in ("P02/rgb.mp4", "frames/P02/rgb.mp4", "data/P02/frames/rgb.mp4"):
        assert find_frames(tmp_path, "kitchen-P02", named, "kitchen") is None
    for uid in ("kitchen-P01", "kitchen-P02"):
        assert find_frames(tmp_path / "P01", uid, f"{uid[-3:]}/rgb.mp4", "kitchen") is None


@pytest.mark.parametrize("outside", ["../outside", "/outside", "a/../../outside", "..", "frames/../../outside"])
def test_no_name_leads_out_of_the_root(tmp_path, outside):
    touch(tmp_path / "outside.arrow")
    root = tmp_path / "root"
    (root / "frames").mkdir(parents=True)
    outside = str(tmp_path / "outside") if outside.startswith("/") else outside
    assert find_frames(root, outside, None, "d") is None
    assert find_frames(root, "x", f"{outside}.arrow", "d") is None
    assert find_frames(root, "outside", None, outside) is None
    assert find_frames(root, "outside", None, "..") is None


# ---- what preprocess makes of them -------------------------------------------------------------------


def hazards_of(tmp_path: Path, inputs: list[Path], root: Path) -> list[tuple[str, str]]:
    manifest, _ = preprocess(inputs, tmp_path / "out", Options(frames_root=str(root)))
    return [(h["name"], h["text"]) for h in manifest["hazards"] if "frames" in h["name"] or "frames" in h["text"][:20]]


def test_two_data_sets_below_one_root(tmp_path):
    """Case upstream/13: the public layout processed_data/<dataset>/frames/<uid>."""
    root = tmp_path / "processed_data"
    inputs = []
    for dataset, uid in (("holoassist", "R1"), ("wtag", "T1")):
        write_images(root / dataset / "frames" / uid)
        path = tmp_path / f"train_{dataset}.jsonl"
        inputs.append(write_clip(path, uid, dataset=dataset, frames_file=f"frames/{uid}.arrow"))
    assert hazards_of(tmp_path, inputs, root) == []
    shutil.rmtree(root / "wtag")
    assert [name for name, _ in hazards_of(tmp_path, inputs, root)] == ["frames missing"]


def test_a_link_to_nowhere_below_the_root_is_ignored(tmp_path):
    """Case faults/04: git-annex leaves a dangling link for what was not fetched."""
    root = tmp_path / "raw"
    write_images(root / "frames" / "v0")
    (root / "frames" / "other.mp4").symlink_to("../.git/annex/objects/xx/yy/other.mp4")
    inputs = [write_clip(tmp_path / "train_a.jsonl", "v0")]
    assert hazards_of(tmp_path, inputs, root) == []
    write_clip(inputs[0], "other")
    ((name, text),) = hazards_of(tmp_path, inputs, root)
    assert name == "frames missing"
    assert "1 video below" in text
    assert "other" in text


def test_another_videos_pictures_are_never_taken(tmp_path):
    """Case faults/35: two videos of one bare name, one of them not copied yet."""
    root = tmp_path / "raw"
    touch(root / "rgb.mp4")
    write_images(root / "P01" / "rgb")
    for uid in ("P01", "P02"):
        inputs = [write_clip(tmp_path / "train_a.jsonl", f"kitchen-{uid}", frames_file=f"{uid}/rgb.mp4")]
    ((name, text),) = hazards_of(tmp_path, inputs, root)
    assert name == "frames missing"
    assert "1 video below" in text
    assert "kitchen-P02" in text
    ((name, text),) = hazards_of(tmp_path, inputs, root / "P01")
    assert name == "frames missing"
    assert "2 videos" in text


def test_frames_that_arrive_in_a_linked_folder_are_noticed(tmp_path):
    """The disk with the frames is often linked into the root; a loop of links ends."""
    root, disk = tmp_path / "raw", tmp_path / "disk"
    root.mkdir()
    disk.mkdir()
    (root / "d").symlink_to(disk)
    (disk / "loop").symlink_to(root)
    inputs = [write_clip(tmp_path / "train_a.jsonl", "v0", dataset="d")]
    options = Options(frames_root=str(root))
    manifest, _ = preprocess(inputs, tmp_path / "out", options)
    assert "frames missing" in [h["name"] for h in manifest["hazards"]]
    write_images(disk / "v0")
    manifest, skipped = preprocess(inputs, tmp_path / "out", options)
    assert not skipped
    assert "frames missing" not in [h["name"] for h in manifest["hazards"]]
    assert preprocess(inputs, tmp_path / "out", options)[1]
