"""`benchmark`: what it leaves on disk, that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from by_hand import clip_example, dst, turn, write_shards
from small_run import CONFIG, write_data

import trainer.benchmark
import trainer.plan
from pipeline.dataset import Split
from pipeline.errors import InputError
from trainer.benchmark import TooSlow, answer_of, benchmark, is_done
from trainer.cli import main
from trainer.config import Settings, TrainConfig
from trainer.evaluation.evaluate_scores import hold
from trainer.plan import Plan, commands_of, ladder, run_of
from trainer.run_folder import lock_folder
from trainer.schedule import Schedule, in_order

ARMS = ("silence", "speak", "speak+dst")
SMALL = replace(CONFIG, model="nano", steps=4, eval_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("benchmark") / "data", 7, 4, 6)


@pytest.fixture(scope="module")
def plan(data):
    return Plan(data, data.parent / "out", ARMS, (0, 1), SMALL, draws=500, jobs=1, hazards=("test: few clips",))


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


def test_each_run_is_told_and_kept(told, plan):
    assert told[0].startswith("On 6 recordings with 6 events a difference in event F1 under about 0.58")  # at best
    runs = [line for line in told if " seed " in line]
    jobs = [(arm, seed) for arms in (ARMS[1:], ARMS[:1]) for seed in (0, 1) for arm in arms]
    assert [line.partition(":")[0] for line in runs] == [f"{arm} seed {seed}" for arm, seed in jobs]
    assert runs[-1].endswith("6 of 6)")
    first, *_, last = (line for line in told if line.startswith("speak+dst minus speak"))
    assert "a second pair of runs, about 0:" in first
    assert "with 2 more pairs of runs" in last
    page = (plan.out / "report.html").read_text()
    assert "with 2 more pairs of runs" in page
    assert 'http-equiv="refresh"' not in page
    for job in jobs:
        names = sorted(path.name for path in (run_of(plan, job) / "scores").iterdir())
        assert names == ["metrics.json", "self-fed.parquet", "teacher-forced.parquet"]


def test_tables_hold_every_arm_seed_mode_and_metric(told, plan):
    results = rows(plan.out, "results")
    assert len(results) == 3 * 2 * 2 * 18
    metrics = json.loads((plan.out / "runs/speak/seed-1/scores/metrics.json").read_text())
    (row,) = rows(plan.out, "results", rung="speak", seed=1, mode="self-fed", metric="speaking_ap")
    assert row["value"] == metrics["self-fed"]["speaking"]["frames"]["ap"]
    both = [r["value"] for r in rows(plan.out, "results", rung="speak", mode="self-fed", metric="speaking_ap")]
    (arm,) = rows(plan.out, "rungs", rung="speak", mode="self-fed", metric="speaking_ap")
    assert arm["value"] == pytest.approx(sum(both) / 2)
    assert arm["low"] <= arm["value"] <= arm["high"]
    pairs = {(row["a"], row["b"]) for row in rows(plan.out, "comparisons")}
    assert pairs == {("speak+dst", "speak"), ("silence", "speak")}
    (primary,) = rows(plan.out, "comparisons", primary=True)
    assert (primary["a"], primary["mode"], primary["metric"]) == ("speak+dst", "self-fed", "event_f1")


def test_direct_and_inverted_come_out_equal_in_every_metric(told, plan):
    for row in rows(plan.out, "comparisons", a="silence", b="speak"):
        assert row["difference"] in (None, 0.0)
        assert row["p_value"] in (None, 1.0)
    assert any(row["difference"] == 0.0 for row in rows(plan.out, "comparisons", a="silence", b="speak"))


def test_what_it_is_of_is_written_down(told, plan):
    info = json.loads((plan.out / "benchmark.json").read_text())
    assert (info["recordings"], info["clips"], info["frames"]) == (6, 6, 12 + 13 + 14 + 12 + 13 + 14)
    assert info["label_rule"] == "span"
    assert set(info["hashes"]) == {f"{arm}/seed-{seed}" for arm in ARMS for seed in (0, 1)}
    assert info["hazards"] == ["test: few clips"]
    assert set(info["versions"]) >= {"python", "torch", "transformers"}
    assert answer_of(plan.out) in (plan.out / "report.html").read_text().replace('</h1>\n<p class="numbers">', " ")


def test_its_commands_do_the_same(told, plan, tmp_path, monkeypatch):
    """The two lines that it gives for a run, run by hand elsewhere, give the run's metrics."""
    for line in commands_of(replace(plan, out=tmp_path), ("speak+dst", 1)):
        words = line.split()
        assert words[0] == "prospect-dst"
        assert main(words[1:]) == 0
    ours, theirs = (
        json.loads((out / "runs/speak+dst/seed-1/scores/metrics.json").read_text()) for out in (plan.out, tmp_path)
    )
    assert ours == theirs


