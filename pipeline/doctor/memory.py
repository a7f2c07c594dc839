"""What a training step takes on one GPU, counted by running it without its memory (`simulate`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pipeline.doctor.simulate import Live, WeightsOnMeta, materialise, simulated

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.student.batch import StudentBatch
    from pipeline.student.load import Student
    from pipeline.train.tuned import Tuned

MOMENTS = 2  # AdamW keeps two numbers for every trained weight,
COUNTER = 4  # and the number of steps for every tensor, float32


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one GPU.

    Args:
        weights: parameters and buffers.
        gradients, optimizer: of what is trained.
        activations: the most that is alive besides, logits included; gradients that are not made yet leave room for it.
        gathered: whole layers beside their shards, where weights are sharded.
        flops: floating point operations of one forward and backward of a micro-batch, with recomputation.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0
    flops: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.gathered


def build(cfg: Config) -> tuple[Student, Tuned]:
    """The student as it will be trained, on the meta device, and with the Aligner around it.

    Raises:
        UserError: no such model, or settings that do not fit it.
    """
    from pipeline.align.loss import AlignmentLoss
    from pipeline.student.capture import AttentionTap
    from pipeline.student.load import skeleton
    from pipeline.student.untrained import directory
    from pipeline.train.trainable import trainable
    from pipeline.train.tuned import Tuned

    if cfg.model.weights == "random":
        directory(cfg.model)  # made, if it is not there, while numbers are still real
    with WeightsOnMeta():
        student = skeleton(cfg.model, cfg.align)
        model = trainable(student.model, cfg.train)
        tap = AttentionTap(model, student.family)
        tuned = Tuned(model, AlignmentLoss.for_tap(tap, cfg.align), tap, cfg.train.logits_mb << 20)
    return student, tuned.train()


def size_of(module: nn.Module) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state; tied weights count once."""
    weights = {id(p): p for p in (*module.parameters(), *module.buffers())}.values()
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = sum(map(_bytes, trained))
    return sum(map(_bytes, weights)), gradients, MOMENTS * gradients + COUNTER * len(trained)


def estimate(tuned: Tuned, batch: StudentBatch, *, bf16: bool, accumulates: bool, ranks: int = 1) -> Memory:
    """Counts a forward and a backward of one micro-batch.

    Args:
        tuned: of `build`; its weights are fakes afterwards.
        batch: a micro-batch of the longest examples, with real numbers.
        bf16: compute in bf16.
        accumulates: a step has several micro-batches, so that gradients are there while the next forward runs.
        ranks: GPUs that weights, gradients and optimizer state are sharded over.
    """
    from pipeline.train.parallel import blocks

    weights, gradients, optimizer = size_of(tuned)
    gathered = 0
    if ranks > 1:
        gathered = 2 * max((sum(map(_bytes, layer.parameters())) for layer in blocks(tuned.student)), default=0)
    # Found from the model's numbers in a real run; whatever it is, it takes no memory of its own.
    tuned._tail = _same
    with simulated() as live:
        materialise(tuned)
        above, flops = most_alive(tuned, batch, live, bf16=bf16, accumulates=accumulates)
    share = -(-gradients // ranks)
    return Memory(
        -(-weights // ranks),
        share,
        -(-optimizer // ranks),
        max(above - (0 if accumulates else gradients), 0),
        gathered,
        flops,
    )


def most_alive(tuned: nn.Module, batch: StudentBatch, live: Live, *, bf16: bool, accumulates: bool) -> tuple[int, int]:
    """The most bytes alive in forward and backward above what was there before, and the floating point operations.

    Args:
        live: the active count.
        accumulates: gradients are there before; else they count when they are made.
    """
    for tensor in (*tuned.parameters(), *tuned.buffers()):
        live.add(tensor)
    if accumulates:
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    live.restart()
    before = live.now
    with Flops() as count:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            ce, aligned, _ = tuned(batch)
        (ce + aligned).backward()
    return live.peak - before, count.total


class Flops(TorchDispatchMode):
    """Adds up the floating point operations of matrix products, convolutions and attention."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            query, key, value = (tensor.shape for tensor in args[1:4])
            self.total += sdpa_flop_count(query, key, value) * 5 // 2  # as the registry has it for the GPU's kernels
        return out


def _same(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
