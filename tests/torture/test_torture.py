"""One small attempt of each attack (`just torture` makes hundreds, `just torture --prove` shows that each finds what is
broken on purpose). The regression tests of what they found are beside the modules that had it wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, mounts and reads /proc")


def torture(tmp_path: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of the command, whose world lies below tmp_path."""
    command = [sys.executable, "-m", "tests.torture.run", "--keep", str(tmp_path / "world"), *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONUTF8": "1"}, capture_output=True, text=True, timeout=280
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_one_attempt_of_each_attack_loses_nothing(tmp_path):
    status, told = torture(tmp_path, "--tries", "1", "--seed", "3")
    assert status == 0, told
    rows = dict(re.findall(r"^(\w+) +(\d+) ", told, re.MULTILINE))
    names = ("kill", "corrupt", "reorder", "disk", "frames", "garbage", "examples", "forge", "live", "twice", "odd")
    assert rows == dict.fromkeys(names, "1")
    assert "lost: nothing" in told
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
