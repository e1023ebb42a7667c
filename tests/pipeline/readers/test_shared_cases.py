"""The cases of ../shared/cases, where they are: what each one's README expects. Their made-up kin are tested beside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_up import run_on

from pipeline.errors import InputError, UsageError

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


@pytest.mark.parametrize("case", ["01", "04"])
def test_knowledge_lists_and_bounds_of_updates_alone(case, tmp_path):
    out = on(case, tmp_path)
    assert out.clips()[0]["knowledge"] is None
    assert out.bounds() == [(0, 44)]
    assert out.ones() == (SPEAKING, UPDATES)
    assert out.manifest["inputs"][0]["bounds_widened"] == (case == "04")


def test_proassist_file_names(tmp_path):
    out = on("02", tmp_path)
    for split in ("train", "val", "test"):
        assert out.ones(split) == ([11, 19], [])
    with pytest.raises(UsageError, match="contradicts the file name"):
        run_on([UPSTREAM / "02-proassist-file-names/dialog-klg-sum_val_L4096_I1.jsonl"], tmp_path, split="train")


def test_summary_only(tmp_path):
    out = on("03", tmp_path)
    assert out.ones() == ([11, 19], [])
    assert {label for head in out.labels(clip=1).values() for label in head.values()} == {-100}


def test_segment_without_dst(tmp_path):
    out = on("05", tmp_path)
    assert out.bounds() == [(0, 44), (190, 220)]
    assert [out.ones(clip=clip) for clip in (0, 1)] == [(SPEAKING, UPDATES), ([199, 219], [])]


def test_initial_state_of_split_clips(tmp_path):
    out = on("06", tmp_path)
    assert out.states() == [{"S1": "not_started", "S2": "not_started"}, {"S1": "completed", "S2": "in_progress"}]
    assert out.hazards()["initial state contradicts the updates"].startswith("2 of 2")


def test_window_bounds_inclusive(tmp_path):
    out = on("07", tmp_path)
    assert out.bounds() == [(9, 41)]
    assert out.ones()[1][-4:] == [37, 38, 39, 40]


@pytest.mark.parametrize(
    ("case", "words"), [("08", "times are gone"), ("09", "give --fps"), ("10", "no frames were made"), ("11", "role")]
)
def test_files_that_are_no_use_say_why(case, words, tmp_path):
    (file,) = next(iter(UPSTREAM.glob(f"{case}-*"))).iterdir()
    with pytest.raises(InputError, match=words):
        run_on([file], tmp_path)


def test_times_but_no_frames_with_fps(tmp_path):
    assert on("09", tmp_path, fps=2.0).ones() == ([6, 12, 22, 32, 44], [12, 32, 40])


def test_lead_in_at_time_0(tmp_path):
    out = on("12", tmp_path)
    assert out.ones() == ([0, 9, 31], [0, 31])
    assert out.bounds() == [(0, 32)]


def test_frames_of_two_datasets(tmp_path):
    folder = UPSTREAM / "13-frames-of-two-datasets"
    out = run_on(sorted(folder.glob("*.jsonl")), tmp_path, frames_root=str(folder / "processed_data"))
    assert not [name for name in out.hazards() if "frames" in name and "missing" in name]


def test_knowledge_not_added(tmp_path):
    assert [clip["knowledge"] for clip in on("14", tmp_path).clips()] == [None]


def test_files_of_a_folder_with_other_names_for_val(tmp_path):
    shutil.copytree(CASES / "faults/11/data", tmp_path / "case")
    out = run_on([tmp_path / "case"], tmp_path)
    told = {Path(source["path"]).name: source["split"] for source in out.manifest["inputs"]}
    assert told == {
        "dev.json": "val",
        "my_test.json": "test",
        "train_annotations.json": "train",
        "validation_annotations.json": "val",
    }


def test_egoproactive_sessions(tmp_path):
    out = run_on([CASES / "egoproactive/sessions.jsonl"], tmp_path, split="val")
    assert out.bounds("val") == [(0, 184), (0, 47), (0, 33)]
    spoken = [*range(4), *range(21, 37), *range(152, 168)]
    assert [out.ones("val", clip)[0] for clip in range(3)] == [spoken, [*range(16)], [*range(1, 33)]]
    quiet = [frame for frame, label in out.labels("val")["speaking"].items() if label == 0]
    assert quiet == [*range(37, 53), *range(85, 101), *range(168, 184)]
    assert out.hazards()["dialog history tells the answers"].startswith("8 of 8")
