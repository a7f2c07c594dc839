"""Flickr30k Entities (Plummer et al., 2015): captions whose phrases are tied to boxes.

`data.path` holds `Sentences/<id>.txt` (five captions an image, phrases as `[/EN#<chain>/<type> words]`),
`Annotations/<id>.xml` (boxes of each chain) and the lists `train.txt`, `val.txt`, `test.txt`; `data.images` the
pictures `<id>.jpg`. A phrase of chain 0 (nothing that can be seen), of a whole scene, or without a box has no region.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree

from pipeline.errors import UserError
from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, one_turn
from pipeline.sources.config import DataConfig
from pipeline.sources.llava_json import image_root

if TYPE_CHECKING:
    from pipeline.layout import Layout

SPLITS = ("train", "val", "test")
NOT_VISUAL = "0"
_PHRASE = re.compile(r"\[/EN#(?P<chain>\d+)(?P<types>(?:/\w+)+) (?P<words>[^\]]*)\]")


class Phrase(NamedTuple):
    """Characters `start:end` of a caption, the chain that they belong to, and its type (people, clothing, ...)."""

    start: int
    end: int
    chain: str
    kind: str


def open_source(data: DataConfig, layout: "Layout") -> "Flickr30kEntities":
    """Opens the folder `data.path`."""
    folder = needs_path(data.path, data.name, "FOLDER with Sentences/, Annotations/ and test.txt")
    lists = {split: [folder / f"{split}.txt"] for split in SPLITS if (folder / f"{split}.txt").is_file()}
    for part in ("Sentences", "Annotations"):
        if not (folder / part).is_dir():
            raise UserError(f"data '{data.name}': {folder} has no folder {part}: check data.path")
    if not lists:
        raise UserError(f"data '{data.name}': {folder} has none of train.txt, val.txt, test.txt: check data.path")
    return Flickr30kEntities(lists, folder, data.prompt, data.captions == "all", image_root(data, folder))


@dataclass
class Flickr30kEntities(FileSource):
    """One example per image, or one per caption with `every`; an example knows all captions of its image."""

    lists: dict[str, list[Path]]
    folder: Path
    prompt: str
    every: bool
    root: Path = Path()
    _ids: dict[str, list[tuple[str, int]]] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> dict[str, list[Path]]:
        """What decides the content of a split: its list, captions and boxes."""
        return {
            split: [
                *lists,
                *(
                    path
                    for name in _names(lists[0])
                    for path in (self._sentences(name), self._annotation(name))
                    if path.is_file()
                ),
            ]
            for split, lists in self.lists.items()
        }

    def splits(self) -> list[str]:
        return list(self.lists)

    def count(self, split: str) -> int:
        return len(self._listed(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        for name, number in self._listed(split)[start:stop]:
            yield self._item(name, number)

    def _item(self, name: str, number: int) -> RawItem:
        key, image = f"{name}#{number}", self.root / f"{name}.jpg"
        try:
            captions = [parse(line) for line in _lines(self._sentences(name))]
            size, boxes = read_boxes(self._annotation(name))
        except (OSError, UnicodeDecodeError, ValueError, ElementTree.ParseError) as error:
            return RawItem(key, image, None, Failure("bad_record", f"{type(error).__name__}: {error}"))
        if number >= len(captions) or not captions[number][0]:
            return RawItem(key, image, None, Failure("empty_conversation", "the image has no caption"))
        text, phrases = captions[number]
        regions = [
            {
                "turn": 1,
                "start": one.start,
                "end": one.end,
                "kind": one.kind,
                "boxes": _fractions(boxes[one.chain], size),
            }
            for one in phrases
            if one.chain != NOT_VISUAL and boxes.get(one.chain)
        ]
        turns = [{"turn": 1, "kind": "caption", "answers": [told for told, _ in captions]}]
        meta = {"regions": regions, "turns": turns, "image": f"{name}.jpg"}
        return RawItem(key, image, {"conversations": one_turn(self.prompt, text), "meta": meta})

    def _listed(self, split: str) -> list[tuple[str, int]]:
        if split not in self._ids:
            names = _names(self.lists[split][0])
            self._ids[split] = [
                (name, number)
                for name in names
                for number in range(max(1, len(_lines(self._sentences(name)))) if self.every else 1)
            ]
        return self._ids[split]

    def _sentences(self, name: str) -> Path:
        return self.folder / "Sentences" / f"{name}.txt"

    def _annotation(self, name: str) -> Path:
        return self.folder / "Annotations" / f"{name}.xml"


def _names(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split()


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def parse(line: str) -> tuple[str, list[Phrase]]:
    """A caption without its marks, and its phrases."""
    text, phrases, cursor = "", [], 0
    for match in _PHRASE.finditer(line):
        text += line[cursor : match.start()]
        words = match["words"].strip()
        kind = match["types"].split("/")[1]
        phrases.append(Phrase(len(text), len(text) + len(words), match["chain"], kind))
        text += words
        cursor = match.end()
    return (text + line[cursor:]).rstrip(), [one for one in phrases if one.end > one.start]


def read_boxes(path: Path) -> tuple[tuple[int, int], dict[str, list[tuple[int, int, int, int]]]]:
    """(width, height) of the image and the boxes (left, top, right, bottom) of every chain, in pixels from 1 on.

    An object may belong to several chains; one of a scene, or without a box, gives none.

    Raises:
        ValueError: something is missing in the file.
    """
    root = ElementTree.parse(path).getroot()
    size = int(_text(root, "size/width")), int(_text(root, "size/height"))
    boxes: dict[str, list[tuple[int, int, int, int]]] = {}
    for thing in root.iter("object"):
        if thing.find("bndbox") is None:
            continue
        left, top, right, bottom = (int(_text(thing, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
        for name in thing.findall("name"):
            boxes.setdefault((name.text or "").strip(), []).append((left, top, right, bottom))
    return size, boxes


def _text(node: ElementTree.Element, path: str) -> str:
    found = node.findtext(path)
    if found is None:
        raise ValueError(f"there is no {path}")
    return found


def _fractions(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> list[list[float]]:
    width, height = size
    found = [
        [max(left - 1, 0) / width, max(top - 1, 0) / height, min(right / width, 1.0), min(bottom / height, 1.0)]
        for left, top, right, bottom in boxes
    ]
    return [box for box in found if box[0] < box[2] and box[1] < box[3]]
