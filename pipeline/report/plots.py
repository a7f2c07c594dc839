"""Figures of the report: drawn with matplotlib, as SVG in three widths for the page and as PNG beside it.

A figure on the page has the page's font and takes its colours from the page (`theme`), so that it is sharp at any size
and follows the reader's colour scheme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

from pipeline.report.theme import TOKENS, themed, token

# Name of a shape: its width in points, which is about what one unit measures on the page, in pixels.
SHAPES = {"wide": 1080, "middle": 640, "phone": 340}
INK, SOFT, LINE, PAPER = (TOKENS[name][0] for name in ("ink", "soft", "line", "paper"))

Paint = Callable[..., None]
# What draws a figure in a shape: shape -> (rows, columns, height in points, paint(axes)).
Plan = Callable[[str], tuple[int, int, float, Paint]]


def colour(arm: str, arms: Sequence[str]) -> str:
    """The colour of an arm."""
    return TOKENS[token(arm, arms)][0]


def svg(plan: Plan, shape: str, name: str) -> str:
    """The figure as an SVG element to put into a page.

    Args:
        name: keeps its identifiers apart from those of other figures; the element with id ``<name>-text`` describes it.
    """
    made = _draw(plan, shape, format="svg", transparent=True, metadata={"Date": None}).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", made[made.index("<svg") :], flags=re.DOTALL)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()
    head = f'<svg class="{shape}" viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-text">'
    text = re.sub(r"<svg [^>]*>", head, text, count=1)
    # The page's own font; identifiers only where they are referred to, and then unique on the page.
    text = re.sub(r"<style.*?</style>|font-family: [^;\"]*;? ?", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', text))
    text = re.sub(r' ?id="([\w.]+)"', lambda m: f' id="{name}-{shape}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#(\w+)', rf"\1#{name}-{shape}-\2", text).replace("xlink:href", "href")
    return themed(re.sub(r"<!--.*?-->|\s*\n\s*", " ", text))


def png(plan: Plan, shape: str = "wide") -> bytes:
    """The figure as a PNG, in the light colours."""
    return _draw(plan, shape, format="png", dpi=144, facecolor="#ffffff")


def _draw(plan: Plan, shape: str, **save) -> bytes:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = {"wide": 12.5, "middle": 12, "phone": 11}[shape]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": shape,  # the same figure has the same identifiers
        "font.family": "DejaVu Sans",
        "font.size": size,
        "axes.titlesize": size,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.labelsize": size - 1,
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.unicode_minus": True,
        "grid.color": LINE,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": LINE,
        "xtick.labelcolor": SOFT,
        "xtick.labelsize": size - 1.5,
        "ytick.color": LINE,
        "ytick.labelcolor": INK,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": size - 0.5,
        "lines.solid_capstyle": "round",
    }
    rows, columns, height, paint = plan(shape)
    with rc_context(style):
        figure = Figure(figsize=(SHAPES[shape] / 72, height / 72), dpi=72, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1, wspace=0.03, hspace=0.05)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in axes:
            panel.patch.set_alpha(0)
        paint(axes)
        out = io.BytesIO()
        figure.savefig(out, **save)
    return out.getvalue()


def _grid_of(panels: int, shape: str) -> tuple[int, int]:
    """Rows and columns for so many panels."""
    columns = min(panels, {"wide": 4, "middle": 2, "phone": 1}[shape])
    return -(-panels // columns), columns


# --- arms and their differences -------------------------------------------------------------------------------------


def results(summary: Mapping, tasks: Sequence[str]) -> Plan | None:
    """A point with its 95% interval for every arm: accuracy of each task, and pointing beside chance and teacher."""
    arms = list(summary["arms"])
    panels = [(task, f"{task}: accuracy", "accuracy") for task in tasks] + [("pointing", "pointing", "value")]
    panels = [p for p in panels if any(p[0] in entry for entry in summary["arms"].values())]
    teacher = summary.get("teacher") or {}
    if not panels:
        return None

    def plan(shape: str):
        rows, columns = _grid_of(len(panels), shape)

        def paint(axes) -> None:
            for number, (panel, (key, title, value)) in enumerate(zip(axes, panels, strict=False)):
                found = [(arm, summary["arms"][arm].get(key)) for arm in arms]
                _points(panel, [(arm, entry and entry[value], entry) for arm, entry in found], arms, signed=False)
                panel.set_title(title)
                if number % columns:
                    panel.tick_params(labelleft=False)
                if key == "pointing":
                    _reference(panel, teacher.get("chance"), "chance", SOFT)
                    _reference(panel, teacher.get("pointing"), "teacher", TOKENS["arm-teacher"][0])
            _blank(axes[len(panels) :])

        return rows, columns, rows * (64 + 30 * len(arms)), paint

    return plan


def changes(summary: Mapping, tasks: Sequence[str]) -> Plan | None:
    """Paired differences from the reference with 95% intervals; filled where the interval excludes zero.

    The base is left out beside trained arms: its distance from them would flatten the others.
    """
    paired = summary["paired"]
    named = list(paired["arms"])
    named = [arm for arm in named if arm != "base"] or named
    panels = [what for what in (*tasks, "pointing") if any(what in paired["arms"][arm] for arm in named)]
    if not panels:
        return None
    arms = list(summary["arms"])
    # One scale for all, so that differences can be compared by eye.
    known = [paired["arms"][arm][what]["ci95"] for arm in named for what in panels if what in paired["arms"][arm]]
    ends = min(0, *(lo for lo, _ in known)), max(0, *(hi for _, hi in known))

    def plan(shape: str):
        rows, columns = _grid_of(len(panels), shape)

        def paint(axes) -> None:
            for number, (panel, what) in enumerate(zip(axes, panels, strict=False)):
                found = [(arm, paired["arms"][arm].get(what)) for arm in named]
                rows = [(arm, entry and entry["difference"], entry) for arm, entry in found]
                _points(panel, rows, arms, signed=True, span=ends)
                panel.axvline(0, color=INK, linewidth=1, zorder=0.5)
                panel.set_title(f"{what}, minus {paired['reference']}")
                if number % columns:
                    panel.tick_params(labelleft=False)
            _blank(axes[len(panels) :])

        return rows, columns, rows * (64 + 30 * len(named)), paint

    return plan


def _points(
    panel,
    found: Sequence[tuple[str, float | None, Mapping | None]],
    arms: Sequence[str],
    signed: bool,
    span: tuple[float, float] | None = None,
) -> None:
    """One line for each arm: its name, its value as a point with the interval, and the number."""
    known = [entry for _, _, entry in found if entry]
    low, high = span or (min(entry["ci95"][0] for entry in known), max(entry["ci95"][1] for entry in known))
    if not signed and low < 0.35:
        low = 0
    width = max(high - low, 0.02)
    for place, (arm, value, entry) in enumerate(found):
        panel.axhline(place, color=LINE, linewidth=0.8, zorder=0)
        if entry is None:
            panel.annotate("not measured", (low, place), color=SOFT, va="center", ha="left", style="italic")
            continue
        tone = colour(arm, arms)
        panel.plot(entry["ci95"], (place, place), color=tone, linewidth=3.2, alpha=0.45)
        sure = not signed or entry["real"]
        panel.plot([value], [place], "o", color=tone, markersize=8, markeredgewidth=2, mfc=tone if sure else PAPER)
        text = f"{value:+.3f}".replace("-", "−") if signed else f"{value:.3f}"
        paper = {"facecolor": PAPER, "edgecolor": "none", "pad": 0.5}  # or the line at zero would cross it out
        panel.annotate(text, (value, place), (0, 7), textcoords="offset points", ha="center", va="bottom", bbox=paper)
    panel.set_yticks(range(len(found)), [arm for arm, _, _ in found])
    panel.set_ylim(len(found) - 0.4, -0.75)
    panel.set_xlim(low - 0.06 * width, high + 0.08 * width)
    panel.locator_params(axis="x", nbins=5)
    panel.tick_params(axis="x", length=3)


def _reference(panel, value: float | None, name: str, tone: str) -> None:
    """A dotted line at a value that is not an arm's, with its name at the foot."""
    if value is None:
        return
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, value - 0.03), max(high, value + 0.03))
    panel.axvline(value, color=tone, linewidth=1.4, linestyle=(0, (1, 2)), zorder=0.4)
    right = value > 0.6 * panel.get_xlim()[1]
    panel.annotate(
        f"{name} {value:.2f}",
        (value, 0),
        (-4 if right else 4, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=tone,
        ha="right" if right else "left",
        va="bottom",
        fontsize="small",
    )


def _blank(axes) -> None:
    for panel in axes:
        panel.set_axis_off()


# --- kinds of questions ---------------------------------------------------------------------------------------------


def kinds(by_kind: Mapping[str, Mapping], arms: Sequence[str], value: str = "accuracy") -> Plan:
    """Bars with intervals for each kind and arm; ``by_kind``: {panel: {kind: {arm: entry}}}."""
    titles = [title for title, found in by_kind.items() if found]
    shown = [arm for arm in arms if any(arm in entry for t in titles for entry in by_kind[t].values())]
    most = max(len(by_kind[title]) for title in titles)
    thick = 11 if len(shown) < 4 else 8

    def plan(shape: str):
        columns = min(len(titles), {"wide": 2, "middle": 2 if most <= 12 else 1, "phone": 1}[shape])
        rows = -(-len(titles) // columns)
        # Panels side by side show the same kinds in the same lines, so that the names are needed once.
        names = list(dict.fromkeys(kind for title in titles for kind in by_kind[title]))

        def paint(axes) -> None:
            from matplotlib.patches import Patch

            for number, (panel, title) in enumerate(zip(axes, titles, strict=False)):
                mine = names if columns > 1 else list(by_kind[title])
                step = 0.78 / len(shown)
                for place, kind in enumerate(mine):
                    for slot, arm in enumerate(shown):
                        entry = by_kind[title].get(kind, {}).get(arm)
                        if entry:
                            y, (lo, hi) = place - 0.39 + step * (slot + 0.5), entry["ci95"]
                            panel.barh(y, entry[value], step * 0.86, color=colour(arm, arms), alpha=0.88)
                            panel.plot((lo, hi), (y, y), color=INK, linewidth=1.1, alpha=0.75)
                panel.set_yticks(range(len(mine)), mine)
                if number % columns:
                    panel.tick_params(labelleft=False)
                panel.set_ylim(len(mine) - 0.5, -0.5)
                panel.set_xlim(0, 1)
                panel.grid(axis="x")
                panel.set_title(title)
            _blank(axes[len(titles) :])
            key = [Patch(color=colour(arm, arms), label=arm, alpha=0.88) for arm in shown]
            axes[0].figure.legend(
                handles=key, loc="outside upper left", ncols=4 if shape != "phone" else 3, handlelength=1
            )

        lines = most if columns == 1 else len(names)
        return rows, columns, rows * (56 + lines * (len(shown) * thick + 10)) + 34, paint

    return plan


# --- training -------------------------------------------------------------------------------------------------------


def training(curves: Mapping[str, Sequence[dict]], heldout: Mapping[str, Sequence[dict]] | None = None) -> Plan:
    """Language loss and alignment loss over steps; ``curves``: run name -> lines of metrics.jsonl.

    Dashed: the losses on ``heldout`` examples.

    With several seeds each is a thin line and their mean a strong one.
    """
    keys = (("ce", "language loss"), ("align", "alignment loss"))
    panels = [(key, title) for key, title in keys if any(row.get(key) for rows in curves.values() for row in rows)]
    runs: dict[str, dict[str, Sequence[dict]]] = {}
    for name, rows in curves.items():
        runs.setdefault(name.rpartition("-")[0] or name, {})[name] = rows
    arms = list(runs)

    def plan(shape: str):
        rows, columns = (1, len(panels)) if shape != "phone" else (len(panels), 1)

        def paint(axes) -> None:
            from matplotlib.lines import Line2D

            for panel, (key, title) in zip(axes, panels, strict=False):
                for arm, mine in runs.items():
                    tone = colour(arm, arms)
                    lines = [line for line in (_line(found, key) for found in mine.values()) if line]
                    for line in lines if len(lines) > 1 else ():
                        panel.plot(list(line), _smooth(list(line.values())), color=tone, linewidth=0.8, alpha=0.35)
                    steps = sorted(set.intersection(*map(set, lines))) if lines else []
                    mean = [sum(line[step] for line in lines) / len(lines) for step in steps]
                    if any(mean):
                        panel.plot(steps, _smooth(mean), color=tone, linewidth=2)
                    for name in mine:
                        if held := _line((heldout or {}).get(name, ()), key):
                            panel.plot(list(held), list(held.values()), "--", color=tone, linewidth=1.2)
                panel.set_title(title)
                panel.set_xlabel("step")
                panel.grid(axis="y")
                panel.set_ylim(bottom=0)
                panel.margins(x=0.01)
                panel.tick_params(axis="y", labelcolor=SOFT)
            key = [Line2D([], [], color=colour(arm, arms), label=arm, linewidth=2.5) for arm in arms]
            axes[0].figure.legend(
                handles=key, loc="outside upper left", ncols=4 if shape != "phone" else 3, handlelength=1.2
            )

        return rows, columns, rows * 250 + 34, paint

    return plan


def _line(rows: Sequence[dict], key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows if row.get(key) is not None}


def _smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Moving mean over about ``share`` of the curve, so that arms can be told apart in the noise of batches."""
    reach = max(0, round(len(values) * share / 2))
    parts = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]


# --- pictures in rows -----------------------------------------------------------------------------------------------


def sheet(heads: Sequence[str], rows: Sequence[tuple[str, Sequence]]) -> Plan:
    """Pictures in a table: ``rows`` of (label, one picture or None for each head)."""

    def plan(shape: str):
        def paint(axes) -> None:
            for place, (label, pictures) in enumerate(rows):
                mine = axes[place * len(heads) : (place + 1) * len(heads)]
                for panel, picture in zip(mine, pictures, strict=True):
                    if picture is not None:
                        panel.imshow(picture, interpolation="none")
                    panel.set_xticks([])
                    panel.set_yticks([])
                    panel.spines[:].set_visible(False)
                mine[0].set_ylabel(
                    label, rotation=0, ha="right", va="center", color=INK, fontweight="bold", labelpad=10
                )
                if place == 0:
                    for panel, head in zip(mine, heads, strict=True):
                        panel.set_title(head, loc="center", fontweight="normal", pad=6)

        side = (SHAPES[shape] - 110) / len(heads)
        return max(1, len(rows)), len(heads), max(1, len(rows)) * side + 30, paint

    return plan
