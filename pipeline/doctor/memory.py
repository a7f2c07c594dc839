"""What a training step takes on one GPU, counted by running it without its memory (`simulate`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from pipeline.doctor.simulate import Live, WeightsOnMeta, materialise, simulated

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.student.batch import StudentBatch
    from pipeline.student.load import Student
    from pipeline.train.tuned import Tuned

# Of a weight in 4 bits, in bytes: itself, a scale of 8 bits for each 64, and one of 32 bits for each 256 of these.
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
TABLES = 4 * (16 + 256)  # bytes beside each such tensor: the values that the 4 bits and the 8 bits stand for
MOMENTS = 2  # AdamW keeps two numbers for every trained weight,
COUNTER = 4  # and the number of steps for every tensor, float32


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step on one GPU.

    Args:
        weights: parameters and buffers.
        gradients, optimizer: of what is trained.
        activations: the most that is alive besides, logits included; gradients that are not made yet leave room for it.
        gathered: weights that stay whole beside their shards where weights are sharded (what comes and goes is in
            ``activations``), and a layer unpacked from 4 bits.
        host: bytes in the CPU's memory instead, for each process.
        flops: floating point operations of one forward and backward of a micro-batch, with recomputation.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int = 0
    host: int = 0
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
        # What is held in 4 bits is counted in `estimate`; here it would be cast to 32.
        model = trainable(student.model, replace(cfg.train, quantize=""))
        tap = AttentionTap(model, student.family)
        tuned = Tuned(model, AlignmentLoss.for_tap(tap, cfg.align), tap, cfg.train.logits_mb << 20)
    return student, tuned.train()


def size_of(module: nn.Module) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state; tied weights count once."""
    weights = {id(p): p for p in (*module.parameters(), *module.buffers())}.values()
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = sum(map(_bytes, trained))
    return sum(map(_bytes, weights)), gradients, MOMENTS * gradients + COUNTER * len(trained)


def estimate(
    tuned: Tuned,
    batch: StudentBatch,
    *,
    bf16: bool,
    accumulates: bool,
    ranks: int = 1,
    offload: bool = False,
    nf4: bool = False,
) -> Memory:
    """Counts a forward and a backward of one micro-batch.

    Args:
        tuned: of `build`; its weights are fakes afterwards.
        batch: a micro-batch of the longest examples, with real numbers.
        bf16: compute in bf16.
        accumulates: a step has several micro-batches, so that gradients are there while the next forward runs.
        ranks: GPUs that weights, gradients and optimizer state are sharded over.
        offload: these shards are in the CPU's memory; only with several ``ranks``.
        nf4: what is not trained is held in 4 bits.
    """
    weights, gradients, optimizer = size_of(tuned)
    packed = _packed(tuned) if nf4 else {}
    if nf4:
        weights += _change(tuned, packed)
    sharding = Sharding(tuned, bf16, packed) if ranks > 1 else None
    gathered = sharding.staying if sharding else 0
    gathered += 2 * max((p.numel() for p in packed.values()), default=0)  # unpacked one at a time, in bf16
    # Found from the model's numbers in a real run; whatever it is, it takes no memory of its own.
    tuned._tail = _same
    with simulated() as live:
        # Sharded weights are gathered in the precision of the compute. Others are copied to it, all of them, and kept.
        materialise(tuned, torch.bfloat16 if bf16 and sharding else None)
        if sharding:
            sharding.follow(tuned, live, 0 if accumulates else ranks)
        above, flops = most_alive(tuned, batch, live, bf16=bf16, accumulates=accumulates and not sharding)
    shares = [-(-size // ranks) for size in (weights, gradients, optimizer)]
    if not accumulates:
        above = max(above - shares[1], 0)
    if offload and sharding:
        return Memory(0, 0, 0, above, gathered, sum(shares), flops=flops)
    return Memory(*shares, above, gathered, flops=flops)


def _packed(tuned: Tuned) -> dict[int, nn.Parameter]:
    """The weights that bitsandbytes holds in 4 bits, by id: those of linear layers that are not trained, but for the
    output layer's."""
    head = tuned.get_output_embeddings()
    linear = (module for module in tuned.student.modules() if isinstance(module, nn.Linear) and module is not head)
    return {id(module.weight): module.weight for module in linear if not module.weight.requires_grad}


def _change(tuned: Tuned, packed: dict[int, nn.Parameter]) -> int:
    """Bytes more (or less) that the weights take with these in 4 bits. PEFT holds the other frozen ones in float32."""
    change = 0.0
    for parameter in {id(p): p for p in tuned.student.parameters()}.values():
        if id(parameter) in packed:
            change += NF4 * parameter.numel() + TABLES - _bytes(parameter)
        elif not parameter.requires_grad:
            change += 4 * parameter.numel() - _bytes(parameter)
    return round(change)


class Sharding:
    """What FSDP2 holds whole beside the shards, as accelerate groups weights: layer by layer, the embeddings, the
    output layer, and the rest.

    The output layer and the rest stay from forward to backward. Of the others one is whole while it runs and the next
    one is on its way; in backward so are the gradients of the one that runs, with the float32 that they are added in.

    Attributes:
        staying: bytes of the groups that stay.
    """

    def __init__(self, tuned: Tuned, bf16: bool, packed: dict[int, nn.Parameter]):
        from pipeline.train.parallel import blocks

        self._seen: set[int] = set()
        self._bf16, self._packed = bf16, packed
        self.staying, _ = self._group(tuned.get_output_embeddings())  # first: it may share its weights with the next
        layers = [tuned.get_input_embeddings(), *blocks(tuned.student)]
        self._layers = {layer: self._group(layer) for layer in layers}
        self.staying += self._group(tuned)[0]
        self._live: Live | None = None
        self._backward = False

    def follow(self, tuned: Tuned, live: Live, ranks: int) -> None:
        """From now on counts in ``live`` what is whole, and of each gradient its share.

        Args:
            ranks: that share gradients; 0 where they are there already.
        """
        self._live = live
        next_size = 0
        for layer, (whole, gradients) in reversed(self._layers.items()):
            layer.register_forward_pre_hook(partial(self._begin, whole + next_size))
            layer.register_forward_hook(partial(self._end, whole, gradients))
            next_size = whole
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._share, ranks))

    def _begin(self, size: int, *_: object) -> None:
        if not self._backward:
            self._live.hold(size)

    def _end(self, whole: int, gradients: int, module: nn.Module, args: tuple, output: object) -> None:
        if self._backward:  # a checkpointed layer runs again
            return
        self._live.hold(0)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._back, 2 * whole + gradients))

    def _back(self, size: int, *_: object) -> None:
        self._backward = True
        self._live.hold(size)

    def _share(self, ranks: int, parameter: nn.Parameter) -> None:
        if ranks:  # held in float32 where the compute is in bf16
            self._live.now += _bytes(parameter) * (2 if self._bf16 else 1) // ranks
        parameter.grad = None

    def _group(self, module: nn.Module | None) -> tuple[int, int]:
        """Bytes of what is whole, and of its gradients."""
        whole = gradients = 0
        for parameter in module.parameters() if module is not None else ():
            if id(parameter) in self._seen:
                continue
            self._seen.add(id(parameter))
            size = 2 * parameter.numel() if self._bf16 and parameter.is_floating_point() else _bytes(parameter)
            whole += round(NF4 * parameter.numel()) if id(parameter) in self._packed else size
            gradients += 4 * parameter.numel() if parameter.requires_grad else 0
        return whole, gradients


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
