"""How processes share a step: one alone, DDP, or FSDP2, all through accelerate."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.train import trackers

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from pipeline.train.config import TrainConfig
    from pipeline.train.tuned import Tuned


def accelerator(cfg: TrainConfig, run: Path) -> Accelerator:
    """The accelerator for these settings and this process; its trackers write below ``run``.

    With FSDP2: parameters and what is sent in bf16 where the compute is, gradients added up in float32, and outputs
    left as they are: accelerate's own ``bf16`` would also add gradients and give losses in bf16.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import DataLoaderConfiguration

    plugin = None
    if shards(cfg):
        from accelerate import FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if cfg.cpu_offload:  # accelerate then starts a group that can also reduce what lies on the CPU
            os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
        policy = MixedPrecisionPolicy()
        if cfg.precision == "bf16":
            # Inputs are left as they are, and autocast (see `prepare`) casts what layers need: FSDP would look into the
            # batch and round the places of image tokens and the targets.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=None, cast_forward_inputs=False)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            mixed_precision_policy=policy,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[],  # by the model, see `prepare`
            cpu_offload=cfg.cpu_offload,
            cpu_ram_efficient_loading=False,
            activation_checkpointing=False,  # its way gives wrong gradients with dropout; the model does its own
        )
    made = Accelerator(
        log_with=trackers.check(cfg.trackers) or None,
        project_dir=run / "trackers",
        cpu=processes() > 1 and not torch.cuda.is_available(),  # else processes without GPUs would not know each other
        mixed_precision=cfg.precision,
        dataloader_config=DataLoaderConfiguration(),
        step_scheduler_with_optimizer=False,
        fsdp_plugin=plugin,
        # Some models have trained layers that nothing reads, such as the last one of the tower in LLaVA.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    assert made.num_processes == processes(), f"{made.num_processes} of {processes()} processes found each other"
    return made


def shards(cfg: TrainConfig) -> bool:
    """Whether weights are sharded: as asked, or where there are several processes with a GPU each."""
    if cfg.parallel == "auto":
        return processes() > 1 and torch.cuda.is_available()
    return cfg.parallel == "fsdp" and processes() > 1


def processes() -> int:
    """Processes that train together, as torchrun and SLURM's launcher tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepare(
    accelerator: Accelerator, tuned: Tuned, optimizer: torch.optim.Optimizer, cfg: TrainConfig
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The module wrapped for its processes, and its optimizer. The student's layers are compiled one by one if asked:
    they are alike, so that one compilation serves all.

    Raises:
        UserError: FSDP was asked for where accelerate has none, which is a machine without GPUs.
    """
    layers = blocks(tuned.student)
    if cfg.compile:
        for layer in layers:
            layer.compile()
    if shards(cfg):
        if not accelerator.is_fsdp2:
            raise UserError(
                "train.parallel=fsdp needs GPUs (accelerate has no FSDP on the CPU): use train.parallel=ddp"
            )
        names = sorted({type(layer).__name__ for layer in layers})
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
        if cfg.precision == "bf16":  # accelerate's own autocast leaves FSDP2 out
            tuned.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(tuned.forward)
    return accelerator.prepare(tuned, optimizer)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of text and vision: members of the outermost module lists that have parameters, but for
    those that run once for every image (``Layout.per_image``).

    So found they are right for every family; what transformers itself names (``_no_split_modules``) leaves out
    towers, or names parts of layers.
    """
    found: list[nn.Module] = []
    for child in model.children():
        if getattr(child, "lavender_per_image", False):
            continue
        if isinstance(child, nn.ModuleList):
            found += [member for member in child if not isinstance(member, nn.ModuleList)]
        else:
            found += blocks(child)
    return [layer for layer in found if any(True for _ in layer.parameters())]
