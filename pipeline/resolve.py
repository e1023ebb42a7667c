"""What only the whole input can decide: unique ids, each file's frame convention, bounds, padding, initial states.

Works on what pass 1 kept of each clip (`Survey`); a clip that cannot stay is refused here, like a malformed one.

    C clips of a part
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import hazards, labels
from pipeline.errors import InputError
from pipeline.extract import NOT_GIVEN, Head, Survey, Task, absent, spooled_turns
from pipeline.media import count_frames, find_frames
from pipeline.options import Options
from pipeline.readers.clip import MAX_FRAME, MAX_FRAMES, ClipError, Refusal, check_size, refuse
from pipeline.schema import ROLES
from pipeline.state import NOT_STARTED, Segment, lacks, states_before


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
    bounds_widened: int = 0
    renamed: int = 0  # clips whose id a clip of another data set has
    ignored: Counter[str] = field(default_factory=Counter)  # descriptive field -> clips where its type says nothing
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
            "bounds_widened": self.bounds_widened,
            "renamed": self.renamed,
            "ignored_fields": dict(sorted(self.ignored.items())),
        }


@dataclass
class Part:
    """One part between the passes: C clips, which of them are kept, and their bounds."""

    source: Source
    task: Task
    survey: Survey
    keep: np.ndarray  # bool [C]
    bounds: np.ndarray  # int64 [C, 2]; -1 where neither given nor seen
    states: dict[int, dict[str, str]] = field(default_factory=dict)  # clip -> its replayed initial state
    renamed: dict[int, str] = field(default_factory=dict)  # clip -> its id, where another data set has the given one
    broken: int = 0  # clips whose replayed state lacks what their updates need

    def refuse(self, i: int, error: ClipError) -> None:
        """Drop clip `i` of the part."""
        place = self.survey.place[i]
        number, (start, end) = self.task.first + int(place), self.task.spans[place].tolist()
        self.keep[i] = False
        self.source.refuse(refuse(self.task.file, number, error, (start, end), self.survey.clip_ids[i]))


def decide(sources: list[Source], parts: list[Part], options: Options) -> dict[str, hazards.ContextCounts]:
    """Decide for all clips; returns the counts of the context leak audit by split."""
    _refuse_duplicates(parts)
    for source in sources:
        mine = [part for part in parts if part.source is source]
        _decide_convention(source, mine, options.frame_convention)
        _decide_bounds(source, mine, options.bounds)
        _replay_states(mine)
    if options.pad_s:
        _pad(parts, options)
    context: dict[str, hazards.ContextCounts] = {}
    for part in parts:
        _count_context(part, context.setdefault(part.source.split, hazards.ContextCounts()))
    return context


def part_of(source: Source, task: Task, found: Survey) -> Part:
    for refusal in found.refused:
        source.refuse(refusal)
    for head in found.heads:
        source.fps_assumed += not head.fps_given
        source.ignored.update(set(head.ignored))
    return Part(source, task, found, np.ones(len(found.clip_ids), bool), found.given.copy())


def _refuse_duplicates(parts: list[Part]) -> None:
    """Of clips of one data set with one id in one split, the first is kept; one of another data set is renamed."""
    taken: dict[str, dict[str, Head]] = {}
    for part in parts:
        names = taken.setdefault(part.source.split, {})
        for i, (name, head) in enumerate(zip(part.survey.clip_ids, part.survey.heads, strict=True)):
            first = names.setdefault(name, head)
            if first is head:
                continue
            longer = f"{name}_{head.dataset or 'unknown'}_{head.video_uid}"
            if first.dataset == head.dataset or longer in names:
                part.refuse(i, ClipError("clip_id", f"{name!r} a second time", "an id of its own"))
                continue
            names[longer] = head
            part.survey.clip_ids[i] = part.renamed[i] = longer
            part.source.renamed += 1


def _decide_convention(source: Source, parts: list[Part], given: str | None) -> None:
    """Let the file's valid clips vote on how start_frame and end_frame are meant."""
    own: set[str | None] = set()
    for part in parts:
        source.votes += part.survey.votes[part.keep & _may_be_valid(part)].sum(axis=0)
        heads = [part.survey.heads[i] for i in np.flatnonzero(part.keep).tolist()]
        source.schemas.update(head.schema for head in heads)
        own |= {head.convention for head in heads}
    decided = given or labels.decide(source.votes)
    if decided is None:
        total, lead_in, event, window = source.votes.tolist()
        raise InputError(
            f"{source.path}: found no frame convention that 90% of its {total} timed turns follow (votes: "
            f"lead-in {lead_in}, event {event}, window {window}); say which it is with --frame-convention"
        )
    source.convention = decided
    if len(own) == 1 and (only := own.pop()) is not None:
        source.convention = only  # the reader placed all turns


