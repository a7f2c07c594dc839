"""Maps of the words of gold answers, of students and of the teacher, measured against the regions of those words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluate.pointing import measure, word_region
from pipeline.evaluate.questions import Question, alone

if TYPE_CHECKING:
    from pipeline.archive import Archive
    from pipeline.config import Config
    from pipeline.evaluate.shares import Share
    from pipeline.examples import Example, Word
    from pipeline.student.load import Student


@dataclass(frozen=True)
class Asked:
    """A question with its example alone (see `questions.alone`) and the regions of its answer's words.

    Attributes:
        phrases: the same for whole phrases, where those are measured instead of words.
    """

    task: str
    question: Question
    example: Example
    regions: dict[Word, tuple[np.ndarray, str]]
    phrases: dict[Word, tuple[np.ndarray, str]] = field(default_factory=dict)


@dataclass
class Looks:
    """Rows of pointing.jsonl and, in the same order, each word's map (N, 32, 32) uint8, lowest 0 and highest 255."""

    rows: list[dict]
    maps: np.ndarray

    def save(self, folder: Path) -> list[Path]:
        """Writes pointing.jsonl and maps.npz; returns their paths."""
        from pipeline.evaluate.answers import write_rows

        write_rows(folder / "pointing.jsonl", self.rows)
        np.savez_compressed(folder / "maps.npz", uid=np.array([row["uid"] for row in self.rows]), maps=self.maps)
        return [folder / "pointing.jsonl", folder / "maps.npz"]


def ask(archives: Mapping[str, Archive], tasks: Mapping[str, Sequence[Question]], unit: str = "word") -> list[Asked]:
    """The questions whose gold answer has words with a region, in order of length.

    Args:
        unit: measure every `word`, or the mean map of the words of a `phrase`, which is what has a region of its own.
    """
    found = []
    for task, chosen in tasks.items():
        for question in chosen:
            example = alone(archives[question.split][question.index], question.turn)
            regions = _regions(example)
            if regions:
                phrases = _phrases(example) if unit == "phrase" else {}
                found.append(Asked(task, question, example, regions, phrases))
    return sorted(found, key=lambda a: (a.task, len(a.question.prompt) + len(a.question.gold), a.question.uid))


def _regions(example: Example) -> dict:
    return _of_spans(example, example.words(("assistant",)))


def _phrases(example: Example) -> dict:
    from pipeline.examples import Word

    spans = {(one["turn"], one["start"], one["end"]) for one in example.meta["regions"]}
    return _of_spans(example, [Word(*span) for span in sorted(spans) if example.turns[span[0]].role == "assistant"])


def _of_spans(example: Example, spans: Sequence[Word]) -> dict:
    from pipeline.examples import ImageError, decode

    if example.image is None or not example.meta.get("regions"):
        return {}
    try:
        image = decode(example.image)
    except ImageError:
        return {}
    found = {w: word_region(example.meta["regions"], w.turn, w.start, w.end, image.size[::-1]) for w in spans}
    return {word: region for word, region in found.items() if region is not None}


def _row(asked: Asked, word: Word, map_HW: np.ndarray) -> dict:
    region_HW, kind = (asked.phrases or asked.regions)[word]
    found = measure(map_HW, region_HW)
    return {
        "uid": f"{asked.question.uid}:{word.start}",
        "task": asked.task,
        "split": asked.question.split,
        "index": asked.question.index,
        "turn": asked.question.turn,
        "start": word.start,
        "end": word.end,
        "word": asked.example.word_text(word),
        "word_kind": kind,
        "kind": asked.question.kind,
        "cluster": asked.question.cluster,
        "hit": found.hit,
        "mass": round(found.mass, 4),
        "area": round(found.area, 4),
        "centre": found.centre,
        "centre_mass": round(found.centre_mass, 4),
        "centre_iou": round(found.centre_iou, 4),
        "ious": [round(iou, 4) for iou in found.ious],
    }


def as_bytes(map_HW: np.ndarray) -> np.ndarray:
    """A map as uint8, its lowest value 0 and its highest 255; a constant map is all 0."""
    low, high = float(map_HW.min()), float(map_HW.max())
    unit = (map_HW - low) / (high - low) if high > low else np.zeros_like(map_HW)
    return np.rint(unit * 255).astype(np.uint8)


def _collect(found: Iterator[tuple[Asked, Word, np.ndarray]]) -> Looks:
    rows, maps = [], []
    for asked, word, map_HW in _units(found):
        rows.append(_row(asked, word, map_HW))
        maps.append(as_bytes(map_HW))
    return Looks(rows, np.stack(maps) if maps else np.zeros((0, 32, 32), np.uint8))


