"""Runs on file systems that refuse things: no checkpoint is lost to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from refusing.sitecustomize import refuse
from small_run import go, same

from trainer.checkpoint import load_run

REFUSING = Path(__file__).parents[1] / "refusing"


@pytest.mark.parametrize("what", [("flock", "chmod", "fsync", "over"), ("folders", "chmod")])
def test_a_run_is_saved_over_an_older_checkpoint_to_the_same_bits(data, whole, cut, monkeypatch, what):
    refuse(monkeypatch.setattr, cut, *what)
    assert go(data, cut, resume=True).resumed_from == 6
    assert same(cut, whole)
    assert [path.name for path in cut.glob(".*")] in ([], [".lock"])


@pytest.mark.slow
def test_a_fresh_process_beside_files_of_our_names_on_a_disk_that_refuses_all_niceties(data, tmp_path):
    """And a worker below a TMPDIR whose name leaves none for its sockets: it must not import the user's trainer.py."""
    deep, mine = tmp_path / ("t" * 100), tmp_path / "mine"
    deep.mkdir()
    mine.mkdir()
    for name in ("trainer", "pipeline"):
        (mine / f"{name}.py").write_text(f"open('{name} was imported', 'w')\n")
    refuses = {"FAKE_FS": str(tmp_path), "REFUSED": "flock,chmod,fsync,over", "TMPDIR": str(deep)}
    env = {**os.environ, **refuses, "PYTHONPATH": str(REFUSING)}
    few = ("--steps", "1", "--clips-per-step", "2", "--max-tokens", "200", "--workers", "1", "--model", "nano")
    command = [Path(sys.executable).with_name("prospect-dst"), "train", data, "--run", tmp_path / "run", *few]
    ran = subprocess.run(command, cwd=mine, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr[-300:] if ran.returncode else "") == (0, "")
    assert load_run(tmp_path / "run").info["step"] == 1
    assert sorted(path.name for path in mine.iterdir()) == ["pipeline.py", "trainer.py"]
