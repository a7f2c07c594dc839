"""What every source gives: raw items in a fixed order, each one accounted for, readable from any position."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.examples import InvalidExample


@dataclass(frozen=True)
class Failure:
    """Why an input cannot be used: a short status for counting, a reason for reading."""

    status: str
    reason: str


@dataclass(frozen=True)
class RawItem:
    """One input as the source finds it.

    Args:
        id: the source's own name for it.
        image: a file, its bytes, or None.
        record: `conversations` (LLaVA or chat form), and optionally `licence` and `meta`; None if it failed already.
        failure: set when the source itself could not read the input.
        source: name of the data set it is from, where that is not the one being read.
        root: the folder its image must lie in, where that is not the source's.
    """

    id: str
    image: Path | bytes | None
    record: Mapping[str, Any] | None
    failure: Failure | None = None
    source: str = ""
    root: Path | None = None


class Source(ABC):
    """A data set. Instances are small and can be sent to other processes; items come in the same order every time."""

    root: Path | None = None  # the folder that image files must lie in

    @abstractmethod
    def splits(self) -> list[str]:
        """Names of the splits, `train` first if there is one."""

    @abstractmethod
    def count(self, split: str) -> int:
        """Number of inputs of a split, failures included."""

    @abstractmethod
    def items(self, split: str, start: int = 0, stop: int | None = None) -> Iterator[RawItem]:
        """Inputs `start:stop` of a split; one item for every input, whatever is wrong with it."""

    @abstractmethod
    def fingerprint(self, stamp: Path) -> dict[str, str]:
        """What identifies the content, by name.

        Args:
            stamp: a file in which hashes of large inputs may be kept until those change.
        """

    def report(self) -> list[str]:
        """Lines for people about what will be read, where the counts of the splits do not say it all."""
        return []


class FileSource(Source):
    """A source whose content is that of some files per split."""

    files: dict[str, list[Path]]

    def splits(self) -> list[str]:
        return sorted(self.files, key=lambda split: split != "train")

    def fingerprint(self, stamp: Path) -> dict[str, str]:
        return {
            f"{split}.sha256": content_hash(files, stamp.with_name(f"{stamp.stem}-{split}{stamp.suffix}"))
            for split, files in sorted(self.files.items())
        }


def hash_files(files: Sequence[Path], stamp: Path) -> dict[str, str]:
    """sha256 of every file by its base name, from `stamp` while sizes and times are unchanged."""
    return {Path(name).name: sha256 for name, sha256 in _hashes(files, stamp).items()}


def content_hash(files: Sequence[Path], stamp: Path) -> str:
    """One sha256 for the content of many files, whatever they are called."""
    found = list(_hashes(files, stamp).values())
    return found[0] if len(found) == 1 else receipts.hash_bytes("".join(found).encode())


def _hashes(files: Sequence[Path], stamp: Path) -> dict[str, str]:
    names = [Path(os.path.relpath(file, stamp.parent)).as_posix() for file in files]
    try:
        known = receipts.check(stamp)
        current = known.stage == "source" and sorted(known.files) == sorted(names)
    except receipts.Damaged:
        current = False
    if not current:
        known = receipts.write(stamp, stage="source", settings={}, files=list(files), durable=True)
    return {name: known.files[name].sha256 for name in names}


def split_files(path: Path, splits: Mapping[str, str], pattern: str, name: str) -> dict[str, list[Path]]:
    """Files of every split.

    Args:
        splits: a file, folder or pattern for each, relative to `path`; without it everything is train.
        pattern: which files of a folder are meant.

    Raises:
        UserError: a split without files.
    """
    found = {}
    for split, part in (splits or {"train": ""}).items():
        where = path / part if part else path
        if where.is_dir():
            files = sorted(where.glob(pattern))
        elif any(character in str(where) for character in "*?["):
            files = sorted(Path(where.anchor or ".").glob(str(where.relative_to(where.anchor))))
        else:
            files = [where] if where.is_file() else []
        if not files:
            raise UserError(f"data '{name}': {where} has no files for split {split}: check data.path and data.splits")
        found[split] = files
    return found


def needs_path(path: str, name: str, what: str) -> Path:
    """The path that a kind of source cannot do without.

    Raises:
        UserError: it is not given or not there.
    """
    if not path:
        raise UserError(f"data '{name}' needs data.path={what}")
    found = Path(path).expanduser()
    if not found.exists() and not any(character in path for character in "*?["):
        raise UserError(f"data '{name}': {found} does not exist: check data.path (it should be {what})")
    return found


def one_turn(question: str, answer: Any) -> list[dict[str, Any]]:
    """A conversation of one question and its answer; a marker is not needed where there is at most one image."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def read_image(item: RawItem, root: Path | None, follow_links: bool) -> bytes | None:
    """The bytes of an item's image.

    Raises:
        InvalidExample: `outside_root`, `missing_image`, `empty_image` or `unreadable_image`.
    """
    if item.image is None:
        return None
    if isinstance(item.image, bytes):
        data = item.image
    else:
        data = _read_file(item.image, root, follow_links)
    if not data:
        raise InvalidExample("empty_image", "the image has zero bytes")
    return data


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep) or path == folder


def _check_place(path: Path, root: Path, follow_links: bool) -> None:
    """Raises InvalidExample if a path leads out of `root`, by its name or (without `follow_links`) by a link."""
    path, root = path.absolute(), root.absolute()
    if not _within(os.path.normpath(path), os.path.normpath(root)):
        raise InvalidExample("outside_root", f"{os.path.relpath(path, root)} leads out of the image folder")
    if follow_links:
        return
    # Links of a folder are followed once for all files in it; not so with "..", which may come after a link.
    plain = ".." not in path.parts and not path.is_symlink()
    real = f"{_real(str(path.parent)).rstrip(os.sep)}{os.sep}{path.name}" if plain else os.path.realpath(path)
    if not _within(real, _real(str(root))):
        name = os.path.relpath(path, root)
        raise InvalidExample("outside_root", f"{name} is a link out of the image folder (data.follow_links=true)")


def _read_file(path: Path, root: Path | None, follow_links: bool) -> bytes:
    try:
        if root is not None:
            _check_place(path, root, follow_links)
        return path.read_bytes()
    except InvalidExample:
        raise
    except FileNotFoundError as error:
        raise InvalidExample("missing_image", f"{_name(path, root)} does not exist") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InvalidExample("unreadable_image", f"{_name(path, root)}: {reason}") from error


def _name(path: Path, root: Path | None) -> str:
    return os.path.relpath(path, root) if root else str(path)
