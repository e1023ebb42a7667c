"""All figures, drawn with matplotlib: the ladder, curves over seeds, timelines; SVG, PNG, and SVG for a page.

Numbers in, figure out: nothing here reads data or knows a metric. The same numbers give the same bytes under one
matplotlib. In files figures stand on white; in a page their colours are CSS variables, so that they turn dark with it.

    F frames of a clip    S seeds
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trainer.config import TEACHER_FORCED

Values = npt.NDArray[np.float64]
Line = tuple[Values, Values]  # x, y

STYLE: Final = Path(__file__).with_name("figures.mplstyle")
FONTS: Final = "system-ui, -apple-system, 'Segoe UI', sans-serif"  # of the reader
NEVER: Final = "never updating"
DASHED: Final = (0, (4, 3))
INK, MUTED, GRID, WHITE = "#1f2328", "#57606a", "#d0d7de", "#ffffff"
FALSE_ALARM, SPEAKING, DST = "#cf222e", "#2563eb", "#d97706"
# rung -> (colour, on a dark page, line style); after Okabe and Ito's palette, with more contrast to white
RUNG_STYLES: Final[dict[str, tuple[str, str, Any]]] = {
    "metronome": ("#3d4650", "#c3cad3", (0, (1, 3))),
    "history": ("#6639ba", "#b794f6", (0, (3, 1, 1, 1))),
    "true-state": ("#a40e26", "#ff8f9c", ":"),
    "silence": ("#6e7781", "#a5adb8", ":"),
    "lm-eos": ("#a8478f", "#dd8fc4", "-."),
    "texts": ("#4b5fc4", "#9aa8f0", ":"),
    "frames": ("#7a5c3d", "#c9a27e", "-."),
    "speak": ("#0072b2", "#56b4e9", "-"),
    "speak+dst-head": ("#008f68", "#3cc9a0", "--"),
    "speak+dst": ("#d55e00", "#ff8a47", "-"),
    "speak+markers": ("#a87900", "#e6b422", (0, (6, 2))),
    "token": ("#0f7b8a", "#4fc3d6", "--"),
}
OTHER: Final[tuple[str, str, Any]] = ("#8250df", "#b48cf2", "-")
DARK: Final = dict([(INK, "#e4e7eb"), (MUTED, "#98a1ad"), (GRID, "#353c45"), (WHITE, "#1b1f25"), (DST, "#f0a04b"),
                    (FALSE_ALARM, "#ff7b72"), *(style[:2] for style in (*RUNG_STYLES.values(), OTHER))])  # fmt: skip


def rung_colour(rung: str) -> str:
    return RUNG_STYLES.get(rung, OTHER)[0]


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


def thin(x: Values, y: Values, buckets: int = 400) -> Line:
    """The same line in at most 800 points: of each of 400 stretches the lowest and the highest, in their order."""
    known = np.flatnonzero(np.isfinite(y))
    if len(known) <= 2 * buckets:
        return x[known], y[known]
    parts = np.array_split(known, buckets)
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


def css_colours() -> str:
    """CSS declarations of these variables."""
    return " ".join(f"--x{light[1:]}: light-dark({light}, {dark});" for light, dark in DARK.items())


class Mark(NamedTuple):
    """One value with its interval, None where undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None
    below: float | None = None  # the value of the rung below
    step: str = ""  # the difference to it, in words


class RungRow(NamedTuple):
    name: str
    colour: str
    marks: Sequence[Mark]  # one per panel


