"""The hazards of the data by name: what a model could learn instead of the task, or what a number could hide.

A hazard never changes a label. `preprocess` tells them all; `inspect` tells again what the shards alone can show,
through the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.media import count_frames, find_frames
from pipeline.terminal import percent, plain

IMPLAUSIBLE_RATE: Final = 0.5  # positive share of a head's frames: probably read in the wrong convention
MOST_CLIPS: Final = 0.5  # share of clips that begin on an event: a position shortcut
COINCIDE: Final = 0.8  # of one head's positives also positive for the other: comparisons mean little
NAMED: Final = 3  # examples in a hazard's text

Hazard = dict[str, str]  # name, split, text


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """One head in one split; clips that say nothing about the head are left out."""

    clips: int
    frames: int
    positives: int


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """One split: clips, those whose first frame is positive for either head, frames positive for both."""

    clips: int
    first: int
    both: int
    heads: Mapping[str, HeadCounts]  # speaking, DST


def of_labels(split: str, counts: LabelCounts) -> Iterator[Hazard]:
    """Hazards that the label counts of a split show."""
    for name, head in counts.heads.items():
        if not head.clips:
            text = f"no clip says anything about {name}: that head learns nothing here"
            yield _hazard("head without positives", split, text)
        elif not head.positives:
            text = f"no frame is positive for {name}: that head learns only silence, its AP is undefined"
            yield _hazard("head without positives", split, text)
        elif head.positives > IMPLAUSIBLE_RATE * head.frames:
            text = (
                f"{percent(head.positives / head.frames)} of frames are positive for {name}: look at a timeline "
                "(inspect --clip), then perhaps set --frame-convention"
            )
            yield _hazard("implausible positive rate", split, text)
    if counts.first > MOST_CLIPS * counts.clips:
        text = (
            f"{counts.first:,} of {counts.clips:,} clips begin on an event: a model can learn the position instead; "
            "--pad-s widens the clips"
        )
        yield _hazard("events at the first frame", split, text)
    name, head = min(counts.heads.items(), key=lambda item: item[1].positives)
    if head.positives and counts.both >= COINCIDE * head.positives:
        text = (
            f"{counts.both:,} of {head.positives:,} {name} frames are positive for both heads: judge "
            "speak-only, DST-only and both apart"
        )
        yield _hazard("heads coincide", split, text)


def of_recordings(splits: Mapping[str, set[str]]) -> Iterator[Hazard]:
    """Recordings (by split) that stand in more than one split."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(set().union(*splits.values())):
        where = tuple(sorted(split for split, found in splits.items() if name in found))
        if len(where) > 1:
            together.setdefault(where, []).append(name)
    for where, names in sorted(together.items()):
        text = (
            f"{_count(names, 'recording')} in {' and '.join(where)}, e.g. {plain(', '.join(names[:NAMED]))}: "
            "results flatter; split by recording"
        )
        yield _hazard("recording in several splits", "+".join(where), text)


class Video(NamedTuple):
    """What the frames of a split's video are looked up by."""

    split: str
    uid: str
    frames_file: str | None
    dataset: str
    fps: float


def of_frames(root: Path, videos: Mapping[Video, int]) -> Iterator[Hazard]:
    """Annotations against the frames below `root`; videos: each with its last annotated frame + 1."""
    problems: dict[tuple[str, str], list[str]] = {}
    for (split, uid, frames_file, dataset, fps), end in videos.items():
        path = find_frames(root, uid, frames_file, dataset)
        there = count_frames(path, fps) if path else None
        if path is None:
            problems.setdefault(("frames missing", split), []).append(uid)
        elif there is None:
            problems.setdefault(("frames unreadable", split), []).append(str(path))
        elif there < end:
            text = f"{uid} (annotated to {end:,}, has {there:,})"
            problems.setdefault(("annotations longer than the frames", split), []).append(text)
    for (name, split), which in sorted(problems.items()):
        text = f"{name}: {_count(which, 'video')} below {root}, e.g. {plain(', '.join(which[:NAMED]))}"
        yield _hazard(name, split, text)


def merged(told: Iterable[Hazard], order: Iterable[str]) -> list[Hazard]:
    """Hazards without repeats, by split in `order`, those of several splits last."""
    known = {split: i for i, split in enumerate(order)}
    unique: dict[tuple[str, str], Hazard] = {}
    for hazard in told:
        unique.setdefault((hazard.get("name", ""), hazard.get("split", "")), hazard)
    return sorted(unique.values(), key=lambda h: known.get(h.get("split", ""), len(known)))


def _hazard(name: str, split: str, text: str) -> Hazard:
    return {"name": name, "split": split, "text": text}


def _count(names: list[str], noun: str) -> str:
    return f"{len(names):,} {noun}{'' if len(names) == 1 else 's'}"
