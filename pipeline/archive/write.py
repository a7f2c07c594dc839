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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
        expected={tar_path.name: tar.sha256},
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
        known["image"] = Path(os.path.relpath(item.image, root)).as_posix()
    return {**known, **meta}


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
        return json.dumps(document, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # half a character somewhere in meta: the escaped form can hold it
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


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


class TarWriter:
    """A POSIX tar written to a temporary name; leaving the context without an error gives it its own."""

    def __init__(self, path: Path):
        self.path = path
        self.sha256 = ""
        self._tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._hash = hashlib.sha256()
        self._offset = 0

    def __enter__(self) -> "TarWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._tmp.open("wb")
        return self

    def add(self, name: str, data: bytes) -> int:
        """Appends a file; returns the offset of its data."""
        header = tarfile.TarInfo(name)  # mode 0644, no owner, time 0
        header.size = len(data)
        self._put(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._offset
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return offset

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._put(bytes(2 * _BLOCK))
            self._put(bytes(-self._offset % tarfile.RECORDSIZE))
        self._file.close()
        if kind is None:
            self.sha256 = self._hash.hexdigest()
            receipts.commit_file(self._tmp, self.path)
        else:
            self._tmp.unlink(missing_ok=True)
