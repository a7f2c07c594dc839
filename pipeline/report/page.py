"""The page: what an evaluation wrote, as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from pipeline.report import plots
from pipeline.report.plots import LOOKS


def render(context: Mapping[str, Any]) -> str:
    """The HTML of a context made by `contents`; every text in it is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("pipeline.report") / "templates"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    own = {name: Markup((folder / f"page.{name}").read_text(encoding="utf-8")) for name in ("css", "js")}
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(**context, style=own["css"], script=own["js"])


def contents(
    title: str,
    summary: Mapping,
    details: Mapping,
    curves: Mapping[str, Sequence[dict]],
    gallery: Sequence[dict],
    gallery_note: str,
    mistakes: Sequence[tuple],
    commands: str,
) -> dict[str, Any]:
    """Everything the template shows.

    Args:
        summary, details: the evaluation's two files.
        curves: run name -> lines of its metrics.jsonl.
        gallery: cards of `gallery.cards`. mistakes: rows of `gallery.mistakes`.
        commands: what to type to repeat it.
    """
    tasks, arms = list(details["tasks"]), list(summary["arms"])
    return {
        "title": title,
        "lead": lead(summary, tasks),
        "results": _results(summary, tasks),
        "changes": _changes(summary, tasks),
        "figures": figures(summary, details, curves),
        "kinds": _kinds(details, arms),
        "gallery": gallery,
        "gallery_note": gallery_note,
        "gallery_kinds": sorted({card["kind"] for card in gallery if card["kind"]}),
        "yes_no": _yes_no(details),
        "grounding": _grounding(details),
        "words": _words(details),
        "mistakes": _mistakes(mistakes),
        "facts": _facts(summary, details),
        "commands": commands,
    }


def lead(summary: Mapping, tasks: Sequence[str]) -> str:
    """The outcome in words: each trained arm against the reference, up, down or undecided."""
    reference = summary["paired"]["reference"]
    told = []
    for arm, changes in summary["paired"]["arms"].items():
        if arm == "base":
            continue
        parts = [f"{_verdict(changes[task])} on {task}" for task in tasks if task in changes]
        if parts:
            told.append(f"{arm} against {reference}: {', '.join(parts)}.")
    if not told:
        return f"{', '.join(summary['arms'])}: nothing to compare with yet."
    return " ".join(told) + f" Intervals are 95%, over {summary['paired']['covers']}."


def _verdict(change: Mapping) -> str:
    points, (lo, hi) = 100 * change["difference"], (100 * x for x in change["ci95"])
    words = ("better" if points > 0 else "worse") if change["real"] else "not distinguishable"
    return f"{words} ({points:+.1f} points [{lo:+.1f}, {hi:+.1f}])"


def _cell(entry: Mapping | None, key: str = "value") -> dict | None:
    if not entry:
        return None
    lo, hi = entry["ci95"]
    return {"value": f"{entry[key]:.3f}", "note": f"[{lo:.3f}, {hi:.3f}] n={entry['n']}"}


def _results(summary: Mapping, tasks: Sequence[str]) -> dict:
    seeds = summary["seeds"]
    covers = summary["paired"]["covers"]
    over = f"{covers}, {len(seeds)} seeds" if covers != "examples" else "examples only"
    return {
        "caption": f"Share of right answers and of hits of the pointing game, with 95% intervals over {over}.",
        "heads": ["arm", *(f"{task} accuracy" for task in tasks), "pointing"],
        "rows": [
            {
                "head": arm,
                "cells": [*(_cell(entry.get(task), "accuracy") for task in tasks), _cell(entry.get("pointing"))],
                "strong": arm == "lavender",
            }
            for arm, entry in summary["arms"].items()
        ],
    }


def _changes(summary: Mapping, tasks: Sequence[str]) -> dict | None:
    paired = summary["paired"]
    if not paired["arms"]:
        return None

    def cell(change: Mapping | None) -> dict | None:
        if not change:
            return None
        lo, hi = change["ci95"]
        p = f"p={change['p']:.3f}" if change["p"] >= 0.001 else "p<0.001"
        mcnemar = f", McNemar {change['mcnemar_p']:.2g}" if change["mcnemar_p"] is not None else ""
        real = "real" if change["real"] else "not distinguishable"
        return {"value": f"{change['difference']:+.3f}", "note": f"[{lo:+.3f}, {hi:+.3f}] {p}{mcnemar}: {real}"}

    return {
        "caption": f"Paired differences from {paired['reference']}; real: the interval excludes zero.",
        "heads": [f"minus {paired['reference']}", *tasks, "pointing"],
        "rows": [
            {"head": arm, "cells": [cell(changes.get(what)) for what in (*tasks, "pointing")], "strong": False}
            for arm, changes in paired["arms"].items()
        ],
    }


