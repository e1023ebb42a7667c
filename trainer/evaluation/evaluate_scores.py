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
from trainer.evaluation import chunk_metrics
from trainer.evaluation.event_metrics import Beat
from trainer.evaluation.metrics import Thresholds, choose_thresholds, intervals, measure
from trainer.evaluation.scores import ScoredClip, read_info, read_scores, write_scores

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


def hold(data: Path, split: str) -> EvalSplits:
    test = Split(data, split)
    return EvalSplits(test, Split(data, "val") if "val" in test.manifest["splits"] and split != "val" else None)


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
    settings, info = settings or Settings(), read_info(path)
    if data is None and "data" not in info:
        raise InputError(f"{path}: does not say which shards it is of; name them: evaluate DATA --scores {path}")
    held = hold(data or Path(info["data"]), split)
    scored = read_scores(path, held.all, optional=held.all.keys() - {split})
    for head, value in (given or {}).items():
        if head not in HEADS or math.isnan(value):
            raise InputError(f"threshold {head}={value:g}: expected a logit of one of {', '.join(HEADS)}")
    notes: list[str] = []
    thresholds = Thresholds(dict(given or {}), dict(given or {}))
    source = "given" if given else held.val.name if held.val else None
    if not given and "thresholds" in info and scored[split][0].said is not None:
        was = info["thresholds"]
        beats = {head: Beat(**beat) for head, beat in was.get("metronome", {}).items()}
        thresholds = Thresholds(was["frame"], was["event"], beats)
    elif not given:
        thresholds, source, notes = pick_thresholds(scored, held, settings)
    sessions = None if chunks is None else chunk_metrics.read_sessions(chunks)
    by_mode = {str(info.get("mode", "scores")): scored[split]}
    metrics, missing = all_metrics(by_mode, thresholds, settings, sessions, submission, draws)
    metrics |= {"file": str(path), "split": split, "thresholds": asdict(thresholds), "thresholds_from": source}
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(split, metrics, (*notes, *missing), out)


def evaluate_submission(path: Path, chunks: Path, out: Path | None = None) -> Evaluation:
    """EgoProactive's metrics of a submission (predictions in its format) against the sessions file `chunks`."""
    sessions = chunk_metrics.read_sessions(chunks)
    report = chunk_metrics.report_chunks(sessions, chunk_metrics.read_submission(path, sessions))
    metrics = {"submission": {"chunks": report}, "file": str(path), "sessions": str(chunks)}
    if out is not None:
        write_json(out / METRICS_FILE, metrics)
    return Evaluation(chunks.stem, metrics, (), out)


def write_evaluation(
    folder: Path,
    scored: Mapping[str, Sequence[ScoredClip]],
    held: EvalSplits,
    settings: Settings,
    origin: Mapping[str, Any],
    arm: str,
    run_live: Callable[[Thresholds], Sequence[ScoredClip]] | None,
    sessions: Sequence[chunk_metrics.Session] | None = None,
    submission: Path | None = None,
    draws: int = 0,
) -> Evaluation:
    """Choose thresholds, score free-running with them, and write both scores files and metrics.json into `folder`.

    scored: teacher-forced, by split. origin: what the files say of their data and model. run_live: the measured split,
    free-running; None where that was not asked for. The last three are as for `all_metrics`.
    """
    split = held.test.name
    thresholds, source, notes = pick_thresholds(scored, held, settings)
    origin = {**origin, "thresholds": asdict(thresholds), "thresholds_from": source}
    write_scores(folder / f"{TEACHER_FORCED}.parquet", scored, origin | {"mode": TEACHER_FORCED})
    by_mode = {TEACHER_FORCED: scored[split]}
    if run_live is not None and "speaking" in thresholds.event:  # a DST head without a threshold never fires
        by_mode[SELF_FED] = run_live(thresholds)
        write_scores(folder / f"{SELF_FED}.parquet", {split: by_mode[SELF_FED]}, origin | {"mode": SELF_FED})
    elif run_live is not None:
        notes.append("not self-fed: no threshold for speaking")
    metrics, missing = all_metrics(by_mode, thresholds, settings, sessions, submission, draws)
    metrics |= origin | {"split": split, "arm": arm}
    write_json(folder / METRICS_FILE, metrics)
    return Evaluation(split, metrics, (*notes, *missing), folder)


def pick_thresholds(
    scored: Mapping[str, Sequence[ScoredClip]], held: EvalSplits, settings: Settings
) -> tuple[Thresholds, str | None, list[str]]:
    """(thresholds, the split they were chosen on, notes). Without scores of val: no thresholds, None, the reason."""
    if held.val is not None and held.val.name in scored:
        return choose_thresholds(scored[held.val.name], settings), held.val.name, []
    why = "val itself is measured" if held.test.name == "val" else "there is no val split"
    note = f"{why}: no threshold could be chosen, so no events from scores"
    if held.val is not None:
        note = f"no scores of {held.val.name}: no threshold was chosen; score it, or give one"
    return Thresholds({}, {}), None, [note]


def all_metrics(
    by_mode: Mapping[str, Sequence[ScoredClip]],
    thresholds: Thresholds,
    settings: Settings,
    sessions: Sequence[chunk_metrics.Session] | None = None,
    submission: Path | None = None,
    draws: int = 0,
) -> tuple[dict[str, Any], list[str]]:
    """(each mode's metrics and the settings; what could not be measured, and why).

    draws: adds `intervals`, by name of METRICS. sessions: adds EgoProactive's metrics as `chunks`, and writes the last
    mode's answers to `submission`. Raises InputError where a session has no clip.
    """
    metrics: dict[str, Any] = {}
    answers: list[list[str]] = []
    for mode, clips in by_mode.items():
        metrics[mode] = measure(clips, thresholds, settings)
        if draws:
            metrics[mode]["intervals"] = intervals(clips, thresholds, settings, draws)
        if sessions is not None:
            report, answers = chunk_metrics.report_clips(
                sessions, clips, thresholds.event.get("speaking"), settings.refractory_s
            )
            metrics[mode]["chunks"] = report
    if submission is not None and answers:
        chunk_metrics.write_submission(submission, sessions or (), answers)
    notes = ["no chunk metrics and no submission: no threshold for speaking"] if sessions and not answers else []
    return metrics | {"settings": asdict(settings)}, notes
