"""What a run logs: metrics.jsonl through kills, TensorBoard, wandb, and lines on stderr."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import InputError
from trainer import run_log
from trainer.run_log import open_log, read_metrics, rewind, scalars

LINE_3 = {
    "step": 3, "loss": 1.25, "speaking": 0.5, "dst_update": 0.25, "lm": 0.0, "n_speaking": 390.0, "n_dst_update": 39.0,
    "n_lm": 0.0, "grad_norm": 2.5, "lr": 0.002, "tokens": 3400, "padding": 0.012, "seconds": 0.8,
}  # fmt: skip
EVALUATION = {
    "split": "val",
    "clips": 7,
    "speaking": {"ap": 0.75, "chance": 0.125, "frames": 80, "positives": 10},
    "dst_update": {"ap": None, "chance": 0.0, "frames": 80, "positives": 0},
    "lm_loss": 1.5,
}


def step(number: int, loss: float = 1.0, seconds: float = 1.0) -> dict:
    return {"step": number, "loss": loss, "tokens": 100, "padding": 0.0, "seconds": seconds}


def content(run: Path) -> str:
    return (run / "metrics.jsonl").read_text()


def log_run(run: Path, steps, done: int = 0, seconds: float = 1.0) -> None:
    """Log `steps` of a run of 6, evaluated after every second one."""
    with open_log(run, 6, done, shown=False) as log:
        for number in steps:
            log(step(number, 1 / number, seconds))
            if number % 2 == 0:
                log({"step": number, "evaluation": EVALUATION, "seconds": seconds})


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: per name (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


# ---- metrics.jsonl -----------------------------------------------------------------------------------


def test_a_step_is_one_flushed_line_with_the_clock_apart(tmp_path):
    with open_log(tmp_path, 10, shown=False) as log:
        log(LINE_3)
        log({"step": 3, "evaluation": {"split": "val", "lm_loss": None}, "more": [{"x": -math.inf}, 2], "seconds": 2})
        first, second = map(json.loads, content(tmp_path).splitlines())
    rest = {name: value for name, value in LINE_3.items() if name != "seconds"}
    assert first == {**rest, "clock": {"seconds": 0.8, "tokens_per_s": 4250.0}}
    rest = {"evaluation": {"split": "val", "lm_loss": None}, "more": [{"x": None}, 2]}  # not finite: null
    assert second == {"step": 3, **rest, "clock": {"seconds": 2}}


def test_a_run_that_was_killed_and_resumed_leaves_the_lines_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        run.mkdir()
    log_run(whole, range(1, 7), seconds=1.0)
    log_run(killed, range(1, 6), seconds=2.0)  # its checkpoint is that of step 3
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log_run(killed, range(4, 7), done=3, seconds=3.0)
    lines = [[{k: v for k, v in line.items() if k != "clock"} for line in read_metrics(r)] for r in (whole, killed)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[1]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_rewind_keeps_what_came_before_byte_for_byte(tmp_path):
    rewind(tmp_path, 5)
    assert read_metrics(tmp_path) == []
    before = '{"step": 1,   "loss": 1.50}\n{"step": 2, "loss": 1}\n{"step": 2, "evaluation": {}}\n'
    (tmp_path / "metrics.jsonl").write_text(before + '{"step": 3, "loss": 0.5}\n{"step": 3, "ev')
    rewind(tmp_path, 2)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', '{"loss": 1}', "7", ""])
def test_another_damaged_line_is_named_and_the_file_left_alone(tmp_path, damage):
    before = f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n'
    (tmp_path / "metrics.jsonl").write_text(before)
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2: .*remove that line and run again"):
        rewind(tmp_path, 1)
    assert content(tmp_path) == before


# ---- TensorBoard, wandb ------------------------------------------------------------------------------


def test_scalars_have_the_names_and_leave_out_what_was_not_measured():
    assert scalars(LINE_3 | {"clock": {"seconds": 0.8, "tokens_per_s": 4250.0}, "note": "x", "skew": math.nan}) == {
        "loss/total": 1.25, "loss/speaking": 0.5, "loss/dst_update": 0.25, "supervised/speaking": 390.0,
        "supervised/dst_update": 39.0, "supervised/lm": 0.0, "train/grad_norm": 2.5, "train/lr": 0.002,
        "train/tokens": 3400.0, "train/padding": 0.012, "train/seconds": 0.8, "train/tokens_per_s": 4250.0,
    }  # fmt: skip
    assert scalars({"step": 3, "evaluation": EVALUATION}) == {
        "eval/val/speaking_ap": 0.75,
        "eval/val/speaking_chance": 0.125,
        "eval/val/dst_update_chance": 0.0,
        "eval/val/lm_loss": 1.5,
    }


@pytest.mark.slow
def test_tensorboard_forgets_what_came_after_the_checkpoint_of_a_resumed_run(tmp_path):
    with open_log(tmp_path, 3, shown=False) as log:
        for number in (1, 2, 3):
            log(step(number, loss=number))
        log({"step": 3, "evaluation": EVALUATION})
    assert events(tmp_path)["eval/val/speaking_ap"] == [(3, 0.75)]
    time.sleep(1.1)  # event files are read in the order of their second
    with open_log(tmp_path, 3, 1, shown=False) as log:
        log(step(2, loss=20))
    assert events(tmp_path)["loss/total"] == [(1, 1.0), (2, 20.0)]


class FakeWandb:
    """Writes down how it was called."""

    def __init__(self, refuses: str = "") -> None:
        self.calls, self.refuses = [], refuses

    def init(self, **options):
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.calls.append(("init", options))

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self, **options):
        self.calls.append(("finish", options))


def test_wandb_gets_config_numbers_and_whether_the_run_failed(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "thesis")
    run = tmp_path / "run7"
    run.mkdir()
    with open_log(run, 2, tracker="wandb", shown=False, config={"lr": 0.5}) as log:
        log({"step": 1, "loss": 2.0})
        log({"step": 1, "evaluation": EVALUATION | {"speaking": {}, "dst_update": {}}})
    options = {"project": "thesis", "name": "run7", "group": "run7", "config": {"lr": 0.5}, "dir": str(run)}
    assert wandb.calls == [
        ("init", options), (1, {"loss/total": 2.0}), (1, {"eval/val/lm_loss": 1.5}), ("finish", {"exit_code": 0}),
    ]  # fmt: skip
    with pytest.raises(ZeroDivisionError), open_log(run, 2, tracker="wandb", shown=False):
        raise ZeroDivisionError
    assert wandb.calls[-1] == ("finish", {"exit_code": 1})


@pytest.mark.parametrize(
    ("tracker", "package", "message"),
    [
        ("wandb", FakeWandb("no key:\nlog in"), r"wandb: it does not start \(no key: log in\); see its manual"),
        ("wandb", None, "wandb: wandb is not installed; pip install wandb, or leave --log out"),
        ("antigravity", None, "antigravity: expected wandb, or leave --log out"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_one_line_and_leaves_no_file(tmp_path, monkeypatch, tracker, package, message):
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(InputError, match=f"^--log {message}"), open_log(tmp_path, 2, tracker=tracker, shown=False):
        pass
    assert not list(tmp_path.iterdir())


# ---- on stderr ---------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless moved."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(run_log, "time", SimpleNamespace(monotonic=lambda: time.now))
    return time


def test_a_log_file_gets_plain_lines(tmp_path, capsys, clock):
    with open_log(tmp_path, 13, done=2) as log:
        clock.now += 0.8
        log(LINE_3 | {"speaking": 0.0042})
        log({"step": 3, "evaluation": EVALUATION})
    assert capsys.readouterr().err.splitlines() == [
        "step 3/13  loss 1.250  speaking 4.2e-03  dst_update 0.250  lm -  4,250 tok/s  eta 0:08",
        "step 3/13  on val: speaking AP 0.750 (chance 0.125)  dst_update AP - (chance 0.000)",
    ]


@pytest.mark.parametrize(
    ("total", "steps", "seconds", "expected"),
    [(50, 50, 0, [1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50]), (1000, 8, 12, [1, 4, 7])],
)
def test_a_line_comes_with_each_tenth_and_after_thirty_quiet_seconds(
    tmp_path, capsys, clock, total, steps, seconds, expected
):
    with open_log(tmp_path, total) as log:
        for number in range(1, steps + 1):
            log(step(number))
            clock.now += seconds
    assert [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()] == expected
