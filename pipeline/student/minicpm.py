"""MiniCPM-Llama3-V 2.5: the image in up to ten slices, each of 96 latents that have no place of their own.

A large image is seen whole at low resolution and cut into a grid of slices of it at a higher one; text attends to the
latents of all slices, and the resampler's own attention says where in the slice each latent looks.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.student.batch import Item
from pipeline.student.layouts import Laid, Layout, grid
from pipeline.student.minicpm_model import MiniCPMV, MiniCPMVConfig, line_positions
from pipeline.student.native import Native, stack
from pipeline.student.planes import Piece

if TYPE_CHECKING:
    from PIL.Image import Image

UNKNOWN = "<unk>"  # stands for an image token
MARKER = "<image></image>"  # stands for an image until its slices are known


class Processor:
    """Tokenizer and chat template; images are cut as the model's config says.

    Args:
        path: where they came from.
    """

    image_processor = None

    def __init__(self, tokenizer, path: str):
        self.tokenizer, self.path = tokenizer, path
        self.chat_template = tokenizer.chat_template
        self.image_token_id = tokenizer.convert_tokens_to_ids(UNKNOWN)

    def apply_chat_template(self, messages: list[dict], **options) -> str:
        """The template knows texts only: an image and the texts after it are joined by line ends."""
        plain = [{"role": message["role"], "content": _joined(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(plain, chat_template=self.chat_template, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the tokenizer, and what the published code reads beside it."""
        self.tokenizer.save_pretrained(directory)
        source = Path(self.path, "preprocessor_config.json")
        if source.is_file():
            shutil.copy(source, directory)


