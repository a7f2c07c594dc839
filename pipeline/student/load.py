"""Loading a student: model, processor and family, with one clear line for whatever is missing.

Importing this module is cheap; torch comes with the first load.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.student.config import ModelConfig
from pipeline.student.weights import model_path

if TYPE_CHECKING:
    from torch import nn

    from pipeline.align.config import AlignConfig
    from pipeline.student.family import Family

# `model_type` of a model's config -> the module of its family and the class in it
FAMILIES = {
    "mllama": ("pipeline.student.mllama", "Mllama"),
    "minicpmv": ("pipeline.student.minicpm", "MiniCPM"),
    "openflamingo": ("pipeline.student.openflamingo", "OpenFlamingoFamily"),
    "paligemma": ("pipeline.student.paligemma", "PaliGemma"),
    **dict.fromkeys(
        (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3_vl",
            "llava",
            "llava_next",
            "llava_onevision",
            "internvl",
            "idefics3",
            "smolvlm",
            "gemma3",
            "idefics2",
            "minicpmv4_6",
        ),
        ("pipeline.student.native", "Native"),
    ),
}


@dataclass
class Student:
    """A loaded student.

    Args:
        model: a transformers model in evaluation mode.
        processor: its processor.
        family: what knows the two.
    """

    model: "nn.Module"
    processor: object
    family: "Family"


def load_student(cfg: ModelConfig, align: "AlignConfig | None" = None, quantization: object | None = None) -> Student:
    """Loads a student from a directory or hub id.

    Args:
        cfg: which model.
        align: which words and layers are aligned; None takes every assistant word and every layer.
        quantization: how weights are held in fewer bits, as ``from_pretrained`` takes it; None holds them as they are.

    Raises:
        UserError: nothing there, no weights, weights that do not fit, or an architecture without a family.
    """
    from safetensors import SafetensorError

    if cfg.weights == "random":
        from pipeline.student.untrained import directory

        cfg = directory(cfg)
        if cfg.size == "full":  # there are no weights to read
            return skeleton(cfg, align)
    family, path, options = _found(cfg)
    try:
        (model, info), processor = family.load(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are listed, and refused below
            **({"quantization_config": quantization} if quantization else {}),
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot load the model {cfg.path}: {_first_line(error)}") from error
    except ValueError as error:
        raise _own_code(cfg, error) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"the weights in {cfg.path} lack {len(missing)} tensors of the model in its shapes: {missing[0]}, ..."
        )
    return _student(cfg, family, model, processor, align)


def skeleton(cfg: ModelConfig, align: "AlignConfig | None" = None) -> Student:
    """As `load_student` without reading weights: shapes, processor and family; see `Family.skeleton`.

    Raises:
        UserError: nothing there, or an architecture without a family.
    """
    if cfg.weights == "random":
        from pipeline.student.untrained import directory

        cfg = directory(cfg)
    family, path, options = _found(cfg)
    try:
        model, processor = family.skeleton(path, **options)
    except OSError as error:
        raise UserError(f"cannot load the model {cfg.path}: {_first_line(error)}") from error
    except ValueError as error:
        raise _own_code(cfg, error) from error
    return _student(cfg, family, model, processor, align)


def _found(cfg: ModelConfig) -> "tuple[type[Family], str, dict]":
    """The family, the directory or hub id, and the options that both ways of loading take."""
    import torch

    path = model_path(cfg.path)
    if not Path(path).is_dir() and (cfg.path.startswith(("bundled:", ".", "/", "~")) or cfg.path.count("/") != 1):
        raise UserError(f"no model directory {path}: give model.path= a directory or a hub id")
    family = find_family(cfg, path)
    unknown = sorted(set(cfg.parts) - set(family.parts))
    if unknown:
        raise UserError(f"model.parts.{unknown[0]}: {cfg.path} has no such part")
    options = {"dtype": getattr(torch, cfg.dtype), "attn_implementation": cfg.attention} | _where(cfg)
    if cfg.parts:
        options["parts"] = {name: model_path(part) for name, part in cfg.parts.items()}
    return family, path, options


def _student(cfg: ModelConfig, family: "type[Family]", model: "nn.Module", processor, align) -> Student:
    """Checks of the processor that every family needs."""
    if not processor.tokenizer.is_fast:
        raise UserError(f"{cfg.path} has no fast tokenizer (tokenizer.json), which is needed to find words in tokens")
    if not processor.chat_template:
        raise UserError(f"{cfg.path} has no chat template: use the instruction-tuned version of the model")
    made = family(processor, cfg.max_length, align)
    made.max_pixels = cfg.max_pixels
    made.prepare(model)
    return Student(model.eval(), processor, made)


def find_family(cfg: ModelConfig, path: str) -> "type[Family]":
    """The family class named in the settings, or that of the model's own config.

    Raises:
        UserError: no config there, or an architecture without a family.
    """
    name = cfg.family
    if not name:
        from transformers import PreTrainedConfig

        try:
            found, _ = PreTrainedConfig.get_config_dict(path, **_where(cfg))
        except OSError as error:
            raise UserError(f"cannot read the config of {cfg.path}: {_first_line(error)}") from error
        name = found.get("model_type", "")
        if not name:
            raise UserError(f"{cfg.path} has no config.json with a model_type: it is not a model directory")
    if name not in FAMILIES:
        raise UserError(f"no family for models of type '{name}' ({cfg.path}): known are {', '.join(sorted(FAMILIES))}")
    module, attribute = FAMILIES[name]
    return getattr(import_module(module), attribute)


def _where(cfg: ModelConfig) -> dict:
    """Options of ``from_pretrained`` that say where files come from."""
    where = {"local_files_only": cfg.local_files_only, "trust_remote_code": cfg.trust_remote_code}
    return where | ({"revision": cfg.revision} if cfg.revision else {})


def _own_code(cfg: ModelConfig, error: ValueError) -> ValueError:
    """What to raise for an error of transformers: one clear line if it is about code that comes with the weights."""
    if "trust_remote_code" not in str(error):
        return error
    return UserError(
        f"cannot load the model {cfg.path} without running code that comes with it: {_first_line(error)} If you trust "
        "that code, give model.trust_remote_code=true"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
