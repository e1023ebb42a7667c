"""OUT/report.html and OUT/figures/: the answer in a sentence, figures, all numbers, and the command that led to them.

Everything is computed from what `benchmark` left in OUT (and, for the timelines, from the shards that it used, while
they are there), so the page can be written again at any time. No script, nothing loaded; the figures are inlined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from scipy.special import expit
from sklearn.metrics import precision_recall_curve

from pipeline.schema import HEADS
from pipeline.storage import write_text
from pipeline.terminal import counted
from trainer.arms import RUNGS
from trainer.config import MODES, TEACHER_FORCED
from trainer.evaluation import comparison, conclusions, plots
from trainer.evaluation.clip_pictures import find_disagreements, timeline
from trainer.evaluation.comparison import PRIMARY, Benchmark, Row, baseline, read_benchmark
from trainer.evaluation.conclusions import ladder_steps
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.plots import RUNG_STYLES, css_colour, format_interval, format_number

MOST_GROUPS: Final = 12  # of a kind, on the page
MIN_FRAMES_PER_BIN: Final = 20  # a point of the reliability curve with fewer is noise
HARNESS_TOLERANCE: Final = 1e-5  # between the probabilities of a direct and an inverted head
PAGE, FIGURES = "report.html", "figures"
UPDATE_LATENCY: Final = "median latency of right updates (s)"
FIRST_PAGE: Final = """<!doctype html>
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


def page_data(bench: Benchmark) -> dict[str, Any]:
    """All that the template shows; draws the figures into OUT/figures on the way."""
    info, mode, (a, b) = bench.info, bench.mode, bench.pair
    interest = comparison.pairs_of(bench.rungs)  # the ladder's other pairs only say how high one has to climb
    rows = [
        row | {"heading": METRICS[row["metric"]].label}
        for (*pair, _, _), row in bench.comparisons.items()
        if tuple(pair) in interest
    ]
    rows.sort(key=lambda row: (not row["primary"], [*METRICS].index(row["metric"])))
    groups: dict[str, dict[str, dict[str, Row]]] = {"dataset": {}, "task": {}}  # group -> rung -> its row
    for row in bench.groups:
        if row["mode"] == mode:
            groups[row["by"]].setdefault(plots.printable(row["group"], 40), {})[row["rung"]] = row
    clips, how_chosen = find_disagreements(bench)

    def draw(name: str, make: Callable[[], Figure], label: str) -> Markup:
        return Markup(plots.write_figure(bench.out / FIGURES / name, make, label))

    return {
        "opening": conclusions.opening(bench),
        "leaks": [*conclusions.leaks(bench)],
        "question": conclusions.question(bench),
        "harness": harness_check(bench),
        "limits": [*conclusions.limits(bench)],
        "colours": plots.CSS_COLOURS,
        "rungs": {rung: {"about": RUNGS[rung], "colour": css_colour(RUNG_STYLES[rung].colour)} for rung in bench.rungs},
        "steps": ladder_steps(bench),
        "groups": {by: dict([*by_group.items()][:MOST_GROUPS]) for by, by_group in groups.items() if len(by_group) > 1},
        "convergence": conclusions.convergence(bench),
        "figures": {name: draw(name, make, label) for name, (make, label) in _figures(bench).items()},
        "min_frames": MIN_FRAMES_PER_BIN,
        "primary": {"metric": PRIMARY, "a": a, "b": b, "rung": a if a in bench.rungs else bench.rungs[0]},
        "disagreements": how_chosen,
        "clips": [
            {"svg": draw(f"timeline-{i}", partial(timeline, clip), f"clip {clip.clip.clip_id}"), "lines": clip.lines}
            for i, clip in enumerate(clips, 1)
        ],
        "metrics": _metric_rows(bench),
        "comparisons": [row for row in rows if row["metric"] == PRIMARY],
        "other_comparisons": [row for row in rows if row["metric"] != PRIMARY],
        "info": info,
        "mode": mode,
        "thresholds_from": sorted({run["thresholds_from"] for run in bench.metrics.values()} - {None}),
    }


def _metric_rows(bench: Benchmark) -> list[dict[str, Any]]:
    """Per metric and mode: each rung's value and interval, and (value, name) of the baseline."""
    rows = []
    for name in METRICS:
        cells = {mode: [bench.score(rung, mode, name) for rung in bench.rungs] for mode in bench.modes}
        if any(map(any, cells.values())):
            baselines = {mode: baseline(bench, mode, name) for mode in bench.modes}
            heading = {"name": name, "heading": METRICS[name].label, "meaning": METRICS[name].meaning}
            rows.append(heading | {"modes": cells, "baselines": baselines})
    cells = {}
    for mode in bench.modes:
        seeds = [bench.of_seeds(rung, mode, "state.transitions.median_latency_s") for rung in bench.rungs]
        if any(seeds):  # means without an interval: not compared
            cells[mode] = [{"value": np.mean(latencies) if latencies else None, "low": None} for latencies in seeds]
    if cells:
        heading = {"name": "", "heading": UPDATE_LATENCY, "meaning": ""}
        rows.append(heading | {"modes": cells, "baselines": dict.fromkeys(cells)})
    return rows


