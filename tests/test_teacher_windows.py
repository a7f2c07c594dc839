"""Texts, windows and the tokens of words."""

import bisect
import functools
import gzip
import itertools
import sys
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from teacher_models import clip_tokenizer
from transformers import CLIPTokenizer

from pipeline.examples import Example, Turn, words
from pipeline.teacher.phrases import heads
from pipeline.teacher.windows import TeacherText, Window, assign, overlapping, teacher_texts, windows

REAL = [
    "Don't stop: it's the rock'n'roll café, isn't it?",
    "A well-known state-of-the-art TV-set costs $1,299.99 (24 % off)!",
    "İstanbul ÅNGSTRÖM STRASSE ẞ ǅ ﬁne naïve cafe\u0301 e\u0301le\u0300ve",
    "你好世界 東京タワー 2024年 한국어 ไทย русский ελληνικά العربية",
    "👩‍🚀 rockets 🚀🚀 to the 🌕!! ok👍 3️⃣",
    "tabs\tand\nnew  lines \u00a0 and the the the the",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "x<|endoftext|>y <image> &amp; <b>bold</b> snake_case _emphasis_ 1/2 3.14 10:30",
]
PIECES = st.sampled_from([w for text in REAL for w in regex.findall(r"\s+|\S+", text)])
TEXTS = st.one_of(
    st.lists(PIECES, max_size=40).map("".join),
    st.text(max_size=60).map(lambda s: s.replace("\x00", "")),
)


def published_vocabulary() -> Path | None:
    """CLIP's own merges, as the package open_clip_torch ships them; the file is read, the package not imported."""
    for folder in sys.path:
        path = Path(folder) / "open_clip" / "bpe_simple_vocab_16e6.txt.gz"
        if path.is_file():
            return path
    return None


def published_tokenizer() -> CLIPTokenizer:
    """The tokenizer of CLIP and of Stable Diffusion 1.x: 49,408 tokens in the order of Radford et al. (2021)."""
    lines = gzip.decompress(published_vocabulary().read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    tokens = order + [c + "</w>" for c in order] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: n for n, t in enumerate(tokens)}, merges=merges, model_max_length=77)


@functools.lru_cache(maxsize=2)
def tokenizer(kind: str = "tiny"):
    return clip_tokenizer() if kind == "tiny" else published_tokenizer()


published = pytest.mark.skipif(published_vocabulary() is None, reason="needs `pip install --no-deps open_clip_torch`")
KINDS = [pytest.param("tiny"), pytest.param("published", marks=published)]


def count(text: str) -> int:
    return len(tokenizer()(text, add_special_tokens=False).input_ids)


def token_spans(text: str) -> list[tuple[int, int]]:
    return tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping


def as_text(question: str, answer: str, phrases: str = "none") -> TeacherText:
    turns = (Turn("user", question), Turn("assistant", answer))
    return teacher_texts(Example("0", None, "", turns, "", "", ""), phrases=phrases)[0]


# --- words to tokens ------------------------------------------------------------------------------------------------


