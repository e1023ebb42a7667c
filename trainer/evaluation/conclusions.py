"""What the report concludes: the ladder's steps, the lowest rung that reaches the top, and the sentences that say so.

Each sentence is computed from the tables and stands there only if the numbers make it true; none says more than an
interval allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final, NamedTuple

import numpy as np
from scipy import stats

from pipeline.terminal import counted
from trainer.arms import RUNGS
from trainer.config import FREE_RUNNING, MODES, TEACHER_FORCED
from trainer.evaluation.bootstrap import Comparison, answer
from trainer.evaluation.comparison import (
    BEATS,
    CHAIN,
    CONTROL_PAIRS,
    NO_LARGER,
    PRIMARY,
    QUESTION,
    ROUNDING,
    SMALL,
    UNDECIDED,
    WORSE,
    Benchmark,
    steps_of,
    training_curves,
    verdict_of,
    why_missing,
)
from trainer.evaluation.plots import Line, format_interval, format_number

IMPROVING: Final = "was still improving"
SOURCES: Final = dict(zip(CHAIN, ("the clock", "history", "texts", "pictures", "own state"), strict=True))  # each adds


# ---- the ladder --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A rung, and what it adds to the one below it; the lowest has no numbers of a step."""

    rung: str
    below: str | None
    value: float | None  # event F1
    low: float | None = None  # of the difference, as `high`
    high: float | None = None
    difference: float | None = None  # to `below`
    verdict: str = ""


def ladder_steps(bench: Benchmark, mode: str | None = None) -> list[Step]:
    """Every rung measured in `mode` (None: that of the answer), from the lowest up."""
    mode = mode or bench.mode
    steps, measured = [], [rung for rung in bench.rungs if bench.score(rung, mode, PRIMARY)]
    lower = steps_of(measured)
    for rung in measured:
        value, below = bench.score(rung, mode, PRIMARY)["value"], lower.get(rung)
        row = bench.comparison(rung, below, mode, PRIMARY) if below else {}
        low, high = row.get("low"), row.get("high")
        verdict = verdict_of(low, high, bench.info["margin"]) if below else ""
        steps.append(Step(rung, below, value, low, high, row.get("difference"), verdict))
    return steps


class Top(NamedTuple):
    """How far up the ladder one has to climb; scripted rungs and variants of a rung are left out."""

    rung: str  # the lowest that no higher rung is shown to beat
    decided: bool  # whether the rungs above `rung` are shown to add no more than the margin to it
    chain: list[str]  # the rungs of CHAIN that were measured


def _measured_chain(bench: Benchmark, mode: str) -> list[str]:
    return [rung for rung in CHAIN if bench.score(rung, mode, PRIMARY).get("value") is not None]


def _beats(bench: Benchmark, high: str, low: str, mode: str) -> bool:
    """Whether `high` is shown to be better than `low`, or than another rung below `high` whose value is no less.

    Else a rung with few seeds, whose intervals are wide, would hide a gain that is shown over a better rung.
    """
    values = {rung: bench.score(rung, mode, PRIMARY)["value"] for rung in _measured_chain(bench, mode)}
    return any(
        values[rung] >= values[low] and (bench.comparison(high, rung, mode, PRIMARY).get("low") or 0.0) > 0
        for rung in CHAIN[: CHAIN.index(high)]
        if rung in values
    )


def top_rung(bench: Benchmark, mode: str | None = None) -> Top | None:
    """The lowest rung that reaches the top; None where fewer than two rungs of CHAIN were measured."""
    mode = mode or bench.mode
    chain = _measured_chain(bench, mode)
    for place, rung in enumerate(chain if len(chain) > 1 else ()):
        above = chain[place + 1 :]
        if not any(_beats(bench, higher, rung, mode) for higher in above):
            ends = [bench.comparison(higher, rung, mode, PRIMARY).get("high") for higher in above]
            return Top(rung, all(end is not None and end <= bench.info["margin"] + ROUNDING for end in ends), chain)
    return None


def tells(bench: Benchmark) -> list[str]:
    """The rungs of CHAIN whose source of information is shown to tell: better than every rung below them."""
    chain = _measured_chain(bench, bench.mode)
    return [
        rung
        for place, rung in enumerate(chain)
        if place and all(_beats(bench, rung, low, bench.mode) for low in chain[:place])
    ]


