"""Checkpoints to resume from: written in the background, committed by rename, verified in full before use.

A checkpoint is a folder ``checkpoints/<step>/`` with ``state/`` (`torch.distributed.checkpoint`: every process writes
its part) and a receipt with the sha256 of every file. It holds what was trained (adapters alone for LoRA, always the
Aligner), the buffers, the optimizer's state, the step, and what the trackers have summed up since the last logged line.
It holds no random state: everything random in a step is seeded from (seed, step, process). It holds no learning rate:
that is a function of the step. The position in the data is the step.

The same checkpoint loads on another number of processes, plain, under DDP or FSDP2.
"""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.train.metrics import FILE as METRICS

if TYPE_CHECKING:
    from torch import nn

FOLDER = "checkpoints"
STATE = "state"
RECEIPT = "receipt.json"
PARTIAL = ".partial"
WEIGHTS, OPTIMIZER = "model.", "optimizer."
# Settings of training that only decide how a step is computed: a run may go on with others, as after a lack of memory.
FREE = ("micro_batch", "gradient_checkpointing", "logits_mb")
TIMEOUT = timedelta(hours=1)  # of one write: the slowest process's part on slow storage

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Position:
    """Where a run goes on.

    Args:
        path: the checkpoint, or None to begin.
        step: optimizer steps done.
        trackers: what `save` was given.
        damaged: why newer checkpoints were passed over, one line each.
        changed: settings (`FREE`) that are others now, one line each.
    """

    path: Path | None = None
    step: int = 0
    trackers: dict = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one run. Every process makes one and calls the same methods in the same order.

    Args:
        run: the run's directory, on a file system that all processes share.
        settings: what decides the run's numbers; a checkpoint of others is not resumed.
        keep: how many of the newest are kept, besides the best.
        model: what is trained, not wrapped in DDP; FSDP2 works in place.
        optimizer: over the trained parameters of ``model``. They alone are saved: also those that are frozen for the
            moment, for they may have been trained before.
    """

    def __init__(self, run: Path, settings: dict, keep: int, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.run, self.settings, self.keep = run, settings, keep
        self.model, self.optimizer = model, getattr(optimizer, "optimizer", optimizer)
        # A group of its own: a write in the background must not meet the training's own collectives.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        self._main = self._group is None or dist.get_rank() == 0
        gpu = torch.cuda.is_available()
        # One for all saves: the copy goes to the same (pinned) memory each time.
        self._stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, trackers: dict | None = None, heldout: float | None = None) -> None:
        """Copies the state and returns; files, receipt and rename follow in the background.

        Waits for the one before, if that is still being written.

        Args:
            step: optimizer steps done.
            trackers: anything that JSON holds.
            heldout: the loss on held-out examples; the checkpoint with the lowest is kept.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        started = time.monotonic()
        partial = self.run / FOLDER / f"{step:08d}{PARTIAL}"
        if self._main:
            shutil.rmtree(partial, ignore_errors=True)
        written = dcp.async_save(
            self._weights() | self._moments(),
            storage_writer=dcp.FileSystemWriter(partial / STATE),
            process_group=self._group,
            async_stager=self._stager,
        )
        counts = {"step": step, "trackers": trackers or {}, "heldout": heldout}
        self._writing = self._pool.submit(self._commit, written, partial, counts, started)

    def wait(self) -> None:
        """Returns when nothing is being written on any process.

        Raises:
            UserError: a checkpoint could not be written, on all processes alike.
        """
        if self._writing is None:
            return
        error = None
        try:
            self._writing.result()
        except (OSError, CheckpointException) as failure:
            error = failure
        self._writing = None
        failed = torch.tensor(int(error is not None))
        if self._group is not None:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=self._group)
        if failed:
            reason = _cause(error) if error else "another process could not write its part"
            raise UserError(f"cannot write a checkpoint in {self.run / FOLDER}: {reason}") from error

    def close(self) -> None:
        """`wait`, then lets go of the memory of the copy."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._stager.close()

    def restore(self, overwrite: bool = False) -> Position:
        """Loads the newest checkpoint that verifies in full into model and optimizer; every process the same one.

        Args:
            overwrite: delete checkpoints of a run with other settings instead of refusing.

        Raises:
            Stale: the checkpoints belong to a run with other settings.
            UserError: they were written by an older version, or hold other tensors than are trained.
        """
        position = self._on_main(lambda: newest(self.run, self.settings, overwrite))
        if position.path is None:
            return position
        moments = self._load(position.path, with_moments=True)
        self._take(moments)
        return position

    def restore_best(self) -> Position:
        """Loads the weights of the checkpoint with the lowest held-out loss that verifies in full, and no more.

        Raises:
            UserError: no checkpoint has one.
        """
        position = self._on_main(lambda: chosen(self.run))
        self._load(position.path, with_moments=False)
        return position

    def _load(self, path: Path, with_moments: bool) -> dict[str, torch.Tensor]:
        """Reads weights in place; returns the optimizer's state, if it is asked for."""
        reader = dcp.FileSystemReader(path / STATE)
        stored = reader.read_metadata().state_dict_metadata
        weights = self._weights()
        held = {name for name in stored if name.startswith(WEIGHTS)}
        if held != weights.keys():
            raise UserError(
                f"{path} holds other tensors than are trained: {', '.join(sorted(held ^ weights.keys())[:3])}"
            )
        moments = self._room_for(stored) if with_moments else {}
        dcp.load(weights | moments, storage_reader=reader, process_group=self._group)
        return moments

    # --- what is saved ------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, torch.Tensor]:
        """Trained parameters and all buffers by name, the tensors themselves (parts of them under FSDP2)."""
        state = get_model_state_dict(self.model)  # first: it brings FSDP2 modules back into their parts
        # By parameter, not by key: of tied weights one name is enough, and a frozen one must not come in by the other.
        wanted = {*self._names().values(), *(_plain(name) for name, _ in self.model.named_buffers())}
        return {WEIGHTS + name: tensor for name, tensor in state.items() if name in wanted}

    def _names(self) -> dict[torch.Tensor, str]:
        names = {parameter: _plain(name) for name, parameter in self.model.named_parameters()}
        return {p: names[p] for group in self.optimizer.param_groups for p in group["params"]}

    def _moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state; a parameter that has had no gradient so far has none."""
        names = self._names()
        return {
            f"{OPTIMIZER}{names[parameter]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
        }

    def _room_for(self, stored: dict) -> dict[str, torch.Tensor]:
        """Tensors to read the stored optimizer state into, laid out over processes as the parameters are."""
        parameters = {name: parameter for parameter, name in self._names().items()}
        room = {}
        for name, meta in stored.items():
            if not name.startswith(OPTIMIZER):
                continue
            parameter = parameters.get(name.removeprefix(OPTIMIZER).rpartition(".")[0])
            if parameter is None or not isinstance(meta, TensorStorageMetadata):
                raise UserError(
                    f"a checkpoint in {self.run / FOLDER} holds an optimizer's state of another kind: {name}"
                )
            dtype = meta.properties.dtype
            if meta.size == parameter.shape:
                room[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                room[name] = torch.zeros(meta.size, dtype=dtype)
        return room

    def _take(self, moments: dict[str, torch.Tensor]) -> None:
        index = {name: number for number, name in enumerate(self._names().values())}
        state: dict[int, dict] = {}
        for name, value in moments.items():
            parameter, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
            state.setdefault(index[parameter], {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    # --- in the background --------------------------------------------------------------------------------------------

    def _commit(self, written: Future, partial: Path, counts: dict, started: float) -> None:
        """Waits for the files of all processes; the first one then writes the receipt, and removes what is not kept."""
        written.result()
        if not self._main:
            return
        if (metrics := self.run / METRICS).is_file():
            receipts.sync_tree(metrics)  # its lines up to this step are not written again
        receipts.write(
            partial / RECEIPT,
            stage="checkpoint",
            settings=self.settings,
            inputs={},
            files=[partial / STATE],
            counts=counts,
            seconds=time.monotonic() - started,
        )
        receipts.commit_dir(partial, partial.with_suffix(""))
        # Later ones are damaged, else the run would have gone on from them: they must not push out the whole ones.
        paths = [path for path in _found(self.run) if int(path.name) <= counts["step"]]
        kept = {*paths[-self.keep :], best(paths)}
        for path in paths:
            if path not in kept:
                shutil.rmtree(path)

    def _on_main(self, call: Callable[[], Position]) -> Position:
        """The first process's answer, or its error, on all."""
        said: list = [None]
        if self._main:
            try:
                said = [call()]
            except UserError as error:
                said = [error]
        if self._group is not None:
            dist.broadcast_object_list(said, group=self._group)
        if isinstance(said[0], UserError):
            raise said[0]
        return said[0]


