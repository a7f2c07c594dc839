"""How much a map says: a peak and an entropy, and a filter that leaves out maps that say nothing."""

from dataclasses import dataclass

import numpy as np

from pipeline.mapstore.schema import STATUS, ExampleMaps


@dataclass(frozen=True)
class QualityFilter:
    """Which words are worth aligning to; the default keeps all that have a map.

    Args:
        min_peak: least share of a map's attention in its strongest cell, in units of the even share (1 = flat).
        max_entropy: largest entropy, as a share of that of a flat map (1 = flat).
    """

    min_peak: float = 0.0
    max_entropy: float = 1.0

    @property
    def active(self) -> bool:
        return self.min_peak > 0 or self.max_entropy < 1

    def usable(self, maps: ExampleMaps) -> np.ndarray:
        """(W,) bool: the status is ok and the map passes."""
        fine_W = maps.status == STATUS["ok"]
        if self.active and len(fine_W):
            peak_W, entropy_W = quality(maps)
            fine_W = fine_W & (peak_W >= self.min_peak) & (entropy_W <= self.max_entropy)
        return fine_W


def quality(maps: ExampleMaps) -> tuple[np.ndarray, np.ndarray]:
    """Peak and entropy (W,) of the raw attention, so that the stretching to 0..1 does not hide a flat map."""
    cells = maps.maps.shape[1] * maps.maps.shape[2]
    raw_WC = np.maximum(maps.raw().reshape(-1, cells), 0)
    share_WC = raw_WC / np.maximum(raw_WC.sum(axis=1, keepdims=True), 1e-30)
    logs_WC = np.log(np.where(share_WC > 0, share_WC, 1))
    entropy_W = -(share_WC * logs_WC).sum(axis=1) / np.log(cells)
    return share_WC.max(axis=1, initial=0) * cells, entropy_W
