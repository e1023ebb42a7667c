"""`benchmark`: what it leaves on disk, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from dataclasses import replace
from functools import partial

import pyarrow.parquet as pq
import pytest
from by_hand import clip_example, turn, write_shards
from small_run import CONFIG, write_data

import trainer.benchmark
from pipeline.dataset import Split
from pipeline.errors import InputError
from trainer.benchmark import benchmark, is_done
from trainer.config import Settings
from trainer.evaluation.metrics import hold
from trainer.plan import Plan, Schedule, in_order, ladder, run_of

ARMS = ("speak", "speak+dst")
SMALL = replace(CONFIG, model="nano", steps=4, eval_every=2)


@pytest.fixture(scope="module")
def plan(splits, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "out"
    return Plan(splits, out, ARMS, (0, 1), SMALL, draws=500, jobs=1, hazards=("test: few clips",))


@pytest.fixture(scope="module")
def told(plan):
    """What the benchmark says; `pages`: its report after each unit (the last is whole, others are not drawn)."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        write = trainer.benchmark.write_report
        patch.setattr(trainer.benchmark, "write_report", lambda *given: None if given[2] else write(*given))
        assert benchmark(plan, lines.append) == plan.out / "report.html"
    return lines


@pytest.fixture
def pages(monkeypatch):
    """[(narrowing, in progress)] of the reports that a benchmark writes, which takes seconds each."""
    written: list[tuple[str, bool]] = []
    monkeypatch.setattr(trainer.benchmark, "write_report", lambda out, *given: written.append(given))
    return written


def rows(out, table, **wanted):
    found = pq.read_table(out / f"{table}.parquet").to_pylist()
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def copy_run(finished, plan, job):
    """In place of carry_out: (seconds, notes)."""
    shutil.copytree(run_of(finished, job), run_of(plan, job))
    return 7.0, ()


def test_each_run_is_told_and_kept(told, plan):
    assert told[0].startswith(
        "On 6 recordings with 6 events a difference in event F1 could be shown of about 0.58 with 2"
    )
    runs = [line for line in told if " seed " in line]
    jobs = [(arm, seed) for seed in (0, 1) for arm in ARMS]
    assert [line.partition(":")[0] for line in runs] == [f"{arm} seed {seed}" for arm, seed in jobs]
    assert runs[-1].endswith("4 of 4)")
    first, *_, last = (line for line in told if line.startswith("speak+dst minus speak"))
    assert "a second pair of runs, about 0:" in first
    assert "with 2 more pairs of runs" in last
    info, page = json.loads((plan.out / "benchmark.json").read_text()), (plan.out / "report.html").read_text()
    assert (info["recordings"], info["clips"], info["frames"]) == (6, 6, 12 + 13 + 14 + 12 + 13 + 14)
    assert info["hazards"] == ["test: few clips"]
    assert "with 2 more pairs of runs" in page
    assert 'http-equiv="refresh"' not in page
    for job in jobs:
        names = sorted(path.name for path in (run_of(plan, job) / "scores").iterdir())
        assert names == ["free-running.parquet", "metrics.json", "teacher-forced.parquet"]


def test_tables_hold_every_arm_seed_mode_and_metric(told, plan):
    results = rows(plan.out, "results")
    assert len(results) == 2 * 2 * 2 * 18
    metrics = json.loads((plan.out / "runs/speak/seed-1/scores/metrics.json").read_text())
    (row,) = rows(plan.out, "results", rung="speak", seed=1, mode="free-running", metric="speaking_ap")
    assert row["value"] == metrics["free-running"]["speaking"]["frames"]["ap"]
    both = [r["value"] for r in rows(plan.out, "results", rung="speak", mode="free-running", metric="speaking_ap")]
    (arm,) = rows(plan.out, "rungs", rung="speak", mode="free-running", metric="speaking_ap")
    assert arm["value"] == pytest.approx(sum(both) / 2)
    assert arm["low"] <= arm["value"] <= arm["high"]
    (primary,) = rows(plan.out, "comparisons", primary=True)
    assert [primary[key] for key in ("a", "b", "mode", "metric")] == ["speak+dst", "speak", "free-running", "event_f1"]


def test_stopped_at_any_run_it_leaves_a_report_and_goes_on(told, plan, tmp_path, monkeypatch, pages):
    """Ctrl-C in the second run, then the fourth: tables of what is finished; at the end those of an undisturbed one."""
    stopped, calls = replace(plan, out=tmp_path / "out"), []

    def copied(plan_, job):
        calls.append(job)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return copy_run(plan, plan_, job)

    monkeypatch.setattr(trainer.benchmark, "carry_out", copied)
    for runs, states in ((1, [False]), (3, [True, True, False])):  # first of all, what was there already
        with pytest.raises(KeyboardInterrupt):
            benchmark(stopped)
        assert len({(row["rung"], row["seed"]) for row in rows(stopped.out, "results")}) == runs
        assert [in_progress for _, in_progress in pages] == states
        pages.clear()
    benchmark(stopped)
    assert calls[1] == calls[2] == ("speak+dst", 0)
    assert calls[4] == calls[5] == ("speak+dst", 1)
    assert [in_progress for _, in_progress in pages] == [True, False]
    page = (stopped.out / "report.html").read_text()
    assert "No pair of runs has ended yet" in page  # until the first report, which `pages` kept
    for table in ("results", "rungs", "comparisons", "windows", "groups"):
        assert rows(stopped.out, table) == rows(plan.out, table)
    lines: list[str] = []
    benchmark(stopped, lines.append)
    assert lines[0] == "4 of 4 runs are there already"


