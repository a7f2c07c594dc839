"""POPE (Li et al., EMNLP 2023): "Is there a ... in the image?", answered yes or no; JSON-lines files and COCO images.

Each file `coco_pope_<split>.json` holds lines of `{"question_id", "image", "text", "label"}`; the splits differ in how
the absent objects were drawn: `random`, `popular` or `adversarial`. They are for evaluation only.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.examples import IMAGE_MARKER
from pipeline.sources.base import Failure, RawItem, Source, content_hash
from pipeline.sources.config import DataConfig

if TYPE_CHECKING:
    from pipeline.layout import Layout

REQUEST = "Please answer yes or no."


def open_source(data: DataConfig, layout: "Layout") -> "Pope":
    """Opens the folder `data.path`; images lie in `data.images`, or beside the files."""
    if not data.path:
        raise UserError(f"data '{data.name}' needs data.path=FOLDER with coco_pope_random.json and the like")
    folder = Path(data.path).expanduser()
    files = data.splits or {path.stem.rpartition("_")[2]: path.name for path in sorted(folder.glob("*pope_*.json"))}
    root = Path(data.images).expanduser() if data.images else folder
    return Pope({split: folder / name for split, name in files.items()}, root)


@dataclass
class Pope(Source):
    """One file per split; image names are relative to `root`."""

    files: dict[str, Path]
    root: Path
    _lines: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError(f"{self.root}: has no POPE file (coco_pope_random.json): check data.path")
        for file in self.files.values():
            if not file.is_file():
                raise UserError(f"{file}: there is no such file: check data.path and data.splits")

    def splits(self) -> list[str]:
        return sorted(self.files)

    def count(self, split: str) -> int:
        return len(self._read(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        for number, line in list(enumerate(self._read(split)))[start:stop]:
            yield self._item(split, number, line)

    def fingerprint(self, stamp: Path) -> dict[str, str]:
        return {
            f"{split}.sha256": content_hash([file], stamp.with_name(f"{stamp.stem}-{split}{stamp.suffix}"))
            for split, file in sorted(self.files.items())
        }

    def _item(self, split: str, number: int, line: str) -> RawItem:
        name = f"{split}/{number}"
        try:
            row = json.loads(line)
            image, question, label = str(row["image"]), str(row["text"]), str(row["label"]).strip().lower()
        except (ValueError, KeyError, TypeError) as error:
            failure = Failure("bad_record", f"line {number + 1}: {type(error).__name__}: {error}")
            return RawItem(name, None, None, failure)
        if label not in ("yes", "no"):
            return RawItem(name, None, None, Failure("bad_record", f"line {number + 1}: the label is {label!r}"))
        turns = [
            {"from": "human", "value": f"{IMAGE_MARKER}\n{question} {REQUEST}"},
            {"from": "gpt", "value": label},
        ]
        meta = {"turns": [{"turn": 1, "kind": "pope", "group": split}]}
        return RawItem(name, self.root / image, {"conversations": turns, "meta": meta})

    def _read(self, split: str) -> list[str]:
        if split not in self._lines:
            text = self.files[split].read_text(encoding="utf-8")
            self._lines[split] = [line for line in text.split("\n") if line.strip()]
        return self._lines[split]
