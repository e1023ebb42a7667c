"""Options of `preprocess`: checked when made, hashed, kept in the manifest; its command line follows from them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Final

from typer import Option

from pipeline.errors import InputError, UsageError
from pipeline.schema import CONVENTIONS, POSITIVES

ASSEMBLY101: Final = r"nusar-.*?(?=__)"  # the take, without task prefix and camera
_labels, _input = (partial(Option, rich_help_panel=panel) for panel in ("Labels", "Input"))


@dataclass(frozen=True)
class Options:
    """Options of `preprocess`; any of them changes the output's key.

    neg_rate: by split, '*' for all others; empty: the clip's own (train), else 0.5 for train and 1.0 elsewhere.
    """

    seed: Annotated[int, _labels(help="seed of the sampling draws")] = 0
    positive: Annotated[str, _labels(help="span: every frame of an event is positive; onset: its first")] = "span"
    neg_rate: Annotated[
        dict[str, float], _labels(help="share of silent frames to supervise: 0.3, or by split train=0.3,val=1")
    ] = field(default_factory=dict)
    pad_s: Annotated[float, _labels(help="widen each clip by so many seconds on both sides")] = 0.0
    split: Annotated[str | None, _input(help="split of inputs whose names tell none")] = None
    force_split: Annotated[bool, _input(help="use --split also where a file's name tells another")] = False
    fps: Annotated[float | None, _input(help="frames per second of clips that do not say; default: 2")] = None
    bounds: Annotated[
        str, _input(help="clip bounds: given, turns, or auto (given, unless a file's span its DST updates alone)")
    ] = "auto"
    frame_convention: Annotated[str | None, _input(help="event, window or lead-in; default: detected per file")] = None
    recording_regex: Annotated[
        str, _input(help="what of a video_uid names the recording (first group, or whole match)", show_default=False)
    ] = ASSEMBLY101
    frames_root: Annotated[str | None, _input(help="check annotations against the frames below this folder")] = None
    on_error: Annotated[str, _input(help="quarantine: set bad clips aside; fail: stop")] = "quarantine"

    def __post_init__(self) -> None:
        choices = {"positive": POSITIVES, "on_error": ("quarantine", "fail"), "frame_convention": CONVENTIONS}
        for name, allowed in (choices | {"bounds": ("auto", "given", "turns")}).items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} {value!r}: expected one of {', '.join(allowed)}")
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
