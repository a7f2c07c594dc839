"""Shards and maps on other machines: staged to local disk shard by shard, checked, and pushed with the same care.

Any fsspec URL works (`s3://`, `gs://`, `hf://`, `file://`, ...). A remote folder looks like a local one: a manifest,
receipts, and the files they vouch for. A fetched file gets its name only when its size and sha256 are those of its
receipt, so what lies on the local disk is as good as what was made there.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import receipts
from pipeline.errors import UserError

MANIFEST = "manifest.json"


class Remote:
    """A folder at a URL.

    Raises:
        UserError: the URL's kind is unknown or needs a package that is not installed.
    """

    def __init__(self, url: str, **options: Any):
        import fsspec

        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, **options)
        except (ValueError, ImportError) as error:
            raise UserError(f"{url}: cannot be opened: {error}") from error
        self.url = url.rstrip("/")

    def fetch(self, name: str, local: Path, expected: receipts.Entry | None = None) -> None:
        """Copies one file and checks it.

        Raises:
            Damaged: what arrived is not what the receipt vouches for.
            UserError: the file is not there, or the connection failed.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        tmp = local.with_name(f".{local.name}.{os.getpid()}.tmp")
        try:
            self.fs.get_file(f"{self.root}/{name}", str(tmp))
            if expected and (tmp.stat().st_size, receipts.file_sha256(tmp)) != (expected.size, expected.sha256):
                raise receipts.Damaged(f"{self.url}/{name}: arrived other than its receipt vouches for: fetch it again")
            receipts.commit_file(tmp, local)
        except (OSError, TimeoutError) as error:
            raise UserError(f"{self.url}/{name}: cannot be fetched: {type(error).__name__}: {error}") from error
        finally:
            tmp.unlink(missing_ok=True)

    def put(self, local: Path, name: str) -> None:
        """Copies one file there; stores with rename semantics get it under its name only when it is whole."""
        target = f"{self.root}/{name}"
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        try:
            self.fs.put_file(str(local), target)
        except OSError as error:
            raise UserError(f"{self.url}/{name}: cannot be written: {type(error).__name__}: {error}") from error


def pull(url: str, folder: Path, shards: list[str] | None = None, **options: Any) -> int:
    """Stages a folder with a manifest: metadata first, then every shard that is not here and whole already.

    Args:
        shards: stems to stage, e.g. `["00000"]`; all by default. Others keep their receipts only.

    Returns:
        Number of shards that were fetched.
    """
    remote, folder = Remote(url, **options), Path(folder)
    fetched = 0
    with receipts.hold(folder):
        for name in _tree(remote, folder, MANIFEST):
            receipt = receipts.load(folder / name)
            if not receipt.files or (shards is not None and Path(name).stem not in shards):
                continue
            if receipts.is_current(folder / name, full=False):
                continue
            _fetch_files(remote, folder, name, receipt)
            fetched += 1
        remote.fetch(MANIFEST, folder / MANIFEST)  # last, so that an interrupted pull is not taken for a whole one
    return fetched


def _tree(remote: Remote, folder: Path, top: str) -> Iterator[str]:
    """Fetches the manifest (under another name) and every receipt below it; yields the names of the latter."""
    aside = folder / f".{top}.remote.tmp"
    remote.fetch(top, aside)
    pending = list(receipts.load(aside).children.items())
    aside.unlink()
    while pending:
        name, digest = pending.pop(0)
        path = folder / name
        if not _is_the(path, digest):
            remote.fetch(name, path)
        receipt = receipts.load(path)
        if receipt.digest != digest:
            raise receipts.Damaged(f"{remote.url}/{name}: is not the one that the manifest vouches for: push it again")
        below = Path(name).parent
        pending += [((below / child).as_posix(), found) for child, found in receipt.children.items()]
        yield name


def _is_the(path: Path, digest: str) -> bool:
    try:
        return receipts.load(path).digest == digest
    except receipts.Damaged:
        return False


def _fetch_files(remote: Remote, folder: Path, name: str, receipt: receipts.Receipt) -> None:
    below = Path(name).parent
    for file, entry in receipt.files.items():
        where = (below / file).as_posix()
        if ".." in Path(where).parts or Path(where).is_absolute():
            raise UserError(f"{remote.url}/{name}: names a file outside its folder: {file}")
        if entry.parts is None:
            remote.fetch(where, folder / where, entry)
            continue
        tmp = (folder / where).with_name(f".{Path(where).name}.{os.getpid()}.tmp")
        try:
            for part, (size, sha256) in entry.parts.items():
                if ".." in Path(part).parts or Path(part).is_absolute():
                    raise UserError(f"{remote.url}/{where}: names a file outside its folder: {part}")
                remote.fetch(f"{where}/{part}", tmp / part, receipts.Entry(size, sha256, 0))
            receipts.commit_dir(tmp, folder / where)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    receipts.check(folder / name)


def push(folder: Path, url: str, **options: Any) -> int:
    """Copies a folder with a manifest to a URL after a full check of it; the manifest goes last.

    Returns:
        Number of files sent.

    Raises:
        Damaged: something here is not whole.
    """
    folder = Path(folder)
    receipts.check(folder / MANIFEST, full=True)
    remote = Remote(url, **options)
    names = [name for name in _local_tree(folder, MANIFEST) if name != MANIFEST]
    sent = 0
    for name in [*names, MANIFEST]:
        below = Path(name).parent
        for file, entry in receipts.load(folder / name).files.items():
            where = (below / file).as_posix()
            for part in [where] if entry.parts is None else [f"{where}/{part}" for part in entry.parts]:
                remote.put(folder / part, part)
                sent += 1
        remote.put(folder / name, name)
        sent += 1
    return sent


def _local_tree(folder: Path, top: str) -> Iterator[str]:
    pending = [top]
    while pending:
        name = pending.pop(0)
        yield name
        below = Path(name).parent
        pending += [(below / child).as_posix() for child in receipts.load(folder / name).children]
