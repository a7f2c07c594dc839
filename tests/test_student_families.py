"""What every family must do, on tiny models of the real classes."""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from student_models import KINDS, build_student

from pipeline.errors import UserError
from pipeline.examples import Example, Turn
from pipeline.student.batch import IGNORED, EncodeError
from pipeline.student.capture import AttentionTap, Call, student_maps
from pipeline.student.load import load_student
from pipeline.student.planes import SIDE, Planes, latent_maps, project, project_latents

SIZES = {"wide": (40, 150), "tall": (170, 50), "square": (64, 64), "tiny": (9, 13), "huge": (500, 700)}

# The last projection of attention in every vision tower: without it patches do not mix.
MIXING = tuple(
    f"{name}.{kind}" for name in ("out_proj", "o_proj", "attn.proj", "projection_layer") for kind in ("weight", "bias")
)


def picture(height: int, width: int, seed: int = 0) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def example(question: str, answer: str, size: tuple[int, int] | None, key: str = "0") -> Example:
    turns = (Turn("user", question), Turn("assistant", answer))
    return Example(key, picture(*size) if size else None, "png" if size else "", turns, "test", "train", "none")


@pytest.fixture(scope="module", params=KINDS)
def student(request, tmp_path_factory):
    made = load_student(build_student(request.param, tmp_path_factory.mktemp(request.param)))
    made.kind = request.param
    return made


@pytest.fixture(scope="module")
def examples():
    return [
        example("What colour is the circle?", "a small red circle and a blue square", (50, 90)),
        example("two", "red", (90, 40)),
        example("List the colours.", "a blue square", (64, 64)),
    ]


TEXT = example("two", "a red square", None)


# --- capture --------------------------------------------------------------------------------------------------------


class Eager:
    """The attention of one forward as plain eager attention returns it (`output_attentions`), in place of a tap."""

    def __init__(self, student, batch):
        self.family, self.words = student.family, batch.words
        self.layers = student.family.layers(student.model)
        self.relays = student.family.relays(student.model)
        self.kept = {}
        hooks = [module.register_forward_hook(self._keep) for module in (*self.layers.values(), *self.relays)]
        with attention(student.model, self.layers, self.relays, "eager"):
            self.logits = student.model(**batch.inputs, output_attentions=True).logits
        for hook in hooks:
            hook.remove()

    def _keep(self, module, args, output):
        self.kept[module] = output[1]

    def maps(self):
        words = self.words
        return {
            index: self.kept[module][words.row_batch, :, words.row_pos].float() for index, module in self.layers.items()
        }

    def calls(self, words):
        example_B1 = torch.arange(len(words.slots))[:, None]
        probs = {index: self.kept[module][example_B1, :, words.slots] for index, module in self.layers.items()}
        return {index: Call(None, None, None, None, 1.0, rows.transpose(1, 2)) for index, rows in probs.items()}

    def relayed(self):
        return self.family.through([self.kept[module].float().mean(1) for module in self.relays])


@contextmanager
def attention(model, layers, relays, name: str) -> Iterator[None]:
    """The model with another attention in the layers that matter."""
    configs = {id(module.config): module.config for module in (*layers.values(), *relays)}.values()
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    yield
    for config, old in zip(configs, before, strict=True):
        config._attn_implementation_internal = old


def tapped(student, batch):
    """Logits and raw maps of a batch."""
    with AttentionTap(student.model, student.family) as tap, torch.no_grad():
        tap.rows(batch.words)
        return student.model(**batch.inputs).logits, student_maps(tap, batch)


def loss_of(maps: torch.Tensor) -> torch.Tensor:
    """Some function of maps for which no two values count alike."""
    return (maps * torch.linspace(0, 1, maps.numel()).view_as(maps)).mean()


