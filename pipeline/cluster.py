"""Where the parts of a command run: in this process, in a pool of its children, or on a Ray cluster.

A `Mapper` takes a function and its calls, and gives the results in the order of the calls. The function is a pure
function of its call and writes whole files, so where it runs, how often it is tried and what else runs beside it
never changes a byte. Ray gives other machines and tries again what was killed; the price is a file system that
all of them see (checked, node by node, before anything is done) and the same installation on each.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Protocol

from pipeline.errors import InputError, UsageError

Calls = Sequence[tuple[Any, ...]]

RETRIES: Final = 3  # of a task whose worker or machine died
AHEAD: Final = 4096  # tasks that wait at the cluster; bounds what it is told at once
REACH_S: Final = 10  # to find out whether anything answers at an address
STOP_S: Final = 10  # for the tasks of a run that ends early
LOOK_S: Final = 5  # until a new file must be seen on another machine
STORE_BYTES: Final = 256 << 20  # of a Ray started here; what it can't hold goes to its folder
SAME: Final = ("prospect-dst", "numpy", "pyarrow", "msgspec", "pillow", "av", "torch", "transformers")

# Before ray is imported: no reports to its makers, no `uv run` per worker, no endless tries after out-of-memory, and
# no warning about GPUs that are not asked for.
_SETTINGS: Final = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_task_oom_retries": str(RETRIES),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class Mapper(Protocol):
    def __call__(self, function: Callable[..., Any], calls: Calls) -> Generator[Any]:
        """function(*call) of each call, in order. Close it to stop what is still running."""
        ...


def here(function: Callable[..., Any], calls: Calls) -> Generator[Any]:
    """The Mapper that runs everything in this process, as it is asked for."""
    for call in calls:
        yield function(*call)


def pool(workers: int) -> Mapper:
    """The Mapper of at most so many processes on this machine."""

    def mapped(function: Callable[..., Any], calls: Calls) -> Generator[Any]:
        if min(workers, len(calls)) <= 1:
            yield from here(function, calls)
            return
        context = get_context("spawn")  # workers hold no copy of the lock
        count = min(workers, len(calls))
        with ProcessPoolExecutor(count, context, initializer=_die_with, initargs=(os.getpid(),)) as processes:
            try:
                with _uninterrupted():  # workers inherit it: Ctrl-C is this process's business
                    coming = processes.map(function, *zip(*calls, strict=True))
                yield from coming
            except BrokenProcessPool:
                raise InputError("a worker was killed (out of memory?); run again with fewer --workers") from None

    return mapped


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore SIGINT for a moment (signals are the main thread's)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _die_with(parent: int) -> None:
    """A worker ends with the run that started it, also when that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- Ray ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_cluster(
    address: str, out: Path, inputs: Sequence[Path] = (), workers: int = 0, gpu: bool = False
) -> Iterator[Mapper]:
    """The Mapper of a Ray cluster: "local" (started here, with `workers` processes; 0: one per core), "auto",
    "host:port" or "ray://host:port".

    `out` and `inputs` must be seen by every machine of it. `gpu`: a task has a GPU of its own, where the cluster has
    any. Raises UsageError without ray, InputError where the cluster can't be reached or used.
    """
    ray = _imported()
    with _connected(ray, address, workers):
        _check_nodes(ray, address, out, inputs)
        gpus = 1 if gpu and ray.cluster_resources().get("GPU") else 0
        yield _Ray(ray, gpus, os.getcwd())


def _imported() -> Any:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; ray.init with an address would not
    try:
        import grpc
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError("--ray: Ray is not installed; pip install 'prospect-dst[ray]', on every machine") from None
    del grpc  # ray does without; addresses are tried with it
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str, workers: int) -> Iterator[None]:
    quiet = {"log_to_driver": False, "logging_level": "CRITICAL"}
    with contextlib.ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)  # short: sockets
        empty = stack.enter_context(folder)
        if address == "local":
            quiet |= {"num_cpus": workers or None, "include_dashboard": False, "object_store_memory": STORE_BYTES}
            quiet |= {"_temp_dir": empty}
        elif workers:
            raise UsageError(f"--workers {workers}: the Ray cluster says how many; leave it out")
        else:
            _reach(address)
        try:
            with contextlib.chdir(empty):  # workers import from the folder of this call: never from the user's
                ray.init(address, **quiet)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise InputError(f"--ray {address}: {_line(error)}; {_START}") from None
        stack.callback(ray.shutdown)
        yield