def ladder(rows: Sequence[RungRow], panels: Sequence[str], measure: str) -> Figure:
    """Panels side by side, the lowest rung at the bottom; the broad bar is the step from the rung below, the numbers at
    the right are the value and that step."""
    figure = new_figure(38 * len(rows) + 74)
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for place, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
        axes.set_title(panel)
        axes.set(ylim=(-0.5, len(rows) - 0.4), xlabel=measure)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.margins(x=0.08)
        right = axes.get_yaxis_transform()
        for y, (_, colour, marks) in enumerate(rows):
            value, low, high, below, step = marks[place]
            if value is not None:
                if below is not None:
                    axes.plot([below, value], [y, y], color=GRID, linewidth=9, solid_capstyle="butt", zorder=2)
                if low is not None and high is not None:
                    axes.plot([low, high], [y, y], color=colour, linewidth=1.8, zorder=3)
                inside = WHITE if panel == TEACHER_FORCED else colour
                axes.plot([value], [y], "o", color=colour, mfc=inside, markersize=6.5, markeredgewidth=1.6, zorder=4)
            numbers = format_interval(value, low, high)
            axes.text(1.03, y + (0.2 if step else 0), numbers, transform=right, va="center", size=11)
            axes.text(1.03, y - 0.2, step, transform=right, va="center", size=10.5, color=MUTED)
    all_axes[0].set_yticks(range(len(rows)), [printable(row.name, 30) for row in rows], size=12, weight="bold")
    for label, row in zip(all_axes[0].get_yticklabels(), rows, strict=True):
        label.set_color(row.colour)
    return figure


class Curve(NamedTuple):
    """One rung: a thin line per seed, and their mean as a thick one."""

    rung: str
    seeds: Sequence[Line]
    mean: Line
    note: str = ""  # a number for the legend

    @property
    def style(self) -> dict[str, Any]:
        colour, _, style = (MUTED, "", DASHED) if self.rung == NEVER else RUNG_STYLES.get(self.rung, OTHER)
        return {"color": colour, "linestyle": style}


class Panel(NamedTuple):
    heading: str
    curves: Sequence[Curve]
    x: str
    y: str
    line: tuple[Values, Values, str] | None = None  # x, y, name: what the curves are to be compared with
    x_end: float | None = None  # the x axis runs from 0 to here; None: as far as the curves go
    dots: bool = False
    empty: str = "nothing to draw"


def curve_panels(panels: Sequence[Panel], note: str) -> Figure:
    """Panels side by side, and a legend of all rungs with their numbers, named `note`."""
    figure = new_figure(350)
    notes: dict[str, list[str]] = {}
    styles = {curve.rung: curve.style for panel in panels for curve in panel.curves}
    for i, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(1, len(panels), i + 1), panel)
        for curve in panel.curves:
            notes.setdefault(curve.rung, ["-"] * len(panels))[i] = curve.note or "-"
    handles = [
        Line2D([], [], linewidth=2.2, label=f"{printable(rung, 20)}  {', '.join(numbers)}", **styles[rung])
        for rung, numbers in notes.items()
    ]
    title = note if len(panels) == 1 else f"{note}: left, right"
    legend = figure.legend(handles=handles, loc="outside right upper", labelcolor="linecolor", title=title,
                           alignment="left", title_fontproperties={"size": 11.5})  # fmt: skip
    legend.get_title().set_color(MUTED)
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    axes.set_title(printable(panel.heading, 40))
    axes.set(xlabel=panel.x, ylabel=panel.y, ylim=(0, 1.02), yticks=np.linspace(0, 1, 5))
    axes.grid(visible=bool(panel.curves), axis="both")
    if not panel.curves:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, panel.empty, ha="center", va="center", size=11.5, color=MUTED)
        return
    if panel.line:
        xs, ys, name = panel.line
        axes.plot(xs, ys, color=MUTED, linewidth=1.1, linestyle=DASHED)
        axes.annotate(name, (xs[0], ys[0]), (4, 4), textcoords="offset points", size=11, color=MUTED)
    for curve in panel.curves:
        for line in curve.seeds:
            axes.plot(*line, color=curve.style["color"], linewidth=0.8, alpha=0.4)
        marker = "o" if panel.dots or len(curve.mean[0]) < 3 else ""
        axes.plot(*curve.mean, linewidth=2.2, marker=marker, markersize=4.5, clip_on=False, zorder=3, **curve.style)
    if panel.x_end is not None:
        axes.set_xlim(0, panel.x_end)


