"""What `preprocess` is asked: its options, from which its command line follows, and which files it reads.

A file's name says its split, else its folder's name, else --split. A folder is searched for JSON files; what is
not read of it is returned with the reason, never left out silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from pipeline.errors import InputError, UsageError
from pipeline.schema import MANIFEST, QUARANTINE

ASSEMBLY101: Final = r"nusar-.*?(?=__)"  # the take, without task prefix and camera
SPLITS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_TOKEN: Final = re.compile(rf"(?:^|(?<=[_\-./]))({'|'.join(SPLITS)})(?=[_\-./]|$)", re.IGNORECASE)
Skipped = tuple[Path, str]  # a file or folder, and why it is left out
_labels, _input = (partial(Option, rich_help_panel=panel) for panel in ("Labels", "Input"))


@dataclass(frozen=True)
class Options:
    """Options of `preprocess`; any of them changes the output's key. neg_rate: by split, '*' for all others."""

    seed: Annotated[int, _labels(help="seed of the sampling draws")] = 0
    positive: Annotated[str, _labels(help="span: every frame of an event is positive; onset: its first")] = "span"
    neg_rate: Annotated[
        dict[str, float],
        _labels(
            help="share of silent frames to supervise: 0.3, or train=0.3,val=1; default: the clip's own, else "
            "0.5, in train, 1 in other splits"
        ),
    ] = field(default_factory=dict)
    pad_s: Annotated[float, _labels(help="widen each clip by so many seconds on both sides")] = 0.0
    split: Annotated[str | None, _input(help="split of inputs whose names tell none")] = None
    force_split: Annotated[bool, _input(help="use --split also where a file's name tells another")] = False
    fps: Annotated[float | None, _input(help="frames per second of clips that do not say; default: 2")] = None
    bounds: Annotated[str, _input(help="clip bounds: given, turns; auto: given, unless of DST updates alone")] = "auto"
    frame_convention: Annotated[str | None, _input(help="event, window or lead-in; default: detected per file")] = None
    recording_regex: Annotated[
        str, _input(help="what of a video_uid names the recording (first group, or whole match)", show_default=False)
    ] = ASSEMBLY101
    frames_root: Annotated[str | None, _input(help="check annotations against the frames below this folder")] = None
    on_error: Annotated[str, _input(help="quarantine: set bad clips aside; fail: stop")] = "quarantine"

    def __post_init__(self) -> None:
        choices = {"positive": "span onset", "on_error": "quarantine fail", "bounds": "auto given turns"}
        for name, allowed in (choices | {"frame_convention": "event window lead-in"}).items():
            if (value := getattr(self, name)) not in (None, *allowed.split()):
                expected = ", ".join(allowed.split())
                raise UsageError(f"--{name.replace('_', '-')} {value!r}: expected one of {expected}")
        if self.fps is not None and not 1e-6 <= self.fps <= 1e6:
            raise UsageError(f"--fps {self.fps}: expected a positive number of frames a second")
        for split, rate in self.neg_rate.items():
            if not 0 <= rate <= 1:
                raise UsageError(f"--neg-rate {split}={rate}: expected a rate between 0 and 1")
        if not 0 <= self.pad_s <= 86_400:
            raise UsageError(f"--pad-s {self.pad_s}: expected seconds between 0 and 86400")
        if self.split is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", self.split):
            raise UsageError(f"--split {self.split!r}: expected letters, digits, '-' and '_'")
        try:
            re.compile(self.recording_regex)
        except re.error as error:
            raise UsageError(f"--recording-regex {self.recording_regex!r}: {error}") from None
        if self.frames_root is not None and not Path(self.frames_root).is_dir():
            raise InputError(f"--frames-root {self.frames_root}: not a folder; give the folder that holds the frames")

    def rate(self, split: str, own: float | None) -> float:
        """Probability that a silent frame is supervised: --neg-rate, else the clip's own (train), else 0.5 or 1.0."""
        default = own if split == "train" else 1.0
        given = self.neg_rate.get(split, self.neg_rate.get("*", default))
        return 0.5 if given is None else given


