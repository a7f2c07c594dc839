"""The arms of a comparison: which runs there are, what their results depend on, and how their students are loaded.

Nothing heavy is imported until a student is loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.evaluate.compare import BASE
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.student.load import Student


@dataclass(frozen=True)
class Run:
    """One arm-seed: where its trained weights are and where its results go.

    The base has no seed and no weights; a student from elsewhere has no seed.
    """

    arm: str
    seed: int | None
    weights: Path | None
    results: Path

    @property
    def name(self) -> str:
        return self.arm if self.seed is None else f"{self.arm}-{self.seed}"


def base_run(cfg: Config) -> Run:
    """The student as it was before training."""
    return Run(BASE, None, None, Layout(cfg).eval_dir / BASE)


def other_run(cfg: Config, name: str) -> Run:
    """A student that the settings name with its directory.

    Raises:
        UserError: there is no such directory.
    """
    path = Path(cfg.eval.students[name]).expanduser()
    if not path.is_dir():
        raise UserError(f"eval.students.{name}={path}: there is no such directory")
    return Run(name, None, path, Layout(cfg).eval_dir / name)


def trained_run(cfg: Config, arm: str, seed: int) -> Run:
    """An arm-seed, whether it has been trained or not."""
    layout = Layout(cfg)
    return Run(arm, seed, layout.run_dir(arm, seed), layout.eval_dir / f"{arm}-{seed}")


def find(cfg: Config) -> list[Run]:
    """The base and every arm-seed to evaluate: those that the settings name, or all that have a finished run.

    Raises:
        UserError: a run that the settings name is missing or unfinished.
    """
    layout = Layout(cfg)
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(layout.runs.glob("*-*/receipt.json")):
        match = re.fullmatch(r"(.+)-(\d+)", path.parent.name)
        if match:
            found[match[1], int(match[2])] = path
    arms = list(cfg.eval.arms) or sorted({arm for arm, _ in found}, key=rank)
    runs = [base_run(cfg)]
    for arm in arms:
        seeds = list(cfg.eval.seeds) or sorted(seed for name, seed in found if name == arm)
        missing = [seed for seed in seeds if (arm, seed) not in found]
        if arm != BASE and (missing or not seeds):
            raise UserError(
                f"no finished run of arm '{arm}'{f' with seed {missing[0]}' if missing else ''} in {layout.runs}: "
                f"train it first (make train ARM={arm}{f' SEED={missing[0]}' if missing else ''})"
            )
        runs += [trained_run(cfg, arm, seed) for seed in seeds if arm != BASE]
    taken = {run.arm for run in runs}
    for name in cfg.eval.students:
        if name in taken:
            raise UserError(f"eval.students.{name}: an arm has that name already, choose another")
    return runs + [other_run(cfg, name) for name in cfg.eval.students]


def rank(arm: str) -> tuple[int, str]:
    """Sorts arms: the usual two, the controls, then others by name."""
    order = ("sft", "lavender", "shuffled", "centre", "oracle")
    return (order.index(arm) if arm in order else len(order), arm)


def weights_digest(cfg: Config, run: Run) -> str:
    """Names the weights of a run: its receipt's digest, or for the base the content of the model's directory.

    Raises:
        UserError: the run's receipt is missing or damaged.
    """
    from pipeline.student.weights import identity
    from pipeline.weights import directory_digest

    if run.weights is None:
        return identity(cfg.model)
    if run.seed is None:
        return directory_digest(run.weights)
    return receipts.load(run.weights / "receipt.json").digest


def load(cfg: Config, run: Run, device: str) -> Student:
    """The student of a run on a device: the base, a fully trained copy (`model/`), or base and adapter (`adapter/`).

    Adapters are merged into the weights, so that every arm runs the same code at the same speed. All layers that look
    at the image are tapped, whatever an arm trained.

    Raises:
        Damaged: the run's files are not the ones that its receipt vouches for.
        UserError: no weights, or an adapter that does not fit the base.
    """
    from transformers.utils import logging

    from pipeline.align.config import AlignConfig
    from pipeline.student.load import load_student

    logging.disable_progress_bar()  # one of its own for every arm would tear the stage's apart
    if run.seed is not None:
        receipts.check(run.weights / "receipt.json")
    align = AlignConfig(rows=cfg.align.rows, max_words=0, words="all")
    folder = None if run.weights is None else _exported(run.weights)
    if folder is None:
        student = load_student(cfg.model, align)
    elif (folder / "adapter_config.json").is_file():
        student = load_student(cfg.model, align)
        student = replace(student, model=_merged(student.model, folder))
    else:
        # An absolute path, so that it cannot be taken for a hub id.
        student = load_student(replace(cfg.model, path=str(folder.resolve()), weights="published", size="full"), align)
    student.model.to(device).eval().requires_grad_(False)
    return student


def _exported(weights: Path) -> Path:
    """The directory with the model or the adapter: `model/` or `adapter/` of a run, or the directory itself."""
    for folder in (weights / "model", weights / "adapter", weights):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    raise UserError(f"{weights} has neither a model nor an adapter: delete it and train again, or give another")


def _merged(model, folder: Path):
    from peft import PeftModel
    from safetensors import safe_open

    wrapped = PeftModel.from_pretrained(model, folder)
    # PEFT only warns when weights of the file find no place; an arm would silently be half of itself.
    with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
        names = {re.sub(r"\.default(?=\.|$)", "", name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    placed = {re.sub(r"\.default(?=\.|$)", "", name) for name, _ in wrapped.named_parameters() if "lora_" in name}
    lost = sorted(name for name in names if "lora_" in name and name not in placed)
    if lost:
        raise UserError(f"{len(lost)} weights of {folder} do not fit the base model, the first is {lost[0]}")
    return wrapped.merge_and_unload()


def describe(cfg: Config) -> dict:
    """The model settings that every arm's results share."""
    kept = ("name", "path", "family", "revision", "dtype", "attention", "max_length")
    kept += ("max_pixels",) if cfg.model.max_pixels else ()
    return json.loads(json.dumps({key: getattr(cfg.model, key) for key in kept}))
