"""The report stage: what an evaluation found, as one self-contained page and as pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.evaluate.compare import BASE
from pipeline.evaluate.status import BLIND
from pipeline.layout import Layout
from pipeline.report import status
from pipeline.report.repeat import commands

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.archive import Archive
    from pipeline.config import Config
    from pipeline.examples import Example
    from pipeline.report.gallery import Find, Shown


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
    from pipeline.report import facts, plots
    from pipeline.report.beside import published
    from pipeline.report.page import contents, render
    from pipeline.train.metrics import heldout, read

    summary = json.loads((layout.eval_dir / "summary.json").read_text(encoding="utf-8"))
    details = json.loads((layout.eval_dir / "details.json").read_text(encoding="utf-8"))
    jobs = [job for job in details["jobs"] if job["arm"]]
    trained = [(job["arm"], job["seed"]) for job in jobs if job["seed"] is not None]
    # A harness may have asked arms that were trained elsewhere.
    trained = [run for run in trained if not cfg.eval.suite or (layout.run_dir(*run) / "receipt.json").is_file()]
    library = _Library(cfg)
    shown = _shown(jobs, summary["paired"]["reference"], cfg.report.arms)
    pictures = _Pictures(cfg, layout, details, shown, library.find)
    rows = facts.runs(cfg, jobs)
    context = contents(
        cfg.report.title or f"{cfg.model.name} on {cfg.data.name}: does looking help?",
        summary,
        details,
        {f"{arm}-{seed}": read(layout.run_dir(arm, seed)) for arm, seed in trained},
        heldout={f"{arm}-{seed}": heldout(layout.run_dir(arm, seed)) for arm, seed in trained},
        gallery=pictures.cards(),
        gallery_note=pictures.note(),
        mistakes=pictures.mistakes(library.picture),
        facts=facts.groups(cfg, summary, details),
        runs=_table(rows, facts.RUN_HEADS) if rows else None,
        published=published(cfg, summary, details),
        commands=commands(cfg, [(arm, seed, _settings(layout, arm, seed)) for arm, seed in trained]),
    )
    out = {status.PAGE: render(context).encode()}
    out |= {f"{name}.png": plots.png(one["plan"]) for name, one in context["figures"].items()}
    if pictures.words:
        out["gallery.png"] = pictures.sheet()
    for name, data in out.items():
        receipts.write_file(layout.report_dir / name, data)
    return [layout.report_dir / name for name in out]


def _settings(layout: Layout, arm: str, seed: int) -> dict:
    return receipts.load(layout.run_dir(arm, seed) / "receipt.json").settings


def _table(rows: list[dict], heads: dict[str, str]) -> dict:
    """The columns that say something about any of the rows."""
    columns = [key for key in heads if any(row[key] for row in rows)]
    return {
        "heads": [heads[key] for key in columns],
        "rows": [{"arm": row["arm"], "cells": [row[key] for key in columns]} for row in rows],
    }


class _Library:
    """Examples of any split, by number or by the name of a question."""

    def __init__(self, cfg: Config):
        self._cfg, self._archives = cfg, {}

    def _archive(self, split: str) -> Archive:
        from pipeline.archive import Archive
        from pipeline.evaluate.status import examples_dir

        if split not in self._archives:
            self._archives[split] = Archive(examples_dir(self._cfg, split))
        return self._archives[split]

    def find(self, split: str, index: int) -> Example:
        return self._archive(split)[index]

    def picture(self, uid: str) -> Image.Image | None:
        """The image that a question (`<split>/<key>:<turn>`) is about; None if it has none that can be shown."""
        from pipeline.examples import ImageError, decode

        if self._cfg.eval.suite:  # a harness has its own data
            return None
        split, _, rest = uid.rpartition("/")
        key, archive = rest.partition(":")[0], self._archive(split)
        number = next((n for n, tar in enumerate(archive.shards) if tar.stem == key[:5]), None)  # the keys' own scheme
        shard = None if number is None else archive.shard(number)
        data = shard.image(shard.keys.index(key)) if shard and key in shard.keys else None
        try:
            return None if data is None or uid.endswith(BLIND) else decode(data)
        except ImageError:
            return None


class _Pictures:
    """The words of the gallery with their maps: those that were measured, or where nothing could be, read now."""

    def __init__(self, cfg: Config, layout: Layout, details: dict, shown: list[tuple[str, str]], find: Find):
        from pipeline.report import gallery

        self.arms = [gallery.Maps.read(arm, layout.eval_dir / name) for arm, name in shown]
        place = layout.eval_dir / f"teacher-{cfg.teacher.name}"
        self.teacher = gallery.Maps.read("teacher", place) if (place / "maps.npz").is_file() else None
        uids = gallery.choose(self.arms, details["point_task"], cfg.report.words, self.teacher)
        self.measured = bool(uids)
        if uids:
            self.words = gallery.measured(uids, self.arms, find)
        elif cfg.report.words and cfg.report.look and not cfg.eval.suite:
            self.words = self._look(cfg, layout, find, dict(shown))
        else:
            self.words = []

    def _look(self, cfg: Config, layout: Layout, find: Find, names: dict[str, str]) -> list[Shown]:
        from pipeline.evaluate import arms, stage
        from pipeline.report import gallery
        from pipeline.report.looks import StudentLooks, TeacherLooks, device_of

        _, asked, _ = stage.chosen(cfg)
        questions = {q.uid: q for found in asked.values() for q in found if not q.blind and q.gold.strip()}
        if not questions or not self.arms:
            return []
        device, runs = device_of(cfg), {run.name: run for run in arms.find(cfg)}
        read = {one.name: StudentLooks(cfg, runs[names[one.name]], device) for one in self.arms}
        if layout.maps_dir.is_dir():
            self.teacher = gallery.Maps("teacher")
            read["teacher"] = TeacherLooks(cfg, device)
        drawn = gallery.draw_by_name(questions, cfg.report.words)
        return gallery.look([questions[uid] for uid in drawn], find, self.teacher, self.arms, read)

    def cards(self) -> list[dict]:
        from pipeline.report import gallery

        return gallery.cards(self.words, self.teacher, self.arms)

    def sheet(self) -> bytes:
        from pipeline.report import gallery

        return gallery.sheet(self.words, self.teacher, self.arms)

    def mistakes(self, picture: Callable[[str], Image.Image | None]) -> dict | None:
        from pipeline.report import gallery

        return gallery.mistakes({one.name: one.answers for one in self.arms}, picture)

    def note(self) -> str:
        if not self.words:
            return ""
        drawn = f"{len(self.words)} words of right answers, drawn by a hash of their names and not picked. "
        students = "The students' maps are raw attention, mean over heads and layers."
        if self.measured:
            hit = "Bright is where the attention lies, the white line is the true region; a hit has its peak inside. "
            return f"{drawn}{hit}The change is that of the share inside the region, between two students. {students}"
        like = "The change is that of the correlation (r) with the teacher's map. " if self.teacher else ""
        bright = "Bright is where the attention lies; the true regions of these data are not known. "
        return drawn + bright + like + students


def _shown(jobs: list[dict], reference: str, count: int) -> list[tuple[str, str]]:
    """(arm, folder) of the students in the gallery: the base, the reference, then others with `lavender` last, at most
    ``count`` beside the base, each with its first seed."""
    first: dict[str, str] = {}
    for job in jobs:
        first.setdefault(job["arm"], job["name"])
    trained = sorted((arm for arm in first if arm != BASE), key=lambda arm: (arm != reference, arm != "lavender"))
    names = trained[:count]
    if "lavender" in names:
        names = [*(arm for arm in names if arm != "lavender"), "lavender"]
    return [(arm, first[arm]) for arm in ([BASE] if BASE in first else []) + names]
