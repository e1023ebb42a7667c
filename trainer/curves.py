"""RUN/curves.svg from RUN/metrics.jsonl: losses, average precision against chance, gradient norm, learning rate.

Thin lines are single steps, thick ones running means, in which a step counts by what its loss was averaged over. The
same metrics give the same bytes (under one matplotlib).

    S steps
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.signal import lfilter

from pipeline.schema import HEAD_TITLES
from pipeline.storage import write_text
from trainer.evaluation.plots import DASHED, DST, INK, MUTED, SPEAKING, Values, new_figure, printable, render, thin
from trainer.run_log import Line, read_metrics, short

NAMES: Final = {"loss": "total", **HEAD_TITLES, "lm": "text", "grad_norm": "", "lr": ""}
COLOURS: Final = {"speaking": SPEAKING, "dst_update": DST, "lm": "#0d9488"}


class Curve(NamedTuple):
    """A number of each step, [S]; NaN where a step has none, as its mean has."""

    values: Values
    mean: Values

    @property
    def end(self) -> float:
        return _last(self.mean)


def draw(run: Path) -> None:
    """Write RUN/curves.svg."""
    svg, _ = render(partial(make_figure, run.resolve().name, read_metrics(run)))
    write_text(run / "curves.svg", svg)


def read_curve(steps: Sequence[Line], name: str, half_life: int) -> Curve:
    """Of that name in the lines of metrics.jsonl."""
    weights = np.array([line.get(f"n_{name}", 1.0) for line in steps])
    known = np.array([line[name] for line in steps], float)  # null: NaN
    values = np.where(weights > 0, known, np.nan)  # 0 where nothing was supervised is no measurement
    return Curve(values, values if name == "lr" else running_mean(values, weights, half_life))


def running_mean(values: Values, weights: Values, half_life: float) -> Values:
    """[S]: mean around each step, earlier and later, weights halving every `half_life` steps; NaN where values are.

    Sums over sums: a step with little to supervise counts little. Looks both ways, so it does not lag.
    """

    def decayed(terms: Values) -> Values:
        return lfilter([1.0], [1.0, -(0.5 ** (1 / half_life))], terms)

    known = np.isfinite(values)
    products, weights = (np.where(known, terms, 0.0) for terms in (values * weights, weights))
    total, weight = (decayed(terms) + decayed(terms[::-1])[::-1] - terms for terms in (products, weights))
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=known)


def _last(values: Values) -> float:
    """That is known; NaN where none is."""
    return float(next(iter(values[np.isfinite(values)][::-1]), np.nan))


def make_figure(run: str, lines: Sequence[Line]) -> Figure:
    """Of the run's metrics, all lines in order."""
    steps = [line for line in lines if "evaluation" not in line]
    evaluations = [line for line in lines if "evaluation" in line]
    numbers, half_life = np.array([line["step"] for line in steps], float), max(1, round(len(steps) / 50))
    curves = {name: read_curve(steps, name, half_life) for name in NAMES}

    headings, how = {"loss": "Loss", "norm": "Gradient norm", "rate": "Learning rate"}, ""
    rows, heights = [["loss", "loss"], ["norm", "rate"]], [220, 120]
    if len(evaluations) > 1:
        headings["ap"] = f"Average precision on {printable(evaluations[-1]['evaluation']['split'], 20)}"
        rows, heights = [rows[0], ["ap", "ap"], rows[1]], [220, 120, 120]
    elif evaluations:
        aps = [f"{name} {short(evaluations[0]['evaluation'][head]['ap'])}" for head, name in HEAD_TITLES.items()]
        how = f"Evaluated once, at step {evaluations[0]['step']:,}: average precision {' and '.join(aps)}.\n"
    figure = new_figure(90 + sum(heights) + 62 * len(heights))
    panels = figure.subplot_mosaic(rows, height_ratios=heights)  # type: ignore[arg-type]
    count = int(numbers[-1])
    title = f"{printable(run)}: {count:,} step{'s' * (count != 1)}, loss {short(curves['loss'].end)}"
    figure.suptitle(title, x=0.012, ha="left", size=17, weight="bold")
    how += f"Thin: each step. Thick, and numbers: running mean (half-life {half_life:,})."
    figure.supxlabel(how, x=0.012, ha="left", size=11.5, color=MUTED)

    for name, axes in panels.items():
        axes.set_title(headings[name])
        axes.set_xlim(numbers[0] - 1, count)
        axes.xaxis.set_major_locator(MaxNLocator(10 if name in ("loss", "ap") else 5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}" if step else "step 0"))
    rate, norm = curves.pop("lr"), curves.pop("grad_norm")
    _draw_lines(panels["loss"], numbers, curves)
    _draw_lines(panels["norm"], numbers, {"grad_norm": norm})
    _draw_lines(panels["rate"], numbers, {"lr": rate}, log=False)
    if "ap" in panels:
        _draw_precision(panels["ap"], evaluations)
    for axes in panels.values():
        if axes.get_legend_handles_labels()[0]:  # names right of the axes, in their lines' colours
            axes.legend(loc="center left", handlelength=1.2, bbox_to_anchor=(1.01, 0.5), labelcolor="linecolor")
    return figure


def _draw_lines(axes: Axes, steps: Values, curves: Mapping[str, Curve], log: bool = True) -> None:
    """Each step thin, the running mean thick and named; logarithmic where they span more than 1.5 decades."""
    known = {name: curve for name, curve in curves.items() if np.isfinite(curve.values).any()}
    for name, curve in sorted(known.items(), key=lambda item: item[1].end, reverse=True):
        marker = "o" if np.isfinite(curve.values).sum() < 3 else ""  # too few steps for a line
        colour, label = COLOURS.get(name, INK), f"{NAMES[name]} {short(curve.end)}".strip()
        axes.plot(*thin(steps, curve.values), color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(*thin(steps, curve.mean), color=colour, linewidth=2, marker=marker, label=label, clip_on=False)
    highest = max((np.nanmax(curve.values) for curve in known.values()), default=0.0)
    means = np.concatenate([[np.nan], *(curve.mean for curve in known.values())])
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
