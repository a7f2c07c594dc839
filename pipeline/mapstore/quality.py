"""How much a map says: a peak and an entropy, and a filter that leaves out maps that say nothing."""

from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

import numpy as np

from pipeline.mapstore.schema import STATUS, ExampleMaps

_OK = STATUS["ok"]
_NO_WORDS = np.zeros(0, bool)


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
        fine_W = maps.status == _OK
        if self.active and len(fine_W):
            peak_W, entropy_W = quality(maps)
            fine_W = fine_W & (peak_W >= self.min_peak) & (entropy_W <= self.max_entropy)
        return fine_W


class Maps(Protocol):
    """What is needed of a map store."""

    def get(self, key: str) -> ExampleMaps | None: ...


@dataclass
class Counts:
    """What has been read so far; examples that are read again count again."""

    examples: int = 0
    without_maps: int = 0
    words: int = 0
    unusable: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, usable_W: np.ndarray) -> None:
        """One example; from any thread."""
        words = len(usable_W)
        unusable = words - np.count_nonzero(usable_W)
        with self._lock:
            self.examples += 1
            self.without_maps += not words
            self.words += words
            self.unusable += unusable

    @property
    def unusable_share(self) -> float:
        """Share of the words that have no map or whose map the quality filter leaves out."""
        return self.unusable / max(self.words, 1)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=Lock())


class FilteredMaps:
    """A map store behind a quality filter, with counts of what went through."""

    def __init__(self, store: Maps, quality: QualityFilter | None = None, counts: Counts | None = None):
        self.store, self.quality = store, quality or QualityFilter()
        self.counts = Counts() if counts is None else counts
        self._chooses = self.quality.active

    def get(self, key: str) -> tuple[ExampleMaps | None, np.ndarray]:
        """The maps of an example, or None, and (W,) bool which of its words are worth aligning."""
        maps = self.store.get(key)
        if maps is None:
            usable_W = _NO_WORDS
        else:
            usable_W = self.quality.usable(maps) if self._chooses else maps.status == _OK
        self.counts.add(usable_W)
        return maps, usable_W


def quality(maps: ExampleMaps) -> tuple[np.ndarray, np.ndarray]:
    """Peak and entropy (W,) of the raw attention, so that the stretching to 0..1 does not hide a flat map."""
    cells = maps.maps.shape[1] * maps.maps.shape[2]
    raw_WC = np.maximum(maps.raw().reshape(-1, cells), 0)
    share_WC = raw_WC / np.maximum(raw_WC.sum(axis=1, keepdims=True), 1e-30)
    logs_WC = np.log(np.where(share_WC > 0, share_WC, 1))
    entropy_W = -(share_WC * logs_WC).sum(axis=1) / np.log(cells)
    return share_WC.max(axis=1, initial=0) * cells, entropy_W
