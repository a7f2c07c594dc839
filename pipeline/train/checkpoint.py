"""Checkpoints to resume from: trained weights and optimizer state, committed by rename, verified before use."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline import receipts

FOLDER = "checkpoints"


def save(run: Path, step: int, weights: dict[str, torch.Tensor], optimizer: dict, settings: dict, keep: int) -> None:
    """Write ``run/checkpoints/<step>`` and delete all but the newest ``keep``.

    Args:
        run: the run's directory.
        step: optimizer steps done.
        weights: every trained tensor by name.
        optimizer: its ``state_dict``.
        settings: the settings that decide what the run computes; a checkpoint of others is not resumed.
        keep: how many to keep.
    """
    started = time.monotonic()
    final = run / FOLDER / f"{step:08d}"
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, partial / "trained.safetensors"
    )
    torch.save(optimizer, partial / "optimizer.pt")
    files = [partial / "trained.safetensors", partial / "optimizer.pt"]
    receipts.write(
        partial / "receipt.json",
        stage="checkpoint",
        settings=settings,
        inputs={},
        files=files,
        counts={"step": step},
        seconds=time.monotonic() - started,
    )
    receipts.commit_dir(partial, final)
    for old in _found(run)[:-keep]:
        shutil.rmtree(old)


def newest(run: Path, settings: dict, overwrite: bool = False) -> tuple[Path | None, int, list[str]]:
    """The newest checkpoint that verifies in full, its step, and why newer ones were passed over.

    Args:
        overwrite: delete checkpoints of a run with other settings instead of refusing.

    Raises:
        Stale: the checkpoints belong to a run with other settings.
    """
    damaged = []
    for path in reversed(_found(run)):
        try:
            receipts.check(path / "receipt.json", settings=settings, full=True)
        except receipts.Damaged as error:
            damaged.append(str(error))
            continue
        except receipts.Stale:
            if not overwrite:
                raise
            shutil.rmtree(path)
            continue
        return path, int(path.name), damaged
    return None, 0, damaged


def load(path: Path, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint into the trained tensors and the optimizer, in place.

    Raises:
        ValueError: the names of the tensors differ.
    """
    stored = load_file(path / "trained.safetensors")
    if stored.keys() != weights.keys():
        raise ValueError(f"{path} holds other tensors than are trained: {sorted(stored.keys() ^ weights.keys())[:3]}")
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.copy_(stored[name])
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))


def _found(run: Path) -> list[Path]:
    folder = run / FOLDER
    return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
