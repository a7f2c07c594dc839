"""Llama 3.2 Vision: geometry, capture and batches on a tiny model of the real classes."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.align.config import AlignConfig
from pipeline.align.loss import AlignmentLoss
from pipeline.errors import UserError
from pipeline.examples import Example, Turn, decode
from pipeline.student.batch import IGNORED, EncodeError
from pipeline.student.capture import AttentionTap, student_maps
from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student
from pipeline.world.student import build_mllama

TEXTS = ["What colour is the circle?", "a small red circle and a blue square", "red", "two", "List the colours."] * 3
SIZES = {
    "wide": (50, 190),
    "tall": (200, 40),
    "square": (96, 96),
    "tiny": (5, 9),
    "huge": (700, 500),
    "strip": (16, 900),
}


def png(height: int = 40, width: int = 60, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def example(*texts: str, key: str = "0000000000", image: bytes | None = b"", system: str = "") -> Example:
    roles = ("user", "assistant") * len(texts)
    turns = [Turn("system", system)] if system else []
    turns += [Turn(role, text) for role, text in zip(roles, texts, strict=False)]
    image = png() if image == b"" else image
    return Example(key, image, "png" if image else "", tuple(turns), "test", "train", "none")


@pytest.fixture(scope="module")
def tiled(tmp_path_factory):
    path = build_mllama(tmp_path_factory.mktemp("tiled"), TEXTS, max_num_tiles=4, image_size=32, vocabulary=400)
    return load_student(ModelConfig(name="t", path=str(path)))


@pytest.fixture
def long_and_short():
    return [
        example("What colour is the circle?", "a small red circle and a blue square", key="0"),
        example("List the colours.", "red", "What colour is the circle?", "blue", image=png(90, 30, 1), key="1"),
        example("two", "red circle", image=png(20, 20, 2), key="2"),
    ]


def logits(student, inputs) -> torch.Tensor:
    with torch.no_grad():
        return student.model(**inputs).logits


@pytest.mark.parametrize("train", [True, False], ids=["right", "left"])
def test_tap_changes_no_logits(tiled, long_and_short, train):
    batch = tiled.family.encode(long_and_short, train=train)
    plain = logits(tiled, batch.inputs)
    with AttentionTap(tiled.model, tiled.family) as tap:
        tap.rows(batch.words)
        assert torch.equal(logits(tiled, batch.inputs), plain)
        tap.rows(None)
        assert torch.equal(logits(tiled, batch.inputs), plain)
    assert torch.equal(logits(tiled, batch.inputs), plain)


@pytest.mark.parametrize("train", [True, False], ids=["right", "left"])
def test_captured_rows_and_gradients_equal_eager(tiled, long_and_short, train):
    batch = tiled.family.encode(long_and_short, train=train)
    words = batch.words
    weights = [tiled.model.model.language_model.layers[i].cross_attn.q_proj.weight for i in (1, 3)]
    weights.append(tiled.model.model.multi_modal_projector.weight)

    def rows_eager():
        tiled.model.set_attn_implementation({"text_config": "eager"})
        try:
            out = tiled.model(**batch.inputs, output_attentions=True)
        finally:
            tiled.model.set_attn_implementation({"text_config": "sdpa"})
        return {i: out.attentions[i][words.row_batch, :, words.row_pos] for i in (1, 3)}

    def rows_tapped():
        with AttentionTap(tiled.model, tiled.family) as tap:
            tap.rows(words)
            tiled.model(**batch.inputs)
            return tap.maps()

    found = []
    for run in (rows_eager, rows_tapped):
        rows = run()
        scale = torch.linspace(0, 1, next(iter(rows.values())).numel()).view_as(rows[1])
        found.append((rows, torch.autograd.grad(sum((r * scale).sum() for r in rows.values()), weights)))
    (eager, eager_grads), (tapped, tapped_grads) = found
    for index in eager:
        assert tapped[index].dtype == torch.float32
        torch.testing.assert_close(tapped[index], eager[index], atol=1e-5, rtol=1e-5)
    for one, other in zip(tapped_grads, eager_grads, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_checkpointing_keeps_gradients_and_refuses_reentrant(tiled, long_and_short):
    batch = tiled.family.encode(long_and_short)
    weight = tiled.model.model.language_model.layers[0].mlp.up_proj.weight
    model = tiled.model.train()
    try:
        with AttentionTap(model, tiled.family) as tap:
            grads = []
            for checkpointing in (False, True):
                if checkpointing:
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                tap.rows(batch.words)
                model(**batch.inputs, use_cache=False)
                kept = tap.calls(batch.words)
                loss = student_maps(tap, batch).square().mean() * 100
                model.zero_grad()
                loss.backward()
                grads.append(weight.grad.clone())
                assert all(tap.calls(batch.words)[index] is kept[index] for index in kept)
            torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)
            assert grads[0].abs().max() > 0
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            with pytest.raises(UserError, match="use_reentrant=False"):
                tap.rows(batch.words)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()


def test_batched_equals_single(tiled, long_and_short):
    with AttentionTap(tiled.model, tiled.family) as tap, torch.no_grad():
        together = tiled.family.encode(long_and_short)
        tap.rows(together.words)
        out = tiled.model(**together.inputs).logits
        maps = student_maps(tap, together)
        first = 0
        for b, one in enumerate(long_and_short):
            for train in (True, False):
                single = tiled.family.encode([one], train=train)
                tap.rows(single.words)
                alone = tiled.model(**single.inputs).logits
                length = alone.shape[1]
                torch.testing.assert_close(out[b, :length], alone[0], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(
                    maps[first : first + len(single.words)], student_maps(tap, single), atol=1e-4, rtol=1e-4
                )
            first += len(single.words)


def test_text_only_row_equals_the_row_alone(tiled, long_and_short):
    text = example("two", "a red square", image=None)
    alone = tiled.family.encode([text], train=False)
    assert "pixel_values" not in alone.inputs
    expected = logits(tiled, alone.inputs)
    mixed = tiled.family.encode([*long_and_short, text])
    assert not (mixed.words.word_example == 3).any()
    length = expected.shape[1]
    torch.testing.assert_close(logits(tiled, mixed.inputs)[3, :length], expected[0], atol=2e-5, rtol=1e-4)
    # Every rank runs the cross-attention layers, even with a batch of texts only.
    only = tiled.family.encode([text, text])
    assert "pixel_values" in only.inputs
    torch.testing.assert_close(logits(tiled, only.inputs)[0], expected[0], atol=2e-5, rtol=1e-4)
    with AttentionTap(tiled.model, tiled.family) as tap:
        tap.rows(only.words)
        tiled.model(**only.inputs)
        assert student_maps(tap, only).shape == (0, 2, 4, 32, 32)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_geometry_by_perturbation(tiled, size):
    """A change in one place of the original image moves the patches that the family puts there, and no others."""
    height, width = size
    base = np.full((height, width, 3), 90, np.uint8)
    patches = patch_embedding(tiled, base)
    pieces = tiled.family.pieces(height, width)
    rng = np.random.default_rng(1)
    side = (max(height // 12, 1), max(width // 12, 1))
    for _ in range(6):
        y, x = (int(rng.integers(0, n - s + 1)) for n, s in zip(size, side, strict=True))
        changed = base.copy()
        changed[y : y + side[0], x : x + side[1]] = 250
        moved = np.abs(patch_embedding(tiled, changed) - patches).sum(-1)
        assert moved.max() > 0
        column = int(moved.argmax())
        top, left, bottom, right = rectangle(pieces, column)
        # The spot and its patch overlap; resampling may spread the change by a pixel of the smaller image.
        slack_y, slack_x = (1.5 / n + 1.5 / 32 * s for n, s in ((height, bottom - top), (width, right - left)))
        assert top - slack_y < (y + side[0]) / height
        assert bottom + slack_y > y / height
        assert left - slack_x < (x + side[1]) / width
        assert right + slack_x > x / width
        # All that moved lies within a patch of the spot.
        for other in np.flatnonzero(moved > moved.max() * 0.2):
            t, le, b, r = rectangle(pieces, int(other))
            assert t - (b - t) <= (y + side[0]) / height
            assert b + (b - t) >= y / height
            assert le - (r - le) <= (x + side[1]) / width
            assert r + (r - le) >= x / width


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_pixels_are_those_of_the_published_processor(tiled, size):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 255, (*size, 3), dtype=np.uint8))
    made = tiled.processor.image_processor([[image]], return_tensors="pt")
    tensors, pieces, meta = tiled.family.encode_image(image)
    torch.testing.assert_close(tensors["pixel_values"], made["pixel_values"][0, 0], atol=1e-6, rtol=1e-6)
    assert tensors["aspect_ratio_ids"] == made["aspect_ratio_ids"][0, 0]
    assert torch.equal(tensors["aspect_ratio_mask"], made["aspect_ratio_mask"][0, 0])
    assert meta["tiles"] == len(pieces) == made["num_tiles"][0][0]


def test_inputs_are_those_of_the_published_processor(tiled, long_and_short):
    batch = tiled.family.encode(long_and_short[:1])
    one = long_and_short[0]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": one.turns[0].text}]},
        {"role": "assistant", "content": [{"type": "text", "text": one.turns[1].text}]},
    ]
    text = tiled.processor.apply_chat_template(messages)
    made = tiled.processor(images=[[decode(one.image)]], text=[text], return_tensors="pt", add_special_tokens=False)
    assert set(made) == set(batch.inputs)
    for name, value in made.items():
        torch.testing.assert_close(batch.inputs[name], value, atol=1e-6, rtol=1e-6)


def patch_embedding(student, pixels: np.ndarray) -> np.ndarray:
    """(keys, C): patches before any mixing, at the key index of the cross-attention; class tokens stay 0."""
    tensors, _, _ = student.family.encode_image(Image.fromarray(pixels))
    vision = student.model.model.vision_model
    with torch.no_grad():
        made = vision.patch_embedding(tensors["pixel_values"]).flatten(2).transpose(1, 2)
    out = torch.zeros(made.shape[0], made.shape[1] + 1, made.shape[2])
    out[:, 1:] = made
    return out.flatten(0, 1).detach().numpy()


def rectangle(pieces, column: int) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of the patch with this key index, in fractions of the image."""
    for piece in pieces:
        found = np.argwhere(piece.columns_HW == column)
        if len(found):
            (r, c) = found[0]
            top, left = piece.top + r * piece.step_y, piece.left + c * piece.step_x
            return top, left, top + piece.step_y, left + piece.step_x
    raise AssertionError(f"no patch has key {column}")


