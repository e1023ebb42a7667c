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
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from pipeline import hazards, labels
from pipeline.card import CARD
from pipeline.cluster import Mapper, pool
from pipeline.errors import InputError, UsageError
from pipeline.media import IMAGES, VIDEOS, count_frames, find_frames
from pipeline.options import Options
from pipeline.read import MAX_FRAME, MAX_FRAMES, ClipError, Index, Refusal, check_size, index, refuse
from pipeline.schema import QUARANTINE, SCHEMA_HASH, SCHEMA_VERSION, shard_path
from pipeline.shards import commit, intact, locked, read_manifest, sha256, staging
from pipeline.summary import label_hazards, summary_of
from pipeline.survey import NOT_GIVEN, Survey, Task, cut, survey
from pipeline.write import Plan, Written, merged, write_part

PART_CLIPS: Final = 2048
PART_BYTES: Final = 512 << 20  # of JSON; only absurdly large clips reach it
_SPLIT = re.compile(r"(train|val|test)(?![a-z0-9])")

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
    sources = [_source(path, options) for path in _expand(inputs, options)]
    _check_rates(options, {source.split for source in sources})
    for number, source in enumerate(sources):
        progress("hashing", number, len(sources))
        source.sha256 = sha256(source.path)
    key = _key(sources, options)
    with locked(out):
        before = read_manifest(out)
        if before and before.get("key") == key and (out / CARD).exists() and intact(out):
            return before, True
        with staging(out) as folder:
            manifest = _Run(sources, options, folder, mapper or pool(workers), progress).manifest(key)
            commit(folder, out, manifest)
    return manifest, False


def _check_rates(options: Options, splits: set[str]) -> None:
    """A misspelt split must not cost its rate in silence."""
    if unknown := sorted(set(options.neg_rate) - splits - {"*", "train", "val", "test"}):
        there = ", ".join(sorted(splits))
        raise UsageError(f"--neg-rate {unknown[0]}=...: no such split, expected one of the inputs' ({there})")


# ---- inputs ------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One input file and what pass 1 learns of it."""

    path: Path
    split: str
    bytes: int
    mtime_ns: int
    sha256: str = ""
    form: str = "unreadable"
    clips: int = 0
    schemas: Counter[str] = field(default_factory=Counter)
    convention: str = "event"
    votes: np.ndarray = field(default_factory=lambda: np.zeros(4, np.int64))
    fps_assumed: int = 0
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, refusal: Refusal) -> None:
        refusal.split = self.split
        self.refused.append(refusal)

    def summary(self) -> dict[str, Any]:
        """This file's entry in the manifest."""
        total, lead_in, event, window = (int(v) for v in self.votes)
        return {
            "path": str(self.path),
            "split": self.split,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "form": self.form,
            "clips": self.clips,
            "quarantined": len(self.refused),
            "schemas": {name: count for name, count in sorted(self.schemas.items()) if count},
            "frame_convention": self.convention,
            "votes": {"turns": total, "lead-in": lead_in, "event": event, "window": window},
            "turns_not_fitting": total - labels.fitting(self.convention, self.votes),
            "fps_assumed": self.fps_assumed,
        }


def _expand(inputs: list[Path], options: Options) -> Iterator[Path]:
    """Files as they are; a folder stands for the JSON files in it whose names tell a split."""
    for path in inputs:
        if not path.is_dir():
            yield path
            continue
        found = sorted(p for p in path.iterdir() if p.suffix in (".json", ".jsonl") and p.is_file())
        found = [p for p in found if options.split or _SPLIT.match(p.name)]
        if not found:
            raise InputError(
                f"{path}: found a folder without train_*.json, val_*.json or test_*.json; name the files themselves"
            )
        yield from found


def _source(path: Path, options: Options) -> Source:
    match = _SPLIT.match(path.name)
    split = options.split or (match[1] if match else None)
    try:
        stat = path.stat()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path}: cannot be read: {why}; check the path") from None
    if split is None:
        raise UsageError(
            f"{path}: the file name tells no split (expected train_..., val_... or test_...); give --split"
        )
    return Source(path, split, stat.st_size, stat.st_mtime_ns)


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


