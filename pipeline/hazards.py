"""The hazards of the data by name: what a model could learn instead of the task, or what a number could hide.

A hazard never changes a label. Each function yields (name, split, text); the manifest keeps them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from pipeline.extract import Source
from pipeline.readers.clip import EVERYWHERE
from pipeline.schema import HEAD_TITLES, HEADS
from pipeline.state import initial_state
from pipeline.terminal import counted, percent, plain

IMPLAUSIBLE_RATE: Final = 0.5  # positive share of a head's frames: probably read in the wrong convention
MOST_CLIPS: Final = 0.5  # share of clips that begin on an event: a position shortcut
COINCIDE: Final = 0.8  # of one head's positives also positive for the other: comparisons mean little
FIXED_PERIOD: Final = 0.8  # share of the gaps between events that have one length
FEW_GAPS: Final = 20  # fewer say nothing of a period
OTHER_RATE: Final = 4  # so many more pictures than annotated frames: probably extracted at the camera's rate
BY_CHANCE: Final = 0.2  # share of decisions that a history which grows at random may tell

Hazard = tuple[str, str, str]
_WORDS: Final = "[_-](?:cam|view|head|chest|side|ego|exo)"
_VIEW: Final = re.compile(rf"(.+?)(__.+|{_WORDS}\w*)")


def find_hazards(
    sources: list[Source], splits: Mapping[str, Mapping[str, Any]], frames_root: str | None
) -> Iterator[Hazard]:
    """All hazards of a run; splits: the manifest's counts by split."""
    by_split: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        by_split[source.split].append(source)
    for split, counts in splits.items():
        yield from of_labels(split, counts)
    for find in (of_context, of_variants):
        for split, own in by_split.items():
            yield from find(split, own)
    yield from of_recordings(recordings(sources))
    yield from of_views(sources)
    if frames_root:
        yield from of_frames(Path(frames_root), sources)


def of_labels(split: str, counts: Mapping[str, Any]) -> Iterator[Hazard]:
    """Hazards that the label counts of a split show."""
    for head, title in HEAD_TITLES.items():
        positives, frames, gaps = (counts[f"{head}_{name}"] for name in ("positive", "frames", "gaps"))
        seconds, count = max(gaps, key=lambda gap: (gap[1], -gap[0]), default=(0.0, 0))
        total = sum(n for _, n in gaps)
        if not counts[f"{head}_clips"]:
            text = f"no clip says anything about {title}: that head learns nothing here"
            yield "head without positives", split, text
        elif not positives:
            text = f"no frame is positive for {title}: that head learns only silence, its AP is undefined"
            yield "head without positives", split, text
        elif positives > IMPLAUSIBLE_RATE * frames:
            text = f"{percent(positives / frames)} of frames are positive for {title}: look at a timeline"
            yield "implausible positive rate", split, f"{text} (inspect --clip), then perhaps set --frame-convention"
        if total >= FEW_GAPS and count >= FIXED_PERIOD * total:
            text = (
                f"{count:,} of {total:,} gaps between {title} events last {seconds:g} s: a model can learn the period"
            )
            yield "events at a fixed period", split, f"{text} instead; compare with a metronome"
    first, clips = counts["first_frame_positive"], counts["clips"]
    if first > MOST_CLIPS * clips:
        text = f"{first:,} of {clips:,} clips begin on an event: a model can learn the position instead"
        yield "events at the first frame", split, f"{text}; --pad-s widens the clips"
    rarer = min(HEADS, key=lambda head: counts[f"{head}_positive"])
    both, positives = counts["both_positive"], counts[f"{rarer}_positive"]
    if positives and both >= COINCIDE * positives:
        text = f"{both:,} of {positives:,} {HEAD_TITLES[rarer]} frames are positive for both heads"
        yield "heads coincide", split, f"{text}: judge speak-only, DST-only and both apart"


def of_context(split: str, sources: list[Source]) -> Iterator[Hazard]:
    """Texts that tell a label before the decision is made, and states that cannot be right."""
    clips = [clip for source in sources for clip in source.kept()]
    given_away, decisions = (sum(clip.given_away[i] for clip in clips) for i in (0, 1))
    if given_away > BY_CHANCE * decisions:
        text = f"{given_away:,} of {decisions:,} speaking decisions can be read off the file's `dialog`, which grows"
        text += " exactly after an interrupt: it is not read here; do not show a model later entries or their number"
        yield "dialog history tells the answers", split, text
    given = [clip for clip in clips if clip.initial_state is not None]
    wrong = 0  # given states that the replay, or the clip's own updates, contradict
    for clip in given:
        own, state = clip.initial_state or {}, clip.state  # None: as given
        differ = state is not None and state != own and initial_state(state, own) != initial_state(own, state)
        wrong += clip.contradicted or differ
    if wrong:
        text = f"{wrong:,} of {len(given):,} given initial states contradict the updates of the conversation's earlier"
        text += " clips or the clip's own: the replayed state was taken"
        yield "initial state contradicts the updates", split, text
    echoed, spoken = (sum(clip.echoed[i] for clip in clips) for i in (0, 1))
    if echoed:
        text = f"{echoed:,} of {spoken:,} assistant turns stand word for word in an earlier user turn"
        yield "user turns tell the answers", split, f"{text}: a model can read when and what to say"
    if lacking := sum(clip.lacks_updates for clip in clips):
        text = f"{lacking:,} of {len(clips):,} clips complete a step that no earlier clip of their conversation started"
        yield "clips missing in conversations", split, f"{text}: their initial state lacks what happened in between"
    if told_wrong := sum(clip.system_contradicted for clip in clips):
        text = f"{told_wrong:,} of {len(clips):,} clips have a system turn that tells a state which their own updates"
        yield "system turn tells a wrong state", split, f"{text} contradict: system turns are not put into prompts"


