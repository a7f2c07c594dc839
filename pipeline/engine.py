"""How shard and precompute spread their tasks: Dask, on threads, on local processes or on a running scheduler."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")
KINDS = ("threads", "processes", "scheduler")


@dataclass
class EngineConfig:
    """Where tasks run. It never changes what they write.

    Args:
        kind: `threads` of this process, `processes` (a Dask LocalCluster) or a running `scheduler` (e.g. in SLURM).
        workers: threads or processes; 0 takes one per core.
        address: the scheduler's address for `kind=scheduler`, e.g. tcp://node1:8786.
    """

    kind: str = "threads"
    workers: int = 0
    address: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown engine.kind '{self.kind}': choose one of {', '.join(KINDS)}")
        if self.workers < 0:
            raise UserError(f"engine.workers is {self.workers}: give 0 (one per core) or more")
        if self.kind == "scheduler" and not self.address:
            raise UserError("engine.kind=scheduler needs engine.address=tcp://host:port")

    @property
    def worker_count(self) -> int:
        """Workers with 0 resolved to the cores this process may use."""
        return self.workers or cores()


def cores() -> int:
    """Cores this process may run on (a container or `taskset` may allow fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    engine: EngineConfig,
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    done: Callable[[Result], object] | None = None,
) -> list[Result]:
    """Calls `function` on every task and returns the results in the order of `tasks`.

    Args:
        done: called in this process with each result as it arrives, in whatever order (progress, counting).

    The first exception of a task is raised here; tasks already running are waited for, no new one starts.
    """
    done = done or (lambda result: None)
    if not tasks:
        return []
    if engine.kind == "threads":
        return _threads(engine.worker_count, function, tasks, done)
    return _distributed(engine, function, tasks, done)


def _threads(workers: int, function, tasks, done) -> list:
    from dask.callbacks import Callback
    from dask.threaded import get

    watch = _Watch()
    keys = [f"task-{i}" for i in range(len(tasks))]
    # The task travels as an index: Dask would search a dict or list argument for keys of its own graph.
    graph = {key: (lambda i: watch.call(function, tasks[i]), i) for i, key in enumerate(keys)}
    try:
        with Callback(posttask=lambda key, result, *_: done(result)):
            return list(get(graph, keys, num_workers=workers))
    finally:
        # Dask hands an exception on at once, while other threads are still at work (on files, say).
        watch.stop()


class _Watch:
    """Counts the tasks that run and lets no further one start after `stop`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running, self._stopped = 0, False

    def call(self, function: Callable[[Task], Result], task: Task) -> Result | None:
        with self._changed:
            if self._stopped:
                return None  # nobody takes it any more
            self._running += 1
        try:
            return function(task)
        except BaseException:
            with self._changed:
                self._stopped = True
            raise
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def stop(self) -> None:
        """Returns when no task runs any more."""
        with self._changed:
            self._stopped = True
            self._changed.wait_for(lambda: self._running == 0)


def _distributed(engine: EngineConfig, function, tasks, done) -> list:
    from dask.distributed import Client, LocalCluster, as_completed

    def collect(client: Client) -> list:
        futures = client.map(function, tasks, pure=False)
        for future in as_completed(futures):
            done(future.result())
        return [future.result() for future in futures]

    if engine.kind == "scheduler":
        try:
            client = Client(engine.address, timeout=20)
        except OSError as error:
            raise UserError(f"no Dask scheduler answers at {engine.address}: {error}") from error
        with client:
            return collect(client)
    # One thread per process: a worker keeps one model, and the math libraries have threads of their own.
    with (
        LocalCluster(n_workers=engine.worker_count, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        return collect(client)
