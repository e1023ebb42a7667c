"""The attacks on files, processes and disks. Each is a function (arena, rng) -> Verdict that acts once.

Lost is whatever is worse than an error that names the file:
    1. an old output that is neither complete nor replaced by the complete new one;
    2. a result that differs from the undisturbed run's by a byte, without an error that names the file;
    3. a traceback, a signal that nobody sent, a process that hangs or outlives its command, memory beyond a bound;
    4. a good clip, or video, that a bad neighbour cost;
    5. an error of more than one line, or one that names no file of those touched.
Logs that no command reads (metrics.jsonl beyond its shape, curves.svg, TensorBoard, model cards) are not attacked:
nothing vouches for them, and nothing follows from them.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .arena import JOBS, TINY, Arena, Bytes, Ran, digest, fault, files, of_run, of_scores

REFUSED, RECOVERED, SAME, OTHER, LOST = OUTCOMES = ("refused", "recovered", "unchanged", "other input", "LOST")


@dataclass(frozen=True)
class Verdict:
    """What one attempt came to. refused: by one line that names the file; recovered: the next run did the work;
    unchanged: the result was the same at once; other input: what was damaged is the user's own and reads as another."""

    outcome: str
    what: str  # was tried
    why: str = ""


Attack = Callable[[Arena, random.Random], Verdict]


def _differing(found: Bytes, expected: Bytes) -> str:
    names = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    return ", ".join(names[:4])


# ---- stopped at a random moment ----------------------------------------------------------------------


def kill(arena: Arena, rng: random.Random) -> Verdict:
    """SIGKILL (also SIGTERM, SIGINT) at random moments of a job, up to three times; then once more, to the end."""
    name = _a_job(arena, rng, (6, 6, 3, 3, 1))
    old = _prepare(arena, name, rng)
    hits, told = 0, []
    for _ in range(rng.randint(1, 3)):
        sent = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        after = rng.uniform(0, 1.1 * arena.seconds[name])
        ran = arena.job(name, stop=(after, sent))
        told.append(f"{sent.name} after {after:.2f} s")
        what = f"{name}: {', '.join(told)}"
        if why := fault(ran) or _torn(arena, name, old):
            return Verdict(LOST, what, why)
        if ran.stopped and ran.status not in (-sent, 130, *((0, 3))):
            return Verdict(LOST, what, f"status {ran.status}: {ran.words}")
        hits += ran.stopped and not ran.done
        if ran.done:
            break
    return _finish(arena, name, what, RECOVERED if hits else SAME)


def _a_job(arena: Arena, rng: random.Random, weights: Sequence[float]) -> str:
    """One of JOBS that the world has, by weight."""
    return rng.choices(list(JOBS), [w * (name in arena.result) for name, w in zip(JOBS, weights, strict=True)])[0]


def _prepare(arena: Arena, name: str, rng: random.Random) -> Bytes | None:
    """The world without the job's output, or with one of other options; that one's digest."""
    arena.fresh("raw", "data", *(["run"] if name in ("encode", "evaluate") else []))
    out = arena.here / JOBS[name].out
    if name == "preprocess" and rng.random() < 0.6:
        must(arena.run(*JOBS[name].argv, "--seed", "7"))
    elif name == "evaluate" and rng.random() < 0.5:
        must(arena.run(*JOBS[name].argv, "--late-s", "1"))
    elif JOBS[name].out not in ("run",):
        shutil.rmtree(out, ignore_errors=True)
    return JOBS[name].result(out) if out.is_dir() else None


def must(ran: Ran) -> Ran:
    assert ran.done, f"{ran.argv}: {ran.err}"
    return ran


def _torn(arena: Arena, name: str, old: Bytes | None) -> str | None:
    """Why what lies there now passes as whole and is not, or is gone where it must not be."""
    out = arena.here / JOBS[name].out
    if name in ("preprocess", "evaluate"):
        vouches = out / ("manifest.json" if name == "preprocess" else "metrics.json")
        if not vouches.is_file():
            gone = JOBS[name].keeps_old and old and not list(out.glob(".staging-*/old/*"))
            return f"{vouches.name} is gone, and nothing in its place" if gone else None
        found = JOBS[name].result(out)
        if found not in (old, arena.result[name]):
            return f"neither the old output nor the new: {_differing(found, arena.result[name])}"
    if name == "encode":
        wrong = [n for n, sha in digest(out).items() if arena.result[name].get(n) != sha] if out.is_dir() else []
        return f"half a file: {wrong[0]}" if wrong else None
    return None


