"""How shard and precompute spread their tasks: Dask, on threads, on local processes, on a running scheduler or on
workers that SLURM starts."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import UserError

if TYPE_CHECKING:
    from dask.distributed import Client

Task = TypeVar("Task")
Result = TypeVar("Result")
KINDS = ("threads", "processes", "scheduler", "slurm")


@dataclass
class EngineConfig:
    """Where tasks run. It never changes what they write.

    Args:
        kind: `threads` of this process, `processes` (a Dask LocalCluster), a running `scheduler`, or `slurm`: workers
            that dask-jobqueue submits as SLURM jobs, one process and one GPU each.
        workers: threads, processes or SLURM jobs; 0 takes one per core (one job for `slurm`).
        address: the scheduler's address for `kind=scheduler`, e.g. tcp://node1:8786.
        queue: SLURM's partition; empty for the default one.
        account: SLURM's account; empty for the user's own.
        walltime: of a SLURM job, HH:MM:SS. A job that runs out of it loses only the shard it was at.
        cores: CPU cores of a SLURM job.
        memory: of a SLURM job.
        gpus: GPUs of a SLURM job; 0 for work on the CPU.
        directives: further #SBATCH lines, without `#SBATCH`.
        prologue: lines of shell that a SLURM job runs before the worker, e.g. `module load cuda`.
        log_dir: folder for the output of SLURM jobs; empty for the current one.
        interface: network interface by which SLURM jobs reach this machine, e.g. ib0; empty for the default.
    """

    kind: str = "threads"
    workers: int = 0
    address: str = ""
    queue: str = ""
    account: str = ""
    walltime: str = "04:00:00"
    cores: int = 8
    memory: str = "32GB"
    gpus: int = 1
    directives: list[str] = field(default_factory=list)
    prologue: list[str] = field(default_factory=list)
    log_dir: str = ""
    interface: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown engine.kind '{self.kind}': choose one of {', '.join(KINDS)}")
        if self.workers < 0:
            raise UserError(f"engine.workers is {self.workers}: give 0 (one per core) or more")
        if self.kind == "scheduler" and not self.address:
            raise UserError("engine.kind=scheduler needs engine.address=tcp://host:port")
        if self.cores < 1 or self.gpus < 0:
            raise UserError("engine.cores must be 1 or more and engine.gpus 0 or more")

    @property
    def worker_count(self) -> int:
        """Workers with 0 resolved to the cores this process may use (one job for `slurm`)."""
        return self.workers or (1 if self.kind == "slurm" else cores())


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
    from dask.distributed import as_completed

    with _client(engine) as client:
        futures = client.map(function, tasks, pure=False)
        for future in as_completed(futures):
            done(future.result())
        return [future.result() for future in futures]


@contextmanager
def _client(engine: EngineConfig) -> Iterator["Client"]:
    from dask.distributed import Client, LocalCluster

    if engine.kind == "scheduler":
        try:
            client = Client(engine.address, timeout=20)
        except OSError as error:
            raise UserError(f"no Dask scheduler answers at {engine.address}: {error}") from error
        with client:
            yield client
        return
    if engine.kind == "slurm":
        if shutil.which("sbatch") is None:
            raise UserError("engine.kind=slurm: there is no sbatch here: start from a login node of the cluster")
        with _jobqueue().SLURMCluster(**_slurm_options(engine)) as cluster, Client(cluster) as client:
            cluster.scale(jobs=engine.worker_count)
            yield client
        return
    # One thread per process: a worker keeps one model, and the math libraries have threads of their own.
    with (
        LocalCluster(n_workers=engine.worker_count, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def slurm_script(engine: EngineConfig) -> str:
    """The script that is submitted for every worker, with the address of a scheduler still to start in it.

    Raises:
        UserError: dask-jobqueue is not installed.
    """
    job = _jobqueue().slurm.SLURMJob(
        scheduler="tcp://SCHEDULER:PORT", name="lavender", protocol="tcp", **_slurm_options(engine)
    )
    return job.job_script()


def _slurm_options(engine: EngineConfig) -> dict[str, Any]:
    """What dask-jobqueue makes a job's script of. One process with one thread, for the reason given above; the other
    cores of the job are for the threads that decode and for the math libraries."""
    directives = [f"--gres=gpu:{engine.gpus}"] if engine.gpus else []
    return {
        "cores": 1,
        "processes": 1,
        "job_cpu": engine.cores,
        "memory": engine.memory,
        "walltime": engine.walltime,
        "queue": engine.queue or None,
        "account": engine.account or None,
        "job_extra_directives": [*directives, *engine.directives],
        "job_script_prologue": list(engine.prologue),
        "log_directory": engine.log_dir or None,
        "interface": engine.interface or None,
    }


def _jobqueue():
    try:
        import dask_jobqueue
    except ImportError as error:
        raise UserError("engine.kind=slurm needs dask-jobqueue: pip install 'lavender-pipeline[slurm]'") from error
    return dask_jobqueue
