"""MiniCPM-Llama3-V 2.5: the published checkpoint in and out, its arithmetic against plain loops, slices, prompts, the
train stage. What every family must do is in `test_student_families`."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_student_families import TEXT, Eager, example, picture, tapped
from torch import nn
from torch.nn import functional

from pipeline.errors import UserError
from pipeline.examples import Example, Turn
from pipeline.student.batch import IGNORED, EncodeError
from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student
from pipeline.student.minicpm import MiniCPM, Processor, Slices, Slicing, in_line
from pipeline.student.minicpm_model import MiniCPMVConfig, line_positions, positions
from pipeline.student.planes import SIDE, shares
from pipeline.student.tiny.minicpm import CONFIG, CONTROL, LATENTS, build_minicpm, published_minicpm

SIZES = {
    "square": (64, 64),
    "wide": (40, 150),
    "tall": (170, 50),
    "tiny": (9, 13),
    "huge": (500, 700),
    "strip": (6, 80),
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return load_student(ModelConfig(name="t", path=str(build_minicpm(tmp_path_factory.mktemp("minicpm")))))


@pytest.fixture
def examples():
    return [
        example("What colour is the circle?", "a small red circle and a blue square", (50, 90)),
        example("two", "red", (20, 20)),
    ]


# --- weights --------------------------------------------------------------------------------------------------------


def test_a_published_checkpoint_fills_the_model_and_its_names_come_back(student, examples, tmp_path):
    published, held = published_minicpm(), student.model.state_dict()
    assert held.keys() == published.keys()
    assert all(torch.equal(held[name], value) for name, value in published.items())
    _, info = MiniCPM.load(student.processor.path, output_loading_info=True)[0]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    student.model.save_pretrained(tmp_path)
    student.processor.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], value) for name, value in published.items())
    again = load_student(ModelConfig(name="t", path=str(tmp_path)))
    batch, other = student.family.encode(examples), again.family.encode(examples)
    assert torch.equal(other.inputs["input_ids"], batch.inputs["input_ids"])
    for one, same in zip(tapped(student, batch), tapped(again, other), strict=True):
        assert torch.equal(one, same)
    stated = json.loads((tmp_path / "config.json").read_text())
    for name in ("architectures", "model_type", "query_num", "slice_config", "hidden_size", "num_hidden_layers"):
        assert stated[name] == CONFIG[name]
    assert MiniCPMVConfig.from_pretrained(tmp_path).llama().rope_parameters["rope_theta"] == 500000.0


def test_refusals(student, tmp_path):
    path = build_minicpm(tmp_path / "a")
    weights = load_file(path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "resampler.query"}, path / "model.safetensors")
    with pytest.raises(UserError, match=r"lack 1 tensors.*resampler\.query"):
        load_student(ModelConfig(name="t", path=str(path)))
    newer = CONFIG | {"vision_config": CONFIG["vision_config"] | {"model_type": "siglip_vision_model"}}
    (path / "config.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match=r"another MiniCPM-V.*siglip"):
        load_student(ModelConfig(name="t", path=str(path)))
    with pytest.raises(EncodeError, match="control token <image>"):
        student.family.encode_one(example("what is <image> ?", "red", (20, 20)))


# --- the published arithmetic, in loops ------------------------------------------------------------------------------


def published_tokens(student, slices: list[torch.Tensor], sizes: list[tuple[int, int]]) -> tuple[list, list]:
    """Image tokens (Q, C) and resampler probabilities (Q, P) of each slice of one image, as the remote code computes
    them: slices padded with zeros to the longest, no mask in the tower, positions in one line."""
    w, patch, side = student.model.state_dict(), 8, 10
    longest = max(h * v for h, v in sizes)
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    line = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / torch.tensor(longest)), boundaries, right=True)
    tokens, maps = [], []
    for pixels, (rows, cols) in zip(slices, sizes, strict=True):
        flat = functional.pad(pixels[..., : rows * cols * patch], (0, (longest - rows * cols) * patch))
        x = functional.conv2d(
            flat[None], w["vpm.embeddings.patch_embedding.weight"], w["vpm.embeddings.patch_embedding.bias"], stride=8
        )
        x = x[0, :, 0].T + w["vpm.embeddings.position_embedding.weight"][line]
        for i in range(2):
            at = f"vpm.encoder.layers.{i}"

            def linear(name, value, at=at):
                return functional.linear(value, w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"])

            def norm(name, value, at=at):
                return functional.layer_norm(value, (32,), w[f"{at}.{name}.weight"], w[f"{at}.{name}.bias"], 1e-6)

            y = norm("layer_norm1", x)
            heads = []
            for h in range(2):
                q, k, v = (linear(f"self_attn.{n}_proj", y)[:, h * 16 : (h + 1) * 16] for n in "qkv")
                heads.append((q @ k.T / 4).softmax(-1) @ v)
            x = x + linear("self_attn.out_proj", torch.cat(heads, 1))
            x = x + linear("mlp.fc2", functional.gelu(linear("mlp.fc1", norm("layer_norm2", x)), approximate="tanh"))
        x = functional.layer_norm(x, (32,), w["vpm.post_layernorm.weight"], w["vpm.post_layernorm.bias"], 1e-6)
        made = resampled(w, x, rows, cols)
        tokens.append(made[0])
        maps.append(made[1])
    return tokens, maps


def resampled(w, x, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    def norm(name, value):
        weight, bias = w[f"resampler.{name}.weight"], w[f"resampler.{name}.bias"]
        return functional.layer_norm(value, (256,), weight, bias, 1e-6)

    attention = nn.MultiheadAttention(256, 2, batch_first=True)
    names = attention.state_dict()
    attention.load_state_dict({name: w[f"resampler.attn.{name}"] for name in names})
    value = norm("ln_kv", x @ w["resampler.kv_proj.weight"].T)
    place = torch.zeros(len(x), 256)
    for p in range(rows * cols):
        for half, number in enumerate((p % cols, p // cols)):  # the first half of the channels is the column's
            for f in range(64):
                angle = number / 10000 ** (f / 64)
                place[p, 128 * half + f], place[p, 128 * half + 64 + f] = math.sin(angle), math.cos(angle)
    hidden = torch.arange(len(x)) >= rows * cols
    query = norm("ln_q", w["resampler.query"])
    out, probs = attention(query[None], (value + place)[None], value[None], key_padding_mask=hidden[None])
    return norm("ln_post", out[0]) @ w["resampler.proj"], probs[0]


def test_image_tokens_and_maps_equal_the_published_arithmetic(student, examples):
    """Two images of different sizes in one batch: each as the published code treats it alone."""
    batch = student.family.encode(examples)
    kept = []
    hook = student.model.llm.register_forward_pre_hook(lambda m, a, k: kept.append(k), with_kwargs=True)
    _, maps = tapped(student, batch)
    hook.remove()
    found_NC = kept[0]["inputs_embeds"][batch.inputs["image_mask"]].view(-1, LATENTS, 256)
    expected, looks, pieces = [], [], []
    for one in examples:
        item = student.family.encode_one(one)
        sizes = [tuple(size) for size in item.image["target_sizes"].tolist()]
        made = published_tokens(student, list(item.image["pixel_values"]), sizes)
        expected += made[0]
        looks.append(made[1])
        pieces.append(item.pieces)
    assert [len(one) for one in looks] == [7, 1]
    torch.testing.assert_close(found_NC, torch.stack(expected), atol=2e-4, rtol=1e-3)

    # text -> latents, by plain eager attention, times latents -> patches, spread over the patches' rectangles
    attention = Eager(student, batch).maps()
    words = batch.words
    composed = torch.zeros_like(maps)
    for n, index in enumerate(attention):
        for w in range(len(words)):
            b = int(words.word_example[w])
            rows = [r for r in range(len(words.row_word)) if words.row_word[r] == w]
            mean_HK = attention[index][rows].mean(0)
            for t, piece in enumerate(pieces[b]):
                high, wide = piece.columns_HW.shape
                share_HP = mean_HK[:, torch.from_numpy(piece.latents_Q)] @ looks[b][t][:, : high * wide]
                y = torch.from_numpy(shares(piece.top, piece.step_y, high)).float()
                x = torch.from_numpy(shares(piece.left, piece.step_x, wide)).float()
                for h in range(4):
                    composed[w, n, h] += y @ share_HP[h].view(high, wide) @ x.T * SIDE**2
    torch.testing.assert_close(maps, composed, atol=2e-4, rtol=1e-3)
    assert composed.std() > 0.1


def test_places_between_two_are_rounded_as_when_the_weights_were_trained():
    """Where transformers now puts a patch elsewhere, the published way holds; elsewhere they agree."""
    from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

    config = Idefics2VisionConfig(hidden_size=1, image_size=140, patch_size=2, num_channels=1)
    now = Idefics2VisionEmbeddings(config)
    with torch.no_grad():
        now.patch_embedding.weight.zero_()
        now.patch_embedding.bias.zero_()
        now.position_embedding.weight[:] = torch.arange(4900)[:, None].float()
        moved = 0
        for length in [*range(1, 80), *range(700, 1300, 7), 1024, 1050, 1120]:
            found = line_positions(length, 70)
            assert found.shape == (length,)
            other = now(torch.zeros(1, 1, 2, 2 * length), torch.ones(1, 1, length, dtype=torch.bool))[0, :, 0]
            for k in (other.long() != found).nonzero()[:, 0].tolist():
                assert (k * 70) % length == 0 and abs(int(other[k]) - int(found[k])) == 1
                moved += 1
    assert line_positions(49, 70)[28] == 40
    assert moved


def test_features_depend_on_the_largest_slice_of_the_same_image_only(student):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 32, 3), dtype=np.uint8))
    pixels, sizes = in_line(image, 8)[None], torch.tensor([[5, 4]])
    with torch.no_grad():
        alone = student.model.encode(pixels, sizes, line_positions(20, 10)[None])
        beside = functional.pad(pixels, (0, 8 * 8))
        longer = student.model.encode(beside, sizes, line_positions(28, 10)[None])
        neighbour = student.model.encode(beside, sizes, functional.pad(line_positions(20, 10), (0, 8), value=-1)[None])
    torch.testing.assert_close(neighbour, alone, atol=1e-4, rtol=1e-3)
    assert (longer - alone).abs().max() > 1e-2


def test_positions_of_any_size(student):
    assert positions(torch.arange(6), torch.tensor([[3]]), 8).shape == (1, 6, 8)
    long = positions(torch.arange(300), torch.tensor([[300]]), 8)[0]
    assert long[299, 0] == pytest.approx(math.sin(299), abs=1e-4)  # beyond the 70 columns of the published table


# --- slices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tiles", "overview", "sliced"),
    [
        ((448, 448), (0, 0), (448, 448), None),
        ((100, 50), (0, 0), (630, 322), None),  # a small image is enlarged
        ((600, 500), (2, 1), (490, 406), (700, 574)),
        ((896, 896), (2, 2), (448, 448), (896, 896)),
        ((500, 1000), (1, 2), (322, 630), (448, 896)),
        ((1344, 896), (3, 2), (546, 364), (1344, 896)),
        ((4000, 3000), (3, 3), (518, 392), (1554, 1176)),
        ((3000, 400), (7, 1), (1218, 168), (3234, 434)),
    ],
)
def test_grids_and_sizes_of_the_real_model(size, tiles, overview, sliced):
    """Worked by hand from the published rules: slices of about 448 x 448 pixels, at most nine, patches of 14."""
    real = Slicing(9, 448, 14)
    assert real.tiles(*size) == tiles
    assert real.overview(*size) == overview
    if sliced:
        assert real.sliced(*size, *tiles) == sliced


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_slices_tile_the_resized_image(student, size):
    height, width = size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), dtype=np.uint8))
    layout = student.family.layout
    cols, rows = layout.slicing.tiles(width, height)
    laid = layout(image)
    assert len(laid.pieces) == 1 + rows * cols <= 10
    assert laid.text.count("<unk>") == LATENTS * len(laid.pieces)
    seen = []
    for pixels, (high, wide) in zip(laid.tensors["pixel_values"], laid.tensors["target_sizes"].tolist(), strict=True):
        assert not pixels[..., high * wide * 8 :].any()
        strip = pixels[..., : high * wide * 8].unflatten(2, (high, wide, 8))  # 3, patch row, row, column, patch column
        seen.append(strip.permute(0, 2, 1, 3, 4).reshape(3, high * 8, wide * 8))
    assert abs(seen[0][0].numel() - 32 * 32) <= 32 * 32  # about the area of a slice, whatever the shape
    if rows:
        whole = torch.cat([torch.cat(seen[1 + r * cols : 1 + (r + 1) * cols], 2) for r in range(rows)], 1)
        resized = image.resize((whole.shape[2], whole.shape[1]), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.asarray(resized, np.float32) / 127.5 - 1).permute(2, 0, 1)
        torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)
        covered = sum(p.step_y * p.step_x * p.columns_HW.size for p in laid.pieces[1:])
        assert covered == pytest.approx(1.0)


def test_one_slice_only_where_the_config_says_so(student):
    config = MiniCPMVConfig.from_pretrained(student.processor.path)
    config.slice_mode = False
    laid = Slices(config, None, student.processor.tokenizer)(Image.new("RGB", (300, 200)))
    assert len(laid.pieces) == 1 and "<slice>" not in laid.text


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    """The family with the real vocabulary of Llama 3 and the settings of the published model, without its weights."""
    from llama3_tokenizer import llama3_tokenizer

    places = dict(zip((128002, 128010, 128011, 128020, 128021), CONTROL, strict=True))
    tokenizer = llama3_tokenizer(places, unk_token="<unk>")
    family = MiniCPM(Processor(tokenizer, ""))
    config = MiniCPMVConfig(query_num=96, patch_size=14, slice_config={"max_slice_nums": 9})
    family.layout = Slices(config, None, tokenizer)
    return family


CONVERSATIONS = {
    "plain": ("What is it?", "A small red circle, and two blue squares."),
    "contractions": ("Isn't it there?", "It's well-lit; they'd say it doesn't (really) matter..."),
    "numbers": ("How many?", "1234567 of 3.5kg, 12:30 on 2024-01-02."),
    "scripts": ("Qu'est-ce que c'est ?", "Ça s'appelle naïveté — 東京タワー と Привет, мир! 🙂 fin"),
    "lines": ("List them.", "First:\n\n- one\n- two\n\tindented  twice"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_words_and_labels_with_the_real_vocabulary(llama, name):
    tokenizer, (question, answer) = llama.tokenizer, CONVERSATIONS[name]
    turns = (
        Turn("system", "Be brief."),
        Turn("user", question),
        Turn("assistant", answer),
        Turn("user", "And then?"),
        Turn("assistant", "Nothing else."),
    )
    one = Example("0", picture(800, 900), "png", turns, "test", "train", "none")
    item = llama.encode_one(one)
    ids = item.ids.tolist()
    block = "<image>" + "<unk>" * 96 + "</image>"
    assert tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
        f"{block}<slice>{block}{block}\n{block}{block}</slice>\n{question}<|eot_id|>"
        f"<|start_header_id|>assistant<|end_header_id|>\n\n{answer}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd then?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNothing else.<|eot_id|>"
    )
    assert ids.count(tokenizer.bos_token_id) == 1
    learnt = [token for token, label in zip(ids, item.labels.tolist(), strict=True) if label != IGNORED]
    assert tokenizer.decode(learnt) == f"{answer}<|eot_id|>Nothing else.<|eot_id|>"
    assert len(item.words) == len(one.words(("assistant",)))
    for word, (start, end) in zip(item.words, item.tokens, strict=True):
        text = one.word_text(word)
        # The fewest tokens that hold all of the word: they spell it, with at most what shares its tokens around it.
        assert text in tokenizer.decode(ids[start:end])
        assert text not in tokenizer.decode(ids[start + 1 : end]) and text not in tokenizer.decode(ids[start : end - 1])
    starts = [place for place, token in enumerate(ids) if tokenizer.decode([token]) == "<image>"]
    for piece, start in zip(item.pieces, starts, strict=True):  # image_bound of the published code
        assert piece.latents_Q.tolist() == list(range(start + 1, start + 97))
        assert tokenizer.decode([ids[start + 97]]) == "</image>"
    asked = llama.prompt([one], [3])["input_ids"][0].tolist()
    assert tokenizer.decode(asked).endswith("And then?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
    assert asked.count(tokenizer.bos_token_id) == 1


def test_the_images_span_is_never_cut(llama):
    one = example("What is it?", "a red circle", (600, 900))
    whole = llama.encode_one(one)
    last = int(whole.pieces[-1].latents_Q[-1])
    try:
        llama.max_length = last
        with pytest.raises(EncodeError, match=r"96|model\.max_length"):
            llama.encode_one(one)
        llama.max_length = len(whole.ids) - 2
        assert len(llama.encode_one(one).ids) == len(whole.ids) - 2
    finally:
        llama.max_length = 4096


# --- generation and the stages --------------------------------------------------------------------------------------


def test_generation_looks_at_the_image_once_and_equals_a_loop(student, examples):
    inputs = student.family.prompt([*examples, TEXT], [0, 0, 0])
    model, calls = student.model, []
    hook = model.resampler.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": student.family.pad_id, "eos_token_id": 5}
    found = model.generate(**inputs, **options, use_cache=True)
    assert len(calls) == 1
    without = model.generate(**inputs, **options, use_cache=False)
    hook.remove()
    assert len(calls) > 3
    assert found.tolist() == without.tolist()
    for b, one in enumerate([*examples, TEXT]):
        single = student.family.prompt([one], [0])
        alone = model.generate(**single, **options, use_cache=True)[0, single["input_ids"].shape[1] :]
        assert found[b, inputs["input_ids"].shape[1] :][: len(alone)].tolist() == alone.tolist()


def stage_settings(root, method: str) -> list[str]:
    return [
        f"shards_dir={root}/shards",
        f"runs_dir={root}/runs",
        "model=minicpm-llama3-v25",
        f"model.path={build_minicpm(root / 'student')}",
        "model.dtype=float32",
        "model.max_length=512",
        "data.sizes={train: 12, val: 4, test: 4, ood_pairs: 2, ood_count: 2, ood_background: 2}",
        "engine.workers=1",
        "arm=oracle",
        f"train.method={method}",
        "train.lora.dropout=0",
        "train.lr=0.001",
        "train.precision=no",
        "train.steps=2",
        "train.batch_size=4",
        "train.micro_batch=2",
        "train.log_every=1",
        "train.workers=0",
    ]


def test_the_train_stage_aligns_and_exports_under_the_published_names(tmp_path):
    from pipeline.archive.stage import shard
    from pipeline.config import compose
    from pipeline.train import metrics, status
    from pipeline.train.stage import train

    cfg = compose([*stage_settings(tmp_path, "full"), "train=minicpm-llama3-v25-full", "train.steps=2"])
    shard(cfg)
    train(cfg)  # exports, loads the export again and compares the logits
    run = status.run_dir(cfg)
    assert status.up_to_date(cfg)
    rows = metrics.read(run)
    assert all(row["align"] > 0 and row["ce"] > 0 for row in rows)
    saved, published = load_file(run / "model" / "model.safetensors"), published_minicpm()
    assert saved.keys() == published.keys()
    moved = {name for name in saved if not torch.equal(saved[name], published[name])}
    assert any(name.startswith("llm.") for name in moved) and "resampler.query" in moved
    assert not any(name.startswith("vpm.") for name in moved)


@pytest.mark.full
def test_all_stages_with_lora_and_generated_answers(tmp_path, command):
    settings = stage_settings(tmp_path, "lora")
    for stage in ("shard", "train", "eval"):
        result = command(stage, *settings, "eval.limit=4", cwd=tmp_path)
        assert result.returncode == 0, f"{stage}: {result.stdout}{result.stderr}"
    adapter = load_file(next((tmp_path / "runs").glob("*/world/oracle-1")) / "adapter" / "adapter_model.safetensors")
    for part in ("llm", "vpm"):
        found = [value for name, value in adapter.items() if f".{part}." in name and "lora_B" in name]
        assert found and all(value.abs().max() > 0 for value in found), part
