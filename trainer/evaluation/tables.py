"""Results of training and evaluation as terminal tables. Takes plain numbers, so it needs no torch."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Group

from pipeline.schema import HEAD_TITLES
from pipeline.terminal import plain, table
from trainer.evaluation.metrics import METRICS, Evaluation, value_at

BASELINES: Final = {  # path of a metric -> path and name of its level without a model
    "speaking.events.f1": ("speaking.events.metronome.f1", "a metronome"),
    "dst_update.events.f1": ("dst_update.events.metronome.f1", "a metronome"),
    "speaking.frames.ap": ("speaking.frames.chance", "chance"),
    "speaking.frames.alone.ap": ("speaking.frames.alone.chance", "chance"),
    "dst_update.frames.ap": ("dst_update.frames.chance", "chance"),
    "state.joint_accuracy": ("state.joint_accuracy_never_updating", "never updating"),
}
_LABELS: Final = {metric.path: metric.label for metric in METRICS.values()} | {
    "state.completions.f1": "step completion F1",
    "state.completions.delay_s": "step completion delay (s)",
    "state.mistakes.f1": "mistake F1",
}
_CELLS: Final = "positive frames: speaking only {speaking_only:,}, DST only {dst_update_only:,}, both {both:,}"


def render_evaluation(evaluation: Evaluation) -> Any:
    """One column per mode, one row per metric that is defined; then what the numbers are of."""
    metrics = evaluation.metrics
    by_mode = {name: report for name, report in metrics.items() if isinstance(report, dict)}
    chunks = {name: report["chunks"] for name, report in by_mode.items() if report.get("chunks")}
    modes = {name: report for name, report in by_mode.items() if "cells" in report}
    tables = _chunk_table(chunks) if chunks else []
    if not modes:
        return Group(*tables, *evaluation.notes)
    rows = table(f"on {plain(evaluation.split)}", *modes, "to compare with")
    names = {metric.path: metric.name for metric in METRICS.values()}
    for path, label in _LABELS.items():
        other_path, other = BASELINES.get(path, ("", ""))
        values, others = ([value_at(report, p) for report in modes.values()] for p in (path, other_path))
        if any(value is not None for value in values):
            compared = next((f"{other} {value:.3f}" for value in others if value is not None), "")
            limits = [value_at(report, f"intervals.{names.get(path)}") for report in modes.values()]
            rows.add_row(label, *map(_with_interval, values, limits), compared)
    report, source = next(iter(modes.values())), metrics.get("thresholds_from")
    window = "from {early_s:g} s before to {late_s:g} s after; after one, {refractory_s:g} s of silence"
    brackets = "; in brackets: 95% intervals by bootstrap over recordings" if report.get("intervals") else ""
    scope = (
        f"[dim]{report['frames']:,} frames, {report['clips']:,} clips, {report['recordings']:,} recordings{brackets}\n"
        f"{_CELLS.format(**report['cells'])}\n"
        f"an event is in time {window.format(**metrics['settings'])}; thresholds: {plain(source or 'none')}[/]"
    )
    return Group(rows, scope, *tables, *evaluation.notes)


def _chunk_table(by_mode: dict[str, dict[str, Any]]) -> list[Any]:
    """EgoProactive's metrics over all chunks, one column per mode."""
    whole = table("by chunk", *map(plain, by_mode))
    overall = [report["overall"] for report in by_mode.values()]
    for name in overall[0]["intervals"]:
        title = name.replace("_f1", " F1").replace("_", " ").replace("gmean", "G-mean")
        whole.add_row(title, *(_with_interval(one[name], one["intervals"][name], ".4f") for one in overall))
    first = next(iter(by_mode.values()))
    scope = (
        f"[dim]{first['total_sessions']:,} sessions, {overall[0]['support']:,} chunks, {first['skipped_chunks']:,} "
        f"without a prediction left out; 95% intervals by bootstrap over {overall[0]['recordings']:,} recordings[/]"
    )
    return ["", whole, scope]


def _with_interval(value: float | None, interval: list[float] | None, how: str = ".3f") -> str:
    limits = "" if interval is None else " \\[{}, {}]".format(*(format(limit, how) for limit in interval))
    return "-" if value is None else format(value, how) + limits


def render_report(report: dict[str, Any]) -> Any:
    """A table: average precision per head against chance, and where the positives lie."""
    rows = table("head", "average precision", "by chance", "positive frames", "of frames")
    for head, name in HEAD_TITLES.items():
        ap, chance, frames, positives = report[head].values()
        rows.add_row(name, "undefined" if ap is None else f"{ap:.3f}", f"{chance:.3f}", f"{positives:,}", f"{frames:,}")
    context = "teacher-forced: the reference's texts are in the context"
    return Group(rows, f"[dim]{_CELLS.format(**report)}\n{context}[/]")
