"""easy-VQA (Zhou, 2019, MIT licence): drawn shapes with questions, from the installed package `easy-vqa`; offline.

5,000 images and 48,248 question-answer pairs, here one conversation per image. The package has a train and a test
part; every eighth training image becomes `val`. A question is of kind "yesno", "colour" or "shape", by its answer.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.examples import IMAGE_MARKER
from pipeline.sources.base import RawItem, Source, content_hash
from pipeline.sources.config import DataConfig

if TYPE_CHECKING:
    from pipeline.layout import Layout

_VAL_EVERY = 8
_FOLDERS = {"train": "train", "val": "train", "test": "test"}
_KINDS = {
    "yesno": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
_KIND_OF = {answer: kind for kind, answers in _KINDS.items() for answer in answers}


def open_source(data: DataConfig, layout: "Layout") -> "EasyVqa":
    """Finds the package's data folder, or takes `data.path`."""
    if data.path:
        return EasyVqa(Path(data.path).expanduser())
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("data 'easy_vqa' needs the package easy-vqa: pip install easy-vqa")
    return EasyVqa(Path(spec.origin).parent / "data")


@dataclass
class EasyVqa(Source):
    """The package's folder: `train|test/questions.json` and `train|test/images/<number>.png`."""

    root: Path
    _groups: dict[str, list[tuple[int, list]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for folder in sorted(set(_FOLDERS.values())):
            if not (self.root / folder / "questions.json").is_file():
                raise UserError(f"{self.root / folder}: has no questions.json: reinstall easy-vqa or check data.path")

    def splits(self) -> list[str]:
        return list(_FOLDERS)

    def count(self, split: str) -> int:
        return len(self._load(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        folder = _FOLDERS[split]
        for number, pairs in self._load(split)[start:stop]:
            turns = [
                {"from": speaker, "value": text}
                for question, answer in pairs
                for speaker, text in (("human", question), ("gpt", answer))
            ]
            turns[0]["value"] = f"{IMAGE_MARKER}\n{turns[0]['value']}"
            kinds = [
                {"turn": 2 * place + 1, "kind": _KIND_OF[answer]}
                for place, (_, answer) in enumerate(pairs)
                if answer in _KIND_OF
            ]
            image = self.root / folder / "images" / f"{number}.png"
            yield RawItem(f"{folder}/{number}", image, {"conversations": turns, "meta": {"turns": kinds}})

    def fingerprint(self, stamp: Path) -> dict[str, str]:
        files = [self.root / folder / "questions.json" for folder in sorted(set(_FOLDERS.values()))]
        return {"questions.sha256": content_hash(files, stamp), "kinds": ",".join(_KINDS)}

    def _load(self, split: str) -> list[tuple[int, list]]:
        """(image number, [(question, answer), ...]) by image number; the package lists one pair per row."""
        if split not in self._groups:
            file = self.root / _FOLDERS[split] / "questions.json"
            try:
                rows = json.loads(file.read_bytes())
                grouped: dict[int, list] = {}
                for question, answer, number in rows:
                    grouped.setdefault(int(number), []).append((question, answer))
            except (ValueError, TypeError) as error:
                raise UserError(f"{file}: is not easy-VQA's list of questions: reinstall easy-vqa") from error
            if split in ("train", "val"):
                grouped = {n: pairs for n, pairs in grouped.items() if (n % _VAL_EVERY == 7) == (split == "val")}
            self._groups[split] = sorted(grouped.items())
        return self._groups[split]
