"""LLaVA's form: a JSON list or JSON lines of `{"id", "image", "conversations": [...]}` and a folder of images.

Turns have `from`/`value` or `role`/`content`. The file is streamed, so its size does not matter; each shard starts
reading at a byte offset found in one pass over the file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, split_files
from pipeline.sources.config import DataConfig
from pipeline.sources.jsonstream import Index, build_index, records

if TYPE_CHECKING:
    from pipeline.layout import Layout


def open_source(data: DataConfig, layout: "Layout") -> "LlavaJson":
    """Opens the file or files of `data.path`."""
    path = needs_path(data.path, data.name, "FILE.json, a list of conversations")
    return LlavaJson(split_files(path, data.splits, "*.json*", data.name), image_root(data, path))


def image_root(data: DataConfig, path: Path) -> Path:
    """The folder that image names are relative to.

    Raises:
        UserError: there is no such folder.
    """
    root = Path(data.images).expanduser() if data.images else (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise UserError(f"{root}: there is no such image folder: check data.images")
    return root


@dataclass
class LlavaJson(FileSource):
    """Records of some files per split; image names are relative to `root`."""

    files: dict[str, list[Path]]
    root: Path
    objects: bool = False
    _index: dict[str, list[Index]] = field(default_factory=dict, repr=False)

    def count(self, split: str) -> int:
        return sum(index.count for index in self._indexed(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        first = 0
        for file, index in zip(self.files[split], self._indexed(split), strict=True):
            low, high = max(start - first, 0), index.count if stop is None else min(stop - first, index.count)
            for number, record in records(file, index, low, high):
                yield self.item(split, first + number, record)
            first += index.count

    def item(self, split: str, number: int, record: Any) -> RawItem:
        """What a record of the file gives; other forms of JSON override this."""
        return llava_item(number, record, self.root)

    def _indexed(self, split: str) -> list[Index]:
        if split not in self._index:
            self._index[split] = [build_index(file, self.objects) for file in self.files[split]]
        return self._index[split]


def llava_item(number: int, record: Any, root: Path) -> RawItem:
    """The raw item of a LLaVA record, or of whatever stands in its place."""
    if isinstance(record, Failure):
        return RawItem(f"#{number}", None, None, record)
    if not isinstance(record, Mapping):
        return RawItem(
            f"#{number}", None, None, Failure("bad_record", f"a JSON {type(record).__name__}, not an object")
        )
    name = record.get("id")
    name = f"#{number}" if name is None else str(name).encode("utf-8", "replace").decode()
    image, failure = image_name(record)
    if failure:
        return RawItem(name, None, None, failure)
    return RawItem(name, None if image is None else root / image, record)


def image_name(record: Mapping[str, Any]) -> tuple[str | None, Failure | None]:
    """The one image a record names, or None, or why it cannot be used."""
    if record.get("video"):
        return None, Failure("unsupported", "the record names a video")
    image = record.get("image", record.get("images"))
    if isinstance(image, Mapping):  # {"<image_00>": "a.jpg"}, as MiniCPM's lists have it
        image = list(image.values())
    if isinstance(image, list):
        if len(image) > 1:
            return None, Failure("unsupported", f"{len(image)} images: only one is supported")
        image = image[0] if image else None
    if image is None or image == "":
        return None, None
    if not isinstance(image, str):
        return None, Failure("bad_record", f"the image is a JSON {type(image).__name__}, not a name")
    if "\0" in image:
        return None, Failure("outside_root", "the image name has a NUL byte")
    return image, None
