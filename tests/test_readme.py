"""What the README claims is run here: its commands exist, its rows are real, its polars lines work."""

import re
from pathlib import Path

import polars as pl
import pytest

from trainer.cli import app, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("readme") / "labels"
    assert main(["preprocess", str(ROOT / "data"), "--out", str(out)]) == 0
    return out


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_label_rows_are_what_preprocess_writes(sample):
    rows = [line.strip("|").split("|") for line in README.splitlines() if line.startswith("| tea_nusar")]
    shown = {tuple(cell.strip() for cell in row) for row in rows}
    assert len(shown) >= 3
    rows = pl.read_parquet(sample / "frames")
    columns = ["clip_id", "clip", "frame", "time_s", "speaking_label", "dst_update_label"]
    real = {tuple(str(v) for v in row) for row in rows.filter(split="train").select(columns).rows()}
    assert shown <= real


def test_polars_lines_work(sample, monkeypatch):
    monkeypatch.chdir(sample.parent)
    (source,) = (block for block in blocks("python") if "scan_parquet" in block)
    setup, *lines = re.split(r"^# \d\. .*\n", source, flags=re.MULTILINE)
    assert len(lines) == 5
    known: dict = {}
    exec(setup, known)
    results = [eval(line.strip(), known) for line in lines]
    first, timeline, cells, said, kept = (r.collect() if isinstance(r, pl.LazyFrame) else r for r in results)
    assert dict(first.select("split", "speaking_label").rows())["val"] == pytest.approx(0.1)
    assert timeline["frame"].to_list() == list(range(118, 166))
    assert cells["len"].sum() == 186
    assert said["text"].to_list()[0] == "Let's make tea! First, fill the kettle with water."
    assert kept.item() < 0.5


@pytest.mark.slow
def test_commands_work_as_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.demo.RECORDINGS", {"train": 2, "val": 2, "test": 2})
    monkeypatch.setattr("trainer.evaluation.plots.write_figure", lambda stem, make, label: "")  # which takes seconds
    monkeypatch.setattr("trainer.cli.DEFAULT_RUNGS", ("metronome", "speak", "speak+dst"))  # not each of them
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    lines = [line.partition("#")[0].split()[1:] for line in README.splitlines() if line.startswith("prospect-dst ")]
    order = "preprocess inspect synth preprocess train train evaluate evaluate encode train benchmark stream"
    assert [line[0] for line in lines] == order.split()
    small = {
        "synth": ["--train", "2", "--val", "1", "--test", "1"],
        "train": ["--steps", "1"],
        "benchmark": ["--steps", "1", "--seeds", "1", "--minutes", "0", "--jobs", "1"],
    }
    for line in lines:
        assert main([*line, *small.get(line[0], [])]) == 0
    (source,) = (block for block in blocks("python") if "import trainer" in block)
    capsys.readouterr()
    exec(source, {})
    assert capsys.readouterr().out.count("(2, ") == len(pl.read_parquet("made/clips").filter(split="test"))
    assert "tea_nusar" in (tmp_path / "labels.html").read_text()
    assert "(free-running, 2 recordings, 1 seed)" in (tmp_path / "answer/report.html").read_text()


def test_every_command_of_the_readme_exists():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    told = set(re.findall(r"prospect-dst ([a-z]+)", README))
    assert commands == told


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:pipeline|trainer|tests|docs|data|benchmarks)/[\w./]+)`", text)
    named += re.findall(r"\]\(([^)#:]+)\)", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
