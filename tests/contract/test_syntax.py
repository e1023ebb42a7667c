"""Files that are no JSON, wholly or in one place: what can be read is read and labelled right, the rest is told.

A line of JSON Lines costs itself alone. A syntax error inside an array ends the reading of that file there: what
precedes it is kept, what follows is one quarantine line up to the file's end.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from harness import preprocess, preprocess_apart, quarantine, shards
from samples import (
    TA,
    TB,
    TC,
    A,
    B,
    C,
    Told,
    array,
    good,
    indented,
    kept_well,
    many,
    one_line,
    run,
    sound,
    swap,
    with_field,
)

from pipeline.readers import index

# ---- one broken clip between two good ones -----------------------------------------------------------

HUGE = b"9" * 5000
SYNTAX = {  # name: the middle clip's text
    "single quotes": TB.replace(b'"', b"'"),
    "python's None": swap(b'"fps": 2', b'"fps": None'),
    "undefined": swap(b'"fps": 2', b'"fps": undefined'),
    "unquoted key": swap(b'"fps"', b"fps"),
    "missing colon": swap(b'"fps": 2', b'"fps" 2'),
    "missing value": swap(b'"fps": 2', b'"fps": '),
    "missing comma": swap(b'"fps": 2,', b'"fps": 2'),
    "trailing comma in the object": TB[:-1] + b",}",
    "trailing comma in the conversation": TB[:-2] + b",]}",
    "leading zero": swap(b'"fps": 2', b'"fps": 02'),
    "plus sign": swap(b'"fps": 2', b'"fps": +2'),
    "hexadecimal": swap(b'"fps": 2', b'"fps": 0x2'),
    "bare point": swap(b'"time": 10.0', b'"time": 10.'),
    "bad escape": swap(b"Well done.", b"Well\\x done."),
    "half an escape": swap(b"Well done.", b"Well\\u12 done."),
    "raw line break in a text": swap(b"Well done.", b"Well\ndone."),
    "raw tab in a text": swap(b"Well done.", b"Well\tdone."),
    "raw NUL in a text": swap(b"Well done.", b"Well\0done."),
    "NUL between tokens": swap(b'"fps": 2', b'"fps":\0 2'),
    "line comment inside": swap(b'"fps": 2,', b'"fps": 2, // two\n'),
    "block comment inside": swap(b'"fps": 2,', b'"fps": 2, /* two */'),
    "invalid UTF-8 in a text that is read": swap(b"Well done.", b"Well \xff\xfe done."),
    "overlong UTF-8 in a text that is read": swap(b"Well done.", b"Well \xc0\x80 done."),
    "half a UTF-8 character": swap(b"Well done.", b"Well \xe2\x82"),
    "UTF-8 surrogate": swap(b"Well done.", b"Well \xed\xa0\x80"),
    "invalid UTF-8 in video_uid": swap(b"video of b", b"video \xff"),
    "invalid UTF-8 in id": swap(b'"id": "b"', b'"id": "\xff"'),
    "invalid UTF-8 in a step's name": swap(b'"name": "one"', b'"name": "\xff"'),
    "invalid UTF-8 in an update": swap(b"S1->start", b"\xff->start"),
    "invalid UTF-8 in a field that is not read": with_field(b'"\xff"'),
    "invalid UTF-8 in a key that is not read": with_field(b"1", b"\xff"),
    "lone surrogate in a text": swap(b"Well done.", b"\\ud800"),
    "lone surrogate in video_uid": swap(b"video of b", b"\\udc00"),
    "lone surrogate in id": swap(b'"id": "b"', b'"id": "\\ud800"'),
    "5000 digits in a frame": swap(b'"end_frame": 13', b'"end_frame": ' + HUGE),
    "5000 digits in a time": swap(b'"time": 10.0', b'"time": ' + HUGE),
    "5000 digits in fps": swap(b'"fps": 2', b'"fps": ' + HUGE),
    "5000 digits in the bounds": swap(b'"end_frame_idx": 30', b'"end_frame_idx": ' + HUGE),
    "5000 digits in clip_idx": with_field(HUGE, b"clip_idx"),
    "5000 digits and NaN": swap(b'"end_frame": 13', b'"end_frame": ' + HUGE, with_field(b"NaN")),
    "5000 decimals in a frame": swap(b'"end_frame": 13', b'"end_frame": 13.' + b"0" * 5000),
    "1e400 in a frame": swap(b'"end_frame": 13', b'"end_frame": 1e400'),
    "1e400 in a time": swap(b'"time": 10.0', b'"time": 1e400'),
    "1e400 in fps": swap(b'"fps": 2', b'"fps": 1e400'),
    "1e999999999 in a time": swap(b'"time": 10.0', b'"time": 1e999999999'),
    "deep nesting in a field that is not read": with_field(b"[" * 100_000 + b"]" * 100_000),
    "deep objects in a field that is not read": with_field(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "deep nesting in a content": swap(b'"Well done."', b"[" * 100_000 + b"]" * 100_000),
    "deep nesting for a conversation": b'{"id": "b", "video_uid": "x", "conversation": '
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}",
}

MAY_STAY = {  # whether these are JSON, readers differ: the clip may be on disk
    "trailing comma in the object",
    "trailing comma in the conversation",
    "raw line break in a text",
    "raw tab in a text",
    "raw NUL in a text",
    "line comment inside",
    "block comment inside",
    "invalid UTF-8 in a field that is not read",
    "invalid UTF-8 in a key that is not read",
    "lone surrogate in a text",
    "5000 decimals in a frame",
    "deep nesting in a field that is not read",
    "deep objects in a field that is not read",
}
# an array can be walked past these, as its quotes and brackets are right
ALONE = ("invalid UTF-8", "overlong UTF-8", "half a UTF-8", "UTF-8 surrogate", "lone surrogate", "5000", "1e")


def test_broken_line_costs_itself_alone(tmp_path: Path):
    """All of them as lines of one file, with good ones between."""
    texts, kept, refused = [TA], [], []
    for name, text in SYNTAX.items():
        if b"\n" in text:
            continue
        texts.append(text.replace(b'"id": "b"', f'"id": "b {name}"'.encode()))
        (kept if name in MAY_STAY else refused).append(len(texts) - 1)
    ran, out = run(tmp_path, b"\n".join([*texts, TC]) + b"\n", name="train_lines.jsonl")
    assert ran.status == 3, ran.err
    told = [line["clip"] for line in quarantine(out)]
    assert set(refused) <= set(told) <= set(refused + kept)
    found = [clip["clip_id"] for clip in shards(out).clips]
    assert len(found) == len(texts) + 1 - len(told)
    assert (found[0], found[-1]) == ("a", "c")


def test_clip_that_can_be_stepped_over_costs_itself_alone_in_an_array(tmp_path: Path):
    alone = {name: array(TA, text, TC) for name, text in SYNTAX.items() if name.startswith(ALONE)}
    for name, told in many(tmp_path, alone).items():
        if name in MAY_STAY and len(told.ids) == 3:
            continue
        assert [one[0] for one in told.ids] == ["a", "c"], name
        assert [line["clip"] for line in told.lines] == [1], name
        assert {"turn", "field"} <= set(told.lines[0])


def test_syntax_error_in_an_array_ends_the_reading_there(tmp_path: Path):
    errors = {name: array(TA, text, TC) for name, text in SYNTAX.items() if not name.startswith(ALONE)}
    for name, told in many(tmp_path, errors).items():
        ended_well(name, told, errors[name])


def ended_well(name: str, told: Told, content: bytes) -> None:
    """Clips are kept up to the error; one line tells of all that follows, to the file's end."""
    ids = [one[0] for one in told.ids]
    assert ids == ["a", "b", "c"][: len(ids)], (name, ids)
    assert ids, name
    if len(ids) == 3:
        assert name in MAY_STAY, name
        return
    *_, last = told.lines
    assert last["clip"] >= len(ids), name
    assert len(content) - len(b"]") <= last["byte_end"] <= told.size, (name, last)
    assert last["byte_start"] >= 1, name


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


