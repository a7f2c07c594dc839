"""One shard of examples: a plain WebDataset tar, a table with a row for every input, and a receipt.

The bytes of both files depend on the inputs and settings alone: members have no owner and no time, and the table
holds nothing about when or where it was written.
"""

import hashlib
import json
import os
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c

from pipeline import receipts
from pipeline.examples import (
    KEPT,
    NO_IMAGE,
    NOT_FAILED,
    OK,
    Example,
    ImageError,
    InvalidExample,
    inspect_image,
    parse_turns,
)
from pipeline.regions import check_regions
from pipeline.sources.base import RawItem, Source, read_image

_BLOCK = 512
_PLAIN = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_HEADER = _PLAIN[:148] + bytes(8) + _PLAIN[156:]
_SPACES = 8 * ord(" ")  # the checksum counts its own place as spaces
_FLUSH = 8 << 20  # bytes between two flushes of a tar that is being written


@dataclass(frozen=True)
class Rules:
    """What decides the bytes of a shard, apart from its inputs."""

    source: str
    licence: str
    shard_size: int
    limit: int
    max_pixels: int
    max_chars: int
    check_images: bool
    follow_links: bool
    reading: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One shard to write: inputs `start:stop` of a split; `again` reads only those that failed before."""

    source: Source
    split: str
    number: int
    start: int
    stop: int
    folder: Path
    rules: Rules
    inputs: Mapping[str, str]
    again: bool = False

    @property
    def stem(self) -> str:
        """The shard's name, the same as the first five characters of its keys."""
        return f"{self.number:05d}"

    @property
    def receipt(self) -> Path:
        return self.folder / f"{self.stem}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """What the receipt is checked against."""
        rules = {name: value for name, value in asdict(self.rules).items() if name != "reading" or value}
        return {**rules, "split": self.split, "start": self.start, "stop": self.stop}


@dataclass
class Row:
    """What the table says about one input; offsets, sizes and CRC-32 are those of the member's data in the tar."""

    key: str
    id: str
    status: str
    reason: str = ""
    ext: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    turns: int = 0
    chars: int = 0
    image_offset: int = -1
    image_size: int = 0
    image_crc: int = 0
    json_offset: int = -1
    json_size: int = 0
    json_crc: int = 0


COLUMNS = {
    "key": "string", "id": "string", "status": "string", "reason": "string", "ext": "string",
    "width": "int32", "height": "int32", "sha256": "string", "turns": "int32", "chars": "int32",
    "image_offset": "int64", "image_size": "int64", "image_crc": "uint32",
    "json_offset": "int64", "json_size": "int64", "json_crc": "uint32",
}  # fmt: skip


def write_shard(job: Job) -> receipts.Receipt:
    """Writes a job's tar, table and receipt; whatever is wrong with an input becomes a row of the table.

    Raises:
        Damaged: the disk gives back something else than was written.
    """
    return write_rows(job, _read_again(job) if job.again else _read(job))


def write_rows(job: Job, inputs: Iterable[tuple[Row, Example | None]]) -> receipts.Receipt:
    """Writes rows and their examples as the shard of `job`."""
    began = time.monotonic()
    tar_path, table_path = job.folder / f"{job.stem}.tar", job.folder / f"{job.stem}.parquet"
    rows: list[Row] = []
    with TarWriter(tar_path) as tar:
        for row, example in inputs:
            if example is not None:
                _add(tar, row, example)
            rows.append(row)
    write_table(rows, table_path)
    return receipts.write(
        job.receipt,
        stage="shard",
        settings=job.settings,
        inputs=job.inputs,
        files=[tar_path, table_path],
        counts=_counts(rows),
        seconds=time.monotonic() - began,
        written={tar_path.name: tar.written},
        durable=True,
    )


def _read(job: Job) -> Iterator[tuple[Row, Example | None]]:
    for index, item in enumerate(job.source.items(job.split, job.start, job.stop)):
        yield make_example(item, f"{job.stem}{index:05d}", job.split, job.rules, job.source.root)


def _read_again(job: Job) -> Iterator[tuple[Row, Example | None]]:
    """As `_read`, but what is good in the shard as it is now is copied from there."""
    from pipeline.archive.read import open_shard, read_table

    old, shard = read_table(job.folder / f"{job.stem}.parquet"), open_shard(job.receipt)
    places = {key: place for place, key in enumerate(shard.keys)}
    for index, item in enumerate(job.source.items(job.split, job.start, job.stop)):
        key = f"{job.stem}{index:05d}"
        if old[index]["status"] in NOT_FAILED:
            yield Row(**old[index]), shard[places[key]] if key in places else None
        else:
            yield make_example(item, key, job.split, job.rules, job.source.root)


def make_example(item: RawItem, key: str, split: str, rules: Rules, root: Path | None) -> tuple[Row, Example | None]:
    """The table's row for a raw item, and its example if it is good."""
    if not item.id.isascii():  # JSON may hold half a character
        item = replace(item, id=item.id.encode("utf-8", "replace").decode())
    row = Row(key=key, id=item.id, status=OK)
    try:
        if item.failure:
            raise InvalidExample(item.failure.status, item.failure.reason)
        turns = parse_turns(item.record.get("conversations"), item.image is not None, rules.max_chars)
        image = read_image(item, item.root or root, rules.follow_links)
        if image is None:
            row.status = NO_IMAGE
        else:
            row.ext, row.width, row.height = _inspect(image, rules)
            row.sha256 = hashlib.sha256(image).hexdigest()
        row.turns, row.chars = len(turns), sum(len(turn.text) for turn in turns)
        meta = _meta(item, [turn.text for turn in turns], item.root or root)
        licence = str(item.record.get("licence") or rules.licence)
        return row, Example(key, image, row.ext, turns, item.source or rules.source, split, licence, meta)
    except InvalidExample as error:
        row.status, row.reason = error.status, error.reason.encode("utf-8", "replace").decode()
        return row, None


