"""Where parts run: in this process, in a pool, on a Ray that is started here; and what is said without one."""

import math
import os
import secrets
import signal
import sys
from pathlib import Path

import pytest
from made_up import snapshot, toy_clip, turn, written

from pipeline import cluster, extract, shards
from pipeline import preprocess as module
from pipeline.cli import main


@pytest.mark.parametrize("mapper", [cluster.here, cluster.pool(2)])
def test_a_mapper_gives_results_in_the_order_of_the_calls(mapper):
    assert list(mapper(math.isqrt, [(81,), (1,), (16,)])) == [9, 1, 4]
    assert list(mapper(math.isqrt, [])) == []


def import_ray():
    """With the settings that it reads once, when it is imported."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ.update(cluster.SETTINGS | token | os.environ)
    return pytest.importorskip("ray")


def dies_once(function, marker: Path):
    """`function`, but the first process that runs it is killed when everything is written."""

    def deadly(*call):
        result = function(*call)
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return result
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    import_ray().cloudpickle.register_pickle_by_value(sys.modules[__name__])  # not installed where Ray's workers are
    return deadly


@pytest.mark.slow
def test_preprocess_on_ray_writes_the_same_bytes_also_with_workers_killed(tmp_path, monkeypatch, capsys):
    """Four parts of ten clips, of which one is refused."""
    monkeypatch.setattr(module, "PART_CLIPS", 10)
    monkeypatch.chdir(tmp_path)  # paths as a user writes them
    turns = [turn("DST_UPDATE", "S1 start", 6.0, 12, 14), turn("assistant", "Now.", 8.0, 16, 18)]
    clips = [toy_clip(f"c{i}", i % 10, 40, turns) for i in range(40)]
    clips[17] = {"video_uid": "broken"}
    written(tmp_path / "train_x.json", clips)
    assert main(["preprocess", "train_x.json", "--out", "here", "--workers", "1"]) == 3
    monkeypatch.setattr(module, "extract", dies_once(extract.extract, tmp_path / "killed-1"))
    monkeypatch.setattr(module, "write_part", dies_once(shards.write_part, tmp_path / "killed-2"))
    status = main(["preprocess", "train_x.json", "--out", "there", "--ray", "local", "--workers", "2"])
    if "timed out during startup" in (message := capsys.readouterr().err):
        pytest.skip("Ray does not start within its 30 s on a machine as busy as this")
    assert status == 3, message
    assert (tmp_path / "killed-1").exists()
    assert (tmp_path / "killed-2").exists()
    assert snapshot(tmp_path / "there") == snapshot(tmp_path / "here")
    assert len(snapshot(tmp_path / "there")) == 2 * 4 + 4


def test_without_ray_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    source = written(tmp_path / "train_x.json", [toy_clip("c", 0, 9, [])])
    assert main(["preprocess", str(source), "--out", str(tmp_path / "out"), "--ray", "auto"]) == 2
    message = capsys.readouterr().err
    assert "--ray: Ray is not installed; pip install 'prospect-dst[ray]'" in message
    assert message.count("\n") == 1
