"""SDXL, SD3 and Flux against references that store everything; inversions; tokens; buckets; compilation."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import teacher_models
import torch
from diffusers import DDIMInverseScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from test_teacher_capture import StoreEverything, config, picture, plane, text

from pipeline.errors import UserError
from pipeline.teacher import capture as capture_module
from pipeline.teacher.capture import Capture
from pipeline.teacher.extract import LOOKAHEAD, Item, load_teacher
from pipeline.teacher.inversion import Path as Steps
from pipeline.teacher.inversion import _optimise, readings
from pipeline.teacher.load import load_parts
from pipeline.teacher.noise import draw_noise
from pipeline.teacher.unet import UNetAdapter, cross_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of tiny pipelines, made when first asked for."""
    made: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in made:
            path = str(tmp_path_factory.mktemp(name))
            if name in ("sd1", "sd2"):
                teacher_models.save_sd(path, version=int(name[-1]))
            else:
                kind, _, variant = name.partition("-")
                options = {"no_t5": {"t5": False}, "dual": {"dual": True}, "plain": {"guided": False}}.get(variant, {})
                getattr(teacher_models, kind)(**options).save_pretrained(path)
            made[name] = path
        return made[name]

    return get


def word_positions(tokenizer, words_text, first: int) -> list[list[int]]:
    """Text positions of each word, from the tokenizer's own encoding of the whole text."""
    offsets = tokenizer(words_text.text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    return [
        [first + i for i, (start, end) in enumerate(offsets) if start < span[1] and span[0] < end]
        for span in words_text.spans
    ]


def latents_of(pipe, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean = pipe.vae.encode(pixels).latent_dist.mean - (pipe.vae.config.shift_factor or 0)
    return mean * pipe.vae.config.scaling_factor


def noise_like(latents: torch.Tensor, seed: int) -> torch.Tensor:
    return draw_noise(seed, 0, tuple(latents.shape[1:]))[None]


# --- Stable Diffusion XL ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sdxl_equals_the_reference(saved):
    path = saved("sdxl")
    cfg = config(path, timesteps=[300])
    image, words = picture(0, (16, 16)), text()
    found = load_teacher(cfg, "cpu").extract([image], [words], [7])[0]

    pipe = teacher_models.StableDiffusionXLPipeline.from_pretrained(path, local_files_only=True)
    store: dict[str, list[torch.Tensor]] = {}
    pipe.unet.set_attn_processor({n: StoreEverything(n, store) for n in pipe.unet.attn_processors})
    hidden, _, pooled, _ = pipe.encode_prompt(words.text, device="cpu", do_classifier_free_guidance=False)
    latents = latents_of(pipe, image)
    alpha = pipe.scheduler.alphas_cumprod[300]
    noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise_like(latents, 7)
    ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), dtype=torch.float32, text_encoder_projection_dim=24)
    extra = {"text_embeds": pooled, "time_ids": ids}
    pipe.unet(noised, 300, encoder_hidden_states=hidden, added_cond_kwargs=extra)
    groups = word_positions(pipe.tokenizer, words, 1)
    wanted = 0
    layers = cross_layers(pipe.unet)
    assert len(layers) == 8
    for name, side in layers:
        mean_NT = store[f"{name}.processor"][0][0].mean(0)
        maps = torch.stack([mean_NT[:, group].mean(-1) for group in groups]).unflatten(-1, (side, side))
        wanted = wanted + plane(maps, 32) / len(layers)
    np.testing.assert_allclose(found.maps, wanted.numpy(), atol=1e-5, rtol=0)


# --- Stable Diffusion 3 and Flux --------------------------------------------------------------------------------------


