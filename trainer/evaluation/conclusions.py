"""The sentences that the report opens with: the answer, whether the harness can be trusted, what limits the answer.

Each is computed from the tables and stands there only if the numbers make it true; none says more than an interval
allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Final

from pipeline.terminal import counted
from trainer.arms import find_rung
from trainer.config import MODES, SELF_FED, TEACHER_FORCED
from trainer.evaluation.benchmark_folder import IMPROVING, Benchmark, Row, convergence, greatest_difference, why_missing
from trainer.evaluation.bootstrap import Comparison, answer
from trainer.evaluation.ladder import (
    BEATS,
    CHAIN,
    CONTROL_PAIRS,
    NO_LARGER,
    PRIMARY,
    QUESTION,
    SMALL,
    UNDECIDED,
    WORSE,
    Step,
    ladder_steps,
    tells,
    top_rung,
)
from trainer.evaluation.metrics import METRICS, Metric
from trainer.evaluation.plots import format_interval, format_number

HARNESS_TOLERANCE: Final = 1e-5  # between the probabilities of a direct and an inverted head
FEW_SEEDS, FEW_RECORDINGS = 3, 20  # under which the page says so
WITHOUT_CONTENT: Final = "speak+markers"
SOURCES: Final = {  # what each rung of CHAIN has more than the one before it
    "metronome": "the clock",
    "history": "history",
    "texts": "texts",
    "speak": "pictures",
    "speak+dst": "own state",
}


def headline(bench: Benchmark) -> str:
    """The answer in two sentences."""
    return " ".join(opening(bench))


def opening(bench: Benchmark) -> list[str]:
    """What tells when to speak, then the ladder's steps in numbers; where there is no ladder, the question's answer."""
    top, margin = top_rung(bench), f"{bench.margin:g}"
    if top is None:
        return [question(bench)]
    steps = {step.rung: step for step in ladder_steps(bench)}
    lowest, *others = top.chain
    beyond = "" if lowest == "metronome" else f"beyond what {lowest} has"
    if told := [source for rung in tells(bench) for source in _sources(steps[rung])]:
        first = f"On these data, when to speak is told by {_listed(told)}{beyond and f', {beyond}'}"
        if alike := _as_good_without_content(bench) if SOURCES[QUESTION[0]] in told else []:
            verb = "lacks the state's content, is" if len(alike) == 1 else "lack the state's content, are"
            first += f", or by what comes with it: {_listed(alike)}, which {verb} not shown to be worse"
    else:
        first = f"On these data nothing is shown to tell when to speak {beyond or 'better than a metronome'}"
    if top.decided:
        first += f"; {top.rung} is the lowest rung that reaches the top"
        first += "" if top.rung == top.chain[-1] else f": those above add {margin} event F1 at most"
    else:
        name = top.rung.replace("metronome", "a metronome")
        first += f"; no rung is shown to beat {name}, but whether one does, by over {margin}, is undecided"
    seeds = [bench.score(r, bench.mode, PRIMARY)["seeds"] for r in top.chain if find_rung(r).kind == "arm"] or [1]
    size = f"{min(seeds)} to " if min(seeds) < max(seeds) else ""
    size = f"{counted(bench.info['recordings'], 'recording')}, {size}{counted(max(seeds), 'seed')}"
    numbers = [f"{lowest} {format_number(steps[lowest].value)}"]
    numbers += [f"{_listed(_sources(steps[rung]))} {_step(bench, steps[rung])}" for rung in others]
    text = f"Event F1 ({bench.mode}, {size}): {', '.join(numbers)}"
    if "true-state" in steps and steps["true-state"].below == QUESTION[0]:
        text += f"; the true state would add {_step(bench, steps['true-state'])}"
    return [f"{first}.", f"{text}."]


def _as_good_without_content(bench: Benchmark) -> list[str]:
    """The controls of the question, without what the updates say, that speak+dst is not shown to beat."""
    rows = {control: bench.comparison(rung, control, bench.mode, PRIMARY) for rung, control in CONTROL_PAIRS}
    return [control for control, row in rows.items() if row and (row["low"] or 0.0) <= 0]


def _sources(step: Step) -> list[str]:
    """What the rung has more than the one below it, which need not be the next."""
    lower = CHAIN.index(step.below) if step.below else -1
    return [SOURCES[rung] for rung in CHAIN[lower + 1 : CHAIN.index(step.rung) + 1]]


def _step(bench: Benchmark, step: Step) -> str:
    """'+0.010 [-0.020, +0.040] (no more than 0.05)'"""
    small, least = f" (under {bench.margin:g})", f" (no more than {bench.margin:g})"
    words = {BEATS: "", WORSE: " (worse)", UNDECIDED: " (undecided)", SMALL: small, NO_LARGER: least}
    return format_interval(step.difference, step.low, step.high, signed=True) + words[step.verdict]


def leaks(bench: Benchmark) -> Iterator[str]:
    """That seeing was not needed, and that the context gives the answer away: of each mode the lowest such rung."""
    for mode in bench.modes:
        top = top_rung(bench, mode)
        for blind in ("history", "texts"):
            row = bench.comparison("speak", blind, mode, PRIMARY)
            near = row.get("high") is not None and row["high"] <= bench.margin
            if near and top and top.rung != top.chain[0]:
                yield (
                    f"Seeing was not needed ({mode}): {blind}, which sees no picture, comes within {bench.margin:g} "
                    f"event F1 of speak (speak minus {blind}: {_difference(row)})."
                )
                yield from _given_away(bench, blind) if mode == TEACHER_FORCED else ()
                break


def _given_away(bench: Benchmark, blind: str) -> Iterator[str]:
    """That a rung without pictures is much better on the reference's context than on its own."""
    forced, free = (bench.score(blind, mode, PRIMARY) for mode in MODES)
    if forced.get("low") is None or free.get("high") is None or forced["low"] <= free["high"] + bench.margin:
        return
    on_reference, on_own = (format_interval(row["value"], row["low"], row["high"]) for row in (forced, free))
    text = (
        f"The reference's context gives away when to speak: on it {blind} reaches {on_reference}, on its own {on_own}."
    )
    row = bench.comparison("texts", "history", TEACHER_FORCED, PRIMARY)
    if blind == "texts" and (row.get("low") or 0.0) > bench.margin:
        text += f" The times of past events do not ({_difference(row)} over history): look for a text before its event."
    yield text


