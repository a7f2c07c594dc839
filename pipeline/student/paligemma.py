"""PaliGemma: a square of image tokens and a question that see each other in both directions, then the answer.

It has no chat: the prompt is the image, the start token, the question and a newline; the answer ends with the end
token. A conversation of several questions has no form in this model and is refused. PaliGemma 2 caps attention scores
and is refused too, see `native`.
"""

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.student.batch import IGNORED, Item
from pipeline.student.native import Native, Parts

# `image` is the image token, `bos_token` and `eos_token` the tokenizer's.
TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if loop.index0 != (0 if message['role'] == 'user' else 1) %}"
    "{{- raise_exception('PaliGemma takes one question and one answer') }}{%- endif %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- IMAGE }}{%- endif %}{%- endfor %}"
    "{%- if message['role'] == 'user' %}{{- bos_token }}{%- endif %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}"
    "{{- '\n' if message['role'] == 'user' else eos_token }}"
    "{%- endfor %}"
)


class PaliGemma(Native):
    """The family of `PaliGemmaForConditionalGeneration` with a Gemma 1 text model."""

    @classmethod
    def load(cls, path: str, **options) -> tuple[nn.Module, object]:
        made, parts = super().load(path, **options)
        return made, cls._prompting(parts, made[0] if isinstance(made, tuple) else made, path)

    @classmethod
    def skeleton(cls, path: str, **options) -> tuple[nn.Module, object]:
        model, parts = super().skeleton(path, **options)
        return model, cls._prompting(parts, model, path)

    @staticmethod
    def _prompting(parts: Parts, model: nn.Module, path: str) -> Parts:
        """The parts with the prompt's form, which the published ones do not state."""
        tokenizer = parts.tokenizer
        # As in the model's own processor: the start token comes after the image.
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
        if tokenizer("")["input_ids"]:
            raise UserError(f"the tokenizer in {path} adds tokens to every text, which PaliGemma's prompt cannot have")
        if not parts.chat_template:
            image = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
            parts.chat_template = TEMPLATE.replace("IMAGE", repr(image))
        return parts

    def collate_image(
        self, items: Sequence[Item], ids_BL: torch.Tensor, shift: Sequence[int], train: bool
    ) -> dict[str, torch.Tensor]:
        """With the tokens of the answer marked: those before them see each other in both directions."""
        answer_BL = torch.zeros_like(ids_BL)
        for b, item in enumerate(items):
            learnt = (item.labels != IGNORED).nonzero()
            if len(learnt):
                answer_BL[b, shift[b] + int(learnt[0]) :] = 1
        return super().collate_image(items, ids_BL, shift, train) | {"token_type_ids": answer_BL}
