"""Captions and questions about a scene, with the objects that each word speaks of.

Every word that names a colour, a shape, a size or a number of objects carries the set of objects it is true of
in that sentence: in "a small red circle" all three words mean that one circle; in "List the colours." / "red and
blue" the word "red" means every red object. "yes" and "no" name no object and carry none.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from pipeline.world.scenes import COLOURS, HELD_OUT, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
KINDS = ("attribute", "shape", "count", "relation", "yesno", "list")


@dataclass
class Text:
    """A sentence under construction: characters and the (start, end, objects, kind) of its naming words."""

    text: str = ""
    spans: list[tuple[int, int, tuple[int, ...], str]] = field(default_factory=list)

    def add(self, piece: str, things: tuple[int, ...] = (), kind: str = "") -> Text:
        if things:
            self.spans.append((len(self.text), len(self.text) + len(piece), tuple(things), kind))
        self.text += piece
        return self


@dataclass(frozen=True)
class Exchange:
    """A question, its answer and the kind of question (``caption`` or one of ``KINDS``)."""

    question: Text
    answer: Text
    kind: str


def caption(rng: np.random.Generator, scene: Scene, loose: bool = False) -> Text:
    """One caption. ``loose`` adds forms that name only some objects or only one property, which let a diffusion
    model bind each word by itself."""
    order = [int(i) for i in rng.permutation(len(scene.things))]
    if loose and len(order) > 1 and rng.random() < 0.4:
        order = order[: int(rng.integers(1, len(order)))]
    forms = ["plain", "plain", "clause", "relation"] + (["single", "single", "single", "count"] if loose else [])
    form = str(rng.choice(forms))
    out = Text()
    if form == "relation" and len(order) >= 2:
        a, b = order[:2]
        _noun_phrase(out, rng, scene, a).add(f" {_relation(scene.things[a], scene.things[b])} ")
        return _noun_phrase(out, rng, scene, b)
    if form == "count":
        thing = scene.things[order[0]]
        same = tuple(i for i, t in enumerate(scene.things) if t.shape == thing.shape)
        plural = "es" if thing.shape == "cross" else "s"
        noun = thing.shape + (plural if len(same) > 1 else "")
        return (
            out.add("there are " if len(same) > 1 else "there is ")
            .add(NUMBERS[len(same)], same, "count")
            .add(" ")
            .add(noun, same, "shape")
        )
    for place, index in enumerate(order):
        if place:
            out.add(" and " if place == len(order) - 1 else ", ")
        thing = scene.things[index]
        if form == "clause":
            same = tuple(_unique(scene, colour=thing.colour, shape=thing.shape))
            out.add("a ").add(thing.shape, same, "shape").add(" that is ").add(thing.colour, same, "colour")
        elif form == "single":
            _single(out, rng, scene, index)
        else:
            _noun_phrase(out, rng, scene, index)
    if form == "plain" and not loose and rng.random() < 0.3:
        out.add(f" on a {scene.background} background")
    return out


def _noun_phrase(out: Text, rng: np.random.Generator, scene: Scene, index: int) -> Text:
    """ "a small red circle": its words mean every object of which the whole phrase is true."""
    thing = scene.things[index]
    wanted = {"colour": thing.colour, "shape": thing.shape}
    if rng.random() < 0.35:
        wanted = {"size": thing.size, **wanted}
    same = tuple(_unique(scene, **wanted))
    for place, (kind, value) in enumerate(wanted.items()):
        out.add(" " if place else f"{_article(value)} ").add(value, same, kind)
    return out


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _single(out: Text, rng: np.random.Generator, scene: Scene, index: int) -> Text:
    """One property only. A bare property is true of every object that has it, not only of the one drawn."""
    thing = scene.things[index]
    which = str(rng.choice(["colour", "shape", "size"], p=[0.45, 0.4, 0.15]))
    same = tuple(i for i, t in enumerate(scene.things) if getattr(t, which) == getattr(thing, which))
    value = getattr(thing, which)
    return out.add("a " if which == "shape" else "something ").add(value, same, which)


def _relation(a: Thing, b: Thing) -> str:
    if abs(a.x - b.x) >= abs(a.y - b.y):
        return "left of" if a.x < b.x else "right of"
    return "above" if a.y < b.y else "below"


def ask(rng: np.random.Generator, scene: Scene, kind: str) -> Exchange | None:
    """A question of a kind with exactly one right answer, or None where the scene allows none."""
    return _ASK[kind](rng, scene)


def _unique(scene: Scene, **wanted: str) -> list[int]:
    return [i for i, t in enumerate(scene.things) if all(getattr(t, k) == v for k, v in wanted.items())]


def _targets(rng: np.random.Generator, scene: Scene) -> list[int]:
    """Objects in random order; those of a held-out pair first, so that `ood_pairs` asks about them."""
    order = [int(i) for i in rng.permutation(len(scene.things))]
    return sorted(order, key=lambda i: (scene.things[i].colour, scene.things[i].shape) not in HELD_OUT)


def _ask_attribute(rng, scene):
    for i in _targets(rng, scene):
        thing = scene.things[i]
        if rng.random() < 0.75:
            if len(_unique(scene, shape=thing.shape)) == 1:
                question = Text().add("What colour is the ").add(thing.shape, (i,), "shape").add("?")
                return Exchange(question, Text().add(thing.colour, (i,), "colour"), "attribute")
        elif len(_unique(scene, colour=thing.colour, shape=thing.shape)) == 1:
            question = Text().add("Is the ").add(thing.colour, (i,), "colour").add(" ").add(thing.shape, (i,), "shape")
            return Exchange(question.add(" small or large?"), Text().add(thing.size, (i,), "size"), "attribute")
    return None


def _ask_shape(rng, scene):
    for i in _targets(rng, scene):
        thing = scene.things[i]
        if len(_unique(scene, colour=thing.colour)) == 1:
            question = Text().add("What shape is ").add(thing.colour, (i,), "colour").add("?")
            return Exchange(question, Text().add(thing.shape, (i,), "shape"), "shape")
    return None


def _ask_count(rng, scene):
    if rng.random() < 0.5:
        present = scene.things[_targets(rng, scene)[0]].shape
        shape = present if rng.random() < 0.85 else str(rng.choice(SHAPES))
        found = tuple(_unique(scene, shape=shape))
        question = Text().add("How many ").add(shape + ("es" if shape == "cross" else "s"), found, "shape")
    else:
        present = scene.things[_targets(rng, scene)[0]].colour
        colour = present if rng.random() < 0.85 else str(rng.choice(list(COLOURS)))
        found = tuple(_unique(scene, colour=colour))
        question = Text().add("How many ").add(colour, found, "colour").add(" shapes")
    return Exchange(question.add(" are there?"), Text().add(NUMBERS[len(found)], found, "count"), "count")


def _ask_relation(rng, scene):
    directions = {
        "left of": lambda a, b: b.x - a.x,
        "right of": lambda a, b: a.x - b.x,
        "above": lambda a, b: b.y - a.y,
        "below": lambda a, b: a.y - b.y,
    }
    for i in _targets(rng, scene):
        thing = scene.things[i]
        if len(_unique(scene, colour=thing.colour, shape=thing.shape)) != 1:
            continue
        for name in rng.permutation(list(directions)):
            gaps = [(j, directions[str(name)](t, thing)) for j, t in enumerate(scene.things) if j != i]
            beyond = [j for j, gap in gaps if gap > 0]
            # One object clearly on that side and no other near the boundary: else the answer is a matter of taste.
            if len(beyond) == 1 and dict(gaps)[beyond[0]] > 6 and all(gap < -3 for j, gap in gaps if j != beyond[0]):
                j = beyond[0]
                question = Text().add(f"What is {name} the ").add(thing.colour, (i,), "colour").add(" ")
                answer = Text().add(scene.things[j].colour, (j,), "colour").add(" ")
                answer.add(scene.things[j].shape, (j,), "shape")
                return Exchange(question.add(thing.shape, (i,), "shape").add("?"), answer, "relation")
    return None


def _ask_yesno(rng, scene):
    thing = scene.things[_targets(rng, scene)[0]]
    colour, shape = thing.colour, thing.shape
    if rng.random() < 0.5:
        # "no" questions mix properties that are there, so that they cannot be answered by looking for one word.
        for _ in range(20):
            if rng.random() < 0.5:
                colour = str(rng.choice(list(COLOURS)))
            else:
                shape = str(rng.choice(SHAPES))
            if not _unique(scene, colour=colour, shape=shape) and (colour, shape) not in HELD_OUT:
                break
            colour, shape = thing.colour, thing.shape
    found = tuple(_unique(scene, colour=colour, shape=shape))
    question = (
        Text()
        .add(f"Is there {_article(colour)} ")
        .add(colour, found, "colour")
        .add(" ")
        .add(shape, found, "shape")
        .add("?")
    )
    return Exchange(question, Text().add("yes" if found else "no"), "yesno")


def _ask_list(rng, scene):
    which = str(rng.choice(["colour", "shape"]))
    values = list(Counter(getattr(t, which) for t in scene.things))
    answer = Text()
    for place, value in enumerate(values):
        if place:
            answer.add(" and " if place == len(values) - 1 else ", ")
        answer.add(value, tuple(_unique(scene, **{which: value})), which)
    return Exchange(Text().add(f"List the {which}s."), answer, "list")


_ASK = {
    "attribute": _ask_attribute,
    "shape": _ask_shape,
    "count": _ask_count,
    "relation": _ask_relation,
    "yesno": _ask_yesno,
    "list": _ask_list,
}


def exchanges(rng: np.random.Generator, scene: Scene, count: int, with_caption: bool) -> list[Exchange]:
    """``count`` questions of different kinds, after a caption if asked."""
    out = []
    if with_caption:
        out.append(Exchange(Text().add("Describe the image."), caption(rng, scene), "caption"))
    for kind in rng.permutation(KINDS):
        if len([e for e in out if e.kind != "caption"]) == count:
            break
        found = ask(rng, scene, str(kind))
        if found is not None:
            out.append(found)
    return out


def teacher_text(rng: np.random.Generator, scene: Scene) -> Text:
    """A text to train the diffusion model on: mostly captions, sometimes a question with its answer."""
    if rng.random() < 0.6:
        return caption(rng, scene, loose=True)
    while True:
        found = ask(rng, scene, str(rng.choice(KINDS)))
        if found is not None:
            break
    out = Text(found.question.text + " ", list(found.question.spans))
    shift = len(out.text)
    out.text += found.answer.text
    out.spans += [(s + shift, e + shift, things, kind) for s, e, things, kind in found.answer.spans]
    return out
