"""Which files are read, and the split that a name tells."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import InputError, UsageError
from pipeline.inputs import find_inputs, split_of, splits_in, told_split
from pipeline.options import Options


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("train.json", ["train"]),
        ("train_training.json", ["train"]),
        ("dialog-klg-sum_val_L4096_I1.jsonl", ["val"]),
        ("summary_train_L4096_I1+SEP.jsonl", ["train"]),
        ("wearable_ai_2026_egoproactive_val_700.jsonl", ["val"]),
        ("valid.json", ["val"]),
        ("validation_annotations.json", ["val"]),
        ("dev.json", ["val"]),
        ("my-test.json", ["test"]),
        ("set.TEST.v2.jsonl", ["test"]),
        ("val_validation.json", ["val"]),
        ("train_val.json", ["train", "val"]),
        ("training.json", []),
        ("trainer_x.json", []),
        ("latest.json", []),
        ("contest_1.json", []),
        ("testing.json", []),
        ("device.json", []),
        ("devtest.json", []),
        ("evaluation.json", []),
        ("train2.json", []),
        ("", []),
    ],
)
def test_a_token_bounded_by_signs_or_the_names_ends_tells_the_split(name, splits):
    assert splits_in(name) == splits


def test_the_folder_tells_it_where_the_name_does_not():
    assert told_split(Path("data/val/part-1.jsonl")) == "val"
    assert told_split(Path("data/my_dev_set/part-1.jsonl")) == "val"
    assert told_split(Path("data/val/test.jsonl")) == "test"
    assert told_split(Path("val/data/part-1.jsonl")) is None


@pytest.mark.parametrize("path", ["data/train_val.json", "train-and-test/x.json"])
def test_a_name_that_tells_two_splits_is_refused(path):
    with pytest.raises(UsageError, match=r"tells the splits train and .*give --split"):
        told_split(Path(path))


@pytest.mark.parametrize(
    ("name", "given", "force", "split"),
    [
        ("clips.json", "train", False, "train"),
        ("clips.json", "mine", False, "mine"),
        ("val_x.json", "val", False, "val"),
        ("val_x.json", "train", True, "train"),
        ("train_val.json", "val", False, "val"),
        ("val_x.json", "train", False, None),
        ("train_x.json", "mine", False, None),
        ("train_val.json", "test", False, None),
        ("clips.json", None, False, None),
    ],
)
def test_an_option_decides_and_does_not_contradict_a_name_in_silence(name, given, force, split):
    options = Options(split=given, force_split=force)
    if split is not None:
        assert split_of(Path("data") / name, options) == split
        return
    with pytest.raises(UsageError, match=name) as error:
        split_of(Path("data") / name, options)
    assert ("--force-split" if given else "--split") in str(error.value)


def files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]")
    return folder


def found(folder: Path, **options) -> tuple[list[str], dict[str, str]]:
    """Files read and left out, relative to the folder."""
    read, skipped = find_inputs([folder], Options(**options))
    return (
        [str(path.relative_to(folder)) for path in read],
        {str(path.relative_to(folder)): why for path, why in skipped},
    )


def test_a_folder_is_searched_and_what_is_left_out_is_told(tmp_path):
    names = ("train_annotations.json", "validation_annotations.json", "dev.json", "my_test.jsonl", "sub/val/x.json")
    left = ("clips.json", "train_val.json")
    folder = files(tmp_path / "data", *names, *left, ".hidden/train.json", "notes.txt", "frames/train.json")
    read, skipped = found(folder)
    assert sorted(read) == sorted(names)
    assert skipped == {
        "clips.json": "its name tells no split",
        "train_val.json": "its name tells the splits train and val",
    }


def test_with_a_split_given_a_folder_holds_files_of_other_splits_back(tmp_path):
    folder = files(tmp_path / "data", "train_a.json", "val_a.json", "clips.json")
    assert found(folder, split="val") == (["clips.json", "val_a.json"], {"train_a.json": "its name tells train"})
    assert found(folder, split="val", force_split=True) == (["clips.json", "train_a.json", "val_a.json"], {})


def test_an_output_of_preprocess_in_a_folder_is_no_input(tmp_path):
    folder = files(tmp_path / "data", "train_a.json", "out/manifest.json", "out/train.json")
    assert found(folder) == (["train_a.json"], {})


def test_a_folder_with_nothing_to_read_says_what_was_left_out(tmp_path):
    folder = files(tmp_path / "data", "clips.json")
    with pytest.raises(InputError, match=r"without a JSON file.*clips.json, its name tells no split"):
        find_inputs([folder], Options())


def test_a_file_that_is_named_is_read_whatever_it_is_called(tmp_path):
    path = files(tmp_path, "train_filtered.json") / "train_filtered.json"
    assert find_inputs([path], Options()) == ([path], [])
