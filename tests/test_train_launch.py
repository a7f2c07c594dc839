"""How training is started: by what is there, and as a job of SLURM."""

import re
import subprocess

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
    assert words[2] == "torch.distributed.run"
    assert "--nproc-per-node=3" in words
    assert launch.command(compose([*WORDS, "train.launch=one"]), WORDS)[2] == "stages.train"
    assert "--nproc-per-node=2" in launch.command(compose([*WORDS, "train.processes=2"]), WORDS)


def test_the_driver_starts_training_that_way_and_other_stages_as_ever(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    work = chain.plan("train", WORDS)
    jobs = {stage: [chain._started(*step) for step in work.steps(stage)] for stage in ("shard", "train")}
    assert jobs["shard"][0].command[1:3] == ["-m", "stages.shard"]
    assert jobs["train"][0].command[1:3] == ["-m", "torch.distributed.run"]
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
