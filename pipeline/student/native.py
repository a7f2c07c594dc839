"""Every vision-language model of transformers that puts image tokens into the text sequence.

They differ in how an image becomes tokens (see `layouts`) and share the rest: the text model's self-attention is
tapped, and the columns of the image tokens are read.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.student import chat
from pipeline.student.batch import EncodeError, Item, StudentBatch
from pipeline.student.family import Family
from pipeline.student.layouts import LAYOUTS, Layout
from pipeline.student.planes import Piece

if TYPE_CHECKING:
    from pipeline.examples import Example, Turn


class Parts:
    """Tokenizer, image processor and chat template, where the model's own processor class would need torchvision.

    Args:
        path: where they came from.
    """

    def __init__(self, tokenizer, image_processor, chat_template: str | None, path: str):
        self.tokenizer, self.image_processor, self.chat_template = tokenizer, image_processor, chat_template
        self.path = path

    def apply_chat_template(self, messages: list[dict], **options) -> str:
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes all parts, and what the model's own processor class reads beside them."""
        self.image_processor.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        if self.chat_template:
            Path(directory, "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        source = Path(self.path, "processor_config.json")
        if source.is_file():
            shutil.copy(source, directory)


class Native(Family):
    """The family of all models in `layouts.LAYOUTS`."""

    layout: Layout

    @classmethod
    def load(cls, path: str, **options) -> tuple[nn.Module, object]:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, ProcessorMixin

        where = {
            name: options[name] for name in ("revision", "local_files_only", "trust_remote_code") if name in options
        }
        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **where)
        found, _ = ProcessorMixin.get_processor_dict(path, **where)
        template = found.get("chat_template") or tokenizer.chat_template
        model = AutoModelForImageTextToText.from_pretrained(path, **options)
        return model, Parts(tokenizer, image_processor, template, path)

    def prepare(self, model: nn.Module) -> None:
        kind = model.config.model_type
        if kind not in LAYOUTS:
            raise UserError(f"no layout of image tokens for models of type '{kind}': known are {', '.join(LAYOUTS)}")
        text = model.config.get_text_config()
        if getattr(text, "attn_logit_softcapping", None):
            raise UserError(f"{kind} with capped attention scores cannot be tapped: no fused kernel computes them")
        self.layout = LAYOUTS[kind](model.config, self.processor.image_processor, self.tokenizer)

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        from transformers import PreTrainedModel

        base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        text = getattr(base.model, "language_model", None) or base.model.text_model
        layers = text.layers
        return {index: layers[index].self_attn for index in self.layout.layers(len(layers))}

    def _prepare_text(
        self, example: "Example", turns: Sequence["Turn"], generate: bool
    ) -> tuple[chat.Chat, chat.Tokens, Callable[[int], tuple[dict, list[Piece], dict]]]:
        rendered = self._render(turns, example.image is not None, generate)
        if example.image is None:
            return rendered, chat.tokenize(self.tokenizer, rendered), lambda length: ({}, [], {})
        laid = self.layout(self._decode(example))
        rendered = rendered.replace(self.layout.marker, laid.text)
        tokens = chat.tokenize(self.tokenizer, rendered)
        at = np.flatnonzero(np.asarray(tokens.ids) == self.layout.image_id)
        wanted = laid.text.count(self.layout.token)
        if len(at) != wanted:
            raise EncodeError(f"{len(at)} image tokens in the prompt instead of {wanted}")

        def image(length: int) -> tuple[dict, list[Piece], dict]:
            if at[-1] >= length:
                raise EncodeError(f"the image's {wanted} tokens do not fit into {length} tokens (model.max_length)")
            return laid.tensors, [_placed(piece, at) for piece in laid.pieces], {}

        return rendered, tokens, image

    def collate(self, items: Sequence[Item], train: bool = True) -> StudentBatch:
        batch = super().collate(items, train)
        if not train:  # the image's columns move with the padding before them
            shift_B = batch.labels.shape[1] - torch.tensor([len(item.ids) for item in items])
            batch.planes.shift(shift_B)
        return batch

    def collate_image(
        self, items: Sequence[Item], ids_BL: torch.Tensor, shift: Sequence[int], train: bool
    ) -> dict[str, torch.Tensor]:
        seen = [item.image for item in items if item.image]
        extra = self.layout.extra(ids_BL == self.layout.image_id)
        if not seen:
            return extra
        made = {}
        for name in seen[0]:
            values = [image[name] for image in seen]
            made[name] = stack(values) if name in self.layout.stacked else torch.cat(values)
        return made | extra


def _placed(piece: Piece, at: np.ndarray) -> Piece:
    """A piece that counts image tokens, counting tokens of the sequence instead."""
    if piece.latents_Q is not None:
        return replace(piece, latents_Q=at[piece.latents_Q])
    return replace(piece, columns_HW=at[piece.columns_HW])


def stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, ...) from tensors whose first dimension may differ: images of more or fewer tiles."""
    most = max(value.shape[0] if value.dim() else 0 for value in values)
    if values[0].dim() < 2 or all(value.shape[0] == most for value in values):
        return torch.stack(list(values))
    out = values[0].new_zeros(len(values), most, *values[0].shape[1:])
    for n, value in enumerate(values):
        out[n, : len(value)] = value
    return out
