"""The engine: order, progress, failures, on threads and on processes."""

import threading
import time

import pytest

from pipeline.engine import EngineConfig, run


def _square(value: int) -> int:
    return value * value


def _slow_first(task: dict) -> dict:
    time.sleep(0.05 if task["n"] == 0 else 0)
    return task


def _fail_at_three(value: int) -> int:
    if value == 3:
        raise ValueError("three")
    return value


def test_threads_keep_the_order_and_report_each_result():
    seen = []
    # dicts and strings that look like keys of a graph must arrive untouched
    tasks = [{"n": n, "task-0": "task-1"} for n in range(6)]
    assert run(EngineConfig(workers=3), _slow_first, tasks, seen.append) == tasks
    assert sorted(task["n"] for task in seen) == list(range(6))


def test_threads_run_at_the_same_time():
    barrier = threading.Barrier(3, timeout=20)
    assert run(EngineConfig(workers=3), lambda _: barrier.wait() >= 0, [0, 1, 2]) == [True] * 3


def test_no_tasks():
    assert run(EngineConfig(), _square, []) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_task_is_raised(workers):
    with pytest.raises(ValueError, match="three"):
        run(EngineConfig(workers=workers), _fail_at_three, list(range(6)))


def test_a_failure_waits_for_running_tasks_and_starts_no_other():
    running = threading.Barrier(2, timeout=20)
    finished, started = [], []

    def task(number: int) -> None:
        started.append(number)
        if number < 2:
            running.wait()
        if number == 0:
            raise ValueError("zero")
        time.sleep(0.3)
        finished.append(number)

    with pytest.raises(ValueError, match="zero"):
        run(EngineConfig(workers=2), task, list(range(8)))
    ended = list(finished)
    time.sleep(0.5)
    assert 1 in ended
    assert ended == finished
    assert sorted(started) == sorted([0, *ended])


@pytest.mark.full
def test_processes_give_the_same_results():
    seen = []
    assert run(EngineConfig(kind="processes", workers=2), _square, list(range(5)), seen.append) == [0, 1, 4, 9, 16]
    assert sorted(seen) == [0, 1, 4, 9, 16]
    with pytest.raises(ValueError, match="three"):
        run(EngineConfig(kind="processes", workers=1), _fail_at_three, list(range(6)))
