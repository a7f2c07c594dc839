"""VLMEvalKit's outputs, compared as we compare.

VLMEvalKit runs by itself, with `vlmevalkit_model.py` dropped in, and writes a folder for every model. Here each becomes
an arm: `<outputs>/<model>/[T<day>_G<commit>/]<model>_<task>*.xlsx` with its scores. The model `sft-1` is the arm `sft`,
seed 1. What a harness run decoded with must be known, so `<outputs>/<model>/decoding.json` is required.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.evaluate import harness, status
from pipeline.evaluate.arms import rank
from pipeline.evaluate.compare import BASE
from pipeline.evaluate.harness import Total
from pipeline.evaluate.status import Job

if TYPE_CHECKING:
    from pipeline.config import Config

DECODING = "decoding.json"
SCORES = ("hit", "eval_score", "score", "match")  # a sample's score, by the kinds of VLMEvalKit's benchmarks
TABLES = (".xlsx", ".tsv", ".csv")
_FIELD_LIMIT = 256 << 20


def find(cfg: Config) -> list[Job]:
    """The arms whose outputs are there: those that the settings name, else all; the base first.

    Raises:
        UserError: no folder of outputs, none of an arm that the settings name, or of none at all.
    """
    found = [_job(path.name) for path in sorted(outputs(cfg).iterdir()) if (path / DECODING).is_file()]
    wanted = {BASE, *cfg.eval.arms}
    found = [job for job in found if not cfg.eval.arms or job.arm in wanted]
    missing = [arm for arm in cfg.eval.arms if arm not in {job.arm for job in found}]
    if missing or not found:
        which = f" of '{missing[0]}'" if missing else ""
        raise UserError(
            f"{outputs(cfg)} has no outputs{which} with a {DECODING}: run VLMEvalKit with vlmevalkit_model.py first"
        )
    return sorted(found, key=lambda job: (job.arm != BASE, rank(job.arm), job.seed or 0))


def outputs(cfg: Config) -> Path:
    """VLMEvalKit's folder of outputs.

    Raises:
        UserError: it is not given or not there.
    """
    if not cfg.eval.harness_path:
        raise UserError("eval.suite=vlmevalkit needs eval.harness_path=OUTPUTS, the folder that VLMEvalKit wrote")
    path = Path(cfg.eval.harness_path).expanduser()
    if not path.is_dir():
        raise UserError(f"eval.harness_path={path}: there is no such folder")
    return path


def inputs(cfg: Config, job: Job) -> dict[str, str]:
    """Digests of the files that an arm's results are read from."""
    model = outputs(cfg) / job.name
    files = {DECODING: model / DECODING}
    for task in status.tasks(cfg):
        for path in _tables(model, task):
            files[path.name] = path
    return {name: harness.file_digest(path) for name, path in sorted(files.items())}


def convert(cfg: Config, job: Job, folder: Path) -> tuple[list[Path], dict]:
    """Writes an arm's per_sample.jsonl and totals.json; returns their paths and counts.

    Raises:
        UserError: outputs that are missing, unreadable or without a score.
    """
    from pipeline.evaluate.answers import write_rows

    model = outputs(cfg) / job.name
    try:
        decoding = json.loads((model / DECODING).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{model / DECODING}: is not JSON: {error}") from error
    recorded = {**status.decoding(cfg), **decoding}
    rows, totals = [], {}
    for task in status.tasks(cfg):
        mine, totals[task] = read(model, task, cfg.eval.scorers.get(task, ""))
        rows += [{**row, "settings": recorded} for row in mine]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "per_sample.jsonl", rows)
    return [folder / "per_sample.jsonl", harness.save(folder, totals)], {"questions": len(rows)}


