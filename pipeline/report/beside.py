"""The table of published numbers beside ours; what is not known or was not measured is an empty cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pipeline.evaluate.published import ARMS, MADE_WITH, beside

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.evaluate.published import Beside


def published(cfg: Config, summary: Mapping, details: Mapping) -> dict | None:
    """The table for the page; None where the evaluation names no published benchmarks."""
    if not cfg.eval.benchmarks:
        return None
    lines = beside(cfg.eval.benchmarks, cfg.eval.suite, summary, details.get("harness", {}))
    return table(lines, list(summary["arms"]), cfg.eval.suite)


def table(lines: Sequence[Beside], arms: Sequence[str], suite: str) -> dict:
    """Heads and rows: a benchmark, the paper's numbers, ours."""
    measured = sum(any(entry for entry in line.ours.values()) for line in lines)
    alike = all(line.comparable for line in lines)
    note = f"{measured} of {len(lines)} benchmarks are measured here. "
    if alike:
        note += f"Both sides were made with {MADE_WITH}."
    else:
        note += f"The published numbers were made with {MADE_WITH}, ours with {suite or 'the built-in evaluator'}: "
        note += "harnesses score the same model differently, so the two sides cannot be subtracted."
    return {
        "note": note,
        "caption": "The paper's numbers (Llama-3.2-11B with LoRA, read off its figures) and ours, in its units.",
        "groups": [("the paper", len(ARMS)), ("ours", len(arms))],
        "heads": ["benchmark", *ARMS, *arms],
        "rows": [
            {
                "head": line.name,
                "note": line.metric,
                "cells": [*(_told(line.published.get(arm)) for arm in ARMS), *(_ours(line.ours.get(a)) for a in arms)],
            }
            for line in lines
        ],
    }


def _told(value: float | None) -> dict | None:
    return None if value is None else {"value": f"{value:,.0f}" if value > 100 else f"{value:.1f}"}


def _ours(entry: Mapping | None) -> dict | None:
    if entry is None:
        return None
    digits = 0 if entry["value"] > 100 else 1
    interval = entry["ci95"] and "[{:,.{d}f}, {:,.{d}f}]".format(*entry["ci95"], d=digits)
    return {"value": f"{entry['value']:,.{digits}f}", "interval": interval or "", "note": f"n = {entry['n']:,}"}
