"""What ends a run with a reason: numbers that are not finite, memory that is not there, a step that does not end."""

from __future__ import annotations

import faulthandler
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.student.batch import StudentBatch
    from pipeline.student.config import ModelConfig
    from pipeline.student.family import Family
    from pipeline.train.config import TrainConfig

IN_A_ROW = 10  # skipped steps that end a run: then it is not the examples
PIXELS = 500_000  # of an image, where there was no limit: about 700 x 700
SHOWN = 64  # keys in a message
# What PyTorch says when there is no memory on a CPU; on a GPU it has an exception of its own.
_CPU = re.compile(r"can't allocate memory|not enough memory: you tried to allocate")


class NotFinite(UserError):
    """A loss or a gradient is NaN or infinite; the message names the step and the examples of all processes."""


class Finite:
    """Whether a step's numbers may go to the optimizer.

    Args:
        skip: leave a bad step out and count it, instead of stopping.
        skipped, in_a_row: of the run that is gone on with.
    """

    def __init__(self, skip: bool, skipped: int = 0, in_a_row: int = 0):
        self.skip, self.skipped, self.in_a_row = skip, skipped, in_a_row

    def state(self) -> dict:
        """What a resumed run needs to count on."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def check(self, step: int, ce: float, aligned: float, bad_norms: float, batches: Sequence[StudentBatch]) -> bool:
        """True when all is finite; False when the step is to be skipped.

        Args:
            ce, aligned: the global batch's losses, the same on all processes.
            bad_norms: on how many processes the gradient's norm was not finite.
            batches: this process's micro-batches.

        Raises:
            NotFinite: on all processes alike.
        """
        if math.isfinite(ce + aligned) and bad_norms == 0:
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        keys = _of_all_processes([key for batch in batches for key in batch.keys])
        named = ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
        what = f"step {step}: ce {ce:g}, align {aligned:g}" + (", gradient not finite" if bad_norms else "")
        if not self.skip:
            raise NotFinite(
                f"loss or gradient is not finite at {what}; examples {named}. No weight has changed since. "
                "Look at these examples, lower train.lr, or leave such steps out with train.on_nonfinite=skip"
            )
        if self.in_a_row == IN_A_ROW:
            raise NotFinite(f"{IN_A_ROW} steps in a row are not finite, the last at {what}; examples {named}")
        print(f"skipped {what}; examples {named}", file=sys.stderr, flush=True)
        return False


def _of_all_processes(keys: list[str]) -> list[str]:
    from accelerate.utils import gather_object

    return gather_object(keys)


@contextmanager
def memory(cfg: TrainConfig, model: ModelConfig | None = None, family: Family | None = None) -> Iterator[None]:
    """While active, running out of memory becomes one line that says what to lower.

    Args:
        model, family: of the student; without them no way is known to make its images smaller.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: {_first_line(error)}; {advice(cfg, model, family)}") from error
    except RuntimeError as error:
        if not _CPU.search(str(error)):
            raise
        raise UserError(f"out of memory: {_first_line(error)}; {advice(cfg, model, family)}") from error


def advice(cfg: TrainConfig, model: ModelConfig | None = None, family: Family | None = None) -> str:
    """What would take less memory than these settings, the cheapest first."""
    return "try " + ", ".join(ways(cfg, model, family))


def ways(cfg: TrainConfig, model: ModelConfig | None = None, family: Family | None = None) -> list[str]:
    """Settings that take less memory than these, and what each changes."""
    ways = []
    if cfg.micro_batch > 1:
        ways.append(f"train.micro_batch={cfg.micro_batch // 2} (the same result)")
    if not cfg.gradient_checkpointing:
        ways.append("train.gradient_checkpointing=true (the same result, about a third slower)")
    if cfg.logits_mb > 64:
        ways.append("train.logits_mb=64 (the same result)")
    if cfg.precision == "no":
        ways.append("train.precision=bf16")
    if model is not None and family is not None and family.size_counts():
        ways.append(f"model.max_pixels={model.max_pixels // 2 or PIXELS} (smaller images)")
    ways.append("a smaller model.max_length (shorter texts)")
    if cfg.method == "full":
        ways.append("train.method=lora")
    return ways


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


class HangWatch:
    """Prints where every thread is when a step takes longer than ``seconds``; 0 watches nothing. It ends nothing: the
    processes that wait for this one have time limits of their own, and may say more."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __enter__(self) -> HangWatch:
        self.again()
        return self

    def __exit__(self, *_: object) -> None:
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def again(self) -> None:
        """Starts counting anew."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, file=sys.__stderr__)
