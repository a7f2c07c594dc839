"""RLAIF-V (Yu et al., 2024): a question, a chosen and a rejected answer; the chosen one is learned.

Reads the hub's parquet form (image bytes, `question`, `chosen`), and the ShareGPT form (`conversations` up to the
question, `chosen` a turn) as a table or as JSON with image files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.sources.base import FileSource, RawItem, needs_path, one_turn, split_files
from pipeline.sources.config import DataConfig
from pipeline.sources.hf import Table
from pipeline.sources.llava_json import LlavaJson, image_root, llava_item

if TYPE_CHECKING:
    from pipeline.layout import Layout


def open_source(data: DataConfig, layout: "Layout") -> FileSource:
    """Opens parquet files or a JSON file, whichever `data.path` is."""
    path = needs_path(data.path, data.name, "a folder of parquet files, or a JSON file")
    if path.suffix.startswith(".json"):
        return Lists({"train": [path]}, image_root(data, path))
    files = split_files(path, data.splits, "**/*.parquet", data.name)
    return Rows(files, dict(data.columns), data.prompt, path if path.is_dir() else path.parent)


def chosen(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The conversation that ends with the chosen answer."""
    answer, turns = row.get("chosen"), row.get("conversations")
    if isinstance(answer, list) and answer:  # the whole conversation, or its last turn, as a list
        turns, answer = (None, answer[0]) if len(answer) == 1 else (answer, None)
    about = {"meta": {"origin": row["origin_dataset"]}} if row.get("origin_dataset") else {}
    if isinstance(turns, list):
        return {"conversations": [*turns, answer] if answer else turns, **about}
    if row.get("question") is None:
        return None
    text = answer.get("value", answer.get("content")) if isinstance(answer, Mapping) else answer
    return {"conversations": one_turn(str(row["question"]), text), **about}


@dataclass
class Rows(Table):
    """The parquet forms."""

    def item(self, number: int, row: Mapping[str, Any], folder: Path | None = None) -> RawItem:
        return super().item(number, {**row, "id": row.get("id", row.get("idx"))}, folder)

    def record(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        return chosen(row)


@dataclass
class Lists(LlavaJson):
    """The JSON form."""

    def item(self, split: str, number: int, record: Any) -> RawItem:
        if isinstance(record, Mapping):
            record = {**record, **(chosen(record) or {})}
        return llava_item(number, record, self.root)
