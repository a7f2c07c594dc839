"""Procedural scenes of coloured shapes with an exact mask for every object.

A scene is 64x64 pixels with one to four objects (five or six in ``ood_count``) on a plain, shaded, striped,
chequered or noisy background. Later objects lie over earlier ones, so masks are the VISIBLE pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
OVERSAMPLE = 4
# Centres lie on a grid of this many pixels. Models this small and young have no convolution to share what they learn
# between positions: with centres anywhere, a tower of 8x8 patches took ten times as long to tell shapes apart.
GRID = 8
COUNTS = (0.1, 0.35, 0.35, 0.2)  # shares of one to four objects
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 160, 60),
    "blue": (40, 80, 214),
    "yellow": (236, 208, 40),
    "purple": (150, 50, 180),
    "orange": (240, 130, 30),
    "cyan": (40, 195, 205),
}
SIZES = {"small": (5.5, 7.0), "large": (9.5, 12.0)}
BACKGROUNDS = ("plain", "shaded", "striped", "chequered", "noisy")
OOD_BACKGROUNDS = ("dotted", "wavy", "bricks")

# Colour-shape pairs that no image and no text outside `ood_pairs` may contain: each shape and each colour is
# held out at most twice, so that all of them stay well known on their own.
HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("green", "triangle"),
        ("blue", "circle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("orange", "diamond"),
    }
)
SPLITS = ("train", "val", "test", "ood_pairs", "ood_count", "ood_background")


@dataclass(frozen=True)
class Thing:
    """One object: centre (x, y) and radius r in pixels, angle in radians."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    r: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Objects from back to front, a background kind, and the seed of every random pixel."""

    things: tuple[Thing, ...]
    background: str
    seed: int


def sample_scene(rng: np.random.Generator, split: str = "train", count: int = 0) -> Scene:
    """Draw a scene of a split; about a third of the crowded scenes contain a partly hidden object.

    Args:
        count: objects; 0 draws a number as well.
    """
    if not count:
        count = int(rng.integers(5, 7)) if split == "ood_count" else int(rng.choice([1, 2, 3, 4], p=COUNTS))
    backgrounds = OOD_BACKGROUNDS if split == "ood_background" else BACKGROUNDS
    while True:
        gap = 0.72 if rng.random() < 0.35 else 1.0
        things = _place(rng, count, gap, small_only=split == "ood_count", held_out=split == "ood_pairs")
        if things is not None:
            break
    scene = Scene(things, str(rng.choice(backgrounds)), int(rng.integers(2**31)))
    areas = masks(scene).sum(axis=(1, 2))
    # Nothing may be hidden so far that its words have no pixels to point at.
    return scene if areas.min() >= 30 else sample_scene(rng, split, count)


def _place(rng, count: int, gap: float, small_only: bool, held_out: bool) -> tuple[Thing, ...] | None:
    things: list[Thing] = []
    for index in range(count):
        # `ood_pairs` has one object of a held-out pair in every scene, first in the list; the others are ordinary.
        unseen = held_out and index == 0
        pairs = [(c, s) for c in COLOURS for s in SHAPES if ((c, s) in HELD_OUT) == unseen]
        colour, shape = pairs[int(rng.integers(len(pairs)))]
        size = "small" if small_only or (count == 4 and rng.random() < 0.6) else str(rng.choice(list(SIZES)))
        r = float(rng.uniform(*SIZES[size]))
        for _ in range(60):
            low, high = math.ceil((r + 1) / GRID), math.floor((SIDE - r - 1) / GRID)
            x, y = GRID * rng.integers(low, high + 1, size=2)
            if all(math.hypot(x - t.x, y - t.y) > gap * (r + t.r) for t in things):
                things.append(Thing(shape, colour, size, float(x), float(y), r, float(rng.uniform(-0.3, 0.3))))
                break
        else:
            return None
    return tuple(things)


