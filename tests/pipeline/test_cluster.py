"""A real Ray of several processes, started (`ray start`) and connected to once, and the failures of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline import cluster
from pipeline import preprocess as module
from pipeline.errors import InputError
from pipeline.extract import extract
from pipeline.shards import write_part
from trainer.cli import app, main

CONNECTED = cluster.connected
CLIPS = 40
PARTS = 4


def clip(number: int) -> dict[str, Any]:
    at = {"start_frame": 10 + number, "end_frame": 12 + number, "time": 5.5 + number / 2}
    return {
        "video_uid": f"v{number}",
        "start_frame_idx": number,
        "end_frame_idx": number + 40,
        "dst": [{"id": "S1", "name": "first"}],
        "conversation": [
            {"role": "user", "content": f"question {number}", **at},
            {"role": "DST_UPDATE", "content": "S1->start", **at},
            {"role": "assistant", "content": f"answer {number}", **at},
        ],
    }


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four parts of ten clips, of which one is refused."""
    monkeypatch.setattr(module, "PART_CLIPS", CLIPS // PARTS)
    clips = [clip(number) for number in range(CLIPS)]
    clips[17] = {"video_uid": "broken"}
    path = tmp_path / "train_x.json"
    path.write_text(json.dumps(clips))
    return path


def snapshot(out: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


# ---- the mappers of one machine ----------------------------------------------------------------------


@pytest.mark.parametrize("mapper", [cluster.here, cluster.pool(1), cluster.pool(2)])
def test_a_mapper_gives_results_in_the_order_of_the_calls(mapper: cluster.Mapper) -> None:
    assert list(mapper(math.isqrt, [(81,), (1,), (16,)])) == [9, 1, 4]
    assert list(mapper(math.isqrt, [])) == []


# ---- Ray ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of this machine's with two workers, to which this process is connected: that costs seconds."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    needs_ray()
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        command += ["--num-cpus=2", "--num-gpus=0", "--include-dashboard=false", "--object-store-memory=100000000"]
        command += [f"--temp-dir={folder}", "--disable-usage-stats"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as ray:
            wait_for(port, ray)
            there = f"127.0.0.1:{port}"
            import ray as package

            with cluster.connected(package, there, 0), pytest.MonkeyPatch.context() as patch:
                patch.setattr(cluster, "connected", lambda *_: contextlib.nullcontext())
                yield there
            ray.terminate()


def needs_ray() -> None:
    """With the product's settings, which ray reads once, when it is imported."""
    os.environ.update(cluster.SETTINGS | os.environ)
    pytest.importorskip("ray")


def wait_for(port: int, ray: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert ray.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError("Ray did not start")


def dies_once(function: Callable[..., Any], marker: Path) -> Callable[..., Any]:
    """`function`, but the first process that runs it is killed when everything is written."""

    def deadly(*call: Any) -> Any:
        result = function(*call)
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return result
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    cloudpickle = pytest.importorskip("ray").cloudpickle  # this module is not installed where Ray's workers are
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return deadly


@pytest.mark.slow
def test_preprocess_on_ray_writes_the_same_bytes_also_with_workers_killed(
    source: Path, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # paths as a user writes them
    assert main(["preprocess", source.name, "--out", "here", "--workers", "1"]) == 3
    monkeypatch.setattr(module, "extract", dies_once(extract, tmp_path / "killed-1"))
    monkeypatch.setattr(module, "write_part", dies_once(write_part, tmp_path / "killed-2"))
    assert main(["preprocess", source.name, "--out", "there", "--ray", address]) == 3
    assert (tmp_path / "killed-1").exists()
    assert (tmp_path / "killed-2").exists()
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")
    assert len(snapshot(tmp_path / "there")) == 2 * PARTS + 4


@pytest.mark.slow
def test_a_machine_that_does_not_see_a_file_is_named(tmp_path: Path, address: str) -> None:
    with cluster.ray_cluster(address, tmp_path / "out", [tmp_path / "nowhere"]) as mapper:
        assert mapper is not None
        with pytest.raises(
            InputError, match=rf"--ray: node \S+ does not see {tmp_path}/nowhere; put it on a disk that"
        ):
            list(mapper(math.isqrt, [(81,)]))


# ---- no Ray ------------------------------------------------------------------------------------------


def test_without_ray_one_line_says_how_to_get_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["preprocess", str(source), "--out", str(tmp_path / "out"), "--ray", "auto"]) == 2
    told = capsys.readouterr().err
    assert "--ray: Ray is not installed; pip install 'prospect-dst[ray]'" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("there", "status", "says"),
    [
        ("127.0.0.1:{port}", 1, "Connection refused; start one with `ray start --head`"),
        ("ray://127.0.0.1:{port}", 1, "Connection refused; start one with `ray start --head`"),
        ("nonsense", 2, "expected auto, local, host:port or ray://host:port"),
        ("host:", 2, "expected auto, local, host:port or ray://host:port"),
        (":1", 2, "expected auto, local, host:port or ray://host:port"),
    ],
)
def test_an_address_where_nothing_answers_or_that_is_none_is_one_line(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    there,
    status,
    says,
) -> None:
    needs_ray()
    monkeypatch.setattr(cluster, "connected", CONNECTED)
    there = there.format(port=free_port())
    assert main(["preprocess", str(source), "--out", str(tmp_path / "out"), "--ray", there]) == status
    told = capfd.readouterr().err
    assert f"--ray {there}: " in told
    assert says in told
    assert told.count("\n") == 1


# ---- recipes -----------------------------------------------------------------------------------------

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.sbatch"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_recipe_is_bash_and_its_commands_have_their_options(recipe: Path) -> None:
    subprocess.run(["bash", "-n", recipe], check=True)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    lines = recipe.read_text().replace("\\\n", " ").splitlines()
    used = [match for line in lines if (match := re.search(r"(?:prospect-dst|trainer\.cli) (\w+) (.*)", line))]
    assert used
    for match in used:
        known = {option for parameter in commands[match[1]].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z0-9-]+", match[2])) <= known
