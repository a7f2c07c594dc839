"""lmms-eval asks our arms: its tasks, prompts and scores; our weights, greedy decoding and comparison.

lmms-eval lives in an environment of its own (`make .venv-lmms/.ready`), so a job runs in a process of that Python:

    python -m pipeline.evaluate.lmms REQUEST.json

Nothing here imports lmms-eval before that.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError
from pipeline.evaluate import harness, status
from pipeline.evaluate.status import Job

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.evaluate.harness import Total

LOG = "lmms.log"
ROWS = "per_sample.jsonl"
POLL_SECONDS = 0.5
USER_ERROR = 2


def manifest():
    """What the entry point `lmms_eval.models` gives: `--model lavender` of lmms-eval's own command."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("lavender", simple_class_path="pipeline.evaluate.lmms_model.Lavender")


def interpreter(cfg: Config) -> Path:
    """The Python that has lmms-eval.

    Raises:
        UserError: it is not there.
    """
    path = Path(cfg.eval.harness_python).expanduser().absolute()
    if not path.is_file():
        raise UserError(
            f"{path}: there is no Python with lmms-eval: run make .venv-lmms/.ready, or name one in eval.harness_python"
        )
    return path


def evaluate(
    cfg: Config, job: Job, folder: Path, kept: Path, device: str, advance: Callable[[int], object]
) -> tuple[list[Path], dict]:
    """Has one arm asked; returns its files (per_sample.jsonl, totals.json) and counts.

    Args:
        kept: finished answers, which a killed run goes on from. advance: called with the number of new answers.

    Raises:
        UserError: lmms-eval is missing or refuses; the message has its last line.
    """
    import torch
    from omegaconf import OmegaConf

    request = folder / "request.json"
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "settings": OmegaConf.to_container(OmegaConf.structured(cfg)),
        "arm": job.arm,
        "seed": job.seed,
        "folder": str(folder.absolute()),
        "kept": str(kept.absolute()),
        "device": device,
        "threads": torch.get_num_threads(),
    }
    request.write_text(json.dumps(told))
    seen = _lines(kept)
    with (folder / LOG).open("w") as log:
        command = [str(interpreter(cfg)), "-m", "pipeline.evaluate.lmms", str(request.absolute())]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                now = _lines(kept)
                advance(now - seen)
                seen = now
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise UserError(f"lmms-eval stopped for {job.name}: {_reason(folder / LOG)} (all of it in {folder / LOG})")
    request.unlink()
    rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").split("\n") if line]
    several = sum(row["images"] > 1 for row in rows)
    if several:
        print(f"eval: {several} questions of {job.name} have several images, of which the first was shown", flush=True)
    return [folder / ROWS, folder / harness.TOTALS], {"questions": len(rows), "several_images": several}


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _reason(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error: |[\w.]*(Error|Exception|Interrupt)\b", line)]
    # What the last error says, not the progress bars that come after it.
    return ([*lines[-1:], *errors[-1:]] or ["it said nothing"])[-1].removeprefix("error: ")


# --- in the environment of lmms-eval --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Runs one job; a mistake of the user's becomes one line and exit code 2."""
    (path,) = sys.argv[1:] if argv is None else argv
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    try:
        _run(json.loads(Path(path).read_text()))
    except UserError as error:
        print(f"error: {error}", flush=True)
        return USER_ERROR
    return 0


def _run(told: Mapping) -> None:
    import torch
    from lmms_eval.evaluator import simple_evaluate
    from omegaconf import OmegaConf

    from pipeline.config import Config
    from pipeline.evaluate import arms
    from pipeline.evaluate.answers import write_rows
    from pipeline.evaluate.lmms_model import Lavender

    torch.set_num_threads(told["threads"])
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), told["settings"]))
    folder = Path(told["folder"])
    tasks = harness.named(cfg.eval)
    manager = _tasks(cfg.eval.harness_path, tasks)
    student = arms.load(cfg, status.run_of(cfg, Job(told["arm"], told["seed"])), told["device"])
    model = Lavender(student=student, batch_size=cfg.eval.batch, kept=told["kept"])
    results = simple_evaluate(
        model=model,
        tasks=tasks,
        limit=cfg.eval.limit or None,
        task_manager=manager,
        batch_size=cfg.eval.batch,
        bootstrap_iters=0,
        log_samples=True,
        cli_args=argparse.Namespace(output_path=str(folder / "submissions"), process_with_media=True),
        process_docs_parallel=1,
    )
    rows, totals = read(results, model, status.decoding(cfg), tasks)
    write_rows(folder / ROWS, rows)
    harness.save(folder, totals)


