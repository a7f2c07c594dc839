"""Scores between right and wrong, against one or several gold answers: ANLS, VQA accuracy and CIDEr-D.

ANLS is the one of the package `anls_star` (an extra of this project); no release of a scorer for the other two is still
looked after, so they are written out here, after their definitions.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.errors import UserError

# --- ANLS -----------------------------------------------------------------------------------------------------------


def anls(answer: str, golds: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over its gold answers, 0 below one half.

    Biten et al., "Scene Text Visual Question Answering" (ICCV 2019), section 5; case and repeated spaces do not matter.
    The released scorers, and `anls_star` which does the work here (Peer et al., 2024), keep a similarity of exactly one
    half, which the paper's formula drops.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from anls_star import anls_score
    except ImportError as error:
        raise UserError("the scorer 'anls' needs the package anls_star: pip install anls_star") from error
    return float(anls_score(tuple(golds), answer))


# --- VQA accuracy ---------------------------------------------------------------------------------------------------

_NUMBERS = {name: str(n) for n, name in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_ARTICLES = ("a", "an", "the")
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
# Contractions of the data set's list; each is also recognised with one apostrophe left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've i'm i've isn't it'd it'd've it'll let's ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've somebody'd've somebody'll
somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_CONTRACTED = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS for at, mark in enumerate(word) if mark == "'"
}
for _name in ("lets", "shes"):  # not in the list
    del _CONTRACTED[_name]


def vqa_words(text: str) -> str:
    """An answer as VQA compares it: lower case, without articles and most punctuation, numbers as digits.

    Agrawal et al., "VQA: Visual Question Answering" (ICCV 2015); the steps are those of the data set's evaluation page.
    """
    given = unicodedata.normalize("NFKC", text).replace("\n", " ").replace("\t", " ").strip().lower()
    thousands, text = bool(re.search(r"\d,\d", given)), given
    for mark in _MARKS:
        # A mark that touches a space, or a number with commas, is dropped; one between two letters separates them.
        alone = f"{mark} " in given or f" {mark}" in given
        text = text.replace(mark, "" if alone or thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, golds: Sequence[str]) -> float:
    """VQA accuracy of one answer against the answers of several people.

    min(agreeing / 3, 1), averaged over all sets that leave one person out (Agrawal et al., 2015; the averaging is that
    of the data set's own script). That script compares answers as they are where all people say the same; here they are
    always compared by `vqa_words`, as most harnesses compare what a model says. A single gold answer is right or wrong.
    """
    said, told = vqa_words(answer), [vqa_words(gold) for gold in golds]
    if len(told) == 1:
        return float(said == told[0])
    agree = sum(gold == said for gold in told)
    # Leaving out one of those who agree loses a vote; leaving out another loses none.
    votes = [agree - (gold == said) for gold in told]
    return sum(min(1.0, vote / 3) for vote in votes) / len(votes)


# --- CIDEr-D --------------------------------------------------------------------------------------------------------

ORDERS = 4
SIGMA = 6.0  # of the penalty for another length, in words
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def caption_words(text: str) -> list[str]:
    """Words of a caption: lower case, without punctuation.

    The published numbers split words with the Penn Treebank tokeniser, a Java program; it differs from this in
    contractions ("do n't") only.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


class CiderD:
    """CIDEr-D of captions (Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", CVPR 2015).

    Per sample: 10 times the mean over n = 1..4 of the mean over reference captions of the clipped cosine between
    tf-idf vectors of n-grams, times exp(-(difference in length)^2 / (2 * 6^2)). Document frequencies count the images
    whose references hold an n-gram, over all images of the task, so the mean over samples is the score of the set.

    Args:
        references: the reference captions of every image of the task.
    """

    def __init__(self, references: Iterable[Sequence[str]]):
        self.frequency: Counter[tuple[str, ...]] = Counter()
        images = 0
        for golds in references:
            images += 1
            self.frequency.update({gram for gold in golds for counts in _grams(gold) for gram in counts})
        self.log_images = math.log(images) if images else 0.0

    def __call__(self, answer: str, golds: Sequence[str]) -> float:
        said = self._vectors(answer)
        per_order = [0.0] * ORDERS
        for gold in golds:
            told = self._vectors(gold)
            penalty = math.exp(-((said[1] - told[1]) ** 2) / (2 * SIGMA**2))
            for n in range(ORDERS):
                per_order[n] += penalty * _clipped_cosine(said[0][n], told[0][n])
        return 10 * sum(per_order) / ORDERS / len(golds)

    def _vectors(self, text: str) -> tuple[list[dict[tuple[str, ...], float]], int]:
        """tf-idf weights for each n, and the length in words."""
        weighted = [
            {gram: count * (self.log_images - math.log(max(1, self.frequency[gram]))) for gram, count in counts.items()}
            for counts in _grams(text)
        ]
        return weighted, len(caption_words(text))


def _grams(text: str) -> list[Counter[tuple[str, ...]]]:
    words = caption_words(text)
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, ORDERS + 1)]


def _clipped_cosine(said: dict, told: dict) -> float:
    norms = math.sqrt(sum(w * w for w in said.values())) * math.sqrt(sum(w * w for w in told.values()))
    if norms == 0:
        return 0.0
    return sum(min(weight, told[gram]) * told[gram] for gram, weight in said.items() if gram in told) / norms
