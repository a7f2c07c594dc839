"""The view of one example: learnt spans, words with tokens, a picture."""

import io
import re
from ast import literal_eval

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image

from pipeline.archive.read import Archive
from pipeline.examples import Example, Turn
from pipeline.student.config import ModelConfig
from pipeline.student.inspect import inspect
from pipeline.student.load import load_student
from pipeline.world.student import build_mllama

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")


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


@pytest.mark.parametrize("model", ["minicpm-llama3-v25", "minicpm-v46"])
def test_command_shows_spans_words_and_a_picture(model, small_world, command, monkeypatch, tmp_path):
    """`python -m stages.inspect DATA= MODEL= index=`, for a family behind a relay and one without."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    chosen = ("DATA=world", f"MODEL={model}", "model.weights=random", "model.size=tiny", "index=3", "align.words=all")
    done = command("inspect", *SMALL, *chosen, f"runs_dir={tmp_path}/runs", cwd=small_world)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    [folder] = small_world.glob("shards/*/examples/train")
    one = Archive(folder)[3]
    assert lines[0].startswith(f"{one.key}: ")
    learnt = [literal_eval(line.split(maxsplit=2)[2]) for line in lines if line.startswith("learnt")]
    answers = [turn.text for turn in one.turns if turn.role == "assistant"]
    assert [text.partition("<|")[0] for text in learnt] == answers
    words = [QUOTED.findall(line) for line in lines if line.startswith("word")]
    assert [literal_eval(word) for word, *_ in words] == [one.word_text(word) for word in one.words(("assistant",))]
    for word, *tokens in words:
        assert literal_eval(word) in "".join(map(literal_eval, tokens))
    [file] = [line.removeprefix("picture ") for line in lines if line.startswith("picture")]
    with Image.open(small_world / file) as drawn:  # the patches, then each word, five in a row
        rows = -(-(len(words) + 1) // 5)
        assert drawn.size == (min(len(words) + 1, 5) * 260, rows * (256 + 16 + 4))
        assert len(drawn.getcolors(1 << 24)) > 50
