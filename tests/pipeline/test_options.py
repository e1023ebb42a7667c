"""Which files are read, and the split that a name tells."""

from pathlib import Path

import pytest

from pipeline.errors import InputError, UsageError
from pipeline.options import Options, find_inputs, split_of, splits_in

NAMES = {
    "train": "train.json train_training.json summary_train_L4096_I1+SEP.jsonl",
    "val": "dialog-klg-sum_val_L4096_I1.jsonl valid.json validation_annotations.json dev.json val_validation.json",
    "test": "my-test.json set.TEST.v2.jsonl",
    "train val": "train_val.json",
    "": "training.json trainer_x.json latest.json contest_1.json device.json devtest.json evaluation.json train2.json",
}


@pytest.mark.parametrize("splits", NAMES)
def test_a_token_bounded_by_signs_or_the_names_ends_tells_the_split(splits):
    assert all(splits_in(name) == splits.split() for name in NAMES[splits].split())


@pytest.mark.parametrize(
    ("path", "given", "force", "split"),
    [
        ("data/val_x.json", "train", True, "train"),
        ("data/train_val.json", "val", False, "val"),
        ("data/val_x.json", "train", False, "--force-split"),
        ("data/clips.json", None, False, "give --split"),
        ("data/val/part-1.jsonl", None, False, "val"),  # its folder tells it
        ("val/data/part-1.jsonl", None, False, "give --split"),
        ("train-and-test/x.json", None, False, "tells the splits train and test; give --split"),
    ],
)
def test_a_name_tells_the_split_and_an_option_decides_unless_it_contradicts(path, given, force, split):
    """split: or what the UsageError says."""
    options = Options(split=given, force_split=force)
    if "--" not in split:
        assert split_of(Path(path), options) == split
        return
    with pytest.raises(UsageError, match=path.split("/")[-1]) as error:
        split_of(Path(path), options)
    assert split in str(error.value)


def found(folder: Path, **options) -> tuple[set[str], dict[str, str]]:
    """Files read and left out, relative to the folder."""
    read, skipped = find_inputs([folder], Options(**options))
    return {str(p.relative_to(folder)) for p in read}, {str(p.relative_to(folder)): why for p, why in skipped}


def test_a_folder_is_searched_and_what_is_left_out_is_reported(tmp_path):
    """An output of preprocess, hidden folders and frames are no inputs."""
    folder = tmp_path / "data"
    names = ("train_a.json", "validation_b.json", "my_test.jsonl", "sub/val/x.json", "clips.json", "train_val.json")
    for name in (*names, ".hidden/train.json", "notes.txt", "frames/train.json", "out/manifest.json", "out/train.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]")
    assert found(folder) == (
        {"train_a.json", "validation_b.json", "my_test.jsonl", "sub/val/x.json"},
        {"clips.json": "its name tells no split", "train_val.json": "its name tells the splits train and val"},
    )
    read, skipped = found(folder, split="val")
    assert read == {"validation_b.json", "sub/val/x.json", "clips.json"}
    assert skipped["train_a.json"] == "its name tells train"
    assert find_inputs([folder / "clips.json"], Options()) == ([folder / "clips.json"], [])  # one that is named is read
    (folder / "new").mkdir()
    (folder / "clips.json").rename(folder / "new/clips.json")
    with pytest.raises(InputError, match=r"without a JSON file.*clips.json, its name tells no split"):
        find_inputs([folder / "new"], Options())