@pytest.mark.parametrize("train", [True, False], ids=["right", "left"])
def test_tap_changes_no_logits_and_rows_equal_eager(student, examples, train):
    batch = student.family.encode([*examples, TEXT], train=train)
    with torch.no_grad():
        plain = student.model(**batch.inputs).logits
        with AttentionTap(student.model, student.family) as tap:
            tap.rows(batch.words)
            assert torch.equal(student.model(**batch.inputs).logits, plain)
            found, maps = tap.maps(), student_maps(tap, batch)
            tap.rows(None)
            assert torch.equal(student.model(**batch.inputs).logits, plain)
        with AttentionTap(student.model, student.family) as tap:  # the rows said after the forward
            for other in (student.family.encode(examples[1:], train=train), batch):
                student.model(**other.inputs)
            torch.testing.assert_close(student_maps(tap, batch), maps, atol=1e-5, rtol=1e-5)
        assert torch.equal(student.model(**batch.inputs).logits, plain)
        eager = Eager(student, batch)
    for index, rows in eager.maps().items():
        torch.testing.assert_close(found[index], rows, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps, student_maps(eager, batch), atol=1e-4, rtol=1e-4)
    assert float(maps.mean()) > 0.05
    assert float(maps.std((3, 4)).mean()) > 0.01


def test_logits_of_chosen_positions_are_those_of_all(student, examples):
    """The training step asks for logits where something is learnt, whatever the model's forward knows of that."""
    batch = student.family.encode(examples)
    length = batch.labels.shape[1]
    with torch.no_grad():
        whole = student.model(**batch.inputs).logits
        for kept, places in ((torch.tensor([2, 5, length - 3]), [2, 5, length - 3]), (2, slice(-2, None))):
            some = student.model(**batch.inputs, logits_to_keep=kept).logits
            torch.testing.assert_close(some, whole[:, places], atol=1e-5, rtol=1e-4)
        assert student.model(**batch.inputs).logits.shape == whole.shape


def test_gradients_equal_those_of_eager_attention(student, examples):
    batch = student.family.encode(examples[:2])
    found = []
    for way in ("tap", "eager"):
        student.model.zero_grad()
        if way == "tap":
            with AttentionTap(student.model, student.family) as tap:
                tap.rows(batch.words)
                student.model(**batch.inputs)
                loss_of(student_maps(tap, batch)).backward()
        else:
            loss_of(student_maps(Eager(student, batch), batch)).backward()
        found.append({name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None})
    student.model.zero_grad()
    assert found[0].keys() == found[1].keys()
    largest = max(float(grad.abs().max()) for grad in found[1].values())
    assert largest > 1e-4
    for name, grad in found[1].items():
        torch.testing.assert_close(found[0][name], grad, atol=1e-5 * max(largest, 1.0), rtol=1e-4, msg=name)


def test_checkpointing_keeps_gradients_and_refuses_reentrant(student, examples):
    batch = student.family.encode(examples[:2])
    model, grads = student.model.train(), []
    try:
        with AttentionTap(model, student.family) as tap:
            for checkpointing in (False, True):
                if checkpointing:
                    model.gradient_checkpointing_enable({"use_reentrant": False})
                model.zero_grad()
                tap.rows(batch.words)
                logits = model(**batch.inputs, use_cache=False).logits
                (loss_of(student_maps(tap, batch)) + logits.square().mean()).backward()
                grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.gradient_checkpointing_enable({"use_reentrant": True})
            with pytest.raises(UserError, match="use_reentrant=False"):
                tap.rows(batch.words)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


def test_lora_trains_through_the_tap(student, examples):
    from peft import LoraConfig, get_peft_model

    batch = student.family.encode(examples[:2])
    _, before = tapped(student, batch)
    gradients = {name: p.requires_grad for name, p in student.model.named_parameters()}
    targets = ["q_proj", "v_proj", "to_q", "to_kv"]
    model = get_peft_model(student.model, LoraConfig(r=2, target_modules=targets))
    try:
        with AttentionTap(model, student.family) as tap:
            tap.rows(batch.words)
            model(**batch.inputs)
            maps = student_maps(tap, batch)
        torch.testing.assert_close(maps, before)
        loss_of(maps).backward()
        moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
        assert moved
        assert all("lora" in name for name in moved)
    finally:
        model.unload()
        for name, parameter in student.model.named_parameters():
            parameter.requires_grad_(gradients[name])
    torch.testing.assert_close(tapped(student, batch)[1], before)


