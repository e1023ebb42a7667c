"""preprocess, train and encode under kill -9, full disks, flipped bytes and garbage. Nothing may be lost: what lies
there afterwards is complete, an error is one line that names a file, and the next run does the work, bit for bit.

Outputs hold absolute paths, so the world that commands work on is put back at the same place before each attempt.
`just torture` tries more: PROSPECT_DST_TORTURE times as many attempts, each a function of its seed."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.options import Options
from pipeline.preprocess import preprocess

CONTEXT = multiprocessing.get_context("forkserver")
TIMES = int(os.environ.get("PROSPECT_DST_TORTURE", "1"))
SAMPLE = Path(__file__).resolve().parents[2] / "data" / "train_sample.json"
SYNTH = "synth raw --train 3 --val 1 --test 1 --seed 3"
FEW = "--steps 3 --clips-per-step 2 --max-tokens 400 --workers 0 --eval-every 2 --save-every 1"
COMMANDS = {  # name -> what it runs; its output is the folder of the same name
    "labels": "preprocess raw --out labels --frames-root raw",
    "run": f"train labels --run run --model nano {FEW} --resume",
    "features": "encode labels --model run/last --out features",
    "frozen": "train labels --run frozen --model run/last --features features --freeze vision --steps 1 --workers 0",
}
HERE = {"labels": "--workers 1"}  # undisturbed it needs no processes, which import for seconds
FOLDERS = ["raw", *COMMANDS]  # each is made from those before it


def _child(command: str, folder: Path, err: Path, max_file_size: int | None) -> None:
    os.chdir(folder)
    for path, handle in ((os.devnull, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), handle)
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    from trainer.cli import main

    status = main(command.split())
    sys.stderr.flush()
    os._exit(status)


class World:
    """The outputs lie in `root`/here while they are worked on, and in `root`/kept as they were built."""

    def __init__(self, root: Path):
        self.root, self.here, self.kept = root, root / "here", root / "kept"
        self.here.mkdir()
        assert self.command(SYNTH) == ""
        self.seconds, self.results = {}, {}  # of each command, undisturbed
        for name, command in COMMANDS.items():
            began = time.monotonic()
            assert self.command(command) == ""
            self.seconds[name], self.results[name] = time.monotonic() - began, self.result(name)
        shutil.copytree(self.here, self.kept)

    def restore(self, name: str) -> None:
        """What the command needs, as it was built, and nothing else."""
        shutil.rmtree(self.here)
        for folder in FOLDERS[: FOLDERS.index(name)]:
            shutil.copytree(self.kept / folder, self.here / folder)

    def command(self, command: str, kill_after: float | None = None, max_file_size: int | None = None) -> str:
        """The line of error ("": none) of `prospect-dst COMMAND` in the world; with SIGKILL after so many seconds."""
        err = self.root / "err"
        err.write_text("")
        process = CONTEXT.Process(target=_child, args=(command, self.here, err, max_file_size))
        process.start()
        process.join(kill_after)
        if kill_after is not None:
            process.kill()
        process.join()
        text = err.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.startswith("prospect-dst: ")]
        allowed = (0, 1, 3) if kill_after is None else (0, -signal.SIGKILL)
        assert process.exitcode in allowed, (process.exitcode, text[-2000:])
        assert "Traceback" not in text, text[-2000:]
        assert len(lines) == (process.exitcode == 1), text[-2000:]
        return lines[0] if lines else ""

    def result(self, name: str) -> dict[str, str]:
        """File -> SHA-256 of what a command wrote; of a run its checkpoints."""
        folders = ("last", "best") if name in ("run", "frozen") else (".",)
        paths = [p for folder in folders for p in (self.here / name / folder).rglob("*") if p.is_file()]
        names = {path: path.relative_to(self.here).as_posix() for path in paths}
        return {name: hashlib.sha256(p.read_bytes()).hexdigest() for p, name in names.items() if "/." not in name}

    def finishes(self, name: str) -> None:
        """The command, undisturbed, does what is left to do, with the same result as ever."""
        assert self.command(f"{COMMANDS[name]} {HERE.get(name, '')}") == ""
        assert self.result(name) == self.results[name]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("torture"))


attempts = pytest.mark.parametrize("seed", range(TIMES))
jobs = pytest.mark.parametrize("name", ["labels", "run", "features"])


@pytest.mark.slow
@attempts
@jobs
def test_a_killed_command_leaves_nothing_half_done_and_the_next_finishes(world, name, seed):
    rng = random.Random(f"kill {name} {seed}")
    world.restore(name)
    if name == "labels":  # over an older output
        assert world.command(f"{COMMANDS[name]} --seed 7 {HERE[name]}") == ""
    old = world.result(name)
    world.command(COMMANDS[name], kill_after=rng.uniform(0, world.seconds[name]))
    if name == "labels":
        assert world.result(name) in (old, world.results[name])
    if name == "features":
        assert world.result(name).items() <= world.results[name].items()
    world.finishes(name)


@pytest.mark.slow
@attempts
@jobs
def test_no_room_is_an_error_of_one_line_and_the_next_run_finishes(world, name, seed):
    rng = random.Random(f"disk {name} {seed}")
    world.restore(name)
    largest = max(path.stat().st_size for path in (world.kept / name).rglob("*"))
    message = world.command(COMMANDS[name], max_file_size=rng.randrange(1000, largest))
    assert name in message or message == ""
    world.finishes(name)


DAMAGED = {  # what is damaged, by a command that reads it
    "labels/frames/*/*.parquet": "run",
    "labels/clips/*/*.parquet": "run",
    "run/last/*.safetensors": "features",
    "raw/**/*.arrow": "features",
    "features/**/*.safetensors": "frozen",
}


@pytest.mark.slow
@attempts
@pytest.mark.parametrize("pattern", DAMAGED)
def test_damaged_input_is_named_or_changes_nothing(world, pattern, seed):
    rng, name = random.Random(f"damage {pattern} {seed}"), DAMAGED[pattern]
    world.restore(name)
    path = rng.choice(sorted(world.here.glob(pattern)))
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data[:at] if rng.random() < 0.3 else data)
    message = world.command(COMMANDS[name])
    assert path.stem in message or message == "", at
    if not message and not pattern.endswith(".arrow"):  # other pixels are another input
        assert world.result(name) == world.results[name], (path, at)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside nested lists and dictionaries."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


@settings(max_examples=25 * TIMES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=TIMES == 1)
@given(st.data())
def test_a_clip_with_any_value_anywhere_costs_no_other_clip(data):
    good = json.loads(SAMPLE.read_text())[0]
    bad = copy.deepcopy(good) | {"id": "bad", "video_uid": "another video"}
    *path, last = data.draw(st.sampled_from(places(bad)))
    parent = bad
    for key in path:
        parent = parent[key]
    parent[last] = data.draw(VALUES)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "garbage_train.json"
        file.write_text(json.dumps([bad, good]))
        manifest, _ = preprocess([file], Path(folder) / "out", Options())
    assert manifest["splits"]["train"]["clips"] >= 1
