"""Scorers: a raw output and a gold answer in, an answer and right or wrong out. Each has a version that is recorded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipeline.evaluate.graded import CiderD, anls, vqa_accuracy

EXACT = "exact-1"
LIST = "set-1"
YESNO = "yesno-1"
CHOICE = "choice-1"
ANLS, VQA, CIDER = "anls-2", "vqa-2", "cider-d-2"
HALF = 0.5
# From which grade on an answer counts as right in lists of mistakes; the grade itself is what is averaged. One half is
# ANLS's own threshold, and for VQA two of ten people who agree. CIDEr-D has no threshold: no caption is right or wrong.
RIGHT_FROM = {"anls": HALF, "vqa": HALF, "cider": None}
YES_NO = ("pope", "yesno")  # kinds of question whose answer is yes or no


@dataclass(frozen=True)
class Score:
    """What was understood of an output (``answer``), whether it is right, and why nothing could be understood.

    ``failure`` is empty where the output could be read; else the answer counts as wrong AND as a parse failure.
    ``grade`` is what a scorer between right and wrong gives; without it ``value`` is 1 or 0. ``correct`` is None where
    a scorer only grades.
    """

    answer: str
    correct: bool | None
    scorer: str
    failure: str = ""
    grade: float | None = None

    @property
    def value(self) -> float:
        return float(self.correct) if self.grade is None else self.grade


def normalise(text: str) -> str:
    """NFKC, lower case, one space between words, no punctuation at the end."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    while text and unicodedata.category(text[-1]).startswith("P"):
        text = text[:-1].rstrip()
    return text


def as_set(text: str) -> frozenset[str]:
    """The items of a list written with commas, semicolons, line breaks or "and"; their order does not matter."""
    items = re.split(r"[,;\n]|\band\b|&", unicodedata.normalize("NFKC", text).lower())
    return frozenset(filter(None, (normalise(item) for item in items)))


def score(kind: str, raw: str, gold: str, ended: bool = True) -> Score:
    """Scores ``raw`` by the rule of its question kind.

    Lists are compared as sets; "pope" reads yes or no from the beginning of the output; "choice" reads a letter;
    everything else is exact match after ``normalise``. An output that is empty, or still running at the longest
    length allowed, is a parse failure and is wrong.
    """
    rule = RULES.get(kind, _score_exact)
    found = rule(raw, gold)
    if found.failure:
        return found
    if not normalise(raw):
        return Score("", False, found.scorer, "empty")
    if not ended and rule in (_score_exact, _score_list):
        return Score(found.answer, False, found.scorer, "too long")
    return found


def _score_exact(raw: str, gold: str) -> Score:
    answer = normalise(raw)
    return Score(answer, answer == normalise(gold), EXACT)


def _score_list(raw: str, gold: str) -> Score:
    found = as_set(raw)
    return Score(", ".join(sorted(found)), found == as_set(gold), LIST)


def _score_yesno(raw: str, gold: str) -> Score:
    """The first word decides, as POPE's own script does for short answers; anything else is a failure, not a guess."""
    first = re.match(r"\W*(yes|no)\b", normalise(raw))
    if not first:
        return Score("", False, YESNO, "neither yes nor no")
    return Score(first.group(1), first.group(1) == normalise(gold), YESNO)


def _score_choice(raw: str, gold: str) -> Score:
    """A letter A-H, alone, before punctuation or after "answer is"; two different letters are a failure."""
    text = unicodedata.normalize("NFKC", raw).strip()
    start = re.match(r"[(\[]?([A-Ha-h])(?:[)\].:,]|\s*$)", text)
    named = re.findall(r"(?i:answer|option|choice)(?i:\s+is)?\W{0,3}([A-H])\b", text)
    letters = {start.group(1).upper()} if start else {letter.upper() for letter in named}
    if len(letters) != 1:
        return Score("", False, CHOICE, "several letters" if letters else "no letter")
    letter = letters.pop()
    return Score(letter, letter == gold.strip().upper(), CHOICE)


RULES = {"list": _score_list, "pope": _score_yesno, "choice": _score_choice, "exact": _score_exact}
GRADED = {"anls": ANLS, "vqa": VQA, "cider": CIDER}
SCORERS = (*RULES, *GRADED)
POINTING = "pointing-2"  # what `pointing.measure` gives
VERSIONS = {"exact": EXACT, "list": LIST, "pope": YESNO, "choice": CHOICE, **GRADED}


class Scorer:
    """The rule of one task.

    Args:
        name: one of ``SCORERS`` for every question of the task; empty: each by its kind.
        golds: the gold answers of every question of the task, which CIDEr-D weighs words by.
    """

    def __init__(self, name: str, golds: Iterable[Sequence[str]]):
        self.name = name
        grades: dict[str, Callable[[str, Sequence[str]], float]] = {"anls": anls, "vqa": vqa_accuracy}
        self._grade = CiderD(golds) if name == "cider" else grades.get(name)

    def __call__(self, kind: str, raw: str, golds: Sequence[str], ended: bool) -> Score:
        """Scores one output: against the first gold answer by rules of right and wrong, against all by the others."""
        if self._grade is None:
            return score(self.name or kind, raw, golds[0], ended)
        answer = " ".join(raw.split())
        failure = "" if answer else "empty"
        grade = 0.0 if failure else self._grade(answer, golds)
        right = False if failure else passes(grade, RIGHT_FROM[self.name])
        return Score(answer, right, VERSIONS[self.name], failure, grade)


def passes(grade: float | None, threshold: float | None = HALF) -> bool | None:
    """Whether a grade reaches the threshold; None where one of the two is missing."""
    return None if grade is None or threshold is None else grade >= threshold
