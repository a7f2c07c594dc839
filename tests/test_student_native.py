"""The native models: what every family must do, on tiny models of the real classes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from student_models import KINDS, build

from pipeline.errors import UserError
from pipeline.examples import Example, Turn
from pipeline.student.batch import IGNORED, EncodeError
from pipeline.student.capture import AttentionTap, student_maps
from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student

SIZES = {"wide": (40, 150), "tall": (170, 50), "square": (64, 64), "tiny": (9, 13), "huge": (500, 700)}

# The last projection of attention in every vision tower: without it patches do not mix.
MIXING = tuple(
    f"{name}.{kind}" for name in ("out_proj", "attn.proj", "projection_layer") for kind in ("weight", "bias")
)


def picture(height: int, width: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def example(question: str, answer: str, size: tuple[int, int] | None, key: str = "0") -> Example:
    turns = (Turn("user", question), Turn("assistant", answer))
    return Example(key, picture(*size) if size else None, "png" if size else "", turns, "test", "train", "none")


@pytest.fixture(scope="module", params=KINDS)
def student(request, tmp_path_factory):
    path = build(request.param, tmp_path_factory.mktemp(request.param))
    return load_student(ModelConfig(name="t", path=str(path)))


@pytest.fixture(scope="module")
def examples():
    return [
        example("What colour is the circle?", "a small red circle and a blue square", (50, 90)),
        example("two", "red", (90, 40)),
        example("List the colours.", "a blue square", (64, 64)),
    ]


@pytest.mark.parametrize("train", [True, False], ids=["right", "left"])
def test_tap_changes_no_logits_and_rows_equal_eager(student, examples, train):
    model, words = student.model, None
    batch = student.family.encode(examples, train=train)
    words = batch.words
    with torch.no_grad():
        plain = model(**batch.inputs).logits
        with AttentionTap(model, student.family) as tap:
            tap.rows(words)
            assert torch.equal(model(**batch.inputs).logits, plain)
            tapped = tap.maps()
    owner = tap.layers[next(iter(tap.layers))].config
    before = owner._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            eager = model(**batch.inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation({"text_config": before})
    for index, rows in tapped.items():
        expected = eager[index][words.row_batch, :, words.row_pos]
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
    assert float(student_maps_of(student, batch).mean()) > 0.05


def student_maps_of(student, batch):
    with AttentionTap(student.model, student.family) as tap, torch.no_grad():
        tap.rows(batch.words)
        student.model(**batch.inputs)
        return student_maps(tap, batch)


def test_gradients_equal_eager(student, examples):
    batch = student.family.encode(examples[:2])
    model, words = student.model, batch.words
    weights = [p for n, p in model.named_parameters() if n.endswith("layers.0.mlp.up_proj.weight")][-1:]
    found = []
    for way in ("tap", "eager"):
        if way == "tap":
            with AttentionTap(model, student.family) as tap:
                tap.rows(words)
                model(**batch.inputs)
                index, rows = list(tap.maps().items())[-1]
        else:
            model.set_attn_implementation({"text_config": "eager"})
            rows = model(**batch.inputs, output_attentions=True).attentions[index][words.row_batch, :, words.row_pos]
            model.set_attn_implementation({"text_config": "sdpa"})
        scale = torch.linspace(0, 1, rows.numel()).view_as(rows)
        found.append(torch.autograd.grad((rows * scale).sum(), weights)[0])
    assert found[1].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_batched_equals_single(student, examples):
    text = example("two", "a red square", None)
    together = student.family.encode([*examples, text])
    assert not (together.words.word_example == 3).any()
    maps = student_maps_of(student, together)
    with torch.no_grad():
        logits = student.model(**together.inputs).logits
    first = 0
    for b, one in enumerate([*examples, text]):
        single = student.family.encode([one])
        with torch.no_grad():
            alone = student.model(**single.inputs).logits
        torch.testing.assert_close(logits[b, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-3)
        count = len(single.words)
        if count:
            padded_left = student.family.encode([one, examples[0]], train=False)
            for other in (student_maps_of(student, single), student_maps_of(student, padded_left)[:count]):
                torch.testing.assert_close(maps[first : first + count], other, atol=2e-3, rtol=1e-3)
        first += count


def test_words_labels_and_image_span(student, examples):
    tokenizer = student.processor.tokenizer
    one = examples[0]
    item = student.family.encode_one(one)
    ids = item.ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == tokenizer.chat_template.count("bos_token")
    learnt = [token for token, label in zip(ids, item.labels.tolist(), strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt[:-1]) == one.turns[1].text
    assert learnt[-1] in student.family.special
    for word, (start, end) in zip(item.words, item.tokens, strict=True):
        assert tokenizer.decode(ids[start:end]).strip() == one.word_text(word)
    columns = np.concatenate([piece.columns_HW.ravel() for piece in item.pieces])
    assert len(np.unique(columns)) == len(columns)
    assert {ids[column] for column in columns} == {student.family.layout.image_id}
    student.family.max_length = int(columns.max())
    try:
        with pytest.raises(EncodeError, match="max_length"):
            student.family.encode_one(one)
    finally:
        student.family.max_length = 4096


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_geometry_by_perturbation(student, size):
    """A change of a part of the image moves those image tokens that the family puts there."""
    height, width = size
    base = np.full((height, width, 3), 90, np.uint8)
    pieces, before = features(student, base)
    part_y, part_x = max(height // 4, 1), max(width // 4, 1)
    for y, x in (
        (0, 0),
        (0, width - part_x),
        (height - part_y, 0),
        (height // 2, width // 4),
        (height // 3, width // 2),
    ):
        changed = base.copy()
        changed[y : y + part_y, x : x + part_x] = (250, 160, 20)
        moved_N = (features(student, changed)[1] - before).abs().sum(1)
        part = (y / height, x / width, (y + part_y) / height, (x + part_x) / width)
        for piece in pieces:
            moved_HW = moved_N[torch.from_numpy(piece.columns_HW)].numpy()
            covered_HW = covered(piece, part)
            if covered_HW.max() > 0.6:  # some token lies mostly in the part
                assert covered_HW.flat[moved_HW.argmax()] > 0.1 * covered_HW.max()
            # Resampling and rounding spread a change by part of a patch, not by more.
            for r, c in np.argwhere(moved_HW > 0.5 * max(moved_N.max().item(), 1e-6)):
                assert covered(piece, grown(part, piece.step_y, piece.step_x))[r, c] > 0


def features(student, pixels: np.ndarray):
    """The image's pieces and tokens (N, C) as the text model gets them, without any mixing between patches."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    turns = (Turn("user", "two"), Turn("assistant", "red"))
    item = student.family.encode_one(Example("0", out.getvalue(), "png", turns, "test", "train", "none"))
    batch = student.family.collate([item])
    inner = student.model.model
    text = getattr(inner, "language_model", None) or inner.text_model
    saved, kept = {}, []
    for name, weight in inner.named_parameters():
        if ("vision" in name or "visual" in name) and name.endswith(MIXING):
            saved[name] = weight.detach().clone()
            weight.data.zero_()
    hook = text.register_forward_pre_hook(lambda m, a, k: kept.append(k["inputs_embeds"]), with_kwargs=True)
    try:
        with torch.no_grad():
            student.model(**batch.inputs)
    finally:
        hook.remove()
        for name, value in saved.items():
            inner.get_parameter(name).data.copy_(value)
    assert saved
    return item.pieces, kept[0][0]


def covered(piece, part) -> np.ndarray:
    """(rows, cols): the share of each patch that lies in a part (top, left, bottom, right) of the image."""
    rows, cols = piece.columns_HW.shape
    y = piece.top + piece.step_y * np.arange(rows)
    x = piece.left + piece.step_x * np.arange(cols)
    high = np.clip(np.minimum(y + piece.step_y, part[2]) - np.maximum(y, part[0]), 0, None) / piece.step_y
    wide = np.clip(np.minimum(x + piece.step_x, part[3]) - np.maximum(x, part[1]), 0, None) / piece.step_x
    return np.outer(high, wide)


def grown(part, by_y: float, by_x: float):
    return part[0] - by_y, part[1] - by_x, part[2] + by_y, part[3] + by_x


def test_one_that_cannot_be_placed_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "idefics2"}')
    with pytest.raises(UserError, match=r"idefics2.*perceiver"):
        load_student(ModelConfig(name="t", path=str(tmp_path)))
