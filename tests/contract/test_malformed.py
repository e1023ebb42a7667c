"""Malformed clips among good ones, and the command itself: each costs itself, never a neighbour, never a traceback.

A case stands between two good clips, whose labels are then compared with `reference.py`: exit status 3 and one
quarantine line with file, clip, turn and field where a clip is refused; status 1 and one line on stderr where nothing
survives; 2 where the command itself is wrong. What is no JSON is test_syntax.py's business.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fields import problems
from harness import preprocess, quarantine, shards
from hostile import ALL_MUTATIONS, FRAMES_MUTATIONS, NOT_A_CLIP, SESSION_MUTATIONS, egoproactive_clip, mutated
from samples import (
    TA,
    TB,
    TC,
    A,
    B,
    C,
    array,
    frames_clip,
    good,
    kept_well,
    many,
    one_line,
    run,
    sound,
    swap,
    with_field,
)

# ---- clips that are valid JSON but malformed ----------------------------------------------------------


@pytest.mark.parametrize("layout", ["array", "indented", "lines"])
def test_malformed_clips_are_quarantined_and_their_neighbours_kept(layout: str, tmp_path: Path):
    session = egoproactive_clip(random.Random("session"), 1)
    bad = [mutated(frames_clip("p") if name in FRAMES_MUTATIONS else B, name) for name in sorted(ALL_MUTATIONS)]
    bad += [mutated(session, name) for name in sorted(SESSION_MUTATIONS)] + list(NOT_A_CLIP)
    found = [A, *bad, C]
    content = {
        "array": json.dumps(found).encode(),
        "indented": json.dumps(found, indent=2).encode(),
        "lines": b"\n".join(json.dumps(clip).encode() for clip in found),
    }[layout]
    ran, out = run(tmp_path, content)
    assert ran.status == 3, ran.err
    kept_well(out, [A, C])
    told = quarantine(out)
    assert [line["clip"] for line in told] == list(range(1, len(bad) + 1))
    for line, clip in zip(told, bad, strict=True):
        wrong = problems(clip) or [(None, "end_frame_idx")]  # bounds 5..5, refused once the convention is known
        assert any(line["turn"] == turn and field in str(line["field"]) for turn, field in wrong), (line, wrong)


@pytest.mark.parametrize("name", ["role unknown", "uid climbs"])
def test_on_error_fail_stops_with_one_line_and_writes_nothing(name: str, tmp_path: Path):
    ran, out = run(tmp_path, json.dumps([A, mutated(B, name), C]).encode(), "--on-error", "fail")
    assert ran.status == 1
    turn, field = problems(mutated(B, name))[0]
    one_line(ran, "train_training.json", "clip 1", field, *([] if turn is None else [f"turn {turn}"]))
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("name", ["bounds 10^9", "uid missing"])
def test_file_of_malformed_clips_alone_is_bad_input(name: str, tmp_path: Path):
    ran, out = run(tmp_path, json.dumps([mutated(B, name)]).encode())
    assert ran.status == 1
    one_line(ran, "train_training.json")
    assert not list(out.glob("clips/*/*.parquet"))


# ---- duplicates --------------------------------------------------------------------------------------


def test_the_first_of_two_clips_with_one_id_is_kept(tmp_path: Path):
    other = good("a", end_frame_idx=25, video_uid="another")
    ran, out = run(tmp_path, json.dumps([A, other, C]).encode())
    assert ran.status == 3
    kept_well(out, [A, C])
    (line,) = quarantine(out)
    assert line["clip"] == 1
    assert "id" in line["field"]


def test_a_refused_clip_does_not_take_an_id(tmp_path: Path):
    ran, out = run(tmp_path, json.dumps([mutated(A, "role unknown") | {"id": "a"}, A, C]).encode())
    assert ran.status == 3
    kept_well(out, [A, C])


def test_the_same_clip_without_an_id_twice_is_a_duplicate(tmp_path: Path):
    bare = {name: value for name, value in A.items() if name != "id"}
    ran, out = run(tmp_path, json.dumps([bare, bare]).encode())
    assert ran.status == 3
    assert len(shards(out).clips) == 1


def test_conversations_over_one_video_are_no_duplicates(tmp_path: Path):
    bare = {name: value for name, value in frames_clip("x").items() if name != "id"} | {"clip_idx": 0}
    users = [bare | {"metadata": {"user_id": f"talk_{i}"}} for i in range(3)]
    ran, out = run(tmp_path, json.dumps(users).encode())
    assert ran.status == 0, ran.err
    assert len({clip["clip_id"] for clip in shards(out).clips}) == 3


def test_the_same_id_in_two_splits_is_no_duplicate(tmp_path: Path):
    paths = [tmp_path / "train_x.json", tmp_path / "val_x.json"]
    for path in paths:
        path.write_bytes(array(TA, TB))
    ran = sound(preprocess(*paths, "--out", tmp_path / "out", "--workers", 1))
    assert ran.status == 0, ran.err
    assert [c["clip_id"] for c in shards(tmp_path / "out", "val").clips] == ["a", "b"]


def test_duplicate_across_files_of_a_split_is_refused_in_the_second(tmp_path: Path):
    paths = [tmp_path / "train_y.json", tmp_path / "train_x.json"]
    paths[0].write_bytes(array(TB, TA))
    paths[1].write_bytes(array(TC, TA))
    ran = sound(preprocess(*paths, "--out", tmp_path / "out", "--workers", 1))
    assert ran.status == 3, ran.err
    kept_well(tmp_path / "out", [B, A, C])
    (line,) = quarantine(tmp_path / "out")
    assert (Path(line["file"]).name, line["clip"]) == ("train_x.json", 1)


# ---- harmless oddities -------------------------------------------------------------------------------

HARMLESS = {
    "NaN in a field that is not read": array(TA, with_field(b"NaN"), TC),
    "Infinity in a field that is not read": array(TA, with_field(b"-Infinity"), TC),
    "NaN nested in a field that is not read": array(TA, with_field(b'{"x": [1, NaN, "]}"]}'), TC),
    "NaN in a JSONL field that is not read": b"\n".join([TA, with_field(b"NaN"), TC]),
    "1e400 in a field that is not read": array(TA, with_field(b"1e400"), TC),
    "5000 digits in a field that is not read": array(TA, with_field(b"7" * 5000), TC),
    "NaN and 5000 digits in fields that are not read": array(TA, with_field(b"7" * 5000 + b', "x": NaN'), TC),
    "lone surrogate in a field that is not read": array(TA, with_field(b'"\\ud800"'), TC),
    "byte-order mark, array": b"\xef\xbb\xbf" + array(TA, TB, TC),
    "byte-order mark, lines": b"\xef\xbb\xbf" + b"\n".join([TA, TB, TC]),
    "byte-order mark and NaN": b"\xef\xbb\xbf" + array(TA, with_field(b"NaN"), TC),
    "array with blanks around": b" \r\n\t" + array(TA, TB, TC) + b"\n\n  ",
    "lines with blank lines": b"\n\n" + TA + b"\n\r\n" + TB + b"\n  \n" + TC + b"\n\n",
    "carriage returns": b"\r\n".join([TA, TB, TC]),
    "line separators inside a text": array(TA, swap(b"Well done.", "x\u2028y\u2029z\x85".encode()), TC),
    "brackets inside a text": array(TA, swap(b"Well done.", rb"]}, {\" [ // /* NaN */"), TC),
    "NaN inside a text, and outside": array(TA, swap(b"Well done.", b"NaN, -Infinity", with_field(b"NaN")), TC),
    "a key twice": array(TA, with_field(b"2", b"fps"), TC),
    "nulls": array(TA, with_field(b"null", b"frames_file"), TC),
    "frame as 15.0": array(TA, swap(b'"start_frame": 15', b'"start_frame": 15.0'), TC),
    "frame as 1.5e1": array(TA, swap(b'"start_frame": 15', b'"start_frame": 1.5e1'), TC),
    "frame as -0.0": array(TA, swap(b'"start_frame": 0', b'"start_frame": -0.0'), TC),
    "a time of 1e308": array(TA, swap(b'"time": 10.0', b'"time": 1e308'), TC),
    "a tiny time": array(TA, swap(b'"time": 10.0', b'"time": 5e-324'), TC),
    "two dots in a name": array(TA, swap(b"video of b", b"a..b"), TC),
    "a hundred thousand characters": array(TA, swap(b"Well done.", b"x" * 100_000), TC),
    "escaped NUL in a text": array(TA, swap(b"Well done.", b"a\\u0000b"), TC),
    "surrogate pair": array(TA, swap(b"Well done.", b"\\ud83d\\ude00"), TC),
    "huge turn range": array(TA, swap(b'"end_frame": 13', b'"end_frame": 2147483646'), TC),
}


def test_harmless_oddities_change_nothing(tmp_path: Path):
    for name, told in many(tmp_path, HARMLESS, but="b").items():
        assert [one[0] for one in told.ids] == ["a", "b", "c"], name
        assert told.speaking == [3, 3, 3], name
        assert not told.lines, name


@pytest.mark.filterwarnings("error")
def test_a_product_that_overflows_leaves_stderr_empty(tmp_path: Path):
    ran, _ = run(tmp_path, array(TA, swap(b'"time": 10.0', b'"time": 1e308'), TC))
    assert (ran.status, ran.err) == (0, "")


def test_clip_at_the_last_frame_numbers(tmp_path: Path):
    last = 2**31 - 1
    turn = {"role": "assistant", "content": "x", "start_frame": last - 1, "end_frame": last}
    clip = good("end", start_frame_idx=last - 5, end_frame_idx=last, conversation=[turn])
    ran, out = run(tmp_path, json.dumps([clip]).encode())
    assert ran.status == 0, ran.err
    kept_well(out, [clip])


def test_window_turn_at_the_last_frame_number_does_not_overflow(tmp_path: Path):
    turn = {"role": "assistant", "content": "x", "start_frame": 12, "end_frame": 2**31 - 1}
    clip = good("w", conversation=[turn])
    ran, out = run(tmp_path, json.dumps([A, clip]).encode(), "--frame-convention", "window")
    assert ran.status in (0, 3)
    if ran.status == 0:
        assert shards(out).clips[1]["n_speaking"] == 19  # to frame 30: the clip's end is inclusive, too


def test_fps_at_the_ends_of_float_range(tmp_path: Path):
    for i, fps in enumerate((5e-324, 1e-40, 1e39, 1.7e308)):
        (tmp_path / str(i)).mkdir()
        ran, _ = run(tmp_path / str(i), json.dumps([A, good("f", fps=fps), C]).encode())
        assert ran.status in (0, 3)


def test_mixed_conventions_show_the_votes(tmp_path: Path):
    """Half event, half window, in one file: no rule reaches 90%."""
    turns = [
        {"role": "user", "content": "x", "time": (12 + i) / 2, "start_frame": s + i, "end_frame": e + i}
        for i in range(5)
        for s, e in ((12, 14), (10, 12))
    ]
    ran, out = run(tmp_path, json.dumps([good("m", conversation=turns)]).encode())
    assert ran.status == 1
    one_line(ran, "train_training.json", "--frame-convention", "event", "window", "5", "10")
    assert not out.joinpath("manifest.json").exists()
    ran, out = run(tmp_path, json.dumps([good("m", conversation=turns)]).encode(), "--frame-convention", "window")
    assert ran.status == 0


# ---- the command itself ------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path):
    ran = sound(preprocess(tmp_path / "train_none.json", "--out", tmp_path / "out"))
    assert ran.status in (1, 2)
    one_line(ran, "train_none.json")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_missing_file_beside_a_good_one(tmp_path: Path):
    (tmp_path / "train_good.json").write_bytes(array(TA, TB))
    ran = sound(preprocess(tmp_path / "train_good.json", tmp_path / "train_none.json", "--out", tmp_path / "out"))
    assert ran.status in (1, 2)
    one_line(ran, "train_none.json")


def test_folder_for_a_file(tmp_path: Path):
    (tmp_path / "train_x.json").mkdir()
    ran = sound(preprocess(tmp_path / "train_x.json", "--out", tmp_path / "out"))
    assert ran.status in (1, 2)
    one_line(ran, "train_x.json")


def test_no_input_at_all(tmp_path: Path):
    assert sound(preprocess("--out", tmp_path / "out")).status == 2


@pytest.mark.parametrize("name", ["clips.json", "training_x.json", ".json"])
def test_file_name_that_tells_no_split(name: str, tmp_path: Path):
    folder = tmp_path / "clips"  # pytest's own folder has the token test in its name
    folder.mkdir()
    ran, out = run(folder, array(TA, TB), name=name)
    assert ran.status == 2
    one_line(ran, name, "--split")
    assert not (out / "manifest.json").exists()
    ran, out = run(folder, array(TA, TB), "--split", "val", name=name)
    assert ran.status == 0, ran.err
    assert [c["clip_id"] for c in shards(out, "val").clips] == ["a", "b"]


USAGE = [
    ["--neg-rate", "1.5"],
    ["--neg-rate", "-0.1"],
    ["--neg-rate", "nan"],
    ["--neg-rate", "half"],
    ["--neg-rate", "train=2"],
    ["--neg-rate", "train=0.5,val"],
    ["--neg-rate", "=0.5"],
    ["--neg-rate", ""],
    ["--positive", "middle"],
    ["--frame-convention", "naive"],
    ["--on-error", "ignore"],
    ["--pad-s", "-1"],
    ["--pad-s", "nan"],
    ["--pad-s", "inf"],
    ["--workers", "-1"],
    ["--split", "../up"],
    ["--split", ""],
    ["--split", "a/b"],
    ["--recording-regex", "("],
    ["--seed", "many"],
    ["--nonsense"],
]


@pytest.mark.parametrize("options", USAGE, ids=" ".join)
def test_bad_usage_is_status_two(options: list[str], tmp_path: Path):
    ran, out = run(tmp_path, array(TA, TB), *options)
    assert ran.status == 2, (ran.status, ran.err, ran.out)
    assert ran.lines
    assert not (out / "manifest.json").exists()
    assert {p.name for p in tmp_path.iterdir()} <= {"train_training.json", "out"}


def test_out_that_is_a_file(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    ran, out = run(tmp_path, array(TA, TB))
    assert ran.status in (1, 2)
    one_line(ran)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["out[red]", "out {x}*?", "-out", "hive=1"])
def test_odd_names_of_the_output_folder(name: str, tmp_path: Path):
    path = tmp_path / "train_[bold] x.json"
    path.write_bytes(array(TA, b"{}", TC))
    out = tmp_path / name.replace("/", "]")
    ran = sound(preprocess(path, f"--out={out}", "--workers", 1))
    assert ran.status == 3, ran.err
    assert len(list(out.glob("clips/*/*.parquet"))) == 1


def test_markup_and_control_characters_in_the_input_are_harmless(tmp_path: Path):
    odd = good("[/red]", dataset="[/x]", video_uid="[bold]\x1b[31m\n")
    bad = good("x", conversation=[{"role": "[/x]\nassistant\x1b[31m", "content": ""}])
    ran, out = run(tmp_path, json.dumps([A, odd, bad]).encode())
    assert ran.status == 3
    kept_well(out, [A, odd])
    assert "\x1b" not in ran.out + ran.err
    ran, out = run(tmp_path, json.dumps([A, bad]).encode(), "--on-error", "fail")
    assert ran.status == 1
    one_line(ran, "turn 0", "role")
    assert "\x1b" not in ran.err


def test_one_file_twice_is_refused_the_second_time(tmp_path: Path):
    path = tmp_path / "train_x.json"
    path.write_bytes(array(TA, TB))
    ran = sound(preprocess(path, path, "--out", tmp_path / "out", "--workers", 1))
    assert ran.status in (0, 2, 3), ran.err
    if ran.status != 2:
        kept_well(tmp_path / "out", [A, B])


def test_strangers_in_the_output_folder_survive(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "frames").mkdir()
    (tmp_path / "out" / "frames" / "video.arrow").write_text("mine too")
    run(tmp_path, array(TA, TB))
    run(tmp_path, array(TA, TB, TC))
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "frames" / "video.arrow").read_text() == "mine too"


def test_bad_input_leaves_the_old_output(tmp_path: Path):
    run(tmp_path, array(TA, TB))
    ran, out = run(tmp_path, b"[{}]")
    assert ran.status == 1
    kept_well(out, [A, B])
    ran, out = run(tmp_path, array(TA, b"{}", TC), "--on-error", "fail")
    assert ran.status == 1
    kept_well(out, [A, B])


def test_quarantine_of_an_earlier_run_does_not_linger(tmp_path: Path):
    ran, out = run(tmp_path, array(TA, b"{}", TC))
    assert (ran.status, len(quarantine(out))) == (3, 1)
    ran, out = run(tmp_path, array(TA, TC))
    assert ran.status == 0
    assert not (out / "quarantine.jsonl").exists()


def test_several_bad_files_and_splits_are_each_named(tmp_path: Path):
    paths = []
    for name in ("train_1.json", "train_2.jsonl", "val_1.json"):
        paths.append(tmp_path / name)
        parts = [json.dumps(good(f"{name} {i}")).encode() for i in range(2)]
        paths[-1].write_bytes(array(parts[0], b"{}", parts[1]))
    ran = sound(preprocess(*paths, "--out", tmp_path / "out", "--workers", 1))
    assert ran.status == 3, ran.err
    found = [(Path(line["file"]).name, line["clip"]) for line in quarantine(tmp_path / "out")]
    assert found == [(path.name, 1) for path in paths]
    assert len(shards(tmp_path / "out", "train").clips) == 4
    assert len(shards(tmp_path / "out", "val").clips) == 2
