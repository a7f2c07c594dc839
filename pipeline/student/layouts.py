"""How each native vision-language model of transformers cuts an image into tokens.

A layout takes an image and gives the model's tensors, the text that stands for the image in the prompt, and where
each image token lies. Sizes come from the model's image processor and config, so every checkpoint of an architecture
is covered; whatever a layout cannot place exactly it refuses.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.student.batch import EncodeError
from pipeline.student.planes import Piece

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Laid:
    """An image as a model takes it.

    Args:
        tensors: what the image processor made, without a batch dimension where `Layout.stacked` says so.
        text: what takes the place of `Layout.marker` in the prompt.
        pieces: where the image tokens lie; columns count the image tokens from 0 (behind a relay, the latents do).
        gap: what goes between the image and a word that follows at once.
    """

    tensors: dict[str, torch.Tensor]
    text: str
    pieces: list[Piece]
    gap: str = ""


@dataclass
class Layout:
    """One architecture.

    Args:
        config: the model's config.
        processor: its image processor (the PIL one).
        tokenizer: its tokenizer.
        marker: what the chat template writes for an image.
        token: the image token's text.
    """

    config: object
    processor: object
    tokenizer: object
    marker: str = field(init=False)
    token: str = field(init=False)
    # Tensors that get a batch dimension; the others of several images are joined along their first, or along another.
    stacked: ClassVar[tuple[str, ...]] = ("pixel_values",)
    along: ClassVar[dict[str, int]] = {}
    packs: ClassVar[bool] = True  # whether layers keep several sequences in one row apart by their positions
    # Parts of the model that run once for every image or slice. Ranks run them a different number of times, so FSDP
    # must not gather their weights each time.
    per_image: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.token = self.marker = self.tokenizer.convert_ids_to_tokens(self.image_id)

    @property
    def image_id(self) -> int:
        return self.config.image_token_id

    def __call__(self, image: "Image") -> Laid:
        raise NotImplementedError

    def extra(self, image_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further inputs, from which positions hold image tokens."""
        return {}

    def relays(self, model: nn.Module) -> list[nn.Module]:
        """Attention modules between patches and image tokens, see `Family.relays`."""
        return []

    def keys(self, columns_BTHW: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The columns of the pieces of a batch, where they depend on how the batch is padded."""
        return columns_BTHW

    def layers(self, count: int) -> list[int]:
        """Text layers that attend to the whole image: not those of a sliding window, nor of linear attention."""
        kinds = getattr(self.config.get_text_config(), "layer_types", None)
        return [index for index in range(count) if not kinds or kinds[index] == "full_attention"]

    def pixels(self, image: "Image", **options) -> dict[str, torch.Tensor]:
        return dict(self.processor([image], return_tensors="pt", **options))


def grid(first: int, rows: int, cols: int) -> np.ndarray:
    """(rows, cols) token numbers from ``first``, row by row."""
    return first + np.arange(rows * cols).reshape(rows, cols)


class Qwen(Layout):
    """Qwen2-VL to Qwen3-VL: the image stretched to a multiple of two patches, no padding, 2 x 2 patches a token."""

    stacked: ClassVar[tuple[str, ...]] = ()
    longest: ClassVar[int] = 200  # times as long as wide; the published processor raises at more

    def __call__(self, image: "Image") -> Laid:
        if max(image.size) > self.longest * min(image.size):
            raise EncodeError(f"an image of {image.width}x{image.height} pixels: at most {self.longest} to 1")
        tensors = self.pixels(image)
        _, high, wide = tensors["image_grid_thw"][0].tolist()
        rows, cols = high // self.processor.merge_size, wide // self.processor.merge_size
        return Laid(tensors, self.token * (rows * cols), [Piece(grid(0, rows, cols), 0, 0, 1 / rows, 1 / cols)])

    def extra(self, image_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mm_token_type_ids": image_BL.int()}


class Llava(Layout):
    """LLaVA-1.5: one square, the middle of the image or the image padded to a square."""

    def __call__(self, image: "Image") -> Laid:
        tensors = {name: value[0] for name, value in self.pixels(image).items()}
        patch = self.config.vision_config.patch_size
        size_y, size_x = tensors["pixel_values"].shape[-2:]
        rows, cols = size_y // patch, size_x // patch  # what is left beyond the last whole patch is not seen
        first = self._class_tokens()
        top, left, high, wide = window(self.processor, image.height, image.width)
        pieces = [Piece(grid(first, rows, cols), top, left, high * patch / size_y, wide * patch / size_x)]
        return Laid(tensors, self.token * (first + rows * cols), pieces)

    def _class_tokens(self) -> int:
        """Tokens before the patches that reach the text model."""
        has_class = self.config.vision_config.model_type == "clip_vision_model"
        return int(has_class and self.config.vision_feature_select_strategy == "full")


def window(made, height: int, width: int) -> tuple[float, float, float, float]:
    """Top, left, height and width of what an image processor that makes squares shows of an image, in fractions of it.

    Args:
        made: the processor: pads to a square or not, resizes, and cuts out the middle or not.
        height, width: of the image, in pixels.
    """
    top, left, high, wide = 0.0, 0.0, height, width
    if getattr(made, "do_pad", False):
        side = max(height, width)
        top, left, high, wide = -((side - height) // 2), -((side - width) // 2), side, side
    scaled_y = scaled_x = 1.0
    if made.do_resize and "shortest_edge" in made.size and made.size["shortest_edge"]:
        short, long = sorted((high, wide))
        edge = made.size["shortest_edge"]
        fitted = (edge, int(edge * long / short)) if high <= wide else (int(edge * long / short), edge)
        scaled_y, scaled_x = fitted[0] / high, fitted[1] / wide
    elif made.do_resize:
        scaled_y, scaled_x = made.size["height"] / high, made.size["width"] / wide
    if getattr(made, "do_center_crop", False):
        crop_y, crop_x = made.crop_size["height"], made.crop_size["width"]
        size_y, size_x = round(high * scaled_y), round(wide * scaled_x)
        top += (size_y - crop_y) // 2 / scaled_y
        left += (size_x - crop_x) // 2 / scaled_x
        high, wide = crop_y / scaled_y, crop_x / scaled_x
    return top / height, left / width, high / height, wide / width


class LlavaNext(Layout):
    """LLaVA-NeXT and LLaVA-OneVision: the whole image in one tile, then tiles of it at higher resolution without the
    padding, with a newline token at the end of each row."""

    stacked: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def __call__(self, image: "Image") -> Laid:
        from transformers.image_processing_utils import select_best_resolution

        tensors = {name: value[0] for name, value in self.pixels(image).items() if name in self.stacked}
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        height, width = image.height, image.width
        best = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        # Where the resized image lies on the canvas of tiles, in pixels of the canvas (get_patch_output_size).
        if best[1] / width < best[0] / height:
            high, wide = min(math.ceil(height * best[1] / width), best[0]), best[1]
        else:
            high, wide = best[0], min(math.ceil(width * best[0] / height), best[1])
        above, before = (best[0] - high) // 2, (best[1] - wide) // 2
        # What the model cuts off the canvas again, in patches (unpad_image).
        rows, cols = best[0] // vision.image_size * side, best[1] // vision.image_size * side
        cut_y = cut_x = 0
        if width / height > cols / rows:
            cut_y = (rows - int(round(height * (cols / width), 7))) // 2
        else:
            cut_x = (cols - int(round(width * (rows / height), 7))) // 2
        rows, cols = rows - 2 * cut_y, cols - 2 * cut_x
        limit = getattr(self.config, "vision_aspect_ratio", "")
        ratio = math.sqrt(rows * cols / (int(limit.removeprefix("anyres_max_")) * side**2)) if limit else 0.0
        scale_y = scale_x = 1.0
        if ratio > 1.1:
            fewer_rows, fewer_cols = int(rows // ratio), int(cols // ratio)
            scale_y, scale_x = rows / fewer_rows, cols / fewer_cols
            rows, cols = fewer_rows, fewer_cols
        fine = grid(side * side, rows, cols + 1)[:, :cols]
        seen = vision.patch_size / vision.image_size
        pieces = [Piece(grid(0, side, side), 0, 0, seen, seen)]
        for y, y_end, top, step_y in self._runs(rows, scale_y, cut_y):
            for x, x_end, left, step_x in self._runs(cols, scale_x, cut_x):
                part = fine[y:y_end, x:x_end]
                pieces.append(Piece(part, (top - above) / high, (left - before) / wide, step_y / high, step_x / wide))
        return Laid(tensors, self.token * (side * side + rows * (cols + 1)), pieces)

    def _runs(self, count: int, scale: float, cut: int) -> list[tuple[int, int, float, float]]:
        """Tokens along one side of the canvas in runs of even steps: first token, the one after the last, where the run
        begins and the step, both in pixels of the canvas.

        One run, unless tiles are no whole number of patches (384 pixels, 27 patches of 14 each): what is left at a
        tile's end is not seen, and the next run begins after it. A token made of patches on both sides of it counts to
        the side of its middle.

        Args:
            count: tokens.
            scale: patches in each.
            cut: patches before the first.
        """
        size, patch = self.config.vision_config.image_size, self.config.vision_config.patch_size
        per_tile = size // patch if size % patch else 1 << 30
        middles = cut + (np.arange(count) + 0.5) * scale
        tile_of = (middles // per_tile).astype(int)
        runs = []
        for tile in np.unique(tile_of):
            tokens = np.flatnonzero(tile_of == tile)
            begins = tile * size + patch * (cut + tokens[0] * scale - tile * per_tile)
            runs.append((int(tokens[0]), int(tokens[-1]) + 1, begins, patch * scale))
        return runs


class InternVL(Layout):
    """InternVL: the image stretched over a grid of tiles, then a thumbnail of the whole if there are several."""

    stacked: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start, self.end = self.tokenizer.start_image_token, self.tokenizer.end_image_token

    def __call__(self, image: "Image") -> Laid:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        made = self.processor
        tensors = {"pixel_values": self.pixels(image, crop_to_patches=True)["pixel_values"]}
        size = (made.size["height"], made.size["width"])
        tiles_x, tiles_y = get_optimal_tiled_canvas(
            (image.height, image.width), size, made.min_patches, made.max_patches
        )
        patch = self.config.vision_config.patch_size
        patch = patch[0] if isinstance(patch, list | tuple) else patch
        side = int(size[0] // patch * self.config.downsample_ratio)
        pieces = tiled(tiles_y, tiles_x, side)
        return Laid(tensors, self.start + self.token * (len(pieces) * side * side) + self.end, pieces)


class Idefics3(Layout):
    """Idefics3 and SmolVLM: the image stretched over a grid of tiles, each named by row and column, then the whole."""

    stacked: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")

    def __call__(self, image: "Image") -> Laid:
        made = self.processor([[image]], return_tensors="pt", return_row_col_info=True)
        tensors = {name: made[name][0] for name in self.stacked}
        rows, cols = made["rows"][0][0], made["cols"][0][0]
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size // self.config.scale_factor
        run = self.token * (side * side)
        fake = "<fake_token_around_image>"
        text = "".join(
            "".join(f"{fake}<row_{r + 1}_col_{c + 1}>{run}" for c in range(cols)) + "\n" for r in range(rows)
        )
        text += ("\n" if rows else "") + f"{fake}<global-img>{run}{fake}"
        return Laid(tensors, text, tiled(max(rows, 1), max(cols, 1), side))


class Idefics2(Layout):
    """Idefics2: the whole image, or its quarters before it, padded at the right and the bottom; each becomes 64
    latents of a perceiver, whose keys are the patches."""

    stacked: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    wide: ClassVar[int] = 1 << 12  # patches in a row, until the batch's padding says how many

    def __call__(self, image: "Image") -> Laid:
        if self.processor.do_image_splitting and min(image.size) < 2:
            raise EncodeError(f"an image of {image.width}x{image.height} pixels has no quarters")
        made = self.processor([[image]], return_tensors="pt")
        tensors = {name: made[name][0] for name in self.stacked}
        patch, latents = self.config.vision_config.patch_size, self.config.perceiver_config.resampler_n_latents
        half_y, half_x = image.height // 2, image.width // 2
        parts = [(0, 0, image.height, image.width)]  # top, left, height, width in pixels
        if self.processor.do_image_splitting:
            ys, xs = ((0, half_y), (half_y, image.height - half_y)), ((0, half_x), (half_x, image.width - half_x))
            parts = [(top, left, high, wide) for top, high in ys for left, wide in xs] + parts
        pieces = []
        for number, (top, left, high, wide) in enumerate(parts):
            mask_YX = tensors["pixel_attention_mask"][number]
            fitted_y, fitted_x = int(mask_YX[:, 0].sum()), int(mask_YX[0].sum())
            # What is left of the image beyond the last whole patch is not seen.
            rows, cols = fitted_y // patch, fitted_x // patch
            columns = self.wide * np.arange(rows)[:, None] + np.arange(cols)
            step_y, step_x = patch * high / fitted_y / image.height, patch * wide / fitted_x / image.width
            first = np.arange(number * latents, (number + 1) * latents)
            pieces.append(Piece(columns, top / image.height, left / image.width, step_y, step_x, first))
        fake = "<fake_token_around_image>"
        text = (fake + self.token * latents) * len(parts) + fake
        return Laid(tensors, text, pieces, gap=" ")

    def relays(self, model: nn.Module) -> list[nn.Module]:
        return [layer.self_attn for layer in model.connector.perceiver_resampler.layers]

    def keys(self, columns_BTHW: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if "pixel_values" not in inputs:
            return columns_BTHW
        cols = inputs["pixel_values"].shape[-1] // self.config.vision_config.patch_size
        return columns_BTHW // self.wide * cols + columns_BTHW % self.wide


class Gemma3(Layout):
    """Gemma 3: the image stretched to a square, 16 x 16 tokens; only full-attention layers see all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.marker = self.tokenizer.boi_token
        if self.processor.do_pan_and_scan:
            raise UserError("gemma3 with pan-and-scan crops is not supported: set do_pan_and_scan to false")

    def __call__(self, image: "Image") -> Laid:
        tensors = {"pixel_values": self.pixels(image)["pixel_values"][0]}
        side = math.isqrt(self.config.mm_tokens_per_image)
        text = f"\n\n{self.tokenizer.boi_token}{self.token * side**2}{self.tokenizer.eoi_token}\n\n"
        return Laid(tensors, text, [Piece(grid(0, side, side), 0, 0, 1 / side, 1 / side)])

    def extra(self, image_BL: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"token_type_ids": image_BL.long()}


class MiniCPM46(Layout):
    """MiniCPM-V 4.6: the whole image, then, of a large one, a grid of slices, each stretched to a multiple of four (or
    two) patches, which become one token. Only every fourth layer of the text model attends; the others are linear."""

    stacked: ClassVar[tuple[str, ...]] = ()
    along: ClassVar[dict[str, int]] = {"pixel_values": 3}  # the patches of all images in one row
    packs: ClassVar[bool] = False
    per_image: ClassVar[tuple[str, ...]] = ("merger",)

    def __post_init__(self) -> None:
        super().__post_init__()
        made, config = self.processor, self.config
        if made.downsample_mode != config.downsample_mode:
            raise UserError(
                f"minicpmv4_6: its processor counts tokens for downsample_mode {made.downsample_mode}, the model makes "
                f"them for {config.downsample_mode}"
            )
        merges = tuple(config.merge_kernel_size), tuple(config.vision_config.window_kernel_size), config.merger_times
        if merges != ((2, 2), (2, 2), 1):
            raise UserError("minicpmv4_6 that merges patches other than 2x2 and 2x2 is not supported")
        if not made.do_resize:
            raise UserError("minicpmv4_6 without do_resize is not supported: images would not fill whole tokens")
        self.patches = 2 if config.downsample_mode == "4x" else 4  # of a token, in height and width

    def __call__(self, image: "Image") -> Laid:
        tensors = self.pixels(image)
        rows, cols = tensors.pop("grids")[0]
        tensors.pop("num_patches_per_image")
        # The whole, then its slices, row by row; all as tokens of height and width.
        sizes = (tensors["target_sizes"] // self.patches).tolist()
        places = [(0, 0, 1, 1)] + [(r, c, rows, cols) for r in range(rows) for c in range(cols)]
        pieces, texts, first = [], [], 0
        for (r, c, of_rows, of_cols), (high, wide) in zip(places, sizes, strict=True):
            pieces.append(
                Piece(grid(first, high, wide), r / of_rows, c / of_cols, 1 / (of_rows * high), 1 / (of_cols * wide))
            )
            texts.append(self.token * (high * wide))
            first += high * wide
        tok = self.tokenizer
        text = tok.image_start_token + texts[0] + tok.image_end_token
        if self.processor.use_image_id:
            text = f"{tok.image_id_start_token}0{tok.image_id_end_token}{text}"
        slices = [tok.slice_start_token + run + tok.slice_end_token for run in texts[1:]]
        text += "\n".join("".join(slices[r * cols : (r + 1) * cols]) for r in range(rows))
        return Laid(tensors, text, pieces)


def tiled(rows: int, cols: int, side: int) -> list[Piece]:
    """Tiles of side x side tokens that cover the image, row by row; if there are several, one more for the whole."""
    step_y, step_x = 1 / (rows * side), 1 / (cols * side)
    pieces = [
        Piece(grid((r * cols + c) * side * side, side, side), r / rows, c / cols, step_y, step_x)
        for r in range(rows)
        for c in range(cols)
    ]
    if len(pieces) > 1:
        pieces.append(Piece(grid(len(pieces) * side * side, side, side), 0, 0, 1 / side, 1 / side))
    return pieces


LAYOUTS: dict[str, type[Layout]] = {
    "qwen2_vl": Qwen,
    "qwen2_5_vl": Qwen,
    "qwen3_vl": Qwen,
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_onevision": LlavaNext,
    "internvl": InternVL,
    "idefics3": Idefics3,
    "smolvlm": Idefics3,
    "gemma3": Gemma3,
    "idefics2": Idefics2,
    "minicpmv4_6": MiniCPM46,
    "paligemma": Llava,  # a square
}
