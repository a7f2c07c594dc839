"""One process of two that train together: the first sees images, the second texts only. Run by test_student_ranks.

python tests/two_ranks.py RANK RENDEZVOUS_FILE OUT_FILE KIND=PICKLED_SETTINGS...
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from test_student_families import TEXT, example, loss_of
from torch import nn

from pipeline.student.capture import AttentionTap, student_maps
from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student
from pipeline.train.parallel import blocks


def batches(family):
    """The batch of each rank."""
    seen = example("What colour is the circle?", "a small red circle", (50, 90))
    return [family.encode([seen, TEXT]), family.encode([TEXT, example("two", "a blue square", None)])]


def loss_on(model, family, batch) -> torch.Tensor:
    with AttentionTap(model, family) as tap:
        tap.rows(batch.words)
        logits = model(**batch.inputs, use_cache=False).logits
        loss = logits.square().mean()
        return loss + loss_of(student_maps(tap, batch)) if len(batch.words) else loss


def gradients(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def main(rank: int, meeting: str, out: str, settings: dict[str, dict]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    gaps = {}
    for kind, setting in settings.items():
        for way in ("ddp", "fsdp"):
            student = load_student(ModelConfig(name=kind, **setting))
            model, family = student.model.train(), student.family
            parts = batches(family)
            sum(loss_on(model, family, part) for part in parts).backward()
            expected = {name: grad / 2 for name, grad in gradients(model).items()}
            model.zero_grad()
            if way == "fsdp":
                for block in blocks(model):
                    fully_shard(block, mesh=mesh)
                wrapped = fully_shard(model, mesh=mesh)
            else:
                # Layers that nothing reads, such as CLIP's last one in LLaVA, have no gradient on any rank.
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(name in expected)
                wrapped = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):  # DDP complains of a missing gradient in the step after
                wrapped.zero_grad()
                loss_on(wrapped, family, parts[rank]).backward()
            found = gradients(wrapped)
            missing = sorted(expected.keys() - found.keys())
            largest = max(float(grad.abs().max()) for grad in expected.values())
            gap = max(float((found[name] - grad).abs().max()) for name, grad in expected.items() if name in found)
            gaps[f"{kind} {way}"] = [gap / largest, missing]
    if rank == 0:
        Path(out).write_text(json.dumps(gaps), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4]))
