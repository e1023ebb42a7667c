"""What a run says of its output: counts per split, and the hazards of the data by name.

A hazard never changes a label; it tells the user what a model could learn instead of the task, or what a number
could hide. Each names what was seen and what to do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.frames import count_frames
from pipeline.schema import find_frames
from pipeline.survey import Survey
from pipeline.write import Written

IMPLAUSIBLE_RATE: Final = 0.5
MOST_CLIPS: Final = 0.5
COINCIDE: Final = 0.8
NAMED: Final = 3  # examples in a hazard's text


@dataclass(frozen=True)
class Kept:
    """What hazards need of a part: bool keep [C], int64 bounds [C, 2]."""

    split: str
    survey: Survey
    keep: np.ndarray
    bounds: np.ndarray


def merge(written: list[Written]) -> dict[str, dict[str, Any]]:
    """Counts per split, summed over its parts."""
    splits: dict[str, dict[str, Any]] = {}
    for part in written:
        told = splits.setdefault(part.split, {"counts": Counter(), "drops": Counter(), "seconds": 0.0})
        told["counts"].update(part.counts)
        told["drops"].update(part.drops)
        told["seconds"] += part.seconds
    for told in splits.values():
        counts = told.pop("counts")
        seconds = told.pop("seconds")
        told["drops"] = {reason: count for reason, count in sorted(told["drops"].items()) if count}
        told.update(dict(counts), hours=round(seconds / 3600, 4))
    return splits


def hazards(splits: dict[str, dict[str, Any]], kept: list[Kept], frames_root: str | None) -> list[dict[str, Any]]:
    """[{name, split, text}], worst first within a split."""
    found = [hazard for split, told in splits.items() for hazard in _of_labels(split, told)]
    found += _shared_recordings(kept)
    if frames_root:
        found += _of_frames(Path(frames_root), kept)
    return found


def _hazard(name: str, split: str, text: str) -> dict[str, Any]:
    return {"name": name, "split": split, "text": text}


def _of_labels(split: str, told: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for head in ("speaking", "dst_update"):
        rate = told[f"{head}_positive"] / told["frames"]
        if rate > IMPLAUSIBLE_RATE:
            text = f"{rate:.0%} of frames are positive for {head}: is the frame convention right (--frame-convention)?"
            found.append(_hazard("implausible positive rate", split, text))
        if told[f"{head}_positive"] == 0:
            text = f"no frame is positive for {head}: its head learns nothing, its metrics are undefined"
            found.append(_hazard("head without positives", split, text))
    if told["first_frame_positive"] > MOST_CLIPS * told["clips"]:
        text = (
            f"{told['first_frame_positive']} of {told['clips']} clips begin with an event: a model can learn the "
            "position instead of the task; widen the clips with --pad-s"
        )
        found.append(_hazard("events at the first frame", split, text))
    both, fewer = told["both_positive"], min(told["speaking_positive"], told["dst_update_positive"])
    if fewer and both >= COINCIDE * fewer:
        text = (
            f"{both} frames are positive for both heads, of {told['speaking_positive']} speaking and "
            f"{told['dst_update_positive']} DST frames: a gain by one head may be the other's; report the cells apart"
        )
        found.append(_hazard("heads coincide", split, text))
    return found


def _shared_recordings(kept: list[Kept]) -> list[dict[str, Any]]:
    splits: dict[str, set[str]] = {}
    for part in kept:
        for i in np.flatnonzero(part.keep).tolist():
            splits.setdefault(part.survey.recording_ids[i], set()).add(part.split)
    shared: dict[tuple[str, ...], list[str]] = {}
    for name, where in splits.items():
        if len(where) > 1:
            shared.setdefault(tuple(sorted(where)), []).append(name)
    return [
        _hazard(
            "recording in several splits",
            "+".join(where),
            f"{_count(len(names), 'recording')} in {' and '.join(where)}, e.g. {', '.join(names[:NAMED])}: "
            "results leak; split by recording",
        )
        for where, names in sorted(shared.items())
    ]


def _of_frames(root: Path, kept: list[Kept]) -> list[dict[str, Any]]:
    """Compare annotations with the frames below `root`, one look per video."""
    needed: dict[tuple[str, str, str | None], int] = {}
    for part in kept:
        for i in np.flatnonzero(part.keep).tolist():
            video = (part.split, part.survey.video_uids[i], part.survey.frames_files[i])
            needed[video] = max(needed.get(video, 0), int(part.bounds[i, 1]))
    problems: dict[tuple[str, str], list[str]] = {}
    for (split, uid, frames_file), end in needed.items():
        path = find_frames(root, uid, frames_file)
        there = count_frames(path) if path else None
        if path is None:
            problems.setdefault(("frames missing", split), []).append(uid)
        elif there is None:
            problems.setdefault(("frames unreadable", split), []).append(str(path))
        elif there < end:
            text = f"{uid} ({end} against {there})"
            problems.setdefault(("annotations longer than the frames", split), []).append(text)
    return [
        _hazard(name, split, f"{_count(len(which), 'video')} below {root}, e.g. {', '.join(which[:NAMED])}")
        for (name, split), which in sorted(problems.items())
    ]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
