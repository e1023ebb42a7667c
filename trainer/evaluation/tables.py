"""What training and evaluation found, as tables for a terminal. Takes plain numbers, so it needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from pipeline.terminal import plain

if TYPE_CHECKING:
    from trainer.evaluation.evaluate_scores import Evaluation
    from trainer.teacher_forced import EvalReport

_ROWS: Final = (  # title, path in one mode's metrics, how it is said, path of what to compare it with and its name
    ("speaking", None, "", None),
    ("average precision", ("speaking", "frames", "ap"), ".3f", (("speaking", "frames", "chance"), "chance")),
    ("  at frames without DST update", ("speaking", "frames", "alone", "ap"), ".3f",
     (("speaking", "frames", "alone", "chance"), "chance")),
    ("calibration error", ("speaking", "frames", "calibration", "ece"), ".3f", None),
    ("event F1", ("speaking", "events", "f1"), ".3f", (("speaking", "events", "metronome", "f1"), "a metronome")),
    ("  precision", ("speaking", "events", "precision"), ".3f", None),
    ("  recall", ("speaking", "events", "recall"), ".3f", None),
    ("  reactive", ("speaking", "events", "reactive", "f1"), ".3f", None),
    ("  proactive", ("speaking", "events", "proactive", "f1"), ".3f", None),
    ("median latency, s", ("speaking", "events", "median_latency_s"), "+.2f", None),
    ("false alarms per quiet hour", ("speaking", "events", "false_alarms_per_quiet_hour"), ".1f", None),
    ("duplicates per event", ("speaking", "events", "duplicates_per_event"), ".3f", None),
    ("F1 by what was said", ("dialogue", "f1"), ".3f", None),
    ("DST updates", None, "", None),
    ("average precision", ("dst_update", "frames", "ap"), ".3f", (("dst_update", "frames", "chance"), "chance")),
    ("event F1", ("dst_update", "events", "f1"), ".3f", (("dst_update", "events", "metronome", "f1"), "a metronome")),
    ("state", None, "", None),
    ("joint accuracy", ("state", "joint_accuracy"), ".3f",
     (("state", "joint_accuracy_never_updating"), "never updating")),
    ("transition F1", ("state", "transitions", "f1"), ".3f", None),
)  # fmt: skip

_CHUNK_METRICS: Final = ("precision", "recall", "f1")
MOST_TASKS: Final = 10  # in the printed table; metrics.json has all


def render_evaluation(evaluation: Evaluation) -> Any:
    """One column per mode, one row per metric that is defined; then what the numbers are of."""
    metrics = evaluation.metrics
    by_chunk = {
        name: found["chunks"] for name, found in metrics.items() if isinstance(found, dict) and found.get("chunks")
    }
    tables = _chunk_tables(by_chunk) if by_chunk else []
    modes = [name for name, found in metrics.items() if isinstance(found, dict) and "cells" in found]
    if not modes:
        return Group(*tables, *evaluation.notes)
    table = _table(f"on {plain(evaluation.split)}", *modes, "to compare with")
    title: str | None = None
    for name, path, how, other in _ROWS:
        if path is None:
            title = name
            continue
        found = [_at(metrics[mode], path) for mode in modes]
        if any(value is not None for value in found):
            if title is not None:
                table.add_row(f"[bold]{title}[/]")
                title = None
            known = [_at(metrics[mode], other[0]) for mode in modes] if other else []
            compared = next((value for value in known if value is not None), None)
            beside = "" if compared is None or other is None else f"{other[1]} {compared:.3f}"
            table.add_row(f"  {name}", *(_say(value, how) for value in found), beside)
    lines = [f"[dim]{line}[/]" for line in _about(metrics[modes[0]], metrics)]
    return Group(table, *lines, *tables, *evaluation.notes)


def _chunk_tables(by_mode: dict[str, dict[str, Any]]) -> list[Any]:
    """EgoProactive's metrics: one column per mode, over all chunks, then macro F1 of the tasks with most chunks."""
    first = next(iter(by_mode.values()))
    whole, tasks = _table("by chunk", *map(plain, by_mode)), _table("macro F1 by task", *map(plain, by_mode), "chunks")
    for name in ("macro_f1", "gmean_f1", *(f"{k}_{m}" for k in ("interrupt", "silent") for m in _CHUNK_METRICS)):
        title = name.replace("_f1", " F1").replace("_", " ").replace("gmean", "G-mean")
        whole.add_row(title, *(_with_interval(found["overall"], name) for found in by_mode.values()))
    largest = sorted(first["per_task"], key=lambda task: (-first["per_task"][task]["support"], task))[:MOST_TASKS]
    for task in largest:
        own = [found["per_task"][task] for found in by_mode.values()]
        tasks.add_row(
            escape(plain(task)), *(_with_interval(found, "macro_f1") for found in own), f"{own[0]['support']:,}"
        )
    overall, skipped = first["overall"], first["skipped_chunks"]
    without = f", {skipped:,} without a prediction left out" if skipped else ""
    line = (
        f"[dim]{first['total_sessions']:,} sessions, {overall['support']:,} chunks{without}; "
        f"{overall['recordings']:,} recordings, drawn again for the 95% intervals; {len(largest)} of "
        f"{len(first['per_task']):,} tasks shown[/]"
    )
    return ["", whole, "", tasks, line]


def _with_interval(found: dict[str, Any], name: str) -> str:
    interval = found["intervals"][name]
    beside = "" if interval is None else f" \\[{interval[0]:.4f}, {interval[1]:.4f}]"
    return f"{found[name]:.4f}{beside}"


def _about(report: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    cells, settings = report["cells"], metrics["settings"]
    source = metrics.get("thresholds_from")
    chosen = "none" if source is None else f"the best of {plain(source)}" if source == "val" else plain(source)
    return [
        f"{report['frames']:,} frames, {report['clips']:,} clips, {report['recordings']:,} recordings; positive: "
        f"speaking only {cells['speaking_only']:,}, DST only {cells['dst_update_only']:,}, both {cells['both']:,}",
        f"an event is in time from {settings['early_s']:g} s before to {settings['late_s']:g} s after; after one, "
        f"{settings['refractory_s']:g} s of silence; thresholds: {chosen}",
    ]


def _at(report: dict[str, Any], path: tuple[str, ...]) -> float | None:
    found: Any = report
    for key in path:
        found = None if found is None else found.get(key)
    return found


def _say(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def render_report(report: EvalReport) -> Any:
    """A table: average precision per head against chance, and where the positives lie."""
    table = _table("head", "average precision", "by chance", "positive frames", "of frames")
    for name, head in (("speaking", report.speaking), ("DST", report.dst_update)):
        ap = "undefined" if head.ap is None else f"{head.ap:.3f}"
        table.add_row(name, ap, f"{head.chance:.3f}", f"{head.positives:,}", f"{head.frames:,}")
    only = f"speaking only {report.speaking_only:,}, DST only {report.dst_update_only:,}"
    cells = f"positive frames: {only}, both {report.both:,}"
    return Group(table, f"[dim]{cells}\nteacher-forced: the reference's texts are in the context[/]")


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table
