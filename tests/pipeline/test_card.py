"""The dataset card in an output of preprocess: what it says, whose it is, and what others read by it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.schema import CLIPS, FRAMES
from trainer.cli import main

ROOT = Path(__file__).parents[2]


def write_split(folder: Path, split: str, clips: int) -> Path:
    """A file whose every clip has 10 frames, the assistant speaking in frames 4 and 5."""
    turns = [{"role": "assistant", "content": f"{split}!", "time": 2.0, "start_frame": 4, "end_frame": 6}]
    bounds = {"start_frame_idx": 0, "end_frame_idx": 10}
    made = [
        {"id": f"{split}{i}", "video_uid": f"{split}-v{i}", "fps": 2, "dst": [], "conversation": turns, **bounds}
        for i in range(clips)
    ]
    path = folder / f"{split}_x.json"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def out(tmp_path) -> Path:
    """3 clips in train, 2 in val, 1 in test."""
    inputs = [write_split(tmp_path, split, clips) for split, clips in (("val", 2), ("test", 1), ("train", 3))]
    preprocess(inputs, tmp_path / "out")
    return tmp_path / "out"


def test_front_matter_names_the_files_of_each_split(out):
    _, front, _ = (out / "README.md").read_text().split("---\n", 2)
    files = "".join(
        f'  - split: "{split}"\n    path: TABLE/split={split}/*.parquet\n' for split in ("train", "val", "test")
    )
    assert front == (
        "license: unknown\nconfigs:\n"
        "- config_name: frames\n  default: true\n  data_files:\n" + files.replace("TABLE", "frames")
        + "- config_name: clips\n  data_files:\n" + files.replace("TABLE", "clips")
    )  # fmt: skip


def test_body_has_counts_hazards_columns_and_how_it_was_made(out):
    body = (out / "README.md").read_text()
    for line in (
        "| train | 3 | 3 | 30 |",
        "| val | 2 | 2 | 20 |",
        "- train: no clip says anything about DST",
        "| `n_speaking` | int32 | frames with speaking_label 1 |",
        '- positive: `"span"`',
        "| train_x.json | train | 3 | 0 | event |",
    ):
        assert line in body
    for column in (*FRAMES.names, *CLIPS.names, "turns.role", "turns.updates.transition", "steps.name"):
        assert f"| `{column}` |" in body, column


def test_card_names_no_folders_of_this_machine(tmp_path):
    root = tmp_path / "private" / "raw"
    root.mkdir(parents=True)
    path = write_split(tmp_path / "private", "train", 1)
    preprocess([path], tmp_path / "out", Options(frames_root=str(root)))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "private" not in text
    assert "- train: frames missing: 1 video below raw, e.g. train-v0" in text
    assert '- frames_root: `"raw"`' in text


# ---- whose README.md it is ---------------------------------------------------------------------------


def test_a_card_of_ours_is_replaced_and_one_that_was_edited_stays(tmp_path, out, capsys):
    readme, source = out / "README.md", write_split(tmp_path, "train", 5)
    preprocess([source], out)
    assert "| train | 5 | 5 | 50 |" in readme.read_text()
    readme.write_text(edited := readme.read_text().replace("unknown", "mit", 1))
    assert main(["preprocess", str(write_split(tmp_path, "train", 4)), "--out", str(out), "--workers", "1"]) == 0
    assert readme.read_text() == edited
    assert "README.md: not, or no longer, the card that preprocess writes; left as it is" in capsys.readouterr().err


# ---- what others read --------------------------------------------------------------------------------


def test_datasets_gives_each_split_its_own_rows(out, tmp_path):
    datasets = pytest.importorskip("datasets")
    moved = tmp_path / "moved"
    shutil.move(out, moved)  # nothing depends on where it lies
    for name, rows in (("frames", {"train": 30, "val": 20, "test": 10}), ("clips", {"train": 3, "val": 2, "test": 1})):
        loaded = datasets.load_dataset(str(moved), name, cache_dir=str(tmp_path / "cache"))
        assert {split: len(part) for split, part in loaded.items()} == rows
        for split, part in loaded.items():
            assert all(clip_id.startswith(split) for clip_id in part["clip_id"])
            assert part.column_names == (FRAMES if name == "frames" else CLIPS).names
    assert loaded["val"][0]["turns"][0]["text"] == "val!"
    assert set(datasets.load_dataset(str(moved), cache_dir=str(tmp_path / "cache"))) == {"train", "val", "test"}


@pytest.mark.parametrize("library", ["polars", "pandas", "duckdb", "pyarrow", "datasets"])
def test_lines_of_the_documentation_give_the_speaking_share_of_val(library, tmp_path, monkeypatch):
    """Each block of docs/parquet.md ends in an expression: how often the assistant speaks in val, 0.1 in our sample."""
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    preprocess([ROOT / "data"], tmp_path / "labels")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "parquet.md").read_text(), re.DOTALL)
    (source,) = (block for block in blocks if f"import {library}" in block or f"from {library}" in block)
    *setup, last = source.strip().split("\n\n")
    known: dict = {}
    exec("\n\n".join(setup), known)
    assert eval(last, known) == pytest.approx(0.1)
