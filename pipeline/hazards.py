"""The hazards of the data by name: what a model could learn instead of the task, or what a number could hide.

A hazard never changes a label. `preprocess` tells them all; `inspect` tells again what the shards alone can show,
through the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.media import count_and_delay, find_frames
from pipeline.terminal import percent, plain

IMPLAUSIBLE_RATE: Final = 0.5  # positive share of a head's frames: probably read in the wrong convention
MOST_CLIPS: Final = 0.5  # share of clips that begin on an event: a position shortcut
COINCIDE: Final = 0.8  # of one head's positives also positive for the other: comparisons mean little
FIXED_PERIOD: Final = 0.8  # share of the gaps between events that have one length
FEW_GAPS: Final = 20  # fewer say nothing of a period
NAMED: Final = 3  # examples in a hazard's text

Hazard = dict[str, str]  # name, split, text


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """One head in one split; clips that say nothing about the head are left out."""

    clips: int
    frames: int
    positives: int
    usual_gap: tuple[float, int, int] = (
        0.0,
        0,
        0,
    )  # `usual_gap` of the events' quiet gaps


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """One split: clips, those whose first frame is positive for either head, frames positive for both."""

    clips: int
    first: int
    both: int
    heads: Mapping[str, HeadCounts]  # speaking, DST


def usual_gap(gaps: Mapping[float, int]) -> tuple[float, int, int]:
    """(the most frequent quiet gap between events in seconds, how often, of how many); (0.0, 0, 0) without any."""
    seconds, count = max(gaps.items(), key=lambda item: (item[1], -item[0]), default=(0.0, 0))
    return seconds, count, sum(gaps.values())


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
        seconds, count, gaps = head.usual_gap
        if gaps >= FEW_GAPS and count >= FIXED_PERIOD * gaps:
            text = (
                f"{count:,} of {gaps:,} gaps between {name} events last {seconds:g} s: a model can learn the period "
                "instead; compare with a metronome"
            )
            yield _hazard("events at a fixed period", split, text)
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


@dataclass
class ContextCounts:
    """One split: what the texts around a decision tell of it."""

    decisions: int = 0  # of files with a dialog history
    given_away: int = 0  # of those, told by the history's growth
    verbatim: int = 0  # of those, in sessions where the added text is the answer itself
    spoken: int = 0  # assistant turns
    echoed: int = 0  # of those, whose text stands in an earlier user turn
    given_states: int = 0  # clips with an initial state
    wrong_states: int = 0  # of those, contradicted by the replay or by the clip's own updates
    broken_states: int = 0  # clips whose replayed state lacks what their updates need: earlier clips are missing
    clips: int = 0
    wrong_system: int = 0  # clips whose system turn tells a state that the clip's own updates contradict


def of_context(split: str, counts: ContextCounts) -> Iterator[Hazard]:
    """Context leak audit: texts that tell a label before the decision is made."""
    if counts.verbatim or counts.given_away > counts.decisions / 2:
        text = (
            f"{counts.given_away:,} of {counts.decisions:,} speaking decisions are told by the file's `dialog`, which "
            "grows exactly after an interrupt: it is not read here; do not show a model later entries or their number"
        )
        yield _hazard("dialog history tells the answers", split, text)
    if counts.echoed:
        text = (
            f"{counts.echoed:,} of {counts.spoken:,} assistant turns stand word for word in an earlier user turn: "
            "a model can read when and what to say"
        )
        yield _hazard("user turns tell the answers", split, text)
    if counts.wrong_states:
        text = (
            f"{counts.wrong_states:,} of {counts.given_states:,} given initial states contradict the updates of the "
            "conversation's earlier clips or the clip's own: the replayed state was taken"
        )
        yield _hazard("initial state contradicts the updates", split, text)
    if counts.broken_states:
        text = (
            f"{counts.broken_states:,} of {counts.clips:,} clips complete a step that no earlier clip of their "
            "conversation started: clips are missing in between, and their initial state lacks what happened there"
        )
        yield _hazard("clips missing in conversations", split, text)
    if counts.wrong_system:
        text = (
            f"{counts.wrong_system:,} of {counts.clips:,} clips have a system turn that tells a state which their own "
            "updates contradict: system turns are not put into prompts"
        )
        yield _hazard("system turn tells a wrong state", split, text)


def of_variants(split: str, files: Mapping[tuple[str | None, ...], set[str]]) -> Iterator[Hazard]:
    """Conversations (data set, video, user) that several files of a split hold, as variants of one preparation do."""
    several = {Path(name).name for names in files.values() if len(names) > 1 for name in names}
    if several:
        count = sum(len(names) > 1 for names in files.values())
        text = (
            f"{count:,} conversations stand in several files, e.g. {plain(', '.join(sorted(several)[:NAMED]))}: "
            "each is trained on as often; name the files of one variant"
        )
        yield _hazard("conversations in several files", split, text)


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
        there, late_s = count_and_delay(path, fps) if path else (None, 0.0)
        if late_s:
            text = f"{uid} (at {late_s:.3g} s; frames before it show it, too)"
            problems.setdefault(("first picture comes late", split), []).append(text)
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
