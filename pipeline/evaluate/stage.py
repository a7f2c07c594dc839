"""The eval stage: every arm asked the same questions, then compared. Results are cached arm by arm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.evaluate import status
from pipeline.evaluate.shares import Ranks, Share
from pipeline.evaluate.status import Job
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.evaluate.attention import Looks
    from pipeline.evaluate.questions import Question

SILENT = lambda count: None  # noqa: E731 (a default for callbacks)


@dataclass(frozen=True)
class StageResult:
    """The summary, and how many arms (or the teacher) were evaluated now."""

    summary: dict
    written: int


def evaluate(cfg: Config) -> StageResult:
    """Evaluates what lacks a valid receipt, writes `runs/<model>/<data>/eval/summary.json` and prints the table.

    Raises:
        UserError: no such run, no such split, or results made with other settings.
    """
    layout = Layout(cfg)
    path = layout.eval_dir / status.SUMMARY
    if status.up_to_date(cfg):
        print(f"eval: up to date ({path})")
        return StageResult(json.loads(path.read_text()), 0)
    found = status.jobs(cfg)
    missing = [job for job in found if not status.current(cfg, job)]
    print(f"eval: {len(found) - len(missing)} of {len(found)} evaluated, {_names(missing) or 'none'} to do", flush=True)
    if cfg.dry_run:
        return StageResult({}, 0)
    ranks = Ranks.found()
    if ranks.size > 1 and missing:
        missing = ranks.together(lambda group: _over_ranks(cfg, missing, group))
        if ranks.rank:
            return StageResult({}, 0)
    began = time.monotonic()
    with receipts.hold(layout.eval_dir):
        if missing:
            _run(cfg, missing)
        summary, failures = _summarise(cfg, found, time.monotonic() - began)
    print(_printed(cfg, summary, failures))
    print(f"eval: {path}, {time.monotonic() - began:.1f} s")
    return StageResult(summary, len(missing))


def _names(found: Sequence[Job]) -> str:
    return ", ".join(job.name for job in found)


def evaluate_arm(
    cfg: Config, arm: str, seed: int | None = None, device: str = "", advance: Callable[[int], object] = SILENT
) -> Path:
    """Evaluates one arm-seed (the base without a seed) unless its results are there; returns their folder.

    Writes per_sample.jsonl, pointing.jsonl, maps.npz and receipt.json. Safe to call in a process of its own, beside
    others that evaluate other arms.

    Args:
        device: where to run; empty as `eval.device` says.
        advance: called with the number of questions finished.

    Raises:
        UserError: no such run, or its results were made with other settings.
    """
    return _work(cfg, Job(arm, seed), device, advance)


def evaluate_teacher(cfg: Config, device: str = "", advance: Callable[[int], object] = SILENT) -> Path:
    """Measures the teacher's maps at the words that the arms are measured at; cached like an arm's results."""
    return _work(cfg, Job("", None), device, advance)


def _work(cfg: Config, job: Job, device: str, advance: Callable[[int], object]) -> Path:
    folder = status.folder(cfg, job)
    if status.current(cfg, job):
        return folder
    began = time.monotonic()
    settings, inputs = status.settings(cfg, job), status.inputs(cfg, job)
    with receipts.hold(folder):
        (folder / status.RECEIPT).unlink(missing_ok=True)
        work = _teacher if not job.arm else _student
        files, counts = work(
            cfg, job, folder, receipts.fingerprint({**settings, **inputs}), _device(cfg, device), advance
        )
        receipts.write(
            folder / status.RECEIPT,
            stage="eval",
            settings=settings,
            inputs=inputs,
            files=files,
            counts=counts,
            seconds=time.monotonic() - began,
        )
        for part in folder.glob("*.part"):
            part.unlink()
    return folder


def _device(cfg: Config, device: str) -> str:
    name = device or cfg.eval.device
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen(cfg: Config) -> tuple[dict, dict[str, list[Question]], dict[str, list[Question]]]:
    """Archives by split, the questions of each task, and the questions whose answers' maps are measured.

    Raises:
        UserError: a task without a single question.
    """
    from pipeline.archive import Archive
    from pipeline.evaluate.questions import choose, read

    ev = cfg.eval
    archives = {split: Archive(status.examples_dir(cfg, split)) for split in status.splits(cfg)}
    asked, pointed = {}, {}
    for task, splits in status.tasks(cfg).items():
        asked[task] = choose(read(archives, splits, ev.exclude_kinds), ev.limit, ev.equal_parts)
        if not asked[task]:
            raise UserError(f"task '{task}' has no questions in {', '.join(splits)}: check eval.exclude_kinds")
    for task in [task for task in asked if task in ev.blind]:
        asked[f"{task}{status.BLIND}"] = [question.without_image() for question in asked[task]]
    for task, splits in ((ev.point_task, status.tasks(cfg).get(ev.point_task)), ("val", [ev.val_split])):
        if ev.point_task and splits and set(splits) <= archives.keys():
            pointed[task] = choose(read(archives, splits, ev.point_exclude_kinds), ev.limit, ev.equal_parts)
    return archives, asked, pointed


def _student(cfg: Config, job: Job, folder: Path, name: str, device: str, advance) -> tuple[list[Path], dict]:
    from pipeline.evaluate.answers import write_rows

    if cfg.eval.suite:
        return _harness(cfg, job, folder, name, device, advance)
    finished = _share(cfg, job, folder, name, device, advance, Share())
    rows, looks = finished
    write_rows(folder / "per_sample.jsonl", rows)
    files = [folder / "per_sample.jsonl", *looks.save(folder)]
    right = sum(row["correct"] is True for row in rows)
    return files, {"questions": len(rows), "correct": right, "words": len(looks.rows)}


def evaluate_share(
    cfg: Config, arm: str, seed: int | None, share: Share, device: str = "", advance: Callable[[int], object] = SILENT
) -> None:
    """Does a share of an arm's batches, for `evaluate_arm` to put together with the others."""
    job = Job(arm, seed)
    folder = status.folder(cfg, job)
    folder.mkdir(parents=True, exist_ok=True)
    name = receipts.fingerprint({**status.settings(cfg, job), **status.inputs(cfg, job)})
    _share(cfg, job, folder, name, _device(cfg, device), advance, share)


