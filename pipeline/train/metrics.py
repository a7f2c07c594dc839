"""The numbers of a run, one JSON line per logged step."""

from __future__ import annotations

import json
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