# ---- the answer --------------------------------------------------------------------------------------


def opening(bench: Benchmark) -> list[str]:
    """What tells when to speak, then the ladder's steps in numbers; where there is no ladder, the question's answer."""
    top, margin = top_rung(bench), f"{bench.info['margin']:g}"
    if top is None:
        return [question(bench)]
    steps = {step.rung: step for step in ladder_steps(bench)}
    lowest, *others = top.chain
    beyond = "" if lowest == "metronome" else f"beyond what {lowest} has"
    adds = {}  # rung -> the sources that it has more than the one below it, which need not be the next
    for rung in others:
        place = CHAIN.index(str(steps[rung].below)) + 1
        adds[rung] = [SOURCES[added] for added in CHAIN[place : CHAIN.index(rung) + 1]]
    if sources := [source for rung in tells(bench) for source in adds[rung]]:
        first = f"On these data, when to speak is told by {_listed(sources)}{beyond and f', {beyond}'}"
        rows = [(control, bench.comparison(a, control, bench.mode, PRIMARY)) for a, control in CONTROL_PAIRS]
        alike = [control for control, row in rows if row and (row["low"] or 0.0) <= 0]
        if SOURCES[QUESTION[0]] in sources and alike:
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
    seeds = [bench.score(r, bench.mode, PRIMARY)["seeds"] for r in top.chain if RUNGS[r].kind == "arm"] or [1]
    size = f"{min(seeds)} to " if min(seeds) < max(seeds) else ""
    size = f"{counted(bench.info['recordings'], 'recording')}, {size}{counted(max(seeds), 'seed')}"
    numbers = [f"{lowest} {format_number(steps[lowest].value)}"]
    numbers += [f"{_listed(adds[rung])} {_added(bench, steps[rung])}" for rung in others]
    text = f"Event F1 ({bench.mode}, {size}): {', '.join(numbers)}"
    if "true-state" in steps and steps["true-state"].below == QUESTION[0]:
        text += f"; the true state would add {_added(bench, steps['true-state'])}"
    return [f"{first}.", f"{text}."]


def _added(bench: Benchmark, step: Step) -> str:
    """'+0.010 [-0.020, +0.040] (no more than 0.05)'"""
    if step.rung == "history" and step.low == step.high == 0:  # it speaks as the metronome
        return "+0.000 (no difference)"
    small, least = f" (under {bench.info['margin']:g})", f" (no more than {bench.info['margin']:g})"
    words = {BEATS: "", WORSE: " (worse)", UNDECIDED: " (undecided)", SMALL: small, NO_LARGER: least}
    return format_interval(step.difference, step.low, step.high, signed=True) + words[step.verdict]


def leaks(bench: Benchmark) -> Iterator[str]:
    """That seeing was not needed, and that the context gives the answer away: of each mode the lowest such rung."""
    for mode in bench.modes:
        top = top_rung(bench, mode)
        for blind in ("history", "texts"):
            row = bench.comparison("speak", blind, mode, PRIMARY)
            near = row.get("high") is not None and row["high"] <= bench.info["margin"]
            if near and top and top.rung != top.chain[0]:
                difference = format_interval(row["difference"], row["low"], row["high"], signed=True)
                yield (
                    f"Seeing was not needed ({mode}): {blind}, which sees no picture, comes within "
                    f"{bench.info['margin']:g} event F1 of speak (speak minus {blind}: {difference})."
                )
                yield from _given_away(bench, blind) if mode == TEACHER_FORCED else ()
                break


def _given_away(bench: Benchmark, blind: str) -> Iterator[str]:
    """That a rung without pictures is much better on the reference's context than on its own."""
    forced, free = (bench.score(blind, mode, PRIMARY) for mode in MODES)
    if forced.get("low") is None or free.get("high") is None or forced["low"] <= free["high"] + bench.info["margin"]:
        return
    on_reference, on_own = (format_interval(row["value"], row["low"], row["high"]) for row in (forced, free))
    text = (
        f"The reference's context gives away when to speak: on it {blind} reaches {on_reference}, on its own {on_own}."
    )
    row = bench.comparison("texts", "history", TEACHER_FORCED, PRIMARY)
    if blind == "texts" and (row.get("low") or 0.0) > bench.info["margin"]:
        over = format_interval(row["difference"], row["low"], row["high"], signed=True)
        text += f" The times of past events do not ({over} over history): look for a text before its event."
    yield text


