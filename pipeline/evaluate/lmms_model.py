"""A student as lmms-eval sees a model. Imports lmms-eval, so only its own environment can import this.

    python -m lmms_eval --model lavender --model_args model=llama32-11b,weights=DIRECTORY --tasks ai2d

finds it through the entry point `lmms_eval.models`; `pipeline.evaluate.lmms` passes a live object instead.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image

from pipeline.errors import UserError
from pipeline.evaluate.answers import generate, own_decoding, read_rows
from pipeline.evaluate.questions import Question, batches
from pipeline.examples import Example, Turn
from pipeline.student.batch import IGNORED, EncodeError
from pipeline.student.load import Student

HARNESS = "harness"
MOST_TOKENS = 1024  # where a task names no longest answer, as lmms-eval's own models do
PARAGRAPH = "\n\n"  # what lmms-eval adds to `until` where a task names none; its own models ignore it as well


@dataclass(frozen=True)
class _Asked:
    """One request: its name, its text, how long the answer may be, what ends it, and how its images are found."""

    uid: str
    text: str
    tokens: int
    until: tuple[str, ...]
    task: object
    doc: tuple[str, str, int]  # task, split, number


class Lavender(lmms):
    """The base, or a trained arm: greedy answers in batches, the same for every arm whatever a task asks for.

    Args:
        model: a name in `conf/model`.
        weights: a run, a model or an adapter of that model; empty for the base.
        batch_size: questions generated together.
        device: where it runs; empty takes a GPU if there is one.
        student: a loaded student instead of all these.
        kept: a file of finished answers; what is there is not asked again.

    Raises:
        UserError: no such model or weights.
    """

    is_simple = True

    def __init__(
        self,
        model: str = "",
        weights: str = "",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        student: Student | None = None,
        kept: str | Path = "",
    ):
        super().__init__()
        if student is None:
            student = _load(model, weights, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.student, self.batch = student, int(batch_size)
        self.device = next(student.model.parameters()).device
        self.tasks: dict[str, object] = {}
        self.limits: dict[str, dict] = {}
        self.rows: dict[str, dict] = {}
        self.seen: dict[str, dict] = {}  # what is known of a question that is scored by likelihood
        self._kept = Path(kept) if kept else None
        if self._kept:
            self.rows = {row["uid"]: row for row in read_rows(self._kept)}

    def generate_until(self, requests) -> list[str]:
        """One answer for each request; requests of an equal length allowed are decoded together."""
        asked = [self._asked(request) for request in requests]
        for tokens in sorted({one.tokens for one in asked}):
            self._answer([one for one in asked if one.tokens == tokens], tokens)
        return [_cut(self.rows[one.uid]["raw"], one.until) for one in asked]

    def loglikelihood(self, requests) -> list[GenerationResult]:
        """(loss, whether greedy decoding would give it) of each request's continuation.

        The loss is the mean negative log-probability of its tokens, as lmms-eval's own models return it: despite the
        method's name the harness takes the choice with the LOWEST number. In a result object, because 0.7.3 makes text
        of a bare pair and then cannot read it.
        """
        found = []
        for request in requests:
            text, continuation, look, number, task, split = request.args
            self.tasks[task] = look.__self__
            if callable(continuation):
                continuation = continuation(self.task_dict[task][split][number])
            example, images = _example(str(text), str(continuation), self._visuals(look, task, split, number))
            uid = f"{task}/{split}/{number}"
            self.seen[uid] = {"cluster": _cluster(example, uid), "images": images}
            found.append(GenerationResult(self._likelihood(example)))
        return found

    def generate_until_multi_round(self, requests) -> list[list[str]]:
        raise UserError("lmms-eval tasks of several rounds are not supported: every question is asked alone")

    def recorded(self) -> dict:
        """How answers were made and what each task allowed them, to be kept with every answer."""
        own = own_decoding(self.student)
        return {"decoding": "greedy", "num_beams": 1, "limits": dict(sorted(self.limits.items())), **own}

    # ---------------------------------------------------------------------------------------------------------------

    def _asked(self, request) -> _Asked:
        text, wanted, look, number, task, split = request.args
        self.tasks[task] = look.__self__
        until = wanted.get("until") or ()
        until = tuple(mark for mark in ([until] if isinstance(until, str) else until) if mark and mark != PARAGRAPH)
        tokens = int(wanted.get("max_new_tokens") or MOST_TOKENS)
        self.limits[task] = {"max_new_tokens": tokens, "until": list(until)}
        uid = f"{task}/{split}/{number}:{request.idx}"
        return _Asked(uid, str(text), tokens, until, look, (task, split, number))

    def _visuals(self, look, task: str, split: str, number: int) -> list:
        return [visual for visual in (look(self.task_dict[task][split][number]) or []) if visual is not None]

    def _answer(self, asked: Sequence[_Asked], tokens: int) -> None:
        examples = _Examples(self, asked)
        chosen = [
            Question(one.uid, HARNESS, index, one.uid, 1, "", one.text, "", "") for index, one in enumerate(asked)
        ]
        for part in batches(chosen, self.batch):
            if all(question.uid in self.rows for question in part):
                continue
            outputs = generate(self.student, {HARNESS: examples}, part, tokens)
            for question, (raw, ended, problem) in zip(part, outputs, strict=True):
                cluster, images = examples.seen.pop(question.index)
                row = {"uid": question.uid, "raw": raw, "ended": ended, "problem": problem}
                self.rows[question.uid] = row | {"cluster": cluster, "images": images}
            if self._kept:
                # A line that a kill cut short must not swallow the next one: every write begins a line of its own.
                with self._kept.open("a", encoding="utf-8") as out:
                    for question in part:
                        out.write("\n" + json.dumps(self.rows[question.uid], ensure_ascii=False))

    def _likelihood(self, example: Example) -> tuple[float, bool]:
        family = self.student.family
        try:
            item = family.encode_one(example)
        except EncodeError:
            return float("inf"), False
        labels = item.labels.clone()
        learnt = (labels != IGNORED).nonzero().flatten()
        if len(learnt) > 1 and int(labels[learnt[-1]]) in family.special:
            labels[learnt[-1]] = IGNORED  # the end of the turn is no part of the continuation
        batch = family.collate([item], train=False).to(self.device)
        with torch.inference_mode():
            logits_LV = self.student.model(**batch.inputs).logits[0, :-1].float()
        wanted_L = labels[1:].to(self.device)
        scored_L = wanted_L != IGNORED
        logs_NV = logits_LV[scored_L].log_softmax(-1)
        told_N = wanted_L[scored_L]
        loss = -float(logs_NV.gather(1, told_N[:, None]).mean())
        return loss, bool((logs_NV.argmax(-1) == told_N).all())


class _Examples:
    """Examples of requests by number, made when they are read; `seen` says what image each had, and how many."""

    def __init__(self, model: Lavender, asked: Sequence[_Asked]):
        self._model, self._asked = model, asked
        self.seen: dict[int, tuple[str, int]] = {}

    def __getitem__(self, index: int) -> Example:
        one = self._asked[index]
        visuals = self._model._visuals(one.task, *one.doc)
        example, images = _example(one.text, ".", visuals, one.uid)
        self.seen[index] = _cluster(example, one.uid), images
        return example


def _example(text: str, answer: str, visuals: Sequence, key: str = HARNESS) -> tuple[Example, int]:
    """A question about the first image, and how many images it had; what is no image shows none."""
    pictures = [visual for visual in visuals if isinstance(visual, Image.Image)]
    data = None
    if pictures:
        out = io.BytesIO()
        pictures[0].convert("RGB").save(out, "PNG", compress_level=1)
        data = out.getvalue()
    turns = (Turn("user", text.replace("<image>", "").strip()), Turn("assistant", answer.strip()))
    return Example(key, data, "png" if data else "", turns, HARNESS, HARNESS, "", {}), len(visuals)


def _cluster(example: Example, uid: str) -> str:
    return sha256(example.image).hexdigest()[:12] if example.image else uid


def _cut(text: str, until: Sequence[str]) -> str:
    for mark in until:
        text = text.split(mark)[0]
    return text


def _load(model: str, weights: str, device: str) -> Student:
    from pipeline.config import compose
    from pipeline.evaluate import arms

    if not model:
        raise UserError("give --model_args model=NAME[,weights=DIRECTORY], a name in conf/model")
    cfg = compose([f"model={model}"])
    run = arms.Run("given", None, Path(weights).expanduser() if weights else None, Path())
    return arms.load(cfg, run, device)
