"""Where the attacks take place: a small finished world (videos, shards, runs, features, scores, a benchmark), put back
before every attempt at the same absolute path, so that whatever comes out can be compared byte for byte.

Commands run in processes of their own: each is forked off this one, which has torch imported and nothing started, so a
command costs 0.1 s instead of 10 and is otherwise the real thing (its own session, its own `cli.main`, real exit
statuses and signals). What it trades: the forked command's imports cannot fail.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PEAK_MB = 2_500  # resident memory of one command: torch and this world take 500
ADDRESS_GB = 12  # address space beyond what the parent has: torch and Arrow reserve a lot
MORE_S = 10.0  # in which processes of a command that ended must be gone
SLOW = 6  # a command may take so many times what it takes undisturbed, and at least LEAST_S
LEAST_S = 45.0

PR_SET_PDEATHSIG, CLONE_NEWNS, MS_REC_PRIVATE = 1, 0x20000, 0x44000
TINY = [
    "--model",
    "nano",
    "--steps",
    "4",
    "--clips-per-step",
    "2",
    "--max-tokens",
    "400",
    "--workers",
    "0",
    "--eval-every",
    "2",
]


@dataclass(frozen=True)
class Ran:
    """What became of a process: `status` is negative for a signal."""

    argv: tuple[str, ...]
    status: int
    out: str
    err: str
    seconds: float
    peak_mb: float
    stopped: bool  # by the signal that was asked for
    hung: bool
    left: int  # processes of its session that outlived it

    @property
    def done(self) -> bool:
        return self.status in (0, 3)

    @property
    def told(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.err.splitlines() if line.startswith("prospect-dst: ")]

    @property
    def words(self) -> str:
        return (self.told or [*self.err.splitlines(), f"status {self.status}"][-1:])[0][:300]


def fault(ran: Ran, names: Iterable[str] = ()) -> str | None:
    """Why the process is a defect whatever its result; None if it did its work or refused as it should.

    names: a refusal must hold one of them.
    """
    command = ran.argv[0]
    if ran.hung:
        return f"{command}: hung, ended after {ran.seconds:.0f} s"
    if ran.left:
        return f"{command}: {ran.left} processes outlived it"
    if ran.peak_mb > PEAK_MB:
        return f"{command}: took {ran.peak_mb:,.0f} MB"
    if ran.stopped and ran.status < 0:
        return None
    if ran.status < 0:
        return f"{command}: died of signal {-ran.status} ({ran.words})"
    if "Traceback (most recent call last)" in ran.err or "this is a bug" in ran.err:
        return f"{command}: {ran.words if ran.told else ran.err.strip().splitlines()[-1]}"
    if ran.done or ran.status in (130, 143):
        return None
    after = ran.err[ran.err.find("prospect-dst: ") :].splitlines()
    if len(ran.told) != 1 or len(after) != 1:
        return f"{command}: {len(after)} lines of error, expected one: {ran.err.strip()[-300:]!r}"
    wanted = list(names)
    if wanted and not any(name in ran.told[0] for name in wanted):
        return f"{command}: names none of {', '.join(wanted)}: {ran.words}"
    return None


# ---- what came out -----------------------------------------------------------------------------------

Bytes = dict[str, str]  # file -> SHA-256


def digest(folder: Path, keep: Callable[[str], bool] = lambda name: True) -> Bytes:
    """SHA-256 of every file below `folder` but hidden ones (locks, what was staged)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in Path(name).parts) and keep(name):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def curve(run: Path) -> str:
    """What a run logged, but the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.dumps([{k: v for k, v in line.items() if k != "clock"} for line in lines])


def of_run(run: Path) -> Bytes:
    """A training's result: both checkpoints (the optimizer's state with it) and the curve."""
    return digest(run, lambda name: name.startswith(("last/", "best/"))) | {"curve": curve(run)}


def of_scores(folder: Path) -> Bytes:
    return digest(folder, lambda name: name.endswith((".parquet", "metrics.json")))


def of_benchmark(out: Path) -> Bytes:
    tables = digest(out, lambda name: name.endswith((".parquet", "scores/metrics.json")))
    runs = [path for path in (out / "runs").glob("*/seed-*") if path.is_dir()]
    return tables | {str(run.relative_to(out)): json.dumps(of_run(run)) for run in sorted(runs)}


@dataclass(frozen=True)
class Job:
    """A command of the world, what it writes, and how its result is taken."""

    argv: tuple[str, ...]
    out: str  # folder below `here`
    result: Callable[[Path], Bytes]
    status: int = 0
    keeps_old: bool = False  # stopped, the old output is still there; else it may be gone, but never half


JOBS: Mapping[str, Job] = {
    "preprocess": Job(
        (*["preprocess", "raw", "--out", "data", "--frames-root", "raw", "--workers", "1"],),
        "data",
        digest,
        3,
        keeps_old=True,
    ),
    "train": Job(("train", "data", "--run", "run", *TINY, "--save-every", "1", "--resume"), "run", of_run),
    "encode": Job((*["encode", "data", "--model", "run/last", "--out", "features"],), "features", digest),
    "evaluate": Job((*["evaluate", "run", "data", "--out", "scores"],), "scores", of_scores),
    "benchmark": Job(
        (
            *[
                "benchmark",
                "data",
                "--out",
                "bench",
                "--arms",
                "speak,speak+dst",
                "--seeds",
                "1",
                "--jobs",
                "1",
                "--draws",
                "100",
            ],
            *TINY[:-4],
        ),
        "bench",
        of_benchmark,
    ),
}


# ---- the world ---------------------------------------------------------------------------------------


@dataclass
class Arena:
    """A world below `root`: `here` is what attacks act on, `kept` what it is put back from."""

    root: Path
    sabotage: Callable[[], None] = lambda: None  # run in every forked process before its command (see `proof`)
    seconds: dict[str, float] = field(default_factory=dict)  # of each job, undisturbed
    result: dict[str, Bytes] = field(default_factory=dict)
    commands: int = 0
    can_mount: bool = False
    light: bool = False  # no benchmark, fewer cases an attempt: for the test suite

    @property
    def here(self) -> Path:
        return self.root / "here"

    @property
    def kept(self) -> Path:
        return self.root / "kept"

    def fresh(self, *parts: str) -> None:
        """Put back the named parts of the world (all without names), and nothing else."""
        self.unmount()
        chosen = parts or tuple(sorted(path.name for path in self.kept.iterdir()))
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)
        for part in dict.fromkeys(chosen):
            shutil.copytree(self.kept / part, self.here / part, symlinks=True)

    def keep(self, *parts: str) -> None:
        for part in parts:
            shutil.rmtree(self.kept / part, ignore_errors=True)
            shutil.copytree(self.here / part, self.kept / part)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The product as it is, for what the attacked one is compared with."""
        before, self.sabotage = self.sabotage, lambda: None
        try:
            yield
        finally:
            self.sabotage = before

    def job(self, name: str, **more: object) -> Ran:
        return self.run(*JOBS[name].argv, usual=self.seconds.get(name, 20.0), **more)  # type: ignore[arg-type]

    def outcome(self, name: str) -> Bytes:
        return JOBS[name].result(self.here / JOBS[name].out)

    def run(self, *argv: str, **more: object) -> Ran:
        """`prospect-dst ARGV` in `here`; options as `apart`'s."""
        return self.apart(lambda: _command(list(argv)), argv, **more)  # type: ignore[arg-type]

    def apart(
        self,
        function: Callable[[], int],
        argv: Sequence[str] = ("python",),
        usual: float = 5.0,
        stop: tuple[float, int] | None = None,
        env: Mapping[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
        proceed: Callable[[], None] | None = None,
    ) -> Ran:
        """Run `function` in a process of its own; its return value is the exit status.

        usual: seconds it takes; stop: (after how many seconds, which signal); prepare: in the process, before it;
        proceed: in this process, once it was started (a rival, say).
        """
        self.commands += 1
        folder = self.root / "told"
        folder.mkdir(parents=True, exist_ok=True)
        out, err = folder / f"out-{self.commands}", folder / f"err-{self.commands}"
        for path in (out, err):
            path.touch()
        sys.stdout.flush()
        sys.stderr.flush()
        began = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the process has its own handler
        pid = os.fork()
        if not pid:
            self._child(function, out, err, dict(env or {}), prepare)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            if proceed is not None:
                proceed()
            ended, usage, stopped, hung = _watch(pid, began, stop, max(LEAST_S, SLOW * usual))
        except BaseException:
            _end_session(pid)
            raise
        seconds = time.monotonic() - began
        left = _outlive(pid)
        ran = Ran(
            tuple(argv), os.waitstatus_to_exitcode(ended), _text(out), _text(err), seconds,
            usage.ru_maxrss / 1000, stopped, hung, left,
        )  # fmt: skip
        out.unlink()
        err.unlink()
        return ran

    def _child(
        self, function: Callable[[], int], out: Path, err: Path, env: dict[str, str], prepare: Callable[[], None]
    ) -> None:
        status = 70
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for path, handle in ((os.devnull, 0), (out, 1), (err, 2)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), handle)
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(i, mode, encoding="utf-8", errors="replace") for i, mode in enumerate("rww")
            )
            os.environ.update(env)
            os.chdir(self.here)
            _limit_memory()
            sys.modules["__main__"] = types.ModuleType("__main__")  # a worker that is spawned must not import `run`
            self.sabotage()
            prepare()
            status = function()
            signal.signal(
                signal.SIGINT, signal.SIG_IGN
            )  # a Ctrl-C while torch winds up is told by torch's own callbacks
        except KeyboardInterrupt:
            status = 130
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
            status = 1
        finally:
            with contextlib.suppress(BaseException):
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    # ---- small disks

    def mount(self, name: str, size: int) -> Path:
        """An own disk of `size` bytes at `here/name`."""
        path = self.here / name
        path.mkdir(parents=True, exist_ok=True)
        _mount(path, f"size={max(4096, size)}")
        return path

    def grow(self, name: str) -> None:
        _mount(self.here / name, "remount,size=1g")

    def unmount(self) -> None:
        """Let go of every disk of `mount`."""
        for line in Path("/proc/self/mounts").read_text().splitlines():
            where = line.split()[1]
            if where.startswith(f"{self.root}/"):
                ctypes.CDLL(None).umount2(where.encode(), 2)