_START: Final = "start one with `ray start --head`, give its host:port, or use --ray local"


def _reach(address: str) -> None:
    """InputError unless something like Ray answers there: ray.init tries for minutes, and for 'auto' need not."""
    target = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    target = target.removeprefix("ray://")
    if target == "auto" or os.environ.get("RAY_USE_TLS") == "1":
        return
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--ray {address}: expected auto, local, host:port or ray://host:port")
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACH_S)
        except grpc.FutureTimeoutError:
            raise InputError(f"--ray {address}: no Ray answers there within {REACH_S} s; {_START}") from None


def _check_nodes(ray: Any, address: str, out: Path, inputs: Sequence[Path]) -> None:
    """InputError unless every machine that would work sees the same files, and runs the same versions."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    beside = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    token = beside / f".prospect-dst-{secrets.token_hex(8)}"
    asked = (os.getcwd(), str(token), [str(path) for path in inputs])
    look = ray.remote(num_cpus=0)(_look)
    token.touch()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if not nodes:
            raise InputError(f"--ray {address}: no machine with a CPU there; `ray start --address ...` on some")
        there = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(*asked)
            for node in nodes
        ]
        for node, found in zip(nodes, there, strict=True):
            _check_node(node["NodeManagerHostname"], _got(ray, found))
    finally:
        token.unlink(missing_ok=True)


def _check_node(name: str, found: tuple[str | None, dict[str, str]]) -> None:
    missing, versions = found
    if missing:
        raise InputError(f"--ray: node {name} does not see {missing}; put it on a disk that all machines share")
    for package, expected in _versions().items():
        if versions[package] != expected:
            raise InputError(
                f"--ray: node {name} has {package} {versions[package]}, expected {expected} as here; install the same"
            )


def _look(folder: str, token: str, inputs: list[str]) -> tuple[str | None, dict[str, str]]:
    """On a node: what is missing there, if anything, and the versions."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    until = time.monotonic() + LOOK_S
    while not os.path.exists(token):
        if time.monotonic() > until:
            return os.path.join(folder, os.path.dirname(token)), _versions()
        time.sleep(0.1)
    return next((path for path in inputs if not os.path.exists(path)), None), _versions()


def _versions() -> dict[str, str]:
    """Of everything that a byte of the output may depend on."""
    found = {}
    for package in SAME:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


@dataclass(frozen=True)
class _Ray:
    """The Mapper of a connected cluster."""

    ray: Any
    gpus: int
    folder: str  # this process's: paths mean the same everywhere

    def __call__(self, function: Callable[..., Any], calls: Calls) -> Generator[Any]:
        # max_calls: a GPU task's process would otherwise end with it, and what it has loaded would be lost
        task = self.ray.remote(num_cpus=1, num_gpus=self.gpus, max_retries=RETRIES, max_calls=0)(_run)
        coming = (task.remote(self.folder, function, call) for call in calls)
        waiting = deque(islice(coming, AHEAD))
        try:
            while waiting:
                yield _got(self.ray, waiting[0])
                waiting.popleft()
                waiting.extend(islice(coming, 1))
        finally:
            self._stop(list(waiting))

    def _stop(self, tasks: list[Any]) -> None:
        """Returns when nothing of them runs on, so that what they were writing can be removed."""
        for task in tasks:
            self.ray.cancel(task)  # not by force: in Ray 2.60 that aborts this process now and then
        if tasks:
            self.ray.wait(tasks, num_returns=len(tasks), timeout=STOP_S)


def _run(folder: str, function: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    os.chdir(folder)
    return function(*call)


def _got(ray: Any, task: Any) -> Any:
    """Its result. What the function raised is raised here; what befell its worker is an InputError."""
    told = ray.exceptions
    try:
        return ray.get(task)
    except told.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise InputError(f"--ray: a task failed: {_line(error)}") from None
    except (told.WorkerCrashedError, told.OutOfMemoryError, told.NodeDiedError):
        raise InputError(
            f"--ray: workers were killed {RETRIES + 1} times at the same part (out of memory?); give Ray fewer CPUs "
            f"(ray start --num-cpus), or machines with more memory"
        ) from None
    except told.RayError as error:
        raise InputError(f"--ray: {_line(error)}; see the cluster's logs, then run again") from None


def _line(error: BaseException) -> str:
    """The first sentence of what Ray says, which may be a page."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