def _finish(arena: Arena, name: str, what: str, outcome: str) -> Verdict:
    """Run the job to its end, undisturbed, and compare."""
    ran = arena.job(name)
    if why := fault(ran):
        return Verdict(LOST, what, why)
    if ran.status != JOBS[name].status:
        return Verdict(LOST, what, f"the next run: status {ran.status}: {ran.words}")
    if (found := arena.outcome(name)) != arena.result[name]:
        return Verdict(LOST, what, f"{name}'s result differs in {_differing(found, arena.result[name])}")
    return Verdict(outcome, what)


# ---- damaged files -----------------------------------------------------------------------------------


def _flip(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def _digit(rng: random.Random, data: bytearray) -> bytes:
    """Another digit for one: what reads as well as before."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57] or [rng.randrange(len(data))]
    at = rng.choice(places)
    data[at] = rng.choice([b for b in range(48, 58) if b != data[at]])
    return bytes(data)


def _truncate(rng: random.Random, data: bytearray) -> bytes:
    end = len(bytes(data).rstrip())  # a line's end that is missing says nothing
    return bytes(data[: rng.choice((rng.randrange(len(data)), end - 1))])


def _zero(rng: random.Random, data: bytearray) -> bytes:
    at = rng.randrange(len(data))
    size = min(rng.choice((16, 512, 4096)), len(data) - at)
    data[at : at + size] = bytes(size)
    return bytes(data)


def _splice(rng: random.Random, data: bytearray) -> bytes:
    a, b, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.randint(1, 600)
    data[a : a + size] = data[b : b + size]
    return bytes(data)


MUTATIONS: Final = {
    "flip": _flip,
    "digit": _digit,
    "truncate": _truncate,
    "zero": _zero,
    "splice": _splice,
    "extend": lambda rng, data: bytes(data) + rng.randbytes(rng.randint(1, 5000)),
    "garbage": lambda rng, data: rng.randbytes(rng.randint(1, len(data) + 1)),
    "empty": lambda rng, data: b"",
}


def damage(rng: random.Random, path: Path, others: Sequence[Path]) -> str:
    """Do something to a file; what."""
    how = rng.choices([*MUTATIONS, "delete", "swap", "folder"], [4, 3, 3, 2, 2, 2, 1, 1, 2, 3, 1])[0]
    if how == "delete":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "swap":
        rivals = [p for p in others if p != path and p.suffix == path.suffix] or [path]
        other = rng.choice(rivals)
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
        return f"swap with {other.name} of {other.parent.name}"
    else:
        data = bytearray(path.read_bytes())
        path.write_bytes(MUTATIONS[how](rng, data) if data else b"\0")
    return how


@dataclass(frozen=True)
class Reader:
    """A command that reads some files of the world, and what comes out of it when they are right."""

    argv: tuple[str, ...]
    parts: tuple[str, ...]  # of the world that it needs
    targets: tuple[str, ...]  # patterns below `here`
    result: Callable[[Arena, Ran], object]
    mends: bool = False  # it makes them anew


def _new(function: Callable[[Path], Bytes], name: str) -> Callable[[Arena, Ran], object]:
    return lambda arena, ran: function(arena.here / name)


_SHARDS = ("data/manifest.json", "data/quarantine.jsonl", "data/*/*/*.parquet")
_CHECKPOINT = ("last/*.json", "last/*.safetensors")
_FIT = ("train", "data", "--run", "new", *TINY)
_LOOK = ("--split", "test", "--no-self-fed", "--out", "new")
_UNHASHED: Final = {"manifest.json", "options.json", "run.json", "metrics.json", "benchmark.json"}  # no own SHA-256
READERS: Final = {
    "inspect": Reader(("inspect", "data"), ("raw", "data"), _SHARDS, lambda arena, ran: ran.out),
    "train": Reader(_FIT, ("raw", "data"), _SHARDS[::2], _new(of_run, "new")),
    "evaluate the shards": Reader(
        ("evaluate", "run", "data", *_LOOK), ("raw", "data", "run"), _SHARDS[::2], _new(of_scores, "new")
    ),
    "preprocess again": Reader(
        JOBS["preprocess"].argv, ("raw", "data"), _SHARDS, _new(digest, "data"), mends=True
    ),
    "resume": Reader(
        (*JOBS["train"].argv[:3], "half", *JOBS["train"].argv[4:]),
        ("raw", "data", "half"),
        ("half/options.json", "half/metrics.jsonl", *(f"half/{path}" for path in _CHECKPOINT)),
        _new(lambda run: {k: v for k, v in of_run(run).items() if k != "curve"}, "half"),
    ),
    "resume as it was": Reader(
        ("train", "data", "--run", "half", "--resume"),
        ("raw", "data", "half"),
        ("half/options.json", *(f"half/{path}" for path in _CHECKPOINT)),
        _new(of_run, "half"),
    ),
    "evaluate the run": Reader(
        ("evaluate", "run", "data", *_LOOK),
        ("raw", "data", "run"),
        tuple(f"run/{path}" for path in _CHECKPOINT),
        _new(of_scores, "new"),
    ),
    "encode with the run": Reader(
        ("encode", "data", "--model", "run/last", "--out", "new"),
        ("raw", "data", "run"),
        tuple(f"run/{path}" for path in _CHECKPOINT),
        _new(digest, "new"),
    ),
    "train on features": Reader(
        (*_FIT, "--model", "run/last", "--features", "features", "--freeze", "vision"),
        ("data", "run", "features"),
        ("features/*.safetensors",),
        _new(of_run, "new"),
    ),
    "encode again": Reader(
        JOBS["encode"].argv, ("raw", "data", "run", "features"), ("features/*.safetensors",),
        _new(digest, "features"), mends=True,
    ),
    "scores again": Reader(
        ("evaluate", "data", "--scores", "scores/self-fed.parquet", "--out", "new"),
        ("data", "scores"),
        ("scores/self-fed.parquet",),
        _new(of_scores, "new"),
    ),
    "scores with thresholds": Reader(
        ("evaluate", "data", "--scores", "scores/teacher-forced.parquet", "--out", "new"),
        ("data", "scores"),
        ("scores/teacher-forced.parquet",),
        _new(of_scores, "new"),
    ),
    "benchmark again": Reader(
        JOBS["benchmark"].argv,
        ("raw", "data", "bench"),
        ("bench/*.parquet", "bench/*.json", "bench/runs/*/*/scores/*", "bench/runs/*/*/options.json",
         "bench/runs/*/*/last/run.json"),
        lambda arena, ran: JOBS["benchmark"].result(arena.here / "bench"),
        mends=True,
    ),
}  # fmt: skip
READER_WEIGHTS: Final = {"benchmark again": 0.15}


def corrupt(arena: Arena, rng: random.Random) -> Verdict:
    """One file that a command reads is damaged: it says which, or its result is the same."""
    there = [name for name in READERS if name != "benchmark again" or "benchmark" in arena.result]
    name = rng.choices(there, [READER_WEIGHTS.get(name, 1) for name in there])[0]
    reader = READERS[name]
    expected = _expected(arena, name)
    arena.fresh(*reader.parts)
    targets = [path for pattern in reader.targets for path in files(arena.here, pattern) if path.name not in _UNHASHED]
    path = rng.choice(targets)
    how = damage(rng, path, targets)
    return _read_on(arena, reader, expected, f"{path.relative_to(arena.here)}: {how}; {name}", _names(path, how))


def _names(path: Path, how: str = "") -> list[str]:
    """Any of what an error may call the file: itself, or a folder that holds little else."""
    return [path.name, str(path.parent), *([how.split()[2]] if how.startswith("swap") else [])]


def _expected(arena: Arena, name: str) -> object:
    """What the reader gives undisturbed: worked out once."""
    key = f"reader {name}"
    if key not in arena.result:
        reader = READERS[name]
        arena.fresh(*reader.parts)
        with arena.undisturbed():
            arena.result[key] = reader.result(arena, must(arena.run(*reader.argv)))  # type: ignore[assignment]
    return arena.result[key]


def _read_on(arena: Arena, reader: Reader, expected: object, what: str, names: list[str]) -> Verdict:
    """Run the command over what was damaged; one that makes anew may need to be told to, by an error."""
    ran = arena.run(*reader.argv)
    if why := fault(ran, names):
        return Verdict(LOST, what, why)
    if not ran.done:
        return Verdict(REFUSED, what, ran.words)
    if reader.result(arena, ran) != expected:
        found = reader.result(arena, ran)
        differs = _differing(found, expected) if isinstance(found, dict) and isinstance(expected, dict) else "output"
        return Verdict(LOST, what, f"{ran.argv[0]}: no error, and another result: {differs}")
    return Verdict(RECOVERED if reader.mends else SAME, what)


# ---- shards in another order -------------------------------------------------------------------------


def reorder(arena: Arena, rng: random.Random) -> Verdict:
    """Shards renamed, swapped, rewritten with other row groups, added, touched; the manifest's list shuffled."""
    name = rng.choice(("inspect", "train", "evaluate the shards", "preprocess again"))
    reader = READERS[name]
    expected = _expected(arena, name)
    arena.fresh(*reader.parts)
    how = rng.choice(list(REORDERINGS))
    names = REORDERINGS[how](arena, rng)
    return _read_on(arena, reader, expected, f"{how}; {name}", names)


def _parts(arena: Arena) -> list[Path]:
    return list(files(arena.here, "data/*/*/*.parquet"))


def _rename(arena: Arena, rng: random.Random) -> list[str]:
    path = rng.choice(_parts(arena))
    path.rename(path.with_name("part-00009.parquet"))
    return [path.name, "part-00009.parquet"]


def _rotate(arena: Arena, rng: random.Random) -> list[str]:
    table = rng.choice(("frames", "clips"))
    paths = list(files(arena.here, f"data/{table}/split=train/*.parquet"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(content)
    return [path.name for path in paths]


def _regroup(arena: Arena, rng: random.Random) -> list[str]:
    """The same rows in two row groups, the second first."""
    path = rng.choice(_parts(arena))

    def rewrite() -> int:
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        half = table.num_rows // 2
        with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for piece in (table.slice(half), table.slice(0, half)):
                writer.write_table(piece)
        return 0

    must(arena.apart(rewrite))
    return [path.name]


def _shuffle_list(arena: Arena, rng: random.Random) -> list[str]:
    path = arena.here / "data/manifest.json"
    manifest = json.loads(path.read_text())
    rng.shuffle(manifest["shards"])
    path.write_text(json.dumps(manifest))
    return ["manifest.json"]


def _touch(arena: Arena, rng: random.Random) -> list[str]:
    for path in files(arena.here, "**/*"):
        os.utime(path, (rng.randint(0, 2**31), rng.randint(0, 2**31)))
    return ["nothing"]


def _stray(arena: Arena, rng: random.Random) -> list[str]:
    """One more part, which the manifest does not list: it must not be read."""
    path = rng.choice(_parts(arena))
    shutil.copy(path, path.with_name("part-00077.parquet"))
    return ["part-00077.parquet"]


def _other_split(arena: Arena, rng: random.Random) -> list[str]:
    """val's shards in test's place, and the other way round."""
    for table in ("frames", "clips"):
        val, test = (arena.here / f"data/{table}/split={split}" for split in ("val", "test"))
        val.rename(val.with_name("x"))
        test.rename(val)
        val.with_name("x").rename(test)
    return ["split=val", "split=test"]


REORDERINGS: Final = {
    "a part renamed": _rename,
    "parts rotated": _rotate,
    "row groups turned round": _regroup,
    "the manifest's list shuffled": _shuffle_list,
    "other times": _touch,
    "a stray part": _stray,
    "splits swapped": _other_split,
}


# ---- no room -----------------------------------------------------------------------------------------


def disk(arena: Arena, rng: random.Random) -> Verdict:
    """A disk that is full at a random byte, or a limit on the size of a file; then there is room, and it runs again."""
    name = _a_job(arena, rng, (5, 4, 4, 4, 0.5))
    return (
        _on_small_disk(arena, rng, name) if arena.can_mount and rng.random() < 0.7 else _short_files(arena, rng, name)
    )


def _size(arena: Arena, name: str) -> int:
    """Bytes of the job's undisturbed output, on pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files(arena.kept / JOBS[name].out, "**/*"))


def _on_small_disk(arena: Arena, rng: random.Random, name: str) -> Verdict:
    needed = _size(arena, name)
    old = _prepare(arena, name, rng)
    room = int(needed * rng.uniform(0, rng.choice((0.1, 1.3, 1.3, 2.2))))
    out = JOBS[name].out
    _move_onto_disk(arena, out, (_used(arena.here / out) if old else 0) + room)
    what = f"{name}: {room:,} bytes left of {needed:,}, {'an' if old else 'no'} old output there"
    ran = arena.job(name)
    return _after_no_room(arena, name, old, ran, what, lambda: arena.grow(out))


def _used(folder: Path) -> int:
    return sum(4096 + -(-path.lstat().st_size // 4096) * 4096 for path in folder.rglob("*")) + 8192


def _move_onto_disk(arena: Arena, out: str, size: int) -> None:
    here, aside = arena.here / out, arena.root / "aside"
    shutil.rmtree(aside, ignore_errors=True)
    if here.exists():
        here.rename(aside)
    arena.mount(out, size)
    if aside.exists():
        shutil.copytree(aside, here, dirs_exist_ok=True)


def _short_files(arena: Arena, rng: random.Random, name: str) -> Verdict:
    sizes = [path.stat().st_size for path in files(arena.kept / JOBS[name].out, "**/*")]
    old = _prepare(arena, name, rng)
    most = max(2048, int(max(sizes) * rng.uniform(0, 1.1)) if rng.random() < 0.6 else rng.choice(sizes) // 2)
    what = f"{name}: no file above {most:,} bytes, {'an' if old else 'no'} old output there"
    ran = arena.job(name, prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    return _after_no_room(arena, name, old, ran, what, lambda: None)


def _after_no_room(
    arena: Arena, name: str, old: Bytes | None, ran: Ran, what: str, make_room: Callable[[], None]
) -> Verdict:
    names = [JOBS[name].out]
    if why := fault(ran, names):
        return Verdict(LOST, what, why)
    if ran.done and arena.outcome(name) != arena.result[name]:
        return Verdict(LOST, what, f"done, it says, but {_differing(arena.outcome(name), arena.result[name])}")
    if why := _torn(arena, name, old):
        return Verdict(LOST, what, why)
    make_room()
    verdict = _finish(arena, name, what, REFUSED if not ran.done else SAME)
    return Verdict(verdict.outcome, what, verdict.why or (ran.words if not ran.done else ""))


# ---- frames ------------------------------------------------------------------------------------------


def frames(arena: Arena, rng: random.Random) -> Verdict:
    """A video's Arrow file, mp4 or images cut, damaged, replaced, removed: named, or read as another video's frames.

    A damaged picture that still decodes is a picture (JPEG has no checksum): 'other input'. The other videos' features
    must be those of an undisturbed run.
    """
    kind = rng.choice(("raw", "mp4", "png"))
    name = rng.choice(("train", "evaluate", "encode", "preprocess"))
    expected = _undamaged(arena, kind, name)
    path, how, videos = _spoil_frames(arena, rng, kind, name)
    what = f"{kind}/{path.relative_to(arena.here / kind)}: {how}; {name}"
    ran = arena.run(*_on_frames(kind, name))
    if why := fault(ran, [*_names(path), *videos]):
        return Verdict(LOST, what, why)
    if name == "encode" and (cost := _cost_to_others(arena, expected, videos)):
        return Verdict(LOST, what, f"a bad video cost {cost}")
    if not ran.done or (name == "encode" and ran.status == 3):
        return Verdict(REFUSED, what, ran.words)
    return Verdict(SAME if _seen(arena, name) == expected else OTHER, what)


def _on_frames(kind: str, name: str) -> tuple[str, ...]:
    at = ("--frames-root", kind)
    return {
        "train": (*_FIT, *at),
        "evaluate": ("evaluate", "run", "data", *_LOOK, *at),
        "encode": ("encode", "data", "--model", "run/last", "--out", "new", *at),
        "preprocess": ("preprocess", "raw/train_training.json", "--out", "new", "--workers", "1", *at),
    }[name]


def _seen(arena: Arena, name: str) -> Bytes:
    new = arena.here / "new"
    return of_run(new) if name == "train" else of_scores(new) if name == "evaluate" else digest(new)


def _undamaged(arena: Arena, kind: str, name: str) -> Bytes:
    key = f"frames {kind} {name}"
    if key not in arena.result:
        arena.fresh("raw", "data", "run", kind)
        with arena.undisturbed():
            must(arena.run(*_on_frames(kind, name)))
        arena.result[key] = _seen(arena, name)
    return arena.result[key]


def _spoil_frames(arena: Arena, rng: random.Random, kind: str, name: str) -> tuple[Path, str, list[str]]:
    """(the file, what was done to it, the videos it is of)"""
    arena.fresh("raw", "data", "run", kind)
    split = {"evaluate": "test", "train": "train", "preprocess": "train"}.get(name, "")
    folder = arena.here / kind / "frames"
    if kind == "png":
        video = rng.choice(sorted(p for p in folder.iterdir() if f"-{split}" in p.name))
        paths = sorted(video.iterdir())
    else:
        paths = [p for p in sorted(folder.iterdir()) if f"-{split}" in p.name]
    path = rng.choice(paths)
    if rng.random() < (0.5 if kind == "png" else 0.2):
        how, content = rng.choice(list(HOSTILE.items())[: 5 if kind == "png" else None])
        path.write_bytes(content())
    elif kind == "raw" and rng.random() < 0.4:
        how = _rewrite_arrow(arena, rng, path)
    else:
        how = damage(rng, path, paths)
    named = [path.stem if kind != "png" else path.parent.name]
    return path, how, named + ([Path(how.split()[2]).stem] if how.startswith("swap") else [])


def _rewrite_arrow(arena: Arena, rng: random.Random, path: Path) -> str:
    """A sound Arrow file of what are no frames."""
    how = rng.choice(("half its rows", "null rows", "numbers", "no base64", "other column", "huge JPEG", "no rows"))

    def rewrite() -> int:
        import pyarrow as pa

        rows = pa.ipc.open_stream(path.read_bytes()) if path.read_bytes()[:6] != b"ARROW1" else pa.ipc.open_file(path)
        table = rows.read_all()
        n = table.num_rows
        made = {
            "half its rows": lambda: table.slice(0, n // 2),
            "null rows": lambda: pa.table({"frame": pa.nulls(n, pa.string())}),
            "numbers": lambda: pa.table({"frame": list(range(n))}),
            "no base64": lambda: pa.table({"frame": ["?" * 99] * n}),
            "other column": lambda: table.rename_columns(["picture", *table.column_names[1:]]),
            "huge JPEG": lambda: pa.table({"frame": [base64.b64encode(huge_jpeg()).decode()] * n}),
            "no rows": lambda: table.slice(0, 0),
        }[how]()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made)
        return 0

    must(arena.apart(rewrite))
    return how


def _cost_to_others(arena: Arena, expected: Bytes, videos: Sequence[str]) -> str:
    found = digest(arena.here / "new") if (arena.here / "new").is_dir() else {}
    others = {name for name in expected if not any(video in name for video in videos)}
    return ", ".join(sorted(name for name in others if found.get(name) != expected[name])[:2])


def huge_jpeg() -> bytes:
    """A JPEG whose header says 60,000 x 60,000."""
    from PIL import Image

    told = io.BytesIO()
    Image.new("RGB", (8, 8)).save(told, "JPEG")
    data = bytearray(told.getvalue())
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def _huge_png() -> bytes:
    """A whole PNG of 30,000 x 30,000 in 110 kB, which takes 3.6 GB once it is RGB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    side = 30_000
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = zlib.compressobj(1)
    body = b"".join([*(rows.compress(bytes(1 + side // 8)) for _ in range(side)), rows.flush()])
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _small(mode: str, kind: str) -> bytes:
    from PIL import Image

    told = io.BytesIO()
    Image.new(mode, (1, 3)).save(told, kind)
    return told.getvalue()


HOSTILE: Final[dict[str, Callable[[], bytes]]] = {  # five pictures first
    "a JPEG of 60,000 x 60,000": huge_jpeg,
    "a PNG of 30,000 x 30,000": _huge_png,
    "a grey picture of 1 x 3": lambda: _small("L", "PNG"),
    "a CMYK JPEG": lambda: _small("CMYK", "JPEG"),
    "a GIF": lambda: _small("P", "GIF"),
    "a playlist": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a pickle": lambda: b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "a header alone": lambda: b"ARROW1\0\0",
    "a length of 2 GB": lambda: b"\xff\xff\xff\xff\xf0\xff\xff\x7f" + bytes(64),
}


# ---- two at once -------------------------------------------------------------------------------------


def twice(arena: Arena, rng: random.Random) -> Verdict:
    """Two of the same job at once: one does the work, the other says in one line why not (or finds it done)."""
    name = rng.choice(("preprocess", "train", "encode", "evaluate"))
    arena.fresh("raw", "data", *(["run"] if name in ("encode", "evaluate") else []))
    if JOBS[name].out != "run" or name == "train":
        shutil.rmtree(arena.here / JOBS[name].out, ignore_errors=True)
    delay = rng.uniform(0, arena.seconds[name])
    rivals: list[Ran] = []

    def second() -> None:
        import time

        time.sleep(delay)
        rivals.append(arena.job(name))

    first = arena.job(name, proceed=second)
    what = f"{name}, and again {delay:.2f} s later"
    for ran in (first, rivals[0]):
        if why := fault(ran):
            return Verdict(LOST, what, why)
    if not (first.done or rivals[0].done):
        return Verdict(LOST, what, f"neither did it: {first.words} / {rivals[0].words}")
    verdict = _finish(arena, name, what, REFUSED if not (first.done and rivals[0].done) else SAME)
    return Verdict(verdict.outcome, what, verdict.why or next((r.words for r in (first, rivals[0]) if not r.done), ""))


# ---- odd places --------------------------------------------------------------------------------------


def odd(arena: Arena, rng: random.Random) -> Verdict:
    """Another locale, umask, time zone; no HOME, no TMPDIR to write to; a folder that is locked or a file."""
    name = rng.choice(("preprocess", "train", "encode", "evaluate"))
    how = rng.choice(list(ODDITIES))
    arena.fresh("raw", "data", *(["run"] if name in ("encode", "evaluate") else []))
    if JOBS[name].out != "run" or name == "train":
        shutil.rmtree(arena.here / JOBS[name].out, ignore_errors=True)
    what, out = f"{name}: {how}", arena.here / JOBS[name].out
    if how == "the output is a file":
        out.write_text("mine")
    env, prepare = ODDITIES[how]
    ran = arena.job(name, env=env, prepare=prepare)
    if why := fault(ran, [JOBS[name].out]):
        return Verdict(LOST, what, why)
    if how == "the output is a file":
        if out.read_text() != "mine":
            return Verdict(LOST, what, "the file is gone")
        out.unlink()
    elif ran.status != JOBS[name].status or arena.outcome(name) != arena.result[name]:
        return Verdict(LOST, what, f"status {ran.status}, {ran.words}")
    return _finish(arena, name, what, REFUSED if not ran.done else SAME)


def _only_mine() -> None:
    os.umask(0o077)


def _no_home() -> None:
    for variable in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME"):
        os.environ.pop(variable, None)


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


ODDITIES: Final[dict[str, tuple[dict[str, str], Callable[[], None]]]] = {
    "LC_ALL=C": ({"LC_ALL": "C", "PYTHONUTF8": "0", "LANG": "C"}, lambda: None),
    "umask 077": ({}, _only_mine),
    "no HOME": ({}, _no_home),
    "HOME and TMPDIR that are not there": (
        {"HOME": "/nowhere", "TMPDIR": "/nowhere", "HF_HOME": "/nowhere/hf"},
        lambda: None,
    ),
    "another time zone": ({"TZ": "Pacific/Chatham", "SOURCE_DATE_EPOCH": "0"}, lambda: None),
    "64 open files": ({}, _few_files),
    "the output is a file": ({}, lambda: None),
}
