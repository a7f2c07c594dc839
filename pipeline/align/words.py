"""Which words are worth aligning: those that can name something in a picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

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


def choose(example: "Example", words: Sequence["Word"], which: str, limit: int) -> list["Word"]:
    """The words to align, in order.

    Args:
        example: whose words they are.
        which: ``content`` or ``all``.
        limit: how many at most, the first ones; 0 for no limit.
    """
    kept = [word for word in words if which == "all" or is_content(example.word_text(word))]
    return kept[:limit] if limit else kept
