"""The report's pictures: forest plots, curves over seeds, timelines. Each an SVG, a PNG, and the same SVG for the page.

Numbers in, picture out: nothing here reads a file or knows a metric. In the page the colours are CSS variables, so the
pictures turn dark with it; in the files they stand on white. Arms have fixed colours that colour-blind people can tell
apart, and line styles besides. 800 units wide; the same numbers give the same bytes (under one matplotlib). A picture
takes about 0.3 s and 20-100 kB.

    F frames of a clip    S seeds
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.curves import _FONTS, _STYLE, GRID, INK, MUTED, WIDTH, _plain, thin

Values = npt.NDArray[np.float64]
Line = tuple[Values, Values]  # x, y

WHITE, MISSED, DST = "#ffffff", "#cf222e", "#d97706"
# arm -> (colour, on a dark page, line style); after Okabe and Ito's palette, with more contrast to white
ARM_STYLES: Final[dict[str, tuple[str, str, Any]]] = {
    "silence": ("#6e7781", "#a5adb8", ":"),
    "lm-eos": ("#a8478f", "#dd8fc4", "-."),
    "speak": ("#0072b2", "#56b4e9", "-"),
    "speak+dst-head": ("#008f68", "#3cc9a0", "--"),
    "speak+dst": ("#d55e00", "#ff8a47", "-"),
    "speak+markers": ("#a87900", "#e6b422", (0, (6, 2))),
}
OTHER: Final[tuple[str, str, Any]] = ("#8250df", "#b48cf2", "-")
NEVER: Final = "never updating"
_STYLES: Final = {**ARM_STYLES, NEVER: (MUTED, "#98a1ad", (0, (4, 3)))}
# on white -> on the page, where it is dark
DARK: Final = {
    INK: "#e4e7eb",
    MUTED: "#98a1ad",
    GRID: "#353c45",
    WHITE: "#1b1f25",
    MISSED: "#ff7b72",
    DST: "#f0a04b",
    **{light: dark for light, dark, _ in (*ARM_STYLES.values(), OTHER)},
}
MODES: Final = ("teacher-forced", "self-fed")
_PNG_DPI = 144


def colour(arm: str) -> str:
    """The arm's own, on white."""
    return ARM_STYLES.get(arm, OTHER)[0]


def css_colours(dark: bool = False) -> str:
    """CSS declarations of every colour that a picture in the page uses."""
    return " ".join(f"--x{light[1:]}: {there if dark else light};" for light, there in DARK.items())


# ---- to disk and into the page -----------------------------------------------------------------------


def draw(stem: Path, make: Callable[[], Figure], about: str) -> str:
    """Write STEM.svg and STEM.png of what `make` builds; the SVG for the page, read out as `about`."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that matplotlib's own font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = make()
        svg, png = io.StringIO(), io.BytesIO()
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None, "Creator": None})
        FigureCanvasAgg(figure)
        figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    picture = svg.getvalue().replace("'DejaVu Sans'", _FONTS)
    stem.with_suffix(".svg").write_text(picture, encoding="utf-8")
    stem.with_suffix(".png").write_bytes(png.getvalue())
    return for_page(picture, stem.name, about)


def for_page(svg: str, name: str, about: str) -> str:
    """An SVG element that can stand beside others in one page: own ids, the page's colours, nothing of XML's."""
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _own_tag(tag.group(), name), body)
    box = re.search(r'viewBox="[^"]*"', body)
    head = f'<svg role="img" aria-label="{html.escape(about)}" {box.group() if box else ""}>'
    return head + body[body.index(">") + 1 :]


def _own_tag(tag: str, name: str) -> str:
    """A tag with its ids and what points to them made the figure's own, and its colours the page's."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return re.sub(r"#[0-9a-f]{6}\b", lambda at: f"var(--x{at.group()[1:]})" if at.group() in DARK else at.group(), tag)


# ---- forest plots ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """One value with its interval, None where undefined."""

    mode: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    name: str
    colour: str
    marks: Sequence[Mark]  # one a mode


@dataclass(frozen=True)
class Forest:
    """One panel: a row a thing, a mark a mode; `line` (at, name) is what to hold them against."""

    heading: str
    rows: Sequence[Row]
    line: tuple[float, str] | None = None
    signed: bool = False


