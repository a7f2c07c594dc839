"""OpenFlamingo: text looks at 64 latents, latents at the 16x16 patches of the middle square of the image.

The published checkpoints hold what was trained (perceiver, cross-attention, token embeddings); CLIP and the language
model come from their own places, `model.parts`. A directory that this code saved holds everything.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.student.batch import EncodeError, Item, StudentBatch
from pipeline.student.family import Family
from pipeline.student.layouts import grid, window
from pipeline.student.native import Parts
from pipeline.student.openflamingo_lm import EMBEDDINGS, LAYERS, text_config, text_weights
from pipeline.student.openflamingo_model import FOLDER, OpenFlamingo, OpenFlamingoConfig
from pipeline.student.planes import Piece, patches_of

if TYPE_CHECKING:
    from PIL.Image import Image

CHECKPOINT = "checkpoint.pt"
IMAGE, END = "<image>", "<|endofchunk|>"
# The form of OpenFlamingo's own evaluation on questions, without its "Short": answers may be of any length here.
TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'image' %}{{- '<image>' }}{%- endif %}{%- endfor %}"
    "{{- 'Question:' }}{%- endif %}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}"
    "{%- if message['role'] == 'user' %}{{- ' Answer:' }}"
    "{%- elif message['role'] == 'assistant' %}{{- '<|endofchunk|>' }}"
    "{%- else %}{{- '\n' }}{%- endif %}"
    "{%- endfor %}"
)
# Second names of the same tensors, in checkpoints saved during training
_ALIASES = ("lang_encoder.gated_cross_attn_layers.", "lang_encoder.old_decoder_blocks.")


class OpenFlamingoFamily(Family):
    """The family of `OpenFlamingo`."""

    parts: ClassVar[tuple[str, ...]] = ("language", "vision")

    @classmethod
    def load(cls, path: str, parts: Mapping[str, str] | None = None, **options) -> tuple[nn.Module, object]:
        where = {name: options[name] for name in ("revision", "local_files_only") if name in options}
        trust = options.get("trust_remote_code", False)
        kept = ("dtype", "output_loading_info", "ignore_mismatched_sizes")
        options = {name: options[name] for name in kept if name in options} | {
            "attn_implementation": _kernels(options.get("attn_implementation", "sdpa"))
        }
        published = cls._published(path, parts, where)
        if published is None:
            return OpenFlamingo.from_pretrained(path, **options, **where), Parts.load(path, **where)
        where.pop("revision", None)  # it is the checkpoint's
        return assemble(published, parts["language"], parts["vision"], where, options, trust)

    @classmethod
    def skeleton(cls, path: str, parts: Mapping[str, str] | None = None, **options) -> tuple[nn.Module, object]:
        from transformers.modeling_utils import load_state_dict

        where = {name: options[name] for name in ("revision", "local_files_only") if name in options}
        published = cls._published(path, parts, where)
        if published is None:
            config, processor = OpenFlamingoConfig.from_pretrained(path, **where), Parts.load(path, **where)
        else:
            where.pop("revision", None)
            shapes = load_state_dict(published, map_location="meta")
            trust = options.get("trust_remote_code", False)
            config, processor, _ = _outline(shapes, published, parts["language"], parts["vision"], where, trust)
        config._attn_implementation = _kernels(options.get("attn_implementation", "sdpa"))
        return OpenFlamingo._from_config(config, dtype=options.get("dtype")), processor

    @classmethod
    def _published(cls, path: str, parts: Mapping[str, str] | None, where: Mapping) -> str | None:
        """The published checkpoint's file; None in a directory that this code saved."""
        published = _file(path, CHECKPOINT, **where)
        missing = [name for name in cls.parts if not (parts or {}).get(name)]
        if published is not None and missing:
            raise UserError(
                f"{path} holds only what OpenFlamingo trained: give model.parts.{missing[0]}= the directory or hub id "
                f"of its {missing[0]} model"
            )
        return published

    def prepare(self, model: nn.Module) -> None:
        tower = model.config.vision_config
        self.cells = tower.image_size // tower.patch_size
        self.latents = model.config.latents
        self.image_id = model.config.image_token_id
        if self.tokenizer.convert_tokens_to_ids(IMAGE) != self.image_id:
            raise UserError(f"the tokenizer's {IMAGE} is not the model's image token {self.image_id}")

    def attention_modules(self, model: nn.Module) -> dict[int, nn.Module]:
        crossed = ((i, layer.gated_cross_attn_layer) for i, layer in enumerate(_inner(model).blocks()))
        return {i: layer.attn for i, layer in crossed if layer is not None}

    def relays(self, model: nn.Module) -> list[nn.Module]:
        return [attention for attention, _ in _inner(model).perceiver.layers]

    def through(self, relays_NQK: list[torch.Tensor]) -> torch.Tensor:
        return patches_of(relays_NQK)

    def encode_image(self, image: "Image") -> tuple[dict[str, torch.Tensor], list[Piece], dict[str, int]]:
        made = self.processor.image_processor
        top, left, high, wide = window(made, image.height, image.width)
        cells = self.cells
        piece = Piece(grid(0, cells, cells), top, left, high / cells, wide / cells, np.arange(self.latents))
        return {"pixel_values": made([image], return_tensors="pt")["pixel_values"][0]}, [piece], {}

    def locate(self, ids: list[int]) -> dict[str, int]:
        if self.image_id not in ids:
            raise EncodeError("the image token lies beyond model.max_length")
        return {"at": ids.index(self.image_id)}

    def collate(self, items: Sequence[Item], train: bool = True) -> StudentBatch:
        batch = super().collate(items, train)
        if batch.planes.source is not None:  # the perceiver runs on the blank image of a text-only example too
            batch.planes.source = torch.arange(len(items))[:, None].expand_as(batch.planes.source)
        return batch

    def collate_image(
        self, items: Sequence[Item], ids_BL: torch.Tensor, shift: Sequence[int], train: bool
    ) -> dict[str, torch.Tensor]:
        size = self.processor.image_processor.crop_size
        # Text without an image token takes nothing from this one, but all ranks run the same layers.
        blank = torch.zeros(3, size["height"], size["width"])
        return {"pixel_values": torch.stack([item.image.get("pixel_values", blank) for item in items])[:, None]}