def _joined(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(MARKER if part["type"] == "image" else part["text"] for part in content)


@dataclass(frozen=True)
class Slicing:
    """How an image is resized and cut. Sizes are (width, height) in pixels.

    Args:
        most: slices at most.
        side: a slice has about the area of a square with this side.
        patch: sides of slices are multiples of it.
    """

    most: int
    side: int
    patch: int

    @classmethod
    def of(cls, config: "MiniCPMVConfig") -> "Slicing":
        stated = config.slice_config or {}
        most = stated.get("max_slice_nums", 9) if config.slice_mode else 1
        return cls(most, stated.get("scale_resolution", 448), config.patch_size)

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows of slices; (0, 0) where the whole image alone is enough."""
        wanted = min(math.ceil(width * height / self.side**2), self.most)
        if wanted <= 1:
            return 0, 0
        allowed = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= self.most]
        grids = [(cols, count // cols) for count in allowed for cols in range(1, count + 1) if count % cols == 0]
        shape = math.log(width / height)
        return min(grids, key=lambda one: abs(shape - math.log(one[0] / one[1])))

    def overview(self, width: int, height: int) -> tuple[int, int]:
        """Size of the whole image as it is seen."""
        return self._fit(width, height)

    def sliced(self, width: int, height: int, cols: int, rows: int) -> tuple[int, int]:
        """Size of the whole image before it is cut into so many slices."""
        wide, high = self._fit(_nearest(width, cols) / cols, _nearest(height, rows) / rows)
        return wide * cols, high * rows

    def _fit(self, width: float, height: float) -> tuple[int, int]:
        ratio = width / height
        high = int(self.side / math.sqrt(ratio))
        return _nearest(int(high * ratio), self.patch), _nearest(high, self.patch)


def _nearest(length: float, unit: int) -> int:
    """The multiple of the unit, at least one, that is nearest."""
    return max(round(length / unit) * unit, unit)


class Slices(Layout):
    """The whole image and the slices of it, row by row, as the published code cuts and names them."""

    stacked: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.marker = MARKER
        self.slicing = Slicing.of(self.config)

    @property
    def image_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(UNKNOWN)

    def __call__(self, image: "Image") -> Laid:
        from PIL.Image import Resampling

        slicing, latents = self.slicing, self.config.query_num
        size = (image.width, image.height)
        cols, rows = slicing.tiles(*size)
        parts = [image.resize(slicing.overview(*size), Resampling.BICUBIC)]
        places = [(0.0, 0.0, 1.0, 1.0)]  # top, left, height and width in fractions of the image
        if cols:
            whole = image.resize(slicing.sliced(*size, cols, rows), Resampling.BICUBIC)
            wide, high = whole.width // cols, whole.height // rows
            for row in range(rows):
                for col in range(cols):
                    parts.append(whole.crop((col * wide, row * high, (col + 1) * wide, (row + 1) * high)))
                    places.append((row / rows, col / cols, 1 / rows, 1 / cols))
        patch = slicing.patch
        sizes = [(part.height // patch, part.width // patch) for part in parts]
        pieces = [
            Piece(grid(0, h, w), top, left, high / h, wide / w, np.arange(n * latents, (n + 1) * latents))
            for n, ((h, w), (top, left, high, wide)) in enumerate(zip(sizes, places, strict=True))
        ]
        tensors = {
            "pixel_values": stack([in_line(part, patch) for part in parts]),
            "target_sizes": torch.tensor(sizes),
            "patch_positions": self._positions(max(h * w for h, w in sizes)).repeat(len(parts), 1),
        }
        return Laid(tensors, self._text(cols, rows), pieces)

    def _positions(self, length: int) -> torch.Tensor:
        tower = self.config.vision_config
        return line_positions(length, tower.image_size // tower.patch_size)

    def _text(self, cols: int, rows: int) -> str:
        one = f"<image>{self.token * self.config.query_num}</image>"
        return one + (f"<slice>{chr(10).join([one * cols] * rows)}</slice>" if cols else "")


def in_line(image: "Image", patch: int) -> torch.Tensor:
    """(3, patch, P * patch): the patches of an image one after the other, row by row, in [-1, 1]."""
    pixels_YX3 = np.asarray(image, np.float32) / np.float32(255)
    scaled_YX3 = (pixels_YX3 - np.float32(0.5)) / np.float32(0.5)
    rows, cols = image.height // patch, image.width // patch
    split = scaled_YX3.reshape(rows, patch, cols, patch, 3).transpose(4, 1, 0, 2, 3)
    return torch.from_numpy(np.ascontiguousarray(split.reshape(3, patch, rows * cols * patch)))


class MiniCPM(Native):
    """The family of `MiniCPMV`."""

    @classmethod
    def load(cls, path: str, **options) -> tuple[nn.Module, object]:
        processor = cls._processor(path, options)
        options.pop("trust_remote_code", None)  # nothing of the published code is run
        return MiniCPMV.from_pretrained(path, **options), processor

    @classmethod
    def skeleton(cls, path: str, **options) -> tuple[nn.Module, object]:
        processor = cls._processor(path, options)
        kernels = {name: options[name] for name in ("dtype", "attn_implementation") if name in options}
        where = {name: options[name] for name in ("revision", "local_files_only") if name in options}
        return MiniCPMV._from_config(MiniCPMVConfig.from_pretrained(path, **where), **kernels), processor

    @staticmethod
    def _processor(path: str, options: dict) -> Processor:
        from transformers import PreTrainedConfig, PreTrainedTokenizerFast

        where = {name: options[name] for name in ("revision", "local_files_only") if name in options}
        found, _ = PreTrainedConfig.get_config_dict(path, **where)
        tower = (found.get("vision_config") or {}).get("model_type", "")
        if not tower.startswith("idefics2"):
            raise UserError(
                f"{path} is another MiniCPM-V: of the type 'minicpmv' only MiniCPM-Llama3-V-2.5, whose vision "
                f"tower is idefics2, is supported, and this one's is '{tower or 'not stated'}'"
            )
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **where)
        processor = Processor(tokenizer, path)
        for token in (UNKNOWN, "<image>", "</image>", "<slice>", "</slice>"):
            if token not in tokenizer.get_vocab():
                raise UserError(f"the tokenizer of {path} has no token {token}")
        return processor

    def prepare(self, model: nn.Module) -> None:
        self.layout = Slices(model.config, None, self.tokenizer)

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        return {index: layer.self_attn for index, layer in enumerate(_inner(model).llm.model.layers)}

    def relays(self, model: nn.Module) -> list[nn.Module]:
        return [_inner(model).resampler.attn]

    def through(self, relays_NQK: list[torch.Tensor]) -> torch.Tensor:
        return relays_NQK[0]

    def collate_image(
        self, items: Sequence[Item], ids_BL: torch.Tensor, shift: Sequence[int], train: bool
    ) -> dict[str, torch.Tensor]:
        seen = [item.image for item in items if item.image]
        if not seen and not train:
            return {}
        if not seen:  # in training every rank runs the tower, if only for one patch of nothing
            patch = self.layout.slicing.patch
            one = {"target_sizes": torch.ones(1, 2).long(), "patch_positions": torch.zeros(1, 1).long()}
            seen = [{"pixel_values": torch.zeros(1, 3, patch, patch)} | one]
        pixels = stack([pixels_3YX for image in seen for pixels_3YX in image["pixel_values"]])
        places = stack([line_P + 1 for image in seen for line_P in image["patch_positions"]]) - 1  # -1 is padding
        return {
            "pixel_values": pixels,
            "target_sizes": torch.cat([image["target_sizes"] for image in seen]),
            "patch_positions": places,
            "image_mask": ids_BL == self.layout.image_id,
        }


def _inner(model: nn.Module) -> MiniCPMV:
    return next(module for module in model.modules() if isinstance(module, MiniCPMV))
