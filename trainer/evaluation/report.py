"""OUT/report.html and OUT/figures/: the answer in a sentence, figures, all numbers, and the commands that led to them.

Everything is computed from what `benchmark` left in OUT (and, for the timelines, from the shards that it used, while
they are there), so the page can be written again at any time. No script, nothing loaded; the figures are inlined.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.storage import write_text
from pipeline.terminal import counted
from trainer.arms import find_rung
from trainer.config import MODES
from trainer.evaluation import conclusions, plots
from trainer.evaluation.benchmark_folder import (
    MIN_FRAMES_PER_BIN,
    Benchmark,
    Row,
    baseline,
    convergence,
    precision_recall,
    read_benchmark,
    reliability,
    state_over_time,
    training_curves,
)
from trainer.evaluation.disagreements import find_disagreements
from trainer.evaluation.ladder import PRIMARY, Step, ladder_steps, pairs_of
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.plots import (
    Curve,
    Mark,
    Panel,
    arm_colour,
    css_colour,
    format_interval,
    format_number,
    printable,
)

MOST_GROUPS: Final = 12  # of a kind, on the page
PAGE, FIGURES = "report.html", "figures"
UPDATE_LATENCY: Final = "median latency of right updates (s)"
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
    loader = PackageLoader("trainer.evaluation", ".")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": format_number, "count": counted}
    more = {"narrowing": narrowing, "in_progress": in_progress}
    write_text(out / PAGE, page.get_template(PAGE).render(page_data(bench) | more))
    return out / PAGE


def page_data(bench: Benchmark) -> dict[str, Any]:
    """All that the template shows; draws the figures into OUT/figures on the way."""
    info, (metric, a, b) = bench.info, bench.primary
    interest = pairs_of(bench.rungs)  # the ladder's other pairs only say how high one has to climb
    rows = [row | {"heading": _heading(row["metric"])} for row in bench.comparisons if (row["a"], row["b"]) in interest]
    rows.sort(key=lambda row: (not row["primary"], [*METRICS].index(row["metric"])))
    clips, about = find_disagreements(bench, a, b)
    return {
        "opening": conclusions.opening(bench),
        "leaks": [*conclusions.leaks(bench)],
        "question": conclusions.question(bench),
        "one_seed": conclusions.one_seed(bench),
        "harness": conclusions.harness_check(bench),
        "limits": conclusions.limits(bench),
        "size": conclusions.data_size(info),
        "colours": {"light": plots.css_colours(), "dark": plots.css_colours(dark=True)},
        "arms": {rung: {"about": find_rung(rung), "colour": css_colour(arm_colour(rung))} for rung in bench.rungs},
        "steps": ladder_steps(bench),
        "groups": {by: found for by in ("dataset", "task") if len(found := _groups(bench, by)) > 1},
        "convergence": convergence(bench),
        "figures": {name: _draw(bench, name, make, label) for name, (make, label) in _figures(bench).items()},
        "min_frames": MIN_FRAMES_PER_BIN,
        "primary": {"metric": metric, "a": a, "b": b, "arm": a if a in bench.rungs else bench.rungs[0]},
        "disagreements": about,
        "clips": [
            {"svg": _draw(bench, f"timeline-{i}", partial(plots.timeline, clip.timeline), clip.timeline.title),
             "lines": clip.lines, "omitted": clip.omitted}
            for i, clip in enumerate(clips, 1)
        ],
        "metrics": _metric_rows(bench),
        "comparisons": [row for row in rows if row["metric"] == metric],
        "other_comparisons": [row for row in rows if row["metric"] != metric],
        "info": info,
        "mode": bench.mode,
        "thresholds_from": sorted({run["thresholds_from"] for run in bench.metrics.values()} - {None}),
    }  # fmt: skip


def _groups(bench: Benchmark, by: str) -> dict[str, dict[str, Row]]:
    """Group -> rung -> its row in the mode of the answer; those with most speech first."""
    found: dict[str, dict[str, Row]] = {}
    for row in bench.groups:
        if row["by"] == by and row["mode"] == bench.mode:
            found.setdefault(printable(row["group"], 40), {})[row["rung"]] = row
    return dict([*found.items()][:MOST_GROUPS])


def _heading(name: str) -> str:
    return f"{METRICS[name].label} ({METRICS[name].unit})" if METRICS[name].unit else METRICS[name].label


def _metric_rows(bench: Benchmark) -> list[dict[str, Any]]:
    """Per metric and mode: each arm's value and interval, and the baseline."""
    arms, rows = bench.rungs, []
    for name in METRICS:
        cells = {mode: [bench.arm(arm, mode, name) for arm in arms] for mode in bench.modes}
        if any(map(any, cells.values())):
            baselines = {mode: baseline(bench, mode, name) for mode in bench.modes}
            rows.append({"name": name, "heading": _heading(name), "modes": cells, "baselines": baselines})
    cells = {}
    for mode in bench.modes:
        seeds = [bench.of_seeds(arm, mode, "state.transitions.median_latency_s") for arm in arms]
        if any(seeds):  # means without an interval: not compared
            cells[mode] = [{"value": np.mean(latencies) if latencies else None, "low": None} for latencies in seeds]
    if cells:
        rows.append({"name": "", "heading": UPDATE_LATENCY, "modes": cells, "baselines": dict.fromkeys(cells)})
    return rows


