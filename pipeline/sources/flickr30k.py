"""Flickr30k captions (Young et al., 2014) in Karpathy's `dataset_flickr30k.json`, with the folder of images.

The file names the split of each image; its test images never enter training, `restval` (of the COCO file of the same
form) counts as train.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, one_turn
from pipeline.sources.config import DataConfig
from pipeline.sources.llava_json import image_root

if TYPE_CHECKING:
    from pipeline.layout import Layout

_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def open_source(data: DataConfig, layout: "Layout") -> "Flickr30k":
    """Opens `data.path`, the JSON file, and `data.images`, the folder."""
    path = needs_path(data.path, data.name, "dataset_flickr30k.json")
    if path.is_dir():
        path = path / "dataset_flickr30k.json"
    if not path.is_file():
        raise UserError(f"data '{data.name}': {path} does not exist: check data.path")
    return Flickr30k(path, data.prompt, data.captions == "all", image_root(data, path))


@dataclass
class Flickr30k(FileSource):
    """One example per image, or one per caption with `every`."""

    path: Path
    prompt: str
    every: bool
    root: Path = Path()
    _rows: dict[str, list[tuple[str, int, str]]] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> dict[str, list[Path]]:
        return {split: [self.path] for split in self._load()}

    def count(self, split: str) -> int:
        return len(self._load()[split])

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        for name, number, caption in self._load()[split][start:stop]:
            if not name:
                yield RawItem(f"#{number}", None, None, Failure("bad_record", "the entry names no image file"))
                continue
            failure = None if caption else Failure("empty_conversation", "the image has no caption")
            yield RawItem(
                f"{name}#{number}", self.root / name, {"conversations": one_turn(self.prompt, caption)}, failure
            )

    def _load(self) -> dict[str, list[tuple[str, int, str]]]:
        """(file name, number of the caption, caption) of every example by split."""
        if not self._rows:
            try:
                images = json.loads(self.path.read_bytes())["images"]
                for entry in images:
                    split = _SPLITS[entry["split"]]
                    sentences = [sentence["raw"] for sentence in entry["sentences"]] or [""]
                    name = entry["filename"] if isinstance(entry["filename"], str) else ""
                    for number, caption in enumerate(sentences if self.every else sentences[:1]):
                        self._rows.setdefault(split, []).append((name, number, caption))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path}: is not Karpathy's list of images and sentences ({error!r})") from error
        return self._rows
