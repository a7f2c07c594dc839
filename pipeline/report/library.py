"""What there is to browse: examples by number, by key or by word, maps by teacher, attention by student.

Only what is asked for is read, by its offset, so the size of the data does not matter.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.archive import Archive
    from pipeline.archive.read import Shard
    from pipeline.config import Config
    from pipeline.examples import Example, Word

MOST_ROWS = 200  # of one request
MOST_FOUND = 5000  # examples listed for a word
PATIENCE = 0.15  # seconds that one search may read texts; it goes on with the next request
SNIPPET = 90  # characters of a row


class Missing(LookupError):
    """A request for something that is not there."""


class Library:
    """What the page can show of one configuration.

    Safe to use from several threads: students and the teacher answer one at a time.

    Raises:
        UserError: the data has no shards.
    """

    def __init__(self, cfg: Config):
        self.cfg, self.layout = cfg, Layout(cfg)
        folder = self.layout.examples_dir()
        self.splits = sorted((path.parent.name for path in folder.glob("*/manifest.json")), key=lambda s: s != "train")
        if not self.splits:
            raise UserError(f"{folder}: has no shards to browse: run make shard DATA={cfg.data.name}")
        self._archives: dict[str, Archive] = {}
        self._texts: dict[str, Texts] = {}
        self._stores: dict = {}
        self._readers: dict = {}
        self._opening, self._reading = Lock(), Lock()
        self._runs = {run.name: run for run in self._find()}
        maps = self.layout.shards / "maps"
        self._stored = sorted(path.name for path in maps.iterdir() if path.is_dir()) if maps.is_dir() else []

    def _find(self) -> list:
        from pipeline.evaluate.arms import find

        return find(self.cfg)

    def warm(self) -> None:
        """Opens what the page asks for first, so that it is there when somebody looks."""
        split = self.splits[0]
        if len(self.archive(split)):
            self.describe(split, 0)
            stored = [name for name, there in self.teachers(split).items() if there]
            if stored:
                self.maps(split, 0, "teacher", stored[0])

    def about(self) -> dict:
        """Names and sizes for the page's controls."""
        counts = {
            split: receipts.load(self.layout.examples_dir(split) / "manifest.json").counts["examples"]
            for split in self.splits
        }
        return {
            "data": self.cfg.data.name,
            "model": self.cfg.model.name,
            "splits": counts,
            "students": list(self._runs),
            "teachers": {split: self.teachers(split) for split in self.splits},
        }

    def teachers(self, split: str) -> dict[str, bool]:
        """Teachers by name, and whether their maps of the split are stored; the configured one can also read now."""
        found = {name: True for name in self._stored if (self._place(name, split) / "manifest.json").is_file()}
        return found if self.cfg.teacher.name in found else {**found, self.cfg.teacher.name: False}

    def _place(self, teacher: str, split: str):
        return self.layout.shards / "maps" / teacher / split

    def archive(self, split: str) -> Archive:
        """The archive of a split.

        Raises:
            Missing: no such split.
        """
        from pipeline.archive import Archive

        if split not in self.splits:
            raise Missing(f"no split {split}")
        with self._opening:
            if split not in self._archives:
                self._archives[split] = Archive(self.layout.examples_dir(split), hashed=False)
        return self._archives[split]

    def example(self, split: str, index: int) -> Example:
        """One example.

        Raises:
            Missing: no such split or number.
        """
        archive = self.archive(split)
        if not 0 <= index < len(archive):
            raise Missing(f"{split} has {len(archive)} examples")
        where, row = archive.locate(index)
        return self._shard(archive, where)[row]

    def _shard(self, archive: Archive, number: int) -> Shard:
        """An opened shard. A page asks for an example in several requests at once: one of them opens its shard."""
        with self._opening:
            return archive.shard(number)

    def describe(self, split: str, index: int) -> dict:
        """Turns, and words with the places where they stand."""
        one = self.example(split, index)
        return {
            "key": one.key,
            "source": one.source,
            "licence": one.licence,
            "image": one.image is not None,
            "turns": [{"role": turn.role, "text": turn.text} for turn in one.turns],
            "words": [list(word) for word in one.words()],
            "meta": {key: value for key, value in one.meta.items() if key != "regions"},
        }

    # --- lists ---

    def rows(self, split: str, numbers: list[int]) -> list[list]:
        """[number, key, beginning of the conversation] of each example, without its image."""
        archive = self.archive(split)
        out = []
        for number in numbers[:MOST_ROWS]:
            if not 0 <= number < len(archive):
                raise Missing(f"{split} has {len(archive)} examples")
            where, row = archive.locate(number)
            shard = self._shard(archive, where)
            out.append([number, shard.keys[row], _beginning(shard.document(row)["turns"])])
        return out

    def search(self, split: str, wanted: str) -> dict:
        """Numbers of the examples whose key begins with ``wanted`` (digits) or whose text has words that begin with it.

        Texts are read the first time they are searched; a request that would take long answers with what it has and
        says how many it has looked at, and the next one goes on.
        """
        archive = self.archive(split)
        if re.fullmatch(r"\d{3,10}", wanted):
            found = _by_key(archive, wanted)
            return {"found": found[:MOST_FOUND], "count": len(found), "searched": len(archive), "of": len(archive)}
        with self._opening:
            texts = self._texts.setdefault(split, Texts(archive))
        return texts.search(wanted)

    # --- maps ---

    def maps(self, split: str, index: int, kind: str, name: str) -> tuple[list[Word], np.ndarray, list[int], list]:
        """Every word's map of a teacher or a student.

        Returns:
            words, maps (W, 32, 32) uint8 (0 lowest and 255 highest), statuses, and (lowest, highest) raw values where
            they are stored.

        Raises:
            Missing: no such teacher, student or example.
        """
        one = self.example(split, index)
        if kind == "teacher" and self.teachers(split).get(name):
            found = self._store(name, split).get(one.key)
            if found is None:
                return [], np.zeros((0, 32, 32), np.uint8), [], []
            return found.words, found.maps, found.status.tolist(), found.range.tolist()
        looks = self._read(kind, name, split, one)
        words, maps = list(looks), list(looks.values())
        return words, np.stack(maps) if maps else np.zeros((0, 32, 32), np.uint8), [0] * len(words), []

    def _store(self, teacher: str, split: str):
        from pipeline.mapstore import MapStore

        with self._opening:
            if (teacher, split) not in self._stores:
                self._stores[teacher, split] = MapStore(self._place(teacher, split))
        return self._stores[teacher, split]

    def _read(self, kind: str, name: str, split: str, one: Example) -> dict:
        from pipeline.report.looks import StudentLooks, TeacherLooks, device_of

        known = self._runs if kind == "student" else self.teachers(split) if kind == "teacher" else ()
        if name not in known:
            raise Missing(f"no {kind or 'such'} {name}")
        if one.image is None:
            raise Missing("this example has no image to look at")
        from pipeline.student.batch import EncodeError

        with self._reading:
            if (kind, name) not in self._readers:
                device = device_of(self.cfg)
                self._readers[kind, name] = (
                    StudentLooks(self.cfg, self._runs[name], device)
                    if kind == "student"
                    else TeacherLooks(self.cfg, device)
                )
            try:
                return self._readers[kind, name](one)
            except EncodeError as error:
                raise Missing(f"{name} cannot take this example: {error}") from error


