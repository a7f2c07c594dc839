"""The finished student as others load it: an adapter or a model directory, reloaded and compared before it counts.

``adapter/`` is loaded by `PeftModel.from_pretrained` on the base that its ``adapter_config.json`` names; ``model/`` by
the model's own ``from_pretrained``. Both hold the processor and a model card. Under FSDP2 the parts are gathered on the
first process, in the memory of its CPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from pipeline.student.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from pipeline.student.batch import StudentBatch
    from pipeline.train.tuned import Tuned

ALIGNER = "aligner.safetensors"
# Largest difference of logits, as a share of the largest logit, between the trained model and the reloaded export:
SAME = 1e-5  # the same weights, precision and device
MERGED = 1e-4  # float32, adapters added into the weights
ROUNDED = 5e-2  # bfloat16 or float16 weights that were merged or rounded, or that ran on another device


class ExportError(RuntimeError):
    """The exported directory, loaded again, computes something else than the trained model."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far its logits are from the trained model's, as a share of the largest."""

    files: list[Path]
    difference: float
    tolerance: float


def export(
    run: Path,
    tuned: Tuned,
    processor,
    base: str,
    dtype: torch.dtype,
    merge: bool,
    batch: StudentBatch,
    reload: Callable[[Path], nn.Module],
    main: bool = True,
) -> Exported | None:
    """Writes ``adapter/`` or ``model/`` and ``aligner.safetensors`` into ``run``. Every process calls it.

    Args:
        tuned: what was trained, not wrapped in DDP; its student is a PEFT model for LoRA. Weights in a finer precision
            than is saved are left rounded to it.
        processor: saved beside the weights.
        base: directory or hub id of the base, for ``adapter_config.json``.
        dtype: of the saved weights of a whole model; an adapter keeps its own.
        merge: adds the adapters into the base and writes a whole model.
        batch: something to compare logits on.
        reload: path -> the model loaded from an export, on the CPU.
        main: whether this process writes; the others only help and get None.

    Raises:
        ExportError: the logits differ by more than the tolerance.
    """
    student = tuned.student
    lora = hasattr(student, "peft_config")
    rounds = not lora and any(p.is_floating_point() and p.dtype != dtype for p in student.parameters())
    student.eval()
    # All this before anything is written: under FSDP2 every process takes part.
    device = next(student.parameters()).device
    sharded = any(hasattr(p, "full_tensor") for p in student.parameters())  # computes in a precision of its own
    state = _gathered(student, only_trained=lora, dtype=dtype if rounds else None)
    if rounds and not sharded:
        # The same rounding as in the file: what is left to compare is the writing and the reading.
        for parameter in student.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    # Trained weights in float32 beside others in half precision only fit together under autocast, as in training.
    mixed = torch.autocast(device.type, dtype, enabled=rounds and sharded and dtype != torch.float32)
    with _whole(tuned), mixed:
        trained = _logits(student, batch)
    aligner = _gathered(tuned.align) or tuned.align.state_dict()
    if not main:
        return None
    for old in ("adapter", "model"):
        shutil.rmtree(run / old, ignore_errors=True)
    folder = run / ("adapter" if lora else "model")
    if lora:
        student.peft_config["default"].base_model_name_or_path = base
    student.save_pretrained(folder, state_dict=state)
    if lora and merge:
        adapter, folder = folder, run / "model"
        reload(adapter).merge_and_unload(safe_merge=True).save_pretrained(folder)
        shutil.rmtree(adapter)
    processor.save_pretrained(folder)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in aligner.items()}, run / ALIGNER)

    again = _near(reload(folder).eval(), device)
    moved = next(again.parameters()).device.type != device.type
    if moved or sharded or (merge and lora and dtype != torch.float32):
        tolerance = ROUNDED
    else:
        tolerance = MERGED if merge and lora else SAME
    difference = float((trained - _logits(again, batch)).abs().max() / trained.abs().max())
    if not difference <= tolerance:
        raise ExportError(
            f"{folder}: reloaded logits differ by {difference:.1e} of the largest from the trained model's, more than "
            f"{tolerance:.0e}"
        )
    return Exported([folder, run / ALIGNER], difference, tolerance)


def _logits(model: nn.Module, batch: StudentBatch) -> torch.Tensor:
    """(B, P, V) float32 on the CPU, at the positions that predict a learnt token; without any, at the first ones."""
    following_BL = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    needed_P = (following_BL != IGNORED).any(0).nonzero().squeeze(1)
    if not len(needed_P):  # a batch whose examples this student could not take, see `Batches.at`
        needed_P = torch.arange(min(following_BL.shape[1], 16))
    device = next(model.parameters()).device
    with torch.no_grad():
        made = model(**batch.to(device).inputs, logits_to_keep=needed_P.to(device), use_cache=False)
    return made.logits.float().cpu()


@contextmanager
def _whole(tuned: nn.Module) -> Iterator[None]:
    """Under FSDP2: the parameters that belong to the outermost module whole, so that the student runs by itself."""
    sharded = isinstance(tuned, FSDPModule)
    if sharded:
        tuned.unshard()
    yield
    if sharded:
        tuned.reshard()


def _gathered(module: nn.Module, only_trained: bool = False, dtype: torch.dtype | None = None) -> dict | None:
    """The state whole and on the CPU, where it is in parts or has to be cast; None where it can be taken as it is."""
    sharded = any(hasattr(p, "full_tensor") for p in module.parameters())
    if not sharded and dtype is None:
        return None
    options = StateDictOptions(full_state_dict=sharded, cpu_offload=True, ignore_frozen_params=only_trained)
    state = get_model_state_dict(module, options=options)
    return {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in state.items()}


def _near(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device, if it has room for it beside what is there."""
    if device.type == "cuda":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if torch.cuda.mem_get_info(device)[0] < 1.3 * size:
            return model
    return model.to(device)
