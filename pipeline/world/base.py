"""Pre-train the tiny student on captions: the "base" that every arm starts from."""

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
from pipeline.world.scenes import render, sample_scene
from pipeline.world.student import build_mllama
from pipeline.world.texts import caption, exchanges, teacher_text

SIZES = {"vision_hidden": 96, "vision_layers": 3, "global_layers": 1}


def train_base(out: Path, steps: int = 2000, scenes: int = 8000, seed: int = 0, batch_size: int = 32, **sizes) -> None:
    """Build an untrained Llama 3.2 Vision in miniature, teach it to caption scenes, and save it in ``out``.

    The scenes are of the train split's kind but none of its own; no question is asked but "Describe the image.".
    """
    rng = np.random.default_rng([seed, 2])
    drawn = [sample_scene(rng, "train") for _ in range(scenes)]
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    started, running = time.monotonic(), None
    for step in range(steps):
        items = []
        for index in rng.integers(len(drawn), size=batch_size):
            item = family.encode_one(_example(drawn[int(index)], caption(rng, drawn[int(index)]).text, picture=False))
            item.image, item.pieces, item.meta = images[index].image, images[index].pieces, images[index].meta
            items.append(item)
        batch = family.collate(items)
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"base step {step} loss {running:.4f} {(time.monotonic() - started) / (step + 1):.3f} s", flush=True)
    model.save_pretrained(out)


def _example(scene, text: str, picture: bool = True) -> Example:
    stream = io.BytesIO()
    if picture:
        Image.fromarray(render(scene)).save(stream, "PNG")
    turns = (Turn("user", "Describe the image."), Turn("assistant", text))
    return Example("0", stream.getvalue() or None, "png", turns, "world", "train", "Apache-2.0")
