"""From positions in the training order to collated batches with their target maps."""

from __future__ import annotations

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from pipeline.errors import UserError
from pipeline.student.batch import IGNORED, EncodeError, StudentBatch

if TYPE_CHECKING:
    from pipeline.archive import Archive
    from pipeline.student.batch import Item
    from pipeline.student.family import Family
    from pipeline.train.targets import Targets

CACHE_BYTES = 512 << 20  # of encoded examples; a small data set is then encoded once, not once an epoch


@dataclass
class Share:
    """One process's part of a global batch: its micro-batches, how many examples are in them, and how many could not be
    encoded."""

    batches: list[StudentBatch]
    examples: int
    skipped: int


def line(key: str, reason: str) -> str:
    """One example of a ``skipped_file``."""
    return json.dumps({"key": key, "reason": reason}) + "\n"


def refused(file: Path) -> dict[str, str]:
    """Key and reason of every example in a ``skipped_file``, of all processes; a last line cut off by a kill is left
    out."""
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    return {row["key"]: row["reason"] for row in rows}


class Plan(Protocol):
    """Which examples make up each global batch: a `BatchPlan`, or a list that ends."""

    batch_size: int

    def at(self, step: int) -> list[int]:
        """Numbers of the examples of a global batch."""
        ...


def check_share(batch_size: int, ranks: int) -> None:
    """Refuses a global batch that does not divide over processes.

    Raises:
        UserError: with what to choose.
    """
    if batch_size % ranks:
        raise UserError(f"train.batch_size={batch_size} does not divide over {ranks} processes: choose a multiple")


class Batches:
    """The global batches of a run as a pure function of the step.

    Args:
        archive, plan: the examples, and which of them make up each global batch.
        family: encodes and collates.
        targets: maps for the words, or None for an arm without alignment.
        micro_batch: examples per forward pass.
        rank, ranks: this process and how many there are; each takes a contiguous part of every global batch.
        skipped_file: where examples that the student cannot take are written, one JSON line each with the reason.
        max_failed: share of the archive that may fail before the run stops, over all processes that share the file.
        cache_bytes: encoded examples that are kept.
    """

    def __init__(
        self,
        archive: Archive,
        plan: Plan,
        family: Family,
        targets: Targets | None,
        *,
        micro_batch: int,
        rank: int,
        ranks: int,
        skipped_file: Path,
        max_failed: float,
        cache_bytes: int = CACHE_BYTES,
    ):
        check_share(plan.batch_size, ranks)
        self.archive, self.plan, self.family, self.targets = archive, plan, family, targets
        self.micro_batch, self.rank, self.ranks = micro_batch, rank, ranks
        self.skipped_file, self.limit = skipped_file, max_failed * len(archive)
        self.refused: dict[int, str] = {}
        self.cache: OrderedDict[int, tuple[Item, torch.Tensor, torch.Tensor]] = OrderedDict()
        self.cached_bytes, self.cache_bytes = 0, cache_bytes

    def at(self, step: int) -> Share:
        """The micro-batches of this process in global batch number ``step`` (from 0)."""
        whole = self.plan.at(step)
        first, last = len(whole) * self.rank // self.ranks, len(whole) * (self.rank + 1) // self.ranks
        rows = [self._row(index) for index in whole[first:last]]
        kept = [row for row in rows if row is not None]
        parts = [kept[i : i + self.micro_batch] for i in range(0, len(kept), self.micro_batch)]
        batches = [self._collate(part) for part in parts]
        # Where examples were left out or do not divide evenly, a process may have fewer batches than the others, and
        # they would wait for it; and without any, one process does what several do.
        most = -(-len(whole) // self.ranks)
        wanted = -(-most // self.micro_batch) if self.ranks > 1 else 1
        missing = max(wanted - len(batches), 0)
        return Share(batches + [self._nothing()] * missing, len(kept), len(rows) - len(kept))

    def only(self, index: int) -> StudentBatch | None:
        """A batch of one example; None if it cannot be encoded."""
        row = self._row(index)
        return None if row is None else self._collate([row])

    def stream(self, step: int, stop: int, workers: int) -> Iterator[Share]:
        """Shares of the steps ``step:stop``; with workers, that many batches are prepared ahead in threads."""
        if workers == 0:
            yield from map(self.at, range(step, stop))
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="batches") as pool:
            ahead: list[Future[Share]] = []
            for number in range(step, stop):
                while len(ahead) < 2 * workers and number + len(ahead) < stop:
                    ahead.append(pool.submit(self.at, number + len(ahead)))
                yield ahead.pop(0).result()

    def _row(self, index: int) -> tuple[Item, torch.Tensor, torch.Tensor] | None:
        found = self.cache.get(index)
        if found is not None:
            return found
        if index in self.refused:
            return None
        example = self.archive[index]
        try:
            item = self.family.encode_one(example)
        except EncodeError as error:
            self._refuse(index, example.key, str(error))
            return None
        if self.targets is None:
            maps_WHW, valid_W = np.zeros((0, 32, 32), np.float32), np.zeros(0, bool)
            item = dataclasses.replace(item, words=[], tokens=[])
        else:
            maps_WHW, valid_W = self.targets(index, example, item.words)
        row = (item, torch.from_numpy(maps_WHW), torch.from_numpy(valid_W))
        size = sum(t.numel() * t.element_size() for t in (item.ids, *item.image.values(), row[1]))
        if self.cached_bytes + size <= self.cache_bytes:
            self.cache[index] = row
            self.cached_bytes += size
        return row

    def _nothing(self) -> StudentBatch:
        """A batch that teaches nothing: the first example that can be encoded, without labels and words."""
        item = next((row[0] for row in map(self._row, range(len(self.archive))) if row is not None), None)
        if item is None:
            raise UserError(f"this student can take none of the {len(self.archive)} examples: see {self.skipped_file}")
        item = dataclasses.replace(item, labels=torch.full_like(item.labels, IGNORED), words=[], tokens=[])
        return self._collate([(item, torch.zeros(0, 32, 32), torch.zeros(0, dtype=torch.bool))])

    def _refuse(self, index: int, key: str, reason: str) -> None:
        self.refused[index] = reason
        with self.skipped_file.open("a", encoding="utf-8") as out:
            out.write(line(key, reason))
        # Each process meets its own: what they share is the file.
        if (found := len(refused(self.skipped_file))) > self.limit:
            raise UserError(
                f"{found} of {len(self.archive)} examples cannot be encoded for this student, more than "
                f"data.max_failed allows; the last: {key}: {reason} (all in {self.skipped_file})"
            )

    def _collate(self, rows: list[tuple[Item, torch.Tensor, torch.Tensor]]) -> StudentBatch:
        batch = self.family.collate([item for item, _, _ in rows], train=True)
        targets_WHW = torch.cat([maps for _, maps, _ in rows])
        return dataclasses.replace(batch, targets=targets_WHW, valid=torch.cat([valid for _, _, valid in rows]))
