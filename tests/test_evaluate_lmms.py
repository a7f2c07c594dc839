"""lmms-eval, the real one in an environment of its own, asks the tiny students about the world."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluate_world import settings, world  # noqa: F401 (a fixture)

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.evaluate import harness, intervals, lmms, stage
from pipeline.evaluate.scoring import score
from pipeline.layout import Layout

REPOSITORY = Path(__file__).parent.parent
TASK = """
task: little_world
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/little_world.parquet}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, do_sample: true, temperature: 1.5}}
process_results: !function utils.right
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
UTILS = """
import io
from PIL import Image
from pipeline.evaluate.scoring import normalise


def visual(doc):
    return [Image.open(io.BytesIO(doc["picture"])).convert("RGB")]


def right(doc, results):
    return {"right": float(normalise(results[0]) == normalise(doc["answer"]))}
"""


@pytest.fixture(scope="module")
def python():
    """The environment that `make eval SUITE=lmms` makes; where lmms-eval cannot be installed there is none."""
    found = REPOSITORY / ".venv-lmms"
    if not (found / ".ready").is_file():
        made = subprocess.run(["make", "-C", str(REPOSITORY), ".venv-lmms/.ready"], capture_output=True, text=True)
        if made.returncode:
            if "No matching distribution" not in made.stderr and "Connection" not in made.stderr:
                pytest.fail(made.stderr)
            pytest.skip("lmms-eval cannot be installed here")
    return found / "bin" / "python"


def little_world(folder, questions, archives, golds):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"picture": archives[q.split][q.index].image, "question": q.prompt, "answer": gold}
        for q, gold in zip(questions, golds, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "little_world.parquet")
    (folder / "little_world.yaml").write_text(TASK.format(folder=folder))
    (folder / "utils.py").write_text(UTILS)