def assemble(
    published: str, language: str, vision: str, where: Mapping, options: Mapping, trust: bool = False
) -> tuple[nn.Module | tuple[nn.Module, dict], Parts]:
    """The model of a published checkpoint.

    Args:
        published: its file, tensors by name.
        language, vision: directories or hub ids of the language model (with its tokenizer) and of CLIP.
        where: says where to look for files.
        options: of ``from_pretrained``.
        trust: run code that comes with the tokenizer or the image processor.

    Raises:
        UserError: parts that do not belong together; tensors that are missing or too many.
    """
    from transformers.modeling_utils import load_state_dict

    trained = {name: value for name, value in load_state_dict(published).items() if not name.startswith(_ALIASES)}
    config, parts, stated = _outline(trained, published, language, vision, where, trust)
    text = config.text_config
    kind = text.model_type
    embedding = f"lang_encoder.{EMBEDDINGS[kind]}"
    layer, inside = re.compile(rf"^({re.escape(LAYERS[kind])}\.\d+)\."), rf"\1.{FOLDER}."
    weights = {
        "lang_encoder." + layer.sub(inside, name): value
        for name, value in text_weights(_weights(language, **where), stated).items()
    }
    for name in (embedding, "lang_encoder.embed_out.weight"):
        if name in weights and name not in trained:
            if len(weights[name]) < text.vocab_size:
                raise UserError(f"{language} has embeddings for {len(weights[name])} of {text.vocab_size} tokens")
            weights[name] = weights[name][: text.vocab_size]
    weights |= {f"vision_encoder.{name}": value for name, value in _tower(_weights(vision, **where)).items()}
    weights |= {f"lang_encoder.{n}": v for n, v in text_weights(_inside(trained, "lang_encoder."), kind).items()}
    weights |= {name: value for name, value in trained.items() if not name.startswith("lang_encoder.")}
    model, info = OpenFlamingo.from_pretrained(
        None, config=config, state_dict=weights, **{**options, "output_loading_info": True}
    )
    too_many = sorted(info["unexpected_keys"])
    if too_many:
        raise UserError(f"{len(too_many)} tensors of {published} or its parts have no place: {too_many[0]}, ...")
    return ((model, info) if options.get("output_loading_info") else model), parts


