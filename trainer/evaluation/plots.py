"""What all figures share: colours, numbers as text, panels of curves, and rendering as SVG, PNG, and SVG for a page.

Nothing here reads data or knows a metric. The same numbers give the same bytes under one matplotlib. In files figures
stand on white; in a page their colours are CSS variables, so that they turn dark with it.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

Values = npt.NDArray[np.float64]
Line = tuple[Values, Values]  # x, y

STYLE: Final = Path(__file__).with_name("figures.mplstyle")
FONTS: Final = "system-ui, -apple-system, 'Segoe UI', sans-serif"  # of the reader
NEVER: Final = "never updating"
DASHED: Final = (0, (4, 3))
INK, MUTED, GRID, WHITE = "#1f2328", "#57606a", "#d0d7de", "#ffffff"
FALSE_ALARM, SPEAKING, DST = "#cf222e", "#2563eb", "#d97706"


class RungStyle(NamedTuple):
    colour: str
    dark: str  # on a dark page
    line: Any


RUNG_STYLES: Final = {  # after Okabe and Ito's palette, with more contrast to white
    "metronome": RungStyle("#3d4650", "#c3cad3", (0, (1, 3))),
    "history": RungStyle("#6639ba", "#b794f6", (0, (3, 1, 1, 1))),
    "true-state": RungStyle("#a40e26", "#ff8f9c", ":"),
    "silence": RungStyle("#6e7781", "#a5adb8", ":"),
    "lm-eos": RungStyle("#a8478f", "#dd8fc4", "-."),
    "texts": RungStyle("#4b5fc4", "#9aa8f0", ":"),
    "frames": RungStyle("#7a5c3d", "#c9a27e", "-."),
    "speak": RungStyle("#0072b2", "#56b4e9", "-"),
    "speak+dst-head": RungStyle("#008f68", "#3cc9a0", "--"),
    "speak+dst": RungStyle("#d55e00", "#ff8a47", "-"),
    "speak+markers": RungStyle("#a87900", "#e6b422", (0, (6, 2))),
    "token": RungStyle("#0f7b8a", "#4fc3d6", "--"),
    NEVER: RungStyle(MUTED, "#98a1ad", DASHED),
}
DARK: Final = dict([(INK, "#e4e7eb"), (MUTED, "#98a1ad"), (GRID, "#353c45"), (WHITE, "#1b1f25"), (DST, "#f0a04b"),
                    (FALSE_ALARM, "#ff7b72"), *(style[:2] for style in RUNG_STYLES.values())])  # fmt: skip


# declarations of the variables that `css_colour` names
CSS_COLOURS: Final = " ".join(f"--x{light[1:]}: light-dark({light}, {dark});" for light, dark in DARK.items())


def printable(text: str, most: int = 36) -> str:
    """Names come from outside: what cannot be printed would break the XML, what is too long the layout."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def format_number(value: float | None, signed: bool = False) -> str:
    """Three decimals below 10, one above; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:{'+' if signed and value > 0 else ''},.{1 if abs(value) >= 10 else 3}f}"
    return text.replace("-0.000", "0.000")


def format_interval(value: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    """'+0.042 [+0.011, +0.071]'; 'undefined' without a value."""
    if value is None:
        return "undefined"
    number, *ends = (format_number(x, signed) for x in (value, low, high))
    return f"{number} (no interval)" if "-" in ends else f"{number} [{', '.join(ends)}]"


def thin(x: Values, y: Values) -> Line:
    """The same line in at most 800 points: of each of 400 stretches the lowest and the highest, in their order."""
    known = np.flatnonzero(np.isfinite(y))
    if len(known) <= 800:
        return x[known], y[known]
    parts = np.array_split(known, 400)
    chosen = np.array([sorted((p[y[p].argmin()], p[y[p].argmax()])) for p in parts]).ravel()
    return x[chosen], y[chosen]


def new_figure(height: float, width: float = 800) -> Figure:
    """Sizes in points, which are SVG's units."""
    return Figure(figsize=(width / 72, math.ceil(height) / 72))


