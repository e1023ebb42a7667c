"""RUN/curves.svg from RUN/metrics.jsonl: losses, average precision against chance, gradient norm, learning rate.

Thin lines are single steps, thick ones running means, in which a step counts by what its loss was averaged over. The
same metrics give the same bytes (under one matplotlib).

    S steps
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.schema import HEAD_TITLES
from pipeline.storage import write_text
from trainer.evaluation.plots import DASHED, DST, INK, MUTED, SPEAKING, Values, new_figure, printable, render, thin
from trainer.run_log import Line, read_metrics, short

NAMES: Final = {"loss": "total", **HEAD_TITLES, "lm": "text", "grad_norm": "", "lr": ""}
COLOURS: Final = {"loss": INK, "speaking": SPEAKING, "dst_update": DST, "lm": "#0d9488", "grad_norm": INK, "lr": INK}


class Curves(NamedTuple):
    """`values` are NaN where a step has none, and `means` with them; both by the names in COLOURS, [S] each."""

    run: str
    steps: Values  # [S], ascending
    values: dict[str, Values]
    means: dict[str, Values]
    half_life: int  # of the means, in steps
    evaluations: list[Line]  # ascending


def draw(run: Path) -> None:
    """Write RUN/curves.svg."""
    svg, _ = render(partial(make_figure, read_curves(run)))
    write_text(run / "curves.svg", svg)


def read_curves(run: Path) -> Curves:
    lines = read_metrics(run)
    steps = [line for line in lines if "evaluation" not in line]
    half_life = max(1, round(len(steps) / 50))
    values, means = {}, {}
    for name in COLOURS:
        weights = np.array([line.get(f"n_{name}", 1.0) for line in steps])
        known = np.array([line[name] for line in steps], float)  # null: NaN
        values[name] = np.where(weights > 0, known, np.nan)  # 0 where nothing was supervised is no measurement
        means[name] = values[name] if name == "lr" else running_mean(values[name], weights, half_life)
    numbers = np.array([line["step"] for line in steps], float)
    evaluations = [line for line in lines if "evaluation" in line]
    return Curves(run.resolve().name, numbers, values, means, half_life, evaluations)


def _last(values: Values) -> float:
    """That is known; NaN where none is."""
    return float(next(iter(values[np.isfinite(values)][::-1]), np.nan))


def running_mean(values: Values, weights: Values, half_life: float) -> Values:
    """[S]: mean around each step, earlier and later, weights halving every `half_life` steps; NaN where values are.

    Sums over sums: a step with little to supervise counts little. Looks both ways, so it does not lag.
    """
    keep = 0.5 ** (1 / half_life)

    def decayed(terms: Values) -> Values:
        return np.array(list(accumulate(terms.tolist(), lambda total, term: total * keep + term)))

    known = np.isfinite(values)
    products, weights = (np.where(known, terms, 0.0) for terms in (values * weights, weights))
    total, weight = (decayed(terms) + decayed(terms[::-1])[::-1] - terms for terms in (products, weights))
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=known)


def make_figure(curves: Curves) -> Figure:
    headings = {"loss": "Loss", "norm": "Gradient norm", "rate": "Learning rate"}
    rows, heights, how = [["loss", "loss"], ["norm", "rate"]], [220, 120], ""
    if len(curves.evaluations) > 1:
        headings["ap"] = f"Average precision on {printable(curves.evaluations[-1]['evaluation']['split'], 20)}"
        rows, heights = [rows[0], ["ap", "ap"], rows[1]], [220, 120, 120]
    elif curves.evaluations:
        [line] = curves.evaluations
        aps = [f"{name} {short(line['evaluation'][head]['ap'])}" for head, name in HEAD_TITLES.items()]
        how = f"Evaluated once, at step {line['step']:,}: average precision {' and '.join(aps)}.\n"
    figure = new_figure(90 + sum(heights) + 62 * len(heights))
    panels = figure.subplot_mosaic(rows, height_ratios=heights)  # type: ignore[arg-type]
    count = int(curves.steps[-1])
    title = f"{printable(curves.run)}: {count:,} step{'s' * (count != 1)}, loss {short(_last(curves.means['loss']))}"
    figure.suptitle(title, x=0.012, ha="left", size=17, weight="bold")
    how += f"Thin: each step. Thick, and numbers: running mean (half-life {curves.half_life:,})."
    figure.supxlabel(how, x=0.012, ha="left", size=11.5, color=MUTED)
    for name, axes in panels.items():
        axes.set_title(headings[name])
        axes.set_xlim(curves.steps[0] - 1, count)
        axes.xaxis.set_major_locator(MaxNLocator(10 if name in ("loss", "ap") else 5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}" if step else "step 0"))
    _draw_lines(panels["loss"], curves, ["loss", *HEAD_TITLES, "lm"])
    _draw_lines(panels["norm"], curves, ["grad_norm"])
    _draw_lines(panels["rate"], curves, ["lr"], log=False)
    if "ap" in panels:
        _draw_precision(panels["ap"], curves.evaluations)
    for axes in panels.values():
        if axes.get_legend_handles_labels()[0]:  # names right of the axes, in their lines' colours
            axes.legend(loc="center left", handlelength=1.2, bbox_to_anchor=(1.01, 0.5), labelcolor="linecolor")
    return figure


def _draw_lines(axes: Axes, curves: Curves, names: Sequence[str], log: bool = True) -> None:
    """Each step thin, the running mean thick and named; logarithmic where they span more than 1.5 decades."""
    names = [name for name in names if np.isfinite(curves.values[name]).any()]
    for name in sorted(names, key=lambda name: _last(curves.means[name]), reverse=True):
        values, colour = curves.values[name], COLOURS[name]
        marker = "o" if np.isfinite(values).sum() < 3 else ""  # too few steps for a line
        label = f"{NAMES[name]} {short(_last(curves.means[name]))}".strip()
        mean = thin(curves.steps, curves.means[name])
        axes.plot(*thin(curves.steps, values), color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(*mean, color=colour, linewidth=2, marker=marker, label=label, clip_on=False)
    highest = max((np.nanmax(curves.values[name]) for name in names), default=0.0)
    means = np.concatenate([[np.nan], *(curves.means[name] for name in names)])
    lowest = means[means > 0].min() / 2 if log and (means > 0).any() else highest
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
    axes.set(ylim=(0, 1.02), yticks=[0, 0.5, 1])
    steps = [line["step"] for line in evaluations]
    for head, name in HEAD_TITLES.items():
        logged = [line["evaluation"][head] for line in evaluations]
        aps, colour, chance = np.array([entry["ap"] for entry in logged], float), COLOURS[head], logged[-1]["chance"]
        if np.isfinite(aps).any():
            label = f"{name} {short(_last(aps))}"
            axes.plot(steps, aps, "o-", color=colour, linewidth=2, markersize=5, clip_on=False, zorder=3, label=label)
            axes.axhline(chance, color=colour, linewidth=1.2, linestyle=DASHED, label=f"  chance {short(chance)}")
