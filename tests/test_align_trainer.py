"""The three lines of `examples/hf_trainer.py` in a Trainer of transformers: loss and gradients of our own step."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import SMALL

from pipeline.student.capture import AttentionTap
from pipeline.train.tuned import Tuned


@pytest.fixture(scope="module")
def example():
    file = Path(__file__).parent.parent / "examples" / "hf_trainer.py"
    spec = importlib.util.spec_from_file_location("hf_trainer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_and_its_loss_is_that_of_our_own_step(example, small_world, tmp_path, monkeypatch):
    assert any("train: 24" in word for word in SMALL)
    monkeypatch.chdir(small_world)
    trainer = example.main(["TARGETS=oracle", "STEPS=6", f"OUT={tmp_path}/out"])
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged
    assert all(0 < loss < 20 for loss in logged)
    assert len(trainer.train_dataset) == 24
    # The Aligner learns with the model: each of its weights is optimised, once.
    optimised = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert all(optimised.count(id(p)) == 1 for p in trainer.align.parameters())
    assert all(trainer.optimizer.state[p]["step"] == 6 for p in trainer.align.parameters())

    # One batch: the Trainer's loss and gradients against those of the training stage's module.
    model, align = trainer.model.eval(), trainer.align
    inputs = trainer.collate(trainer.train_dataset[:3])
    model.zero_grad()
    align.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    found = [p.grad.clone() for p in [*model.parameters(), *align.parameters()] if p.grad is not None]
    model.zero_grad()
    align.zero_grad()
    # With gradients accumulated over four batches each counts a quarter.
    trainer.args.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = 4
    _, counted = trainer.get_batch_samples(iter([inputs] * 4), 4, trainer.args.device)
    torch.testing.assert_close(trainer.training_step(model, inputs, counted), loss.detach() / 4, atol=1e-2, rtol=1e-2)
    model.eval().zero_grad()
    align.zero_grad()
    trainer.tap.close()
    with AttentionTap(model, trainer.family) as tap:
        batch = inputs["batch"]
        tokens = int((batch.labels[:, 1:] != -100).sum())
        ce, aligned, words = Tuned(model, align, tap)(batch)
        expected = ce / tokens + 5.0 * aligned / words
        assert aligned > 0
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        expected.backward()
    wanted = [p.grad for p in [*model.parameters(), *align.parameters()] if p.grad is not None]
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)
