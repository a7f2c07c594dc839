"""Decoding chunks of maps: by zarrs where it is installed, else by hand; neither is believed before the digest fits.

zarr-python is not in between: its machinery takes 0.7 ms a call, twice what decoding the maps of an example does. So
zarrs is called as its own pipeline for zarr-python calls it.
"""

import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.mapstore.schema import CHUNK, SIDE

_started = _forked = False  # whether zarrs has threads, and whether this process is a fork of one in which it had


def _after_fork() -> None:
    global _forked
    _forked = _forked or _started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def installed() -> bool:
    """Whether zarrs is there."""
    return find_spec("zarrs") is not None


def usable() -> bool:
    """Whether zarrs can be used here and now.

    Its threads do not come along with a fork (of a data loader, say): a child of a process that has used it would
    wait for them for ever.
    """
    return installed() and not _forked


def cores() -> int:
    """Cores that this process may use. On one, zarrs decodes a shard no faster than a loop over its chunks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ZarrsChunks:
    """The sharded array `maps` of a group, read by zarrs.

    Args:
        group: folder of the Zarr group.
        metadata: of its array `maps`.
        width: bytes per row of a stored map.
    """

    def __init__(self, group: Path, metadata: Mapping[str, Any], width: int):
        from zarr.storage import LocalStore
        from zarrs.pipeline import CodecPipelineImpl

        global _started
        _started = True
        self._impl = CodecPipelineImpl(json.dumps(metadata), LocalStore(group, read_only=True), validate_checksums=True)
        self._per_file: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        self._cells = (slice(0, SIDE), slice(0, width))
        self._width = width

    def read(self, first: int, last: int, into_NCHX: np.ndarray) -> bool:
        """Chunks `first:last` into an array (last - first, 64, 32, width) of uint8; whether zarrs found no fault.

        A chunk that is missing comes as zeros, as Zarr has it: the caller must look.
        """
        from zarrs.utils import ChunkItem

        low, high, file = first * CHUNK, last * CHUNK, self._per_file
        items = []
        for number in range(low // file, (high - 1) // file + 1):
            begin, end = max(low, number * file), min(high, (number + 1) * file)
            items.append(
                ChunkItem(
                    key=f"maps/c/{number}/0/0",
                    chunk_subset=[slice(begin - number * file, end - number * file), *self._cells],
                    chunk_shape=[file, SIDE, self._width],
                    subset=[slice(begin - low, end - low), *self._cells],
                    shape=[high - low, SIDE, self._width],
                )
            )
        try:
            self._impl.retrieve_chunks_and_apply_index(items, into_NCHX.reshape(-1, SIDE, self._width))
        except (RuntimeError, ValueError, OSError):  # all that it says about bad bytes; the caller finds out which
            return False
        return True