def _tasks(path: str, tasks: list[str]):
    """lmms-eval's list of tasks: those of the folder alone where they are enough, which spares reading 3,000 files.

    Raises:
        UserError: a task that is in neither.
    """
    from lmms_eval.tasks import TaskManager

    own = str(Path(path).expanduser()) if path else None
    if own:
        manager = TaskManager("WARNING", include_path=own, include_defaults=False, model_name="lavender")
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager("WARNING", include_path=own, model_name="lavender")
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 3)
            hint = f": did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"lmms-eval has no task '{task}'{hint}")
    return manager


def read(results: Mapping, model, decoding: Mapping, tasks: list[str]) -> tuple[list[dict], dict[str, Total]]:
    """Our rows and the totals of lmms-eval's results.

    Args:
        results: what `simple_evaluate` returned. model: the object that it asked. decoding: recorded in every row.
        tasks: as they were asked for; those of a group are joined under its name.
    """
    recorded = {**decoding, **model.recorded()}
    rows, totals = [], {}
    for task in tasks:
        mine = []
        for leaf in _leaves(results, task):
            found, total = _leaf(results, model, leaf)
            mine += [{**row, "task": task, "group": leaf, "settings": recorded} for row in found]
            totals.setdefault(task, total)
        if task in results["results"] and task not in results["samples"]:
            totals[task] = _total(results["results"][task], len(mine), totals.get(task))
        rows += mine
    return rows, totals


def _leaves(results: Mapping, task: str) -> list[str]:
    if task in results["samples"]:
        return [task]
    return [leaf for part in results["group_subtasks"].get(task, ()) for leaf in _leaves(results, part)]


def _leaf(results: Mapping, model, task: str) -> tuple[list[dict], Total]:
    measured, kind = results["results"][task], model.tasks[task]
    every, count = results["samples"][task], results["n-samples"][task]["effective"]
    samples = every[:count]  # a task with several filters repeats its samples for each
    numbers = _numbers(measured)
    metric, scores = _scores(samples, numbers, kind)
    label = f"lmms_eval-{results.get('lmms_eval_version', '')}/{metric or 'total'}/{results['versions'].get(task)}"
    told = results["configs"][task].get("metadata") or {}
    told = told[0] if isinstance(told, list) else told
    rows = []
    for place, sample in enumerate(samples):
        kept = _kept(model, task, sample)
        score = None if scores is None else scores[place]
        rows.append(
            {
                "uid": f"{task}/{sample['doc_id']}",
                "key": str(sample["doc_id"]),
                "kind": "harness",
                "cluster": kept.get("cluster", f"{task}/{sample['doc_id']}"),
                "prompt": str(sample["arguments"][0]) if sample["arguments"] else "",
                "gold": sample["target"] if isinstance(sample["target"], str) else json.dumps(sample["target"]),
                "raw": kept.get("raw", ""),
                "answer": _answer(sample),
                "correct": harness.right(score),
                "score": None if score is None else round(float(score), 6),
                "failure": kept.get("problem", "") or ("" if kept.get("raw", "-").strip() else "empty"),
                "images": kept.get("images", 1),
                "scorer": label,
                "judge": str(told.get("gpt_eval_model_name", "none")),
            }
        )
    name = metric or next(iter(numbers), "")
    value = numbers.get(name, 0.0)
    mean = scores is not None and harness.is_mean(value, scores)
    clusters = [row["cluster"] for row in rows]
    halves = _halves(samples, clusters, numbers, kind)
    return rows, harness.Total(name, value, len(rows), numbers, mean, halves, len(set(clusters)))


