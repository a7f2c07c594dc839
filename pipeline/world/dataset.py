"""Write the embedded world to disk as a user's data set would be: LLaVA-style JSON lists and PNG files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.regions import encode_rle
from pipeline.world.scenes import SPLITS, masks, render, sample_scene
from pipeline.world.texts import Text, exchanges

SIZES = {"train": 1500, "val": 250, "test": 500, "ood_pairs": 170, "ood_count": 170, "ood_background": 170}
QUESTIONS = 2  # per scene
CAPTIONED = 0.2  # share of the scenes that also have a caption
VERSION = 2  # of the drawing and wording; part of the source's fingerprint


def write_world(out: Path, sizes: Mapping[str, int] = SIZES, seed: int = 0) -> None:
    """Write ``<out>/<split>.json`` and ``<out>/images/<split>/<number>.png`` for each split in ``sizes``.

    Each record has ``id``, ``image`` (relative to ``<out>``), ``conversations`` (from/value, the image marker
    first) and ``meta``: ``regions`` (turn, start, end, kind, rle: where the named objects are visible; offsets count
    characters of the turn without the image marker), ``turns`` (the kind of each answer) and ``background``.
    Every scene depends on (seed, split, number) alone: a larger size only appends.
    """
    for split, size in sizes.items():
        (out / "images" / split).mkdir(parents=True, exist_ok=True)
        records = [_record(out, split, number, seed) for number in range(size)]
        (out / f"{split}.json").write_text(json.dumps(records, separators=(",", ":")) + "\n", encoding="utf-8")


def _record(out: Path, split: str, number: int, seed: int) -> dict:
    rng = scene_rng(split, number, seed)
    scene = sample_scene(rng, split)
    told = exchanges(rng, scene, QUESTIONS, with_caption=rng.random() < CAPTIONED)
    name = f"images/{split}/{number:05d}.png"
    Image.fromarray(render(scene)).save(out / name)
    masks_NHW = masks(scene)
    conversations, regions, kinds = [], [], []
    for index, exchange in enumerate(told):
        marker = "<image>\n" if index == 0 else ""
        conversations.append({"from": "human", "value": marker + exchange.question.text})
        conversations.append({"from": "gpt", "value": exchange.answer.text})
        regions += _regions(exchange.question, 2 * index, masks_NHW) + _regions(
            exchange.answer, 2 * index + 1, masks_NHW
        )
        kinds.append({"turn": 2 * index + 1, "kind": exchange.kind})
    meta = {"regions": regions, "turns": kinds, "background": scene.background}
    return {"id": f"{split}-{number:05d}", "image": name, "conversations": conversations, "meta": meta}


def scene_rng(split: str, number: int, seed: int) -> np.random.Generator:
    """The random numbers of one scene; no two splits share any."""
    assert split in SPLITS
    return np.random.default_rng([seed, zlib.crc32(split.encode()), number])


def _regions(text: Text, turn: int, masks_NHW: np.ndarray) -> list[dict]:
    return [
        {"turn": turn, "start": start, "end": end, "kind": kind, "rle": encode_rle(masks_NHW[list(things)].any(axis=0))}
        for start, end, things, kind in text.spans
    ]
