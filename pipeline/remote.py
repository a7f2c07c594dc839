"""Shards and maps on other machines: staged to local disk shard by shard, checked, and pushed with the same care.

Any fsspec URL works (`s3://`, `gs://`, `hf://`, `file://`, ...). A remote folder looks like a local one: a manifest,
receipts, and the files they vouch for. A fetched file gets its name only when its size and sha256 are those of its
receipt, so what lies on the local disk is as good as what was made there. Tars and maps may also come later, each when
it is first used (`pull(..., lazy=True)`).
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline import receipts
from pipeline.errors import UserError

MANIFEST = "manifest.json"
COMMIT_FILES = 500  # files of one commit on the Hugging Face hub


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
        try:
            self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.fs.put_file(str(local), target)
        except OSError as error:
            raise UserError(f"{self.url}/{name}: cannot be written: {type(error).__name__}: {error}") from error

    def put_all(self, files: Sequence[tuple[Path, str]]) -> None:
        """Copies files there, in order. A write to a repository of the hub is a commit, of which it allows some hundred
        an hour, so there many files make one."""
        repository = self._repository()
        if repository is None:
            for local, name in files:
                self.put(local, name)
            return
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(endpoint=self.fs.endpoint, token=self.fs.token)
        for first in range(0, len(files), COMMIT_FILES):
            part = files[first : first + COMMIT_FILES]
            prefix = f"{repository.path_in_repo}/".lstrip("/")
            added = [CommitOperationAdd(f"{prefix}{name}", str(local)) for local, name in part]
            message = f"{part[-1][1]} and {len(part) - 1} more files"
            try:
                api.create_commit(
                    repository.repo_id, added, commit_message=message,
                    repo_type=repository.repo_type, revision=repository.revision,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"{self.url}: cannot be written: {type(error).__name__}: {error}") from error
        self.fs.invalidate_cache()

    def _repository(self) -> Any:
        """What the hub says about the repository, if the URL is in one (its buckets take single files)."""
        if "hf" not in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)):
            return None
        found = self.fs.resolve_path(self.root)
        return found if hasattr(found, "path_in_repo") else None


def pull(url: str, folder: Path, shards: list[str] | None = None, lazy: bool = False, **options: Any) -> int:
    """Stages a folder with a manifest: metadata first, then every shard that is not here and whole already.

    Args:
        shards: stems to stage, e.g. `["00000"]`; all by default. Others keep their receipts only.
        lazy: fetch the receipts and the tables now, tars and maps when they are first used (`stage`), by the same
            URL and without `options`.

    Returns:
        Number of shards that were fetched.
    """
    remote, folder = Remote(url, **options), Path(folder)
    fetched = 0
    with receipts.hold(folder):
        (folder / receipts.REMOTE).unlink(missing_ok=True)  # so that what is missing counts as missing
        for name in _tree(remote, folder, MANIFEST):
            receipt = receipts.load(folder / name)
            if not receipt.files or (shards is not None and Path(name).stem not in shards):
                continue
            if receipts.is_current(folder / name, full=False):
                continue
            _fetch_files(remote, folder, name, receipt, tables_only=lazy)
            fetched += 1
        if lazy:
            receipts.write_file(folder / receipts.REMOTE, json.dumps({"url": remote.url}).encode())
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
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise UserError(f"{remote.url}/{top}: names a receipt outside its folder: {name}")
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


def stage(receipt: receipts.Receipt) -> None:
    """Fetches what a shard lacks, if it was pulled lazily; several processes may ask for it at once.

    Raises:
        Damaged: what arrived is not what the receipt vouches for.
        UserError: it cannot be fetched.
    """
    folder = receipt.path.parent
    if all((folder / name).exists() for name in receipt.files):
        return
    home = receipts.awaited(receipt.path)
    if home is None:
        return  # the reader says what is missing
    with (folder / f".{receipt.path.stem}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((folder / name).exists() for name in receipt.files):
            url = json.loads((home / receipts.REMOTE).read_bytes())["url"]
            _fetch_files(Remote(url), home, receipt.path.relative_to(home).as_posix(), receipt)


def _fetch_files(remote: Remote, folder: Path, name: str, receipt: receipts.Receipt, tables_only: bool = False) -> None:
    below = Path(name).parent
    for file, entry in receipt.files.items():
        where = (below / file).as_posix()
        if tables_only and Path(file).suffix != ".parquet":
            continue
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
    if not tables_only:
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
    files: list[tuple[Path, str]] = []
    for name in [*names, MANIFEST]:
        receipt = receipts.load(folder / name)
        stage(receipt)
        for file, entry in receipt.files.items():
            where = (Path(name).parent / file).as_posix()
            parts = [where] if entry.parts is None else [f"{where}/{part}" for part in entry.parts]
            files += [(folder / part, part) for part in parts]
        files.append((folder / name, name))
    remote.put_all(files)
    return len(files)


def _local_tree(folder: Path, top: str) -> Iterator[str]:
    pending = [top]
    while pending:
        name = pending.pop(0)
        yield name
        below = Path(name).parent
        pending += [(below / child).as_posix() for child in receipts.load(folder / name).children]
