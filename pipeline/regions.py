"""Regions of the image plane that a word is known to mean: run-length masks and boxes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def encode_rle(mask_HW: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a boolean mask: column by column, beginning with the count of zeros."""
    flat = np.asarray(mask_HW, bool).ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], changes, [flat.size]])
    counts = np.diff(edges).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    return {"size": [int(n) for n in mask_HW.shape], "counts": counts}


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The boolean (H, W) mask of `encode_rle`.

    Raises:
        ValueError: the counts do not add up to the size.
    """
    height, width = rle["size"]
    counts = np.asarray(rle["counts"], dtype=np.int64)
    if counts.sum() != height * width or (counts < 0).any():
        raise ValueError(f"run lengths cover {counts.sum()} of {height}x{width} pixels")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((height, width), order="F")


def region_mask(region: Mapping[str, Any], size: Sequence[int]) -> np.ndarray:
    """A region of `meta.regions` as a boolean (H, W) mask of the whole upright image.

    A mask of another size is sampled at the centres of the pixels; a box [x0, y0, x1, y1] (fractions of the width
    and height) holds the pixels whose centres lie in it.
    """
    height, width = size
    y_H = (np.arange(height) + 0.5) / height
    x_W = (np.arange(width) + 0.5) / width
    if "rle" in region:
        mask = decode_rle(region["rle"])
        if mask.shape == (height, width):
            return mask
        rows, columns = (y_H * mask.shape[0]).astype(int), (x_W * mask.shape[1]).astype(int)
        return mask[rows[:, None], columns[None, :]]
    inside = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in region["boxes"]:
        inside |= ((y_H >= y0) & (y_H < y1))[:, None] & ((x_W >= x0) & (x_W < x1))[None, :]
    return inside


def check_regions(regions: Any, texts: Sequence[str]) -> None:
    """Checks `meta.regions` against the texts of the turns.

    Raises:
        ValueError: a turn that does not exist, a span outside its text, run lengths or boxes that make no mask.
    """
    if not isinstance(regions, list):
        raise ValueError("regions is not a list")
    for number, region in enumerate(regions):
        try:
            turn, start, end = (int(region[name]) for name in ("turn", "start", "end"))
            if not (0 <= turn < len(texts) and 0 <= start < end <= len(texts[turn])):
                raise ValueError(f"span {turn}:{start}-{end} is outside the conversation")
            if "rle" in region:
                height, width = region["rle"]["size"]
                counts = region["rle"]["counts"]
                if sum(counts) != height * width or min(counts) < 0:
                    raise ValueError(f"run lengths do not cover {height}x{width} pixels")
            else:
                for box in region["boxes"]:
                    x0, y0, x1, y1 = box
                    if not 0 <= x0 < x1 <= 1 or not 0 <= y0 < y1 <= 1:
                        raise ValueError(f"box {box} is not made of growing fractions")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"region {number}: {type(error).__name__}: {error}") from error
