"""What decides an evaluation, and whether its receipts still hold. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.evaluate import arms, harness, scoring
from pipeline.evaluate.questions import BLIND
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config

RECEIPT = "receipt.json"
SUMMARY = "summary.json"
DETAILS = "details.json"
TEACHER = "teacher"


@dataclass(frozen=True)
class Job:
    """One cached piece of an evaluation: the results of a run (``arm``, ``seed``) or, without an arm, the teacher's."""

    arm: str
    seed: int | None

    @property
    def name(self) -> str:
        return TEACHER if not self.arm else self.arm if self.seed is None else f"{self.arm}-{self.seed}"


def examples_dir(cfg: Config, split: str) -> Path:
    """The folder of a split as `eval.tasks` names it: of this data (`test`) or of another (`pope:random`)."""
    data, _, name = split.rpartition(":")
    return Path(cfg.shards_dir) / data / "examples" / name if data else Layout(cfg).examples_dir(name)


def tasks(cfg: Config) -> dict[str, list[str]]:
    """Task name -> the splits of it that are there; tasks without any are left out.

    Raises:
        UserError: none of the splits is there.
    """
    if cfg.eval.suite:  # a harness brings its own examples: one name is both task and split
        named = harness.named(cfg.eval)
        if not named:
            raise UserError(f"eval.suite={cfg.eval.suite}: name the harness's tasks, as in TASKS=ai2d,mmmu_val")
        return {task: [task] for task in named}
    found = {
        task: [split for split in splits if (examples_dir(cfg, split) / "manifest.json").is_file()]
        for task, splits in cfg.eval.tasks.items()
    }
    kept = {task: splits for task, splits in found.items() if splits}
    if not kept:
        wanted = ", ".join(split for splits in cfg.eval.tasks.values() for split in splits)
        raise UserError(
            f"data '{cfg.data.name}' has none of the splits that eval.tasks names ({wanted}) in "
            f"{cfg.shards_dir}: run make shard for them, or name others in eval.tasks"
        )
    return kept


def task_names(cfg: Config) -> list[str]:
    """The tasks in order, those asked blind at the end."""
    found = list(tasks(cfg))
    return found + [f"{task}{BLIND}" for task in found if task in cfg.eval.blind]


def splits(cfg: Config) -> list[str]:
    """Every split that is read: those of the tasks and, where there is one, the split for choosing thresholds."""
    if cfg.eval.suite:
        return []
    named = [split for found in tasks(cfg).values() for split in found]
    val = cfg.eval.val_split
    if val and cfg.eval.point_task and (examples_dir(cfg, val) / "manifest.json").is_file():
        named.append(val)
    return sorted(set(named))


def decoding(cfg: Config) -> dict:
    """The settings that every answer records; arms that differ in one of them cannot be compared."""
    own = {"task_scorers": {task: scoring.VERSIONS[name] for task, name in cfg.eval.scorers.items()}}
    if cfg.eval.suite:
        asked = {"prompt": f"{cfg.eval.suite}'s own", "batch": cfg.eval.batch, "limit": cfg.eval.limit}
        if cfg.eval.suite == "vlmevalkit":  # what VLMEvalKit decoded with stands beside its outputs
            asked = {"prompt": "vlmevalkit's own"}
        return {**asked, "dtype": cfg.model.dtype, "model": cfg.model.name, **(own if cfg.eval.scorers else {})}
    return {
        "decoding": "greedy",
        "max_new_tokens": cfg.eval.max_new_tokens,
        "batch": cfg.eval.batch,
        "prompt": "chat template, one question alone",
        "scorers": [scoring.EXACT, scoring.LIST, scoring.YESNO, scoring.CHOICE],
        "dtype": cfg.model.dtype,
        "model": cfg.model.name,
        **(own if cfg.eval.scorers else {}),
    }


