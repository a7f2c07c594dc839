"""PaliGemma and Idefics2 beside the library's own processors, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from student_models import build_student
from test_student_families import example

from pipeline.errors import UserError
from pipeline.examples import Example, Turn, decode
from pipeline.student.batch import IGNORED, EncodeError
from pipeline.student.load import load_student

QUESTION, ANSWER = "What colour is the circle?", "a small red circle"


def loaded(kind, tmp_path_factory):
    cfg = build_student(kind, tmp_path_factory.mktemp(kind))
    return cfg, load_student(cfg)


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    return loaded("paligemma", tmp_path_factory)


def test_paligemma_inputs_are_those_of_the_published_processor(paligemma):
    from transformers import PaliGemmaProcessor

    _, student = paligemma
    one = example(QUESTION, ANSWER, (50, 90))
    published = PaliGemmaProcessor(student.processor.image_processor, student.family.tokenizer)
    made = published(images=[decode(one.image)], text=f"<image>{QUESTION}", suffix=ANSWER, return_tensors="pt")
    batch = student.family.encode([one])
    for name in ("input_ids", "token_type_ids", "pixel_values"):
        torch.testing.assert_close(batch.inputs[name], made[name].to(batch.inputs[name].dtype), msg=name)
    assert torch.equal(batch.labels, made["labels"])
    asked = student.family.prompt([one], [0])
    length = int((batch.labels[0] == IGNORED).sum())
    assert torch.equal(asked["input_ids"][0], batch.inputs["input_ids"][0, :length])
    assert not asked["token_type_ids"].any()


def test_paligemma_sees_its_question_in_both_directions_and_its_answer_in_one(paligemma):
    _, student = paligemma
    batch = student.family.encode([example(QUESTION, ANSWER, (50, 90))])
    first = int((batch.labels[0] != IGNORED).nonzero()[0])
    with torch.no_grad():
        before = student.model(**batch.inputs).logits[0]
        for place, moves in ((first - 3, True), (first + 1, False)):
            changed = batch.inputs | {"input_ids": batch.inputs["input_ids"].clone()}
            changed["input_ids"][0, place] = 5
            after = student.model(**changed).logits[0]
            assert torch.equal(before[: place - 1], after[: place - 1]) != moves


def test_paligemma_refuses_further_questions_and_capped_scores(paligemma):
    cfg, student = paligemma
    turns = (Turn("user", "one"), Turn("assistant", "red"), Turn("user", "two"), Turn("assistant", "blue"))
    image = example("", "", (20, 20)).image
    with pytest.raises(EncodeError, match="one question and one answer"):
        student.family.encode_one(Example("0", image, "png", turns, "test", "train", "none"))
    text = student.model.config.get_text_config()
    text.attn_logit_softcapping = 50.0
    try:
        with pytest.raises(UserError, match="capped attention scores"):
            student.family.prepare(student.model)
    finally:
        del text.attn_logit_softcapping
    assert cfg.family == ""


@pytest.mark.parametrize("kind", ["idefics2", "idefics2_split"])
def test_idefics2_inputs_are_those_of_the_published_processor(kind, tmp_path_factory):
    from transformers import Idefics2Processor

    _, student = loaded(kind, tmp_path_factory)
    tokenizer = student.family.tokenizer
    one = example(QUESTION, ANSWER, (50, 90))
    rendered = student.processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ],
        tokenize=False,
    )
    batch = student.family.encode([one])
    published = Idefics2Processor(student.processor.image_processor, tokenizer, image_seq_len=8)
    made = published(images=[[decode(one.image)]], text=[rendered], return_tensors="pt")
    for name in ("input_ids", "pixel_values", "pixel_attention_mask"):
        torch.testing.assert_close(batch.inputs[name], made[name].to(batch.inputs[name].dtype), msg=name)
    pieces = student.family.encode_one(one).pieces
    assert len(pieces) == (5 if kind == "idefics2_split" else 1)


def test_gemma3_with_crops_is_refused(tmp_path_factory):
    cfg, _ = loaded("gemma3", tmp_path_factory)
    file = f"{cfg.path}/preprocessor_config.json"

    found = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(found | {"do_pan_and_scan": True}))
    with pytest.raises(UserError, match="pan-and-scan"):
        load_student(cfg)
