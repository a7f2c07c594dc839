"""One process of two that go on from one process's checkpoint and write theirs. Run by test_train_resume.

python tests/two_ranks_checkpoint.py RANK FOLDER
"""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_train_resume import no_space, small, step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.train.checkpoint import Checkpoints


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for way in ("ddp", "fsdp"):
        run = folder / way
        if rank == 0:
            shutil.copytree(folder / "one", run)
        dist.barrier()
        model, _ = small()
        for parameter in model.parameters():  # nothing that was there before may be taken for what was loaded
            if parameter.requires_grad:
                nn.init.constant_(parameter, float("nan"))
        wrapped = nn.parallel.DistributedDataParallel(model) if way == "ddp" else sharded(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        checkpoints = Checkpoints(run, {"a": 1}, 2, model, optimizer)
        position = checkpoints.restore()
        assert position.step == 2, position
        step(wrapped, optimizer, 3)
        checkpoints.save(3)
        total = torch.ones(1000)
        for _ in range(20):  # the training's own collectives go on meanwhile
            dist.all_reduce(total, dist.ReduceOp.MAX)
        checkpoints.wait()
        if way == "ddp":
            failing(checkpoints, rank)
        checkpoints.close()
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def failing(checkpoints: Checkpoints, rank: int) -> None:
    """What the first process cannot write ends all of them, not with a hang."""
    works = receipts.commit_dir
    if rank == 0:
        receipts.commit_dir = no_space
    checkpoints.save(4)
    with pytest.raises(UserError, match="cannot write a checkpoint"):
        checkpoints.wait()
    receipts.commit_dir = works


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
