"""Malformed files: each costs itself, never a neighbour, never a traceback, never gigabytes.

About 230 inputs in under a minute. A case stands between two good clips, whose labels are then compared with
`reference.py`: exit status 3 and one quarantine line with file, clip, turn and field where a clip is refused;
status 1 and one line on stderr where nothing survives; 2 where the command itself is wrong. Where DESIGN.md
allows two statuses (a trailing comma may be forgiven or named), the case lists both.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from harness import Ran, differences, preprocess, preprocess_apart, quarantine, shards
from hostile import ALL_MUTATIONS, FRAMES_MUTATIONS, NOT_A_CLIP, mutated
from reference import problems, read_files


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


def frames_clip(name: str) -> dict:
    turns = [{"role": "frames", "start": 10, "end": 13}, {"role": "assistant", "content": "Attach it."}]
    return {"id": name, "video_uid": "pro", "start_frame_idx": 10, "end_frame_idx": 20, "conversation": turns}


A, B, C = (good(name) for name in "abc")
TA, TB, TC = (json.dumps(clip).encode() for clip in (A, B, C))
BY_NAME = {"a": A, "b": B, "c": C}


def array(*texts: bytes) -> bytes:
    return b"[" + b", ".join(texts) + b"]"


def indented(*clips: dict) -> bytes:
    return json.dumps(list(clips), indent=1).encode()


def swap(old: bytes, new: bytes, text: bytes = TB) -> bytes:
    assert text.count(old) >= 1, old
    return text.replace(old, new, 1)


def with_field(value: bytes, name: bytes = b"quality") -> bytes:
    """Clip b with one more field, given as JSON text."""
    return TB[:-1] + b', "' + name + b'": ' + value + b"}"


def sound(ran: Ran) -> Ran:
    for text in (ran.err, ran.out):
        assert "Traceback" not in text, text[-3000:]
        assert "Error(" not in text, text[-3000:]
        assert "this is a bug" not in text, text[-3000:]
    assert ran.status in (0, 1, 2, 3), (ran.status, ran.err[-3000:])
    return ran


def one_line(ran: Ran, *words: str) -> None:
    assert len(ran.lines) == 1, ran.err
    assert len(ran.err) < 2000, "a line, not a dump"
    for word in words:
        assert word in ran.err, (word, ran.err)


def kept_well(out: Path, expected: list[dict]) -> None:
    """Exactly these clips are on disk, in this order, with all labels right."""
    readings, refused, _ = read_files([expected])
    assert not refused
    found = shards(out)
    assert [clip["clip_id"] for clip in found.clips] == [clip["id"] for clip in expected]
    wrong, _ = differences(found, readings, split="train", positive="span", seed=0, rate=None)
    assert not wrong, wrong


def run(folder: Path, content: bytes, *options: object, name: str = "train_training.json") -> tuple[Ran, Path]:
    path = folder / name
    path.write_bytes(content)
    started = time.monotonic()
    ran = sound(preprocess(path, "--out", folder / "out", "--workers", 1, *options))
    assert time.monotonic() - started < 10
    return ran, folder / "out"


# ---- one clip that is valid JSON but malformed, between two good ones --------------------------------


@pytest.mark.parametrize("name", sorted(ALL_MUTATIONS))
def test_malformed_clip_is_quarantined_and_its_neighbours_kept(name: str, tmp_path: Path):
    bad = mutated(frames_clip("p") if name in FRAMES_MUTATIONS else B, name)
    wrong = problems(bad)
    assert wrong, "the case itself"
    ran, out = run(tmp_path, json.dumps([A, bad, C]).encode())
    assert ran.status == 3, ran.err
    kept_well(out, [A, C])
    (line,) = quarantine(out)
    assert Path(line["file"]).name == "train_training.json"
    assert line["clip"] == 1
    assert any(line["turn"] == turn and field in str(line["field"]) for turn, field in wrong), (line, wrong)


@pytest.mark.parametrize("bad", NOT_A_CLIP, ids=json.dumps)
def test_element_that_is_no_clip_is_quarantined(bad, tmp_path: Path):
    ran, out = run(tmp_path, json.dumps([A, bad, C]).encode())
    assert ran.status == 3, ran.err
    kept_well(out, [A, C])
    (line,) = quarantine(out)
    assert (line["clip"], line["turn"]) == (1, None)


def test_all_malformed_clips_at_once_in_every_format(tmp_path: Path):
    names = sorted(set(ALL_MUTATIONS) - set(FRAMES_MUTATIONS))
    found = [A, *(mutated(B, name) for name in names), C]
    lines = b"\n".join(json.dumps(clip).encode() for clip in found)
    for i, content in enumerate((json.dumps(found).encode(), json.dumps(found, indent=2).encode(), lines)):
        folder = tmp_path / str(i)
        folder.mkdir()
        ran, out = run(folder, content)
        assert ran.status == 3, ran.err
        kept_well(out, [A, C])
        assert [line["clip"] for line in quarantine(out)] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("name", ["role unknown", "time NaN", "bounds 10^9", "uid climbs", "swapped", "uid missing"])
def test_on_error_fail_stops_with_one_line_and_writes_nothing(name: str, tmp_path: Path):
    ran, out = run(tmp_path, json.dumps([A, mutated(B, name), C]).encode(), "--on-error", "fail")
    assert ran.status == 1
    turn, field = problems(mutated(B, name))[0]
    one_line(ran, "train_training.json", "clip 1", field, *([] if turn is None else [f"turn {turn}"]))
    assert not (out / "manifest.json").exists()


@pytest.mark.parametrize("name", ["role unknown", "time NaN", "bounds 10^9", "uid missing", "end over uint64"])
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


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_harmless_oddity_changes_nothing(name: str, tmp_path: Path):
    ran, out = run(tmp_path, HARMLESS[name])
    assert ran.status == 0, ran.err
    assert not quarantine(out)
    assert [clip["clip_id"] for clip in shards(out).clips] == ["a", "b", "c"]
    assert [clip["n_speaking"] for clip in shards(out).clips] == [3, 3, 3]


def test_a_product_that_overflows_leaves_stderr_empty(tmp_path: Path):
    path = tmp_path / "train_training.json"
    path.write_bytes(array(TA, swap(b'"time": 10.0', b'"time": 1e308'), TC))
    ran = sound(preprocess_apart(path, "--out", tmp_path / "out"))
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
        assert shards(out).clips[1]["n_speaking"] == 18


def test_fps_at_the_ends_of_float_range(tmp_path: Path):
    for i, fps in enumerate((5e-324, 1e-40, 1e39, 1.7e308)):
        (tmp_path / str(i)).mkdir()
        ran, _ = run(tmp_path / str(i), json.dumps([A, good("f", fps=fps), C]).encode())
        assert ran.status in (0, 3)


# ---- syntax: one broken clip between two good ones ---------------------------------------------------

HUGE = b"9" * 5000
SYNTAX = {
    # name: (middle clip's text, statuses, whether b may be on disk)
    "single quotes": (TB.replace(b'"', b"'"), {3}, False),
    "python's None": (swap(b'"fps": 2', b'"fps": None'), {3}, False),
    "undefined": (swap(b'"fps": 2', b'"fps": undefined'), {3}, False),
    "unquoted key": (swap(b'"fps"', b"fps"), {3}, False),
    "missing colon": (swap(b'"fps": 2', b'"fps" 2'), {3}, False),
    "missing value": (swap(b'"fps": 2', b'"fps": '), {3}, False),
    "missing comma": (swap(b'"fps": 2,', b'"fps": 2'), {3}, False),
    "trailing comma in the object": (TB[:-1] + b",}", {0, 3}, True),
    "trailing comma in the conversation": (TB[:-2] + b",]}", {0, 3}, True),
    "leading zero": (swap(b'"fps": 2', b'"fps": 02'), {3}, False),
    "plus sign": (swap(b'"fps": 2', b'"fps": +2'), {3}, False),
    "hexadecimal": (swap(b'"fps": 2', b'"fps": 0x2'), {3}, False),
    "bare point": (swap(b'"time": 10.0', b'"time": 10.'), {3}, False),
    "bad escape": (swap(b"Well done.", b"Well\\x done."), {3}, False),
    "half an escape": (swap(b"Well done.", b"Well\\u12 done."), {3}, False),
    "raw line break in a text": (swap(b"Well done.", b"Well\ndone."), {0, 3}, True),
    "raw tab in a text": (swap(b"Well done.", b"Well\tdone."), {0, 3}, True),
    "raw NUL in a text": (swap(b"Well done.", b"Well\0done."), {0, 3}, True),
    "NUL between tokens": (swap(b'"fps": 2', b'"fps":\0 2'), {3}, False),
    "line comment inside": (swap(b'"fps": 2,', b'"fps": 2, // two\n'), {0, 3}, True),
    "block comment inside": (swap(b'"fps": 2,', b'"fps": 2, /* two */'), {0, 3}, True),
    "invalid UTF-8 in a text that is read": (swap(b"Well done.", b"Well \xff\xfe done."), {3}, False),
    "overlong UTF-8 in a text that is read": (swap(b"Well done.", b"Well \xc0\x80 done."), {3}, False),
    "half a UTF-8 character": (swap(b"Well done.", b"Well \xe2\x82"), {3}, False),
    "UTF-8 surrogate": (swap(b"Well done.", b"Well \xed\xa0\x80"), {3}, False),
    "invalid UTF-8 in video_uid": (swap(b"video of b", b"video \xff"), {3}, False),
    "invalid UTF-8 in id": (swap(b'"id": "b"', b'"id": "\xff"'), {3}, False),
    "invalid UTF-8 in a step's name": (swap(b'"name": "one"', b'"name": "\xff"'), {3}, False),
    "invalid UTF-8 in an update": (swap(b"S1->start", b"\xff->start"), {3}, False),
    "invalid UTF-8 in a field that is not read": (with_field(b'"\xff"'), {0, 3}, True),
    "invalid UTF-8 in a key that is not read": (with_field(b"1", b"\xff"), {0, 3}, True),
    "lone surrogate in a text": (swap(b"Well done.", b"\\ud800"), {0, 3}, True),
    "lone surrogate in video_uid": (swap(b"video of b", b"\\udc00"), {3}, False),
    "lone surrogate in id": (swap(b'"id": "b"', b'"id": "\\ud800"'), {3}, False),
    "5000 digits in a frame": (swap(b'"end_frame": 13', b'"end_frame": ' + HUGE), {3}, False),
    "5000 digits in a time": (swap(b'"time": 10.0', b'"time": ' + HUGE), {3}, False),
    "5000 digits in fps": (swap(b'"fps": 2', b'"fps": ' + HUGE), {3}, False),
    "5000 digits in the bounds": (swap(b'"end_frame_idx": 30', b'"end_frame_idx": ' + HUGE), {3}, False),
    "5000 digits in clip_idx": (with_field(HUGE, b"clip_idx"), {3}, False),
    "5000 digits and NaN": (
        swap(b'"end_frame": 13', b'"end_frame": ' + HUGE, with_field(b"NaN")),
        {3},
        False,
    ),
    "5000 decimals in a frame": (swap(b'"end_frame": 13', b'"end_frame": 13.' + b"0" * 5000), {0, 3}, True),
    "1e400 in a frame": (swap(b'"end_frame": 13', b'"end_frame": 1e400'), {3}, False),
    "1e400 in a time": (swap(b'"time": 10.0', b'"time": 1e400'), {3}, False),
    "1e400 in fps": (swap(b'"fps": 2', b'"fps": 1e400'), {3}, False),
    "1e999999999 in a time": (swap(b'"time": 10.0', b'"time": 1e999999999'), {3}, False),
    "deep nesting in a field that is not read": (with_field(b"[" * 100_000 + b"]" * 100_000), {0, 3}, True),
    "deep objects in a field that is not read": (
        with_field(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        {0, 3},
        True,
    ),
    "deep nesting in a content": (
        swap(b'"Well done."', b"[" * 100_000 + b"]" * 100_000),
        {3},
        False,
    ),
    "deep nesting for a conversation": (
        b'{"id": "b", "video_uid": "x", "conversation": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        {3},
        False,
    ),
}


@pytest.mark.parametrize("name", sorted(SYNTAX))
def test_broken_clip_in_an_array_costs_itself_alone(name: str, tmp_path: Path):
    broken, statuses, may_stay = SYNTAX[name]
    check_broken(tmp_path, array(TA, broken, TC), statuses, may_stay)


@pytest.mark.parametrize("name", sorted(n for n in SYNTAX if "raw line break" not in n and "line comment" not in n))
def test_broken_line_costs_itself_alone(name: str, tmp_path: Path):
    broken, statuses, may_stay = SYNTAX[name]
    check_broken(tmp_path, b"\n".join([TA, broken, TC]) + b"\n", statuses, may_stay, name="train_lines.jsonl")


def check_broken(
    folder: Path, content: bytes, statuses: set[int], may_stay: bool, name: str = "train_training.json"
) -> None:
    """a and c stay, b stays where it may, and what is refused is named once, at its place."""
    ran, out = run(folder, content, name=name)
    assert ran.status in statuses, (ran.status, ran.err)
    ids = [clip["clip_id"] for clip in shards(out).clips]
    assert ids == ["a", "c"] or (may_stay and ids == ["a", "b", "c"]), ids
    if ids == ["a", "c"]:
        kept_well(out, [A, C])
        (line,) = quarantine(out)
        assert Path(line["file"]).name == name
        assert line["clip"] == 1, line
        assert {"turn", "field"} <= set(line)


# Quotes or brackets that do not balance: where the clip ends must be guessed, its neighbours must be kept.
UNBALANCED = {
    "no closing brace": lambda clip: clip[:-1],
    "no closing bracket": lambda clip: clip[:-2] + b"}",
    "no end at all": lambda clip: clip[:-2],
    "cut in the conversation": lambda clip: clip[: clip.index(b"Attach it.") + 4],
    "cut before the conversation": lambda clip: clip[: clip.index(b'"dst"')],
    "cut in a turn": lambda clip: clip[: clip.index(b'"time"')],
    "an extra closing brace": lambda clip: clip + b"}",
    "an extra closing bracket": lambda clip: clip[:-1] + b"]}",
    "an extra opening brace": lambda clip: b"{" + clip,
    "an extra opening bracket": lambda clip: b"[" + clip,
    "a text without its end": lambda clip: swap(b'Well done."', b"Well done.", clip),
    "a text without its start": lambda clip: swap(b'"Well done."', b'Well done."', clip),
    "a key without its end": lambda clip: swap(b'"fps"', b'"fps', clip),
    "a quote too many": lambda clip: swap(b'Well done."', b'Well "done."', clip),
}


@pytest.mark.parametrize("layout", ["one line", "a clip a line", "indented", "lines"])
@pytest.mark.parametrize("name", sorted(UNBALANCED))
def test_unbalanced_clip_costs_itself_alone(name: str, layout: str, tmp_path: Path):
    if layout == "indented":
        text = indented(A, B, C)
        start, end = text.index(b' {\n  "id": "b"') + 1, text.index(b' {\n  "id": "c"')
        middle = text[start:end].rstrip(b" ,\n")
        whole = json.dumps(B, indent=1).encode().replace(b"\n", b"\n ")
        assert middle == whole
        compact_end = middle.replace(b"\n  ]\n }", b"]}")
        content = text.replace(middle, UNBALANCED[name](compact_end))
    else:
        middle = UNBALANCED[name](TB)
        joint = {"one line": b", ", "a clip a line": b",\n", "lines": b"\n"}[layout]
        content = joint.join([TA, middle, TC])
        content = content + b"\n" if layout == "lines" else b"[" + content + b"]"
    ran, out = run(tmp_path, content)
    assert ran.status in (0, 3), (ran.status, ran.err)
    ids = [clip["clip_id"] for clip in shards(out).clips]
    # An extra bracket outside the clip leaves the clip itself whole.
    whole_inside = name.startswith("an extra") and not name.endswith("closing bracket")
    assert ids == ["a", "c"] or (whole_inside and ids == ["a", "b", "c"]), ids
    assert ran.status == 3
    assert all(line["clip"] in (1, 2) for line in quarantine(out))


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_to_a_clips_bytes_costs_itself_alone(seed: int, tmp_path: Path):
    """A few bytes of the middle clip replaced, cut, inserted or repeated: the neighbours stay, exactly."""
    for case in range(8):
        rng = random.Random(f"{seed} {case}")
        text = damaged(rng, json.dumps(B, indent=rng.choice((None, 1))).encode())
        content = rng.choice(
            (array(TA, text, TC), b"[" + b",\n".join([TA, text, TC]) + b"]", b"\n".join([TA, text, TC]))
        )
        folder = tmp_path / str(case)
        folder.mkdir()
        ran, out = run(folder, content)
        assert ran.status in (0, 3), (ran.status, ran.err, text)
        ids = [clip["clip_id"] for clip in shards(out).clips]
        assert (ids[0], ids[-1]) == ("a", "c"), (ids, text)
        assert len(ids) == 3 or (len(ids) == 2 and ran.status == 3), (ids, text)


def damaged(rng: random.Random, text: bytes) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length, byte = (
            rng.randrange(len(text)),
            rng.choice((1, 2, 5, 30, 200)),
            rng.choice(b'{}[]",:\\\n\0\xff 0aN'),
        )
        before, after = text[:at], text[at:]
        text = rng.choice(
            (before + bytes([byte]) + after[1:], before + after[length:], before + bytes([byte]) + after,
             before + after[:length] + after)
        )  # fmt: skip
    return text


@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_slow_reading_of_a_long_file_loses_nothing_at_its_seams(layout: str, start: bytes, tmp_path: Path):
    """12 MB of characters of 1 to 4 bytes, read the slow way because of one NaN; every 50th clip is broken."""
    rng, texts, whole = random.Random(layout), [], []
    for i in range(600):
        clip = good(f"c{i}", inferred_knowledge="é部✓😀x" * rng.randint(0, 2400))
        texts.append(json.dumps(clip, ensure_ascii=False).encode())
        if i % 50 == 7:
            texts[-1] = texts[-1][: -rng.choice((1, 2, 9, 40, 300))]
        else:
            whole.append(clip)
    texts[0] = texts[0][:-1] + b', "q": NaN}'
    content = b"[" + b",\n".join(texts) + b"]" if layout == "array" else b"\n".join(texts)
    ran, out = run(tmp_path, start + content)
    assert ran.status == 3, ran.err
    kept_well(out, whole)
    assert len(quarantine(out)) == 12


@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize("cut", [1, 2, 9, 40, 300])
def test_clips_after_a_broken_one_keep_their_numbers(layout: str, cut: int, tmp_path: Path):
    texts = [TA, TB[:-cut], TC, b'{"video_uid": 5}']
    ran, out = run(tmp_path, array(*texts) if layout == "array" else b"\n".join(texts))
    assert ran.status == 3
    kept_well(out, [A, C])
    assert [line["clip"] for line in quarantine(out)] == [1, 3]


# ---- syntax: the file around the clips ---------------------------------------------------------------

AROUND = {
    # name: (content, statuses, clips that must be there)
    "array without its end": (array(TA, TB)[:-1], {3}, "ab"),
    "array cut after a comma": (b"[" + TA + b", " + TB + b",", {3}, "ab"),
    "array cut in a clip": (array(TA, TB, TC)[:-60], {3}, "ab"),
    "array cut in a text": (array(TA, TB, TC[: TC.index(b"Attach") + 3]), {3}, "ab"),
    "array cut in a key": (b"[" + TA + b', {"vid', {3}, "a"),
    "array cut in a number": (b"[" + TA + b', {"fps": 1', {3}, "a"),
    "indented array cut": (indented(A, B, C)[:-60], {3}, "ab"),
    "lines cut": (TA + b"\n" + TB + b"\n" + TC[:-60], {3}, "ab"),
    "lines cut in UTF-8": (TA + b"\n" + TB + b'\n{"video_uid": "\xe2\x82', {3}, "ab"),
    "trailing comma": (b"[" + TA + b", " + TB + b",]", {0, 3}, "ab"),
    "leading comma": (b"[," + TA + b", " + TB + b"]", {0, 3}, "ab"),
    "two commas": (b"[" + TA + b",, " + TB + b"]", {0, 3}, "ab"),
    "no comma": (b"[" + TA + b" " + TB + b"]", {0, 3}, "ab"),
    "semicolon": (b"[" + TA + b"; " + TB + b"]", {0, 3}, "ab"),
    "garbage after the array": (array(TA, TB) + b" xyz", {3}, "ab"),
    "object after the array": (array(TA, TB) + b"\n" + TC, {0, 3}, "ab"),
    "bracket after the array": (array(TA, TB) + b"]", {0, 3}, "ab"),
    "NUL after the array": (array(TA, TB) + b"\0\0\0", {0, 3}, "ab"),
    "control-Z after the array": (array(TA, TB) + b"\x1a", {0, 3}, "ab"),
    "garbage before the array": (b"xyz " + array(TA, TB), {1, 3}, ""),
    "two arrays": (array(TA) + b"\n" + array(TB), {0, 3}, "ab"),
    "two arrays without a blank": (array(TA, TB) + array(TC), {0, 3}, "abc"),
    "an array a line": (array(TA) + b"\n" + array(TB, TC) + b"\n", {0, 3}, "abc"),
    "line comment between": (b"[" + TA + b", // next\n" + TB + b"]", {0, 3}, "ab"),
    "block comment between": (b"[" + TA + b", /* , [ */" + TB + b"]", {0, 3}, "ab"),
    "line comment first": (b"// clips\n" + array(TA, TB), {0, 1, 3}, ""),
    "objects over several lines": (json.dumps(A, indent=2).encode() + b"\n" + TB, {0, 3}, "ab"),
    "objects on one line": (TA + b" " + TB, {0, 3}, "ab"),
    "objects without a blank": (TA + TB, {0, 3}, "ab"),
    "lines with commas": (TA + b",\n" + TB + b",\n", {0, 3}, "ab"),
    "lines with a null": (TA + b"\nnull\n" + TB, {3}, "ab"),
    "lines with a number": (TA + b"\n5\n" + TB, {3}, "ab"),
    "lines with a word": (TA + b"\nhello world\n" + TB, {3}, "ab"),
    "lines with half a line": (TA + b'\n{"video_uid": "x", "conv\n' + TB, {3}, "ab"),
    "lines with a NaN time": (TA + b"\n" + swap(b"10.0", b"NaN") + b"\n" + TC, {3}, "ac"),
    "word between": (b"[" + TA + b", hello, " + TB + b"]", {3}, "ab"),
    "NaN between": (b"[" + TA + b", NaN, " + TB + b"]", {3}, "ab"),
    "byte-order mark and a bad clip": (
        b"\xef\xbb\xbf" + array(TA, swap(b"10.0", b"Infinity"), TC),
        {3},
        "ac",
    ),
    "invalid UTF-8 between": (b"[" + TA + b", \xff\xfe, " + TB + b"]", {3}, "ab"),
    "a form feed for a blank": (b"[" + TA + b",\f" + TB + b"]", {0, 3}, "ab"),
}


@pytest.mark.parametrize("name", sorted(AROUND))
def test_damage_around_clips_costs_no_whole_clip(name: str, tmp_path: Path):
    content, statuses, ids = AROUND[name]
    ran, out = run(tmp_path, content)
    assert ran.status in statuses, (ran.status, ran.err)
    if ran.status == 1:
        one_line(ran, "train_training.json")
        return
    found = [clip["clip_id"] for clip in shards(out).clips]
    assert "".join(found).startswith(ids), found
    kept_well(out, [BY_NAME[name] for name in found])
    assert bool(quarantine(out)) == (ran.status == 3)


NOTHING = {
    "empty": b"",
    "blanks": b" \n\t \r\n",
    "byte-order mark alone": b"\xef\xbb\xbf",
    "empty array": b"[]",
    "null": b"null",
    "true": b"true",
    "number": b"42",
    "text": b'"clips"',
    "NaN": b"NaN",
    "empty object": b"{}",
    "array of an empty object": b"[{}]",
    "array of null": b"[null]",
    "array of empty arrays": b"[[], []]",
    "array in an array": b"[" + array(TA, TB) + b"]",
    "object of clips": b'{"clips": ' + array(TA, TB) + b"}",
    "only an opening bracket": b"[",
    "only an opening brace": b"{",
    "only a closing bracket": b"]",
    "only a quote": b'"',
    "only a comma": b",",
    "deep arrays": b"[" * 100_000,
    "deep closed arrays": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "UTF-16 with mark": array(TA, TB).decode().encode("utf-16"),
    "UTF-16 big-endian": array(TA, TB).decode().encode("utf-16-be"),
    "UTF-16 little-endian": array(TA, TB).decode().encode("utf-16-le"),
    "UTF-32": array(TA, TB).decode().encode("utf-32"),
    "zeros": b"\0" * 5000,
    "gzip": b"\x1f\x8b\x08\x00" + random.Random(1).randbytes(500),
    "parquet": b"PAR1" + random.Random(2).randbytes(500) + b"PAR1",
    "noise": random.Random(3).randbytes(5000),
    "csv": b"video_uid,start,end\nv,1,2\n",
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "yaml": b"- video_uid: v\n  conversation: []\n",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_file_without_a_clip_is_one_line(name: str, tmp_path: Path):
    ran, out = run(tmp_path, NOTHING[name])
    assert ran.status == 1, (ran.status, ran.err)
    one_line(ran, "train_training.json")
    assert not (out / "manifest.json").exists()


def test_empty_array_beside_a_good_file_is_no_error(tmp_path: Path):
    """It is well-formed and no clip of it is lost."""
    (tmp_path / "train_good.json").write_bytes(array(TA, TB))
    (tmp_path / "train_none.json").write_bytes(b"[]")
    paths = tmp_path / "train_good.json", tmp_path / "train_none.json"
    ran = sound(preprocess(*paths, "--out", tmp_path / "out", "--workers", 1))
    assert ran.status == 0, ran.err
    kept_well(tmp_path / "out", [A, B])


@pytest.mark.parametrize("name", ["empty", "noise", "deep arrays", "UTF-16 with mark"])
def test_bad_file_beside_a_good_one_is_named(name: str, tmp_path: Path):
    """A file with nothing in it is refused as a whole (status 1), or named while the other is done (3)."""
    (tmp_path / "train_good.json").write_bytes(array(TA, TB))
    (tmp_path / "train_bad.json").write_bytes(NOTHING[name])
    paths = tmp_path / "train_good.json", tmp_path / "train_bad.json"
    ran = sound(preprocess(*paths, "--out", tmp_path / "out", "--workers", 1))
    assert ran.status in (1, 3), ran.err
    if ran.status == 3:
        kept_well(tmp_path / "out", [A, B])
        assert any("train_bad.json" in line["file"] for line in quarantine(tmp_path / "out"))
    else:
        one_line(ran, "train_bad.json")


@pytest.mark.parametrize("first", [b"NaN" + TB, b'"' + TB, b"},{" + TB, b"\0", TB[1:], b"\xff\xfe", b"x"])
def test_a_first_line_that_begins_like_nothing_costs_no_other_line(first: bytes, tmp_path: Path):
    ran, out = run(tmp_path, b"\n".join((first, TA, TC)))
    assert ran.status == 3, ran.err
    kept_well(out, [A, C])
    assert [line["clip"] for line in quarantine(out)] == [0]


def test_half_a_character_in_a_role_costs_its_clip_alone(tmp_path: Path):
    ran, out = run(tmp_path, array(TA, TB.replace(b'"role": "', b'"role": "\xb8', 1), TC))
    assert ran.status == 3, ran.err
    kept_well(out, [A, C])
    assert "UTF-8" in quarantine(out)[0]["found"]


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


@pytest.mark.parametrize("name", ["clips.json", "training.json", "training_x.json", "trainer_x.json", ".json"])
def test_file_name_that_tells_no_split(name: str, tmp_path: Path):
    ran, out = run(tmp_path, array(TA, TB), name=name)
    assert ran.status == 2
    one_line(ran, name, "--split")
    assert not (out / "manifest.json").exists()
    ran, out = run(tmp_path, array(TA, TB), "--split", "val", name=name)
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


@pytest.mark.parametrize("name", ["out[red]", "out*", "out?", "out {x}", "out[/", "-out", "out%20", "hive=1"])
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
    ran = sound(preprocess(*paths, "--out", tmp_path / "out", "--workers", 2))
    assert ran.status == 3, ran.err
    found = [(Path(line["file"]).name, line["clip"]) for line in quarantine(tmp_path / "out")]
    assert found == [(path.name, 1) for path in paths]
    assert len(shards(tmp_path / "out", "train").clips) == 4
    assert len(shards(tmp_path / "out", "val").clips) == 2


# ---- bombs, in a process of their own under limits ---------------------------------------------------

BOMBS = {
    "deep nesting": (array(TA, b"[" * 1_000_000, TC), {1, 3}),
    "deep nesting in a clip": (array(TA, with_field(b"[" * 1_000_000 + b"]" * 1_000_000), TC), {0, 3}),
    "a number of a million digits": (
        array(TA, swap(b'"end_frame": 13', b'"end_frame": ' + b"9" * 10**6), TC),
        {3},
    ),
    "many empty objects": (array(TA, *[b"{}"] * 50_000, TC), {3}),
    "many opening braces": (array(TA, b"{" * 200_000, TC), {1, 3}),
    "many quotes": (array(TA, b'"' * 200_001, TC), {1, 3}),
    "many broken clips": (array(TA, *[TB[:-1]] * 2_000, TC), {1, 3}),
    "many ranges of 10^9": (
        json.dumps(
            [
                A,
                good(
                    "b",
                    end_frame_idx=1_000_010,
                    conversation=[A["conversation"][2] | {"end_frame": 2**31 - 2}] * 300,
                ),
            ]
        ).encode(),
        {0},
    ),
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_bomb_takes_neither_gigabytes_nor_minutes(name: str, tmp_path: Path):
    content, statuses = BOMBS[name]
    path = tmp_path / "train_training.json"
    path.write_bytes(content)
    ran = sound(preprocess_apart(path, "--out", tmp_path / "out", "--workers", 1, seconds=30))
    assert ran.status in statuses, (ran.status, ran.err[-2000:])
    assert len(ran.err) < 20_000
    if ran.status == 3:
        ids = [clip["clip_id"] for clip in shards(tmp_path / "out").clips]
        assert ids[0] == "a"
        assert "b" not in ids or name == "deep nesting in a clip"
        assert ids[-1] == "c" or name in ("deep nesting", "many opening braces", "many quotes")
