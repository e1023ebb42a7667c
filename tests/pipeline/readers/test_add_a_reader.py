"""The example of docs/add-a-reader.md does what the page says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest

from pipeline import readers
from pipeline.preprocess import preprocess
from pipeline.readers.clip import ClipError

PAGE = Path(__file__).parents[3] / "docs" / "add-a-reader.md"


@pytest.fixture
def remarks(monkeypatch):
    """The page's module, registered as it says."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    module = ModuleType("remarks")
    monkeypatch.setitem(sys.modules, "remarks", module)  # msgspec looks annotations up there
    exec(compile(code, "remarks.py", "exec"), module.__dict__)
    monkeypatch.setattr(readers, "READERS", (module.READER, *readers.READERS))
    return module


def test_the_page_s_reader_labels_the_page_s_clip(remarks, tmp_path):
    (sample,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "train.jsonl").write_text(sample)
    manifest, _ = preprocess([tmp_path / "train.jsonl"], tmp_path / "out")
    assert manifest["inputs"][0]["schemas"] == {"remarks": 1}
    frames = pl.read_parquet(tmp_path / "out/frames/split=train/part-00000.parquet", hive_partitioning=False)
    assert frames["frame"].to_list() == list(range(40))
    assert frames.filter(pl.col("speaking_label") == 1)["frame"].to_list() == [6, 24]  # 3.2 s and 12.0 s at 2 fps
    assert set(frames["dst_update_label"]) == {-100}


@pytest.mark.parametrize(
    ("clip", "field"),
    [
        ('{"clip": "a.mp4", "length_s": 9, "remarks": [[-1, "x"]]}', "remarks"),
        ('{"clip": "../a.mp4", "length_s": 9, "remarks": []}', "clip"),
        ('{"clip": "a.mp4", "remarks": []}', "length_s"),
    ],
)
def test_the_page_s_reader_refuses_what_decides(remarks, clip, field):
    with pytest.raises(ClipError) as error:
        readers.decode(clip.encode())
    assert error.value.field == field


def test_a_clip_of_no_known_schema_is_told_what_each_schema_needs():
    with pytest.raises(ClipError) as error:
        readers.decode(b'{"video": "a.mp4", "captions": []}')
    assert "captions, video" in error.value.found
    for reader in readers.READERS:
        assert f"{reader.name}: {reader.needs}" in error.value.expected