def spelled(ids: list[int], kind: str = "tiny") -> bytes:
    """What tokens say in UTF-8, by the byte alphabet of the vocabulary alone."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(b): b for b in printable}
    alphabet |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in printable)}
    tokens = tokenizer(kind).convert_ids_to_tokens(ids)
    return bytes(alphabet[c] for token in tokens for c in token.removesuffix("</w>"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", REAL)
def test_a_word_gets_exactly_its_tokens(text, kind):
    encoded = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)
    for start, end in words(text):
        own = overlapping((start, end), encoded.offset_mapping)
        said = spelled([encoded.input_ids[i] for i in own], kind)
        wanted = unicodedata.normalize("NFC", text[start:end]).lower().encode()
        # Published merges join neighbouring ideographs, which are words of their own, and may end inside the next one.
        assert said == wanted or (wanted in said and kind == "published" and not wanted.isascii()), text[start:end]


MIXED = st.lists(
    st.one_of(
        PIECES,
        st.sampled_from(
            ["'tis", "o'clock", "we'll", "10th", "x-ray", "Ångström", "Dvořák", "東京", "🙂", "👨‍👩‍👧", "the"]
        ),
        st.text(st.characters(categories=["L", "N", "P", "S", "M"]), min_size=1, max_size=8),
    ),
    max_size=20,
)


def graphemes(text: str) -> list[tuple[int, int, bytes]]:
    """(start, end, what CLIP makes of it in UTF-8) of every user-perceived character that is not blank."""
    found = [(m.start(), m.end(), unicodedata.normalize("NFC", m.group()).lower()) for m in regex.finditer(r"\X", text)]
    return [(start, end, said.encode()) for start, end, said in found if said.strip()]


@published
@given(parts=MIXED, glue=st.sampled_from([" ", "", ", "]))
@settings(max_examples=200, deadline=None)
def test_words_of_any_text_get_all_their_tokens_and_no_other(parts, glue):
    """Places are counted along the bytes that the tokens spell, without the tokenizer's own offsets."""
    text = glue.join(parts)
    encoded = tokenizer("published")(text, add_special_tokens=False, return_offsets_mapping=True)
    said = [spelled([token], "published") for token in encoded.input_ids]
    clusters = graphemes(text)
    assume(b"".join(said) == b"".join(c[2] for c in clusters))  # composed across two characters: another text to CLIP
    ends = list(itertools.accumulate(len(c[2]) for c in clusters))
    owners = [set() for _ in said]  # numbers of the characters that a token spells a part of
    here = 0
    for token, spelling in enumerate(said):
        first = bisect.bisect_right(ends, here)
        here += len(spelling)
        owners[token] = set(range(first, bisect.bisect_left(ends, here) + 1))
    for start, end in words(text):
        inside = {n for n, (low, high, _) in enumerate(clusters) if low < end and start < high}
        wanted = [token for token, owned in enumerate(owners) if owned & inside]
        assert overlapping((start, end), encoded.offset_mapping) == wanted, text[start:end]


@published
def test_the_published_vocabulary_is_the_one_of_clip():
    ids = tokenizer("published")("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_tokens_of_a_word_are_consecutive_and_in_order(kind, text):
    spans = tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    seen = -1
    for span in words(text):
        own = overlapping(span, spans)
        if own:
            assert own == list(range(own[0], own[-1] + 1))
            # Only ideographs and the like may share a token with the word before.
            assert own[0] > seen or (own[0] == seen and not text[slice(*span)].isascii())
            seen = own[-1]


# --- windows --------------------------------------------------------------------------------------------------------


@given(question=TEXTS, answer=TEXTS, limit=st.integers(4, 40))
@settings(max_examples=200, deadline=None)
def test_every_word_that_fits_has_a_window(question, answer, limit):
    question, answer = question.strip(), answer.strip() or "yes"
    text = as_text(question, answer)
    found = windows(text, limit, count)
    for window in found:
        assert count(window.text) <= limit
    places = assign(text.spans, found, [token_spans(window.text) for window in found])
    for span, place in zip(text.spans, places, strict=True):
        word = text.text[slice(*span)]
        if place is None:
            assert count(word) > limit // 2 or count(word) == 0, word
            continue
        window, tokens = found[place[0]], place[1]
        start, end = window.span(span)
        assert window.text[start:end] == word
        assert tokens == overlapping((start, end), token_spans(window.text))


def test_a_text_that_fits_is_one_window():
    text = as_text("What is it?", "A red circle.")
    assert windows(text, 75, count) == [Window("What is it? A red circle.", ((0, 0, 25),))]


def test_long_answers_are_cut_after_sentences_and_keep_the_question():
    answer = "Aaa bbb ccc. " * 6
    found = windows(as_text("Why so?", answer.strip()), 35, count)
    assert len(found) > 1
    for window in found:
        assert window.text.startswith("Why so? Aaa")
        assert window.text.endswith("ccc.")


def test_a_long_sentence_is_cut_after_commas_and_a_long_clause_between_words():
    by_clause = windows(as_text("", "aaaa bbbb, cccc dddd, eeee ffff gggg"), 18, count)
    assert [w.text for w in by_clause] == ["aaaa bbbb, cccc dddd,", "eeee ffff gggg"]
    by_word = windows(as_text("", " ".join(["abcd"] * 10)), 12, count)
    assert all(set(w.text.split()) == {"abcd"} for w in by_word)


def test_the_last_window_reaches_back_for_context():
    found = windows(as_text("", "Aaa aaa. Bbb bbb. Ccc ccc. Ddd ddd."), 21, count)
    assert [w.text for w in found] == ["Aaa aaa. Bbb bbb. Ccc ccc.", "Bbb bbb. Ccc ccc. Ddd ddd."]


def test_a_long_question_gets_windows_of_its_own():
    question = " ".join(["abcd"] * 20) + "?"
    text = as_text(question, "Yes, there is.")
    found = windows(text, 24, count)
    places = assign(text.spans, found, [token_spans(w.text) for w in found])
    assert None not in places
    answer = found[places[-1][0]]
    assert answer.text.endswith(" Yes, there is.")
    assert answer.text.startswith("abcd abcd abcd ")


def test_a_word_is_read_where_its_smaller_context_is_largest():
    whole = "a b c d e"
    spans = words(whole)
    first = Window("a b c d", ((0, 0, 7),))
    second = Window("b c d e", ((2, 0, 7),))
    places = assign(spans, [first, second], [token_spans(w.text) for w in (first, second)])
    #  a: only in the first; b: 1 against 0; c: 1 against 1, the earlier; d: 0 against 1; e: only in the second
    assert [place[0] for place in places] == [0, 0, 0, 1, 1]


def test_texts_hold_question_and_answer_of_each_assistant_turn():
    turns = (Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "A man."), Turn("user", "Where?"),
             Turn("assistant", "Here."))  # fmt: skip
    example = Example("0", None, "", turns, "", "", "")
    texts = teacher_texts(example)
    assert [t.text for t in texts] == ["Who? A man.", "Where? Here."]
    for text in texts:
        assert [text.text[slice(*s)] for s in text.spans] == [example.word_text(w) for w in text.words]
    assert [w for t in texts for w in t.words] == example.words()
    assert [t.text for t in teacher_texts(example, "answer")] == ["A man.", "Here."]


