"""The trainer's commands as they are typed: what they print, what they refuse, what they leave."""

from __future__ import annotations

import fcntl
import os

import pytest
from small_run import curve

from trainer.cli import main


def train(data, run, *more) -> int:
    return main(["train", str(data), "--run", str(run), *map(str, more)])


FEW = ("--steps", 2, "--clips-per-step", 2, "--max-tokens", 200, "--model", "nano")


def test_train_encode_and_train_again_on_features(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", *FEW, "--frames-root", data / "frames-on-disk") == 0
    said = capsys.readouterr().out
    assert "2 steps in" in said
    assert f"--split test --frames-root {data / 'frames-on-disk'}" in said
    encode = ["encode", str(data), "--model", str(tmp_path / "run" / "last"), "--out", str(tmp_path / "features")]
    assert main([*encode, "--store", "float32"]) == 0
    assert "10 videos, 129 frames" in capsys.readouterr().out
    assert main([*encode, "--store", "float32"]) == 0
    assert "10 videos were there already; skipped" in capsys.readouterr().out

    again = (*FEW, "--model", tmp_path / "run" / "last", "--freeze", "vision")
    assert train(data, tmp_path / "live", *again) == 0
    assert train(data, tmp_path / "cached", *again, "--features", tmp_path / "features") == 0
    live, cached = ([line["loss"] for line in curve(tmp_path / r) if "loss" in line] for r in ("live", "cached"))
    assert cached == pytest.approx(live, rel=1e-4)
    where = [str(tmp_path / "cached"), str(data), "--features", str(tmp_path / "features")]
    assert main(["evaluate", *where, "--split", "val", "--no-free-running", "--draws", "0"]) == 0


def test_resume_keeps_the_run_s_options_refuses_others_by_name_and_a_second_process(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run, *FEW, "--lr", "0.01", "--freeze", "vision,connector", "--lr-by-part", "heads=0.1") == 0
    assert train(data, run, "--resume", "--lr", "0.01", "--freeze", "vision", "--freeze", "connector") == 0
    assert "all 2 steps had been done before" in capsys.readouterr().out
    assert train(data, run, "--resume", "--steps", "9") == 1
    assert "steps is 9, the run has 2" in capsys.readouterr().err.splitlines()[-1]
    handle = os.open(run / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert train(data, run, "--resume") == 1
    os.close(handle)
    assert "another process is at work there" in capsys.readouterr().err
    assert train(data, run, "--resume") == 0


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--log", "tensorbored"), "tensorbored"),
        (("--features", "."), "these features are for frozen parts; add --freeze vision"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_made(
    data, tmp_path, capsys, monkeypatch, option, message
):
    monkeypatch.chdir(tmp_path)  # the demo leaves checkpoints in the folder of the call
    assert train(data, tmp_path / "run", *FEW, *option) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_would_be_ignored_or_overwritten_is_bad_usage(tmp_path, capsys):
    for kind in (["--scores", "s.parquet"], ["--control", "history"]):
        for option in (["--updates", "reference"], ["--features", "f"], ["--frames-root", "f"]):
            assert main(["evaluate", "labels", *kind, *option]) == 2
            assert f"{option[0]}: not used with {kind[0]}" in capsys.readouterr().err
    video = tmp_path / "video.mp4"
    video.touch()
    assert main(["stream", "run", str(video), "--html", str(video)]) == 2
    assert "its name is no page's; expected a new name, or one in .html" in capsys.readouterr().err


def test_a_mistake_before_the_first_checkpoint_can_be_corrected(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", *FEW, "--max-tokens", 3) == 1
    assert "use --max-tokens " in capsys.readouterr().err
    assert train(data, tmp_path / "run", *FEW) == 0
    assert train(data, tmp_path / "run", *FEW) == 1
    assert "exists and is not empty" in capsys.readouterr().err
