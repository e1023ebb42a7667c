"""Which files are read, and the split that a name tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError, UsageError
from pipeline.inputs import find_inputs, split_of, splits_in, told_split
from pipeline.options import Options

NAMES = {
    "train": "train.json train_training.json summary_train_L4096_I1+SEP.jsonl",
    "val": "dialog-klg-sum_val_L4096_I1.jsonl valid.json validation_annotations.json dev.json val_validation.json",
    "test": "my-test.json set.TEST.v2.jsonl",
    "train val": "train_val.json",
    "": "training.json trainer_x.json latest.json contest_1.json device.json devtest.json evaluation.json train2.json",
}


@pytest.mark.parametrize(
    ("splits", "name"), [(s.split(), name) for s, names in NAMES.items() for name in names.split()]
)
def test_a_token_bounded_by_signs_or_the_names_ends_tells_the_split(splits, name):
    assert splits_in(name) == splits


def test_the_folder_tells_it_where_the_name_does_not():
    assert told_split(Path("data/val/part-1.jsonl")) == "val"
    assert told_split(Path("data/my_dev_set/part-1.jsonl")) == "val"
    assert told_split(Path("data/val/test.jsonl")) == "test"
    assert told_split(Path("val/data/part-1.jsonl")) is None
    with pytest.raises(UsageError, match=r"tells the splits train and test; give --split"):
        told_split(Path("train-and-test/x.json"))


@pytest.mark.parametrize(
    ("name", "given", "force", "split"),
    [
        ("clips.json", "mine", False, "mine"),
        ("val_x.json", "val", False, "val"),
        ("val_x.json", "train", True, "train"),
        ("train_val.json", "val", False, "val"),
        ("val_x.json", "train", False, None),
        ("train_x.json", "mine", False, None),
        ("clips.json", None, False, None),
    ],
)
def test_an_option_decides_unless_it_contradicts_the_name(name, given, force, split):
    options = Options(split=given, force_split=force)
    if split is not None:
        assert split_of(Path("data") / name, options) == split
        return
    with pytest.raises(UsageError, match=name) as error:
        split_of(Path("data") / name, options)
    assert ("--force-split" if given else "--split") in str(error.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    names = ("train_a.json", "validation_b.json", "my_test.jsonl", "sub/val/x.json", "clips.json", "train_val.json")
    for name in (*names, ".hidden/train.json", "notes.txt", "frames/train.json", "out/manifest.json", "out/train.json"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("[]")
    return tmp_path / "data"


def found(folder: Path, **options) -> tuple[set[str], dict[str, str]]:
    """Files read and left out, relative to the folder."""
    read, skipped = find_inputs([folder], Options(**options))
    return {str(p.relative_to(folder)) for p in read}, {str(p.relative_to(folder)): why for p, why in skipped}


def test_a_folder_is_searched_and_what_is_left_out_is_reported(folder):
    """An output of preprocess, hidden folders and frames are no inputs."""
    assert found(folder) == (
        {"train_a.json", "validation_b.json", "my_test.jsonl", "sub/val/x.json"},
        {"clips.json": "its name tells no split", "train_val.json": "its name tells the splits train and val"},
    )


def test_with_a_split_given_files_of_other_splits_are_left_out(folder):
    read, skipped = found(folder, split="val")
    assert read == {"validation_b.json", "sub/val/x.json", "clips.json"}
    assert skipped["train_a.json"] == "its name tells train"
    assert "train_a.json" in found(folder, split="val", force_split=True)[0]


def test_a_folder_without_inputs_says_what_was_left_out(folder):
    (folder / "new").mkdir()
    (folder / "clips.json").rename(folder / "new/clips.json")
    with pytest.raises(InputError, match=r"without a JSON file.*clips.json, its name tells no split"):
        find_inputs([folder / "new"], Options())


def test_a_file_given_by_name_is_read_whatever_it_is_called(tmp_path):
    assert find_inputs([tmp_path / "train_filtered.json"], Options()) == ([tmp_path / "train_filtered.json"], [])
