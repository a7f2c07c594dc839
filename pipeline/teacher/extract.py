"""The teacher: images and texts in, one attention map per word out."""

import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipeline.errors import UserError
from pipeline.examples import Word
from pipeline.teacher.adapter import Adapter, Size
from pipeline.teacher.capture import Capture, token_weights
from pipeline.teacher.config import MAP_SIDE, TeacherConfig
from pipeline.teacher.inversion import readings
from pipeline.teacher.load import device_of, load_adapter
from pipeline.teacher.unet import UNetAdapter
from pipeline.teacher.windows import Span, TeacherText, Window, assign, windows

Group = tuple[Span, ...]
REMEMBERED = 1024  # windows whose maps are kept for identical pairs of image and text
LOOKAHEAD = 8  # batches of images that `bucket` looks through for some of one size


@dataclass(frozen=True)
class Item:
    """One text about one image.

    Args:
        image: the image, or `Adapter.pixels` of it, or a function that opens it when its turn comes.
        identity: equal for equal images, e.g. the sha256 of the file.
        seed: of the noise, see `noise.image_seed`.
        text: what is read, see `windows.teacher_texts`.
        name: how errors call it.
    """

    image: Image.Image | torch.Tensor | Callable[[], Image.Image]
    identity: Hashable
    seed: int
    text: TeacherText
    name: str = ""


@dataclass(frozen=True)
class WordMaps:
    """Maps of an item's words.

    Args:
        words: spans of the conversation's turns: the text's words, or with `unit=token` their tokens.
        maps: (W, 32, 32) float32.
        found: (W,), False where no window of the teacher's size holds the word (its map is zero).
    """

    words: tuple[Word, ...]
    maps: np.ndarray
    found: np.ndarray


@dataclass(frozen=True)
class _Unit:
    """What is computed once: a window of text about an image, and the maps wanted from it, each of one span of
    characters or more that share it."""

    identity: Hashable
    seed: int
    size: Size
    text: str
    spans: tuple[Group, ...]


@dataclass(frozen=True)
class _Part:
    """Where a word's map will be: a unit and a row of its maps, or several rows to be multiplied; no unit if no window
    holds the word."""

    word: Word
    unit: _Unit | None = None
    rows: tuple[int, ...] = ()


