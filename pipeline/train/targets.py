"""What each arm pulls the student's attention to: one 32x32 map per word, and which words have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.examples import Word
from pipeline.mapstore.quality import Counts, FilteredMaps
from pipeline.regions import region_mask

if TYPE_CHECKING:
    from pipeline.archive import Archive
    from pipeline.examples import Example
    from pipeline.mapstore import ExampleMaps, MapStore
    from pipeline.mapstore.quality import QualityFilter

SIDE = 32


class Targets(Protocol):
    """Maps of some words of one example.

    ``counts`` says how many maps were read from a store; None where there is none.
    """

    counts: Counts | None

    def __call__(self, index: int, example: Example, words: list[Word]) -> tuple[np.ndarray, np.ndarray]:
        """Maps (W, 32, 32) float32 in [0, 1] and valid (W,) bool, for the example at ``index`` of the archive."""
        ...


def open_targets(
    kind: str, archive: Archive, maps: MapStore | None, seed: int, quality: QualityFilter | None = None
) -> Targets:
    """The targets of an arm.

    Args:
        kind: ``teacher``, ``shuffled``, ``centre`` or ``oracle``.
        archive: the examples that are trained on.
        maps: the teacher's maps of the same examples; not needed for ``centre`` and ``oracle``.
        seed: decides which other image ``shuffled`` takes.
        quality: of the teacher's maps, those that it leaves out are not aligned to.
    """
    if kind in ("centre", "oracle"):
        return WithoutStore(_centre if kind == "centre" else _oracle)
    assert maps is not None, f"targets '{kind}' read the map store"
    filtered = FilteredMaps(maps, quality)
    return FromTeacher(filtered) if kind == "teacher" else Shuffled(filtered, archive.keys, seed)


class WithoutStore:
    """Targets that are a function of the example alone."""

    counts = None

    def __init__(self, made: Callable[[Example, list[Word]], tuple[np.ndarray, np.ndarray]]):
        self.made = made

    def __call__(self, index: int, example: Example, words: list[Word]) -> tuple[np.ndarray, np.ndarray]:
        return self.made(example, words)


class FromTeacher:
    """The word's own map, found by (turn, start, end).

    In a store of finer spans (``teacher.unit=token``) a word's map is the mean, before scaling, of those that share a
    character with it.
    """

    def __init__(self, maps: FilteredMaps):
        self.maps, self.counts = maps, maps.counts

    def __call__(self, index: int, example: Example, words: list[Word]) -> tuple[np.ndarray, np.ndarray]:
        stored, usable_R = self.maps.get(example.key)
        rows = {} if stored is None else {tuple(word): row for row, word in enumerate(stored.words)}
        own = [rows.get(tuple(word)) for word in words]
        maps_WHW, valid_W = _take(stored, usable_R, own)
        if stored is None or None not in own:
            return maps_WHW, valid_W
        raw_RHW = stored.raw()
        for place in (place for place, row in enumerate(own) if row is None):
            usable = [row for row, span in enumerate(stored.words) if usable_R[row] and _meet(span, words[place])]
            if usable:
                mean_HW = raw_RHW[usable].mean(0)
                low, high = mean_HW.min(), mean_HW.max()
                if high > low:
                    maps_WHW[place], valid_W[place] = (mean_HW - low) / (high - low), True
        return maps_WHW, valid_W


def _meet(span: Word, word: Word) -> bool:
    return span.turn == word.turn and span.start < word.end and word.start < span.end


class Shuffled:
    """The maps of another example: the same kind of targets without the connection to the image.

    Example ``order[i]`` takes from ``order[i + 1]``, so that nobody gets their own; word number w takes usable map
    number w of the other, beginning again where that has fewer.
    """

    def __init__(self, maps: FilteredMaps, keys: list[str], seed: int):
        self.maps, self.counts, self.keys = maps, maps.counts, keys
        order = np.random.default_rng([seed, 0x5F]).permutation(len(keys))
        self.other = np.empty(len(keys), dtype=np.int64)
        self.other[order] = np.roll(order, -1)

    def __call__(self, index: int, example: Example, words: list[Word]) -> tuple[np.ndarray, np.ndarray]:
        stored, usable_R = self.maps.get(self.keys[int(self.other[index])])
        roles = {turn for turn, _, _ in words}
        usable = np.flatnonzero(usable_R).tolist()
        # Answers borrow from answers (odd turns from odd turns), so that the maps are of the same kind of word.
        alike = [r for r in usable if any((stored.words[r].turn - turn) % 2 == 0 for turn in roles)] or usable
        return _take(stored, usable_R, [alike[w % len(alike)] if alike else None for w in range(len(words))])


def unknown() -> Targets:
    """Targets of which no word has one."""
    return WithoutStore(lambda example, words: _take(None, np.zeros(0, bool), [None] * len(words)))


def _take(stored: ExampleMaps | None, usable_R: np.ndarray, rows: list[int | None]) -> tuple[np.ndarray, np.ndarray]:
    maps_WHW = np.zeros((len(rows), SIDE, SIDE), dtype=np.float32)
    valid_W = np.zeros(len(rows), dtype=bool)
    for place, row in enumerate(rows):
        if row is not None and usable_R[row]:
            maps_WHW[place] = stored.maps[row].astype(np.float32) / 255
            valid_W[place] = True
    return maps_WHW, valid_W


def _centre(example: Example, words: list[Word]) -> tuple[np.ndarray, np.ndarray]:
    """A round blob in the middle, a fifth of the side wide, for every word."""
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    blob = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 0.2**2)).astype(np.float32)
    blob = (blob - blob.min()) / (blob.max() - blob.min())
    return np.repeat(blob[None], len(words), axis=0), np.ones(len(words), dtype=bool)


def _oracle(example: Example, words: list[Word]) -> tuple[np.ndarray, np.ndarray]:
    """The true region of each word as its share of every cell, scaled to a highest value of one.

    A word has the regions of exactly its span, else the union of those whose spans share a character with it: a phrase
    with a region gives it to each of its words.
    """
    regions = example.meta.get("regions", [])
    maps_WHW = np.zeros((len(words), SIDE, SIDE), dtype=np.float32)
    valid_W = np.zeros(len(words), dtype=bool)
    for place, word in enumerate(words):
        own = [r for r in regions if _meet(Word(r["turn"], r["start"], r["end"]), word)]
        own = [r for r in own if (r["start"], r["end"]) == (word.start, word.end)] or own
        if not own:
            continue
        # Eight samples a side and cell give the covered share to about one part in sixty.
        mask = np.logical_or.reduce([region_mask(region, (SIDE * 8, SIDE * 8)) for region in own]).astype(np.float32)
        cover = mask.reshape(SIDE, 8, SIDE, 8).mean(axis=(1, 3))
        if cover.max() > 0 and cover.min() < cover.max():
            maps_WHW[place], valid_W[place] = cover / cover.max(), True
    return maps_WHW, valid_W
