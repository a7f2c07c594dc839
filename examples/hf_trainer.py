"""Attention alignment in a plain `Trainer` of transformers: three lines of it, marked below.

    make shard precompute
    python examples/hf_trainer.py [MODEL=bundled:student] [DATA=world] [TARGETS=teacher] [STEPS=20] [OUT=DIRECTORY]

MODEL is any student of this package, a directory or a hub id; TARGETS is `teacher`, or `oracle` where regions are
known.
"""

import sys

import torch
from transformers import Trainer, TrainingArguments

from pipeline.align.config import AlignConfig
from pipeline.align.loss import AlignmentLoss
from pipeline.archive import Archive
from pipeline.config import compose
from pipeline.layout import Layout
from pipeline.mapstore import MapStore
from pipeline.student.batch import StudentBatch
from pipeline.student.capture import AttentionTap
from pipeline.student.config import ModelConfig
from pipeline.student.load import Student, load_student
from pipeline.train.targets import open_targets


class AlignedTrainer(Trainer):
    """A Trainer whose loss has the alignment in it.

    Args:
        student: what `load_student` gives.
        lam: weight of the alignment loss.
        options: those of `Trainer`; the data set's items are triples of an encoded example (`Family.encode_one`), its
            words' maps (W, 32, 32) in [0, 1] and which of them are usable, (W,) bool.
    """

    def __init__(self, student: Student, lam: float = 5.0, **options):
        self.family = student.family
        self.tap = AttentionTap(student.model, student.family)  # 1
        self.align = AlignmentLoss.for_tap(self.tap, AlignConfig(), weight=lam)  # 2
        super().__init__(model=student.model, data_collator=self.collate, **options)
        self.align.to(self.args.device)

    def collate(self, items: list[tuple]) -> dict[str, StudentBatch]:
        """Encoded examples and their maps as one batch."""
        batch = self.family.collate([item for item, _, _ in items])
        batch.targets = torch.cat([maps for _, maps, _ in items])
        batch.valid = torch.cat([valid for _, _, valid in items])
        return {"batch": batch}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["batch"].to(self.args.device)
        outputs = model(**batch.inputs, labels=batch.labels, use_cache=False)
        loss = outputs.loss + self.align(self.tap, batch)  # 3
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args, **kwargs):
        """The Trainer's own, with the Aligner's weights beside the model's."""
        made = super().create_optimizer(*args, **kwargs)
        mine = [p for p in self.align.parameters() if all(p is not q for g in made.param_groups for q in g["params"])]
        if mine:
            made.add_param_group({"params": mine})
        return made


def rows(student: Student, data: str, kind: str, count: int) -> list[tuple]:
    """The first examples of a data set's training split, encoded, with their words' maps."""
    cfg = compose([f"data={data}"])
    archive = Archive(Layout(cfg).examples_dir("train"))
    maps = MapStore(Layout(cfg).maps_split_dir("train")) if kind == "teacher" else None
    targets = open_targets(kind, archive, maps, seed=1)
    found = []
    for number in range(min(count, len(archive))):
        item = student.family.encode_one(archive[number])
        maps_WHW, valid_W = targets(number, archive[number], item.words)
        found.append((item, torch.from_numpy(maps_WHW), torch.from_numpy(valid_W)))
    return found


def main(argv: list[str]) -> AlignedTrainer:
    given = {"MODEL": "bundled:student", "DATA": "world", "TARGETS": "teacher", "STEPS": "20", "OUT": "runs/hf_trainer"}
    given |= dict(word.split("=", 1) for word in argv)
    student = load_student(ModelConfig(name="example", path=given["MODEL"], max_length=512), AlignConfig())
    arguments = TrainingArguments(
        given["OUT"],
        max_steps=int(given["STEPS"]),
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    examples = rows(student, given["DATA"], given["TARGETS"], 64)
    trainer = AlignedTrainer(student, args=arguments, train_dataset=examples)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(sys.argv[1:])
