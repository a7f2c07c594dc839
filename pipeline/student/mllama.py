"""Llama 3.2 Vision (`mllama`): cross-attention from some text layers to up to four image tiles.

The image keeps its aspect ratio, is fitted into a canvas of tiles and padded at the right and the bottom. Each tile
gives one class token and a square grid of patches; a text row attends to `tiles x tokens` keys.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.student import chat
from pipeline.student.batch import EncodeError, Item
from pipeline.student.family import Family
from pipeline.student.planes import Piece

if TYPE_CHECKING:
    from PIL.Image import Image


class Mllama(Family):
    """The family of `MllamaForConditionalGeneration`."""

    style = chat.Style(plain_system=True)
    patch_size = 14  # replaced by `prepare`

    @classmethod
    def load(cls, path: str, **options) -> tuple[nn.Module, object]:
        from transformers import MllamaForConditionalGeneration

        processor = cls._processor(path, **_where(options))
        return MllamaForConditionalGeneration.from_pretrained(path, **options), processor

    @classmethod
    def skeleton(cls, path: str, **options) -> tuple[nn.Module, object]:
        from transformers import MllamaConfig, MllamaForConditionalGeneration

        where = _where(options)
        config = MllamaConfig.from_pretrained(path, **where)
        kernels = {name: options[name] for name in ("dtype", "attn_implementation") if name in options}
        return MllamaForConditionalGeneration._from_config(config, **kernels), cls._processor(path, **where)

    @classmethod
    def _processor(cls, path: str, **where):
        from transformers import AutoTokenizer, MllamaProcessor
        from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

        # The parts are loaded one by one because the default image processor needs torchvision; this one gives the
        # same pixels with PIL.
        image_processor = MllamaImageProcessorPil.from_pretrained(path, **where)
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        template = _chat_template(path, tokenizer, where)
        return MllamaProcessor(image_processor, tokenizer, chat_template=template)

    def prepare(self, model: nn.Module) -> None:
        from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

        self.patch_size = model.config.vision_config.patch_size
        for module in model.modules():
            if isinstance(module, MllamaCrossAttentionDecoderLayer):
                module.register_forward_hook(_skip_text_only, with_kwargs=True)

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

        return {m.layer_idx: m for m in model.modules() if isinstance(m, MllamaTextCrossAttention)}

    @cached_property
    def tiles(self) -> int:
        """Tile slots of every image."""
        return self.processor.image_processor.max_image_tiles

    @cached_property
    def tile_size(self) -> int:
        """Pixels on a side of a tile."""
        return self.processor.image_processor.size["height"]

    def encode_image(self, image: "Image") -> tuple[dict[str, torch.Tensor], list[Piece], dict[str, int]]:
        """What `MllamaImageProcessorPil` gives for one image, without its costs per call."""
        made, tile, slots = self.processor.image_processor, self.tile_size, self.tiles
        (rows, cols), (high, wide) = self.fit(image.height, image.width)
        canvas_YX3 = np.zeros((rows * tile, cols * tile, 3), np.float32)
        canvas_YX3[:high, :wide] = np.asarray(image.resize((wide, high), made.resample))
        if made.do_rescale:
            canvas_YX3 *= np.float32(made.rescale_factor)
        if made.do_normalize:
            canvas_YX3 = (canvas_YX3 - np.float32(made.image_mean)) / np.float32(made.image_std)
        tiles_T3YX = canvas_YX3.reshape(rows, tile, cols, tile, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, tile, tile)
        pixels_T3YX = torch.zeros(slots, 3, tile, tile)
        pixels_T3YX[: rows * cols] = torch.from_numpy(tiles_T3YX)
        tensors = {
            "pixel_values": pixels_T3YX,
            "aspect_ratio_ids": torch.tensor(_ratios(slots).index((rows, cols)) + 1),
            "aspect_ratio_mask": torch.tensor([1] * (rows * cols) + [0] * (slots - rows * cols)),
        }
        return tensors, self.pieces(image.height, image.width), {"tiles": rows * cols}

    def fit(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of tiles for an image of this size, and its height and width in pixels inside them."""
        from transformers.models.mllama import image_processing_pil_mllama as published

        tile = self.tile_size
        canvas = published.get_optimal_tiled_canvas(height, width, self.tiles, tile)
        high, wide = published.get_image_size_fit_to_canvas(height, width, *canvas, tile)
        return (int(canvas[0]) // tile, int(canvas[1]) // tile), (int(high), int(wide))

    def pieces(self, height: int, width: int) -> list[Piece]:
        """The tiles that an image of this size fills, row by row, in fractions of the image."""
        (rows, cols), (high, wide) = self.fit(height, width)
        tile, patch = self.tile_size, self.patch_size
        grid = tile // patch
        inside = 1 + np.arange(grid * grid).reshape(grid, grid)  # token 0 of a tile is its class token
        pieces = []
        for row in range(rows):
            for col in range(cols):
                columns = len(pieces) * (grid * grid + 1) + inside
                pieces.append(Piece(columns, row * tile / high, col * tile / wide, patch / high, patch / wide))
        return pieces

    def locate(self, ids: list[int]) -> dict[str, int]:
        if self.processor.image_token_id not in ids:
            raise EncodeError("the image token lies beyond model.max_length")
        return {"at": ids.index(self.processor.image_token_id)}

    def collate_image(
        self, items: Sequence[Item], ids_BL: torch.Tensor, shift: Sequence[int], train: bool
    ) -> dict[str, torch.Tensor]:
        if not train and not any(item.image for item in items):
            return {}
        # In training a batch without any image still gets an empty one: ranks must run the same layers. Its effect
        # is taken back by `_skip_text_only`.
        blank = {
            "pixel_values": torch.zeros(self.tiles, 3, self.tile_size, self.tile_size),
            "aspect_ratio_ids": torch.tensor(0),
            "aspect_ratio_mask": torch.tensor([1] + [0] * (self.tiles - 1)),
        }
        made = {
            name: torch.stack([(item.image or blank)[name] for item in items])[:, None].contiguous() for name in blank
        }
        cross_BLIT = torch.zeros(*ids_BL.shape, 1, self.tiles, dtype=torch.long)
        for b, item in enumerate(items):
            if item.image:
                cross_BLIT[b, shift[b] + item.meta["at"] :, 0, : item.meta["tiles"]] = 1
        return made | {"cross_attention_mask": cross_BLIT}


def _where(options: dict) -> dict:
    return {name: options[name] for name in ("revision", "local_files_only") if name in options}


def _ratios(tiles: int) -> list[tuple[int, int]]:
    """The tile layouts (rows, columns) in the order of their ids, from 1."""
    from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios

    return get_all_supported_aspect_ratios(tiles)


def _skip_text_only(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> torch.Tensor:
    """Undoes a cross-attention layer for examples that see no image.

    The published code leaves such rows a uniform attention over another example's blank image; a text-only example
    would then depend on its neighbours in the batch.
    """
    seen_B1L1 = kwargs.get("full_text_row_masked_out_mask")
    if seen_B1L1 is None:
        return output
    before_BLC = args[0] if args else kwargs["hidden_states"]
    return torch.where(seen_B1L1.amax(dim=(1, 2, 3))[:, None, None] > 0, output, before_BLC)


def _chat_template(path: str, tokenizer, where: dict) -> str | None:
    """The processor's template if it has one of its own, else the tokenizer's."""
    from transformers import ProcessorMixin

    found, _ = ProcessorMixin.get_processor_dict(path, **where)
    return found.get("chat_template") or tokenizer.chat_template
