"""OCR-VQA (Mishra et al., 2019): questions about book covers.

Reads the original `dataset.json` (an object of books with `imageURL`, `questions`, `answers` and a split number; images
are `images/<id>.<ext>` as its own loader names them) as one conversation per cover, and the authors' list of
`{"id", "image", "conversations": [{"role", "content"}]}`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.examples import IMAGE_MARKER
from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, split_files
from pipeline.sources.config import DataConfig
from pipeline.sources.jsonstream import records
from pipeline.sources.llava_json import LlavaJson, image_root

if TYPE_CHECKING:
    from pipeline.layout import Layout

_SPLITS = {1: "train", 2: "val", 3: "test"}


def open_source(data: DataConfig, layout: "Layout") -> FileSource:
    """Opens `data.path`: the original file (or the folder it is in) or a list."""
    path = needs_path(data.path, data.name, "dataset.json")
    if path.is_dir():
        path = path / "dataset.json"
    with needs_path(str(path), data.name, "dataset.json").open("rb") as file:
        original = file.read(64).lstrip()[:1] == b"{"
    if not original or data.splits:
        return LlavaJson(split_files(path, data.splits, "*.json", data.name), image_root(data, path))
    root = image_root(data, path)
    images = root if data.images or not (root / "images").is_dir() else root / "images"
    return Books({split: [path] for split in _SPLITS.values()}, images, objects=True)


@dataclass
class Books(LlavaJson):
    """The original file: an object of books, of which each split takes its own."""

    _numbers: dict[str, list[int]] | None = None

    def count(self, split: str) -> int:
        return len(self._of(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        wanted = self._of(split)[start:stop]
        if not wanted:
            return
        chosen = set(wanted)
        index = self._indexed("train")[0]
        for number, (name, book) in records(self.files[split][0], index, wanted[0], wanted[-1] + 1):
            if number in chosen:
                yield self._book(name, book)

    def _of(self, split: str) -> list[int]:
        """Numbers of the books of a split; a book without a known split counts as train, where its fault shows."""
        if self._numbers is None:
            numbers: dict[str, list[int]] = {name: [] for name in _SPLITS.values()}
            index = self._indexed("train")[0]
            for number, (_, book) in records(self.files["train"][0], index, 0, index.count):
                part = book.get("split") if isinstance(book, Mapping) else None
                numbers[_SPLITS.get(part, "train") if isinstance(part, int) else "train"].append(number)
            self._numbers = numbers
        return self._numbers[split]

    def splits(self) -> list[str]:
        return [split for split in super().splits() if self._of(split)]

    def _book(self, name: str, book: Any) -> RawItem:
        try:
            if not isinstance(book["questions"], list) or not isinstance(book["answers"], list):
                raise TypeError("its questions and answers are no lists")
            pairs = list(zip(book["questions"], book["answers"], strict=True))
            image = self.root / f"{name}{PurePosixPath(book['imageURL']).suffix}"
        except (KeyError, TypeError, ValueError) as error:
            return RawItem(name, None, None, Failure("bad_record", f"not a book of OCR-VQA: {error!r}"))
        turns = [
            {"role": role, "content": text}
            for question, answer in pairs
            for role, text in (("user", question), ("assistant", answer))
        ]
        if turns and isinstance(turns[0]["content"], str):
            turns[0]["content"] = f"{IMAGE_MARKER}\n{turns[0]['content']}"
        return RawItem(name, image, {"conversations": turns})
