"""The hazards of the data by name: what a model could learn instead of the task, or what a number could hide.

A hazard never changes a label. Each function yields (name, split, text); the manifest keeps them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from pipeline.media import count_and_delay, find_frames
from pipeline.readers.clip import EVERYWHERE
from pipeline.resolve import Source
from pipeline.schema import HEAD_TITLES
from pipeline.state import initial_state
from pipeline.summary import Split
from pipeline.terminal import counted, percent, plain

IMPLAUSIBLE_RATE: Final = 0.5  # positive share of a head's frames: probably read in the wrong convention
MOST_CLIPS: Final = 0.5  # share of clips that begin on an event: a position shortcut
COINCIDE: Final = 0.8  # of one head's positives also positive for the other: comparisons mean little
FIXED_PERIOD: Final = 0.8  # share of the gaps between events that have one length
FEW_GAPS: Final = 20  # fewer say nothing of a period
BY_CHANCE: Final = 0.2  # share of decisions that a history which grows at random may tell

Hazard = tuple[str, str, str]


def find_hazards(sources: list[Source], splits: list[Split], frames_root: str | None) -> list[Hazard]:
    """All hazards of a run: of labels, of the texts around decisions, of files and recordings, of frames on disk."""
    by_split: dict[str, list[Source]] = {}
    for source in sources:
        by_split.setdefault(source.split, []).append(source)
    return [
        *(hazard for split in splits for hazard in of_labels(split)),
        *(hazard for split, own in by_split.items() for hazard in of_context(split, own)),
        *(hazard for split, own in by_split.items() for hazard in of_variants(split, own)),
        *of_recordings(recordings(sources)),
        *(of_frames(Path(frames_root), sources) if frames_root else ()),
    ]


def of_labels(split: Split) -> Iterator[Hazard]:
    """Hazards that the label counts of a split show."""
    for head, counts in split.heads.items():
        title, (seconds, count, gaps) = HEAD_TITLES[head], counts.usual_gap
        if not counts.clips:
            text = f"no clip says anything about {title}: that head learns nothing here"
            yield "head without positives", split.name, text
        elif not counts.positives:
            text = f"no frame is positive for {title}: that head learns only silence, its AP is undefined"
            yield "head without positives", split.name, text
        elif counts.positives > IMPLAUSIBLE_RATE * counts.frames:
            share = percent(counts.positives / counts.frames)
            text = f"{share} of frames are positive for {title}: look at a timeline (inspect --clip), then perhaps set"
            yield "implausible positive rate", split.name, f"{text} --frame-convention"
        if gaps >= FEW_GAPS and count >= FIXED_PERIOD * gaps:
            text = f"{count:,} of {gaps:,} gaps between {title} events last {seconds:g} s: a model can learn the period"
            yield "events at a fixed period", split.name, f"{text} instead; compare with a metronome"
    if split.first > MOST_CLIPS * split.clips:
        text = f"{split.first:,} of {split.clips:,} clips begin on an event: a model can learn the position instead"
        yield "events at the first frame", split.name, f"{text}; --pad-s widens the clips"
    head, counts = min(split.heads.items(), key=lambda item: item[1].positives)
    if counts.positives and split.both >= COINCIDE * counts.positives:
        text = f"{split.both:,} of {counts.positives:,} {HEAD_TITLES[head]} frames are positive for both heads"
        yield "heads coincide", split.name, f"{text}: judge speak-only, DST-only and both apart"


def of_context(split: str, sources: list[Source]) -> Iterator[Hazard]:
    """Context leak audit: texts that tell a label before the decision is made, and states that cannot be right."""
    clips = [clip for source in sources for clip in source.kept()]
    parts = [part for source in sources for part in source.parts]
    told, decisions = (sum(clip.clip.given_away[i] for clip in clips) for i in (0, 1))
    given = [clip for clip in clips if clip.clip.initial_state is not None]
    wrong = 0  # given states that the replay, or the clip's own updates, contradict
    for clip in given:
        own = clip.clip.initial_state or {}
        replayed = own if clip.state is None else clip.state
        steps = {*own, *replayed}
        wrong += clip.contradicted or initial_state(steps, own) != initial_state(steps, replayed)
    for count, total, name, text in (
        (
            *(told if told > BY_CHANCE * decisions else 0, decisions),
            "dialog history tells the answers",
            "speaking decisions are told by the file's `dialog`, which grows exactly after an interrupt: it is not "
            "read here; do not show a model later entries or their number",
        ),
        (
            *(sum(part.echoed for part in parts), sum(part.spoken for part in parts)),
            "user turns tell the answers",
            "assistant turns stand word for word in an earlier user turn: a model can read when and what to say",
        ),
        (
            *(wrong, len(given)),
            "initial state contradicts the updates",
            "given initial states contradict the updates of the conversation's earlier clips or the clip's own: the "
            "replayed state was taken",
        ),
        (
            *(sum(source.counts["states_lacking"] for source in sources), len(clips)),
            "clips missing in conversations",
            "clips complete a step that no earlier clip of their conversation started: clips are missing in between, "
            "and their initial state lacks what happened there",
        ),
    ):
        if count:
            yield name, split, f"{count:,} of {total:,} {text}"


def of_variants(split: str, sources: list[Source]) -> Iterator[Hazard]:
    """Conversations (data set, video, user) that several files of a split hold, as variants of one preparation do."""
    files: dict[tuple[str | None, ...], set[Path]] = defaultdict(set)
    for source in sources:
        for clip in (info.clip for info in source.kept()):
            if clip.user is not None and clip.unlabelled != EVERYWHERE:
                files[clip.dataset, clip.video_uid, clip.user].add(source.path)
    several = [paths for paths in files.values() if len(paths) > 1]
    if several:
        examples = _examples(sorted({path.name for paths in several for path in paths}))
        text = f"{len(several):,} conversations stand in several files, {examples}"
        advice = "each is trained on as often; name the files of one variant"
        yield "conversations in several files", split, f"{text}: {advice}"


def recordings(sources: list[Source]) -> dict[str, set[str]]:
    """The recordings of each split."""
    found: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        for clip in source.kept():
            found[source.split].add(clip.recording_id)
    return found


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
            yield "recording in several splits", "+".join(where), text


def of_frames(root: Path, sources: list[Source]) -> Iterator[Hazard]:
    """Annotations against the frames below `root`."""
    ends: dict[tuple[str, str, str | None, str, float], int] = {}  # video of a split -> its last annotated frame + 1
    for source, info in [(owner, info) for owner in sources for info in owner.kept()]:
        clip = info.clip
        video = (source.split, clip.video_uid, clip.frames_file, clip.dataset or "unknown", clip.fps)
        ends[video] = max(ends.get(video, 0), info.bounds[1])
    problems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (split, uid, frames_file, dataset, fps), end in ends.items():
        path = find_frames(root, uid, frames_file, dataset)
        there, late_s = count_and_delay(path, fps) if path else (None, 0.0)
        if late_s:
            text = f"{uid} (at {late_s:.3g} s; frames before it show it, too)"
            problems["first picture comes late", split].append(text)
        if path is None:
            problems["frames missing", split].append(uid)
        elif there is None:
            problems["frames unreadable", split].append(str(path))
        elif there < end:
            problems["annotations longer than the frames", split].append(f"{uid} (annotated to {end:,}, has {there:,})")
    for (name, split), which in sorted(problems.items()):
        yield name, split, f"{name}: {counted(len(which), 'video')} below {root}, {_examples(which)}"


def _examples(names: list[str]) -> str:
    return f"e.g. {plain(', '.join(names[:3]))}"
