"""Where a step's time goes: waiting for data, forward, backward, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
PARTS = ("data", "forward", "backward", "optimizer")


class Clock:
    """Seconds by part of a step, added up until they are taken.

    Kernels on a GPU run after the call that started them: there the parts are measured by events on the device, which
    are read when they are taken, so that nothing waits for them before.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done inside."""
        if not self.on_gpu:
            begun = time.perf_counter()
            yield
            self.seconds[name] += time.perf_counter() - begun
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def waiting(self, items: Iterable[Item], name: str = "data") -> Iterator[Item]:
        """The same items; counts the time until each is there."""
        iterator = iter(items)
        while True:
            begun = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.seconds[name] += time.perf_counter() - begun
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        if self._events:
            torch.cuda.synchronize()
            for name, first, last in self._events:
                self.seconds[name] += first.elapsed_time(last) / 1000
        found = {name: self.seconds[name] for name in PARTS}
        self.seconds.clear()
        self._events.clear()
        return found
