"""Figures of the report, each in a light and a dark look and in a wide and a narrow shape."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Okabe and Ito's palette, which stays distinct without full colour vision; (light look, dark look) for each arm.
COLOURS = {
    "base": ("#6e6e6e", "#a8a8a8"),
    "sft": ("#0072b2", "#56b4e9"),
    "lavender": ("#8e3fa8", "#d79bea"),
    "shuffled": ("#d55e00", "#f0934e"),
    "oracle": ("#007a5a", "#3fc8a0"),
    "centre": ("#8a7400", "#e8d24a"),
}
SPARE = (("#444444", "#cccccc"), ("#a3195b", "#ff8fc0"), ("#3b5b00", "#a6d854"), ("#5b3b00", "#d9a066"))
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++")


@dataclass(frozen=True)
class Look:
    """How a figure is drawn: ``dark`` ink on light or the reverse, ``narrow`` for phones."""

    dark: bool = False
    narrow: bool = False

    @property
    def ink(self) -> str:
        return "#e8e6ef" if self.dark else "#1f1b2e"

    @property
    def paper(self) -> str:
        return "#1b1824" if self.dark else "#ffffff"

    @property
    def name(self) -> str:
        return f"{'dark' if self.dark else 'light'}-{'narrow' if self.narrow else 'wide'}"

    def colour(self, arm: str, arms: Sequence[str]) -> str:
        spare = [name for name in arms if name not in COLOURS]
        return (COLOURS[arm] if arm in COLOURS else SPARE[spare.index(arm) % len(SPARE)])[self.dark]


LOOKS = tuple(Look(dark, narrow) for narrow in (False, True) for dark in (False, True))


def draw(paint: Callable, look: Look, rows: int = 1, columns: int = 1, height: float = 3.2) -> bytes:
    """PNG bytes of a figure of panels; ``paint(axes, look)`` fills them. In the narrow shape panels are stacked."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.25,
        "hatch.linewidth": 0.6,
        "font.family": "DejaVu Sans",
    }
    for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"):
        style[key] = look.ink
    with rc_context(style):
        if look.narrow:
            rows, columns = rows * columns, 1
        size = (3.6, 0.85 * height * rows) if look.narrow else (9.0, height * rows)
        figure = Figure(figsize=size, dpi=160, facecolor=look.paper, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel in axes:
            panel.set_facecolor(look.paper)
        paint(axes, look)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


def results(summary: Mapping, tasks: Sequence[str], look: Look) -> bytes:
    """Accuracy per task and pointing, one bar with its interval for each arm."""
    arms = list(summary["arms"])
    panels = [(task, f"{task} accuracy", "accuracy") for task in tasks] + [("pointing", "pointing", "value")]
    panels = [p for p in panels if any(p[0] in entry for entry in summary["arms"].values())]
    chance = (summary.get("teacher") or {}).get("chance")

    def paint(axes, look):
        for panel, (key, title, value) in zip(axes, panels, strict=False):
            _bars(panel, arms, {arm: summary["arms"][arm].get(key) for arm in arms}, value, arms, look)
            panel.set_title(title, fontsize=10)
            if key == "pointing" and chance is not None:
                panel.axhline(chance, color=look.ink, linestyle=":", linewidth=1)
                panel.annotate("chance", (1, chance), (0, 2), ("axes fraction", "data"), "offset points", ha="right")

    return draw(paint, look, 1, max(1, len(panels)))


def _bars(panel, names: Sequence[str], entries: Mapping, value: str, arms: Sequence[str], look: Look) -> None:
    for place, name in enumerate(names):
        entry = entries[name]
        if not entry:
            continue
        height, (lo, hi) = entry[value], entry["ci95"]
        panel.bar(place, height, color=look.colour(name, arms), width=0.7)
        panel.errorbar(place, height, [[max(0, height - lo)], [max(0, hi - height)]], color=look.ink, capsize=3)
        panel.annotate(f"{height:.2f}", (place, hi), (0, 3), "data", "offset points", ha="center", fontsize=8)
    panel.set_xticks(range(len(names)), names, rotation=0 if len(names) < 5 else 30)
    panel.set_ylim(0, 1.08)
    panel.grid(axis="x", visible=False)


def kinds(by_kind: Mapping, arms: Sequence[str], look: Look) -> bytes:
    """Accuracy by kind of question: a panel per task, a group of bars per kind, a bar per arm."""
    tasks = [task for task in by_kind if by_kind[task]]

    def paint(axes, look):
        for panel, task in zip(axes, tasks, strict=True):
            width = 0.8 / len(arms)
            names = list(by_kind[task])
            for slot, arm in enumerate(arms):
                for place, kind in enumerate(names):
                    entry = by_kind[task][kind].get(arm)
                    if not entry:
                        continue
                    height, (lo, hi) = entry["accuracy"], entry["ci95"]
                    x = place - 0.4 + width * (slot + 0.5)
                    label = arm if place == 0 else None
                    panel.bar(
                        x,
                        height,
                        width * 0.92,
                        color=look.colour(arm, arms),
                        label=label,
                        hatch=HATCHES[slot % len(HATCHES)],
                        edgecolor=look.paper,
                        linewidth=0,
                    )
                    panel.errorbar(x, height, [[max(0, height - lo)], [max(0, hi - height)]], color=look.ink, lw=0.9)
            panel.set_xticks(range(len(names)), names, rotation=25 if look.narrow else 0)
            panel.set_title(f"{task} accuracy by kind of question", fontsize=10)
            panel.set_ylim(0, 1.05)
            panel.grid(axis="x", visible=False)
            panel.legend(frameon=False, ncols=len(arms) if len(arms) < 4 else 3, fontsize=8, loc="upper right")

    return draw(paint, look, max(1, len(tasks)), 1, height=2.8)


def training(curves: Mapping[str, Sequence[dict]], look: Look) -> bytes:
    """Language loss and alignment loss over steps; ``curves``: run name -> lines of metrics.jsonl."""
    panels = [
        (key, title) for key, title in (("ce", "language loss"), ("align", "alignment loss")) if _has(curves, key)
    ]
    arms = sorted({name.rpartition("-")[0] for name in curves})

    def paint(axes, look):
        for panel, (key, title) in zip(axes, panels, strict=False):
            named = set()
            for name, rows in curves.items():
                steps = [row["step"] for row in rows if row.get(key) is not None]
                values = _smooth([row[key] for row in rows if row.get(key) is not None])
                arm = name.rpartition("-")[0]
                label = arm if arm not in named else None
                style = ("-", "--", "-.", ":")[arms.index(arm) % 4]
                if steps:
                    panel.plot(steps, values, style, color=look.colour(arm, arms), label=label, linewidth=1.4)
                    named.add(arm)
            panel.set_title(title, fontsize=10)
            panel.set_xlabel("step")
            if named:
                panel.legend(frameon=False, fontsize=8)

    return draw(paint, look, 1, max(1, len(panels)))


def _has(curves: Mapping[str, Sequence[dict]], key: str) -> bool:
    return any(row.get(key) for rows in curves.values() for row in rows)


def _smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Moving mean over about ``share`` of the curve, so that arms can be told apart in the noise of batches."""
    reach = max(0, round(len(values) * share / 2))
    parts = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(part) / len(part) for part in parts]
