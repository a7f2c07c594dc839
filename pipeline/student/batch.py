"""What a family makes of examples: encoded items, and the batch that a model, a tap and the loss read."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from pipeline.student.planes import Piece, Planes

if TYPE_CHECKING:
    from pipeline.examples import Word

IGNORED = -100  # label of a position that the language loss leaves out


class EncodeError(ValueError):
    """One example that this student cannot take; the message is the reason, to be recorded with the example's key."""


@dataclass
class Item:
    """One encoded example, cheap to keep.

    Args:
        key: the example's key.
        ids, labels: (L,) long.
        words: the words to align, in order.
        tokens: for each word the half-open range of its tokens.
        image: tensors of the image without a batch dimension; empty for a text-only example.
        pieces: where the image's tokens lie; empty for a text-only example.
        meta: what a family needs besides to collate.
    """

    key: str
    ids: torch.Tensor
    labels: torch.Tensor
    words: list["Word"]
    tokens: list[tuple[int, int]]
    image: dict[str, torch.Tensor] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    meta: dict[str, int] = field(default_factory=dict)


@dataclass
class WordRows:
    """The W words of a batch and the R attention rows that belong to them.

    Args:
        word: the words themselves, in the order of the other fields.
        word_example: (W,) index of each word's example in the batch.
        row_batch, row_pos: (R,) example and query position of each row.
        row_word: (R,) the word it belongs to, ascending.
        row_slot: (R,) its place among the rows of its example.
        slots: (B, S) the same positions as a table, 0 where an example has fewer rows.
    """

    word: list["Word"]
    word_example: torch.Tensor
    row_batch: torch.Tensor
    row_pos: torch.Tensor
    row_word: torch.Tensor
    row_slot: torch.Tensor
    slots: torch.Tensor

    def __len__(self) -> int:
        return len(self.word)

    def to(self, device: torch.device | str) -> "WordRows":
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("word_example", "row_batch", "row_pos", "row_word", "row_slot", "slots")
        }
        return replace(self, **moved)

    @classmethod
    def build(cls, items: Sequence[Item], shift: Sequence[int], rows: str) -> "WordRows":
        """Rows of the items' words.

        Args:
            items: the examples of the batch.
            shift: tokens of padding before each of them.
            rows: ``predict`` takes the position before each token, ``token`` the token's own.
        """
        back = 1 if rows == "predict" else 0
        word, example, batch, pos, of_word, slot = [], [], [], [], [], []
        table: list[list[int]] = [[] for _ in items]
        for b, item in enumerate(items):
            for one, (start, end) in zip(item.words, item.tokens, strict=True):
                for token in range(start - back, end - back):
                    batch.append(b)
                    pos.append(token + shift[b])
                    of_word.append(len(word))
                    slot.append(len(table[b]))
                    table[b].append(token + shift[b])
                word.append(one)
                example.append(b)
        width = max(map(len, table), default=0)
        slots = [line + [0] * (width - len(line)) for line in table]
        tensors = (torch.tensor(value, dtype=torch.long) for value in (example, batch, pos, of_word, slot))
        return cls(word, *tensors, torch.tensor(slots, dtype=torch.long).reshape(len(items), width))


@dataclass
class StudentBatch:
    """A collated batch of B examples.

    Args:
        keys: the examples' keys.
        inputs: keyword arguments of the model's forward, without labels.
        labels: (B, L) long, ``IGNORED`` outside the assistant's words and turn ends. Not shifted.
        words: the words to align and their attention rows.
        planes: where the image tokens lie.
        targets: (W, 32, 32) float maps in [0, 1] to align with, put there by the trainer.
        valid: (W,) bool, false for words without a usable map.
    """

    keys: list[str]
    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    words: WordRows
    planes: Planes
    targets: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "StudentBatch":
        """The batch with all tensors on a device."""
        return replace(
            self,
            inputs={name: value.to(device, non_blocking=True) for name, value in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            words=self.words.to(device),
            planes=self.planes.to(device),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=True),
            valid=None if self.valid is None else self.valid.to(device, non_blocking=True),
        )


def pad(rows: Sequence[torch.Tensor], value: int, left: bool) -> torch.Tensor:
    """(B, L) from rows of different lengths."""
    width = max(map(len, rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for b, row in enumerate(rows):
        start = width - len(row) if left else 0
        out[b, start : start + len(row)] = row
    return out
