"""What only the whole input can decide: unique ids, each file's frame convention, bounds, padding, initial states.

Works on the `ClipInfo`s of pass 1 and writes what it decides into them; a clip that cannot stay is refused here, like
a malformed one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pipeline import labels
from pipeline.errors import InputError
from pipeline.extract import NONE, ClipInfo, Extracted
from pipeline.media import count_frames, find_frames
from pipeline.options import Options
from pipeline.readers.clip import MAX_FRAME, MAX_FRAMES, ClipError, Range, check_bounds
from pipeline.state import Segment, states_before


@dataclass
class Source:
    """One input file and what is learned of it."""

    path: Path
    split: str
    bytes: int
    sha256: str = ""
    convention: str = "event"
    votes: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # turns; of those, lead-in, event, window
    counts: Counter[str] = field(default_factory=Counter)  # of clips: renamed, bounds_widened
    refused: list[dict[str, Any]] = field(default_factory=list)  # lines of quarantine.jsonl
    parts: list[Extracted] = field(default_factory=list)

    def kept(self) -> list[ClipInfo]:
        return [clip for part in self.parts for clip in part.clips if clip.keep]

    def refuse(self, clip: int | None, error: ClipError, span: Range, clip_id: str | None = None) -> None:
        """Add a line of quarantine.jsonl: where, found, expected. `clip` counts the file's clips from 0."""
        numbers = {"clip": clip, "turn": error.turn}
        where = " ".join([str(self.path), *(f"{name} {n}" for name, n in numbers.items() if n is not None)])
        line = {"file": str(self.path), "clip": clip, "clip_id": clip_id, **asdict(error)}
        line |= {"byte_start": span[0], "byte_end": span[1], "split": self.split}
        line["message"] = f"{where}: {error.field}: found {error.found}, expected {error.expected}"
        self.refused.append(line)

    def drop(self, clip: ClipInfo, error: ClipError) -> None:
        clip.keep = False
        self.refuse(clip.number, error, clip.span, clip.clip_id)

    def manifest_entry(self) -> dict[str, Any]:
        """What the manifest says of this file, and so the report."""
        turns, *fits = self.votes
        clips = [clip.clip for part in self.parts for clip in part.clips]
        ignored = Counter(name for clip in clips for name in set(clip.ignored))  # descriptive field -> clips
        schemas = Counter(info.clip.schema for info in self.kept())
        return {
            "path": str(self.path),
            "split": self.split,
            "sha256": self.sha256,
            "bytes": self.bytes,
            "clips": len(self.kept()),
            "quarantined": len(self.refused),
            "schemas": dict(sorted(schemas.items())),
            "frame_convention": self.convention,
            "votes": {"turns": turns, **dict(zip(labels.VOTED, fits, strict=True))},
            "turns_not_fitting": turns - fits[labels.VOTED.index(self.convention)],
            "fps_assumed": sum(not clip.fps_given for clip in clips),
            **{name: self.counts[name] for name in ("bounds_widened", "renamed")},
            "ignored_fields": dict(sorted(ignored.items())),
        }


def resolve(sources: list[Source], options: Options) -> None:
    """Decide on all clips. Raises InputError where no frame convention fits a file."""
    taken: dict[tuple[str, str], ClipInfo] = {}
    for source in sources:
        _unique_ids(source, taken)
        _decide_convention(source, options.frame_convention)
        _decide_bounds(source, options.bounds)
        _replay_states(source)
    if options.pad_s:
        _pad([clip for source in sources for clip in source.kept()], options)


def _unique_ids(source: Source, taken: dict[tuple[str, str], ClipInfo]) -> None:
    """Of clips of one data set with one id in one split, the first is kept; one of another data set is renamed."""
    for clip in source.kept():
        first = taken.setdefault((source.split, clip.clip_id), clip)
        if first is clip:
            continue
        longer = f"{clip.clip_id}_{clip.clip.dataset or 'unknown'}_{clip.clip.video_uid}"
        if first.clip.dataset == clip.clip.dataset or (source.split, longer) in taken:
            source.drop(clip, ClipError("clip_id", f"{clip.clip_id!r} a second time", "an id of its own"))
            continue
        taken[source.split, longer] = clip
        clip.clip_id = longer
        source.counts["renamed"] += 1


def _decide_convention(source: Source, given: str | None) -> None:
    """Let the file's valid clips vote on how start_frame and end_frame are meant."""
    clips = source.kept()
    voters = []
    for clip in clips:  # with bounds that are right in one convention at least (`window` adds a frame at the end)
        start, end = _given_or(clip, clip.extent)
        if end - start + (clip.clip.end_frame is None) > 0 and end - start <= MAX_FRAMES:
            voters.append(clip.votes)
    source.votes = np.array(voters, np.int64).reshape(-1, 4).sum(axis=0).tolist()
    decided = given or labels.decide(np.array(source.votes))
    if decided is None:
        turns, lead_in, event, window = source.votes
        raise InputError(
            f"{source.path}: found no frame convention that 90% of its {turns} timed turns follow (votes: "
            f"lead-in {lead_in}, event {event}, window {window}); say which it is with --frame-convention"
        )
    own = {clip.clip.convention for clip in clips}
    source.convention = (own.pop() if len(own) == 1 else None) or decided  # the reader's, where it placed all turns


