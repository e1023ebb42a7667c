"""The cases of ../shared/cases, where they are: what each one's README expects. Their made-up kin are tested beside."""

import shutil
from pathlib import Path

import pytest
from made_up import run_on

from pipeline.errors import InputError

CASES = next((f for p in Path(__file__).parents if (f := p / "shared/cases").is_dir()), Path("shared/cases"))
UPSTREAM = CASES / "upstream"
pytestmark = pytest.mark.skipif(not UPSTREAM.is_dir(), reason="../shared/cases is not here")

SPEAKING, UPDATES = [5, 11, 21, 31, 43], [11, 31, 39]


def on(case: str, tmp_path: Path, **options):
    """The case's files, read from a copy of its folder."""
    (folder,) = UPSTREAM.glob(f"{case}-*")
    copy = tmp_path / "case"
    shutil.copytree(folder, copy)
    return run_on([copy], tmp_path, **options)


@pytest.mark.parametrize(
    ("case", "bounds", "ones"),
    [
        ("01", [(0, 44)], [(SPEAKING, UPDATES)]),
        ("04", [(0, 44)], [(SPEAKING, UPDATES)]),
        ("05", [(0, 44), (190, 220)], [(SPEAKING, UPDATES), ([199, 219], [])]),
        ("12", [(0, 32)], [([0, 9, 31], [0, 31])]),
    ],
)
def test_bounds_and_labels(case, bounds, ones, tmp_path):
    out = on(case, tmp_path)
    assert out.bounds() == bounds
    assert [out.ones(clip=clip) for clip in range(len(ones))] == ones


def test_fields_states_and_splits(tmp_path):
    out = on("02", tmp_path / "2")
    assert [out.ones(split) for split in ("train", "val", "test")] == [([11, 19], [])] * 3
    out = on("03", tmp_path / "3")
    assert out.ones() == ([11, 19], [])
    assert {label for head in out.labels(clip=1).values() for label in head.values()} == {-100}
    out = on("06", tmp_path / "6")
    assert out.states() == [{"S1": "not_started", "S2": "not_started"}, {"S1": "completed", "S2": "in_progress"}]
    assert out.hazards()["initial state contradicts the updates"].startswith("2 of 2")
    out = on("07", tmp_path / "7")
    assert (out.bounds(), out.ones()[1][-4:]) == ([(9, 41)], [37, 38, 39, 40])
    assert on("09", tmp_path / "9", fps=2.0).ones() == ([6, 12, 22, 32, 44], [12, 32, 40])
    assert [on(case, tmp_path / case).clips()[0]["knowledge"] for case in ("01", "14")] == [None, None]


@pytest.mark.parametrize(
    ("case", "words"), [("08", "times are gone"), ("09", "give --fps"), ("10", "no frames were made"), ("11", "role")]
)
def test_files_that_are_no_use_say_why(case, words, tmp_path):
    (file,) = next(iter(UPSTREAM.glob(f"{case}-*"))).iterdir()
    with pytest.raises(InputError, match=words):
        run_on([file], tmp_path)


def test_folders_of_several_files(tmp_path):
    folder = UPSTREAM / "13-frames-of-two-datasets"
    out = run_on(sorted(folder.glob("*.jsonl")), tmp_path / "13", frames_root=str(folder / "processed_data"))
    assert not [name for name in out.hazards() if "frames" in name and "missing" in name]
    shutil.copytree(CASES / "faults/11/data", tmp_path / "case")
    out = run_on([tmp_path / "case"], tmp_path)
    splits = {Path(source["path"]).name.split(".")[0]: source["split"] for source in out.manifest["inputs"]}
    assert splits == {"dev": "val", "my_test": "test", "train_annotations": "train", "validation_annotations": "val"}


def test_egoproactive_sessions(tmp_path):
    out = run_on([CASES / "egoproactive/sessions.jsonl"], tmp_path, split="val")
    assert out.bounds("val") == [(0, 184), (0, 47), (0, 33)]
    spoken = [*range(4), *range(21, 37), *range(152, 168)]
    assert [out.ones("val", clip)[0] for clip in range(3)] == [spoken, [*range(16)], [*range(1, 33)]]
    quiet = [frame for frame, label in out.labels("val")["speaking"].items() if label == 0]
    assert quiet == [*range(37, 53), *range(85, 101), *range(168, 184)]
    assert out.hazards()["dialog history tells the answers"].startswith("8 of 8")
