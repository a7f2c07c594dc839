"""What a training run may use: memory and speed of the GPUs that are here or that are asked about."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from pipeline.errors import UserError

GIB = 1 << 30
# name -> (GiB of memory, dense bf16 operations a second), from the makers' data sheets
KNOWN = {
    "rtx4090": (24, 165e12),
    "a10g": (24, 70e12),
    "l40s": (48, 362e12),
    "a100-40gb": (40, 312e12),
    "a100-80gb": (80, 312e12),
    "h100": (80, 989e12),
    "h200": (141, 989e12),
    "b200": (180, 2250e12),
}
USED = 0.4  # of the peak, by a well-run step on a GPU; on a CPU the speed is measured, and
USED_CPU = 0.5  # small and many operations reach about half of one large product's


@dataclass(frozen=True)
class Hardware:
    """Args:
    name: for the table.
    count: how many, one process each.
    memory: bytes of each.
    speed: operations a second that a step reaches on each.
    """

    name: str
    count: int
    memory: int
    speed: float


def hardware(gpu: str = "", count: int = 0) -> Hardware:
    """The named GPUs, else those of this machine, else its processor.

    Raises:
        UserError: a GPU whose numbers are not known.
    """
    if gpu:
        if gpu.lower() not in KNOWN:
            raise UserError(f"gpu={gpu}: known are {', '.join(KNOWN)}")
        gib, peak = KNOWN[gpu.lower()]
        return Hardware(gpu.lower(), count or 1, gib * GIB, USED * peak)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        named = [name for name in KNOWN if name.partition("-")[0] in found.name.lower().replace(" ", "")]
        peak = KNOWN[named[0]][1] if named else 100e12
        return Hardware(found.name, count or torch.cuda.device_count(), found.total_memory, USED * peak)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("CPU", count or 1, memory, USED_CPU * _measured())


def _measured(side: int = 512) -> float:
    """Operations a second of a float32 product on this processor, the best of some."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
