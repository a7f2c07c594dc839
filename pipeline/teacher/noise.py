"""Noise that depends on the picture and nothing else: not on order, shard, window or number of workers."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def image_seed(seed: int, image: bytes) -> int:
    """The seed of an image's noise, from `teacher.seed` and the sha256 of the image's bytes; 63 bits."""
    digest = hashlib.sha256(image).hexdigest()
    return _number(f"{seed}/{digest}")


def draw_noise(seed: int, draw: int, shape: tuple[int, ...]) -> "torch.Tensor":
    """Standard normal noise of `shape` (float32, on the CPU) for one draw of an image with `image_seed` `seed`.

    Every timestep of a draw gets the same noise, as along one trajectory of the model.
    """
    import torch

    generator = torch.Generator().manual_seed(_number(f"{seed}/{draw}"))
    return torch.randn(shape, generator=generator)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
