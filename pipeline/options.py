"""What decides the labels, in one frozen place: checked at construction, hashed, kept in the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pipeline.errors import InputError, UsageError
from pipeline.schema import CONVENTIONS, POSITIVES

ASSEMBLY101: Final = r"nusar-.*?(?=__)"  # the take, without task prefix and camera


@dataclass(frozen=True)
class Options:
    """Options of `preprocess`; any of them changes the output's key.

    neg_rate: by split, '*' for all others; empty: the clip's own (train), else 0.5 for train and 1.0 elsewhere.
    """

    seed: int = 0
    positive: str = "span"
    neg_rate: dict[str, float] = field(default_factory=dict)
    pad_s: float = 0.0
    split: str | None = None
    force_split: bool = False  # also where a file's name tells another
    fps: float | None = None  # of clips that do not say; None: 2
    bounds: str = "auto"  # of clips: auto (by a vote of the file), given, or turns
    frame_convention: str | None = None
    recording_regex: str = ASSEMBLY101
    frames_root: str | None = None
    on_error: str = "quarantine"

    def __post_init__(self) -> None:
        _one_of("--positive", self.positive, POSITIVES)
        _one_of("--on-error", self.on_error, ("quarantine", "fail"))
        if self.frame_convention is not None:
            _one_of("--frame-convention", self.frame_convention, CONVENTIONS)
        _one_of("--bounds", self.bounds, ("auto", "given", "turns"))
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
        """Probability that a frame positive for neither head is supervised."""
        given = self.neg_rate.get(split, self.neg_rate.get("*"))
        if given is not None:
            return given
        if split != "train":
            return 1.0
        return 0.5 if own is None else own


def _one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{option} {value!r}: expected one of {', '.join(allowed)}")
