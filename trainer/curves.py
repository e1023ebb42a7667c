"""A run as a picture: RUN/curves.svg, drawn from RUN/metrics.jsonl with nothing else at hand.

Losses over steps, average precision of both heads against chance, gradient norm and learning rate. Thin lines are
single steps, thick ones running means: each term weighed by what it was averaged over, as one big step would be.
800 units wide; the same metrics give the same bytes (under one matplotlib). At most 800 points a line, so a run of
5,000 steps takes 136 kB; spikes survive the thinning.

    S steps
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.storage import write_text
from trainer.run_log import METRICS, Line, read_metrics, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

CURVES: Final = "curves.svg"
WIDTH: Final = 800
INK, MUTED, GRID = "#1f2328", "#57606a", "#d0d7de"  # as in docs/learned.svg
NAMES: Final = {"loss": "total", "speaking": "speaking", "dst_update": "DST", "lm": "text"}
COLOURS: Final = {"loss": INK, "speaking": "#2563eb", "dst_update": "#d97706", "lm": "#0d9488"}
DRAWN: Final = (*COLOURS, "grad_norm", "lr")
_FONTS = "system-ui, -apple-system, 'Segoe UI', sans-serif"
_BUCKETS, _LOG_FROM = 400, 10**1.5
_LEFT, _TOP, _WIDE, _HALF, _LOSS, _SMALL, _GAP, _BOTTOM = 56, 90, 614, 252, 220, 120, 62, 36  # units


@dataclass(frozen=True)
class Curves:
    """What there is to draw; `values` are NaN where a step has none, and `means` with them."""

    name: str
    steps: Values  # [S], ascending
    values: dict[str, Values]  # of each name in DRAWN, [S]
    means: dict[str, Values]  # of each in DRAWN, [S]
    half_life: int  # of the means, in steps
    evaluations: list[Line]  # of the last one's split, ascending

    def end(self, name: str) -> float:
        """Where the running mean ends; NaN where there is none."""
        known = self.means[name][np.isfinite(self.means[name])]
        return float(known[-1]) if len(known) else math.nan


def draw(run: Path) -> Path:
    """Write RUN/curves.svg from RUN/metrics.jsonl; its path. InputError where there is no step to draw."""
    write_text(run / CURVES, render(read_curves(run)))
    return run / CURVES


def read_curves(run: Path) -> Curves:
    """The run's numbers; of a step or evaluation that was logged twice, the later."""
    lines = read_metrics(run)
    steps = {line["step"]: line for line in lines if "evaluation" not in line}
    if not steps:
        raise InputError(f"{run / METRICS}: found no step, expected what train writes; train first")
    numbers = sorted(steps)
    half_life = max(1, round(len(numbers) / 50))
    values, means = {}, {}
    for name in DRAWN:
        weights = np.array([_number(steps[n].get(f"n_{name}", 1.0)) for n in numbers])
        found = np.array([_number(steps[n].get(name)) for n in numbers])
        values[name] = np.where(weights > 0, found, np.nan)  # 0 where nothing was supervised is no measurement
        means[name] = running_mean(values[name], weights, half_life)
    return Curves(run.resolve().name, np.array(numbers, float), values, means, half_life, _evaluations(lines))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _evaluations(lines: Sequence[Line]) -> list[Line]:
    found = [line for line in lines if "evaluation" in line]
    same = {line["step"]: line for line in found if line["evaluation"]["split"] == found[-1]["evaluation"]["split"]}
    return [same[step] for step in sorted(same)]


def running_mean(values: Values, weights: Values, half_life: float) -> Values:
    """[S]: mean around each step, earlier and later, weights halving every `half_life` steps; NaN where values are.

    Sums over sums: a step with little to supervise counts little. Looks both ways, so it does not lag.
    """
    known = np.isfinite(values)
    top, bottom = (_around(np.where(known, part, 0.0), half_life) for part in (values * weights, weights))
    return np.divide(top, bottom, out=np.full(len(values), np.nan), where=known)


def _around(values: Values, half_life: float) -> Values:
    """[S]: the sum over all steps, each counting half for every `half_life` steps between."""
    keep = 0.5 ** (1 / half_life)
    before, after = (
        np.array(list(accumulate(part.tolist(), lambda total, value: total * keep + value)))
        for part in (values, values[::-1])
    )
    return before + after[::-1] - values


