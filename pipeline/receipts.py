"""Receipts: the proof that a piece of cached output is whole and was made with these settings.

A receipt is a small JSON file, written last and by rename. It names every file it vouches for with size and sha256,
the settings and the digests of the inputs it was made from, and receipts below it (`children`), so that the receipt
that closes a stage vouches for a whole tree. Presence of a file proves nothing; a receipt that checks does.

`Receipt.digest` covers what was made and from what, not when or how fast: making the same thing again gives the same
digest, so nothing downstream becomes stale. The receipt's own hash covers every byte of it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

SCHEMA = 1
REMOTE = "remote.json"  # names the URL from which what is missing below its folder comes when it is needed
PACKAGES = ("dask", "diffusers", "numcodecs", "numpy", "pillow", "pyarrow", "regex", "torch", "transformers", "zarr")
_BLOCK = 1 << 20


class Damaged(UserError):
    """Cached output that is missing, incomplete or changed since it was written."""


class Stale(UserError):
    """Cached output made with other settings or inputs; `fields` names those that differ."""

    def __init__(self, message: str, fields: Sequence[str] = ()):
        super().__init__(message)
        self.fields = list(fields)

    def __reduce__(self):
        return type(self), (self.args[0], self.fields)


@dataclass(frozen=True)
class Entry:
    """One file or directory: `parts` holds size and sha256 of each file of a directory, by its path inside it."""

    size: int
    sha256: str
    mtime_ns: int
    parts: dict[str, list] | None = None


@dataclass(frozen=True)
class Written:
    """What went into a file, taken while it was written."""

    sha256: str
    crc32c: int


@dataclass(frozen=True)
class Receipt:
    """A receipt as read back; paths in `files` and `children` are relative to its folder."""

    path: Path
    stage: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: dict[str, Entry]
    children: dict[str, str]
    counts: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    digest: str

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decided the output."""
        return fingerprint({"schema": SCHEMA, "settings": self.settings, "inputs": self.inputs})


def fingerprint(settings: Mapping) -> str:
    """sha256 of the settings in canonical form."""
    return hashlib.sha256(_canonical(plain(settings))).hexdigest()


