"""The page: what an evaluation wrote, as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from pipeline.evaluate.compare import exceptions
from pipeline.report import plots, theme


def render(context: Mapping[str, Any]) -> str:
    """The HTML of a context made by `contents`; every text in it is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("pipeline.report") / "templates"
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    own = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(**context, style=Markup(theme.css() + own["css"]), script=Markup(own["js"]))


def contents(
    title: str,
    summary: Mapping,
    details: Mapping,
    curves: Mapping[str, Sequence[dict]],
    *,
    heldout: Mapping[str, Sequence[dict]] | None = None,
    gallery: Sequence[dict] = (),
    gallery_note: str = "",
    mistakes: Mapping | None = None,
    facts: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (),
    runs: Mapping | None = None,
    published: Mapping | None = None,
    commands: str = "",
) -> dict[str, Any]:
    """Everything the template shows.

    Args:
        summary, details: the evaluation's two files.
        curves, heldout: run name -> lines of its metrics.jsonl, of training and of the held-out examples.
        gallery: cards of `gallery.cards`. mistakes: `gallery.mistakes`.
        facts: `facts.groups`. runs: the table of `facts.runs`. published: the table of `published.table`.
        commands: what to type to repeat it.
    """
    tasks, arms = list(details["tasks"]), list(summary["arms"])
    scored = list(gallery[0]["scores"] or gallery[0]["misses"]) if gallery else []
    return {
        "title": title,
        "subtitle": _subtitle(summary, details),
        "lead": lead(summary, tasks),
        "verdicts": verdicts(summary, tasks),
        "results": _results(summary, tasks),
        "changes": _changes(summary, tasks),
        "figures": figures(summary, details, curves, heldout or {}),
        "kinds": _kinds(details, arms),
        "gallery": gallery,
        "gallery_note": gallery_note,
        "gallery_arms": scored,
        "gallery_kinds": sorted({card["kind"] for card in gallery if card["kind"]}),
        "yes_no": _yes_no(details),
        "grounding": _grounding(details),
        "words": _words(details),
        "mistakes": mistakes,
        "facts": facts,
        "runs": runs,
        "published": published,
        "commands": commands,
        "tokens": {arm: theme.token(arm, arms) for arm in (*arms, "teacher")},
    }


def _subtitle(summary: Mapping, details: Mapping) -> str:
    seeds, asked = summary["seeds"], sum(details["questions"].values())
    over = f"{len(seeds)} training seed{'s' if len(seeds) != 1 else ''}" if seeds else "no trained run"
    return f"{details['model']} · {details['data']} · teacher {details['teacher']} · {over} · {asked:,} questions"


def _main(summary: Mapping) -> str | None:
    """The arm that the page is about: lavender, or the last trained one that is compared."""
    arms = [arm for arm in summary["paired"]["arms"] if arm != "base"]
    return "lavender" if "lavender" in arms else arms[-1] if arms else None


def verdicts(summary: Mapping, tasks: Sequence[str]) -> list[dict]:
    """For each measure, how the main arm stands against the reference: a number, its interval, and what it means."""
    arm, reference = _main(summary), summary["paired"]["reference"]
    if arm is None:
        return []
    out = []
    for what in (*tasks, "pointing"):
        change = summary["paired"]["arms"][arm].get(what)
        if not change:
            continue
        key = "value" if what == "pointing" else "accuracy"
        sides = ((name, summary["arms"][name][what]) for name in (arm, reference))
        state = "even" if not change["real"] else "better" if change["difference"] > 0 else "worse"
        lo, hi = (100 * x for x in change["ci95"])
        out.append(
            {
                "what": "pointing" if what == "pointing" else f"accuracy on {what}",
                "state": state,
                "change": f"{_signed(100 * change['difference'], 1)} points",
                "interval": f"[{_signed(lo, 1)}, {_signed(hi, 1)}], n = {change['n']:,}",
                "verdict": {"even": "no real difference", "better": "a real gain", "worse": "a real loss"}[state],
                "from": ", ".join(f"{name} {_ranged(side, key)}" for name, side in sides),
            }
        )
    return out


