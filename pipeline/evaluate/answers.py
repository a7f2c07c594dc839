"""Answers of a student: batched greedy generation with a key-value cache, scored and kept question by question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.evaluate.questions import BLIND, Question, batches
from pipeline.evaluate.scoring import Score, Scorer
from pipeline.evaluate.shares import Share

if TYPE_CHECKING:
    from pipeline.archive import Archive
    from pipeline.examples import Example
    from pipeline.student.load import Student

ALL = Share()


def answer(
    student: Student,
    archives: Mapping[str, Archive],
    tasks: Mapping[str, Sequence[Question]],
    settings: Mapping,
    partial: Path,
    batch: int,
    max_new_tokens: int,
    advance: Callable[[int], object] = lambda count: None,
    scorers: Mapping[str, str] | None = None,
    share: Share = ALL,
    earlier: Sequence[Path] = (),
) -> list[dict]:
    """Asks every question of every task and returns one row for each, in the tasks' order.

    Rows are appended to ``partial`` batch by batch; what is there already is not asked again. Batches are the same
    however often a run is interrupted, so their numbers are too.

    Args:
        archives: by split. tasks: name -> questions. settings: recorded in every row, with `own_decoding`.
        partial: file of finished rows; the caller names it after everything that decides them.
        advance: called with the number of questions finished.
        scorers: task -> the rule for all of its questions; a task without one has each scored by its kind.
        share: the batches to ask; rows of other batches are returned where they are there already.
        earlier: files of rows that other shares, or an earlier run, finished.
    """
    rules = {
        name: Scorer((scorers or {}).get(name.removesuffix(BLIND), ""), (q.answers for q in found))
        for name, found in tasks.items()
    }
    done = {row["uid"]: row for path in (*earlier, partial) for row in read_rows(path)}
    task_of = {q.uid: name for name, found in tasks.items() for q in found}
    everything = [q for found in tasks.values() for q in found]
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as out:
        if out.tell() and not partial.read_bytes().endswith(b"\n"):
            out.write("\n")  # a line that a kill cut short must not swallow the next one
        for number, part in enumerate(batches(everything, batch)):
            if not share.mine(number):
                continue
            if not all(q.uid in done for q in part):
                outputs = generate(student, archives, part, max_new_tokens)
                settings = {**settings, **own_decoding(student)}
                for question, (raw, ended, problem) in zip(part, outputs, strict=True):
                    task = task_of[question.uid]
                    found = rules[task](question.kind, raw, question.answers, ended)
                    if problem:
                        found = Score("", False, found.scorer, problem)
                    row = _row(task, question, raw, found, settings)
                    done[question.uid] = row
                    out.write(json.dumps(row, ensure_ascii=False) + "\n")
                out.flush()
            advance(len(part))
    return [done[q.uid] for q in everything if q.uid in done]


def _row(task: str, question: Question, raw: str, found: Score, settings: Mapping) -> dict:
    return {
        "uid": question.uid,
        "task": task,
        "key": question.key,
        "kind": question.kind,
        "group": question.group or question.kind,
        "cluster": question.cluster,
        "prompt": question.prompt,
        "gold": question.gold,
        "raw": raw,
        "answer": found.answer,
        "correct": found.correct,
        "score": round(found.value, 6),
        "failure": found.failure,
        "scorer": found.scorer,
        "judge": "none",
        "settings": dict(settings),
    }


def generate(
    student: Student, archives: Mapping[str, Archive], part: Sequence[Question], max_new_tokens: int
) -> list[tuple[str, bool, str]]:
    """(output, whether it ended by itself, problem) for each question, decoded greedily together.

    A question that the student cannot take gets an empty output and the reason as its problem.
    """
    from pipeline.student.batch import EncodeError

    examples = [_seen(archives[q.split][q.index], q.blind) for q in part]
    turns = [q.turn - 1 for q in part]
    problems = [""] * len(part)
    try:
        inputs = student.family.prompt(examples, turns)
    except EncodeError:
        for place, (example, turn) in enumerate(zip(examples, turns, strict=True)):
            try:
                student.family.prompt([example], [turn])
            except EncodeError as error:
                problems[place] = str(error)
        kept = [place for place, problem in enumerate(problems) if not problem]
        if not kept:
            return [("", True, problem) for problem in problems]
        inputs = student.family.prompt([examples[i] for i in kept], [turns[i] for i in kept])
    texts = iter(_decode(student, inputs, stop_ids(student, examples, part), max_new_tokens))
    return [("", True, problem) if problem else (*next(texts), "") for problem in problems]


def _seen(example: Example, blind: bool) -> Example:
    return replace(example, image=None, ext="") if blind else example


def _decode(student: Student, inputs: Mapping, stops: Sequence[int], max_new_tokens: int) -> list[tuple[str, bool]]:
    import torch
    from transformers import GenerationConfig

    device = next(student.model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items()}
    # Spelt out, because what is left open comes from the model's own directory and differs between arms.
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=list(stops),
        pad_token_id=student.family.pad_id,
    )
    with torch.inference_mode():
        out_BL = student.model.generate(**inputs, generation_config=greedy)
    found = []
    for ids in out_BL[:, inputs["input_ids"].shape[1] :].tolist():
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        text = student.family.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()
        found.append((text, end is not None))
    return found


def own_decoding(student: Student) -> dict:
    """What of the decoding comes from the student's own directory, to be recorded: an arm that stops at other tokens or
    has another chat template was not asked the same."""
    template = student.processor.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    text = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return {"stops": _stated_stops(student), "chat_template": hashlib.sha256(text.encode()).hexdigest()[:12]}


def _stated_stops(student: Student) -> list[int]:
    stated = getattr(student.model.generation_config, "eos_token_id", None)
    stops = {*(stated if isinstance(stated, (list, tuple)) else [stated]), student.family.tokenizer.eos_token_id}
    return sorted(stop for stop in stops if stop is not None)


def stop_ids(student: Student, examples: Sequence, part: Sequence[Question]) -> list[int]:
    """Tokens that end an answer: those of the model's generation settings and the one that closes a turn in its chat.

    The latter is read off an encoded example, where it is the last token that is learnt.
    """
    from pipeline.evaluate.questions import alone
    from pipeline.student.batch import IGNORED, EncodeError

    stops = set(_stated_stops(student))
    for example, question in zip(examples, part, strict=True):
        try:
            labels = student.family.encode_one(alone(example, question.turn)).labels
        except EncodeError:
            continue
        learnt = labels[labels != IGNORED].tolist()
        stops |= {learnt[-1]} & student.family.special
        break
    return sorted(stops)


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file; lines that are not whole (a killed writer) are left out, no file is no rows."""
    if not path.exists():
        return []
    rows = []
    # Not splitlines(): an answer may hold U+0085 or U+2028, which JSON leaves as they are.
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def write_rows(path: Path, rows: Iterable[Mapping]) -> None:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
