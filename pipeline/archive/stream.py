"""The training stream: examples with their maps, batch after batch, resumable at any position."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from pipeline.archive.order import BatchPlan, Mixture, Order, Positions, numbered
from pipeline.archive.read import Archive
from pipeline.examples import Example
from pipeline.mapstore.quality import Counts, FilteredMaps, Maps, QualityFilter
from pipeline.mapstore.schema import ExampleMaps

_NO_WORDS = np.zeros(0, bool)


class Sample(NamedTuple):
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


class Stream:
    """Global batches from one or more archives, a pure function of (seed, position).

    Args:
        archives: the examples; numbers run through all of them.
        maps: the map store of each archive, or None where there is none.
        quality: leaves out words with poor maps.
        order: as for `open_plan`.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        maps: Sequence[Maps | None],
        *,
        quality: QualityFilter | None = None,
        **order: Any,
    ):
        if len(archives) != len(maps) or not archives:
            raise ValueError("a stream needs one map store or None for each archive")
        self.archives = list(archives)
        self.counts = Counts()
        self.maps = [None if store is None else FilteredMaps(store, quality, self.counts) for store in maps]
        self.plan = open_plan(archives, **order)
        self._ends = list(accumulate(map(len, self.archives)))

    @property
    def order(self) -> Positions:
        """The order that batches are cut from."""
        return self.plan.order

    def __len__(self) -> int:
        """Examples of one epoch."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        which = bisect_right(self._ends, index)
        example = self.archives[which][index - self._ends[which - 1] if which else index]
        store = self.maps[which]
        if store is None:
            self.counts.add(_NO_WORDS)
            return Sample(index, example, None, _NO_WORDS)
        return Sample(index, example, *store.get(example.key))

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


def open_plan(
    archives: Sequence[Archive],
    *,
    seed: int,
    batch_size: int,
    window_bytes: int = 1 << 30,
    window: int = 0,
    left_out: Sequence[int] = (),
    weights: Sequence[float] | None = None,
    parts: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    bucket: bool = False,
    max_tokens: int = 0,
) -> BatchPlan:
    """The global batches of one or more archives, whose example numbers run through all of them.

    Args:
        window_bytes: shards are shuffled together as far as their bytes fit (tars and decoded maps), at least one.
        window: no more shards than this are shuffled together; 0 leaves it to their bytes.
        left_out: numbers of examples that never come.
        weights: share of each archive, or of each part, in all batches; without them each example comes once in an
            epoch.
        parts: (N,) the number of the part that each example belongs to; those of no part (-1) never come.
        lengths, bucket, max_tokens: see `BatchPlan`; lengths default to the characters of each example.
    """
    numbers = numbered([size for archive in archives for size in archive.sizes], left_out)
    shard_bytes = [size for archive in archives for size in archive.bytes]
    order: Positions
    if weights is None:
        order = Order(numbers, seed, _narrower(window, shards_within(shard_bytes, window_bytes)))
    else:
        parts = np.repeat(np.arange(len(archives)), list(map(len, archives))) if parts is None else parts
        orders = []
        for part in range(len(weights)):
            own = [shard[parts[shard] == part] for shard in numbers]
            held = [which for which, shard in enumerate(own) if len(shard)]
            within = shards_within([shard_bytes[which] for which in held], window_bytes // len(weights))
            orders.append(Order([own[which] for which in held], seed, _narrower(window, within)))
        order = Mixture(orders, weights, seed)
    if lengths is None and (bucket or max_tokens):
        lengths = np.concatenate([archive.lengths for archive in archives])
    return BatchPlan(order, batch_size, lengths, bucket, max_tokens)


def shards_within(shard_bytes: Sequence[int], limit: int) -> int:
    """How many shards fit into `limit` bytes at once, whichever they are; at least one."""
    total = 0
    for number, size in enumerate(sorted(shard_bytes, reverse=True)):
        total += size
        if total > limit:
            return max(number, 1)
    return len(shard_bytes)


def _narrower(window: int, within: int) -> int:
    return min(window, within) if window else within
