"""The attacks on readers: files that are no clips, or one bad clip among good ones, into `preprocess`; and Arrow tables
that claim to be shards, under a manifest whose hashes agree, into the trainer's reader.

Many small cases a process, each under an alarm; what a case may do is written once: refuse by name, or be right. The
truth about forged tables is read here, row by row, by none of the product's code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import random
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from .arena import TINY, Arena, Ran, fault, files
from .attacks import LOST, OTHER, REFUSED, SAME, Verdict

REPOSITORY: Final = Path(__file__).resolve().parents[2]
REAL: Final = REPOSITORY.parent / "shared" / "real"
CASES, EXAMPLES, FORGED = 12, 60, 12  # of an attempt: mutated files; hypothesis's examples of files, of shards
CASE_S = 20  # one case, of a few kB to 20 MB


# ---- clips to spoil ----------------------------------------------------------------------------------


def families(raw: Path) -> dict[str, list[bytes]]:
    """Real and made-up clips as JSON, by schema; each with an id that no flipped bit turns into another's."""
    found: dict[str, list[Any]] = {"prospect": [], "proassist": []}
    for path in (*files(raw, "*.json"), *files(REPOSITORY / "data", "*.json")):
        found["prospect"] += json.loads(path.read_text())[:4]
    if (REAL / "prospect_clip.json").is_file():
        read = json.loads((REAL / "prospect_clip.json").read_text())
        found["prospect"] += read if isinstance(read, list) else [read]
    if (REAL / "proassist_prepared.jsonl").is_file():
        found["proassist"] += [json.loads(line) for line in (REAL / "proassist_prepared.jsonl").open() if line.strip()]
    good = {kind: [clip for clip in clips if clip.get("fps", 1) != -1] for kind, clips in found.items() if clips}
    return {kind: [_named(clip, i) for i, clip in enumerate(clips)] for kind, clips in good.items()}


def _named(clip: dict[str, Any], number: int) -> bytes:
    name = hashlib.sha256(f"{number}".encode()).hexdigest()
    return json.dumps({**clip, "id": name}, ensure_ascii=number % 2 == 0).encode("utf-8", "surrogatepass")


def _surrogate(rng: random.Random) -> bytes:
    return rng.choice((b'"\\ud800"', b"\xed\xa0\x80", b'"\\udfff\\ud800"'))


TOKENS: Final[tuple[Callable[[random.Random], bytes], ...]] = (
    *(lambda rng, t=t: t for t in (
        b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\0", b"\xef\xbb\xbf", b"\xff", b"NaN", b"-Infinity",
        b"1e308", b"1e999", b"-1", b"-0.0", b"null", b"true", b"//", b"'", b"\x1b[31m", b"}{", b"},{", b"}\n{", b"]\n[",
        b'"conversation":', b'{"video_uid":"x"', b'"video_uid":null,', b'"fps":0,', b"\xe2\x80\xa8",
        b'"start_frame":193.5,',
    )),
    _surrogate,
    lambda rng: b"9" * rng.choice((20, 400, 5_000)),
    lambda rng: b"[" * rng.choice((50, 3_000, 100_000)),
    lambda rng: b'{"a":' * rng.choice((50, 3_000, 50_000)),
    lambda rng: b'"' + b"x" * rng.choice((10_000, 10_000_000)) + b'"',
    lambda rng: b"[" + b"0," * rng.choice((1_000, 1_000_000)) + b"0]",
)  # fmt: skip
BIG: Final = 0.04  # share of mutations that take one of the last five tokens

VALUES: Final = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, -1e308, 5e-324, 0.5, 193.0, math.nan, math.inf, "", "x",
    "\0", "\ud800", "..", "../x", "/etc/passwd", "C:\\x", "a\nb", "\x1b[31m[/red]", [], {}, [[]], [None], {"id": None},
    "S1->start", "S1->fly", "x" * 100_000, list(range(10_000)), "\u202e", "ﬀ", "🙂" * 50, [{"role": "user"}],
)  # fmt: skip