_NAMES, _PLOT_LEFT, _PLOT_RIGHT, _NUMBERS = 8, 214, 612, 628  # units from the left
_LINE, _ROW_GAP, _HEAD, _FOOT = 17, 11, 44, 30


def forest(panels: Sequence[Forest]) -> Figure:
    """The panels below each other; which marker means which mode is said once, at the top."""
    heights = [sum(_row_height(row) for row in panel.rows) for panel in panels]
    figure = _figure(sum(heights) + len(panels) * (_HEAD + _FOOT) + 8)
    top = 8.0
    for panel, height in zip(panels, heights, strict=True):
        _say(figure, _NAMES, top + 18, panel.heading, size=13, weight="bold")
        _forest_rows(figure, panel, top + _HEAD, height)
        top += _HEAD + height + _FOOT
    modes = sorted({m.mode for panel in panels for row in panel.rows for m in row.marks}, key=_mode_rank)
    for i, mode in enumerate(modes):
        x, marker = WIDTH - 8 - 88 * (len(modes) - 1 - i), "○" if mode == MODES[0] else "●"
        _say(figure, x, 26, f"{marker} {mode}", size=11.5, color=MUTED, ha="right")
    return figure


def _mode_rank(mode: str) -> tuple[int, str]:
    return (MODES.index(mode) if mode in MODES else len(MODES)), mode


def _row_height(row: Row) -> int:
    return _LINE * max(1, len(row.marks)) + _ROW_GAP


