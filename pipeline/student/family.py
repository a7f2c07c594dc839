"""What all students share: from examples to batches, and where the attention to the image is found.

A family answers which layers attend from text to image, where each image token lies, how a chat becomes inputs and how
weights are loaded. A new family subclasses `Family` in a module of its own and fills in the four methods that raise
`NotImplementedError` here.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pipeline.align.words import choose
from pipeline.student import chat
from pipeline.student.batch import IGNORED, EncodeError, Item, StudentBatch, WordRows, pad
from pipeline.student.planes import SIDE, Piece, Planes

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.align.config import AlignConfig
    from pipeline.examples import Example, Turn


class Family:
    """One architecture with its processor.

    Args:
        processor: the model's processor, with a fast tokenizer.
        max_length: longest sequence in tokens.
        align: which words are aligned and where their attention is read; None takes every assistant word at the
            positions that predict it.
    """

    style = chat.Style()
    max_pixels = 0  # larger images are shrunk to so many; 0 for no limit
    in_text = False  # whether the image's tokens are among the text's
    parts: ClassVar[tuple[str, ...]] = ()  # names that `model.parts` may give to `load`

    def __init__(self, processor, max_length: int = 4096, align: "AlignConfig | None" = None):
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.max_length = max_length
        self.rows = align.rows if align else "predict"
        self.roles = tuple(align.roles) if align else ("assistant",)
        self.words = align.words if align else "all"
        self.max_words = align.max_words if align else 0
        self.side = align.side if align else SIDE
        self.layer_choice = tuple(align.layers) if align else ()
        self.last_layers = align.last_layers if align else 0
        self._template = chat.template_of(processor)
        self._frames: dict = {}
        added = self.tokenizer.added_tokens_decoder
        self.special = frozenset(index for index, token in added.items() if token.special)
        self._control = re.compile("|".join(re.escape(token.content) for token in added.values()) or r"(?!)")
        pad_id = self.tokenizer.pad_token_id
        self.pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id

    # what an architecture fills in

    @classmethod
    def load(cls, path: str, **options) -> tuple[nn.Module, object]:
        """The model and its processor from a directory or hub id; options go to ``from_pretrained``."""
        raise NotImplementedError

    @classmethod
    def skeleton(cls, path: str, **options) -> tuple[nn.Module, object]:
        """As `load` without reading any weights: the model of the config, drawn at random on the default device.

        Under ``torch.device("meta")`` it takes no memory, which is how sizes are known before anything is loaded.
        """
        raise NotImplementedError

    def prepare(self, model: nn.Module) -> None:
        """Whatever a loaded model needs before its first forward."""

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        """Every attention module through which text looks at the image, by the index of its layer."""
        raise NotImplementedError

    def encode_image(self, image: "Image") -> tuple[dict[str, torch.Tensor], list[Piece], dict[str, int]]:
        """The image's tensors without a batch dimension, its geometry and what else `collate_image` needs."""
        raise NotImplementedError

    def collate_image(
        self, items: Sequence[Item], ids_BL: torch.Tensor, shift: Sequence[int], train: bool
    ) -> dict[str, torch.Tensor]:
        """The image's part of the model's inputs, for ids that start after ``shift`` tokens of padding."""
        raise NotImplementedError

    def relays(self, model: nn.Module) -> list[nn.Module]:
        """Attention modules of a perceiver or resampler between patches and text, in the order they run."""
        return []

    def through(self, relays_NQK: list[torch.Tensor]) -> torch.Tensor:
        """The attention of each latent over its keys, (N, Q, K), from that of all relays in order, the mean over heads.

        The keys that `Piece.columns_HW` counts must be among K.
        """
        if len(relays_NQK) != 1:
            raise NotImplementedError(f"{type(self).__name__} has several relays: say how they compose")
        return relays_NQK[0]

    # shared

    def layers(self, model: nn.Module) -> dict[int, nn.Module]:
        """The attention modules to tap, by layer, in order: all of them, the chosen ones or the last ones.

        Raises:
            ValueError: a chosen layer does not look at the image.
        """
        found = dict(sorted(self.attention_modules(model).items()))
        missing = [index for index in self.layer_choice if index not in found]
        if missing:
            raise ValueError(f"align.layers: layer {missing[0]} does not look at the image; these do: {list(found)}")
        chosen = sorted(self.layer_choice or found)
        return {index: found[index] for index in chosen[-self.last_layers :]}

    def encode_one(self, example: "Example") -> Item:
        """One example as ids, labels, word ranges and image tensors; what training repeats every epoch.

        Raises:
            EncodeError: this student cannot take the example; the message says why.
        """
        rendered, tokens, image_of = self._prepare_text(example, example.turns, generate=False)
        length = min(len(tokens.ids), self.max_length)
        image, pieces, meta = image_of(length)
        labels = chat.labels(tokens, rendered, example.turns, self.special)[:length]
        if all(label == IGNORED for label in labels):
            raise EncodeError("no assistant words" + (f" within {length} tokens" if length < len(tokens.ids) else ""))
        words = choose(example, example.words(self.roles) if pieces else [], self.words, self.max_words)
        words, ranges = chat.word_tokens(tokens, rendered, words, length)
        ids = torch.tensor(tokens.ids[:length])
        return Item(example.key, ids, torch.tensor(labels), words, ranges, image, pieces, meta)

    def length(self, example: "Example", size: tuple[int, int] | None) -> int:
        """Tokens of what `encode_one` makes, known without a look at the image.

        Args:
            size: width and height of the upright image; None without one.

        Raises:
            EncodeError: this student cannot take the example's text.
        """
        _, tokens, _ = self._prepare_text(example, example.turns, generate=False)
        return min(len(tokens.ids), self.max_length)

    def encode(self, examples: Sequence["Example"], train: bool = True) -> StudentBatch:
        """A batch of examples: `encode_one` and `collate`."""
        return self.collate([self.encode_one(example) for example in examples], train=train)

    def collate(self, items: Sequence[Item], train: bool = True) -> StudentBatch:
        """A batch of encoded items, padded on the right for training and on the left otherwise."""
        width = max(len(item.ids) for item in items)
        shift = [0 if train else width - len(item.ids) for item in items]
        ids_BL = pad([item.ids for item in items], self.pad_id, left=not train)
        mask_BL = pad([torch.ones_like(item.ids) for item in items], 0, left=not train)
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL} | self.collate_image(items, ids_BL, shift, train)
        return StudentBatch(
            keys=[item.key for item in items],
            inputs=inputs,
            labels=pad([item.labels for item in items], IGNORED, left=not train),
            words=WordRows.build(items, shift, self.rows),
            planes=Planes.stack([item.pieces for item in items], self.side),
        )

    def prompt(self, examples: Sequence["Example"], turns: Sequence[int]) -> dict[str, torch.Tensor]:
        """Inputs of ``generate``, padded on the left: each example's image and one user turn, asked alone.

        Args:
            examples: B examples.
            turns: for each the index of the user turn to ask; a system turn before it is kept.
        """
        items = []
        for example, index in zip(examples, turns, strict=True):
            asked = [turn for turn in example.turns[:index] if turn.role == "system"] + [example.turns[index]]
            _, tokens, image_of = self._prepare_text(example, asked, generate=True)
            image, pieces, meta = image_of(len(tokens.ids))
            ids = torch.tensor(tokens.ids)
            items.append(Item(example.key, ids, torch.full_like(ids, IGNORED), [], [], image, pieces, meta))
        return self.collate(items, train=False).inputs

    def _prepare_text(
        self, example: "Example", turns: Sequence["Turn"], generate: bool
    ) -> tuple[chat.Chat, chat.Tokens, Callable[[int], tuple[dict, list[Piece], dict]]]:
        """The rendered turns, their tokens, and a function that gives the image's tensors, pieces and place for a
        sequence of so many tokens."""
        rendered = self._render(turns, example.image is not None, generate)
        tokens = chat.tokenize(self.tokenizer, rendered)

        def image(length: int) -> tuple[dict, list[Piece], dict]:
            if example.image is None:
                return {}, [], {}
            tensors, pieces, meta = self.encode_image(self._decode(example))
            return tensors, pieces, meta | self.locate(tokens.ids[:length])

        return rendered, tokens, image

    def _render(self, turns: Sequence["Turn"], image: bool, generate: bool) -> chat.Chat:
        chat.check_plain(turns, self._control)
        template, style = self._template, self.style
        try:
            return chat.render(template, turns, style, self._frames, image=image, generate=generate)
        except EncodeError:
            if not image or style.fold_system or all(turn.role != "system" for turn in turns):
                raise
            return chat.render(template, turns, style.folded(), self._frames, image=image, generate=generate)

    def _decode(self, example: "Example") -> "Image":
        from pipeline.examples import ImageError, decode

        try:
            image = decode(example.image)
        except ImageError as error:
            raise EncodeError(str(error)) from error
        scale = math.sqrt(self.max_pixels / (image.width * image.height)) if self.max_pixels else 1.0
        if scale >= 1:
            return image
        size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
        return image.resize(size, 1)  # Lanczos; maps lie on fractions of the image, which stay

    def size_counts(self) -> bool:
        """Whether a smaller image takes less memory: some processors bring all images to one size, and some models pad
        them to the largest number of tiles."""
        small, large = (sum(map(torch.numel, self.encode([_blank(side)]).inputs.values())) for side in (56, 1792))
        return small < large

    def locate(self, ids: list[int]) -> dict[str, int]:
        """Where the image stands in the ids, for `collate_image`."""
        return {}


def _blank(side: int) -> "Example":
    """A question about a grey square."""
    from PIL import Image

    from pipeline.examples import Example, Turn

    out = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(out, "png")
    turns = (Turn("user", "What is it?"), Turn("assistant", "a square"))
    return Example("0", out.getvalue(), "png", turns, "", "", "")