def _given_or(clip: ClipInfo, extent: Range) -> Range:
    """The clip's bounds as given, or from `extent` what is not given."""
    start, end = (None, None) if clip.unbounded else clip.given
    return extent[0] if start is None else start, extent[1] if end is None else end


def _decide_bounds(source: Source, bounds: str) -> None:
    """Bounds from the clips, or from their turns where missing or where the file's span DST updates alone.

    The latter by a vote: 90% of the clips with bounds have just that extent, and some other turn lies outside.
    Refuses empty and absurd clips.
    """
    clips = source.kept()
    voters = [clip for clip in clips if not clip.placed and None not in clip.given]
    spans_dst = [clip for clip in voters if clip.unbounded or clip.given == clip.dst_extent]
    outside = any(clip.given != clip.extent for clip in spans_dst)
    widen = bounds == "auto" and outside and len(spans_dst) >= labels.AGREEMENT * len(voters)
    for clip in clips:
        first, last = clip.extent
        if source.convention == "lead-in" and not clip.placed:  # the event of an empty range lies before it
            first = min(first, max(clip.first_end - 1, 0))
            last = max(last, first + 1)
        start, end = _given_or(clip, (first, last))
        if clip.extent[1] != NONE and not clip.placed and (widen or bounds == "turns"):
            start, end = (first, last) if bounds == "turns" else (min(start, first), max(end, last))
        changed = None not in clip.given and (start, end) != clip.given
        clip.bounds = (start, end + (source.convention == "window" and not clip.placed))
        try:
            check_bounds(*clip.bounds)
            source.counts["bounds_widened"] += changed
        except ClipError as error:
            source.drop(clip, error)


def _replay_states(source: Source) -> None:
    """Replay the state before each clip of a file over the earlier clips of its conversation.

    Where there are none, the given state stays, unless the clip's own updates contradict it.
    """
    conversations: dict[tuple[str | None, ...], list[ClipInfo]] = {}
    for clip in source.kept():
        if clip.tracked:
            key = (clip.clip.dataset, clip.clip.video_uid, clip.clip.user)
            conversations.setdefault(key, []).append(clip)
    for group in (group for members in conversations.values() for group in _tell_apart(members)):
        if len(group) == 1:
            group[0].state = {} if group[0].contradicted else None
            continue
        segments = []
        for clip in group:
            lead_in = source.convention == "lead-in" and not clip.placed
            first = max(clip.first_end - 1, 0) if lead_in else clip.extent[0]
            updates = [
                (max(end - 1, 0) if lead_in else start, step, transition)
                for start, end, step, transition in msgspec.msgpack.decode(clip.updates)
            ]
            given = None if clip.contradicted else clip.clip.initial_state
            segments.append(Segment(clip.bounds[0] if clip.extent[1] == NONE else first, updates, given))
        for clip, state in zip(group, states_before(segments), strict=True):
            clip.state = state


def _tell_apart(members: list[ClipInfo]) -> Iterator[list[ClipInfo]]:
    """The conversations among clips of one video and user, which are one unless a clip_idx comes twice.

    Generators write several conversations of one user type without telling them apart: then a clip_idx that does not
    rise begins the next one.
    """
    numbers = [clip.clip.clip_idx for clip in members]
    begin = 0
    if len(set(numbers)) < len(numbers) and set(numbers) != {None}:
        for i, (before, number) in enumerate(pairwise(numbers), 1):
            if before is None or number is None or number <= before:
                yield members[begin:i]
                begin = i
    yield members[begin:]


def _pad(clips: list[ClipInfo], options: Options) -> None:
    """Widen clips by pad_s on both sides, up to frame 0, their neighbours, and the frames on disk if known.

    A neighbour is a clip of the same video that lies wholly before or after, in any split.
    """
    videos: dict[str, list[ClipInfo]] = {}
    for clip in clips:
        videos.setdefault(clip.clip.video_uid, []).append(clip)
    for members in videos.values():
        starts, ends = (sorted(bounds) for bounds in zip(*(clip.bounds for clip in members), strict=True))
        one, root, there = members[0].clip, options.frames_root, None  # frames on disk
        if root and (path := find_frames(Path(root), one.video_uid, one.frames_file, one.dataset)):
            there, _ = count_frames(path, one.fps)
        for clip in members:
            start, end = clip.bounds
            pad = int(options.pad_s * clip.clip.fps + labels.FLOOR_TOLERANCE)
            before, after = bisect_right(ends, start), bisect_left(starts, end)
            first = max(0, start - pad, *ends[before - 1 : before])
            last = min(MAX_FRAME if there is None else there, end + pad, *starts[after : after + 1])
            clip.bounds = first, max(end, last)