def newest(run: Path, settings: dict, overwrite: bool = False) -> Position:
    """The newest checkpoint that verifies in full; what a killed run left half written is removed.

    Raises:
        Stale: the checkpoints belong to a run with other settings (with ``overwrite`` they are deleted).
        UserError: they were written by an older version.
    """
    for left in (run / FOLDER).glob(f"*{PARTIAL}"):
        shutil.rmtree(left)
    damaged = []
    for path in reversed(_found(run)):
        if (path / "trained.safetensors").exists():
            if not overwrite:
                raise UserError(f"{path} was written by an older version: delete {path.parent} or give overwrite=true")
            shutil.rmtree(path)
            continue
        try:
            changed = _changed(receipts.load(path / RECEIPT).settings, settings)
            expected = settings
            if changed:
                kept = {name: value for name, value in settings["train"].items() if name not in changed}
                before = {name: old for name, (old, _) in changed.items() if old is not None}
                expected = settings | {"train": kept | before}
            receipt = receipts.check(path / RECEIPT, settings=expected, full=True)
        except receipts.Damaged as error:
            damaged.append(str(error).removesuffix(": run the stage again"))
            continue
        except receipts.Stale:
            if not overwrite:
                raise
            shutil.rmtree(path)
            continue
        told = tuple(f"train.{name} ({_told(old)} -> {_told(new)})" for name, (old, new) in changed.items())
        return Position(path, receipt.counts["step"], receipt.counts["trackers"], tuple(damaged), told)
    return Position(damaged=tuple(damaged))


