"""The numbers of a run, one JSON line per logged step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline import receipts

FILE = "metrics.jsonl"
COLUMNS = 7  # of what is kept of a step, see `Running.add`


class Metrics:
    """Appends to ``metrics.jsonl``; a resumed run first drops the lines after its checkpoint, which it will repeat."""

    def __init__(self, run: Path, step: int, also: Callable[[dict], None] = lambda line: None):
        self.path, self.also = run / FILE, also
        # What was found before the first step is found again by a run that begins again.
        kept = [line for line in lines(run) if step and line["step"] <= step]
        # By rename: a kill in the middle must not take the lines that no one writes again.
        receipts.write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def add(self, line: dict) -> None:
        """One line, for the file and for whatever else shows it."""
        self.also(line)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def read(run: Path) -> list[dict]:
    """The lines of training, in order."""
    return [line for line in lines(run) if "heldout" not in line]


def heldout(run: Path) -> list[dict]:
    """What was found on the held-out examples, in order: the numbers of `HeldOut.measure` and their step."""
    return [{"step": line["step"]} | line["heldout"] for line in lines(run) if "heldout" in line]


def lines(run: Path) -> list[dict]:
    """All whole lines of a run's metrics; a last line cut off by a kill is left out."""
    path = run / FILE
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


class Running:
    """Means since the last logged step; the loss is the mean of the optimised numbers.

    Args:
        rows, left_out: of the run that is gone on with. Rows of checkpoints from before the loss was in them are
            counted and otherwise left out.
    """

    def __init__(self, rows: Sequence[Sequence[float]] = (), left_out: int = 0):
        self.rows = [tuple(row) for row in rows if len(row) == COLUMNS]
        self.left_out = left_out + len(rows) - len(self.rows)
        self.before = len(self.rows) + self.left_out  # steps whose time is not known
        self.since = time.monotonic()

    def state(self) -> dict:
        """What a resumed run needs to log the same numbers."""
        return {"rows": [list(row) for row in self.rows], "left_out": self.left_out}

    def add(self, loss: float, ce: float, aligned: float, tokens: int, words: int, examples: int, skipped: int) -> None:
        """One step of all processes: the loss as it was optimised, its two parts without their factors, label tokens,
        aligned words, examples, and those that could not be encoded."""
        self.rows.append((loss, ce, aligned, tokens, words, examples, skipped))

    def leave_out(self) -> None:
        """One step whose numbers were not finite."""
        self.left_out += 1

    def line(
        self,
        step: int,
        weight: float,
        rate: float,
        norm: float,
        nonfinite: int,
        parts: dict[str, float],
    ) -> dict | None:
        """What is logged at a step; None when no step since the last line was finite.

        Args:
            weight: lambda at the last step.
            norm: of the last gradient, before clipping.
            nonfinite: steps skipped so far.
            parts: seconds by part of a step since the last line.
        """
        if not self.rows:
            return None
        loss, ce, aligned, tokens, words, examples, skipped = (
            sum(column) / len(self.rows) for column in zip(*self.rows, strict=True)
        )
        steps = self._made()
        seconds = self.seconds() / steps
        return {
            "step": step,
            "loss": loss,
            "ce": ce,
            "align": aligned,
            "lambda": weight,
            "lr": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "words": words,
            "words_per_example": words / max(examples, 1),
            "skipped": skipped,
            "nonfinite": nonfinite,
            "seconds_per_step": round(seconds, 4),
            "seconds": {name: round(value / steps, 5) for name, value in parts.items()},
        }

    def seconds(self) -> float:
        """Seconds since the last line."""
        return time.monotonic() - self.since

    def rest(self, seconds: float) -> None:
        """Leaves out time in which no step was made."""
        self.since += seconds

    def take(self) -> int:
        """Steps made since the last call; begins anew."""
        done = self._made()
        self.rows, self.left_out, self.before, self.since = [], 0, 0, time.monotonic()
        return done

    def _made(self) -> int:
        return len(self.rows) + self.left_out - self.before


def note(line: dict | None) -> str:
    """What the progress bar shows of a line."""
    if line is None:
        return "no finite step"
    return f"loss {line['loss']:.3f} ce {line['ce']:.3f} align {line['align']:.4f}"