def _outline(
    trained: Mapping[str, torch.Tensor], published: str, language: str, vision: str, where: Mapping, trust: bool
) -> tuple[OpenFlamingoConfig, Parts, str]:
    """The config, the processor and the language model's own `model_type`; of ``trained`` only the shapes are read."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPVisionConfig

    found = _json(language, "config.json", **where)
    text = text_config(found, language)
    kind = text.model_type
    # Without an answer transformers would ask for one on the terminal: MPT-1B brings code, which nothing here needs.
    tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=trust, **where)
    tokenizer.add_special_tokens({"additional_special_tokens": [END, IMAGE]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tower = _json(vision, "config.json", **where)
    tower = CLIPVisionConfig.from_dict(tower.get("vision_config", tower))
    embedding = f"lang_encoder.{EMBEDDINGS[kind]}"
    # OpenFlamingo cut the vocabulary to its tokenizer's length.
    text.vocab_size = len(trained[embedding]) if embedding in trained else len(tokenizer)
    config = OpenFlamingoConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        **_sizes(trained, kind, published),
    )
    images = AutoImageProcessor.from_pretrained(vision, backend="pil", trust_remote_code=trust, **where)
    return config, Parts(tokenizer, images, TEMPLATE, language), found["model_type"]


def _sizes(trained: Mapping[str, torch.Tensor], kind: str, name: str) -> dict[str, int]:
    """Sizes of perceiver and cross-attention, from the names and shapes of a published checkpoint."""
    place = re.compile(rf"lang_encoder\.{re.escape(LAYERS[kind])}\.(\d+)\.gated_cross_attn_layer\.attn_gate$")
    crossed = sorted(int(found[1]) for found in map(place.match, trained) if found)
    query = trained.get("perceiver.layers.0.0.to_q.weight")
    if not crossed or query is None or "perceiver.latents" not in trained:
        raise UserError(f"{name} is no OpenFlamingo checkpoint for a language model of type {kind}")
    every = crossed[0] + 1
    if crossed != [every * (n + 1) - 1 for n in range(len(crossed))]:
        raise UserError(f"{name} has cross-attention before layers {crossed}, which is not one in every {every}")
    depth = OpenFlamingoConfig.head_dim
    return {
        "cross_attn_every_n_layers": every,
        "latents": len(trained["perceiver.latents"]),
        "perceiver_layers": len([n for n in trained if re.match(r"perceiver\.layers\.\d+\.0\.to_q\.weight$", n)]),
        "num_attention_heads": len(query) // depth,
        "head_dim": depth,
    }


def _tower(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of CLIP's vision tower, from those of the tower alone or of the whole model."""
    names = _inside(weights, "vision_model.") or weights
    unused = ("post_layernorm.", "embeddings.position_ids")
    return {name: value for name, value in names.items() if not name.startswith(unused)}


def _inside(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _kernels(name: str) -> dict[str, str]:
    """The attention of each submodel; MPT has one of its own (`openflamingo_lm`), whatever is asked for."""
    return {"": name, "vision_config": name, "text_config": name}


def _inner(model: nn.Module) -> OpenFlamingo:
    return next(module for module in model.modules() if isinstance(module, OpenFlamingo))


def _file(path: str, name: str, **where) -> str | None:
    from transformers.utils import cached_file

    return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)


def _json(path: str, name: str, **where) -> dict:
    found = _file(path, name, **where)
    if found is None:
        raise UserError(f"no {name} in {path}")
    return json.loads(Path(found).read_text(encoding="utf-8"))


def _weights(path: str, **where) -> dict[str, torch.Tensor]:
    """All tensors of a model directory or hub id, by name, whatever the format; nothing is unpickled but tensors."""
    from transformers.modeling_utils import load_state_dict
    from transformers.utils import (
        SAFE_WEIGHTS_INDEX_NAME,
        SAFE_WEIGHTS_NAME,
        WEIGHTS_INDEX_NAME,
        WEIGHTS_NAME,
    )
    from transformers.utils.hub import get_checkpoint_shard_files

    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        found = _file(path, name, **where)
        if found is None:
            continue
        files = [found] if not name.endswith(".json") else get_checkpoint_shard_files(path, found, **where)[0]
        return {key: value for file in files for key, value in load_state_dict(file).items()}
    raise UserError(f"no weights in {path}: neither {SAFE_WEIGHTS_NAME} nor {WEIGHTS_NAME}")
