"""The order of training: shuffled, near-sequential on disk, and a pure function of (seed, epoch, position).

The position, a count of examples from the start of the run, is all there is to remember: nothing is drawn in sequence,
so any position is found at once, and neither workers nor ranks play a part. The random bits are those of Philox,
which NumPy keeps stable between versions.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from threading import Lock
from typing import Protocol

import numpy as np

_ROUND = 1000  # positions in which a mixture gives every data set exactly its share
_POOL = 50  # batches whose examples are sorted by length together
_BATCHES = 1 << 32  # streams of random bits for the order of batches, apart from those of the examples


class Positions(Protocol):
    """An endless order of example numbers, cut into blocks that are shuffled as a whole."""

    seed: int
    total: int

    def indices(self, position: int, count: int) -> list[int]:
        """Numbers of the examples at `position` and the `count - 1` positions after it."""
        ...

    def block(self, position: int) -> tuple[int, np.ndarray]:
        """The first position and the example numbers of the block around a position."""
        ...


class Order:
    """Each epoch puts the shards into a random order, takes `window` of them and shuffles their examples together.

    Args:
        shards: examples per shard in file order, or one number for a single shard; or for each shard the numbers of
            those of its examples that are in this order.
        seed: of the order.
        window: shards that are shuffled together; 0 takes all.
    """

    def __init__(self, shards: int | Sequence[int] | Sequence[np.ndarray], seed: int, window: int = 0):
        shards = [shards] if isinstance(shards, int) else list(shards)
        if not all(isinstance(shard, np.ndarray) for shard in shards):
            shards = numbered(shards)
        self.numbers = shards
        self.sizes = list(map(len, shards))
        self.total = sum(self.sizes)
        self.seed = seed
        self.window = min(window, len(self.sizes)) or len(self.sizes)
        if self.total < 1:
            raise ValueError("an order needs at least one example")
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._block = lru_cache(maxsize=4)(self._make_block)

    def indices(self, position: int, count: int) -> list[int]:
        """Numbers of the examples at `position` and the `count - 1` positions after it, across epochs."""
        found: list[int] = []
        while len(found) < count:
            start, block = self.block(position + len(found))
            first = position + len(found) - start
            found.extend(block[first : first + count - len(found)].tolist())
        return found

    def block(self, position: int) -> tuple[int, np.ndarray]:
        """The first position and the shuffled example numbers of the window of shards around a position."""
        epoch, number, start = self._place(position)
        return start, self._block(epoch, number)

    def shards(self, position: int) -> list[int]:
        """Numbers of the shards that are shuffled together at a position."""
        epoch, number, _ = self._place(position)
        return self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]

    def _place(self, position: int) -> tuple[int, int, int]:
        """Epoch, number of the window in it, and the window's first position."""
        epoch, place = divmod(position, self.total)
        _, ends = self._epoch(epoch)
        number = int(np.searchsorted(ends, place, side="right"))
        return epoch, number, epoch * self.total + (int(ends[number - 1]) if number else 0)

    def _make_epoch(self, epoch: int) -> tuple[list[int], np.ndarray]:
        """Shards in this epoch's order, and the position where each window of them ends."""
        shards = shuffled(len(self.sizes), self.seed, epoch, 0).tolist()
        sizes = [
            sum(self.sizes[shard] for shard in shards[start : start + self.window])
            for start in range(0, len(shards), self.window)
        ]
        return shards, np.cumsum(sizes)

    def _make_block(self, epoch: int, number: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
        examples = np.concatenate([self.numbers[shard] for shard in shards])
        return examples[shuffled(len(examples), self.seed, epoch, number + 1)]

    def __getstate__(self) -> tuple:
        return self.numbers, self.seed, self.window

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)


def numbered(sizes: Sequence[int], left_out: Sequence[int] = ()) -> list[np.ndarray]:
    """Numbers of the examples of every shard but for some, for an `Order` in which these are as if not there.

    Args:
        sizes: examples per shard in file order.
        left_out: numbers of the examples that never come.
    """
    kept = np.ones(sum(sizes), bool)
    kept[list(left_out)] = False
    return [low + np.flatnonzero(kept[low:high]) for low, high in pairwise([0, *accumulate(sizes)])]


class Mixture:
    """Several orders in fixed proportions, each with example numbers of its own.

    Of every thousand positions each data set gets exactly its share (to the nearest one), in shuffled places; within
    a data set its own order goes on, so a small one with a large weight is simply seen more often.

    Args:
        weights: of each order; they need not add up to one.

    Raises:
        ValueError: a weight that is negative, or all of them zero.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int):
        if len(orders) != len(weights) or min(weights) < 0 or sum(weights) <= 0:
            raise ValueError("a mixture needs one weight of 0 or more for each data set, and one above 0")
        self.orders, self.seed = list(orders), seed
        self.total = sum(order.total for order in orders)
        self.quotas = _quotas(weights)
        self._round = lru_cache(maxsize=4)(self._make_round)

    def indices(self, position: int, count: int) -> list[int]:
        """As `Order.indices`."""
        found: list[int] = []
        while len(found) < count:
            start, block = self.block(position + len(found))
            first = position + len(found) - start
            found.extend(block[first : first + count - len(found)].tolist())
        return found

    def block(self, position: int) -> tuple[int, np.ndarray]:
        """The round of positions around a position."""
        number = position // _ROUND
        return number * _ROUND, self._round(number)

    def _make_round(self, number: int) -> np.ndarray:
        picks = np.repeat(np.arange(len(self.orders)), self.quotas)[shuffled(_ROUND, self.seed, number, _BATCHES - 1)]
        examples = np.empty(_ROUND, np.int64)
        for which, (order, quota) in enumerate(zip(self.orders, self.quotas, strict=True)):
            if quota:
                examples[picks == which] = order.indices(number * quota, quota)
        return examples

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_round"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._round = lru_cache(maxsize=4)(self._make_round)


def _quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to a round, by largest remainder."""
    exact = np.asarray(weights, np.float64) / sum(weights) * _ROUND
    whole = np.floor(exact).astype(int)
    for which in np.argsort(whole - exact, kind="stable")[: _ROUND - whole.sum()]:
        whole[which] += 1
    return whole.tolist()


