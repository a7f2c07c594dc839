"""Words to look at: image, teacher's map and the arms' maps, and the answers that went wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.evaluate.answers import read_rows
from pipeline.evaluate.pointing import word_region
from pipeline.report.overlay import enlarge, overlay, png
from pipeline.report.page import uri

if TYPE_CHECKING:
    from pipeline.examples import Example

SHOWN_MISTAKES = 20


@dataclass
class Maps:
    """What an evaluation kept of one arm or the teacher: rows and maps of words, and the answers, by name."""

    name: str
    words: dict[str, dict]
    maps: dict[str, np.ndarray]
    answers: dict[str, dict]

    @classmethod
    def read(cls, name: str, folder: Path) -> Maps:
        """Reads pointing.jsonl, maps.npz and (of an arm) per_sample.jsonl."""
        words = {row["uid"]: row for row in read_rows(folder / "pointing.jsonl")}
        with np.load(folder / "maps.npz", allow_pickle=False) as stored:
            maps = dict(zip(stored["uid"].tolist(), stored["maps"], strict=True))
        answers = {row["uid"]: row for row in read_rows(folder / "per_sample.jsonl")}
        return cls(name, words, maps, answers)


def choose(arms: Sequence[Maps], task: str, count: int, teacher: Maps | None = None) -> list[str]:
    """``count`` words of a task that every arm has a map of, drawn by a hash of their names: not picked by hand.

    Words that the teacher was measured at come first.
    """
    shared = set.intersection(*(set(arm.words) for arm in arms)) if arms else set()
    mine = (uid for uid in shared if arms[0].words[uid]["task"] == task)
    told = set(teacher.words) if teacher else set()
    return sorted(mine, key=lambda uid: (uid not in told, hashlib.sha256(uid.encode()).digest()))[:count]


def cards(
    uids: Sequence[str], teacher: Maps | None, arms: Sequence[Maps], example: Callable[[str, int], Example]
) -> list[dict]:
    """Cards of the gallery; the first arm is the one that changes are measured from, the last the one of interest.

    Args:
        example: (split, index) -> the example.
    """
    from pipeline.examples import decode

    out = []
    for uid in uids:
        row = arms[0].words[uid]
        shown = example(row["split"], row["index"])
        image = decode(shown.image)
        region, _ = word_region(shown.meta["regions"], row["turn"], row["start"], row["end"], image.size[::-1])
        answer = shown.turns[row["turn"]].text
        pictures = [_picture("image", enlarge(image), "", "", f"the image asked about, key {shown.key}")]
        for one in [teacher, *arms]:
            if one is not None and uid in one.maps:
                found = one.words[uid]
                picture = overlay(image, one.maps[uid].astype(np.float32), region)
                mark = "hit" if found["hit"] else "miss"
                said = one.answers.get(uid.rpartition(":")[0])
                inside = f"{100 * found['mass']:.0f}% inside"
                note = inside + (f"; says “{_short(said['answer'], 28)}”" if said else "")
                alt = f"attention of {one.name} for the word {row['word']}: {mark}, {inside} its region"
                pictures.append(_picture(one.name, picture, mark, note, alt))
        last = arms[-1].words[uid]
        out.append(
            {
                "word": row["word"],
                "kind": row["word_kind"],
                "question": shown.turns[row["turn"] - 1].text,
                "before": answer[: row["start"]],
                "after": answer[row["end"] :],
                "pictures": pictures,
                "failure": int(not last["hit"]),
                "gain": round(last["mass"] - row["mass"], 4),
            }
        )
    return sorted(out, key=lambda card: (-card["failure"], card["gain"]))


def _picture(name: str, image, mark: str, note: str, alt: str) -> dict:
    return {
        "name": name,
        "source": uri(png(image, colours=96)),
        "width": image.width,
        "height": image.height,
        "mark": mark,
        "note": note,
        "alt": alt,
    }


def sheet(uids: Sequence[str], teacher: Maps | None, arms: Sequence[Maps], example, count: int = 8) -> bytes:
    """One PNG with the first words of the gallery in rows: image, teacher, arms."""
    from pipeline.examples import decode
    from pipeline.report.plots import Look, draw

    columns = [one for one in (teacher, *arms) if one is not None]
    rows = list(uids[:count])

    def paint(axes, look):
        for place, uid in enumerate(rows):
            row = arms[0].words[uid]
            shown = example(row["split"], row["index"])
            image = decode(shown.image)
            region, _ = word_region(shown.meta["regions"], row["turn"], row["start"], row["end"], image.size[::-1])
            mine = axes[place * (len(columns) + 1) :]
            mine[0].imshow(enlarge(image))
            mine[0].set_ylabel(row["word"], rotation=0, ha="right", va="center")
            for panel, one in zip(mine[1:], columns, strict=False):
                if uid in one.maps:
                    panel.imshow(overlay(image, one.maps[uid].astype(np.float32), region))
            for panel, name in zip(mine, ["image", *(one.name for one in columns)], strict=False):
                if place == 0:
                    panel.set_title(name, fontsize=9)
        for panel in axes:
            panel.set_xticks([])
            panel.set_yticks([])
            panel.grid(visible=False)
            for side in panel.spines.values():
                side.set_visible(False)

    return draw(paint, Look(), max(1, len(rows)), len(columns) + 1, height=1.6)


def mistakes(arms: Mapping[str, Mapping[str, dict]], count: int = SHOWN_MISTAKES) -> list[tuple]:
    """Head and rows of the mistakes table: question, gold, the output of every arm.

    Questions that an earlier arm answers rightly come first: that is what was lost.
    """
    names = list(arms)
    if not names:
        return []
    last, others = arms[names[-1]], [arms[name] for name in names[:-1]]
    wrong = [uid for uid, row in last.items() if not row["correct"]]
    lost = {uid: any(other[uid]["correct"] for other in others if uid in other) for uid in wrong}
    wrong.sort(key=lambda uid: (not lost[uid], hashlib.sha256(uid.encode()).digest()))
    rows = [("question", "kind", "right answer", *names)]
    for uid in wrong[:count]:
        row = last[uid]
        said = [_said(arms[name].get(uid)) for name in names]
        rows.append((row["prompt"], f"{row['task']}: {row['kind']}", row["gold"], *said))
    return rows if len(rows) > 1 else []


def _said(row: Mapping | None) -> str:
    if row is None:
        return "not asked"
    return f"{_short(row['raw'], 80) or 'nothing'} ({row['failure'] or ('right' if row['correct'] else 'wrong')})"


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
