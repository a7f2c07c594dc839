"""Existing WebDataset tars: an image and a `.json` or `.txt` per key.

The `.json` holds `conversations`, or a question and an answer, or a caption, under the names that `data.columns`
gives; a `.txt` is a caption. A tar that is cut off is one more failed input.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, one_turn, split_files
from pipeline.sources.config import DataConfig
from pipeline.sources.tars import Member, by_key, read_index, read_member

if TYPE_CHECKING:
    from pipeline.layout import Layout

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm")


def open_source(data: DataConfig, layout: "Layout") -> "WebDataset":
    """Opens the tars of `data.path` (a folder or a pattern) or of each split."""
    path = needs_path(data.path, data.name, "FOLDER with tars, or a pattern")
    return WebDataset(split_files(path, data.splits, "*.tar", data.name), dict(data.columns), data.prompt)


@dataclass
class WebDataset(FileSource):
    """Samples of some tars per split, in the tars' order."""

    files: dict[str, list[Path]]
    columns: Mapping[str, str]
    prompt: str
    _counts: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def count(self, split: str) -> int:
        return sum(self._counted(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        first = 0
        for path, count in zip(self.files[split], self._counted(split), strict=True):
            low, high = max(start - first, 0), count if stop is None else min(stop - first, count)
            first += count
            if low < high:
                yield from (self._item(path, sample) for sample in samples(path)[low:high])

    def _counted(self, split: str) -> list[int]:
        if split not in self._counts:
            self._counts[split] = [len(samples(path)) for path in self.files[split]]
        return self._counts[split]

    def _item(self, path: Path, sample: tuple[str, dict[str, Member] | Failure]) -> RawItem:
        key, members = sample
        name = f"{path.stem}/{key}"
        if isinstance(members, Failure):
            return RawItem(name, None, None, members)
        images = [ext for ext in members if ext.rpartition(".")[2] in IMAGES]
        if len(images) > 1:
            return RawItem(name, None, None, Failure("unsupported", f"{len(images)} images: only one is supported"))
        image = read_member(path, members[images[0]]) if images else None
        try:
            record = self._record(path, members)
        except (ValueError, TypeError) as error:
            return RawItem(name, None, None, Failure("bad_json", f"its .json: {error}"))
        if record is None:
            return RawItem(name, None, None, Failure("missing_text", "has neither conversations nor a caption"))
        return RawItem(name, image, record)

    def _record(self, path: Path, members: dict[str, Member]) -> dict[str, Any] | None:
        found = {}
        if "json" in members:
            found = json.loads(read_member(path, members["json"]))
            if not isinstance(found, Mapping):
                raise TypeError(f"a JSON {type(found).__name__}, not an object")
        if "txt" in members:
            found = {"caption": read_member(path, members["txt"]).decode("utf-8", "replace"), **found}
        return to_record(found, self.columns, self.prompt)


def to_record(row: Mapping[str, Any], columns: Mapping[str, str], prompt: str) -> dict[str, Any] | None:
    """A conversation from a row of a table: whole, or a question and an answer, or a caption; None if there is none."""

    def named(what: str) -> Any:
        return row.get(columns.get(what, what))

    about = {name: row[name] for name in ("licence", "meta") if row.get(name) is not None}
    for name in (columns.get("conversations", "conversations"), "turns", "messages"):
        turns = row.get(name)
        if turns is not None:
            if name == "turns" and isinstance(turns, list):
                turns = [_own_turn(turn) for turn in turns]
            return {"conversations": turns, **about}
    if named("question") is not None or named("answer") is not None:
        return {"conversations": one_turn(str(named("question") or prompt), named("answer")), **about}
    if named("caption") is not None:
        return {"conversations": one_turn(prompt, named("caption")), **about}
    return None


def _own_turn(turn: Any) -> Any:
    """A turn of this pipeline's own tars as others write it; anything else as it is."""
    own = isinstance(turn, Mapping) and turn.keys() == {"role", "text"}
    return {"role": turn["role"], "content": turn["text"]} if own else turn


@lru_cache(maxsize=16)
def samples(path: Path) -> list[tuple[str, dict[str, Member] | Failure]]:
    """Keys of a tar with their members; if the tar is damaged, one more that says so."""
    members, failure = read_index(path)
    found: list[tuple[str, dict[str, Member] | Failure]] = list(by_key(members).items())
    return [*found, ("(end)", failure)] if failure else found
