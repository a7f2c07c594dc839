"""Any table of a local folder or a Hugging Face data set, with a mapping of its columns.

`data.path` is a parquet file, a folder or pattern of them, or the name of a data set on the hub (`owner/name`), whose
parquet files are fetched once. `data.columns` tells what is what: `image`, and either `conversations` or `question` and
`answer` or `caption`; `id` where rows have names. Columns that already have these names need no mapping.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, split_files
from pipeline.sources.config import DataConfig
from pipeline.sources.table import column_names, count_rows, read_rows
from pipeline.sources.webdataset import to_record

if TYPE_CHECKING:
    from pipeline.layout import Layout

_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def open_source(data: DataConfig, layout: "Layout") -> "Table":
    """Opens local files, or fetches them from the hub."""
    path = data.path
    if path and not Path(path).expanduser().exists() and _HUB.fullmatch(path):
        path = str(fetch(path))
    found = needs_path(path, data.name, "a parquet file, a folder of them, or a data set of the hub (owner/name)")
    files = split_files(found, data.splits, "**/*.parquet", data.name)
    _check_columns(files, data)
    return Table(files, dict(data.columns), data.prompt, found if found.is_dir() else found.parent)


def fetch(name: str) -> Path:
    """The folder of a hub data set's parquet files, in the hub's own cache.

    Raises:
        UserError: no such data set, no network, or no parquet files.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    # Sets of other formats have a copy in parquet on this branch, made by the hub itself.
    for revision in (None, "refs/convert/parquet"):
        try:
            found = snapshot_download(
                name, repo_type="dataset", revision=revision, allow_patterns=["**/*.parquet", "*.parquet"]
            )
        except RevisionNotFoundError:
            continue
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"data set '{name}' cannot be fetched from the hub: {reason}") from error
        if any(Path(found).rglob("*.parquet")):
            return Path(found)
    raise UserError(f"data set '{name}' has no parquet files on the hub: download it and give data.path=FOLDER")


def _check_columns(files: dict[str, list[Path]], data: DataConfig) -> None:
    names = column_names(next(iter(files.values()))[0])
    for what, column in data.columns.items():
        if column not in names:
            raise UserError(f"data.columns.{what}={column}: the table has the columns {', '.join(names)}")


@dataclass
class Table(FileSource):
    """Rows of parquet files; images are bytes in the table or file names below `root`."""

    files: dict[str, list[Path]]
    columns: Mapping[str, str]
    prompt: str
    root: Path = Path()
    _counts: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def count(self, split: str) -> int:
        return sum(self._counted(split))

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        first = 0
        for path, count in zip(self.files[split], self._counted(split), strict=True):
            low, high = max(start - first, 0), count if stop is None else min(stop - first, count)
            for number, row in read_rows(path, low, high):
                yield self.item(first + number, row)
            first += count

    def item(self, number: int, row: Mapping[str, Any]) -> RawItem:
        """What a row gives; data sets with a form of their own override `record`."""
        name = row.get(self.columns.get("id", "id"))
        name = f"#{number}" if name is None else str(name)
        image, failure = self.image(row)
        record = None if failure else self.record(row)
        if record is None and failure is None:
            failure = Failure("missing_text", "the row has neither conversations nor question, answer or caption")
        return RawItem(name, image, record, failure)

    def record(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The conversation of a row."""
        return to_record(row, self.columns, self.prompt)

    def image(self, row: Mapping[str, Any]) -> tuple[Path | bytes | None, Failure | None]:
        """The image of a row: `{bytes, path}`, bytes, or a name."""
        image = row.get(self.columns.get("image", "image"), row.get("images"))
        if isinstance(image, list):
            if len(image) > 1:
                return None, Failure("unsupported", f"{len(image)} images: only one is supported")
            image = image[0] if image else None
        if isinstance(image, Mapping):
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if isinstance(image, str):
            return (self.root / image, None) if image and "\0" not in image else (None, None)
        return image, None

    def _counted(self, split: str) -> list[int]:
        if split not in self._counts:
            self._counts[split] = [count_rows(path) for path in self.files[split]]
        return self._counts[split]
