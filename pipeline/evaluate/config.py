"""Settings of the evaluation."""

from dataclasses import dataclass, field

from pipeline.errors import UserError


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
        max_new_tokens: * longest answer generated.
        batch: * questions generated together; part of the result because floating point depends on it.
        point_task: * the task whose answers are used for pointing; empty for none.
        point_exclude_kinds: * kinds of question that are not used for pointing.
        point_batch: * examples in one forward pass for pointing.
        val_split: * the split on which thresholds are chosen.
        teacher_limit: * images for the teacher's own pointing and mIoU; 0 takes all that have maps.
        reference: the arm that others are compared with.
        workers: arms evaluated at the same time, each on a device or thread share of its own; 0 chooses.
        device: cpu, cuda or auto.
        summary: also write summary.json here.
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
    max_new_tokens: int = 24
    batch: int = 128
    point_task: str = ""
    point_exclude_kinds: list[str] = field(default_factory=lambda: ["caption"])
    point_batch: int = 64
    val_split: str = "val"
    teacher_limit: int = 500
    reference: str = "sft"
    workers: int = 0
    device: str = "auto"
    summary: str = ""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.point_batch < 1 or self.max_new_tokens < 1:
            raise UserError("eval.batch, eval.point_batch and eval.max_new_tokens must be at least 1")
        if self.limit < 0 or self.teacher_limit < 0 or self.workers < 0:
            raise UserError("eval.limit, eval.teacher_limit and eval.workers must be 0 or more")
        for key, named in (("point_task", [self.point_task] if self.point_task else []), ("blind", self.blind)):
            for task in named:
                if task not in self.tasks:
                    raise UserError(f"eval.{key} names '{task}': choose from {', '.join(self.tasks)}")
