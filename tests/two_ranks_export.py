"""One process of two that hold a student in parts (FSDP2) and export it. Run by test_train_resume.

python tests/two_ranks_export.py RANK FOLDER STUDENT METHOD
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from test_student_families import example
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student
from pipeline.train.config import TrainConfig
from pipeline.train.export import export
from pipeline.train.parallel import blocks
from pipeline.train.stage import _reload
from pipeline.train.trainable import trainable


class Both(nn.Module):
    def __init__(self, student: nn.Module):
        super().__init__()
        self.student, self.align = student, nn.Linear(3, 3)


def main(rank: int, folder: Path, path: str, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{method}", rank=rank, world_size=2)
    model = ModelConfig(name="tiny", path=path)
    cfg = SimpleNamespace(model=model, train=TrainConfig(method=method))
    loaded = load_student(model)
    student = trainable(loaded.model, cfg.train)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = loaded.family.encode([example("What colour is the circle?", "a small red circle", (50, 90))])
    both = Both(student)
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks(both):
        fully_shard(block, mesh=mesh)
    fully_shard(both, mesh=mesh)
    assert any(hasattr(p, "full_tensor") for p in student.parameters())
    made = export(
        folder,
        both,
        loaded.processor,
        path,
        torch.float32,
        False,
        batch,
        lambda found: _reload(cfg, found),
        rank == 0,
    )
    assert (made is None) == (rank == 1)
    if made:  # the same precision and device: closer than what is allowed to parts
        assert made.difference < 1e-5, made
        assert made.files[0].name == ("adapter" if method == "lora" else "model")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
