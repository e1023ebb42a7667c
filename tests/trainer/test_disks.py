"""Runs on file systems that refuse things: no checkpoint is lost to it, and what cannot work is told before a step."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import go, same, weights

import trainer.checkpoint
import trainer.train
from trainer.checkpoint import RUN_INFO, load_run, recover

REFUSING = Path(__file__).parents[1] / "refusing"
SPEC = importlib.util.spec_from_file_location("refusing", REFUSING / "sitecustomize.py")
refusing = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(refusing)


@pytest.mark.parametrize("what", [("flock", "chmod", "fsync", "over"), ("folders", "chmod")])
def test_a_run_is_saved_over_an_older_checkpoint_to_the_same_bits(data, whole, cut, monkeypatch, what):
    refusing.refuse(monkeypatch.setattr, cut, *what)
    assert go(data, cut, resume=True).resumed_from == 6
    assert same(cut, whole)
    assert [path.name for path in cut.glob(".*")] in ([], [".lock"])


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
        recover(tmp_path / "last")
    monkeypatch.setattr(trainer.checkpoint, "move", move)
    assert (tmp_path / ".last.new" / RUN_INFO).exists()
    recover(tmp_path / "last")
    assert load_run(tmp_path, to_train=True).info["step"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_a_mount_point_or_a_killed_start_is_an_empty_folder(data, tmp_path):
    (tmp_path / "lost+found").mkdir()
    for left in (".lock", ".options.json.01234567.new"):
        (tmp_path / left).touch()
    assert go(data, tmp_path, steps=1, warmup_steps=0, eval_split="none").steps == 1
    assert "last/run.json" in weights(tmp_path)


def test_renames_that_are_refused_are_told_before_the_first_step(data, tmp_path, monkeypatch):
    refusing.refuse(monkeypatch.setattr, tmp_path, "rename")
    monkeypatch.setattr(trainer.train, "train_step", None)
    with pytest.raises(OSError, match=r"renaming is refused there .*choose a folder on another disk") as caught:
        go(data, tmp_path / "run")
    assert caught.value.filename == str(tmp_path / "run" / "options.json")


@pytest.mark.slow
def test_a_fresh_process_beside_files_of_our_names_on_a_disk_that_refuses_all_niceties(data, tmp_path):
    """And a worker below a TMPDIR whose name leaves none for its sockets: it must not import the user's trainer.py."""
    deep, mine = tmp_path / ("t" * 100), tmp_path / "mine"
    deep.mkdir()
    mine.mkdir()
    for name in ("trainer", "pipeline"):
        (mine / f"{name}.py").write_text(f"open('{name} was imported', 'w')\n")
    refuses = {"FAKE_FS": str(tmp_path), "REFUSED": "flock,chmod,fsync,over", "TMPDIR": str(deep)}
    env = {**os.environ, **refuses, "PYTHONPATH": str(REFUSING), "OMP_NUM_THREADS": "1"}
    few = ("--steps", "1", "--clips-per-step", "2", "--max-tokens", "200", "--workers", "1", "--model", "nano")
    command = [Path(sys.executable).with_name("prospect-dst"), "train", data, "--run", tmp_path / "run", *few]
    ran = subprocess.run(command, cwd=mine, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr[-300:] if ran.returncode else "") == (0, "")
    assert load_run(tmp_path / "run").info["step"] == 1
    assert sorted(path.name for path in mine.iterdir()) == ["pipeline.py", "trainer.py"]
