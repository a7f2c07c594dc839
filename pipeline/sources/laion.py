"""Output of img2dataset: `00000.parquet` with a row for every URL, and `00000.tar` or a folder `00000/` of images.

What could not be downloaded is in the table with its reason, and so it stays visible here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, one_turn, split_files
from pipeline.sources.config import DataConfig
from pipeline.sources.table import count_rows, read_rows
from pipeline.sources.tars import by_key, read_index, read_member
from pipeline.sources.webdataset import IMAGES

if TYPE_CHECKING:
    from pipeline.layout import Layout


def open_source(data: DataConfig, layout: "Layout") -> "Laion":
    """Opens the folder that img2dataset wrote."""
    path = needs_path(data.path, data.name, "the output folder of img2dataset")
    tables = split_files(path, data.splits, "[0-9]*.parquet", data.name)
    return Laion(tables, data.prompt, path if path.is_dir() else path.parent)


@dataclass
class Laion(FileSource):
    """Rows of the tables; a row's image is in the tar or folder beside its table."""

    tables: dict[str, list[Path]]
    prompt: str
    root: Path = Path()
    _counts: dict[str, list[int]] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> dict[str, list[Path]]:
        """The tables and the tars, which both decide the content."""
        return {
            split: [*tables, *(tar for table in tables if (tar := table.with_suffix(".tar")).is_file())]
            for split, tables in self.tables.items()
        }

    def count(self, split: str) -> int:
        return sum(self._counted(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        first = 0
        for table, count in zip(self.tables[split], self._counted(split), strict=True):
            low, high = max(start - first, 0), count if stop is None else min(stop - first, count)
            first += count
            for number, row in read_rows(table, low, high, ("key", "url", "caption", "status", "error_message")):
                yield self._item(table, number, row)

    def _counted(self, split: str) -> list[int]:
        if split not in self._counts:
            self._counts[split] = [count_rows(table) for table in self.tables[split]]
        return self._counts[split]

    def _item(self, table: Path, number: int, row: Mapping[str, Any]) -> RawItem:
        key = str(row.get("key") or f"{table.stem}#{number}")
        if row.get("status") != "success":
            reason = f"{row.get('status')}: {row.get('error_message') or 'no reason given'} ({row.get('url')})"
            return RawItem(key, None, None, Failure("not_downloaded", reason))
        if not row.get("caption"):
            return RawItem(key, None, None, Failure("empty_conversation", "the image has no caption"))
        image = self._image(table, key)
        if image is None:
            return RawItem(key, None, None, Failure("missing_image", f"{table.stem} has no image {key}"))
        return RawItem(
            key, image, {"conversations": one_turn(self.prompt, row["caption"]), "meta": {"url": row.get("url")}}
        )

    def _image(self, table: Path, key: str) -> Path | bytes | None:
        tar = table.with_suffix(".tar")
        if tar.is_file():
            members = _members(tar).get(key, {})
            return next((read_member(tar, members[ext]) for ext in members if ext in IMAGES), None)
        folder = table.with_suffix("")
        return next((path for ext in IMAGES if (path := folder / f"{key}.{ext}").exists()), None)


@lru_cache(maxsize=16)
def _members(tar: Path) -> dict:
    members, _ = read_index(tar)  # rows that a damaged tar does not reach are missing images, each one told
    return by_key(members)
