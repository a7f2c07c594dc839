"""Where a student or the teacher looks at the words of any example, computed on the spot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.evaluate.arms import Run
    from pipeline.examples import Example, Word

Looks = dict["Word", np.ndarray]


def device_of(cfg: Config) -> str:
    """The device that `eval.device` means on this machine."""
    if cfg.eval.device != "auto":
        return cfg.eval.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class StudentLooks:
    """A loaded student; calling it with an example gives the raw attention at each word of its answers.

    Mean over heads and over all layers that look at the image, as in the evaluation; each map (32, 32) uint8, lowest 0
    and highest 255. One call at a time.

    Raises:
        UserError: the run's weights are missing, damaged or do not fit (`arms.load`).
    """

    def __init__(self, cfg: Config, run: Run, device: str):
        from pipeline.evaluate.arms import load

        self._student, self._device = load(cfg, run, device), device

    def __call__(self, one: Example) -> Looks:
        """
        Raises:
            EncodeError: the student cannot take this example.
        """
        import torch

        from pipeline.evaluate.attention import as_bytes
        from pipeline.student.capture import AttentionTap, student_maps

        student = self._student
        batch = student.family.encode([one], train=False).to(self._device)
        if not batch.words.word:
            return {}
        with AttentionTap(student.model, student.family) as tap, torch.inference_mode():
            tap.rows(batch.words)
            student.model(**batch.inputs)
            maps_WHW = student_maps(tap, batch).mean((1, 2)).float().cpu().numpy()
        return dict(zip(batch.words.word, map(as_bytes, maps_WHW), strict=True))


class TeacherLooks:
    """The loaded teacher; calling it with an example gives its map at each word of questions and answers.

    The settings are those of the stored maps; one example is read at a time, so that a map may differ from the stored
    one by a level (the canonical batch shape is kept).
    """

    def __init__(self, cfg: Config, device: str):
        from pipeline.teacher.extract import load_teacher

        self._cfg, self._teacher = cfg, load_teacher(cfg.teacher, device)

    def __call__(self, one: Example) -> Looks:
        from pipeline.evaluate.attention import as_bytes
        from pipeline.examples import decode
        from pipeline.teacher.extract import Item
        from pipeline.teacher.noise import image_seed
        from pipeline.teacher.windows import teacher_texts

        if one.image is None:
            return {}
        teacher = self._cfg.teacher
        seed = image_seed(teacher.seed, one.image)
        texts = teacher_texts(one, teacher.text, teacher.phrases)
        items = [Item(lambda: decode(one.image), one.key, seed, text, f"{one.key}:{i}") for i, text in enumerate(texts)]
        found: Looks = {}
        for text, read in zip(texts, self._teacher.read(items), strict=True):
            for word, map_HW in zip(text.words, read.maps, strict=True):
                found.setdefault(word, as_bytes(np.asarray(map_HW, np.float32)))
        return found


def likeness(map_HW: np.ndarray, other_HW: np.ndarray) -> float:
    """Pearson's correlation of two maps of one grid; 0 if one of them is constant."""
    first, second = (np.asarray(m, np.float64).ravel() - np.mean(m) for m in (map_HW, other_HW))
    size = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / size if size else 0.0