@pytest.mark.parametrize("name", sorted(UNBALANCED))
def test_unbalanced_clip_in_lines_costs_itself_alone(name: str, tmp_path: Path):
    ran, out = run(tmp_path, b"\n".join([TA, UNBALANCED[name](TB), TC, b'{"video_uid": 5}']))
    assert ran.status == 3, ran.err
    kept_well(out, [A, C])
    assert [line["clip"] for line in quarantine(out)] == [1, 3]


def test_unbalanced_clip_in_an_array_ends_the_reading(tmp_path: Path):
    """At the error, or where the array seems to end: what is on disk is right, what is not is told."""
    layouts = {"one line": b", ", "a clip a line": b",\n"}
    contents = {
        f"{name}, {layout}": b"[" + joint.join([TA, broken(TB), TC]) + b"]"
        for name, broken in UNBALANCED.items()
        for layout, joint in layouts.items()
    }
    contents |= {f"{name}, indented": indented(A, B, C).replace(b'"b"', b'"b', 1) for name in ("a quote missing",)}
    for name, told in many(tmp_path, contents).items():
        assert told.ids[:1] == [told.ids[0]], name
        assert told.ids[0].startswith("a"), name
        assert len(told.ids) < 3, name
        assert told.lines, name
        assert told.lines[-1]["byte_end"] >= told.size - 1, name