@dataclass
class _Part:
    """One part between the passes: C clips, which of them are kept, and their bounds."""

    source: Source
    task: Task
    survey: Survey
    keep: np.ndarray  # bool [C]
    bounds: np.ndarray  # int64 [C, 2]; -1 where neither given nor seen

    def refuse(self, i: int, error: ClipError) -> None:
        """Drop clip `i` of the part."""
        place = self.survey.place[i]
        number, (start, end) = int(self.task.numbers[place]), self.task.spans[place].tolist()
        self.keep[i] = False
        self.source.refuse(refuse(self.task.file, number, error, (start, end), self.survey.clip_ids[i]))


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
        parts = [_part(*known) for known in zip(owners, tasks, surveys, strict=True)]
        self._decide(parts)
        plans = self._number(parts)
        refused = self._refused(plans)
        written = self._map(write_part, [(plan,) for plan in plans], "writing")
        shutil.rmtree(self.spool, ignore_errors=True)
        manifest = self._told(key, parts, written, refused)
        if refused:
            manifest["quarantine_sha256"] = _write_quarantine(self.staging / QUARANTINE, refused)
        return manifest

    def _told(self, key: str, parts: list[_Part], written: list[Written], refused: list[Refusal]) -> dict[str, Any]:
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

    def _hazards(self, parts: list[_Part], splits: dict[str, dict[str, Any]]) -> list[hazards.Hazard]:
        """The data's hazards; notes each split's number of recordings on the way."""
        recordings: dict[str, set[str]] = {}
        videos: dict[hazards.Video, int] = {}
        for part in parts:
            split, known = part.source.split, part.survey
            for i in np.flatnonzero(part.keep).tolist():
                recordings.setdefault(split, set()).add(known.recording_ids[i])
                video = hazards.Video(
                    split, known.video_uids[i], known.frames_files[i], known.datasets[i], float(known.fps[i])
                )
                videos[video] = max(videos.get(video, 0), int(part.bounds[i, 1]))
        for split, names in recordings.items():
            splits[split]["recordings"] = len(names)
        by_name = {split.name: split for split in summary_of({"splits": splits}).splits}
        found = [hazard for name in splits for hazard in label_hazards(by_name[name])]
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
                tasks.append(Task(str(source.path), found.spans[start:end], found.numbers[start:end], str(spool)))
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

    def _decide(self, parts: list[_Part]) -> None:
        """Unique ids, each file's frame convention, every clip's bounds: all that needs the whole input."""
        _refuse_duplicates(parts)
        for source in self.sources:
            mine = [part for part in parts if part.source is source]
            _decide_convention(source, mine, self.options.frame_convention)
            for part in mine:
                _decide_bounds(part)
        if self.options.pad_s:
            _pad(parts, self.options)

    def _number(self, parts: list[_Part]) -> list[Plan]:
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
            plans.append(Plan(*where, convention, part.keep, part.bounds, clips[split], self.options))
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


def _part(source: Source, task: Task, found: Survey) -> _Part:
    for refusal in found.refused:
        source.refuse(refusal)
    source.fps_assumed += found.fps_assumed
    return _Part(source, task, found, np.ones(len(found.clip_ids), bool), found.given.copy())


def _refuse_duplicates(parts: list[_Part]) -> None:
    """Of clips with one id in one split, the first is kept."""
    taken: dict[str, set[str]] = {}
    for part in parts:
        names = taken.setdefault(part.source.split, set())
        for i, name in enumerate(part.survey.clip_ids):
            if name in names:
                part.refuse(i, ClipError("clip_id", f"{name!r} a second time", "an id of its own"))
            names.add(name)