def test_finished_runs_are_recognised(told, plan, monkeypatch, pages):
    monkeypatch.setattr(trainer.benchmark, "carry_out", lambda plan, job: pytest.fail(f"{job} was done again"))
    lines: list[str] = []
    benchmark(plan, lines.append)
    assert lines[0] == "6 of 6 runs are there already"


def test_stopped_at_any_run_it_leaves_a_report_and_goes_on(told, plan, tmp_path, monkeypatch, pages):
    """Ctrl-C in the second run, then the fourth: tables of what is finished; at the end those of an undisturbed one."""
    stopped, calls = replace(plan, out=tmp_path / "out"), []

    def copied(plan_, job):
        calls.append(job)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        shutil.copytree(run_of(plan, job), run_of(plan_, job))
        return 7.0, ()

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
    assert [in_progress for _, in_progress in pages] == [True, True, False]  # not after each run of `silence`
    for table in ("results", "rungs", "comparisons", "windows", "groups"):
        assert rows(stopped.out, table) == rows(plan.out, table)


def test_controls_and_the_true_state_need_no_training_of_their_own(told, plan, tmp_path, monkeypatch, pages):
    more = replace(plan, out=tmp_path / "out", rungs=ladder(["speak+dst", "true-state"]), seeds=(0,))
    shutil.copytree(plan.out / "runs/speak+dst/seed-0", run_of(more, ("speak+dst", 0)))
    monkeypatch.setattr(trainer.benchmark, "train", lambda *given, **_: pytest.fail("trained"))
    lines: list[str] = []
    benchmark(more, lines.append)
    runs = [line.partition(":")[0] for line in lines if " seed " in line]
    assert runs == ["metronome seed 0", "history seed 0", "true-state seed 0"]
    assert {row["rung"] for row in rows(more.out, "results")} == {"metronome", "history", "speak+dst", "true-state"}
    lines.clear()
    benchmark(more, lines.append)
    assert lines[0] == "4 of 4 runs are there already"
    benchmark(replace(more, rungs=ladder(["speak+dst"])), lines.append)
    left = "left out of tables and report, as they were not asked for this time: true-state/seed-0"
    assert [line for line in lines if line.startswith("left")] == [left]
    with pytest.raises(InputError, match=r"true-state is made of speak\+dst's checkpoint, which is not among them"):
        benchmark(replace(more, rungs=("speak", "true-state")))


def test_more_arms_and_seeds_may_be_added(told, plan, monkeypatch):
    monkeypatch.setattr(trainer.benchmark, "_update", lambda *given, **named: None)
    monkeypatch.setattr(trainer.benchmark, "carry_out", lambda plan, job: pytest.fail(f"{job} is to be done"))
    with pytest.raises(pytest.fail.Exception, match=r"\('speak\+markers', 0\) is to be done"):
        benchmark(replace(plan, rungs=("speak", "speak+markers")))


def test_a_run_is_done_only_with_its_own_files_data_options_and_settings(told, plan, tmp_path):
    splits, trained_on, job = hold(plan.data, "test"), Split(plan.data, "train"), ("speak", 0)
    assert is_done(plan, job, splits, trained_on)
    assert not is_done(replace(plan, settings=Settings(late_s=3.0)), job, splits, trained_on)
    with pytest.raises(InputError, match=r"lr is 0\.1, the run has 0\.002; resume with the same, or train into a new"):
        is_done(replace(plan, config=replace(SMALL, lr=0.1)), job, splits, trained_on)
    other = write_data(tmp_path / "data", 7, 4, 6, lambda clips: clips[:-1])  # one clip less in val, too
    with pytest.raises(InputError, match=r"train data: \w+, the run has \w+; evaluation data: "):
        is_done(replace(plan, data=other), job, hold(other, "test"), Split(other, "train"))
    path = run_of(plan, job) / "scores/self-fed.parquet"
    path.rename(tmp_path / "away")
    assert not is_done(plan, job, splits, trained_on)
    (tmp_path / "away").rename(path)


