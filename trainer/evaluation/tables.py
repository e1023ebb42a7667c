"""Results of training and evaluation as terminal tables. Takes plain numbers, so it needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.console import Group
from rich.markup import escape

from pipeline.terminal import plain, table
from trainer.evaluation.metrics import METRICS, value_at

if TYPE_CHECKING:
    from trainer.evaluation.evaluate_scores import Evaluation
    from trainer.teacher_forced import EvalReport

BASELINES: Final = {  # path of a metric -> path and name of its level without a model
    "speaking.events.f1": ("speaking.events.metronome.f1", "a metronome"),
    "dst_update.events.f1": ("dst_update.events.metronome.f1", "a metronome"),
    "speaking.frames.ap": ("speaking.frames.chance", "chance"),
    "speaking.frames.alone.ap": ("speaking.frames.alone.chance", "chance"),
    "dst_update.frames.ap": ("dst_update.frames.chance", "chance"),
    "state.joint_accuracy": ("state.joint_accuracy_never_updating", "never updating"),
}
_ROWS: Final = (  # section, label, path in one mode's metrics, format
    ("speaking", "average precision", "speaking.frames.ap", ".3f"),
    ("speaking", "  at frames without DST update", "speaking.frames.alone.ap", ".3f"),
    ("speaking", "calibration error", "speaking.frames.calibration.ece", ".3f"),
    ("speaking", "event F1", "speaking.events.f1", ".3f"),
    ("speaking", "  precision", "speaking.events.precision", ".3f"),
    ("speaking", "  recall", "speaking.events.recall", ".3f"),
    ("speaking", "  reactive", "speaking.events.reactive.f1", ".3f"),
    ("speaking", "  proactive", "speaking.events.proactive.f1", ".3f"),
    ("speaking", "median latency, s", "speaking.events.median_latency_s", "+.2f"),
    ("speaking", "false alarms per quiet hour", "speaking.events.false_alarms_per_quiet_hour", ".1f"),
    ("speaking", "duplicates per event", "speaking.events.duplicates_per_event", ".3f"),
    ("DST updates", "average precision", "dst_update.frames.ap", ".3f"),
    ("DST updates", "event F1", "dst_update.events.f1", ".3f"),
    ("state", "joint accuracy", "state.joint_accuracy", ".3f"),
    ("state", "transition F1", "state.transitions.f1", ".3f"),
    ("state", "step completion F1", "state.completions.f1", ".3f"),
    ("state", "  mean delay, s", "state.completions.delay_s", "+.2f"),
    ("state", "  order similarity", "state.completions.order_similarity", ".3f"),
    ("state", "mistake F1", "state.mistakes.f1", ".3f"),
)
_NAMES: Final = {metric.path: metric.name for metric in METRICS.values()}
MAX_TASKS: Final = 10  # in the printed table; metrics.json has all


def render_evaluation(evaluation: Evaluation) -> Any:
    """One column per mode, one row per metric that is defined; then what the numbers are of."""
    metrics = evaluation.metrics
    by_mode = {name: report for name, report in metrics.items() if isinstance(report, dict)}
    chunks = {name: report["chunks"] for name, report in by_mode.items() if report.get("chunks")}
    modes = {name: report for name, report in by_mode.items() if "cells" in report}
    tables = _chunk_tables(chunks) if chunks else []
    if not modes:
        return Group(*tables, *evaluation.notes)
    rows = table(f"on {plain(evaluation.split)}", *modes, "to compare with")
    section = ""
    for title, name, path, how in _ROWS:
        other_path, other = BASELINES.get(path, ("", ""))
        values, others = ([value_at(report, p) for report in modes.values()] for p in (path, other_path))
        if any(value is not None for value in values):
            if title != section:
                rows.add_row(f"[bold]{title}[/]")
            section = title
            compared = next((f"{other} {value:.3f}" for value in others if value is not None), "")
            intervals = [report.get("intervals", {}).get(_NAMES.get(path)) for report in modes.values()]
            shown = map(_with_interval, values, intervals, [how] * len(values))
            rows.add_row(f"  {name}", *shown, compared)
    report, source = next(iter(modes.values())), metrics.get("thresholds_from")
    counts = {name: f"{count:,}" for name, count in (report | report["cells"]).items() if isinstance(count, int)}
    chosen = "none" if source is None else f"the best of {plain(source)}" if source == "val" else plain(source)
    scope = [
        "[dim]{frames} frames, {clips} clips, {recordings} recordings; positive: speaking only {speaking_only}, "
        "DST only {dst_update_only}, both {both}[/]".format(**counts),
        *(["[dim]in brackets: 95% intervals, bootstrap over recordings[/]"] if report.get("intervals") else []),
        "[dim]an event is in time from {early_s:g} s before to {late_s:g} s after; after one, {refractory_s:g} s of "
        "silence; thresholds: {chosen}[/]".format(chosen=chosen, **metrics["settings"]),
    ]
    return Group(rows, *scope, *tables, *evaluation.notes)


def _chunk_tables(by_mode: dict[str, dict[str, Any]]) -> list[Any]:
    """EgoProactive's metrics: one column per mode, over all chunks, then macro F1 of the tasks with most chunks."""

    def cell(report: dict[str, Any], name: str) -> str:
        return _with_interval(report[name], report["intervals"][name])

    first = next(iter(by_mode.values()))
    overall, per_task, modes = first["overall"], first["per_task"], [plain(mode) for mode in by_mode]
    whole, tasks = table("by chunk", *modes), table("macro F1 by task", *modes, "chunks")
    kinds = [f"{kind}_{name}" for kind in ("interrupt", "silent") for name in ("precision", "recall", "f1")]
    for name in ("macro_f1", "gmean_f1", *kinds):
        title = name.replace("_f1", " F1").replace("_", " ").replace("gmean", "G-mean")
        whole.add_row(title, *(cell(report["overall"], name) for report in by_mode.values()))
    largest = sorted(per_task, key=lambda task: (-per_task[task]["support"], task))[:MAX_TASKS]
    for task in largest:
        values = [cell(report["per_task"][task], "macro_f1") for report in by_mode.values()]
        tasks.add_row(escape(plain(task)), *values, f"{per_task[task]['support']:,}")
    skipped = f", {first['skipped_chunks']:,} without a prediction left out" if first["skipped_chunks"] else ""
    scope = (
        f"[dim]{first['total_sessions']:,} sessions, {overall['support']:,} chunks{skipped}; 95% intervals by "
        f"bootstrap over {overall['recordings']:,} recordings; {len(largest)} of {len(per_task):,} tasks shown[/]"
    )
    return ["", whole, "", tasks, scope]


def _with_interval(value: float | None, interval: list[float] | None, how: str = ".4f") -> str:
    limits = "" if interval is None else " \\[{}, {}]".format(*(format(limit, how) for limit in interval))
    return "-" if value is None else format(value, how) + limits


def render_report(report: EvalReport) -> Any:
    """A table: average precision per head against chance, and where the positives lie."""
    rows = table("head", "average precision", "by chance", "positive frames", "of frames")
    for name, head in (("speaking", report.speaking), ("DST", report.dst_update)):
        ap = "undefined" if head.ap is None else f"{head.ap:.3f}"
        rows.add_row(name, ap, f"{head.chance:.3f}", f"{head.positives:,}", f"{head.frames:,}")
    only = f"speaking only {report.speaking_only:,}, DST only {report.dst_update_only:,}"
    cells = f"[dim]positive frames: {only}, both {report.both:,}"
    return Group(rows, f"{cells}\nteacher-forced: the reference's texts are in the context[/]")
