"""Which words are worth aligning: those that can name something in a picture."""

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.examples import Example, Word

# English words that name nothing visible: articles, pronouns, conjunctions, prepositions, auxiliaries, particles.
# Words of other languages are never among them by accident of spelling often enough to matter.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those each every either neither some any no none all both such own other another same
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    ourselves they them their theirs themselves one's who whom whose which what where when why how
    and or but nor so yet if because although though while whereas unless until since than as whether
    of in on at by for with from to into onto upon about against between among amid through during before after above
    below over under underneath beneath beside besides near within without along across toward towards behind beyond
    off out up down around via per like
    is am are was were be been being do does did doing done have has had having can could will would shall should may
    might must ought not n't
    there here then now also too very just only even still again ever never always often perhaps maybe rather quite
    yes no
    it's that's there's he's she's they're i'm we're you're isn't aren't wasn't weren't doesn't don't didn't can't
    cannot couldn't won't wouldn't shouldn't hasn't haven't hadn't what's who's let's
    """.split()
)


def is_content(word: str) -> bool:
    """Whether a word may name something visible. Numbers do: they name the things counted."""
    return word.lower().replace("\u2019", "'") not in FUNCTION_WORDS


# Parts of speech that may be asked for, and how their tags of the Penn Treebank begin.
KINDS = {"nouns": "NN", "verbs": "VB", "adjectives": "JJ"}


def kinds(which: str) -> tuple[str, ...]:
    """The parts of speech in a setting such as ``nouns`` or ``nouns-verbs``; none where it is something else."""
    parts = which.split("-")
    return tuple(KINDS[part] for part in parts) if all(part in KINDS for part in parts) else ()


def choose(example: "Example", words: Sequence["Word"], which: str, limit: int) -> list["Word"]:
    """The words to align, in order.

    Args:
        example: whose words they are.
        words: any of its words.
        which: ``content``, ``all``, or those content words that are some of `KINDS`, joined by hyphens.
        limit: how many at most, the first ones; 0 for no limit.

    Raises:
        UserError: parts of speech without the tagger or its data.
    """
    kept = [word for word in words if which == "all" or is_content(example.word_text(word))]
    wanted = kinds(which)
    if wanted:
        found = {turn: tags(example.turns[turn].text) for turn in {word.turn for word in kept}}
        kept = [word for word in kept if found[word.turn].get((word.start, word.end), "").startswith(wanted)]
    return kept[:limit] if limit else kept


def tags(text: str) -> dict[tuple[int, int], str]:
    """The tag of each word of an English text by its characters, from NLTK's averaged perceptron.

    Raises:
        UserError: NLTK or its data is not there.
    """
    from pipeline.examples import words

    spans = words(text)
    inside = [False] * len(text)
    for start, end in spans:
        inside[start:end] = [True] * (end - start)
    # The tagger reads punctuation as tokens of its own.
    spans = sorted(spans + [m.span() for m in re.finditer(r"[^\w\s]", text) if not inside[m.start()]])
    found = _tagger().tag([text[start:end] for start, end in spans])
    return {span: tag for span, (_, tag) in zip(spans, found, strict=True)}


@cache
def _tagger():
    try:
        from nltk.tag.perceptron import PerceptronTagger
    except ImportError as error:
        raise UserError(
            "align.words by part of speech needs the optional tagger: pip install 'lavender-pipeline[tagger]'"
        ) from error
    try:
        return PerceptronTagger(lang="eng")
    except LookupError as error:
        raise UserError(
            "the tagger of align.words has no data: python -m nltk.downloader averaged_perceptron_tagger_eng"
        ) from error
