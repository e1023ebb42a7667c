"""Malformed clips, broken JSON and wrong usage: each costs itself, never a neighbour, never a traceback.

A case stands between good clips, whose labels are then compared with `reference.py`. A line of JSON Lines costs itself
alone; a syntax error inside an array ends the reading of that file there: what precedes it is kept, what follows is
one quarantine line.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fields import problems
from harness import Ran, Shards, differences, preprocess, quarantine, shards
from hostile import (
    FRAMES_MUTATIONS,
    MUTATIONS,
    NOT_A_CLIP,
    SESSION_MUTATIONS,
    TURN_MUTATIONS,
    egoproactive_clip,
    mutated,
)
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


def frames_clip(**more) -> dict:
    turns = [{"role": "frames", "start": 10, "end": 13}, {"role": "assistant", "content": "Attach it."}]
    return {"video_uid": "pro", "start_frame_idx": 10, "end_frame_idx": 20, "conversation": turns} | more


NO_ROLE = {"+": {"role": "robot"}}
A, B, C = (good(name) for name in "abc")
TA, TB, TC = (json.dumps(clip).encode() for clip in (A, B, C))


def array(*texts: bytes) -> bytes:
    return b"[" + b", ".join(texts) + b"]"


def swap(old: bytes, new: bytes, text: bytes = TB) -> bytes:
    assert old in text
    return text.replace(old, new, 1)


def with_field(value: bytes, name: bytes = b"quality") -> bytes:
    """Clip b with one more field, given as JSON text."""
    return TB[:-1] + b', "' + name + b'": ' + value + b"}"


def one_line(ran: Ran, *words: str) -> None:
    assert len(ran.lines) == 1, ran.err
    assert len(ran.err) < 2000, "a line, not a dump"
    assert all(word in ran.err for word in words), (words, ran.err)


def run(folder: Path, content: bytes, *options: object, name: str = "train_training.json") -> tuple[Ran, Path]:
    (folder / name).write_bytes(content)
    return preprocess(folder / name, "--out", folder / "out", *options), folder / "out"


def kept_well(found: Shards, expected: list[dict]) -> None:
    """Exactly these clips are on disk, in this order, with all labels right."""
    assert [clip["clip_id"] for clip in found.clips] == [clip["id"] for clip in expected]
    readings, refused, _ = read_files([expected])
    assert not refused
    assert not differences(found, readings, split="train", positive="span", seed=0, rate=None)


def many(folder: Path, contents: dict[str, bytes], but: str = "") -> dict[str, tuple[str, list[dict], int]]:
    """Preprocess many files in one run; per name (its clips on disk, as in "abc"; its quarantine lines; its size).

    The clips a, b, c of the n-th file become 'a n', 'b n', 'c n', so that none is a duplicate. All labels are compared,
    but for clips named `but`.
    """
    paths, known = {}, {}
    for number, (name, content) in enumerate(contents.items()):
        for one, clip in (("a", A), ("b", B), ("c", C)):
            content = content.replace(f'"id": "{one}"'.encode(), f'"id": "{one} {number}"'.encode())
            known[f"{one} {number}"] = clip | {"id": f"{one} {number}"}
        paths[name] = folder / f"train_{number}.json"
        paths[name].write_bytes(content)
    ran = preprocess(*paths.values(), "--out", folder / "out")
    assert ran.status in (0, 3), ran.err
    found, lines = shards(folder / "out"), quarantine(folder / "out")
    ids = [clip["clip_id"] for clip in found.clips]
    which = [i for i, name in enumerate(ids) if name[0] != but]
    renumbered = [found.clips[i] | {"clip": number} for number, i in enumerate(which)]
    kept_well(Shards(renumbered, [found.frames[i] for i in which]), [known[ids[i]] for i in which])
    return {
        name: (
            "".join(one[0] for one in ids if one.split()[1] == str(number)),
            [line for line in lines if Path(line["file"]) == path],
            path.stat().st_size,
        )
        for number, (name, path) in enumerate(paths.items())
    }


# ---- clips that are valid JSON but malformed ----------------------------------------------------------


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_malformed_clips_are_quarantined_and_their_neighbours_kept(layout: str, tmp_path: Path):
    session = egoproactive_clip(random.Random("session"), 1)
    tables = (B, MUTATIONS + TURN_MUTATIONS), (frames_clip(id="p"), FRAMES_MUTATIONS), (session, SESSION_MUTATIONS)
    bad = [mutated(clip, change) for clip, changes in tables for change in changes] + list(NOT_A_CLIP)
    clips = [A, *bad, C]
    content = "\n".join(map(json.dumps, clips)) if layout == "lines" else json.dumps(clips, indent=2)
    ran, out = run(tmp_path, content.encode())
    assert ran.status == 3, ran.err
    kept_well(shards(out), [A, C])
    told = quarantine(out)
    assert [line["clip"] for line in told] == list(range(1, len(bad) + 1))
    for line, clip in zip(told, bad, strict=True):
        wrong = problems(clip) or [(None, "end_frame_idx")]  # bounds 5..5, refused once the convention is known
        assert any(line["turn"] == turn and field in str(line["field"]) for turn, field in wrong), (line, wrong)


def test_on_error_fail_stops_with_one_line_and_leaves_the_old_output(tmp_path: Path):
    run(tmp_path, array(TA, TB))
    for bad, words in ((NO_ROLE, ("role", "turn 5")), ({"video_uid": "../up"}, ("video_uid",))):
        ran, out = run(tmp_path, json.dumps([A, mutated(B, bad), C]).encode(), "--on-error", "fail")
        assert ran.status == 1
        one_line(ran, "train_training.json", "clip 1", *words)
        kept_well(shards(out), [A, B])
    assert run(tmp_path, json.dumps([mutated(B, NO_ROLE)]).encode())[0].status == 1  # none is left
    kept_well(shards(out), [A, B])


BARE = {name: value for name, value in A.items() if name != "id"}
TALK = frames_clip(clip_idx=0)


@pytest.mark.parametrize(
    ("clips", "kept", "refused"),
    [
        ([A, good("a", end_frame_idx=25, video_uid="another"), C], 2, [1]),
        ([mutated(A, NO_ROLE) | {"id": "a"}, A, C], 2, [0]),  # a refused clip does not take an id
        ([BARE, BARE], 1, [1]),
        ([TALK | {"metadata": {"user_id": f"talk_{i}"}} for i in range(3)], 3, []),  # over one video: no duplicates
    ],
)
def test_the_first_of_two_clips_with_one_id_is_kept(clips: list, kept: int, refused: list[int], tmp_path: Path):
    ran, out = run(tmp_path, json.dumps(clips).encode())
    assert ran.status == (3 if refused else 0), ran.err
    assert [line["clip"] for line in quarantine(out)] == refused
    assert len({clip["clip_id"] for clip in shards(out).clips}) == kept


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


HARMLESS = {
    "NaN in a field that is not read": array(TA, with_field(b'{"x": [1, NaN, "]}"]}'), TC),
    "NaN in a JSONL field that is not read": b"\n".join([TA, with_field(b"NaN"), TC]),
    "NaN and 5000 digits in fields that are not read": array(TA, with_field(b"7" * 5000 + b', "x": NaN'), TC),
    "lone surrogate in a field that is not read": array(TA, with_field(b'"\\ud800"'), TC),
    "byte-order mark and NaN": b"\xef\xbb\xbf" + array(TA, with_field(b"NaN"), TC),
    "byte-order mark, lines, blank ones": b"\xef\xbb\xbf\n\n" + TA + b"\n\r\n" + TB + b"\n  \n" + TC + b"\n\n",
    "blanks around": b" \r\n\t" + array(TA, TB, TC) + b"\n\n  ",
    "line separators inside a text": array(TA, swap(b"Well done.", "x\u2028y\u2029z\x85".encode()), TC),
    "brackets inside a text": array(TA, swap(b"Well done.", rb"]}, {\" [ // /* NaN */", with_field(b"NaN")), TC),
    "a key twice": array(TA, with_field(b"2", b"fps"), TC),
    "frame as 15.0": array(TA, swap(b'"start_frame": 15', b'"start_frame": 15.0'), TC),
    "a time of 1e308": array(TA, swap(b'"time": 10.0', b'"time": 1e308'), TC),
    "escaped NUL in a text": array(TA, swap(b"Well done.", b"a\\u0000b"), TC),
    "huge turn range": array(TA, swap(b'"end_frame": 13', b'"end_frame": 2147483646'), TC),
}


@pytest.mark.filterwarnings("error")
def test_harmless_oddities_change_nothing(tmp_path: Path):
    for name, (ids, lines, _) in many(tmp_path, HARMLESS, but="b").items():
        assert (ids, lines) == ("abc", []), name


def test_numbers_at_their_limits(tmp_path: Path):
    last = 2**31 - 1
    turn = {"role": "assistant", "content": "x", "start_frame": last - 1, "end_frame": last}
    clip = good("end", start_frame_idx=last - 5, end_frame_idx=last, conversation=[turn])
    kept_well(shards(run(tmp_path, json.dumps([clip]).encode())[1]), [clip])
    window = good("w", conversation=[turn | {"start_frame": 12}])
    _, out = run(tmp_path, json.dumps([A, window]).encode(), "--frame-convention", "window")
    assert shards(out).clips[1]["n_speaking"] == 19  # to frame 30: the clip's end is inclusive, too
    fps = [good(f"f{i}", fps=fps) for i, fps in enumerate((5e-324, 1e-40, 1e39, 1.7e308))]
    assert run(tmp_path, json.dumps([A, *fps]).encode())[0].status in (0, 3)


# ---- broken JSON -------------------------------------------------------------------------------------

HUGE = b"9" * 5000
STEPPED_OVER = {  # quotes and brackets are right, so that an array's reading goes on behind the clip
    "invalid UTF-8 in a text": swap(b"Well done.", b"Well \xff\xfe done."),
    "half a UTF-8 character": swap(b"Well done.", b"Well \xe2\x82"),
    "invalid UTF-8 in an update": swap(b"S1->start", b"\xff->start"),
    "lone surrogate in video_uid": swap(b"video of b", b"\\udc00"),
    "5000 digits in fps": swap(b'"fps": 2', b'"fps": ' + HUGE),
    "5000 digits and NaN": swap(b'"end_frame": 13', b'"end_frame": ' + HUGE, with_field(b"NaN")),
    "1e400 in a time": swap(b'"time": 10.0', b'"time": 1e400'),
}
ENDS_AN_ARRAY = {
    "single quotes": TB.replace(b'"', b"'"),
    "python's None": swap(b'"fps": 2', b'"fps": None'),
    "missing comma": swap(b'"fps": 2,', b'"fps": 2'),
    "bad escape": swap(b"Well done.", b"Well\\x done."),
    "NUL between tokens": swap(b'"fps": 2', b'"fps":\0 2'),
    "no closing brace": TB[:-1],
    "cut in a turn": TB[: TB.index(b'"time"')],
    "an extra opening bracket": b"[" + TB,
    "a text without its end": swap(b'Well done."', b"Well done."),
}


@pytest.mark.parametrize("broken", [STEPPED_OVER, ENDS_AN_ARRAY], ids=["stepped over", "ends an array"])
def test_a_broken_line_costs_itself_alone(broken: dict[str, bytes], tmp_path: Path):
    for name, (ids, lines, _) in many(tmp_path, {k: b"\n".join([TA, v, TC]) for k, v in broken.items()}).items():
        assert (ids, [line["clip"] for line in lines]) == ("ac", [1]), name


def test_a_broken_clip_that_can_be_stepped_over_costs_itself_alone_in_an_array(tmp_path: Path):
    for name, (ids, lines, _) in many(tmp_path, {k: array(TA, v, TC) for k, v in STEPPED_OVER.items()}).items():
        assert (ids, [line["clip"] for line in lines]) == ("ac", [1]), name


def test_a_syntax_error_in_an_array_ends_the_reading_there(tmp_path: Path):
    for name, (ids, lines, size) in many(tmp_path, {k: array(TA, v, TC) for k, v in ENDS_AN_ARRAY.items()}).items():
        assert ids[:1] == "a", name
        assert len(ids) < 3, name
        assert lines[-1]["byte_end"] >= size - 1, name  # all that follows is told


AROUND = {  # name: (content, clips that are kept)
    "array without its end": (array(TA, TB)[:-1], "ab"),
    "array cut in a key": (b"[" + TA + b', {"vid', "a"),
    "indented array cut": (json.dumps([A, B, C], indent=1).encode()[:-60], "ab"),
    "trailing comma": (b"[" + TA + b", " + TB + b",]", "ab"),
    "no comma": (b"[" + TA + b" " + TB + b"]", "a"),
    "garbage after the array": (array(TA, TB) + b" xyz", "ab"),
    "garbage before the array": (b"xyz " + array(TA, TB), ""),
    "two arrays": (array(TA) + b"\n" + array(TB), "a"),
    "block comment between": (b"[" + TA + b", /* , [ */" + TB + b"]", "a"),
    "objects on one line": (TA + b" " + TB, "a"),
    "lines cut in UTF-8": (TA + b"\n" + TB + b'\n{"video_uid": "\xe2\x82', "ab"),
    "lines with a null": (TA + b"\nnull\n" + TB, "ab"),
    "a first line that begins like nothing": (b"},{" + TB.replace(b'"b"', b'"x"') + b"\n" + TA + b"\n" + TC, "ac"),
    "NaN between": (b"[" + TA + b", NaN, " + TB + b"]", "ab"),
}
RANGES = [{"role": "assistant", "content": "x", "start_frame": 0, "end_frame": 10**9}] * 1000
BOMBS = {
    "deep arrays": (array(TA, b"[" * 1_000_000, TC), "a"),
    "deep nesting in a content": (array(TA, swap(b'"Well done."', b"[" * 100_000 + b"]" * 100_000), TC), "a"),
    "a number of a million digits": (array(TA, swap(b'"end_frame": 13', b'"end_frame": ' + b"9" * 10**6), TC), "ac"),
    "many empty objects": (array(TA, *[b"{}"] * 2000, TC), "ac"),
    "many broken lines": (b"\n".join([TA, *[TB[:-1]] * 500, TC]), "ac"),
    "many ranges of 10^9": (json.dumps([A, good("b", end_frame_idx=1_000_010, conversation=RANGES)]).encode(), "ab"),
}


@pytest.mark.parametrize("cases", [AROUND, BOMBS], ids=["damage", "bombs"])
def test_damage_and_json_bombs_cost_no_clip_that_precedes_them(cases: dict, tmp_path: Path):
    contents = {"whole": array(TA, TB, TC)} | {name: content for name, (content, _) in cases.items()}
    results = many(tmp_path, contents, but="b" if cases is BOMBS else "")
    assert results.pop("whole")[:2] == ("abc", [])
    for name, (ids, lines, _) in results.items():
        assert ids == cases[name][1], name
        assert lines or "ranges" in name, name


NOTHING = {
    "empty": b"",
    "byte-order mark alone": b"\xef\xbb\xbf",
    "empty array": b"[]",
    "null": b"null",
    "array of an empty object": b"[{}]",
    "array in an array": b"[" + array(TA, TB) + b"]",
    "object of clips": b'{"clips": ' + array(TA, TB) + b"}",
    "deep arrays": b"[" * 100_000,
    "UTF-16 with mark": array(TA, TB).decode().encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00" + random.Random(1).randbytes(500),
    "noise": random.Random(3).randbytes(5000),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
}


def test_a_file_without_a_clip_is_one_line_alone_and_named_beside_good_ones(tmp_path: Path):
    for name, content in NOTHING.items():
        ran, out = run(tmp_path, content)
        assert ran.status == 1, (name, ran.err)
        one_line(ran, "train_training.json")
        assert not out.exists(), name
    results = many(tmp_path, {"good": array(TA, TB), **NOTHING})
    assert results.pop("good")[:2] == ("ab", [])
    for name, (ids, lines, _) in results.items():
        assert (ids, bool(lines)) == ("", name != "empty array"), name


@pytest.mark.parametrize("layout", ["array", "lines"])
def test_an_array_that_msgspec_refuses_is_read_to_its_broken_end(layout: str, tmp_path: Path):
    """Characters of 1 to 4 bytes, walked by the standard library because of one NaN."""
    rng, texts, whole = random.Random(layout), [], []
    for i in range(60):
        clip = good(f"c{i}", inferred_knowledge="é部✓😀x" * rng.randint(0, 900))
        texts.append(json.dumps(clip, ensure_ascii=False).encode())
        if (i == 7 and layout == "lines") or i == 59:
            texts[-1] = texts[-1][: -rng.choice((1, 2, 9, 40, 300))]
        else:
            whole.append(clip)
    texts[0] = texts[0][:-1] + b', "q": NaN}'
    ran, out = run(tmp_path, b"[" + b",\n".join(texts) + b"]" if layout == "array" else b"\n".join(texts))
    assert ran.status == 3, ran.err
    kept_well(shards(out), whole)
    assert [line["clip"] for line in quarantine(out)] == ([59] if layout == "array" else [7, 59])


# ---- the command itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *("--neg-rate 1.5", "--neg-rate nan", "--neg-rate half", "--neg-rate train=0.5,val", "--neg-rate =0.5"),
        *("--neg-rate dev=0.5", "--positive middle", "--frame-convention naive", "--on-error ignore", "--bounds x"),
        *("--pad-s -1", "--pad-s inf", "--fps 0", "--workers -1", "--split ../up", "--split=", "--recording-regex ("),
        *("--seed many", "--nonsense"),
    ],
)
def test_bad_usage_is_status_two(options: str, tmp_path: Path):
    ran, out = run(tmp_path, array(TA, TB), *options.split())
    assert ran.status == 2, (ran.status, ran.err, ran.out)
    assert ran.lines
    assert not (out / "manifest.json").exists()


def test_markup_and_control_characters_in_the_input_are_harmless(tmp_path: Path):
    odd = good("[/red]", dataset="[/x]", video_uid="[bold]\x1b[31m\n")
    bad = good("x", conversation=[{"role": "[/x]\nassistant\x1b[31m", "content": ""}])
    ran, out = run(tmp_path, json.dumps([A, odd, bad]).encode())
    kept_well(shards(out), [A, odd])
    failed, _ = run(tmp_path, json.dumps([A, bad]).encode(), "--on-error", "fail")
    assert (ran.status, failed.status) == (3, 1)
    one_line(failed, "turn 0", "role")
    assert "\x1b" not in ran.out + ran.err + failed.err
