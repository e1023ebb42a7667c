"""What a run logs: metrics.jsonl through kills, TensorBoard, wandb, and lines on stderr."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest

from pipeline.errors import InputError
from trainer.run_log import open_log, read_metrics, scalars

LINE_3 = {
    "step": 3, "loss": 1.25, "speaking": 0.5, "dst_update": 0.25, "lm": 0.0, "n_speaking": 390.0, "n_dst_update": 39.0,
    "n_lm": 0.0, "grad_norm": 2.5, "lr": 0.002, "tokens": 3400, "padding": 0.012, "seconds": 0.8,
}  # fmt: skip
EVALUATION = {"split": "val", "speaking": {"ap": 0.75}, "dst_update": {"ap": None}}


def test_a_step_is_one_flushed_line_with_the_clock_apart(tmp_path):
    with open_log(tmp_path, 10, shown=False) as log:
        log(LINE_3)
        log({"step": 3, "evaluation": {"split": "val", "lm_loss": None}, "more": [{"x": -math.inf}, 2]})
        first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    rest = {name: value for name, value in LINE_3.items() if name != "seconds"}
    assert first == {**rest, "clock": {"seconds": 0.8, "tokens_per_s": 4250.0}}
    rest = {"evaluation": {"split": "val", "lm_loss": None}, "more": [{"x": None}, 2]}  # not finite: null
    assert second == {"step": 3, **rest}


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_keeps_the_rest_byte_for_byte(tmp_path):
    before = '{"step": 1,   "loss": 1.50}\n{"step": 2, "loss": 1}\n{"step": 2, "evaluation": {}}\n'
    (tmp_path / "metrics.jsonl").write_text(before + '{"step": 3, "loss": 0.5}\n{"step": 3, "ev')
    with open_log(tmp_path, 6, done=2, shown=False):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == before
    (tmp_path / "metrics.jsonl").write_text(before.replace('"step": 2, "loss"', '"loss"'))
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2: damaged"):
        read_metrics(tmp_path)


def test_tensorboard_has_what_was_measured_by_name(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, 2, shown=False) as log:
        for line in ({"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 2, "evaluation": EVALUATION}):
            log(line)
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(e.step, e.value) for e in shown.Scalars("loss/total")] == [(1, 1.0), (2, 0.5)]
    assert [(e.step, e.value) for e in shown.Scalars("eval/val/speaking_ap")] == [(2, 0.75)]
    found = scalars(LINE_3 | {"note": "x", "skew": math.nan})
    assert found.keys() == {
        *("loss/total", "loss/speaking", "loss/dst_update", "supervised/speaking", "supervised/dst_update"),
        *("supervised/lm", "train/grad_norm", "train/lr", "train/tokens", "train/padding", "train/seconds"),
    }  # no loss/lm: nothing to supervise


def test_wandb_gets_config_numbers_and_whether_the_run_failed(tmp_path, monkeypatch):
    calls = []
    wandb = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda values, step: calls.append((step, values)),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("WANDB_PROJECT", "thesis")
    run = tmp_path / "run7"
    run.mkdir()
    with open_log(run, 2, tracker="wandb", shown=False, config={"lr": 0.5}) as log:
        log({"step": 1, "loss": 2.0})
    options = {"project": "thesis", "name": "run7", "group": "run7", "config": {"lr": 0.5}, "dir": str(run)}
    assert calls == [("init", options), (1, {"loss/total": 2.0}), ("finish", 0)]
    with pytest.raises(ZeroDivisionError), open_log(run, 2, tracker="wandb", shown=False):
        raise ZeroDivisionError
    assert calls[-1] == ("finish", 1)
    del wandb.init
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # which may not be installed
    with pytest.raises(InputError, match="--log wandb: does not start"), open_log(run, 2, tracker="wandb"):
        pass
    with open_log(run, 2, shown=False) as log:
        log({"step": 1, "loss": 2.0})
