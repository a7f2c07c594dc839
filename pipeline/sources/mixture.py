"""Several data sets as one, evenly interleaved; every example keeps the name and the licence of its own.

`data.parts` names them, each with the settings it would have alone and a `weight`: 1 takes it once, 0.5 every other
input, 2 each one twice. `expected` is how many inputs a part should have, so that half a download is noticed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.sources.base import RawItem, Source
from pipeline.sources.config import DataConfig

if TYPE_CHECKING:
    from pipeline.layout import Layout

# What a part may say for itself; the rest (bounds, size of the shards, ...) holds for the mixture as a whole.
_SETTINGS = (
    "kind", "path", "images", "splits", "licence", "limit", "prompt", "captions", "columns", "sizes", "seed",
)  # fmt: skip
_OFFLINE = ("easy_vqa", "world")  # kinds that need no path
_NAME = re.compile(r"[\w.-]+")  # it is part of every id, before a slash, and of names of files


def open_source(data: DataConfig, layout: "Layout") -> "Mixture":
    """Opens every part.

    Raises:
        UserError: no parts, a part with an unknown or wrong setting, or one that is not there.
    """
    from pipeline.sources import open_source as open_part

    if not data.parts:
        raise UserError(f"data '{data.name}' needs data.parts: name: {{kind, path, ...}}")
    parts = {}
    for name, given in data.parts.items():
        settings, weight, expected = part_config(str(name), given, data)
        own = copy(layout)
        own.source_dir = layout.source_dir / settings.name  # two worlds must not draw over each other
        parts[settings.name] = Part(open_part(settings, own), settings.licence, weight, settings.limit, expected)
    return Mixture(parts)


def part_config(name: str, given: Any, data: DataConfig) -> tuple[DataConfig, float, int]:
    """The settings of one part, its weight and the inputs expected of it.

    Raises:
        UserError: one is unknown, of the wrong type or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not _NAME.fullmatch(name):
        raise UserError(f"data.parts: '{name}' cannot name a part: use letters, digits, '_', '-' and '.'")
    if not isinstance(given, Mapping):
        raise UserError(f"data.parts.{name} is {given!r}: give {{kind: ..., path: ...}}")
    settings = dict(given)
    weight, expected = settings.pop("weight", 1.0), settings.pop("expected", 0)
    if unknown := sorted(settings.keys() - set(_SETTINGS)):
        raise UserError(
            f"data.parts.{name}.{unknown[0]}: no setting of a part; it has {', '.join(_SETTINGS)}, weight, expected"
        )
    if settings.get("kind", "mixture") == "mixture":
        raise UserError(f"data.parts.{name}: needs a kind other than mixture")
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f"data.parts.{name}.weight is {weight}: give a number above 0")
    if not isinstance(expected, int) or expected < 0:
        raise UserError(f"data.parts.{name}.expected is {expected}: give a number of inputs, or 0")
    if settings.get("path") in (None, "", "???"):
        if settings["kind"] not in _OFFLINE:
            raise UserError(f"data.parts.{name}.path is not set: give data.parts.{name}.path=...")
        settings.pop("path", None)
    settings = {"prompt": data.prompt, "captions": data.captions, **settings, "name": name}
    try:
        checked = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), settings))
    except OmegaConfBaseException as error:
        raise UserError(f"data.parts.{name}.{error.full_key}: {str(error).partition(chr(10))[0]}") from error
    return checked, float(weight), expected


@dataclass
class Part:
    """One data set of the mixture."""

    source: Source
    licence: str
    weight: float
    limit: int
    expected: int = 0

    def available(self, split: str) -> int:
        """Inputs of a split, with the part's own limit."""
        count = self.source.count(split) if split in self.source.splits() else 0
        return min(count, self.limit) if self.limit else count

    def taken(self, split: str) -> int:
        """Inputs that the mixture takes."""
        return round(self.available(split) * self.weight)

    def report(self) -> str:
        """Inputs by split, whether as many as expected, weight and licence. Expected are those of all splits together,
        or of train where `limit` cuts each split."""
        splits = {split: self.available(split) for split in self.source.splits()}
        found = splits.get("train", 0) if self.limit else sum(splits.values())
        counted = ", ".join(f"{split} {count}" for split, count in splits.items())
        text = f"{found} inputs ({counted})"
        if self.expected:
            off = found - self.expected
            text += f" of {self.expected} expected" + (f", {abs(off)} {'more' if off > 0 else 'fewer'}" if off else "")
        return f"{text}; weight {self.weight:g}; licence {self.licence}"


@dataclass
class Mixture(Source):
    """The parts by name."""

    parts: dict[str, Part]
    _order: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def splits(self) -> list[str]:
        names = {split for part in self.parts.values() for split in part.source.splits()}
        return sorted(names, key=lambda split: (split != "train", split))

    def count(self, split: str) -> int:
        return sum(part.taken(split) for part in self.parts.values())

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        order = self._interleaved(split)
        stop = len(order) if stop is None else min(stop, len(order))
        before = np.bincount(order[:start], minlength=len(self.parts))
        after = np.bincount(order[:stop], minlength=len(self.parts))
        streams = [
            self._part_items(name, split, int(low), int(high))
            for name, low, high in zip(self.parts, before, after, strict=True)
        ]
        for which in order[start:stop]:
            yield next(streams[which])

    def report(self) -> list[str]:
        return [f"{name}: {part.report()}" for name, part in self.parts.items()]

    def fingerprint(self, stamp: Path) -> dict[str, str]:
        return {
            f"{name}.{key}": value
            for name, part in self.parts.items()
            for key, value in part.source.fingerprint(stamp.with_name(f"{stamp.stem}-{name}{stamp.suffix}")).items()
        }

    def _part_items(self, name: str, split: str, low: int, high: int) -> Iterator[RawItem]:
        part = self.parts[name]
        available, taken = part.available(split), part.taken(split)
        number = low
        while number < high:  # the inputs, as often as the weight says, in their own order
            first = number * available // taken if taken < available else number % available
            last = (high - 1) * available // taken + 1 if taken < available else min(available, first + high - number)
            wanted = {n * available // taken for n in range(number, high)} if taken < available else None
            for place, item in enumerate(part.source.items(split, first, last), first):
                if wanted is None or place in wanted:
                    yield self._labelled(name, part, item)
                    number += 1

    def _labelled(self, name: str, part: Part, item: RawItem) -> RawItem:
        record = None if item.record is None else {"licence": part.licence, **item.record}
        return replace(item, id=f"{name}/{item.id}", record=record, source=name, root=item.root or part.source.root)

    def _interleaved(self, split: str) -> np.ndarray:
        """Which part each place of the mixture belongs to."""
        if split not in self._order:
            counts = [part.taken(split) for part in self.parts.values()]
            places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
            which = np.repeat(np.arange(len(counts)), counts)
            self._order[split] = which[np.argsort(places, kind="stable")]
        return self._order[split]
