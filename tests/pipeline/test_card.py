"""The dataset card in an output of preprocess: what it says, whose it is, and what others read by it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import card
from pipeline import output as shards
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


def split_text(out: Path) -> tuple[str, str]:
    """(front matter, body)"""
    _, front, body = (out / "README.md").read_text().split("---\n", 2)
    return front, body


def test_front_matter_names_the_files_of_each_split(out):
    front, _ = split_text(out)
    assert front == (
        "license: unknown\n"
        "configs:\n"
        "- config_name: frames\n"
        "  default: true\n"
        "  data_files:\n"
        '  - split: "train"\n'
        "    path: frames/split=train/*.parquet\n"
        '  - split: "val"\n'
        "    path: frames/split=val/*.parquet\n"
        '  - split: "test"\n'
        "    path: frames/split=test/*.parquet\n"
        "- config_name: clips\n"
        "  data_files:\n"
        '  - split: "train"\n'
        "    path: clips/split=train/*.parquet\n"
        '  - split: "val"\n'
        "    path: clips/split=val/*.parquet\n"
        '  - split: "test"\n'
        "    path: clips/split=test/*.parquet\n"
    )


def test_body_tells_counts_hazards_columns_and_how_it_was_made(out):
    _, body = split_text(out)
    assert "| train | 3 | 3 | 30 |" in body
    assert "| val | 2 | 2 | 20 |" in body
    assert "| test | 1 | 1 | 10 |" in body
    assert "- train: no clip says anything about DST" in body
    for column in (*FRAMES.names, *CLIPS.names, "turns.role", "turns.updates.transition", "steps.name"):
        assert f"| `{column}` |" in body, column
    assert "| `n_speaking` | int32 | frames with speaking_label 1 |" in body
    assert '- positive: `"span"`' in body
    assert "| train_x.json | train | 3 | 0 | event |" in body


def test_card_tells_no_folders_of_this_machine(tmp_path):
    root = tmp_path / "private" / "raw"
    root.mkdir(parents=True)
    path = write_split(tmp_path / "private", "train", 1)
    assert main(["preprocess", str(path), "--out", str(tmp_path / "out"), "--frames-root", str(root)]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "private" not in text
    assert "- train: frames missing: 1 video below raw, e.g. train-v0" in text
    assert '- frames_root: `"raw"`' in text


def test_same_input_gives_the_same_card_wherever_it_lies(tmp_path, out):
    (tmp_path / "elsewhere").mkdir()
    inputs = [write_split(tmp_path / "elsewhere", s, clips) for s, clips in (("val", 2), ("test", 1), ("train", 3))]
    preprocess(inputs, tmp_path / "again", workers=2)
    assert (tmp_path / "again" / "README.md").read_bytes() == (out / "README.md").read_bytes()


def test_split_names_that_datasets_refuses_are_changed(tmp_path):
    path = write_split(tmp_path, "train", 1)
    manifest, _ = preprocess([path], tmp_path / "out")
    manifest["splits"] = {"dev-1": manifest["splits"]["train"]}
    card.write(tmp_path / "card.md", manifest)
    assert '  - split: "dev_1"\n    path: frames/split=dev-1/*.parquet\n' in (tmp_path / "card.md").read_text()


# ---- whose README.md it is ---------------------------------------------------------------------------


def test_a_card_of_ours_is_replaced(tmp_path, out):
    preprocess([write_split(tmp_path, "train", 5)], out)
    assert "| train | 5 | 5 | 50 |" in split_text(out)[1]
    assert "test" not in split_text(out)[0]
    assert shards.verify(out)


@pytest.mark.parametrize("edit", [lambda text: "# My data\n", lambda text: text.replace("unknown", "mit", 1)])
def test_a_card_that_was_edited_or_is_not_ours_stays(tmp_path, out, edit, capsys):
    readme = out / "README.md"
    readme.write_text(edit(readme.read_text()))
    edited = readme.read_bytes()
    assert not card.is_ours(readme)
    assert shards.verify(out)  # a licence filled in does not damage the data
    path = write_split(tmp_path, "train", 5)
    assert main(["preprocess", str(path), "--out", str(out)]) == 0
    assert readme.read_bytes() == edited
    assert "README.md: not, or no longer, the card that preprocess writes; left as it is" in capsys.readouterr().err
    assert shards.read_manifest(out)["splits"]["train"]["clips"] == 5


def test_a_readme_that_was_there_before_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine")
    preprocess([write_split(tmp_path, "train", 1)], tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_a_card_that_was_removed_comes_back(tmp_path, out):
    inputs = [tmp_path / f"{split}_x.json" for split in ("val", "test", "train")]
    written = (out / "README.md").read_bytes()
    assert preprocess(inputs, out)[1]
    (out / "README.md").unlink()
    assert not preprocess(inputs, out)[1]
    assert (out / "README.md").read_bytes() == written


def test_a_failed_swap_brings_the_old_card_back(tmp_path, out, monkeypatch):
    before = (out / "README.md").read_bytes()
    rename = Path.rename

    def fail(self, target):
        if Path(target) == out / "manifest.json" and self.parent != out:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(Exception, match="no space left"):
        preprocess([write_split(tmp_path, "train", 5)], out)
    monkeypatch.undo()
    assert (out / "README.md").read_bytes() == before


# ---- what others read --------------------------------------------------------------------------------


def test_datasets_gives_each_split_its_own_rows(out, tmp_path):
    datasets = pytest.importorskip("datasets")
    cache = {"cache_dir": str(tmp_path / "cache")}
    moved = tmp_path / "moved"
    shutil.move(out, moved)  # nothing depends on where it lies
    for name, rows in (("frames", {"train": 30, "val": 20, "test": 10}), ("clips", {"train": 3, "val": 2, "test": 1})):
        loaded = datasets.load_dataset(str(moved), name, **cache)
        assert {split: len(part) for split, part in loaded.items()} == rows
        for split, part in loaded.items():
            assert all(clip_id.startswith(split) for clip_id in part["clip_id"])
            assert part.column_names == (FRAMES if name == "frames" else CLIPS).names
    first = loaded["val"][0]
    assert first["turns"][0]["text"] == "val!"
    assert (first["turns"][0]["start_frame"], first["turns"][0]["end_frame"]) == (4, 6)
    expected = pq.read_table(moved / "clips" / "split=val", partitioning=None)["sampling_seed"][0].as_py()
    assert first["sampling_seed"] == expected
    assert set(datasets.load_dataset(str(moved), **cache)) == {"train", "val", "test"}  # frames are the default


def blocks(language: str) -> list[str]:
    text = (ROOT / "docs" / "parquet.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("library", ["polars", "pandas", "duckdb", "pyarrow", "datasets"])
def test_lines_of_the_documentation_give_the_speaking_share_of_val(library, tmp_path, monkeypatch):
    """Each block of docs/parquet.md ends in an expression: how often the assistant speaks in val, 0.1 in our sample."""
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    preprocess([ROOT / "data"], tmp_path / "labels")
    (source,) = (block for block in blocks("python") if f"import {library}" in block or f"from {library}" in block)
    *setup, last = source.strip().split("\n\n")
    known: dict = {}
    exec("\n\n".join(setup), known)
    assert eval(last, known) == pytest.approx(0.1)


def test_readers_that_know_hive_partitions_add_the_split(out):
    frames = pl.read_parquet(out / "frames")
    assert dict(frames.group_by("split").len().rows()) == {"train": 30, "val": 20, "test": 10}
    table = pq.read_table(out / "frames")
    assert table.column_names == [*FRAMES.names, "split"]
    assert pa.types.is_dictionary(table.schema.field("split").type)
