"""Which noun a modifier belongs to, by rule.

In "a red circle" a causal text encoder lets the noun's embedding carry the colour, so a diffusion model binds the
circle to the noun and leaves the modifier with nothing to point at. Giving the modifier its noun's map repairs that.
A word counts as a modifier only if it is in the lists below or has the ending of an adjective: the rules would rather
miss a modifier, which then keeps its own map, than take a noun or a verb for one.
"""

import itertools

import regex


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


MODIFIERS = _listed("""
    red orange yellow green blue cyan turquoise teal purple violet pink magenta brown beige tan black white grey gray
    golden gold silver blonde blond dark light bright pale
    small little tiny mini big large huge giant tall short long wide narrow thin thick fat slim deep shallow high low
    round circular rectangular triangular oval flat curved straight curly sharp pointed
    striped spotted dotted checkered chequered plaid patterned plain shaded noisy textured
    old new young ancient modern fresh ripe raw dry wet clean dirty dusty muddy rusty shiny smooth rough soft hard hot
    cold warm cool frozen empty full open closed broken torn bare wooden metal metallic plastic
    woolen woollen sandy snowy rocky grassy sunny cloudy rainy foggy stormy
    happy sad angry tired smiling sleeping bearded bald elderly male female adult
    first second third last left-hand right-hand upper lower middle front rear several many few various
    zero one two three four five six seven eight nine ten eleven twelve dozen
    """)
ENDINGS = ("ful", "ous", "ish", "less", "shaped", "coloured", "colored", "haired", "sized", "sleeved", "dressed")
MODIFIER_NOT = _listed("furnish fish dish finish polish publish british radish unless bless handful")
ADVERBS = _listed("very quite rather really so too fairly mostly partly slightly bright light dark")
LINKS = _listed("and or")
ARTICLES = _listed("a an the this that these those")
COPULAS = _listed("is are was were be been being looks look seems seem appears appear")
CLOSED = (
    _listed("""
    a an the this that these those some any no each every both either neither all other another such
    i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
    who whom whose which what where when why how there here something anything nothing someone anyone everyone
    of in on at by to from with without for about into onto over under above below between behind beside besides near
    next along across through around against among during before after as than like up down off out inside outside
    left right towards toward within upon
    and or but nor if then so because while although though yet
    am do does did done doing have has had having can could will would shall should may might must not n't yes
    also only just even still again now more most less least much very too quite rather really please
    contains shows show shown see seen depicts describe list name count tell
    """)
    | COPULAS
)
# Nouns that name no thing in the picture unless something more is said of them ("the red shapes").
GENERAL = _listed("""
    colour color colours colors shape shapes size sizes kind kinds type types sort number numbers object objects thing
    things image picture photo photograph scene background answer question
    """)
SENTENCE = regex.compile(r"[.!?;:\n\u3002\uff01\uff1f]")


def sources(text: str, spans: list[tuple[int, int]], answer: int, level: str) -> list[tuple[int, ...]]:
    """For each word the words whose maps make up its own (see `TeacherConfig.phrases`): itself unless it belongs to a
    noun and its modifiers.

    Args:
        text: question and answer, as in `TeacherText`.
        spans: character spans of the words of `text`, in order.
        answer: where the answer begins in `text`.
    """
    if level not in ("mean", "product"):
        return [(head,) for head in heads(text, spans, answer, level)]
    found = heads(text, spans, answer, "clause")
    groups: dict[int, list[int]] = {}
    for word, head in enumerate(found):
        groups.setdefault(head, []).append(word)
    return [tuple(groups[head]) for head in found]


def heads(text: str, spans: list[tuple[int, int]], answer: int, level: str) -> list[int]:
    """For each word its noun: itself unless it is a modifier whose noun is found.

    Args:
        level: `none` (every word its own), `phrase` ("small red circle": both words go to "circle"), or `clause`
            (also "the circle is red", and an answer "Red." that names no noun takes the noun asked about).
    """
    out = list(range(len(spans)))
    if level == "none":
        return out
    lowered = [text[start:end].lower() for start, end in spans]
    gaps = [text[end:start] for (_, end), (start, _) in itertools.pairwise(spans)]
    nouns = [is_noun(word) for word in lowered]
    modifiers = [is_modifier(word) for word in lowered]
    for index, modifier in enumerate(modifiers):
        if modifier:
            head = _after(index, lowered, gaps, nouns, modifiers)
            if head is None and level == "clause" and not _named(index, lowered, gaps, modifiers):
                head = _before(index, lowered, gaps, nouns, modifiers, spans, answer)
            out[index] = index if head is None else head
    return out


def is_modifier(word: str) -> bool:
    """Whether a lower-case word is taken for an adjective or a number."""
    if word in MODIFIERS or word.isdigit():
        return True
    return len(word) > 5 and word.endswith(ENDINGS) and word not in MODIFIER_NOT


def is_noun(word: str) -> bool:
    """Whether a lower-case word may be a noun: anything that is neither a modifier nor in the closed classes."""
    return not is_modifier(word) and word not in CLOSED and word not in ADVERBS and any(c.isalpha() for c in word)


def _after(index, lowered, gaps, nouns, modifiers) -> int | None:
    """The noun that follows, over further modifiers, "and" between two of them, and commas between two of them."""
    here = index
    while here + 1 < len(lowered):
        gap, following = gaps[here].strip(), here + 1
        if nouns[following]:
            return following if not gap else None
        linked = lowered[following] in LINKS and following + 1 < len(lowered) and modifiers[following + 1]
        if gap not in ("", ",") or not (modifiers[following] or linked):
            return None
        here = following
    return None


def _named(index, lowered, gaps, modifiers) -> bool:
    """Whether an article opens a run of modifiers without a noun, which are one then: "an orange", "the small one"."""
    here = index
    while here and modifiers[here - 1] and not gaps[here - 1].strip():
        here -= 1
    return bool(here) and lowered[here - 1] in ARTICLES and not gaps[here - 1].strip()


def _before(index, lowered, gaps, nouns, modifiers, spans, answer) -> int | None:
    """The noun that a modifier without a following noun is said of: the nearest one before it in its sentence, or,
    in an answer that has no noun at all, the last noun of the question."""
    in_answer = spans[index][0] >= answer
    lone = in_answer and not any(noun and start >= answer for noun, (start, _) in zip(nouns, spans, strict=True))
    for here in range(index - 1, -1, -1):
        crossed = spans[here][0] < answer <= spans[here + 1][0]
        if (crossed and not lone) or (SENTENCE.search(gaps[here]) and not lone):
            return None
        if nouns[here]:
            if lowered[here] in GENERAL and not (here and modifiers[here - 1]):
                return None
            return here
    return None
