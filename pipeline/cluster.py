"""Where the parts of a command run: in this process, in a pool of its children, or on a Ray cluster.

A `Mapper` takes a function and its calls, and gives the results in the order of the calls. The function is a pure
function of its call and writes whole files, so where it runs and how often it is tried never changes a byte. Ray gives
other machines and retries; the price is a file system that all of them see and the same installation on each.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from pipeline.errors import InputError, UsageError

Calls = Sequence[tuple[Any, ...]]
Mapper = Callable[[Callable[..., Any], Calls], Generator[Any]]  # (function, calls) -> results; close it to stop

RETRIES: Final = 3  # of a task whose worker or machine died
AHEAD: Final = 4096  # tasks that wait at the cluster
REACH_S, STOP_S, LOOK_S = 10, 10, 5  # until an address answers, tasks stop, a new file is seen on other machines
_START: Final = "start one with `ray start --head`, give its host:port, or use --ray local"
_SETTINGS: Final = {  # before ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_task_oom_retries": str(RETRIES),
}


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
        with ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(os.getpid(),)) as processes:
            try:
                yield from processes.map(function, *zip(*calls, strict=True))
            except BrokenProcessPool:
                raise InputError("a worker was killed (out of memory?); run again with fewer --workers") from None

    return mapped


def _start_worker(parent: int) -> None:
    """A worker ignores Ctrl-C, and ends with the run that started it, also when that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

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
    os.environ.update(_SETTINGS | os.environ)
    if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; ray.init with an address would not
    try:
        import ray
    except ImportError:
        raise UsageError("--ray: Ray is not installed; pip install 'prospect-dst[ray]', on every machine") from None
    folder = os.getcwd()  # paths mean the same in every worker
    with connected(ray, address, workers):
        _check_nodes(ray, address, out, inputs)
        gpus = 1 if gpu and ray.cluster_resources().get("GPU") else 0

        def mapped(function: Callable[..., Any], calls: Calls) -> Generator[Any]:
            # max_calls: a GPU task's process would otherwise end with it, and what it has loaded would be lost
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES, max_calls=0)(_run)
            coming = (task.remote(folder, function, call) for call in calls)
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
                    ray.wait(list(waiting), num_returns=len(waiting), timeout=STOP_S)

        yield mapped


def _run(folder: str, function: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    os.chdir(folder)
    return function(*call)


@contextlib.contextmanager
def connected(ray: Any, address: str, workers: int) -> Iterator[None]:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as empty:  # short: sockets
        if address == "local":  # what the object store can't hold goes to its folder
            options |= {"num_cpus": workers or None, "include_dashboard": False, "_temp_dir": empty}
            options |= {"object_store_memory": 256 << 20}
        elif workers:
            raise UsageError(f"--workers {workers}: the Ray cluster says how many; leave it out")
        elif not re.fullmatch(r"auto|(ray://)?[^/]+:\d+", address):
            raise UsageError(f"--ray {address}: expected auto, local, host:port or ray://host:port")
        try:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if port.isdigit():  # ray.init tries for minutes
                socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
            with contextlib.chdir(empty):  # workers import from the folder of this call: never from the user's
                ray.init(address, **options)
        except (OSError, OverflowError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise InputError(f"--ray {address}: {_line(error)}; {_START}") from None
        try:
            yield
        finally:
            ray.shutdown()


def _check_nodes(ray: Any, address: str, out: Path, inputs: Sequence[Path]) -> None:
    """InputError unless every machine that would work sees the same files, and runs the same version."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    beside = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    with tempfile.NamedTemporaryFile(prefix=".prospect-dst-", dir=beside) as token:
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if not nodes:
            raise InputError(f"--ray {address}: no machine with a CPU there; `ray start --address ...` on some")
        asked = (os.getcwd(), [token.name, *map(str, inputs)], version("prospect-dst"))
        where = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
        looks = [ray.remote(num_cpus=0)(_look).options(scheduling_strategy=node).remote(*asked) for node in where]
        for node, look in zip(nodes, looks, strict=True):
            if wrong := _result(ray, look):
                raise InputError(f"--ray: node {node['NodeManagerHostname']} {wrong}")


def _look(folder: str, paths: list[str], expected: str) -> str | None:
    """On a node: what is wrong there, if anything."""
    until = time.monotonic() + LOOK_S
    while not os.path.exists(paths[0]) and time.monotonic() < until:
        time.sleep(0.1)
    for path in (os.path.join(folder, path) for path in paths):
        if not os.path.exists(path):
            there = os.path.dirname(path) if path.endswith(paths[0]) else path
            return f"does not see {there}; put it on a disk that all machines share"
    if (there := version("prospect-dst")) != expected:
        return f"has prospect-dst {there}, expected {expected} as here; install the same"
    return None


def _result(ray: Any, task: Any) -> Any:
    """A task's result. What the function raised is raised here; what befell its worker is an InputError."""
    kinds = ray.exceptions
    try:
        return ray.get(task)
    except kinds.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise InputError(f"--ray: a task failed: {_line(error)}") from None
    except (kinds.WorkerCrashedError, kinds.OutOfMemoryError, kinds.NodeDiedError):
        what = f"workers were killed {RETRIES + 1} times at the same part (out of memory?)"
        raise InputError(f"--ray: {what}; give Ray fewer CPUs, or machines with more memory") from None
    except kinds.RayError as error:
        raise InputError(f"--ray: {_line(error)}; see the cluster's logs, then run again") from None


def _line(error: BaseException) -> str:
    """The first sentence of what Ray says, which may be a page."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__
