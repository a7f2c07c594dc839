"""The course of the two losses' weights over a run."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.align.config import AlignConfig


def factor(cfg: "AlignConfig", step: int, steps: int) -> float:
    """What lambda is multiplied by at a step, 0 to 1.

    Args:
        cfg: the run's settings.
        step: optimizer steps done, from 0.
        steps: optimizer steps of the whole run.
    """
    progress = min(max(step / max(steps, 1), 0.0), 1.0)
    if cfg.schedule == "decay":
        return math.exp(-cfg.decay * progress)
    if cfg.schedule == "inverse":
        return 1.0 - math.exp(-cfg.decay * progress)
    if cfg.schedule == "warmup":
        return min(progress / cfg.warmup, 1.0)
    return 1.0


def language_factor(cfg: "AlignConfig", step: int, steps: int) -> float:
    """What the language loss is multiplied by: 1e-7 while the Aligner learns first, then 1.

    Not 0: every weight keeps a gradient, which wrappers for several processes need.
    """
    return 1e-7 if step < cfg.aligner_first * steps else 1.0
