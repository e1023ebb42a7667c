"""The sentences that the report opens with: the answer, whether the harness can be trusted, what limits the answer.

Each is computed from the tables and stands there only if the numbers make it true; none says more than an interval
allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Final

from pipeline.terminal import counted
from trainer.config import MODES, SELF_FED, TEACHER_FORCED
from trainer.evaluation.benchmark_folder import Benchmark, Row, baseline, greatest_difference, why_missing
from trainer.evaluation.bootstrap import Comparison, answer
from trainer.evaluation.metrics import METRICS, Metric
from trainer.evaluation.plots import format_interval, format_number

HARNESS_TOLERANCE: Final = 1e-5  # between the probabilities of a direct and an inverted head
FEW_SEEDS, FEW_RECORDINGS = 3, 20  # under which the page says so
WITHOUT_CONTENT: Final = "speak+markers"


def headline(bench: Benchmark) -> str:
    """The answer as a sentence; where no two arms were compared, the reason."""
    name, a, b = bench.primary
    metric, row = METRICS[name], bench.comparison(a, b, bench.mode, name)
    if row:
        comparison = Comparison(**{field.name: row[field.name] for field in fields(Comparison)})
        return answer(comparison, a, b, metric.label, metric.unit, bench.mode, metric.higher_is_better) + "."
    reached = []
    for arm in bench.rungs:
        if row := bench.arm(arm, bench.mode, name):
            number, _, interval = format_interval(row["value"], row["low"], row["high"]).partition(" ")
            reached.append(f"{arm} reaches {number} {_named(metric)} {interval}".rstrip())
    return f"No answer: {a} and {b} were not compared. {'; '.join(reached) or 'Nothing was measured'} ({bench.mode})."


def limits(bench: Benchmark) -> list[str]:
    """What limits the answer, most important first."""
    return [
        *_missing(bench),
        *_no_skill(bench),
        *_exposure(bench),
        *_announcement(bench),
        *_precision(bench),
        *_stopping(bench),
    ]


def one_seed(bench: Benchmark) -> str:
    """A warning that nothing on the page says what other seeds would give; empty with more than one."""
    if len(bench.info["seeds"]) > 1:
        return ""
    if any(row["low"] is not None for row in (*bench.arms, *bench.comparisons)):
        return "One seed: the intervals are about other recordings, not other seeds, and are too narrow for those."
    return "One seed: nothing here says what other seeds would give."


def harness_check(bench: Benchmark) -> tuple[str, str]:
    """('passed', 'failed' or 'skipped', the sentence): direct and inverted heads are the same model, and must agree."""
    if not {"silence", "speak"} <= set(bench.rungs):
        return "skipped", "Harness not checked: that needs the arms silence and speak, which must come out equal."
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
    counts = [(len(info["rungs"]), "arm"), (len(info["seeds"]), "seed")]
    counts += [(info[f"{what}s"], what) for what in ("recording", "clip", "frame")]
    size = ", ".join(counted(number, what) for number, what in counts)
    minutes = float(info["seconds"]) / 60
    return (
        f"Split {info['split']}: {size}; {minutes:,.1f} minutes of training, all runs together, on {info['machine']}."
    )


# ---- what limits the answer --------------------------------------------------------------------------


def _missing(bench: Benchmark) -> Iterator[str]:
    """Which arms lack the mode that was asked for, and why."""
    arms: dict[str, list[str]] = {}
    for arm in bench.rungs:
        if why := why_missing(bench, arm, str(bench.info["primary"]["mode"])):
            arms.setdefault(why, []).append(arm)
    for why, names in arms.items():
        yield f"{' and '.join(names)} {'was' if len(names) == 1 else 'were'} {why}."


def _no_skill(bench: Benchmark) -> Iterator[str]:
    """That event F1 shows no skill, where a metronome gets as much."""
    metronome = baseline(bench, bench.mode, "event_f1")
    rows = [bench.arm(arm, bench.mode, "event_f1") for arm in bench.rungs]
    known = [row for row in rows if row.get("value") is not None]
    if metronome and known and not any((row["low"] or 0.0) > metronome.value for row in known):
        verb = "beats" if all(row["value"] <= metronome.value for row in known) else "is shown to beat"
        window = "from {early_s:g} s early to {late_s:g} s late".format(**bench.info["settings"])
        yield (
            f"No arm {verb} {metronome.name} ({format_number(metronome.value)}): at this window ({window}) event F1 "
            "does not show skill; narrow it with --early-s and --late-s."
        )


def _exposure(bench: Benchmark) -> Iterator[str]:
    """What the winner, or else the first arm, loses when it reads its own text; or that this was not measured."""
    name, a, b = bench.primary
    metric, free_running = METRICS[name], SELF_FED
    if free_running not in bench.modes:
        yield "No free-running evaluation: each model read the reference's texts, as no user can: too favourable."
        return
    winner = b if _shown_sign(metric, bench.comparison(a, b, free_running, name)) < 0 else a
    forced, free = (bench.arm(winner, mode, name).get("value") for mode in MODES)
    if forced is None or free is None:
        return
    loss = forced - free if metric.higher_is_better else free - forced
    text = (
        f"Given the reference's texts {winner} reaches {format_number(forced)} {_named(metric)}; free-running, given "
        f"its own, {format_number(free)}: exposure bias costs {format_number(loss) if loss > 0 else 'nothing here'}."
    )
    row = bench.comparison(a, b, TEACHER_FORCED, name)
    yield text + (f" Teacher-forced, {a} minus {b} would read {_difference(row)}." if _is_known(row) else "")


def _announcement(bench: Benchmark) -> Iterator[str]:
    """How much of a gain that was shown is also had from updates without content."""
    name, a, b = bench.primary
    metric, control = METRICS[name], WITHOUT_CONTENT
    values = [bench.arm(arm, bench.mode, name).get("value") for arm in (a, control, b)]
    shown = _shown_sign(metric, bench.comparison(a, b, bench.mode, name)) > 0
    if not shown or None in values or control in (a, b):
        return
    sign = 1 if metric.higher_is_better else -1
    gain, announced = (sign * (float(value or 0) - float(values[2] or 0)) for value in values[:2])
    share = f"{announced / gain:.0%}" if 0 < announced < gain else "none" if announced <= 0 else "all"
    text = (
        f"{control}, whose state updates carry no content, gains {format_number(announced, signed=True)} over {b}: "
        f"{share} of the gain is announcement (an update says that speech is near), not content."
    )
    row = bench.comparison(a, control, bench.mode, name)
    yield text + (f" {a} minus {control}: {_difference(row)}." if _is_known(row) else "")


def _precision(bench: Benchmark) -> Iterator[str]:
    """What size would have been missed (`answer` says it where none was shown), and what more data would help."""
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


def _stopping(bench: Benchmark) -> Iterator[str]:
    """Which interval holds where a benchmark was stopped because of what it showed (trainer.evaluation.sequential)."""
    name, a, b = bench.primary
    row = bench.comparison(a, b, bench.mode, name)
    if row.get("low") is None or row["seeds"] < 2:
        return
    told = "The answer's interval holds where the clock, or a number of seeds that was set beforehand, ended the runs"
    if row.get("always_low") is None:
        yield f"{told}; to stop because of what was seen takes 3 seeds or more."
        return
    always = format_interval(row["difference"], row["always_low"], row["always_high"], signed=True)
    yield f"{told}; who stopped because of what was seen reads {always}, which holds at every number of seeds at once."


# ---- words -------------------------------------------------------------------------------------------


def _named(metric: Metric) -> str:
    return f"{metric.unit} {metric.label}".strip()


def _shown_sign(metric: Metric, row: Row) -> int:
    """1 where the first arm was shown to be better, -1 the second, else 0."""
    if row.get("low") is None:
        return 0
    return (int(row["low"] > 0) - int(row["high"] < 0)) * (1 if metric.higher_is_better else -1)


def _is_known(row: Row) -> bool:
    return row.get("difference") is not None


def _difference(row: Row) -> str:
    return format_interval(row["difference"], row["low"], row["high"], signed=True)
