"""The part of `benchmarks.train` that needs a GPU: the real shapes of Llama-3.2-11B-Vision with random weights."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

EXAMPLES, CARDS = 130_000, 8  # the paper's data, and the cards that the time is projected for
REAL = (
    "model=llama32-11b",
    "model.weights=random",
    "train.batch_size=1",
    "train.micro_batch=1",
)


def on_gpu(folder: Path, blocks: int = 6, steps: int = 10) -> dict[str, object]:
    """The keys of the GPU part, with `gpu_` before each."""
    import torch

    from pipeline.doctor.hardware import KNOWN

    name = torch.cuda.get_device_name()
    plain = name.lower().replace(" ", "")
    peaks = [speed for known, (_, speed) in KNOWN.items() if known.partition("-")[0] in plain]
    torch.cuda.reset_peak_memory_stats()
    found = speed(folder, "cuda", REAL, peaks[0] if peaks else None, blocks, steps)
    found |= {"card": name, "peak_gib": round(torch.cuda.max_memory_allocated() / (1 << 30), 2)}
    return {f"gpu_{key}": value for key, value in found.items()}


def speed(
    folder: Path, device: str, overrides: tuple[str, ...], peak: float | None, blocks: int, steps: int
) -> dict[str, object]:
    """Tokens/s, examples/s, utilisation, estimated memory and the loop's time over the bare step's.

    Utilisation counts the operations that the step needs, without what checkpointing computes again, over the card's
    dense bf16 peak; None where that is not known.

    Args:
        overrides: of the settings, with one micro-batch a step.
        peak: operations a second.
    """
    from benchmarks.train import Run
    from pipeline.doctor.memory import build, estimate

    run = Run(folder, *overrides, device=device)
    cfg, batch = run.cfg, run.batches.at(0).batches[0]
    bf16 = cfg.train.precision == "bf16"
    needed, taken = (
        estimate(
            build(replace(cfg, train=replace(cfg.train, gradient_checkpointing=again)))[1],
            batch,
            bf16=bf16,
            accumulates=False,
        )
        for again in (False, True)
    )
    run.loop(steps)
    run.bare(steps)
    loops, ratios = [], []
    for _ in range(blocks):
        first = run.loop(steps)
        loops.append(first / steps)
        ratios.append(first / run.bare(steps))
    step = statistics.median(loops)
    examples = cfg.train.batch_size / step
    return {
        "step_seconds": round(step, 4),
        "tokens_per_second": round(int(batch.inputs["attention_mask"].sum()) / step, 1),
        "examples_per_second": round(examples, 3),
        "mfu": round(needed.flops / step / peak, 4) if peak else None,
        "hfu": round(taken.flops / step / peak, 4) if peak else None,
        "over_bare": round(statistics.median(ratios), 4),
        "estimated_gib": round(taken.total / (1 << 30), 2),
        "hours_of_130k_on_8": round(EXAMPLES / examples / CARDS / 3600, 2),
    }
