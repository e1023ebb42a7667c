"""OUT/report.html and OUT/figures/: the answer in a sentence, figures, all numbers, and the commands that led to them.

Everything is computed from what `benchmark` left in OUT (and, for the timelines, from the shards that it used, while
they are there), so the page can be written again at any time. No script, nothing loaded; the figures are inlined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    precision_recall,
    read_benchmark,
    reliability,
    state_over_time,
    training_curves,
)
from trainer.evaluation.disagreements import find_disagreements
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.plots import Forest, Mark, Panel, arm_colour, css_colour, format_number

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
    rows = [row | {"heading": _heading(row["metric"])} for row in bench.comparisons]
    rows.sort(key=lambda row: (not row["primary"], [*METRICS].index(row["metric"])))
    clips, about = find_disagreements(bench, a, b)
    return {
        "headline": conclusions.headline(bench),
        "one_seed": conclusions.one_seed(bench),
        "harness": conclusions.harness_check(bench),
        "limits": conclusions.limits(bench),
        "size": conclusions.data_size(info),
        "colours": {"light": plots.css_colours(), "dark": plots.css_colours(dark=True)},
        "arms": {arm: {"about": find_rung(arm).uses, "colour": css_colour(arm_colour(arm))} for arm in bench.rungs},
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
    metrics = list(dict.fromkeys((bench.primary[0], "speaking_ap")))
    pairs = list(dict.fromkeys((row["a"], row["b"]) for row in bench.comparisons))
    training = [
        _training_panel(bench, head, name) for head, name in (("speaking", "Speaking"), ("dst_update", "DST update"))
    ]
    forests = {"arms": [_arms_forest(bench, metric) for metric in metrics]}
    if pairs:
        forests["differences"] = [_differences_forest(bench, metric, pairs) for metric in metrics]
    panels = {
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
        **{name: (partial(plots.forest, forest), forest[0].heading) for name, forest in forests.items()},
        **{name: (partial(plots.curve_panels, *drawn), name) for name, drawn in panels.items()},
    }


def _arms_forest(bench: Benchmark, metric: str) -> Forest:
    levels = [level for mode in bench.modes if (level := baseline(bench, mode, metric))]  # the same in every mode
    line = (levels[0].value, f"{levels[0].name}: {format_number(levels[0].value)}") if levels else None
    arms = bench.rungs
    cells = {arm: [bench.arm(arm, mode, metric) or {"mode": mode} for mode in bench.modes] for arm in arms}
    return Forest(_heading(metric), [_row(arm, arm_colour(arm), row, "value") for arm, row in cells.items()], line)


def _differences_forest(bench: Benchmark, metric: str, pairs: Sequence[tuple[str, str]]) -> Forest:
    cells = {
        f"{a} - {b}": [bench.comparison(a, b, mode, metric) or {"mode": mode} for mode in bench.modes] for a, b in pairs
    }
    side = "right" if METRICS[metric].higher_is_better else "left"
    heading = f"Difference in {_heading(metric)}: {side} of the line the first is better"
    rows = [_row(pair, plots.INK, row, "difference") for pair, row in cells.items()]
    return Forest(heading, rows, (0.0, "no difference"), signed=True)


def _row(name: str, colour: str, cells: Sequence[Row], value: str) -> plots.Row:
    return plots.Row(name, colour, [Mark(c["mode"], c.get(value), c.get("low"), c.get("high")) for c in cells])


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
