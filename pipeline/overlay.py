"""Pictures of where a map looks: the image with the map's colours over it and the true region's outline; sheets of
them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 192  # pixels of the longer side of a picture on the page
GAP, LINE, TEXT = 6, 24, 13  # pixels of a sheet: between pictures, of a line of text, of its letters
INK, SOFT = (20, 18, 24), (110, 108, 120)
EDGE, HALO = (255, 255, 255), (20, 18, 24)


def enlarge(image: Image.Image, side: int = SIDE) -> Image.Image:
    """The image with its longer side at ``side`` pixels; small drawings keep hard pixel edges."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)


def overlay(image: Image.Image, map_HW: np.ndarray, region_HW: np.ndarray | None = None, side: int = SIDE):
    """Lays a map (any grid over the whole image, any range) over an RGB image; outlines a region's mask.

    The image is shown dark and almost grey, the map in colours that grow brighter with it (inferno), more opaque where
    it is high: the peak is seen on any image and also without colour vision. A constant map is shown as all low.
    """
    from matplotlib import colormaps

    picture = enlarge(image, side)
    map_HW = np.asarray(map_HW, dtype=np.float32)
    low, high = float(map_HW.min()), float(map_HW.max())
    unit = (map_HW - low) / (high - low) if high > low else np.zeros_like(map_HW)
    heat_HW = np.asarray(Image.fromarray(unit).resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    colours_HWC = colormaps["inferno"](heat_HW)[..., :3] * 255
    grey_HW1 = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    ground_HWC = 0.55 * (0.65 * grey_HW1 + 0.35 * np.asarray(picture, dtype=np.float32))
    alpha_HW1 = (0.25 + 0.6 * heat_HW)[..., None]
    mixed = ground_HWC * (1 - alpha_HW1) + colours_HWC * alpha_HW1
    if region_HW is not None:
        edge_HW = outline(region_HW, picture.size)
        mixed[_grown(edge_HW)] = HALO
        mixed[edge_HW] = EDGE
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def outline(region_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boundary pixels (H, W) of a mask scaled to ``size`` (width, height)."""
    scaled = Image.fromarray(np.asarray(region_HW, dtype=np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    inside = np.pad(np.asarray(scaled) > 0, 1)
    core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return inside[1:-1, 1:-1] & ~core


def _grown(mask_HW: np.ndarray) -> np.ndarray:
    """A mask and the pixels beside it."""
    padded = np.pad(mask_HW, 1)
    return padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:] | mask_HW


def encoded(image: Image.Image, colours: int = 0) -> bytes:
    """PNG bytes; with ``colours`` reduced to a palette, which makes small overlays three times smaller."""
    if colours:
        image = image.quantize(colours, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def sheet(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image | None]]]) -> Image.Image:
    """Pictures in a table on white: ``rows`` of (label, one picture or None for each head)."""
    from matplotlib import get_data_path
    from PIL import ImageDraw, ImageFont

    # Pillow's own font knows Latin alone.
    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT)
    heights = [max((picture.height for picture in pictures if picture), default=0) + LINE for _, pictures in rows]
    out = Image.new("RGB", (len(heads) * (SIDE + GAP) + GAP, LINE + sum(heights)), (255, 255, 255))
    draw = ImageDraw.Draw(out)
    for column, head in enumerate(heads):
        draw.text((GAP + column * (SIDE + GAP), GAP), head, SOFT, font)
    top = LINE
    for (label, pictures), height in zip(rows, heights, strict=True):
        draw.text((GAP, top + GAP), label, INK, font)
        for column, picture in enumerate(pictures):
            if picture is not None:
                out.paste(picture, (GAP + column * (SIDE + GAP), top + LINE))
        top += height
    return out
