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

AHEAD: Final = 4096  # tasks that wait at the cluster
REACH_S, STOP_S = 10, 10  # until an address answers, until tasks stop
SETTINGS: Final = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_task_oom_retries": "3"}


def available_cores() -> int:
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
    if address != "local" and workers:
        raise UsageError(f"--workers {workers}: the Ray cluster says how many; leave it out")
    os.environ.update(SETTINGS | os.environ)  # ray reads them when it is imported
    try:
        import ray
    except ImportError:
        raise UsageError("--ray: Ray is not installed; pip install 'prospect-dst[ray]', on every machine") from None
    beside = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with contextlib.ExitStack() as stack:
        short = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)  # for sockets' names
        _connect(ray, address, workers, stack.enter_context(short))
        stack.callback(ray.shutdown)
        token = stack.enter_context(tempfile.NamedTemporaryFile(prefix=".prospect-dst-", dir=beside))
        needed = [token.name, *(str(path.absolute()) for path in inputs)]
        # max_calls: a GPU task's process would otherwise end with it, and what it has loaded would be lost
        resources = {"num_cpus": 1, "num_gpus": 1 if gpu and ray.cluster_resources().get("GPU") else 0}
        task = ray.remote(**resources, max_retries=3, max_calls=0)(_run)
        where = (os.getcwd(), version("prospect-dst"), needed)

        def mapped(function: Callable[..., Any], calls: Calls) -> Generator[Any]:
            submitted = (task.remote(where, function, call) for call in calls)
            waiting = deque(islice(submitted, AHEAD))
            try:
                while waiting:
                    yield ray.get(waiting[0])
                    waiting.popleft()
                    waiting.extend(islice(submitted, 1))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:  # of a worker
                reason, _, _ = str(error).partition("\n")
                raise InputError(f"--ray: {reason}; give Ray fewer CPUs if memory ran out, or see its logs") from None
            finally:  # when nothing runs on, what was being written can be removed
                for left in waiting:
                    ray.cancel(left)  # not by force: in Ray 2.60 that aborts this process now and then
                if waiting:
                    ray.wait([*waiting], num_returns=len(waiting), timeout=STOP_S)

        yield mapped


def _connect(ray: Any, address: str, workers: int, empty: str) -> None:
    """ray.init, in a folder without modules: workers import from the folder of this call, never from the user's."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address == "local":
        options |= {"num_cpus": workers or None, "object_store_memory": 256 << 20, "include_dashboard": False}
        options["_temp_dir"] = empty
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host:  # ray.init tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
        with contextlib.chdir(empty):
            ray.init(address, **options)
    except Exception as error:  # ray.init also raises the plain class, where its start takes too long
        expected = "expected local, auto, or the host:port or ray://host:port of a cluster (`ray start --head`)"
        reason, _, _ = str(error).partition("\n")
        raise InputError(f"--ray {address}: {reason}; {expected}") from None


def _run(where: tuple[str, str, list[str]], function: Callable[..., Any], call: Sequence[Any]) -> Any:
    """On any machine: function(*call), if that machine sees the same files and has the same version installed."""
    folder, expected, needed = where
    node = f"--ray: node {socket.gethostname()}"
    if unseen := [path for path in needed if not os.path.exists(path)]:
        raise InputError(f"{node} does not see {unseen[0]}; put it on a disk that all machines share")
    if (installed := version("prospect-dst")) != expected:
        raise InputError(f"{node} has prospect-dst {installed}, expected {expected} as here; install the same")
    os.chdir(folder)  # paths mean the same
    return function(*call)
