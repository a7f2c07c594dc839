"""One process of two whose weights are sharded: bytes of the tensors of a real step beside the preflight's estimate.

torchrun tests/two_ranks_memory.py FOLDER name=value ...
"""

import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu  # noqa: F401 (accelerate then shards without GPUs)
import torch
from test_doctor import batch_of

from pipeline.align.loss import AlignmentLoss
from pipeline.config import compose
from pipeline.doctor import memory
from pipeline.doctor.simulate import Live
from pipeline.student.capture import AttentionTap
from pipeline.student.load import load_student
from pipeline.train import parallel
from pipeline.train.trainable import trainable
from pipeline.train.tuned import Tuned


class Resized(Live):
    """FSDP frees what it gathered by making storages empty: looks at the sizes anew after each operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        storages = [ref() for ref, _ in list(self._alive.values())]
        self.now = sum(storage.nbytes() for storage in storages if storage is not None)
        self.most = max(self.most, self.now)
        return out

    def add(self, tensor):
        if not hasattr(tensor, "to_local"):
            super().add(tensor)

    most = 0


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def size(tensors) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors)


def main(folder: Path, *overrides: str) -> None:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(folder / os.environ["RANK"])
    cfg = compose([*overrides, "train.parallel=fsdp", "train.trackers=[]"])
    torch.manual_seed(0)
    student = load_student(cfg.model, cfg.align)
    model = trainable(student.model, cfg.train)
    tap = AttentionTap(model, student.family)
    tuned = Tuned(model, AlignmentLoss.for_tap(tap, cfg.align), tap, cfg.train.logits_mb << 20).train()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    accelerator = parallel.accelerator(cfg.train, folder)
    wrapped, optimizer = parallel.prepare(accelerator, tuned, torch.optim.AdamW(trained, fused=True), cfg.train)
    assert accelerator.is_fsdp2
    batch = batch_of(student.family, 2)
    with Resized() as live:
        for tensor in (*wrapped.parameters(), *wrapped.buffers()):
            live.add(local(tensor))
        before = live.now
        ce, aligned, _ = wrapped(batch)
        (ce + aligned).backward()
    gradients = size(p.grad for p in wrapped.parameters() if p.grad is not None)
    optimizer.step()
    state = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    real = {
        "weights": size((*wrapped.parameters(), *wrapped.buffers())),
        "gradients": gradients,
        "optimizer": size(state),
        "above": live.most - before - gradients,
    }
    torch.distributed.destroy_process_group()
    student, tuned = memory.build(cfg)
    guess = memory.estimate(tuned, batch, bf16=cfg.train.precision == "bf16", accumulates=False, ranks=2)
    found = {
        "weights": guess.weights,
        "gradients": guess.gradients,
        "optimizer": guess.optimizer,
        "above": guess.activations + guess.gathered,
    }
    if os.environ["RANK"] == "0":
        (folder / "out.json").write_text(json.dumps([found, real]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
