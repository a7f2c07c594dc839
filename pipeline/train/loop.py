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
from pipeline.train.clock import Clock
from pipeline.train.flops import Throughput
from pipeline.train.guards import Finite, HangWatch
from pipeline.train.metrics import Running, note
from pipeline.train.trainable import Unfreezing

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

    from pipeline.align.config import AlignConfig
    from pipeline.progress import Progress
    from pipeline.student.batch import StudentBatch
    from pipeline.train.config import TrainConfig
    from pipeline.train.data import Batches
    from pipeline.train.heldout import HeldOut
    from pipeline.train.metrics import Metrics


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
    save: Callable[[int, dict, float | None], None],
    trackers: dict | None = None,
    asked: Callable[[], bool] = lambda: False,
    heldout: HeldOut | None = None,
) -> int:
    """Trains from step ``start`` (steps done) to ``steps`` and returns the steps done.

    ``save`` is given the steps done, the trackers, which a resumed run gets back, and the loss on the held-out examples
    where they were evaluated. When ``asked`` says yes on any process, all of them save at the end of that step and
    return.

    The loss of a global batch is (sum of cross-entropies) / (label tokens) + lambda * (sum of alignment errors) /
    (aligned words), both counted over all processes and micro-batches. Everything random depends on (seed, step,
    process) alone, so a resumed run repeats an uninterrupted one.
    """
    tuned.train()
    ranks, device = accelerator.num_processes, accelerator.device
    stop = min(steps, start + cfg.max_steps_per_call) if cfg.max_steps_per_call else steps
    peaks = (cfg.lr, cfg.aligner_lr)  # not what the optimizer says: a loaded one remembers its last rate
    clock, trackers = Clock(device), trackers or {}
    finite = Finite(cfg.on_nonfinite == "skip", **trackers.get("finite", {}))
    running = Running(**trackers.get("running", {}))
    speed = Throughput(accelerator.unwrap_model(tuned).student, device, ranks)
    unfreezing = Unfreezing(tuned.named_parameters(), cfg.unfreeze)
    with HangWatch(cfg.hang_timeout) as watch:

        def evaluated(done: int) -> float | None:
            if heldout is None or not heldout.due(done, steps):
                return None
            began = time.monotonic()
            loss = heldout(tuned, done, watch.again)
            running.rest(time.monotonic() - began)
            return loss if math.isfinite(loss) else None

        if start == 0:
            evaluated(0)
        for step, share in enumerate(clock.waiting(batches.stream(start, stop, cfg.workers)), start):
            torch.manual_seed((seed * 1_000_003 + step) * 1_009 + accelerator.process_index)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate_factor(cfg, step, steps)
            weight, language = lam * factor(align, step, steps), language_factor(align, step, steps)

            # How many label tokens and aligned words the global batch has: what the sums below are divided by.
            micro = [batch.to(device) for batch in share.batches]
            own_tokens = sum(int((b.labels[:, 1:] != IGNORED).sum()) for b in micro)
            own_words = sum(int(usable(b).sum()) for b in micro)
            counts = torch.tensor([own_tokens, own_words, share.examples, share.skipped], device=device)
            *found, examples, skipped = accelerator.reduce(counts, "sum").tolist()
            tokens, words = (max(n, 1) for n in found)

            sums = torch.zeros(4, device=device)
            for number, batch in enumerate(micro):
                # Gradients travel between processes once a step, with the last micro-batch; but FSDP would have to hold
                # them whole until then.
                wait = number + 1 < len(micro) and not accelerator.is_fsdp2
                with accelerator.no_sync(tuned) if wait else nullcontext():
                    with clock.part("forward"):
                        ce, aligned, _ = tuned(batch)
                        # DDP and FSDP average gradients over processes: times `ranks` makes it the sum of the parts.
                        loss = (language * ce / tokens + weight * aligned / words) * ranks
                    with clock.part("backward"):
                        accelerator.backward(loss)
                sums[:2] += torch.stack([ce.detach(), aligned.detach()])
                speed.add(batch)

            unfreezing.drop(step)

            # No step with a loss or a gradient that is not finite on any process.
            norm = accelerator.clip_grad_norm_(tuned.parameters(), cfg.grad_clip)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            sums[2], sums[3] = ~torch.isfinite(norm), asked()
            sums = accelerator.reduce(sums, "sum") / torch.tensor([tokens, words, 1, 1], device=device)
            ce, aligned, bad_norms, ending = sums.tolist()
            if finite.check(step, ce, aligned, bad_norms, micro):
                with clock.part("optimizer"):
                    optimizer.step()
                running.add(language * ce + weight * aligned, ce, aligned, tokens, words, examples, skipped)
            else:
                running.leave_out()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            if done % cfg.log_every == 0 or done == steps:
                rate = optimizer.param_groups[0]["lr"]
                line = running.line(done, weight, rate, float(norm), finite.skipped, clock.take())
                measured = speed.take(running.seconds())
                if accelerator.is_main_process and line:
                    metrics.add(line | measured)
                progress.advance(running.take(), note=note(line))
            loss = evaluated(done)
            if done % cfg.checkpoint_every == 0 or done == stop or ending:
                save(done, {"running": running.state(), "finite": finite.state()}, loss)
            if ending:
                return done
            watch.again()
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