@dataclass(frozen=True)
class Track:
    """One rung on one clip; instants in seconds of the video."""

    rung: str
    times: Values  # [F]
    scores: Values  # [F], 0..1
    threshold: float | None  # as a score
    hits: Sequence[float]  # speech matched to a reference event
    false_alarms: Sequence[float]  # other speech
    updates: Sequence[float]  # state updates


class Timeline(NamedTuple):
    title: str
    subtitle: str
    span: tuple[float, float]  # seconds that are shown
    user: Sequence[float]
    speech: Sequence[float]  # of the reference
    updates: Sequence[float]  # of the reference
    tracks: Sequence[Track]


def timeline(clip: Timeline) -> Figure:
    """The reference in three lanes; below it each rung's score, where it spoke, and where it wrote an update."""
    figure = new_figure(150 + 126 * len(clip.tracks))
    lanes, *tracks = figure.subplots(1 + len(clip.tracks), sharex=True, height_ratios=[55] + [84] * len(clip.tracks))
    lanes.set_title(f"{printable(clip.title, 70)}\n", pad=4)
    lanes.text(0, 1.12, printable(clip.subtitle, 120), transform=lanes.transAxes, size=11.5, color=MUTED)
    events = {"user": ("v", MUTED, clip.user), "reference speech": ("o", INK, clip.speech)}
    events["reference update"] = ("d", DST, clip.updates)
    for y, (marker, colour, instants) in enumerate(events.values()):
        lanes.plot(instants, [y] * len(instants), marker, color=colour, markersize=6.5)
    lanes.set_yticks(range(len(events)), list(events))
    lanes.set_ylim(2.6, -0.6)
    for axes, track in zip(tracks, clip.tracks, strict=True):
        _draw_track(axes, track, clip.span)
    pad = 0.01 * (clip.span[1] - clip.span[0])
    for axes in (lanes, *tracks):
        axes.grid(visible=False)
        axes.set_xlim(clip.span[0] - pad, clip.span[1] + pad)
        for instant in clip.speech:
            axes.axvline(instant, color=GRID, linewidth=1.2, zorder=0)
    tracks[-1].set_xlabel("seconds of the video")
    points = (("o", INK, "hit"), ("x", FALSE_ALARM, "false alarm"), ("d", DST, "its update"))
    lines: tuple[tuple[Any, str], ...] = (("-", "score"), (DASHED, "threshold"))
    handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=6.5, label=name) for m, c, name in points]
    handles += [Line2D([], [], color=MUTED, linestyle=style, label=name) for style, name in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, labelcolor=MUTED, handlelength=1)
    return figure


def _draw_track(axes: Axes, track: Track, span: tuple[float, float]) -> None:
    colour = rung_colour(track.rung)
    axes.set_title(" ", size=12)  # room for the marks above the axes
    axes.set(ylim=(-0.16, 1.06), yticks=[0, 0.5, 1])
    axes.set_ylabel(printable(track.rung, 18), rotation=0, ha="right", color=colour, size=12, weight="bold")
    axes.plot(*thin(track.times, track.scores), color=colour, linewidth=1.3)
    if track.threshold is not None:
        axes.axhline(track.threshold, color=colour, linewidth=0.9, linestyle=DASHED, alpha=0.8)
    for instants, marker, shade in ((track.hits, "o", colour), (track.false_alarms, "x", FALSE_ALARM)):
        shown = [t for t in instants if span[0] <= t <= span[1]]
        axes.plot(shown, [1.14] * len(shown), marker, color=shade, transform=axes.get_xaxis_transform(), markersize=6.5,
                  markeredgewidth=1.8, clip_on=False, in_layout=False)  # fmt: skip
    axes.plot(track.updates, [-0.08] * len(track.updates), "d", color=DST, markersize=5.5)
