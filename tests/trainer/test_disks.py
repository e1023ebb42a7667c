"""Runs on file systems that refuse things: no checkpoint is lost to it, and what cannot work is told before a step."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import curve, go, go_until, weights

import trainer.checkpoint
import trainer.train
from trainer.checkpoint import RUN_INFO, load_run, recover

REFUSING = Path(__file__).parents[1] / "refusing"
SPEC = importlib.util.spec_from_file_location("refusing", REFUSING / "sitecustomize.py")
refusing = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(refusing)


@pytest.mark.parametrize("what", [("flock", "chmod", "fsync", "over"), ("folders", "chmod")])
def test_a_run_is_saved_and_resumed_to_the_same_bits(data, whole, tmp_path, monkeypatch, what):
    with monkeypatch.context() as patch:
        refusing.refuse(patch.setattr, tmp_path, *what)
        go_until(7, data, tmp_path / "run", monkeypatch)
        refusing.refuse(patch.setattr, tmp_path, *what)
        assert load_run(tmp_path / "run").info["step"] == 6
        assert go(data, tmp_path / "run", resume=True).resumed_from == 6
    assert weights(tmp_path / "run") == weights(whole)
    assert curve(tmp_path / "run") == curve(whole)
    assert not [path.name for path in (tmp_path / "run").glob(".*") if path.name != ".lock"]


def test_a_kill_while_files_are_moved_one_by_one_costs_nothing(data, whole, tmp_path, monkeypatch):
    """As on a bucket: the old checkpoint's files are partly replaced; the next start moves the rest."""
    shutil.copytree(whole / "last", tmp_path / "last")
    shutil.copytree(whole / "last", tmp_path / ".last.new")
    refusing.refuse(monkeypatch.setattr, tmp_path, "folders")
    move, count = trainer.checkpoint.move, iter(range(100))

    def killed(new, path):
        if next(count) == 3:
            raise KeyboardInterrupt
        move(new, path)

    monkeypatch.setattr(trainer.checkpoint, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.checkpoint._move_into_place(tmp_path / ".last.new", tmp_path / "last")
    monkeypatch.setattr(trainer.checkpoint, "move", move)
    assert (tmp_path / ".last.new" / RUN_INFO).exists()
    recover(tmp_path / "last")
    assert load_run(tmp_path, to_train=True).info["step"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_mount_point_or_a_killed_start_is_an_empty_folder(data, whole, tmp_path):
    (tmp_path / "lost+found").mkdir()
    for left in (".lock", ".options.json.01234567.new"):
        (tmp_path / left).touch()
    go(data, tmp_path)
    assert weights(tmp_path) == weights(whole)


def test_renames_that_are_refused_are_told_before_the_first_step(data, tmp_path, monkeypatch):
    refusing.refuse(monkeypatch.setattr, tmp_path, "rename")
    monkeypatch.setattr(trainer.train, "train_step", None)
    with pytest.raises(OSError, match=r"renaming is refused there .*choose a folder on another disk") as caught:
        go(data, tmp_path / "run")
    assert caught.value.filename == str(tmp_path / "run" / "options.json")


@pytest.mark.slow
def test_commands_in_a_fresh_process_on_a_disk_that_refuses_all_niceties(data, tmp_path):
    """And workers below a TMPDIR whose name leaves none for their sockets."""
    deep = tmp_path / ("t" * 100)
    deep.mkdir()
    refuses = {"FAKE_FS": str(tmp_path), "REFUSED": "flock,chmod,fsync,over", "TMPDIR": str(deep)}
    env = {**os.environ, **refuses, "PYTHONPATH": str(REFUSING), "OMP_NUM_THREADS": "1"}
    few = ("--steps", "2", "--clips-per-step", "2", "--max-tokens", "200")
    for words in (
        ("train", data, "--run", tmp_path / "run", *few, "--workers", "1"),
        ("encode", data, "--model", tmp_path / "run" / "last", "--out", tmp_path / "features"),
    ):
        ran = subprocess.run([sys.executable, "-m", "trainer.cli", *map(str, words)], env=env, capture_output=True)
        assert (ran.returncode, ran.stderr.decode()[-300:] if ran.returncode else "") == (0, "")
    assert load_run(tmp_path / "run").info["step"] == 2