class Teacher:
    """Reads word maps off a diffusion model. Use `load_teacher`.

    One instance may serve several threads: a forward keeps its state in the objects that travel with it.
    """

    def __init__(self, cfg: TeacherConfig, adapter: Adapter):
        self.cfg = cfg
        self.adapter = adapter
        self.batch_size = cfg.batch_size  # less where the memory does not hold that many

    def extract(
        self, images: Sequence[Image.Image], texts: Sequence[TeacherText], seeds: Sequence[int] | None = None
    ) -> list[WordMaps]:
        """Word maps of images with one text each.

        Args:
            images: any size and aspect ratio; the map covers the whole image.
            seeds: of the noise, one for each image; 0, 1, 2, ... by default.
        """
        seeds = range(len(images)) if seeds is None else seeds
        items = [
            Item(image, (id(image), seed), seed, text, f"number {number}")
            for number, (image, text, seed) in enumerate(zip(images, texts, seeds, strict=True))
        ]
        return list(self.read(items))

    @torch.no_grad()
    def read(self, items: Iterable[Item], batch_size: int | None = None) -> Iterator[WordMaps]:
        """Word maps of a stream of items, in its order. Batches are filled across items and all have one shape (one
        for each size of image with `geometry=bucket`); identical windows of identical images are computed once (among
        the last thousand).

        Args:
            batch_size: windows per forward; `self.batch_size` by default.

        Raises:
            UserError: a map that is not finite, with the item's name.
        """
        batch = batch_size or self.batch_size
        waiting: deque[tuple[list[_Part], set[_Unit]]] = deque()
        queue: OrderedDict[_Unit, str] = OrderedDict()  # not yet computed, with the name of the item that asked first
        done: OrderedDict[_Unit, np.ndarray] = OrderedDict()
        latents: dict[Hashable, torch.Tensor] = {}
        look = batch * (LOOKAHEAD if self.cfg.geometry == "bucket" else 1)
        for group in _by_images(items, look):
            images = {item.identity: item.image for item in group if item.identity not in latents}
            images = {name: image() if callable(image) else image for name, image in images.items()}
            sizes = {name: self.adapter.size(image) for name, image in images.items()}
            sizes |= {name: self._size_of(value) for name, value in latents.items()}
            latents |= self._latents(images, sizes, batch)
            for item in group:
                parts = self._plan(item, sizes[item.identity])
                units = {part.unit for part in parts if part.unit}
                for part in parts:
                    if part.unit and part.unit not in done:
                        queue.setdefault(part.unit, item.name)
                waiting.append((parts, units))
            while size := _full(queue, batch) or self._overdue(waiting, queue, 2 * look):
                self._compute(queue, size, done, latents, batch)
                yield from self._finished(waiting, queue, done)
            yield from self._finished(waiting, queue, done)
            needed = {unit.identity for unit in queue}
            latents = {identity: value for identity, value in latents.items() if identity in needed}
        while queue:
            self._compute(queue, next(iter(queue)).size, done, latents, batch)
            yield from self._finished(waiting, queue, done)
        yield from self._finished(waiting, queue, done)

    @torch.no_grad()
    def seconds_per_batch(self) -> float:
        """About how long a batch takes: one forward with everything around it is measured (a second one on a GPU,
        where the first does not count) and taken as often as there will be some. A step of the optimisation of
        `null-text` also goes back through the model, which takes about as long as two forwards."""
        cfg, adapter = self.cfg, self.adapter
        shape, text, seconds = (3, adapter.side, adapter.side), "a red circle", 0.0
        rows = [[[ranges] for ranges in adapter.text.ranges(text, [(2, 5), (6, 12)])]] * self.batch_size
        for _ in range(2 if adapter.device.type == "cuda" else 1):
            began = time.monotonic()
            latents_BCYX = adapter.latents(torch.zeros(self.batch_size, *shape))
            condition = adapter.condition([text] * self.batch_size)
            tokens_BTW = token_weights(rows, adapter.text.positions, 2).to(adapter.device)
            grids = adapter.grids((adapter.side, adapter.side))
            capture = Capture(grids, tokens_BTW, None, cfg.refine, adapter.refine_side)
            noised_BCYX = adapter.noised(latents_BCYX, latents_BCYX, 100)
            adapter.forward(noised_BCYX, 100, condition, capture)
            capture.word_maps().cpu()
            if isinstance(adapter, UNetAdapter) and cfg.inversion != "none":  # most of its forwards run whole
                began = time.monotonic()
                adapter.predict(noised_BCYX, 100, 0.5, condition).cpu()
            seconds = time.monotonic() - began
        back = 2 * cfg.inversion_steps * cfg.inner_steps if cfg.inversion == "null-text" else 0
        return seconds * (cfg.forwards + back)

    def sizes(self, text: TeacherText) -> tuple[int, int]:
        """How many windows of a text are read, and how many maps (of words, or of tokens with `unit=token`) it gets."""
        parts = self._plan(Item(Image.new("RGB", (1, 1)), 0, 0, text), (0, 0))
        return len({part.unit for part in parts if part.unit}), len(parts)

    def _plan(self, item: Item, size: Size) -> list[_Part]:
        """Where the map of each word (or token) will come from."""
        side, text = self.adapter.text, item.text
        found = windows(text, side.limit, side.count)
        tokens = [side.spans(window.text) for window in found]
        assigned = assign(text.spans, found, tokens)
        wanted: list[tuple[Word, int | None, Group]] = []
        for index, word in enumerate(text.words):
            place = assigned[index]
            if place is None:
                wanted.append((word, None, ()))
                continue
            number, group = self._group(text, index, assigned, found)
            if self.cfg.unit == "word":
                wanted.append((word, number, group))
                continue
            inside = _inside(word, text.spans[index], found[place[0]], [tokens[place[0]][i] for i in place[1]])
            alone = text.sources[index] == (index,)
            wanted += [(token, number, (span,) if alone else group) for token, span in inside]
        spans: list[dict[Group, int]] = [{} for _ in found]
        for _, window, group in wanted:
            for one in self._separate(group):
                spans[window].setdefault(one, len(spans[window]))
        units = [
            _Unit(item.identity, item.seed, size, window.text, tuple(own))
            for window, own in zip(found, spans, strict=True)
        ]
        return [
            _Part(word)
            if window is None
            else _Part(word, units[window], tuple(spans[window][one] for one in self._separate(group)))
            for word, window, group in wanted
        ]

    def _separate(self, group: Group) -> list[Group]:
        """The spans whose maps are read as one: all of a phrase for a mean, each by itself for a product."""
        return [(span,) for span in group] if self.cfg.phrases == "product" else [group] if group else []

    @staticmethod
    def _group(text: TeacherText, index: int, assigned: list, found: Sequence[Window]) -> tuple[int, Group]:
        """The window a word is read in and the spans there whose maps make up its own: those of its phrase that the
        window of the phrase's last word holds, or the word alone if that has none."""
        last = assigned[text.sources[index][-1]]
        group = [found[last[0]].span(text.spans[source]) for source in text.sources[index]] if last else []
        group = [span for span in group if span]
        if group:
            return last[0], tuple(group)
        window = assigned[index][0]
        return window, (found[window].span(text.spans[index]),)

    def _overdue(self, waiting: deque, queue: OrderedDict[_Unit, str], most: int) -> Size | None:
        """With `bucket` the size of the oldest unit, once more than `most` items wait behind it: one image of a rare
        size would otherwise hold back the maps of all that follow."""
        late = self.cfg.geometry == "bucket" and len(waiting) > most and queue
        return next(iter(queue)).size if late else None

    def _latents(
        self, images: dict[Hashable, Image.Image | torch.Tensor], sizes: dict[Hashable, Size], batch: int
    ) -> dict[Hashable, torch.Tensor]:
        """Latents of new images, in batches of the canonical shape."""
        out = {}
        for size in sorted({sizes[name] for name in images}):
            names = [name for name in images if sizes[name] == size]
            for first in range(0, len(names), batch):
                chosen = names[first : first + batch]
                pixels = [self.adapter.pixels(images[name]) for name in chosen]
                pixels += [pixels[-1]] * (batch - len(pixels))
                out |= zip(chosen, self.adapter.latents(torch.stack(pixels)), strict=False)
        return out

    def _size_of(self, latents_CYX: torch.Tensor) -> Size:
        return tuple(extent * self.adapter.factor for extent in latents_CYX.shape[-2:])

    def _compute(
        self,
        queue: OrderedDict[_Unit, str],
        size: Size,
        done: OrderedDict[_Unit, np.ndarray],
        latents: dict[Hashable, torch.Tensor],
        batch: int,
    ) -> None:
        """Takes one batch of units of one image size off the queue and computes their maps. A batch that is not full
        is padded with copies of its last unit, so that every forward has the same shape."""
        cfg, adapter = self.cfg, self.adapter
        units = list(itertools.islice((unit for unit in queue if unit.size == size), batch))
        names = [queue.pop(unit) for unit in units]
        full = units + [units[-1]] * (batch - len(units))
        latents_BCYX = torch.stack([latents[unit.identity] for unit in full])
        condition = adapter.condition([unit.text for unit in full])
        rows = [_positions(adapter, unit) for unit in full]
        sums = 1 if cfg.renormalise else 0  # a column of the capture's own
        width = -(-(max(len(maps) for maps in rows) + sums) // adapter.columns) * adapter.columns - sums
        capture = Capture(
            grids=adapter.grids(size),
            tokens_BTW=token_weights(rows, adapter.text.positions, width).to(adapter.device),
            content_BT=condition.content_BT if cfg.renormalise else None,
            refine=cfg.refine,
            refine_side=adapter.refine_side,
        )
        maps_BWYX, forwards = 0.0, 0
        for _ in readings(adapter, cfg, latents_BCYX, [unit.seed for unit in full], condition, capture):
            forwards += 1
            if cfg.refine:  # each forward has its own self-attention
                maps_BWYX = maps_BWYX + capture.word_maps()
        if not cfg.refine:
            maps_BWYX = capture.word_maps()
        maps = (maps_BWYX / forwards).cpu().numpy()
        for row, (unit, name) in enumerate(zip(units, names, strict=True)):
            own = maps[row, : len(unit.spans)].copy()
            if not np.isfinite(own).all():
                cure = "the weights are damaged" if cfg.dtype == "float32" else "use teacher.dtype=float32"
                raise UserError(f"the teacher gave maps that are not finite for {name}: {cure}")
            done[unit] = own

    def _finished(self, waiting: deque, queue: OrderedDict, done: OrderedDict) -> Iterator[WordMaps]:
        """The items at the front whose windows are all computed."""
        while waiting and waiting[0][1].isdisjoint(queue):
            parts, _ = waiting.popleft()
            maps = np.zeros((len(parts), MAP_SIDE, MAP_SIDE), dtype=np.float32)
            for index, part in enumerate(parts):
                if part.unit:
                    maps[index] = product(done[part.unit][list(part.rows)])
            found = np.array([part.unit is not None for part in parts], dtype=bool)
            yield WordMaps(tuple(part.word for part in parts), maps, found)
        # Only what no waiting item needs may be forgotten.
        needed = set().union(*(units for _, units in waiting))
        for unit in list(itertools.islice(done, max(0, len(done) - REMEMBERED))):
            if unit not in needed:
                del done[unit]


def product(maps_NYX: np.ndarray) -> np.ndarray:
    """Geometric mean of maps, each scaled to [0, 1]: high where all of them are. One map stays as it is.

    A hundredth is added to each, so that a word whose map is zero at the place does not silence the others.
    """
    if len(maps_NYX) == 1:
        return maps_NYX[0]
    low_N11, high_N11 = maps_NYX.min((1, 2), keepdims=True), maps_NYX.max((1, 2), keepdims=True)
    scaled_NYX = (maps_NYX - low_N11) / np.maximum(high_N11 - low_N11, 1e-12)
    return np.exp(np.log(scaled_NYX + 0.01).mean(0)) - np.float32(0.01)


def _inside(word: Word, span: Span, window: Window, tokens: Sequence[Span]) -> list[tuple[Word, Span]]:
    """The tokens of a word as spans of its turn and of the window. Tokens that are bytes of one character are one."""
    start, end = window.span(span)
    inside = sorted({(max(a, start), min(b, end)) for a, b in tokens})
    return [(Word(word.turn, word.start + a - start, word.start + b - start), (a, b)) for a, b in inside]


def _positions(adapter: Adapter, unit: _Unit) -> list[list[list[list[int]]]]:
    """Text positions of a unit's maps, as `token_weights` wants them."""
    flat = [span for group in unit.spans for span in group]
    ranges = iter(adapter.text.ranges(unit.text, flat))
    return [[next(ranges) for _ in group] for group in unit.spans]


def _full(queue: OrderedDict[_Unit, str], batch: int) -> Size | None:
    """The image size of which a whole batch is waiting, the one that has waited longest first."""
    counts = Counter(unit.size for unit in queue)
    return next((unit.size for unit in queue if counts[unit.size] >= batch), None)


def _by_images(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items with at most `size` different images, so that images are encoded in full batches."""
    group: list[Item] = []
    seen: set[Hashable] = set()
    for item in items:
        if item.identity not in seen and len(seen) == size:
            yield group
            group, seen = [], set()
        group.append(item)
        seen.add(item.identity)
    if group:
        yield group


def load_teacher(cfg: TeacherConfig, device: str | None = None) -> Teacher:
    """The teacher of a configuration, its weights loaded with `from_pretrained`.

    Args:
        device: `cpu`, `cuda` or `cuda:1`; by default as `cfg.device` says.

    Raises:
        UserError: the weights are missing, or the pipeline is of a kind that the teacher cannot read.
    """
    return Teacher(cfg, load_adapter(cfg, device or device_of(cfg)))
