"""Text for the teacher: one text per assistant turn, windows that fit the text encoder, and the tokens of each word."""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.examples import Example, Word, words
from pipeline.teacher.phrases import sources

Span = tuple[int, int]

# Where a long text may be cut, best first: after a sentence, after a clause. The third way is between words.
SENTENCE_END = re.compile(
    r"[.!?\u2026]+[\"'\u2019\u201d)\]]*(?=\s)\s*|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*\s*|\n+\s*"
)
CLAUSE_END = re.compile(r"[,;:](?=\s)\s*|[\uff0c\u3001\uff1b\uff1a]\s*|\s[\u2013\u2014-]\s+")


@dataclass(frozen=True)
class TeacherText:
    """What the teacher is conditioned on for one assistant turn.

    Args:
        text: the question before the answer (if any), a space, and the answer.
        answer: where the answer begins in `text`.
        spans: character span in `text` of each word that gets a map.
        words: the same words as spans of the conversation's turns, in the same order.
        sources: for each word, the words whose maps make up its own: itself, or the noun that it modifies.
    """

    text: str
    answer: int
    spans: tuple[Span, ...]
    words: tuple[Word, ...]
    sources: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Window:
    """A piece of a text that fits the teacher. `pieces` are the slices of the text that `text` is made of,
    (start in the text, start in the window, length) each."""

    text: str
    pieces: tuple[tuple[int, int, int], ...]

    def span(self, span: Span) -> Span | None:
        """A span of the whole text as a span of the window, or None if any part of it is outside."""
        for start, here, length in self.pieces:
            if start <= span[0] and span[1] <= start + length:
                return span[0] - start + here, span[1] - start + here
        return None


def teacher_texts(example: Example, mode: str = "question+answer", phrases: str = "none") -> list[TeacherText]:
    """One text per assistant turn of an example; system turns and earlier turns are never part of it.

    Args:
        mode: `question+answer` (the user turn right before, a space, the answer) or `answer` alone.
        phrases: see `TeacherConfig.phrases`.
    """
    out = []
    for index, turn in enumerate(example.turns):
        if turn.role != "assistant" or not turn.text:
            continue
        before = example.turns[index - 1] if index else None
        parts = [(index, turn.text)]
        if mode == "question+answer" and before is not None and before.role == "user" and before.text:
            parts.insert(0, (index - 1, before.text))
        text = " ".join(part for _, part in parts)
        spans, origin, shift = [], [], 0
        for number, part in parts:
            for start, end in words(part):
                spans.append((start + shift, end + shift))
                origin.append(Word(number, start, end))
            shift += len(part) + 1
        answer = len(text) - len(turn.text)
        out.append(TeacherText(text, answer, tuple(spans), tuple(origin), tuple(sources(text, spans, answer, phrases))))
    return out


