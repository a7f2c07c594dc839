"""What the teacher needs of a diffusion model, whatever its kind: sizes, pixels, latents, text, one noised forward."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.teacher.capture import Capture, Layer
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.text import ClipText, Condition

Size = tuple[int, int]  # height and width
WIDEST = 2.0  # aspect ratio of the widest bucket; wider images are squashed to it


class Adapter(ABC):
    """A diffusion model as the teacher sees it. Subclasses set the attributes below.

    Attributes:
        needs: components without which a pipeline cannot be read.
        text: the text side.
        layers: the layers that are read, with their weights.
        refine_side: side of the self-attention used for refinement, 0 if there is none.
        columns: maps of a batch are padded to a multiple of this many, where their number is part of what is compiled.
        top: side of the model's finest grid for a square image of its own size; layers' sides are counted like it.
    """

    needs: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    text: ClipText
    layers: list[Layer]
    refine_side: int = 0
    columns: int = 1
    top: int

    def __init__(
        self, parts: dict, cfg: TeacherConfig, device: torch.device, sample: int, channels: int, patch: int = 1
    ):
        self.device, self.cfg = device, cfg
        self.dtype = getattr(torch, cfg.dtype)
        self.vae = parts["vae"]
        if channels != self.vae.config.latent_channels:
            raise UserError(
                f"teacher.path={cfg.path}: the model takes {channels} channels where its VAE gives "
                f"{self.vae.config.latent_channels} (made for inpainting or editing?): choose one that takes text alone"
            )
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.patch = patch
        self.side = cfg.image_size or sample * self.factor
        if self.side % (self.factor * patch):
            raise UserError(f"teacher.image_size is {self.side}: give a multiple of {self.factor * patch}")

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What has to be on the device."""
        own = [value for value in vars(self).values() if isinstance(value, torch.nn.Module)]
        return own + [value for value in vars(self.text).values() if isinstance(value, torch.nn.Module)]

    # --- sizes ---

    def size(self, image: Image.Image | torch.Tensor) -> Size:
        """Height and width in pixels at which the model reads an image (or `pixels` of one).

        `squash` takes the model's square; `bucket` keeps the aspect ratio as nearly as sides in whole steps allow,
        with about as many pixels.
        """
        if isinstance(image, torch.Tensor):
            return tuple(image.shape[-2:])
        if self.cfg.geometry == "squash":
            return self.side, self.side
        step = self.step
        ratio = min(max(image.width / image.height, 1 / WIDEST), WIDEST)
        return tuple(max(step, round(self.side * root / step) * step) for root in (ratio**-0.5, ratio**0.5))

    @property
    def step(self) -> int:
        """Sides of `bucket` images are multiples of this, so that every grid divides the image evenly."""
        return self.factor * 8

    @property
    def longest(self) -> int:
        """The longest side in pixels at which an image may be read."""
        if self.cfg.geometry == "squash":
            return self.side
        return max(self.step, round(self.side * WIDEST**0.5 / self.step) * self.step)

    def latent_shape(self, size: Size) -> tuple[int, int, int]:
        """(channels, rows, columns) of an image's latents."""
        return self.vae.config.latent_channels, size[0] // self.factor, size[1] // self.factor

    def grids(self, size: Size) -> dict[int, Size]:
        """Rows and columns of every used grid for an image of this size."""
        rows, columns = (extent // self.factor // self.patch for extent in size)
        own = {}
        for side in {layer.side for layer in self.layers} | ({self.refine_side} - {0}):
            ratio = self.top // side
            own[side] = (-(-rows // ratio), -(-columns // ratio))
        return own

    # --- images ---

    def pixels(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        """The whole image at the size the model reads it: (3, Y, X) float32 in [-1, 1]. Needs no model, so other
        threads may call it; what it gave comes back as it is."""
        if isinstance(image, torch.Tensor):
            return image
        height, width = self.size(image)
        image = image.convert("RGB")  # before the resize, which takes the nearest pixel where colours are of a palette
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1)

    def latents(self, pixels_BCYX: torch.Tensor) -> torch.Tensor:
        """Latents of images (the mean of the encoder's distribution), scaled as the model expects them; float32."""
        config = self.vae.config
        mean = self.vae.encode(pixels_BCYX.to(self.device, self.vae.dtype)).latent_dist.mode().float()
        return (mean - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    # --- forwards ---

    def condition(self, texts: Sequence[str]) -> Condition:
        """Encodes windows of text, each at most `self.text.limit` content tokens."""
        found = self.text.encode(texts, self.device)
        found.hidden_BTC = found.hidden_BTC.to(self.dtype)
        if found.pooled_BC is not None:
            found.pooled_BC = found.pooled_BC.to(self.dtype)
        return found

    @abstractmethod
    def noised(self, latents_BCYX: torch.Tensor, noise_BCYX: torch.Tensor, timestep: int) -> torch.Tensor:
        """Latents with the noise of a training timestep (0 to 999)."""

    @abstractmethod
    def forward(self, noised_BCYX: torch.Tensor, timestep: int, condition: Condition, capture: Capture) -> None:
        """One conditional forward up to the last layer that is read."""