def plain(value: Any) -> Any:
    """Settings as JSON sees them: dataclasses and mappings as objects, tuples as lists, paths as text."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- writing --------------------------------------------------------------------------------------------------------


def write(
    path: Path,
    *,
    stage: str,
    settings: Mapping,
    inputs: Mapping[str, str] | None = None,
    files: Sequence[Path] = (),
    counts: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
    children: Sequence[Path] = (),
    written: Mapping[str, Written] | None = None,
    durable: bool = False,
) -> Receipt:
    """Makes `files` durable, reads them back, and writes the receipt that vouches for them.

    Args:
        files: files or directories, anywhere; hashed as they lie on disk.
        children: receipts that this one vouches for.
        written: by file name what went into a file: one that reads back differently is refused. Its CRC-32C is enough
            to tell, and saves hashing it all a second time.
        durable: the caller has flushed the files already.

    Raises:
        Damaged: a file is missing or reads back differently, or a child does not check.
    """
    path = Path(path)
    entries = {}
    for file in files:
        name = _relative(file, path.parent)
        if not durable:
            sync_tree(Path(file))
        entries[name] = _entry(Path(file), (written or {}).get(Path(file).name))
    body = {
        "schema": SCHEMA,
        "stage": stage,
        "settings": plain(settings),
        "inputs": dict(inputs or {}),
        "files": {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in sorted(entries.items())},
        "children": {_relative(child, path.parent): load(child).digest for child in sorted(map(str, children))},
        "counts": plain(counts or {}),
    }
    document = {
        **body,
        "digest": hashlib.sha256(_canonical(body)).hexdigest(),
        "stamps": {name: entry.mtime_ns for name, entry in sorted(entries.items())},
        "parts": {name: entry.parts for name, entry in sorted(entries.items()) if entry.parts is not None},
        "versions": versions(),
        "seconds": round(seconds, 3),
    }
    _write_document(path, document)
    return load(path)


def _write_document(path: Path, document: dict) -> None:
    document = {key: value for key, value in document.items() if key != "sha256"}
    document["sha256"] = hashlib.sha256(_canonical(document)).hexdigest()
    write_file(path, _text(document))


def _text(document: dict) -> bytes:
    return (json.dumps(document, ensure_ascii=False, indent=1) + "\n").encode()


def write_file(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old content or the new, never a part; it is read back before that."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp.write_bytes(data)
    sync_tree(tmp)
    if tmp.read_bytes() != data:
        raise Damaged(f"{path}: reads back differently from what was written: check the disk, then run again")
    tmp.replace(path)
    _sync(path.parent)


def commit_file(tmp: Path, final: Path) -> None:
    """Makes a finished temporary file durable and gives it its name; the two lie on one file system."""
    sync_tree(tmp)
    Path(tmp).replace(final)
    _sync(Path(final).parent)


def commit_dir(tmp: Path, final: Path, durable: bool = False) -> None:
    """Makes a finished temporary directory durable and gives it its name, in place of an older one.

    Args:
        durable: the caller has flushed it already.
    """
    tmp, final = Path(tmp), Path(final)
    if not durable:
        sync_tree(tmp)
    old = final.with_name(f".{final.name}.{os.getpid()}.old.tmp")
    if final.exists():
        final.rename(old)
    tmp.rename(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_tree(path: Path) -> None:
    """Flushes a file, or every file and folder below a directory, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary files of a killed run; only the process that holds the folder may call this."""
    for path in Path(folder).glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


# --- checking -------------------------------------------------------------------------------------------------------


def load(path: Path) -> Receipt:
    """Reads a receipt and checks its own hash, nothing else.

    Raises:
        Damaged: there is none, or its bytes have changed.
    """
    return _parse(Path(path), _document(Path(path)))


def check(
    path: Path,
    settings: Mapping | None = None,
    inputs: Mapping[str, str] | None = None,
    full: bool = False,
) -> Receipt:
    """Checks a receipt, its children and all files.

    Quick: its own hash, and each file's size and time; a file whose time differs is hashed. Full: every hash.

    Raises:
        Stale: `settings` or `inputs` are given and differ.
        Damaged: anything is missing or changed; the message names it.
    """
    path = Path(path)
    document = _document(path)
    receipt = _parse(path, document)
    _check_fields(receipt, document, settings, inputs)
    moved = False
    for name, entry in receipt.files.items():
        moved |= _check_file(path.parent / name, entry, document["parts"].get(name), full)
    for name, digest in receipt.children.items():
        if check(path.parent / name, full=full).digest != digest:
            raise Damaged(f"{path.parent / name}: is not the one that {path.name} vouches for: run the stage again")
    if moved:
        _restamp(receipt, document)
    return receipt


def damages(path: Path) -> list[str]:
    """What is wrong with a receipt's own files by their full hashes, one line each; nothing if all is well.

    Raises:
        Damaged: the receipt itself cannot be read.
    """
    receipt = load(path)
    found = []
    for name, entry in receipt.files.items():
        file = receipt.path.parent / name
        if entry.parts is None or not file.exists():
            found += _damage(file, entry, None)
            continue
        inner = [
            line
            for part, (size, sha256) in entry.parts.items()
            for line in _damage(file / part, Entry(size, sha256, 0), None)
        ]
        found += inner or _damage(file, entry, entry.parts)  # the second finds files that do not belong there
    return found


def awaited(path: Path) -> Path | None:
    """The folder above that knows from where a missing file comes, if there is one (`pipeline.remote`)."""
    return next((folder for folder in list(path.parents)[:3] if (folder / REMOTE).exists()), None)


def _damage(path: Path, entry: Entry, parts: dict[str, list] | None) -> list[str]:
    try:
        _check_file(path, entry, parts, full=True)
    except Damaged as error:
        return [str(error).removesuffix(": run the stage again")]
    return []


def is_current(
    path: Path,
    settings: Mapping | None = None,
    inputs: Mapping[str, str] | None = None,
    full: bool = False,
    overwrite: bool = False,
) -> bool:
    """Whether the output of this receipt can be used: False if absent or damaged.

    Raises:
        Stale: it was made with other settings or inputs (with `overwrite`, False instead).
    """
    try:
        check(path, settings, inputs, full)
    except Damaged:
        return False
    except Stale:
        if overwrite:
            return False
        raise
    return True


def _document(path: Path) -> dict:
    try:
        data = path.read_bytes()
        document = json.loads(data)
        claimed = document["sha256"]
        rest = {key: value for key, value in document.items() if key != "sha256"}
        # The hash is of the meaning; the text must be the one that was written as well, to the last byte.
        sound = hashlib.sha256(_canonical(rest)).hexdigest() == claimed and _text(document) == data
    except FileNotFoundError as error:
        raise Damaged(f"{path}: there is no such receipt: run the stage that writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: the receipt is damaged: run the stage again") from error
    if not sound:
        raise Damaged(f"{path}: the receipt is damaged: run the stage again")
    return document


def _parse(path: Path, document: dict) -> Receipt:
    files = {
        name: Entry(entry["size"], entry["sha256"], document["stamps"][name], document["parts"].get(name))
        for name, entry in document["files"].items()
    }
    names = ("stage", "settings", "inputs", "children", "counts", "versions", "seconds", "digest")
    return Receipt(path=path, files=files, **{name: document[name] for name in names})


def _check_fields(receipt: Receipt, document: dict, settings: Mapping | None, inputs: Mapping | None) -> None:
    differing = [] if document["schema"] == SCHEMA else [f"schema ({document['schema']} -> {SCHEMA})"]
    if settings is not None:
        differing += _differences(receipt.settings, plain(settings), "")
    if inputs is not None:
        differing += _differences(receipt.inputs, dict(inputs), "inputs.")
    if differing:
        raise Stale(
            f"{receipt.path} was made with other settings: {', '.join(differing[:6])}"
            f"{', ...' if len(differing) > 6 else ''}: set them back, choose another folder, or give overwrite=true",
            [text.partition(" ")[0] for text in differing],
        )


def _differences(old: Any, new: Any, prefix: str) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line for key in sorted({*old, *new}) for line in _differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    if old == new:
        return []
    return [f"{prefix.rstrip('.')} ({_short(old)} -> {_short(new)})"]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:18]}..{text[-18:]}"


def _check_file(path: Path, entry: Entry, parts: dict[str, list] | None, full: bool) -> bool:
    """Raises Damaged if the file differs; returns whether only its time did."""
    if not path.exists():
        if awaited(path):
            return False  # it is checked when it arrives
        raise Damaged(f"{path}: is missing: run the stage again")
    if parts is None:
        stat = path.stat()
        if stat.st_size != entry.size:
            raise Damaged(f"{path}: has {stat.st_size} bytes, not {entry.size}: run the stage again")
        moved = stat.st_mtime_ns != entry.mtime_ns
        if (full or moved) and file_sha256(path) != entry.sha256:
            raise Damaged(f"{path}: its content has changed: run the stage again")
        return moved
    found = dict(_walk(path))
    for name, (size, _) in parts.items():
        if name not in found:
            raise Damaged(f"{path / name}: is missing: run the stage again")
        if found[name].st_size != size:
            raise Damaged(f"{path / name}: has {found[name].st_size} bytes, not {size}: run the stage again")
    if extra := sorted(found.keys() - parts.keys()):
        raise Damaged(f"{path / extra[0]}: does not belong there: delete it or run the stage again")
    moved = max((stat.st_mtime_ns for stat in found.values()), default=0) != entry.mtime_ns
    if full or moved:
        for name, (_, sha256) in parts.items():
            if file_sha256(path / name) != sha256:
                raise Damaged(f"{path / name}: its content has changed: run the stage again")
    return moved


def _restamp(receipt: Receipt, document: dict) -> None:
    """Notes new file times after a copy, so that the next quick check need not hash; not possible is not an error."""
    stamps = {name: entry.mtime_ns for name, entry in receipt.files.items()}
    for name, entry in receipt.files.items():
        if (receipt.path.parent / name).exists():
            stamps[name] = _mtime(receipt.path.parent / name, entry.parts is not None)
    with contextlib.suppress(OSError):
        _write_document(receipt.path, {**document, "stamps": stamps})


# --- one process per folder -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder for writing and clears what a killed run left in it.

    Raises:
        UserError: another process holds it; the message says which.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(f"{folder} is being written by {holder}: wait for it or stop it, then run again") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        remove_leftovers(folder)
        try:
            yield
        finally:
            lock.truncate(0)


# --- hashes ---------------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_crc32c(path: Path) -> int:
    """CRC-32C of a file's bytes, several times faster than a hash."""
    import google_crc32c

    found = 0
    with Path(path).open("rb") as handle:
        while block := handle.read(_BLOCK):
            found = google_crc32c.extend(found, block)
    return found


def hash_bytes(data: bytes) -> str:
    """sha256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that touch the output."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _entry(path: Path, written: Written | None = None) -> Entry:
    if not path.exists():
        raise Damaged(f"{path}: is missing, so there is nothing to vouch for: run the stage again")
    if written is not None:
        if file_crc32c(path) != written.crc32c:
            raise Damaged(f"{path}: reads back differently from what was written: check the disk, then run again")
        return Entry(path.stat().st_size, written.sha256, path.stat().st_mtime_ns)
    if not path.is_dir():
        return Entry(path.stat().st_size, file_sha256(path), path.stat().st_mtime_ns)
    parts = {name: [stat.st_size, file_sha256(path / name)] for name, stat in sorted(_walk(path))}
    size = sum(part[0] for part in parts.values())
    return Entry(size, hashlib.sha256(_canonical(parts)).hexdigest(), _mtime(path, True), parts)


def _walk(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            yield path.relative_to(folder).as_posix(), path.stat()


def _mtime(path: Path, directory: bool) -> int:
    if not directory:
        return path.stat().st_mtime_ns
    return max((stat.st_mtime_ns for _, stat in _walk(path)), default=0)


def _relative(path: Path | str, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