def _forest_rows(figure: Figure, panel: Forest, top: float, height: float) -> None:
    axes = _axes(figure, _PLOT_LEFT, top, _PLOT_RIGHT - _PLOT_LEFT, height)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.grid(visible=True, axis="x")
    axes.set_xlim(*_reach(panel))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}" if panel.signed and x else f"{x:g}"))
    if panel.line:
        at, name = panel.line
        axes.axvline(at, color=INK if panel.signed else MUTED, linewidth=1.2, linestyle="-" if panel.signed else "--")
        axes.annotate(name, (at, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                      size=11, color=MUTED, ha="center")  # fmt: skip
    at_y = 0.0
    for row in panel.rows:
        middle = at_y + _row_height(row) / 2
        _say(figure, _NAMES, top + middle, _plain(row.name, 34), size=12, weight="bold", color=row.colour, va="center")
        first = middle - _LINE * (len(row.marks) - 1) / 2
        for i, mark in enumerate(row.marks):
            _mark(figure, axes, mark, row.colour, first + _LINE * i, top, panel.signed)
        at_y += _row_height(row)


def _reach(panel: Forest) -> tuple[float, float]:
    """What the axis must show: all marks, intervals, and the line."""
    found = [x for row in panel.rows for mark in row.marks for x in (mark.value, mark.low, mark.high)]
    known = [x for x in found if x is not None and math.isfinite(x)]
    known += [panel.line[0]] if panel.line else []
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    pad = 0.06 * (high - low) or 0.05 * (abs(high) or 1)
    return low - pad, high + pad


def _mark(figure: Figure, axes: Axes, mark: Mark, ink: str, y: float, top: float, signed: bool) -> None:
    """Point, interval, and both as a number at the right."""
    if mark.value is not None:
        if mark.low is not None and mark.high is not None:
            axes.plot([mark.low, mark.high], [y, y], color=ink, linewidth=1.8, zorder=3)
        inside = WHITE if mark.mode == MODES[0] else ink
        axes.plot([mark.value], [y], "o", color=ink, mfc=inside, markersize=6.5, markeredgewidth=1.6, zorder=4)
    style = {"size": 11, "va": "center", "color": INK if mark.value is not None else MUTED}
    _say(figure, _NUMBERS, top + y, spell(mark.value, mark.low, mark.high, signed), **style)


def spell(value: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    """'+0.042 [+0.011, +0.071]'; 'undefined' without a value."""
    if value is None:
        return "undefined"
    if low is None or high is None:
        return f"{number(value, signed)} (no interval)"
    return f"{number(value, signed)} [{number(low, signed)}, {number(high, signed)}]"


def number(value: float | None, signed: bool = False) -> str:
    """Three decimals below 10, one above; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "-"
    sign = "+" if signed and value > 0 else ""
    return f"{sign}{value + 0.0:,.1f}" if abs(value) >= 10 else f"{sign}{value + 0.0:.3f}".replace("-0.000", "0.000")


# ---- lines over seeds --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One arm: a thin line a seed, and what they have in common as a thick one."""

    arm: str
    seeds: Sequence[Line]
    mean: Line
    note: str = ""  # a number for the key


@dataclass(frozen=True)
class Panel:
    heading: str
    curves: Sequence[Curve]
    x: str
    y: str
    line: tuple[Values, Values, str] | None = None  # x, y, name: what to hold them against
    x_from_zero_to: float | None = None  # None: as far as the curves go
    dots: bool = False
    empty: str = "nothing to draw"


_SIDE, _APART, _FIRST, _TALL = 246, 52, 50, 258
_KEY = _FIRST + 2 * _SIDE + _APART + 26


def panels(drawn: Sequence[Panel], note: str) -> Figure:
    """A wide panel, or two, and a key of all arms in any with their numbers, named `note`."""
    keyed = list(dict.fromkeys(curve.arm for panel in drawn for curve in panel.curves))
    height = max(_HEAD + _TALL + 52, _HEAD + 40 * len(keyed) + 36)
    figure = _figure(height)
    wide = _SIDE if len(drawn) > 1 else 2 * _SIDE + _APART
    for i, panel in enumerate(drawn):
        left = _FIRST + i * (_SIDE + _APART)
        _say(figure, left, 26, _plain(panel.heading, 40), size=13, weight="bold")
        _say(figure, left + wide / 2, _HEAD + _TALL + 37, panel.x, size=11.5, color=MUTED, ha="center")
        axes = _axes(figure, left, _HEAD, wide, _TALL)
        _panel(axes, panel)
    _say(figure, _KEY, 26, note if len(drawn) == 1 else f"{note}: left, right", size=11.5, color=MUTED)
    for i, arm in enumerate(keyed):
        _key(figure, arm, [_note(panel, arm) for panel in drawn], _HEAD + 14 + 40 * i)
    return figure


def _note(panel: Panel, arm: str) -> str:
    return next((curve.note for curve in panel.curves if curve.arm == arm), "") or "-"


def _key(figure: Figure, arm: str, notes: Sequence[str], y: float) -> None:
    tall = figure.get_figheight() * 72
    ink, _, style = _STYLES.get(arm, OTHER)
    xs, ys = (_KEY / WIDTH, (_KEY + 24) / WIDTH), (1 - (y - 4) / tall,) * 2
    figure.add_artist(matplotlib.lines.Line2D(xs, ys, color=ink, linestyle=style, linewidth=2.2))
    _say(figure, _KEY + 32, y, _plain(arm, 20), size=12, weight="bold", color=ink)
    _say(figure, _KEY + 32, y + 15, ", ".join(notes), size=11, color=MUTED)


def _panel(axes: Axes, panel: Panel) -> None:
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.grid(visible=True, axis="both")
    axes.set_title(panel.y, size=11, color=MUTED, loc="left", pad=4)
    if not panel.curves:
        axes.grid(visible=False, axis="both")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, panel.empty, transform=axes.transAxes, ha="center", va="center", size=11.5, color=MUTED)
        return
    if panel.line:
        xs, ys, name = panel.line
        axes.plot(xs, ys, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.annotate(name, (xs[0], ys[0]), (4, 4), textcoords="offset points", size=11, color=MUTED)
    for curve in panel.curves:
        _curve(axes, curve, panel.dots)
    if panel.x_from_zero_to is not None:
        axes.set_xlim(0, panel.x_from_zero_to)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))


def _curve(axes: Axes, curve: Curve, dots: bool) -> None:
    ink, _, style = _STYLES.get(curve.arm, OTHER)
    for line in curve.seeds:
        axes.plot(*line, color=ink, linewidth=0.8, alpha=0.4)
    few = dots or len(curve.mean[0]) < 3
    axes.plot(*curve.mean, color=ink, linewidth=2.2, linestyle=style, marker="o" if few else "", markersize=4.5,
              clip_on=False, zorder=4 if style == ":" else 3)  # fmt: skip


# ---- timelines ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """One arm on one clip; instants in seconds of the video."""

    arm: str
    times: Values  # [F]
    scores: Values  # [F], 0..1
    threshold: float | None  # as a score
    hits: Sequence[float]  # where it spoke, matched to a reference event
    false: Sequence[float]  # where it spoke else
    updates: Sequence[float]  # where it wrote a state update


