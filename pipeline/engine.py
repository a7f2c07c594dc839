"""How shard and precompute spread their tasks: Dask, on threads, on local processes, on a running scheduler or on
workers that SLURM starts."""

import errno
import os
import queue
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import UserError

if TYPE_CHECKING:
    from dask.distributed import Client

Task = TypeVar("Task")
Result = TypeVar("Result")
KINDS = ("threads", "processes", "scheduler", "slurm")
# Failures of a disk or a network that may be gone a moment later.
PASSING = (errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH, errno.EBUSY)
ATTEMPTS = 3  # of a task that fails in such a way
PAUSE = 1.0  # seconds before the second attempt, twice as many before the third
CLUSTERS = 3  # local clusters that may lose all their workers before the stage gives up
# Seconds without a single worker before that is an error; jobs may stand in SLURM's queue for as long as they like.
PATIENCE = {"processes": 60.0, "scheduler": 300.0, "slurm": float("inf")}
LOOK = 5.0  # seconds between two looks at the workers while no result arrives
CLOSING = 30.0  # seconds for a cluster to close


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

    A task that fails as disks and networks do for a moment is tried again, and so is one whose worker process died; so
    tasks must be idempotent. Any other exception of a task is raised here, the first one; tasks already running are
    waited for, no new one starts.

    Raises:
        UserError: a task's worker died each time, or no worker or no scheduler is left.
    """
    done = done or (lambda result: None)
    if not tasks:
        return []
    if engine.kind == "threads":
        return _threads(engine.worker_count, Patient(function), tasks, done)
    return _distributed(engine, Patient(function), tasks, done)


@dataclass(frozen=True)
class Patient:
    """A function that is called again, up to `ATTEMPTS` times, if it fails in a way that may pass."""

    function: Callable

    def __call__(self, task):
        for attempt in range(1, ATTEMPTS):
            try:
                return self.function(task)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                print(f"{error}: trying again ({attempt} of {ATTEMPTS - 1})", file=sys.stderr)
                time.sleep(PAUSE * attempt)
        return self.function(task)


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


class _NoWorkers(Exception):
    """No worker is left to do the tasks."""


def _distributed(engine: EngineConfig, function, tasks, done) -> list:
    results: dict[int, Any] = {}
    for _ in range(CLUSTERS if engine.kind == "processes" else 1):
        try:
            with _client(engine) as client:
                _gather(client, PATIENCE[engine.kind], function, tasks, results, done)
            return [results[number] for number in range(len(tasks))]
        except _NoWorkers:
            print(f"engine: all workers are gone with {len(tasks) - len(results)} tasks left", file=sys.stderr)
    raise UserError(
        f"engine.kind={engine.kind}: no worker is left for {len(tasks) - len(results)} of {len(tasks)} tasks:"
        " see what ended them (memory?), then run again to go on from here"
    )


def _gather(client: "Client", patience: float, function, tasks, results: dict[int, Any], done) -> None:
    """Adds the results of the tasks that have none yet.

    No more tasks are sent than there are workers: Dask blames the death of a worker on every task that was sent to it,
    and gives a task up that was blamed four times, though it may only have stood in line behind others.

    Every wait has an end: Dask does not start a worker again that dies while it is being started (its nanny takes that
    for a failed start and forgets it), and a client without workers would wait for ever.

    Raises:
        _NoWorkers: there has been none for `patience` seconds.
    """
    from dask.distributed import KilledWorker

    arrived: queue.SimpleQueue = queue.SimpleQueue()
    waiting = deque(number for number in range(len(tasks)) if number not in results)
    pending: dict[int, Any] = {}
    seen = time.monotonic()
    while waiting or pending:
        try:
            workers = _workers_of(client)
            while waiting and len(pending) < max(workers, 1):
                number = waiting.popleft()
                pending[number] = client.submit(function, tasks[number], pure=False)
                pending[number].add_done_callback(lambda _, number=number: arrived.put(number))
            number = arrived.get(timeout=LOOK)
            results[number] = pending[number].result(timeout=LOOK)
        except (queue.Empty, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                if pending[number].status == "error":
                    raise  # the task's own
                arrived.put(number)  # the result was lost with its worker and is on its way again
            if workers:
                seen = time.monotonic()
            elif time.monotonic() - seen > patience:
                raise _NoWorkers from error
            continue
        except KilledWorker as error:
            raise UserError(
                f"task {number + 1} of {len(tasks)} ended its worker process again and again (memory?):"
                " give more memory or fewer workers, then run again to go on from here"
            ) from error
        except CancelledError as error:
            raise UserError(
                f"the Dask scheduler is gone with {len(pending) + len(waiting)} of {len(tasks)} tasks left:"
                " start it again, then run again to go on from here"
            ) from error
        seen = time.monotonic()
        del pending[number]
        done(results[number])


def _workers_of(client: "Client") -> int:
    try:
        return sum(client.nthreads().values())
    except OSError as error:
        raise CancelledError("the scheduler does not answer") from error


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
    cluster = LocalCluster(n_workers=engine.worker_count, threads_per_worker=1, dashboard_address=None)
    try:
        with Client(cluster) as client:
            yield client
    finally:
        with suppress(TimeoutError):  # its processes are daemons and end with this one
            cluster.close(timeout=CLOSING)


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