def _inspect(image: bytes, rules: Rules) -> tuple[str, int, int]:
    try:
        return inspect_image(image, rules.max_pixels, whole=rules.check_images)
    except ImageError as error:
        raise InvalidExample("bad_image", str(error)) from error


def _meta(item: RawItem, texts: list[str], root: Path | None) -> dict[str, Any]:
    meta = item.record.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise InvalidExample("bad_record", "meta is not an object")
    if "regions" in meta:
        try:
            check_regions(meta["regions"], texts)
        except ValueError as error:
            raise InvalidExample("bad_regions", str(error)) from error
    known = {"id": item.id}
    if isinstance(item.image, Path) and root is not None:
        known["image"] = _below(item.image, root)
    return {**known, **meta}


def _below(path: Path, root: Path) -> str:
    """The name of a file relative to `root`, with slashes."""
    place, folder = path.as_posix(), f"{root.as_posix().rstrip('/')}/"
    if place.startswith(folder) and ".." not in path.parts:
        return place[len(folder) :]
    return Path(os.path.relpath(path, root)).as_posix()


def _add(tar: "TarWriter", row: Row, example: Example) -> None:
    if example.image is not None:
        row.image_size, row.image_crc = len(example.image), zlib.crc32(example.image)
        row.image_offset = tar.add(f"{row.key}.{row.ext}", example.image)
    data = example_json(example)
    row.json_size, row.json_crc = len(data), zlib.crc32(data)
    row.json_offset = tar.add(f"{row.key}.json", data)


def example_json(example: Example) -> bytes:
    """Everything of an example but its image, as the tar's `.json` member."""
    document = {
        "turns": [turn._asdict() for turn in example.turns],
        "source": example.source,
        "split": example.split,
        "licence": example.licence,
        "meta": example.meta,
    }
    try:
        return _dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character somewhere in meta: the escaped form can hold it
        return _dumps(document).encode()


# A table's meta may hold dates and the like, which become text.
_dumps = partial(json.dumps, sort_keys=True, separators=(",", ":"), default=str)


def _counts(rows: list[Row]) -> dict[str, Any]:
    status = Counter(row.status for row in rows)
    failed = [row for row in rows if row.status not in NOT_FAILED]
    return {
        "inputs": len(rows),
        "examples": sum(row.status in KEPT for row in rows),
        "failed": len(failed),
        "status": dict(sorted(status.items())),
        "image_bytes": sum(row.image_size for row in rows),
        "chars": sum(row.chars for row in rows),
        "first_failure": f"{failed[0].id}: {failed[0].status}: {failed[0].reason}" if failed else "",
    }


def write_table(rows: list[Row], path: Path) -> None:
    """Writes the rows as parquet, by rename."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: pa.array([getattr(row, name) for row in rows], type=kind) for name, kind in COLUMNS.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    receipts.write_file(path, sink.getvalue().to_pybytes())


def header(name: str, size: int) -> bytes:
    """The header of a regular file in a POSIX tar, as `tarfile` writes it: mode 0644, no owner, time 0."""
    block = bytearray(_HEADER)
    block[: len(name)] = name.encode("ascii")
    block[124:136] = b"%011o\0" % size
    block[148:156] = b"%06o\0 " % (sum(block) + _SPACES)
    return bytes(block)


class TarWriter:
    """A POSIX tar written to a temporary name; leaving the context without an error gives it its own.

    While members are added, a thread flushes to the disk what is written already; otherwise the stage would stand still
    at the end of every shard for as long as the disk needs for all of it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._crc32c = 0
        self._tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._hash = hashlib.sha256()
        self._offset = self._flushed = 0
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flush: Future | None = None

    @property
    def written(self) -> receipts.Written:
        """Of all that has been written."""
        return receipts.Written(self._hash.hexdigest(), self._crc32c)

    def __enter__(self) -> "TarWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._tmp.open("wb", buffering=1 << 20)
        return self

    def add(self, name: str, data: bytes) -> int:
        """Appends a file; returns the offset of its data."""
        self._put(header(name, len(data)))
        offset = self._offset
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return offset

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._crc32c = google_crc32c.extend(self._crc32c, data)
        self._offset += len(data)
        if self._offset - self._flushed >= _FLUSH and (self._flush is None or self._flush.done()):
            self._flush_behind()

    def _flush_behind(self) -> None:
        """Starts to flush what is written so far; raises what the last time came to."""
        if self._flush is not None:
            self._flush.result()
        self._file.flush()
        self._flushed = self._offset
        self._flush = self._flusher.submit(os.fdatasync, self._file.fileno())

    def __exit__(self, kind: type | None, *_: object) -> None:
        sound = False
        try:
            if kind is None:
                self._put(bytes(2 * _BLOCK))
                self._put(bytes(-self._offset % tarfile.RECORDSIZE))
                if self._flush is not None:
                    self._flush.result()
                self._file.flush()
                sound = True
        finally:
            self._flusher.shutdown()
            with suppress(OSError):  # all of a sound one is written; on a full disk closing tries once more
                self._file.close()
            if not sound:
                self._tmp.unlink(missing_ok=True)
        if sound:
            receipts.commit_file(self._tmp, self.path)