# ---- figures -----------------------------------------------------------------------------------------


def _draw(bench: Benchmark, name: str, make: Callable[[], Figure], label: str) -> Markup:
    return Markup(plots.write_figure(bench.out / FIGURES / name, make, label))


def _figures(bench: Benchmark) -> dict[str, tuple[Callable[[], Figure], str]]:
    """Name of its files -> (what draws it, accessible name); `state` only where some arm tells the state."""
    training = [
        _training_panel(bench, head, name) for head, name in (("speaking", "Speaking"), ("dst_update", "DST update"))
    ]
    panels = {
        "windows": ([_window_panel(bench, mode) for mode in bench.modes], "F1 at the widest"),
        "precision-recall": ([_pr_panel(bench, mode) for mode in MODES], "AP"),
        "reliability": ([_reliability_panel(bench, mode) for mode in MODES], "ECE"),
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
    by_mode = [{step.rung: step for step in ladder_steps(bench, mode)} for mode in bench.modes]
    return [
        plots.RungRow(find_rung(rung).label, arm_colour(rung), [_mark(bench, steps, rung, mode) for mode, steps in
                                                               zip(bench.modes, by_mode, strict=True)])
        for rung in bench.rungs
    ]  # fmt: skip


def _mark(bench: Benchmark, steps: dict[str, Step], rung: str, mode: str) -> Mark:
    row, step = bench.arm(rung, mode, PRIMARY), steps.get(rung)
    ends = (row.get("value"), row.get("low"), row.get("high"))
    if step is None or step.below is None:
        return Mark(*ends)
    told = format_interval(step.difference, step.low, step.high, signed=True)
    return Mark(*ends, steps[step.below].value, told)


def _window_panel(bench: Benchmark, mode: str) -> Panel:
    """Event F1 over the width of the window; dashed: the metronome."""
    rows, curves = bench.windows.filter(mode=mode).sort("width_s"), []
    for rung in (name for name in bench.rungs if name != "metronome"):
        of_rung = rows.filter(rung=rung)
        lines = [
            (of_seed["width_s"].to_numpy(), of_seed["f1"].to_numpy())
            for _, of_seed in of_rung.group_by("seed", maintain_order=True)
        ]
        if lines:
            mean = np.mean([f1 for _, f1 in lines], axis=0)
            curves.append(Curve(rung, lines, (lines[0][0], mean), format_number(float(mean[-1]))))
    beside = rows.unique("width_s").sort("width_s").drop_nulls("metronome_f1")
    line = (beside["width_s"].to_numpy(), beside["metronome_f1"].to_numpy(), "") if len(beside) else None
    widest = float(rows["width_s"].max() or 0)
    return Panel(f"Event F1, {mode}", curves, "width of the window (s)", "event F1", line, widest, dots=True)


def _pr_panel(bench: Benchmark, mode: str) -> Panel:
    curves, chance = precision_recall(bench, mode)
    line = None if chance is None else (np.array([0.0, 1.0]), np.array([chance, chance]), f"guessing {chance:.3f}")
    return Panel(f"Speaking, {mode}", curves, "recall", "precision", line, 1.0, empty="no scores")


def _reliability_panel(bench: Benchmark, mode: str) -> Panel:
    curves, empty = reliability(bench, mode), "no corrected probabilities"
    return Panel(f"Speaking, {mode}", curves, "probability", "share", _DIAGONAL, 1.0, dots=True, empty=empty)


def _training_panel(bench: Benchmark, head: str, name: str) -> Panel:
    curves, split = training_curves(bench, head)
    last = max((float(steps[-1]) for curve in curves for steps, _ in curve.seeds), default=None)
    return Panel(f"{name}, {split}", curves, "optimizer steps", "average precision", None, last, empty="not measured")