def dies_in_its_third_run(plan, finished):
    """Top-level, for a process of its own."""

    def copied(plan_, job):
        if job == ("speak", 1):
            signal.raise_signal(signal.SIGKILL)
        return copy_run(finished, plan_, job)

    trainer.benchmark.carry_out = copied
    trainer.evaluation.plots.write_figure = lambda stem, make, label: ""  # which takes seconds
    benchmark(plan)


@pytest.mark.slow
def test_killed_it_leaves_the_report_of_its_first_pair_and_goes_on(told, plan, tmp_path, monkeypatch, pages):
    """By SIGKILL; benchmarks/kill does so at twenty random moments."""
    killed = replace(plan, out=tmp_path / "out")
    process = multiprocessing.get_context("forkserver").Process(target=dies_in_its_third_run, args=(killed, plan))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    page = (killed.out / "report.html").read_text()
    assert page.rstrip().endswith("</html>")
    assert "a second pair of runs, about 0:" in page
    monkeypatch.setattr(trainer.benchmark, "carry_out", partial(copy_run, plan))  # fails if a run is done again
    benchmark(killed)
    for table in ("results", "rungs", "comparisons", "windows", "groups"):
        assert rows(killed.out, table) == rows(plan.out, table)


def test_controls_and_the_true_state_need_no_training_of_their_own(told, plan, tmp_path, monkeypatch, pages):
    more = replace(plan, out=tmp_path / "out", rungs=ladder(["speak+dst", "true-state"]), seeds=(0,))
    shutil.copytree(plan.out / "runs/speak+dst/seed-0", run_of(more, ("speak+dst", 0)))
    shutil.copytree(plan.out / "runs/speak+dst/seed-0", run_of(more, ("speak+dst", 0)).with_name("seed-0-old"))
    monkeypatch.setattr(trainer.benchmark, "train", lambda *given, **_: pytest.fail("trained"))
    lines: list[str] = []
    benchmark(more, lines.append)
    runs = [line.partition(":")[0] for line in lines if "event F1 teacher-forced" in line]
    assert runs == ["metronome seed 0", "history seed 0", "true-state seed 0"]
    assert {row["rung"] for row in rows(more.out, "results")} == {"metronome", "history", "speak+dst", "true-state"}


def test_a_run_is_done_only_with_its_own_data_options_and_settings(told, plan, tmp_path):
    splits, trained_on, job = hold(plan.data, "test"), Split(plan.data, "train"), ("speak", 0)
    assert is_done(plan, job, splits, trained_on)
    assert not is_done(replace(plan, settings=Settings(late_s=3.0)), job, splits, trained_on)
    with pytest.raises(InputError, match=r"lr is 0\.1, the run has 0\.002; resume with the same, or train into a new"):
        is_done(replace(plan, config=replace(SMALL, lr=0.1)), job, splits, trained_on)
    other = write_data(tmp_path / "data", 7, 4, 6, lambda clips: clips[:-1])  # one clip less in val, too
    with pytest.raises(InputError, match=r"train data is '\w+', the run has '\w+'; evaluation data is "):
        is_done(replace(plan, data=other), job, hold(other, "test"), Split(other, "train"))


def test_data_that_cannot_answer_is_refused_before_training(plan, tmp_path):
    with pytest.raises(InputError, match="no val split beside val: thresholds are chosen there"):
        benchmark(replace(plan, split="val", out=tmp_path / "out"))
    speaking = [clip_example([turn("assistant", "Hi.", 2, 3)], clip_id=f"c{i}", clip=i) for i in range(2)]
    stateless = write_shards(tmp_path / "stateless", dict.fromkeys(("train", "val", "test"), speaking))
    with pytest.raises(InputError, match=r"so speak\+dst have nothing to learn from.*--rungs texts,speak$"):
        benchmark(replace(plan, data=stateless, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_with_a_clock_runs_have_a_process_of_their_own_and_come_out_the_same(told, plan, tmp_path, pages):
    """With one thread, as here (conftest): another number of threads rounds otherwise."""
    timed = replace(plan, out=tmp_path / "out", seeds=(0,))
    with pytest.raises(InputError, match="out: no run ended in the time given; call again to go on, or give more time"):
        benchmark(replace(timed, rungs=ARMS[:1]), until=time.monotonic() - 1)
    benchmark(timed, until=time.monotonic() + 3600)
    for arm in ARMS:
        assert rows(timed.out, "results", rung=arm) == rows(plan.out, "results", rung=arm, seed=0)


def test_a_pair_that_cannot_end_in_time_is_told_from_its_first_steps(plan, monkeypatch):
    """Of 100 steps at 0.5 s with 3 clips; to evaluate: 3 x 4 clips of val, 6 of test, 3 x 6 free-running: 12 steps."""
    held, first = hold(plan.data, "test"), [0.5] * 10
    monkeypatch.setattr(trainer.benchmark, "_step_seconds", lambda plan, job: first)
    long = replace(plan, config=replace(SMALL, steps=100, eval_every=50))

    def predict(minutes):
        now = time.monotonic()
        schedule = Schedule(in_order(ARMS, ARMS, (0,)), ARMS, until=now + 60 * minutes)
        assert schedule.next(now) == ("speak", 0)
        return schedule, trainer.benchmark._predict(long, schedule, held)

    schedule, too_slow = predict(10)
    assert (schedule.guess, too_slow) == (56, "")
    assert predict(1)[1] == ""  # a pair takes twice that, but early steps may be slow
    assert "speak and speak+dst need about 1:52 more, 0:30 are left; lower" in predict(0.5)[1]
