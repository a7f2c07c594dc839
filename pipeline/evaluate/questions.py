"""Questions from archives: one per assistant turn, each asked alone, in an order that every arm shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.evaluate.scoring import normalise

if TYPE_CHECKING:
    from pipeline.archive import Archive
    from pipeline.examples import Example

OTHER = "other"
BLIND = " blind"  # ends the name of a task that is asked without the image


@dataclass(frozen=True)
class Question:
    """One question of an archive.

    Attributes:
        uid: ``<split>/<key>:<turn>``, unique in an evaluation.
        index: the example's place in its archive.
        turn: index of the assistant turn with the gold answer; the user turn before it holds the question.
        cluster: the image's digest: questions with the same image are not independent.
        group: what results are broken down by: the kind, or what the source names (a country, say).
        blind: asked without the image.
        golds: further right answers, where the source knows several.
    """

    uid: str
    split: str
    index: int
    key: str
    turn: int
    kind: str
    prompt: str
    gold: str
    cluster: str
    group: str = ""
    blind: bool = False
    golds: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Every right answer, the one of the conversation first; the same answer given by several people stays."""
        return self.golds or (self.gold,)

    def without_image(self) -> Question:
        """The same question asked blind, under a name of its own."""
        return replace(self, uid=f"{self.uid}#blind", blind=True)


def questions(example: Example, split: str, index: int, exclude: Sequence[str] = ()) -> list[Question]:
    """Questions of one example: every assistant turn that answers a user turn and is not of an excluded kind.

    Kinds come from ``meta.turns`` (``[{"turn", "kind", "group", "answers"}, ...]``, the last two being optional); a
    turn that it does not name is of kind "yesno" where the right answer is yes or no, else "other".
    """
    told = {item["turn"]: item for item in example.meta.get("turns", ())}
    cluster = hashlib.sha256(example.image).hexdigest()[:12] if example.image else f"{split}/{example.key}"
    found = []
    for turn, (before, answer) in enumerate(zip(example.turns, example.turns[1:], strict=False), start=1):
        mine = told.get(turn, {})
        kind = mine.get("kind") or ("yesno" if normalise(answer.text) in ("yes", "no") else OTHER)
        if answer.role != "assistant" or before.role != "user" or kind in exclude:
            continue
        uid = f"{split}/{example.key}:{turn}"
        golds = tuple(map(str, mine.get("answers", ())))
        group = mine.get("group", kind)
        found.append(
            Question(uid, split, index, example.key, turn, kind, before.text, answer.text, cluster, group, golds=golds)
        )
    return found


def alone(example: Example, turn: int) -> Example:
    """The example with nothing but the question answered at ``turn`` (and the system turn, if it has one).

    Regions of the words that stay travel along, with the turn's new index.
    """
    keep = [i for i, t in enumerate(example.turns) if t.role == "system"] + [turn - 1, turn]
    place = {old: new for new, old in enumerate(keep)}
    regions = [{**r, "turn": place[r["turn"]]} for r in example.meta.get("regions", ()) if r["turn"] in place]
    return replace(
        example,
        key=f"{example.key}:{turn}",
        turns=tuple(example.turns[i] for i in keep),
        meta={"regions": regions},
    )


def read(archives: Mapping[str, Archive], splits: Iterable[str], exclude: Sequence[str]) -> dict[str, list[Question]]:
    """All questions of the splits that ``archives`` has, in archive order."""
    return {
        split: [q for i in range(len(archives[split])) for q in questions(archives[split][i], split, i, exclude)]
        for split in splits
        if split in archives
    }


def choose(by_split: Mapping[str, Sequence[Question]], limit: int, equal: bool = True) -> list[Question]:
    """At most ``limit`` questions (0: no limit), with ``equal`` as many from every split, spread over images.

    The order is that of a hash of the question's name: any limit takes a fixed random part, the same for all arms,
    and a larger limit keeps what a smaller one had.
    """
    parts = [sorted(found, key=lambda q: hashlib.sha256(q.uid.encode()).digest()) for found in by_split.values()]
    if not parts:
        return []
    if not equal:
        pooled = sorted((q for part in parts for q in part), key=lambda q: hashlib.sha256(q.uid.encode()).digest())
        return pooled[: limit or None]
    each = min(len(part) for part in parts)
    if limit:
        each = min(each, max(1, limit // len(parts)))
    return [question for part in parts for question in part[:each]]


def batches(chosen: Sequence[Question], size: int) -> list[list[Question]]:
    """Batches of questions alike in length and kind (kinds differ in the length of their answers).

    They depend on the questions alone, so a run that was interrupted repeats the same batches and the same numbers.
    """
    ordered = sorted(chosen, key=lambda q: (len(q.prompt), q.kind, q.uid))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]
