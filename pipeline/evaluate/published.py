"""Published numbers of a benchmark list (`eval=paper20`) beside ours; what is not known or not measured stays empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.evaluate.config import Benchmark
from pipeline.evaluate.harness import interval as harness_interval

ARMS = ("base", "sft", "lavender")
MADE_WITH = "vlmevalkit"  # the published numbers compare with this harness's only


@dataclass(frozen=True)
class Beside:
    """One line of the table.

    Attributes:
        metric: what the numbers are. task: what the harness calls it, empty where it does not have it.
        published: arm -> number, None where it is not known.
        ours: arm -> {"value", "ci95", "n"} in the unit of the published number, None where it was not measured; "ci95"
            is None where the harness cannot make its number again from a part of the answers.
        comparable: ours were made with the harness of the published ones.
    """

    name: str
    metric: str
    task: str
    published: dict[str, float | None]
    ours: dict[str, dict | None]
    comparable: bool


def beside(benchmarks: Mapping[str, Benchmark], suite: str, summary: Mapping, harness: Mapping) -> list[Beside]:
    """The table of a benchmark list.

    Args:
        suite: the harness that measured ours (`eval.suite`).
        summary: summary.json: arms -> task -> {"accuracy", "ci95", "n"}.
        harness: task -> arm -> the harness's own total ("harness" of details.json), for benchmarks whose number is not
            a mean over answers.
    """
    return [_line(name, one, suite, summary, harness) for name, one in benchmarks.items()]


def _line(name: str, one: Benchmark, suite: str, summary: Mapping, harness: Mapping) -> Beside:
    task = {"lmms": one.lmms, "vlmevalkit": one.vlmevalkit}.get(suite, "")
    ours = {arm: _ours(one, suite, task, arm, found, harness) for arm, found in summary["arms"].items()}
    published = {arm: getattr(one, arm) for arm in ARMS}
    return Beside(name, one.metric, task, published, ours, suite == MADE_WITH)


def _ours(one: Benchmark, suite: str, task: str, arm: str, found: Mapping, harness: Mapping) -> dict | None:
    total = harness.get(task, {}).get(arm)
    weights = one.lmms_metrics if suite == "lmms" else {}
    if total and weights and weights.keys() <= total.get("metrics", {}).keys():
        value = sum(weight * total["metrics"][name] for name, weight in weights.items())
        return _counted(round(value, 2), harness_interval(total, weights), total["n"])
    if one.scale and task in found and (total is None or total.get("mean")):
        entry = found[task]
        lo, hi = entry["ci95"]
        return {
            "value": round(one.scale * entry["accuracy"], 2),
            "ci95": [round(one.scale * lo, 2), round(one.scale * hi, 2)],
            "n": entry["n"],
        }
    if total is None:
        return None
    return _counted(total["value"], harness_interval(total, {total.get("metric", ""): 1.0}), total["n"])


def _counted(value: float, interval: list[float] | None, n: int) -> dict:
    return {"value": value, "ci95": interval and [round(end, 4) for end in interval], "n": n}