def lead(summary: Mapping, tasks: Sequence[str]) -> str:
    """The outcome in words: each trained arm against the reference, up, down or undecided."""
    reference = summary["paired"]["reference"]
    told = []
    for arm, changes in summary["paired"]["arms"].items():
        if arm == "base":
            continue
        parts = [f"{_verdict(changes[what])} {name}" for what, name in _measures(tasks) if what in changes]
        if parts:
            told.append(f"{arm} against {reference}: {', '.join(parts)}.")
    if not told:
        return f"{', '.join(summary['arms'])}: nothing to compare with yet."
    return " ".join(told) + f" Intervals are 95%, over {summary['paired']['covers']}."


def _measures(tasks: Sequence[str]) -> list[tuple[str, str]]:
    return [*((task, f"on {task}") for task in tasks), ("pointing", "in pointing")]


def _verdict(change: Mapping) -> str:
    points, (lo, hi) = 100 * change["difference"], (100 * x for x in change["ci95"])
    words = ("better" if points > 0 else "worse") if change["real"] else "not distinguishable"
    return f"{words} ({_signed(points, 1)} points [{_signed(lo, 1)}, {_signed(hi, 1)}], n = {change['n']:,})"


def _ranged(side: Mapping, key: str) -> str:
    lo, hi = side["ci95"]
    return f"{side[key]:.3f} [{lo:.3f}, {hi:.3f}]"


