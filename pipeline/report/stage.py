"""The report stage: what an evaluation found, as one self-contained page and as pictures."""

from __future__ import annotations

import base64
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.layout import Layout
from pipeline.report import status

if TYPE_CHECKING:
    from pipeline.config import Config


@dataclass(frozen=True)
class StageResult:
    """The page, and how many files were written now."""

    page: Path
    written: int


def report(cfg: Config) -> StageResult:
    """Writes `runs/<model>/<data>/report/`: `index.html` and the figures as PNG.

    Raises:
        UserError: nothing is evaluated yet.
    """
    layout = Layout(cfg)
    page = layout.report_dir / status.PAGE
    if status.up_to_date(cfg):
        print(f"report: up to date ({page})")
        return StageResult(page, 0)
    inputs = status.inputs(cfg)
    if cfg.dry_run:
        print(f"report: would write {page}")
        return StageResult(page, 0)
    began = time.monotonic()
    with receipts.hold(layout.report_dir):
        written = _write(cfg, layout)
        receipts.write(
            layout.report_dir / status.RECEIPT,
            stage="report",
            settings=status.settings(cfg),
            inputs=inputs,
            files=written,
            counts={"files": len(written)},
            seconds=time.monotonic() - began,
        )
    print(f"report: {page} ({page.stat().st_size / 1e6:.1f} MB), {time.monotonic() - began:.1f} s")
    return StageResult(page, len(written))


def _write(cfg: Config, layout: Layout) -> list[Path]:
    from pipeline.archive import Archive
    from pipeline.evaluate.answers import read_rows
    from pipeline.report import gallery
    from pipeline.report.page import contents, render
    from pipeline.report.plots import Look

    summary = json.loads((layout.eval_dir / "summary.json").read_text(encoding="utf-8"))
    details = json.loads((layout.eval_dir / "details.json").read_text(encoding="utf-8"))
    jobs = [job for job in details["jobs"] if job["arm"]]
    curves = {
        job["name"]: read_rows(layout.run_dir(job["arm"], job["seed"]) / "metrics.jsonl")
        for job in jobs
        if job["seed"] is not None
    }
    archives: dict[str, Archive] = {}

    def example(split: str, index: int):
        if split not in archives:
            archives[split] = Archive(layout.examples_dir(split))
        return archives[split][index]

    shown = _shown(jobs, summary["paired"]["reference"], cfg.report.arms)
    maps = [gallery.Maps.read(arm, layout.eval_dir / name) for arm, name in shown]
    place = layout.eval_dir / f"teacher-{cfg.teacher.name}"
    teacher = gallery.Maps.read("teacher", place) if (place / "maps.npz").is_file() else None
    uids = gallery.choose(maps, details["point_task"], cfg.report.words, teacher)
    context = contents(
        cfg.report.title or f"{cfg.model.name} on {cfg.data.name}: does looking help?",
        summary,
        details,
        curves,
        gallery.cards(uids, teacher, maps, example),
        _note(maps, len(uids)),
        gallery.mistakes({one.name: one.answers for one in maps}),
        commands(cfg, summary),
    )
    figures = context["figures"]
    out = {status.PAGE: render(context).encode()}
    out |= {
        f"{name}.png": base64.b64decode(one["pictures"][Look().name].partition(",")[2]) for name, one in figures.items()
    }
    if uids:
        out["gallery.png"] = gallery.sheet(uids, teacher, maps, example)
    for name, data in out.items():
        receipts.write_file(layout.report_dir / name, data)
    return [layout.report_dir / name for name in out]


def _shown(jobs: list[dict], reference: str, count: int) -> list[tuple[str, str]]:
    """(arm, folder) of the arms in the gallery: the reference first, `lavender` last, each with its first seed."""
    first: dict[str, str] = {}
    for job in jobs:
        first.setdefault(job["arm"], job["name"])
    trained = [arm for arm in first if arm != "base"]
    rest = sorted((arm for arm in trained if arm != reference), key=lambda arm: arm != "lavender")[: max(0, count - 1)]
    names = ([reference] if reference in first and (reference != "base" or not rest) else []) + rest[::-1]
    if len(names) < count and "base" in first and "base" not in names:
        names.insert(0, "base")
    return [(arm, first[arm]) for arm in names]


def _note(maps: list, words: int) -> str:
    if not maps:
        return ""
    return (
        f"{words} words of right answers, drawn at random. Bright is where the attention lies, the white line is the "
        "true region; a hit has its brightest point inside. Gain and loss: change of the share inside from "
        f"{maps[0].name} to {maps[-1].name}. The students' maps are raw attention, mean over heads and layers."
    )


def commands(cfg: Config, summary: dict) -> str:
    """What to type to get this page again."""
    arms = [arm for arm in summary["arms"] if arm != "base" and arm not in cfg.eval.students]
    if Path(cfg.runs_dir) == Path("runs/demo"):
        return f"make demo SEEDS={len(summary['seeds'])} ARMS={','.join(arms)}"
    named = [("DATA", cfg.data.name), ("MODEL", cfg.model.name), ("TEACHER", cfg.teacher.name)]
    own = [f"{key}={value}" for key, value in (("shards_dir", cfg.shards_dir), ("runs_dir", cfg.runs_dir))]
    args = [text for text in own if text not in ("shards_dir=shards", "runs_dir=runs")]
    choices = " ".join([*(f"{key}={name}" for key, name in named), *([f'ARGS="{" ".join(args)}"'] if args else [])])
    lines = [f"make train {choices} ARM={arm} SEED={seed}" for arm in arms for seed in summary["seeds"]]
    return "\n".join([*lines, f"make eval {choices}", f"make report {choices}"])
