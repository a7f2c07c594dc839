"""Held-out examples: never trained on, evaluated on the way without a trace, and the best checkpoint kept."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import losses, root, same, settings  # noqa: F401 (root is a fixture)

from pipeline.archive import Archive
from pipeline.archive.order import Order, numbered
from pipeline.config import Config
from pipeline.layout import Layout
from pipeline.student.batch import IGNORED
from pipeline.student.load import load_student
from pipeline.train import heldout, metrics, status
from pipeline.train.stage import train

OUT = ("train.held_out_split=val", "train.held_out=3", "train.evaluate_every=2")
LORA = ("train.method=lora", "train.lora.dropout=0.4", "train.lora.targets=[q_proj,v_proj]", "train.freeze=[]")
TIMES = ("seconds",)


class Table:
    """An archive as far as drawing from it goes."""

    def __init__(self, images: list[str]):
        self.images, self.keys = images, [str(number) for number in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)


def test_whole_images_are_drawn_whatever_lies_beside_them():
    images = [f"image {number // 3}" for number in range(30)] + [""] * 10
    found = heldout.drawn(Table(images), 8)
    assert 5 < len(found) <= 8
    counts = Counter(images[number] for number in found if images[number])
    assert counts and set(counts.values()) == {3}, "no image has some of its examples held out and others not"
    moved = Table(images[::-1])
    moved.keys = moved.keys[::-1]
    again = heldout.drawn(moved, 8)
    assert {moved.images[number] or moved.keys[number] for number in again} == {
        images[number] or str(number) for number in found
    }


def test_an_order_without_some_examples_is_that_of_an_archive_that_lacks_them():
    sizes, out = [4, 5, 3], [0, 5, 6, 11]
    order, rest = Order(numbered(sizes, out), seed=3, window=2), Order([3, 3, 2], seed=3, window=2)
    kept = np.delete(np.arange(12), out)
    assert order.total == 8
    for position in range(0, 24, 5):
        assert order.indices(position, 5) == kept[rest.indices(position, 5)].tolist()
    assert sorted(order.indices(8, 8)) == kept.tolist(), "an epoch sees each of the others once"
    plain = Order(numbered(sizes), seed=3, window=2)
    assert plain.indices(2, 30) == Order(sizes, seed=3, window=2).indices(2, 30), "as before where none is left out"


def ce_of(model, family, cfg: Config) -> tuple[float, int]:
    """Cross-entropy by token over the held-out examples of `OUT`, one at a time, and the number of tokens."""
    archive = Archive(Layout(cfg).examples_dir("val"))
    total = count = 0
    for number in heldout.drawn(archive, 3):
        batch = family.encode([archive[number]])
        with torch.no_grad():
            logits = model(**batch.inputs).logits[0, :-1]
        labels = batch.labels[0, 1:]
        learnt = labels != IGNORED
        total += float(torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], reduction="sum"))
        count += int(learnt.sum())
    return total / count, count


@pytest.fixture(scope="module")
def evaluated(root) -> Config:  # noqa: F811
    """A run with adapters and dropout that was evaluated on the way."""
    cfg = settings(root, "arm=oracle", *LORA, *OUT, f"runs_dir={root}/evaluated")
    train(cfg)
    return cfg


def test_evaluation_leaves_no_trace_in_training(root, evaluated):  # noqa: F811
    cfg = settings(root, "arm=oracle", *LORA, f"runs_dir={root}/not-evaluated")
    train(cfg)
    assert losses(evaluated) == losses(cfg)
    found, expected = (
        load_file(status.run_dir(one) / "adapter" / "adapter_model.safetensors") for one in (evaluated, cfg)
    )
    assert same(found, expected)
    assert not metrics.heldout(status.run_dir(cfg))
    assert status.settings(evaluated) == status.settings(cfg)


def test_the_numbers_are_those_of_the_exported_student(root, evaluated):  # noqa: F811
    run_dir = status.run_dir(evaluated)
    lines = metrics.heldout(run_dir)
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert all(line["examples"] == 3 and line["words"] > 0 for line in lines)
    assert all(line["loss"] == pytest.approx(line["ce"] + evaluated.arm.lam * line["align"]) for line in lines)
    assert all(-1 <= line["correlation"] <= 1 and 0 <= line["peak_inside"] <= 1 for line in lines)
    from peft import PeftModel

    student = load_student(evaluated.model, evaluated.align)
    model = PeftModel.from_pretrained(student.model, run_dir / "adapter").eval()
    ce, tokens = ce_of(model, student.family, evaluated)
    assert lines[-1]["tokens"] == tokens
    assert lines[-1]["ce"] == pytest.approx(ce, rel=1e-5)


def test_the_same_examples_are_drawn_every_time(evaluated):
    run = status.run_dir(evaluated)
    files = sorted((run / "overlays").iterdir())
    assert [file.name for file in files] == [f"{step:08d}.png" for step in (0, 2, 4, 6)]
    sheets = [np.asarray(Image.open(file)).astype(int) for file in files]
    assert len({sheet.shape for sheet in sheets}) == 1
    third = sheets[0].shape[1] // 3
    assert sheets[0].shape[0] > 3 * 192
    assert (sheets[0][30:, : 2 * third] == sheets[-1][30:, : 2 * third]).all(), "image and target stay"
    assert (sheets[0][30:, 2 * third :] != sheets[-1][30:, 2 * third :]).any(), "the student's attention moves"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((run / "trackers").rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Images("heldout/overlays")] == [0, 2, 4, 6]
    assert [event.step for event in events.Scalars("heldout/ce")] == [0, 2, 4, 6]


def untimed(cfg: Config) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.heldout(status.run_dir(cfg))]


def test_a_resumed_run_has_the_same_evaluations(root, evaluated):  # noqa: F811
    cfg = replace(evaluated, runs_dir=f"{root}/evaluated-stopped")
    train(replace(cfg, train=replace(cfg.train, max_steps_per_call=3)))
    assert [line["step"] for line in metrics.heldout(status.run_dir(cfg))] == [0, 2]
    train(cfg)
    assert untimed(cfg) == untimed(evaluated)
    assert losses(cfg) == losses(evaluated)
    assert len(list((status.run_dir(cfg) / "overlays").iterdir())) == 4


def test_examples_of_the_training_split_are_not_trained_on(root, monkeypatch, capsys):  # noqa: F811
    from pipeline.train import stage
    from pipeline.train.data import Batches

    seen = set()
    at = Batches.at

    def noted(self, step):
        share = at(self, step)
        if "held-out" not in self.skipped_file.name:
            seen.update(key for batch in share.batches for key in batch.keys)
        return share

    monkeypatch.setattr(Batches, "at", noted)
    monkeypatch.setattr(heldout, "MOST", 4)
    cfg = settings(
        root,
        "arm=sft",
        "train.held_out=3",
        "train.held_out_split=",
        "train.evaluate_every=6",
        "train.steps=9",
        f"runs_dir={root}/own",
    )
    train(cfg)
    archive = Archive(Layout(cfg).examples_dir("train"))
    out = {archive.keys[number] for number in heldout.left_out(cfg, archive)}
    assert len(out) == 3 and seen == set(archive.keys) - out
    assert "9 examples (3 more held out), 9 steps" in capsys.readouterr().out
    lines = metrics.heldout(status.run_dir(cfg))
    assert [line["step"] for line in lines] == [0, 6, 9]
    assert "align" not in lines[0] and lines[0]["correlation"], "plain fine-tuning is compared with the teacher's maps"
    assert stage.is_main()


def test_the_best_checkpoint_is_kept_and_exported(root, capsys):  # noqa: F811
    """At a rate at which the student learns its examples by heart, the last step is not the best."""
    more = ("arm=sft", "train.steps=40", "train.lr=2e-2", "train.checkpoint_every=4", "train.keep_checkpoints=1")
    cfg = settings(root, *more, *OUT, "train.evaluate_every=4", "train.choose=best", f"runs_dir={root}/best")
    train(cfg)
    run = status.run_dir(cfg)
    found = {line["step"]: line["loss"] for line in metrics.heldout(run) if line["step"]}
    lowest = min(found, key=found.get)
    assert lowest < 40
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [lowest, 40]
    assert f"step {lowest} has the lowest loss" in capsys.readouterr().out
    student = load_student(replace(cfg.model, path=str(run / "model")), cfg.align)
    assert ce_of(student.model.eval(), student.family, cfg)[0] == pytest.approx(found[lowest], rel=1e-5)
    assert found[lowest] != pytest.approx(found[40], rel=1e-3)


def test_settings_that_cannot_be_evaluated_are_refused(root, command, tmp_path):  # noqa: F811
    given = (f"shards_dir={root}/shards", f"model.path={root}/student", f"runs_dir={tmp_path}", "train.steps=2")
    for more, said in (
        (
            ("train.evaluate_every=2", "train.held_out=0"),
            "error: train.evaluate_every=2 needs examples: give train.held_out",
        ),
        (("train.held_out=2", "train.held_out_split=train"), "error: train.held_out_split=train is trained on"),
        (("train.choose=best",), "error: train.choose=best knows the loss"),
    ):
        done = command("train", *given, "arm=sft", *more)
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr
