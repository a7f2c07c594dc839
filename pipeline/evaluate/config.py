"""Settings of the evaluation."""

from dataclasses import dataclass, field

from pipeline.errors import UserError
from pipeline.evaluate.scoring import SCORERS

SUITES = ("", "lmms", "vlmevalkit")
POINT_UNITS = ("word", "phrase")


@dataclass
class Benchmark:
    """One published benchmark and what the paper reports for it.

    Args:
        lmms, vlmevalkit: what each harness calls it; empty where it does not have it.
        metric: the number that is reported.
        scale: what a share of 1 becomes in that number (100: per cent); 0 where it is no mean over answers.
        lmms_metrics: the same number from lmms-eval's metrics, each times a weight, where it is no mean over answers.
        base, sft, lavender: the published numbers; none where they are not known.
    """

    lmms: str = ""
    vlmevalkit: str = ""
    metric: str = "accuracy"
    scale: float = 100.0
    lmms_metrics: dict[str, float] = field(default_factory=dict)
    base: float | None = None
    sft: float | None = None
    lavender: float | None = None


@dataclass
class EvalConfig:
    """What is asked, of whom, and how. Settings marked * change the results and are recorded with them.

    Args:
        name: the name of this set of tasks.
        arms: arms to evaluate beside the base; empty takes every arm-seed with a finished run.
        seeds: seeds to evaluate; empty takes every seed found.
        students: further students, name -> directory of a model or of an adapter of this model.
        tasks: * task name -> splits it joins: of this data (`test`) or of another that has been sharded
            (`pope:random`); splits that are not there are left out.
        equal_parts: * take equally many questions from each split of a task; false takes all of each.
        blind: * tasks that are asked a second time without the image.
        limit: * questions per task, drawn by a fixed order over images; 0 asks all.
        exclude_kinds: * kinds of question that are not asked (a caption has no single right answer).
        scorers: * task -> the rule that scores all of its questions (exact, list, pope, choice, anls, vqa, cider); the
            kind of the question chooses where none is named.
        max_new_tokens: * longest answer generated.
        batch: * questions generated together; part of the result because floating point depends on it.
        point_task: * the task whose answers are used for pointing; empty for none.
        point_exclude_kinds: * kinds of question that are not used for pointing.
        point_unit: * what is measured: every `word` by itself, or the mean map of the words of a `phrase`.
        point_batch: * examples in one forward pass for pointing.
        val_split: * the split on which thresholds are chosen.
        teacher_limit: * images for the teacher's own pointing and mIoU; 0 takes all that have maps.
        reference: the arm that others are compared with.
        workers: processes at the same time, each on a device or thread share of its own; 0 chooses. With more of them
            than arms, an arm's questions are shared out.
        device: cpu, cuda or auto.
        summary: also write summary.json here.
        suite: who asks: empty for the tasks above, `lmms` for lmms-eval, `vlmevalkit` to read what VLMEvalKit wrote.
        harness_tasks: * the harness's names of the tasks.
        harness_path: a folder with further task files for lmms-eval, or the folder of VLMEvalKit's outputs.
        harness_python: the Python that has lmms-eval.
        benchmarks: published numbers, by benchmark, to stand beside ours.
    """

    name: str = "default"
    arms: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    students: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, list[str]] = field(default_factory=dict)  # conf/eval fills it: it would add to a default
    equal_parts: bool = True
    blind: list[str] = field(default_factory=list)
    limit: int = 1000
    exclude_kinds: list[str] = field(default_factory=lambda: ["caption"])
    scorers: dict[str, str] = field(default_factory=dict)
    max_new_tokens: int = 24
    batch: int = 128
    point_task: str = ""
    point_exclude_kinds: list[str] = field(default_factory=lambda: ["caption"])
    point_unit: str = "word"
    point_batch: int = 64
    val_split: str = "val"
    teacher_limit: int = 500
    reference: str = "sft"
    workers: int = 0
    device: str = "auto"
    summary: str = ""
    suite: str = ""
    harness_tasks: list[str] = field(default_factory=list)
    harness_path: str = ""
    harness_python: str = ".venv-lmms/bin/python"
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.point_batch < 1 or self.max_new_tokens < 1:
            raise UserError("eval.batch, eval.point_batch and eval.max_new_tokens must be at least 1")
        if self.limit < 0 or self.teacher_limit < 0 or self.workers < 0:
            raise UserError("eval.limit, eval.teacher_limit and eval.workers must be 0 or more")
        for key, value, known in (("suite", self.suite, SUITES), ("point_unit", self.point_unit, POINT_UNITS)):
            if value not in known:
                raise UserError(f"unknown eval.{key} '{value}': choose one of {', '.join(filter(None, known))}")
        home: dict[str, str] = {}
        for task, splits in self.tasks.items():
            for split in splits:
                if home.setdefault(split, task) != task:  # its answers would be counted for one of the two alone
                    raise UserError(
                        f"eval.tasks: split '{split}' is in '{home[split]}' and in '{task}': name it in one of them "
                        f"(eval.tasks.{home[split]}=[] empties that)"
                    )
        for task, scorer in self.scorers.items():
            if scorer not in SCORERS:
                raise UserError(f"eval.scorers.{task} is '{scorer}': choose one of {', '.join(SCORERS)}")
            if task not in self.tasks and not self.suite:
                raise UserError(f"eval.scorers names '{task}': choose from {', '.join(self.tasks)}")
        for key, named in (("point_task", [self.point_task] if self.point_task else []), ("blind", self.blind)):
            for task in named:
                if task not in self.tasks:
                    raise UserError(f"eval.{key} names '{task}': choose from {', '.join(self.tasks)}")