def spoil(rng: random.Random, clip: bytes, others: Sequence[bytes]) -> bytes:
    """One clip's bytes, damaged once or more."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        clip = rng.choice((_byte, _cut, _repeat, _from_another, _insert, _insert, _value, _value))(rng, clip, others)
    return clip


def _place(rng: random.Random, clip: bytes) -> int:
    return rng.choice((0, 1, len(clip), rng.randrange(len(clip) + 1), rng.randrange(len(clip) + 1)))


def _byte(rng: random.Random, clip: bytes, others: Sequence[bytes]) -> bytes:
    at = min(_place(rng, clip), len(clip) - 1)
    return clip[:at] + bytes([rng.randrange(256)]) + clip[at + 1 :] if clip else b"\0"


def _cut(rng: random.Random, clip: bytes, others: Sequence[bytes]) -> bytes:
    at = _place(rng, clip)
    return clip[:at] + clip[at + rng.choice((1, 2, 30, 10_000)) :]


def _repeat(rng: random.Random, clip: bytes, others: Sequence[bytes]) -> bytes:
    a, b, size = _place(rng, clip), _place(rng, clip), rng.choice((1, 9, 200))
    return clip[:a] + clip[b : b + size] + clip[a:]


def _from_another(rng: random.Random, clip: bytes, others: Sequence[bytes]) -> bytes:
    other, a = rng.choice(others), _place(rng, clip)
    b = _place(rng, other)
    return clip[:a] + other[b : b + rng.choice((3, 40, 400))] + clip[a + rng.choice((0, 40)) :]


def _insert(rng: random.Random, clip: bytes, others: Sequence[bytes]) -> bytes:
    at, few = _place(rng, clip), len(TOKENS) - 5
    token = rng.choice(TOKENS[few:] if rng.random() < BIG else TOKENS[:few])(rng)
    return clip[:at] + token + clip[at:]


def _value(rng: random.Random, clip: bytes, others: Sequence[bytes]) -> bytes:
    """A value somewhere in the tree replaced by a hostile one."""
    try:
        tree = json.loads(clip)
    except (ValueError, RecursionError):
        return _byte(rng, clip, others)
    node, at = tree, None
    for _ in range(rng.randint(1, 5)):
        children = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not children:
            break
        parent, at = node, rng.choice(children)
        node = node[at]
    if at is None:
        return clip
    parent[at] = rng.choice(VALUES)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


# ---- a bad clip among good ones ----------------------------------------------------------------------


def garbage(arena: Arena, rng: random.Random) -> Verdict:
    """Clips damaged at random in files of good ones, through `preprocess`: the good ones survive as they were."""
    arena.fresh("raw")
    seed = rng.getrandbits(32)
    if rng.random() < 0.15:
        return _by_command(arena, rng)
    cases = _count(arena, CASES)
    ran = arena.apart(lambda: _spoil_many(arena.here, random.Random(seed), cases), ("preprocess",), usual=30)
    return _judged(ran, f"{cases} files, one bad clip each")


def _count(arena: Arena, full: int) -> int:
    return full // 4 if arena.light else full


def _judged(ran: Ran, what: str) -> Verdict:
    """The verdict on a process that prints a line for each thing lost, and its counts at the end."""
    if why := fault(ran):
        return Verdict(LOST, what, f"{why} {ran.out.strip()[-300:]}")
    lost = [line for line in ran.out.splitlines() if line.startswith("LOST ")]
    if lost or ran.status:
        return Verdict(LOST, what, (lost or [ran.err.strip()[-300:] or f"status {ran.status}"])[0][5:])
    refused = any(line.startswith("refused") for line in ran.out.splitlines())
    return Verdict(REFUSED if refused else SAME, what)


class _TooLong(BaseException):
    """Not an Exception: nothing may swallow it."""


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: Any) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def _spoil_many(here: Path, rng: random.Random, cases: int) -> int:
    """In a process of its own: files with one bad clip each."""
    of = families(here / "raw")
    truth = {kind: _alone(here, kind, clips) for kind, clips in of.items()}
    for number in range(cases):
        kind = rng.choice(sorted(of))
        content, good = _file_of(rng, of[kind])
        why = _case(here, kind, content, {name: truth[kind][name] for name in good})
        if why is not None and why.startswith("refused"):
            print("refused")
        elif why is not None:
            kept = here.parent / "found"
            kept.mkdir(exist_ok=True)
            path = kept / f"train_{hashlib.sha256(content).hexdigest()[:12]}.json"
            path.write_bytes(content)
            print(f"LOST case {number} ({kind}), kept as {path}: {why}")
    return 0


def _file_of(rng: random.Random, clips: Sequence[bytes]) -> tuple[bytes, list[str]]:
    """(a file with one bad clip, the ids of the good ones)"""
    chosen = rng.sample(list(clips), min(len(clips), rng.randint(2, 5)))
    at = rng.randrange(len(chosen))
    texts = [spoil(rng, text, clips) if i == at else text for i, text in enumerate(chosen)]
    good = [json.loads(text)["id"] for i, text in enumerate(chosen) if i != at]
    if rng.random() < 0.4:
        return b"\n".join(texts) + rng.choice((b"", b"\n", b"\r\n")), good
    space = rng.choice((b"", b" ", b"\n", b"\n  "))
    content = b"[" + (b"," + space).join(texts) + b"]" + space
    try:
        json.loads(content.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        good = good[:at]  # an array is read up to where its syntax breaks
    return rng.choice((b"", b"", b"\xef\xbb\xbf")) + content, good


def _alone(here: Path, kind: str, clips: Sequence[bytes]) -> dict[str, str]:
    """What each clip becomes among good ones, by id."""
    found = _preprocessed(here, kind, b"[" + b",".join(clips) + b"]")
    assert len(found) == len(clips), f"{len(found)} of {len(clips)} clips of {kind} are good"
    return found


def _case(here: Path, kind: str, content: bytes, good: dict[str, str]) -> str | None:
    """None: every good clip is there as it was; else what is wrong, or 'refused' where the file was as a whole."""
    from pipeline.errors import InputError

    try:
        with _alarm(CASE_S):
            found = _preprocessed(here, kind, content)
    except InputError as error:
        if "\n" in str(error) or "train_x.json" not in str(error):
            return f"an error of two lines, or that names no file: {str(error)[:200]!r}"
        return f"the file was refused, and {len(good)} good clips with it: {str(error)[:200]}" if good else "refused"
    except _TooLong:
        return f"more than {CASE_S} s"
    except BaseException:
        return " ".join(traceback.format_exc().split())[-300:]
    missing = [name for name, digest in good.items() if found.get(name) != digest]
    if missing:
        how = "are not as they were" if all(name in found for name in missing) else "are gone"
        return f"{len(missing)} of {len(good)} good clips {how}"
    return None


def _preprocessed(here: Path, kind: str, content: bytes) -> dict[str, str]:
    """By clip_id, a digest of all that the shards say of a clip that is its own, not its neighbours'."""
    import shutil

    import pyarrow.parquet as pq

    from pipeline.options import Options
    from pipeline.preprocess import preprocess

    path, out = here / "train_x.json", here / "made"
    path.write_bytes(content)
    shutil.rmtree(out, ignore_errors=True)
    convention = None if kind == "proassist" else "event"
    preprocess([path], out, Options(frame_convention=convention, bounds="given"))
    found: dict[str, Any] = {}
    for part in sorted(out.glob("clips/split=train/*.parquet")):
        for row in pq.read_table(part, partitioning=None).to_pylist():
            del row["clip"], row["initial_state"]  # is replayed over the clips before it
            found[row["clip_id"]] = hashlib.sha256(repr(row).encode("utf-8", "surrogatepass"))
    for part in sorted(out.glob("frames/split=train/*.parquet")):
        table = pq.read_table(part, partitioning=None).drop_columns(["clip"])
        for name, rows in _by_clip(table):
            found[name].update(rows)
    return {name: sha.hexdigest() for name, sha in found.items()}