def _figures(bench: Benchmark) -> dict[str, tuple[Callable[[], Figure], str]]:
    """Name of its files -> (what draws it, accessible name); `state` only where some rung tells the state."""
    training = []
    for name, head in zip(("Speaking", "DST update"), HEADS, strict=True):
        curves, split = comparison.training_curves(bench, head)
        training.append(plots.Panel(f"{name}, {split}", curves, "optimizer steps", "average precision"))
    panels = {
        "windows": ([_windows(bench, mode) for mode in bench.modes], "F1 at the widest"),
        "precision-recall": ([precision_recall(bench, mode) for mode in MODES], "AP"),
        "reliability": ([_reliability(bench, mode) for mode in MODES], "ECE"),
        "training": (training, "last AP"),
        "state": ([_state_over_time(bench)], "in the whole clip"),
    }
    if not panels["state"][0][0].curves:
        del panels["state"]
    return {
        "ladder": (partial(_ladder, bench), "the ladder"),
        **{name: (partial(plots.curve_panels, *drawn), name) for name, drawn in panels.items()},
    }


def _ladder(bench: Benchmark) -> Figure:
    """A panel per mode, the lowest rung at the bottom; the broad bar is the step from the rung below, the numbers at
    the right are the value and that step."""
    figure, colours = plots.new_figure(38 * len(bench.rungs) + 74), [RUNG_STYLES[rung].colour for rung in bench.rungs]
    all_axes = figure.subplots(1, len(bench.modes), sharex=True, sharey=True, squeeze=False)[0]
    for axes, mode in zip(all_axes, bench.modes, strict=True):
        axes.set_title(mode)
        axes.set(ylim=(-0.5, len(bench.rungs) - 0.4), xlabel="event F1")
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.margins(x=0.08)
        right, steps = axes.get_yaxis_transform(), {step.rung: step for step in ladder_steps(bench, mode)}
        for y, (rung, colour) in enumerate(zip(bench.rungs, colours, strict=True)):
            row, step, step_text = bench.score(rung, mode, PRIMARY), steps.get(rung), ""
            value, low, high = (row.get(name) for name in ("value", "low", "high"))
            if step and step.below:
                step_text = format_interval(step.difference, step.low, step.high, signed=True)
                ends = [steps[step.below].value, value]
                if None not in ends:
                    axes.plot(ends, [y, y], color=plots.GRID, linewidth=9, solid_capstyle="butt", zorder=2)
            if low is not None:
                axes.plot([low, high], [y, y], color=colour, linewidth=1.8, zorder=3)
            if value is not None:
                inside = plots.WHITE if mode == TEACHER_FORCED else colour
                axes.plot([value], [y], "o", color=colour, mfc=inside, markersize=6.5, markeredgewidth=1.6, zorder=4)
            style = {"transform": right, "va": "center"}
            axes.text(1.03, y + (0.2 if step_text else 0), format_interval(value, low, high), size=11, **style)
            axes.text(1.03, y - 0.2, step_text, size=10.5, color=plots.MUTED, **style)
    names = [RUNGS[rung].label or rung for rung in bench.rungs]
    all_axes[0].set_yticks(range(len(names)), names, size=12, weight="bold")
    for label, colour in zip(all_axes[0].get_yticklabels(), colours, strict=True):
        label.set_color(colour)
    return figure


def _windows(bench: Benchmark, mode: str) -> plots.Panel:
    """Event F1 over the width of the window; dashed: the metronome."""
    rows, curves = bench.windows.filter(mode=mode).sort("width_s"), []
    for rung in (name for name in bench.rungs if name != "metronome"):
        seeds = rows.filter(rung=rung).partition_by("seed", maintain_order=True)
        if lines := [(of_seed["width_s"].to_numpy(), of_seed["f1"].to_numpy()) for of_seed in seeds]:
            mean = np.mean([f1 for _, f1 in lines], axis=0)
            curves.append(plots.Curve(rung, lines, (lines[0][0], mean), format_number(float(mean[-1]))))
    beside = rows.unique("width_s").sort("width_s").drop_nulls("metronome_f1")
    line = (beside["width_s"].to_numpy(), beside["metronome_f1"].to_numpy(), "") if len(beside) else None
    return plots.Panel(f"Event F1, {mode}", curves, "width of the window (s)", "event F1", line, dots=True)


def _labelled(bench: Benchmark, mode: str) -> Iterator[tuple[str, dict[int, pl.LazyFrame]]]:
    """(trained rung, {seed: the frames that have a label: speaking's logit, probability and label})."""
    names = ("logit", "probability", "label")
    columns = [pl.col(f"speaking_{name}").cast(pl.Float64).alias(name) for name in names]
    known = (pl.col("split") == bench.info["split"]) & (pl.col("speaking_label") >= 0)
    for rung in [rung for rung in bench.rungs if RUNGS[rung].kind == "arm"]:
        paths = {seed: bench.run(rung, seed) / "scores" / f"{mode}.parquet" for seed in bench.info["seeds"]}
        scans = {seed: pl.scan_parquet(path, glob=False) for seed, path in paths.items() if path.is_file()}
        yield rung, {seed: scan.filter(known).select(columns) for seed, scan in scans.items()}


