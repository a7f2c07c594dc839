"""Examples that are never trained on, evaluated while the others are: which they are, and the losses on them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule

from pipeline.student.batch import IGNORED
from pipeline.student.capture import mean_maps
from pipeline.train.loop import usable

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from pipeline.archive import Archive
    from pipeline.config import Config
    from pipeline.student.batch import StudentBatch
    from pipeline.student.capture import AttentionTap
    from pipeline.train.data import Batches
    from pipeline.train.overlays import Overlays

MOST = 10  # held out of a training split: at most one example in so many
HALF = 0.5  # of a target's highest value: what lies above it is where it looks


def left_out(cfg: Config, archive: Archive) -> list[int]:
    """Numbers of the examples of the training split that are not trained on, in the order of `drawn`."""
    if not cfg.train.held_out or cfg.train.held_out_split:
        return []
    return drawn(archive, min(cfg.train.held_out, len(archive) // MOST))


def drawn(archive: Archive, count: int) -> list[int]:
    """At most ``count`` examples, drawn by a hash of their images, so that no image is drawn for some of its examples
    only; texts without an image by a hash of their keys."""
    together: dict[str, list[int]] = {}
    for number, (image, key) in enumerate(zip(archive.images, archive.keys, strict=True)):
        together.setdefault(image or key, []).append(number)
    found: list[int] = []
    for name in sorted(together, key=lambda name: hashlib.sha256(f"held out {name}".encode()).digest()):
        if len(found) + len(together[name]) <= count:
            found += together[name]
    return found


class Fixed:
    """Batches that end: these examples, once."""

    def __init__(self, numbers: Sequence[int], batch_size: int):
        self.numbers, self.batch_size = list(numbers), batch_size

    def at(self, step: int) -> list[int]:
        """As `BatchPlan.at`."""
        return self.numbers[step * self.batch_size : (step + 1) * self.batch_size]


class HeldOut:
    """Evaluates the held-out examples of a run. Every process makes one and calls it at the same steps.

    Args:
        accelerator: of the run.
        batches: the held-out examples in global batches, that end (`Fixed`), with targets for their
            words. All processes have as many batches.
        every: steps between evaluations; 0 for never.
        lam: the arm's lambda.
        pictures: draws the fixed examples, or None.
        show: is given a line of metrics on the main process.
        workers: as for `Batches.stream`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        batches: Batches,
        every: int,
        lam: float,
        pictures: Overlays | None,
        show: Callable[[dict], None],
        workers: int = 0,
    ):
        self.accelerator, self.batches, self.every, self.lam = accelerator, batches, every, lam
        self.pictures, self.show, self.workers = pictures, show, workers
        self.examples = len(batches.plan.numbers)

    def due(self, done: int, steps: int) -> bool:
        """Whether the weights after so many of the run's steps are evaluated."""
        return self.every > 0 and (done % self.every == 0 or done == steps)

    def __call__(self, tuned: nn.Module, step: int, alive: Callable[[], None] = lambda: None) -> float:
        """Evaluates and draws the weights after ``step`` steps; ``alive`` is called again and again. Returns the loss,
        the same on all processes."""
        began = time.monotonic()
        with at_rest(tuned, self.accelerator.device):
            found = self.measure(tuned, alive)
            if self.pictures is not None:
                self.pictures.draw(tuned, step)
        if self.accelerator.is_main_process:
            self.show({"step": step, "heldout": found | {"seconds": round(time.monotonic() - began, 2)}})
        return found["loss"]

    def measure(self, tuned: nn.Module, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Over all held-out examples, in evaluation mode:

        ``ce``: cross-entropy by label token; ``align``: alignment loss by word, where the arm has one; ``loss``: ce +
        lambda * align with the arm's lambda, whatever the schedules are at; ``correlation``: of the student's raw
        attention (mean over heads and layers) with the word's target, Pearson's, mean over words; ``peak_inside``:
        share of the words whose attention is highest where the target has more than half of its highest value; and of
        how many ``examples``, ``tokens`` and ``words`` these are.
        """
        device = self.accelerator.device
        tap = self.accelerator.unwrap_model(tuned).tap
        sums = torch.zeros(7, dtype=torch.float64, device=device)
        rounds = -(-self.examples // self.batches.plan.batch_size)
        for share in self.batches.stream(0, rounds, self.workers):
            for batch in share.batches:
                batch = batch.to(device)
                ce, aligned, counted = tuned(batch)
                learnt_BL = batch.labels[:, 1:] != IGNORED
                found = [ce, learnt_BL.sum(), aligned, counted, *likeness(tap, batch), learnt_BL.any(1).sum()]
                sums += torch.stack([value.to(torch.float64) for value in found])
                alive()
        ce, tokens, aligned, words, correlation, inside, examples = self.accelerator.reduce(sums, "sum").tolist()
        made = {"loss": ce / max(tokens, 1), "ce": ce / max(tokens, 1)}
        if words and self.lam:
            made["align"] = aligned / words
            made["loss"] += self.lam * made["align"]
        if words:
            made |= {"correlation": correlation / words, "peak_inside": inside / words}
        return made | {"examples": int(examples), "tokens": int(tokens), "words": int(words)}


def likeness(tap: AttentionTap, batch: StudentBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the words with a usable target, after a forward: the correlation of their attention with it, and the
    number of those that are highest where it has more than half of its highest value."""
    found_WSS = mean_maps(tap, batch)
    targets_WSS = batch.targets.to(found_WSS.dtype)
    if targets_WSS.shape[-1] != found_WSS.shape[-1]:
        targets_WSS = torch.nn.functional.adaptive_avg_pool2d(targets_WSS, found_WSS.shape[-1])
    counted_W = usable(batch)
    found_WC, target_WC = found_WSS.flatten(1)[counted_W], targets_WSS.flatten(1)[counted_W]
    around, about = (flat - flat.mean(1, keepdim=True) for flat in (found_WC, target_WC))
    size_W = (around.square().sum(1) * about.square().sum(1)).sqrt()
    correlation_W = (around * about).sum(1) / size_W.clamp_min(torch.finfo(size_W.dtype).tiny)
    # A grid coarser than the plane makes blocks of equal cells: the share of the highest ones that lie inside.
    peak_WC = found_WC >= found_WC.amax(1, keepdim=True) * (1 - 1e-5) if len(found_WC) else found_WC > 0
    above_WC = target_WC > HALF * target_WC.amax(1, keepdim=True) if len(target_WC) else target_WC > 0
    inside_W = (peak_WC & above_WC).sum(1) / peak_WC.sum(1).clamp_min(1)
    return correlation_W.sum(), inside_W.sum()


@contextmanager
def at_rest(tuned: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards everything is as it was: the mode of each module, random numbers,
    and the parts of sharded weights."""
    modes = [(module, module.training) for module in tuned.modules()]
    tuned.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        getattr(tuned, "module", tuned).tap.rows(None)
        if isinstance(tuned, FSDPModule):
            tuned.reshard()
