"""Small clips for the tests of malformed files, and how a run on one or many of them is checked."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

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


def kept_well(out: Path, expected: list[dict], but: str = "") -> None:
    """Exactly these clips are on disk, in this order, with all labels right; clips named `but` may hold anything."""
    found = shards(out)
    if but:
        which = [i for i, clip in enumerate(found.clips) if clip["clip_id"][0] in set("abc") - {but}]
        expected = [expected[i] for i in which]
        clips = [found.clips[i] | {"clip": n} for n, i in enumerate(which)]
        found = Shards(clips, [found.frames[i] for i in which], found.parts)
    readings, refused, _ = read_files([expected])
    assert not refused
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


@dataclass
class Told:
    """What became of one file among many."""

    ids: list[str]  # of the clips on disk, in order
    speaking: list[int]  # their numbers of speaking frames
    lines: list[dict]  # of the quarantine
    size: int  # bytes of the file


def many(folder: Path, contents: dict[str, bytes], but: str = "") -> dict[str, Told]:
    """Preprocess many files in one run; per name what became of its clips, whose labels are all compared (`but` one's).

    The clips a, b, c of the n-th file become 'a n', 'b n', 'c n', so that none is a duplicate.
    """
    paths, known = {}, {}
    for number, (name, content) in enumerate(contents.items()):
        for one, clip in BY_NAME.items():
            content = content.replace(f'"id": "{one}"'.encode(), f'"id": "{one} {number}"'.encode())
            known[f"{one} {number}"] = clip | {"id": f"{one} {number}"}
        paths[name] = folder / f"train_{number}.json"
        paths[name].write_bytes(content)
    ran = sound(preprocess(*paths.values(), "--out", folder / "out", "--workers", 1))
    assert ran.status in (0, 3), ran.err
    rows = shards(folder / "out").clips
    found = [clip["clip_id"] for clip in rows]
    kept_well(folder / "out", [known.get(name) for name in found], but)
    refused = quarantine(folder / "out")
    return {
        name: Told(
            [one for one in found if one.split()[1] == str(number)],
            [clip["n_speaking"] for clip in rows if clip["clip_id"].split()[1] == str(number)],
            [line for line in refused if Path(line["file"]) == path],
            path.stat().st_size,
        )
        for number, (name, path) in enumerate(paths.items())
    }
