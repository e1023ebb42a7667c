"""The example of docs/add-a-reader.md does what the page says."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from made_up import run

from pipeline import readers
from pipeline.readers.clip import ClipError

PAGE = (Path(__file__).parents[3] / "docs" / "add-a-reader.md").read_text()


def test_the_page_s_reader_labels_the_page_s_clip_and_refuses_what_decides(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (sample,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    module = ModuleType("remarks")
    monkeypatch.setitem(sys.modules, "remarks", module)  # msgspec looks annotations up there
    exec(compile(code, "remarks.py", "exec"), module.__dict__)
    monkeypatch.setattr(readers, "READERS", (module.READER, *readers.READERS))
    out = run(tmp_path, [json.loads(sample)])
    assert out.manifest["inputs"][0]["schemas"] == {"remarks": 1}
    assert out.bounds() == [(0, 40)]
    assert out.ones() == ([6, 24], [])  # 3.2 s and 12.0 s at 2 fps
    with pytest.raises(ClipError) as error:
        readers.decode(b'{"clip": "a.mp4", "length_s": 9, "remarks": [[-1, "x"]]}')
    assert error.value.field == "remarks"
