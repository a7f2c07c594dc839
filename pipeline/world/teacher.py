"""Train the tiny Stable Diffusion of the embedded world from scratch and save it as a pipeline directory.

Everything is the real thing at a small size: an ``AutoencoderKL`` that turns 64x64 pixels into 16x16 latents, a causal
``CLIPTextModel`` with a ``CLIPTokenizer``, and a ``UNet2DConditionModel`` with cross-attention at 16x16 and 8x8. It is
trained to predict noise from a picture's text, and to match the two by its cross-attention (`Matching`), for which it
is told which coloured shapes the picture holds, as a caption that names them all would say. No mask and no place is
ever shown to it.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipeline.world.matching import Matching
from pipeline.world.scenes import render, sample_scene
from pipeline.world.texts import Text, teacher_text

BATCH = 16  # scenes, each seen upright and turned
WINDOW = 40  # tokens, start and end markers included
# Words of the bundled public data set, so that its questions are not spelled out in letters.
EXTRA_WORDS = "color contain contains present image rectangle teal brown gray black does not in yes no is there a the"


@dataclass(frozen=True)
class Round:
    """A warm-up and a cosine of the learning rate.

    Attributes:
        noise, match: weights of the two errors.
        timesteps: the noise drawn, from and up to.
        alone: share of the pictures with one object.
    """

    steps: int
    noise: float
    match: float
    timesteps: tuple[int, int]
    alone: float


# By noise prediction alone the maps begin to point only after thousands of steps, if at all: see docs/log.md.
ROUNDS = (
    Round(500, 0.1, 0.3, (20, 400), 0.1),
    Round(700, 0.1, 0.3, (20, 250), 0.55),
    Round(1200, 0.3, 0.3, (20, 300), 0.4),
    Round(900, 0.3, 0.3, (20, 250), 0.35),
)


def build_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, lower case, ``</w>``) whose merges cover every word of ``texts``."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.WhitespaceSplit()])
    trainer = trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", min_frequency=1, show_progress=False)
    bpe.train_from_iterator([*texts, EXTRA_WORDS], trainer)
    learned = json.loads(bpe.to_str())["model"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(pair) for pair in learned["merges"]]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=WINDOW)


def build_teacher(tokenizer: CLIPTokenizer) -> dict[str, torch.nn.Module]:
    """Untrained components, about 2 million parameters in all."""
    vae = AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 16, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=WINDOW,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(40, 80),
        # Cross-attention at 16x16 (three layers) and once at 8x8, in the middle block.
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return {"vae": vae, "text_encoder": text_encoder, "unet": unet}


def draw_pixels(scenes: list) -> torch.Tensor:
    """Scenes as pixels in [-1, 1], (N, 3, 64, 64)."""
    stack = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def fold(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Set the encoder to an exact linear fold: every 4x4 block of pixels onto its principal components, whitened.

    A learnt encoder this small blurs stars, crosses and diamonds into one blob, and what the latents do not hold the
    text cannot name. The layers that are not linear are made so: residual branches and the attention are zero, the
    last GroupNorm is ruled by a pair of large constants in every group, and its SiLU is undone by carrying each number
    with both signs, since silu(x) - silu(-x) = x.

    Args:
        vae: as `build_teacher` makes it; its encoder is overwritten.
        pixels: (N, 3, 64, 64) in [-1, 1], to find the components and their variances.
    """
    encoder, count, big = vae.encoder, vae.config.latent_channels, 300.0
    for part in (encoder, vae.quant_conv):
        for name, parameter in part.named_parameters():
            if "norm" not in name:
                parameter.zero_()
    blocks = F.pixel_unshuffle(F.pixel_unshuffle(pixels, 2), 2).permute(0, 2, 3, 1).reshape(-1, 48).double()
    mean = blocks.mean(0)
    variance, axes = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
    variance, axes = variance.flip(0)[:count], axes.flip(1)[:, :count]
    print(f"fold: variances {[round(v, 3) for v in variance.tolist()]}", flush=True)
    # The grey of the background carries most of the variance; unwhitened, the diffusion noise would drown the rest.
    # Directions that hold next to nothing are not blown up to full strength.
    scale = variance.clamp_min(0.01 * variance.mean()).rsqrt()
    project = (axes * scale).T.float()  # (count, 48): channel order of pixel_unshuffle twice

    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1.0
    first, second = (block.downsamplers[0].conv.weight for block in encoder.down_blocks[:2])
    for color in range(3):
        for y in range(2):
            for x in range(2):
                first[4 * color + 2 * y + x, color, y, x] = 1.0
    for channel in range(12):
        for y in range(2):
            for x in range(2):
                second[:count, channel, y, x] = project[:, 4 * channel + 2 * y + x]
    # Into groups of eight channels: three numbers with both signs and the constants that rule the norm.
    wide, norm = encoder.down_blocks[2].resnets[0].conv_shortcut, encoder.conv_norm_out
    size = norm.num_channels // norm.num_groups
    for group in range(norm.num_groups):
        wide.bias[size * group], wide.bias[size * group + 1] = big, -big
    norm.weight.fill_(big * math.sqrt(2 / size))
    for number in range(count):
        place = size * (number // 3) + 2 + 2 * (number % 3)
        wide.weight[place, number], wide.weight[place + 1, number] = 1.0, -1.0
        encoder.conv_out.weight[number, place, 1, 1], encoder.conv_out.weight[number, place + 1, 1, 1] = 1.0, -1.0
        encoder.conv_out.bias[number] = -float(project[number] @ mean.float())
    encoder.conv_out.bias[count:] = -12.0  # next to no variance: a latent is its mean
    vae.quant_conv.weight[range(2 * count), range(2 * count), 0, 0] = 1.0
    vae.register_to_config(scaling_factor=1.0)


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, 16, 16), the posterior means."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(128)])


