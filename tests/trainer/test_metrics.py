from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import InputError
from trainer import run_log as subject
from trainer.run_log import Metrics, find_logger, open_metrics, read_metrics, rewind, scalars

LINE_3 = {
    "step": 3,
    "loss": 1.25,
    "speaking": 0.5,
    "dst_update": 0.25,
    "lm": 0.0,
    "n_speaking": 390.0,
    "n_dst_update": 39.0,
    "n_lm": 0.0,
    "grad_norm": 2.5,
    "lr": 0.002,
    "tokens": 3400,
    "padding": 0.012,
    "seconds": 0.8,
}
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


def log(run: Path, steps, start: int = 0, seconds: float = 1.0) -> None:
    """Log `steps` of a run of 6, evaluated after every second one."""
    with open_metrics(run, 6, start, shown=False) as metrics:
        for number in steps:
            metrics.step(step(number, 1 / number, seconds))
            if number % 2 == 0:
                metrics.evaluation({"step": number, "evaluation": EVALUATION, "seconds": seconds})


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: per name (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    return {name: [(e.step, e.value) for e in shown.Scalars(name)] for name in shown.Tags()["scalars"]}


# ---- metrics.jsonl -----------------------------------------------------------------------------------


def test_a_step_is_one_line_with_the_clock_apart(tmp_path):
    with open_metrics(tmp_path, 10, shown=False) as metrics:
        metrics.step(LINE_3)
        assert content(tmp_path) == (  # before anything is closed
            '{"step": 3, "loss": 1.25, "speaking": 0.5, "dst_update": 0.25, "lm": 0.0, "n_speaking": 390.0, "n_dst_update": 39.0, '
            '"n_lm": 0.0, "grad_norm": 2.5, "lr": 0.002, "tokens": 3400, "padding": 0.012, '
            '"clock": {"seconds": 0.8, "tokens_per_s": 4250.0}}\n'
        )


def test_an_evaluation_is_a_line_of_its_own(tmp_path):
    with open_metrics(tmp_path, 10, shown=False) as metrics:
        metrics.evaluation({"step": 3, "evaluation": {"split": "val", "lm_loss": None}, "seconds": 2})
    assert (
        content(tmp_path) == '{"step": 3, "evaluation": {"split": "val", "lm_loss": null}, "clock": {"seconds": 2}}\n'
    )


def test_what_is_not_finite_is_null(tmp_path):
    with open_metrics(tmp_path, 10, shown=False) as metrics:
        metrics.step({"step": 1, "loss": math.nan, "grad_norm": math.inf, "more": [{"x": -math.inf}, 2]})
    assert content(tmp_path) == '{"step": 1, "loss": null, "grad_norm": null, "more": [{"x": null}, 2]}\n'


def test_a_run_that_was_killed_and_resumed_leaves_the_lines_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        run.mkdir()
    log(whole, range(1, 7), seconds=1.0)
    log(killed, range(1, 6), seconds=2.0)  # its checkpoint is that of step 3
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log(killed, range(4, 7), start=3, seconds=3.0)
    lines = [[{k: v for k, v in line.items() if k != "clock"} for line in read_metrics(r)] for r in (whole, killed)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[1]] == [1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_rewind_keeps_what_came_before_byte_for_byte(tmp_path):
    before = '{"step": 1,   "loss": 1.50}\n{"step": 2, "loss": 1}\n{"step": 2, "evaluation": {}}\n'
    (tmp_path / "metrics.jsonl").write_text(before + '{"step": 3, "loss": 0.5}\n{"step": 3, "ev')
    rewind(tmp_path, 2)
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    rewind(tmp_path, 0)
    assert content(tmp_path) == ""


@pytest.mark.parametrize("tail", ['{"step": 2, "loss": 0.', '{"step": 2, "loss": 0.5}', "\0\0\0\0", ""])
def test_a_last_line_without_its_newline_does_not_count(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' + tail)
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]
    rewind(tmp_path, 2)
    assert content(tmp_path) == '{"step": 1, "loss": 1.0}\n'


@pytest.mark.parametrize("damage", ['{"step": 2, "lo', '{"loss": 1}', "7", ""])
def test_another_damaged_line_is_named_and_the_file_left_alone(tmp_path, damage):
    before = f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n'
    (tmp_path / "metrics.jsonl").write_text(before)
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2: .*remove that line and run again"):
        rewind(tmp_path, 1)
    assert content(tmp_path) == before


def test_nothing_logged_is_nothing_to_rewind(tmp_path):
    rewind(tmp_path, 5)
    assert read_metrics(tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space left"), subject._json_lines(Path("/dev/full")) as write:
        write({"step": 1})


def test_an_error_in_the_loop_comes_through_and_what_was_logged_stays(tmp_path):
    def loop() -> None:
        with open_metrics(tmp_path, 4) as metrics:
            metrics.step(step(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert events(tmp_path)["loss/total"] == [(1, 1.0)]


def test_metrics_without_anybody_to_tell_take_lines_and_write_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    metrics = Metrics()
    metrics.step(LINE_3)
    metrics.evaluation({"step": 3, "evaluation": EVALUATION})
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


# ---- TensorBoard, wandb, trackio ---------------------------------------------------------------------


def test_scalars_have_the_names_and_leave_out_what_was_not_measured():
    assert scalars(LINE_3 | {"clock": {"seconds": 0.8, "tokens_per_s": 4250.0}, "note": "x", "skew": math.nan}) == {
        "loss/total": 1.25,
        "loss/speaking": 0.5,
        "loss/dst_update": 0.25,
        "supervised/speaking": 390.0,
        "supervised/dst_update": 39.0,
        "supervised/lm": 0.0,
        "train/grad_norm": 2.5,
        "train/lr": 0.002,
        "train/tokens": 3400.0,
        "train/padding": 0.012,
        "train/seconds": 0.8,
        "train/tokens_per_s": 4250.0,
    }
    assert scalars({"step": 3, "evaluation": EVALUATION}) == {
        "eval/val/speaking_ap": 0.75,
        "eval/val/speaking_chance": 0.125,
        "eval/val/dst_update_chance": 0.0,
        "eval/val/lm_loss": 1.5,
    }


def test_tensorboard_shows_each_value_at_its_step(tmp_path):
    with open_metrics(tmp_path, 3, shown=False) as metrics:
        metrics.step({"step": 1, "loss": 2.5, "lr": 0.25, "tokens": 50, "seconds": 0.5})
        metrics.step({"step": 2, "loss": 1.5, "lr": 0.5, "tokens": 100, "seconds": 0.5})
        metrics.evaluation({"step": 2, "evaluation": EVALUATION})
    found = events(tmp_path)
    assert found["loss/total"] == [(1, 2.5), (2, 1.5)]
    assert found["train/lr"] == [(1, 0.25), (2, 0.5)]
    assert found["train/tokens_per_s"] == [(1, 100.0), (2, 200.0)]
    assert found["eval/val/speaking_ap"] == [(2, 0.75)]


def test_tensorboard_forgets_what_came_after_the_checkpoint_of_a_resumed_run(tmp_path):
    with open_metrics(tmp_path, 3, shown=False) as metrics:
        for number in (1, 2, 3):
            metrics.step(step(number, loss=number))
    time.sleep(1.1)  # event files are read in the order of their second
    with open_metrics(tmp_path, 3, 1, shown=False) as metrics:
        metrics.step(step(2, loss=20))
    assert events(tmp_path)["loss/total"] == [(1, 1.0), (2, 20.0)]


def test_without_tensorboard_there_is_a_note_and_the_rest_works(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with open_metrics(tmp_path, 1) as metrics:
        metrics.step(step(1))
    note, line = capsys.readouterr().err.splitlines()
    assert note.endswith("tensorboard: tensorboard is not installed; metrics.jsonl has the same numbers")
    assert line.startswith("step 1/1  loss 1.000")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    log(tmp_path, [1])
    assert capsys.readouterr().err == ""


class FakeTracker(SimpleNamespace):
    """A package like wandb: writes down how it was called."""

    def __init__(self, name: str, refuses: str = "") -> None:
        super().__init__(__name__=name, calls=[], refuses=refuses)

    def init(self, **options):
        if self.refuses:
            raise RuntimeError(self.refuses)
        self.calls.append(("init", options))

    def log(self, values, step):
        self.calls.append((step, values))

    def finish(self, **options):
        self.calls.append(("finish", options))


@pytest.fixture
def tracker(monkeypatch, request):
    fake = FakeTracker(*request.param)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


@pytest.mark.parametrize("tracker", [["trackio"]], indirect=True)
def test_a_tracker_that_is_asked_for_gets_config_and_numbers(tracker, tmp_path):
    run = tmp_path / "run7"
    run.mkdir()
    with open_metrics(run, 2, logger="trackio", shown=False, config={"lr": 0.5}) as metrics:
        metrics.step({"step": 1, "loss": 2.0})
        metrics.evaluation({"step": 1, "evaluation": EVALUATION | {"speaking": {}, "dst_update": {}}})
    assert tracker.calls == [
        ("init", {"project": "prospect-dst", "name": "run7", "group": "run7", "config": {"lr": 0.5}}),
        (1, {"loss/total": 2.0}),
        (1, {"eval/val/lm_loss": 1.5}),
        ("finish", {}),
    ]


@pytest.mark.parametrize("tracker", [["wandb"]], indirect=True)
def test_wandb_keeps_its_files_in_the_run_and_is_told_of_a_failure(tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "thesis")
    with pytest.raises(ZeroDivisionError), open_metrics(tmp_path, 2, logger="wandb", shown=False):
        1 / 0  # noqa: B018
    assert tracker.calls[0][1]["project"] == "thesis"
    assert tracker.calls[0][1]["dir"] == str(tmp_path)
    assert tracker.calls[1:] == [("finish", {"exit_code": 1})]


@pytest.mark.parametrize("tracker", [["wandb", "no key:\nlog in"]], indirect=True)
def test_a_tracker_that_does_not_start_is_one_line_and_leaves_no_file(tracker, tmp_path):
    with pytest.raises(InputError) as caught, open_metrics(tmp_path, 2, logger="wandb", shown=False):
        pass
    assert str(caught.value) == ("--log wandb: it does not start (no key: log in); see its manual, or leave --log out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tracker", [["wandb"]], indirect=True)
def test_an_installed_tracker_that_is_not_asked_for_is_left_alone(tracker, tmp_path):
    log(tmp_path, [1])
    assert tracker.calls == []


def test_a_tracker_that_is_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match=r"^--log trackio: trackio is not installed; pip install trackio, or leave"):
        find_logger("trackio")
    with pytest.raises(InputError, match="not installed"), open_metrics(tmp_path, 2, logger="trackio"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_unknown_tracker_is_refused_without_importing_it():
    with pytest.raises(InputError, match=r"^--log antigravity: expected one of wandb, trackio"):
        find_logger("antigravity")
    assert "antigravity" not in sys.modules
    assert find_logger(None) is None


# ---- on stderr ---------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless moved."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(subject, "time", SimpleNamespace(monotonic=lambda: time.now))
    return time


def test_a_log_file_gets_plain_lines(tmp_path, capsys, clock):
    with open_metrics(tmp_path, 13) as metrics:
        metrics.step(LINE_3 | {"speaking": 0.0042})
        metrics.evaluation({"step": 3, "evaluation": EVALUATION})
    assert capsys.readouterr().err.splitlines() == [
        "step 3/13  loss 1.250  speaking 4.2e-03  dst_update 0.250  lm -  4,250 tok/s  padding 1.2%  eta 0:08",
        "step 3/13  on val: speaking AP 0.750 (chance 0.125)  dst_update AP - (chance 0.000)",
    ]


def test_plain_lines_come_with_each_tenth_of_the_run(tmp_path, capsys, clock):
    with open_metrics(tmp_path, 50) as metrics:
        for number in range(1, 51):
            metrics.step(step(number))
    said = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert said == [1, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50]


def test_plain_lines_come_after_thirty_quiet_seconds(tmp_path, capsys, clock):
    with open_metrics(tmp_path, 1000) as metrics:
        for number in range(1, 9):
            metrics.step(step(number))
            clock.now += 12
    said = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert said == [1, 4, 7]


def test_speed_is_that_of_recent_steps_and_time_left_that_of_the_whole_run(tmp_path, capsys, clock):
    with open_metrics(tmp_path, 4) as metrics:
        metrics.step({"step": 1, "tokens": 100, "seconds": 60.0})
        clock.now += 100  # of which an evaluation takes 99
        metrics.step({"step": 2, "tokens": 500, "seconds": 1.0})
        clock.now += 4000
        for number in range(3, 5):
            metrics.step({"step": number, "tokens": 500, "seconds": 0.0})
    assert [" ".join(line.split()[2:]) for line in capsys.readouterr().err.splitlines()] == [
        "2 tok/s eta 3:00",  # 100 / 60; 3 steps of a minute
        "10 tok/s eta 3:20",  # 600 / 61; 2 steps of 100 s
        "18 tok/s eta 34:10",  # 1,100 / 61; 1 step of 4,100 / 2 s
        "26 tok/s eta 0:00",
    ]


def test_old_steps_fall_out_of_the_speed(tmp_path, capsys, clock):
    with open_metrics(tmp_path, 21) as metrics:
        for number in range(1, 22):
            metrics.step({"step": number, "tokens": 100, "seconds": 100.0 if number == 1 else 1.0})
    assert capsys.readouterr().err.splitlines()[-1].startswith("step 21/21  100 tok/s")


def test_hours_are_shown_as_hours(tmp_path, capsys, clock):
    with open_metrics(tmp_path, 3661) as metrics:
        metrics.step(step(1))
    assert capsys.readouterr().err.endswith("eta 1:01:00\n")


def test_a_gpu_shows_the_peak_of_its_memory(tmp_path, capsys, monkeypatch, clock):
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**29)
    with open_metrics(tmp_path, 1) as metrics:
        metrics.step(step(1))
    assert capsys.readouterr().err.endswith("eta 0:00  peak 1.5 GiB\n")


def test_a_terminal_gets_a_bar_that_ends_full(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with open_metrics(tmp_path, 40, 38) as metrics:
        for number in (39, 40):
            metrics.step(LINE_3 | {"step": number})
            metrics.evaluation({"step": number, "evaluation": EVALUATION})
    shown = capsys.readouterr().err
    assert "40/40" in shown
    assert "4,250 tok/s  padding 1.2%  eta 0:00" in shown
    assert "loss 1.250  speaking 0.500  dst_update 0.250  lm -" in shown
    assert "step 39/40  on val: speaking AP 0.750 (chance 0.125)" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back


def test_nothing_is_shown_unless_asked(tmp_path, capsys, monkeypatch):
    for forced in ("", "1"):
        monkeypatch.setenv("FORCE_COLOR", forced)
        log(tmp_path, range(1, 7))
    assert capsys.readouterr() == ("", "")
    assert len(json.loads(content(tmp_path).splitlines()[0])) == 5
