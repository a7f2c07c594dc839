"""How much a step computes and how fast: FLOPs of the model, their share of the device's peak (MFU), tokens, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.train.trainable import VISION

if TYPE_CHECKING:
    from pipeline.student.batch import StudentBatch

# Dense bf16 FLOP/s of a device, by a part of its name; the makers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12}


def peak(device: torch.device) -> float:
    """The device's dense bf16 peak in FLOP/s; 0 where it is not known, as on a CPU."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAKS.items() if part in name), 0.0)


class ModelFlops:
    """FLOPs of a training step as model FLOPs count: no recomputation, and no attention scores.

    Forward: 2 for each weight and position. Backward: 2 for each weight and position through which a gradient goes on,
    and 2 for each one that is trained. The text part runs at each token; the vision part (tower and all that its name
    covers) at each patch. Looking embeddings up is free; an output layer that shares their weights is not.

    Args:
        student: the model, unwrapped.
    """

    def __init__(self, student: nn.Module):
        self.text, self.text_learnt, self.vision, self.vision_learnt = 0, 0, 0, 0
        self.patch = 0  # values of a patch
        for name, module in student.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.ndim > 1]
            if isinstance(module, nn.Embedding) or not own:
                continue
            size, learnt = sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)
            if VISION.search(name):
                self.vision, self.vision_learnt = self.vision + size, self.vision_learnt + learnt
                if "patch_embed" in name and not self.patch:
                    self.patch = own[0][0].numel()
            else:
                self.text, self.text_learnt = self.text + size, self.text_learnt + learnt

    def of(self, tokens: int, patches: int) -> int:
        """FLOPs of a forward and backward over so many text positions and patches."""
        text = (2 * self.text + 2 * self.text + 2 * self.text_learnt) * tokens
        # Without anything to learn in it, no gradient goes into the tower.
        through = 2 * self.vision if self.vision_learnt else 0
        return text + (2 * self.vision + through + 2 * self.vision_learnt) * patches

    def batch(self, batch: StudentBatch) -> int:
        """FLOPs of a micro-batch, padding included."""
        pixels = batch.inputs.get("pixel_values")
        patches = pixels.numel() // self.patch if pixels is not None and self.patch else 0
        return self.of(batch.inputs["input_ids"].numel(), patches)


class Throughput:
    """What one process computes, added up until it is taken; all processes are taken to do as much.

    Args:
        student: the model, unwrapped.
        device: where it runs.
        ranks: processes that train.
    """

    def __init__(self, student: nn.Module, device: torch.device, ranks: int):
        self.model, self.device, self.ranks, self.peak = ModelFlops(student), device, ranks, peak(device)
        self.flops = self.tokens = self.examples = 0

    def add(self, batch: StudentBatch) -> None:
        """One micro-batch that went forward and backward."""
        self.flops += self.model.batch(batch)
        self.tokens += batch.inputs["input_ids"].numel()
        self.examples += len(batch.keys)

    def take(self, seconds: float) -> dict[str, float]:
        """Examples and tokens (padding included) a second over all processes, model FLOP/s of each, their share of the
        peak where that is known, and the most memory ever held in MiB."""
        seconds = max(seconds, 1e-9)
        made = {
            "examples_per_second": round(self.examples * self.ranks / seconds, 3),
            "tokens_per_second": round(self.tokens * self.ranks / seconds, 1),
            "flops_per_second": float(f"{self.flops / seconds:.4g}"),
        }
        if self.peak:
            made["mfu"] = round(self.flops / seconds / self.peak, 4)
        self.flops = self.tokens = self.examples = 0
        return made | {"peak_memory_mb": round(memory(self.device) / 2**20)}


def memory(device: torch.device) -> int:
    """The most bytes this process has held: on the GPU, or in all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