def of_variants(split: str, sources: list[Source]) -> Iterator[Hazard]:
    """Conversations (data set, video, user) that several files of a split hold, as variants of one preparation do."""
    files: dict[tuple[str | None, ...], set[Path]] = defaultdict(set)
    for source in sources:
        for clip in source.kept():
            if clip.user is not None and clip.unlabelled != EVERYWHERE:
                files[clip.dataset, clip.video_uid, clip.user].add(source.path)
    if several := [paths for paths in files.values() if len(paths) > 1]:
        examples = _examples(sorted({path.name for paths in several for path in paths}))
        text = f"{len(several):,} conversations stand in several files, {examples}: each is trained on as often"
        yield "conversations in several files", split, f"{text}; name the files of one variant"


def recordings(sources: list[Source]) -> dict[str, set[str]]:
    """The recordings of each split."""
    names: dict[str, set[str]] = defaultdict(set)
    for source in sources:
        names[source.split].update(clip.recording_id for clip in source.kept())
    return names


def of_recordings(splits: Mapping[str, set[str]]) -> Iterator[Hazard]:
    """Recordings (by split) that stand in two splits."""
    for a, b in combinations(sorted(splits), 2):
        if names := sorted(splits[a] & splits[b]):
            text = f"{counted(len(names), 'recording')} in {a} and {b}, {_examples(names)}"
            yield "recording in several splits", f"{a}+{b}", f"{text}: results flatter; split by recording"


def of_views(sources: list[Source]) -> Iterator[Hazard]:
    """Videos that count as recordings of their own, though their names look like several views of one recording: one
    beginning (before `__`, or a word such as _cam) has several endings, some of which other beginnings have, too."""
    clips = [(clip, source.split) for source in sources for clip in source.kept()]
    own = {clip.video_uid: split for clip, split in clips if clip.recording_id == clip.video_uid}  # video -> its split
    parts = {uid: match.groups() for uid in sorted(own) if (match := _VIEW.fullmatch(uid))}
    takes, endings = (Counter(part[i] for part in parts.values()) for i in (0, 1))
    shared = {take for take, ending in parts.values() if takes[take] > 1 and endings[ending] > 1}
    views = [uid for uid, (take, _) in parts.items() if take in shared]
    if count := len({parts[uid][0] for uid in views}):
        text = f"{len(views):,} videos look like camera views of {counted(count, 'recording')}, {_examples(views)}, but"
        text += f" count as {counted(len(views), 'recording')}: intervals are too narrow, leaks between splits unseen"
        pattern = "^.*?(?=__)" if all("__" in uid for uid in views) else f"^.*?(?=__|{_WORDS})"
        text += f"; say what names a recording, e.g. --recording-regex '{pattern}'"
        yield "views counted as recordings", "+".join(sorted({own[uid] for uid in views})), text


def of_frames(root: Path, sources: list[Source]) -> Iterator[Hazard]:
    """Annotations against the frames below `root`."""
    from pipeline.media import count_frames, find_frames  # with Pillow

    ends: dict[tuple[str, str, str | None, str, float], int] = {}  # video of a split -> its last annotated frame + 1
    for source, clip in [(owner, clip) for owner in sources for clip in owner.kept()]:
        video = (source.split, clip.video_uid, clip.frames_file, clip.dataset or "unknown", clip.fps)
        ends[video] = max(ends.get(video, 0), clip.bounds[1])
    problems: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (split, uid, frames_file, dataset, fps), end in ends.items():
        path = find_frames(root, uid, frames_file, dataset)
        count, late_s = count_frames(path, fps) if path else (None, 0.0)
        if late_s:
            late = f"{uid} (at {late_s:.3g} s; frames before it show it, too)"
            problems["first picture comes late", split].append(late)
        if path is None:
            problems["frames missing", split].append(uid)
        elif count is None:
            problems["frames unreadable", split].append(str(path.relative_to(root)))
        elif count < end:
            problems["annotations longer than the frames", split].append(f"{uid} (annotated to {end:,}, has {count:,})")
        elif count >= OTHER_RATE * end and (path.is_dir() or path.suffix == ".arrow"):  # they have no clock
            many = f"{uid} (annotated to {end:,} at {fps:g} a second, has {count:,})"
            problems["frames perhaps at another rate than the clips'", split].append(many)
    for (name, split), which in sorted(problems.items()):
        where = f"{counted(len(which), 'video')} below {root.resolve().name}"
        yield name, split, f"{name}: {where}, {_examples(which)}"


def _examples(names: list[str]) -> str:
    return f"e.g. {plain(', '.join(names[:3]))}"
