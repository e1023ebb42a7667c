"""OUT/report.html and OUT/figures/: the answer in a sentence, figures, all numbers, and the command that led to them.

Everything is computed from what `benchmark` left in OUT (and, for the timelines, from the shards that it used, while
they are there), so the page can be written again at any time. No script, nothing loaded; the figures are inlined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.storage import write_text
from pipeline.terminal import counted
from trainer.arms import RUNGS
from trainer.config import MODES
from trainer.evaluation import conclusions, plots
from trainer.evaluation.benchmark_folder import (
    MIN_FRAMES_PER_BIN,
    Benchmark,
    Row,
    baseline,
    precision_recall,
    read_benchmark,
    reliability,
    state_over_time,
    training_curves,
)
from trainer.evaluation.clip_pictures import find_disagreements
from trainer.evaluation.comparison import PRIMARY, pairs_of
from trainer.evaluation.conclusions import ladder_steps
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.plots import Curve, Mark, Panel, css_colour, format_interval, format_number, printable

MOST_GROUPS: Final = 12  # of a kind, on the page
PAGE, FIGURES = "report.html", "figures"
UPDATE_LATENCY: Final = "median latency of right updates (s)"
_FIRST_PAGE: Final = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="20">
<meta name="color-scheme" content="light dark"><title>No result yet</title>
<p>No pair of runs has ended yet. The report replaces this page when one has; the page reloads itself.</p></html>
"""
_DIAGONAL: Final = (np.array([0.0, 1.0]), np.array([0.0, 1.0]), "")


def write_report(out: Path, narrowing: str = "", in_progress: bool = False) -> Path:
    """Write OUT/report.html and OUT/figures/*.svg, *.png; the page's path. InputError if OUT is no benchmark's.

    narrowing: what would narrow the interval. The page of a benchmark `in_progress` reloads itself. It is renamed into
    place when complete. The same folder gives the same bytes.
    """
    bench = read_benchmark(out)
    (out / FIGURES).mkdir(exist_ok=True)
    for old in [*(out / FIGURES).glob("timeline-*"), *(out / FIGURES).glob("state.*")]:  # there may be fewer now
        old.unlink()
    loader = ChoiceLoader([PackageLoader("trainer.evaluation", "."), PackageLoader("pipeline", ".")])
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": format_number, "count": counted}
    more = {"narrowing": narrowing, "in_progress": in_progress}
    write_text(out / PAGE, page.get_template(PAGE).render(page_data(bench) | more))
    return out / PAGE


def write_first_page(out: Path) -> None:
    """Where OUT has no report yet: a page that says so, and reloads itself until there is one."""
    if not (out / PAGE).exists():
        write_text(out / PAGE, _FIRST_PAGE)


def page_data(bench: Benchmark) -> dict[str, Any]:
    """All that the template shows; draws the figures into OUT/figures on the way."""
    info, mode, (a, b) = bench.info, bench.mode, bench.pair
    interest = pairs_of(bench.rungs)  # the ladder's other pairs only say how high one has to climb
    rows = [
        row | {"heading": _heading(row["metric"])}
        for (*pair, _, _), row in bench.comparisons.items()
        if tuple(pair) in interest
    ]
    rows.sort(key=lambda row: (not row["primary"], [*METRICS].index(row["metric"])))
    groups: dict[str, dict[str, dict[str, Row]]] = {"dataset": {}, "task": {}}  # group -> rung -> its row
    for row in bench.groups:
        if row["mode"] == mode:
            groups[row["by"]].setdefault(printable(row["group"], 40), {})[row["rung"]] = row
    clips, about = find_disagreements(bench, a, b)

    def draw(name: str, make: Callable[[], Figure], label: str) -> Markup:
        return Markup(plots.write_figure(bench.out / FIGURES / name, make, label))

    return {
        "opening": conclusions.opening(bench),
        "leaks": [*conclusions.leaks(bench)],
        "question": conclusions.question(bench),
        "harness": conclusions.harness_check(bench),
        "limits": [*conclusions.limits(bench)],
        "colours": plots.css_colours(),
        "rungs": {rung: {"about": RUNGS[rung], "colour": css_colour(plots.rung_colour(rung))} for rung in bench.rungs},
        "steps": ladder_steps(bench),
        "groups": {by: dict([*found.items()][:MOST_GROUPS]) for by, found in groups.items() if len(found) > 1},
        "convergence": conclusions.convergence(bench),
        "figures": {name: draw(name, make, label) for name, (make, label) in _figures(bench).items()},
        "min_frames": MIN_FRAMES_PER_BIN,
        "primary": {"metric": PRIMARY, "a": a, "b": b, "rung": a if a in bench.rungs else bench.rungs[0]},
        "disagreements": about,
        "clips": [
            {"svg": draw(f"timeline-{i}", partial(plots.timeline, timeline), timeline.title), "lines": lines}
            for i, (timeline, lines) in enumerate(clips, 1)
        ],
        "metrics": _metric_rows(bench),
        "comparisons": [row for row in rows if row["metric"] == PRIMARY],
        "other_comparisons": [row for row in rows if row["metric"] != PRIMARY],
        "info": info,
        "mode": mode,
        "thresholds_from": sorted({run["thresholds_from"] for run in bench.metrics.values()} - {None}),
    }


