"""The dataset card in an output of preprocess: what it says, whose it is, and what others read by it."""

import re
from pathlib import Path

import pytest
from made_up import Out, run_on, toy_clip, turn, written

from pipeline.cli import main
from pipeline.preprocess import preprocess
from pipeline.schema import CLIPS, FRAMES

ROOT = Path(__file__).parents[2]
SPLITS = {"val": 2, "test": 1, "train": 3}


def write_split(folder: Path, split: str, clips: int) -> Path:
    """Clips of 10 frames each, the assistant speaking in frames 4 and 5."""
    turns = [turn("assistant", f"{split}!", 2.0, 4, 6)]
    return written(folder / f"{split}_x.json", [toy_clip(f"{split}{i}", 0, 10, turns, 0) for i in range(clips)])


@pytest.fixture
def out(tmp_path) -> Out:
    """3 clips in train, 2 in val, 1 in test; their frames, which are not there, in a folder named raw."""
    (tmp_path / "private" / "raw").mkdir(parents=True)
    inputs = [write_split(tmp_path / "private", split, clips) for split, clips in SPLITS.items()]
    return run_on(inputs, tmp_path, frames_root=str(tmp_path / "private" / "raw"))


def test_the_card_names_files_counts_hazards_columns_and_options_and_no_folder_of_this_machine(out):
    _, front, body = (out.folder / "README.md").read_text().split("---\n", 2)
    files = "".join(
        f'  - split: "{split}"\n    path: TABLE/split={split}/*.parquet\n'
        for split in sorted(SPLITS, key="train val test".index)
    )
    assert front == (
        "license: unknown\nconfigs:\n"
        "- config_name: frames\n  default: true\n  data_files:\n" + files.replace("TABLE", "frames")
        + "- config_name: clips\n  data_files:\n" + files.replace("TABLE", "clips")
    )  # fmt: skip
    for line in (
        "| train | 3 | 3 | 30 |",
        "| val | 2 | 2 | 20 |",
        "- train: no clip says anything about DST",
        "- test: frames missing: 1 video below raw, e.g. video of test0",
        "| `n_speaking` | int32 | frames with speaking_label 1 |",
        '- frames_root: `"raw"`',
        "| train_x.json | train | 3 | 0 | event |",
    ):
        assert line in body
    for column in (*FRAMES.names, *CLIPS.names, "turns.role", "turns.updates.transition", "steps.name"):
        assert f"| `{column}` |" in body, column
    assert "private" not in body


def test_a_card_of_ours_is_replaced_and_one_that_was_edited_stays(tmp_path, out, capsys):
    readme = out.folder / "README.md"
    preprocess([write_split(tmp_path, "train", 5)], out.folder)
    assert "| train | 5 | 5 | 50 |" in readme.read_text()
    readme.write_text(edited := readme.read_text().replace("unknown", "mit", 1))
    assert main(["preprocess", str(write_split(tmp_path, "train", 4)), "--out", str(out.folder), "--workers", "1"]) == 0
    assert readme.read_text() == edited
    assert "README.md: not, or no longer, the card that preprocess writes; left as it is" in capsys.readouterr().err


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
