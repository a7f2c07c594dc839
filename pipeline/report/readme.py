"""The result section of a README, written from a results file so that no number is ever typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path

from pipeline.errors import UserError
from pipeline.evaluate.compare import exceptions

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def keep(summary: Path, kept: Path, command: str, day: date) -> None:
    """Copies a summary.json into the repository with the day and the command that made it.

    Raises:
        UserError: no summary there, or not one.
    """
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
        content["arms"], content["paired"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{summary}: is not the summary of an evaluation ({type(error).__name__})") from error
    kept.parent.mkdir(parents=True, exist_ok=True)
    document = {"date": day.isoformat(), "command": command, "summary": content}
    kept.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def section(document: Mapping, name: str) -> str:
    """Markdown of a kept results file: the table, the differences, the teacher, and where it comes from.

    Args:
        name: the kept file's path in the repository.
    """
    summary = document["summary"]
    paired, teacher = summary["paired"], summary["teacher"]
    columns = list(dict.fromkeys(key for entry in summary["arms"].values() for key in entry))
    columns = [key for key in columns if key != "pointing"] + [key for key in columns if key == "pointing"]
    heads = [column if column == "pointing" else f"{column} accuracy" for column in columns]
    rows = [[arm, *(_number(entry.get(column)) for column in columns)] for arm, entry in summary["arms"].items()]
    seeds = summary["seeds"]
    over = f"{len(seeds)} seeds and examples" if paired["covers"] != "examples" else "examples only (one seed)"
    made = [f"`{document['command']}`, {document['date']}", f"95% intervals over {over}", *exceptions(paired)]
    parts = [
        f"{'; '.join(made)}.",
        _table(["arm", *heads], rows),
    ]
    if paired["arms"]:
        rows = [[arm, *(_change(entry.get(column)) for column in columns)] for arm, entry in paired["arms"].items()]
        parts.append(_table([f"minus {paired['reference']}", *columns], rows))
        parts.append("Bold: the interval of the paired difference excludes zero.")
    if teacher["pointing"] is not None:
        told = {name: _with_interval(teacher, name) for name in ("pointing", "miou", "chance")}
        count = f" (n={teacher['n']})" if "n" in teacher else ""
        asked = {entry["pointing"]["n"] for entry in summary["arms"].values() if "pointing" in entry}
        same = "the same words" if teacher.get("n") in (None, *asked) else "a part of these words"
        parts.append(
            f"The teacher's own maps on {same}: pointing {told['pointing']}, mIoU {told['miou']}; a random "
            f"point would score {told['chance']}{count}."
        )
    taken = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in summary["seconds"].items())
    parts.append(f"From `{name}`, by `python -m stages.readme`. Seconds: {taken or 'not recorded'}.")
    return "\n\n".join(parts)


def _with_interval(teacher: Mapping, name: str) -> str:
    """A number of the teacher; results kept by an earlier version have no intervals."""
    interval = "" if "ci95" not in teacher else " [{:.3f}, {:.3f}]".format(*teacher["ci95"][name])
    return f"{teacher[name]:.3f}{interval}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(entry: Mapping | None) -> str:
    if not entry:
        return "–"
    value = entry.get("accuracy", entry.get("value"))
    lo, hi = entry["ci95"]
    return f"{value:.3f} [{lo:.3f}, {hi:.3f}], n={entry['n']}"


def _change(entry: Mapping | None) -> str:
    if not entry:
        return "–"
    lo, hi = entry["ci95"]
    p = f"p={entry['p']:.3f}" if entry["p"] >= 0.001 else "p<0.001"
    text = f"{entry['difference']:+.3f} [{lo:+.3f}, {hi:+.3f}], {p}, n={entry['n']}"
    return f"**{text}**" if entry["real"] else text


def update(readme: Path, kept: Path, name: str) -> bool:
    """Puts the section of a kept results file between the marks of a README; returns whether the text changed.

    Raises:
        UserError: no results file, or no marks.
    """
    if not kept.is_file():
        raise UserError(f"{kept}: there is no such results file: give the summary.json of an evaluation first")
    text = readme.read_text(encoding="utf-8")
    made = section(json.loads(kept.read_text(encoding="utf-8")), name)
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise UserError(f"{readme}: has no place for results: add the lines {BEGIN} and {END}")
    new = pattern.sub(lambda _: f"{BEGIN}\n{made}\n{END}", text, count=1)
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text
