"""Examples by number: a table of offsets and one positioned read per member, every byte checked."""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path

import numpy as np

from pipeline import receipts
from pipeline.archive.status import MANIFEST
from pipeline.examples import KEPT, Example, Turn
from pipeline.remote import stage

_PLACES = [f"{member}_{name}" for member in ("image", "json") for name in ("offset", "size", "crc")]
_COLUMNS = ["key", "ext", *_PLACES]
_as_turn = partial(tuple.__new__, Turn)  # what Turn._make does, three times as fast
_parse = json.JSONDecoder().scan_once  # of text that begins with a value, as what was written here does


class Archive(Sequence[Example]):
    """The examples of one split, in the order of their keys.

    Opening checks the manifest and every shard's receipt, sizes and times; a shard is hashed in full when it is first
    used, which also brings it into memory in one sequential read, and each example's bytes are compared with their
    checksum on every read. Instances can be sent to workers and used from several threads.

    Args:
        hashed: without it shards are not hashed; for who reads a few examples of many, whose CRC-32 are checked all
            the same.

    Raises:
        Damaged: there is no manifest, or anything is missing or changed; the message names shard and key.
    """

    def __init__(self, folder: Path | str, hashed: bool = True):
        self.folder, self.hashed = Path(folder), hashed
        manifest = receipts.check(self.folder / MANIFEST)
        self.digest: str = manifest.digest
        self.counts = manifest.counts
        found = [receipts.load(self.folder / name) for name in sorted(manifest.children)]
        self.shards = [receipt.path.with_suffix(".tar") for receipt in found]
        self._receipts = found
        self.sizes: list[int] = [receipt.counts["examples"] for receipt in found]
        self.bytes: list[int] = [_shuffle_bytes(receipt) for receipt in found]
        self._ends = list(accumulate(self.sizes))
        self._starts = [0, *self._ends]
        self._open: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        number = bisect_right(self._ends, index)
        opened = self._open.get(number) if index >= 0 else None
        if opened is not None:  # nearly always, and what is written out here counts
            return opened[index - self._starts[number]]
        number, row = self.locate(index)
        return self.shard(number)[row]

    def __iter__(self) -> Iterator[Example]:
        for number in range(len(self.shards)):
            yield from self.shard(number)

    def texts(self) -> Iterator[Example]:
        """The examples with empty bytes for their images, which are not read."""
        for number in range(len(self.shards)):
            shard = self.shard(number)
            yield from map(shard.text, range(len(shard)))

    @property
    def keys(self) -> list[str]:
        """Keys of all examples, in order."""
        return self.column("key") if len(self) else []

    @property
    def lengths(self) -> np.ndarray:
        """(N,) characters of every example, for batches of similar length."""
        return self.column("chars")

    @property
    def images(self) -> list[str]:
        """The sha256 of every example's image, empty where it has none; from the tables alone."""
        return [digest or "" for digest in self.column("sha256")]

    def column(self, name: str) -> np.ndarray | list:
        """One column of the tables, of all examples in order; no tar is hashed for it."""
        found = [_table_of(receipt, [name])[name] for receipt in self._receipts]
        if any(isinstance(part, list) for part in found):
            return [value for part in found for value in part]
        return np.concatenate(found)

    def shard_of(self, index: int) -> int:
        """Number of the shard that holds example `index`."""
        return self.locate(index)[0]

    def shard(self, number: int) -> "Shard":
        """One opened shard."""
        shard = self._open.get(number)
        if shard is None:
            stage(self._receipts[number])
            shard = self._open[number] = Shard(self._receipts[number], self.hashed)
        return shard

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the shard that holds example `index`, and its row there.

        Raises:
            IndexError: there is no such example.
        """
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has {len(self)} examples, not one with number {index}")
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number] - self.sizes[number])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}


def open_shard(receipt: Path) -> "Shard":
    """The shard that a receipt vouches for."""
    return Shard(receipts.check(receipt))


def _shuffle_bytes(receipt: receipts.Receipt) -> int:
    """Memory a shard takes while it is shuffled: its tar, and a decoded map for every five characters of text.

    An estimate from the text keeps the order of training the same with and without maps.
    """
    return receipt.files[f"{receipt.path.stem}.tar"].size + receipt.counts.get("chars", 0) // 5 * 1024


class Shard(Sequence[Example]):
    """One tar and its table, both hashed before anything of them is used (the tar only if ``hashed``)."""

    def __init__(self, receipt: receipts.Receipt, hashed: bool = True):
        self.path = path = receipt.path.with_suffix(".tar")
        table = _table_of(receipt, _COLUMNS)
        self.keys: list[str] = table["key"]
        self.ext: list[str] = table["ext"]
        self._members = np.stack([table[name].astype(np.int64) for name in _PLACES], axis=1)
        self._image, self._json = self._members[:, :3], self._members[:, 3:]  # (N, 3) each: offset, size, sum
        self._file = os.open(path, os.O_RDONLY)
        self._sum = zlib.crc32
        if hashed:
            self._hash(receipt.files[path.name].sha256)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Example:
        offset, size, crc, *place = self._members[row].tolist()
        image = self._read(row, offset, size, crc) if offset >= 0 else None
        return self._example(row, image, *place)

    def text(self, row: int) -> Example:
        """An example with empty bytes for its image, which is not read."""
        offset, _, _, *place = self._members[row].tolist()
        return self._example(row, b"" if offset >= 0 else None, *place)

    def _example(self, row: int, image: bytes | None, offset: int, size: int, crc: int) -> Example:
        document, _ = _parse(self._read(row, offset, size, crc).decode(), 0)
        example = object.__new__(Example)  # past the checks of a frozen dataclass, which take five times as long
        example.__dict__.update(
            key=self.keys[row],
            image=image,
            ext=self.ext[row],
            turns=tuple([_as_turn((turn["role"], turn["text"])) for turn in document["turns"]]),
            source=document["source"],
            split=document["split"],
            licence=document["licence"],
            meta=document["meta"],
        )
        return example

    def document(self, row: int) -> dict:
        """The JSON member of an example: its turns, source, split, licence and meta."""
        return json.loads(self._read(row, *self._json[row].tolist()))

    def image(self, row: int) -> bytes | None:
        """The encoded image of an example, or None."""
        offset, size, crc = self._image[row].tolist()
        return self._read(row, offset, size, crc) if offset >= 0 else None

    def _read(self, row: int, offset: int, size: int, crc: int) -> bytes:
        data = os.pread(self._file, size, offset)
        if len(data) != size:
            data = self._bytes(offset, size)
        if len(data) != size or self._sum(data) != crc:
            raise receipts.Damaged(
                f"{self.path}: the bytes of example {self.keys[row]} have changed: run the shard stage again"
            )
        return data

    def _bytes(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file, size, offset)
        while 0 < len(data) < size and (rest := os.pread(self._file, size - len(data), offset + len(data))):
            data += rest
        return data

    def _hash(self, sha256: str) -> None:
        """Hashes the tar in one sequential pass and notes the CRC-32C of every member on the way.

        Later reads are compared with these: the table's CRC-32 takes ten times as long, and would be the dearest part
        of reading an image.
        """
        import google_crc32c

        places = [(members[row, 0], members, row) for members in (self._image, self._json) for row in range(len(self))]
        whole, at = hashlib.sha256(), 0
        for start, members, row in sorted((place for place in places if place[0] >= 0), key=itemgetter(0)):
            header, data = self._bytes(at, int(start) - at), self._bytes(int(start), int(members[row, 1]))
            whole.update(header)
            whole.update(data)
            at += len(header) + len(data)
            members[row, 2] = google_crc32c.value(data)
        while data := os.pread(self._file, 1 << 20, at):
            whole.update(data)
            at += len(data)
        if whole.hexdigest() != sha256:
            raise receipts.Damaged(f"{self.path}: its content has changed: run the shard stage again")
        self._sum = google_crc32c.value

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def _table_of(receipt: receipts.Receipt, columns: Sequence[str]) -> dict:
    path = receipt.path.with_suffix(".parquet")
    return _read_table(path, receipt.files[path.name].sha256, columns)


def _read_table(path: Path, sha256: str, columns: Sequence[str]) -> dict:
    """Some columns of the kept rows; numbers as arrays."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    data = path.read_bytes()
    if receipts.hash_bytes(data) != sha256:
        raise receipts.Damaged(f"{path}: its content has changed: run the shard stage again")
    table = pq.read_table(pa.BufferReader(data), use_threads=False, columns=list({*columns, "status"}))
    table = table.filter(pc.is_in(table["status"], pa.array(KEPT))).select(list(columns))
    return {
        name: column.to_numpy() if pa.types.is_integer(column.type) else column.to_pylist()
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def read_table(path: Path) -> list[dict]:
    """Every row of a shard's table, failures included, as dictionaries; for people and for repairs."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()
