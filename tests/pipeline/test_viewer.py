"""The HTML page of an output folder: its data, and that text of the data stays text."""

import base64
import hashlib
import json
from html.parser import HTMLParser

from made_up import HOSTILE, run, toy_clip

from pipeline import viewer
from pipeline.dataset import verify


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def page_of(folder, out):
    viewer.write_page(out, "labels", viewer.labels_page(folder, verify(folder)))
    page = out.read_text()
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return page, json.loads(data)


def test_page_carries_the_numbers_and_the_clips(toy, tmp_path):
    _, data = page_of(toy.folder, tmp_path / "page.html")
    assert [s["name"] for s in data["splits"]] == ["train", "val"]
    assert [data["splits"][0][cell] for cell in ("speak_only", "dst_only", "silence", "not_sampled")] == [2, 1, 13, 1]
    assert data["splits"][0]["heads"]["speaking"]["gaps"] == [0, 0, 1, 0, 0, 0, 0, 0, 0]  # one of 2.5 s
    assert [c["id"] for c in data["clips"]] == ["toy_a#0", "toy_b#1", "toy_c#0"]
    assert data["clips"][0]["labels"] == "ahe4bge2"
    assert data["clips"][0]["turns"][5][5] == [["S1", "complete"], ["S2", "start"]]


def test_hostile_text_stays_text_and_the_page_runs_its_own_script_alone(toy, tmp_path):
    benign, _ = page_of(run(tmp_path, [toy_clip("c", 0, 2, [])]).folder, tmp_path / "benign.html")
    page, data = page_of(toy.folder, tmp_path / "page.html")
    assert Tags(page).found == Tags(benign).found
    assert data["clips"][0]["turns"][4][1].startswith(HOSTILE.partition("\x1b")[0])
    assert [tag for tag, attrs in Tags(page).found if {"src", "href", "data", "srcset"} & set(attrs)] == []
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.split("<style>")[0]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_of_many_clips_some_are_shown_of_each_split(toy, monkeypatch):
    monkeypatch.setattr(viewer, "MAX_CLIPS", 2)
    shown = viewer.labels_page(toy.folder, verify(toy.folder))["clips"]
    assert [clip["id"] for clip in shown] == ["toy_a#0", "toy_c#0"]