def settings(cfg: Config, job: Job) -> dict:
    """Every setting that changes the results of a job."""
    ev = cfg.eval
    shared = {
        "tasks": tasks(cfg),
        "equal_parts": ev.equal_parts,
        "blind": list(ev.blind),
        "limit": ev.limit,
        "exclude_kinds": list(ev.exclude_kinds),
        "point_task": ev.point_task,
        "point_exclude_kinds": list(ev.point_exclude_kinds),
        "val_split": ev.val_split,
        "pointing": scoring.POINTING,
        **({"point_unit": ev.point_unit} if ev.point_unit != "word" else {}),
    }
    if ev.suite:
        shared = {"suite": ev.suite, "tasks": tasks(cfg), "limit": ev.limit}
    if not job.arm:
        from dataclasses import asdict

        runtime = ("name", "revision", "local_files_only", "splits", "device")
        teacher = {key: value for key, value in asdict(cfg.teacher).items() if key not in runtime}
        return {**shared, "images": ev.teacher_limit, "teacher": teacher}
    return {
        **shared,
        "decoding": decoding(cfg),
        "model": arms.describe(cfg),
        "rows": cfg.align.rows,
        "point_batch": ev.point_batch,
    }


def inputs(cfg: Config, job: Job) -> dict[str, str]:
    """Digests of the examples and of the weights that a job reads.

    Raises:
        UserError: something is missing or damaged.
    """
    found = {split: receipts.load(examples_dir(cfg, split) / "manifest.json").digest for split in splits(cfg)}
    if cfg.eval.suite == "vlmevalkit":
        from pipeline.evaluate import vlmevalkit

        return vlmevalkit.inputs(cfg, job)
    if cfg.eval.suite and cfg.eval.harness_path:
        found["harness_path"] = harness.digest(Path(cfg.eval.harness_path).expanduser())
    if not job.arm:
        from pipeline.teacher.weights import digest, locate

        return {**found, "weights": digest(locate(cfg.teacher))}
    return {**found, "weights": arms.weights_digest(cfg, run_of(cfg, job))}


def run_of(cfg: Config, job: Job) -> arms.Run:
    """The run that a job evaluates."""
    if job.seed is not None:
        return arms.trained_run(cfg, job.arm, job.seed)
    return arms.other_run(cfg, job.arm) if job.arm in cfg.eval.students else arms.base_run(cfg)


def folder(cfg: Config, job: Job) -> Path:
    """Where the results of a job go."""
    return Layout(cfg).eval_dir / (f"{TEACHER}-{cfg.teacher.name}" if not job.arm else job.name)


def jobs(cfg: Config) -> list[Job]:
    """What the settings ask for: the base, every arm-seed, and the teacher if maps of it were made for this data."""
    if cfg.eval.suite == "vlmevalkit":
        from pipeline.evaluate import vlmevalkit

        return vlmevalkit.find(cfg)
    found = [Job(run.arm, run.seed) for run in arms.find(cfg)]
    teacher = cfg.eval.point_task and not cfg.eval.suite and Layout(cfg).maps_dir.is_dir()
    return [*found, Job("", None)] if teacher else found


def current(cfg: Config, job: Job) -> bool:
    """Whether a job's results can be used.

    Raises:
        Stale: they were made with other settings, weights or examples (unless `overwrite`).
    """
    path = folder(cfg, job) / RECEIPT
    return path.is_file() and receipts.is_current(path, settings(cfg, job), inputs(cfg, job), overwrite=cfg.overwrite)


def summary_settings(cfg: Config, found: list[Job]) -> tuple[dict, dict[str, str]]:
    """Settings and inputs of the summary: the jobs in order, their receipts, and how they are compared."""
    made = {job.name: receipts.load(folder(cfg, job) / RECEIPT).digest for job in found}
    return {
        "jobs": [job.name for job in found],
        "reference": cfg.eval.reference,
        "tasks": task_names(cfg),
        "point_task": cfg.eval.point_task,
    }, made


def up_to_date(cfg: Config) -> bool:
    """Whether the summary and everything it was made of are whole and made from what is there now.

    Raises:
        Stale: the results of an arm were made with other settings, weights or examples.
        UserError: a run that the settings name is missing.
    """
    path = Layout(cfg).eval_dir / RECEIPT
    found = jobs(cfg)
    if not path.is_file() or not all(current(cfg, job) for job in found):
        return False
    try:
        receipts.check(path, *summary_settings(cfg, found))
    except (receipts.Damaged, receipts.Stale):  # it is made of the arms' results in a second, so it is never refused
        return False
    return not cfg.eval.summary or Path(cfg.eval.summary).is_file()