def test_batched_equals_single(student, examples):
    everything = [*examples, TEXT]
    together = student.family.encode(everything)
    assert not (together.words.word_example == 3).any()
    logits, maps = tapped(student, together)
    first = 0
    for b, one in enumerate(everything):
        single = student.family.encode([one])
        alone, own = tapped(student, single)
        torch.testing.assert_close(logits[b, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-3)
        count = len(single.words)
        if count:
            padded_left = student.family.encode([one, examples[0]], train=False)
            for other in (own, tapped(student, padded_left)[1][:count]):
                torch.testing.assert_close(maps[first : first + count], other, atol=2e-3, rtol=1e-3)
        first += count


def test_training_on_texts_alone_runs_every_layer_and_adds_nothing(student, examples):
    """Ranks that see images and ranks that see none must gather the same parameters and have the same gradients."""
    texts, mixed = student.family.encode([TEXT, TEXT]), student.family.encode([*examples, TEXT])
    alone = student.family.encode([TEXT], train=False)
    used = []
    model = student.model.train()
    try:
        for batch in (mixed, texts):
            model.zero_grad()
            logits = model(**batch.inputs, use_cache=False).logits
            logits.square().mean().backward()
            used.append({name for name, p in model.named_parameters() if p.grad is not None})
    finally:
        model.eval()
        model.zero_grad()
    assert used[0] == used[1]
    with torch.no_grad():
        expected = model(**alone.inputs).logits
    torch.testing.assert_close(logits[0, : expected.shape[1]], expected[0], atol=1e-4, rtol=1e-3)


def test_answers_batched_equal_single(student, examples):
    asked = [*examples, TEXT]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": student.family.pad_id}
    inputs = student.family.prompt(asked, [0] * len(asked))
    made = student.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    for b, one in enumerate(asked):
        single = student.family.prompt([one], [0])
        alone = student.model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        assert made[b, : alone.shape[1]].tolist() == alone[0].tolist()


def test_other_kernels_are_refused_by_name(student):
    layers, relays = student.family.layers(student.model), student.family.relays(student.model)
    for name in ("flash_attention_2", "flex_attention"):
        with attention(student.model, layers, relays, name), pytest.raises(UserError, match=f"'{name}' cannot be"):
            AttentionTap(student.model, student.family)


def test_packed_sequences_are_kept_apart(student, examples):
    """Two conversations in one row, told apart by positions that begin again, as transformers packs for its SDPA."""
    family, model = student.family, student.model
    parts = [family.encode([one]) for one in examples[:2]]
    lengths = [part.labels.shape[1] for part in parts]
    ids = torch.cat([part.inputs["input_ids"] for part in parts], 1)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    if student.kind in ("llava", "openflamingo-4b"):
        images = {
            "pixel_values": torch.cat([part.inputs["pixel_values"] for part in parts], int(student.kind != "llava"))
        }
        first, second = parts[0].words, parts[1].words
        words = replace(
            first,
            word=first.word + second.word,
            word_example=torch.cat([first.word_example, second.word_example]),
            row_batch=torch.cat([first.row_batch, second.row_batch]),
            row_pos=torch.cat([first.row_pos, second.row_pos + lengths[0]]),
            row_word=torch.cat([first.row_word, second.row_word + len(first)]),
            row_slot=torch.cat([first.row_slot, second.row_slot + first.slots.shape[1]]),
            slots=torch.cat([first.slots, second.slots + lengths[0]], 1),
        )
        with AttentionTap(model, family) as tap, torch.no_grad():
            tap.rows(words)
            logits = model(input_ids=ids, position_ids=places, use_cache=False, **images).logits
            together = tap.maps()
            start = 0
            for part, length in zip(parts, lengths, strict=True):
                tap.rows(part.words)
                alone = model(**part.inputs).logits
                torch.testing.assert_close(logits[0, start : start + length], alone[0], atol=1e-4, rtol=1e-3)
                rows = slice(0, len(first.row_pos)) if start == 0 else slice(len(first.row_pos), None)
                for index, own in tap.maps().items():
                    keys = own.shape[-1]
                    at = 0 if start == 0 else together[index].shape[-1] - keys
                    found = together[index][rows]
                    torch.testing.assert_close(found[..., at : at + keys], own, atol=1e-5, rtol=1e-3)
                    assert float(found.sum(-1).sub(1).abs().max()) < 1e-5, "nothing goes to the other conversation"
                start += length
    with AttentionTap(model, family) as tap:
        tap.rows(parts[0].words)
        linear = student.kind == "minicpmv4_6"
        with pytest.raises(UserError, match="packed sequences" if linear else "cu_seq_lens"):
            model(**parts[0].inputs, cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0).int())
        if linear or getattr(model.config.get_text_config(), "model_type", "") == "mpt":
            with pytest.raises(UserError, match="packed"):
                model(ids, position_ids=places, pixel_values=parts[0].inputs["pixel_values"])


