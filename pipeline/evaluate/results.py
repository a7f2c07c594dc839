"""Result files of an evaluation, read back and summarised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.evaluate import compare, harness, status
from pipeline.evaluate.answers import read_rows
from pipeline.evaluate.compare import ArmResults
from pipeline.evaluate.intervals import mean_interval
from pipeline.evaluate.pointing import THRESHOLDS
from pipeline.evaluate.status import Job

if TYPE_CHECKING:
    from pipeline.config import Config

VAL = "val"


def read_arms(cfg: Config, found: Sequence[Job]) -> list[ArmResults]:
    """Per-sample rows of the arms among the jobs, in order of first appearance."""
    arms: dict[str, ArmResults] = {}
    for job in found:
        if job.arm:
            folder = status.folder(cfg, job)
            mine = arms.setdefault(job.arm, ArmResults(job.arm))
            mine.answers[job.seed] = read_rows(folder / "per_sample.jsonl")
            mine.words[job.seed] = read_rows(folder / "pointing.jsonl")
    return list(arms.values())


def summarise(cfg: Config, found: Sequence[Job]) -> dict:
    """The content of summary.json."""
    tasks = status.task_names(cfg)
    out = compare.summarise(read_arms(cfg, found), tasks, cfg.eval.point_task, cfg.eval.reference)
    teacher = next((_grounding(_words(cfg, job), cfg.eval.point_task) for job in found if not job.arm), None)
    short = {"pointing": None, "miou": None, "chance": None}
    if teacher:
        intervals = {key: teacher[key]["ci95"] for key in short}
        short = {key: teacher[key]["value"] for key in short} | {"ci95": intervals, "n": teacher["pointing"]["n"]}
    return {"arms": out["arms"], "teacher": short, "seeds": out["seeds"], "seconds": _seconds(cfg, found)} | {
        "paired": out["paired"]
    }


def details(cfg: Config, found: Sequence[Job]) -> dict:
    """What the report shows besides: accuracy by kind, grounding of teacher and arms, failures, settings, counts."""
    arms = read_arms(cfg, found)
    tasks = status.task_names(cfg)
    grounding = {job.name: _grounding(_words(cfg, job), cfg.eval.point_task) for job in found}
    first = next(iter(arms[0].answers.values()))
    folders: dict[str, list[Path]] = {}
    for job in found:
        folders.setdefault(job.arm, []).append(status.folder(cfg, job))
    return {
        "model": cfg.model.name,
        "data": cfg.data.name,
        "teacher": cfg.teacher.name,
        "tasks": {task: status.tasks(cfg)[task.removesuffix(status.BLIND)] for task in tasks},
        "point_task": cfg.eval.point_task,
        "questions": {task: sum(row["task"] == task for row in first) for task in tasks},
        "images": {task: len({row["cluster"] for row in first if row["task"] == task}) for task in tasks},
        "by_kind": compare.by_group(arms, tasks),
        "yes_no": compare.yes_no(arms, tasks),
        "failures": compare.failures(arms),
        "failures_by_task": compare.failures_by_task(arms),
        "grounding": {name: value for name, value in grounding.items() if value},
        "jobs": [{"name": job.name, "arm": job.arm, "seed": job.seed} for job in found],
        "decoding": first[0]["settings"] if first else status.decoding(cfg),
        "harness": harness.joined(folders) if cfg.eval.suite else {},
        "versions": receipts.versions(),
    }


def _words(cfg: Config, job: Job) -> list[dict]:
    return read_rows(status.folder(cfg, job) / "pointing.jsonl")


def _grounding(rows: Sequence[dict], task: str) -> dict | None:
    """Pointing, mass inside, mIoU, and what chance ("chance", the same number for all three) and always looking at the
    middle ("centre", "centre_mass", "centre_miou") would have.

    The threshold of mIoU is the best one on `val`; without words there it is the best on the task itself, and says so.
    """
    mine = [row for row in rows if row["task"] == task]
    if not mine:
        return None
    val = [row for row in rows if row["task"] == VAL]
    scores = [sum(row["ious"][i] for row in val or mine) for i in range(len(THRESHOLDS))]
    best = scores.index(max(scores))
    clusters = [row["cluster"] for row in mine]

    def number(values: Sequence[float], among: Sequence[str] = clusters) -> dict:
        found = mean_interval(values, among)
        return {"value": round(found.value, 4), "ci95": found.ci95, "n": found.n}

    kinds = sorted({row["word_kind"] for row in mine if row["word_kind"]})
    return {
        "pointing": number([row["hit"] for row in mine]),
        "mass": number([row["mass"] for row in mine]),
        "miou": number([row["ious"][best] for row in mine]),
        "chance": number([row["area"] for row in mine]),
        "centre": number([row["centre"] for row in mine]),
        "centre_mass": number([row["centre_mass"] for row in mine]),
        "centre_miou": number([row["centre_iou"] for row in mine]),
        "threshold": THRESHOLDS[best],
        "threshold_from": "val" if val else f"{task} itself",
        "by_word": {
            kind: number(
                [row["hit"] for row in mine if row["word_kind"] == kind],
                [row["cluster"] for row in mine if row["word_kind"] == kind],
            )
            for kind in kinds
        },
    }


def _seconds(cfg: Config, found: Sequence[Job]) -> dict[str, float]:
    """Seconds that the runs and their evaluation took, from their receipts."""
    taken: dict[str, float] = {}
    for job in found:
        _add(taken, "eval", status.folder(cfg, job) / status.RECEIPT)
        if job.seed is not None and cfg.eval.suite != "vlmevalkit":  # whose arms may have been trained elsewhere
            _add(taken, "train", status.run_of(cfg, job).weights / "receipt.json")
    return {stage: round(seconds, 1) for stage, seconds in taken.items()}


def _add(taken: dict[str, float], stage: str, receipt: Path) -> None:
    taken[stage] = taken.get(stage, 0.0) + receipts.load(receipt).seconds