def _changed(old: dict, new: dict) -> dict[str, tuple]:
    """Those of `FREE` that differ, with both values; None stands for the default."""
    old, new = old.get("train", {}), new.get("train", {})
    return {name: (old.get(name), new.get(name)) for name in FREE if old.get(name) != new.get(name)}


def _told(value: object) -> str:
    return "default" if value is None else str(value)


def best(paths: list[Path]) -> Path | None:
    """Of these checkpoints the one with the lowest held-out loss; None where none has one. A damaged one has none."""
    return next(iter(_ranked(paths)), None)


def chosen(run: Path) -> Position:
    """The checkpoint with the lowest held-out loss of those that verify in full.

    Raises:
        UserError: there is none.
    """
    damaged = []
    for path in _ranked(_found(run)):
        try:
            receipt = receipts.check(path / RECEIPT, full=True)
        except receipts.Damaged as error:
            damaged.append(str(error).removesuffix(": run the stage again"))
            continue
        return Position(path, receipt.counts["step"], damaged=tuple(damaged))
    why = damaged[0] if damaged else "none was evaluated"
    raise UserError(f"train.choose=best: no whole checkpoint in {run / FOLDER} has a held-out loss: {why}")


def _ranked(paths: list[Path]) -> list[Path]:
    """Those that have a held-out loss, the lowest first; of equal ones the earlier."""
    losses = {}
    for path in paths:
        try:
            loss = receipts.load(path / RECEIPT).counts["heldout"]
        except receipts.Damaged:
            continue
        if loss is not None:
            losses[path] = loss
    return sorted(losses, key=lambda path: (losses[path], path))


def _found(run: Path) -> list[Path]:
    folder = run / FOLDER
    return sorted(p for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _plain(name: str) -> str:
    """A parameter's name without what compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _cause(error: BaseException) -> str:
    """One line of what went wrong where it went wrong."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
