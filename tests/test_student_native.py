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


@pytest.fixture(scope="module")
def minicpm46(tmp_path_factory):
    return loaded("minicpmv4_6", tmp_path_factory)


@pytest.mark.parametrize("size", [(40, 40), (40, 150), (300, 110)])
def test_minicpm46_image_text_is_that_of_the_published_processor(minicpm46, size):
    """Its class wants a video processor, which needs torchvision: what it writes for an image is asked for alone."""
    from transformers import MiniCPMV4_6Processor

    _, student = minicpm46
    image = decode(example("", "", size).image)
    published = object.__new__(MiniCPMV4_6Processor)
    names = ("image", "image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    for name in names:
        setattr(published, f"{name}_token", getattr(student.family.tokenizer, f"{name}_token", "<|image_pad|>"))
    published.slice_mode = True
    made = student.processor.image_processor([image], return_tensors="pt")
    text = published.replace_image_token(made, image_idx=0, image_token_divisor=16)
    [text] = published._prepend_local_ids(["<|image_pad|>"], [text], "<|image_pad|>")
    laid = student.family.layout(image)
    assert laid.text == text
    assert ("<slice>" in text) == (size != (40, 40))
    assert torch.equal(laid.tensors["pixel_values"], made["pixel_values"])
    assert torch.equal(laid.tensors["target_sizes"], made["target_sizes"])


def test_minicpm46_with_four_times_the_tokens_and_what_is_refused(minicpm46):
    """`downsample_mode: 4x` makes a token of 2x2 patches; it must be that of both the processor and the model."""
    _, student = minicpm46
    one = example(QUESTION, ANSWER, (40, 150))
    config, made = student.model.config, student.processor.image_processor
    count = len(student.family.encode_one(one).pieces[0].columns_HW.ravel())
    made.downsample_mode = "4x"
    try:
        with pytest.raises(UserError, match="downsample_mode 4x"):
            student.family.prepare(student.model)
        config.downsample_mode = "4x"
        finer = type(student.family.layout)(config, made, student.family.tokenizer)
        laid = finer(decode(one.image))
        assert laid.pieces[0].columns_HW.size == pytest.approx(4 * count, rel=0.3)
        with torch.no_grad():
            features = student.model.model.get_image_features(**laid.tensors).pooler_output
        assert [len(found) for found in features] == [piece.columns_HW.size for piece in laid.pieces]
        made.do_resize = False
        with pytest.raises(UserError, match="do_resize"):
            student.family.prepare(student.model)
    finally:
        made.downsample_mode = config.downsample_mode = "16x"
        made.do_resize = True
