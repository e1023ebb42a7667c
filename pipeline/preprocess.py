"""Conversations -> Parquet shards, in two passes over bounded pieces of the input.

Pass 1 (`survey`) decodes and checks clips, spools what is kept as Arrow, and collects what only the whole input
can decide: the file's frame convention, duplicate ids, every clip's neighbours and its number. Pass 2
(`write`) turns one spooled part into labels and shards. Both work on parts of at most 2,048 clips, each a
pure function of the part, so that any number of workers, here or on a cluster (cluster.py), writes the same bytes
and memory is bounded by one part per worker. The spool trades 0.4 of the input's size on disk for decoding the JSON
once.

    C clips of a part
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from pipeline import hazards
from pipeline.card import CARD
from pipeline.cluster import Mapper, pool
from pipeline.errors import InputError, UsageError
from pipeline.extract import Task, cut, survey
from pipeline.inputs import find_inputs, split_of
from pipeline.media import IMAGES, VIDEOS
from pipeline.options import Options
from pipeline.output import commit, intact, locked, read_manifest, staging
from pipeline.readers.clip import Refusal, refuse
from pipeline.readers.index import Index, index
from pipeline.resolve import Part, Source, decide, part_of
from pipeline.schema import QUARANTINE, SCHEMA_HASH, SCHEMA_VERSION, shard_path
from pipeline.shards import Plan, Written, merged, write_part
from pipeline.storage import sha256
from pipeline.summary import summary_of

PART_CLIPS: Final = 2048
PART_BYTES: Final = 512 << 20  # of JSON; only absurdly large clips reach it

Progress = Callable[[str, int, int], None]  # (what, done, of)


def preprocess(
    inputs: list[Path],
    out: Path,
    options: Options | None = None,
    workers: int = 1,
    progress: Progress = lambda what, done, of: None,
    mapper: Mapper | None = None,
) -> tuple[dict[str, Any], bool]:
    """Write the shards of `inputs` to `out`; returns (manifest, whether an unchanged input was skipped).

    The parts are done by `workers` processes here, or by `mapper` where one is given.
    Raises InputError (nothing usable, cannot write, --on-error fail) and UsageError (no split to be told).
    """
    options = options or Options()
    files, skipped = find_inputs(inputs, options)
    sources = [_source(path, options) for path in files]
    _check_rates(options, {source.split for source in sources})
    for number, source in enumerate(sources):
        progress("hashing", number, len(sources))
        try:
            source.sha256 = sha256(source.path)
        except OSError as error:
            raise _unreadable(source.path, error) from None
    key = _key(sources, options)
    with locked(out):
        before = read_manifest(out)
        if before and before.get("key") == key and (out / CARD).exists() and intact(out):
            return before, True
        with staging(out) as folder:
            manifest = _Run(sources, options, folder, mapper or pool(workers), progress).manifest(key)
            manifest["skipped"] = [{"path": str(path), "why": why} for path, why in skipped]
            commit(folder, out, manifest)
    return manifest, False


def _check_rates(options: Options, splits: set[str]) -> None:
    """A misspelt split must not cost its rate in silence."""
    if unknown := sorted(set(options.neg_rate) - splits - {"*", "train", "val", "test"}):
        there = ", ".join(sorted(splits))
        raise UsageError(f"--neg-rate {unknown[0]}=...: no such split, expected one of the inputs' ({there})")


# ---- inputs ------------------------------------------------------------------------------------------


def _source(path: Path, options: Options) -> Source:
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return Source(path, split_of(path, options), stat.st_size, stat.st_mtime_ns)


def _unreadable(path: Path, error: OSError | ValueError) -> InputError:
    why = error.strerror if isinstance(error, OSError) else error
    return InputError(f"{path}: cannot be read: {why}; check the path")


def _key(sources: list[Source], options: Options) -> str:
    """What the output is a function of, hashed."""
    inputs = [(source.path.name, source.split, source.sha256) for source in sources]
    on_disk = _listing(Path(options.frames_root)) if options.frames_root else []
    told = [SCHEMA_HASH, version("prospect-dst"), asdict(options), inputs, on_disk]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _listing(root: Path) -> list[tuple[str, int]]:
    """Name and size of every file that may hold frames; links are followed, those that lead nowhere left out."""
    found, seen = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        paths = [os.path.join(folder, name) for name in names if name.lower().endswith((".arrow", *VIDEOS, *IMAGES))]
        found += [(os.path.relpath(path, root), os.path.getsize(path)) for path in paths if os.path.exists(path)]
    return sorted(found)


# ---- a run -------------------------------------------------------------------------------------------


class _Run:
    """Two passes and the decisions between them."""

    def __init__(
        self, sources: list[Source], options: Options, staging: Path, mapper: Mapper, progress: Progress
    ) -> None:
        self.sources, self.options, self.staging = sources, options, staging
        self.mapper, self.progress = mapper, progress
        self.spool = staging / "spool"
        self.spool.mkdir()

    def manifest(self, key: str) -> dict[str, Any]:
        """Do the work; everything but the manifest is in the staging folder afterwards."""
        owners, tasks = self._tasks()
        surveys = self._map(survey, [(task, self.options.recording_regex) for task in tasks], "reading")
        self._check_unchanged()
        parts = [part_of(*known) for known in zip(owners, tasks, surveys, strict=True)]
        self.context = decide(self.sources, parts, self.options)
        plans = self._number(parts)
        refused = self._refused(plans)
        written = self._map(write_part, [(plan,) for plan in plans], "writing")
        shutil.rmtree(self.spool, ignore_errors=True)
        manifest = self._told(key, parts, written, refused)
        if refused:
            manifest["quarantine_sha256"] = _write_quarantine(self.staging / QUARANTINE, refused)
        return manifest

    def _told(self, key: str, parts: list[Part], written: list[Written], refused: list[Refusal]) -> dict[str, Any]:
        splits = merged(written)
        return {
            "schema_version": SCHEMA_VERSION,
            "schema_hash": SCHEMA_HASH,
            "prospect_dst": version("prospect-dst"),
            "key": key,
            "status": 3 if refused else 0,
            "options": asdict(self.options),
            "inputs": [source.summary() for source in self.sources],
            "splits": splits,
            "quarantined": len(refused),
            "hazards": self._hazards(parts, splits),
            "shards": [shard for part in written for shard in part.shards],
        }

    def _hazards(self, parts: list[Part], splits: dict[str, dict[str, Any]]) -> list[hazards.Hazard]:
        """The data's hazards; notes each split's number of recordings on the way."""
        recordings: dict[str, set[str]] = {}
        files: dict[str, dict[tuple[str | None, ...], set[str]]] = {}  # split -> conversation -> files that hold it
        videos: dict[hazards.Video, int] = {}
        for part in parts:
            split, known = part.source.split, part.survey
            for i in np.flatnonzero(part.keep).tolist():
                recordings.setdefault(split, set()).add(known.recording_ids[i])
                head = known.heads[i]
                if head.user is not None and head.annotated:
                    conversation = (head.dataset, head.video_uid, head.user)
                    files.setdefault(split, {}).setdefault(conversation, set()).add(str(part.source.path))
                where = (head.video_uid, head.frames_file, head.dataset or "unknown")
                video = hazards.Video(split, *where, float(known.fps[i]))
                videos[video] = max(videos.get(video, 0), int(part.bounds[i, 1]))
        for split, names in recordings.items():
            splits[split]["recordings"] = len(names)
        by_name = {split.name: split for split in summary_of({"splits": splits}).splits}
        found = [hazard for name in splits for hazard in hazards.of_labels(by_name[name])]
        found += [hazard for name, counts in self.context.items() for hazard in hazards.of_context(name, counts)]
        found += [hazard for split, held in files.items() for hazard in hazards.of_variants(split, held)]
        found += hazards.of_recordings(recordings)
        if self.options.frames_root:
            found += hazards.of_frames(Path(self.options.frames_root), videos)
        return found

    def _map(self, function: Callable[..., Any], calls: list[tuple[Any, ...]], what: str) -> list[Any]:
        """The mapper's results, in order."""
        results: list[Any] = []
        self.progress(what, 0, len(calls))
        with closing(self.mapper(function, calls)) as coming:
            for result in coming:
                results.append(result)
                self.progress(what, len(results), len(calls))
        return results

    def _tasks(self) -> tuple[list[Source], list[Task]]:
        owners, tasks = [], []
        for number, source in enumerate(self.sources):
            found = self._index(source)
            if found is None:
                continue
            for start, end in cut(found.spans, PART_CLIPS, PART_BYTES):
                spool = self.spool / f"{number}-{start}.arrow"
                owners.append(source)
                tasks.append(Task(str(source.path), found.spans[start:end], start, str(spool), self.options.fps))
        return owners, tasks

    def _index(self, source: Source) -> Index | None:
        """Where the file's clips lie; None (and a refusal) where it is no such file and others are there."""
        try:
            found = index(source.path)
        except InputError as error:
            if len(self.sources) == 1 or self.options.on_error == "fail":
                raise
            what = str(error).removeprefix(f"{source.path}: ").removeprefix("found ")
            source.refuse(Refusal(str(source.path), None, None, None, "file", what, "clips", 0, source.bytes))
            return None
        source.form = found.form
        for number, broken, span in found.broken:
            source.refuse(refuse(str(source.path), number, broken, span))
        return found

    def _check_unchanged(self) -> None:
        for source in self.sources:
            stat = source.path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (source.bytes, source.mtime_ns):
                raise InputError(f"{source.path}: changed while it was read; run again once it is complete")

    def _number(self, parts: list[Part]) -> list[Plan]:
        """A plan for each part with clips left; parts and clips numbered from 0 in each split."""
        plans = []
        clips: Counter[str] = Counter()
        numbers: Counter[str] = Counter()
        for part in parts:
            kept, split = int(part.keep.sum()), part.source.split
            part.source.clips += kept
            if not kept:
                continue
            staging, convention = str(self.staging), part.source.convention
            if not numbers[split]:
                self._make_folders(split)
            where = (part.task.spool, staging, split, numbers[split])
            plans.append(
                Plan(*where, convention, part.keep, part.bounds, clips[split], self.options, part.states, part.renamed)
            )
            numbers[split] += 1
            clips[split] += kept
        return plans

    def _make_folders(self, split: str) -> None:
        for table in ("frames", "clips"):
            (self.staging / shard_path(table, split, 0)).parent.mkdir(parents=True)

    def _refused(self, plans: list[Plan]) -> list[Refusal]:
        """All refusals in input order. Raises InputError where they must stop the run."""
        refused = [r for s in self.sources for r in sorted(s.refused, key=lambda r: (r.byte_start, r.clip or 0))]
        if refused and self.options.on_error == "fail":
            raise InputError(f"{refused[0]}; fix the source and run again, or drop --on-error fail")
        if not plans:
            names = ", ".join(str(source.path) for source in self.sources)
            first = f"; the first of {len(refused)} refused: {refused[0]}" if refused else ""
            raise InputError(f"{names}: found no usable clip, expected at least one{first}")
        return refused


def _write_quarantine(path: Path, refused: list[Refusal]) -> str:
    """One line per refusal; returns the file's SHA-256."""
    lines = [json.dumps({**msgspec.structs.asdict(refusal), "message": str(refusal)}) for refusal in refused]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sha256(path)
