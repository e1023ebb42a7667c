"""From scores to metrics, without torch: of a Parquet file, anybody's, or of what `trainer.evaluate` has just scored.

Thresholds come from `val` or from the user, never from the split that is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.dataset import Split
from pipeline.errors import InputError
from pipeline.schema import HEADS
from pipeline.storage import write_json
from trainer.config import SELF_FED, TEACHER_FORCED, Settings
from trainer.evaluation.chunk_metrics import (
    Session,
    read_sessions,
    read_submission,
    report_chunks,
    report_clips,
    write_submission,
)
from trainer.evaluation.metrics import Thresholds, choose_thresholds, intervals, measure
from trainer.evaluation.scores import ScoredClip, write_scores

METRICS_FILE = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """`metrics` is the content of metrics.json, `notes` what it lacks and why."""

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
    chunks: Path | None = None,
    submission: Path | None = None,
    draws: int = 0,
) -> Evaluation:
    """Measure a scores Parquet, ours or anybody's, against the shards in `data` (None: where the file says they are).

    Thresholds are `given` (logits by head), those that a free-running file was made with, or chosen on the file's own
    `val` rows; else what needs one is None. `out`: a folder for metrics.json; without, nothing is written.
    chunks: a sessions file of EgoProactive's, for its metrics; submission: a file for the answers in its format.
    draws: of the recordings, for 95% intervals; 0: none.
    """
    from trainer.evaluation.read_scores import read_info, read_scores  # polars, which a GPU machine may lack

    settings, info = settings or Settings(), read_info(path)
    if data is None and "data" not in info:
        raise InputError(f"{path}: does not say which shards it is of; name them: evaluate DATA --scores {path}")
    held = hold(data or Path(info["data"]), split)
    mode = str(info.get("mode", "scores"))
    scored = read_scores(path, held.all, optional=held.all.keys() - {split})
    for head, value in (given or {}).items():
        if head not in HEADS or math.isnan(value):
            raise InputError(f"threshold {head}={value:g}: expected a logit of one of {', '.join(HEADS)}")
    notes: list[str] = []
    if given:
        thresholds = Thresholds(dict(given), dict(given))
    elif "thresholds" in info and scored[split][0].said is not None:
        thresholds = Thresholds(**info["thresholds"])
    else:
        thresholds, notes = pick_thresholds(scored, held, settings)
    source = "given" if given else threshold_source(held, notes)
    sessions = None if chunks is None else read_sessions(chunks)
    metrics, missing = all_metrics({mode: scored[split]}, thresholds, settings, sessions, submission, draws)
    metrics |= {"file": str(path), "split": split, "thresholds": asdict(thresholds), "thresholds_from": source}
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(split, metrics, (*notes, *missing), out)


def evaluate_submission(path: Path, chunks: Path, out: Path | None = None) -> Evaluation:
    """EgoProactive's metrics of a submission (predictions in its format) against the sessions file `chunks`."""
    sessions = read_sessions(chunks)
    report = report_chunks(sessions, read_submission(path, sessions))
    metrics = {"submission": {"chunks": report}, "file": str(path), "sessions": str(chunks)}
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(chunks.stem, metrics, (), out)


def hold(data: Path, split: str) -> EvalSplits:
    test = Split(data, split)
    return EvalSplits(test, Split(data, "val") if "val" in test.manifest["splits"] and split != "val" else None)


def write_evaluation(
    folder: Path,
    scored: Mapping[str, Sequence[ScoredClip]],
    held: EvalSplits,
    settings: Settings,
    origin: Mapping[str, Any],
    arm: str,
    run_live: Callable[[Thresholds], Sequence[ScoredClip]] | None,
    sessions: Sequence[Session] | None = None,
    submission: Path | None = None,
    draws: int = 0,
) -> Evaluation:
    """Choose thresholds, score free-running with them, and write both scores files and metrics.json into `folder`.

    scored: teacher-forced, by split. origin: what the files say of their data and model. run_live: the measured split,
    free-running; None where that was not asked for. The last three are as for `all_metrics`.
    """
    split = held.test.name
    thresholds, notes = pick_thresholds(scored, held, settings)
    origin = {**origin, "thresholds": asdict(thresholds), "thresholds_from": threshold_source(held, notes)}
    write_scores(folder / f"{TEACHER_FORCED}.parquet", scored, origin | {"mode": TEACHER_FORCED})
    by_mode = {TEACHER_FORCED: scored[split]}
    if run_live is not None and can_live(thresholds):
        by_mode[SELF_FED] = run_live(thresholds)
        write_scores(folder / f"{SELF_FED}.parquet", {split: by_mode[SELF_FED]}, origin | {"mode": SELF_FED})
    elif run_live is not None:
        notes.append("not self-fed: no threshold for speaking")
    metrics, missing = all_metrics(by_mode, thresholds, settings, sessions, submission, draws)
    metrics |= origin | {"split": split, "arm": arm}
    write_json(folder / METRICS_FILE, metrics)
    return Evaluation(split, metrics, (*notes, *missing), folder)


def can_live(thresholds: Thresholds) -> bool:
    """Whether a free-running pass has the threshold that it needs. A DST head without one never fires."""
    return "speaking" in thresholds.event


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


def threshold_source(held: EvalSplits, notes: Sequence[str]) -> str | None:
    """The split on which `pick_thresholds` chose; None where it could not."""
    return None if notes or held.val is None else held.val.name


def all_metrics(
    by_mode: Mapping[str, Sequence[ScoredClip]],
    thresholds: Thresholds,
    settings: Settings,
    sessions: Sequence[Session] | None = None,
    submission: Path | None = None,
    draws: int = 0,
) -> tuple[dict[str, Any], list[str]]:
    """(each mode's metrics and the settings; what could not be measured, and why).

    draws: adds `intervals`, by name of METRICS. sessions: adds EgoProactive's metrics as `chunks`, and writes the last
    mode's answers to `submission`. Raises InputError where a session has no clip.
    """
    metrics: dict[str, Any] = {mode: measure(clips, thresholds, settings) for mode, clips in by_mode.items()}
    for mode, clips in by_mode.items() if draws else ():
        metrics[mode]["intervals"] = intervals(clips, thresholds, settings, draws)
    notes: list[str] = []
    if sessions is not None:
        answers: list[list[str]] = []
        for mode, clips in by_mode.items():
            speaking = thresholds.event.get("speaking")
            metrics[mode]["chunks"], answers = report_clips(sessions, clips, speaking, settings.refractory_s)
        if submission is not None and answers:
            write_submission(submission, sessions, answers)
        if sessions and not answers:
            notes.append("no chunk metrics and no submission: no threshold for speaking")
    return metrics | {"settings": asdict(settings)}, notes