def harness_check(bench: Benchmark) -> str:
    """Whether silence and speak, whose heads are inverted and direct, came out as the same model; "" where they did not
    both run."""
    runs = dict(_labelled(bench, TEACHER_FORCED))
    silence, speak = runs.get("silence", {}), runs.get("speak", {})
    pairs = [(silence[seed], speak[seed]) for seed in silence if seed in speak]
    probabilities = ([expit(frames.collect()["logit"].to_numpy()) for frames in pair] for pair in pairs)
    apart = max((float(np.abs(p - q).max()) for p, q in probabilities), default=None)
    if apart is None:
        return ""
    how = f"probabilities differ by up to {apart:.1e}, {HARNESS_TOLERANCE:g} is allowed"
    if apart <= HARNESS_TOLERANCE:
        return f"Harness check passed: silence and speak are the same model and came out equal ({how})."
    must = "silence and speak are the same model and must come out equal"
    return f"Harness check FAILED: {must}, but {how}. Trust no number on this page."


def precision_recall(bench: Benchmark, mode: str) -> plots.Panel:
    """Precision at each of 101 recalls is that of the highest threshold that reaches it. Dashed: chance."""
    curves, guessing, recalls = [], None, np.linspace(0, 1, 101)
    for rung, seeds in _labelled(bench, mode):
        lines = []
        for frames in map(pl.LazyFrame.collect, seeds.values()):
            positive = frames["label"].to_numpy() == 1
            if positive.any() and not positive.all():
                chance = positive.mean()
                guessing = (_DIAGONAL[0], np.full(2, chance), f"guessing {chance:.3f}")
                precision, recall, _ = precision_recall_curve(positive, frames["logit"].to_numpy())
                reaching = np.searchsorted(-recall[:-1], -recalls, side="right") - 1  # the last has no threshold
                lines.append((recalls, precision[reaching]))
        if lines:
            mean = np.mean([precision for _, precision in lines], axis=0)
            note = format_number(bench.score(rung, mode, "speaking_ap").get("value"))
            curves.append(plots.Curve(rung, lines, (recalls, mean), note))
    return plots.Panel(f"Speaking, {mode}", curves, "recall", "precision", guessing)


def _reliability(bench: Benchmark, mode: str) -> plots.Panel:
    """The share of positives over the mean probability, in B bins; thick: the frames of all seeds together."""
    curves, count = [], bench.info["settings"]["bins"]

    def shares(bins: Any) -> plots.Line:  # [3, B]: frames, sum of their probabilities, positives
        frames, probability, positive = bins[:, bins[0] >= MIN_FRAMES_PER_BIN]
        return probability / frames, positive / frames

    for rung, seeds in _labelled(bench, mode):
        bins = []
        for frames in map(pl.LazyFrame.collect, seeds.values()):
            p, label = frames["probability"], frames["label"]
            if not p.has_nulls():
                at = np.minimum((p.to_numpy() * count).astype(int), count - 1)
                bins.append(np.stack([np.bincount(at, weights, count) for weights in (None, p, label)]))
        if bins:
            note = format_number(bench.score(rung, mode, "speaking_ece").get("value"))
            curves.append(plots.Curve(rung, [*map(shares, bins)], shares(sum(bins)), note))
    return plots.Panel(f"Speaking, {mode}", curves, "probability", "share", _DIAGONAL, 1.0, dots=True)


def _state_over_time(bench: Benchmark) -> plots.Panel:
    """Each arm's joint state accuracy over equal parts of the clips, in % of their length; last, never updating."""
    mode, metric = bench.mode, "joint_state_accuracy"
    parts = [(rung, bench.of_seeds(rung, mode, "state.over_time"), bench.score(rung, mode, metric).get("value"))
             for rung in bench.rungs]  # fmt: skip
    parts = [part for part in parts if part[1]]
    level, never = baseline(bench, mode, metric), bench.of_reference(mode, "state.over_time_never_updating")
    if parts and level and never:
        parts.append((plots.NEVER, [never], level[0]))
    curves = []
    for rung, shares, whole in parts:
        by_seed = np.array(shares, np.float64)  # [seeds, parts], NaN in a part without frames
        middles = (np.arange(by_seed.shape[1]) + 0.5) * 100 / by_seed.shape[1]
        mean = (middles, by_seed.mean(axis=0))
        curves.append(plots.Curve(rung, [(middles, line) for line in by_seed], mean, format_number(whole)))
    heading = f"Joint state accuracy, {mode}"
    return plots.Panel(heading, curves, "% of the clip", "share of frames", x_end=100, dots=True)
