"""What the two harnesses share: a total for each of their tasks, kept beside the rows of an arm, and joined over arms.

A harness reports a task by a number of its own (``total``). Where that is the mean over its samples, our intervals and
comparisons are made of the same samples. Where it is not (F1, points), the harness's own way to that number is taken
again on random halves of the images, and their spread gives the interval (`interval`). A number that its harness
cannot make again from the samples stands in the report without one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluate.config import EvalConfig
from pipeline.evaluate.intervals import added, t_quantile
from pipeline.evaluate.scoring import passes

TOTALS = "totals.json"
CLOSE = 1e-6
HALVES = 200  # random halves of the images


@dataclass(frozen=True)
class Total:
    """A harness's own number for one task.

    Attributes:
        metric: its name. value: what the harness printed. n: samples behind it. metrics: all of the task's numbers.
        mean: whether it is the mean over the samples' scores.
        halves: metric -> what the harness makes of each of ``HALVES`` halves, the same ones for all metrics.
        images: how many images the halves were drawn from.
    """

    metric: str
    value: float
    n: int
    metrics: dict[str, float] = field(default_factory=dict)
    mean: bool = False
    halves: dict[str, list[float]] = field(default_factory=dict)
    images: int = 0


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


def halves(clusters: Sequence[str], draws: int = HALVES, seed: int = 0) -> Iterator[np.ndarray]:
    """Indices of the samples of random halves of the images, without repeats: a harness may count on each of its
    samples being there once."""
    codes_N = np.unique(np.asarray(clusters), return_inverse=True)[1].ravel()
    count, rng = int(codes_N.max()) + 1, np.random.default_rng(seed)
    for _ in range(draws):
        chosen_C = np.zeros(count, dtype=bool)
        chosen_C[rng.permutation(count)[: count // 2]] = True
        yield np.flatnonzero(chosen_C[codes_N])


def interval(entry: Mapping, weights: Mapping[str, float]) -> list[float] | None:
    """The 95% interval of a weighted sum of a task's metrics, or None where halves do not tell it.

    The spread of halves drawn without repeats is that of the whole (the delete-d jackknife with d = n / 2, Shao and Wu,
    Annals of Statistics 1989); over several seeds their variance is added, as in `intervals.two_level`.

    Args:
        entry: of `joined`.
    """
    if not weights or not weights.keys() <= entry.get("halves", {}).keys() or entry["images"] < 4:
        return None
    value = sum(weight * entry["metrics"][name] for name, weight in weights.items())
    drawn_D = sum(weight * np.asarray(entry["halves"][name]) for name, weight in weights.items())
    if abs(drawn_D.mean() - value) > 0.25 * abs(value) + 3 * drawn_D.std():
        return None  # a sum over samples and no average: of half of them it is half
    seeds_S = sum(weight * np.asarray(entry["seeds"][name]) for name, weight in weights.items())
    between = float(seeds_S.var(ddof=1)) / len(seeds_S) if len(seeds_S) > 1 else 0.0
    spread = added(value, between, float(drawn_D.var()), max(2, len(seeds_S)), entry["images"])
    half = t_quantile(spread.df) * spread.se
    lowest = 0.0 if drawn_D.min() >= 0 else -math.inf  # a share or a sum of points is not below nothing
    return [max(lowest, value - half), value + half]


def right(score: float | None) -> bool | None:
    """Whether a sample that a harness gave ``score`` counts as right: half of a share or more; None for points."""
    return passes(score) if score is not None and 0 <= score <= 1 else None


def save(folder: Path, totals: Mapping[str, Total]) -> Path:
    """Writes totals.json; returns its path."""
    path = folder / TOTALS
    path.write_text(json.dumps({task: asdict(total) for task, total in totals.items()}, indent=1) + "\n")
    return path


def joined(folders: Mapping[str, Sequence[Path]]) -> dict:
    """{task: {arm: the fields of ``Total``, and "seeds"}} from the folders of each arm, averaged over its seeds;
    "seeds" are each one's own numbers of the metrics that have halves."""
    out: dict = {}
    for arm, places in folders.items():
        read = [json.loads((place / TOTALS).read_text()) for place in places if (place / TOTALS).is_file()]
        for task in dict.fromkeys(task for one in read for task in one):
            mine = [one[task] for one in read if task in one]
            names = [name for name in mine[0]["metrics"] if all(name in one["metrics"] for one in mine)]
            told = [name for name in names if all(name in one.get("halves", {}) for one in mine)]
            out.setdefault(task, {})[arm] = {
                **mine[0],
                "value": float(np.mean([one["value"] for one in mine])),
                "metrics": {name: float(np.mean([one["metrics"][name] for one in mine])) for name in names},
                "seeds": {name: [one["metrics"][name] for one in mine] for name in told},
                "halves": {name: np.mean([one["halves"][name] for one in mine], axis=0).tolist() for name in told},
            }
    return out


def named(ev: EvalConfig) -> list[str]:
    """The harness's tasks: those that the settings name, or every benchmark of their list that it has."""
    return list(ev.harness_tasks) or list(
        dict.fromkeys(task for one in ev.benchmarks.values() if (task := getattr(one, ev.suite, "")))
    )
