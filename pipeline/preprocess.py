"""Conversations -> Parquet shards, in two passes over bounded pieces of the input.

Pass 1 (`extract`) decodes and checks clips, spools them as Arrow, and collects what only the whole input can decide
(`resolve`); pass 2 (`write_part`) makes labels and shards of the spool. Both work on parts of at most 2,048 clips, each
a pure function of the part: any number of workers, here or on a cluster, writes the same bytes, in bounded memory.
The spool trades 0.4 of the input's size on disk for decoding the JSON once. Everything is written below OUT/.staging-*
and renamed into place at the end, the manifest last: a run killed at any point leaves the old output, or none.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.cluster import Calls, Mapper, pool
from pipeline.dataset import read_manifest, verify
from pipeline.errors import InputError, UsageError
from pipeline.extract import Source, cut, extract, resolve
from pipeline.hazards import find_hazards, recordings
from pipeline.options import SPLITS, Options, find_inputs, split_of
from pipeline.readers.clip import ClipError
from pipeline.readers.index import index
from pipeline.schema import MANIFEST, QUARANTINE, SCHEMA_HASH, SCHEMA_VERSION, shard_path
from pipeline.shards import Plan, counts_by_split, write_part
from pipeline.storage import LOCK, lock, make_folder, naming, sha256, sync, write_json
from pipeline.summary import CARD, card_text, is_our_card

PART_CLIPS: Final = 2048
PART_BYTES: Final = 512 << 20  # of JSON; only absurdly large clips reach it
STAGING: Final = ".staging-"

Progress = Callable[[str, int, int], None]  # (stage, done, total)


def preprocess(
    inputs: list[Path],
    out: Path,
    options: Options | None = None,
    workers: int = 1,
    progress: Progress = lambda stage, done, total: None,
    mapper: Mapper | None = None,
) -> tuple[dict[str, Any], bool]:
    """Write the shards of `inputs` to `out`; returns (manifest, whether an unchanged input was skipped).

    The parts are done by `workers` processes here, or by `mapper` where one is given.
    Raises InputError (nothing usable, --on-error fail), UsageError (a file name that names no split) and OSError.
    """
    options = options or Options()
    files, skipped = find_inputs(inputs, options)
    sources = [Source(path, split_of(path, options), path.stat().st_size, sha256(path)) for path in files]
    splits = {source.split for source in sources}
    if unknown := sorted(set(options.neg_rate) - splits - {"*", *SPLITS.values()}):
        known = ", ".join(sorted(splits))
        raise UsageError(f"--neg-rate {unknown[0]}=...: no such split, expected one of the inputs' ({known})")
    on_disk = sorted(_frames_below(options.frames_root)) if options.frames_root else []
    read = [(source.path.name, source.split, source.sha256) for source in sources]
    key_of = [SCHEMA_HASH, version("prospect-dst"), asdict(options), read, on_disk]  # all that the output depends on
    key = hashlib.sha256(json.dumps(key_of, sort_keys=True).encode()).hexdigest()
    with contextlib.suppress(InputError, OSError):  # damaged, or none: it is written anew
        if read_manifest(out).get("key") == key and (out / CARD).exists():
            return verify(out), True
    created = not out.exists()
    make_folder(out)
    taken = InputError(f"{out}: another run is writing there; wait for it, or choose another --out")
    with naming(out), lock(out / LOCK, taken), contextlib.ExitStack() as stack:
        stack.callback(gc.enable)  # `extract` disables it
        if created:
            stack.callback(_leave_nothing, out)
        for path in (path for table in ("frames", "clips") for path in (out / table).rglob("*")):
            if path.is_file() and not path.match("split=*/part-*.parquet"):  # a user's videos, say
                raise InputError(f"{path}: found a file that is no shard, would be replaced; choose another --out")
        for left in out.glob(f"{STAGING}*"):  # of killed runs, whose workers may have outlived them
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=STAGING, dir=out, ignore_cleanup_errors=True) as folder:
            manifest = {"key": key} | _run(sources, options, Path(folder), mapper or pool(workers), progress)
            manifest["skipped"] = [{"path": str(path), "why": why} for path, why in skipped]
            _commit(Path(folder), out, manifest)
    return manifest, False


def _frames_below(root: str) -> Iterator[tuple[str, int]]:
    """Relative path and bytes of each file of frames."""
    from pipeline.media import IMAGES, VIDEOS  # with Pillow

    seen: set[str] = set()  # folders: links may lead upwards
    for folder, folders, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for path in (os.path.join(folder, name) for name in names):
            if path.lower().endswith((".arrow", *VIDEOS, *IMAGES)) and os.path.exists(path):
                yield os.path.relpath(path, root), os.path.getsize(path)


def _leave_nothing(out: Path) -> None:
    """Remove a folder that a failed run has made."""
    if not (out / MANIFEST).exists():
        (out / LOCK).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            out.rmdir()


def _commit(staged: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Swap everything into `out`, which has no manifest meanwhile; a README.md that is not ours stays."""
    write_json(staged / MANIFEST, manifest)
    (staged / CARD).write_text(card_text(manifest), encoding="utf-8")
    for path in staged.rglob("*"):
        sync(path)
    names = ["frames", "clips", QUARANTINE]
    if not (out / CARD).exists() or is_our_card(out / CARD):
        names.append(CARD)
    for name in (MANIFEST, *names):
        if (out / name).exists():
            (out / name).rename(staged / f"old {name}")
    for name in names:
        if (staged / name).exists():
            (staged / name).rename(out / name)
    sync(out)
    (staged / MANIFEST).rename(out / MANIFEST)
    sync(out)


