"""From scores to metrics: of a Parquet file, anybody's, or of what `trainer.evaluate` has just scored. No torch.

Thresholds come from `val`, from the user, or from nowhere: never from the split that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import HEADS
from pipeline.storage import write_json
from trainer.config import Settings
from trainer.evaluation.chunk_metrics import (
    Session,
    read_sessions,
    read_submission,
    report_chunks,
    report_clips,
    write_submission,
)
from trainer.evaluation.metrics import Thresholds, choose_thresholds, measure
from trainer.evaluation.scores import ScoredClip

TEACHER_FORCED, SELF_FED = MODES = ("teacher-forced", "self-fed")
METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """What one model is worth: `metrics` is the content of metrics.json, `notes` what it lacks and why."""

    split: str
    metrics: dict[str, Any]
    notes: tuple[str, ...]
    folder: Path | None = None  # where the files are


@dataclass(frozen=True)
class EvalSplits:
    """The split to measure on, and the one to choose thresholds on, if there is one."""

    test: Split
    val: Split | None

    @property
    def all(self) -> dict[str, Split]:
        return {split.name: split for split in (self.val, self.test) if split is not None}


def evaluate_scores(
    path: Path,
    data: Path | None = None,
    split: str = "test",
    out: Path | None = None,
    settings: Settings | None = None,
    given: Mapping[str, float] | None = None,
    encoder: Path | None = None,
    chunks: Path | None = None,
    submission: Path | None = None,
) -> Evaluation:
    """Measure a scores Parquet, ours or anybody's, against the shards in `data` (None: where the file says they are).

    Thresholds are `given` (logits by head), chosen on the file's own `val` rows, or, of a live file, those that it says
    it ran with; else what needs one is None. `out`: a folder for metrics.json; without, nothing is written.
    chunks: a sessions file of EgoProactive's, for its metrics; submission: a file for the answers in its format.
    """
    from trainer.evaluation.read_scores import read_info, read_scores  # polars, which a GPU machine may lack

    settings, info = settings or Settings(), read_info(path)
    held = hold(_shards(path, data, info), split)
    mode = str(info.get("mode", "scores"))
    names = [name for name in held.all if name == split or _has_split(path, name)]
    scored = read_scores(path, {name: held.all[name] for name in names})
    notes: list[str] = []
    if given:
        thresholds = _given(given)
    elif "thresholds" in info and scored[split][0].said is not None:
        thresholds = Thresholds(**info["thresholds"])
    else:
        thresholds, notes = pick_thresholds(scored, held, settings)
    metrics = all_metrics({mode: scored[split]}, thresholds, settings, encoder)
    if chunks is not None:
        notes += add_chunks(metrics, {mode: scored[split]}, read_sessions(chunks), thresholds, settings, submission)
    metrics |= {
        "file": str(path),
        "split": split,
        "thresholds": asdict(thresholds),
        "thresholds_from": source_of(given, notes, held),
    }
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(split, metrics, tuple(notes), out)


def hold(data: Path, split: str, val: str = "val") -> EvalSplits:
    """The split and `val`, which is where thresholds come from: never from the split itself."""
    test = Split(data, split)
    return EvalSplits(test, Split(data, val) if val in test.manifest["splits"] and split != val else None)


def pick_thresholds(
    scored: Mapping[str, Sequence[ScoredClip]], held: EvalSplits, settings: Settings
) -> tuple[Thresholds, list[str]]:
    """Chosen on val; without any, the reason."""
    if held.val is None:
        why = "val itself is measured" if held.test.name == "val" else "there is no val split"
        return Thresholds({}, {}), [f"{why}: no threshold could be chosen, so no events from scores"]
    if held.val.name not in scored:
        return Thresholds({}, {}), [f"no scores of {held.val.name}: no threshold was chosen; score it, or give one"]
    return choose_thresholds(scored[held.val.name], settings), []


def source_of(given: Mapping[str, float] | None, notes: Sequence[str], held: EvalSplits) -> str | None:
    """Where the thresholds of a scores file come from."""
    return "given" if given else None if notes or held.val is None else held.val.name


def _given(logits: Mapping[str, float]) -> Thresholds:
    for head, value in logits.items():
        if head not in HEADS or math.isnan(value):
            raise InputError(f"threshold {head}={value:g}: expected a logit of one of {', '.join(HEADS)}")
    return Thresholds(dict(logits), dict(logits))


def all_metrics(
    of_modes: Mapping[str, Sequence[ScoredClip]], thresholds: Thresholds, settings: Settings, encoder: Path | None
) -> dict[str, Any]:
    found: dict[str, Any] = {mode: measure(clips, thresholds, settings) for mode, clips in of_modes.items()}
    if encoder is not None:
        from trainer.evaluation.text_metrics import EARLY_S, LATE_S, dialogue_metrics, load_encoder

        by_meaning = load_encoder(encoder)
        for mode, clips in of_modes.items():
            if all(clip.said is not None for clip in clips):
                found[mode]["dialogue"] = dialogue_metrics(clips, by_meaning, EARLY_S, LATE_S)
    return {"settings": asdict(settings)} | found


def add_chunks(
    metrics: dict[str, Any],
    of_modes: Mapping[str, Sequence[ScoredClip]],
    sessions: Sequence[Session],
    thresholds: Thresholds,
    settings: Settings,
    submission: Path | None = None,
) -> list[str]:
    """Adds EgoProactive's metrics to each mode's, as `chunks`, and writes the last mode's answers to `submission`.

    Returns what it could not do, and why. Raises InputError where a session has no clip.
    """
    answers: list[list[str]] = []
    for mode, clips in of_modes.items():
        at = thresholds.event.get("speaking")
        metrics[mode]["chunks"], answers = report_clips(sessions, clips, at, settings.refractory_s)
    if submission is not None and answers:
        write_submission(submission, sessions, answers)
    return [] if answers or not sessions else ["no chunk metrics and no submission: no threshold for speaking"]


def evaluate_submission(path: Path, chunks: Path, out: Path | None = None) -> Evaluation:
    """EgoProactive's metrics of a submission (predictions in its format) against the sessions file `chunks`."""
    sessions = read_sessions(chunks)
    report = report_chunks(sessions, read_submission(path, sessions))
    metrics = {"submission": {"chunks": report}, "file": str(path), "sessions": str(chunks)}
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(chunks.stem, metrics, (), out)


def _shards(path: Path, data: Path | None, info: Mapping[str, Any]) -> Path:
    if data is not None:
        return data
    if "data" not in info:
        raise InputError(f"{path}: does not say which shards it is of; name them: evaluate DATA --scores {path}")
    return Path(info["data"])


def _has_split(path: Path, name: str) -> bool:
    if "split" not in pq.read_schema(path).names:
        return False
    splits = pq.read_table(path, columns=["split"])["split"]
    return bool(pc.any(pc.equal(splits.cast("string"), name)).as_py())
