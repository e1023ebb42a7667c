"""Which files are read, and the split of each: told by a file's name, else its folder's, or by --split.

A folder is searched for JSON files. What is not read of it is returned with the reason, never left out in silence.
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
_JSON: Final = (".json", ".jsonl")
Skipped = tuple[Path, str]  # a file or folder, and why it is left out


def splits_in(name: str) -> list[str]:
    """The splits that a name tells: tokens train, val (valid, validation, dev) or test between `_ - . /`."""
    return list(dict.fromkeys(SPLITS[token.lower()] for token in _TOKEN.findall(name)))


def told_split(path: Path) -> str | None:
    """The split that a file's name tells, else its folder's. UsageError where it tells two."""
    for name in (path.name, path.absolute().parent.name):
        found = splits_in(name)
        if len(found) > 1:
            raise UsageError(f"{path}: the name {name!r} tells the splits {' and '.join(found)}; give --split")
        if found:
            return found[0]
    return None


def split_of(path: Path, options: Options) -> str:
    """The split of a file. UsageError where none is told, or --split contradicts the file's name."""
    if options.split is None:
        split = told_split(path)
        if split is None:
            raise UsageError(
                f"{path}: the file name tells no split (expected train, val or test between _ - . in it); give --split"
            )
        return split
    named = splits_in(path.name)
    if named and SPLITS.get(options.split, options.split) not in named and not options.force_split:
        raise UsageError(
            f"{path}: --split {options.split} contradicts the file name, which tells {' and '.join(named)}; "
            "drop --split, or give --force-split as well"
        )
    return options.split


def find_inputs(inputs: list[Path], options: Options) -> tuple[list[Path], list[Skipped]]:
    """(files to read, what of the folders among `inputs` is left out and why). InputError for a folder without any."""
    files: list[Path] = []
    skipped: list[Skipped] = []
    for path in inputs:
        if not path.is_dir():
            files.append(path)
            continue
        found = []
        for file, why in _search(path, options):
            if why:
                skipped.append((file, why))
            else:
                found.append(file)
        if not found:
            left = f" (left out: {'; '.join(f'{p.name}, {why}' for p, why in skipped[:3])})" if skipped else ""
            raise InputError(
                f"{path}: found a folder without a JSON file of train, val or test in its name{left}; "
                "name the files themselves"
            )
        files += found
    return files, skipped


def _search(folder: Path, options: Options) -> Iterator[tuple[Path, str]]:
    """JSON files below a folder in order, each with the reason to leave it out, or ""."""
    for top, folders, names in os.walk(folder):
        here = Path(top)
        if here != folder and MANIFEST in names:
            folders.clear()
            continue  # an output of preprocess
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("frames", "features"))
        files = sorted(here / name for name in names if name.endswith(_JSON) and not name.startswith("."))
        if "prepared" in folders:  # ProAssist's layout: the other folders hold what it was made from
            others = [*files, *(here / name for name in folders if name != "prepared")]
            yield from ((path, "beside prepared/, which is read instead") for path in others)
            folders[:] = ["prepared"]
            continue
        for file in files:
            if file.is_file():
                yield file, _why_not(file, set(names), options)


def _why_not(file: Path, beside: set[str], options: Options) -> str:
    """Why a file that was not named itself is left out, or ""."""
    stem = file.name.removesuffix(".jsonl").removesuffix(".json")
    if f"{stem}_training.json" in beside:
        return f"the by-product of {stem}_training.json"
    if stem.endswith("_training_fixed"):
        return "a copy of the training file with other frame numbers"
    if stem.endswith("_filtered"):
        return "generated dialogs, for which no frames were made"
    named = splits_in(file.name)
    if len(named) > 1:
        return f"its name tells the splits {' and '.join(named)}"
    if options.split is None:
        return "" if named or splits_in(file.absolute().parent.name) else "its name tells no split"
    wanted = SPLITS.get(options.split, options.split)
    return f"its name tells {named[0]}" if named and wanted not in named and not options.force_split else ""
