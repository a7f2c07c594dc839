"""Pre-train the tiny student on captions, lightly: the "base" of every arm.

It comes to its fine-tuning with words and colours and next to no shapes, so that there is something left to see. A base
that names every coloured shape before it is asked anything can be had by `tower_steps` and more steps; looking at the
right place does nothing for its answers (docs/log.md).

No mask and no region is ever shown to it, and no question is asked but "Describe the image.".
"""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from pipeline.examples import Example, Turn
from pipeline.student.batch import IGNORED
from pipeline.student.config import ModelConfig
from pipeline.student.load import load_student
from pipeline.world.matching import NAMES, bag_error, told
from pipeline.world.scenes import COLOURS, SHAPES, render, sample_scene
from pipeline.world.student import build_mllama
from pipeline.world.texts import caption, exchanges, teacher_text

SIZES = {"vision_hidden": 96, "vision_layers": 2, "global_layers": 1}
ALONE = 0.5  # share of the scenes with one object


def train_base(out: Path, steps: int = 300, tower_steps: int = 0, scenes: int = 16000, seed: int = 0, **sizes) -> None:
    """Build an untrained Llama 3.2 Vision in miniature, teach it to caption scenes, and save it in ``out``.

    The scenes are of the train split's kind but none of its own.

    Args:
        steps: on captions, 32 scenes each.
        tower_steps: on the vision tower alone, before.
    """
    rng = np.random.default_rng([seed, 2])
    drawn = [sample_scene(rng, "train", count=int(rng.random() < ALONE)) for _ in range(scenes)]
    # The tokenizer also sees questions, so that an answer is one token per word.
    words = [teacher_text(rng, scene).text for scene in drawn[:3000]]
    words += [e.question.text + " " + e.answer.text for scene in drawn[:3000] for e in exchanges(rng, scene, 3, False)]
    words += [caption(rng, scene).text for scene in drawn[:2000]] + ["Describe the image."] * 50
    build_mllama(out, words, seed=seed, **{**SIZES, **sizes})
    student = load_student(ModelConfig(name="base", path=str(out), max_length=512))
    model, family = student.model.train(), student.family
    print(f"base: {sum(p.numel() for p in model.parameters())} parameters", flush=True)
    images = [family.encode_one(_example(scene, "a")) for scene in drawn]
    torch.manual_seed(seed)
    if tower_steps:
        train_tower(model.model.vision_model, images, drawn, tower_steps, rng)
    params = list(model.parameters())
    optimizer, schedule = _optimizer(params, steps)
    started, running = time.monotonic(), None
    names = {kind: _token_ids(family, words) for kind, words in (("shapes", SHAPES), ("colours", COLOURS))}
    for step in range(steps):
        items = []
        for index in rng.integers(len(drawn), size=32):
            item = family.encode_one(_example(drawn[int(index)], caption(rng, drawn[int(index)]).text, picture=False))
            item.image, item.pieces, item.meta = images[index].image, images[index].pieces, images[index].meta
            items.append(item)
        batch = family.collate(items)
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
        _update(optimizer, schedule, loss, params)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            right = {kind: _right(logits, batch.labels[:, 1:], ids) for kind, ids in names.items()}
            seconds = (time.monotonic() - started) / (step + 1)
            print(f"base step {step + 1} loss {running:.4f} {right} {seconds:.3f} s/step", flush=True)
        if step % 400 == 399 or step == steps - 1:
            model.save_pretrained(out)


def train_tower(tower: torch.nn.Module, images: list, drawn: list, steps: int, rng: np.random.Generator) -> None:
    """Teach the vision tower which coloured shapes a picture shows, and so to keep at each patch what lies there.

    Real towers come to a VLM with such features from image-text pairs. From captions alone this one took ten times as
    long to tell shapes apart, and taught by the mean over its patches it wrote what it saw into patches that were free.

    Args:
        images: encoded examples, in the order of `drawn`. The first half of the steps takes those of one object.
    """
    alone = np.array([index for index, scene in enumerate(drawn) if len(scene.things) == 1])
    heads = torch.nn.ModuleList(torch.nn.Linear(tower.config.vision_output_dim, len(names) + 1) for names in NAMES)
    for head in heads:
        torch.nn.init.constant_(head.bias[-1:], 2.0)  # most patches show nothing
    params = [*tower.parameters(), *heads.parameters()]
    optimizer, schedule = _optimizer(params, steps)
    for step in range(steps):
        rows = rng.choice(alone, 64) if step < steps // 2 else rng.integers(len(drawn), size=64)
        chosen = [images[row].image for row in rows]
        batch = {name: torch.stack([image[name] for image in chosen])[:, None] for name in chosen[0]}
        with torch.autocast("cpu", torch.bfloat16):
            found = tower(**batch).last_hidden_state
        patches_BPD = found[:, 0, 0, 1:].float()
        told_BK = told([drawn[row] for row in rows])
        error_B, absent_BK = bag_error(*(head(patches_BPD).log_softmax(-1) for head in heads), told_BK)
        loss = error_B.mean()
        _update(optimizer, schedule, loss, params)
        if step % 100 == 99:
            right = told_BK.gather(1, absent_BK.argmin(1, keepdim=True)).mean().item()
            print(f"tower step {step + 1} loss {loss.item():.3f} surest pair right {right:.3f}", flush=True)


def _optimizer(params: list, steps: int) -> tuple:
    """AdamW with a short warm-up and a cosine."""
    optimizer = torch.optim.AdamW(params, lr=1.5e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    return optimizer, schedule


def _update(optimizer, schedule, loss: torch.Tensor, params: list) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    schedule.step()


def _token_ids(family, words) -> torch.Tensor:
    """Ids of the words that are one token with a space before them."""
    found = [family.tokenizer(" " + word, add_special_tokens=False).input_ids for word in words]
    return torch.tensor([ids[0] for ids in found if len(ids) == 1])


def _right(logits: torch.Tensor, labels: torch.Tensor, ids: torch.Tensor) -> float:
    """Share of the labels among `ids` that get the highest logit."""
    rows = torch.isin(labels, ids)
    return round((logits[rows].argmax(-1) == labels[rows]).float().mean().item(), 3)


def _example(scene, text: str, picture: bool = True) -> Example:
    stream = io.BytesIO()
    if picture:
        Image.fromarray(render(scene)).save(stream, "PNG")
    turns = (Turn("user", "Describe the image."), Turn("assistant", text))
    return Example("0", stream.getvalue() or None, "png", turns, "world", "train", "Apache-2.0")
