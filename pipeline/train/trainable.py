"""What is trained: adapters or the weights themselves, what is held fixed, and what joins later in the run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.train.config import TrainConfig, Unfreeze

# What the families call the part that looks at the image, and the projections of attention inside it.
VISION = re.compile(r"(^|\.)(vision_model|vision_tower|vision_encoder|visual|vpm)(\.|$)")
VISION_TARGETS = ("q_proj", "v_proj", "qkv")


def trainable(model: nn.Module, cfg: TrainConfig) -> nn.Module:
    """The model with gradients where the settings want them; with adapters, a PEFT model around it.

    Trained weights of half precision become float32 where the compute is bf16 (``train.precision``): steps of 1e-5 of
    a weight are lost in bf16. What is not trained keeps its precision.

    Raises:
        UserError: targets or patterns that match nothing, or nothing is left to train.
    """
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.method == "lora":
        model = adapted(model, cfg)
    for pattern in cfg.freeze:
        matched = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            raise UserError(f"train.freeze: '{pattern}' matches no parameter of {type(model).__name__}")
        for parameter in matched:
            parameter.requires_grad_(False)
    learnt = [p for p in model.parameters() if p.requires_grad]
    if not learnt:
        raise UserError("nothing is left to train: train.freeze covers every parameter")
    if cfg.precision == "bf16":
        for parameter in learnt:
            parameter.data = parameter.data.float()
    return model


def adapted(model: nn.Module, cfg: TrainConfig) -> nn.Module:
    """A PEFT model with low-rank adapters on the modules that ``train.lora`` names.

    Raises:
        UserError: no module of that name.
    """
    from peft import LoraConfig, get_peft_model

    lora = cfg.lora
    model.requires_grad_(False)
    if cfg.quantize:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = list(lora.targets) if lora.vision is None else _targets(model, list(lora.targets), lora.vision)
    settings = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        model = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"train.lora.targets={list(lora.targets)}: {error}") from error
    if cfg.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _targets(model: nn.Module, targets: list[str], vision: bool) -> list[str]:
    """Full names of the modules to adapt: those named, in the vision part its own projections too, or none there."""
    names = [name for name, _ in model.named_modules()]
    chosen = [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]
    if not chosen:
        raise UserError(f"train.lora.targets={targets}: no module of {type(model).__name__} has such a name")
    if not vision:
        return [name for name in chosen if not VISION.search(name)]
    inside = [name for name in names if VISION.search(name) and name.rpartition(".")[2] in VISION_TARGETS]
    if not inside:
        raise UserError(f"train.lora.vision=true: {type(model).__name__} has no attention that looks at the image")
    return list(dict.fromkeys(chosen + inside))


class Unfreezing:
    """Parts that are trained only from some step on.

    They are in the optimizer from the start, and until their step their gradients are dropped before they count: so
    they have no state, no decay and no part in the gradient's norm, and DDP and FSDP, which decide at the start whose
    gradients they exchange, need not be made anew.

    Args:
        named: names and parameters of the wrapped module.
        schedule: patterns with the step at which they join; for a parameter the first one that matches counts.

    Raises:
        UserError: a pattern that matches nothing that is trained.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], schedule: Iterable[Unfreeze]):
        left = {name: p for name, p in named if p.requires_grad}
        self.groups: list[tuple[int, list[nn.Parameter]]] = []
        for entry in schedule:
            matched = [name for name in left if re.search(entry.pattern, name)]
            if not matched:
                raise UserError(f"train.unfreeze: '{entry.pattern}' matches no parameter that is trained")
            self.groups.append((entry.step, [left.pop(name) for name in matched]))

    def drop(self, step: int) -> None:
        """Drops the gradients of what is not trained yet at a step (from 0): after backward, before clipping."""
        for start, parameters in self.groups:
            if step < start:
                for parameter in parameters:
                    parameter.grad = None


def quantization(name: str, method: str) -> object | None:
    """The option of ``from_pretrained`` that loads the fixed weights in 4 bits (QLoRA), or None for ``name`` empty.

    Raises:
        UserError: with full fine-tuning, or where bitsandbytes or its GPU is missing.
    """
    if not name:
        return None
    if method != "lora":
        raise UserError("train.quantize=nf4 goes with train.method=lora: weights of 4 bits cannot be trained")
    import torch

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "train.quantize=nf4 needs bitsandbytes: pip install 'lavender-pipeline[qlora]', or leave it empty"
        ) from error
    if not torch.cuda.is_available():
        raise UserError("train.quantize=nf4 needs a CUDA GPU, and there is none here: leave train.quantize empty")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,  # what FSDP can shard
    )


def groups(named: Iterable[tuple[str, nn.Parameter]], cfg: TrainConfig) -> list[dict[str, list[torch.Tensor] | float]]:
    """The optimizer's two groups: the student's trained weights, and the Aligner's with a rate of their own."""
    learnt = [(name, p) for name, p in named if p.requires_grad]
    return [
        {"params": [p for name, p in learnt if name.startswith("student.")], "lr": cfg.lr},
        {"params": [p for name, p in learnt if name.startswith("align.")], "lr": cfg.aligner_lr},
    ]
