"""The streamed maps against a reference that stores every head of every layer and step; early exit; refinement."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from teacher_models import save_sd

from pipeline.errors import UserError
from pipeline.examples import Example, Turn
from pipeline.teacher.capture import Capture, Layer, head_mean, resize, spread, token_weights
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.extract import load_teacher
from pipeline.teacher.load import load_parts
from pipeline.teacher.noise import draw_noise, image_seed
from pipeline.teacher.unet import CaptureProcessor, choose_layers, cross_layers, cut
from pipeline.teacher.windows import teacher_texts

QUESTION, ANSWER = "Where is the red circle?", "Near a café."


@pytest.fixture(scope="module", params=[1, 2], ids=["sd1", "sd2"])
def directory(request, tmp_path_factory):
    return save_sd(tmp_path_factory.mktemp("sd"), version=request.param)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return save_sd(tmp_path_factory.mktemp("sd1"))


def config(path, **options) -> TeacherConfig:
    return TeacherConfig(name="test", path=str(path), **{"batch_size": 2, **options})


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def text(question: str = QUESTION, answer: str = ANSWER, phrases: str = "none"):
    turns = (Turn("user", question), Turn("assistant", answer))
    return teacher_texts(Example("0", None, "", turns, "", "", ""), phrases=phrases)[0]


# --- the reference: diffusers' own arithmetic, everything stored ------------------------------------------------------


class StoreEverything:
    """Keeps the full probabilities of one layer, computed by the attention class itself."""

    def __init__(self, name: str, store: dict):
        self.name, self.store = name, store

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(context))
        v = attn.head_to_batch_dim(attn.to_v(context))
        probs = attn.get_attention_scores(q, k, attention_mask)
        self.store.setdefault(self.name, []).append(probs.unflatten(0, (-1, attn.heads)))
        return attn.to_out[0](attn.batch_to_head_dim(probs @ v))


@torch.no_grad()
def brute_force(path, cfg: TeacherConfig, image: Image.Image, teacher_text, seed: int) -> torch.Tensor:
    """Word maps (W, 32, 32) from the whole pipeline as published: scheduler, tokenizer, UNet, one step at a time."""
    pipe = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, local_files_only=True)
    store: dict[str, list[torch.Tensor]] = {}
    pipe.unet.set_attn_processor({n: StoreEverything(n, store) for n in pipe.unet.attn_processors})
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    encoded = pipe.tokenizer(
        teacher_text.text, padding="max_length", max_length=77, return_tensors="pt", return_offsets_mapping=True
    )
    hidden = pipe.text_encoder(encoded.input_ids)[0]
    content = torch.tensor([end > start for start, end in encoded.offset_mapping[0].tolist()])
    groups = [
        [i for i, (s, e) in enumerate(encoded.offset_mapping[0].tolist()) if s < span[1] and span[0] < e and e > s]
        for span in teacher_text.spans
    ]
    sides = dict(cross_layers(pipe.unet))
    total, forwards = 0.0, 0
    for draw, timestep in itertools.product(range(cfg.draws), cfg.timesteps):
        store.clear()
        noise = draw_noise(seed, draw, tuple(latents.shape[1:]))[None]
        noised = pipe.scheduler.add_noise(latents, noise, torch.tensor([timestep]))
        pipe.unet(noised, timestep, encoder_hidden_states=hidden)
        parts = {}
        for name, side in sides.items():
            probs_HNT = store[f"{name}.processor"][0][0]
            mean_NT = probs_HNT.mean(0)
            if cfg.renormalise:
                mean_NT = mean_NT / mean_NT[:, content].sum(-1, keepdim=True)
            words_WN = torch.stack([mean_NT[:, group].mean(-1) for group in groups])
            parts.setdefault(side, []).append(words_WN.unflatten(-1, (side, side)))
        used = cfg.resolutions or sorted(parts)
        if cfg.resolutions:
            weights = cfg.resolution_weights or [1.0] * len(used)
            maps = {s: torch.stack(parts[s]).mean(0) * w / sum(weights) for s, w in zip(used, weights, strict=True)}
        else:
            maps = {s: torch.stack(parts[s]).sum(0) / len(sides) for s in used}
        if cfg.refine:
            side = cfg.refine_resolution or max(maps)
            x = sum(plane(m, side) for m in maps.values()).flatten(1).T
            layers = [name for name in store if ".attn1." in name and store[name][0].shape[-1] == side * side]
            self_NN = torch.stack([store[name][0][0].mean(0) for name in layers]).mean(0)
            for _ in range(cfg.refine):
                x = self_NN @ x
            maps = {side: x.T.unflatten(-1, (side, side))}
        total = total + sum(plane(m, 32) for m in maps.values())
        forwards += 1
    return total / forwards


def plane(maps: torch.Tensor, side: int) -> torch.Tensor:
    if maps.shape[-1] > side:
        return F.interpolate(maps[None], size=(side, side), mode="area")[0]
    return F.interpolate(maps[None], size=(side, side), mode="bilinear", align_corners=False)[0]


SETTINGS = [
    {},
    {"timesteps": [20, 400], "draws": 2},
    {"resolutions": [8, 16], "resolution_weights": [0.7, 0.3]},
    {"resolutions": [4, 8]},
    {"renormalise": True, "resolutions": [16]},
    {"refine": 2, "renormalise": True},
    {"refine": 1, "refine_resolution": 8, "timesteps": [10, 100]},
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", SETTINGS, ids=[",".join(o) or "plain" for o in SETTINGS])
def test_streamed_maps_equal_the_reference(directory, options):
    cfg = config(directory, **options)
    image, words = picture(), text()
    found = load_teacher(cfg, "cpu").extract([image], [words], [7])[0]
    wanted = brute_force(directory, cfg, image, words, 7).numpy()
    assert found.found.all()
    assert wanted.std() > 1e-4  # else everything would be equal to everything
    np.testing.assert_allclose(found.maps, wanted, atol=1e-5, rtol=0)


def test_the_cut_model_sees_bit_equal_attention(directory):
    """Every way to end early: in a down block, in the middle, inside each up block."""
    parts = load_parts(Path(directory), torch.float32)
    unet = parts["unet"]
    names = cross_layers(unet)
    for name, side in names:
        module = unet.get_submodule(name)
        module.set_processor(CaptureProcessor(Layer(name, side, 1.0)))
    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(CaptureProcessor())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((1, 4, 16, 16), generator=generator)
    hidden = torch.randn((1, 77, 32), generator=generator)
    calls = []
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: calls.append(n)) for n, m in unet.named_modules()]

    class Keep(Capture):
        def add(self, layer, q, k, scale):
            seen[layer.name] = head_mean(q, k, scale)

    def run(model) -> dict:
        seen.clear()
        calls.clear()
        kwargs = {"capture": Keep({}, None)}
        with torch.no_grad():
            model(latents, 50, encoder_hidden_states=hidden, cross_attention_kwargs=kwargs, return_dict=False)
        return dict(seen)

    seen: dict[str, torch.Tensor] = {}
    whole = run(unet)
    full_calls = len(calls)
    for number, (name, _) in enumerate(names):
        found = run(cut(unet, {name}))
        assert list(found) == [n for n, _ in names[: number + 1]]
        assert all(torch.equal(found[n], whole[n]) for n in found)
        assert len(calls) < full_calls
        assert not any(call.startswith(("conv_out", "conv_norm_out")) for call in calls)
    for hook in hooks:
        hook.remove()


def test_kept_bytes_do_not_grow_with_layers_or_steps(directory):
    def kept(layers: int, steps: int) -> int:
        capture = Capture({4: (4, 4)}, torch.ones(2, 77, 1))
        q, k = torch.randn(2, 2, 16, 8), torch.randn(2, 2, 77, 8)
        for _, number in itertools.product(range(steps), range(layers)):
            capture.add(Layer(str(number), 4, 1.0), q, k, 1.0)
            capture.add_joint(Layer(str(number), 4, 1.0), q, torch.randn(2, 2, 93, 8), slice(16, None), 1.0)
        return sum(t.nbytes for t in (*capture.sums.values(), *capture.words.values()))

    assert kept(1, 1) == kept(9, 3) == 2 * 16 * 78 * 4


def test_heads_in_parts_make_no_difference(monkeypatch):
    q, k = torch.randn(2, 5, 16, 8), torch.randn(2, 5, 77, 8)
    whole = head_mean(q, k, 0.3)
    monkeypatch.setattr("pipeline.teacher.capture.SCORES", 2 * 16 * 77 * 2)
    torch.testing.assert_close(head_mean(q, k, 0.3), whole)


def test_spread_is_the_power_of_the_self_attention_and_uses_a_fused_kernel():
    torch.manual_seed(0)
    pairs = [(torch.randn(2, 3, 25, 8), torch.randn(2, 3, 25, 8)) for _ in range(2)]
    x = torch.rand(2, 11, 25)  # more maps than a head is wide
    both = torch.stack([torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1).mean(1) for q, k in pairs]).mean(0)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):  # refuses what it cannot fuse
        found = spread(x, pairs, 3)
    torch.testing.assert_close(found, x @ torch.matrix_power(both, 3).transpose(-1, -2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_spread_in_half_precision_is_not_lost_beside_its_mean(dtype):
    """Self-attention evens maps out: what they show is soon a thousandth of their mean."""
    torch.manual_seed(0)
    pairs = [(torch.randn(2, 3, 64, 8).to(dtype), torch.randn(2, 3, 64, 8).to(dtype)) for _ in range(2)]
    x = 0.01 * torch.rand(2, 11, 64)
    exact = spread(x, [(q.float(), k.float()) for q, k in pairs], 2)
    shown = exact.amax(-1) - exact.amin(-1)
    assert shown.max() < 0.02 * exact.mean()
    assert ((spread(x, pairs, 2) - exact).abs().amax(-1) < 0.05 * shown).all()


@pytest.mark.parametrize(("old", "new"), [(64, 32), (48, 32), (32, 32), (16, 32), (5, 32), (1, 32), (33, 32)])
def test_resize_keeps_constants_and_places(old, new):
    assert torch.allclose(resize(torch.ones(2, old, old), (new, new)), torch.ones(2, new, new))
    if old <= new or old % new == 0:
        maps = torch.rand(3, old, old)
        torch.testing.assert_close(resize(maps, (new, new)), plane(maps, new), atol=1e-6, rtol=1e-5)
    else:  # area means keep the total, which adaptive pooling does not
        maps = torch.rand(3, old, old, dtype=torch.float64)
        torch.testing.assert_close(resize(maps, (new, new)).mean((1, 2)), maps.mean((1, 2)), atol=1e-6, rtol=1e-5)


def test_token_weights_are_means_added_up_over_streams():
    word, two_streams, phrase = [[[1, 2]]], [[[4], [0, 5]]], [[[3]], [[4, 5]]]
    weights = token_weights([[word, two_streams], [phrase]], positions=6, width=3)
    assert weights.shape == (2, 6, 3)
    assert weights[0].T.tolist() == [[0, 0.5, 0.5, 0, 0, 0], [0.5, 0, 0, 0, 1, 0.5], [0] * 6]
    assert weights[1, :, 0].tolist() == [0, 0, 0, 0.5, 0.25, 0.25]


# --- what the settings choose -----------------------------------------------------------------------------------------


def test_layers_are_chosen_by_side_and_name_and_weigh_one_together():
    cross = [("down_blocks.0.a.attn2", 16), ("down_blocks.1.a.attn2", 8), ("up_blocks.1.a.attn2", 8)]
    layers, kept = choose_layers(cross, [], config("x", resolutions=[8, 16], resolution_weights=[3, 1]))
    assert [layer.weight for layer in layers] == [0.25, 0.375, 0.375]
    assert kept == []
    layers, _ = choose_layers(cross, [], config("x", layers="^up"))
    assert layers == [Layer("up_blocks.1.a.attn2", 8, 1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": [12]}, r"teacher.resolutions has 12, but this model attends at \[4, 8, 16\]"),
        ({"layers": "nothing"}, "leave no layer to read"),
        ({"refine": 1, "refine_resolution": 5}, "refine_resolution is 5"),
    ],
)
def test_wrong_layers_are_the_users_mistake(sd1, options, message):
    with pytest.raises(UserError, match=message):
        load_teacher(config(sd1, **options), "cpu")


@pytest.mark.parametrize(
    "options",
    [{"timesteps": []}, {"timesteps": [1000]}, {"draws": 0}, {"text": "all"}, {"phrases": "x"}, {"layers": "("},
     {"resolutions": [8], "resolution_weights": [1, 2]}, {"dtype": "int8"}, {"device": "tpu"}, {"splits": []},
     {"splits": ["val", "val"]}, {"resolutions": [8, 16], "resolution_weights": [2.0, -1.0]},
     {"resolutions": [8], "resolution_weights": [0.0]}, {"resolution_weights": [1.0, 3.0], "resolutions": [8, 8]},
     {"resolutions": [8], "resolution_weights": [float("nan")]}, {"guidance": float("inf")}],
)  # fmt: skip
def test_wrong_settings_are_refused(options):
    with pytest.raises(UserError, match=f"teacher.{next(reversed(options))}"):
        config("x", **options)


# --- the whole image --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 48), (40, 120)])
@pytest.mark.parametrize(("x", "y"), list(itertools.product((0.25, 0.75), repeat=2)))
def test_a_change_in_one_place_of_the_image_moves_the_map_there(sd1, size, x, y):
    """The image is any shape; the map is a square over all of it."""
    teacher = load_teacher(config(sd1, layers=r"down_blocks\.0", timesteps=[0], batch_size=8), "cpu")
    for name, module in teacher.adapter.unet.named_modules():
        if name.endswith("attn1"):  # a random self-attention would carry the change anywhere
            module.to_out[0].weight.zero_()
    centre = round(x * size[0]), round(y * size[1])
    reach = size[0] // 10, size[1] // 10
    befores, afters = [], []
    for seed in range(8):  # random weights have random receptive fields; over several pictures they even out
        pixels = np.array(picture(seed, size))
        befores.append(Image.fromarray(pixels.copy()))
        pixels[centre[1] - reach[1] : centre[1] + reach[1], centre[0] - reach[0] : centre[0] + reach[0]] = (255, 0, 0)
        afters.append(Image.fromarray(pixels))
    found = teacher.extract(befores + afters, [text()] * 16, list(range(8)) * 2)
    change = np.mean(
        [np.abs(after.maps - before.maps).mean(0) for before, after in zip(found[:8], found[8:], strict=True)], 0
    )
    quarters = change.reshape(2, 16, 2, 16).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == (int(y > 0.5), int(x > 0.5))


# --- words ------------------------------------------------------------------------------------------------------------


def test_modifiers_get_the_map_of_their_noun(sd1):
    teacher = load_teacher(config(sd1), "cpu")
    own, shared = (teacher.extract([picture()], [text(phrases=level)], [1])[0].maps for level in ("none", "phrase"))
    red, circle = 3, 4
    assert not np.array_equal(own[red], own[circle])
    np.testing.assert_array_equal(shared[red], shared[circle])
    np.testing.assert_allclose(shared[circle], own[circle], atol=1e-6)


def test_a_phrase_may_share_the_mean_of_its_maps(sd1):
    teacher = load_teacher(config(sd1), "cpu")
    own, shared = (teacher.extract([picture()], [text(phrases=level)], [1])[0].maps for level in ("none", "mean"))
    red, circle = 3, 4
    np.testing.assert_array_equal(shared[red], shared[circle])
    np.testing.assert_allclose(shared[red], (own[red] + own[circle]) / 2, atol=1e-6)


def test_a_phrase_may_share_the_product_of_its_maps(sd1):
    told = text(phrases="product")
    own = load_teacher(config(sd1), "cpu").extract([picture()], [text()], [1])[0].maps
    shared = load_teacher(config(sd1, phrases="product"), "cpu").extract([picture()], [told], [1])[0].maps
    red, circle = 3, 4
    np.testing.assert_array_equal(shared[red], shared[circle])
    scaled = [(own[i] - own[i].min()) / (own[i].max() - own[i].min()) + 0.01 for i in (red, circle)]
    np.testing.assert_allclose(shared[red] + 0.01, np.sqrt(scaled[0] * scaled[1]), rtol=1e-3)
    for alone in (i for i, group in enumerate(told.sources) if group == (i,)):
        np.testing.assert_allclose(shared[alone], own[alone], atol=1e-6)


def test_every_word_of_a_long_text_has_a_map(sd1):
    teacher = load_teacher(config(sd1), "cpu")
    long = text(answer="The red circle is near the café. " * 12 + "x" * 200)
    found = teacher.extract([picture()], [long])[0]
    assert found.found.tolist() == [True] * (len(long.spans) - 1) + [False]
    windows_of, maps_of = teacher.sizes(long)  # what the preflight counts
    assert windows_of > 1
    assert maps_of == len(found.words)
    by_token = load_teacher(config(sd1, unit="token"), "cpu")
    assert by_token.sizes(long) == (windows_of, len(by_token.extract([picture()], [long])[0].words))
    assert (found.maps[found.found].std((1, 2)) > 0).all()
    assert not found.maps[~found.found].any()


def test_repeated_words_have_maps_of_their_own(sd1):
    teacher = load_teacher(config(sd1), "cpu")
    maps = teacher.extract([picture()], [text("", "red red red")])[0].maps
    assert not np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[1], maps[2])


def test_the_noise_is_that_of_the_image(sd1):
    assert image_seed(0, b"a") != image_seed(0, b"b") != image_seed(1, b"b")
    assert torch.equal(draw_noise(5, 0, (3,)), draw_noise(5, 0, (3,)))
    assert not torch.equal(draw_noise(5, 0, (3,)), draw_noise(5, 1, (3,)))
    teacher = load_teacher(config(sd1, batch_size=3), "cpu")
    first, second, third = teacher.extract([picture()] * 3, [text()] * 3, [1, 2, 1])
    np.testing.assert_array_equal(first.maps, third.maps)
    assert not np.array_equal(first.maps, second.maps)
