"""The training stream: examples with their maps, batch after batch, resumable at any position."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Protocol

import numpy as np

from pipeline.archive.order import BatchPlan, Mixture, Order
from pipeline.archive.read import Archive
from pipeline.examples import Example
from pipeline.mapstore.quality import QualityFilter
from pipeline.mapstore.schema import ExampleMaps


class Maps(Protocol):
    """What the stream needs of a map store."""

    def get(self, key: str) -> ExampleMaps | None: ...


@dataclass(frozen=True)
class Sample:
    """An example as it is trained on; without maps it trains the language loss alone.

    Args:
        index: its number, counted through all archives.
        maps: its maps, or None.
        usable: (W,) bool, the words that are worth aligning.
    """

    index: int
    example: Example
    maps: ExampleMaps | None
    usable: np.ndarray


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch. `after` is the position to resume from once it has been trained on."""

    position: int
    after: int
    samples: list[Sample]


@dataclass
class Counts:
    """What has been served so far."""

    examples: int = 0
    without_maps: int = 0
    words: int = 0
    unusable: int = 0

    @property
    def unusable_share(self) -> float:
        """Share of the words that have no map or whose map the quality filter leaves out."""
        return self.unusable / max(self.words, 1)


class Stream:
    """Global batches from one or more archives, a pure function of (seed, position).

    Args:
        archives: the examples; numbers run through all of them.
        maps: the map store of each archive, or None where there is none.
        window_bytes: shards are shuffled together as far as their bytes fit (tars and decoded maps), at least one.
        weights: share of each archive in the stream; without them each example comes once in an epoch.
        lengths, bucket, max_tokens: see `BatchPlan`; lengths default to the characters of each example.
        quality: leaves out words with poor maps.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        maps: Sequence[Maps | None],
        *,
        seed: int,
        batch_size: int,
        window_bytes: int = 1 << 30,
        weights: Sequence[float] | None = None,
        lengths: np.ndarray | None = None,
        bucket: bool = False,
        max_tokens: int = 0,
        quality: QualityFilter | None = None,
    ):
        if len(archives) != len(maps) or not archives:
            raise ValueError("a stream needs one map store or None for each archive")
        self.archives, self.maps = list(archives), list(maps)
        self.quality = quality or QualityFilter()
        self.counts = Counts()
        self._ends = list(accumulate(map(len, self.archives)))
        if weights is None:
            sizes = [size for archive in archives for size in archive.sizes]
            order = Order(sizes, seed, window([size for archive in archives for size in archive.bytes], window_bytes))
        else:
            part = window_bytes // len(archives)
            orders = [Order(archive.sizes, seed, window(archive.bytes, part)) for archive in archives]
            order = Mixture(orders, weights, seed)
        if lengths is None and (bucket or max_tokens):
            lengths = np.concatenate([archive.lengths for archive in archives])
        self.plan = BatchPlan(order, batch_size, lengths, bucket, max_tokens)
        self.order = order
        self._lock = Lock()

    def __len__(self) -> int:
        """Examples of one epoch."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        which = bisect_right(self._ends, index)
        example = self.archives[which][index - (self._ends[which] - len(self.archives[which]))]
        store = self.maps[which]
        maps = store.get(example.key) if store is not None else None
        usable_W = self.quality.usable(maps) if maps is not None else np.zeros(0, bool)
        with self._lock:
            self.counts.examples += 1
            self.counts.without_maps += maps is None or not len(maps.words)
            self.counts.words += len(usable_W)
            self.counts.unusable += int((~usable_W).sum())
        return Sample(index, example, maps, usable_W)

    def batch(self, position: int, rank: int = 0, ranks: int = 1) -> Batch:
        """This rank's contiguous part of the global batch at a position."""
        indices = self.plan.batch(position)
        first, last = len(indices) * rank // ranks, len(indices) * (rank + 1) // ranks
        return Batch(position, position + len(indices), [self[index] for index in indices[first:last]])

    def batches(
        self, position: int = 0, rank: int = 0, ranks: int = 1, workers: int = 2, ahead: int = 4
    ) -> Iterator[Batch]:
        """Batches from a position on, without end; `workers` threads prepare up to `ahead` of them."""
        if not workers:
            while True:
                batch = self.batch(position, rank, ranks)
                yield batch
                position = batch.after
        with ThreadPoolExecutor(workers, thread_name_prefix="stream") as pool:
            queue: list[Future[Batch]] = []
            try:
                while True:
                    while len(queue) < max(ahead, 1):
                        queue.append(pool.submit(self.batch, position, rank, ranks))
                        position += len(self.plan.batch(position))
                    yield queue.pop(0).result()
            finally:
                for future in queue:
                    future.cancel()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = Lock()


def window(shard_bytes: Sequence[int], limit: int) -> int:
    """How many shards fit into `limit` bytes at once, whichever they are; at least one."""
    total = 0
    for number, size in enumerate(sorted(shard_bytes, reverse=True)):
        total += size
        if total > limit:
            return max(number, 1)
    return len(shard_bytes)