def _by_clip(table: Any) -> Iterator[tuple[str, bytes]]:
    """(clip_id, its rows as bytes), in the table's order."""
    import numpy as np
    import pyarrow as pa

    encoded = table["clip_id"].combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes, names = np.asarray(encoded.indices), encoded.dictionary.to_pylist()
    columns = [np.asarray(table[name]) for name in table.column_names if name != "clip_id"]
    for code, name in enumerate(names):
        yield name, b"".join(column[codes == code].tobytes() for column in columns)


def _by_command(arena: Arena, rng: random.Random) -> Verdict:
    """The same for one file, through the command and several workers."""
    of = families(arena.here / "raw")
    kind = rng.choice(sorted(of))
    content, good = _file_of(rng, of[kind])
    (arena.here / "train_x.json").write_bytes(content)
    more = [] if kind == "proassist" else ["--frame-convention", "event"]
    workers = rng.choice(("1", "2"))
    ran = arena.run("preprocess", "train_x.json", "--out", "made", "--workers", workers, *more)
    what = f"one file of {kind}, {workers} workers"
    if why := fault(ran, ["train_x.json"]):
        return Verdict(LOST, what, why)
    counted = _count_clips(arena) if ran.done else 0
    if counted < len(good):
        return Verdict(LOST, what, f"{counted} clips of {len(good)} good ones: {ran.words}")
    return Verdict(REFUSED if ran.status else SAME, what, ran.words)