@pytest.mark.full
def test_compiled_equals_plain(student, examples):
    batch = student.family.encode(examples[:2])
    model, found = student.model.train(), []
    torch._dynamo.reset()
    try:
        with AttentionTap(model, student.family) as tap:
            for run in (model, torch.compile(model, backend="aot_eager")):
                model.zero_grad()
                tap.rows(batch.words)
                logits = run(**batch.inputs, use_cache=False).logits
                maps = student_maps(tap, batch)
                (loss_of(maps) + logits.square().mean()).backward()
                found.append(
                    (maps.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                )
    finally:
        model.eval()
        model.zero_grad()
        torch._dynamo.reset()
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    for name in found[0][1].keys() | found[1][1].keys():  # compiled, what is not used has zeros instead of nothing
        plain, compiled = (grads.get(name, torch.zeros(())) for _, grads in found)
        torch.testing.assert_close(compiled, plain.expand_as(compiled), atol=1e-5, rtol=1e-3, msg=name)


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)], ids=str)
def test_lines_and_points_are_taken_or_refused_as_examples(student, size):
    """No image stops a stage: what a published processor cannot take is refused with a reason, as one example."""
    one = example("two", "red", size)
    if student.kind == "idefics2_split" or (student.kind.startswith("qwen") and max(size) > 200):
        with pytest.raises(EncodeError, match="pixels"):
            student.family.encode_one(one)
        return
    item = student.family.encode_one(one)
    shown = sum(piece.step_y * piece.step_x * piece.columns_HW.size for piece in item.pieces)
    assert shown > 0
    assert torch.isfinite(student.family.collate([item]).planes.rows_y).all()


def test_the_length_is_known_without_a_look_at_the_image(student, examples):
    for one in (*examples, *(example("two", "red", size) for size in SIZES.values()), TEXT):
        size = None
        if one.image is not None:
            with Image.open(io.BytesIO(one.image)) as image:
                size = image.size
        unread = replace(one, image=None if size is None else b"")
        assert student.family.length(unread, size) == len(student.family.encode_one(one).ids)


def test_words_labels_and_image_span(student, examples):
    family, tokenizer = student.family, student.processor.tokenizer
    one = examples[0]
    item = family.encode_one(one)
    ids = item.ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == student.processor.chat_template.count("bos_token")
    learnt = [token for token, label in zip(ids, item.labels.tolist(), strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt[:-1]) == one.turns[1].text
    assert learnt[-1] in family.special
    for word, (start, end) in zip(item.words, item.tokens, strict=True):
        assert tokenizer.decode(ids[start:end]).strip() == one.word_text(word)
    image = image_id(student)
    at = [place for place, token in enumerate(ids) if token == image]
    columns = np.concatenate([piece.columns_HW.ravel() for piece in item.pieces])
    if item.pieces[0].latents_Q is not None:
        columns = np.concatenate([piece.latents_Q for piece in item.pieces])
    assert len(np.unique(columns)) == len(columns)
    if len(at) > 1:  # the image lies among the text
        assert {ids[column] for column in columns} == {image}
    family.max_length = at[-1]
    try:
        with pytest.raises(EncodeError, match="max_length"):
            family.encode_one(one)
    finally:
        family.max_length = 4096


VARIED = (
    "It's blue-green: 12,345 pixels & na\u00efve caf\u00e9s.",
    "\u4e2d\u6587 circle \U0001f534 don't  stop\nnew line, \u0645\u0631\u062d\u0628\u0627 co-op 3.14%",
    "AWB\u200dx \u0928\u092e\u0938\u094d\u0924\u0947 (a_b) 'quoted' \u00bfs\u00ed?",
)


@pytest.fixture(scope="module")
def llama3():
    """The real Llama 3 vocabulary."""
    from llama3_tokenizer import llama3_tokenizer

    return llama3_tokenizer()


def with_words_of(tokenizer, student):
    """The family with a larger vocabulary, and the control tokens and the template of its own kind."""
    from tokenizers import AddedToken

    small, processor, old = student.family.tokenizer, copy(student.processor), student.family
    control = [token.content for token in small.added_tokens_decoder.values()]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in control], special_tokens=True)
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, getattr(small, name))
    pairs = ("image_{}", "{}_image", "slice_{}", "image_id_{}")
    edges = [pair.format(edge) for pair in pairs for edge in ("start", "end")]
    for name in [f"{edge}_token" for edge in (*edges, "boi", "eoi")]:
        if hasattr(small, name):
            tokenizer._set_model_specific_special_tokens({name: getattr(small, name)})
    if small._tokenizer.post_processor is not None:
        tokenizer._tokenizer.post_processor = small._tokenizer.post_processor
    tokenizer.chat_template = small.chat_template
    processor.tokenizer = tokenizer
    family = type(old)(processor)
    vars(family).update({name: value for name, value in vars(old).items() if name not in vars(family)})
    image = tokenizer.convert_tokens_to_ids(small.convert_ids_to_tokens(image_id(student)))
    if hasattr(old, "layout"):
        config = deepcopy(student.model.config)
        config.image_token_id = image
        family.layout = type(old.layout)(config, processor.image_processor, tokenizer)
    elif hasattr(old, "image_id"):
        family.image_id = image
    else:
        processor.image_token_id = image
    return family


