"""Commands in processes of their own, and a small finished world (raw, labels, run, features) that they work on.

A process is forked from a server that has torch imported and nothing started, which saves the seconds of importing it
each time; the command is otherwise the real one. Outputs hold absolute paths, so the world is put back at the same
place before each attempt.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
TINY = [
    *("--model", "nano", "--steps", "3", "--clips-per-step", "2"),
    *("--max-tokens", "400", "--workers", "0", "--eval-every", "2"),
]
PREPROCESS = ["preprocess", "raw", "--out", "labels", "--frames-root", "raw"]
COMMANDS = {  # name -> what it runs; its output is the folder of the same name
    "labels": PREPROCESS,
    "run": ["train", "labels", "--run", "run", *TINY, "--save-every", "1", "--resume"],
    "features": ["encode", "labels", "--model", "run/last", "--out", "features"],
}
INPUTS = {"labels": ["raw"], "run": ["raw", "labels"], "features": ["raw", "labels", "run"]}


@dataclass(frozen=True)
class Ran:
    """What became of a command: `status` is negative for a signal."""

    status: int
    err: str
    seconds: float

    @property
    def message(self) -> str:
        """The one line of error; fails where the command did not end as it should: done, or refused in one line."""
        lines = [line for line in self.err.splitlines() if line.startswith("prospect-dst: ")]
        assert self.status in (0, 1, 3), (self.status, self.err[-2000:])
        assert "Traceback" not in self.err, self.err[-2000:]
        assert "this is a bug" not in self.err, self.err[-2000:]
        assert len(lines) == (self.status == 1), self.err[-2000:]
        return lines[0] if lines else ""


def _child(argv: list[str], folder: str, err: str, max_file_size: int | None) -> None:
    os.chdir(folder)
    for path, handle in ((os.devnull, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), handle)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with the server
    if max_file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))
    import torch

    from trainer.cli import main

    torch.set_num_threads(1)
    status = main(argv)
    sys.stderr.flush()
    os._exit(status)


@dataclass
class Workbench:
    """The world lies in `root`/here while it is worked on, and in `root`/kept as it was built."""

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)  # of each command, undisturbed
    results: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def here(self) -> Path:
        return self.root / "here"

    def build(self) -> None:
        self.here.mkdir()
        assert self.command(["synth", "raw", "--train", "3", "--val", "1", "--test", "1", "--seed", "3"]).status == 0
        self._keep("raw")
        for name, argv in COMMANDS.items():
            ran = self.command(argv)
            assert ran.status == 0, ran.err
            self.seconds[name], self.results[name] = ran.seconds, self.result(name)
            self._keep(name)

    def _keep(self, name: str) -> None:
        shutil.copytree(self.here / name, self.root / "kept" / name)

    def restore(self, *names: str) -> None:
        """Only these folders of the world, as they were built."""
        shutil.rmtree(self.here)
        self.here.mkdir()
        for name in names:
            shutil.copytree(self.root / "kept" / name, self.here / name)

    def command(self, argv: list[str], kill_after: float | None = None, max_file_size: int | None = None) -> Ran:
        """`prospect-dst ARGV` in the world; with SIGKILL after so many seconds, if it still runs then."""
        err, began = self.root / "err", time.monotonic()
        process = CONTEXT.Process(target=_child, args=(argv, str(self.here), str(err), max_file_size))
        process.start()
        process.join(kill_after)
        if kill_after is not None:
            process.kill()
        process.join()
        text = err.read_text(errors="replace") if err.exists() else ""
        err.unlink(missing_ok=True)
        assert process.exitcode is not None
        return Ran(process.exitcode, text, time.monotonic() - began)

    def result(self, name: str, folder: str = "") -> dict[str, str]:
        """File -> SHA-256 of what a command wrote: of a run both checkpoints, and the curve without clock times."""
        out, hashes = self.here / (folder or name), {}
        for path in sorted(out.rglob("*")):
            parts = path.relative_to(out).parts
            wanted = parts[0] in ("last", "best") if name == "run" else not any(part.startswith(".") for part in parts)
            if path.is_file() and wanted:
                hashes["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest()
        if name == "run" and (out / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            hashes["curve"] = json.dumps([{key: line[key] for key in line if key != "clock"} for line in lines])
        return hashes


def damage(rng: random.Random, path: Path) -> str:
    """Flip a bit, zero a stretch, cut the file off, or put other bytes into it; what was done."""
    data = bytearray(path.read_bytes())
    at, how = rng.randrange(len(data)), rng.choice(["flip", "zero", "cut", "replace"])
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    else:
        end = min(len(data), at + 512)
        data[at:end] = bytes(end - at) if how == "zero" else rng.randbytes(end - at)
    path.write_bytes(data)
    return f"{path.name}: {how} at {at}"
