"""Which words are aligned: content words without any download, parts of speech with the optional tagger."""

import pytest

from pipeline.align import words as filters
from pipeline.align.config import AlignConfig
from pipeline.align.words import choose
from pipeline.errors import UserError
from pipeline.examples import Example, Turn

TEXT = "A small dog runs, and the red cats sleep on a chair. They watch it."


@pytest.fixture
def example():
    return Example("0", None, "", (Turn("user", "Who runs?"), Turn("assistant", TEXT)), "test", "train", "none")


@pytest.fixture
def tagger(tmp_path, monkeypatch):
    """NLTK's own tagger, trained on a few sentences and stored where its published data would lie."""
    import nltk
    from nltk.tag.perceptron import PerceptronTagger

    kinds = {
        "DT": "a the", "JJ": "small red", "NN": "dog chair", "NNS": "cats", "VBZ": "runs is", "VBP": "sleep watch",
        "CC": "and", "IN": "on", "PRP": "they it", ".": ".", ",": ",",
    }  # fmt: skip
    of = {word: tag for tag, some in kinds.items() for word in some.split()}
    sentences = [
        "a small dog runs .", "the red cats sleep on a chair .", "they watch it .",
        "a dog is small , and the cats sleep .",
        "the chair is red .", "they sleep .", "it runs on the chair .",
    ]  # fmt: skip
    made = PerceptronTagger(load=False)
    made.train([[(word, of[word]) for word in sentence.split()] for sentence in sentences] * 5, nr_iter=5)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    (tmp_path / "taggers").mkdir()
    made.save_to_json("eng", str(tmp_path / "taggers" / "averaged_perceptron_tagger_eng"))
    filters._tagger.cache_clear()
    yield
    filters._tagger.cache_clear()


def chosen(example, which: str, limit: int = 0) -> list[str]:
    return [example.word_text(word) for word in choose(example, example.words(("assistant",)), which, limit)]


def test_content_words_need_no_tagger(example):
    assert AlignConfig().words == "content"
    assert chosen(example, "content") == ["small", "dog", "runs", "red", "cats", "sleep", "chair", "watch"]
    assert chosen(example, "content", limit=3) == ["small", "dog", "runs"]
    assert chosen(example, "all")[:3] == ["A", "small", "dog"]


def test_parts_of_speech(example, tagger):
    assert chosen(example, "nouns") == ["dog", "cats", "chair"]
    assert chosen(example, "verbs") == ["runs", "sleep", "watch"]
    assert chosen(example, "nouns-verbs", limit=4) == ["dog", "runs", "cats", "sleep"]
    assert chosen(example, "adjectives-nouns") == ["small", "dog", "red", "cats", "chair"]


def test_without_its_data_one_line_says_what_to_do(example, tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    filters._tagger.cache_clear()
    with pytest.raises(UserError, match=r"nltk\.downloader averaged_perceptron_tagger_eng"):
        chosen(example, "nouns")
    with pytest.raises(UserError, match=r"unknown align\.words 'pronouns'"):
        AlignConfig(words="pronouns")
    assert AlignConfig(words="nouns-verbs").words == "nouns-verbs"