def image_id(student) -> int:
    found = getattr(student.model.config, "image_token_id", None)
    return student.processor.image_token_id if found is None else found


def test_words_and_labels_with_the_real_llama3_vocabulary(student, llama3):
    """Every word has exactly the tokens that hold its bytes; labels are the answers and their ends, no more."""
    family = with_words_of(llama3, student)
    turns = [Turn("user", VARIED[1]), Turn("assistant", VARIED[0])]
    if student.kind != "paligemma":  # which takes one question
        turns += [Turn("user", "And now?"), Turn("assistant", VARIED[1]), Turn("user", VARIED[2])]
        turns += [Turn("assistant", VARIED[2])]
    one = Example("0", picture(40, 60), "png", tuple(turns), "test", "train", "none")
    item = family.encode_one(one)
    ids, tokenizer = item.ids.tolist(), family.tokenizer
    assert ids.count(tokenizer.bos_token_id) == family.processor.chat_template.count("bos_token")
    spell = spelling(tokenizer)
    pieces = [spell(token) for token in ids]
    ends = np.cumsum([len(piece) for piece in pieces])
    whole, at = b"".join(pieces), {}
    cursor = 0
    for index, turn in enumerate(turns):
        cursor = whole.index(turn.text.encode(), cursor)
        at[index] = cursor
        cursor += len(turn.text.encode())
    assert item.words == one.words(("assistant",))
    for word, (start, end) in zip(item.words, item.tokens, strict=True):
        low = at[word.turn] + len(turns[word.turn].text[: word.start].encode())
        high = at[word.turn] + len(turns[word.turn].text[: word.end].encode())
        assert ends[start] - len(pieces[start]) <= low < ends[start]
        assert ends[end - 1] - len(pieces[end - 1]) < high <= ends[end - 1]
    learnt = [label for label in item.labels.tolist() if label != IGNORED]
    close = spell(learnt[-1])
    answers = [turn.text.encode() for turn in turns if turn.role == "assistant"]
    # A space of the template before an answer may be part of the answer's first token.
    found = [part.removeprefix(b" ") for part in b"".join(spell(token) for token in learnt).split(close)]
    assert found == [*answers, b""]
    assert [i for i, label in zip(ids, item.labels.tolist(), strict=True) if label != IGNORED] == learnt