def question(bench: Benchmark) -> str:
    """The answer to the question that was settled beforehand."""
    a, b = bench.pair
    row = bench.comparison(a, b, bench.mode, PRIMARY)
    if not row:
        return f"No answer: {a} and {b} were not compared ({bench.mode})."
    comparison = Comparison(**{field.name: row[field.name] for field in fields(Comparison)})
    return answer(comparison, a, b, bench.mode) + "."


# ---- what limits the answer --------------------------------------------------------------------------


def limits(bench: Benchmark) -> Iterator[str]:
    """What limits the answer, most important first: runs that are missing, exposure bias, power, steps, stopping."""
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
    a, b = bench.pair
    if FREE_RUNNING not in bench.modes:
        yield "No free-running evaluation: each model read the reference's texts, as no user can: too favourable."
    else:
        winner = b if (bench.comparison(a, b, FREE_RUNNING, PRIMARY).get("high") or 0.0) < 0 else a
        forced, free = (bench.score(winner, mode, PRIMARY).get("value") for mode in MODES)
        if forced is not None and free is not None:
            loss = format_number(forced - free) if forced > free else "nothing here"
            yield (
                f"Given the reference's texts {winner} reaches {format_number(forced)} event F1; free-running, given "
                f"its own, {format_number(free)}: exposure bias costs {loss}."
            )
    row = bench.comparison(a, b, bench.mode, PRIMARY)
    if row.get("low") is not None and (row["low"] > 0 or row["high"] < 0):  # `answer` says it where nothing was shown
        size = f"{counted(row['recordings'], 'recording')} and {counted(row['seeds'], 'seed')}"
        missed = format_number(row["detectable"])
        yield f"With these {size} a true difference under {missed} event F1 could well be missed."
    for rung, text in convergence(bench).items():
        if rung in bench.pair and text.startswith(IMPROVING):
            yield f"{rung} {text} when training ended: more --steps may change the answer."
    if row.get("low") is not None and row["seeds"] > 1:  # bootstrap.always_valid
        holds = (
            "The answer's interval holds where the clock, or a number of seeds that was set beforehand, ended the runs"
        )
        always = format_interval(row["difference"], row.get("always_low"), row.get("always_high"), signed=True)
        use = f"if you stopped because of what you saw, use {always}, valid at any number of seeds"
        takes = "to stop because of what was seen takes 3 seeds or more"
        yield f"{holds}; {takes if row.get('always_low') is None else use}."


def convergence(bench: Benchmark) -> dict[str, str]:
    """Trained rung -> 'had converged', ...: whether its speaking AP still moved in the last third of its steps.

    A straight line by least squares, with an intercept per seed; its rise over that third is judged as an effect is.
    """
    curves, _ = training_curves(bench, "speaking")
    return {curve.rung: converged(curve.seeds, bench.info["margin"]) for curve in curves}


def converged(seeds: Sequence[Line], margin: float) -> str:
    """The same of one rung's curves."""
    end = max(steps[-1] for steps, _ in seeds)
    lasts = [(steps[steps >= end * 2 / 3], aps[steps >= end * 2 / 3]) for steps, aps in seeds]
    x, y = (np.concatenate([line[axis] - line[axis].mean() for line in lasts if len(line[0])]) for axis in (0, 1))
    freedom, spread = len(x) - len(lasts) - 1, float(x @ x)
    if freedom < 1 or not spread:
        return "was evaluated too seldom to tell whether it had converged"
    slope = float(x @ y) / spread
    error = float(stats.t.ppf(0.975, freedom)) * float(np.sqrt(((y - slope * x) ** 2).sum() / freedom / spread))
    verdict = verdict_of((slope - error) * end / 3, (slope + error) * end / 3, margin)
    if verdict in (NO_LARGER, SMALL):
        return "had converged"
    if verdict == UNDECIDED:
        return "may or may not have converged"
    return f"{IMPROVING if slope > 0 else 'was getting worse'} by {abs(slope) * 100:.3f} AP per 100 steps"


# ---- words -------------------------------------------------------------------------------------------


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
