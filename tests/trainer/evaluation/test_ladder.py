"""Ladders of hand-made scores: no model is trained, each rung speaks when the test says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from by_hand import clip_example, turn, write_shards

from pipeline.dataset import ClipExample, Split
from pipeline.errors import InputError
from trainer.config import MODES, Settings
from trainer.evaluation.benchmark_folder import Benchmark, _converged, read_benchmark
from trainer.evaluation.comparison import compare_runs, settle
from trainer.evaluation.conclusions import headline, leaks, limits
from trainer.evaluation.evaluate_scores import all_metrics
from trainer.evaluation.ladder import (
    BEATS,
    NO_LARGER,
    SMALL,
    UNDECIDED,
    WORSE,
    ladder_steps,
    tells,
    top_rung,
    verdict_of,
)
from trainer.evaluation.metrics import Thresholds
from trainer.evaluation.scores import ScoredClip, write_scores
from trainer.plan import Plan, run_of

SPEECH = (20, 68, 110, 176, 206)  # frames, at 2 per second, in clips of 240: irregular, at least 15 s apart
NARROW = Settings(early_s=1.0, late_s=1.0)
Speaks = Callable[[ClipExample], Sequence[int]]  # a clip's frames after which a rung speaks


def oracle(clip: ClipExample) -> list[int]:
    return [t.start_frame for t in clip.turns]


def late(clip: ClipExample) -> list[int]:
    return [frame + 2 for frame in oracle(clip)]  # by 1 s


def metronome(clip: ClipExample) -> range:
    return range(10, 240, 48)  # every 24 s: 10, 58, 106, 154, 202


def at_random(seed: int) -> Speaks:
    return lambda clip: sorted(np.random.default_rng([seed, clip.clip]).choice(240, 5, replace=False).tolist())


def folder(
    tmp_path: Path,
    rungs: dict[str, Speaks | tuple[Speaks, Speaks]],
    seeds: dict[str, Sequence[int]] | None = None,
    settings: Settings = NARROW,
) -> Benchmark:
    """A benchmark of these rungs, two seeds each; a pair: what one does teacher-forced, and free-running."""
    clips = [
        clip_example(
            [turn("assistant", "Now.", at + 3 * i, at + 3 * i + 1) for at in SPEECH], 0, 240, clip_id=f"c{i}", clip=i,
            video=f"take-{i}", rate=1.0, goal="make tea" if i < 4 else "bake",
        )
        for i in range(8)
    ]  # fmt: skip
    data = write_shards(tmp_path / "data", {"train": clips, "val": clips, "test": clips})
    plan = Plan(data, tmp_path / "out", tuple(rungs), (0, 1), settings=settings, draws=200)
    jobs = [(rung, seed) for rung in rungs for seed in (seeds or {}).get(rung, plan.seeds)]
    for rung, seed in jobs:
        does = rungs[rung]
        ways = does if isinstance(does, tuple) else (does, does)
        write_run(run_of(plan, (rung, seed)), clips, dict(zip(MODES, ways, strict=True)), settings)
    settle(plan)
    compare_runs(plan, jobs, Split(data, "test"))
    return read_benchmark(plan.out)


def write_run(run: Path, clips: Sequence[ClipExample], ways: dict[str, Speaks], settings: Settings) -> None:
    (run / "scores").mkdir(parents=True)
    by_mode = {}
    for mode, speaks in ways.items():
        by_mode[mode] = []
        for clip in clips:
            spoken = np.isin(np.arange(240), speaks(clip))
            said = ["Now." if here else None for here in spoken] if mode == "self-fed" else None
            by_mode[mode].append(ScoredClip(clip, {"speaking": spoken.astype(np.float32)}, {}, said))
        write_scores(run / "scores" / f"{mode}.parquet", {"test": by_mode[mode]}, {})
    chosen = {"speaking": 0.5}
    metrics, _ = all_metrics(by_mode, Thresholds(chosen, chosen), settings)
    metrics |= {"thresholds": {"frame": chosen, "event": chosen, "metronome": {}}, "model": "by hand"}
    (run / "scores" / "metrics.json").write_text(json.dumps(metrics | {"thresholds_from": "val"}))


SEEING = {"metronome": metronome, "history": metronome, "texts": metronome, "speak": oracle, "speak+dst": oracle}


def test_the_opening_says_where_a_control_without_the_states_content_does_as_well(tmp_path):
    blind = {"metronome": metronome, "speak": metronome, "speak+dst": oracle}
    controls = {"speak+markers": oracle, "speak+dst-head": metronome}  # one does as well, one does not
    told = headline(folder(tmp_path / "one", blind | controls)).split("; ")[0]
    assert told.endswith(
        "told by own state, or by what comes with it: speak+markers, which lacks the state's content, "
        "is not shown to be worse"
    )
    told = headline(folder(tmp_path / "none", blind | {"speak+markers": metronome})).split("; ")[0]
    assert told.endswith("own state")


def test_the_opening_names_what_tells_and_what_adds_nothing(tmp_path):
    bench = folder(tmp_path, SEEING | {"true-state": oracle})
    steps = {step.rung: step for step in ladder_steps(bench)}
    assert [step.below for step in steps.values()] == [None, "metronome", "history", "texts", "speak", "speak+dst"]
    assert [step.verdict for step in steps.values()] == ["", NO_LARGER, NO_LARGER, BEATS, NO_LARGER, NO_LARGER]
    assert steps["speak"].value == 1.0
    top = top_rung(bench)
    assert (top.rung, top.decided) == ("speak", True)
    first, second = headline(bench).split(". ", 1)
    assert first == (
        "On these data, when to speak is told by pictures; speak is the lowest rung that reaches the top: those above "
        "add 0.05 event F1 at most"
    )
    assert second.startswith("Event F1 (self-fed, 8 recordings, 2 seeds): metronome 0.")
    assert "history 0.000 [0.000, 0.000] (no more than 0.05), texts 0.000" in second
    assert "own state 0.000 [0.000, 0.000] (no more than 0.05); the true state would add 0.000" in second
    assert not [*leaks(bench)]


def test_a_rung_that_is_not_better_than_all_below_it_tells_nothing(tmp_path):
    """History alone is right; the models above learn worse, and pictures make up for half of it."""
    rungs = {"metronome": metronome, "history": oracle, "texts": metronome, "speak": oracle}
    bench = folder(tmp_path, rungs)
    assert [step.verdict for step in ladder_steps(bench)] == ["", BEATS, WORSE, BEATS]
    assert headline(bench).startswith("On these data, when to speak is told by history; history is the lowest rung ")
    text = " ".join(leaks(bench))
    assert "Seeing was not needed (self-fed): history, which sees no picture, comes within 0.05 event F1" in text


def test_rungs_that_were_not_run_are_not_named(tmp_path):
    bench = folder(tmp_path, {"metronome": metronome, "speak": oracle})
    assert [step.below for step in ladder_steps(bench)] == [None, "metronome"]
    assert "told by history, texts and pictures; speak is" in headline(bench)
    assert "state" not in headline(bench)


def test_where_nothing_tells_no_rung_beats_the_metronome(tmp_path):
    rungs = {name: at_random(i) for i, name in enumerate(("metronome", "history", "texts", "speak", "speak+dst"))}
    bench = folder(tmp_path, rungs)
    assert headline(bench).startswith("On these data nothing is shown to tell when to speak better than a metronome; ")
    assert top_rung(bench).rung == "metronome"
    assert not [*leaks(bench)]


def test_the_references_next_text_in_the_context_is_named(tmp_path):
    leaky = (oracle, metronome)
    bench = folder(tmp_path, SEEING | {"texts": leaky, "speak": leaky, "speak+dst": leaky})
    forced, given, *others = leaks(bench)
    assert forced.startswith("Seeing was not needed (teacher-forced): texts, which sees no picture, comes within 0.05")
    assert given.startswith("The reference's context gives away when to speak: on it texts reaches 1.000 [1.000")
    assert given.endswith("over history): look for a text before its event.")
    assert not others


def test_windows_and_groups_have_values_counted_by_hand(tmp_path):
    tea = {f"c{i}" for i in range(4)}
    rungs = {"speak": late, "speak+dst": lambda clip: oracle(clip) if clip.clip_id in tea else []}
    bench = folder(tmp_path, rungs, settings=Settings(early_s=2.0, late_s=4.0))
    rows = bench.windows.filter(rung="speak", seed=1, mode="self-fed")
    assert rows["width_s"].to_list() == [0.5, 1, 2, 3, 4, 5, 6]  # late by up to two thirds of it
    assert rows["f1"].to_list() == [0, 0, 1, 1, 1, 1, 1]
    assert rows["metronome_f1"].is_between(0, 1).all()
    found = {(row["by"], row["group"]): row for row in bench.groups
             if (row["rung"], row["mode"]) == ("speak+dst", "self-fed")}  # fmt: skip
    assert {key: (row["value"], row["recordings"], row["events"]) for key, row in found.items()} == {
        ("dataset", "unknown"): (pytest.approx(40 / 60), 8, 40),
        ("task", "make tea"): (1.0, 4, 20),
        ("task", "bake"): (0.0, 4, 20),
    }
    assert found["dataset", "unknown"]["low"] < 0.6 < 0.7 < found["dataset", "unknown"]["high"]


def test_rungs_are_compared_on_the_seeds_both_have_and_controls_on_all(tmp_path):
    seeds = {"metronome": [0], "history": [0, 1], "speak": [0, 1, 2], "speak+dst": [0, 1]}
    bench = folder(tmp_path, dict.fromkeys(seeds, metronome), seeds)
    assert bench.comparison("speak+dst", "speak", "self-fed", "event_f1")["seeds"] == 2
    assert bench.comparison("speak", "metronome", "self-fed", "event_f1")["seeds"] == 3
    assert bench.comparison("history", "metronome", "self-fed", "event_f1")["seeds"] == 1
    one, two = (bench.score(rung, "self-fed", "event_f1") for rung in ("metronome", "history"))
    assert "metronome was not evaluated" not in " ".join(limits(bench))
    assert (one["low"], one["high"]) == (two["low"], two["high"])  # equal runs widen nothing


def test_a_margin_is_settled_before_any_run(tmp_path):
    plan = Plan(tmp_path, tmp_path, ("speak", "speak+dst"), margin=0.1)
    settle(plan)
    assert json.loads((tmp_path / "benchmark.json").read_text())["margin"] == 0.1
    settle(plan)
    with pytest.raises(InputError, match=r"--margin 0\.05: this benchmark was begun with 0\.1; a margin is settled"):
        settle(Plan(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.0, 0.0, NO_LARGER),
        (-0.05, 0.05, NO_LARGER),
        (-0.0501, 0.05, UNDECIDED),
        (-0.05, 0.0501, UNDECIDED),
        (0.0001, 0.05, SMALL),
        (0.0001, 0.0501, BEATS),
        (0.0, 0.2, UNDECIDED),
        (-0.05, -0.0001, SMALL),
        (-0.0501, -0.0001, WORSE),
        (0.06, 0.2, BEATS),
        (None, None, UNDECIDED),
    ],
)
def test_a_verdict_is_what_the_interval_allows(low, high, verdict):
    assert verdict_of(low, high, 0.05) == verdict


@pytest.mark.parametrize(
    ("aps", "said"),
    [
        ([[0.5, 0.7, 0.700, 0.701, 0.700]] * 2, "had converged"),
        ([[0.1, 0.2, 0.300, 0.401, 0.500]] * 2, "was still improving by 0.100 AP per 100 steps"),
        ([[0.1, 0.2, 0.500, 0.401, 0.300]] * 2, "was getting worse by 0.100 AP per 100 steps"),
        ([[0.1, 0.2, 0.300, 0.600, 0.301]] * 2, "may or may not have converged"),
        ([[0.1, 0.2]], "was evaluated too seldom to tell whether it had converged"),
    ],
)
def test_convergence_is_told_from_the_last_third(aps, said):
    steps = np.array([100.0, 200.0, 400.0, 500.0, 600.0])
    assert _converged([(steps[: len(seed)], np.array(seed)) for seed in aps], 0.05) == said


def test_a_rung_with_few_seeds_does_not_hide_what_is_shown_against_a_better_one():
    """speak+dst is shown to beat the metronome (0.5) and speak, but not texts (0.47), of which there are two seeds."""

    class Bench:
        mode, margin = "self-fed", 0.05
        values: ClassVar = {"metronome": 0.5, "history": 0.48, "texts": 0.47, "speak": 0.48, "speak+dst": 0.71}

        def score(self, rung, mode, metric):
            return {"value": self.values[rung]} if rung in self.values else {}

        def comparison(self, a, b, mode, metric):
            if a != "speak+dst":
                return {"low": -0.04, "high": 0.04}
            return {"low": -0.18, "high": 0.66} if b == "texts" else {"low": 0.16, "high": 0.27}

    assert tells(Bench()) == ["speak+dst"]
    assert top_rung(Bench()).rung == "speak+dst"
    Bench.values["texts"] = 0.6  # better than all that it is shown to beat
    assert tells(Bench()) == []
    assert top_rung(Bench()).rung == "texts"