def _may_be_valid(part: Part) -> np.ndarray:
    """bool [C]: clips whose bounds are right in one convention at least (`window` adds a frame at the end)."""
    known = part.survey
    bounds = np.where(_absent(known)[:, None] | (known.given == NOT_GIVEN), known.seen, known.given)
    sizes = bounds[:, 1] - bounds[:, 0]
    return (sizes + (known.given[:, 1] == NOT_GIVEN) > 0) & (sizes <= MAX_FRAMES)


def _absent(known: Survey) -> np.ndarray:
    return absent(known.given, known.seen, known.dst_seen)


def _decide_bounds(source: Source, parts: list[Part], bounds: str) -> None:
    """Bounds from the clips, or from their turns where missing or where the file's span DST updates alone.

    The latter by a vote: 90% of the clips with bounds have just that extent, and some other turn lies outside.
    Refuses empty and absurd clips.
    """
    voters = matching = outside = 0
    for part in parts:
        known = part.survey
        which = part.keep & ~known.placed & (known.given != NOT_GIVEN).all(axis=1)
        fits = which & (_absent(known) | (known.given == known.dst_seen).all(axis=1))
        voters += int(which.sum())
        matching += int(fits.sum())
        outside += int((fits & (known.seen != known.given).any(axis=1)).sum())
    dst_alone = outside > 0 and matching >= labels.AGREEMENT * voters
    for part in parts:
        known = part.survey
        inclusive = (source.convention == "window") & ~known.placed
        seen, nothing = known.seen, (known.given == NOT_GIVEN) | _absent(known)[:, None]
        if source.convention == "lead-in":  # the event of an empty range lies before it
            first = np.where(known.placed, seen[:, 0], np.minimum(seen[:, 0], np.maximum(known.first_end - 1, 0)))
            seen = np.stack([first, np.maximum(seen[:, 1], first + 1)], axis=1)
        found = np.where(nothing, seen, known.given)
        some = ((known.seen[:, 1] != NOT_GIVEN) & ~known.placed)[:, None]
        if bounds == "turns":
            found = np.where(some, seen, found)
        elif bounds == "auto" and dst_alone:
            wider = np.stack([np.minimum(found[:, 0], seen[:, 0]), np.maximum(found[:, 1], seen[:, 1])], axis=1)
            found = np.where(some, wider, found)
        part.bounds = found + np.stack([np.zeros_like(inclusive), inclusive], axis=1)
        _check_bounds(part)
        changed = (known.given != NOT_GIVEN).all(axis=1) & (found != known.given).any(axis=1)
        source.bounds_widened += int((part.keep & changed).sum())


def _check_bounds(part: Part) -> None:
    sizes = part.bounds[:, 1] - part.bounds[:, 0]
    for i in np.flatnonzero(
        part.keep & ((sizes <= 0) | (sizes > MAX_FRAMES) | (part.bounds[:, 1] > MAX_FRAME))
    ).tolist():
        try:
            check_size(*part.bounds[i].tolist())
        except ClipError as error:
            part.refuse(i, error)


# ---- initial states ----------------------------------------------------------------------------------


def _replay_states(parts: list[Part]) -> None:
    """Replay the state before each clip of a file over the earlier clips of its conversation.

    Where there are none, the given state stays, unless the clip's own updates contradict it.
    """
    conversations: dict[tuple[str | None, ...], list[tuple[Part, int]]] = {}
    for part in parts:
        for i in np.flatnonzero(part.keep).tolist():
            head = part.survey.heads[i]
            if head.tracked:
                conversations.setdefault((head.dataset, head.video_uid, head.user), []).append((part, i))
    alone = [members[0] for members in conversations.values() if len(members) == 1]
    groups = [group for members in conversations.values() if len(members) > 1 for group in _told_apart(members)]
    several = [group for group in groups if len(group) > 1]
    for part, i in [*alone, *(group[0] for group in groups if len(group) == 1)]:
        if part.survey.heads[i].contradicted:
            part.states[i] = {}
    segments = _segments([member for group in several for member in group])
    for group in several:
        for (part, i), state in zip(group, states_before([segments[id(part), i] for part, i in group]), strict=True):
            part.states[i] = state
            updates = ((step, transition) for _, step, transition in segments[id(part), i].updates)
            part.broken += lacks(state, updates)