def test_two_benchmarks_keep_out_of_each_others_folder(told, plan):
    with ExitStack() as held:
        lock_folder(plan.out, held)
        with pytest.raises(InputError, match="another process is at work there; wait for it, or choose another"):
            benchmark(plan)


def test_data_that_cannot_answer_is_refused_before_training(data, plan, tmp_path):
    with pytest.raises(InputError, match="no val split beside val: thresholds are chosen there"):
        benchmark(replace(plan, split="val", out=tmp_path / "out"))
    silent = [clip_example([dst(2, 3, ("S1", "complete"))], clip_id=f"c{i}", clip=i) for i in range(2)]
    speaking = [clip_example([turn("assistant", "Hi.", 2, 3)], clip_id=f"c{i}", clip=i) for i in range(2)]
    quiet = write_shards(tmp_path / "quiet", {"train": speaking, "val": speaking, "test": silent})
    with pytest.raises(InputError, match="the assistant never speaks in test: nothing to measure"):
        benchmark(replace(plan, data=quiet, out=tmp_path / "out"))
    stateless = write_shards(tmp_path / "stateless", dict.fromkeys(("train", "val", "test"), speaking))
    with pytest.raises(InputError, match=r"so speak\+dst have nothing to learn from.*silence,.*speak$"):
        benchmark(replace(plan, data=stateless, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


KILLED = """
import multiprocessing, os, signal, sys, time
from pathlib import Path
import trainer.benchmark, trainer.evaluation.plots
from trainer.cli import main

def begin():
    pid = os.fork()  # has all imports already
    if pid == 0:
        os._exit(main(sys.argv[2:]))
    return pid

trainer.benchmark.get_context = lambda method: multiprocessing.get_context("fork")
trainer.evaluation.plots.write_figure = lambda stem, make, label: ""  # which takes seconds
first, pid = Path(sys.argv[1]), begin()
while not first.exists():
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    time.sleep(0.05)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
out = first.parents[4]
assert (out / "report.html").read_text().rstrip().endswith("</html>")  # of the controls
before = first.stat().st_mtime_ns
assert os.waitpid(begin(), 0)[1] == 0
assert first.stat().st_mtime_ns == before
"""


@pytest.mark.slow
def test_a_benchmark_with_a_clock_that_is_killed_goes_on(told, plan, tmp_path):
    """Killed as soon as its first run is finished, and begun anew: the same tables as of one that never stopped.
    benchmarks/kill does so at twenty random moments."""
    options = {"rungs": "speak,speak+dst", "seeds": 1, "draws": 500, "jobs": 1, "minutes": 60, "model": "nano"}
    options |= {"steps": 4, "eval-every": 2, "clips-per-step": 3, "warmup-steps": 2, "max-tokens": 200}
    options |= {"micro-batch-tokens": 120, "optimizer": SMALL.optimizer, "lr": SMALL.lr}
    words = ["benchmark", str(plan.data), "--out", str(tmp_path / "out")]
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    first = tmp_path / "out/runs/speak/seed-0/scores/metrics.json"
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two that wait for each other take minutes on busy cores
    subprocess.run([sys.executable, "-c", KILLED, first, *words], check=True, env=one_thread)
    assert 'http-equiv="refresh"' not in (tmp_path / "out/report.html").read_text()
    for arm in ("speak", "speak+dst"):
        found, expected = (rows(out, "results", rung=arm, seed=0) for out in (tmp_path / "out", plan.out))
        values = [np.array([row.pop("value") for row in table], float) for table in (found, expected)]
        np.testing.assert_allclose(*values, rtol=1e-5)  # another number of threads rounds otherwise
        assert found == expected


def test_a_pair_that_cannot_end_in_time_is_told_from_its_first_steps(plan, data, monkeypatch):
    """Of 100 steps at 0.5 s with 3 clips; to evaluate: 3 x 4 clips of val, 6 of test, 3 x 6 free-running: 12 steps."""
    splits, first = hold(data, "test"), [0.5] * 10
    monkeypatch.setattr(trainer.benchmark, "_step_seconds", lambda plan, job: first)
    long = replace(plan, config=replace(SMALL, steps=100, eval_every=50))

    def predict(minutes):
        now = trainer.benchmark.time.monotonic()
        units = in_order(("speak", "speak+dst"), ("speak", "speak+dst"), (0,))
        schedule = Schedule(units, ("speak", "speak+dst"), until=now + 60 * minutes)
        assert schedule.next(now) == ("speak", 0)
        trainer.benchmark._predict(long, schedule, splits)
        return schedule.guess

    guess = predict(10)
    assert guess == 56
    assert predict(1) == guess  # a pair takes twice that, but early steps may be slow
    with pytest.raises(TooSlow, match=r"speak and speak\+dst need about 1:52 more, 0:30 are left; lower"):
        predict(0.5)
    first[:] = [0.5] * 20
    with pytest.raises(TooSlow):
        predict(1)


@pytest.mark.slow
def test_a_clock_too_short_for_one_pair_is_said_after_a_few_steps(data, tmp_path, capsys):
    """Nothing is left that could not be begun anew with fewer steps."""
    words = ["benchmark", str(data), "--out", str(tmp_path / "out"), "--rungs", "speak,speak+dst", "--jobs", "1"]
    words += ["--model", "nano", "--clips-per-step", "3", "--max-tokens", "200", "--minutes", "1.5"]
    assert main([*words, "--steps", "100000"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no pair of runs would end in time: speak and speak+dst need about " in error
    assert "lower --steps to about " in error
    assert (tmp_path / "out/report.html").exists()  # of the controls
    assert not list((tmp_path / "out/runs").glob("speak*/*/last"))


@pytest.mark.slow
def test_several_runs_at_a_time_give_the_same(told, plan, tmp_path, pages):
    both = replace(plan, out=tmp_path / "out", rungs=("speak", "speak+dst"), seeds=(0,), jobs=2)
    benchmark(both)
    for arm in both.rungs:
        assert rows(both.out, "results", rung=arm) == rows(plan.out, "results", rung=arm, seed=0)


def test_one_arm_alone_has_no_answer(told, plan, tmp_path, pages):
    alone = replace(plan, out=tmp_path / "out", rungs=("speak",), seeds=(0,))
    benchmark(alone)
    assert answer_of(alone.out).startswith("No answer: speak+dst and speak were not compared. speak reaches ")


def test_a_plan_names_each_arm_once(plan, tmp_path):
    with pytest.raises(InputError, match="rungs: speak, speak, expected one or more, each once"):
        benchmark(replace(plan, out=tmp_path / "out", rungs=("speak", "speak")))
    with pytest.raises(InputError, match="seeds: none, expected one or more"):
        benchmark(replace(plan, out=tmp_path / "out", seeds=()))


def test_a_thousand_seeds_cost_no_look_at_each(plan, tmp_path, monkeypatch, pages):
    """A benchmark with a clock is planned with as many: only runs that are there are opened."""
    monkeypatch.setattr(trainer.benchmark, "is_done", lambda plan, job, *_: pytest.fail(f"looked for {job}"))
    monkeypatch.setattr(trainer.benchmark, "_run_all", lambda *_: (run for run in ()))
    benchmark(replace(plan, out=tmp_path / "out", seeds=tuple(range(trainer.plan.MOST_SEEDS))))


def test_options_become_words_that_the_command_line_reads():
    config = TrainConfig(arm="speak", freeze=("vision", "text"), lr_by_part={"heads": 0.1}, bf16=True, lr=1e-5)
    words = trainer.plan._options(config, TrainConfig())
    assert words == [
        *("--arm", "speak", "--lr", "1e-05", "--lr-by-part", "heads=0.1", "--freeze", "vision,text", "--bf16")
    ]


def test_a_benchmark_stopped_before_its_first_run_ended_leaves_a_page_that_says_so(plan, tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(trainer.benchmark, "_run_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        benchmark(replace(plan, out=tmp_path / "out"))
    page = (tmp_path / "out/report.html").read_text()
    assert "No run of this benchmark has ended yet" in page
    assert 'http-equiv="refresh"' in page  # the first report replaces it
