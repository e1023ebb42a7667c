"""The HTML page of an output folder: its data, and that text of the data stays text."""

import base64
import hashlib
import json
from html.parser import HTMLParser

import pytest
from toy_folder import HOSTILE, labels, make_clip, toy_splits, turn, write_folder

from pipeline import viewer


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def page_of(folder):
    out = folder.parent / "page.html"
    viewer.write_page(folder, out)
    page = out.read_text()
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return page, json.loads(data)


def test_page_carries_the_numbers_and_the_clips(toy):
    _, data = page_of(toy)
    assert [s["name"] for s in data["splits"]] == ["train", "val"]
    assert data["splits"][0]["heads"]["speaking"]["gaps"] == [0, 0, 1, 0, 0, 0, 0, 0, 0]  # one of 2.0 s
    assert [c["id"] for c in data["clips"]] == ["toy_a#0", "toy_b#1", "toy_c#0"]
    assert data["clips"][0]["labels"] == "abi2e2bai" + "e"
    assert data["clips"][0]["turns"][4][5] == [["S1", "complete"], ["S2", "start"]]


def test_hostile_text_stays_text(tmp_path):
    splits = toy_splits()
    splits["train"].append(make_clip(HOSTILE, "01", "00", recording=HOSTILE))
    benign, _ = page_of(write_folder(tmp_path / "a" / "out", {"train": [make_clip("c", "01", "00")]}))
    page, data = page_of(write_folder(tmp_path / "b" / "out", splits))
    assert Tags(page).found == Tags(benign).found
    assert page.count("<script") == 2
    assert data["clips"][0]["turns"][5][1].startswith("</script><script>alert(1)</script><!-- <b>&amp; ")


def test_page_loads_nothing_and_its_policy_allows_its_own_script_alone(toy):
    page, _ = page_of(toy)
    assert [tag for tag, attrs in Tags(page).found if {"src", "href", "data", "srcset"} & set(attrs)] == []
    assert "default-src 'none'" in page
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "unsafe" not in page.split("<style>")[0]


def test_many_clips_are_thinned_out_evenly_over_splits():
    picked = viewer.spread([list(range(1000)), list(range(3)), list(range(50))], 20)
    assert [len(p) for p in picked] == [9, 3, 8]
    assert picked[0] == [i * 1000 // 9 for i in range(9)]
    assert viewer.spread([[1], [2]], 1) in ([[1], []], [[], [2]])


def test_page_size_is_bounded(tmp_path, monkeypatch):
    talk = [turn("assistant", "word " * 100, 0, 1, 0.1)] * 500
    clips = [make_clip(f"c{i}", "01" * 20_000, "." * 40_000, turns=talk) for i in range(3)]
    folder = write_folder(tmp_path / "out", {"train": clips})
    monkeypatch.setattr(viewer, "MAX_BYTES", 500_000)
    page, data = page_of(folder)
    assert len(page) < 600_000
    clip = data["clips"][0]
    assert (len(clip["turns"]), clip["more_turns"], clip["frames"]) == (400, 100, 40_000)
    assert len(clip["labels"]) == 20_000


@pytest.mark.parametrize(
    ("speaking", "dst", "code"), [("", "", ""), ("111", "000", "b3"), ("10.", "01.", "bdi"), ("..", "00", "h2")]
)
def test_run_lengths(speaking, dst, code):
    assert viewer.run_lengths(labels(speaking), labels(dst)) == code