def _told_apart(members: list[tuple[Part, int]]) -> list[list[tuple[Part, int]]]:
    """The conversations among clips of one video and user, which are one unless a clip_idx comes twice.

    Generators write several conversations of one user type without telling them apart: then a clip_idx that does not
    rise begins the next one.
    """
    numbers = [part.survey.heads[i].clip_idx for part, i in members]
    if len(set(numbers)) == len(numbers) or set(numbers) == {None}:
        return [members]
    groups: list[list[tuple[Part, int]]] = []
    before: int | None = None
    for member, number in zip(members, numbers, strict=True):
        if before is None or number is None or number <= before:
            groups.append([])
        groups[-1].append(member)
        before = number
    return groups


def _segments(members: list[tuple[Part, int]]) -> dict[tuple[int, int], Segment]:
    """What `states_before` needs of some clips, by (id of the part, clip), from the spooled turns."""
    by_part: dict[int, tuple[Part, list[int]]] = {}
    for part, i in members:
        by_part.setdefault(id(part), (part, []))[1].append(i)
    segments = {}
    for part, clips in by_part.values():
        ordered = np.array(sorted(clips))
        updates: list[list[tuple[int, str, str]]] = [[] for _ in clips]
        firsts = [int(part.bounds[i, 0]) for i in ordered]
        seen = [False] * len(clips)
        for turns in spooled_turns(part.task.spool, ordered):
            moved, _ = labels.canonical(part.source.convention, turns.start, turns.end)
            start = np.where(part.survey.placed[ordered[turns.owner]], turns.start, moved)
            framed = (turns.end != labels.NO_FRAMES[1]) & (turns.role != ROLES.index("system"))
            for turn in np.flatnonzero(framed).tolist():
                own, frame = int(turns.owner[turn]), int(start[turn])
                firsts[own] = min(firsts[own], frame) if seen[own] else frame
                seen[own] = True
                updates[own] += [(frame, update["id"], update["transition"]) for update in turns.updates[turn]]
        for own, i in enumerate(ordered.tolist()):
            head = part.survey.heads[i]
            segments[id(part), i] = Segment(firsts[own], updates[own], None if head.contradicted else head.given)
    return segments


# ---- hazards -----------------------------------------------------------------------------------------


def _count_context(part: Part, counts: hazards.ContextCounts) -> None:
    """Add the part's counts for the context leak audit."""
    counts.spoken += part.survey.spoken
    counts.echoed += part.survey.echoed
    counts.broken_states += part.broken
    for i in np.flatnonzero(part.keep).tolist():
        head = part.survey.heads[i]
        given_away, decisions, verbatim = head.given_away
        counts.given_away += given_away
        counts.decisions += decisions
        counts.verbatim += given_away if verbatim else 0
        counts.clips += 1
        counts.wrong_system += head.system_contradicted
        if head.given is not None:
            counts.given_states += 1
            counts.wrong_states += head.contradicted or _differs(head.given, part.states.get(i))


def _differs(given: Mapping[str, str], replayed: Mapping[str, str] | None) -> bool:
    if replayed is None:
        return False
    steps = {*given, *replayed}
    return any(given.get(step, NOT_STARTED) != replayed.get(step, NOT_STARTED) for step in steps)


def _pad(parts: list[Part], options: Options) -> None:
    """Widen clips by pad_s on both sides, up to frame 0, their neighbours, and the frames on disk if known.

    A neighbour is a clip of the same video that lies wholly before or after, in any split.
    """
    videos: dict[str, list[tuple[Part, int]]] = {}
    for part in parts:
        for i in np.flatnonzero(part.keep).tolist():
            videos.setdefault(part.survey.heads[i].video_uid, []).append((part, i))
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
    head = known.heads[i]
    path = find_frames(Path(root), head.video_uid, head.frames_file, head.dataset) if root else None
    return count_frames(path, float(known.fps[i])) if path else None
