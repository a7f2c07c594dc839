"""The numbers of a run, one JSON line per logged step."""

from __future__ import annotations

import json
import time
from pathlib import Path

FILE = "metrics.jsonl"


class Metrics:
    """Appends to ``metrics.jsonl``; a resumed run first drops the lines after its checkpoint, which it will repeat."""

    def __init__(self, run: Path, step: int):
        self.path = run / FILE
        kept = [line for line in read(run) if line["step"] <= step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def read(run: Path) -> list[dict]:
    """The whole lines of a run's metrics; a last line cut off by a kill is left out."""
    path = run / FILE
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


class Running:
    """Means since the last logged step; the loss is the mean of the optimised numbers."""

    def __init__(self):
        self.rows: list[tuple[float, float, int, int, int]] = []
        self.left_out = 0
        self.since = time.monotonic()

    def add(self, ce: float, aligned: float, tokens: int, words: int, skipped: int) -> None:
        """One step: its losses, label tokens, aligned words, and examples that could not be encoded."""
        self.rows.append((ce, aligned, tokens, words, skipped))

    def leave_out(self) -> None:
        """One step whose numbers were not finite."""
        self.left_out += 1

    def line(
        self,
        step: int,
        language: float,
        weight: float,
        rate: float,
        norm: float,
        nonfinite: int,
        parts: dict[str, float],
    ) -> dict | None:
        """What is logged at a step; None when no step since the last line was finite.

        Args:
            language, weight: factors of the two losses.
            norm: of the last gradient, before clipping.
            nonfinite: steps skipped so far.
            parts: seconds by part of a step since the last line.
        """
        if not self.rows:
            return None
        ce, aligned, tokens, words, skipped = (sum(column) / len(self.rows) for column in zip(*self.rows, strict=True))
        steps = len(self.rows) + self.left_out
        seconds = (time.monotonic() - self.since) / steps
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
            "nonfinite": nonfinite,
            "seconds_per_step": round(seconds, 4),
            "seconds": {name: round(value / steps, 5) for name, value in parts.items()},
        }

    def take(self) -> int:
        """Steps since the last call; begins anew."""
        done = len(self.rows) + self.left_out
        self.rows, self.left_out, self.since = [], 0, time.monotonic()
        return done


def note(line: dict | None) -> str:
    """What the progress bar shows of a line."""
    if line is None:
        return "no finite step"
    return f"loss {line['loss']:.3f} ce {line['ce']:.3f} align {line['align']:.4f}"