def spelling(tokenizer) -> Callable[[int], bytes]:
    """The bytes of each token of a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    return lambda i: added.get(i) or bytes(byte_of[character] for character in tokenizer.convert_ids_to_tokens(i))


# --- geometry -------------------------------------------------------------------------------------------------------


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
        moved = [np.abs(now - old).sum(-1) for now, old in zip(features(student, changed)[1], before, strict=True)]
        most = max(moved_HW.max() for moved_HW in moved)
        part = (y / height, x / width, (y + part_y) / height, (x + part_x) / width)
        for piece, moved_HW in zip(pieces, moved, strict=True):
            covered_HW = covered(piece, part)
            if covered_HW.max() > 0.6:  # some token lies mostly in the part
                assert covered_HW.flat[moved_HW.argmax()] > 0.1 * covered_HW.max()
            # Resampling and rounding spread a change by part of a patch, not by more.
            for r, c in np.argwhere(moved_HW > 0.5 * max(most, 1e-6)):
                assert covered(piece, grown(part, piece.step_y, piece.step_x))[r, c] > 0


def features(student, pixels: np.ndarray):
    """The image's pieces, and the features (rows, columns, C) of the tokens of each as the first attention to be
    tapped gets them, without any mixing between patches."""
    turns = (Turn("user", "two"), Turn("assistant", "red"))
    item = student.family.encode_one(Example("0", png(pixels), "png", turns, "test", "train", "none"))
    batch = student.family.collate([item])
    relays = student.family.relays(student.model)
    first = (relays or list(student.family.layers(student.model).values()))[0]
    saved, kept = {}, []
    for name, weight in student.model.named_parameters():
        if ("vision" in name or "visual" in name or "vpm" in name) and name.endswith(MIXING):
            saved[name] = weight.detach().clone()
            weight.data.zero_()

    def keep(module, args, kwargs):
        if relays:
            kept.append(kwargs["context"] if "context" in kwargs else args[0])
        elif "cross_attention_states" in kwargs:
            kept.append(kwargs["cross_attention_states"])

    hooks = [first.register_forward_pre_hook(keep, with_kwargs=True)]
    if not relays and hasattr(student.family, "layout"):  # the tokens of the image among those of the text
        inner = student.model.model
        text = getattr(inner, "language_model", None) or inner.text_model
        hooks.append(text.register_forward_pre_hook(lambda m, a, k: kept.append(k["inputs_embeds"]), with_kwargs=True))
    try:
        with torch.no_grad():
            student.model(**batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for name, value in saved.items():
            student.model.get_parameter(name).data.copy_(value)
    assert saved
    found = []
    for t, piece in enumerate(item.pieces):
        rows, cols = piece.columns_HW.shape
        source_NC = kept[0][batch.planes.source[0, t]] if relays else kept[0].flatten(0, -2)
        found.append(source_NC[batch.planes.columns[0, t, :rows, :cols]].numpy())
    return item.pieces, found


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


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_one_hot_attention_lands_on_its_patch(student, size):
    """The map of attention to one patch alone has its middle within half a cell of the patch's own."""
    item = student.family.encode_one(example("two", "red", size))
    planes = student.family.collate([item]).planes
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    for t, piece in enumerate(item.pieces):
        rows, cols = piece.columns_HW.shape
        for r, c in {(0, 0), (rows - 1, cols - 1), (rows // 2, cols // 3), (rows // 3, cols - 1)}:
            y0, x0 = piece.top + piece.step_y * r, piece.left + piece.step_x * c
            y = max(y0, 0.0), min(y0 + piece.step_y, 1.0)
            x = max(x0, 0.0), min(x0 + piece.step_x, 1.0)
            if y[0] >= y[1] or x[0] >= x[1]:
                continue  # padding
            map_SS = one_hot(planes, t, int(planes.columns[0, t, r, c]))
            # What lies outside of the image is lost, the rest is all there.
            inside = (y[1] - y[0]) * (x[1] - x[0]) / (piece.step_y * piece.step_x)
            assert float(map_SS.sum()) == pytest.approx(inside * SIDE**2, rel=1e-4)
            middle_y = float((map_SS.sum(1) * axis).sum() / map_SS.sum())
            middle_x = float((map_SS.sum(0) * axis).sum() / map_SS.sum())
            assert abs(middle_y - sum(y) / 2) <= 0.5 / SIDE
            assert abs(middle_x - sum(x) / 2) <= 0.5 / SIDE


def one_hot(planes: Planes, t: int, column: int) -> torch.Tensor:
    """The map (S, S) of a word that looks at one patch, through one latent where there is a relay."""
    if planes.latents is None:
        return project(torch.eye(int(planes.columns.max()) + 1)[None, None, None, column], planes)[0, 0, 0]
    sources, latents = int(planes.source.max()) + 1, planes.latents.shape[2]
    relay_NQK = torch.zeros(sources, latents, int(planes.columns.max()) + 1)
    relay_NQK[planes.source[0, t], latents // 2, column] = 1
    probs_BHSK = torch.zeros(1, 1, 1, int(planes.latents.max()) + 1)
    probs_BHSK[..., planes.latents[0, t, latents // 2]] = 1
    return project_latents(probs_BHSK, latent_maps(relay_NQK, planes), planes)[0, 0, 0]