def _share(
    cfg: Config, job: Job, folder: Path, name: str, device: str, advance, share: Share
) -> tuple[list[dict], Looks]:
    """Rows and looks of a share; of everything where there is one share, which reads what several have finished."""
    from pipeline.evaluate import arms, shares
    from pipeline.evaluate.answers import answer
    from pipeline.evaluate.attention import ask, shared_looks

    archives, asked, pointed = chosen(cfg)
    ev, files = cfg.eval, shares.kept(folder, "answers", name)
    there = shares.finished_looks(folder, name) if share.of == 1 else None
    student = _Late(lambda: arms.load(cfg, status.run_of(cfg, job), device))
    rows = answer(
        student,
        archives,
        asked,
        status.decoding(cfg),
        share.file(folder, "answers", name),
        ev.batch,
        ev.max_new_tokens,
        advance,
        ev.scorers,
        share,
        files,
    )
    if there is None:
        there, numbers = shared_looks(student.get(), ask(archives, pointed, cfg.eval.point_unit), ev.point_batch, share)
        if share.of > 1:
            shares.save_looks(share.file(folder, "looks", name), there, numbers)
    return rows, there


class _Late:
    """A student that is loaded when something of it is first read: where everything is answered, never."""

    def __init__(self, load: Callable):
        self._load, self._loaded = load, None

    def get(self):
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def __getattr__(self, name: str):
        return getattr(self.get(), name)


def _over_ranks(cfg: Config, missing: Sequence[Job], ranks: Ranks) -> list[Job]:
    """Under torchrun: every process does a share of each arm. The first puts them together afterwards."""
    missing = ranks.told(list(missing))
    for job in missing:
        if job.arm and not cfg.eval.suite:
            evaluate_share(cfg, job.arm, job.seed, ranks.share, ranks.device(cfg.eval.device))
    ranks.wait()
    return missing


def _harness(cfg: Config, job: Job, folder: Path, name: str, device: str, advance) -> tuple[list[Path], dict]:
    from pipeline.evaluate import lmms, vlmevalkit

    if cfg.eval.suite == "vlmevalkit":
        return vlmevalkit.convert(cfg, job, folder)
    return lmms.evaluate(cfg, job, folder, folder / f"answers-{name[:12]}.part", device, advance)


def _teacher(cfg: Config, job: Job, folder: Path, name: str, device: str, advance) -> tuple[list[Path], dict]:
    from pipeline.evaluate.attention import ask, teacher_looks

    archives, _, pointed = chosen(cfg)
    looks = teacher_looks(cfg, ask(archives, pointed, cfg.eval.point_unit), device, advance)
    return looks.save(folder), {"words": len(looks.rows)}


def _run(cfg: Config, missing: Sequence[Job]) -> None:
    """Does the jobs, several at a time in processes of their own where that is faster."""
    from pipeline.evaluate.workers import run
    from pipeline.progress import Progress

    if cfg.eval.suite == "vlmevalkit":  # nothing is asked, files are read
        for job in missing:
            _work(cfg, job, "cpu", SILENT)
        return
    each = 0 if cfg.eval.suite else sum(map(len, chosen(cfg)[1].values()))  # nobody knows before a harness has begun
    with Progress("eval", each * sum(1 for job in missing if job.arm), "questions") as progress:
        run(cfg, missing, progress.advance)


def _summarise(cfg: Config, found: Sequence[Job], seconds: float) -> tuple[dict, dict]:
    """Writes summary and details; returns the summary and what could not be read."""
    from pipeline.evaluate.results import details, summarise

    layout = Layout(cfg)
    out = layout.eval_dir / status.SUMMARY
    summary, more = summarise(cfg, found), details(cfg, found)
    texts = {out: summary, layout.eval_dir / status.DETAILS: more}
    for path, content in texts.items():
        receipts.write_file(path, _json(content))
    settings, inputs = status.summary_settings(cfg, list(found))
    receipts.write(
        layout.eval_dir / status.RECEIPT,
        stage="eval",
        settings=settings,
        inputs=inputs,
        files=list(texts),
        counts={"arms": len(summary["arms"])},
        seconds=seconds,
    )
    if cfg.eval.summary:
        receipts.write_file(Path(cfg.eval.summary), _json(summary))
    return summary, more["failures"]


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _printed(cfg: Config, summary: dict, failures: dict) -> str:
    from pipeline.evaluate.compare import table

    text, teacher = table(summary, status.task_names(cfg)), summary["teacher"]
    if teacher["pointing"] is not None:
        numbers = (
            "{} {:.3f} [{:.3f}, {:.3f}]".format(name, teacher[key], *teacher["ci95"][key])
            for name, key in (("pointing", "pointing"), ("mIoU", "miou"), ("chance", "chance"))
        )
        text += f"\nteacher: {', '.join(numbers)} n={teacher['n']}"
    unread = [
        f"{arm} {', '.join(f'{n} {why}' for why, n in found.items())}" for arm, found in failures.items() if found
    ]
    if unread:
        text += f"\noutputs that could not be read, counted as wrong: {'; '.join(unread)}"
    return text
