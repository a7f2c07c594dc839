"""A teacher's weights in memory: the components of a diffusers pipeline, and the adapter that fits them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from pipeline.errors import UserError
from pipeline.teacher.adapter import Adapter
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.dit import FluxAdapter, SD3Adapter
from pipeline.teacher.unet import UNetAdapter
from pipeline.teacher.weights import locate, read_index, require_weights

FAMILIES = {
    "UNet2DConditionModel": UNetAdapter,
    "SD3Transformer2DModel": SD3Adapter,
    "FluxTransformer2DModel": FluxAdapter,
}


def load_adapter(cfg: TeacherConfig, device: str) -> Adapter:
    """The model of a configuration on a device.

    Only what a map needs stays in memory: no decoder of the VAE, no part of the backbone after the last layer that is
    read (unless an inversion needs it).

    Raises:
        UserError: the weights are missing, the pipeline is of a kind that the teacher cannot read, or there is no GPU.
    """
    require_device(device)
    directory = locate(cfg)
    parts = load_parts(directory, getattr(torch, cfg.dtype))
    found = [FAMILIES[type(part).__name__] for part in parts.values() if type(part).__name__ in FAMILIES]
    if len(found) != 1:
        raise UserError(f"teacher.path={cfg.path}: a {pipeline_kind(directory)} is not supported")
    missing = [name for name in found[0].needs if parts.get(name) is None]
    if missing:
        raise UserError(
            f"teacher.path={cfg.path}: a {pipeline_kind(directory)} without {', '.join(missing)} is not supported"
        )
    place = torch.device(device)
    modules = [part for part in parts.values() if isinstance(part, torch.nn.Module)]
    for module in modules:
        module.eval().requires_grad_(False)
    adapter = found[0](parts, cfg, place)
    for module in adapter.modules:
        module.to(place)
    return adapter


def device_of(cfg: TeacherConfig) -> str:
    """`cpu` or `cuda`, with `auto` resolved."""
    if cfg.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return cfg.device


def require_device(device: str) -> None:
    """Raises UserError: a GPU is asked for and PyTorch sees none on this machine."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "teacher.device is cuda, but PyTorch sees no GPU on this machine: use teacher.device=cpu or auto"
        )


def pipeline_kind(directory: Path) -> str:
    """The class of the pipeline in a directory, e.g. StableDiffusionPipeline."""
    return read_index(directory).get("_class_name", "pipeline of no stated class")


def load_parts(directory: Path, dtype: torch.dtype) -> dict[str, object]:
    """The components of a pipeline by name, each as the class that its index names; the safety checker is left out.

    Raises:
        UserError: a component is missing, has no safetensors weights, or is of an unknown class.
    """
    import diffusers
    import transformers
    from safetensors import SafetensorError

    index = read_index(directory)
    libraries = {"diffusers": diffusers, "transformers": transformers}
    parts = {}
    for name, value in index.items():
        if not isinstance(value, list) or name in ("safety_checker", "feature_extractor", "image_encoder"):
            continue
        library, kind = value
        if library is None:
            continue
        cls = getattr(libraries.get(library), kind or "", None)
        if cls is None:
            raise UserError(f"{directory}: component '{name}' is a {library}.{kind}, which is not known here")
        options = {}
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
            require_weights(directory / name)
            # float16 overflows in the encoder of some VAEs
            half = dtype == torch.float16 and name == "vae"
            options = {"torch_dtype": torch.float32 if half else dtype, "use_safetensors": True}
        try:
            with _quiet():
                parts[name] = cls.from_pretrained(directory / name, local_files_only=True, **options)
        except (OSError, ValueError, SafetensorError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"teacher component {directory / name} cannot be loaded: {first}") from error
    if "vae" in parts:
        parts["vae"].decoder = parts["vae"].post_quant_conv = None
    return parts


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading prints no progress bars of its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # Only what was on is turned on again: the hub warns where an environment variable has turned it off.
    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