def _units(found: Iterator[tuple[Asked, Word, np.ndarray]]) -> Iterator[tuple[Asked, Word, np.ndarray]]:
    """The words' maps as they are, or the mean over the words of each phrase; an example's words come together."""
    for _, group in groupby(found, key=lambda one: one[0].question.uid):
        words = list(group)
        asked = words[0][0]
        if not asked.phrases:
            yield from words
        for phrase in asked.phrases:
            inside = [
                map_HW
                for _, word, map_HW in words
                if word.turn == phrase.turn and phrase.start <= word.start and word.end <= phrase.end
            ]
            if inside:
                yield asked, phrase, np.mean(np.stack(inside).astype(np.float32), axis=0)


def student_looks(
    student: Student, asked: Sequence[Asked], batch: int, advance: Callable[[int], object] = lambda count: None
) -> Looks:
    """The student's raw attention at the words of the gold answer, which it is made to read (teacher forcing).

    Mean over heads and over all layers that look at the image; the Aligner has no part in it.
    """
    return _collect(_student_maps(student, asked, batch, advance))


def shared_looks(student: Student, asked: Sequence[Asked], batch: int, share: Share) -> tuple[Looks, list[int]]:
    """``student_looks`` of a share of the batches, and the number of the batch of each word."""
    rows, maps, numbers = [], [np.zeros((0, 32, 32), np.uint8)], []
    for number in filter(share.mine, range(math.ceil(len(asked) / batch))):
        part = student_looks(student, asked[number * batch : (number + 1) * batch], batch)
        rows += part.rows
        maps.append(part.maps)
        numbers += [number] * len(part.rows)
    return Looks(rows, np.concatenate(maps)), numbers


def _student_maps(student, asked, batch, advance) -> Iterator[tuple[Asked, Word, np.ndarray]]:
    import torch

    from pipeline.student.batch import EncodeError
    from pipeline.student.capture import AttentionTap, student_maps

    device = next(student.model.parameters()).device
    with AttentionTap(student.model, student.family) as tap, torch.inference_mode():
        for start in range(0, len(asked), batch):
            part, items = [], []
            for one in asked[start : start + batch]:
                try:
                    items.append(student.family.encode_one(one.example))
                    part.append(one)
                except EncodeError:  # counted where it was asked
                    continue
            if part:
                encoded = student.family.collate(items, train=False).to(device)
                tap.rows(encoded.words)
                student.model(**encoded.inputs)
                maps_WHW = student_maps(tap, encoded).mean((1, 2)).float().cpu().numpy()
                places = encoded.words.word_example.tolist()
                for word, place, map_HW in zip(encoded.words.word, places, maps_WHW, strict=True):
                    if word in part[place].regions:
                        yield part[place], word, map_HW
            advance(len(asked[start : start + batch]))


def teacher_looks(
    cfg: Config, asked: Sequence[Asked], device: str, advance: Callable[[int], object] = lambda count: None
) -> Looks:
    """The teacher's maps of the same words, read with the settings of the stored maps; at most
    ``eval.teacher_limit`` images of each task."""
    return _collect(_teacher_maps(cfg, limited(asked, cfg.eval.teacher_limit), device, advance))


def limited(asked: Sequence[Asked], images: int) -> list[Asked]:
    """The part of ``asked`` about at most so many images of each task, drawn by their digests; 0 keeps all."""
    if not images:
        return list(asked)
    found: dict[str, set[str]] = {}
    for one in asked:
        found.setdefault(one.task, set()).add(one.question.cluster)
    kept = {task: set(sorted(clusters)[:images]) for task, clusters in found.items()}
    return [one for one in asked if one.question.cluster in kept[one.task]]


def _teacher_maps(cfg, asked, device, advance) -> Iterator[tuple[Asked, Word, np.ndarray]]:
    from pipeline.examples import decode
    from pipeline.teacher.extract import Item, load_teacher
    from pipeline.teacher.noise import image_seed
    from pipeline.teacher.windows import teacher_texts

    def items() -> Iterator[Item]:
        for one in asked:
            text = teacher_texts(one.example, cfg.teacher.text, cfg.teacher.phrases)[0]
            image, seed = one.example.image, image_seed(cfg.teacher.seed, one.example.image)
            yield Item(lambda image=image: decode(image), one.question.cluster, seed, text, one.question.uid)

    teacher = load_teacher(cfg.teacher, device)
    for one, found in zip(asked, teacher.read(items()), strict=True):
        text = teacher_texts(one.example, cfg.teacher.text, cfg.teacher.phrases)[0]
        for word, map_HW in zip(text.words, found.maps, strict=True):
            if word in one.regions:
                yield one, word, map_HW
        advance(1)
