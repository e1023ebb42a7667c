"""Malformed clips and broken JSON between good clips, whose labels are then compared with `reference.py`.

A line of JSON Lines costs itself alone; a syntax error inside an array ends the reading of that file there: what
precedes it is kept, what follows is one quarantine line.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from harness import Ran, Shards, differences, preprocess, quarantine, shards
from reference import read_files


def good(name: str, **more) -> dict:
    """A small valid clip: 20 frames from 10, speaking at 12, 13, 20, a state update at 15, 16, 4 votes."""
    turns = [
        {"role": "system", "content": "You help.", "start_frame": 0, "end_frame": 1},
        {"role": "user", "content": "hi", "time": 5.5, "start_frame": 11, "end_frame": 13},
        {"role": "assistant", "content": "Attach it.", "time": 6.0, "start_frame": 12, "end_frame": 14},
        {"role": "DST_UPDATE", "content": "S1->start", "time": 7.5, "start_frame": 15, "end_frame": 17},
        {"role": "assistant", "content": "Well done.", "time": 10.0, "start_frame": 20, "end_frame": 21},
    ]
    clip = {"id": name, "video_uid": f"video of {name}", "fps": 2, "start_frame_idx": 10, "end_frame_idx": 30}
    return clip | {"dst": [{"id": "S1", "name": "one"}], "conversation": turns} | more


def plus(**fields) -> dict:
    """Clip b with one more turn, its turn 5."""
    turn = {"role": "user", "content": "hi", "time": 3.0, "start_frame": 6, "end_frame": 7} | fields
    return good("b", conversation=[*B["conversation"], turn])


A, B, C = (good(name) for name in "abc")
TA, TB, TC = (json.dumps(clip).encode() for clip in (A, B, C))
SESSION = {"video_path": "x.mp4", "video_intervals": [[0, 8], [8, 16]], "answers": ["$silent$", "$interrupt$Now."]}


def array(*texts: bytes) -> bytes:
    return b"[" + b", ".join(texts) + b"]"


def swap(old: bytes, new: bytes) -> bytes:
    """The text of clip b with something else in it."""
    assert old in TB
    return TB.replace(old, new, 1)


def run(folder: Path, content: bytes, *options: object) -> tuple[Ran, Path]:
    (folder / "train_training.json").write_bytes(content)
    return preprocess(folder / "train_training.json", "--out", folder / "out", *options), folder / "out"


def kept_well(found: Shards, expected: list[dict]) -> None:
    """Exactly these clips are on disk, in this order, with all labels right."""
    assert [clip["clip_id"] for clip in found.clips] == [clip["id"] for clip in expected]
    assert not differences(found, read_files([expected])[0])


# ---- clips that are valid JSON but malformed ----------------------------------------------------------

MALFORMED = [  # clip, turn, field
    ({name: value for name, value in B.items() if name != "video_uid"}, None, "video_uid"),
    *((good("b", video_uid=path), None, "video_uid") for path in ("../up", "/etc/passwd", 3)),
    (good("b", frames_file="data/../../x.arrow"), None, "frames_file"),
    (good("b", conversation=None), None, "conversation"),
    *((good("b", start_frame_idx=start), None, "start_frame_idx") for start in (-1, 1.5)),
    (good("b", start_frame_idx=31), None, "end_frame_idx"),
    *((good("b", end_frame_idx=end), None, "end_frame_idx") for end in (10, 1_000_011, 2**31)),  # 10: empty
    *((good("b", fps=fps), None, "fps") for fps in (0, "2", math.nan)),
    (good("b", neg_frame_sampling_rate=1.5), None, "neg_frame_sampling_rate"),
    (good("b", dst=[{"name": "one"}]), None, "dst"),
    (good("b", initial_dst_state={"S1": "exploded"}), None, "initial_dst_state"),
    (good("b", clip_idx=0.5), None, "clip_idx"),
    (good("b", conversation=["hi"]), 0, ""),
    (plus(role="robot"), 5, "role"),
    (plus(content=["hi"]), 5, "content"),
    *((plus(role="DST_UPDATE", content=said), 5, "content") for said in ("what a day", [{"transition": "start"}])),
    (plus(role="DST_UPDATE", content=[{"id": "S1", "transition": "explode"}]), 5, "transition"),
    *((plus(time=time), 5, "time") for time in (math.nan, "3.0")),
    *((plus(start_frame=start), 5, "start_frame") for start in (-1, 6.5)),
    (plus(start_frame=8), 5, "end_frame"),
    (plus(role="frames", start=9, end=8), 5, "end"),
    (SESSION | {"video_path": "../x.mp4"}, None, "video_path"),
    (SESSION | {"answers": ["$silent$"]}, None, "answers"),
    *((SESSION | {"video_intervals": chunks}, None, "video_intervals") for chunks in ([], [[8, 16], [0, 8]])),
    *((other, None, "") for other in (None, 3, [B])),
    (A, None, "id"),  # the first of two is kept
]


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_malformed_clips_are_quarantined_and_their_neighbours_kept(layout: str, tmp_path: Path):
    clips = [A, *(clip for clip, _, _ in MALFORMED), C]
    content = "\n".join(map(json.dumps, clips)) if layout == "lines" else json.dumps(clips, indent=2)
    ran, out = run(tmp_path, content.encode())
    assert ran.status == 3, ran.err
    kept_well(shards(out), [A, C])
    told = quarantine(out)
    assert [line["clip"] for line in told] == list(range(1, len(clips) - 1))
    for line, (clip, turn, field) in zip(told, MALFORMED, strict=True):
        assert line["turn"] == turn, (line, clip)
        assert field in str(line["field"]), (line, clip)


def test_on_error_fail_stops_with_one_line_and_leaves_the_old_output(tmp_path: Path):
    run(tmp_path, array(TA, TB))
    ran, out = run(tmp_path, json.dumps([A, plus(role="robot"), C]).encode(), "--on-error", "fail")
    assert (ran.status, len(ran.lines)) == (1, 1)
    assert all(word in ran.err for word in ("train_training.json", "clip 1", "turn 5", "role"))
    kept_well(shards(out), [A, B])


def test_duplicates_count_over_the_files_of_a_split_but_not_over_splits(tmp_path: Path):
    files = {"train_y": (TB, TA), "train_x": (TC, TA), "val_x": (TA, TB)}
    for name, texts in files.items():
        (tmp_path / f"{name}.json").write_bytes(array(*texts))
    ran = preprocess(*(tmp_path / f"{name}.json" for name in files), "--out", tmp_path / "out")
    assert ran.status == 3, ran.err
    kept_well(shards(tmp_path / "out"), [B, A, C])
    assert [c["clip_id"] for c in shards(tmp_path / "out", "val").clips] == ["a", "b"]
    (line,) = quarantine(tmp_path / "out")
    assert (Path(line["file"]).name, line["clip"]) == ("train_x.json", 1)


# ---- JSON --------------------------------------------------------------------------------------------

HARMLESS = [
    array(TA, TB[:-1] + b', "quality": {"x": [1, NaN, "]}"]}}', TC),  # not read
    b"\xef\xbb\xbf\n\n" + TA + b"\n\r\n" + TB + b"\n  \n" + TC + b"\n\n",  # byte-order mark, blank lines
    array(TA, swap(b'"start_frame": 15', b'"start_frame": 15.0'), TC),
    array(TA, swap(b'"end_frame": 13', b'"end_frame": 2147483646'), TC),
]


@pytest.mark.parametrize("content", HARMLESS, ids=["NaN", "lines", "15.0", "long turn"])
def test_harmless_oddities_change_nothing(content: bytes, tmp_path: Path):
    ran, out = run(tmp_path, content)
    assert ran.status == 0, ran.err
    kept_well(shards(out), [A, B, C])


STEPPED_OVER = (swap(b"Well done.", b"Well \xff\xfe done."), swap(b'"fps": 2', b'"fps": ' + b"9" * 5000))
ENDS_AN_ARRAY = (TB.replace(b'"', b"'"), swap(b'"fps": 2,', b'"fps": 2'), TB[:-1], b"[" * 100_000)


@pytest.mark.parametrize("broken", [*STEPPED_OVER, *ENDS_AN_ARRAY], ids=range(6))
def test_a_broken_clip_costs_itself_alone_as_a_line_and_in_an_array_at_most_what_follows(broken, tmp_path: Path):
    _, out = run(tmp_path, b"\n".join([TA, broken, TC]))
    kept_well(shards(out), [A, C])
    assert [line["clip"] for line in quarantine(out)] == [1]
    content = array(TA, broken, TC)
    assert run(tmp_path, content)[0].status == 3
    kept_well(shards(out), [A, C] if broken in STEPPED_OVER else [A])
    if broken in ENDS_AN_ARRAY:
        assert quarantine(out)[-1]["byte_end"] >= len(content) - 1  # the record reaches to the end of the file


@pytest.mark.parametrize(
    "content", [array(TA, TB)[:-1], array(TA, TB) + b" xyz", TA + b"\n" + TB + b'\n{"video_uid": "\xe2\x82']
)
def test_a_file_that_is_cut_or_goes_on_keeps_what_is_whole(content: bytes, tmp_path: Path):
    ran, out = run(tmp_path, content)
    assert ran.status == 3, ran.err
    kept_well(shards(out), [A, B])


NOTHING = (b"", b"[]", b"null", b'{"clips": []}', b"\x1f\x8b\x08\x00junk", array(TA).decode().encode("utf-16"))


@pytest.mark.parametrize("content", [*NOTHING, b"version https://git-lfs.github.com/spec/v1\nsize 12345\n"])
def test_a_file_without_a_clip_is_one_line(content: bytes, tmp_path: Path):
    ran, out = run(tmp_path, content)
    assert (ran.status, len(ran.lines)) == (1, 1)
    assert "train_training.json" in ran.err
    assert not (out / "manifest.json").exists()