class StoreJoint:
    """Keeps the whole image-and-text attention matrix of a layer. `text_first` is Flux's order."""

    def __init__(self, name: str, store: dict, text_first: bool):
        self.name, self.store, self.text_first = name, store, text_first

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def project(x, q, k, v, norm_q, norm_k):
            heads = [part(x).unflatten(-1, (attn.heads, -1)) for part in (q, k, v)]
            return [norm_q(heads[0]) if norm_q else heads[0], norm_k(heads[1]) if norm_k else heads[1], heads[2]]

        image = project(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        qkv = image
        if encoder_hidden_states is not None:
            words = project(encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj,
                            attn.norm_added_q, attn.norm_added_k)  # fmt: skip
            both = [words, image] if self.text_first else [image, words]
            qkv = [torch.cat(parts, dim=1) for parts in zip(*both, strict=True)]
        if image_rotary_emb is not None:
            qkv[:2] = [apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in qkv[:2]]
        q, k, v = (part.transpose(1, 2) for part in qkv)
        probs = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        self.store[self.name] = probs[0]
        out = (probs @ v).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attn.to_out[0](out) if getattr(attn, "to_out", None) and not self.text_first else out
        cells, count = hidden_states.shape[1], encoder_hidden_states.shape[1]
        if self.text_first:
            return attn.to_out[0](out[:, count:]), attn.to_add_out(out[:, :count])
        return attn.to_out[0](out[:, :cells]), (
            out[:, cells:] if attn.context_pre_only else attn.to_add_out(out[:, cells:])
        )


def reference(store, names, image, text_start, groups, content, side, cfg) -> torch.Tensor:
    """Word maps from full matrices. `image` and `text_start` say where image rows and text columns lie."""
    total = 0
    rows = 0
    for name in names:
        mean_NN = store[name].mean(0)
        if cfg.refine:
            block = mean_block(store[name][:, image, image])
            rows = rows + block / len(names)
        columns = mean_NN[image, text_start:]
        if cfg.renormalise:
            columns = columns / columns[:, content].sum(-1, keepdim=True)
        maps = torch.stack([sum(columns[:, own].mean(-1) for own in ranges) for ranges in groups])
        total = total + maps / len(names)
    if cfg.refine:
        total = total @ torch.matrix_power(rows, cfg.refine).T
    return plane(total.unflatten(-1, (side, side)), 32)


def mean_block(block_HNN: torch.Tensor) -> torch.Tensor:
    """The image's attention to itself, as if there were no text."""
    return (block_HNN / block_HNN.sum(-1, keepdim=True)).mean(0)


JOINT = [{}, {"renormalise": True, "layers": r"\.1\."}, {"refine": 2}]


@torch.no_grad()
@pytest.mark.parametrize("options", JOINT, ids=["plain", "renormalise,layers", "refine"])
@pytest.mark.parametrize("name", ["sd3", "sd3-no_t5", "sd3-dual"])
def test_sd3_equals_the_reference(saved, name, options):
    path = saved(name)
    cfg = config(path, timesteps=[300], **options)
    image, words = picture(0, (16, 16)), text()
    found = load_teacher(cfg, "cpu").extract([image], [words], [7])[0]

    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3-no_t5" else {}
    pipe = teacher_models.StableDiffusion3Pipeline.from_pretrained(path, local_files_only=True, **absent)
    store: dict[str, torch.Tensor] = {}
    for number, block in enumerate(pipe.transformer.transformer_blocks):
        block.attn.set_processor(StoreJoint(f"{number}", store, False))
        if block.attn2 is not None:
            block.attn2.set_processor(StoreJoint(f"{number}.2", store, False))
    hidden, _, pooled, _ = pipe.encode_prompt(words.text, None, None, "cpu", do_classifier_free_guidance=False)
    latents = latents_of(pipe, image)
    noised = 0.7 * latents + 0.3 * noise_like(latents, 7)
    pipe.transformer(noised, hidden, pooled, torch.tensor([300.0]))
    groups = [[own] for own in word_positions(pipe.tokenizer, words, 1)]
    content = list(range(1, 1 + len(pipe.tokenizer(words.text, add_special_tokens=False).input_ids)))
    if pipe.tokenizer_3 is not None:
        for ranges, own in zip(groups, word_positions(pipe.tokenizer_3, words, 77), strict=True):
            ranges.append(own)
        content += [77 + i for i in range(len(pipe.tokenizer_3(words.text, add_special_tokens=False).input_ids))]
    names = ["1"] if cfg.layers else ["0", "1", "2"]
    wanted = reference(store, names, slice(0, 16), 16, groups, content, 4, cfg)
    assert wanted.std() > 1e-5
    np.testing.assert_allclose(found.maps, wanted.numpy(), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", JOINT, ids=["plain", "renormalise,layers", "refine"])
@pytest.mark.parametrize("name", ["flux", "flux-plain"])
def test_flux_equals_the_reference(saved, name, options):
    path = saved(name)
    cfg = config(path, timesteps=[150], image_size=16, **options)
    image, words = picture(0, (16, 16)), text()
    found = load_teacher(cfg, "cpu").extract([image], [words], [7])[0]

    pipe = teacher_models.FluxPipeline.from_pretrained(path, local_files_only=True)
    store: dict[str, torch.Tensor] = {}
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        for number, block in enumerate(getattr(pipe.transformer, kind)):
            block.attn.set_processor(StoreJoint(f"{kind}.{number}", store, True))
    hidden, pooled, text_ids = pipe.encode_prompt(words.text, None, device="cpu")
    latents = latents_of(pipe, image)
    noised = pipe._pack_latents(0.85 * latents + 0.15 * noise_like(latents, 7), 1, 16, 8, 8)
    image_ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    guidance = torch.tensor([1.0]) if pipe.transformer.config.guidance_embeds else None
    pipe.transformer(noised, hidden, pooled, torch.tensor([0.15]), image_ids, text_ids, guidance)
    groups = [[own] for own in word_positions(pipe.tokenizer_2, words, 0)]
    content = list(range(len(pipe.tokenizer_2(words.text, add_special_tokens=False).input_ids)))
    names = [name for name in store if not cfg.layers or name.endswith(".1")]
    assert len(names) == (1 if cfg.layers else 3)
    wanted = reference_flux(store, names, groups, content, cfg)
    assert wanted.std() > 1e-5
    np.testing.assert_allclose(found.maps, wanted.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_and_its_refinement_are_fused(saved, name, monkeypatch):
    """The real queries and keys, in their own strides: a kernel that refuses what it cannot fuse takes them."""
    own, calls = capture_module.fused_mean, []

    def forced(*args, **kwargs):
        calls.append(1)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return own(*args, **kwargs)

    monkeypatch.setattr(capture_module, "fused_mean", forced)
    teacher = load_teacher(config(saved(name), refine=1, renormalise=True, image_size=16), "cpu")
    found = teacher.extract([picture(0, (16, 16))], [text()], [7])[0]
    assert len(calls) == 6  # three layers read, the same three for refinement
    assert found.maps.std() > 0


def reference_flux(store, names, groups, content, cfg) -> torch.Tensor:
    """Flux has the text first: move it behind the image, where the reference looks for it."""
    moved = {name: torch.cat([probs[:, 512:], probs[:, :512]], 1) for name, probs in store.items()}
    moved = {name: torch.cat([probs[..., 512:], probs[..., :512]], -1) for name, probs in moved.items()}
    return reference(moved, names, slice(0, 16), 16, groups, content, 4, cfg)


@pytest.mark.parametrize(("name", "limit"), [("sdxl", 75), ("sd3", 75), ("flux", 511)])
def test_windows_are_those_of_the_model(saved, name, limit):
    options = {"image_size": 16} if name == "flux" else {}
    teacher = load_teacher(config(saved(name), **options), "cpu")
    assert teacher.adapter.text.limit == limit
    long = text(answer="The red circle is near. " * 40)
    found = teacher.extract([picture()], [long])[0]
    assert found.found.all()


def test_transformers_end_early_and_refuse_inversions(saved):
    teacher = load_teacher(config(saved("sd3"), layers=r"blocks\.0\."), "cpu")
    assert len(teacher.adapter.transformer.transformer_blocks) == 1
    teacher = load_teacher(config(saved("flux"), layers="^transformer_blocks", image_size=16), "cpu")
    assert len(teacher.adapter.transformer.single_transformer_blocks) == 0
    with pytest.raises(UserError, match="needs a model with a UNet"):
        load_teacher(config(saved("sd3"), inversion="ddim"), "cpu")


def test_a_pipeline_of_another_kind_is_one_line(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved("sd1"), copy)
    index = (copy / "model_index.json").read_text().replace('"UNet2DConditionModel"', '"UNet3DConditionModel"')
    (copy / "model_index.json").write_text(index)
    with pytest.raises(UserError):
        load_teacher(config(copy), "cpu")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_pipeline_without_a_needed_part_is_one_line(saved, tmp_path, part):
    copy = tmp_path / "copy"
    shutil.copytree(saved("sd1"), copy)
    index = json.loads((copy / "model_index.json").read_text()) | {part: [None, None]}
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"StableDiffusionPipeline without {part} is not supported"):
        load_teacher(config(copy), "cpu")


def test_a_model_for_inpainting_is_one_line(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved("sd1"), copy)
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    UNet2DConditionModel.from_config({**unet.config, "in_channels": 9}).save_pretrained(copy / "unet")
    with pytest.raises(UserError, match="takes 9 channels where its VAE gives 4"):
        load_teacher(config(copy), "cpu")


def test_an_image_larger_than_the_places_a_model_knows_is_one_line(saved):
    load_teacher(config(saved("sd3"), image_size=32), "cpu")
    for options in ({"image_size": 64}, {"image_size": 32, "geometry": "bucket"}):
        with pytest.raises(UserError, match="knows places up to 32 pixels a side"):
            load_teacher(config(saved("sd3"), **options), "cpu")


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_half_precision_gives_nearly_the_same_maps(saved, name):
    """The published settings of these families are in bfloat16."""
    options = {"image_size": 16, "renormalise": True, "refine": 2}

    def stored(dtype: str) -> np.ndarray:
        """Maps as they are kept, from their own least to their own greatest value."""
        teacher = load_teacher(config(saved(name), dtype=dtype, **options), "cpu")
        maps = teacher.extract([picture(0, (16, 16))], [text()], [7])[0].maps
        return (maps - maps.min((1, 2), keepdims=True)) / np.ptp(maps, (1, 2), keepdims=True)

    full, half = stored("float32"), stored("bfloat16")
    assert 0 < np.abs(half - full).max() < 0.15


# --- inversions -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_ddim_inversion_is_that_of_diffusers(saved, name):
    pipe = StableDiffusionPipeline.from_pretrained(saved(name), safety_checker=None, local_files_only=True)
    own = dict(pipe.scheduler.config) | {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
    scheduler = DDIMInverseScheduler.from_config(own, timestep_spacing="leading")
    scheduler.set_timesteps(5)
    ids = pipe.tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = pipe.text_encoder(ids)[0]
    latents = wanted = latents_of(pipe, picture())
    for timestep in scheduler.timesteps:
        found = pipe.unet(wanted, timestep, encoder_hidden_states=hidden).sample
        wanted = scheduler.step(found, timestep, wanted).prev_sample

    adapter = unet_adapter(saved(name), inversion="ddim")
    steps = Steps(adapter, 5)
    assert steps.steps == scheduler.timesteps.tolist()
    trail = steps.out(latents, adapter.condition(["a red circle"]), 5)
    torch.testing.assert_close(trail[-1], wanted, atol=1e-4, rtol=1e-4)
    assert len(trail) == 6


def unet_adapter(path, **options) -> UNetAdapter:
    parts = load_parts(Path(path), torch.float32)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    return UNetAdapter(parts, config(path, **options), torch.device("cpu"))


@torch.no_grad()
def test_null_text_follows_the_path_back(saved):
    """With the optimised empty text guided denoising stays nearer to the way out than without."""

    def ends(inner: int) -> tuple[float, int]:
        cfg = config(saved("sd1"), inversion="null-text", inversion_steps=3, inner_steps=inner, timesteps=[])
        adapter = unet_adapter(saved("sd1"), inversion="null-text")
        condition = adapter.condition(["a red circle", "the circle"])
        latents = torch.cat([adapter.latents(adapter.pixels(picture(n))[None]) for n in range(2)])
        seen = []
        own = Steps.move
        Steps.move = staticmethod(lambda *args: seen.append(own(*args)) or seen[-1])
        try:
            capture = Capture(adapter.grids((32, 32)), torch.ones(2, 77, 1) / 77)
            count = sum(1 for _ in readings(adapter, cfg, latents, [0, 0], condition, capture))
        finally:
            Steps.move = staticmethod(own)
        assert torch.isfinite(capture.word_maps()).all()
        return (seen[-1] - seen[0]).square().mean().item(), count  # both lie one step away from the image

    (loose, _), (tight, count) = ends(1), ends(8)
    assert count == 3
    assert tight < 0.9 * loose


def published_null_text(pipe, image: Image.Image, prompt: str, count: int, inner: int) -> list[torch.Tensor]:
    """The latents along the way back, by the algorithm of Mokady et al. written out for one image."""
    stride, alphas = 1000 // count, pipe.scheduler.alphas_cumprod
    steps = [1 + stride * number for number in range(count)]

    def encoded(said: str) -> torch.Tensor:
        ids = pipe.tokenizer(said, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return pipe.text_encoder(ids)[0]

    def alpha(t: int) -> float:
        return float(alphas[max(t, 0)])

    def noise_of(x, t, hidden, share):
        found = pipe.unet(x, t, encoder_hidden_states=hidden).sample
        return (
            share**0.5 * found + (1 - share) ** 0.5 * x if pipe.scheduler.config.prediction_type != "epsilon" else found
        )

    def moved(x, noise, here, there):
        clean = (x - (1 - here) ** 0.5 * noise) / here**0.5
        return there**0.5 * clean + (1 - there) ** 0.5 * noise  # in this order: Adam makes much of the last bits

    text_BTC, null_BTC = encoded(prompt), encoded("")
    way = [latents_of(pipe, image)]
    for t in steps:
        here = alpha(t - stride)
        way.append(moved(way[-1], noise_of(way[-1], t, text_BTC, here), here, alpha(t)))
    now, out = way[-1], [way[-1]]
    for number, t in enumerate(reversed(steps)):
        here, there = alpha(t), alpha(t - stride)
        noise = noise_of(now, t, text_BTC, here)

        def back(null, now=now, noise=noise, t=t, here=here, there=there):
            plain = noise_of(now, t, null, here)
            return moved(now, plain + 7.5 * (noise - plain), here, there)

        with torch.enable_grad():
            null_BTC = null_BTC.detach().clone().requires_grad_()
            optimiser = torch.optim.Adam([null_BTC], lr=1e-2 * (1 - number / (2 * count)))
            for _ in range(inner):
                loss = torch.nn.functional.mse_loss(back(null_BTC), way[count - 1 - number])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        now = back(null_BTC.detach())
        out.append(now)
    return out


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_null_text_is_the_published_method(saved, name, monkeypatch):
    pipe = StableDiffusionPipeline.from_pretrained(saved(name), safety_checker=None, local_files_only=True)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False)
    wanted = published_null_text(pipe, picture(), "a red circle", 4, 3)
    options = {"inversion": "null-text", "inversion_steps": 4, "inner_steps": 3, "timesteps": []}
    teacher = load_teacher(config(saved(name), batch_size=1, **options), "cpu")
    seen, predict, forward = [], teacher.adapter.predict, teacher.adapter.forward

    def noted(latents, *args, capture=None, **kwargs):
        seen.extend([latents[0]] if capture is not None else [])
        return predict(latents, *args, capture=capture, **kwargs)

    monkeypatch.setattr(teacher.adapter, "predict", noted)
    monkeypatch.setattr(teacher.adapter, "forward", lambda x, *args: (seen.append(x[0]), forward(x, *args)))
    teacher.extract([picture()], [text("", "a red circle")])
    assert len(seen) == 4
    for found, (own,) in zip(seen, wanted[:4], strict=True):
        torch.testing.assert_close(found, own, atol=1e-3, rtol=1e-3)


def test_the_null_text_of_an_image_does_not_depend_on_its_batch():
    """Rows that need one step, more, and all of them: each ends as it does by itself."""
    start, target = torch.zeros(3, 2, 4), torch.tensor([0.0, 0.02, 5.0])[:, None, None].expand(3, 2, 4)
    together = _optimise(lambda null: null * 1.5, start, target, 0.01, 8, 1e-4)
    for row in range(3):
        alone = _optimise(lambda null: null * 1.5, start[row : row + 1], target[row : row + 1], 0.01, 8, 1e-4)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-7, rtol=1e-6)
    moved = together.mean((1, 2))
    assert moved[0] == 0
    assert 0.005 < moved[1] < 0.02
    assert moved[2] > 0.07


@pytest.mark.parametrize("inversion", ["ddim", "null-text"])
def test_inverted_teachers_give_maps_at_the_wanted_steps(saved, inversion):
    options = {"inversion": inversion, "inversion_steps": 4, "inner_steps": 1}
    some = load_teacher(config(saved("sd1"), timesteps=[260], **options), "cpu")
    every = load_teacher(config(saved("sd1"), timesteps=[], **options), "cpu")
    maps = [teacher.extract([picture()], [text()], [1])[0].maps for teacher in (some, every)]
    again = some.extract([picture()], [text()], [99])[0].maps  # no noise is drawn
    assert not np.allclose(*maps)
    np.testing.assert_array_equal(maps[0], again)


# --- units, buckets, compilation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("phrases", ["none", "phrase", "mean", "product"])
def test_token_maps_merge_to_the_word_map(saved, phrases):
    words = text(phrases=phrases)
    by_word, by_token = (
        load_teacher(config(saved("sd1"), unit=unit, phrases=phrases), "cpu").extract([picture()], [words], [1])[0]
        for unit in ("word", "token")
    )
    assert len(by_token.words) > len(by_word.words)
    for word, map_YX in zip(by_word.words, by_word.maps, strict=True):
        own = [
            i for i, t in enumerate(by_token.words) if t.turn == word.turn and t.start < word.end and word.start < t.end
        ]
        assert by_token.words[own[0]].start == word.start
        assert by_token.words[own[-1]].end == word.end
        if words.text[words.spans[by_word.words.index(word)][0] :].startswith("café"):
            continue  # the two bytes of its last letter are one token here and weigh two in the word
        np.testing.assert_allclose(by_token.maps[own].mean(0), map_YX, atol=1e-6)


def test_buckets_keep_the_aspect_ratio_and_fill_batches_of_one_size(saved):
    teacher = load_teacher(config(saved("sd1"), geometry="bucket", batch_size=2), "cpu")
    shapes = {(60, 60): (32, 32), (120, 60): (16, 48), (50, 120): (48, 16), (400, 60): (16, 48)}
    images = [picture(number, size) for number, size in enumerate(list(shapes) * 2)]
    assert [teacher.adapter.size(image) for image in images] == list(shapes.values()) * 2
    sizes = []
    own = teacher.adapter.forward
    teacher.adapter.forward = lambda noised, *rest: (sizes.append(tuple(noised.shape)), own(noised, *rest))
    found = teacher.extract(images, [text()] * len(images), list(range(len(images))))
    assert {size[0] for size in sizes} == {2}
    assert len(sizes) == 4
    single = load_teacher(config(saved("sd1"), geometry="bucket", batch_size=2), "cpu")
    for number, image in enumerate(images[:4]):
        alone = single.extract([image], [text()], [number])[0]
        np.testing.assert_allclose(alone.maps, found[number].maps, atol=1e-5)


def test_one_image_of_a_rare_size_does_not_hold_back_a_stream(saved):
    teacher = load_teacher(config(saved("sd1"), geometry="bucket", batch_size=1, layers="^down"), "cpu")
    teacher.batch_size = 2
    taken = []

    def images():
        for number in range(100):
            taken.append(number)
            image = picture(number, (32, 32) if number else (64, 32))
            yield Item(image, number, number, text())

    for position, _ in enumerate(teacher.read(images())):
        assert len(taken) - position <= 5 * 2 * LOOKAHEAD, position
    assert position == 99


def test_a_change_in_a_bucketed_image_moves_the_map_there(saved):
    teacher = load_teacher(config(saved("sd1"), layers=r"down_blocks\.0", timesteps=[0], geometry="bucket"), "cpu")
    for name, module in teacher.adapter.unet.named_modules():
        if name.endswith("attn1"):
            module.to_out[0].weight.zero_()
    change = 0
    for seed in range(4):
        before = np.array(picture(seed, (96, 48)))
        after = before.copy()
        after[28:44, 64:88] = (255, 0, 0)
        maps = [teacher.extract([Image.fromarray(p)], [text()], [seed])[0].maps for p in (before, after)]
        change = change + np.abs(maps[1] - maps[0]).mean(0)
    quarters = change.reshape(2, 16, 2, 16).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == (1, 1)


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        ("sdxl", r"^down_blocks\.1\.attentions\.0\.transformer_blocks\.0", {"geometry": "bucket", "image_size": 64}),
        ("sd3", r"\.0\.", {}),
        ("flux", "^transformer_blocks", {"geometry": "bucket", "image_size": 64}),
    ],
)
@pytest.mark.parametrize(("size", "x", "y"), [((96, 48), 0.75, 0.25), ((48, 96), 0.25, 0.75)])
def test_a_change_moves_the_map_there_in_larger_families(saved, name, layers, options, size, x, y):
    """Rows and columns are not mixed up, on grids that are not square neither."""
    teacher = load_teacher(config(saved(name), layers=layers, timesteps=[1], **options), "cpu")
    for part, module in getattr(teacher.adapter, "unet", torch.nn.Module()).named_modules():
        if part.endswith("attn1"):
            module.to_out[0].weight.zero_()
    change = 0
    for seed in range(4):
        before = np.array(picture(seed, size))
        after = before.copy()
        left, top, reach = round(x * size[0]), round(y * size[1]), (size[0] // 10, size[1] // 10)
        after[top - reach[1] : top + reach[1], left - reach[0] : left + reach[0]] = (255, 0, 0)
        maps = [teacher.extract([Image.fromarray(p)], [text()], [seed])[0].maps for p in (before, after)]
        change = change + np.abs(maps[1] - maps[0]).mean(0)
    quarters = change.reshape(2, 16, 2, 16).mean((1, 3))
    assert np.unravel_index(quarters.argmax(), (2, 2)) == (int(y > 0.5), int(x > 0.5))


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_the_capture_goes_through_the_compiler(saved, name, monkeypatch):
    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: own(model, backend="aot_eager", dynamic=False))
    side = 32 if name in ("sd1", "sd2") else 16
    options = {"image_size": 16} if name == "flux" else {}
    texts = [text(answer=answer) for answer in ("Near.", "Near a café.", "Yes.", "It is near it.", "No, it is not.")]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        load_teacher(config(saved(name), compile=compiled, batch_size=1, **options), "cpu").extract(
            [picture(0, (side, side))] * 5, texts, range(5)
        )
        for compiled in (False, True)
    )
    for one, other in zip(plain, compiled, strict=True):
        np.testing.assert_allclose(one.maps, other.maps, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    # Texts of 6 to 9 words in heads 8 or 16 wide: one graph, or two, never one for each text.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
