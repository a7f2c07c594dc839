"""Reads receipts; runs each stage up to the target that lacks a valid one. `make` calls it; it holds the order only.

    python -m stages.chain TARGET [name=value ...]
    python -m stages.chain demo --seeds 5 --arms sft,lavender,shuffled,oracle [name=value ...]

Nothing heavy is imported here: when everything is up to date, this one light process is all that runs.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from pipeline.config import Config, compose
from pipeline.engine import cores
from pipeline.errors import UserError
from pipeline.layout import Layout
from stages import jobs, results
from stages.cli import USER_ERROR, follow_parent, guarded
from stages.jobs import Job

STATUS = {  # stage -> the module whose `up_to_date(cfg)` reads its receipts
    "shard": "pipeline.archive.status",
    "precompute": "pipeline.teacher.status",
    "train": "pipeline.train.status",
    "eval": "pipeline.evaluate.status",
    "report": "pipeline.report.status",
}
STAGES = tuple(STATUS)
DEMO_DIR = "runs/demo"
BASE = "base"
COMPARED = ("sft", "lavender")  # what `eval`, `report` and `demo` train when no arms are named
CONTROLS = ("shuffled", "centre", "oracle")


@dataclass(frozen=True)
class Arm:
    """One arm to train: its settings, and the overrides that compose them but for the seed."""

    cfg: Config
    overrides: tuple[str, ...]

    @property
    def uses_maps(self) -> bool:
        """Whether it reads the teacher's maps; plain fine-tuning and the oracle do not."""
        return self.cfg.arm.lam > 0 and self.cfg.arm.targets in ("teacher", "shuffled")


@dataclass(frozen=True)
class Plan:
    """What a target needs: the stages in order, and the arms and seeds to train."""

    target: str
    cfg: Config
    overrides: tuple[str, ...]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]

    @property
    def stages(self) -> tuple[str, ...]:
        last = STAGES.index("report" if self.target == "demo" else self.target)
        needed = STAGES[: last + 1]
        if self.target in ("eval", "report") and not self.arms:  # nothing to train; a harness brings its own examples
            unneeded = ("train", "precompute", *(["shard"] if self.cfg.eval.suite else []))
            return tuple(stage for stage in needed if stage not in unneeded)
        if self.target == "train" and not any(arm.uses_maps for arm in self.arms.values()):
            return tuple(stage for stage in needed if stage != "precompute")
        return needed

    def steps(self, stage: str) -> list[tuple[Config, Job]]:
        """The settings and the process of every piece of work of a stage."""
        if stage != "train":
            return [(self.cfg, Job(stage, stage, self.overrides))]
        return [
            (replace(arm.cfg, seed=seed), Job(stage, f"{name}-{seed}", (*arm.overrides, f"seed={seed}")))
            for seed in self.seeds
            for name, arm in self.arms.items()
        ]


def plan(
    target: str,
    overrides: Sequence[str],
    seeds: int | None = None,
    arms: Sequence[str] | None = None,
    controls: bool = False,
    students: Mapping[str, str] | None = None,
) -> Plan:
    """Composes the settings of a target.

    Args:
        seeds: train seeds 1 to this number; None takes `seed` alone.
        arms: names in `conf/arm`; None takes the arm of the settings for `train`, else `eval.arms` or the usual two.
        controls: the controls as well; `oracle` where the data knows regions.
        students: name -> directory of further models or adapters to evaluate; without `arms` these and the base alone.
    """
    overrides = [override for override in overrides if override]
    if target == "demo":
        overrides = [f"runs_dir={DEMO_DIR}", *overrides]
    cfg = compose(overrides)
    if target == "train":
        return Plan(target, cfg, tuple(overrides), {cfg.arm.name: Arm(cfg, tuple(overrides))}, (cfg.seed,))
    alone = (students or cfg.eval.suite == "vlmevalkit") and not controls
    names = [name for name in arms or cfg.eval.arms or (() if alone else COMPARED) if name != BASE]
    if controls:
        names += [name for name in CONTROLS if name not in names and (name != "oracle" or _has_regions(cfg))]
    numbers = tuple(range(1, seeds + 1)) if seeds else tuple(cfg.eval.seeds) or (cfg.seed,)
    overrides += [f"+eval.students.{name}={path}" for name, path in (students or {}).items()]
    if target != "demo" and (arms or students):
        overrides.append(f"eval.arms=[{','.join(names or [BASE])}]")
        cfg = compose(overrides)
    if target == "demo":
        # named, so that arms of an earlier and larger demo stay out of this table
        overrides += [f"eval.arms=[{','.join(names)}]", f"eval.seeds=[{','.join(map(str, numbers))}]"]
        cfg = compose(overrides)
    return Plan(target, cfg, tuple(overrides), {name: _arm(name, overrides) for name in names}, numbers)


def _has_regions(cfg: Config) -> bool:
    return cfg.data.kind == "world"