def test_a_question_without_text_adds_nothing():
    assert as_text("", "A man.").text == "A man."


# --- phrases --------------------------------------------------------------------------------------------------------


def shared(question: str, answer: str, level: str) -> dict[str, str]:
    text = as_text(question, answer, level)
    said = [text.text[slice(*span)] for span in text.spans]
    return {said[i]: said[source] for i, (source,) in enumerate(text.sources) if source != i}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("a small red circle", {"small": "circle", "red": "circle"}),
        ("two red and white balls", {"two": "balls", "red": "balls", "white": "balls"}),
        ("a big, beautiful house near a green tree", {"big": "house", "beautiful": "house", "green": "tree"}),
        ("a circle that is red", {}),
        ("something red", {}),
        ("a red and a blue circle", {"blue": "circle"}),
        ("red. circle", {}),
    ],
)
def test_a_modifier_goes_with_the_noun_after_it(answer, expected):
    assert shared("", answer, "phrase") == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("", "a circle that is red", {"red": "circle"}),
        ("", "The circle is red and small.", {"red": "circle", "small": "circle"}),
        ("What colour is the circle?", "Red.", {"Red": "circle"}),
        ("Is the star small or large?", "large", {"small": "star", "large": "star"}),
        ("How many circles are there?", "two", {"many": "circles", "two": "circles"}),
        ("List the colours.", "red and blue", {}),
        ("What shape is red?", "circle", {}),
        ("How many red shapes are there?", "three", {"many": "shapes", "red": "shapes", "three": "shapes"}),
        ("What is above the circle?", "a red star", {"red": "star"}),
        ("", "A man eats an orange.", {}),
        ("What does the man eat?", "An orange.", {}),
        ("", "The star beside the circle is the small one.", {}),
    ],
)
def test_clauses_carry_a_modifier_back_to_its_noun(question, answer, expected):
    assert shared(question, answer, "clause") == expected


def test_with_mean_a_noun_and_its_modifiers_are_one_group():
    text = as_text("", "a small red circle and a star", "mean")
    assert text.sources == ((0,), (1, 2, 3), (1, 2, 3), (1, 2, 3), (4,), (5,), (6,))


@given(TEXTS, st.integers(0, 30))
@settings(max_examples=100, deadline=None)
def test_sources_are_words_and_nouns_keep_their_own(text, answer):
    spans = words(text)
    for level in ("none", "phrase", "clause"):
        found = heads(text, spans, min(answer, len(text)), level)
        assert len(found) == len(spans)
        assert all(found[source] == source for source in found)
    assert heads(text, spans, 0, "none") == list(range(len(spans)))