def read(model: Path, task: str, scorer: str = "") -> tuple[list[dict], Total]:
    """Our rows of one benchmark of one model, and VLMEvalKit's own number for it.

    Args:
        model: `<outputs>/<model>`. task: VLMEvalKit's name of the benchmark.
        scorer: a rule of `eval.scorers` for benchmarks of which VLMEvalKit keeps no score of a sample; without one
            they keep their total alone.

    Raises:
        UserError: no outputs of that benchmark, or a file of another form.
    """
    tables = _tables(model, task)
    if not tables:
        raise UserError(f"{model}: has no outputs of '{task}' ({model.name}_{task}.xlsx): run VLMEvalKit on it first")
    judged = [(path, rows) for path in tables if (rows := list(_rows(path))) and _score_column(rows)]
    path, rows = judged[-1] if judged else (tables[0], list(_rows(tables[0])))
    if {_text(row.get("split")) for row in rows} == {"dev", "validation"}:  # MMMU: the number is that of validation
        rows = [row for row in rows if row["split"] == "validation"]
    missing = {"index", "prediction"} - (rows[0].keys() if rows else set())
    if missing:
        raise UserError(f"{path}: lacks the column {sorted(missing)[0]}: is it a file of VLMEvalKit?")
    column = _score_column(rows) if not scorer else None
    suffix = path.stem.removeprefix(f"{model.name}_{task}").strip("_")
    scored = _by_rule(rows, scorer) if scorer else [_as_score(row.get(column)) if column else None for row in rows]
    label = f"vlmevalkit/{suffix or 'predictions'}/{column}" if column else scorer or "vlmevalkit total"
    judge = re.sub(r"_?(result|auxmatch|results|score)$", "", suffix) or "none"
    found = [_row(task, row, score, label, judge) for row, score in zip(rows, scored, strict=True)]
    return found, _total(model, task, scored)


def _row(task: str, row: Mapping, score: float | None, label: str, judge: str) -> dict:
    raw = _text(row.get("prediction"))
    understood = _text(row.get("extracted"))
    failure = "" if raw.strip() else "empty"
    if understood in ("Unknown", "Z"):
        failure, understood = failure or "not understood", ""
    return {
        "uid": f"{task}/{_text(row['index'])}",
        "task": task,
        "key": _text(row["index"]),
        "kind": "harness",
        "group": _text(row.get("category") or row.get("split") or task),
        # VLMEvalKit keeps no images in its outputs; questions of one image share its name or path.
        "cluster": f"{task}/{_text(row.get('image_path') or row.get('img_id') or row.get('index'))}",
        "prompt": _text(row.get("question")),
        "gold": _text(row.get("answer")),
        "raw": raw,
        "answer": understood or raw,
        "correct": harness.right(score),
        "score": None if score is None else round(score, 6),
        "failure": failure,
        "scorer": label,
        "judge": judge,
    }


def _by_rule(rows: Sequence[Mapping], name: str) -> list[float]:
    from pipeline.evaluate.scoring import Scorer

    golds = [_golds(row.get("answer")) for row in rows]
    rule = Scorer(name, golds)
    return [rule("", _text(row["prediction"]), gold, True).value for row, gold in zip(rows, golds, strict=True)]


def _golds(value: object) -> tuple[str, ...]:
    """The gold answers of a cell, which may hold a list written as Python writes it."""
    text = _text(value)
    if text.startswith("["):
        try:
            found = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return (text,)
        if isinstance(found, list) and found:
            return tuple(map(str, found))
    return (text,)


def _score_column(rows: Sequence[Mapping]) -> str | None:
    return next((name for name in SCORES if rows and all(_as_score(row.get(name)) is not None for row in rows)), None)


def _as_score(value: object) -> float | None:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, str):
        named = {"true": 1.0, "false": 0.0}.get(value.strip().lower())
        if named is not None:
            return named
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return number if 0 <= number <= 1 else None


