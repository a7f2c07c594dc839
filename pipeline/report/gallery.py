"""Words to look at: image, teacher's map and the arms' maps, and the answers that went wrong."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluate.answers import read_rows
from pipeline.evaluate.pointing import word_region
from pipeline.overlay import encoded, enlarge, overlay
from pipeline.report.looks import Looks, likeness

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.examples import Example

SHOWN_MISTAKES = 20
INSIDE, LIKE = "inside its region", "like the teacher"
Find = Callable[[str, int], "Example"]


@dataclass
class Maps:
    """What is known of one arm or the teacher: rows and maps of words, and the answers, by name."""

    name: str
    words: dict[str, dict] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)
    answers: dict[str, dict] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, folder: Path) -> Maps:
        """Reads pointing.jsonl, maps.npz and per_sample.jsonl, as far as they are there.

        The teacher has no answers; what a harness asked has no maps.
        """
        words = {row["uid"]: row for row in read_rows(folder / "pointing.jsonl")}
        maps: dict[str, np.ndarray] = {}
        if (folder / "maps.npz").is_file():
            with np.load(folder / "maps.npz", allow_pickle=False) as stored:
                maps = dict(zip(stored["uid"].tolist(), stored["maps"], strict=True))
        answers = {row["uid"]: row for row in read_rows(folder / "per_sample.jsonl")}
        return cls(name, words, maps, answers)


@dataclass(frozen=True)
class Shown:
    """A word of the gallery: its row (as in pointing.jsonl), its example and, where it is known, its region."""

    row: dict
    example: Example
    image: Image.Image
    region: np.ndarray | None

    @property
    def uid(self) -> str:
        return self.row["uid"]


def draw_by_name(names: Iterable[str], count: int, first: Iterable[str] = ()) -> list[str]:
    """``count`` of the names, drawn by a hash of them: not picked by hand. Those of ``first`` come before others."""
    told = set(first)
    return sorted(names, key=lambda name: (name not in told, hashlib.sha256(name.encode()).digest()))[:count]


def choose(arms: Sequence[Maps], task: str, count: int, teacher: Maps | None = None) -> list[str]:
    """``count`` words of a task that every arm has a map of; words that the teacher was measured at come first."""
    shared = set.intersection(*(set(arm.words) for arm in arms)) if arms else set()
    mine = [uid for uid in shared if arms[0].words[uid]["task"] == task]
    return draw_by_name(mine, count, teacher.words if teacher else ())


def measured(uids: Sequence[str], arms: Sequence[Maps], find: Find) -> list[Shown]:
    """The words of an evaluation that measured where they look."""
    from pipeline.examples import decode

    found = []
    for uid in uids:
        row = arms[0].words[uid]
        one = find(row["split"], row["index"])
        image = decode(one.image)
        region, _ = word_region(one.meta["regions"], row["turn"], row["start"], row["end"], image.size[::-1])
        found.append(Shown(row, one, image, region))
    return found


def look(
    questions: Sequence,
    find: Find,
    teacher: Maps | None,
    arms: Sequence[Maps],
    read: Mapping[str, Callable[[Example], Looks]],
) -> list[Shown]:
    """One word from each question's gold answer, for data whose regions nobody knows: reads the maps now.

    Fills the maps of ``teacher`` and ``arms`` (at their names in ``read``). Of the words that all have a map of, the
    longest is taken, the likeliest to name something. What an arm cannot take is left out.
    """
    from pipeline.evaluate.questions import alone
    from pipeline.examples import ImageError, decode
    from pipeline.student.batch import EncodeError

    found = []
    for question in questions:
        one = alone(find(question.split, question.index), question.turn)
        try:
            image = decode(one.image)
            looks = {name: reader(one) for name, reader in read.items()}
        except (EncodeError, ImageError):
            continue
        words = [w for w in one.words(("assistant",)) if all(w in have for have in looks.values())]
        if not words:
            continue
        word = max(words, key=lambda w: (w.end - w.start, -w.start))
        row = {
            "uid": f"{question.uid}:{word.start}",
            "turn": word.turn,
            "start": word.start,
            "end": word.end,
            "word": one.word_text(word),
            "word_kind": question.kind,
        }
        for kept in (teacher, *arms):
            if kept is not None:
                kept.maps[row["uid"]] = looks[kept.name][word]
        found.append(Shown(row, one, image, None))
    return found


def cards(shown: Sequence[Shown], teacher: Maps | None, arms: Sequence[Maps]) -> list[dict]:
    """Cards of the gallery: misses of the last arm first, then by the score of its answer and by the change from the
    first arm to it.

    A card's ``scores`` are, by arm, the share of the map inside the word's region; without a known region the
    correlation with the teacher's map; without either there are none.
    """
    out = []
    for one in shown:
        text = one.example.turns[one.row["turn"]].text
        about = f"the image of example {one.example.key}"
        pictures = [_picture("image", enlarge(one.image), alt=about)]
        scores: dict[str, float] = {}
        misses: dict[str, bool] = {}
        grades: dict[str, float] = {}
        for who in [teacher, *arms]:
            if who is None or one.uid not in who.maps:
                continue
            picture = overlay(one.image, who.maps[one.uid], one.region)
            said = who.answers.get(one.uid.rpartition(":")[0])
            mark, note = "", ""
            if one.region is not None:
                found = who.words[one.uid]
                mark, note = ("hit" if found["hit"] else "miss"), f"{100 * found['mass']:.0f}% inside"
                score = found["mass"]
            elif teacher is not None and who is not teacher and one.uid in teacher.maps:
                score = likeness(who.maps[one.uid], teacher.maps[one.uid])
                note = f"r = {score:.2f}"
            else:
                score = None
            if who is not teacher:
                if score is not None:
                    scores[who.name] = round(score, 4)
                misses[who.name] = mark == "miss" if mark else bool(said) and said["correct"] is False
                grades[who.name] = graded(said) if said else 0.0
            alt = f"attention of {who.name} for the word {one.row['word']}" + (f": {mark}, {note}" if mark else "")
            words = _short(said["answer"] or said["raw"], 28) if said else ""
            answer = (f"says “{words}”" if words else "says nothing") if said else ""
            pictures.append(_picture(who.name, picture, mark, note, answer, alt))
        first, last = arms[0].name, arms[-1].name
        out.append(
            {
                "word": one.row["word"],
                "kind": one.row["word_kind"],
                "question": one.example.turns[one.row["turn"] - 1].text,
                "before": text[: one.row["start"]],
                "after": text[one.row["end"] :],
                "pictures": pictures,
                "scores": scores,
                "misses": misses,
                "grades": grades,
                "measure": INSIDE if one.region is not None else LIKE,
                "change": round(scores.get(last, 0) - scores.get(first, 0), 4),
            }
        )
    to = arms[-1].name
    return sorted(out, key=lambda card: (-card["misses"].get(to, False), card["grades"].get(to, 0.0), card["change"]))


def graded(row: Mapping) -> float:
    """The score of an answer; rows of right and wrong may have none, rows scored only together count as 0."""
    return float(row.get("score", row["correct"]) or 0)


def _picture(name: str, image, mark: str = "", note: str = "", answer: str = "", alt: str = "") -> dict:
    return {
        "name": name,
        "source": uri(encoded(image, colours=128)),
        "width": image.width,
        "height": image.height,
        "mark": mark,
        "note": note,
        "answer": answer,
        "alt": alt,
    }


def uri(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def sheet(shown: Sequence[Shown], teacher: Maps | None, arms: Sequence[Maps], count: int = 8) -> bytes:
    """One PNG with the first words of the gallery in rows: image, teacher, arms."""
    from pipeline.report import plots

    columns = [one for one in (teacher, *arms) if one is not None]
    rows = [
        (
            one.row["word"],
            [
                enlarge(one.image),
                *(
                    overlay(one.image, who.maps[one.uid], one.region) if one.uid in who.maps else None
                    for who in columns
                ),
            ],
        )
        for one in shown[:count]
    ]
    return plots.png(plots.sheet(["image", *(one.name for one in columns)], rows), "middle")


def mistakes(
    arms: Mapping[str, Mapping[str, dict]], picture: Callable[[str], Image.Image | None], count: int = SHOWN_MISTAKES
) -> dict | None:
    """The wrong answers of the last arm beside what the others said, the lowest scores first; None if there is none.

    Among equals, questions that an earlier arm answers rightly come first: that is what was lost. What counts as wrong
    is for the scorer to say; where a scorer only grades, the answers with the lowest grades are shown.

    Args:
        picture: uid -> the image that the question is about, or None.
    """
    names = list(arms)
    if not names:
        return None
    last, others = arms[names[-1]], [arms[name] for name in names[:-1]]
    # What a harness scores only as a whole (its rows have no score of their own) is neither right nor wrong.
    last = {uid: row for uid, row in last.items() if row.get("score", 0) is not None}
    wrong = [uid for uid, row in last.items() if row["correct"] is False]
    lost = {uid for uid in wrong if any(other[uid]["correct"] for other in others if uid in other)}
    low = wrong or [uid for uid, row in last.items() if row["correct"] is None]
    rows = []
    for uid in sorted(draw_by_name(low, len(low), lost), key=lambda uid: graded(last[uid]))[:count]:
        row, image = last[uid], picture(uid)
        rows.append(
            {
                "picture": _picture("image", enlarge(image, 96), alt=f"the image of {uid}") if image else None,
                "question": row["prompt"],
                "kind": f"{row['task']}: {row['kind']}",
                "gold": row["gold"],
                "said": [_said(arms[name].get(uid)) for name in names],
            }
        )
    return {"arms": names, "wrong": len(wrong), "asked": len(last), "lost": len(lost), "rows": rows} if rows else None


def _said(row: Mapping | None) -> dict:
    if row is None:
        return {"text": "", "verdict": "not asked"}
    verdict = {True: "right", False: "wrong", None: "graded"}[row["correct"]]
    grade = graded(row)
    told = "" if grade in (0.0, 1.0) and row["correct"] is not None else f", {grade:.2f}"
    return {"text": _short(row["raw"], 80) or "nothing", "verdict": row["failure"] or verdict + told}


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
