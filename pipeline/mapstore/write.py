"""Writing one group of the map store: into a temporary folder, flushed, read back, renamed."""

import os
import shutil
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import receipts
from pipeline.mapstore.read import Group
from pipeline.mapstore.schema import (
    ATTRIBUTE,
    CHUNK,
    LEVEL,
    PROFILES,
    SCHEMA,
    SHARD,
    SIDE,
    ExampleMaps,
    pack,
    salted_digest,
    stored_width,
)


def write_shard(
    path: Path,
    rows: Sequence[ExampleMaps],
    *,
    attrs: Mapping[str, Any] | None = None,
    profile: str = "exact",
) -> None:
    """Writes the maps of one tar as `path` (`<shard>.zarr`); the caller then writes the receipt that vouches for it.

    The bytes depend on the rows and attributes alone. The folder appears under its name only when it is whole and
    has been read back.

    Args:
        rows: in the tar's order; an example without words is a row without maps.
        attrs: settings worth keeping beside the maps.

    Raises:
        ValueError: rows of the wrong shape or type, a key twice, an unknown profile.
        Damaged: the disk gives back something else than was written.
    """
    path = Path(path)
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}: choose one of {', '.join(PROFILES)}")
    arrays = _arrays(rows, profile)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    try:
        _write_group(tmp, path.stem, arrays, profile, attrs or {})
        receipts.sync_tree(tmp)
        _read_back(tmp, path.stem, rows, profile)
        receipts.commit_dir(tmp, path, durable=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _arrays(rows: Sequence[ExampleMaps], profile: str) -> dict[str, np.ndarray]:
    keys = [row.key for row in rows]
    if len(set(keys)) != len(keys):
        raise ValueError("a key occurs twice")
    for row in rows:
        count = len(row.words)
        shapes = (row.maps.shape, row.range.shape, row.status.shape)
        if shapes != ((count, SIDE, SIDE), (count, 2), (count,)) or row.maps.dtype != np.uint8:
            raise ValueError(f"example {row.key}: maps, range and status do not fit its {count} words")
    words = np.array([tuple(word) for row in rows for word in row.words], np.int32).reshape(-1, 3)
    maps = np.concatenate([row.maps for row in rows]) if rows else np.zeros((0, SIDE, SIDE), np.uint8)
    return {
        "maps": pack(maps, profile),
        "range": np.concatenate([row.range for row in rows] or [np.zeros((0, 2))]).astype("<f4"),
        "status": np.concatenate([row.status for row in rows] or [np.zeros(0)]).astype(np.uint8),
        "turn": words[:, 0].astype("<i4"),
        "start": words[:, 1].astype("<i4"),
        "end": words[:, 2].astype("<i4"),
        "offsets": np.array([0, *accumulate(len(row.words) for row in rows)], "<i8"),
        "key": np.array(keys, dtype=np.dtypes.StringDType()),
    }


def _write_group(
    folder: Path, shard: str, arrays: dict[str, np.ndarray], profile: str, attrs: Mapping[str, Any]
) -> None:
    import zarr
    from numcodecs import blosc
    from zarr.codecs import BloscCodec, Crc32cCodec

    blosc.use_threads = False  # Blosc's own threads finish in any order, and the bytes would follow it
    digests = {}
    made = {}
    for name, values in arrays.items():
        shape, shards = _chunks(name, values)
        digests[name] = [
            salted_digest(shard, name, position, chunk) for position, chunk in enumerate(_decoded(values, shape))
        ]
        made[name] = (values, shape, shards)
    group = zarr.create_group(
        zarr.storage.LocalStore(folder),
        zarr_format=3,
        attributes={
            ATTRIBUTE: {
                "schema": SCHEMA,
                "profile": profile,
                "shard": shard,
                "digests": digests,
                **receipts.plain(attrs),
            }
        },
    )
    for name, (values, chunks, shards) in made.items():
        typesize = values.dtype.itemsize if name != "key" else 1
        # Bit planes of two nibbles in a byte are two unrelated pictures: a third more bytes than left as they are.
        shuffle = "noshuffle" if name == "maps" and profile == "compact" else "bitshuffle"
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=chunks,
            shards=shards,
            compressors=[
                BloscCodec(cname="zstd", clevel=LEVEL, shuffle=shuffle, typesize=typesize),
                Crc32cCodec(),
            ],
            filters=None,
            config={"write_empty_chunks": True},  # an absent chunk must never be able to pass for zeros
        )
        if len(values):
            array[:] = values


def _chunks(name: str, values: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Chunk and shard shape: maps in chunks of 64 inside files of up to 4,096, everything else in one chunk."""
    if name != "maps":
        return (max(len(values), 1), *values.shape[1:]), None
    per_file = min(SHARD, max(-(-len(values) // CHUNK), 1) * CHUNK)
    return (CHUNK, *values.shape[1:]), (per_file, *values.shape[1:])


def _decoded(values: np.ndarray, chunk: tuple[int, ...]) -> list[bytes]:
    """The bytes of every chunk as a decoder gives them back: the last one padded with zeros."""
    if values.dtype.kind == "T":
        from numcodecs.vlen import VLenUTF8

        return [bytes(VLenUTF8().encode(values.astype(object)))] if len(values) else []
    pieces = []
    for start in range(0, len(values), chunk[0]):
        piece = values[start : start + chunk[0]]
        padding = np.zeros((chunk[0] - len(piece), *piece.shape[1:]), piece.dtype)
        pieces.append(np.concatenate([piece, padding]).tobytes())
    return pieces


def _read_back(folder: Path, shard: str, rows: Sequence[ExampleMaps], profile: str) -> None:
    group = Group(folder, shard)
    stored = group.load()
    same = len(stored) == len(rows) and stored_width(profile) == group.width
    for row, found in zip(rows, stored, strict=False):
        exact = profile == "exact"
        levels = np.abs(found.maps.astype(np.int16) - row.maps).max(initial=0) <= (0 if exact else 8)
        same &= (
            levels
            and found.key == row.key
            and found.words == [tuple(word) for word in row.words]
            and np.array_equal(found.status, row.status)
            and np.array_equal(found.range, row.range.astype(np.float32), equal_nan=True)
        )
    if not same:
        raise receipts.Damaged(
            f"{folder}: reads back differently from what was written: check the disk, then run again"
        )
