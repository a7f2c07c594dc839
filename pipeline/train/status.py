"""What decides a training run, and whether its receipt still holds. No torch here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config

RECEIPT = "receipt.json"
# Settings of how a run is carried out; they change nothing about what it computes.
RUNTIME = (
    "name",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "workers",
    "max_steps_per_call",
    "hang_timeout",
    "parallel",
    "cpu_offload",
    "launch",
    "trackers",
    "processes",
    "nodes",
    "evaluate_every",
    "overlays",
)


# Settings that came later: at their defaults they do not count, so that runs from before stay good.
LATER = ("logits_mb", "on_nonfinite", "unfreeze", "quantize", "compile", "held_out", "held_out_split", "choose")
LATER += ("window_mb", "weights", "bucket", "max_tokens")


def uses_maps(cfg: Config) -> bool:
    """Whether the arm reads the map store."""
    return cfg.arm.lam > 0 and cfg.arm.targets in ("teacher", "shuffled")


def settings(cfg: Config) -> dict:
    """Every setting that changes the trained weights."""
    train = {key: value for key, value in asdict(cfg.train).items() if key not in RUNTIME}
    if cfg.train.method == "full" or cfg.train.export == "adapter":
        del train["export"]  # as in runs from before there was a choice
    if cfg.train.held_out_split and cfg.train.choose == "last":  # nothing of what is trained depends on them
        train |= {"held_out": 0, "held_out_split": ""}
    if cfg.train.choose == "best":
        train |= {name: getattr(cfg.train, name) for name in ("evaluate_every", "checkpoint_every")}
    default = asdict(type(cfg.train)())
    for key in LATER:
        if train[key] == default[key]:
            del train[key]
    if not uses_maps(cfg) or train["quality"] == default["quality"]:
        del train["quality"]
    if train["lora"]["vision"] is None:
        del train["lora"]["vision"]
    # Where the parts are is not in it: what they hold is among the inputs.
    left_out = ("name", "local_files_only", "parts")
    model = {key: value for key, value in asdict(cfg.model).items() if key not in left_out}
    if cfg.model.weights == "published":  # settings of random weights; runs from before they existed stay good
        del model["weights"], model["size"]
    if not cfg.model.max_pixels:  # as in runs from before there was a limit
        del model["max_pixels"]
    arm = {key: value for key, value in asdict(cfg.arm).items() if key != "name"}
    # Without alignment its settings decide nothing, and plain fine-tuning must not go stale with them.
    align = asdict(cfg.align) if cfg.arm.lam > 0 else None
    return {
        "train": train,
        "model": model,
        "arm": arm if cfg.arm.lam > 0 else {"lam": 0.0},
        "align": align,
        "seed": cfg.seed,
    }


def inputs(cfg: Config) -> dict[str, str]:
    """Digests of what is read: the examples, the maps if the arm aligns with them, and the student's files.

    Raises:
        Damaged: the examples or the maps have no valid receipt.
        UserError: the student's files are not there.
    """
    from pipeline.student.weights import identity

    layout = Layout(cfg)
    found = {
        "examples": receipts.load(layout.examples_dir(cfg.train.split) / "manifest.json").digest,
        "student": identity(cfg.model),
    }
    if cfg.train.held_out_split and cfg.train.choose == "best":
        path = layout.examples_dir(cfg.train.held_out_split) / "manifest.json"
        found["held_out"] = receipts.load(path).digest
    if uses_maps(cfg):
        found["maps"] = receipts.load(layout.maps_split_dir(cfg.train.split) / "manifest.json").digest
    return found


def run_dir(cfg: Config) -> Path:
    """The directory of the run of this arm and seed."""
    return Layout(cfg).run_dir(cfg.arm.name, cfg.seed)


def up_to_date(cfg: Config) -> bool:
    """Whether the run is finished, whole, and made from what is there now.

    Raises:
        Stale: it was made with other settings or inputs.
    """
    receipt = run_dir(cfg) / RECEIPT
    if not receipt.is_file():
        return False
    return receipts.is_current(receipt, settings=settings(cfg), inputs=inputs(cfg), overwrite=cfg.overwrite)