def test_choice_of_words_and_layers(tiled):
    one = example("two", "There is a small red circle on the left and two squares")
    align = AlignConfig(max_words=4, layers=[3], rows="token", side=16)
    family = type(tiled.family)(tiled.processor, align=align)
    family.prepare(tiled.model)
    assert [one.word_text(word) for word in family.encode_one(one).words] == ["small", "red", "circle", "left"]
    batch = family.encode([one])
    with AttentionTap(tiled.model, family) as tap, torch.no_grad():
        tap.rows(batch.words)
        tiled.model(**batch.inputs)
        assert student_maps(tap, batch).shape == (4, 1, 4, 16, 16)
        batch.targets = torch.rand(4, 32, 32)
        assert 0 < AlignmentLoss.for_tap(tap, align)(tap, batch) < 1
    family.layer_choice = (2,)
    with pytest.raises(ValueError, match="layer 2 does not look at the image"):
        AttentionTap(tiled.model, family)


def test_last_layers_and_roles(tiled):
    """Question words are aligned only where `align.roles` names the user; `last_layers` takes the last that look."""
    one = example("Is there a circle?", "a red square")
    for roles, words in ((None, ["red", "square"]), (["user", "assistant"], ["circle", "red", "square"])):
        align = AlignConfig(**({"roles": roles} if roles else {}))
        family = type(tiled.family)(tiled.processor, align=align)
        family.prepare(tiled.model)
        assert [one.word_text(word) for word in family.encode_one(one).words] == words
    family.layer_choice, every = (), list(family.layers(tiled.model))
    assert len(every) > 1
    family.last_layers = 1
    assert list(family.layers(tiled.model)) == every[-1:]
    family.layer_choice, family.last_layers = tuple(every), 1
    assert list(family.layers(tiled.model)) == every[-1:]