def test_the_real_harness_gives_what_the_built_in_evaluator_gives(world, python, tmp_path, capsys):  # noqa: F811
    """Base and adapter, question by question; the gold answers are chosen so that each is right about half the time."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pipeline.evaluate import arms, status
    from pipeline.evaluate.answers import generate
    from pipeline.student.load import load_student

    torch.manual_seed(3)
    tuned = load_student(settings(world).model).model
    tuned = get_peft_model(tuned, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "mine")
    asked_of = [f"+eval.students.mine={tmp_path}/mine", "eval.arms=[base]", f"runs_dir={tmp_path}/runs"]
    built_in = settings(world, *asked_of)
    archives, asked, _ = stage.chosen(built_in)
    questions = asked["test"][:20]
    said = {}
    for run in arms.find(built_in):
        student = arms.load(built_in, run, "cpu")
        # Batches as the harness makes them: alike in length, eight at a time.
        said[run.name] = {}
        order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i))
        for start in range(0, len(order), 8):
            part = order[start : start + 8]
            found = generate(student, archives, [questions[i] for i in part], 6)
            said[run.name] |= {i: raw for i, (raw, _, _) in zip(part, found, strict=True)}
    golds = [said[("base", "mine")[i % 2]][i] or "nothing" for i in range(len(questions))]
    little_world(tmp_path, questions, archives, golds)

    cfg = settings(
        world,
        *asked_of,
        "eval=lmms",
        "eval.harness_tasks=[little_world]",
        f"eval.harness_path={tmp_path}",
        f"eval.harness_python={python}",
    )
    summary = stage.evaluate(cfg).summary
    assert "little_world accuracy" in capsys.readouterr().out
    details = json.loads((Layout(cfg).eval_dir / "details.json").read_text())
    for name in ("base", "mine"):
        folder = Layout(cfg).eval_dir / name
        rows = [json.loads(line) for line in (folder / "per_sample.jsonl").read_text().splitlines()]
        assert [row["raw"] for row in rows] == [said[name][i] for i in range(len(questions))]
        right = [score("", row["raw"], gold).correct for row, gold in zip(rows, golds, strict=True)]
        assert 0 < sum(right) < len(right)
        assert [row["correct"] for row in rows] == right
        assert len({row["cluster"] for row in rows}) == len({q.cluster for q in questions})
        assert summary["arms"][name]["little_world"]["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
        total = details["harness"]["little_world"][name]
        assert (total["metric"], total["n"], total["mean"]) == ("right", 20, True)
        assert total["value"] == pytest.approx(sum(right) / len(right))
    told = rows[0]["settings"]
    assert told["decoding"] == "greedy"  # whatever the task asks for
    assert told["stops"]
    assert told["limits"]["little_world"]["max_new_tokens"] == 6
    assert rows[0]["scorer"].startswith("lmms_eval-")
    assert stage.evaluate(cfg).written == 0

    # What a killed run has answered is not asked again.
    job = status.Job("base", None)
    folder = status.folder(cfg, job)
    (folder / "receipt.json").unlink()
    name = receipts.fingerprint({**status.settings(cfg, job), **status.inputs(cfg, job)})
    kept = [
        {"uid": f"little_world/test/{i}:0", "raw": golds[i], "problem": "", "cluster": str(i), "images": 1}
        for i in range(20)
    ]
    part = folder / f"answers-{name[:12]}.part"
    part.write_text("".join("\n" + json.dumps(row) for row in kept) + '\n{"uid": "little')
    stage.evaluate_arm(cfg, "base")
    total = json.loads((folder / harness.TOTALS).read_text())["little_world"]
    assert total["value"] == 1
    assert not part.exists()


CHOICES = """
task: little_choice
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {folder}/little_choice.parquet}}}}
test_split: test
output_type: multiple_choice
doc_to_visual: !function utils.visual
doc_to_text: question
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@pytest.mark.full
def test_of_choices_the_likeliest_is_taken(world, python, tmp_path):  # noqa: F811
    """By the real harness, which takes the lowest loss; every third question has the unlikeliest choice for right."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from pipeline.evaluate import arms
    from pipeline.evaluate.questions import alone
    from pipeline.examples import Turn

    cfg = settings(
        world,
        "eval.arms=[base]",
        f"runs_dir={tmp_path}/runs",
        "eval=lmms",
        "eval.harness_tasks=[little_choice]",
        f"eval.harness_path={tmp_path}",
        f"eval.harness_python={python}",
    )
    archives, asked, _ = stage.chosen(settings(world))
    student = arms.load(cfg, arms.base_run(cfg), "cpu")
    choices, rows, likeliest = ["red", "two blue stars", "yes", "a small green square"], [], []
    for number, question in enumerate(asked["test"][:12]):
        example = alone(archives[question.split][question.index], question.turn)
        losses = []
        for choice in choices:
            turns = (*example.turns[:-1], Turn("assistant", choice))
            item = student.family.encode_one(replace(example, turns=turns))
            learnt = (item.labels >= 0).nonzero().flatten()[:-1]  # without the end of the turn
            batch = student.family.collate([item], train=False)
            with torch.no_grad():
                logits = student.model(**batch.inputs).logits[0, learnt - 1]
            losses.append(float(torch.nn.functional.cross_entropy(logits, item.labels[learnt])))
        order = sorted(range(len(choices)), key=losses.__getitem__)
        gold = order[-1] if number % 3 == 0 else order[0]
        likeliest.append(choices[order[0]])
        picture = archives[question.split][question.index].image
        rows.append({"picture": picture, "question": question.prompt, "choices": choices, "gold": gold})
    assert len(set(likeliest)) > 1 or likeliest[0] != choices[0]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "little_choice.parquet")
    (tmp_path / "little_choice.yaml").write_text(CHOICES.format(folder=tmp_path))
    (tmp_path / "utils.py").write_text(UTILS)
    summary = stage.evaluate(cfg).summary
    assert summary["arms"]["base"]["little_choice"]["accuracy"] == pytest.approx(8 / 12, abs=1e-4)
    told = [json.loads(line) for line in (Layout(cfg).eval_dir / "base" / "per_sample.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in told] == likeliest
    assert [row["correct"] for row in told] == [number % 3 != 0 for number in range(12)]
    assert len({row["cluster"] for row in told}) == len({q.cluster for q in asked["test"][:12]}) < 12


@pytest.mark.full
def test_its_own_command_finds_our_models(world, python, tmp_path):  # noqa: F811
    """`lmms_eval --model lavender` on an adapter of the bundled student gives the built-in evaluator's accuracy."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pipeline.config import compose
    from pipeline.evaluate import arms
    from pipeline.evaluate.answers import generate
    from pipeline.student.load import load_student

    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_student(compose().model).model, lora).save_pretrained(tmp_path / "mine")
    archives, asked, _ = stage.chosen(settings(world))
    questions = asked["test"][:8]
    student = arms.load(compose(), arms.Run("given", None, tmp_path / "mine", tmp_path), "cpu")
    said = [generate(student, archives, [question], 6)[0][0] for question in questions]
    little_world(tmp_path, questions, archives, [raw if n % 4 else "nothing" for n, raw in enumerate(said)])
    command = [str(python), "-m", "lmms_eval", "--model", "lavender", "--tasks", "little_world", "--log_samples"]
    command += ["--model_args", f"model=tiny,weights={tmp_path}/mine", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--batch_size", "1", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["little_world"]["right,none"] == pytest.approx(6 / 8)
    (samples,) = (tmp_path / "out").rglob("*_samples_little_world.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [one["filtered_resps"] for one in sorted(found, key=lambda one: one["doc_id"])] == said


def test_mistakes_are_told(world, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match="name the harness's tasks"):
        stage.evaluate(settings(world, "eval=lmms"))
    cfg = settings(world, "eval=lmms", "eval.harness_tasks=[ai2d]", f"eval.harness_python={tmp_path}/python")
    with pytest.raises(UserError, match="no Python with lmms-eval"):
        stage.evaluate_arm(cfg, "base", None, "cpu")
    with pytest.raises(UserError, match="no such folder"):
        stage.evaluate(settings(world, "eval=lmms", "eval.harness_tasks=[ai2d]", "eval.harness_path=/nowhere"))


def test_the_reason_is_the_last_error_and_no_progress_bar(tmp_path):
    log = tmp_path / "lmms.log"
    log.write_text(
        "ValueError: first\nTraceback (most recent call last):\nx.RetryError: second\n 0%| | 0/12 [00:10<?]\n"
    )
    assert lmms._reason(log) == "x.RetryError: second"
    log.write_text("loading\nerror: lmms-eval has no task 'x'\n")
    assert lmms._reason(log) == "lmms-eval has no task 'x'"
    log.write_text("Killed\n")
    assert lmms._reason(log) == "Killed"
    log.write_text("")
    assert lmms._reason(log) == "it said nothing"


class Task:
    """What is needed of a task of lmms-eval: how it makes one number of many."""

    def aggregation(self):
        return {
            "f1": lambda values: sum(v["hit"] for v in values) ** 2 / len(values) ** 2,
            "alone": lambda values: sum(v["prediction"] == "A" for v in values) / len(values),
        }


def test_a_total_that_is_no_mean_is_told_apart():
    samples = [{"f1": {"hit": i % 2}, "alone": {"prediction": "AB"[i % 2]}, "points": 40.0 * i} for i in range(4)]
    assert lmms._scores(samples, {"f1": 0.25, "alone": 0.5}, Task()) == ("alone", [1, 0, 1, 0])
    metric, parts = lmms._scores(samples, {"f1": 0.25}, Task())
    assert (metric, parts) == ("f1", [0, 1, 0, 1])
    assert not harness.is_mean(0.25, parts)
    assert harness.is_mean(50.0, parts)  # in per cent
    assert lmms._scores(samples, {"points": 999.0}, Task()) == ("", None)


class Points:
    """Numbers that are no means: F1, points for pairs that must be complete, and a plain sum."""

    def aggregation(self):
        return {"f1": self.f1, "pairs": self.pairs, "sum": lambda values: float(sum(v["hit"] for v in values))}

    @staticmethod
    def f1(values):
        found = sum(v["hit"] and v["told"] for v in values)
        return 2 * found / (sum(v["hit"] for v in values) + sum(v["told"] for v in values))

    @staticmethod
    def pairs(values):
        by_image = {}
        for v in values:
            by_image.setdefault(v["image"], []).append(v["hit"] == v["told"])
        assert all(len(pair) == 2 for pair in by_image.values())
        return 100 * sum(all(pair) + sum(pair) / 2 for pair in by_image.values()) / len(by_image)


def told_points(seed, images=150):
    rng = np.random.default_rng(seed)
    told = [{"hit": bool(rng.random() < 0.5), "image": i // 2} for i in range(2 * images)]
    told = [one | {"told": one["hit"] if rng.random() < 0.8 else not one["hit"]} for one in told]
    return [{"f1": one, "pairs": one, "sum": one} for one in told], [str(one["image"]) for one in told]


def test_totals_that_are_no_means_get_the_interval_of_resampling(tmp_path):
    samples, clusters = told_points(0)
    numbers = {name: combine([one[name] for one in samples]) for name, combine in Points().aggregation().items()}
    halves = lmms._halves(samples, clusters, {**numbers, "f1": numbers["f1"]}, Points())
    assert set(halves) == {"f1", "pairs", "sum"}
    harness.save(tmp_path, {"t": harness.Total("f1", numbers["f1"], 300, numbers, False, halves, 150)})
    entry = harness.joined({"sft": [tmp_path]})["t"]["sft"]

    hit, told = (np.array([one["f1"][name] for one in samples], float) for name in ("hit", "told"))
    expected = intervals.ratio_interval(2 * hit * told, hit + told, clusters)
    lo, hi = harness.interval(entry, {"f1": 1.0})
    assert (lo + hi) / 2 == pytest.approx(expected.value)
    assert hi - lo == pytest.approx(expected.hi - expected.lo, rel=0.2)
    scaled = harness.interval(entry, {"f1": 100.0})
    assert scaled == pytest.approx([100 * lo, 100 * hi])

    per_image = [
        100 * (all(pair) + sum(pair) / 2) for pair in zip((hit == told)[::2], (hit == told)[1::2], strict=True)
    ]
    expected = intervals.mean_interval(per_image, range(150))
    lo, hi = harness.interval(entry, {"pairs": 1.0})
    assert (lo + hi) / 2 == pytest.approx(expected.value)
    assert hi - lo == pytest.approx(expected.hi - expected.lo, rel=0.2)
    assert harness.interval(entry, {"sum": 1.0}) is None  # half of the samples have half of a sum
    assert harness.interval(entry, {"other": 1.0}) is None


def test_totals_over_seeds_spread_by_seeds_too(tmp_path):
    folders = []
    for seed in (0, 1):
        samples, clusters = told_points(seed)
        value = Points.f1([one["f1"] for one in samples])
        halves = lmms._halves(samples, clusters, {"f1": value, "pairs": -1.0}, Points())
        assert set(halves) == {"f1"}  # a total that the task does not give again is not spread
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        harness.save(folders[-1], {"t": harness.Total("f1", value, 300, {"f1": value}, False, halves, 150)})
    both = harness.joined({"sft": folders})["t"]["sft"]
    far = {**both, "seeds": {"f1": [both["value"] - 0.1, both["value"] + 0.1]}}
    near = {**both, "seeds": {"f1": [both["value"]] * 2}}
    widths = [np.ptp(harness.interval(entry, {"f1": 1.0})) for entry in (near, both, far)]
    assert widths[0] <= widths[1] < widths[2]
