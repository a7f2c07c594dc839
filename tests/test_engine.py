"""The engine: order, progress, failures, on threads and on processes."""

import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline import engine
from pipeline.config import compose
from pipeline.engine import EngineConfig, run, slurm_script
from pipeline.errors import UserError


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


# --- tasks and workers that fail now and then ---


def test_what_may_pass_is_tried_again(monkeypatch, capsys):
    monkeypatch.setattr(engine, "PAUSE", 0.01)
    calls = []

    def task(number: int) -> int:
        calls.append(number)
        if calls.count(number) < number:
            raise OSError(errno.EIO, "a disk that fails for a moment")
        return number

    assert run(EngineConfig(workers=1), task, [1, 2, 3]) == [1, 2, 3]
    assert "for a moment: trying again (2 of 2)" in capsys.readouterr().err
    with pytest.raises(OSError, match="for a moment"):
        run(EngineConfig(workers=1), task, [9])
    assert calls.count(9) == engine.ATTEMPTS

    def full(number: int) -> None:
        calls.append("full")
        raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(OSError, match="no space"):
        run(EngineConfig(workers=1), full, [0])
    assert calls.count("full") == 1


@pytest.fixture
def clusters(monkeypatch):
    """Clusters in this process, of as many workers as the list says, one after the other."""
    from dask.distributed import Client, LocalCluster

    sizes = []

    @contextmanager
    def client(_):
        options = {"threads_per_worker": 1, "processes": False, "dashboard_address": None}
        with LocalCluster(n_workers=sizes.pop(0), **options) as cluster, Client(cluster) as found:
            yield found

    monkeypatch.setattr(engine, "_client", client)
    monkeypatch.setattr(engine, "LOOK", 0.1)
    monkeypatch.setitem(engine.PATIENCE, "processes", 0.2)
    return sizes


def test_a_cluster_without_workers_is_replaced(clusters, capsys):
    clusters += [0, 1]
    seen = []
    assert run(EngineConfig(kind="processes"), _square, [1, 2, 3], seen.append) == [1, 4, 9]
    assert sorted(seen) == [1, 4, 9]
    assert "all workers are gone with 3 tasks left" in capsys.readouterr().err


def test_a_running_scheduler():
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        cfg = EngineConfig(kind="scheduler", address=cluster.scheduler_address)
        assert run(cfg, _square, [1, 2, 3]) == [1, 4, 9]


def test_no_workers_at_all_is_one_line(clusters):
    clusters += [0] * engine.CLUSTERS
    with pytest.raises(UserError, match="no worker is left for 3 of 3 tasks"):
        run(EngineConfig(kind="processes"), _square, [1, 2, 3])


def _die_once(mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.name


def _die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.full
def test_tasks_of_a_worker_that_died_are_done_by_another(tmp_path):
    assert run(EngineConfig(kind="processes", workers=2), _die_once, [tmp_path / f"{n}" for n in range(4)]) == list(
        "0123"
    )


@pytest.mark.full
def test_a_task_that_always_ends_its_worker_is_one_line():
    with pytest.raises(UserError, match=r"task 1 of 1 ended its worker|no worker is left"):
        run(EngineConfig(kind="processes", workers=1), _die, [0])


# --- SLURM ------------------------------------------------------------------------------------------------------------


def test_the_script_of_a_slurm_job():
    cfg = compose(
        ["engine=slurm", "engine.workers=4", "engine.queue=gpu", "engine.account=lab", "engine.walltime='02:30:00'",
         "engine.cores=6", "engine.memory=48GB", "engine.directives=['--constraint=a100']",
         "engine.prologue=['module load cuda']", "engine.log_dir=logs"]
    ).engine  # fmt: skip
    script = slurm_script(cfg)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    for wanted in ("-p gpu", "-A lab", "-n 1", "--cpus-per-task=6", "--mem=45G", "-t 02:30:00", "--gres=gpu:1",
                   "--constraint=a100"):  # fmt: skip
        assert wanted in asked
    assert script.startswith("#!")
    lines = script.splitlines()
    worker = next(line for line in lines if "distributed" in line)
    assert worker.startswith(sys.executable)
    assert "tcp://SCHEDULER:PORT" in worker
    assert "--nthreads 1 " in f"{worker} "
    assert "--nworkers" not in worker  # one process
    assert lines.index("module load cuda") < lines.index(worker)
    assert "gres" not in slurm_script(compose(["engine=slurm", "engine.gpus=0"]).engine)


def test_slurm_away_from_a_cluster_is_one_line(monkeypatch):
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="no sbatch here"):
        run(EngineConfig(kind="slurm"), _square, [1])


@pytest.mark.full
@pytest.mark.timeout(120)
def test_workers_that_slurm_starts_do_the_work(tmp_path, monkeypatch):
    """In the place of SLURM: an `sbatch` that runs the submitted script on this machine."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "sbatch").write_text(
        f"#!/bin/bash\ncp $1 {tmp_path}/script.sh\n"
        f"bash {tmp_path}/script.sh >{tmp_path}/log 2>&1 &\necho Submitted batch job 1\n"
    )
    (tools / "scancel").write_text(f"#!/bin/bash\necho $1 >>{tmp_path}/cancelled\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.chdir(tmp_path)
    assert run(EngineConfig(kind="slurm", memory="1GB"), math.factorial, list(range(5))) == [1, 1, 2, 6, 24]
    assert "#SBATCH --gres=gpu:1" in (tmp_path / "script.sh").read_text()
