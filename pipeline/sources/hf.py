"""Any table of a local folder or a Hugging Face data set, with a mapping of its columns.

`data.path` is a file, a folder or pattern of files (parquet, Arrow as `Dataset.save_to_disk` writes it, JSON, JSON
lines, CSV, TSV), a folder of image files with or without a `metadata` table (`imagefolder`), or the name of a data set
on the hub (`owner/name`), whose tables are fetched once. `data.columns` tells what is what: `image`, and either
`conversations` or `question` and `answer` or `caption`; `id` where rows have names. Columns that already have these
names need no mapping. Without `data.splits` the files' own names tell them, as `train-00000.parquet` or `test/0.csv`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.sources.base import Failure, FileSource, RawItem, needs_path, one_turn, split_files
from pipeline.sources.config import DataConfig
from pipeline.sources.table import SUFFIXES, column_names, count_rows, read_rows
from pipeline.sources.webdataset import IMAGES, to_record

if TYPE_CHECKING:
    from pipeline.layout import Layout

_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_ABOUT = ("dataset_info.json", "dataset_dict.json", "dataset_infos.json", "state.json")  # not data, but about it
_METADATA = "metadata"  # the table of an image folder


def open_source(data: DataConfig, layout: "Layout") -> FileSource:
    """Opens local files, or fetches them from the hub."""
    path = data.path
    if path and not Path(path).expanduser().exists() and _HUB.fullmatch(path):
        path = str(fetch(path))
    found = needs_path(path, data.name, "a table, a folder of tables or images, or a data set of the hub (owner/name)")
    root = found if found.is_dir() else found.parent
    files = _split_tables(found, data)
    if not files:
        return Pictures(_by_split(_images(found), found), data.prompt, found)
    _check_columns(files, data)
    columns = dict(data.columns)
    if all(file.stem == _METADATA for group in files.values() for file in group):
        columns.setdefault("image", "file_name")
    return Table(files, columns, data.prompt, root)


def _split_tables(path: Path, data: DataConfig) -> dict[str, list[Path]]:
    """The tables of every split; none if `path` is a folder of images only.

    Raises:
        UserError: there is nothing to read.
    """
    if data.splits or not path.is_dir():
        found = {split: _tables(files) for split, files in split_files(path, data.splits, "**/*", data.name).items()}
        if empty := [split for split, files in found.items() if not files]:
            raise UserError(f"data '{data.name}': split {empty[0]} of {path} has no tables ({', '.join(SUFFIXES)})")
        return found
    found = _by_split(_tables(sorted(path.rglob("*"))), path)
    if not found and not _images(path):
        raise UserError(f"data '{data.name}': {path} has neither tables ({', '.join(SUFFIXES)}) nor images")
    return found


def _tables(files: list[Path]) -> list[Path]:
    """The tables among files; where there are several kinds, of the first kind of SUFFIXES."""
    kinds = [[file for file in files if file.suffix == kind and file.name not in _ABOUT] for kind in SUFFIXES]
    return next((group for group in kinds if group), [])


def _images(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.suffix[1:].lower() in IMAGES and file.is_file()]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have; reading it says so
        return False


def _by_split(files: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Files by the split that their names tell, a folder's before a file's; train where they tell none."""
    found: dict[str, list[Path]] = {}
    for file in files:
        parts = re.split(r"[^a-z]+", file.relative_to(folder).with_suffix("").as_posix().lower())
        found.setdefault(next((_SPLITS[part] for part in parts if part in _SPLITS), "train"), []).append(file)
    return found


def fetch(name: str) -> Path:
    """The folder of a hub data set, in the hub's own cache: its parquet files, or else its other tables.

    Raises:
        UserError: no such data set, no network, or no tables.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

    # Sets of other formats mostly have a copy in parquet on the branch in the middle, made by the hub itself.
    parquet, tables = ["*.parquet"], [f"*{suffix}" for suffix in SUFFIXES]
    for revision, patterns in ((None, parquet), ("refs/convert/parquet", parquet), (None, tables)):
        try:
            found = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
        except RevisionNotFoundError:
            continue
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"data set '{name}' cannot be fetched from the hub: {reason}") from error
        if _tables(sorted(found.rglob("*"))):
            return found
    raise UserError(f"data set '{name}' has no tables on the hub: download it and give data.path=FOLDER")


def _check_columns(files: dict[str, list[Path]], data: DataConfig) -> None:
    names = column_names(next(iter(files.values()))[0])
    for what, column in data.columns.items():
        if column not in names:
            raise UserError(f"data.columns.{what}={column}: the table has the columns {', '.join(names)}")


@dataclass
class Table(FileSource):
    """Rows of tables; images are bytes in the table or file names, below the table's folder or else below `root`."""

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
                if isinstance(row, Failure):
                    yield RawItem(f"#{first + number}", None, None, row)
                else:
                    yield self.item(first + number, row, path.parent)
            first += count

    def item(self, number: int, row: Mapping[str, Any], folder: Path | None = None) -> RawItem:
        """What a row of a table in `folder` gives; data sets with a form of their own override `record`."""
        name = row.get(self.columns.get("id", "id"))
        name = f"#{number}" if name is None else str(name)
        image, failure = self.image(row, folder or self.root)
        record = None if failure else self.record(row)
        if record is None and failure is None:
            failure = Failure("missing_text", "the row has neither conversations nor question, answer or caption")
        return RawItem(name, image, record, failure)

    def record(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The conversation of a row."""
        return to_record(row, self.columns, self.prompt)

    def image(self, row: Mapping[str, Any], folder: Path) -> tuple[Path | bytes | None, Failure | None]:
        """The image of a row: `{bytes, path}`, bytes, or a name, in the folder of an image folder's table below it."""
        image = row.get(self.columns.get("image", "image"), row.get("images"))
        if isinstance(image, list):
            if len(image) > 1:
                return None, Failure("unsupported", f"{len(image)} images: only one is supported")
            image = image[0] if image else None
        if isinstance(image, Mapping):
            image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if isinstance(image, str):
            if "\0" in image:
                return None, Failure("outside_root", "the image name has a NUL byte")
            if not image:
                return None, None
            return (folder if folder != self.root and _is_file(folder / image) else self.root) / image, None
        if image is not None and not isinstance(image, bytes):
            return None, Failure("bad_record", f"the image is a {type(image).__name__}, neither bytes nor a name")
        return image, None

    def _counted(self, split: str) -> list[int]:
        if split not in self._counts:
            self._counts[split] = [count_rows(path) for path in self.files[split]]
        return self._counts[split]


@dataclass
class Pictures(FileSource):
    """A folder of image files in folders that name what they show: the prompt is asked, the name is the answer."""

    files: dict[str, list[Path]]
    prompt: str
    root: Path

    def count(self, split: str) -> int:
        return len(self.files[split])

    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        for path in self.files[split][start:stop]:
            name = path.relative_to(self.root).as_posix()
            label = path.parent.name
            if path.parent == self.root or label.lower() in _SPLITS:
                yield RawItem(name, path, None, Failure("missing_text", "the image lies in no folder that names it"))
            else:
                yield RawItem(name, path, {"conversations": one_turn(self.prompt, label.replace("_", " "))})

    def fingerprint(self, stamp: Path) -> dict[str, str]:
        names = {
            f"{split}.names": receipts.hash_bytes(
                "\0".join(str(file.relative_to(self.root)) for file in files).encode("utf-8", "surrogateescape")
            )
            for split, files in sorted(self.files.items())
        }
        return {**super().fingerprint(stamp), **names}  # the folders' names are the answers
