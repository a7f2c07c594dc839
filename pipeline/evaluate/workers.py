"""Jobs side by side: one process per device, or per share of the CPU's threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import TYPE_CHECKING

from pipeline.engine import cores
from pipeline.evaluate.shares import Share
from pipeline.evaluate.status import Job

if TYPE_CHECKING:
    from pipeline.config import Config

POLL_SECONDS = 0.3
_state: dict = {}  # of a worker process: its device and the shared counter


def run(cfg: Config, jobs: Sequence[Job], advance: Callable[[int], object]) -> None:
    """Does every job; the first error of one stops the rest and is raised here.

    On GPUs there is a process for each, several for an arm where there are more GPUs than arms; on the CPU
    `eval.workers`, by default one per core, with the cores' threads divided among them: small models gain nothing from
    a second thread.
    """
    devices = _devices(cfg)
    wanted = cfg.eval.workers or (len(devices) if devices[0].startswith("cuda") else min(len(jobs), len(devices)))
    parts = 1 if cfg.eval.suite else wanted // len(jobs)
    if parts > 1:  # more devices than arms: each arm's questions are shared out, then put together
        shares = [(job, Share(part, parts)) for job in jobs if job.arm for part in range(parts)]
        _side_by_side(cfg, shares, devices, min(wanted, len(shares)), advance)
        advance = _silent
    _side_by_side(cfg, [(job, Share()) for job in jobs], devices, min(wanted, len(jobs)), advance)


def _silent(count: int) -> None:
    """What was asked before is not counted again."""


def _side_by_side(
    cfg: Config,
    work: Sequence[tuple[Job, Share]],
    devices: Sequence[str],
    count: int,
    advance: Callable[[int], object],
) -> None:
    if count == 1:
        for job, share in work:
            _call(cfg, job, share, devices[0], advance)
        return
    context = multiprocessing.get_context("spawn")  # a forked child cannot use a GPU, nor trust held locks
    counter, queue = context.Value("q", 0), context.Queue()
    for number in range(count):
        queue.put(devices[number % len(devices)])
    threads = max(1, cores() // count)
    pool = ProcessPoolExecutor(count, context, _start, (queue, counter, threads, os.getpid()))
    seen, waiting = 0, set()
    try:
        with _terminable():
            waiting = {pool.submit(_do, cfg, job, share) for job, share in work}
            while waiting:
                done, waiting = wait(waiting, POLL_SECONDS, return_when="FIRST_EXCEPTION")
                advance(counter.value - seen)
                seen = counter.value
                for future in done:
                    future.result()
    finally:
        children = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        if waiting:  # an error or an interrupt: finished rows are kept, so nothing is lost by stopping
            for child in children:
                child.terminate()
        for child in children:
            child.join(20)


def _devices(cfg: Config) -> list[str]:
    if cfg.eval.device in ("auto", "cuda"):
        import torch

        if torch.cuda.is_available():
            return [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [cfg.eval.device if cfg.eval.device != "auto" else "cpu"] * cores()


def _call(cfg: Config, job: Job, share: Share, device: str, advance: Callable[[int], object]) -> None:
    from pipeline.evaluate import stage

    if share.of > 1:
        stage.evaluate_share(cfg, job.arm, job.seed, share, device, advance)
    elif job.arm:
        stage.evaluate_arm(cfg, job.arm, job.seed, device, advance)
    else:
        stage.evaluate_teacher(cfg, device)


def _start(queue, counter, threads: int, parent: int) -> None:
    """Sets up a worker: its device, its threads, and an end when the parent is gone."""
    import torch

    torch.set_num_threads(threads)
    _state.update(device=queue.get(), counter=counter)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too and decides

    def watch() -> None:
        # A killed parent cannot tell its children; orphans would hold the folders that the next run needs.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(cfg: Config, job: Job, share: Share) -> None:
    counter = _state["counter"]

    def advance(count: int) -> None:
        with counter.get_lock():
            counter.value += count

    _call(cfg, job, share, _state["device"], advance)


class _terminable:
    """While active, SIGTERM is raised as KeyboardInterrupt, so that workers are stopped too (main thread only)."""

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGTERM, self._interrupt)

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.previous)

    @staticmethod
    def _interrupt(*_: object) -> None:
        raise KeyboardInterrupt