def train_decoder(vae: AutoencoderKL, pixels: torch.Tensor, latents: torch.Tensor, steps: int, generator) -> None:
    """Squared error of the reconstruction. Nothing here ever decodes, but a pipeline without a decoder is none."""
    params = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(pixels), (16,), generator=generator)
        loss = F.mse_loss(vae.decode(latents[rows]).sample, pixels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"decoder step {step} error {loss.item():.4f}", flush=True)


def train_teacher(
    out: Path, rounds: Sequence[Round] = ROUNDS, decoder_steps: int = 200, scenes: int = 12000, seed: int = 0
) -> None:
    """Train and save the pipeline directory ``out``; by its steps some 40 minutes on one core."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    drawn = [sample_scene(rng, "train", count=int(index % 4 == 3)) for index in range(scenes)]
    pixels = draw_pixels(drawn)
    tokenizer = build_tokenizer([teacher_text(rng, scene).text for scene in drawn for _ in range(2)])
    parts = build_teacher(tokenizer)
    print({name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}, len(tokenizer), flush=True)
    fold(parts["vae"], pixels)
    latents = encode(parts["vae"], pixels)
    train_decoder(parts["vae"], pixels, latents, decoder_steps, generator)
    parts["vae"].eval()
    views = torch.stack([latents, encode(parts["vae"], pixels.flip(2, 3))])
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    matching = Matching(parts["unet"], tokenizer, parts["text_encoder"])
    for plan in rounds:
        train_unet(parts, tokenizer, scheduler, matching, views, drawn, plan, generator, rng)
        save(out, parts, tokenizer, scheduler)


def train_unet(parts, tokenizer, scheduler, matching: Matching, views, drawn, plan: Round, generator, rng) -> None:
    """One round in bfloat16 (half as slow again without), with the text encoder trained along.

    Args:
        views: (2, N, C, 16, 16) latents of the drawn scenes, upright and turned by half a circle.
    """
    unet, text_encoder = parts["unet"].to(memory_format=torch.channels_last), parts["text_encoder"]
    params = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=1e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / plan.steps))),
    )
    low, high = plan.timesteps
    alone = [index for index, scene in enumerate(drawn) if len(scene.things) == 1]
    several = [index for index, scene in enumerate(drawn) if len(scene.things) > 1]
    started = time.time()
    for step in range(plan.steps):
        rows = [int(rng.choice(alone if rng.random() < plan.alone else several)) for _ in range(BATCH)]
        # One text in twenty is empty, so that guidance and inversion have an unconditional model to work with.
        texts = [teacher_text(rng, drawn[row]) if rng.random() > 0.05 else Text() for row in rows]
        coded = tokenizer(
            [text.text for text in texts], padding="max_length", max_length=WINDOW, truncation=True, return_tensors="pt"
        )
        # Less noise more often: what a word names has to be seen to be matched.
        t = (low + (high - low) * torch.rand(BATCH, generator=generator) ** 1.5).long()
        clean = views[:, rows].flatten(0, 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, t.repeat(2)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            states_BLD = text_encoder(coded.input_ids)[0]
            predicted = unet(noisy, t.repeat(2), encoder_hidden_states=states_BLD.repeat(2, 1, 1)).sample
            left_B = scheduler.alphas_cumprod[t]
            matched = matching(texts, coded, states_BLD, [drawn[row] for row in rows], left_B, generator)
        # Of a turned picture "left of" is not true.
        error = F.mse_loss(predicted[:BATCH].float(), noise[:BATCH])
        optimizer.zero_grad()
        (plan.noise * error + plan.match * matched).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            seconds = (time.time() - started) / (step + 1)
            print(
                f"unet step {step} noise {error.item():.4f} match {matched.item():.3f} {seconds:.3f} s/step", flush=True
            )


def save(out: Path, parts: dict, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler) -> None:
    """Write the directory that ``StableDiffusionPipeline.from_pretrained`` reads, the UNet in half precision."""
    StableDiffusionPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=tokenizer,
        unet=copy.deepcopy(parts["unet"]).half(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)
