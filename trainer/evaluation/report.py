"""OUT/report.html: one page that opens with the answer in a sentence and ends with the commands that led to it.

Everything is computed from what `benchmark` left in OUT (and, for the timelines, from the shards it used, while they
are there), so the page can be written again at any time. A sentence stands there only if the numbers make it true. No
script, nothing loaded: pictures are inline SVG in the page's own colours. All text from outside is escaped. 6 arms with
3 seeds made a page of 0.4 MB in 7 s; 5,000 clips (2 arms, 60 frames each) one of 0.2 MB in 12 s.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.storage import write_text
from trainer.arms import ARMS
from trainer.curves import INK
from trainer.evaluation.benchmark_folder import (
    LEAST_IN_BIN,
    Benchmark,
    greatest_difference,
    guess,
    metronome,
    precision_recall,
    read_benchmark,
    reliability,
    state_over_time,
    training,
    why_missing,
)
from trainer.evaluation.bootstrap import Comparison, answer
from trainer.evaluation.disagreements import Moment, find_moments
from trainer.evaluation.metrics import METRICS
from trainer.evaluation.plots import (
    MODES,
    Forest,
    Mark,
    Panel,
    Row,
    colour,
    css_colours,
    draw,
    forest,
    number,
    panels,
    spell,
    timeline,
)

PAGE, FIGURES = "report.html", "figures"
SAME: Final = 1e-5  # what direct and inverted probabilities may be apart
FEW_SEEDS, FEW_RECORDINGS = 3, 20  # under which the page says so
WITHOUT_CONTENT = "speak+markers"
EXPLAINED: Final = {
    "event_f1": "moments of speech matched one to one with the reference's, in time; harmonic mean of the next two",
    "event_precision": "share of the moments it spoke at that match one of the reference's",
    "event_recall": "share of the reference's moments that it spoke at",
    "event_f1_reactive": "as event F1, for speech just after the user spoke",
    "event_f1_proactive": "as event F1, for speech that nobody asked for",
    "false_alarms_per_quiet_hour": "speech in no reference moment's window, per hour outside all windows",
    "duplicates_per_event": "further speech within a reference moment's window, per reference moment",
    "median_latency_s": "how long after the reference it spoke, at matched moments; negative: earlier",
    "speaking_ap": "average precision over frames: how well the score ranks frames to speak at; guessing gets chance",
    "speaking_auroc": "chance that a frame to speak at outscores a silent one; guessing gets 0.5",
    "speaking_f1": "over frames, at the threshold that was best on val",
    "speaking_balanced_accuracy": "mean of the shares of speaking and of silent frames judged right, at that threshold",
    "speaking_ece": "how far probabilities are from the shares they promise, on average over frames",
    "speaking_ap_alone": "average precision where no state update coincides: speech alone against frames of neither",
    "dst_ap": "as speaking AP, for state updates",
    "dst_event_f1": "as event F1, for state updates",
    "joint_state_accuracy": "share of frames at whose end every step's state is right, from the updates it made",
    "transition_f1": "updates matched in time, step and transition with the reference's",
}

CAPTIONS: Final = {
    "arms": "Each arm's mean over seeds with its 95% interval (recordings drawn again, seeds counted in). Hollow: the "
    "model reads the reference's texts. Filled: its own, as a user would have it. Dashed: what is had without seeing "
    "anything; the metronome's period was the best on val.",
    "differences": "First arm minus second, paired by recording and seed. An interval that crosses the line shows no "
    "difference. Compare arms here, not above: unpaired intervals overlap too easily.",
    "precision": "How many of the frames it would speak at are right (precision), if so many of the right ones are to "
    "be found (recall). Thin: single seeds. Thick: their mean at equal recall. Dashed: guessing.",
    "reliability": "Of the frames given a probability, how many were to be spoken at: on the dashed line, as many as "
    "promised. Thin: single seeds. Thick: all seeds' frames together. Bins of fewer than "
    f"{LEAST_IN_BIN} frames are left out. Probabilities are corrected for the sampling of silent frames in training.",
    "state": "Share of frames at whose end every step's state is right, in each tenth of the clips, from the updates "
    "that the arm itself made. Thin: single seeds. Thick: their mean. Dashed: an assistant that makes no update.",
    "training": "Teacher-forced. Arms that end alike may have learned at different speed: compare them at equal "
    "steps. Thin: single seeds. Thick: their mean.",
    "timeline": "Circles: speech matched to a moment of the reference. Crosses: speech matched to none. Diamonds: "
    "state updates. Dashed: the score at which it speaks.",
}

LATENCY: Final = (
    "A negative latency is no foresight: a frame's time is its beginning, which lies before the instant that it shows, "
    "and a label may begin some frames before its moment. A perfect head is early by up to one frame, or, where the "
    "labelled span or its onset lies earlier than that, by up to the start of the span."
)
UPDATE_LATENCY: Final = "median latency of right updates (s)"
THRESHOLDS: Final = (
    "chosen on {} with the reference's texts in the context, by the best event F1; the self-fed pass runs with them, "
    "so exposure bias includes any misfit of the threshold"
)

e = html.escape


def write_report(out: Path) -> Path:
    """Write OUT/report.html and OUT/figures/*.svg, *.png; the page's path. InputError if OUT is no benchmark's.

    The page is renamed into place when complete. The same folder gives the same bytes.
    """
    bench = read_benchmark(out)
    (out / FIGURES).mkdir(exist_ok=True)
    for old in [*(out / FIGURES).glob("timeline-*"), *(out / FIGURES).glob("state.*")]:  # there may be fewer now
        old.unlink()
    sections = (opening, _plots, _curves, _state, _timelines, _tables, _provenance)
    body = "\n".join(section(bench) for section in sections)
    page = files("trainer.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    marks = {"TITLE": e(headline(bench)), "LIGHT": css_colours(), "DARK": css_colours(dark=True), "BODY": body}
    for mark, text in marks.items():  # the body last: it may hold marks
        page = page.replace("{{" + mark + "}}", text, 1)
    write_text(out / PAGE, page)
    return out / PAGE


# ---- 1. the answer -----------------------------------------------------------------------------------


def opening(bench: Benchmark) -> str:
    """The answer in a sentence, whether the harness can be trusted, and what qualifies the answer."""
    qualified = (_missing, _skill, _exposure, _announcement, _power, _seeds, _small)
    said = [text for qualify in qualified if (text := qualify(bench)) is not None]
    return (
        '<header><p class="soft">prospect-dst benchmark: does dialog state tracking help to know when to speak?</p>'
        f"<h1>{e(headline(bench))}</h1>{_one_seed(bench)}{_harness(bench)}{_bullets(said)}"
        f'<p class="soft small">{e(_size(bench.info))}</p></header>'
    )


def _size(info: dict[str, Any]) -> str:
    counts = [(len(info["arms"]), "arm"), (len(info["seeds"]), "seed"), (info["recordings"], "recording")]
    counts += [(info.get("clips"), "clip"), (info.get("frames"), "frame")]
    told = [_count(count, what) for count, what in counts if count is not None]
    minutes = None if info.get("seconds") is None else f"{float(info['seconds']) / 60:,.1f} minutes of training"
    took = [f"{minutes}, all runs together"] if minutes else []
    took += [str(info["machine"])] if info.get("machine") else []
    return f"Split {info['split']}: {', '.join(told)}{'; ' if took else ''}{', on '.join(took)}."


def headline(bench: Benchmark) -> str:
    """The answer, ending in a full stop; what there is to say where nothing was compared."""
    metric, a, b = _primary(bench)
    row = bench.comparison(a, b, bench.mode, metric)
    if row is not None:
        compared = Comparison(**{f.name: row[f.name] for f in fields(Comparison) if f.name in row})
        return answer(compared, a, b, _name(metric), _unit(metric), bench.mode, _higher(metric)) + "."
    told = [
        f"{arm} reaches {_with_unit(spell(found['value'], found['low'], found['high']), metric)}"
        for arm in bench.info["arms"]
        if (found := bench.arm(arm, bench.mode, metric)) is not None
    ]
    return f"No answer: {a} and {b} were not compared. {'; '.join(told) or 'Nothing was measured'} ({bench.mode})."


def _one_seed(bench: Benchmark) -> str:
    """In red: nothing else on the page can say what other seeds would give."""
    if len(bench.info["seeds"]) > 1:
        return ""
    known = any(row["low"] is not None for row in (*bench.arms, *bench.comparisons))
    told = "the intervals tell only of other recordings, not of other seeds, and are too narrow for that"
    return f'<p class="alarm">One seed: {told if known else "nothing here tells of other seeds"}.</p>'


def _missing(bench: Benchmark) -> str | None:
    """Which arms lack the mode that was asked for, and why."""
    mode = str(bench.info["primary"]["mode"])
    whys = {arm: why for arm in bench.info["arms"] if (why := why_missing(bench, arm, mode)) is not None}
    alike = {why: [arm for arm in whys if whys[arm] == why] for why in whys.values()}
    told = [f"{_and(arms)} {'was' if len(arms) == 1 else 'were'} {why}." for why, arms in alike.items()]
    return " ".join(told) or None


def _skill(bench: Benchmark) -> str | None:
    """That event F1 tells nothing, where a metronome gets as much."""
    found = metronome(bench, bench.mode, "speaking")
    rows = [bench.arm(arm, bench.mode, "event_f1") for arm in bench.info["arms"]]
    known = [row for row in rows if row is not None and row["value"] is not None]
    if found is None or not known or any((row["low"] or 0.0) > found[1] for row in known):
        return None
    verb = "beats" if all(row["value"] <= found[1] for row in known) else "is shown to beat"
    window = "from {early_s:g} s early to {late_s:g} s late".format(**bench.info["settings"])
    return (
        f"No arm {verb} a metronome that speaks every {found[0]:g} s ({number(found[1])}): at this window ({window}) "
        "event F1 does not show skill; narrow it with --early-s and --late-s."
    )


def _exposure(bench: Benchmark) -> str | None:
    """What the winner, or else the first arm, loses when it reads its own text; or that nobody knows."""
    if MODES[1] not in bench.modes:
        return "No self-fed pass was made: each model read the reference's texts, which no user has. That flatters."
    metric, a, b = _primary(bench)
    winner = b if _gain(bench.comparison(a, b, MODES[1], metric)) == -_sign(metric) else a
    forced, fed = (bench.value(winner, mode, metric) for mode in MODES)
    if forced is None or fed is None:
        return None
    lost = _sign(metric) * (forced - fed)
    eaten = f"exposure bias eats {number(lost)}" if lost > 0 else "exposure bias eats nothing here"
    reached = _with_unit(number(forced), metric)
    told = f"Given the reference's texts {winner} reaches {reached}; given its own, {number(fed)}: {eaten}."
    other = bench.comparison(a, b, MODES[0], metric)
    if other is not None and other["difference"] is not None:
        told += f" Teacher-forced, {a} minus {b} would read {_interval(other)}."
    return told


def _gain(row: dict[str, Any] | None) -> int:
    """The sign of a difference that was shown; 0 where none was."""
    if row is None or row["low"] is None:
        return 0
    return int(row["low"] > 0) - int(row["high"] < 0)


def _announcement(bench: Benchmark) -> str | None:
    """How much of a gain that was shown is had from updates without content."""
    metric, a, b = _primary(bench)
    gain, announced = (_better(bench, arm, b, metric) for arm in (a, WITHOUT_CONTENT))
    shown = _gain(bench.comparison(a, b, bench.mode, metric)) == _sign(metric)
    if not shown or gain is None or announced is None or WITHOUT_CONTENT in (a, b):
        return None
    share = f"{announced / gain:.0%}" if 0 < announced < gain else "none" if announced <= 0 else "all"
    told = (
        f"{WITHOUT_CONTENT}, whose state updates carry no content, gains {number(announced, signed=True)} over {b}: "
        f"{share} of the gain is announcement (an update says that speech is near), not content."
    )
    content = bench.comparison(a, WITHOUT_CONTENT, bench.mode, metric)
    if content is not None and content["difference"] is not None:
        told += f" {a} minus {WITHOUT_CONTENT}: {_interval(content)}."
    return told


def _better(bench: Benchmark, arm: str, other: str, metric: str) -> float | None:
    """By how much `arm` is better than `other`."""
    first, second = (bench.value(name, bench.mode, metric) for name in (arm, other))
    return None if first is None or second is None else _sign(metric) * (first - second)


def _power(bench: Benchmark) -> str | None:
    """The size below which a difference would have been missed; `answer` says it where none was shown."""
    metric, a, b = _primary(bench)
    row = bench.comparison(a, b, bench.mode, metric)
    if row is None or not _gain(row) or row["detectable"] is None:
        return None
    size = f"{_count(row['recordings'], 'recording')} and {_count(row['seeds'], 'seed')}"
    missed = _with_unit(number(row["detectable"]), metric)
    return f"With these {size} a true difference under {missed} could well be missed."


def _seeds(bench: Benchmark) -> str | None:
    """Where more seeds would help more than more recordings."""
    metric, a, b = _primary(bench)
    row = bench.comparison(a, b, bench.mode, metric) or {}
    if (row.get("seed_share") or 0.0) <= 0.5:
        return None
    return (
        f"Most of the width of the answer's interval comes from having only {_count(row['seeds'], 'seed')} (Student's "
        f"t, {_count(row['seeds'] - 1, 'degree')} of freedom); more seeds narrow it faster than more recordings."
    )


def _small(bench: Benchmark) -> str | None:
    seeds, recordings = len(bench.info["seeds"]), bench.info["recordings"]
    few = [_count(seeds, "seed")] if 1 < seeds < FEW_SEEDS else []  # of one, _one_seed tells
    few += [_count(recordings, "recording")] if recordings < FEW_RECORDINGS else []
    if not few:
        return None
    verb = "is" if few == ["1 recording"] else "are"
    return f"{' and '.join(few)} {verb} few: what holds here may not hold for others."


def _harness(bench: Benchmark) -> str:
    """Direct and inverted heads are the same model: whether they came out so."""
    if not {"silence", "speak"} <= set(bench.info["arms"]):
        return _soft("Harness not checked: that needs the arms silence and speak, which must come out equal.")
    apart = greatest_difference(bench, "silence", "speak", MODES[0])
    if apart is None:
        return _soft("Harness not checked: there are no scores of silence and speak on the same frames.")
    far = f"probabilities differ by up to {apart:.1e}, 1e-5 is allowed" if apart else "to the last bit"
    if apart <= SAME:
        told = f"Harness check passed: silence and speak, the same model written twice, came out equal ({far})."
        return f'<p class="small passed">{told}</p>'
    return (
        '<p class="alarm">Harness check FAILED: silence and speak are the same model written twice and must come out '
        f"equal, but {far}. Trust no number on this page.</p>"
    )


# ---- 2. forest plots ---------------------------------------------------------------------------------


def _plots(bench: Benchmark) -> str:
    metric = _primary(bench)[0]
    shown = list(dict.fromkeys((metric, "speaking_ap")))
    arms = [Forest(_heading(name), _arm_rows(bench, name), _guess_line(bench, name)) for name in shown]
    pairs = list(dict.fromkeys((row["a"], row["b"]) for row in bench.comparisons))
    differences = [_differences(bench, name, pairs) for name in shown]
    text = f"<dl>{''.join(_arm_about(arm) for arm in bench.info['arms'])}</dl>"
    text += _figure(bench, "arms", partial(forest, arms), f"{_name(metric)} of each arm")
    if pairs:
        text += _figure(bench, "differences", partial(forest, differences), f"{_name(metric)}: differences of pairs")
    return _card("The arms", text)


def _guess_line(bench: Benchmark, metric: str) -> tuple[float, str] | None:
    """The same in every mode: it depends on the reference alone."""
    found = next((level for mode in bench.modes if (level := guess(bench, mode, metric)) is not None), None)
    return None if found is None else (found.value, f"{found.who}: {number(found.value)}")


def _differences(bench: Benchmark, metric: str, pairs: Sequence[tuple[str, str]]) -> Forest:
    side = "right" if _higher(metric) else "left"
    heading = f"Difference in {_heading(metric)}: {side} of the line the first is better"
    return Forest(heading, _pair_rows(bench, metric, pairs), (0.0, "no difference"), signed=True)


def _arm_about(arm: str) -> str:
    about = ARMS[arm].about if arm in ARMS else ""
    return f'<dt style="color: var(--x{colour(arm)[1:]})">{e(arm)}</dt><dd>{e(about)}</dd>'


def _arm_rows(bench: Benchmark, metric: str) -> list[Row]:
    def mark(arm: str, mode: str) -> Mark:
        row = bench.arm(arm, mode, metric) or {}
        return Mark(mode, row.get("value"), row.get("low"), row.get("high"))

    return [Row(arm, colour(arm), [mark(arm, mode) for mode in bench.modes]) for arm in bench.info["arms"]]


def _pair_rows(bench: Benchmark, metric: str, pairs: Sequence[tuple[str, str]]) -> list[Row]:
    def mark(a: str, b: str, mode: str) -> Mark:
        row = bench.comparison(a, b, mode, metric) or {}
        return Mark(mode, row.get("difference"), row.get("low"), row.get("high"))

    return [Row(f"{a} - {b}", INK, [mark(a, b, mode) for mode in bench.modes]) for a, b in pairs]


# ---- 3. curves ---------------------------------------------------------------------------------------


def _curves(bench: Benchmark) -> str:
    ranking, calibration = (_two(bench, panel) for panel in (_pr_panel, _reliability_panel))
    steps = (_training_panel(bench, "speaking", "Speaking"), _training_panel(bench, "dst_update", "DST update"))
    text = _figure(bench, "precision-recall", partial(panels, ranking, "AP"), "precision over recall")
    text += _figure(bench, "reliability", partial(panels, calibration, "ECE"), "calibration")
    text += _figure(bench, "training", partial(panels, steps, "last AP"), "average precision over training steps")
    return _card("Scores, probabilities, training", text)


def _two(bench: Benchmark, panel: Callable[[Benchmark, str], Panel]) -> tuple[Panel, Panel]:
    return panel(bench, MODES[0]), panel(bench, MODES[1])


def _pr_panel(bench: Benchmark, mode: str) -> Panel:
    curves, chance = precision_recall(bench, mode)
    line = None if chance is None else (np.array([0.0, 1.0]), np.array([chance, chance]), f"guessing {chance:.3f}")
    return Panel(f"Speaking, {mode}", curves, "recall", "precision", line, 1.0, empty="no scores")


def _reliability_panel(bench: Benchmark, mode: str) -> Panel:
    line = (np.array([0.0, 1.0]), np.array([0.0, 1.0]), "")
    empty = "no corrected probabilities"
    return Panel(f"Speaking, {mode}", reliability(bench, mode), "probability", "share", line, 1.0, True, empty)


def _training_panel(bench: Benchmark, head: str, name: str) -> Panel:
    curves, split = training(bench, head)
    last = max((float(x[-1]) for curve in curves for x, _ in curve.seeds), default=None)
    return Panel(f"{name}, {split}", curves, "optimizer steps", "average precision", None, last, empty="not measured")


# ---- 4. the state ------------------------------------------------------------------------------------


def _state(bench: Benchmark) -> str:
    """Empty where no arm's updates tell of the state."""
    known = {mode: curves for mode in bench.modes if (curves := state_over_time(bench, mode))}
    if not known:
        return ""
    mode = bench.mode if bench.mode in known else next(iter(known))
    panel = Panel(
        f"Joint state accuracy, {mode}", known[mode], "% of the clip", "share of frames", x_from_zero_to=100, dots=True
    )
    draw_it = partial(panels, (panel,), "in the whole clip")
    return _card("The state", _figure(bench, "state", draw_it, "joint state accuracy over time in the clip"))


# ---- 5. timelines ------------------------------------------------------------------------------------


def _timelines(bench: Benchmark) -> str:
    _, a, b = _primary(bench)
    found, about = find_moments(bench, a, b)
    parts = [_soft(about)]
    for i, moment in enumerate(found, 1):
        parts.append(_figure(bench, f"timeline-{i}", partial(timeline, moment.picture), moment.picture.title))
        parts.append(_transcript(moment))
    return _card(f"Where {a} and {b} differ most", "".join(parts))


def _transcript(moment: Moment) -> str:
    rows = "".join(
        f'<tr><td>{line.seconds:.1f} s</td><td class="left"{_tint(line.who)}>{e(line.who)}</td>'
        f'<td class="text">{e(line.text)}</td></tr>'
        for line in moment.lines
    )
    more = f'<p class="soft small">{moment.left_out} more lines are left out.</p>' if moment.left_out else ""
    return f"<details><summary>What was said</summary><table>{rows}</table>{more}</details>"


def _tint(who: str) -> str:
    return f' style="color: var(--x{colour(who)[1:]})"' if who in ARMS else ""


# ---- 6. tables ---------------------------------------------------------------------------------------


def _tables(bench: Benchmark) -> str:
    measured = [name for name in _metrics(bench) if any(row["metric"] == name for row in bench.arms)]
    arms = "".join(f'<th style="color: var(--x{colour(arm)[1:]})">{e(arm)}</th>' for arm in bench.info["arms"])
    rows = "".join(_metric_rows(bench, name) for name in measured) + _update_latency_rows(bench)
    about = {_heading(name): EXPLAINED.get(name, "") for name in measured}
    numbers = _table(f"<th>metric</th><th></th>{arms}<th>guessing</th>", rows)
    notes = f'<p class="soft small note">{e(LATENCY)}</p>' if "median_latency_s" in measured else ""
    explained = _folded("What each metric means", about)
    return _card("All numbers", numbers + notes + explained) + _card("All comparisons", _comparisons(bench))


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _metric_rows(bench: Benchmark, metric: str) -> str:
    def cells(mode: str) -> list[str]:
        level = guess(bench, mode, metric)
        known = "" if level is None else f"{number(level.value)}<small>{e(level.who)}</small>"
        return [*(_cell(bench.arm(arm, mode, metric)) for arm in bench.info["arms"]), known]

    return _rows(_heading(metric), {mode: cells(mode) for mode in bench.modes})


def _update_latency_rows(bench: Benchmark) -> str:
    """Means over seeds without an interval: not compared. Empty where no arm's updates tell of the state."""
    found = {
        mode: [bench.measured(arm, mode, "state", "transitions", "median_latency_s") for arm in bench.info["arms"]]
        for mode in bench.modes
    }
    cells = {mode: [*(_mean(seeds) for seeds in of_arms), ""] for mode, of_arms in found.items() if any(of_arms)}
    return _rows(UPDATE_LATENCY, cells)


def _mean(values: Sequence[float]) -> str:
    return number(float(np.mean(values))) if values else "-"


def _rows(heading: str, of_modes: dict[str, list[str]]) -> str:
    """One row a mode: each arm, then what guessing gets."""
    rows = []
    for i, (mode, cells) in enumerate(of_modes.items()):
        first = f'<th rowspan="{len(of_modes)}" class="left">{e(heading)}</th>' if i == 0 else ""
        *arms, guessed = cells
        numbers = "".join(f"<td>{cell}</td>" for cell in arms) + f'<td class="guess">{guessed}</td>'
        within = ' class="within"' if i < len(of_modes) - 1 else ""
        rows.append(f'<tr{within}>{first}<td class="mode soft">{e(mode)}</td>{numbers}</tr>')
    return "".join(rows)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return "-"
    ends = "" if row["low"] is None else f"<small>{number(row['low'])} to {number(row['high'])}</small>"
    return f"{number(row['value'])}{ends}"


_COLUMNS: Final = (
    ("difference", "first arm minus second, in the metric's unit; mean over seeds, paired by recording"),
    ("95% interval", "made this way, it holds the true difference in about 95 of 100 such experiments"),
    ("direction", "how sure the difference's sign is: 50% is a coin toss"),
    ("p", "two-sided, against no difference; of this test alone"),
    (
        "Holm p",
        "the same, corrected for all pairs compared on this metric in this mode; not for looking at many metrics",
    ),
    ("missed under", "a true difference smaller than this would be missed in more than 1 of 5 such experiments"),
)


def _comparisons(bench: Benchmark) -> str:
    if not bench.comparisons:
        return _soft("No two arms of a pair of interest were run.")
    metric, *_ = _primary(bench)
    order = {name: i for i, name in enumerate(_metrics(bench))}
    ranked = sorted(bench.comparisons, key=lambda row: (not row["primary"], order[row["metric"]]))
    first, rest = ([row for row in ranked if (row["metric"] == metric) is own] for own in (True, False))
    sizes = sorted({(row["recordings"], row["seeds"]) for row in ranked})
    size = "; ".join(f"{_count(r, 'recording')}, {_count(s, 'seed')}" for r, s in sizes)
    others = f"<summary>{_count(len(rest), 'comparison')} in other metrics</summary>{_comparison_table(rest)}"
    return (
        _soft(f"{size}. Shaded: the one question that was fixed beforehand.")
        + _comparison_table(first)
        + (f"<details>{others}</details>" if rest else "")
        + _list(dict(_COLUMNS))
    )


def _comparison_table(rows: Iterable[dict[str, Any]]) -> str:
    numbers = "".join(f"<th>{name}</th>" for name, _ in _COLUMNS)
    head = f'<th>pair</th><th class="left">metric</th><th class="left">mode</th>{numbers}'
    return _table(head, "".join(_comparison_row(row) for row in rows))


def _comparison_row(row: dict[str, Any]) -> str:
    ends = "-" if row["low"] is None else f"{number(row['low'], True)} to {number(row['high'], True)}"
    sure = "-" if row["p_direction"] is None else f"{row['p_direction']:.1%}"
    tests = [_p(row["p_value"]), _p(row["p_holm"])]
    cells = [number(row["difference"], True), ends, sure, *tests, number(row["detectable"])]
    left = [f"<td>{e(row['a'])} - {e(row['b'])}</td>"]
    left += [f'<td class="left">{e(text)}</td>' for text in (_heading(row["metric"]), row["mode"])]
    own = ' class="primary"' if row["primary"] else ""
    return f"<tr{own}>{''.join(left)}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "under 0.001" if value < 0.001 else f"{value:.3f}"


# ---- 7. where it comes from --------------------------------------------------------------------------


def _provenance(bench: Benchmark) -> str:
    info = bench.info
    hazards = [str(hazard) for hazard in info.get("hazards") or ()]
    commands = "".join(_command(str(command)) for command in info.get("commands") or ())
    rules = {"label rule": info.get("label_rule"), **_spelt(info.get("settings")), "thresholds": _thresholds(bench)}
    rules["bootstrap draws"] = info.get("draws")
    config = {key: value for key, value in (info.get("config") or {}).items() if key not in ("arm", "seed")}
    data = {"data": info.get("data"), **{f"key of {k}": v for k, v in (info.get("data_key") or {}).items()}}
    hashes = _folded("SHA-256 that names each checkpoint (of its run.json)", info.get("hashes"))
    cards = [
        _card("Hazards of the data", _bullets(hazards) or _soft("None was seen.")),
        _card("Speech matched by meaning", _list(info.get("sentence"))) if info.get("sentence") else "",
        _card("How to query it", f'<pre id="recipe">{e(recipe(bench))}</pre>'),
        _card("Commands", f'<pre class="commands">{commands}</pre>'),
        _card("Rules and settings", _list(rules) + _folded("Training, the same for all arms and seeds", config)),
        _card("Data, versions, hashes", _list(data) + _list(info.get("versions")) + hashes),
    ]
    return "\n".join(cards)


def _command(words: str) -> str:
    """On its own line, which may break between words, but not at a hyphen."""
    return f"<span>{' '.join(f'<span>{e(word)}</span>' for word in words.split(' '))}\n</span>"


def _thresholds(bench: Benchmark) -> str:
    """Where they come from; older folders do not say, and had no other place."""
    chosen = [key for key in bench.metrics if bench.threshold(*key) is not None]
    splits = sorted({str(bench.metrics[key].get("thresholds_from") or "val") for key in chosen})
    return THRESHOLDS.format(_and(splits)) if splits else "none could be chosen: val has no frame to speak at"


_SETTINGS: Final = {
    "early_s": "speech counts as early as (s)",
    "late_s": "speech counts as late as (s)",
    "refractory_s": "silence after speech (s)",
    "reactive_s": "reactive: the user spoke within (s)",
    "bins": "bins of the calibration",
}


def _spelt(settings: dict[str, Any] | None) -> dict[str, Any]:
    return {_SETTINGS.get(key, key): value for key, value in (settings or {}).items()}


def recipe(bench: Benchmark) -> str:
    """A polars script that runs in OUT."""
    metric, a, _ = _primary(bench)
    arm = a if a in bench.info["arms"] else bench.info["arms"][0]
    scores = f"runs/{arm}/seed-{bench.info['seeds'][0]}/scores/{bench.mode}.parquet"
    return f"""\
import polars as pl  # run where this page lies

# each arm, with its interval
arms = pl.read_parquet("arms.parquet")
print(arms.filter(metric={metric!r}).select("arm", "mode", "value", "low", "high"))

# what was shown: intervals that leave out 0
pairs = pl.read_parquet("comparisons.parquet")
shown = pairs.filter((pl.col("low") > 0) | (pl.col("high") < 0)).sort("p_holm")
print(shown.select("a", "b", "mode", "metric", "difference", "low", "high", "p_holm"))

# seed by seed
seeds = pl.read_parquet("results.parquet").filter(metric={metric!r}, mode={bench.mode!r})
print(seeds.pivot(on="seed", index="arm", values="value"))

# silent frames at which {arm} would rather have spoken
frames = pl.scan_parquet({scores!r}).filter(split={str(bench.info["split"])!r}, speaking_label=0)
print(frames.top_k(10, by="speaking_logit").select("clip_id", "frame", "time_s", "speaking_logit").collect())
"""


# ---- words and parts ---------------------------------------------------------------------------------


def _primary(bench: Benchmark) -> tuple[str, str, str]:
    primary = bench.info["primary"]
    a, b = primary["pair"]
    return str(primary["metric"]), str(a), str(b)


def _metrics(bench: Benchmark) -> list[str]:
    """METRICS' order, then what it does not know."""
    found = {row["metric"] for row in (*bench.arms, *bench.comparisons)}
    return [name for name in METRICS if name in found] + sorted(found - set(METRICS))


def _name(metric: str) -> str:
    return METRICS[metric].label if metric in METRICS else metric.replace("_", " ")


def _unit(metric: str) -> str:
    return METRICS[metric].unit if metric in METRICS else ""


def _heading(metric: str) -> str:
    unit = _unit(metric)
    return f"{_name(metric)} ({unit})" if unit else _name(metric)


def _higher(metric: str) -> bool:
    return METRICS[metric].higher_is_better if metric in METRICS else True


def _sign(metric: str) -> int:
    """1 where more is better, else -1."""
    return 1 if _higher(metric) else -1


def _with_unit(text: str, metric: str) -> str:
    """'0.520 [0.490, 0.550]' with the metric's unit and name behind its first number."""
    value, space, interval = text.partition(" ")
    return " ".join(part for part in (value, _unit(metric), _name(metric)) if part) + space + interval


def _interval(row: dict[str, Any]) -> str:
    return spell(row["difference"], row["low"], row["high"], signed=True)


def _and(names: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _soft(text: str) -> str:
    return f'<p class="soft">{e(text)}</p>'


def _bullets(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{e(text)}</li>' for text in texts)}</ul>" if texts else ""


def _card(heading: str, body: str) -> str:
    return f'<section class="card"><h2>{e(heading)}</h2>{body}</section>'


def _list(rows: dict[str, Any] | None) -> str:
    told = "".join(f"<dt>{e(str(k))}</dt><dd>{e(str(v))}</dd>" for k, v in (rows or {}).items() if v is not None)
    return f"<dl>{told}</dl>" if told else ""


def _folded(name: str, rows: dict[str, Any] | None) -> str:
    return f"<details><summary>{e(name)}</summary>{_list(rows)}</details>" if rows else ""


def _figure(bench: Benchmark, name: str, make: Callable[[], Any], about: str) -> str:
    """Drawn to files and into the page."""
    svg = draw(bench.out / FIGURES / name, make, about)
    links = ", ".join(f'<a href="{FIGURES}/{name}.{kind}">{name}.{kind}</a>' for kind in ("svg", "png"))
    caption = f"{CAPTIONS[name.split('-')[0]]} Beside this page in {FIGURES}/: {links}."
    return f'<figure><div class="scroll">{svg}</div><figcaption>{caption}</figcaption></figure>'