def _command(argv: list[str]) -> int:
    from trainer.cli import main

    sys.argv = ["prospect-dst", *argv]
    return main()


def _limit_memory() -> None:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = now + (ADDRESS_GB << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _watch(
    pid: int, began: float, stop: tuple[float, int] | None, most: float
) -> tuple[int, resource.struct_rusage, bool, bool]:
    """(wait status, usage, whether it was stopped, whether it hung) of a process, once it has ended."""
    stopped = hung = False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage, stopped, hung
        age = time.monotonic() - began
        if stop is not None and not stopped and age >= stop[0]:
            os.kill(pid, stop[1])
            stopped, most = True, age + LEAST_S
        if age > most and not hung:
            hung = True
            _end_session(pid)
        time.sleep(0.002)


def _in_session(session: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                told = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(told[3]) == session and told[0] != "Z":
                    found.append(int(entry))
    return found


def _end_session(session: int) -> None:
    for pid in _in_session(session):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _outlive(session: int) -> int:
    """Processes of the session that are still there after MORE_S, which are then ended."""
    end = time.monotonic() + MORE_S
    while left := _in_session(session):
        if time.monotonic() > end:
            _end_session(session)
            return len(left)
        time.sleep(0.02)
    return 0


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _mount(path: Path, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = 32 if options.startswith("remount") else 0  # MS_REMOUNT
    told = options.removeprefix("remount,").encode()
    if libc.mount(b"torture", str(path).encode(), b"tmpfs", flags, told):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))


def own_mounts() -> bool:
    """Whether this process may mount; then in a namespace of its own, so that nothing is left, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    return not libc.unshare(CLONE_NEWNS) and not libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None)


# ---- building it -------------------------------------------------------------------------------------


def build(root: Path, light: bool = False) -> Arena:
    """A new world below `root`: every job done once, undisturbed, its result and time noted."""
    arena = Arena(root, light=light)
    arena.can_mount = own_mounts()
    arena.here.mkdir(parents=True)
    _must(arena.run(*["synth", "raw", "--train", "4", "--val", "1", "--test", "1", "--views", "1", "--px", "32"]))
    _spoil_one_clip(arena.here / "raw" / "train_training.json")
    for name, job in JOBS.items():
        if light and name == "benchmark":
            continue
        ran = arena.job(name)
        if ran.status != job.status or fault(ran):
            raise SystemExit(f"undisturbed, {' '.join(ran.argv)} does not work: {ran.words}")
        arena.seconds[name], arena.result[name] = ran.seconds, arena.outcome(name)
    _must(arena.run("train", "data", "--run", "half", *TINY, "--save-every", "1", prepare=_stop_after_two))
    _must(arena.apart(_other_frames))
    arena.keep("raw", "mp4", "png", "half", *(JOBS[name].out for name in arena.result))
    return arena


def _must(ran: Ran) -> None:
    if not ran.done:
        raise SystemExit(f"the world could not be built: {' '.join(ran.argv)}: {ran.err}")


def _spoil_one_clip(path: Path) -> None:
    """Have something in the quarantine."""
    clips = json.loads(path.read_text())
    path.write_text(json.dumps([{**clips[0], "fps": -1, "id": "bad"}, *clips]))


def _stop_after_two() -> None:
    """The training process ends after its second step, as if there was a power cut."""
    import trainer.train

    after = trainer.train._Session.after_step

    def stops(self: object, done: int, line: dict) -> None:
        after(self, done, line)  # type: ignore[arg-type]
        if done == 2:
            os._exit(0)

    trainer.train._Session.after_step = stops  # type: ignore[assignment, method-assign]


def _other_frames() -> int:
    """The videos of raw/ once more: as mp4/frames/NAME.mp4 and as png/frames/NAME/000000.png."""
    import av
    import pyarrow as pa

    from pipeline.media import fit, read_base64

    for source in sorted(Path("raw/frames").glob("*.arrow")):
        with pa.memory_map(str(source)) as file:
            kind = pa.ipc.open_file if source.read_bytes()[:6] == b"ARROW1" else pa.ipc.open_stream
            frames = [fit(read_base64(text), 32) for text in kind(file).read_all()["frame"].to_pylist()]
        _write_images(Path("png/frames") / source.stem, frames)
        path = Path("mp4/frames") / f"{source.stem}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as movie:
            stream = movie.add_stream("mpeg4", rate=2)
            stream.width = stream.height = 32
            for pixels in frames:
                picture = av.VideoFrame.from_ndarray(pixels.transpose(1, 2, 0).copy(), format="rgb24")
                movie.mux(stream.encode(picture))
            movie.mux(stream.encode())
    return 0


def _write_images(folder: Path, frames: Iterable) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for number, pixels in enumerate(frames):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number:06}.png")


def warm() -> None:
    """Import all that a command needs, and start nothing."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    import av
    import sklearn.metrics
    import torch.utils.tensorboard
    import transformers

    import pipeline.preprocess
    import pipeline.synth
    import pipeline.viewer
    import trainer.benchmark
    import trainer.cli
    import trainer.encode
    import trainer.evaluate
    import trainer.train

    pipeline.preprocess.PART_CLIPS = 4  # type: ignore[misc]  # so that this small world has several shards
    _ = av, sklearn, torch, transformers, pipeline, trainer
    assert threading.active_count() == 1


def files(folder: Path, *patterns: str) -> Iterator[Path]:
    """Regular files below `folder` that match, in order."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    yield from sorted(found)