def question(bench: Benchmark) -> str:
    """The answer to the question that was settled beforehand; where its arms were not compared, the reason."""
    name, a, b = bench.primary
    metric, row = METRICS[name], bench.comparison(a, b, bench.mode, name)
    if row:
        comparison = Comparison(**{field.name: row[field.name] for field in fields(Comparison)})
        return answer(comparison, a, b, metric.label, metric.unit, bench.mode, metric.higher_is_better) + "."
    reached = []
    for rung in bench.rungs:
        if row := bench.score(rung, bench.mode, name):
            number, _, interval = format_interval(row["value"], row["low"], row["high"]).partition(" ")
            reached.append(f"{rung} reaches {number} {_named(metric)} {interval}".rstrip())
    return f"No answer: {a} and {b} were not compared. {'; '.join(reached) or 'Nothing was measured'} ({bench.mode})."


def one_seed(bench: Benchmark) -> str:
    """A warning that nothing on the page says what other seeds would give; empty with more than one."""
    if len(bench.info["seeds"]) > 1:
        return ""
    if any(row["low"] is not None for row in (*bench.scores.values(), *bench.comparisons.values())):
        return "One seed: the intervals are about other recordings, not other seeds, and are too narrow for those."
    return "One seed: nothing here says what other seeds would give."


def harness_check(bench: Benchmark) -> tuple[str, str]:
    """('passed', 'failed' or 'skipped', the sentence): direct and inverted heads are the same model, and must agree."""
    if not {"silence", "speak"} <= set(bench.rungs):
        return "skipped", ""
    difference = greatest_difference(bench, "silence", "speak", TEACHER_FORCED)
    if difference is None:
        return "skipped", "Harness not checked: there are no scores of silence and speak on the same frames."
    how = f"probabilities differ by up to {difference:.1e}, 1e-5 is allowed" if difference else "to the last bit"
    if difference <= HARNESS_TOLERANCE:
        return "passed", f"Harness check passed: silence and speak are the same model and came out equal ({how})."
    must = "silence and speak are the same model and must come out equal"
    return "failed", f"Harness check FAILED: {must}, but {how}. Trust no number on this page."


def data_size(info: Row) -> str:
    """What was evaluated, how long training took, and where."""
    counts = [(len(info["rungs"]), "rung"), (len(info["seeds"]), "seed")]
    counts += [(info[f"{what}s"], what) for what in ("recording", "clip", "frame")]
    size, minutes = ", ".join(counted(number, what) for number, what in counts), float(info["seconds"]) / 60
    where = f"{minutes:,.1f} minutes of training, all runs together, on {info['machine']}"
    return f"Split {info['split']}: {size}; {where}."


# ---- what limits the answer --------------------------------------------------------------------------


def limits(bench: Benchmark) -> list[str]:
    """What limits the answer, most important first."""
    return [*_missing(bench), *_exposure(bench), *_without_content(bench), *_precision(bench), *_stopping(bench)]


def _missing(bench: Benchmark) -> Iterator[str]:
    """Which arms lack the mode that was asked for, and why; and that event F1 shows no skill where nothing is shown to
    beat a metronome."""
    reasons: dict[str, list[str]] = {}
    for rung in bench.rungs:
        if why := why_missing(bench, rung, str(bench.info["primary"]["mode"])):
            reasons.setdefault(why, []).append(rung)
    for why, rungs in reasons.items():
        yield f"{_listed(rungs)} {'was' if len(rungs) == 1 else 'were'} {why}."
    top = top_rung(bench)
    if top and top.rung == "metronome":
        window = "from {early_s:g} s early to {late_s:g} s late".format(**bench.info["settings"])
        yield f"At this window ({window}) event F1 does not show skill; narrow it with --early-s and --late-s."