def render(make: Callable[[], Figure], png: bool = False) -> tuple[str, bytes]:
    """(SVG, PNG if asked for) of the figure that `make` builds, whatever the user's own matplotlib settings are."""
    svg, bitmap = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's own font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(matplotlib.rc_params_from_file(STYLE, use_default_template=False))
        figure = make()
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
        if png:
            FigureCanvasAgg(figure)
            figure.savefig(bitmap, format="png", dpi=144, metadata={"Software": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", svg.getvalue(), flags=re.DOTALL)
    text = re.sub(r'width="([\d.]+)pt" height="([\d.]+)pt"', r'width="\1" height="\2"', text, count=1)
    return text[text.index("<svg") :].replace("'DejaVu Sans'", FONTS), bitmap.getvalue()


def write_figure(stem: Path, make: Callable[[], Figure], label: str) -> str:
    """Write STEM.svg and STEM.png; returns an SVG element for a page: own ids, the page's colours, named `label`."""
    svg, png = render(make, png=True)
    stem.with_suffix(".svg").write_text(svg, encoding="utf-8")
    stem.with_suffix(".png").write_bytes(png)

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{stem.name}-", tag.group())
        return re.sub(r"#[0-9a-f]{6}\b", lambda colour: css_colour(colour.group()), text)

    head, body = re.sub(r"<[^>]*>", adapt, svg).split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    return f'<svg role="img" aria-label="{html.escape(label)}" {box.group() if box else ""}>{body}'


def css_colour(colour: str) -> str:
    """The CSS variable that stands for a figure's colour in a page."""
    return f"var(--x{colour[1:]})" if colour in DARK else colour


class Curve(NamedTuple):
    """One rung: a thin line per seed, and their mean as a thick one."""

    rung: str
    seeds: Sequence[Line]
    mean: Line
    note: str = ""  # a number for the legend


class Panel(NamedTuple):
    heading: str
    curves: Sequence[Curve]
    x: str
    y: str
    line: tuple[Values, Values, str] | None = None  # x, y, name: what the curves are to be compared with
    x_end: float = 0.0  # the x axis runs from 0 to here; 0: as far as the curves go
    dots: bool = False


def curve_panels(panels: Sequence[Panel], note: str) -> Figure:
    """Panels side by side, and a legend of all rungs with their numbers, named `note`."""
    figure = new_figure(350)
    notes: dict[str, list[str]] = {}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.set_title(printable(panel.heading, 40))
        axes.set(xlabel=panel.x, ylabel=panel.y, ylim=(0, 1.02), yticks=np.linspace(0, 1, 5))
        axes.grid(visible=bool(panel.curves), axis="both")
        if not panel.curves:
            axes.set(xticks=[], yticks=[])
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", size=11.5, color=MUTED)
            continue
        if panel.line:
            xs, ys, name = panel.line
            axes.plot(xs, ys, color=MUTED, linewidth=1.1, linestyle=DASHED)
            axes.annotate(name, (xs[0], ys[0]), (4, 4), textcoords="offset points", size=11, color=MUTED)
        for curve in panel.curves:
            style = RUNG_STYLES[curve.rung]
            notes.setdefault(curve.rung, ["-"] * len(panels))[i] = curve.note or "-"
            for line in curve.seeds:
                axes.plot(*line, color=style.colour, linewidth=0.8, alpha=0.4)
            marker = "o" if panel.dots or len(curve.mean[0]) < 3 else ""
            axes.plot(*curve.mean, color=style.colour, linestyle=style.line, linewidth=2.2, marker=marker,
                      markersize=4.5, clip_on=False, zorder=3)  # fmt: skip
        axes.set_xlim(0, panel.x_end or max(line[0][-1] for curve in panel.curves for line in curve.seeds))
    handles = []
    for rung, numbers in notes.items():
        label, style = f"{printable(rung, 20)}  {', '.join(numbers)}", RUNG_STYLES[rung]
        handles.append(Line2D([], [], color=style.colour, linestyle=style.line, linewidth=2.2, label=label))
    title = note if len(panels) == 1 else f"{note}: left, right"
    legend = figure.legend(handles=handles, loc="outside right upper", labelcolor="linecolor", title=title,
                           alignment="left", title_fontproperties={"size": 11.5})  # fmt: skip
    legend.get_title().set_color(MUTED)
    return figure