def splits_in(name: str) -> list[str]:
    """The splits that a name tells: tokens train, val (valid, validation, dev) or test between `_ - . /`."""
    return list(dict.fromkeys(SPLITS[token.lower()] for token in _TOKEN.findall(name)))


def split_of(path: Path, options: Options) -> str:
    """--split, else what the name tells, else its folder's. UsageError for none, two, or a --split that contradicts."""
    splits = [options.split] if options.split else splits_in(path.name) or splits_in(path.absolute().parent.name)
    if not splits:
        problem = "the file name tells no split (expected train, val or test between _ - . in it)"
        raise UsageError(f"{path}: {problem}; give --split")
    if len(splits) > 1:
        raise UsageError(f"{path}: the name tells the splits {' and '.join(splits)}; give --split")
    if other := _contradicted(path, options):
        problem = f"--split {splits[0]} contradicts the file name, which tells {other}"
        raise UsageError(f"{path}: {problem}; drop --split, or give --force-split as well")
    return splits[0]


def _contradicted(path: Path, options: Options) -> str:
    """What the file's name tells, where --split is another; else ""."""
    named = splits_in(path.name)
    agrees = options.split is None or SPLITS.get(options.split, options.split) in named
    return "" if agrees or options.force_split else " and ".join(named)


def find_inputs(inputs: list[Path], options: Options) -> tuple[list[Path], list[Skipped]]:
    """(files to read, what of the folders among `inputs` is left out and why). InputError for a folder without any."""
    files: list[Path] = []
    skipped: list[Skipped] = []
    for path in inputs:
        path.stat()  # an OSError where it is not there
        entries = list(_search(path, options)) if path.is_dir() else [(path, "")]
        left = [(file, why) for file, why in entries if why]
        if len(left) == len(entries):
            some = "; ".join(f"{file.name}, {why}" for file, why in left[:3]) or "nothing"
            problem = f"a folder without a JSON file of train, val or test in its name (left out: {some})"
            raise InputError(f"{path}: found {problem}; name the files themselves")
        files += [file for file, why in entries if not why]
        skipped += left
    return files, skipped


def _search(folder: Path, options: Options) -> Iterator[Skipped]:
    """JSON files below a folder in order, each with the reason to leave it out, or ""."""
    for top, folders, names in os.walk(folder):
        here = Path(top)
        if here != folder and MANIFEST in names:  # an output of preprocess
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("frames", "features"))
        own = {MANIFEST, QUARANTINE} if MANIFEST in names else set()  # of an output in the folder itself
        files = sorted(here / name for name in {*names} - own if name.endswith((".json", ".jsonl")) and name[0] != ".")
        if "prepared" in folders:  # ProAssist's layout: the other folders hold what it was made from
            others = [*files, *(here / name for name in folders if name != "prepared")]
            yield from ((path, "beside prepared/, which is read instead") for path in others)
            folders[:] = ["prepared"]
        else:
            yield from ((file, _why_not(file, set(names), options)) for file in files if file.is_file())


def _why_not(file: Path, beside: set[str], options: Options) -> str:
    """Why a file that was not named itself is left out, or ""."""
    named = splits_in(file.name)
    if f"{file.stem}_training.json" in beside:
        return f"the by-product of {file.stem}_training.json"
    if file.stem.endswith("_training_fixed"):
        return "a copy of the training file with other frame numbers"
    if file.stem.endswith("_filtered"):
        return "generated dialogs, for which no frames were made"
    if len(named) > 1:
        return f"its name tells the splits {' and '.join(named)}"
    if options.split is None and not named and not splits_in(file.absolute().parent.name):
        return "its name tells no split"
    return f"its name tells {other}" if (other := _contradicted(file, options)) else ""
