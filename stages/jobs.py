"""Child processes of the driver: one after another with the terminal, or side by side with named output."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from stages.cli import CHILD

POLL_SECONDS = 0.05
GRACE_SECONDS = 20  # for what only ends; a training also has to end its step and to save, see `Job.grace`


@dataclass(frozen=True)
class Job:
    """`python -m stages.<stage> <overrides>`, or the words in `launcher` where it takes more to start it; `name` marks
    its lines when several run at once. Told to end, it is killed after `grace` seconds."""

    stage: str
    name: str
    overrides: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    grace: float = GRACE_SECONDS

    @property
    def command(self) -> list[str]:
        if self.launcher:
            return list(self.launcher)
        return [sys.executable, "-m", f"stages.{self.stage}", *self.overrides]


@dataclass(frozen=True)
class _Running:
    name: str
    grace: float
    process: subprocess.Popen
    relays: list[threading.Thread]


def run(jobs: Sequence[Job], width: int, threads: int) -> int:
    """Runs the jobs, at most `width` at a time, and returns 0 or the first exit code that is not 0.

    Args:
        threads: threads per job for the math libraries; 0 leaves them to choose.

    After a failure no job is started and those still running are asked to stop: every stage goes on from what it
    saved when it is called again.
    """
    environment = os.environ | {CHILD: "1"}
    if threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    waiting, running, code = list(jobs), [], 0
    with _Terminable():
        try:
            while (waiting and not code) or running:
                while waiting and not code and len(running) < width:
                    running.append(_start(waiting.pop(0), environment, shared=len(jobs) > 1))
                for child in [child for child in running if child.process.poll() is not None]:
                    running.remove(child)
                    for relay in child.relays:
                        relay.join()
                    if child.process.returncode and not code:
                        code = _exit_code(child)
                        _stop(running)
                time.sleep(POLL_SECONDS)
        finally:
            _stop(running)
    return code


def _start(job: Job, environment: dict[str, str], shared: bool) -> _Running:
    if not shared:
        return _Running(
            job.name, job.grace, subprocess.Popen(job.command, env=environment, stdin=subprocess.DEVNULL), []
        )
    process = subprocess.Popen(
        job.command,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    pipes = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    relays = [threading.Thread(target=_relay, args=(job.name, *pipe), daemon=True) for pipe in pipes]
    for relay in relays:
        relay.start()
    return _Running(job.name, job.grace, process, relays)


def _relay(name: str, lines: Iterable[str], out: TextIO) -> None:
    for line in lines:
        print(f"[{name}] {line.rstrip()}", file=out, flush=True)


def _stop(running: list[_Running]) -> None:
    """Asks every process to end, and ends those that do not within their grace period."""
    for child in running:
        child.process.terminate()
    began = time.monotonic()
    for child in running:
        try:
            child.process.wait(max(0.1, began + child.grace - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def _exit_code(child: _Running) -> int:
    """The exit code as a shell gives it. A stage tells its own errors; one that was killed could not."""
    returncode = child.process.returncode
    if returncode > 0:
        return returncode
    name = signal.Signals(-returncode).name
    print(f"error: {child.name} was ended by {name}: run the same command again to go on from here", file=sys.stderr)
    return 128 - returncode


class _Terminable:
    """While active, SIGTERM is raised as KeyboardInterrupt, so that the children are stopped too."""

    def __enter__(self) -> None:
        self.previous = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    @staticmethod
    def _interrupt(*_: object) -> None:
        raise KeyboardInterrupt
