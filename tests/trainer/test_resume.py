"""A run that was stopped, however, ends as one that never was: the same weights, moments and curve, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from small_run import curve, go, go_until, same, weights, write_data

import trainer.train
from pipeline.errors import InputError
from trainer.checkpoint import load_run, recover
from trainer.encode import load_tower


def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(data, cut, whole):
    assert load_run(cut).info["step"] == 6
    report = go(data, cut, resume=True)
    assert (report.resumed_from, report.steps) == (6, 10)
    assert same(cut, whole)


@pytest.mark.slow
def test_neither_workers_nor_when_it_was_saved_changes_a_bit(data, cut, whole):
    go(data, cut, resume=True, workers=2, save_every=3)
    assert same(cut, whole)


@pytest.mark.slow
def test_a_worker_s_error_is_one_line(tmp_path):
    data = write_data(tmp_path / "data", clips=3, val=1)
    for path in (data / "frames-on-disk").glob("train-*.arrow"):
        path.write_bytes(b"no Arrow file")
    with pytest.raises(InputError, match=r"^\S*train-v\d\.arrow: not an Arrow IPC file[^\n]*$"):
        go(data, tmp_path / "run", workers=1)


def test_a_stop_before_the_first_checkpoint_costs_the_steps_done_alone(data, tmp_path, whole):
    go_until(1, data, tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()
    assert go(data, tmp_path / "run", resume=True).resumed_from == 0
    assert same(tmp_path / "run", whole)


def test_resuming_a_finished_run_changes_nothing_and_says_so(data, tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    report = go(data, tmp_path / "run", resume=True)
    assert (report.note, report.loss) == ("all 10 steps had been done before", None)
    assert same(tmp_path / "run", whole)


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_kill_while_a_checkpoint_is_moved_into_place_loses_none(data, cut, whole, name):
    draft = cut / f".{name}.new"
    (cut / name).rename(draft)
    (cut / name).mkdir()
    (draft / "heads.safetensors").rename(cut / name / "heads.safetensors")
    assert load_run(cut).info["step"] == 6
    recover(cut / name)
    assert (cut / name / "run.json").is_file()
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    if name == "last":
        assert go(data, cut, resume=True).resumed_from == 6
        assert same(cut, whole)
        assert [path.name for path in cut.glob(".*")] == [".lock"]


def test_adapters_and_muon_resume_bit_for_bit(data, tmp_path):
    pytest.importorskip("peft")
    more = {"lora_rank": 2, "freeze": ("vision",), "optimizer": "muon", "steps": 4, "eval_every": 0}
    go(data, tmp_path / "whole", **more)
    go_until(3, data, tmp_path / "cut", **more)
    assert go(data, tmp_path / "cut", resume=True, **more).resumed_from == 2
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_a_loss_that_is_not_finite_leaves_the_last_good_step(data, tmp_path, monkeypatch):
    step, calls = trainer.train.sum_terms, []

    def breaks(model, pack, config):
        calls.append(pack)
        return step(model, pack, config) * (float("nan") if len(calls) > 4 * 2 else 1)  # two packs a step

    monkeypatch.setattr(trainer.train, "sum_terms", breaks)
    with pytest.raises(InputError, match=r"the loss is not finite at clips train\d"):
        go(data, tmp_path / "run", save_every=3)
    loaded = load_run(tmp_path / "run")
    assert 0 < loaded.info["step"] <= 4
    assert all(torch.isfinite(p).all() for p in loaded.model.parameters())
    assert curve(tmp_path / "run")[-1]["step"] == loaded.info["step"]


# ---- refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.5}, r"lr is 0\.5, the run has 0\.002; resume with the same"),
        ({"seed": 1, "steps": 12}, r"seed is 1, the run has 0; steps is 12, the run has 10"),
    ],
)
def test_other_options_are_refused_by_name(data, cut, changed, message):
    with pytest.raises(InputError, match=message):
        go(data, cut, resume=True, **changed)


@pytest.mark.parametrize(("size", "which"), [({"clips": 6}, "train data"), ({"val": 2}, "evaluation data")])
def test_other_data_is_refused(cut, tmp_path, size, which):
    with pytest.raises(InputError, match=rf"{which}: [0-9a-f]{{16}}, the run has [0-9a-f]{{16}}"):
        go(write_data(tmp_path / "other", **size), cut, resume=True)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_or_missing_state_is_refused_by_name(data, cut):
    path = cut / "last" / "state.safetensors"
    flip(path)
    with pytest.raises(InputError, match=r"last/state\.safetensors: damaged, its SHA-256 differs"):
        go(data, cut, resume=True)
    path.unlink()
    with pytest.raises(InputError, match=r"last/state\.safetensors: not found"):
        go(data, cut, resume=True)


def test_a_run_with_a_damaged_file_is_no_model_to_start_from(data, cut, tmp_path):
    flip(cut / "last" / "model.safetensors")
    for start in (
        lambda: go(data, tmp_path / "new", model=str(cut)),
        lambda: load_tower(str(cut / "last"), 1, "vision", "float16", "float32"),
    ):
        with pytest.raises(InputError, match=r"last/model\.safetensors: damaged"):
            start()


@pytest.mark.parametrize(
    "writes", ["trainer.checkpoint.save_file", "trainer.model.SmolVLMForConditionalGeneration.save_pretrained"]
)
def test_a_full_disk_names_the_checkpoint_and_leaves_the_old_one(data, cut, monkeypatch, writes):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    before = weights(cut)
    monkeypatch.setattr(writes, full)
    with pytest.raises(OSError, match="No space left") as caught:
        go(data, cut, resume=True)
    assert str(caught.value.filename).endswith(".new")
    assert weights(cut) == before


# ---- kill -9 -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(data, whole, tmp_path):
    """Each process is killed (SIGKILL) at a random moment of what a whole run takes; the next resumes.

    PROSPECT_DST_KILLS=20 for the full measure (`just kill`).
    """
    wanted = int(os.environ.get("PROSPECT_DST_KILLS", "3"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trainer.train"])  # torch is imported once

    def start(run):
        process = context.Process(target=go, args=(data, run), kwargs={"resume": True, "save_every": 1})
        process.start()
        return process

    for name in ("warm", "timed"):  # the first one waits for the server to import torch
        began = time.monotonic()
        (process := start(tmp_path / name)).join()
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_training_process_that_was_killed(data, tmp_path):
    def alive() -> int:
        """Processes that have not ended, of those started below: they have a variable of their own."""
        count = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"PROSPECT_DST_TEST={tmp_path}".encode() in (process / "environ").read_bytes()
                count += marked and bool((process / "cmdline").read_bytes())
            except OSError:
                continue
        return count

    def until(condition, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.2)

    code = f"import sys; sys.path[:0] = {sys.path!r}; from small_run import go; from pathlib import Path; " + (
        f"go(Path({str(data)!r}), Path({str(tmp_path / 'run')!r}), workers=2, steps=100_000)"
    )
    environment = {**os.environ, "PROSPECT_DST_TEST": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "run" / "last").exists(), 200)
    assert alive() >= 4  # training, fork server, two workers
    process.kill()
    process.wait()
    until(lambda: not alive(), 60)
