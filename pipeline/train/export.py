"""The finished student as others load it: an adapter or a model directory, reloaded and compared before it counts."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.student.batch import StudentBatch

TOLERANCE = 1e-5


class ExportError(RuntimeError):
    """The exported directory, loaded again, computes something else than the trained model."""


def export(
    run: Path, student: nn.Module, processor, aligner: nn.Module, method: str, batch: StudentBatch, reload
) -> list[Path]:
    """Writes ``adapter/`` or ``model/`` and ``aligner.safetensors`` into ``run``; returns what was written.

    Args:
        student: the trained model (a PEFT model for ``lora``).
        batch: something to compare logits on.
        reload: path -> the model loaded from the export.

    Raises:
        ExportError: the logits differ by more than ``TOLERANCE``.
    """
    folder = run / ("adapter" if method == "lora" else "model")
    shutil.rmtree(folder, ignore_errors=True)
    student.save_pretrained(folder)
    if method == "full":
        processor.save_pretrained(folder)
    save_file({k: v.detach().cpu().contiguous() for k, v in aligner.state_dict().items()}, run / "aligner.safetensors")
    student.eval()
    again = reload(folder).eval()
    with torch.no_grad():
        inputs = batch.to(next(student.parameters()).device).inputs
        gap = float((student(**inputs).logits - again.to(inputs["input_ids"].device)(**inputs).logits).abs().max())
    if not gap <= TOLERANCE:
        raise ExportError(f"{folder}: reloaded logits differ by {gap:.2e} from the trained model's")
    return [folder, run / "aligner.safetensors"]