def test_fractional_extent_of_the_real_model(tiled):
    """A 746-pixel-wide fit in a canvas of two 560-pixel tiles covers 53.29 of 80 patch columns."""
    family = tiled.family
    saved = dict(vars(family))
    try:
        vars(family).update(tile_size=560, patch_size=14)
        pieces = family.pieces(840, 1120)  # fits 2x2 tiles exactly one to one: 1120x840 of 1120x1120
        assert len(pieces) == 4
        assert pieces[1].columns_HW[0, 0] == 1601 + 1
        assert pieces[2].top == pytest.approx(560 / 840)
        assert pieces[0].step_x == pytest.approx(14 / 1120)
        wide = family.pieces(420, 560)
        assert len(wide) == 1
        tall = family.pieces(1500, 1000)  # 2x2 canvas, width floor(1000 * 1120 / 1500) = 746
        assert 1 / tall[0].step_x == pytest.approx(746 / 14)
    finally:
        vars(family).clear()
        vars(family).update(saved)


def test_words_and_labels_are_exact(tiled):
    one = example(
        "What's the colour, in one word?",
        "It's blue-green: 12,345 pixels & naïve \u4e2d\u6587 caf\u00e9.\nA second  line",
        "and now?",
        "red",
        system="Be brief.",
    )
    item = tiled.family.encode_one(one)
    tokenizer = tiled.processor.tokenizer
    ids = item.ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert len(item.words) == len(one.words(("assistant",)))
    for word, (start, end) in zip(item.words, item.tokens, strict=True):
        text = one.word_text(word)
        covered = tokenizer.decode(ids[start:end])
        assert text in covered
        if not any(ord(c) > 0x2E80 for c in text):
            assert covered.strip(" \n") in (text, text + "'", text + ",")
        assert text not in tokenizer.decode(ids[start + 1 : end])
        assert text not in tokenizer.decode(ids[start : end - 1])
    learnt = [token for token, label in zip(ids, item.labels.tolist(), strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == "<|eot_id|>".join([one.turns[2].text, one.turns[4].text, ""])
    # A system turn beside an image is folded into the first question.
    assert "user<|end_header_id|>\n\n<|image|>Be brief." in tokenizer.decode(ids)


def test_rows_predict_and_token(tiled, long_and_short):
    predict = tiled.family.encode(long_and_short).words
    family = tiled.family
    family.rows = "token"
    try:
        token = family.encode(long_and_short, train=False).words
        width = family.encode(long_and_short).inputs["input_ids"].shape[1]
    finally:
        family.rows = "predict"
    shift = torch.tensor([width - len(family.encode_one(one).ids) for one in long_and_short])
    assert torch.equal(token.row_pos, predict.row_pos + 1 + shift[predict.row_batch])
    assert torch.equal(predict.slots[predict.row_batch, predict.row_slot], predict.row_pos)
    assert torch.equal(predict.word_example[predict.row_word], predict.row_batch)


def test_prompt_generates_like_single(tiled, long_and_short):
    inputs = tiled.family.prompt(long_and_short, [0, 2, 0])
    text = tiled.processor.tokenizer.decode(inputs["input_ids"][1])
    assert text.endswith("<|image|>What colour is the circle?<|eot_id|>" + header("assistant"))
    assert "List" not in text
    made = tiled.model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for b, (one, turn) in enumerate(zip(long_and_short, (0, 2, 0), strict=True)):
        single = tiled.family.prompt([one], [turn])
        alone = tiled.model.generate(**single, max_new_tokens=6, do_sample=False)[:, single["input_ids"].shape[1] :]
        assert made[b, : alone.shape[1]].tolist() == alone[0].tolist()


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def test_truncation_spares_the_image_and_drops_cut_words(tiled):
    one = example("two", "a small red circle and a blue square")
    whole = tiled.family.encode_one(one)
    tiled.family.max_length = len(whole.ids) - 3
    try:
        item = tiled.family.encode_one(one)
        assert len(item.ids) == tiled.family.max_length
        assert all(end <= len(item.ids) for _, end in item.tokens)
        assert 0 < len(item.words) < len(whole.words)
        tiled.family.max_length = 4
        with pytest.raises(EncodeError, match="image"):
            tiled.family.encode_one(one)
    finally:
        tiled.family.max_length = 4096


def test_refusals(tiled, tmp_path):
    with pytest.raises(EncodeError, match="control token"):
        tiled.family.encode_one(example("what is <|eot_id|>?", "red"))
    with pytest.raises(EncodeError):
        tiled.family.encode_one(example("two", "red", image=b"no image"))
    with pytest.raises(UserError, match="no model directory"):
        load_student(ModelConfig(name="t", path=str(tmp_path / "absent")))
    path = build_mllama(tmp_path / "m", TEXTS, vocabulary=300)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the model"):
        load_student(ModelConfig(name="t", path=str(path)))
    with pytest.raises(UserError, match="no family"):
        load_student(ModelConfig(name="t", path=str(path), family="nonsense"))
    tapped = replace(tiled)
    tapped.model.set_attn_implementation({"text_config": "flex_attention"})
    try:
        with pytest.raises(UserError, match="cannot be tapped"):
            AttentionTap(tapped.model, tapped.family)
    finally:
        tapped.model.set_attn_implementation({"text_config": "sdpa"})