@dataclass(frozen=True)
class Timeline:
    title: str
    about: str
    start_s: float
    end_s: float
    user: Sequence[float]
    speech: Sequence[float]  # of the reference
    updates: Sequence[float]  # of the reference
    tracks: Sequence[Track] = field(default_factory=tuple)


_LANE, _TRACK, _TRACK_HEAD, _LEFT = 20, 84, 52, 132


def timeline(found: Timeline) -> Figure:
    """The reference in three lanes; below it each arm's score, where it spoke, and where it wrote an update."""
    lanes = (("user", found.user, "v", MUTED), ("reference speech", found.speech, "o", INK),
             ("reference update", found.updates, "d", DST))  # fmt: skip
    figure = _figure(54 + _LANE * len(lanes) + (_TRACK_HEAD + _TRACK) * len(found.tracks) + 42)
    _say(figure, 8, 20, _plain(found.title, 70), size=13, weight="bold")
    _say(figure, 8, 38, _plain(found.about, 120), size=11.5, color=MUTED)
    _lanes(figure, found, lanes)
    top = 54 + _LANE * len(lanes)
    for track in found.tracks:
        _track(figure, found, track, top + _TRACK_HEAD)
        top += _TRACK_HEAD + _TRACK
    middle = (_LEFT + WIDTH - 20) / 2
    _say(figure, middle, top + 36, "seconds of the video", size=11.5, color=MUTED, ha="center")
    return figure


def _time_axes(figure: Figure, found: Timeline, top: float, height: float) -> Axes:
    axes = _axes(figure, _LEFT, top, WIDTH - 20 - _LEFT, height)
    pad = 0.01 * (found.end_s - found.start_s)
    axes.set_xlim(found.start_s - pad, found.end_s + pad)
    axes.grid(visible=False)
    for instant in found.speech:
        axes.axvline(instant, color=GRID, linewidth=1.2, zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    return axes


def _lanes(figure: Figure, found: Timeline, lanes: Sequence[tuple[str, Sequence[float], str, str]]) -> None:
    axes = _time_axes(figure, found, 54, _LANE * len(lanes))
    axes.set_ylim(len(lanes), 0)
    axes.set_yticks([])
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    for i, (name, instants, marker, ink) in enumerate(lanes):
        _say(figure, 8, 54 + _LANE * (i + 0.5), name, size=11.5, color=ink, va="center")
        axes.plot(instants, [i + 0.5] * len(instants), marker, color=ink, markersize=6.5, linestyle="")


def _track(figure: Figure, found: Timeline, track: Track, top: float) -> None:
    ink = colour(track.arm)
    _say(figure, 8, top - 12, _plain(track.arm, 18), size=12, weight="bold", color=ink, va="center")
    for y, name in ((top + 14, "line: score"), (top + 30, "● hit  × false"), (top + 46, "♦ its update")):
        _say(figure, 8, y, name, size=10.5, color=MUTED, va="center")
    axes = _time_axes(figure, found, top, _TRACK)
    axes.set_ylim(-0.16, 1.06)
    axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.spines["bottom"].set_position(("axes", 0))
    axes.plot(*thin(track.times, track.scores), color=ink, linewidth=1.3)
    if track.threshold is not None:
        axes.axhline(track.threshold, color=ink, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.8)
    above = axes.get_xaxis_transform()
    for instants, marker, shade in ((track.hits, "o", ink), (track.false, "x", MISSED)):
        axes.plot(instants, [1 + 12 / _TRACK] * len(instants), marker, color=shade, markersize=6.5, markeredgewidth=1.8,
                  linestyle="", clip_on=False, transform=above)  # fmt: skip
    axes.plot(track.updates, [-0.08] * len(track.updates), "d", color=DST, markersize=5.5, linestyle="")


# ---- parts -------------------------------------------------------------------------------------------


def _figure(height: float) -> Figure:
    """One point a unit, on white."""
    return Figure(figsize=(WIDTH / 72, math.ceil(height) / 72), dpi=72, facecolor=WHITE)


def _say(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text at (x, y) units from the top left."""
    figure.text(x / WIDTH, 1 - y / (figure.get_figheight() * 72), text, **style)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Place and size in units from the top left."""
    tall = figure.get_figheight() * 72
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / tall, width / WIDTH, height / tall))
    axes.set_facecolor("none")
    return axes