def _polygon(thing: Thing) -> list[tuple[float, float]]:
    """Corners in units of the radius, before rotation."""
    if thing.shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if thing.shape == "diamond":
        return [(0, -1.1), (0.65, 0), (0, 1.1), (-0.65, 0)]
    if thing.shape == "triangle":
        return [(0, -1.05), (1.0, 0.8), (-1.0, 0.8)]
    if thing.shape == "cross":
        a = 0.34
        return [
            (-a, -1),
            (a, -1),
            (a, -a),
            (1, -a),
            (1, a),
            (a, a),
            (a, 1),
            (-a, 1),
            (-a, a),
            (-1, a),
            (-1, -a),
            (-a, -a),
        ]
    radii = [1.12 if k % 2 == 0 else 0.46 for k in range(10)]
    return [(q * math.sin(k * math.pi / 5), -q * math.cos(k * math.pi / 5)) for k, q in enumerate(radii)]


def _coverage(thing: Thing) -> np.ndarray:
    """Antialiased coverage (64, 64) in [0, 1]."""
    canvas = Image.new("L", (SIDE * OVERSAMPLE, SIDE * OVERSAMPLE), 0)
    draw = ImageDraw.Draw(canvas)
    x, y, r = thing.x * OVERSAMPLE, thing.y * OVERSAMPLE, thing.r * OVERSAMPLE
    if thing.shape == "circle":
        draw.ellipse((x - 0.92 * r, y - 0.92 * r, x + 0.92 * r, y + 0.92 * r), fill=255)
    else:
        c, s = math.cos(thing.angle), math.sin(thing.angle)
        draw.polygon([(x + r * (c * u - s * v), y + r * (s * u + c * v)) for u, v in _polygon(thing)], fill=255)
    fine = np.asarray(canvas, dtype=np.float32) / 255
    return fine.reshape(SIDE, OVERSAMPLE, SIDE, OVERSAMPLE).mean(axis=(1, 3))


def masks(scene: Scene) -> np.ndarray:
    """Visible mask of each object, bool (n, 64, 64); no pixel belongs to two objects."""
    owner = np.full((SIDE, SIDE), -1)
    for index, thing in enumerate(scene.things):
        owner[_coverage(thing) > 0.5] = index
    return owner[None] == np.arange(len(scene.things))[:, None, None]


def render(scene: Scene) -> np.ndarray:
    """The picture, uint8 (64, 64, 3)."""
    rng = np.random.default_rng(scene.seed)
    image = _background(scene.background, rng)
    for thing in scene.things:
        cover = _coverage(thing)[..., None]
        paint = np.array(COLOURS[thing.colour], dtype=np.float32) * rng.uniform(0.88, 1.08) + rng.normal(0, 5, 3)
        grain = rng.normal(0, 5, (SIDE, SIDE, 1))
        image = image * (1 - cover) + (paint + grain) * cover
    return np.clip(image, 0, 255).astype(np.uint8)


def _background(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Greyish with a slight tint, so that no background carries the colour of an object."""
    base = rng.uniform(60, 215) + rng.normal(0, 8, 3)
    other = base + rng.choice([-1, 1]) * rng.uniform(18, 42)
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    turn = rng.uniform(0, math.pi)
    along = x * math.cos(turn) + y * math.sin(turn)
    period = rng.uniform(6, 14)
    if kind == "plain":
        weight = np.zeros_like(x)
    elif kind == "shaded":
        weight = (along - along.min()) / (along.max() - along.min())
    elif kind == "striped":
        weight = (np.sin(2 * math.pi * along / period) > 0).astype(np.float32)
    elif kind == "chequered":
        weight = ((x // (period / 2)).astype(int) + (y // (period / 2)).astype(int)) % 2
    elif kind == "noisy":
        coarse = Image.fromarray(rng.uniform(0, 255, (16, 16)).astype(np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
        weight = np.asarray(coarse, dtype=np.float32) / 255
    elif kind == "dotted":
        weight = (np.hypot(x % period - period / 2, y % period - period / 2) < period / 3.5).astype(np.float32)
    elif kind == "wavy":
        weight = 0.5 + 0.5 * np.sin(2 * math.pi * (y + 4 * np.sin(2 * math.pi * x / 23)) / period)
    else:  # bricks
        row = (y // (period / 1.6)).astype(int)
        weight = ((y % (period / 1.6) < 1.3) | ((x + row * period / 2) % period < 1.3)).astype(np.float32)
    flat = base + (other - base) * np.asarray(weight, dtype=np.float32)[..., None]
    return flat + rng.normal(0, rng.uniform(1, 7), (SIDE, SIDE, 1))