def figures(summary: Mapping, details: Mapping, curves: Mapping) -> dict[str, dict]:
    """Pictures of every figure in all looks, as data URIs, with a text that says what they show."""
    tasks, arms = list(details["tasks"]), list(summary["arms"])
    numbers = "; ".join(
        f"{arm}: "
        + ", ".join(f"{what} {entry.get('accuracy', entry.get('value')):.2f}" for what, entry in found.items())
        for arm, found in summary["arms"].items()
    )
    out = {
        "results": {
            "draw": lambda look: plots.results(summary, tasks, look),
            "alt": f"Bars of accuracy and pointing for each arm. {numbers}.",
            "caption": "Accuracy by task and pointing of the raw attention; the lines are 95% intervals.",
        }
    }
    if any(details["by_kind"].values()):
        out["kinds"] = {
            "draw": lambda look: plots.kinds(details["by_kind"], arms, look),
            "alt": "Bars of accuracy for each kind of question and arm; the table below has the numbers.",
            "caption": "Accuracy by kind of question, each asked alone.",
        }
    if any(curves.values()):
        out["training"] = {
            "draw": lambda look: plots.training(curves, look),
            "alt": _curve_text(curves),
            "caption": "Losses over training steps, smoothed over 2% of the run.",
        }
    return {
        name: {
            **{key: one[key] for key in ("alt", "caption")},
            "pictures": {k.name: uri(one["draw"](k)) for k in LOOKS},
        }
        for name, one in out.items()
    }


def _curve_text(curves: Mapping[str, Sequence[dict]]) -> str:
    ends = (f"{name} ends at language loss {rows[-1]['ce']:.3f}" for name, rows in curves.items() if rows)
    return f"Lines of language and alignment loss over training steps: {'; '.join(ends)}."


def uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _kinds(details: Mapping, arms: Sequence[str]) -> dict:
    rows = [
        {"head": f"{task}: {kind}", "cells": [_cell(found.get(arm), "accuracy") for arm in arms], "strong": False}
        for task, kinds in details["by_kind"].items()
        for kind, found in kinds.items()
    ]
    return {"caption": "Accuracy by task and kind of question.", "heads": ["kind", *arms], "rows": rows}


def _yes_no(details: Mapping) -> dict | None:
    columns = ("f1", "precision", "recall", "yes_rate")
    rows = [
        {"head": f"{task}: {arm}", "cells": [_cell(found[column]) for column in columns], "strong": arm == "lavender"}
        for task, arms in details["yes_no"].items()
        for arm, found in arms.items()
    ]
    if not rows:
        return None
    return {
        "caption": "Yes/no questions as POPE reports them: yes counts as positive; yes rate: how often it is given.",
        "heads": ["task and arm", "F1", "precision", "recall", "yes rate"],
        "rows": rows,
    }


def _grounding(details: Mapping) -> dict | None:
    found = details["grounding"]
    if not found:
        return None
    columns = ("pointing", "mass", "miou", "chance", "centre")
    one = next(iter(found.values()))
    return {
        "caption": "Raw attention at the words of the right answer against the true regions. mass: share of the map "
        f"inside; mIoU: above the threshold chosen on {one['threshold_from']}; chance: a random point; centre: the "
        "middle.",
        "heads": ["maps of", "pointing", "mass inside", "mIoU", "chance", "centre"],
        "rows": [
            {"head": name, "cells": [_cell(entry[column]) for column in columns], "strong": name == "teacher"}
            for name, entry in found.items()
        ],
    }


def _words(details: Mapping) -> dict | None:
    found = details["grounding"]
    kinds = sorted({kind for entry in found.values() for kind in entry["by_word"]})
    if not kinds:
        return None
    return {
        "caption": "Pointing by kind of word.",
        "heads": ["maps of", *kinds],
        "rows": [
            {"head": name, "cells": [_cell(entry["by_word"].get(kind)) for kind in kinds], "strong": name == "teacher"}
            for name, entry in found.items()
        ],
    }


def _mistakes(found: Sequence[tuple]) -> dict | None:
    if not found:
        return None
    heads, rows = found[0], found[1:]
    cells = [[{"value": text, "note": ""} for text in row[1:]] for row in rows]
    return {
        "caption": "The first wrong answers of the last arm in the table above, and what the others said.",
        "heads": list(heads),
        "rows": [{"head": row[0], "cells": cell, "strong": False} for row, cell in zip(rows, cells, strict=True)],
    }


def _facts(summary: Mapping, details: Mapping) -> list[tuple[str, str]]:
    failures = "; ".join(
        f"{arm}: {', '.join(f'{count} {why}' for why, count in found.items()) or 'none'}"
        for arm, found in details["failures"].items()
    )
    facts = [
        ("data", details["data"]),
        ("model", details["model"]),
        ("teacher", details["teacher"]),
        ("seeds", ", ".join(map(str, summary["seeds"])) or "none"),
    ]
    for task, splits in details["tasks"].items():
        count, images = details["questions"][task], details["images"][task]
        facts.append((f"task {task}", f"{count} questions about {images} images of {', '.join(splits)}"))
    facts += [(f"answers: {key}", _text(value)) for key, value in details["decoding"].items()]
    facts.append(("outputs that could not be read", failures))
    facts += [(f"seconds: {stage}", f"{seconds:.0f}") for stage, seconds in summary["seconds"].items()]
    facts.append(("versions", ", ".join(f"{name} {version}" for name, version in details["versions"].items())))
    return facts


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
