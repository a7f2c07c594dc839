"""A conversation as token ids: where each turn and word lies, and which tokens are learnt.

The chat template is the model's own. To know exactly where a turn's text ends up, the template is rendered with
marks in place of the texts; the texts then take the marks' places, and the result must equal the plain rendering. A
template that rewrites the text of a turn is thereby refused instead of being misread.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pipeline.student.batch import IGNORED, EncodeError

if TYPE_CHECKING:
    from pipeline.examples import Turn, Word

_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template has them


@dataclass(frozen=True)
class Style:
    """What a chat template asks of its messages.

    Args:
        plain_system: a system turn's content is a string, not a list of parts.
        fold_system: a system turn's text goes to the start of the first user turn, for templates that allow no
            system turn beside an image.
    """

    plain_system: bool = False
    fold_system: bool = False

    def folded(self) -> "Style":
        return replace(self, fold_system=True)


@dataclass(frozen=True)
class Chat:
    """A rendered conversation: its text and the half-open character range of each turn's text in it."""

    text: str
    spans: tuple[tuple[int, int], ...]

    def replace(self, marker: str, text: str) -> "Chat":
        """The conversation with the one place where the template names the image written out.

        Raises:
            EncodeError: the template names it never or several times.
        """
        at = self.text.find(marker)
        if at < 0 or self.text.count(marker) > 1:
            raise EncodeError(f"the chat template writes {marker} {self.text.count(marker)} times for one image")
        more = len(text) - len(marker)
        spans = tuple((a + more * (a > at), b + more * (b > at)) for a, b in self.spans)
        return Chat(self.text[:at] + text + self.text[at + len(marker) :], spans)


@dataclass(frozen=True)
class Tokens:
    """Token ids and the half-open character range ``lows:highs`` of each in the rendered text, both ascending."""

    ids: list[int]
    lows: list[int]
    highs: list[int]

    def covering(self, start: int, end: int) -> tuple[int, int]:
        """The half-open range of tokens that share a character with ``start:end``; empty where none does."""
        return bisect_right(self.highs, start), bisect_left(self.lows, end)


def template_of(processor) -> Callable[..., str]:
    """A processor's ``apply_chat_template``, with a fixed date where its template would print today's."""
    dated = "date_string" in processor.chat_template
    return partial(processor.apply_chat_template, **({"date_string": "26 Jul 2024"} if dated else {}))


def render(
    template: Callable[..., str],
    turns: Sequence["Turn"],
    style: Style,
    frames: dict[tuple, str],
    *,
    image: bool,
    generate: bool = False,
) -> Chat:
    """Renders turns with a processor's chat template.

    Args:
        template: what `template_of` gives.
        turns: the conversation; the image stands before the first user turn's text.
        style: what the template asks for.
        frames: keeps the renderings with marks, which depend on the turns' roles only.
        image: whether there is one.
        generate: end with the header of an assistant turn.

    Raises:
        EncodeError: the template refuses the conversation or changes a turn's text.
    """
    frame = (tuple(turn.role for turn in turns), style, image, generate)
    if frame not in frames:
        marks = [f"\ue000{i}\ue001" for i in range(len(turns))]
        frames[frame] = _apply(template, turns, marks, style, image, generate)
    marked = frames[frame]
    found = list(_MARK.finditer(marked))
    if [int(match[1]) for match in found] != list(range(len(turns))):
        raise EncodeError("the chat template drops or reorders turns")
    text, spans, cursor = "", [], 0
    for match, turn in zip(found, turns, strict=True):
        text += marked[cursor : match.start()]
        spans.append((len(text), len(text) + len(turn.text)))
        text += turn.text
        cursor = match.end()
    text += marked[cursor:]
    if text != _apply(template, turns, [turn.text for turn in turns], style, image, generate):
        raise EncodeError("the chat template changes the text of a turn")
    return Chat(text, tuple(spans))


def _apply(
    template: Callable[..., str],
    turns: Sequence["Turn"],
    texts: Sequence[str],
    style: Style,
    image: bool,
    generate: bool,
) -> str:
    from jinja2 import TemplateError

    messages: list[dict] = []
    waiting, prefix = image, ""
    for turn, text in zip(turns, texts, strict=True):
        if turn.role == "system" and style.fold_system:
            prefix += text + "\n\n"
            continue
        if turn.role == "system" and style.plain_system:
            messages.append({"role": "system", "content": text})
            continue
        content: list[dict] = []
        if turn.role == "user":
            if waiting:
                content.append({"type": "image"})
                waiting = False
            text, prefix = prefix + text, ""
        content.append({"type": "text", "text": text})
        messages.append({"role": turn.role, "content": content})
    if waiting:
        raise EncodeError("an image but no user turn to put it in")
    try:
        return template(messages, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        raise EncodeError(f"the chat template refuses the conversation: {error}") from error


def tokenize(tokenizer, chat: Chat) -> Tokens:
    """Ids of a rendered conversation. A start token is added only where the template has not written one."""
    start = tokenizer.bos_token
    encoded = tokenizer(
        chat.text,
        add_special_tokens=not (start and chat.text.startswith(start)),
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    lows, highs = zip(*encoded["offset_mapping"], strict=True)
    return Tokens(encoded["input_ids"], list(lows), list(highs))


def check_plain(turns: Sequence["Turn"], control: re.Pattern[str]) -> None:
    """Refuses texts that spell a control token: the tokenizer would take it for one.

    Args:
        turns: the conversation.
        control: matches every control token of the tokenizer.

    Raises:
        EncodeError: with the token found.
    """
    for turn in turns:
        found = control.search(turn.text)
        if found:
            raise EncodeError(f"the text contains the control token {found[0]}")


def labels(
    tokens: Tokens, chat: Chat, turns: Sequence["Turn"], special: frozenset[int], learnt: Sequence[str] = ("assistant",)
) -> list[int]:
    """Labels (not shifted) for the words and the turn end of the learnt roles; ``IGNORED`` elsewhere.

    Args:
        tokens, chat, turns: the conversation and its renderings.
        special: ids of control tokens; the first one after a turn's text is its end.
        learnt: roles that are learnt.
    """
    out = [IGNORED] * len(tokens.ids)
    for index, (turn, (start, end)) in enumerate(zip(turns, chat.spans, strict=True)):
        if turn.role not in learnt:
            continue
        first, last = tokens.covering(start, end)
        limit = chat.spans[index + 1][0] if index + 1 < len(turns) else len(chat.text)
        close = last
        while close < len(tokens.ids) and tokens.highs[close] <= limit and tokens.ids[close] not in special:
            close += 1
        if close < len(tokens.ids) and tokens.ids[close] in special:
            last = close + 1
        out[first:last] = tokens.ids[first:last]
    return out


def word_tokens(
    tokens: Tokens, chat: Chat, words: Sequence["Word"], length: int
) -> tuple[list["Word"], list[tuple[int, int]]]:
    """The words whose tokens all lie among the first ``length``, and their half-open token ranges."""
    kept, ranges = [], []
    for word in words:
        base = chat.spans[word.turn][0]
        first, last = tokens.covering(base + word.start, base + word.end)
        if first < last <= length:
            kept.append(word)
            ranges.append((first, last))
    return kept, ranges
