"""Where the numbers of a run are shown besides `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

    from pipeline.config import Config

# Tracker -> the package it is in.
KNOWN = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check(names: Sequence[str]) -> list[str]:
    """The trackers, which are known and installed.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if name not in KNOWN:
            raise UserError(f"unknown train.trackers '{name}': choose some of {', '.join(KNOWN)}")
        if find_spec(KNOWN[name]) is None:
            raise UserError(f"train.trackers={name} needs its package: pip install {KNOWN[name]}")
    return list(names)


def start(accelerator: Accelerator, cfg: Config, label: str, step: int) -> None:
    """Opens the trackers that the accelerator was made with; call it on all processes.

    Args:
        label: names the run.
        step: where it goes on; what TensorBoard showed after it is taken back, for the run repeats it. The others go on
            with the run of before, and keep what they have of a step.
    """
    own = {
        "tensorboard": {"purge_step": step + 1 if step else 0},
        "wandb": {"name": label, "resume": "allow", "config": asdict(cfg.train)},
        "trackio": {"name": label, "resume": "allow" if step else "never", "config": asdict(cfg.train)},
    }
    if "wandb" in cfg.train.trackers and accelerator.is_main_process:
        own["wandb"]["id"] = _identity(Path(accelerator.project_dir) / "wandb-id", anew=not step)
    wanted = {name: own[name] for name in cfg.train.trackers}
    accelerator.init_trackers(f"{cfg.model.name}-{cfg.data.name}", init_kwargs=wanted)


def _identity(path: Path, anew: bool) -> str:
    """The name under which Weights & Biases knows the run; in a file, so that a resumed process goes on with it."""
    if anew or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")


def show_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """A picture, in every tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":  # accelerate passes on its numbers alone
            import trackio

            tracker.tracker.log({name: trackio.Image(picture)}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({name: [picture]}, step=step)


def flat(line: dict) -> dict[str, float]:
    """A line of metrics as one level of numbers: ``seconds/forward`` and the like."""
    made = {}
    for name, value in line.items():
        if isinstance(value, dict):
            made |= {f"{name}/{part}": number for part, number in value.items()}
        elif name != "step":
            made[name] = value
    return made
