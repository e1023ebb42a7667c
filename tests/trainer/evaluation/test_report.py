"""Benchmarks of hand-made scores, from tables to report: no model is trained, rungs speak when the test says so."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from by_hand import clip_example, turn, write_shards

from pipeline.dataset import ClipExample
from pipeline.errors import InputError
from trainer.config import MODES, Settings
from trainer.evaluation import plots
from trainer.evaluation.clip_pictures import find_disagreements
from trainer.evaluation.comparison import BEATS, NO_LARGER, Benchmark, compare_runs, read_benchmark, settle
from trainer.evaluation.conclusions import ladder_steps, leaks, opening, top_rung
from trainer.evaluation.metrics import Thresholds, all_metrics, hold
from trainer.evaluation.report import harness_check, write_report
from trainer.evaluation.scores import ScoredClip, write_scores
from trainer.plan import Plan, run_of

SPEECH = (20, 68, 110, 176, 206)  # frames, at 2 per second, in clips of 240: irregular, at least 15 s apart
TEA = '<b>tea</b> & "cake"'  # a task
NARROW = Settings(early_s=1.0, late_s=1.0)
Speaks = Callable[[ClipExample], Sequence[int]]  # a clip's frames after which a rung speaks


def oracle(clip: ClipExample) -> list[int]:
    return [t.start_frame for t in clip.turns]


def metronome(clip: ClipExample) -> range:
    return range(10, 240, 48)  # every 24 s: 10, 58, 106, 154, 202


def late(clip: ClipExample) -> list[int]:
    return [frame + 2 for frame in oracle(clip)]  # by 1 s


def at_random(seed: int) -> Speaks:
    return lambda clip: sorted(np.random.default_rng([seed, clip.clip]).choice(240, 5, replace=False).tolist())


def folder(
    tmp_path: Path,
    rungs: dict[str, Speaks | tuple[Speaks, ...]],
    seeds: dict[str, Sequence[int]] | None = None,
    settings: Settings = NARROW,
    said: str = "Now.",
) -> Benchmark:
    """A benchmark of these rungs, two seeds each; a tuple: what one does teacher-forced, and free-running."""
    clips = [
        clip_example(
            [turn("assistant", "Now.", at + 3 * i, at + 3 * i + 1) for at in SPEECH], 0, 240, clip_id=f"c{i}", clip=i,
            video=f"take-{i}", rate=1.0, goal=TEA if i < 4 else "bake",
        )
        for i in range(8)
    ]  # fmt: skip
    data = write_shards(tmp_path / "data", {"train": clips, "val": clips, "test": clips})
    by_rung = dict.fromkeys(rungs, (0, 1)) | (seeds or {})
    all_seeds = tuple(sorted(set().union(*by_rung.values())))
    plan = Plan(data, tmp_path / "out", tuple(rungs), all_seeds, settings=settings, draws=200)
    jobs = [(rung, seed) for rung, of_rung in by_rung.items() for seed in of_rung]
    for job in jobs:
        ways = rungs[job[0]]
        ways = ways if isinstance(ways, tuple) else (ways, ways)
        write_run(run_of(plan, job) / "scores", clips, dict(zip(MODES, ways, strict=False)), settings, said)
    settle(plan)
    compare_runs(plan, jobs, hold(data, "test"))
    return read_benchmark(plan.out)


def write_run(out: Path, clips: Sequence[ClipExample], ways: dict[str, Speaks], settings: Settings, said: str) -> None:
    out.mkdir(parents=True)
    by_mode: dict[str, list[ScoredClip]] = {}
    for mode, speaks in ways.items():
        for clip in clips:
            spoken = np.isin(np.arange(240), speaks(clip))
            heads, probabilities = {"speaking": spoken.astype(np.float32)}, {"speaking": spoken * np.float32(0.75)}
            texts = [said if here else None for here in spoken] if mode == "free-running" else None
            by_mode.setdefault(mode, []).append(ScoredClip(clip, heads, probabilities, texts))
        write_scores(out / f"{mode}.parquet", {"test": by_mode[mode]}, {})
    chosen = {"speaking": 0.5}
    metrics, _ = all_metrics(by_mode, Thresholds(chosen, chosen), settings)
    metrics |= {"thresholds": {"frame": chosen, "event": chosen, "metronome": {}}, "model": "by hand"}
    (out / "metrics.json").write_text(json.dumps(metrics | {"thresholds_from": "val"}))


SEEING = {"metronome": metronome, "history": metronome, "texts": metronome, "speak": oracle, "speak+dst": oracle}


def test_the_opening_names_what_tells_and_what_adds_nothing(tmp_path):
    bench = folder(tmp_path, SEEING | {"true-state": oracle})
    steps = {step.rung: step for step in ladder_steps(bench)}
    assert [step.below for step in steps.values()] == [None, "metronome", "history", "texts", "speak", "speak+dst"]
    assert [step.verdict for step in steps.values()] == ["", NO_LARGER, NO_LARGER, BEATS, NO_LARGER, NO_LARGER]
    assert steps["speak"].value == 1.0
    top = top_rung(bench)
    assert (top.rung, top.decided) == ("speak", True)
    first, second = opening(bench)
    assert first == (
        "On these data, when to speak is told by pictures; speak is the lowest rung that reaches the top: those above "
        "add 0.05 event F1 at most."
    )
    assert second.startswith("Event F1 (free-running, 8 recordings, 2 seeds): metronome 0.")
    assert "history +0.000 (no difference), texts 0.000 [0.000, 0.000] (no more than 0.05), pictures" in second
    assert "own state 0.000 [0.000, 0.000] (no more than 0.05); the true state would add 0.000" in second
    assert not [*leaks(bench)]


def test_the_references_next_text_in_the_context_is_named(tmp_path):
    leaky = (oracle, metronome)
    bench = folder(tmp_path, SEEING | {"texts": leaky, "speak": leaky, "speak+dst": leaky})
    forced, given, *others = leaks(bench)
    assert forced.startswith("Seeing was not needed (teacher-forced): texts, which sees no picture, comes within 0.05")
    assert given.startswith("The reference's context gives away when to speak: on it texts reaches 1.000 [1.000")
    assert given.endswith("over history): look for a text before its event.")
    assert not others


def test_where_nothing_tells_no_rung_beats_the_metronome(tmp_path):
    names = ("metronome", "texts", "speak", "speak+dst")
    bench = folder(tmp_path, {name: at_random(i) for i, name in enumerate(names)})
    start = "On these data nothing is shown to tell when to speak better than a metronome; "
    assert opening(bench)[0].startswith(start)
    assert top_rung(bench).rung == "metronome"
    assert not [*leaks(bench)]


def test_windows_and_groups_have_values_counted_by_hand(tmp_path):
    rungs = {"speak": late, "speak+dst": lambda clip: oracle(clip) if clip.goal == TEA else []}
    bench = folder(tmp_path, rungs, settings=Settings(early_s=2.0, late_s=4.0))
    rows = bench.windows.filter(rung="speak", seed=1, mode="free-running")
    assert rows["width_s"].to_list() == [0.5, 1, 2, 3, 4, 5, 6]  # late by up to two thirds of it
    assert rows["f1"].to_list() == [0, 0, 1, 1, 1, 1, 1]
    ours = [row for row in bench.groups if (row["rung"], row["mode"]) == ("speak+dst", "free-running")]
    assert {(row["by"], row["group"]): (row["value"], row["recordings"], row["events"]) for row in ours} == {
        ("dataset", "unknown"): (pytest.approx(40 / 60), 8, 40),
        ("task", TEA): (1.0, 4, 20),
        ("task", "bake"): (0.0, 4, 20),
    }


def test_rungs_are_compared_on_the_seeds_both_have_and_controls_on_all(tmp_path):
    seeds = {"metronome": [0], "speak": [0, 1, 2], "speak+dst": [0, 1]}
    bench = folder(tmp_path, dict.fromkeys(seeds, metronome), seeds)
    assert bench.comparison("speak+dst", "speak", "free-running", "event_f1")["seeds"] == 2
    assert bench.comparison("speak", "metronome", "free-running", "event_f1")["seeds"] == 3


def test_harness_check_wants_the_inverted_head_to_equal_the_direct_one(tmp_path):
    same = harness_check(folder(tmp_path / "same", {"speak": oracle, "silence": oracle}))
    assert same.startswith("Harness check passed: silence and speak are the same model and came out equal (")
    other = harness_check(folder(tmp_path / "other", {"speak": oracle, "silence": late}))
    assert other.endswith("differ by up to 2.3e-01, 1e-05 is allowed. Trust no number on this page.")
    begun = folder(tmp_path / "begun", {"speak": oracle, "silence": late}, {"speak": [0], "silence": [1]})
    assert harness_check(begun) == ""  # no seed has run under both


def test_a_margin_is_settled_before_any_run(tmp_path):
    settle(Plan(tmp_path, tmp_path, ("speak", "speak+dst"), margin=0.1))
    assert json.loads((tmp_path / "benchmark.json").read_text())["margin"] == 0.1
    with pytest.raises(InputError, match=r"--margin 0\.05: this benchmark was begun with 0\.1; a margin is settled"):
        settle(Plan(tmp_path, tmp_path))


def texts(page: str, tag: str) -> list[str]:
    """What stands in each such element, without the markup inside."""
    return [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page)]


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Benchmark:
    """With its report; speak errs in c0, c1 and c5, speak+dst in c4."""

    def speak(clip: ClipExample) -> list[int]:
        return {"c0": oracle(clip)[:1], "c1": [40], "c5": oracle(clip)[:4]}.get(clip.clip_id, oracle(clip))

    def track(clip: ClipExample) -> list[int]:
        return oracle(clip) if clip.clip_id != "c4" else []

    rungs = {"metronome": metronome, "speak": speak, "speak+dst": track}
    bench = folder(tmp_path_factory.mktemp("reported"), rungs, said="<b>bold</b> & \x07 <img src=x>")
    write_report(bench.out)
    return bench


def test_page_opens_with_the_answer_stands_alone_and_shows_text_from_outside_as_text(reported):
    page, figures = (reported.out / "report.html").read_text(), reported.out / "figures"
    assert texts(page, "h1") == opening(reported)[:1]
    assert not re.findall(r"https?:|url\((?!#)|@import|\{\{|\{%|<script|<b>|<img", page)
    assert TEA in texts(page, "th")
    assert "<b>bold</b> & \ufffd <img src=x>" in texts(page, "td")
    for name in ("ladder", "windows", "precision-recall", "reliability", "training", "timeline-1"):
        assert f'href="figures/{name}.svg"' in page
        assert "<svg" in (figures / f"{name}.svg").read_text()
        assert (figures / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tables_show_each_rungs_value_and_interval(reported):
    """Of 40 events speak+dst matches 35 in 35, speak 30 in 31."""
    page = (reported.out / "report.html").read_text()
    (row,) = re.findall(r"<tr[^>]*><th[^>]*>event F1</th>(<td[^>]*>teacher-forced</td>.*)</tr>", page)
    mode, _, speak, track, _ = texts(row, "td")
    assert mode == "teacher-forced"
    assert re.fullmatch(r"0\.8450\.\d{3} to [01]\.\d{3}", speak)
    assert re.fullmatch(r"0\.9330\.\d{3} to [01]\.\d{3}", track)


def test_the_polars_recipe_runs(reported, monkeypatch, capsys):
    recipe = re.search(r'<pre id="recipe">(.*?)</pre>', (reported.out / "report.html").read_text(), re.DOTALL)
    monkeypatch.chdir(reported.out)
    exec(html.unescape(recipe.group(1)), {})
    assert "speaking_logit" in capsys.readouterr().out


def test_clips_with_the_greatest_difference_either_way_are_shown(reported):
    clips, about = find_disagreements(reported)
    assert [clip.outcomes[0].scored.clip.clip_id for clip in clips] == ["c1", "c0", "c4"]  # 6, 4 and -5 errors fewer
    assert "Of 8 clips speak+dst makes fewer in 3, speak in 1; the rest are even." in about
    first, second = clips[0].outcomes
    assert (first.arm, first.hits, first.false_alarms) == ("speak+dst", [11.5, 35.5, 56.5, 89.5, 104.5], [])
    assert (second.arm, second.hits, second.false_alarms) == ("speak", [], [20])
    assert [(line.seconds, line.who) for line in clips[0].lines[:3]] == [
        (11.5, "reference"), (11.5, "speak+dst"), (20.0, "speak"),
    ]  # fmt: skip


def test_without_the_data_there_are_no_timelines_and_the_page_says_why(reported):
    moved = replace(reported, info=reported.info | {"data": "nosuch"})
    clips, about = find_disagreements(moved)
    assert (clips, about.startswith("No timelines: nosuch"), "not found" in about) == ([], True, True)


def test_one_rung_one_seed_teacher_forced_still_makes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "write_figure", lambda stem, make, label: "<svg></svg>")  # drawing takes seconds
    bench = folder(tmp_path, {"speak": (oracle,)}, {"speak": [0]})
    page = write_report(bench.out).read_text()
    assert texts(page, "h1") == ["No answer: speak+dst and speak were not compared (teacher-forced)."]
    assert texts(page, "p")[1].startswith("One seed: nothing here says what other seeds would give.")
    assert "No timelines: speak+dst was not run." in texts(page, "p")
