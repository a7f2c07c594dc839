"""The engine: order, progress, failures, on threads and on processes."""

import math
import subprocess
import sys
import threading
import time

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
