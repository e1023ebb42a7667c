"""preprocess, train and encode under kill -9, full disks, flipped bytes and garbage. Nothing may be lost: what lies
there afterwards is complete, an error is one line that names a file, and the next run does the work, bit for bit.

`just torture` tries more: PROSPECT_DST_TORTURE times as many attempts, each a function of its seed."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from workbench import COMMANDS, INPUTS, PREPROCESS, Workbench, damage

from pipeline.errors import InputError
from pipeline.options import Options
from pipeline.preprocess import preprocess

TIMES = int(os.environ.get("PROSPECT_DST_TORTURE", "1"))
SAMPLE = Path(__file__).resolve().parents[2] / "data" / "train_sample.json"
attempts = pytest.mark.parametrize("seed", range(TIMES))
jobs = pytest.mark.parametrize("name", COMMANDS)


def finishes(bench: Workbench, name: str) -> None:
    """The command, undisturbed, does what is left to do, with the same result as ever."""
    ran = bench.command(COMMANDS[name])
    assert ran.status == 0, ran.err
    assert bench.result(name) == bench.results[name]


# ---- kill -9 -----------------------------------------------------------------------------------------


@pytest.mark.slow
@attempts
@jobs
def test_a_killed_command_leaves_nothing_half_done_and_the_next_finishes(bench, name, seed):
    rng = random.Random(f"kill {name} {seed}")
    bench.restore(*INPUTS[name])
    old = None
    if name == "labels":  # over an older output
        assert bench.command([*PREPROCESS, "--seed", "7"]).status == 0
        old = bench.result(name)
    for _ in range(1 + TIMES):
        ran = bench.command(COMMANDS[name], kill_after=rng.uniform(0, bench.seconds[name]))
        assert ran.status in (0, -signal.SIGKILL), ran.err
        left = bench.result(name)
        if name == "labels":
            assert left in (old, bench.results[name])
        if name == "features":
            assert left.items() <= bench.results[name].items()
    finishes(bench, name)


# ---- full disks --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes")
@attempts
@jobs
def test_no_room_is_an_error_of_one_line_and_the_next_run_finishes(bench, name, seed):
    rng = random.Random(f"disk {name} {seed}")
    bench.restore(*INPUTS[name])
    sizes = [path.stat().st_size for path in (bench.root / "kept" / name).rglob("*") if path.is_file()]
    ran = bench.command(COMMANDS[name], max_file_size=rng.randrange(1000, max(sizes)))
    if ran.status:
        assert name in ran.message
    finishes(bench, name)


# ---- flipped bytes -----------------------------------------------------------------------------------

READERS = {  # what is damaged, by a command that reads it
    "frames/*/*.parquet": "run",
    "clips/*/*.parquet": "run",
    "last/*.safetensors": "features",
    "*.arrow": "features",
}


@pytest.mark.slow
@attempts
@pytest.mark.parametrize("pattern", READERS)
def test_damaged_input_is_named_or_changes_nothing(bench, pattern, seed):
    rng, name = random.Random(f"flip {pattern} {seed}"), READERS[pattern]
    bench.restore(*INPUTS[name])
    path = rng.choice(sorted(path for folder in INPUTS[name] for path in (bench.here / folder).rglob(pattern)))
    what = damage(rng, path)
    ran = bench.command(COMMANDS[name])
    if ran.message:
        assert path.name in ran.message or path.stem in ran.message, what
    elif pattern != "*.arrow":  # other pixels are another input
        assert bench.result(name) == bench.results[name], what


@pytest.mark.slow
@attempts
def test_damaged_features_are_named_or_change_nothing(bench, seed):
    rng = random.Random(f"features {seed}")
    train = [
        *("train", "labels", "--run", "other", "--model", "run/last", "--features", "features"),
        *("--freeze", "vision", "--steps", "1", "--workers", "0"),
    ]
    bench.restore("raw", "labels", "run", "features")
    assert bench.command(train).status == 0
    expected = bench.result("run", "other")
    bench.restore("raw", "labels", "run", "features")
    path = rng.choice(sorted((bench.here / "features").rglob("*.safetensors")))
    what = damage(rng, path)
    ran = bench.command(train)
    assert path.name in ran.message if ran.message else bench.result("run", "other") == expected, what


# ---- garbage -----------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places(tree: object, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside nested lists and dictionaries."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((*path, key), *places(value, (*path, key)))]


def preprocessed(content: bytes) -> dict | None:
    """The manifest; None where the file was refused as a whole, which must be in one line that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "garbage_train.json"
        path.write_bytes(content)
        try:
            manifest, _ = preprocess([path], Path(folder) / "out", Options())
        except InputError as error:
            message = str(error)
        else:
            return manifest
    assert path.name in message
    assert "\n" not in message
    return None


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
    for clips in ([good, bad], [bad, good]):
        manifest = preprocessed(json.dumps(clips).encode())
        assert manifest is not None
        assert manifest["splits"]["train"]["clips"] >= 1


@settings(max_examples=25 * TIMES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=TIMES == 1)
@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(0, 50))
def test_bytes_put_anywhere_into_a_file_are_read_around_or_refused_in_one_line(junk, at, removed):
    content = SAMPLE.read_bytes()
    preprocessed(content[:at] + junk + content[at + removed :])