def test_random_damage_to_a_clips_bytes_costs_no_earlier_clip_nor_another_line(tmp_path: Path):
    """A few bytes of the middle clip replaced, cut, inserted or repeated; `many` compares the labels."""
    rng, contents = random.Random("damage"), {}
    for case in range(40):
        text = damaged(rng, json.dumps(B, indent=rng.choice((None, 1))).encode())
        joints = (b"[" + TA + b",\n" + text + b",\n" + TC + b"]", b"\n".join([TA, text.replace(b"\n", b" "), TC]))
        contents[f"{case} {text!r}"] = joints[case % 2]
    for number, (name, told) in enumerate(many(tmp_path, contents, but="b").items()):
        ids = [one[0] for one in told.ids]
        assert ids[0] == "a", name
        assert number % 2 == 0 or ids[-1] == "c", name
        assert told.lines or len(ids) == 3, name


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
def test_slow_reading_loses_nothing_at_its_seams(layout: str, start: bytes, tmp_path: Path, monkeypatch):
    """0.8 MB of characters of 1 to 4 bytes, in windows of 64 kB, read the slow way because of one NaN."""
    monkeypatch.setattr(index, "WINDOW", 1 << 16)
    rng, texts, whole = random.Random(layout), [], []
    for i in range(100):
        clip = good(f"c{i}", inferred_knowledge="é部✓😀x" * rng.randint(0, 900))
        texts.append(json.dumps(clip, ensure_ascii=False).encode())
        if (i % 50 == 7 and layout == "lines") or i == 99:
            texts[-1] = texts[-1][: -rng.choice((1, 2, 9, 40, 300))]
        else:
            whole.append(clip)
    texts[0] = texts[0][:-1] + b', "q": NaN}'
    content = b"[" + b",\n".join(texts) + b"]" if layout == "array" else b"\n".join(texts)
    ran, out = run(tmp_path, start + content)
    assert ran.status == 3, ran.err
    kept_well(out, whole)
    assert [line["clip"] for line in quarantine(out)] == ([99] if layout == "array" else [7, 57, 99])


# ---- syntax: the file around the clips ---------------------------------------------------------------

