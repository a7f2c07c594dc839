"""WorldMedQA-V (Matos et al., 2024): medical multiple choice about an image, from four countries, in two languages.

Eight TSV files `<country>_<language>_processed.tsv` with the columns index, question, A, B, C, D, correct_option,
split and image (base64). Each file becomes a split `<country>_<language>`; they are for evaluation only.
"""

import base64
import binascii
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.examples import IMAGE_MARKER
from pipeline.sources.base import Failure, RawItem, Source, hash_files
from pipeline.sources.config import DataConfig

if TYPE_CHECKING:
    from pipeline.layout import Layout

SUFFIX = "_processed"
OPTIONS = ("A", "B", "C", "D")
COLUMNS = ("index", "question", *OPTIONS, "correct_option", "image")
REQUEST = "Answer with the letter of the right option only."
_FIELD_LIMIT = 256 << 20  # characters of one field; an image in base64 is far beyond the csv module's own limit


def open_source(data: DataConfig, layout: "Layout") -> "WorldMedQa":
    """Opens the TSV files in the folder `data.path`."""
    if not data.path:
        raise UserError(f"data '{data.name}' needs data.path=FOLDER with brazil_local{SUFFIX}.tsv and the like")
    folder = Path(data.path).expanduser()
    files = {path.stem.removesuffix(SUFFIX): path for path in sorted(folder.glob("*.tsv"))}
    return WorldMedQa(folder, files)


@dataclass
class WorldMedQa(Source):
    """A folder of TSV files."""

    folder: Path
    files: dict[str, Path]

    def __post_init__(self) -> None:
        if not self.files:
            raise UserError(f"{self.folder}: has no TSV files of WorldMedQA-V: check data.path")
        for path in self.files.values():
            with path.open(encoding="utf-8", newline="") as handle:
                columns = next(csv.reader(handle, delimiter="\t"), [])
            missing = [name for name in COLUMNS if name not in columns]
            if missing:
                raise UserError(f"{path}: lacks the column {missing[0]}: is it a file of WorldMedQA-V?")

    def splits(self) -> list[str]:
        return list(self.files)

    def count(self, split: str) -> int:
        return sum(1 for _ in self._rows(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        for row in islice(self._rows(split), start, stop):
            yield _item(split, row)

    def fingerprint(self, stamp: Path) -> dict[str, str]:
        found = hash_files(list(self.files.values()), stamp)
        return {f"{split}.sha256": found[file.name] for split, file in self.files.items()}

    def _rows(self, split: str) -> Iterator[dict[str, str]]:
        csv.field_size_limit(_FIELD_LIMIT)
        with self.files[split].open(encoding="utf-8", newline="") as handle:
            yield from csv.DictReader(handle, delimiter="\t")


def _item(split: str, row: dict[str, str]) -> RawItem:
    name = f"{split}/{row['index']}"
    answer = (row["correct_option"] or "").strip().upper()
    if answer not in OPTIONS or not row["question"]:
        return RawItem(
            name, None, None, Failure("bad_record", f"the right option is {answer!r} or the question is empty")
        )
    try:
        image = base64.b64decode(row["image"] or "", validate=True)
    except binascii.Error as error:
        return RawItem(name, None, None, Failure("bad_image", f"the image is not base64: {error}"))
    options = "\n".join(f"{letter}. {row[letter]}" for letter in OPTIONS)
    turns = [
        {"from": "human", "value": f"{IMAGE_MARKER}\n{row['question']}\n{options}\n{REQUEST}"},
        {"from": "gpt", "value": answer},
    ]
    country, _, _ = split.rpartition("_")
    meta = {"turns": [{"turn": 1, "kind": "choice", "group": country or split}]}
    return RawItem(name, image, {"conversations": turns, "meta": meta})
