"""Reading the map store: every byte checked, nothing ever filled in.

Zarr fills missing chunks with zeros by definition, so a reader of attention maps must not use it as it is. Chunks are
decoded by zarrs where that is installed; whatever does not fit its digest, and whatever could be such zeros, is read
again by hand, and a chunk that is missing, empty, damaged or in the wrong place is an error that names shard and key.
The files are plain Zarr v3 (sharding, Blosc, CRC-32C, vlen-utf8) and any Zarr library reads them.
"""

import json
import os
import sys
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path
from threading import Lock

import numpy as np

from pipeline import receipts
from pipeline.mapstore import chunks
from pipeline.mapstore.schema import (
    ATTRIBUTE,
    CHUNK,
    INDEX_ENTRY,
    SCHEMA,
    SIDE,
    ExampleMaps,
    Spans,
    decode_chunk,
    is_sound,
    salted_digest,
    stored_width,
    unpack,
)
from pipeline.receipts import Damaged
from pipeline.remote import stage

MANIFEST = "manifest.json"
_SMALL = {"range": "<f4", "status": "u1", "turn": "<i4", "start": "<i4", "end": "<i4", "offsets": "<i8"}
_CACHED_CHUNKS = 16
_FEW = 2  # chunks that are read by hand


class MapStore:
    """The maps of one split: `shards/<data>/maps/<teacher>/<split>/`.

    Opening checks the manifest and every receipt, sizes and times; metadata files are hashed when a shard is first
    used; every chunk is checked on every read. Instances can be sent to workers.

    Args:
        partial: accept a folder whose stage has not been closed, and use the shards that have a valid receipt.
        cache_bytes: memory for whole decoded shards. A training stream that stays within a few shards at a time then
            decodes each once; without it a `get` decodes the one or two chunks it needs.

    Raises:
        Damaged: there is no manifest, or anything is missing or changed.
    """

    def __init__(self, folder: Path | str, partial: bool = False, cache_bytes: int = 0):
        self.folder = Path(folder)
        self.cache_bytes = cache_bytes
        manifest = self.folder / MANIFEST
        if partial and not manifest.exists():
            names = [path for path in sorted(self.folder.glob("[0-9]*.json")) if receipts.is_current(path)]
            self._receipts = {path.stem: receipts.load(path) for path in names}
            self.digest = receipts.fingerprint({name: receipt.digest for name, receipt in self._receipts.items()})
        else:
            closed = receipts.check(manifest)
            self._receipts = {Path(name).stem: receipts.load(self.folder / name) for name in closed.children}
            self.digest = closed.digest
        self._groups: dict[str, Group] = {}
        self._spare: list[np.ndarray] = []  # blocks of shards that were forgotten
        self._loaded: OrderedDict[str, tuple[Group, np.ndarray]] = OrderedDict()
        self._lock = Lock()

    @property
    def shards(self) -> list[str]:
        """Names of the shards, sorted."""
        return sorted(self._receipts)

    @property
    def keys(self) -> list[str]:
        """Keys of all examples, those without words included."""
        return [key for name in self.shards for key in self.group(name).keys]

    def get(self, key: str) -> ExampleMaps | None:
        """The maps of an example, or None if the store does not hold it.

        Raises:
            Damaged: a chunk is missing, damaged or in the wrong place; shard and key are named.
        """
        name = key[:5]
        if name not in self._receipts:
            return None
        with self._lock:
            loaded = self._loaded.get(name)
            if loaded is not None:
                self._loaded.move_to_end(name)
        if loaded is None:
            group = self.group(name)
            if group.decoded_bytes > self.cache_bytes:
                return group.get(key)
            loaded = self._load(name, group)
        group, maps_WHW = loaded
        return group.cut(key, maps_WHW)

    def forget(self) -> None:
        """Forgets all decoded shards; their memory is kept for those that are decoded next."""
        with self._lock:
            while self._loaded:
                self._retire()

    def _load(self, name: str, group: "Group") -> tuple["Group", np.ndarray]:
        """Decodes a whole shard, once, and forgets those that were used longest ago."""
        with self._lock:
            if name not in self._loaded:
                room = self.cache_bytes - group.decoded_bytes
                while sum(held.decoded_bytes for held, _ in self._loaded.values()) > room:
                    self._retire()
                self._loaded[name] = group, group.decode(self._spare)
            return self._loaded[name]

    def _retire(self) -> None:
        """Forgets the shard that was used longest ago. Fresh memory for the next would cost a page fault for each map
        or so: this shard's is kept for it, unless somebody still looks at any of its maps."""
        _, loaded = self._loaded.popitem(last=False)
        maps_WHW = loaded[1]
        del loaded
        block = maps_WHW.base
        # Seen by these names, by the one of the other, and by the count itself. Every view of a map has the block as
        # its base, and a thread that is about to cut one out holds `maps_WHW`.
        if block is not None and sys.getrefcount(maps_WHW) == 2 and sys.getrefcount(block) == 3:
            self._spare.append(block)

    def group(self, name: str) -> "Group":
        """One opened shard."""
        group = self._groups.get(name)
        if group is None:
            path = self.folder / f"{name}.zarr"
            stage(self._receipts[name])
            group = self._groups[name] = Group(path, name, self._receipts[name].files[path.name].parts)
        return group

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_groups": {}, "_spare": [], "_loaded": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update({**state, "_lock": Lock()})