def _count_clips(arena: Arena) -> int:
    return sum(s["clips"] for s in json.loads((arena.here / "made/manifest.json").read_text())["splits"].values())


# ---- hypothesis ----------------------------------------------------------------------------------------


def examples(arena: Arena, rng: random.Random) -> Verdict:
    """hypothesis over the reader: any JSON, any bytes, any clip-like tree; InputError and ClipError, nothing else."""
    arena.fresh("raw")
    seed = rng.getrandbits(32)
    ran = arena.apart(lambda: _hypothesis(seed, _count(arena, EXAMPLES)), ("hypothesis over the reader",), usual=30)
    return _judged(ran, f"hypothesis, seed {seed}")


def _hypothesis(seed: int, count: int) -> int:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    from pipeline.errors import InputError
    from pipeline.readers import decode
    from pipeline.readers.clip import ClipError
    from pipeline.readers.index import index

    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(VALUES)
    trees = st.recursive(
        scalars, lambda t: st.lists(t, max_size=4) | st.dictionaries(st.text(max_size=5), t, max_size=4)
    )
    roles = st.sampled_from(("system", "user", "assistant", "DST_UPDATE", "frames")) | scalars
    numbers = st.integers(-3, 40) | st.floats() | scalars
    turns = st.fixed_dictionaries(
        {"role": roles},
        optional={"content": trees, "time": numbers, "start_frame": numbers, "end_frame": numbers, "start": numbers,
                  "end": numbers},
    )  # fmt: skip
    clips = st.fixed_dictionaries(
        {"video_uid": st.sampled_from(("v", "v/w", "..")) | scalars,
         "conversation": st.lists(turns, max_size=5) | trees},
        optional={"id": scalars, "fps": numbers, "start_frame_idx": numbers, "end_frame_idx": numbers, "dst": trees,
                  "neg_frame_sampling_rate": numbers, "initial_dst_state": trees, "metadata": trees,
                  "clip_idx": numbers},
    )  # fmt: skip
    files_of = st.lists(clips | trees, max_size=4).map(lambda found: json.dumps(found).encode())
    content = (
        files_of | st.binary(max_size=60) | st.text(alphabet='[]{}",:\\ \n01aeNn\ufeff', max_size=60).map(str.encode)
    )
    path = Path("train_h.json")

    @seeded(seed)
    @settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(content)
    def reads(data: bytes) -> None:
        path.write_bytes(data)
        with _alarm(CASE_S):
            try:
                found = index(path)
            except InputError as error:
                _check_told(error, path.name)
                return
            assert all(0 <= a <= b <= len(data) for a, b in found.spans.tolist())
            for a, b in found.spans.tolist():
                with contextlib.suppress(ClipError):
                    decode(data[a:b])
            _preprocess_quietly(path)

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            reads()
    except BaseException as error:
        told = " ".join(str(error).split())[:200]
        notes = " ".join(" ".join(getattr(error, "__notes__", [])).split())[:300]
        print(f"LOST {type(error).__name__}: {told} {notes}")
    return 0


