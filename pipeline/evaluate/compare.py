"""Arms side by side: accuracy and pointing with intervals, differences from a reference, and the printed table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import UserError
from pipeline.evaluate.intervals import Difference, Interval, ratio_interval, two_level, two_level_paired
from pipeline.evaluate.scoring import YES_NO, normalise

BASE = "base"


@dataclass
class ArmResults:
    """What was measured for one arm, by seed (the base has one entry, under None).

    Attributes:
        answers: seed -> rows of per_sample.jsonl; words: seed -> rows of pointing.jsonl.
    """

    arm: str
    answers: dict[int | None, list[dict]] = field(default_factory=dict)
    words: dict[int | None, list[dict]] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        return sorted(seed for seed in self.answers if seed is not None)


@dataclass(frozen=True)
class Grid:
    """One measure of one arm: values (S, N) in a shared order of examples, with the seeds, names and image clusters."""

    seeds: tuple[int | None, ...]
    values: np.ndarray
    uids: tuple[str, ...]
    clusters: tuple[str, ...]


def grid(rows_by_seed: Mapping[int | None, Sequence[dict]], value: str, keep=lambda row: True) -> Grid | None:
    """Collects ``value`` of the rows that ``keep`` accepts; None without any.

    Raises:
        UserError: seeds that were asked different questions.
    """
    seeds = tuple(sorted(rows_by_seed, key=lambda seed: -1 if seed is None else seed))
    columns, names, clusters = [], None, ()
    for seed in seeds:
        rows = sorted((row for row in rows_by_seed[seed] if keep(row) and _scored(row)), key=lambda row: row["uid"])
        uids = tuple(row["uid"] for row in rows)
        if names is not None and uids != names:
            raise UserError(f"seeds {seeds[0]} and {seed} were asked different questions: evaluate both again")
        names, clusters = uids, tuple(row["cluster"] for row in rows)
        columns.append([_measured(row, value) for row in rows])
    return Grid(seeds, np.array(columns), names, clusters) if names else None


def _scored(row: dict) -> bool:
    """False for what only counts together with others, as in some benchmarks of a harness."""
    return row.get("score", 0) is not None


def _measured(row: dict, value: str) -> float:
    """An answer counts with its score, which scorers other than right and wrong give; older rows have none."""
    return float(row.get("score", row[value]) if value == "correct" else row[value])


def interval(cells: Grid | None) -> Interval | None:
    """Mean over seeds and examples; the interval covers both as soon as there are two seeds."""
    return two_level(cells.values, cells.clusters) if cells else None


def difference(first: Grid | None, second: Grid | None) -> Difference | None:
    """First minus second on the examples of both, over the seeds of both (an arm without seeds pairs with any).

    None where nothing is shared.

    Raises:
        UserError: arms that were asked different questions.
    """
    if first is None or second is None:
        return None
    if first.uids != second.uids:
        raise UserError("arms were asked different questions: evaluate all of them again with the same settings")
    if None in first.seeds or None in second.seeds:
        return two_level_paired(first.values, second.values, first.clusters)
    shared = [seed for seed in first.seeds if seed in second.seeds]
    if not shared:
        return None
    pick = [[cells.seeds.index(seed) for seed in shared] for cells in (first, second)]
    return two_level_paired(first.values[pick[0]], second.values[pick[1]], first.clusters)


def refuse_mixed(arms: Sequence[ArmResults]) -> None:
    """Refuses to compare arms that were asked, decoded or scored differently.

    Raises:
        UserError: names two of the arms and the settings that differ.
    """
    seen: tuple[str, dict] | None = None
    for arm in arms:
        for seed, rows in arm.answers.items():
            name = arm.arm if seed is None else f"{arm.arm}-{seed}"
            for row in rows:
                if seen is None:
                    seen = name, row["settings"]
                elif row["settings"] != seen[1]:
                    keys = sorted(
                        k for k in row["settings"].keys() | seen[1].keys() if row["settings"].get(k) != seen[1].get(k)
                    )
                    what = ", ".join(f"{k}: {seen[1].get(k)} and {row['settings'].get(k)}" for k in keys)
                    raise UserError(
                        f"{seen[0]} and {name} were evaluated with different settings ({what}): "
                        "their answers cannot be compared; evaluate one of them again with the other's settings"
                    )


def summarise(arms: Sequence[ArmResults], tasks: Sequence[str], point_task: str, reference: str) -> dict:
    """The "arms", "paired" and "seeds" of summary.json.

    "paired" holds, for every arm but the reference, its difference from the reference on each task and in pointing.
    What could not be measured (data without such a split, or without regions) has no entry.
    """
    refuse_mixed(arms)
    cells = {arm.arm: _grids(arm, tasks, point_task) for arm in arms}
    out: dict = {"arms": {}, "seeds": sorted({seed for arm in arms for seed in arm.seeds})}
    for arm in arms:
        found = {what: interval(mine) for what, mine in cells[arm.arm].items()}
        out["arms"][arm.arm] = {
            what: _number("value" if what == "pointing" else "accuracy", number)
            for what, number in found.items()
            if number is not None
        }
    reference = reference if reference in cells else BASE if BASE in cells else ""
    out["paired"] = {
        "reference": reference,
        "covers": covers(arms),
        "seeds": {arm.arm: arm.seeds for arm in arms},
        "arms": {
            name: {
                what: _change(change)
                for what in (*tasks, "pointing")
                if (change := difference(mine[what], cells[reference][what])) is not None
            }
            for name, mine in cells.items()
            if reference and name != reference
        },
    }
    return out


def covers(arms: Sequence[ArmResults]) -> str:
    """What the intervals speak for: "examples" with one seed, "seeds and examples" with several."""
    return "seeds and examples" if any(len(arm.seeds) > 1 for arm in arms) else "examples"


def exceptions(paired: Mapping) -> list[str]:
    """Where the "paired" part of a summary is less than it seems: arms of one seed among others of several, arms that
    share only some seeds with the reference, or none, and so are not compared."""
    found, all_seeds, reference = [], paired.get("seeds", {}), paired["reference"]
    told = all_seeds.get(reference, [])
    for arm, seeds in all_seeds.items():
        shared = [seed for seed in seeds if seed in told]
        if len(seeds) == 1 and paired["covers"] != "examples":
            found.append(f"{arm} has one seed ({seeds[0]}): its interval is over examples only")
        if arm == reference or not told or not seeds:
            continue
        if not shared:
            found.append(f"{arm} (seeds {_listed(seeds)}) shares no seed with {reference} and is not compared")
        elif set(seeds) != set(told):
            only = ", over examples only" if len(shared) == 1 else ""
            found.append(f"{arm} minus {reference}: over the shared seeds {_listed(shared)}{only}")
    return found


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _grids(arm: ArmResults, tasks: Sequence[str], point_task: str) -> dict[str, Grid | None]:
    found = {task: grid(arm.answers, "correct", lambda row, task=task: row["task"] == task) for task in tasks}
    return {**found, "pointing": grid(arm.words, "hit", lambda row: row["task"] == point_task)}


def by_group(arms: Sequence[ArmResults], tasks: Sequence[str]) -> dict:
    """{task: {kind or other group: {arm: {"accuracy", "ci95", "n"}}}}: where a gain comes from."""
    out: dict = {}
    for task in tasks:
        groups = {row["group"] for arm in arms for rows in arm.answers.values() for row in rows if row["task"] == task}
        for group in sorted(groups):
            for arm in arms:
                here = grid(arm.answers, "correct", lambda row, t=task, g=group: row["task"] == t and row["group"] == g)
                if here is not None:
                    out.setdefault(task, {}).setdefault(group, {})[arm.arm] = _number("accuracy", interval(here))
    return out


def yes_no(arms: Sequence[ArmResults], tasks: Sequence[str]) -> dict:
    """{task: {arm: {"f1", "precision", "recall", "yes_rate"}}} of yes/no questions, as POPE reports them.

    Each is {"value", "ci95", "n"} over questions, and over seeds where there are several, resampled by image. An output
    that is neither yes nor no is no yes: where yes is right it is one missed, and where no is right it leaves F1 as it
    is; accuracy counts both as wrong.
    """
    out: dict = {}
    for task in tasks:
        for arm in arms:
            counted = {
                seed: [row | _counts(row) for row in rows if row["task"] == task and row["kind"] in YES_NO]
                for seed, rows in arm.answers.items()
            }
            if any(counted.values()):
                out.setdefault(task, {})[arm.arm] = _detection(counted)
    return out


def _counts(row: Mapping) -> dict[str, bool]:
    yes, said = normalise(row["gold"]) == "yes", row["answer"] == "yes"
    return {
        "hit": yes and bool(row["correct"]),
        "alarm": said and not yes,
        "missed": yes and not row["correct"],
        "said": said,
        "every": True,
    }


def _detection(counted: Mapping[int | None, Sequence[dict]]) -> dict:
    cells = {name: grid(counted, name) for name in ("hit", "alarm", "missed", "said", "every")}

    def ratio(over: Sequence[str], under: Sequence[str]) -> dict:
        above, below = (sum(cells[name].values for name in names) for names in (over, under))
        return _number("value", ratio_interval(above, below, cells["every"].clusters))

    return {
        "f1": ratio(["hit", "hit"], ["hit", "hit", "alarm", "missed"]),
        "precision": ratio(["hit"], ["hit", "alarm"]),
        "recall": ratio(["hit"], ["hit", "missed"]),
        "yes_rate": ratio(["said"], ["every"]),
    }


def failures(arms: Sequence[ArmResults]) -> dict:
    """{arm: {reason: count}} of outputs that could not be read."""
    return {arm: _added(tasks) for arm, tasks in failures_by_task(arms).items()}


def failures_by_task(arms: Sequence[ArmResults]) -> dict:
    """{arm: {task: {reason: count}}} of outputs that could not be read, over all seeds; {} for a task without any."""
    out: dict = {}
    for arm in arms:
        mine = out.setdefault(arm.arm, {})
        for row in (row for rows in arm.answers.values() for row in rows):
            counts = mine.setdefault(row["task"], {})
            if row["failure"]:
                counts[row["failure"]] = counts.get(row["failure"], 0) + 1
    return out


def _added(tasks: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in tasks.values():
        for reason, count in counts.items():
            total[reason] = total.get(reason, 0) + count
    return total


def _number(name: str, found: Interval) -> dict:
    return {name: round(found.value, 4), "ci95": found.ci95, "n": found.n}


def _change(found: Difference) -> dict:
    mcnemar = None if found.mcnemar_p is None else _p(found.mcnemar_p)
    return {
        "difference": round(found.value, 4),
        "ci95": found.ci95,
        "p": _p(found.p),
        "mcnemar_p": mcnemar,
        "real": found.real,
        "n": found.n,
    }


def _p(p: float) -> float:
    return float(f"{p:.3g}")


def table(summary: Mapping, tasks: Sequence[str]) -> str:
    """The printed table: one line per arm, with intervals; then the differences from the reference."""
    heads = ["arm", *(f"{task} accuracy" for task in tasks), "pointing"]
    rows = [
        [arm, *(_cell(entry.get(task), "accuracy") for task in tasks), _cell(entry.get("pointing"), "value")]
        for arm, entry in summary["arms"].items()
    ]
    seeds = summary["seeds"]
    if summary["paired"]["covers"] == "examples":
        note = (
            f"95% intervals over examples only (one seed: {seeds[0]})" if seeds else "95% intervals over examples only"
        )
    else:
        note = f"95% intervals over {len(seeds)} seeds and examples"
    lines = [*_lines([heads, *rows]), "; ".join([note, *exceptions(summary["paired"])])]
    reference = summary["paired"]["reference"]
    changes = summary["paired"]["arms"]
    if changes:
        heads = [f"minus {reference}", *tasks, "pointing"]
        rows = [[arm, *(_delta(entry.get(what)) for what in (*tasks, "pointing"))] for arm, entry in changes.items()]
        lines += ["", *_lines([heads, *rows]), "* the interval of the difference excludes zero"]
    return "\n".join(lines)


def _cell(entry: Mapping | None, name: str) -> str:
    if entry is None:
        return "-"
    lo, hi = entry["ci95"]
    return f"{entry[name]:.3f} [{lo:.3f}, {hi:.3f}] n={entry['n']}"


def _delta(entry: Mapping | None) -> str:
    if entry is None:
        return "-"
    lo, hi = entry["ci95"]
    p = f"p={entry['p']:.3f}" if entry["p"] >= 0.001 else "p<0.001"
    return f"{entry['difference']:+.3f} [{lo:+.3f}, {hi:+.3f}] {p} n={entry['n']}{' *' if entry['real'] else ''}"


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "-+-".join("-" * width for width in widths), *lines[1:]]