def _beginning(turns: list[dict]) -> str:
    text = " ".join(" ".join(turn["text"] for turn in turns if turn["role"] != "system").split())
    return text if len(text) <= SNIPPET else text[: SNIPPET - 1] + "…"


def _by_key(archive: Archive, wanted: str) -> list[int]:
    """Numbers of the examples whose key begins so; only the tables of shards that can hold one are read."""
    found, before = [], 0
    for number, tar in enumerate(archive.shards):
        if tar.stem.startswith(wanted[:5]):
            keys = archive.shard(number).keys
            found += [before + row for row, key in enumerate(keys) if key.startswith(wanted)]
        before += archive.sizes[number]
    return found


class Texts:
    """The texts of a split, in memory shard by shard once they have been read, to search for words in them."""

    def __init__(self, archive: Archive):
        self._archive = archive
        self._read: list[tuple[str, list[int]]] = []  # of each shard: its texts in one, and where each begins
        self._last = _Search("")
        self._lock = Lock()

    def search(self, wanted: str) -> dict:
        """Numbers of the examples with all words that begin as those of ``wanted`` do, whatever their case."""
        deadline = time.monotonic() + PATIENCE
        with self._lock:
            if self._last.wanted != wanted:
                self._last = _Search(wanted)
            mine = self._last
            while mine.shards < len(self._archive.shards):
                if mine.shards == len(self._read):
                    self._read.append(self._texts(mine.shards))
                mine.go_on(*self._read[mine.shards])
                if time.monotonic() >= deadline:
                    break
            found = mine.found[:MOST_FOUND]
            return {"found": found, "count": len(mine.found), "searched": mine.examples, "of": len(self._archive)}

    def _texts(self, number: int) -> tuple[str, list[int]]:
        shard = self._archive.shard(number)
        starts, parts, length = [], [], 0
        for row in range(len(shard)):
            text = "\n".join(turn["text"] for turn in shard.document(row)["turns"]).casefold() + "\0"
            starts.append(length)
            parts.append(text)
            length += len(text)
        return "".join(parts), starts


class _Search:
    """How far a search has come."""

    def __init__(self, wanted: str):
        self.wanted, self._parts = wanted, wanted.casefold().split()
        self.shards = self.examples = 0
        self.found: list[int] = []

    def go_on(self, text: str, starts: list[int]) -> None:
        """Looks through one more shard."""
        hits = [set(_rows_with(part, text, starts)) for part in self._parts]
        rows = sorted(set.intersection(*hits)) if hits else ()
        self.found += [self.examples + row for row in rows]
        self.shards, self.examples = self.shards + 1, self.examples + len(starts)


def _rows_with(part: str, text: str, starts: list[int]) -> Iterator[int]:
    """Rows of a shard's texts that have a word which begins so."""
    at = text.find(part)
    while at >= 0:
        if at and (text[at - 1].isalnum() or text[at - 1] == "_"):  # in the middle of a word
            at = text.find(part, at + 1)
            continue
        row = bisect_right(starts, at) - 1
        yield row
        at = text.find(part, starts[row + 1]) if row + 1 < len(starts) else -1
