"""What the report says of numbers written by hand: no folder, no clips."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trainer.config import MODES
from trainer.evaluation.comparison import BEATS, NO_LARGER, SMALL, UNDECIDED, WORSE, Benchmark, verdict_of
from trainer.evaluation.conclusions import converged, ladder_steps, leaks, limits, opening, question, tells, top_rung
from trainer.evaluation.report import precision_recall

FREE = "free-running"
VALUES: dict[tuple[str, str], float | None] = {  # event F1
    ("speak", "teacher-forced"): 0.52, ("speak", FREE): 0.5,
    ("speak+markers", "teacher-forced"): 0.6, ("speak+markers", FREE): 0.525,
    ("speak+dst", "teacher-forced"): 0.82, ("speak+dst", FREE): 0.6,
}  # fmt: skip


def benchmark(
    values: dict[tuple[str, str], float | None] = VALUES,
    seeds: Sequence[int] = (0, 1),
    half_width: float | None = 0.04,  # of the differences' intervals; None: there are none
    out: Path = Path("nowhere"),
) -> Benchmark:
    """Every rung against every other, on 5 recordings."""
    rungs, modes = [*dict.fromkeys(rung for rung, _ in values)], [*dict.fromkeys(mode for _, mode in values)]
    size = {"seeds": len(seeds), "recordings": 5}
    scores = {
        (rung, mode, "event_f1"): size | {"value": value, "low": value and value - 0.03, "high": value and value + 0.03}
        for (rung, mode), value in values.items()
    }
    rows = {}
    for (a, b), mode in product(permutations(rungs, 2), modes):
        row = dict.fromkeys(("difference", "low", "high", "p_direction", "p_value", "detectable", "seed_share"))
        first, second = values[a, mode], values[b, mode]
        if first is not None and second is not None:
            row |= {"difference": first - second, "p_direction": 0.99, "p_value": 0.02, "detectable": 0.057}
            if half_width is not None:
                row |= {"low": first - second - half_width, "high": first - second + half_width}
        rows[a, b, mode, "event_f1"] = row | size | {"undefined": 0}
    info = {
        "rungs": rungs, "seeds": list(seeds), "margin": 0.05, "recordings": 5, "split": "test",
        "settings": {"bins": 10, "early_s": 2, "late_s": 4},
        "primary": {"metric": "event_f1", "mode": FREE, "pair": ["speak+dst", "speak"]},
    }  # fmt: skip
    run = {mode: {} for mode in modes} | {"thresholds": {"event": {"speaking": 0.5}}}
    return Benchmark(out, info, scores, rows, pl.DataFrame(), [], {job: dict(run) for job in product(rungs, seeds)})


def test_the_answer_comes_first_then_what_limits_it():
    bench = benchmark()
    assert opening(bench) == [
        "On these data, when to speak is told by own state, beyond what speak has; speak+dst is the lowest "
        "rung that reaches the top.",
        "Event F1 (free-running, 5 recordings, 2 seeds): speak 0.500, own state +0.100 [+0.060, +0.140].",
    ]
    assert [*limits(bench)][:2] == [
        "Given the reference's texts speak+dst reaches 0.820 event F1; free-running, given its own, 0.600: exposure "
        "bias costs 0.220.",
        "With these 5 recordings and 2 seeds a true difference under 0.057 event F1 could well be missed.",
    ]


def test_the_opening_says_where_a_control_without_the_states_content_does_as_well():
    values = {("speak", FREE): 0.5, ("speak+markers", FREE): 0.6, ("speak+dst", FREE): 0.6}
    told = "or by what comes with it: speak+markers, which lacks the state's content, is not shown to be worse"
    assert f"is told by own state, beyond what speak has, {told}; " in opening(benchmark(values))[0]


def test_a_rung_that_is_not_better_than_all_below_it_tells_nothing():
    """History alone is right; the models above learn worse, and pictures make up for half of it."""
    values = {"metronome": 0.1, "history": 0.9, "texts": 0.1, "speak": 0.9}
    bench = benchmark({(rung, FREE): value for rung, value in values.items()})
    assert [step.verdict for step in ladder_steps(bench)] == ["", BEATS, WORSE, BEATS]
    assert opening(bench)[0].startswith("On these data, when to speak is told by history; history is the lowest rung ")
    (text,) = leaks(bench)
    assert text.startswith(
        "Seeing was not needed (free-running): history, which sees no picture, comes within 0.05 event"
    )


LOSS = {**VALUES, ("speak+dst", FREE): 0.3}
FORCED = {(rung, mode): value for (rung, mode), value in VALUES.items() if mode == "teacher-forced"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"half_width": 0.2}, "exposure bias costs 0.220"),
        ({"values": LOSS}, "speak reaches 0.520 event F1; free-running, given its own, 0.500: exposure"),
        ({"values": FORCED}, "No free-running evaluation: each model read the reference's texts"),
    ],
)
def test_limits_say_what_the_numbers_allow(changes, said):
    assert said in "\n".join(limits(benchmark(**changes)))


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        ({"half_width": 0.2}, "No difference between speak+dst and speak could be shown: +0.100 event F1 [-0.100"),
        ({"values": LOSS}, "speak beats speak+dst by +0.200 event F1 [0.160, 0.240]"),
        ({"values": dict.fromkeys(VALUES), "half_width": None}, "No answer: event F1 is undefined for speak+dst"),
        ({"values": {("speak", FREE): 0.5}}, "No answer: speak+dst and speak were not compared (free-running)."),
    ],
)
def test_the_question_gets_no_more_than_its_interval(changes, starts):
    assert question(benchmark(**changes)).startswith(starts)


def test_an_arm_without_free_running_scores_is_named_with_the_reason():
    bench = benchmark()
    bench.metrics["speak+dst", 1] = {"teacher-forced": {}, "thresholds": {"event": {}}}
    why = "no threshold could be chosen, as val has no frame to speak at (seed 1)."
    assert next(limits(bench)) == f"speak+dst was not evaluated free-running: {why}"
    del bench.metrics["speak+dst", 1]
    assert next(limits(bench)) == "speak+dst was not evaluated (seed 1); run the benchmark again."


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.05, NO_LARGER),
        (-0.0501, 0.05, UNDECIDED),
        (0.0001, 0.05, SMALL),
        (0.0001, 0.0501, BEATS),
        (-0.05, -0.0001, SMALL),
        (-0.0501, -0.0001, WORSE),
        (None, None, UNDECIDED),
    ],
)
def test_a_verdict_is_what_the_interval_allows(low, high, verdict):
    assert verdict_of(low, high, 0.05) == verdict


@pytest.mark.parametrize(("texts", "told", "top"), [(0.47, ["speak+dst"], "speak+dst"), (0.6, [], "texts")])
def test_a_rung_with_few_seeds_does_not_hide_what_is_shown_against_a_better_one(texts, told, top):
    """speak+dst is shown to beat metronome and speak, but not texts, whose seeds are few; 0.6 is better than those."""
    values = {"metronome": 0.5, "texts": texts, "speak": 0.48, "speak+dst": 0.71}
    bench = benchmark({(rung, FREE): value for rung, value in values.items()}, half_width=0.15)
    bench.comparisons["speak+dst", "texts", FREE, "event_f1"]["low"] = -0.18
    assert (tells(bench), top_rung(bench).rung) == (told, top)


@pytest.mark.parametrize(
    ("aps", "said"),
    [
        ([0.5, 0.7, 0.700, 0.701, 0.700], "had converged"),
        ([0.1, 0.2, 0.300, 0.401, 0.500], "was still improving by 0.100 AP per 100 steps"),
        ([0.1, 0.2, 0.300, 0.600, 0.301], "may or may not have converged"),
        ([0.1, 0.2], "was evaluated too seldom to tell whether it had converged"),
    ],
)
def test_convergence_is_told_from_the_last_third(aps, said):
    steps = np.array([100.0, 200.0, 400.0, 500.0, 600.0])[: len(aps)]
    assert converged([(steps, np.array(aps))] * 2, 0.05) == said


def with_speaking(out: Path, labels: list[int], *logits: list[float]) -> Benchmark:
    """A benchmark of speak alone, teacher-forced; of each seed the logits of the frames."""
    for seed, of_seed in enumerate(logits):
        rows = pl.DataFrame({"speaking_label": labels, "speaking_logit": of_seed}).with_row_index("frame")
        rows = rows.with_columns(split=pl.lit("test"), clip_id=pl.lit("c0"), speaking_probability=None)
        (out / f"runs/speak/seed-{seed}/scores").mkdir(parents=True)
        rows.write_parquet(out / f"runs/speak/seed-{seed}/scores/teacher-forced.parquet")
    return benchmark({("speak", mode): 0.5 for mode in MODES}, out=out)


def test_precision_at_a_recall_is_that_of_the_highest_threshold_that_reaches_it(tmp_path):
    # by falling score: right, wrong, right, (not supervised), wrong -> precision 1 up to recall 0.5, then 2/3
    perfect = [5.0, 1, 3, 2.5, 2]
    bench = with_speaking(tmp_path, [1, 0, 1, -100, 0], [5.0, 4, 3, 2.5, 2], perfect)
    panel = precision_recall(bench, "teacher-forced")
    (curve,), (_, _, guessing) = panel.curves, panel.line
    assert guessing == "guessing 0.500"
    recalls, precision = curve.seeds[0]
    assert recalls[[0, 50, 51, 100]].tolist() == pytest.approx([0, 0.5, 0.51, 1])
    assert precision[[0, 50, 51, 100]].tolist() == pytest.approx([1, 1, 2 / 3, 2 / 3])
    assert curve.mean[1][[50, 100]].tolist() == pytest.approx([1, 5 / 6])
