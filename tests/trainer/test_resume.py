"""A run that was stopped, however, ends as one that never was: the same weights, moments and curve, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import time

import pytest
import torch
from small_run import curve, go, go_until, same, write_data

import trainer.train
from pipeline.errors import InputError
from trainer.checkpoint import load_run, recover


@pytest.mark.parametrize("more", [{}, pytest.param({"workers": 2, "save_every": 3}, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(data, cut, whole, more):
    """Neither workers nor when it was saved changes a bit."""
    report = go(data, cut, resume=True, **more)
    assert (report.resumed_from, report.steps) == (6, 10)
    assert same(cut, whole)


def test_a_stop_before_the_first_checkpoint_costs_the_steps_done_alone(data, tmp_path, whole):
    go_until(1, data, tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()
    assert go(data, tmp_path / "run", resume=True).resumed_from == 0
    assert same(tmp_path / "run", whole)


def test_adapters_and_muon_resume_bit_for_bit(data, tmp_path):
    pytest.importorskip("peft")
    more = {"lora_rank": 2, "freeze": ("vision",), "optimizer": "muon", "steps": 3, "warmup_steps": 1, "eval_every": 0}
    go(data, tmp_path / "whole", **more)
    go_until(2, data, tmp_path / "cut", save_every=1, **more)
    assert go(data, tmp_path / "cut", resume=True, **more).resumed_from == 2
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_a_loss_that_is_not_finite_leaves_the_last_good_step(data, tmp_path, monkeypatch):
    step, calls = trainer.train.sum_terms, []

    def breaks(model, pack, config):
        calls.append(pack)
        return step(model, pack, config) * (float("nan") if len(calls) > 2 * 2 else 1)  # two packs a step

    monkeypatch.setattr(trainer.train, "sum_terms", breaks)
    with pytest.raises(InputError, match=r"the loss is not finite at clips train\d"):
        go(data, tmp_path / "run", save_every=3)
    loaded = load_run(tmp_path / "run")
    assert 0 < loaded.info["step"] <= 2
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())
    assert curve(tmp_path / "run")[-1]["step"] == loaded.info["step"]


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_kill_while_a_checkpoint_is_moved_into_place_loses_none(data, cut, whole, name):
    """All of it is in .NAME.new but for one file, which is in place already."""
    draft = (cut / name).rename(cut / f".{name}.new")
    (cut / name).mkdir()
    (draft / "heads.safetensors").rename(cut / name / "heads.safetensors")
    assert load_run(cut).info["step"] == 6
    recover(cut / name)
    assert (cut / name / "run.json").is_file()
    if name == "last":
        assert go(data, cut, resume=True).resumed_from == 6
        assert same(cut, whole)
        assert [path.name for path in cut.glob(".*")] == [".lock"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, r"lr is 0\.5, the run has 0\.002; resume with the same"),
        ({"seed": 1, "steps": 12}, r"seed is 1, the run has 0; steps is 12, the run has 10"),
        ({"arm": "speak"}, r"arm is 'speak', the run has 'speak\+dst'"),
    ],
)
def test_other_options_are_refused_by_name(data, cut, changed, message):
    with pytest.raises(InputError, match=message):
        go(data, cut, resume=True, **changed)


@pytest.mark.parametrize(("size", "which"), [({"clips": 6}, "train data"), ({"val": 2}, "evaluation data")])
def test_other_data_is_refused(cut, tmp_path, size, which):
    with pytest.raises(InputError, match=rf"{which} is '[0-9a-f]{{16}}', the run has '[0-9a-f]{{16}}'"):
        go(write_data(tmp_path / "other", **size), cut, resume=True)


def test_damaged_options_or_a_damaged_or_missing_state_are_refused_by_name(data, cut):
    path = cut / "last" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"last/state\.safetensors: damaged, its SHA-256 differs"):
        go(data, cut, resume=True)
    path.unlink()
    with pytest.raises(InputError, match=r"last/state\.safetensors: not found"):
        go(data, cut, resume=True)
    os.truncate(cut / "options.json", 100)
    with pytest.raises(InputError, match=r"options\.json: damaged"):
        go(data, cut, resume=True)


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(data, whole, tmp_path):
    """Each process is killed (SIGKILL) at a random moment of what a whole run takes; the next resumes.

    PROSPECT_DST_KILLS=20 for the full measure (`just kill`).
    """
    wanted = int(os.environ.get("PROSPECT_DST_KILLS", "3"))
    context = multiprocessing.get_context("forkserver")

    def start(run):
        process = context.Process(target=go, args=(data, run), kwargs={"resume": True, "save_every": 1, "drawn": True})
        process.start()
        return process

    (process := context.Process()).start()
    process.join()  # the server has imported torch
    began = time.monotonic()
    (process := start(tmp_path / "timed")).join()
    assert process.exitcode == 0
    took = time.monotonic() - began
    moments, kills = random.Random(0), 0
    while kills < wanted:
        run = tmp_path / f"run{kills}"
        while (process := start(run)).is_alive():
            process.join(moments.uniform(0, took))
            if process.exitcode is None:
                process.kill()
                process.join()
                kills += 1
            assert process.exitcode in (0, -9)
            if process.exitcode == 0:
                break
        assert same(run, whole)
