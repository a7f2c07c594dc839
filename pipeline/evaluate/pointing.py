"""Where maps point, against regions that are known: the pointing game, mass inside and mean intersection over union.

Pointing game: Zhang et al., "Top-down neural attention by excitation backprop" (IJCV 2018), without tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))


@dataclass(frozen=True)
class Pointing:
    """One word's map against its region.

    Attributes:
        hit: the map's peak lies in the region; a constant map has no peak and misses.
        mass: share of the map's sum inside the region.
        area: share of the image that the region covers. A random point would hit as often, a map that is the same
            everywhere has as much mass inside, and taken as a whole that intersection over union.
        centre: the middle of the image lies in the region, which is what always looking there would score.
        centre_mass: share of `middle` inside the region.
        centre_iou: intersection over union of the region with where `middle` is above half of its height.
        ious: intersection over union of the map above each of ``THRESHOLDS`` with the region.
    """

    hit: bool
    mass: float
    area: float
    centre: bool
    centre_mass: float
    centre_iou: float
    ious: tuple[float, ...]


def peak(map_HW: np.ndarray) -> tuple[float, float] | None:
    """(y, x) of the highest cell's middle as fractions of the image; None for a constant map.

    A model's own grid is coarser than the plane, so one of its cells becomes a block of equal cells: the cell nearest
    to the middle of all highest cells is taken.
    """
    low, high = float(map_HW.min()), float(map_HW.max())
    if not np.isfinite(high - low) or high - low <= 1e-9 * max(1.0, abs(high)):
        return None
    rows, cols = np.nonzero(map_HW >= high - 1e-6 * (high - low))
    nearest = int(np.argmin((rows - rows.mean()) ** 2 + (cols - cols.mean()) ** 2))
    return (rows[nearest] + 0.5) / map_HW.shape[0], (cols[nearest] + 0.5) / map_HW.shape[1]


def measure(map_HW: np.ndarray, region_HW: np.ndarray) -> Pointing:
    """Compares a map over the whole image (any grid) with a region's mask (pixels of the image)."""
    map_HW = np.asarray(map_HW, dtype=np.float32)
    region_HW = np.asarray(region_HW, dtype=bool)
    height, width = region_HW.shape
    point = peak(map_HW)
    hit = point is not None and bool(region_HW[int(point[0] * height), int(point[1] * width)])
    scaled = np.asarray(Image.fromarray(map_HW).resize((width, height), Image.Resampling.BILINEAR))
    total = float(scaled.sum())
    mass = float(scaled[region_HW].sum()) / total if total > 0 else 0.0
    area = float(region_HW.mean())
    low, high = float(scaled.min()), float(scaled.max())
    inside = np.sort((scaled[region_HW] - low) / (high - low)) if high > low else np.zeros(0)
    everything = np.sort((scaled.ravel() - low) / (high - low)) if high > low else np.zeros(0)
    ious = []
    for threshold in THRESHOLDS:
        both = len(inside) - int(np.searchsorted(inside, threshold))
        above = len(everything) - int(np.searchsorted(everything, threshold))
        either = above + int(region_HW.sum()) - both
        ious.append(both / either if either else 0.0)
    blob_HW = middle(height, width)
    upper_HW = blob_HW > 0.5
    return Pointing(
        hit,
        mass,
        area,
        bool(region_HW[height // 2, width // 2]),
        float(blob_HW[region_HW].sum() / blob_HW.sum()),
        float((upper_HW & region_HW).sum() / (upper_HW | region_HW).sum()),
        tuple(ious),
    )


@lru_cache(maxsize=8)
def middle(height: int, width: int) -> np.ndarray:
    """The map of always looking at the middle: a Gaussian (H, W), its deviation a quarter of each side, its top 1."""
    y, x = ((np.arange(extent) + 0.5) / extent - 0.5 for extent in (height, width))
    return np.exp(-8 * (y[:, None] ** 2 + x[None] ** 2))


def best_threshold(measured: Sequence[Pointing]) -> float:
    """The threshold with the highest mean IoU: to be chosen on `val` and used elsewhere."""
    if not measured:
        raise ValueError("a threshold cannot be chosen without maps that have a region")
    return THRESHOLDS[int(np.mean([m.ious for m in measured], axis=0).argmax())]


def word_region(regions: Sequence[dict], turn: int, start: int, end: int, size: tuple[int, int]):
    """The region of a word and its kind: (mask (H, W) bool, kind), or None where the word has none.

    A region belongs to a word when its span covers the word's; a word in several has their union.

    Args:
        regions: ``meta.regions`` of an example. size: (height, width) for regions given as boxes.
    """
    from pipeline.regions import region_mask

    mask, kind = None, ""
    for region in regions:
        if region["turn"] == turn and region["start"] <= start and end <= region["end"]:
            part = region_mask(region, size)
            mask = part if mask is None else mask | part
            kind = region.get("kind", kind)
    return None if mask is None or not mask.any() else (mask, kind)