def _signed(value: float, digits: int = 3) -> str:
    """With a sign, and a minus that is as wide as a plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def _cell(entry: Mapping | None, key: str = "value") -> dict | None:
    if not entry:
        return None
    lo, hi = entry["ci95"]
    return {
        "value": f"{entry[key]:.3f}",
        "interval": f"[{lo:.3f}, {hi:.3f}]",
        "note": f"n = {entry['n']:,}",
        "sort": entry[key],
    }


def _results(summary: Mapping, tasks: Sequence[str]) -> dict:
    seeds, covers = summary["seeds"], summary["paired"]["covers"]
    over = f"{covers}, {len(seeds)} seeds" if covers != "examples" else "examples only"
    what = f"Share of right answers, and of hits of the pointing game, with 95% intervals over {over}"
    return {
        "caption": f"{'; '.join([what, *exceptions(summary['paired'])])}.",
        "heads": ["arm", *(f"{task} accuracy" for task in tasks), "pointing"],
        "rows": [
            {
                "head": arm,
                "arm": arm,
                "cells": [*(_cell(entry.get(task), "accuracy") for task in tasks), _cell(entry.get("pointing"))],
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
        p = f"p = {change['p']:.3f}" if change["p"] >= 0.001 else "p < 0.001"
        mcnemar = f", McNemar {change['mcnemar_p']:.2g}" if change["mcnemar_p"] is not None else ""
        return {
            "value": _signed(change["difference"]),
            "interval": f"[{_signed(lo)}, {_signed(hi)}]",
            "note": f"{p}{mcnemar}, n = {change['n']:,}",
            "state": ("better" if change["difference"] > 0 else "worse") if change["real"] else "even",
            "sort": change["difference"],
        }

    return {
        "caption": f"Paired differences from {paired['reference']}. Real: the 95% interval excludes zero.",
        "heads": [f"minus {paired['reference']}", *tasks, "pointing"],
        "rows": [
            {"head": arm, "arm": arm, "cells": [cell(changes.get(what)) for what in (*tasks, "pointing")]}
            for arm, changes in paired["arms"].items()
        ],
    }


def figures(summary: Mapping, details: Mapping, curves: Mapping, heldout: Mapping) -> dict[str, dict]:
    """Every figure in all shapes, with a text that says what it shows; `plan` draws it again."""
    tasks, arms = list(details["tasks"]), list(summary["arms"])
    numbers = "; ".join(
        f"{arm}: "
        + ", ".join(f"{what} {entry.get('accuracy', entry.get('value')):.2f}" for what, entry in found.items())
        for arm, found in summary["arms"].items()
    )
    plans = {}
    if measured := plots.results(summary, tasks):
        plans["results"] = (
            measured,
            f"Accuracy and pointing of each arm as points with intervals. {numbers}.",
            "Points are means, bars their 95% intervals.",
        )
    if change := plots.changes(summary, tasks):
        plans["changes"] = (
            change,
            f"Differences of the arms from {summary['paired']['reference']} with intervals; the table has the numbers.",
            f"What each arm changes against {summary['paired']['reference']}, paired by question. Filled points: the "
            "95% interval excludes zero. Hollow: it does not.",
        )
    if any(details["by_kind"].values()):
        plans["kinds"] = (
            plots.kinds(details["by_kind"], arms),
            "Bars of accuracy for each kind of question and arm; the table below has the numbers.",
            "Accuracy by kind of question, each question asked alone; thin lines are 95% intervals.",
        )
    if any(row.get("ce") is not None for rows in curves.values() for row in rows):
        plans["training"] = (
            plots.training(curves, heldout),
            _curve_text(curves),
            "Losses over training steps, smoothed over 2% of the run"
            + (", dashed on held-out examples" if any(heldout.values()) else "")
            + (", thin lines for single seeds." if len(summary["seeds"]) > 1 else "."),
        )
    return {name: _figure(name, *one) for name, one in plans.items()}


def _figure(name: str, plan: plots.Plan, alt: str, caption: str) -> dict:
    from markupsafe import Markup

    shapes = [Markup(plots.svg(plan, shape, name)) for shape in plots.SHAPES]
    return {"name": name, "plan": plan, "alt": alt, "caption": caption, "shapes": shapes}


def _curve_text(curves: Mapping[str, Sequence[dict]]) -> str:
    ends = (f"{name} ends at language loss {rows[-1]['ce']:.3f}" for name, rows in curves.items() if rows)
    return f"Lines of language and alignment loss over training steps: {'; '.join(ends)}."


def _kinds(details: Mapping, arms: Sequence[str]) -> dict:
    rows = [
        {"head": f"{task}: {kind}", "cells": [_cell(found.get(arm), "accuracy") for arm in arms]}
        for task, kinds in details["by_kind"].items()
        for kind, found in kinds.items()
    ]
    return {"caption": "Accuracy by task and kind of question.", "heads": ["kind", *arms], "rows": rows}


def _yes_no(details: Mapping) -> dict | None:
    columns = ("f1", "precision", "recall", "yes_rate")
    rows = [
        {"head": f"{task}: {arm}", "arm": arm, "cells": [_cell(found[column]) for column in columns]}
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


def _arm_of(name: str) -> str:
    """The arm of a job: `sft-1` -> `sft`."""
    head, _, seed = name.rpartition("-")
    return head if head and seed.isdecimal() else name


def _grounding(details: Mapping) -> dict | None:
    found = details["grounding"]
    if not found:
        return None
    columns = ("pointing", "mass", "miou")
    one = next(iter(found.values()))
    rows = [(name, [entry[column] for column in columns]) for name, entry in found.items()]
    # Of the words that all students are asked; the teacher may be asked fewer.
    rows += [
        ("a random point, a map without preference", [one["chance"]] * 3),
        ("the middle of the image", [one["centre"], one["centre_mass"], one["centre_miou"]]),
    ]
    return {
        "caption": "Raw attention at the words of the right answer against the true regions. Mass: share of the map "
        f"inside; mIoU: above the threshold chosen on {one['threshold_from']}. The last two rows look at nothing: a "
        "map that is the same everywhere, taken as a whole, and a Gaussian in the middle, above half of its height.",
        "heads": ["maps of", "pointing", "mass inside", "mIoU"],
        "rows": [
            {"head": name, "arm": _arm_of(name), "cells": [_cell(cell) for cell in cells]} for name, cells in rows
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
            {"head": name, "arm": _arm_of(name), "cells": [_cell(entry["by_word"].get(kind)) for kind in kinds]}
            for name, entry in found.items()
        ],
    }