def windows(text: TeacherText, limit: int, count: Callable[[str], int]) -> list[Window]:
    """Windows of at most `limit` tokens that together hold every word of the text which is not longer than that.

    A text that fits is one window. Otherwise the answer is cut at sentence ends, else at clause ends, else between
    words, and packed; every window begins with the question as far as it fits (at most half of the window if the
    question is longer than that), and reaches back over words already seen where there is room. What is left
    of a long question gets windows of its own.

    Args:
        limit: content tokens in a window (75 for CLIP).
        count: content tokens of a string.
    """
    whole = text.text
    if count(whole) <= limit:
        return [_window(whole, [(0, len(whole))])]
    question = (0, max(text.answer - 1, 0))
    out: list[Window] = []
    head = [question] if question[1] else []
    if head and count(whole[slice(*question)]) > limit // 2:
        out = [_window(whole, [piece]) for piece in _cut(whole, question, limit, count)]
        head = _beginning(whole, question, limit // 2, count)

    def with_head(piece: str) -> int:
        return count(" ".join([whole[slice(*part)] for part in head] + [piece]))

    answer = _cut(whole, (text.answer, len(whole)), limit, with_head)
    out += [_window(whole, [*head, piece]) for piece in answer]
    return out or [_window(whole, [piece]) for piece in head]


def assign(
    spans: Sequence[Span], found: Sequence[Window], tokens: Sequence[Sequence[Span]]
) -> list[tuple[int, list[int]] | None]:
    """The window and the tokens in it of each word, or None for a word that no window holds whole.

    A word in several windows is taken from the one where the smaller of its left and right contexts, in tokens, is
    larger; the earlier one of equals.

    Args:
        spans: character spans of the words in the whole text.
        found: the windows of the text.
        tokens: character spans of the content tokens of each window, in the window's text.

    Returns:
        (window index, indices into that window's content tokens) per word.
    """
    out: list[tuple[int, list[int]] | None] = []
    for span in spans:
        best, best_context = None, -1
        for index, (window, token_spans) in enumerate(zip(found, tokens, strict=True)):
            here = window.span(span)
            own = overlapping(here, token_spans) if here else []
            if not own:
                continue
            context = min(own[0], len(token_spans) - 1 - own[-1])
            if context > best_context:
                best, best_context = (index, own), context
        out.append(best)
    return out


def overlapping(span: Span, token_spans: Sequence[Span]) -> list[int]:
    """Indices of the tokens that share at least one character with a span."""
    return [i for i, (start, end) in enumerate(token_spans) if start < span[1] and span[0] < end]


def _window(whole: str, pieces: list[Span]) -> Window:
    here, parts, texts = 0, [], []
    for start, end in pieces:
        parts.append((start, here, end - start))
        texts.append(whole[start:end])
        here += end - start + 1
    return Window(" ".join(texts), tuple(parts))


def _cut(whole: str, span: Span, limit: int, count: Callable[[str], int]) -> list[Span]:
    """Slices of `span` that fit, made of whole atoms. Each reaches back over atoms of the slice before it where
    there is room, so that its first words have some context; it always ends with something new."""
    atoms = _atoms(whole, span, limit, count)
    out, first = [], 0

    def fits(start: int, end: int) -> bool:
        return count(whole[atoms[start][0] : atoms[end][1]].strip()) <= limit

    def joined(start: int, end: int) -> bool:
        return atoms[start][1] == atoms[end][0]

    while first < len(atoms):
        last = first
        while last + 1 < len(atoms) and joined(last, last + 1) and fits(first, last + 1):
            last += 1
        start = first
        while start > 0 and joined(start - 1, start) and fits(start - 1, last):
            start -= 1
        if fits(start, last):
            out.append(_stripped(whole, (atoms[start][0], atoms[last][1])))
        first = last + 1
    return out


def _atoms(whole: str, span: Span, limit: int, count: Callable[[str], int]) -> list[Span]:
    """Parts of `span`, in order: sentences, the clauses of sentences that do not fit, the words of such clauses.
    A word or a run without words that does not fit by itself is left out."""
    parts = [span]
    for boundary in (SENTENCE_END, CLAUSE_END, None):
        finer = []
        for part in parts:
            if count(whole[slice(*part)].strip()) <= limit:
                finer.append(part)
            elif boundary is None:
                finer += [p for p in _word_parts(whole, part) if count(whole[slice(*p)].strip()) <= limit]
            else:
                ends = [part[0] + found.end() for found in boundary.finditer(whole[slice(*part)])]
                stops = sorted({part[0], *ends, part[1]})
                finer += list(itertools.pairwise(stops))
        parts = finer
    return parts


def _word_parts(whole: str, span: Span) -> list[Span]:
    """Words and what lies between them, as consecutive spans."""
    stops = {span[0], span[1]}
    for start, end in words(whole[slice(*span)]):
        stops |= {span[0] + start, span[0] + end}
    ordered = sorted(stops)
    return list(itertools.pairwise(ordered))


def _beginning(whole: str, span: Span, limit: int, count: Callable[[str], int]) -> list[Span]:
    """The longest beginning of `span` that ends with a word and fits, as a list of one span or none."""
    best: list[Span] = []
    for _, end in words(whole[slice(*span)]):
        if count(whole[span[0] : span[0] + end]) > limit:
            break
        best = [(span[0], span[0] + end)]
    return best


def _stripped(whole: str, span: Span) -> Span:
    text = whole[slice(*span)]
    return span[0] + len(text) - len(text.lstrip()), span[1] - len(text) + len(text.rstrip())
