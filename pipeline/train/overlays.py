"""Pictures of a run: a few fixed examples, each with a word, where its target lies and where the student looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.student.capture import mean_maps

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from pipeline.student.batch import StudentBatch
    from pipeline.train.data import Batches

FOLDER = "overlays"


@dataclass(frozen=True)
class Shown:
    """One fixed example.

    Args:
        batch: the example alone.
        place: of the word among the batch's.
        label: the word and the example's key.
        image: decoded.
        target: (32, 32) in [0, 1], or None where the word has none.
    """

    batch: StudentBatch
    place: int
    label: str
    image: Image.Image
    target: np.ndarray | None


class Overlays:
    """The first held-out examples that have a picture and words.

    Of an example's words the longest is taken, of those with a target if there are any: the likeliest to name
    something.
    All processes run their forwards, for sharded weights need all of them; the main one draws.

    Args:
        batches: the held-out examples.
        count: how many.
        run: the pictures are written below it, as ``overlays/<step>.png``.
        start: steps done; pictures of later ones are of a run that this one repeats, and are removed.
        main: whether this process draws.
        show: is given each picture and its step.
    """

    def __init__(
        self,
        batches: Batches,
        count: int,
        run: Path,
        start: int,
        device: torch.device,
        main: bool,
        show: Callable[[Image.Image, int], None],
    ):
        self.folder, self.device, self.main, self.show = run / FOLDER, device, main, show
        self.shown: list[Shown] = []
        for number in batches.plan.numbers:
            if len(self.shown) == count:
                break
            one = _chosen(batches, number)
            if one is not None:
                self.shown.append(one)
        if main:
            for path in self.folder.glob("*.png"):
                if not start or int(path.stem) > start:
                    path.unlink()

    def draw(self, tuned: nn.Module, step: int) -> None:
        """One sheet of the weights after ``step`` steps; in evaluation mode."""
        from pipeline import receipts
        from pipeline.overlay import encoded, enlarge, overlay, sheet

        rows = []
        for one in self.shown:
            batch = one.batch.to(self.device)
            tuned(batch)
            if not self.main:
                continue
            tap = getattr(tuned, "module", tuned).tap
            student_SS = mean_maps(tap, batch)[one.place].float().cpu().numpy()
            target = None if one.target is None else overlay(one.image, one.target)
            rows.append((one.label, [enlarge(one.image), target, overlay(one.image, student_SS)]))
        if not rows:
            return
        picture = sheet(["image", "target", f"student, step {step}"], rows)
        receipts.write_file(self.folder / f"{step:08d}.png", encoded(picture))
        self.show(picture, step)


def _chosen(batches: Batches, number: int) -> Shown | None:
    from pipeline.examples import ImageError, decode

    example = batches.archive[number]
    if example.image is None:
        return None
    found = batches.only(number)
    if found is None or not len(found.words):
        return None
    try:
        image = decode(example.image)
    except ImageError:
        return None
    words, valid = found.words.word, found.valid.tolist()
    places = [place for place, has in enumerate(valid) if has] or range(len(words))
    place = max(places, key=lambda at: (words[at].end - words[at].start, -words[at].start))
    target = found.targets[place].numpy() if valid[place] else None
    return Shown(found, place, f"{example.word_text(words[place])}  ({example.key})", image, target)
