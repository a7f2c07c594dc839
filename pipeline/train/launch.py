"""How the processes of a training are started: one here, torchrun over this machine's GPUs, or a SLURM job over nodes.

No torch here: the driver asks before anything heavy is loaded.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.train import status

if TYPE_CHECKING:
    from pipeline.config import Config

SCRIPT = "train.sbatch"
# Seconds that a process told to end has for its step and for saving, before whoever started it kills it.
GRACE = 600
# torchrun's own limit is 30, which is less than a large model's step and checkpoint.
TORCHRUN = (sys.executable, "-m", "stages.torchrun", f"--shutdown-timeout={GRACE}")


def command(cfg: Config, overrides: Sequence[str]) -> list[str]:
    """The words that train these settings, by ``train.launch``; for SLURM its script is written first.

    Raises:
        UserError: SLURM is asked for where there is no ``sbatch``; the message says where the script is.
    """
    kind, count = cfg.train.launch, cfg.train.processes or gpus()
    if kind == "auto":
        kind = "torchrun" if count > 1 else "one"
    if kind == "one" or cfg.dry_run:
        return [sys.executable, "-m", "stages.train", *overrides]
    if kind == "torchrun":
        return [*TORCHRUN, "--standalone", f"--nproc-per-node={max(count, 1)}", "-m", "stages.train", *overrides]
    script = status.run_dir(cfg) / SCRIPT
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(slurm_script(cfg, overrides), encoding="utf-8")
    if shutil.which("sbatch") is None:
        raise UserError(f"train.launch=slurm: there is no sbatch here: submit {script} from a login node")
    return ["sbatch", "--wait", str(script)]  # its exit code is the job's


def gpus() -> int:
    """NVIDIA GPUs that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([one for one in chosen.split(",") if one.strip() not in ("", "-1")])
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia*"))


def slurm_script(cfg: Config, overrides: Sequence[str]) -> str:
    """A job of ``train.nodes`` nodes with the resources of ``engine`` on each, one process per GPU.

    A job that is preempted or comes near its time limit is told by SIGTERM, saves and ends; queued again, it goes on.
    """
    engine, per_node = cfg.engine, cfg.train.processes or max(cfg.engine.gpus, 1)
    options = {
        "job-name": f"lavender-{cfg.arm.name}-{cfg.seed}",
        "nodes": cfg.train.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": engine.cores,
        "mem": engine.memory,
        "time": engine.walltime,
        "partition": engine.queue,
        "account": engine.account,
        "gres": f"gpu:{engine.gpus}" if engine.gpus else "",
        "output": f"{engine.log_dir or status.run_dir(cfg)}/slurm-%j.log",
        "signal": "TERM@120",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value)]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {line}" for line in engine.directives)]
    started = [
        *map(shlex.quote, TORCHRUN),
        '--nnodes="$SLURM_NNODES"',
        f"--nproc-per-node={per_node}",
        '--rdzv-id="$SLURM_JOB_ID"',
        "--rdzv-backend=c10d",
        '--rdzv-endpoint="$first:$port"',
        "-m stages.train",
        *map(shlex.quote, overrides),
    ]
    lines += [
        "set -euo pipefail",
        *engine.prologue,
        f"cd {shlex.quote(str(Path.cwd()))}",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "srun --kill-on-bad-exit=1 " + " \\\n    ".join(started),
    ]
    return "\n".join(lines) + "\n"
