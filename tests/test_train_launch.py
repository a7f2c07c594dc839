"""How training is started: by what is there, and as a job of SLURM."""

import re
import signal
import subprocess
import time

import pytest

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.train import launch, status
from stages import chain

WORDS = ["data=world", "train.unfreeze=[{step: 3, pattern: 'a b'}]"]


def test_auto_takes_torchrun_where_there_are_several_gpus(monkeypatch):
    cfg = compose(WORDS)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert launch.command(cfg, WORDS)[1:] == ["-m", "stages.train", *WORDS]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "stages.train" in launch.command(cfg, WORDS)[2]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    words = launch.command(cfg, WORDS)
    assert words[2] == "stages.torchrun"
    assert "--nproc-per-node=3" in words
    assert launch.command(compose([*WORDS, "train.launch=one"]), WORDS)[2] == "stages.train"
    assert "--nproc-per-node=2" in launch.command(compose([*WORDS, "train.processes=2"]), WORDS)


def test_the_driver_starts_training_that_way_and_other_stages_as_ever(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    work = chain.plan("train", WORDS)
    jobs = {stage: [chain._started(*step) for step in work.steps(stage)] for stage in ("shard", "train")}
    assert jobs["shard"][0].command[1:3] == ["-m", "stages.shard"]
    assert jobs["train"][0].command[1:3] == ["-m", "stages.torchrun"]
    assert jobs["train"][0].command[-1] == "seed=1"
    # Told to end, training has to finish its step and to save, which takes longer than the driver's and torchrun's own.
    assert jobs["train"][0].grace >= 600 > jobs["shard"][0].grace
    assert f"--shutdown-timeout={launch.GRACE}" in jobs["train"][0].command


def test_a_slurm_script_is_sound_and_asks_for_what_the_settings_say(tmp_path, monkeypatch):
    settings = [
        *WORDS,
        f"runs_dir={tmp_path}/runs",
        "train.launch=slurm",
        "train.nodes=4",
        "engine.gpus=8",
        "engine.queue=gpu",
        "engine.walltime='12:00:00'",
        "engine.directives=['--exclusive']",
        "engine.prologue=['module load cuda']",
    ]
    cfg = compose(settings)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UserError, match="no sbatch here"):
        launch.command(cfg, settings)
    script = status.run_dir(cfg) / launch.SCRIPT
    text = script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.+)$", text, re.M))
    assert (asked["nodes"], asked["gres"], asked["partition"], asked["time"]) == ("4", "gpu:8", "gpu", "12:00:00")
    assert "#SBATCH --exclusive" in text
    assert text.index("module load cuda") < text.index("srun")
    # What srun is given, word by word, as bash reads it.
    stub = 'scontrol() { echo first; }; srun() { printf "%s\\n" "$@"; }; module() { :; }; export -f scontrol\n'
    environment = {
        "SLURM_NNODES": "4",
        "SLURM_JOB_ID": "71234",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "PATH": "/usr/bin:/bin",
    }
    said = subprocess.run(["bash", "-c", stub + text], env=environment, capture_output=True, text=True, check=True)
    words = said.stdout.splitlines()
    assert words[-len(settings) :] == settings
    assert "--nproc-per-node=8" in words
    assert "--nnodes=4" in words
    assert "--rdzv-endpoint=first:31234" in words


def test_a_mistake_of_several_processes_is_one_line(tmp_path):
    script = tmp_path / "mistaken.py"
    script.write_text(
        "import sys\nfrom pipeline.errors import UserError\nfrom stages.cli import guarded\n"
        "def body():\n    raise UserError('as it is')\nsys.exit(guarded(body))\n"
    )
    words = [*launch.TORCHRUN, "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (2, "error: as it is\n")
    script.write_text("import sys\nsys.exit(3)\n")
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and "exitcode  : 3" in done.stderr, "a fault of the program shows where"


def test_processes_told_to_end_have_the_time_to_save(tmp_path):
    script = tmp_path / "saving.py"
    script.write_text(
        "import signal, time\nfrom pathlib import Path\nfrom pipeline.train.preempt import Preemption\n"
        "with Preemption() as preemption:\n"
        f"    Path({str(tmp_path)!r}, 'begun').touch()\n"
        "    while not preemption.asked:\n        time.sleep(0.05)\n"
        f"    Path({str(tmp_path)!r}, 'saved').touch()\n"
    )
    process = subprocess.Popen(
        [*launch.TORCHRUN, "--standalone", "--nproc-per-node=1", str(script)], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=100)
    assert (process.returncode, said) == (128 + signal.SIGTERM, "")
    assert (tmp_path / "saved").exists()