def _arm(name: str, overrides: Sequence[str]) -> Arm:
    """The settings of an arm. `arm.lam=2` and the like change every arm that aligns and leave plain fine-tuning be."""
    shared = [o for o in overrides if o.partition("=")[0] not in ("arm", "seed") and not o.startswith("arm.")]
    plain = (*shared, f"arm={name}")
    changed = (*plain, *(o for o in overrides if o.startswith("arm.")))
    cfg = compose(plain)
    if cfg.arm.lam == 0 or changed == plain:
        return Arm(cfg, plain)
    return Arm(compose(changed), changed)


def walk(work: Plan) -> int:
    """Runs what is missing, in order. Returns 0 or the exit code of the stage that failed."""
    clock = results.Seconds(Path(work.cfg.runs_dir) / "seconds.json")
    ran: set[str] = set()
    checked = False
    for stage in work.stages:
        up_to_date = import_module(STATUS[stage]).up_to_date
        steps = work.steps(stage)
        missing = [_started(cfg, job) for cfg, job in steps if not up_to_date(cfg)]
        if not missing:
            print(f"{stage}: up to date", flush=True)
            continue
        if not checked:
            _check_models(work)
            checked = True
        start = time.monotonic()
        width, threads = side_by_side(len(steps))
        code = None
        try:
            code = jobs.run(missing, width, threads)
        finally:
            if not work.cfg.dry_run and code != USER_ERROR:  # what is refused leaves nothing behind
                clock.add(stage, time.monotonic() - start)
        if code or work.cfg.dry_run:
            return code
        ran.add(stage)
    if work.target in ("demo", "eval", "report"):
        _tell(work, clock, ran)
    return 0


def _check_models(work: Plan) -> None:
    """Before the first stage that runs: a model that a later one cannot load is refused now, not hours later.

    Raises:
        UserError: as `check` of the teacher's and of the student's weights.
    """
    if "precompute" in work.stages:
        import_module("pipeline.teacher.weights").check(work.cfg.teacher)
    if "train" in work.stages:
        import_module("pipeline.student.weights").check(work.cfg.model)


def _started(cfg: Config, job: Job) -> Job:
    """The job as its settings want it started: training may take several processes."""
    if job.stage != "train":
        return job
    from pipeline.train import launch

    return replace(job, launcher=tuple(launch.command(cfg, job.overrides)), grace=launch.GRACE)


def _tell(work: Plan, clock: results.Seconds, ran: set[str]) -> None:
    """The result table and where the page is, unless the stages that have just run told it.

    The demo also keeps its summary, with the seconds of each stage, under a fixed name.
    """
    from pipeline.evaluate.compare import table

    summary = results.summary(Layout(work.cfg).eval_dir / "summary.json", clock)
    if work.target == "demo":
        results.keep(summary, Path(work.cfg.runs_dir) / "summary.json")
    if "eval" not in ran:
        tasks = list(dict.fromkeys(what for arm in summary["arms"].values() for what in arm if what != "pointing"))
        print(table(summary, tasks))
    if "report" in set(work.stages) - ran:
        print(f"report: {Layout(work.cfg).report_dir / 'index.html'}")
    print(f"seconds: {clock}")


def side_by_side(steps: int) -> tuple[int, int]:
    """How many processes at once, and threads for each (0: their own choice).

    One thread each, decided by the steps planned and not by those still missing: a run that is resumed alone keeps its
    thread count, and so its sums. On a GPU the runs would share the device, so they go one after another.
    """
    if steps < 2 or cores() < 2 or Path("/dev/nvidia0").exists():
        return 1, 0
    return min(steps, cores()), 1


def main(argv: Sequence[str] | None = None) -> int:
    if "MAKELEVEL" in os.environ:
        follow_parent()
    return guarded(lambda: _command(argv))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


def _command(argv: Sequence[str] | None) -> int:
    parser = _Parser(prog="stages.chain", description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=(*STAGES, "demo"))
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="Hydra overrides")
    parser.add_argument("--seeds", help="train seeds 1..N")
    parser.add_argument("--arms", help="names in conf/arm, with commas between")
    parser.add_argument("--controls", action="store_true", help="the control arms as well")
    parser.add_argument("--students", help="NAME=DIRECTORY of models or adapters to evaluate, with commas between")
    args = parser.parse_intermixed_args(argv)
    seeds, arms, students = _count(args.seeds), _names(args.arms), _directories(args.students)
    return walk(plan(args.target, args.overrides, seeds, arms, args.controls, students))


def _directories(text: str | None) -> dict[str, str]:
    pairs = [pair.strip().partition("=") for pair in (text or "").split(",") if pair.strip()]
    for name, _, path in pairs:
        if not name.isidentifier() or not path:
            raise UserError(f"STUDENTS={text}: give name=directory with commas between; names of letters, digits and _")
    return {name: path for name, _, path in pairs}


def _names(arms: str | None) -> list[str] | None:
    if arms is None:
        return None
    names = [name.strip() for name in arms.split(",") if name.strip()]
    if not names:
        raise UserError(f"ARMS={arms}: give names of conf/arm with commas between, as in sft,lavender")
    return names


def _count(seeds: str | None) -> int | None:
    if seeds is None:
        return None
    if not seeds.isdecimal() or int(seeds) < 1:
        raise UserError(f"SEEDS={seeds}: give a whole number from 1 on")
    return int(seeds)


if __name__ == "__main__":
    sys.exit(main())
