"""What all tests share. Each test runs offline, on one thread, in a directory of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import chromium  # noqa: F401 (a fixture of all modules)

# Before anything imports torch: several threads would change the last bits of sums and fight for the cores.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def command() -> Command:
    """`command("shard", "data=world", ..., cwd=...)` runs `python -m stages.shard data=world ...` as a user would."""

    def call(stage: str, *overrides: str, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        argv = [sys.executable, "-m", f"stages.{stage}", *overrides]
        return subprocess.run(
            argv, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )

    return call


# A world and a training so small that the whole chain takes a minute; the models are the bundled ones.
SMALL = (
    "data.sizes={train: 24, val: 8, test: 12, ood_pairs: 6, ood_count: 6, ood_background: 6}",
    "data.shard_size=10",
    "train.steps=6",
    "train.batch_size=4",
    "train.micro_batch=4",
    "train.checkpoint_every=3",
    "eval.limit=20",
)


@pytest.fixture(scope="session")
def small_world(command, tmp_path_factory) -> Path:
    """A directory in which the shard stage has run with the settings SMALL. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("world")
    result = command("shard", *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder
