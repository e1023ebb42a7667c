"""Runs the parts one after the other and keeps their rows: `gpu_run.sh` calls this (README.md says what the parts are).

Each part is a forked process in a session of its own: torch and transformers are imported once for all of them, and a
part that hangs is killed with all that it started. So this process must never touch CUDA: a driver does not survive
a fork. Where forked parts find no working device all the same, they are run as new processes.

Exit status: 0; a smoke run's is 1 where a part failed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "trainer"), str(HERE.parents[1])]

import parts  # noqa: E402
import report  # noqa: E402

PARTS: dict[str, tuple[int, Callable[[], None]]] = {  # name -> (seconds at most, what it does)
    "env": (60, parts.env),
    "tests": (110, parts.tests),
    "parity": (75, parts.parity),
    "step-256M": (100, lambda: parts.steps("256M")),
    "step-2.2B": (90, lambda: parts.steps("2.2B")),
    "hf": (60, parts.hf),
    "encode": (45, parts.encode),
    "live": (80, parts.live),
    "e2e": (120, parts.e2e),
}
DEADLINE = int(os.environ.get("DEADLINE") or 525)  # seconds for all
ENOUGH = 15  # seconds without which no part is begun


def child(name: str) -> int:
    """In the part's own process: its exit status."""
    try:
        PARTS[name][1]()
    except Exception as error:
        traceback.print_exc()
        parts.say(name, "failed", error=f"{type(error).__name__}: {str(error)[:300]}")
        return 1
    return 0


def start(name: str, forks: bool) -> int:
    """The id of a new process, the first of a session of its own."""
    if not forks:
        return subprocess.Popen([sys.executable, __file__, name], start_new_session=True).pid
    pid = os.fork()
    if pid == 0:
        os.setsid()
        status = child(name)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return pid


def run_part(name: str, limit: float, forks: bool) -> bool:
    """Whether it ended by itself, and well, within `limit` seconds."""
    print(f"== {name}: at most {limit:.0f} s", flush=True)
    began = time.monotonic()
    pid, ended, status = start(name, forks), 0, 0
    while not ended and time.monotonic() - began < limit:
        time.sleep(0.05)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    how = f"stopped at its limit of {limit:.0f} s" if not ended else "done" if status == 0 else "failed"
    parts.say(name, "took", seconds=time.monotonic() - began, ended=how)
    return bool(ended) and status == 0


def main() -> int:
    began, forks, failed = time.monotonic(), True, list[str]()
    parts.ROWS.unlink(missing_ok=True)
    chosen = os.environ.get("PARTS", "").split() or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        sys.exit(f"PARTS: {', '.join(sorted(unknown))} not among {', '.join(PARTS)}")
    slower = 5 if parts.SMOKE else 1  # other work shares the machine that a smoke run is on
    if not run_part("env", PARTS["env"][0] * slower, forks):
        forks = False
        run_part("env", PARTS["env"][0] * slower, forks)
    for name in (name for name in chosen if name != "env"):
        left = DEADLINE - (time.monotonic() - began)
        if left < ENOUGH and not parts.SMOKE:
            parts.say(name, "took", seconds=0.0, ended="not begun: no time was left")
        elif not run_part(name, PARTS[name][0] * slower if parts.SMOKE else min(PARTS[name][0], left), forks):
            failed.append(name)
    rows = [json.loads(line) for line in parts.ROWS.read_text().splitlines()]
    text = report.made_of([rows])
    print("\n" + text)
    print(f"== all: {time.monotonic() - began:.0f} s; failed: {', '.join(failed) or 'none'}")
    if not parts.SMOKE:
        (parts.ROWS.parent / "results.md").write_text(text)
    return 1 if failed and parts.SMOKE else 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[1]) if sys.argv[1:] else main())