def _preprocess_quietly(path: Path) -> None:
    from pipeline.errors import InputError
    from pipeline.preprocess import preprocess

    try:
        preprocess([path], Path("made"))
    except InputError as error:
        _check_told(error, path.name)


def _check_told(error: Exception, name: str) -> None:
    assert len(str(error).splitlines()) == 1, str(error)
    assert name in str(error), str(error)


# ---- tables that claim to be shards --------------------------------------------------------------------

Rows = list[dict[str, Any]]


def forge(arena: Arena, rng: random.Random) -> Verdict:
    """Shards forged under a manifest that agrees: the trainer refuses by name, or reads what the rows say."""
    arena.fresh("raw", "data")
    seed = rng.getrandbits(32)
    if rng.random() < 0.25:
        return _forged_by_command(arena, seed)
    ran = arena.apart(lambda: _forge_many(seed, _count(arena, FORGED)), ("the trainer's reader",), usual=20)
    return _judged(ran, f"forged tables, seed {seed}")


def _forged_by_command(arena: Arena, seed: int) -> Verdict:
    made = arena.apart(lambda: print(*_forge(Path("data"), random.Random(seed), 1), sep="; ") or 0)
    assert not made.status, made.err
    how = made.out.strip().splitlines()
    ran = arena.run("train", "data", "--run", "new", *TINY)
    what = f"train on {'; '.join(how)}"
    if why := fault(ran, ["part-0", "manifest.json", "frames/", "clips/", "clip ", ".arrow"]):
        return Verdict(LOST, what, why)
    return Verdict(OTHER if ran.done else REFUSED, what, ran.words)


