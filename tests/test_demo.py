"""The front door, end to end: small made-up videos through every command, and what a user sees of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.synth import SynthConfig, synth
from trainer import cli, demo

SMALL = SynthConfig(recordings={"train": 6, "val": 2, "test": 2}, views=2)


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A demo of three steps: everything but the learning."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    console = Console(record=True, width=100, file=(out.parent / "log").open("w"))
    report = demo.demo(out, steps=3, seed=0, console=console, config=SMALL)
    return out, report, console.export_text()


def test_the_demo_goes_through_every_step_and_ends_with_numbers_and_a_picture(made):
    out, report, text = made
    names = ("synth", "preprocess", "inspect", "train", "evaluate")
    order = [text.index(f"{number}  {name}") for number, name in enumerate(names, 1)]
    assert order == sorted(order)
    assert "speaking AP" in text
    assert "free-running" in text
    assert report.metrics["teacher-forced"]["speaking"]["frames"]["positives"] > 0
    picture = (out / "learned.svg").read_text()
    assert picture.startswith("<svg")
    assert "data:image/png;base64" in picture
    assert "http" not in picture.replace("http://www.w3.org/", "")
    manifest = json.loads((out / "data/manifest.json").read_text())
    assert (manifest["hazards"], manifest["inputs"][0]["frame_convention"]) == ([], "event")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("train", "{data}", "--run", "{data}"), 1, "not empty"),
        (("train", "{data}", "--run", "new", "--max-tokens", "100000"), 1, "8192"),
        (("evaluate", "{raw}", "{data}"), 1, "run"),
        (("evaluate", "{data}", "--scores", "nosuch.parquet"), 1, "nosuch.parquet"),
        (("evaluate", "{run}", "{data}", "--split", "dev"), 1, "test, train, val"),
        (("benchmark", "{data}", "--out", "new", "--rungs", "loud"), 1, "expected one of metronome, history"),
        (("benchmark", "{data}", "--out", "new", "--stepz", "1"), 2, "--stepz"),
        (("inspect", "{raw}"), 1, "manifest.json"),
        (("nosuch",), 2, "nosuch"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(made, tmp_path, monkeypatch, capsys, arguments, status, says):
    monkeypatch.chdir(tmp_path)
    places = {name: str(made[0] / name) for name in ("raw", "data", "run")}
    assert run(*(argument.format(**places) for argument in arguments)) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error


def test_a_file_named_test_never_becomes_training_data(tmp_path, capsys):
    root = Path(__file__).parents[1]
    shutil.copy(root / "data/train_sample.json", tmp_path / "test_training.json")
    assert run("preprocess", tmp_path / "test_training.json", "--out", tmp_path / "data") == 0
    assert run("train", tmp_path / "data", "--run", tmp_path / "run") == 1
    assert "found: test" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from trainer.cli import main; main(['--help']);"
        "print([m for m in ('torch', 'polars', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("[]")


@pytest.mark.slow
def test_both_heads_learn_to_see(tmp_path):
    """A third of the demo's data ranks well already; blind to the frames, the texts alone give under 0.7."""
    raw, data = tmp_path / "raw", tmp_path / "data"
    synth(raw, SynthConfig(recordings={"train": 90, "val": 10}, views=1, px=32))
    assert run("preprocess", raw, "--out", data, "--frames-root", raw) == 0
    more = ("--model", "nano", "--optimizer", "muon", "--lr", "4e-3", "--steps", 100, "--clips-per-step", 10)
    assert run("train", data, "--run", tmp_path / "run", *more, "--warmup-steps", 20) == 0
    lines = [json.loads(line) for line in Path(tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = lines[-1]["evaluation"]
    assert min(found["speaking"]["ap"], found["dst_update"]["ap"]) > 0.9