def thin(steps: Values, values: Values) -> tuple[Values, Values]:
    """The same line in at most 800 points: of each of 400 stretches the lowest and the highest, in their order."""
    known = np.flatnonzero(np.isfinite(values))
    if len(known) <= 2 * _BUCKETS:
        return steps[known], values[known]
    parts = np.array_split(known, _BUCKETS)
    chosen = np.array([sorted((p[values[p].argmin()], p[values[p].argmax()])) for p in parts]).ravel()
    return steps[chosen], values[chosen]


# ---- the picture -------------------------------------------------------------------------------------


def render(curves: Curves) -> str:
    """The SVG. Its words stay words: they take the reader's own font, and can be searched."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's own font lacks
        matplotlib.rcdefaults()  # the user's own settings would change the picture
        matplotlib.rcParams.update(_STYLE)
        figure = make_figure(curves)
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})
    svg = out.getvalue().replace("'DejaVu Sans'", _FONTS)
    return re.sub(r'width="(\d+)pt" height="(\d+)pt"', r'width="\1" height="\2"', svg, count=1)


_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prospect-dst",
    "font.family": ["DejaVu Sans"],
    "axes.unicode_minus": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_joinstyle": "round",
    "lines.solid_capstyle": "round",
}


def make_figure(curves: Curves) -> Figure:
    """The matplotlib figure, one point a unit; `render` makes the SVG of it."""
    from matplotlib.figure import Figure

    evaluated = bool(curves.evaluations)
    height = _TOP + _LOSS + (1 + evaluated) * (_GAP + _SMALL) + _BOTTOM
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor="white")
    _say(figure, _LEFT, 28, _title(curves), size=17, weight="bold")
    _say(figure, _LEFT, 48, _about(curves), size=12, color=MUTED)
    _losses(_panel(figure, curves, "Loss", _TOP, _LOSS), curves)
    top = _TOP + _LOSS + _GAP
    if evaluated:
        heading = f"Average precision on {curves.evaluations[-1]['evaluation']['split']}"
        _precision(_panel(figure, curves, heading, top, _SMALL), curves)
        top += _GAP + _SMALL
    _norm(_panel(figure, curves, "Gradient norm", top, _SMALL, width=_HALF), curves)
    _rate(_panel(figure, curves, "Learning rate", top, _SMALL, left=_LEFT + _WIDE - _HALF, width=_HALF), curves)
    return figure


def _title(curves: Curves) -> str:
    count = int(curves.steps[-1])
    return f"{_plain(curves.name)}: {count:,} step{'s' * (count != 1)}, loss {short(curves.end('loss'))}"


def _about(curves: Curves) -> str:
    """What the last evaluation found, and how to read the lines."""
    how = f"Thin: each step. Thick, and numbers: running mean (half-life {curves.half_life:,})."
    if not curves.evaluations:
        return f"Not evaluated. {how}"
    found = curves.evaluations[-1]["evaluation"]
    heads = [f"{NAMES[head]} AP {short(found[head]['ap'])}" for head in ("speaking", "dst_update")]
    return f"{_plain(found['split'], 12)}: {', '.join(heads)}. {how}"


def _losses(axes: Axes, curves: Curves) -> None:
    """Total and terms, each named at its end."""
    known = [name for name in COLOURS if np.isfinite(curves.values[name]).any()]
    for name in reversed(known):
        _line(axes, curves, name, COLOURS[name])
    _scale(axes, curves, known)
    ends = [(curves.end(name), name) for name in known]
    _names(axes, [(end, f"{NAMES[name]} {short(end)}", COLOURS[name]) for end, name in ends])


def _precision(axes: Axes, curves: Curves) -> None:
    """Both heads' AP over steps, and what guessing would get."""
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ends = []
    for head in ("speaking", "dst_update"):
        found = [line["evaluation"][head] for line in curves.evaluations]
        aps, chance, colour = np.array([_number(f["ap"]) for f in found]), _number(found[-1]["chance"]), COLOURS[head]
        if not np.isfinite(aps).any():
            continue
        at = [line["step"] for line in curves.evaluations]
        axes.plot(at, aps, color=colour, linewidth=2, marker="o", markersize=5, clip_on=False, zorder=3)
        axes.axhline(chance, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
        last = aps[np.isfinite(aps)][-1]
        ends += [(last, f"{NAMES[head]} {short(last)}", colour), (chance, f"chance {short(chance)}", colour)]
    _names(axes, ends)


def _norm(axes: Axes, curves: Curves) -> None:
    _line(axes, curves, "grad_norm", INK)
    _scale(axes, curves, ["grad_norm"])
    end = curves.end("grad_norm")
    _names(axes, [(end, short(end), INK)])


def _rate(axes: Axes, curves: Curves) -> None:
    steps, rates = thin(curves.steps, curves.values["lr"])
    axes.plot(steps, rates, color=INK, linewidth=2, marker=_marker(rates), clip_on=False)
    _scale(axes, curves, ["lr"], never_log=True)


# ---- parts of a panel --------------------------------------------------------------------------------


def _say(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text at (x, y) units from the top left."""
    figure.text(x / WIDTH, 1 - y / (figure.get_figheight() * 72), text, **style)


def _panel(
    figure: Figure, curves: Curves, heading: str, top: float, height: float, left: float = _LEFT, width: float = _WIDE
) -> Axes:
    """Axes over the run's steps, with a heading; place and size in units from the top left."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    tall = figure.get_figheight() * 72
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / tall, width / WIDTH, height / tall))
    _say(figure, left, top - 10, _plain(heading), size=13, weight="bold")
    axes.set_xlim(curves.steps[0] - 1, curves.steps[-1])
    axes.xaxis.set_major_locator(MaxNLocator(5 if width < _WIDE else 10, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}" if step else "step 0"))
    return axes


def _line(axes: Axes, curves: Curves, name: str, colour: str) -> None:
    """Each step thin, the running mean thick."""
    raw, mean = curves.values[name], curves.means[name]
    axes.plot(*thin(curves.steps, raw), color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(*thin(curves.steps, mean), color=colour, linewidth=2, marker=_marker(raw), clip_on=False)


def _marker(values: Values) -> str:
    """A dot where there are too few steps for a line."""
    return "o" if np.isfinite(values).sum() < 3 else ""


def _scale(axes: Axes, curves: Curves, names: Sequence[str], never_log: bool = False) -> None:
    """From 0 up; logarithmic where steps and means span more than 1.5 decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = _range(curves, names)
    if high > low * _LOG_FROM and not never_log:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(low / 1.2, high * 1.2)
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 3) if high < low * 1000 else (1,), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, high * 1.05 or 1)
        axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _range(curves: Curves, names: Sequence[str]) -> tuple[float, float]:
    """(least step above 0, greatest step); one far below every running mean may leave the picture."""
    steps = np.concatenate([[0.0], *(curves.values[name] for name in names)])
    means = np.concatenate([[np.nan], *(curves.means[name] for name in names)])
    high = float(np.nanmax(steps))
    if not (means > 0).any():
        return high, high
    return max(float(steps[steps > 0].min()), float(means[means > 0].min()) / 30), high


def _names(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """(value, text, colour): text right of the axes at the height of its value, moved apart where they would touch."""
    ends = [end for end in ends if math.isfinite(end[0])]
    if not ends:
        return
    height = axes.get_window_extent().height  # units, as the figure has one point for each
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(0, end) for end, _, _ in ends]))[:, 1]
    places = spread([float(min(max(h, 0), 1)) for h in heights], 15 / height)
    for place, (_, text, colour) in zip(places, ends, strict=True):
        at = axes.annotate(text, (1, place), (9, 0), xycoords="axes fraction", textcoords="offset points")
        at.set(color=colour, size=12, weight="bold", va="center_baseline")


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in 0..1, at least `gap` apart, in the order of `wanted` and near it; the first of equals is highest."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], -i))
    groups: list[list[int]] = []
    for i in order:
        groups.append([i])
        while len(groups) > 1 and _places(groups[-1], wanted, gap)[0] - _places(groups[-2], wanted, gap)[-1] < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    places = {i: place for group in groups for i, place in zip(group, _places(group, wanted, gap), strict=True)}
    return [places[i] for i in range(len(wanted))]


def _places(group: Sequence[int], wanted: Sequence[float], gap: float) -> list[float]:
    """Of one group: `gap` apart, around the mean of what its members want, between 0 and 1."""
    half = gap * (len(group) - 1) / 2
    middle = min(max(sum(wanted[i] for i in group) / len(group), half), 1 - half)
    return [middle - half + gap * k for k in range(len(group))]


# ---- words -------------------------------------------------------------------------------------------


def _plain(text: str, most: int = 36) -> str:
    """Names come from outside: what cannot be printed would break the XML, what is too long the page."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"
