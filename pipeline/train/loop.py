"""The training loop: `train_loop`, readable from top to bottom. What it optimises is in `tuned`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from pipeline.align.loss import varies
from pipeline.align.schedule import factor, language_factor
from pipeline.student.batch import IGNORED

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from pipeline.align.config import AlignConfig
    from pipeline.progress import Progress
    from pipeline.student.batch import StudentBatch
    from pipeline.train.config import TrainConfig
    from pipeline.train.data import Batches
    from pipeline.train.metrics import Metrics


class NotFinite(RuntimeError):
    """A loss or a gradient is NaN or infinite; the message names the step and the examples."""


def train_loop(
    accelerator: Accelerator,
    tuned: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    cfg: TrainConfig,
    align: AlignConfig,
    lam: float,
    seed: int,
    steps: int,
    start: int,
    metrics: Metrics,
    progress: Progress,
    save: Callable[[int], None],
) -> int:
    """Trains from step ``start`` (steps done) to ``steps`` and returns the steps done.

    The loss of a global batch is (sum of cross-entropies) / (label tokens) + lambda * (sum of alignment errors) /
    (aligned words), both counted over all processes and micro-batches. Everything random depends on (seed, step,
    process) alone, so a resumed run repeats an uninterrupted one.
    """
    tuned.train()
    ranks, device = accelerator.num_processes, accelerator.device
    stop = min(steps, start + cfg.max_steps_per_call) if cfg.max_steps_per_call else steps
    peaks = (cfg.lr, cfg.aligner_lr)  # not what the optimizer says: a loaded one remembers its last rate
    running = Running()
    for step, share in enumerate(batches.stream(start, stop, cfg.workers), start):
        torch.manual_seed((seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(cfg, step, steps)
        weight, language = lam * factor(align, step, steps), language_factor(align, step, steps)

        micro = [batch.to(device) for batch in share.batches]
        counts = torch.tensor(
            [sum(int((b.labels[:, 1:] != IGNORED).sum()) for b in micro), sum(int(usable(b).sum()) for b in micro)],
            device=device,
        )
        tokens, words = (max(int(n), 1) for n in accelerator.reduce(counts, "sum"))
        sums = torch.zeros(2, device=device)
        for number, batch in enumerate(micro):
            # Gradients travel between processes once a step, with the last micro-batch.
            with accelerator.no_sync(tuned) if number + 1 < len(micro) else nullcontext():
                ce, aligned, _ = tuned(batch)
                # DDP and FSDP average gradients over processes: times `ranks` makes it the sum of the parts.
                loss = (language * ce / tokens + weight * aligned / words) * ranks
                accelerator.backward(loss)
            sums += torch.stack([ce.detach(), aligned.detach()])

        norm = accelerator.clip_grad_norm_(tuned.parameters(), cfg.grad_clip)
        ce, aligned = (float(s) for s in accelerator.reduce(sums, "sum") / torch.tensor([tokens, words], device=device))
        if not math.isfinite(ce + aligned) or not math.isfinite(float(norm)):
            keys = ", ".join(key for batch in micro for key in batch.keys)
            raise NotFinite(
                f"loss or gradient is not finite at step {step} (ce {ce}, align {aligned}, norm {float(norm)}); "
                f"examples {keys}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        running.add(ce, aligned, tokens, words, share.skipped)
        if done % cfg.log_every == 0 or done == steps:
            line = running.line(done, language, weight, optimizer.param_groups[0]["lr"], float(norm))
            if accelerator.is_main_process:
                metrics.add(line)
            progress.advance(
                running.take(), note=f"loss {line['loss']:.3f} ce {line['ce']:.3f} align {line['align']:.4f}"
            )
        if done % cfg.checkpoint_every == 0 or done == stop:
            save(done)
    return stop


def usable(batch: StudentBatch) -> torch.Tensor:
    """(W,) which words count in the alignment loss, as `AlignmentLoss.sums` counts them."""
    return batch.valid & varies(batch.targets)


def rate_factor(cfg: TrainConfig, step: int, steps: int) -> float:
    """Learning rate as a share of its peak: linear warm-up, then the schedule down to a fiftieth."""
    warm = cfg.warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if cfg.schedule == "constant":
        return 1.0
    left = (step - warm) / max(steps - warm, 1)
    fall = 0.5 * (1 + math.cos(math.pi * left)) if cfg.schedule == "cosine" else 1 - left
    return 0.02 + 0.98 * fall


class Running:
    """Means since the last logged step; the loss is the mean of the optimised numbers."""

    def __init__(self):
        self.rows: list[tuple[float, float, int, int, int]] = []
        self.since = time.monotonic()

    def add(self, *row) -> None:
        self.rows.append(row)

    def line(self, step: int, language: float, weight: float, rate: float, norm: float) -> dict:
        ce, aligned, tokens, words, skipped = (sum(column) / len(self.rows) for column in zip(*self.rows, strict=True))
        seconds = (time.monotonic() - self.since) / len(self.rows)
        return {
            "step": step,
            "loss": language * ce + weight * aligned,
            "ce": ce,
            "align": aligned,
            "lambda": weight,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "words": words,
            "skipped": skipped,
            "seconds_per_step": round(seconds, 4),
        }

    def take(self) -> int:
        """Steps since the last call; begins anew."""
        done, self.rows, self.since = len(self.rows), [], time.monotonic()
        return done