def _exposure(bench: Benchmark) -> Iterator[str]:
    """What the winner, or else the first arm, loses when it reads its own text; or that this was not measured."""
    name, a, b = bench.primary
    metric = METRICS[name]
    if SELF_FED not in bench.modes:
        yield "No free-running evaluation: each model read the reference's texts, as no user can: too favourable."
        return
    winner = b if _shown_sign(metric, bench.comparison(a, b, SELF_FED, name)) < 0 else a
    forced, free = (bench.score(winner, mode, name).get("value") for mode in MODES)
    if forced is None or free is None:
        return
    loss = forced - free if metric.higher_is_better else free - forced
    text = (
        f"Given the reference's texts {winner} reaches {format_number(forced)} {_named(metric)}; free-running, given "
        f"its own, {format_number(free)}: exposure bias costs {format_number(loss) if loss > 0 else 'nothing here'}."
    )
    row = bench.comparison(a, b, TEACHER_FORCED, name)
    known = row.get("difference") is not None
    yield text + (f" Teacher-forced, {a} minus {b} would read {_difference(row)}." if known else "")


def _without_content(bench: Benchmark) -> Iterator[str]:
    """How much of a gain that was shown is also had from updates without content."""
    name, a, b = bench.primary
    metric, control = METRICS[name], WITHOUT_CONTENT
    values = [bench.score(rung, bench.mode, name).get("value") for rung in (a, control, b)]
    shown = _shown_sign(metric, bench.comparison(a, b, bench.mode, name)) > 0
    if not shown or None in values or control in (a, b):
        return
    sign = 1 if metric.higher_is_better else -1
    gain, announced = (sign * (float(value or 0) - float(values[2] or 0)) for value in values[:2])
    share = f"{announced / gain:.0%}" if 0 < announced < gain else "none" if announced <= 0 else "all"
    text = (
        f"{control}, whose state updates carry no content, gains {format_number(announced, signed=True)} over {b}: "
        f"{share} of the gain comes with the updates (their presence, a second head's labels), not from their content."
    )
    row = bench.comparison(a, control, bench.mode, name)
    yield text + (f" {a} minus {control}: {_difference(row)}." if row.get("difference") is not None else "")


def _precision(bench: Benchmark) -> Iterator[str]:
    """What size would have been missed (`answer` says it where none was shown), what more data would help, and which
    arms of the question still improved when training ended."""
    name, a, b = bench.primary
    metric, row = METRICS[name], bench.comparison(a, b, bench.mode, name)
    if _shown_sign(metric, row) and row["detectable"] is not None:
        size = f"{counted(row['recordings'], 'recording')} and {counted(row['seeds'], 'seed')}"
        missed = f"{format_number(row['detectable'])} {_named(metric)}"
        yield f"With these {size} a true difference under {missed} could well be missed."
    if (row.get("seed_share") or 0.0) > 0.5:
        yield (
            f"Most of the width of the answer's interval comes from having only {counted(row['seeds'], 'seed')} "
            f"(Student's t, {counted(row['seeds'] - 1, 'degree')} of freedom); more seeds narrow it faster than more "
            "recordings."
        )
    seeds, recordings = len(bench.info["seeds"]), bench.info["recordings"]
    few = [counted(seeds, "seed")] if 1 < seeds < FEW_SEEDS else []  # one seed has a warning of its own
    few += [counted(recordings, "recording")] if recordings < FEW_RECORDINGS else []
    if few:
        verb = "is" if few == ["1 recording"] else "are"
        yield f"{' and '.join(few)} {verb} few: what holds here may not hold for others."
    for rung, text in convergence(bench).items():
        if rung in (a, b) and text.startswith(IMPROVING):
            yield f"{rung} {text} when training ended: more --steps may change the answer."


def _stopping(bench: Benchmark) -> Iterator[str]:
    """Which interval holds where a benchmark was stopped because of what it showed (bootstrap.always_valid)."""
    name, a, b = bench.primary
    row = bench.comparison(a, b, bench.mode, name)
    if row.get("low") is None or row["seeds"] < 2:
        return
    told = "The answer's interval holds where the clock, or a number of seeds that was set beforehand, ended the runs"
    if row.get("always_low") is None:
        yield f"{told}; to stop because of what was seen takes 3 seeds or more."
        return
    always = format_interval(row["difference"], row["always_low"], row["always_high"], signed=True)
    yield f"{told}; if you stopped because of what you saw, use {always}, valid at any number of seeds."


# ---- words -------------------------------------------------------------------------------------------


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _named(metric: Metric) -> str:
    return f"{metric.unit} {metric.label}".strip()


def _shown_sign(metric: Metric, row: Row) -> int:
    """1 where the first arm was shown to be better, -1 the second, else 0."""
    if row.get("low") is None:
        return 0
    return (int(row["low"] > 0) - int(row["high"] < 0)) * (1 if metric.higher_is_better else -1)


def _difference(row: Row) -> str:
    return format_interval(row["difference"], row["low"], row["high"], signed=True)
