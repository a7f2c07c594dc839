"""What precompute would do, without doing it: its settings, inputs, and whether its output is up to date. Light."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.weights import digest, locate

if TYPE_CHECKING:
    from pipeline.config import Config

MANIFEST = "manifest.json"
ELSEWHERE = (
    "name",
    "path",
    "revision",
    "local_files_only",
    "splits",
    "device",
)  # decided by weights, split, device kind


def settings(cfg: TeacherConfig, device: str) -> dict[str, Any]:
    """Everything that decides the bytes of the maps, apart from the examples.

    Args:
        device: the kind that computes them, `cpu` or `cuda`.

    Raises:
        UserError: the teacher's weights are not there.
    """
    chosen = {name: value for name, value in asdict(cfg).items() if name not in ELSEWHERE}
    return {**chosen, "device": device, "weights": digest(locate(cfg))}


def inputs(cfg: "Config", split: str) -> dict[str, str]:
    """The manifest of the split's examples.

    Raises:
        UserError: there are no such examples.
    """
    path = examples_manifest(cfg, split)
    if not path.exists():
        raise UserError(
            f"data '{cfg.data.name}' has no split '{split}' in {path.parent.parent}: run `make shard` first"
        )
    return {"examples": receipts.load(path).digest}


def examples_manifest(cfg: "Config", split: str) -> Path:
    """The receipt that closes the examples of a split."""
    return Layout(cfg).examples_dir(split) / MANIFEST


def manifest(cfg: "Config", split: str) -> Path:
    """The receipt that closes the maps of a split."""
    return Layout(cfg).maps_split_dir(split) / MANIFEST


def up_to_date(cfg: "Config") -> bool:
    """Whether every split of `teacher.splits` has maps, whole and made with these settings (a quick check).

    With `teacher.device=auto` maps of either kind of device will do.

    Raises:
        Stale: they were made with other settings (unless `cfg.overwrite`).
        UserError: the teacher's weights are not there.
    """
    for split in cfg.teacher.splits:
        path = manifest(cfg, split)
        if not path.exists() or not examples_manifest(cfg, split).exists():
            return False
        try:
            recorded = receipts.load(path).settings.get("device", "cpu")
        except receipts.Damaged:
            return False
        device = recorded if cfg.teacher.device == "auto" else cfg.teacher.device
        wanted = {**settings(cfg.teacher, device), "split": split}
        if not receipts.is_current(path, wanted, inputs(cfg, split), overwrite=cfg.overwrite):
            return False
    return True