class BatchPlan:
    """Global batches over an order: which examples are trained on together at a position, or at a step.

    Without lengths every batch has `batch_size` examples and runs on across blocks. Otherwise batches stay inside
    a block of the order: of similar length if `bucket`, and no longer than `max_tokens` in all (longest example times
    number of examples, as padded). An example that is longer alone makes a batch of its own.

    Args:
        lengths: (N,) tokens of every example, or anything proportional to them.
    """

    def __init__(
        self,
        order: Positions,
        batch_size: int,
        lengths: np.ndarray | None = None,
        bucket: bool = False,
        max_tokens: int = 0,
    ):
        if (bucket or max_tokens) and lengths is None:
            raise ValueError("batches by length need the lengths of the examples")
        self.order, self.batch_size = order, batch_size
        self.lengths, self.bucket, self.max_tokens = lengths, bucket, max_tokens
        # Blocks walked so far: the position where each begins and the number of its first batch; the last is the next.
        self._starts, self._firsts = [0], [0]
        self._open()

    @property
    def even(self) -> bool:
        """Whether all batches have `batch_size` examples."""
        return not self.bucket and not self.max_tokens

    def batch(self, position: int) -> list[int]:
        """The example numbers of the batch that begins at a position; the next begins that many positions on.

        Raises:
            ValueError: no batch begins there (with lengths, positions are those the plan itself leads to).
        """
        if self.even:
            return self.order.indices(position, self.batch_size)
        start, block = self.order.block(position)
        batches, starts = self._cut(start, block)
        if position - start not in starts:
            raise ValueError(f"no batch begins at position {position}: were the settings of the order changed?")
        return batches[starts.index(position - start)]

    def at(self, step: int) -> list[int]:
        """The example numbers of global batch number `step`, from 0.

        With lengths the blocks before it are gone through once, because how many batches each has is not known.
        """
        if self.even:
            return self.order.indices(step * self.batch_size, self.batch_size)
        with self._lock:
            while self._firsts[-1] <= step:
                self._walk()
            which = bisect_right(self._firsts, step) - 1
            start, first = self._starts[which], self._firsts[which]
        return self._cut(start, self.order.block(start)[1])[0][step - first]

    def steps(self, examples: float) -> int:
        """Batches that begin before the position `examples`."""
        if self.even:
            return math.ceil(examples / self.batch_size)
        with self._lock:
            while self._starts[-1] < examples:
                self._walk()
            which = max(bisect_left(self._starts, examples) - 1, 0)
            start, first = self._starts[which], self._firsts[which]
        starts = self._cut(start, self.order.block(start)[1])[1]
        return first + sum(start + begin < examples for begin in starts)

    def _walk(self) -> None:
        start = self._starts[-1]
        block = self.order.block(start)[1]
        self._firsts.append(self._firsts[-1] + len(self._cut(start, block)[0]))
        self._starts.append(start + len(block))

    def _cut(self, start: int, block: np.ndarray) -> tuple[list[list[int]], list[int]]:
        """The batches of a block and where each begins in it."""
        with self._cutting:
            if start not in self._kept:
                while len(self._kept) > 2:
                    del self._kept[next(iter(self._kept))]
                batches = self._batches(start, block)
                self._kept[start] = batches, [0, *accumulate(map(len, batches))][:-1]
            return self._kept[start]

    def _batches(self, start: int, block: np.ndarray) -> list[list[int]]:
        if not self.bucket:
            return self._pack(block)
        batches = []
        pool = self.batch_size * _POOL
        for first in range(0, len(block), pool):
            part = block[first : first + pool]
            batches += self._pack(part[np.argsort(self.lengths[part], kind="stable")])
        return [batches[which] for which in shuffled(len(batches), self.order.seed, start, _BATCHES)]

    def _pack(self, examples: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = [[]]
        longest = 0
        for example, length in zip(examples.tolist(), self.lengths[examples].tolist(), strict=True):
            longest = max(longest, length)
            too_long = self.max_tokens and longest * (len(batches[-1]) + 1) > self.max_tokens
            if batches[-1] and (too_long or len(batches[-1]) == self.batch_size):
                batches.append([])
                longest = length
            batches[-1].append(example)
        return batches

    def _open(self) -> None:
        self._lock, self._cutting = Lock(), Lock()
        self._kept: dict[int, tuple[list[list[int]], list[int]]] = {}

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_cutting", "_kept")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()


def shuffled(count: int, seed: int, first: int, second: int) -> np.ndarray:
    """A permutation of `count` from the raw bits of a counter-based generator, for one pair of numbers."""
    bits = np.random.Philox(key=[seed & (2**64 - 1), 0], counter=[0, 0, first, second]).random_raw(count)
    return np.argsort(bits, kind="stable")
