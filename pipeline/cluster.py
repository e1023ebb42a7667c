"""Where the parts of a command run: in this process, in a pool of its children, or on a Ray cluster.

A `Mapper` takes a function and its calls, and gives the results in the order of the calls. The function is a pure
function of its call and writes whole files, so where it runs and how often it is tried never changes a byte. Ray gives
other machines and retries; the price is a file system that all of them see and the same installation on each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Final

from pipeline.errors import InputError, UsageError

Calls = Sequence[tuple[Any, ...]]
Mapper = Callable[[Callable[..., Any], Calls], Generator[Any]]  # (function, calls) -> results; close it to stop

RETRIES: Final = 3  # of a task whose worker or machine died
AHEAD: Final = 4096  # tasks that wait at the cluster
REACH_S, STOP_S, LOOK_S = 10, 10, 5  # until an address answers, tasks stop, a new file is seen on other machines
SETTINGS: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_task_oom_retries": "3"}


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def here(function: Callable[..., Any], calls: Calls) -> Generator[Any]:
    """The Mapper that runs everything in this process."""
    for call in calls:
        yield function(*call)


def pool(workers: int) -> Mapper:
    """The Mapper of at most so many processes on this machine."""

    def mapped(function: Callable[..., Any], calls: Calls) -> Generator[Any]:
        count = min(workers, len(calls))
        if count <= 1:
            yield from here(function, calls)
            return
        context = get_context("spawn")  # workers hold no copy of the lock
        with ProcessPoolExecutor(count, context, initializer=_start_worker) as processes:
            try:
                yield from processes.map(function, *zip(*calls, strict=True))
            except BrokenExecutor:
                raise InputError("a worker was killed (out of memory?); run again with fewer --workers") from None

    return mapped


def _start_worker() -> None:
    """A worker ignores Ctrl-C, and ends with the run that started it, also when that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # type: ignore[union-attr]


@contextlib.contextmanager
def ray_cluster(
    address: str | None, out: Path, inputs: Sequence[Path], workers: int = 0, gpu: bool = False
) -> Iterator[Mapper | None]:
    """The Mapper of a Ray cluster: "local" (started here, with `workers` processes; 0: one per core), "auto",
    "host:port" or "ray://host:port"; None where `address` is None. `gpu`: each task has a GPU, if there is any.

    UsageError without ray; InputError where the cluster can't be reached or a machine does not see `out` and `inputs`.
    """
    if address is None:
        yield None
        return
    os.environ.update(SETTINGS | os.environ)  # ray reads them when it is imported
    if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; ray.init with an address would not
    try:
        import ray
    except ImportError:
        raise UsageError("--ray: Ray is not installed; pip install 'prospect-dst[ray]', on every machine") from None
    beside = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with connected(ray, address, workers), tempfile.NamedTemporaryFile(prefix=".prospect-dst-", dir=beside) as token:
        if not (there := ray.cluster_resources()).get("CPU"):
            raise InputError(f"--ray {address}: no machine with a CPU there; `ray start --address ...` on some")
        needed = {str(path): str(path.absolute()) for path in inputs} | {str(beside): token.name}
        # max_calls: a GPU task's process would otherwise end with it, and what it has loaded would be lost
        resources = {"num_cpus": 1, "num_gpus": 1 if gpu and there.get("GPU") else 0}
        task = ray.remote(**resources, max_retries=RETRIES, max_calls=0)(_run)
        where = (os.getcwd(), version("prospect-dst"), needed)

        def mapped(function: Callable[..., Any], calls: Calls) -> Generator[Any]:
            coming = (task.remote(where, function, call) for call in calls)
            waiting = deque(islice(coming, AHEAD))
            try:
                while waiting:
                    yield _result(ray, waiting[0])
                    waiting.popleft()
                    waiting.extend(islice(coming, 1))
            finally:  # when nothing runs on, what was being written can be removed
                for left in waiting:
                    ray.cancel(left)  # not by force: in Ray 2.60 that aborts this process now and then
                if waiting:
                    ray.wait([*waiting], num_returns=len(waiting), timeout=STOP_S)

        yield mapped


@contextlib.contextmanager
def connected(ray: Any, address: str, workers: int) -> Iterator[None]:
    """A connection to the cluster, closed at the end."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    local = {"num_cpus": workers or None, "object_store_memory": 256 << 20, "include_dashboard": False}
    if address != "local" and workers:
        raise UsageError(f"--workers {workers}: the Ray cluster says how many; leave it out")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address not in ("local", "auto") and not (host and port.isdigit()):
        raise UsageError(f"--ray {address}: expected auto, local, host:port or ray://host:port")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as empty:  # short: sockets
        try:
            if port.isdigit():  # ray.init tries for minutes
                socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
            with contextlib.chdir(empty):  # workers import from the folder of this call: never from the user's
                ray.init(address, **options, **(local | {"_temp_dir": empty} if address == "local" else {}))
        except Exception as error:  # ray.init also raises the plain class, where its start takes too long
            start = "start one with `ray start --head`, give its host:port, or use --ray local"
            raise InputError(f"--ray {address}: {_line(error)}; {start}") from None
        try:
            yield
        finally:
            ray.shutdown()


def _run(where: tuple[str, str, dict[str, str]], function: Callable[..., Any], call: Sequence[Any]) -> Any:
    """On any machine: function(*call), if that machine sees the same files and has the same version installed."""
    folder, expected, needed = where
    node, until = f"--ray: node {socket.gethostname()}", time.monotonic() + LOOK_S
    while unseen := [name for name, path in needed.items() if not os.path.exists(path)]:
        if time.monotonic() > until:
            raise InputError(f"{node} does not see {unseen[0]}; put it on a disk that all machines share")
        time.sleep(0.1)
    if (there := version("prospect-dst")) != expected:
        raise InputError(f"{node} has prospect-dst {there}, expected {expected} as here; install the same")
    os.chdir(folder)  # paths mean the same
    return function(*call)


def _result(ray: Any, task: Any) -> Any:
    """A task's result. What the function raised is raised here; what befell its worker is an InputError."""
    advice = "give Ray fewer CPUs if memory ran out, or see the cluster's logs"
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise InputError(f"--ray: {_line(error)}; {advice}") from None


def _line(error: BaseException) -> str:
    """The first sentence of what Ray says, which may be a page."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
