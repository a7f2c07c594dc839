"""What a run trains on and in which order, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from pipeline import receipts
from pipeline.archive.stream import open_plan
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.archive import Archive
    from pipeline.archive.order import BatchPlan
    from pipeline.config import Config
    from pipeline.student.family import Family


def train_plan(
    cfg: Config, archive: Archive, left_out: Sequence[int] = (), lengths: np.ndarray | None = None
) -> BatchPlan:
    """The global batches of a run.

    Args:
        archive: of ``cfg.train.split``.
        left_out: numbers of its examples that are not trained on.
        lengths: (N,) tokens of every example, for ``train.bucket`` and ``train.max_tokens``.

    Raises:
        UserError: weights that do not fit the data.
    """
    train = cfg.train
    weights, parts = _parts(cfg, archive, left_out) if train.weights else (None, None)
    return open_plan(
        [archive],
        seed=cfg.seed,
        batch_size=train.batch_size,
        window=train.window,
        window_bytes=train.window_mb << 20,
        left_out=left_out,
        weights=weights,
        parts=parts,
        lengths=lengths,
        bucket=train.bucket,
        max_tokens=train.max_tokens,
    )


def count_steps(cfg: Config, plan: BatchPlan) -> int:
    """Optimizer steps of the whole run."""
    return cfg.train.steps or plan.steps(cfg.train.epochs * plan.order.total)


def check_weights(cfg: Config) -> None:
    """Refuses weights of other parts than the data set has.

    Raises:
        UserError: with the parts that there are.
    """
    given, known = cfg.train.weights, cfg.data.parts
    if not given:
        return
    if not known:
        raise UserError(f"train.weights: data '{cfg.data.name}' is no mixture of parts (data.parts)")
    if unknown := sorted(given.keys() - known.keys()):
        raise UserError(f"train.weights.{unknown[0]}: data '{cfg.data.name}' has the parts {', '.join(known)}")
    if lacking := [name for name in known if name not in given]:
        raise UserError(f"train.weights has none for the part '{lacking[0]}': give one for each (0 leaves it out)")


def _parts(cfg: Config, archive: Archive, left_out: Sequence[int]) -> tuple[list[float], np.ndarray]:
    """The weights above 0, and (N,) which of them each example has (-1: none)."""
    check_weights(cfg)
    names = [name for name, weight in cfg.train.weights.items() if weight]
    place = {name: number for number, name in enumerate(names)}
    # A mixture calls its inputs by part and id.
    parts = np.array([place.get(one.partition("/")[0], -1) for one in archive.column("id")])
    parts[list(left_out)] = -1
    for name, number in place.items():
        if not (parts == number).any():
            raise UserError(f"train.weights.{name}: split {cfg.train.split} has no example of this part to train on")
    return [cfg.train.weights[name] for name in names], parts


def measure_lengths(archive: Archive, family: Family, file: Path, settings: dict, inputs: dict[str, str]) -> None:
    """Writes the tokens of every example as this student sees it, unless the file is there and still holds.

    Args:
        file: a ``.npy``, (N,) int32; 1 where the student cannot take an example. A receipt stands beside it.
        settings, inputs: whatever else decides them.
    """
    from pipeline.archive import Archive
    from pipeline.progress import Progress
    from pipeline.student.batch import EncodeError

    receipt = file.with_suffix(".json")
    if receipts.is_current(receipt, settings, inputs, overwrite=True):
        return
    # Every document once: no need to hash all images for that, documents are compared with their CRC-32.
    unhashed = Archive(archive.folder, hashed=False)
    status, width, height = (archive.column(name) for name in ("status", "width", "height"))
    lengths_N = np.ones(len(archive), np.int32)
    with Progress("lengths", len(archive), "examples") as progress:
        for number, example in enumerate(unhashed.texts()):
            size = (int(width[number]), int(height[number])) if status[number] == "ok" else None
            with suppress(EncodeError):  # training meets it again and counts it
                lengths_N[number] = family.length(example, size)
            progress.advance(1)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        np.save(out, lengths_N)
    receipts.write(receipt, stage="lengths", settings=settings, inputs=inputs, files=[file])
