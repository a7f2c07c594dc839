"""The real Llama 3 vocabulary, from the `llama-models` package, as a fast tokenizer of transformers.

`llama3_tokenizer()` has the ids, the control tokens, the start token and the chat template of the published one, with
the image token of Llama 3.2 behind them. Families with other control tokens in the reserved places name them.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.student.tiny.minicpm import CHAT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST = 128000  # ids below are ordinary tokens
NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    5: "<|step_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}


def llama3_tokenizer(
    special: dict[int, str] | None = None, image: str = "<|image|>", **named: str
) -> "PreTrainedTokenizerFast":
    """A new tokenizer of 128,256 ids and more.

    Args:
        special: further control tokens by id, in the place of reserved ones or behind; None is ``<|image|>`` at 128256.
        image: what the chat template writes for an image.
        named: such as ``unk_token``, for `PreTrainedTokenizerFast`.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    control = control_tokens() | ({FIRST + 256: "<|image|>"} if special is None else special)
    made = Tokenizer.from_str(_ordinary())
    made.add_special_tokens([AddedToken(control[index], special=True, normalized=False) for index in sorted(control)])
    wrong = [name for index, name in control.items() if made.token_to_id(name) != index]
    assert not wrong, f"these control tokens have other ids than asked: {wrong}"
    # The published tokenizer adds the start token by itself, so a template that writes it must not get another.
    start = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", FIRST)],
    )
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False, **(names | named))
    tokenizer.chat_template = CHAT.replace("IMAGE", image)
    return tokenizer


def control_tokens() -> dict[int, str]:
    """Llama 3's 256 control tokens by id; the reserved ones are numbered in order."""
    reserved = iter(range(256))
    return {FIRST + at: NAMED.get(at) or f"<|reserved_special_token_{next(reserved)}|>" for at in range(256)}


@cache
def _ordinary() -> str:
    """The ordinary tokens in the format of the `tokenizers` library. Takes some seconds, once in a process."""
    import llama_models
    from transformers.convert_slow_tokenizer import TikTokenConverter

    file = Path(next(iter(llama_models.__path__)), "llama3", "tokenizer.model")
    return TikTokenConverter(str(file)).converted().to_str()
