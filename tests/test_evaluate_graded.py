"""Scores between right and wrong, against values worked out by hand from their definitions."""

import math

import pytest

from pipeline.evaluate.graded import CiderD, anls, caption_words, vqa_accuracy, vqa_words
from pipeline.evaluate.harness import right
from pipeline.evaluate.scoring import Scorer


def test_anls():
    assert anls("Hello  World", ["hello world"]) == 1
    # two of ten characters differ; of the gold answers the nearest counts
    assert anls("0123456xx9", ["0123456789", "something else"]) == pytest.approx(0.8)
    # six of ten differ: below one half is nothing
    assert anls("0123xxxxxx", ["0123456789"]) == 0
    assert anls("01234xxxxx", ["0123456789"]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("given", "compared"),
    [
        ("The two  Dogs!", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("blue/green", "blue green"),
        ("blue / green", "blue green"),
        ("2,000", "2000"),
        ("3.5 U.S.", "3.5 us"),
        ("its", "its"),  # a word of its own, so not in the data set's list
    ],
)
def test_vqa_words(given, compared):
    assert vqa_words(given) == compared


@pytest.mark.parametrize(("agree", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_people(agree, accuracy):
    """One of ten agrees: nine of the ten sets of nine others hold that vote, a third each: 9 / 10 / 3."""
    people = ["two"] * agree + [f"another {i}" for i in range(10 - agree)]
    assert vqa_accuracy("2", people) == pytest.approx(accuracy)
    assert vqa_accuracy("2", ["two"]) == 1


def test_cider_of_one_word_captions():
    """Two images, captions of one word: only n = 1 has a weight, log 2, and equal captions have cosine 1: 10 / 4."""
    score = CiderD([["cat"], ["dog"]])
    assert score("cat", ["cat"]) == pytest.approx(2.5)
    assert score("dog", ["cat"]) == 0
    # "cat cat" against "cat": counts (2) and (1), so the cosine is clipped to 1 * 1 / (2 * 1), and one word too many
    assert score("cat cat", ["cat"]) == pytest.approx(10 / 4 * 0.5 * math.exp(-1 / 72))


def test_cider_weighs_words_by_how_few_images_have_them():
    """Three images. "a" is in all of them (weight 0), "red" in two (log 1.5), "cat" in one (log 3)."""
    score = CiderD([["a red cat"], ["a red dog"], ["a bird"]])
    red, cat, dog = math.log(1.5), math.log(3), math.log(3)
    one = red * red / (math.hypot(red, cat) * math.hypot(red, dog))
    a_red, red_cat, red_dog = math.log(1.5), math.log(3), math.log(3)
    two = a_red * a_red / (math.hypot(a_red, red_cat) * math.hypot(a_red, red_dog))
    assert score("a red dog", ["a red cat"]) == pytest.approx(10 * (one + two) / 4)
    # several references are averaged
    assert score("a red dog", ["a red cat", "a bird"]) == pytest.approx(10 * (one + two) / 4 / 2)
    assert caption_words("A man's dog, isn't it?") == ["a", "man's", "dog", "isn't", "it"]


def test_a_task_can_name_its_scorer():
    golds = [("two", "2", "three"), ("yes",)]
    found = Scorer("vqa", golds)("other", "The two.", golds[0], True)
    assert (found.scorer, found.value, found.correct, found.failure) == ("vqa-2", pytest.approx(4 / 9), False, "")
    assert Scorer("anls", golds)("other", "", golds[0], True).failure == "empty"
    assert not Scorer("anls", golds)("other", "", golds[0], True).correct
    assert Scorer("choice", golds)("other", "(B) two", ("B",), True).correct
    by_kind = Scorer("", golds)
    assert by_kind("list", "b and a", ("a, b",), True).correct
    assert by_kind("yesno", "No.", ("no",), True).value == 1


def test_a_scorer_says_from_which_grade_on_an_answer_is_right():
    """ANLS and VQA accuracy from one half on; CIDEr-D has no such grade."""
    near = Scorer("anls", [("0123456789",)])("other", "0123456xx9", ("0123456789",), True)
    assert (near.value, near.correct) == (pytest.approx(0.8), True)
    assert Scorer("anls", [("0123456789",)])("other", "0123xxxxxx", ("0123456789",), True).correct is False
    people = ["two"] * 2 + [f"another {i}" for i in range(8)]
    assert Scorer("vqa", [people])("other", "two", people, True).correct is True
    assert Scorer("vqa", [people])("other", "another 1", people, True).correct is False
    assert Scorer("cider", [("cat",), ("dog",)])("caption", "cat", ("cat",), True).correct is None
    assert [right(score) for score in (0.5, 0.49, 1, 3.2, None)] == [True, False, True, None, None]