def _total(measured: Mapping, n: int, first: Total | None) -> Total:
    """The total of a group: by the metric of its parts, if it has that."""
    numbers = _numbers(measured)
    name = first.metric if first and first.metric in numbers else next(iter(numbers), "")
    return harness.Total(name, numbers.get(name, 0.0), n, numbers)


def _numbers(measured: Mapping) -> dict[str, float]:
    """Metric -> number; the first filter of each metric counts, errors and names are left out."""
    found: dict[str, float] = {}
    for key, value in measured.items():
        name = key.partition(",")[0]
        if isinstance(value, (int, float)) and "stderr" not in name and name not in ("alias", "samples"):
            found.setdefault(name, float(value))
    return found


def _scores(samples: list, numbers: Mapping[str, float], task) -> tuple[str, list[float] | None]:
    """The metric that is reported, and each sample's part of it where the number is the mean of such parts.

    A sample's part is a number, the "score" of a record, or what the task's own aggregation makes of that sample alone.
    The first metric whose parts have the reported mean is taken; without any, the first that has parts at all.
    """
    fallback: tuple[str, list[float] | None] = ("", None)
    for metric, total in numbers.items():
        parts = [_part(sample.get(metric), task, metric) for sample in samples]
        if not parts or any(part is None for part in parts):
            continue
        if harness.is_mean(total, parts):
            return metric, parts
        if fallback[1] is None and all(0 <= part <= 1 for part in parts):
            fallback = metric, parts
    return fallback


def _part(value, task, metric: str) -> float | None:
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, Mapping) and isinstance(value.get("score"), (bool, int, float)):
        return float(value["score"])
    combine = task.aggregation().get(metric)
    return None if value is None or combine is None else _combined(combine, [value])


def _halves(samples: list, clusters: list[str], numbers: Mapping[str, float], task) -> dict[str, list[float]]:
    """Each metric on random halves of the images, by the task's own aggregation, where that gives its total as well."""
    chosen = [places.tolist() for places in harness.halves(clusters)] if samples else []
    found = {}
    for metric, total in numbers.items():
        values, combine = [sample.get(metric) for sample in samples], task.aggregation().get(metric)
        if not chosen or combine is None or any(value is None for value in values):
            continue
        again = _combined(combine, values)
        if again is None or abs(again - total) > harness.CLOSE * max(1.0, abs(total)):
            continue
        drawn = [_combined(combine, [values[place] for place in places]) for places in chosen]
        if all(one is not None for one in drawn):
            found[metric] = [float(f"{one:.6g}") for one in drawn]
    return found


def _combined(combine, values: list) -> float | None:
    """What a task's aggregation makes of some of its samples, None where it needs others beside them."""
    try:
        made = combine(values)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError):
        return None
    return float(made) if isinstance(made, (bool, int, float)) else None


def _kept(model, task: str, sample: Mapping) -> Mapping:
    """What the model kept about a sample: its first request, or the image of a question scored by likelihood."""
    split = model.tasks[task].config.test_split or model.tasks[task].config.validation_split
    uid = f"{task}/{split}/{sample['doc_id']}"
    return model.rows.get(f"{uid}:0") or model.seen.get(uid, {})


def _answer(sample: Mapping) -> str:
    """What the filters left of an output; of choices scored by their loss, the one with the lowest."""
    found = sample["filtered_resps"]
    if len(found) > 1 and all(isinstance(one, (list, tuple)) and len(one) == 2 for one in found):
        losses, told = (
            [float(loss) for loss, _ in found],
            sample["arguments"],
        )  # the requests' arguments, one after another
        return str(told[losses.index(min(losses)) * (len(told) // len(found)) + 1]).strip()
    return _first(found)


def _first(found) -> str:
    while isinstance(found, (list, tuple)) and found:
        found = found[0]
    return found if isinstance(found, str) else json.dumps(found)


if __name__ == "__main__":
    sys.exit(main())