def _forge_many(seed: int, examples: int) -> int:
    import shutil

    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    kept, refused, told = Path("data"), 0, [""]

    @seeded(seed)
    @settings(
        max_examples=examples, database=None, deadline=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(st.randoms(use_true_random=False), st.integers(1, 3))
    def reads(rng: random.Random, count: int) -> None:
        nonlocal refused
        shutil.rmtree("forged", ignore_errors=True)
        shutil.copytree(kept, "forged")
        how = _forge(Path("forged"), rng, count)
        with _alarm(CASE_S):
            why = _read_forged(Path("forged"))
        refused += why == "refused"
        if why not in (None, "refused"):
            told[0] = f"{'; '.join(how)}: {why}"
            raise AssertionError(why)

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            reads()
    except BaseException as error:
        print(f"LOST {told[0] or ' '.join(f'{type(error).__name__}: {error}'.split())[:300]}")
    print(f"refused {refused}")
    return 0


def _read_forged(data: Path) -> str | None:
    """None where the reader gives what the rows say; 'refused'; or what is wrong."""
    from pipeline.dataset import Split
    from pipeline.errors import InputError

    expected = truth(data)
    try:
        split = Split(data, "train")
        found = [_as_row(clip) for clip in split.in_order(rate=None)]
        _ = list(split.texts()), split.statistics()
        for epoch in (0, 1):
            shuffled = list(split.epoch(0, epoch))
            assert sorted(clip.clip_id for clip in shuffled) == sorted(row["clip_id"] for row in found)
            assert [clip.clip for clip in shuffled] == [numbers.clip for numbers in split.label_stream(0, epoch)]
    except InputError as error:
        if "\n" in str(error) or not any(name in str(error) for name in ("part-", "manifest.json")):
            return f"refused without a file's name, or in two lines: {str(error)[:200]!r}"
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if expected is None:
        return "read, though the rows contradict each other"
    return None if found == expected else "what was read is not what the rows say"


_COLUMNS: Final = ("clip_id", "video_uid", "start_frame", "num_frames", "fps", "goal", "neg_rate", "sampling_seed")


def _as_row(clip: Any) -> dict[str, Any]:
    turns = [(t.role, t.text, t.start_frame, t.end_frame, tuple(t.updates)) for t in clip.turns]
    return {name: getattr(clip, name) for name in _COLUMNS} | {
        "turns": turns, "steps": list(clip.steps), "labels": clip.labels.tolist(),
    }  # fmt: skip


def truth(data: Path) -> list[dict[str, Any]] | None:
    """What the rows of the train split say, part by part as the manifest has them; None where that is nothing sound."""
    import pyarrow.parquet as pq

    try:
        manifest = json.loads((data / "manifest.json").read_text())
        mine = sorted((s["part"], s["table"], s["path"]) for s in manifest["shards"] if s["split"] == "train")
        tables: dict[str, Rows] = {"frames": [], "clips": []}
        for _, table, path in mine:
            tables[table] += pq.read_table(data / path, partitioning=None).to_pylist()
        return [_true_clip(row, number, tables["frames"]) for number, row in enumerate(tables["clips"])]
    except Exception:
        return None


def _true_clip(row: dict[str, Any], number: int, frames: Rows) -> dict[str, Any]:
    mine = [f for f in frames if f["clip_id"] == row["clip_id"]]
    assert [f["frame"] for f in mine] == list(range(row["start_frame"], row["end_frame"]))
    assert all(f["clip"] == row["clip"] == number for f in mine)
    turns = [
        (
            t["role"],
            t["text"],
            t["start_frame"],
            t["end_frame"],
            tuple((u["id"], u["transition"]) for u in t["updates"]),
        )
        for t in row["turns"]
    ]
    labels = [[f[f"{head}_label"] for f in mine] for head in ("speaking", "dst_update")]
    steps = [(step["id"], step["name"]) for step in row["steps"]]
    return {name: row[name] for name in _COLUMNS} | {"turns": turns, "steps": steps, "labels": labels}


def _forge(data: Path, rng: random.Random, count: int) -> list[str]:
    """Change `count` things, then make sizes and hashes agree; what was changed."""
    how = []
    for _ in range(count):
        table = rng.choice(("frames", "clips", "clips", "manifest"))
        if table == "manifest":
            how.append(_forge_manifest(data, rng))
            continue
        path = rng.choice(list(files(data, f"{table}/split=train/*.parquet")))
        how.append(f"{table}/{path.name} {_forge_table(path, rng)}")
    reseal(data)
    return how


def _forge_table(path: Path, rng: random.Random) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path, partitioning=None)
    name = rng.choice(table.column_names)
    rows, column = table.to_pylist(), table.column_names.index(name)
    how = rng.choice(("null", "type", "drop", "value", "value", "value", "deep", "deep", "order", "double", "cut",
                      "empty", "groups", "extra"))  # fmt: skip
    at = rng.randrange(len(rows)) if rows else 0
    if how == "null" and rows:
        rows[at][name] = None
        table = _table(rows, table, nullable=True)
    elif how == "type":
        types = (
            pa.int64(),
            pa.float64(),
            pa.string(),
            pa.large_string(),
            pa.binary(),
            pa.bool_(),
            pa.uint8(),
            pa.null(),
        )
        to = rng.choice(types)
        how = f"type {to}"
        table = table.set_column(column, pa.field(name, to), _cast(table[name], to))
    elif how == "drop":
        table = table.drop_columns([name])
    elif how == "value" and rows:
        value = _hostile(rng, rows[at][name])
        how = f"row {at} value {value!r:.40}"
        rows[at][name] = value
        table = _table(rows, table)
    elif how == "deep" and rows and "turns" in rows[0]:
        how = _deep(rng, rows[at])
        table = _table(rows, table)
    elif how == "order" and rows:
        rng.shuffle(rows)
        table = _table(rows, table)
    elif how == "double" and rows:
        table = _table([*rows, rows[at]], table)
    elif how == "cut" and rows:
        table = _table(rows[:at] + rows[at + 1 :], table)
    elif how == "empty":
        table = table.slice(0, 0)
    elif how == "extra":
        table = table.append_column("extra", pa.nulls(len(rows), pa.string()))
    size = max(1, table.num_rows // 2) if how == "groups" else max(1, table.num_rows)
    pq.write_table(table, path, row_group_size=size, compression="zstd")
    return f"{name}: {how}"


def _hostile(rng: random.Random, old: Any) -> Any:
    if isinstance(old, str):
        return rng.choice(("", "../../up", "/etc/passwd", "x\ny", "onset", "span", old + "x", "a" * 5000))
    if isinstance(old, bool) or old is None or isinstance(old, list):
        return old
    if isinstance(old, float):
        return rng.choice((math.nan, math.inf, -1.0, 0.0, 2.0, 1e30, old / 2))
    return rng.choice((-1, 0, 1, 2, -100, 7, 127, old + 1, old - 1, old * 2, 2**31 - 1, -(2**31), 2**63))


def _deep(rng: random.Random, row: dict[str, Any]) -> str:
    """Change a turn, a step or a state."""
    column = rng.choice([name for name in ("turns", "turns", "steps", "initial_state") if row[name]] or ["turns"])
    if not row[column]:
        return "deep, nothing there"
    one = rng.choice([one for one in row[column] if one] or [{"nothing": 0}])
    name = rng.choice(list(one))
    if name == "updates":
        one[name] = [*one[name], {"id": "S1", "transition": rng.choice(("fly", "start", ""))}]
    elif name == "role":
        one[name] = rng.choice(("narrator", "", "user", "DST_UPDATE"))
    elif name in ("start_frame", "end_frame"):
        one[name] = rng.choice((None, -1, 0, 2**31 - 1, -(2**31), (one[name] or 0) + 1))
    else:
        one[name] = _hostile(rng, one[name])
    return f"{column}.{name} {one[name]!r:.40}"


def _table(rows: Rows, like: Any, nullable: bool = False) -> Any:
    """A table of these rows, of the old one's types where they fit, else of wider ones."""
    import pyarrow as pa

    columns, fields = [], []
    for field in like.schema:
        values = [row[field.name] for row in rows]
        try:
            column = pa.array(values, field.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            column = pa.array([str(value) for value in values])
        columns.append(column)
        fields.append(pa.field(field.name, column.type, nullable or column.null_count > 0, field.metadata))
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, like.schema.metadata))