AROUND = {
    # name: (content, clips that are kept)
    "array without its end": (array(TA, TB)[:-1], "ab"),
    "array cut after a comma": (b"[" + TA + b", " + TB + b",", "ab"),
    "array cut in a clip": (array(TA, TB, TC)[:-60], "ab"),
    "array cut in a text": (array(TA, TB, TC[: TC.index(b"Attach") + 3]), "ab"),
    "array cut in a key": (b"[" + TA + b', {"vid', "a"),
    "array cut in a number": (b"[" + TA + b', {"fps": 1', "a"),
    "indented array cut": (indented(A, B, C)[:-60], "ab"),
    "lines cut": (TA + b"\n" + TB + b"\n" + TC[:-60], "ab"),
    "lines cut in UTF-8": (TA + b"\n" + TB + b'\n{"video_uid": "\xe2\x82', "ab"),
    "trailing comma": (b"[" + TA + b", " + TB + b",]", "ab"),
    "leading comma": (b"[," + TA + b", " + TB + b"]", ""),
    "two commas": (b"[" + TA + b",, " + TB + b"]", "a"),
    "no comma": (b"[" + TA + b" " + TB + b"]", "a"),
    "semicolon": (b"[" + TA + b"; " + TB + b"]", "a"),
    "garbage after the array": (array(TA, TB) + b" xyz", "ab"),
    "object after the array": (array(TA, TB) + b"\n" + TC, "ab"),
    "bracket after the array": (array(TA, TB) + b"]", "ab"),
    "NUL after the array": (array(TA, TB) + b"\0\0\0", "ab"),
    "control-Z after the array": (array(TA, TB) + b"\x1a", "ab"),
    "garbage before the array": (b"xyz " + array(TA, TB), ""),
    "two arrays": (array(TA) + b"\n" + array(TB), "a"),
    "two arrays without a blank": (array(TA, TB) + array(TC), "ab"),
    "an array a line": (array(TA) + b"\n" + array(TB, TC) + b"\n", "a"),
    "line comment between": (b"[" + TA + b", // next\n" + TB + b"]", "a"),
    "block comment between": (b"[" + TA + b", /* , [ */" + TB + b"]", "a"),
    "line comment first": (b"// clips\n" + array(TA, TB), ""),
    "objects over several lines": (json.dumps(A, indent=2).encode() + b"\n" + TB, "a"),
    "objects on one line": (TA + b" " + TB, "a"),
    "objects without a blank": (TA + TB, "a"),
    "lines with commas": (TA + b",\n" + TB + b",\n", "a"),
    "lines with a null": (TA + b"\nnull\n" + TB, "ab"),
    "lines with a number": (TA + b"\n5\n" + TB, "ab"),
    "lines with a word": (TA + b"\nhello world\n" + TB, "ab"),
    "lines with half a line": (TA + b'\n{"video_uid": "x", "conv\n' + TB, "ab"),
    "lines with a NaN time": (TA + b"\n" + swap(b"10.0", b"NaN") + b"\n" + TC, "ac"),
    "word between": (b"[" + TA + b", hello, " + TB + b"]", "a"),
    "NaN between": (b"[" + TA + b", NaN, " + TB + b"]", "ab"),
    "byte-order mark and a bad clip": (b"\xef\xbb\xbf" + array(TA, swap(b"10.0", b"Infinity"), TC), "ac"),
    "invalid UTF-8 between": (b"[" + TA + b", \xff\xfe, " + TB + b"]", "a"),
    "a form feed for a blank": (b"[" + TA + b",\f" + TB + b"]", "a"),
}


def test_damage_around_clips_keeps_what_precedes_it(tmp_path: Path):
    contents = {"whole": array(TA, TB, TC)} | {name: content for name, (content, _) in AROUND.items()}
    for name, told in many(tmp_path, contents).items():
        if name != "whole":
            assert "".join(one[0] for one in told.ids) == AROUND[name][1], name
            assert told.lines, name


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


# ---- bombs, in a process of their own under limits ---------------------------------------------------

RANGES = [A["conversation"][2] | {"end_frame": 2**31 - 2}] * 300
BOMBS = {  # name: (content, clips that are kept)
    "deep nesting": (array(TA, b"[" * 1_000_000, TC), "a"),
    "deep nesting in a clip": (array(TA, with_field(b"[" * 1_000_000 + b"]" * 1_000_000), TC), "a"),
    "a number of a million digits": (array(TA, swap(b'"end_frame": 13', b'"end_frame": ' + b"9" * 10**6), TC), "ac"),
    "many empty objects": (array(TA, *[b"{}"] * 20_000, TC), "ac"),
    "many opening braces": (array(TA, b"{" * 200_000, TC), "a"),
    "many quotes": (array(TA, b'"' * 200_001, TC), "a"),
    "many broken clips": (array(TA, *[TB[:-1]] * 2_000, TC), "a"),
    "many broken lines": (b"\n".join([TA, *[TB[:-1]] * 2_000, TC]), "ac"),
    "many ranges of 10^9": (json.dumps([A, good("b", end_frame_idx=1_000_010, conversation=RANGES)]).encode(), "ab"),
}


def test_bombs_take_neither_gigabytes_nor_minutes(tmp_path: Path):
    paths = []
    for number, (content, _) in enumerate(BOMBS.values()):
        paths.append(tmp_path / f"train_{number}.json")
        for one in (b"a", b"b", b"c"):
            content = content.replace(b'"id": "%s"' % one, b'"id": "%s %d"' % (one, number))
        paths[-1].write_bytes(content)
    ran = sound(preprocess_apart(*paths, "--out", tmp_path / "out", "--workers", 1, seconds=60))
    assert ran.status == 3, ran.err[-2000:]
    assert len(ran.err) < 20_000
    found = [clip["clip_id"] for clip in shards(tmp_path / "out").clips]
    assert found == [f"{one} {number}" for number, (_, kept) in enumerate(BOMBS.values()) for one in kept]
