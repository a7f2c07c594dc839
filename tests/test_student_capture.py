"""The tap: rows announced or asked for afterwards, all heads at once or some at a time; checkpoints, LoRA, compile."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from student_models import build
from torch.utils.checkpoint import checkpoint

from pipeline.examples import Example, Turn
from pipeline.student import capture
from pipeline.student.capture import AttentionTap, student_maps
from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student
from pipeline.world.student import build_mllama


def example(question: str, answer: str, size: tuple[int, int], key: str) -> Example:
    pixels = np.random.default_rng(int(key)).integers(0, 255, (*size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    turns = (Turn("user", question), Turn("assistant", answer))
    return Example(key, out.getvalue(), "png", turns, "test", "train", "none")


@pytest.fixture(scope="module", params=["mllama", "qwen2_5_vl"])
def student(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    texts = ["What colour is the circle?", "a small red circle and a blue square"] * 3
    path = build_mllama(folder, texts, vocabulary=400) if request.param == "mllama" else build(request.param, folder)
    return load_student(ModelConfig(name="t", path=str(path)))


@pytest.fixture
def batch(student):
    return student.family.encode(
        [
            example("What colour is the circle?", "a small red circle and a blue square", (50, 90), "1"),
            example("two", "red", (64, 64), "2"),
        ]
    )


def maps_and_gradients(model, tap, batch, announced: bool) -> list[torch.Tensor]:
    """The words' maps and what a loss on them does to every weight."""
    model.zero_grad()
    if announced:
        tap.rows(batch.words)
    model(**batch.inputs, use_cache=False)
    maps = student_maps(tap, batch)
    (maps.square().mean() * 100).backward()
    return [maps.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(found, expected):
    assert len(found) == len(expected)
    assert sum(float(e.abs().max()) > 0 for e in expected) > 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_few_heads_at_a_time_and_rows_asked_for_afterwards_change_nothing(student, batch, monkeypatch, checkpointed):
    model = student.model.train()
    with AttentionTap(model, student.family) as tap:
        expected = maps_and_gradients(model, tap, batch, announced=True)
    runs = []
    monkeypatch.setattr(capture, "checkpoint", lambda *args, **how: runs.append(1) or checkpoint(*args, **how))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for held in (1, capture.HELD):
            monkeypatch.setattr(capture, "HELD", held)
            for announced in (True, False):
                with AttentionTap(model, student.family) as tap:
                    assert_same(maps_and_gradients(model, tap, batch, announced), expected)
            if held == 1:
                assert len(runs) == 2 * 2 * len(tap.layers), "two key heads in every layer, one at a time, in two runs"
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_maps_are_those_of_the_last_forward_and_of_the_words_announced(student, batch):
    other = student.family.encode([example("two", "a red square", (40, 70), "3")])
    model = student.model
    with AttentionTap(model, student.family) as tap, torch.no_grad():
        tap.rows(other.words)
        model(**other.inputs)
        expected = student_maps(tap, other)
        tap.rows(None)
        model(**batch.inputs)
        with pytest.raises(RuntimeError, match="not the words of the last"):
            student_maps(tap, other)
        tap.rows(other.words)
        with pytest.raises(RuntimeError, match="run the model's forward"):
            student_maps(tap, other)
        for shifted in (0, 9):  # a second forward with the same rows takes the place of the first
            inputs = other.inputs | {"pixel_values": other.inputs["pixel_values"] + shifted}
            model(**inputs)
        changed = student_maps(tap, other)
        assert not torch.allclose(changed, expected)
        model(**other.inputs)
        assert torch.equal(student_maps(tap, other), expected)


def test_through_lora_and_compile(student, batch):
    from peft import LoraConfig, get_peft_model

    model = student.model
    with AttentionTap(model, student.family) as tap, torch.no_grad():
        model(**batch.inputs)
        expected = student_maps(tap, batch)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        adapted(**batch.inputs)  # an adapter starts at zero
        torch.testing.assert_close(student_maps(tap, batch), expected, atol=1e-6, rtol=1e-5)
        adapted.unload()
        tap.rows(batch.words)
        torch.compile(model, backend="eager")(**batch.inputs)
        torch.testing.assert_close(student_maps(tap, batch), expected, atol=1e-6, rtol=1e-5)


def test_maps_are_float32_under_autocast(student, batch):
    with AttentionTap(student.model, student.family) as tap, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            student.model(**batch.inputs)
            found = student_maps(tap, batch)
        assert found.dtype == torch.float32
        # From the same queries and keys, outside of autocast.
        torch.testing.assert_close(found, student_maps(tap, batch), atol=1e-6, rtol=1e-6)
