"""Which files are read, and the split of each: from a file's name, else its folder's, or from --split.

A folder is searched for JSON files. What is not read of it is returned with the reason, never left out silently.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pipeline.errors import InputError, UsageError
from pipeline.options import Options
from pipeline.schema import MANIFEST

SPLITS: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_TOKEN = re.compile(rf"(?:^|(?<=[_\-./]))({'|'.join(SPLITS)})(?=[_\-./]|$)", re.IGNORECASE)
Skipped = tuple[Path, str]  # a file or folder, and why it is left out


def splits_in(name: str) -> list[str]:
    """The splits that a name tells: tokens train, val (valid, validation, dev) or test between `_ - . /`."""
    return list(dict.fromkeys(SPLITS[token.lower()] for token in _TOKEN.findall(name)))


def split_of(path: Path, options: Options) -> str:
    """The split of a file: --split, else what its name tells, else its folder's.

    UsageError where they tell none or two, or --split contradicts the file's name.
    """
    split = options.split
    for name in (path.name, path.absolute().parent.name):
        told = [] if split else splits_in(name)
        if len(told) > 1:
            raise UsageError(f"{path}: the name {name!r} tells the splits {' and '.join(told)}; give --split")
        split = split or "".join(told)
    if not split:
        raise UsageError(
            f"{path}: the file name tells no split (expected train, val or test between _ - . in it); give --split"
        )
    if _contradicts(path, options):
        raise UsageError(
            f"{path}: --split {split} contradicts the file name, which tells {' and '.join(splits_in(path.name))}; "
            "drop --split, or give --force-split as well"
        )
    return split


def _contradicts(path: Path, options: Options) -> bool:
    """Whether --split is another than the file's name tells."""
    named = splits_in(path.name)
    split = options.split or ""
    return bool(split and named and SPLITS.get(split, split) not in named and not options.force_split)


def find_inputs(inputs: list[Path], options: Options) -> tuple[list[Path], list[Skipped]]:
    """(files to read, what of the folders among `inputs` is left out and why). InputError for a folder without any."""
    files: list[Path] = []
    skipped: list[Skipped] = []
    for path in inputs:
        found = list(_search(path, options)) if path.is_dir() else [(path, "")]
        skipped += [(file, why) for file, why in found if why]
        files += [file for file, why in found if not why]
        if all(why for _, why in found):
            left = "; ".join(f"{file.name}, {why}" for file, why in skipped[:3])
            raise InputError(
                f"{path}: found a folder without a JSON file of train, val or test in its name"
                f"{f' (left out: {left})' if left else ''}; name the files themselves"
            )
    return files, skipped


def _search(folder: Path, options: Options) -> Iterator[Skipped]:
    """JSON files below a folder in order, each with the reason to leave it out, or ""."""
    for top, folders, names in os.walk(folder):
        here = Path(top)
        if here != folder and MANIFEST in names:  # an output of preprocess
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("frames", "features"))
        files = sorted(here / name for name in names if name.endswith((".json", ".jsonl")) and not name.startswith("."))
        if "prepared" in folders:  # ProAssist's layout: the other folders hold what it was made from
            others = [*files, *(here / name for name in folders if name != "prepared")]
            yield from ((path, "beside prepared/, which is read instead") for path in others)
            folders[:] = ["prepared"]
        else:
            yield from ((file, _why_not(file, set(names), options)) for file in files if file.is_file())


def _why_not(file: Path, beside: set[str], options: Options) -> str:
    """Why a file that was not named itself is left out, or ""."""
    stem = file.name.removesuffix(".jsonl").removesuffix(".json")
    named = splits_in(file.name)
    if f"{stem}_training.json" in beside:
        return f"the by-product of {stem}_training.json"
    if stem.endswith("_training_fixed"):
        return "a copy of the training file with other frame numbers"
    if stem.endswith("_filtered"):
        return "generated dialogs, for which no frames were made"
    if len(named) > 1:
        return f"its name tells the splits {' and '.join(named)}"
    if options.split is None and not named and not splits_in(file.absolute().parent.name):
        return "its name tells no split"
    return f"its name tells {named[0]}" if _contradicts(file, options) else ""
