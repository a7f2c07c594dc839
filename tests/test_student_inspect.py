"""The view of one example: learnt spans, words with tokens, a picture."""

import io

import numpy as np
from PIL import Image

from pipeline.examples import Example, Turn
from pipeline.student.config import ModelConfig
from pipeline.student.inspect import inspect
from pipeline.student.load import load_student
from pipeline.world.student import build_mllama


def test_lines_and_picture(tmp_path):
    path = build_mllama(tmp_path / "m", ["what is it", "a red circle"] * 3, vocabulary=320)
    student = load_student(ModelConfig(name="t", path=str(path)))
    out = io.BytesIO()
    Image.fromarray(np.full((40, 80, 3), 200, np.uint8)).save(out, "png")
    turns = (Turn("user", "what is it"), Turn("assistant", "a red circle"))
    example = Example("0000000007", out.getvalue(), "png", turns, "test", "train", "none")
    lines = inspect(student, example, tmp_path / "out", "train-7")
    assert lines[0].startswith("0000000007: ")
    assert "3 words to align" in lines[0]
    assert any(line.startswith("learnt") and "'a red circle<|eot_id|>'" in line for line in lines)
    words = [line.split(" ", 1)[1].strip() for line in lines if line.startswith("word")]
    assert [line.split("'")[1] for line in words] == ["a", "red", "circle"]
    with Image.open(tmp_path / "out" / "train-7.png") as picture:
        assert picture.size == (4 * 260, 128 + 16 + 4)
