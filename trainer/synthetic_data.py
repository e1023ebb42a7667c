"""Made-up data for a benchmark whose answer is known: synth and preprocess, once, into the benchmark's own folder.

Labels are onsets, so that a text stands in training where it stands live: right after the frame that fires. At
`state_tells` 1 the picture does not show when to speak and the state does; at 0 the picture shows all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.options import Options
from pipeline.preprocess import preprocess
from pipeline.synth import SynthConfig, synth

RECORDINGS = {"train": 300, "val": 20, "test": 40}


def make(out: Path, state_tells: float, echo: Callable[[str], None]) -> Path:
    """OUT/synth-STATE_TELLS/data, made unless it is there."""
    folder = out / f"synth-{state_tells:g}"
    raw, data = folder / "raw", folder / "data"
    if not raw.exists():
        made = synth(raw, SynthConfig(recordings=RECORDINGS, views=1, state_tells=state_tells))
        echo(f"made {sum(split.recordings for split in made.splits.values())} recordings in {raw}")
    preprocess([raw], data, Options(frames_root=str(raw), positive="onset"))
    return data
