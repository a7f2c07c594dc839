"""Flickr30k Entities (Plummer et al., "Flickr30k Entities", ICCV 2015): captions whose phrases are tied to boxes.

As published: `Sentences/<id>.txt` with five marked captions (`[/EN#283585/people A young child] is wearing ...`),
`Annotations/<id>.xml` in the form of PASCAL VOC with the boxes of the marked chains, and `train.txt`, `val.txt` and
`test.txt` with the ids. The images are those of Flickr30k. Words of phrases that have boxes get them as
`meta.regions`, so pointing can be measured on them; articles and possessives before a phrase's first other word do not.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, one_turn
from pipeline.sources.config import DataConfig
from pipeline.sources.llava_json import image_root

if TYPE_CHECKING:
    from pipeline.layout import Layout

SPLITS = ("train", "val", "test")
IMAGES = "flickr30k-images"
PHRASE = re.compile(r"\[/EN#(\d+)/(\S+) ([^\]]*)\]")
UNLOCATED = {"notvisual"}  # kinds that name nothing in the image
LEADING = re.compile(r"(?:(?:an?|the|his|her|its|their|this|that|these|those|some) +)+(?=\S)", re.IGNORECASE)


def open_source(data: DataConfig, layout: "Layout") -> "Flickr30kEntities":
    """Opens the folder `data.path`; the images are in `data.images`, or in its `flickr30k-images`."""
    path = needs_path(data.path, data.name, "the folder with Sentences, Annotations and train.txt, val.txt, test.txt")
    files = {split: path / f"{split}.txt" for split in SPLITS if (path / f"{split}.txt").is_file()}
    if not files or not (path / "Sentences").is_dir() or not (path / "Annotations").is_dir():
        raise UserError(
            f"data '{data.name}': {path} is not Flickr30k Entities: it needs Sentences, Annotations and one of "
            "train.txt, val.txt, test.txt"
        )
    root = path / IMAGES if not data.images and (path / IMAGES).is_dir() else image_root(data, path)
    return Flickr30kEntities(path, files, data.prompt, data.captions == "all", root)


@dataclass
class Flickr30kEntities(FileSource):
    """One example per image, or one per caption with `every`."""

    path: Path
    lists: dict[str, Path]
    prompt: str
    every: bool
    root: Path
    _rows: dict[str, list[tuple[str, int]]] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> dict[str, list[Path]]:
        found = {}
        for split, file in self.lists.items():
            ids = file.read_text(encoding="utf-8").split()
            beside = [p for name in ids for p in (self._sentences(name), self._boxes(name)) if p.is_file()]
            found[split] = [file, *beside]
        return found

    def count(self, split: str) -> int:
        return len(self._load(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        for name, number in self._load(split)[start:stop]:
            yield self._item(name, number)

    def _item(self, name: str, number: int) -> RawItem:
        identity, image = f"{name}.jpg#{number}", self.root / f"{name}.jpg"
        try:
            lines = self._sentences(name).read_text(encoding="utf-8").splitlines()
            caption, phrases = marked(lines[number]) if number < len(lines) else ("", [])
            boxes = read_boxes(self._boxes(name).read_bytes())
        except (OSError, ValueError, ET.ParseError) as error:
            return RawItem(identity, image, None, Failure("bad_record", f"{name}: {type(error).__name__}: {error}"))
        regions = [
            {"turn": 1, "start": start, "end": end, "kind": kind, "boxes": boxes[chain]}
            for chain, kind, start, end in phrases
            if boxes.get(chain)
        ]
        record = {"conversations": one_turn(self.prompt, caption), "meta": {"regions": regions} if regions else {}}
        failure = None if caption else Failure("empty_conversation", "the image has no caption")
        return RawItem(identity, image, record, failure)

    def _load(self, split: str) -> list[tuple[str, int]]:
        """(id, number of the caption) of every example of a split."""
        if split not in self._rows:
            ids = self.lists[split].read_text(encoding="utf-8").split()
            self._rows[split] = [(name, number) for name in ids for number in range(self._captions(name))]
        return self._rows[split]

    def _captions(self, name: str) -> int:
        if not self.every or not self._sentences(name).is_file():
            return 1
        return max(1, len(self._sentences(name).read_bytes().splitlines()))

    def _sentences(self, name: str) -> Path:
        return self.path / "Sentences" / f"{name}.txt"

    def _boxes(self, name: str) -> Path:
        return self.path / "Annotations" / f"{name}.xml"


def marked(line: str) -> tuple[str, list[tuple[str, str, int, int]]]:
    """A caption without its marks, and its phrases: (chain, kind, start, end), without leading articles."""
    text, phrases, last = "", [], 0
    for found in PHRASE.finditer(line):
        text += line[last : found.start()]
        chain, kinds, phrase = found.groups()
        skipped = LEADING.match(phrase)
        start = len(text) + (skipped.end() if skipped else 0)
        text, last = text + phrase, found.end()
        kind = kinds.split("/")[0]
        if kind not in UNLOCATED and start < len(text):
            phrases.append((chain, kind, start, len(text)))
    text += line[last:]
    blank = len(text) - len(text.lstrip())
    return text.strip(), [(chain, kind, start - blank, end - blank) for chain, kind, start, end in phrases]


def read_boxes(data: bytes) -> dict[str, list[list[float]]]:
    """Boxes [x0, y0, x1, y1] of each chain as fractions of the image; the file counts pixels from one, ends included.

    Raises:
        ET.ParseError, ValueError: not such a file.
    """
    root = ET.fromstring(data)
    width, height = (float(_text(root, f"size/{side}")) for side in ("width", "height"))
    out: dict[str, list[list[float]]] = {}
    for thing in root.iterfind("object"):
        place = thing.find("bndbox")
        if place is None:  # a scene, or nothing to be seen
            continue
        x0, y0, x1, y1 = (float(_text(place, name)) for name in ("xmin", "ymin", "xmax", "ymax"))
        box = [max(x0 - 1, 0) / width, max(y0 - 1, 0) / height, min(x1, width) / width, min(y1, height) / height]
        if box[0] < box[2] and box[1] < box[3]:
            for name in thing.iterfind("name"):
                out.setdefault(name.text or "", []).append(box)
    return out


def _text(element: Any, path: str) -> str:
    found = element.findtext(path)
    if not found:
        raise ValueError(f"no {path} in the annotation")
    return found
