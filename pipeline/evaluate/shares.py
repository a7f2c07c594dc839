"""An arm's questions shared out over processes: each takes every n-th batch, and what they found is put together.

Batches depend on the questions alone, so a share gives the numbers that one process would have given.
Under torchrun the processes are its ranks; elsewhere those of `pipeline.evaluate.workers`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pipeline.evaluate.attention import Looks

WAIT = timedelta(days=2)  # a rank without work waits for the slowest


class Share(NamedTuple):
    """Batches number ``part``, ``part + of``, ... of the questions."""

    part: int = 0
    of: int = 1

    def mine(self, number: int) -> bool:
        """Whether the batch of that number belongs to this share."""
        return number % self.of == self.part

    def file(self, folder: Path, kind: str, name: str) -> Path:
        """Where a share keeps what it has finished: `answers` or `looks` of the results called ``name``."""
        own = "" if self.of == 1 else f"-{self.part}of{self.of}"
        return folder / f"{kind}-{name[:12]}{own}.part"


def kept(folder: Path, kind: str, name: str) -> list[Path]:
    """The files of all shares, of this run and of interrupted ones."""
    return sorted(folder.glob(f"{kind}-{name[:12]}*.part"))


def save_looks(path: Path, looks: Looks, numbers: Sequence[int]) -> None:
    """Keeps a share's measured words: rows, maps and the number of the batch of each."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as out:
        rows = np.array(json.dumps(looks.rows))
        np.savez_compressed(out, rows=rows, maps=looks.maps, numbers=np.array(numbers, np.int64))
    temporary.replace(path)


def finished_looks(folder: Path, name: str) -> Looks | None:
    """The words of all shares in the order of one process; None unless every share of some number is there."""
    from pipeline.evaluate.attention import Looks

    found = kept(folder, "looks", name)
    sizes = {int(path.stem.rpartition("of")[2]) for path in found}
    whole = [size for size in sizes if all(Share(k, size).file(folder, "looks", name) in found for k in range(size))]
    if not whole:
        return None
    rows, maps, numbers = [], [], []
    for path in (Share(k, whole[0]).file(folder, "looks", name) for k in range(whole[0])):
        with np.load(path) as stored:
            rows += json.loads(str(stored["rows"]))
            maps.append(stored["maps"])
            numbers.append(stored["numbers"])
    order = np.argsort(np.concatenate(numbers), kind="stable")
    return Looks([rows[i] for i in order], np.concatenate(maps)[order])


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started; a single one without it."""

    rank: int
    size: int
    local: int

    @classmethod
    def found(cls) -> Ranks:
        """From torchrun's environment."""
        rank, size, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT)
        return cls(rank, size, local)

    @property
    def share(self) -> Share:
        return Share(self.rank, self.size)

    def device(self, wanted: str) -> str:
        """This process's device: its GPU of the machine, or the CPU."""
        import torch

        if wanted in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return "cpu" if wanted == "auto" else wanted

    def together(self, body: Callable[[Ranks], Any]) -> Any:
        """Runs ``body`` with the processes joined in a gloo group: nothing but waiting and small facts is exchanged."""
        import torch.distributed as dist

        dist.init_process_group("gloo", rank=self.rank, world_size=self.size, timeout=WAIT)
        try:
            return body(self)
        finally:
            dist.destroy_process_group()

    def told(self, value: Any) -> Any:
        """The value that the first process has."""
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until every process is here."""
        import torch.distributed as dist

        dist.barrier()


_ENVIRONMENT = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
