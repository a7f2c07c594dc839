"""One shard of maps: reads a tar, asks the teacher, writes a Zarr group and the receipt that vouches for it."""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import receipts
from pipeline.archive.read import Archive
from pipeline.errors import UserError
from pipeline.examples import Example, ImageError, Word, decode
from pipeline.mapstore.schema import SIDE, STATUS, ExampleMaps, example_maps
from pipeline.mapstore.write import write_shard
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.extract import Item, Teacher, WordMaps, load_teacher
from pipeline.teacher.noise import image_seed
from pipeline.teacher.windows import teacher_texts

DECODERS = 4  # threads that decode images while a GPU computes
AHEAD = 64  # images decoded ahead of it
FULL = ("can't allocate memory", "_STATUS_ALLOC_FAILED")  # in errors that say the memory is full
NAMES = {number: name for name, number in STATUS.items()}


@dataclass(frozen=True)
class Job:
    """One shard of maps to compute. `tick` is called after each example where the engine shares this process."""

    archive: Archive
    number: int
    folder: Path
    teacher: TeacherConfig
    device: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    max_pixels: int
    tick: Callable[[int], object] | None = field(default=None, compare=False)

    @property
    def stem(self) -> str:
        """The shard's name, the same as its tar's."""
        return self.archive.shards[self.number].stem

    @property
    def receipt(self) -> Path:
        return self.folder / f"{self.stem}.json"


teachers: dict[str, Teacher] = {}  # models loaded in this process
_loading = threading.Lock()


def teacher_of(job: Job) -> Teacher:
    """The teacher of this process, loaded when the first task asks for it."""
    with _loading:
        name = receipts.fingerprint({**job.settings, "split": None})
        if name not in teachers:
            teachers.clear()  # a worker that outlives one run would keep the models of all
            teachers[name] = load_teacher(job.teacher, _place(job.device))
        return teachers[name]


def _place(device: str) -> str:
    """`cuda:N` for worker N of a cluster on a machine with several GPUs, else the device itself."""
    if device != "cuda" or torch.cuda.device_count() < 2:
        return device
    from distributed import get_worker

    try:
        name = str(get_worker().name)
    except ValueError:  # not in a worker of a cluster
        return device
    return f"cuda:{int(name) % torch.cuda.device_count()}" if name.isdigit() else device


@dataclass
class _Pending:
    """An example on its way: its words, the texts still to be read, and what is known so far."""

    key: str
    words: list[Word]
    left: int
    problem: str = ""
    found: list[tuple[Word, np.ndarray, bool]] = field(default_factory=list)
    row: ExampleMaps | None = None

    def add(self, found: WordMaps) -> None:
        """Adds the maps of one text."""
        self.found += zip(found.words, found.maps, found.found.tolist(), strict=True)
        self.left -= 1
        if not self.left:
            self.finish()

    def finish(self) -> None:
        """Turns raw maps into stored ones, a quarter of the memory. Words that no text held are there without a map."""
        read = {(word.turn, word.start) for word, _, _ in self.found}
        nothing = np.zeros((SIDE, SIDE), np.float32)
        rest = [(word, nothing, False) for word in self.words if (word.turn, word.start) not in read]
        everything = sorted(self.found + rest, key=lambda row: row[0])
        maps = np.stack([row[1] for row in everything]) if everything else np.zeros((0, SIDE, SIDE), np.float32)
        known = np.array([row[2] for row in everything], dtype=bool)
        self.row = example_maps(self.key, [row[0] for row in everything], maps, known)
        if self.problem:
            self.row.status[:] = STATUS["failed"]
        self.found = []


def compute_shard(job: Job) -> receipts.Receipt:
    """Computes and writes the maps of one tar, then the receipt that vouches for them.

    Out of memory, the batch is halved and the shard begun again; the receipt says which size was used.

    Raises:
        UserError: a map is not finite, or not even one window fits the memory.
    """
    torch.set_num_threads(job.teacher.threads)
    began = time.monotonic()
    teacher = teacher_of(job)
    size = teacher.batch_size
    while (pending := _try(job, teacher, size)) is None:
        # Only here, not where the error is caught: its traceback still holds the tensors of the batch.
        if size == 1:
            raise UserError(f"not even one window of {job.teacher.path} fits the memory of the {job.device}")
        size = max(1, size // 2)
        teacher.batch_size = min(teacher.batch_size, size)  # another thread may have gone further down
        if job.device == "cuda":
            torch.cuda.empty_cache()
    path = job.folder / f"{job.stem}.zarr"
    rows = [example.row for example in pending]
    write_shard(path, rows, attrs={"teacher": job.settings}, profile=job.teacher.profile)
    return receipts.write(
        job.receipt,
        stage="precompute",
        settings=job.settings,
        inputs=job.inputs,
        files=[path],
        counts=_counts(pending, size),
        seconds=time.monotonic() - began,
    )


def _try(job: Job, teacher: Teacher, size: int) -> list[_Pending] | None:
    """All examples of a tar with their maps, or None if a batch of this size does not fit the memory."""
    try:
        return list(_read(job, teacher, size))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory is full. On the CPU and from cuBLAS and cuDNN PyTorch has words only."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in FULL)


def _read(job: Job, teacher: Teacher, size: int) -> Iterator[_Pending]:
    """The examples of a tar with their maps, in its order."""
    tick = job.tick or (lambda amount: None)
    order: deque[_Pending] = deque()
    everything: list[_Pending] = []

    def items() -> Iterator[Item]:
        for example, image, problem in _decoded(job, teacher):
            texts = teacher_texts(example, job.teacher.text, job.teacher.phrases) if example.image else []
            pending = _Pending(example.key, example.words() if example.image else [], len(texts), problem)
            everything.append(pending)
            if image is None or not texts:
                pending.finish()
                tick(1)
                continue
            seed = image_seed(job.teacher.seed, example.image)
            for text in texts:
                order.append(pending)
                yield Item(image, seed, seed, text, f"example {example.key}")

    for found in teacher.read(items(), size):
        pending = order.popleft()
        pending.add(found)
        if pending.row is not None:
            tick(1)
    yield from everything


def _decoded(job: Job, teacher: Teacher) -> Iterator[tuple[Example, torch.Tensor | None, str]]:
    """The examples of a tar with the pixels that the model reads, or what is wrong with them, in order. Beside a GPU,
    threads decode and resize ahead of it."""
    shard = job.archive.shard(job.number)

    def one(row: int) -> tuple[Example, torch.Tensor | None, str]:
        example = shard[row]
        if not example.image:
            return example, None, ""
        try:
            return example, teacher.adapter.pixels(decode(example.image, job.max_pixels)), ""
        except ImageError as error:
            return example, None, f"{example.key}: {error}"

    if job.device == "cpu":
        yield from map(one, range(len(shard)))
        return
    with ThreadPoolExecutor(DECODERS) as pool:
        coming = deque(pool.submit(one, row) for row in range(min(len(shard), AHEAD)))
        for row in range(len(shard)):
            if row + AHEAD < len(shard):
                coming.append(pool.submit(one, row + AHEAD))
            yield coming.popleft().result()


def _counts(pending: list[_Pending], batch_size: int) -> dict[str, Any]:
    words = Counter(NAMES[int(number)] for example in pending for number in example.row.status)
    problems = [example.problem for example in pending if example.problem]
    return {
        "examples": len(pending),
        "failed": len(problems),
        "without_words": sum(not example.words for example in pending),
        "words": sum(words.values()),
        "status": dict(sorted(words.items())),
        "first_failure": problems[0] if problems else "",
        "batch_size": batch_size,
    }
