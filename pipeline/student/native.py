"""Every vision-language model of transformers that puts image tokens into the text sequence.

They differ in how an image becomes tokens (see `layouts`) and share the rest: the text model's self-attention is
tapped, and the columns of the image tokens are read.
"""

import inspect
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from pipeline.student.planes import Piece, patches_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.examples import Example, Turn


class Parts:
    """Tokenizer, image processor and chat template, where the model's own processor class would need torchvision.

    Args:
        path: where they came from.
    """

    def __init__(self, tokenizer, image_processor, chat_template: str | None, path: str):
        self.tokenizer, self.image_processor, self.chat_template = tokenizer, image_processor, chat_template
        self.path = path

    @classmethod
    def load(cls, path: str, **where) -> "Parts":
        """The parts in a directory or hub id; ``where`` goes to ``from_pretrained``."""
        from transformers import AutoImageProcessor, AutoTokenizer, ProcessorMixin

        tokenizer = AutoTokenizer.from_pretrained(path, **where)
        image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", **where)
        found, _ = ProcessorMixin.get_processor_dict(path, **where)
        return cls(tokenizer, image_processor, found.get("chat_template") or tokenizer.chat_template, path)

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

    in_text = True
    layout: Layout

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._image_texts: dict[tuple[int, int], tuple[str, str]] = {}  # by width and height

    @classmethod
    def load(cls, path: str, **options) -> tuple[nn.Module, object]:
        from transformers import AutoModelForImageTextToText

        parts = Parts.load(path, **_where(options))
        return AutoModelForImageTextToText.from_pretrained(path, **options), parts

    @classmethod
    def skeleton(cls, path: str, **options) -> tuple[nn.Module, object]:
        from transformers import AutoConfig, AutoModelForImageTextToText

        where = _where(options)
        config = AutoConfig.from_pretrained(path, **where)
        kernels = {n: options[n] for n in ("dtype", "attn_implementation", "trust_remote_code") if n in options}
        return AutoModelForImageTextToText.from_config(config, **kernels), Parts.load(path, **where)

    def prepare(self, model: nn.Module) -> None:
        kind = model.config.model_type
        if kind not in LAYOUTS:
            raise UserError(f"no layout of image tokens for models of type '{kind}': known are {', '.join(LAYOUTS)}")
        text = model.config.get_text_config()
        if getattr(text, "attn_logit_softcapping", None):
            raise UserError(f"{kind} with capped attention scores cannot be tapped: no fused kernel computes them")
        self.layout = LAYOUTS[kind](model.config, self.processor.image_processor, self.tokenizer)
        blank = self._joined([self.layout(_blank()).tensors])
        inner = _inner(model)
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            model.register_forward_pre_hook(partial(_note_logits_to_keep, inner), with_kwargs=True)
            inner.register_forward_hook(_keep_logits)
        for name in self.layout.per_image:
            getattr(inner, name).lavender_per_image = True
        if not self.layout.packs:
            inner.register_forward_pre_hook(_refuse_packed, with_kwargs=True)
        inner.register_forward_pre_hook(partial(_run_blank, blank), with_kwargs=True)
        inner.register_forward_hook(_add_blank, with_kwargs=True)

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        inner = _inner(model)
        layers = (getattr(inner, "language_model", None) or inner.text_model).layers
        return {index: layers[index].self_attn for index in self.layout.layers(len(layers))}

    def relays(self, model: nn.Module) -> list[nn.Module]:
        return self.layout.relays(_inner(model))

    def through(self, relays_NQK: list[torch.Tensor]) -> torch.Tensor:
        return patches_of(relays_NQK)

    def _prepare_text(
        self, example: "Example", turns: Sequence["Turn"], generate: bool
    ) -> tuple[chat.Chat, chat.Tokens, Callable[[int], tuple[dict, list[Piece], dict]]]:
        rendered = self._render(turns, example.image is not None, generate)
        if example.image is None:
            return rendered, chat.tokenize(self.tokenizer, rendered), lambda length: ({}, [], {})
        laid = self.layout(self._decode(example))
        rendered = self._with_image(rendered, laid.text, laid.gap)
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

    def length(self, example: "Example", size: tuple[int, int] | None) -> int:
        rendered = self._render(example.turns, size is not None, generate=False)
        if size is not None:
            if size not in self._image_texts:  # how many tokens an image has depends on its size alone
                laid = self.layout(_blank(size))
                self._image_texts[size] = laid.text, laid.gap
            rendered = self._with_image(rendered, *self._image_texts[size])
        return min(len(chat.tokenize(self.tokenizer, rendered).ids), self.max_length)

    def _with_image(self, rendered: chat.Chat, text: str, gap: str) -> chat.Chat:
        following = rendered.text.partition(self.layout.marker)[2][:1]
        gap = gap if following not in ("", "<") and not following.isspace() else ""
        return rendered.replace(self.layout.marker, text + gap)

    def collate(self, items: Sequence[Item], train: bool = True) -> StudentBatch:
        batch = super().collate(items, train)
        if not train:  # the image's columns move with the padding before them
            shift_B = batch.labels.shape[1] - torch.tensor([len(item.ids) for item in items])
            batch.planes.shift(shift_B)
        batch.planes.columns = self.layout.keys(batch.planes.columns, batch.inputs)
        return batch

    def collate_image(
        self, items: Sequence[Item], ids_BL: torch.Tensor, shift: Sequence[int], train: bool
    ) -> dict[str, torch.Tensor]:
        seen = [item.image for item in items if item.image]
        return self._joined(seen) | self.layout.extra(ids_BL == self.layout.image_id)

    def _joined(self, images: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        made = {}
        for name in images[0] if images else ():
            values = [image[name] for image in images]
            along = self.layout.along.get(name, 0)
            made[name] = stack(values) if name in self.layout.stacked else torch.cat(values, along)
        return made


def _where(options: dict) -> dict:
    return {name: options[name] for name in ("revision", "local_files_only", "trust_remote_code") if name in options}


def _blank(size: tuple[int, int] = (64, 64)) -> "Image":
    from PIL import Image

    return Image.new("RGB", size)


def _note_logits_to_keep(inner: nn.Module, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Gives a model that lacks it the ``logits_to_keep`` of the others: positions that get logits, or how many last."""
    if "logits_to_keep" in kwargs:
        kept = kwargs.pop("logits_to_keep")
        inner.lavender_kept = slice(-kept, None) if isinstance(kept, int) else kept  # 0 keeps all
    return args, kwargs


def _keep_logits(inner: nn.Module, args: tuple, output):
    kept = inner.__dict__.pop("lavender_kept", slice(None))
    output.last_hidden_state = output.last_hidden_state[:, kept]
    return output


def _refuse_packed(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Layers of linear attention carry their state from one sequence of a row into the next."""
    places = kwargs.get("position_ids")
    begins = kwargs.get("attention_mask") is None and places is not None and places.shape[-1] > 1
    if kwargs.get("cu_seq_lens_q") is not None or (begins and bool((places.diff(dim=-1) != 1).any())):
        raise UserError(f"{module.config.model_type} cannot take packed sequences: its linear layers would mix them")


def _run_blank(blank: dict[str, torch.Tensor], module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Runs the vision tower for a training batch of texts only. Ranks must run the same layers in the same order:
    where parameters are gathered (FSDP) or gradients exchanged (DDP), one that left the tower out would hang the
    others. `_add_blank` adds nothing of it to the output."""
    if not module.training or kwargs.get("pixel_values") is not None:
        return
    parameter = next(module.parameters())
    inputs = {name: value.to(parameter.device) for name, value in blank.items()}
    features = module.get_image_features(**inputs, return_dict=True)
    # What the model takes from its tower; the tower's own last layers may go unused.
    taken = [features.pooler_output, getattr(features, "deepstack_features", None)]
    module.lavender_blank = _nothing(taken)


def _add_blank(module: nn.Module, args: tuple, kwargs: dict, output):
    nothing = module.__dict__.pop("lavender_blank", None)
    if nothing is not None:
        output.last_hidden_state = output.last_hidden_state + nothing.to(output.last_hidden_state.dtype)
    return output


def _nothing(features) -> torch.Tensor | float:
    """Zero that depends on every tensor in nested lists."""
    if isinstance(features, torch.Tensor):
        return features.sum() * 0.0
    return sum(_nothing(value) for value in features if value is not None)


def _inner(model: nn.Module) -> nn.Module:
    """The part of a wrapped model that joins vision tower and language model."""
    from transformers import PreTrainedModel

    return next(module for module in model.modules() if isinstance(module, PreTrainedModel)).model


def _placed(piece: Piece, at: np.ndarray) -> Piece:
    """A piece that counts image tokens, counting tokens of the sequence instead."""
    if piece.latents_Q is not None:
        return replace(piece, latents_Q=at[piece.latents_Q])
    return replace(piece, columns_HW=at[piece.columns_HW])


def stack(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, ...) from tensors of different sizes, such as images of more or fewer tiles, with zeros at their ends."""
    sizes = [max(size) for size in zip(*(value.shape for value in values), strict=True)]
    out = values[0].new_zeros(len(values), *sizes)
    for n, value in enumerate(values):
        out[(n, *map(slice, value.shape))] = value
    return out