def _run(sources: list[Source], options: Options, staged: Path, mapper: Mapper, progress: Progress) -> dict[str, Any]:
    """Both passes, into the staging folder; returns the manifest."""
    (staged / "try").mkdir()
    spool = (staged / "try").rename(staged / "spool")  # a disk that refuses it is found out before the work is done
    owners = []
    for number, source in enumerate(sources):
        owners += [(source, call) for call in _parts(source, f"{spool}/{number}", options)]
    results = _map(mapper, extract, [call for _, call in owners], "reading", progress)
    for (source, (part, *_)), (kept, refused) in zip(owners, results, strict=True):
        source.parts[part] = kept
        for refusal in refused:
            source.refuse(*refusal)
    resolve(sources, options)
    plans = _plans(sources, options, staged)
    refused = [r for s in sources for r in sorted(s.refused, key=lambda r: (r["byte_start"], r["clip"] or 0))]
    if refused and options.on_error == "fail":
        raise InputError(f"{refused[0]['message']}; fix the source and run again, or drop --on-error fail")
    if not plans:
        paths = ", ".join(str(source.path) for source in sources)
        first = f"; the first of {len(refused)} quarantined: {refused[0]['message']}" if refused else ""
        raise InputError(f"{paths}: found no usable clip, expected at least one{first}")
    written = list(_map(mapper, write_part, [(plan,) for plan in plans], "writing", progress))
    shutil.rmtree(spool, ignore_errors=True)
    counts, names = counts_by_split(written), recordings(sources)
    in_order = [*dict.fromkeys([*SPLITS.values(), *sorted(counts)])]
    splits = {split: counts[split] | {"recordings": len(names[split])} for split in in_order if split in counts}
    root = options.frames_root
    hazards = find_hazards(sources, splits, root)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "schema_hash": SCHEMA_HASH,
        "prospect_dst": version("prospect-dst"),
        "status": 3 if refused else 0,
        "options": asdict(options) | {"frames_root": root and os.path.abspath(root)},  # found from any folder
        "inputs": [source.manifest_entry() for source in sources],
        "splits": splits,
        "quarantined": len(refused),
        "hazards": [{"name": name, "split": split, "text": text} for name, split, text in hazards],
        "shards": [shard for _, shards, _ in written for shard in shards],
    }
    if refused:
        (staged / QUARANTINE).write_text("".join(f"{json.dumps(line)}\n" for line in refused), encoding="utf-8")
    return manifest


def _parts(source: Source, spool: str, options: Options) -> Iterator[tuple[Any, ...]]:
    """Calls of `extract`, one a part of a file; none, and a refusal, where it is not one of clips."""
    try:
        clips, broken = index(source.path)
    except ClipError as reason:
        source.refuse(None, reason, (0, source.bytes))
        return
    if broken:
        source.refuse(*broken)
    for start, end in cut(clips[:, 1] - clips[:, 0], PART_CLIPS, PART_BYTES):
        spans = clips[start:end]
        yield f"{spool}-{start}.arrow", str(source.path), spans, start, options.fps, options.recording_regex


def _map(mapper: Mapper, function: Callable[..., Any], calls: Calls, stage: str, progress: Progress) -> Iterator[Any]:
    """The mapper's results, in order."""
    progress(stage, 0, len(calls))
    with contextlib.closing(mapper(function, calls)) as results:
        for done, result in enumerate(results, 1):
            progress(stage, done, len(calls))
            yield result


def _plans(sources: list[Source], options: Options, staged: Path) -> list[Plan]:
    """A plan for each part with clips left; parts and clips numbered from 0 in each split."""
    plans = []
    clips: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for source, spool, part in [(owner, *item) for owner in sources for item in owner.parts.items()]:
        rows, split = [row for row, clip in enumerate(part) if clip.keep], source.split
        if not rows:
            continue
        for table in ("frames", "clips"):
            (staged / shard_path(table, split, 0)).parent.mkdir(parents=True, exist_ok=True)
        place = (spool, str(staged), split, numbers[split], clips[split])
        plans.append(Plan(*place, source.convention, options, np.array(rows), [part[row] for row in rows]))
        numbers[split] += 1
        clips[split] += len(rows)
    return plans