class Group:
    """One Zarr group.

    Args:
        parts: size and sha256 of its files from the receipt; the metadata is checked against it.
    """

    def __init__(self, path: Path, shard: str, parts: dict[str, list] | None = None):
        from numcodecs import blosc

        self.path, self.shard, self._parts = path, shard, parts
        attributes = self._metadata("zarr.json").get("attributes", {}).get(ATTRIBUTE, {})
        if attributes.get("schema") != SCHEMA or attributes.get("shard") != shard:
            raise Damaged(f"{path}: is not shard {shard} of a map store of schema {SCHEMA}: run precompute again")
        self.attrs: dict = attributes
        self.profile: str = attributes["profile"]
        self.width = stored_width(self.profile)
        self._digests = attributes["digests"]
        maps = self._metadata("maps/zarr.json")
        self._words = maps["shape"][0]
        self._per_file = maps["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._zarrs = chunks.ZarrsChunks(path, maps, self.width) if chunks.usable() else None
        self._index: dict[int, list[list[int]]] = {}
        self._files: dict[int, int] = {}
        self._chunks: OrderedDict[int, np.ndarray] = OrderedDict()
        # Chunks that fitted their digests: file, offset, length and checksum.
        self._belonging: dict[int, tuple[int, int, int, bytes]] = {}
        self._decompress = blosc.decompress
        self._lock = Lock()
        self.keys: list[str] = self._read_keys()
        self._row = {key: row for row, key in enumerate(self.keys)}
        small = {name: self._read_small(name, dtype) for name, dtype in _SMALL.items()}
        self.range, self.status, self.offsets = small["range"].reshape(-1, 2), small["status"], small["offsets"]
        self._ends: list[int] = self.offsets.tolist()
        self._spans = np.stack([small["turn"], small["start"], small["end"]], axis=1)
        if len(self.offsets) != len(self.keys) + 1 or self.offsets[-1] != self._words:
            raise Damaged(f"{path}: its arrays do not fit together: run precompute again")

    def get(self, key: str) -> ExampleMaps | None:
        """The maps of one example, or None."""
        row = self._row.get(key)
        if row is None:
            return None
        low, high = self._ends[row], self._ends[row + 1]
        if low == high:
            return self._example(row, np.zeros((0, SIDE, SIDE), np.uint8))
        first, last = low // CHUNK, (high - 1) // CHUNK + 1
        stored = self._chunks_between(first, last, key).reshape(-1, SIDE, self.width)
        return self._example(row, unpack(stored[low - first * CHUNK : high - first * CHUNK], self.profile))

    def cut(self, key: str, maps_WHW: np.ndarray) -> ExampleMaps | None:
        """The maps of one example out of what `decode` gave, or None."""
        row = self._row.get(key)
        return None if row is None else self._example(row, maps_WHW[self._ends[row] : self._ends[row + 1]])

    @property
    def decoded_bytes(self) -> int:
        """Memory of all its maps."""
        return self._words * SIDE * SIDE

    def decode(self, spare: list[np.ndarray] | None = None) -> np.ndarray:
        """(W, 32, 32) uint8, the maps of all examples; `decoded_bytes` of memory.

        Args:
            spare: blocks of former shards; the last is used again if it is large enough, else all are dropped.
        """
        count = len(self._digests["maps"])
        stored = spare.pop() if spare else None
        if stored is None or len(stored) < count or stored.shape[-1] != self.width:
            if spare:
                spare.clear()
            stored = np.empty((count, CHUNK, SIDE, self.width), np.uint8)
        stored = stored[:count]
        if count:
            self._read_chunks(0, count, stored)
        return unpack(stored.reshape(-1, SIDE, self.width), self.profile)

    def load(self) -> list[ExampleMaps]:
        """The maps of all examples, in the tar's order; they share one block of memory of `decoded_bytes`."""
        maps_WHW = self.decode()
        return [self._example(row, maps_WHW[self._ends[row] : self._ends[row + 1]]) for row in range(len(self.keys))]

    def _example(self, row: int, maps_WHW: np.ndarray) -> ExampleMaps:
        span = slice(self._ends[row], self._ends[row + 1])
        found = object.__new__(ExampleMaps)  # past the checks of a frozen dataclass
        found.__dict__.update(
            key=self.keys[row],
            words=Spans(self._spans[span]),
            maps=maps_WHW,
            range=self.range[span],
            status=self.status[span],
        )
        return found

    def _key_at(self, position: int) -> str:
        """Key of the example that the first map of a chunk belongs to."""
        return self.keys[bisect_right(self._ends, position * CHUNK) - 1]

    # --- chunks of maps ---

    def _chunks_between(self, first: int, last: int, key: str) -> np.ndarray:
        """(last - first, 64, 32, width): from those read a moment ago, or from the files."""
        with self._lock:
            kept = [self._chunks.get(position) for position in range(first, last)]
        if all(chunk is not None for chunk in kept):
            return kept[0] if len(kept) == 1 else np.stack(kept)
        stored = np.empty((last - first, CHUNK, SIDE, self.width), np.uint8)
        self._read_chunks(first, last, stored, key)
        with self._lock:
            for position, chunk in enumerate(stored, first):
                self._chunks[position] = chunk
            while len(self._chunks) > _CACHED_CHUNKS:
                self._chunks.popitem(last=False)
        return stored

    def _read_chunks(self, first: int, last: int, into_NCHX: np.ndarray, key: str = "") -> None:
        """Chunks `first:last`, each one verified; `key` is the example that they are read for.

        Raises:
            Damaged: one is missing, damaged or in the wrong place; shard and key are named.
        """
        # zarrs opens the file and reads its index on every call, which is dear for the one or two chunks of an example.
        several = last - first > _FEW and chunks.cores() > 1
        zarrs = self._zarrs if several and chunks.usable() else None
        whole = zarrs is not None and zarrs.read(first, last, into_NCHX)
        # The zeros of a missing chunk would fit the digest of one that really is zeros: what begins with zeros is read
        # again.
        begun_N = into_NCHX[:, 0].any(axis=(1, 2)).tolist() if whole else [False] * (last - first)
        for position, chunk, begun in zip(range(first, last), into_NCHX, begun_N, strict=True):
            if not (begun and self._fits("maps", position, chunk)) and not self._read_again(position, chunk):
                self._read_by_hand(position, chunk, key or self._key_at(position))

    def _read_by_hand(self, position: int, into_CHX: np.ndarray, key: str) -> None:
        where = f"{self.path}: maps of example {key}"
        file, inside = divmod(position, self._per_file // CHUNK)
        offset, length = self._file_index(file, where)[inside]
        encoded = os.pread(self._files[file], length, offset) if 0 < length < 1 << 32 else b""
        decode_chunk(encoded, where, into_CHX)
        self._compare("maps", position, into_CHX, where)
        self._belonging[position] = self._files[file], offset, length, encoded[-4:]

    def _read_again(self, position: int, into_CHX: np.ndarray) -> bool:
        """A chunk that was read by hand before: that it is sound and has the checksum of what was found to belong here
        says the same as its digest, for less. Whether it could be read so."""
        before = self._belonging.get(position)
        if before is None:
            return False
        handle, offset, length, checksum = before
        encoded = os.pread(handle, length, offset)
        if encoded[-4:] != checksum or not is_sound(encoded):
            return False
        self._decompress(encoded, into_CHX)
        return True

    def _file_index(self, file: int, where: str) -> list[list[int]]:
        """Offset and length of every chunk in a file of the sharded array."""
        with self._lock:
            if file not in self._index:
                self._index[file] = self._open_file(file, where)
            return self._index[file]

    def _open_file(self, file: int, where: str) -> list[list[int]]:
        import google_crc32c

        path = self.path / "maps" / "c" / str(file) / "0" / "0"
        try:
            handle = self._files.setdefault(file, os.open(path, os.O_RDONLY))
        except FileNotFoundError as error:
            raise Damaged(f"{where}: {path.relative_to(self.path)} is missing: run precompute again") from error
        size = self._per_file // CHUNK * INDEX_ENTRY
        start = os.fstat(handle).st_size - size - 4
        tail = os.pread(handle, size + 4, start) if start > 0 else b""
        if len(tail) != size + 4 or google_crc32c.value(tail[:-4]) != int.from_bytes(tail[-4:], "little"):
            raise Damaged(f"{where}: the index of {path.relative_to(self.path)} is damaged: run precompute again")
        return np.frombuffer(tail[:-4], "<u8").reshape(-1, 2).tolist()

    def _fits(self, array: str, position: int, data: bytes | np.ndarray) -> bool:
        return salted_digest(self.shard, array, position, data) == self._digests[array][position]

    def _compare(self, array: str, position: int, data: bytes | np.ndarray, where: str) -> None:
        if not self._fits(array, position, data):
            raise Damaged(f"{where}: the chunk belongs somewhere else: run precompute again")

    # --- small arrays and metadata ---

    def _read_small(self, name: str, dtype: str) -> np.ndarray:
        count = self._metadata(f"{name}/zarr.json")["shape"]
        data = self._read_chunk(name, "c/0/0" if name == "range" else "c/0") if count[0] else b""
        found = np.frombuffer(data, dtype)
        if found.size != np.prod(count):
            raise Damaged(f"{self.path}: array {name} has the wrong size: run precompute again")
        return found

    def _read_keys(self) -> list[str]:
        from numcodecs.vlen import VLenUTF8

        if not self._metadata("key/zarr.json")["shape"][0]:
            return []
        return VLenUTF8().decode(self._read_chunk("key", "c/0")).tolist()

    def _read_chunk(self, name: str, chunk: str) -> bytes:
        where = f"{self.path}: array {name}"
        try:
            encoded = (self.path / name / chunk).read_bytes()
        except FileNotFoundError as error:
            raise Damaged(f"{where}: its chunk is missing: run precompute again") from error
        data = decode_chunk(encoded, where)
        self._compare(name, 0, data, where)
        return data

    def _metadata(self, name: str) -> dict:
        try:
            data = (self.path / name).read_bytes()
        except FileNotFoundError as error:
            raise Damaged(f"{self.path / name}: is missing: run precompute again") from error
        if self._parts is not None and receipts.hash_bytes(data) != self._parts.get(name, [0, ""])[1]:
            raise Damaged(f"{self.path / name}: its content has changed: run precompute again")
        return json.loads(data)

    def __del__(self) -> None:
        for handle in getattr(self, "_files", {}).values():
            os.close(handle)