def _cast(column: Any, to: Any) -> Any:
    import pyarrow as pa

    try:
        return column.cast(to)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):
        return pa.nulls(len(column), to)


def _forge_manifest(data: Path, rng: random.Random) -> str:
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    sound = [
        s for s in manifest["shards"] if isinstance(s, dict) and len(s) > 5
    ]  # an earlier forgery may have added others
    shard = rng.choice(sound)
    name = rng.choice(("path", "table", "split", "part", "rows", "clips", "drop", "double", "splits", "kind", "order"))
    value: Any = None
    if name in ("drop", "double"):
        manifest["shards"] = [s for s in manifest["shards"] if s is not shard or name == "double"] + (
            [dict(shard)] if name == "double" else []
        )
    elif name == "splits":
        manifest["splits"] = value = rng.choice(([], None, {}, {"train": None}, "x", {"train": {"clips": -1}}))
    elif name == "kind":
        manifest["shards"].append(value := rng.choice((None, 3, "x", [], {})))
    elif name == "order":
        rng.shuffle(manifest["shards"])
    else:
        other = rng.choice(sound)[name] if rng.random() < 0.5 else None
        value = other if other is not None else rng.choice((None, -1, 0, "x", 1.5, [], 2**70, "../x", "frames"))
        shard[name] = value
    path.write_text(json.dumps(manifest))
    return f"manifest {name} {value!r:.40}"


def reseal(data: Path) -> None:
    """Have the manifest's sizes and hashes agree with what lies there."""
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"]:
        if isinstance(shard, dict) and isinstance(shard.get("path"), str):
            with contextlib.suppress(OSError, ValueError):
                content = (data / shard["path"]).read_bytes()
                shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest, indent=1) + "\n")