def _heading(name: str) -> str:
    return f"{METRICS[name].label} ({METRICS[name].unit})" if METRICS[name].unit else METRICS[name].label


def _metric_rows(bench: Benchmark) -> list[dict[str, Any]]:
    """Per metric and mode: each rung's value and interval, and (value, name) of the baseline."""
    rows = []
    for name in METRICS:
        cells = {mode: [bench.score(rung, mode, name) for rung in bench.rungs] for mode in bench.modes}
        if any(map(any, cells.values())):
            baselines = {mode: baseline(bench, mode, name) for mode in bench.modes}
            about = {"name": name, "heading": _heading(name), "meaning": METRICS[name].meaning}
            rows.append(about | {"modes": cells, "baselines": baselines})
    cells = {}
    for mode in bench.modes:
        seeds = [bench.of_seeds(rung, mode, "state.transitions.median_latency_s") for rung in bench.rungs]
        if any(seeds):  # means without an interval: not compared
            cells[mode] = [{"value": np.mean(latencies) if latencies else None, "low": None} for latencies in seeds]
    if cells:
        about = {"name": "", "heading": UPDATE_LATENCY, "meaning": ""}
        rows.append(about | {"modes": cells, "baselines": dict.fromkeys(cells)})
    return rows


# ---- figures -----------------------------------------------------------------------------------------


def _figures(bench: Benchmark) -> dict[str, tuple[Callable[[], Figure], str]]:
    """Name of its files -> (what draws it, accessible name); `state` only where some rung tells the state."""
    precision = []
    for mode in MODES:
        curves, chance = precision_recall(bench, mode)
        guessing = None if chance is None else (_DIAGONAL[0], np.full(2, chance), f"guessing {chance:.3f}")
        precision.append(Panel(f"Speaking, {mode}", curves, "recall", "precision", guessing, 1.0, empty="no scores"))
    probabilities = [
        Panel(f"Speaking, {mode}", reliability(bench, mode), "probability", "share", _DIAGONAL, 1.0, dots=True,
              empty="no corrected probabilities")
        for mode in MODES
    ]  # fmt: skip
    training = []
    for head, name in (("speaking", "Speaking"), ("dst_update", "DST update")):
        curves, split = training_curves(bench, head)
        last = max((float(steps[-1]) for curve in curves for steps, _ in curve.seeds), default=None)
        axes = ("optimizer steps", "average precision")
        training.append(Panel(f"{name}, {split}", curves, *axes, None, last, empty="not measured"))
    panels = {
        "windows": ([_window_panel(bench, mode) for mode in bench.modes], "F1 at the widest"),
        "precision-recall": (precision, "AP"),
        "reliability": (probabilities, "ECE"),
        "training": (training, "last AP"),
    }
    states = {mode: curves for mode in (bench.mode, *bench.modes) if (curves := state_over_time(bench, mode))}
    for mode, curves in list(states.items())[:1]:
        heading = f"Joint state accuracy, {mode}"
        state = Panel(heading, curves, "% of the clip", "share of frames", x_end=100, dots=True)
        panels["state"] = ([state], "in the whole clip")
    return {
        "ladder": (partial(plots.ladder, _ladder_rows(bench), bench.modes, METRICS[PRIMARY].label), "the ladder"),
        **{name: (partial(plots.curve_panels, *drawn), name) for name, drawn in panels.items()},
    }


def _ladder_rows(bench: Benchmark) -> list[plots.RungRow]:
    """Of each rung, from the lowest, one mark per mode."""
    marks: dict[str, list[Mark]] = {rung: [] for rung in bench.rungs}
    for mode in bench.modes:
        steps = {step.rung: step for step in ladder_steps(bench, mode)}
        for rung in bench.rungs:
            row, step = bench.score(rung, mode, PRIMARY), steps.get(rung)
            mark = Mark(row.get("value"), row.get("low"), row.get("high"))
            if step and step.below:
                told = format_interval(step.difference, step.low, step.high, signed=True)
                mark = mark._replace(below=steps[step.below].value, step=told)
            marks[rung].append(mark)
    return [plots.RungRow(RUNGS[rung].label or rung, plots.rung_colour(rung), marks[rung]) for rung in bench.rungs]


def _window_panel(bench: Benchmark, mode: str) -> Panel:
    """Event F1 over the width of the window; dashed: the metronome."""
    rows, curves = bench.windows.filter(mode=mode).sort("width_s"), []
    for rung in (name for name in bench.rungs if name != "metronome"):
        seeds = rows.filter(rung=rung).partition_by("seed", maintain_order=True)
        lines = [(of_seed["width_s"].to_numpy(), of_seed["f1"].to_numpy()) for of_seed in seeds]
        if lines:
            mean = np.mean([f1 for _, f1 in lines], axis=0)
            curves.append(Curve(rung, lines, (lines[0][0], mean), format_number(float(mean[-1]))))
    beside = rows.unique("width_s").sort("width_s").drop_nulls("metronome_f1")
    line = (beside["width_s"].to_numpy(), beside["metronome_f1"].to_numpy(), "") if len(beside) else None
    widest = float(rows["width_s"].max() or 0)
    return Panel(f"Event F1, {mode}", curves, "width of the window (s)", "event F1", line, widest, dots=True)
