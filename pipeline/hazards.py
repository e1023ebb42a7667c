"""The hazards of the data by name: what a model could learn instead of the task, or what a number could hide.

A hazard never changes a label. Each function yields {name, split, text}; the manifest keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.media import count_and_delay, find_frames
from pipeline.schema import HEAD_TITLES
from pipeline.summary import Split
from pipeline.terminal import counted, percent, plain

IMPLAUSIBLE_RATE: Final = 0.5  # positive share of a head's frames: probably read in the wrong convention
MOST_CLIPS: Final = 0.5  # share of clips that begin on an event: a position shortcut
COINCIDE: Final = 0.8  # of one head's positives also positive for the other: comparisons mean little
FIXED_PERIOD: Final = 0.8  # share of the gaps between events that have one length
FEW_GAPS: Final = 20  # fewer say nothing of a period
BY_CHANCE: Final = 0.2  # share of decisions that a history which grows at random may tell
NAMED: Final = 3  # examples in a hazard's text

Hazard = dict[str, str]


def of_labels(split: Split) -> Iterator[Hazard]:
    """Hazards that the label counts of a split show."""

    def hazard(name: str, text: str) -> Hazard:
        return {"name": name, "split": split.name, "text": text}

    for head, counts in split.heads.items():
        title, (seconds, count, gaps) = HEAD_TITLES[head], counts.usual_gap
        if not counts.clips:
            text = f"no clip says anything about {title}: that head learns nothing here"
            yield hazard("head without positives", text)
        elif not counts.positives:
            text = f"no frame is positive for {title}: that head learns only silence, its AP is undefined"
            yield hazard("head without positives", text)
        elif counts.positives > IMPLAUSIBLE_RATE * counts.frames:
            yield hazard(
                "implausible positive rate",
                f"{percent(counts.positives / counts.frames)} of frames are positive for {title}: look at a timeline "
                "(inspect --clip), then perhaps set --frame-convention",
            )
        if gaps >= FEW_GAPS and count >= FIXED_PERIOD * gaps:
            yield hazard(
                "events at a fixed period",
                f"{count:,} of {gaps:,} gaps between {title} events last {seconds:g} s: a model can learn the period "
                "instead; compare with a metronome",
            )
    if split.first > MOST_CLIPS * split.clips:
        yield hazard(
            "events at the first frame",
            f"{split.first:,} of {split.clips:,} clips begin on an event: a model can learn the position instead; "
            "--pad-s widens the clips",
        )
    head, counts = min(split.heads.items(), key=lambda item: item[1].positives)
    if counts.positives and split.both >= COINCIDE * counts.positives:
        yield hazard(
            "heads coincide",
            f"{split.both:,} of {counts.positives:,} {HEAD_TITLES[head]} frames are positive for both heads: judge "
            "speak-only, DST-only and both apart",
        )


@dataclass
class ContextCounts:
    """One split: what the texts around a decision tell of it."""

    decisions: int = 0  # of files with a dialog history
    given_away: int = 0  # of those, told by the history's growth
    spoken: int = 0  # assistant turns
    echoed: int = 0  # of those, whose text stands in an earlier user turn
    given_states: int = 0  # clips with an initial state
    wrong_states: int = 0  # of those, contradicted by the replay or by the clip's own updates
    broken_states: int = 0  # clips whose replayed state lacks what their updates need: earlier clips are missing
    clips: int = 0
    wrong_system: int = 0  # clips whose system turn tells a state that the clip's own updates contradict


def of_context(split: str, counts: ContextCounts) -> Iterator[Hazard]:
    """Context leak audit: texts that tell a label before the decision is made."""
    leaks = counts.given_away if counts.given_away > BY_CHANCE * counts.decisions else 0
    for name, count, total, text in (
        (
            "dialog history tells the answers",
            *(leaks, counts.decisions),
            "speaking decisions are told by the file's `dialog`, which grows exactly after an interrupt: it is not "
            "read here; do not show a model later entries or their number",
        ),
        (
            "user turns tell the answers",
            *(counts.echoed, counts.spoken),
            "assistant turns stand word for word in an earlier user turn: a model can read when and what to say",
        ),
        (
            "initial state contradicts the updates",
            *(counts.wrong_states, counts.given_states),
            "given initial states contradict the updates of the conversation's earlier clips or the clip's own: the "
            "replayed state was taken",
        ),
        (
            "clips missing in conversations",
            *(counts.broken_states, counts.clips),
            "clips complete a step that no earlier clip of their conversation started: clips are missing in between, "
            "and their initial state lacks what happened there",
        ),
        (
            "system turn tells a wrong state",
            *(counts.wrong_system, counts.clips),
            "clips have a system turn that tells a state which their own updates contradict: system turns are not put "
            "into prompts",
        ),
    ):
        if count:
            yield {"name": name, "split": split, "text": f"{count:,} of {total:,} {text}"}


def of_variants(split: str, files: Mapping[tuple[str | None, ...], set[str]]) -> Iterator[Hazard]:
    """Conversations (data set, video, user) that several files of a split hold, as variants of one preparation do."""
    several = [names for names in files.values() if len(names) > 1]
    if several:
        examples = _examples(sorted({Path(name).name for names in several for name in names}))
        text = (
            f"{len(several):,} conversations stand in several files, {examples}: "
            "each is trained on as often; name the files of one variant"
        )
        yield {"name": "conversations in several files", "split": split, "text": text}


def of_recordings(splits: Mapping[str, set[str]]) -> Iterator[Hazard]:
    """Recordings (by split) that stand in more than one split."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(set().union(*splits.values())):
        where = tuple(sorted(split for split, names in splits.items() if name in names))
        together.setdefault(where, []).append(name)
    for where, names in sorted(together.items()):
        if len(where) > 1:
            many = counted(len(names), "recording")
            text = f"{many} in {' and '.join(where)}, {_examples(names)}: results flatter; split by recording"
            yield {"name": "recording in several splits", "split": "+".join(where), "text": text}


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
        among = counted(len(which), "video")
        yield {"name": name, "split": split, "text": f"{name}: {among} below {root}, {_examples(which)}"}


def _examples(names: list[str]) -> str:
    return f"e.g. {plain(', '.join(names[:NAMED]))}"
