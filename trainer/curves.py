"""RUN/curves.svg from RUN/metrics.jsonl: losses, and average precision against chance.

Thin lines are single steps, thick ones running means, in which a step counts by what its loss was averaged over. The
same metrics give the same bytes (under one matplotlib).

    S steps
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.signal import lfilter

from pipeline.schema import HEAD_TITLES
from pipeline.storage import write_text
from trainer.evaluation.plots import DASHED, DST, INK, MUTED, SPEAKING, Values, new_figure, printable, render, thin
from trainer.run_log import Line, read_metrics, short

NAMES: Final = {"loss": "total", **HEAD_TITLES, "lm": "text"}
COLOURS: Final = {"loss": INK, "speaking": SPEAKING, "dst_update": DST, "lm": "#0d9488"}


def draw(run: Path) -> None:
    """Write RUN/curves.svg."""
    svg, _ = render(partial(make_figure, run.resolve().name, read_metrics(run)))
    write_text(run / "curves.svg", svg)


def running_mean(values: Values, weights: Values, half_life: float) -> Values:
    """[S]: mean around each step, earlier and later, weights halving every `half_life` steps; NaN where values are.

    Sums over sums: a step with little to supervise counts little. Looks both ways, so it does not lag.
    """
    decayed = partial(lfilter, [1.0], [1.0, -(0.5 ** (1 / half_life))])
    known = np.isfinite(values)
    products, weights = (np.where(known, terms, 0.0) for terms in (values * weights, weights))
    total, weight = (decayed(terms) + decayed(terms[::-1])[::-1] - terms for terms in (products, weights))
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=known)


def make_figure(run: str, lines: Sequence[Line]) -> Figure:
    """Of the run's metrics, all lines in order."""
    steps = [line for line in lines if "evaluation" not in line]
    evaluations = [line for line in lines if "evaluation" in line]
    heights = [220, 120] if evaluations else [220]
    figure = new_figure(90 + sum(heights) + 62 * len(heights))
    panels = figure.subplots(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    half_life, last = max(1, round(len(steps) / 50)), steps[-1]["step"]
    title = f"{printable(run)}: {last:,} step{'s' * (last != 1)}"
    figure.suptitle(title, x=0.012, ha="left", size=17, weight="bold")
    how = f"Thin: each step. Thick, and numbers: running mean (half-life {half_life:,})."
    figure.supxlabel(how, x=0.012, ha="left", size=11.5, color=MUTED)
    _draw_losses(panels[0], steps, half_life)
    if evaluations:
        _draw_precision(panels[1], evaluations)
    for axes in panels:
        axes.set_xlim(steps[0]["step"] - 1, last)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}" if step else "step 0"))
        if axes.get_legend_handles_labels()[0]:  # names right of the axes, in their lines' colours
            axes.legend(loc="center left", handlelength=1.2, bbox_to_anchor=(1.01, 0.5), labelcolor="linecolor")
    return figure


def _draw_losses(axes: Axes, steps: Sequence[Line], half_life: int) -> None:
    """Each step thin, the running mean thick and named; logarithmic where they span more than 1.5 decades."""
    axes.set_title("Loss")
    numbers = np.array([line["step"] for line in steps], float)
    curves = {}  # name -> [S] values, NaN where nothing was supervised; [S] running mean
    for name in NAMES:
        weights = np.array([line.get(f"n_{name}", 1.0) for line in steps])
        values = np.where(weights > 0, np.array([line[name] for line in steps], float), np.nan)
        curves[name] = values, running_mean(values, weights, half_life)
    ends = {name: mean[np.isfinite(mean)][-1] for name, (_, mean) in curves.items() if np.isfinite(mean).any()}
    for name in sorted(ends, key=ends.__getitem__, reverse=True):
        values, mean = curves[name]
        marker = "o" if np.isfinite(values).sum() < 3 else ""  # too few steps for a line
        colour, label = COLOURS[name], f"{NAMES[name]} {short(ends[name])}"
        axes.plot(*thin(numbers, values), color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(*thin(numbers, mean), color=colour, linewidth=2, marker=marker, label=label, clip_on=False)
    highest = max((np.nanmax(curves[name][0]) for name in ends), default=0.0)
    means = np.concatenate([[np.nan], *(curves[name][1] for name in ends)])
    lowest = means[means > 0].min() / 2 if (means > 0).any() else highest
    if highest > lowest * 10**1.5:
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 3) if highest < lowest * 1000 else (1,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(lowest, highest * 1.2)
    else:
        axes.set_ylim(0, highest * 1.05 or 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_precision(axes: Axes, evaluations: Sequence[Line]) -> None:
    """Both heads' average precision, and what guessing would get."""
    axes.set_title(f"Average precision on {printable(evaluations[-1]['evaluation']['split'], 20)}")
    axes.set(ylim=(0, 1.02), yticks=[0, 0.5, 1])
    for head, name in HEAD_TITLES.items():
        logged = [(line["step"], line["evaluation"][head]) for line in evaluations]
        known = [(step, entry["ap"]) for step, entry in logged if entry["ap"] is not None]
        if known:
            colour, label, chance = COLOURS[head], f"{name} {short(known[-1][1])}", logged[-1][1]["chance"]
            axes.plot(*zip(*known, strict=True), "o-", color=colour, markersize=5, clip_on=False, zorder=3, label=label)
            axes.axhline(chance, color=colour, linewidth=1.2, linestyle=DASHED, label=f"  chance {short(chance)}")
