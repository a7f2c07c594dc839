"""What the two harnesses share: a total for each of their tasks, kept beside the rows of an arm, and joined over arms.

A harness reports a task by a number of its own (``total``). Where that is the mean over its samples, our intervals and
comparisons are made of the same samples; where it is not (F1, points), the total stands in the report without one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluate.config import EvalConfig
from pipeline.evaluate.scoring import passes

TOTALS = "totals.json"
CLOSE = 1e-6


@dataclass(frozen=True)
class Total:
    """A harness's own number for one task.

    Attributes:
        metric: its name. value: what the harness printed. n: samples behind it. metrics: all of the task's numbers.
        mean: whether it is the mean over the samples' scores.
    """

    metric: str
    value: float
    n: int
    metrics: dict[str, float] = field(default_factory=dict)
    mean: bool = False


def digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's task files.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"eval.harness_path={folder}: there is no such folder")
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".yaml", ".yml", ".py"):
            total.update(f"{file.relative_to(folder)}:{file_digest(file)}\n".encode())
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_mean(total: float, scores: Sequence[float]) -> bool:
    """Whether a harness's total is the mean of the samples' scores, as a share or in per cent."""
    if not len(scores):
        return False
    mean = float(np.mean(scores))
    return any(abs(unit * mean - total) <= CLOSE * max(1.0, abs(total)) for unit in (1, 100))


def right(score: float | None) -> bool | None:
    """Whether a sample that a harness gave ``score`` counts as right: half of a share or more; None for points."""
    return passes(score) if score is not None and 0 <= score <= 1 else None


def save(folder: Path, totals: Mapping[str, Total]) -> Path:
    """Writes totals.json; returns its path."""
    path = folder / TOTALS
    path.write_text(json.dumps({task: asdict(total) for task, total in totals.items()}, indent=1) + "\n")
    return path


def joined(folders: Mapping[str, Sequence[Path]]) -> dict:
    """{task: {arm: the fields of ``Total``}} from the folders of each arm, averaged over its seeds."""
    out: dict = {}
    for arm, places in folders.items():
        read = [json.loads((place / TOTALS).read_text()) for place in places if (place / TOTALS).is_file()]
        for task in dict.fromkeys(task for one in read for task in one):
            mine = [one[task] for one in read if task in one]
            names = [name for name in mine[0]["metrics"] if all(name in one["metrics"] for one in mine)]
            out.setdefault(task, {})[arm] = {
                **mine[0],
                "value": float(np.mean([one["value"] for one in mine])),
                "metrics": {name: float(np.mean([one["metrics"][name] for one in mine])) for name in names},
            }
    return out


def named(ev: EvalConfig) -> list[str]:
    """The harness's tasks: those that the settings name, or every benchmark of their list that it has."""
    return list(ev.harness_tasks) or list(
        dict.fromkeys(task for one in ev.benchmarks.values() if (task := getattr(one, ev.suite, "")))
    )