def _total(model: Path, task: str, scored: Sequence[float | None]) -> Total:
    """The number that VLMEvalKit reports: that of the file with the totals, in its own unit."""
    metrics = _metrics(model, task)
    known = [score for score in scored if score is not None]
    name, value = primary(metrics)
    if not name and known:
        name, value = "mean score", sum(known) / len(known)
    return Total(name, value, len(scored), metrics, harness.is_mean(value, known))


def primary(metrics: Mapping[str, float]) -> tuple[str, float]:
    """The number of a benchmark as VLMEvalKit's own overview takes it."""
    if {"perception", "reasoning"} <= metrics.keys():  # MME
        return "perception + reasoning", metrics["perception"] + metrics["reasoning"]
    if {"aAcc", "fAcc", "qAcc"} <= metrics.keys():  # HallusionBench
        return "mean of aAcc, fAcc, qAcc", (metrics["aAcc"] + metrics["fAcc"] + metrics["qAcc"]) / 3
    for name in ("Final Score", "Overall", "acc"):
        if name in metrics:
            return name, metrics[name]
    return "", 0.0


def _metrics(model: Path, task: str) -> dict[str, float]:
    """Every number of the file of totals; of several lines the one of the whole (or of `validation`, as for MMMU)."""
    found = [path for end in ("_acc.csv", "_score.csv", "_score.json") for path in _named(model, task, end)]
    if not found:
        return {}
    path = found[-1]
    if path.suffix == ".json":
        told = json.loads(path.read_text(encoding="utf-8"))
    else:
        lines = list(_rows(path))
        order = {"Overall": 0, "overall": 0, "validation": 1, "none": 2, "test": 3}
        lines.sort(key=lambda line: order.get(_text(line.get("split")), 4))
        told = lines[0] if lines else {}
        if set(told) == {"Metric", "Value"}:
            told = {_text(line["Metric"]): line["Value"] for line in lines}
    numbers = {}
    for name, value in told.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError):
            continue
    return numbers


def _tables(model: Path, task: str) -> list[Path]:
    """The predictions and what was made of them, the newest run of VLMEvalKit; judged ones after plain ones."""
    return [
        path
        for path in _named(model, task, "")
        if path.suffix in TABLES and not path.stem.endswith(("_acc", "_score", "_rating"))
    ]


def _named(model: Path, task: str, end: str) -> list[Path]:
    """Files of a benchmark in a model's folder or, before that, in its newest run's; not those of a longer name."""
    runs = sorted((path for path in model.glob("T*_G*") if path.is_dir()), reverse=True)
    for place in (*runs, model):
        start = f"{model.name}_{task}"
        found = [path for path in place.glob(f"{start}*{end}") if path.is_file()]
        found = [path for path in found if re.fullmatch(r"(_[a-z].*)?", path.stem.removeprefix(start))]
        if found:
            return sorted(found, key=lambda path: (len(path.stem), path.name))
    return []


def _rows(path: Path) -> Iterator[dict]:
    """The lines of a table, by column.

    Raises:
        UserError: not a table, or openpyxl is missing.
    """
    if path.suffix == ".xlsx":
        yield from _excel(path)
        return
    csv.field_size_limit(_FIELD_LIMIT)
    with path.open(encoding="utf-8", newline="") as handle:
        yield from csv.DictReader(handle, delimiter="\t" if path.suffix == ".tsv" else ",")


def _excel(path: Path) -> Iterator[dict]:
    from zipfile import BadZipFile

    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise UserError(f"{path}: needs the package openpyxl: pip install openpyxl") from error
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"{path}: is not an Excel file: {error}") from error
    lines = book.active.iter_rows(values_only=True)
    heads = [str(head) for head in next(lines, ())]
    for line in lines:
        yield dict(zip(heads, line, strict=False))
    book.close()


def _text(value: object) -> str:
    """A cell as text; whole numbers, which Excel keeps as floats, without a point."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _job(name: str) -> Job:
    match = re.fullmatch(r"(.+)-(\d+)", name)
    return Job(match[1], int(match[2])) if match else Job(name, None)
