"""What a student makes of one example, for the eye: what is learnt, which tokens each word is, where it looks."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.student.batch import IGNORED

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.examples import Example
    from pipeline.student.batch import Item
    from pipeline.student.load import Student
    from pipeline.student.planes import Piece

CELL = 256  # pixels on the longer side of each picture
LABEL = 16  # and of the line of text above it


def describe(student: "Student", example: "Example", item: "Item") -> list[str]:
    """Lines of text: every run of learnt tokens, decoded, and every aligned word with its tokens.

    Control tokens are spelt out; positions count from 0.
    """
    tokenizer, ids = student.family.tokenizer, item.ids.tolist()
    learnt = (item.labels != IGNORED).tolist()
    lines = [f"{example.key}: {len(ids)} tokens, {sum(learnt)} learnt, {len(item.words)} words to align"]
    start = 0
    while start < len(ids):
        end = start
        while end < len(ids) and learnt[end] == learnt[start]:
            end += 1
        if learnt[start]:
            lines.append(f"learnt  {start:5d}-{end - 1:<5d} {tokenizer.decode(ids[start:end])!r}")
        start = end
    for word, (start, end) in zip(item.words, item.tokens, strict=True):
        tokens = " ".join(repr(tokenizer.decode([token])) for token in ids[start:end])
        lines.append(f"word    {start:5d}-{end - 1:<5d} {example.word_text(word)!r}: {tokens}")
    return lines


def picture(student: "Student", example: "Example", item: "Item") -> "Image":
    """The image with the outlines of its patches, then the student's raw attention at each word (mean over heads and
    layers, each map scaled to its own range)."""
    from PIL import Image

    from pipeline.examples import decode
    from pipeline.student.capture import AttentionTap, student_maps

    image = decode(example.image)
    scale = CELL / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    small = image.resize(size, Image.Resampling.BICUBIC)
    cells = [("patches", outlined(small, item.pieces))]
    if item.words:
        device = next(student.model.parameters()).device
        batch = student.family.collate([item]).to(device)
        with AttentionTap(student.model, student.family) as tap, torch.inference_mode():
            tap.rows(batch.words)
            student.model(**batch.inputs)
            maps_WSS = student_maps(tap, batch).mean((1, 2)).cpu().numpy()
        cells += [
            (example.word_text(word), heated(small, map_SS)) for word, map_SS in zip(item.words, maps_WSS, strict=True)
        ]
    return sheet(cells, size)


def outlined(image: "Image", pieces: "list[Piece]") -> "Image":
    """The image with a line around every patch."""
    from PIL import ImageDraw

    out = image.copy()
    draw = ImageDraw.Draw(out)
    colours = ("#ffffff", "#ff4040", "#40c0ff")
    for number, piece in enumerate(pieces):
        rows, cols = piece.columns_HW.shape
        y = [(piece.top + piece.step_y * i) * image.height for i in range(rows + 1)]
        x = [(piece.left + piece.step_x * i) * image.width for i in range(cols + 1)]
        colour = colours[number % len(colours)]
        for at in y:
            draw.line([(x[0], at), (x[-1], at)], fill=colour)
        for at in x:
            draw.line([(at, y[0]), (at, y[-1])], fill=colour)
    return out


def heated(image: "Image", map_SS: np.ndarray) -> "Image":
    """The image, grey where the map is low and red where it is high."""
    from PIL import Image

    unit = (map_SS - map_SS.min()) / max(float(np.ptp(map_SS)), 1e-12)
    heat = Image.fromarray((unit * 200).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    red = Image.new("RGB", image.size, (255, 30, 0))
    return Image.composite(red, image.convert("L").convert("RGB"), heat)


def sheet(cells: "list[tuple[str, Image]]", size: tuple[int, int], columns: int = 5) -> "Image":
    """Pictures of one size in rows, each with its label above."""
    from PIL import Image, ImageDraw

    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    out = Image.new("RGB", (columns * (size[0] + 4), rows * (size[1] + LABEL + 4)), "white")
    draw = ImageDraw.Draw(out)
    for number, (label, cell) in enumerate(cells):
        x, y = number % columns * (size[0] + 4), number // columns * (size[1] + LABEL + 4)
        draw.text((x + 2, y + 2), label, fill="black")
        out.paste(cell, (x, y + LABEL))
    return out


def inspect(student: "Student", example: "Example", folder: Path, name: str) -> list[str]:
    """Writes the picture to ``folder/name.png`` and returns the lines of text.

    Raises:
        EncodeError: the student cannot take the example.
    """
    item = student.family.encode_one(example)
    lines = describe(student, example, item)
    if example.image is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name}.png"
        picture(student, example, item).save(file)
        lines.append(f"picture {file}")
    return lines