def _decide_convention(source: Source, parts: list[_Part], given: str | None) -> None:
    """Let the file's valid clips vote on how start_frame and end_frame are meant."""
    for part in parts:
        source.votes += part.survey.votes[part.keep & _may_be_valid(part)].sum(axis=0)
        source.schemas["proassist"] += int(part.survey.proassist[part.keep].sum())
        source.schemas["prospect"] += int((~part.survey.proassist[part.keep]).sum())
    decided = given or labels.decide(source.votes)
    if decided is None:
        total, lead_in, event, window = source.votes.tolist()
        raise InputError(
            f"{source.path}: found no frame convention that 90% of its {total} timed turns follow (votes: "
            f"lead-in {lead_in}, event {event}, window {window}); say which it is with --frame-convention"
        )
    source.convention = decided
    if set(source.schemas) and not source.schemas["prospect"]:
        source.convention = "lead-in"  # how ProAssist's `frames` turns are read


def _may_be_valid(part: _Part) -> np.ndarray:
    """bool [C]: clips whose bounds are right in one convention at least (`window` adds a frame at the end)."""
    bounds = np.where(part.survey.given == NOT_GIVEN, part.survey.seen, part.survey.given)
    sizes = bounds[:, 1] - bounds[:, 0]
    return (sizes + (part.survey.given[:, 1] == NOT_GIVEN) > 0) & (sizes <= MAX_FRAMES)


def _decide_bounds(part: _Part) -> None:
    """Infer missing bounds from the turns, in the convention's terms; refuse empty and absurd clips."""
    inclusive = (part.source.convention == "window") & ~part.survey.proassist
    seen = part.survey.seen + np.stack([np.zeros_like(inclusive), inclusive], axis=1)
    part.bounds = np.where(part.survey.given == NOT_GIVEN, seen, part.survey.given)
    sizes = part.bounds[:, 1] - part.bounds[:, 0]
    for i in np.flatnonzero(
        part.keep & ((sizes <= 0) | (sizes > MAX_FRAMES) | (part.bounds[:, 1] > MAX_FRAME))
    ).tolist():
        try:
            check_size(*part.bounds[i].tolist())
        except ClipError as error:
            part.refuse(i, error)


def _pad(parts: list[_Part], options: Options) -> None:
    """Widen clips by pad_s on both sides, up to frame 0, their neighbours, and the frames on disk if known.

    A neighbour is a clip of the same video that lies wholly before or after, in any split.
    """
    videos: dict[str, list[tuple[_Part, int]]] = {}
    for part in parts:
        for i in np.flatnonzero(part.keep).tolist():
            videos.setdefault(part.survey.video_uids[i], []).append((part, i))
    for members in videos.values():
        spans = np.array([part.bounds[i] for part, i in members])
        starts, ends = np.sort(spans[:, 0]), np.sort(spans[:, 1])
        first, i = members[0]
        there = _frames_there(options.frames_root, first.survey, i)
        for (part, i), (start, end) in zip(members, spans.tolist(), strict=True):
            pad = int(min(options.pad_s * part.survey.fps[i] + labels.FLOOR_TOLERANCE, MAX_FRAMES))
            before, after = np.searchsorted(ends, start, "right"), np.searchsorted(starts, end, "left")
            least = int(ends[before - 1]) if before else 0
            most = int(starts[after]) if after < len(starts) else end + pad
            most = most if there is None else max(end, min(most, there))
            part.bounds[i] = (max(least, start - pad), min(most, end + pad, MAX_FRAME))


def _frames_there(root: str | None, known: Survey, i: int) -> int | None:
    names = (known.video_uids[i], known.frames_files[i], known.datasets[i])
    path = find_frames(Path(root), *names) if root else None
    return count_frames(path, float(known.fps[i])) if path else None


def _write_quarantine(path: Path, refused: list[Refusal]) -> str:
    """One line per refusal; returns the file's SHA-256."""
    lines = [json.dumps({**msgspec.structs.asdict(refusal), "message": str(refusal)}) for refusal in refused]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sha256(path)
