"""Files as VLMEvalKit writes them become arms of our comparison; its drop-in module answers greedily for every arm."""

import csv
import json
import sys
import types

import pytest
from evaluate_world import settings, world  # noqa: F401 (a fixture)
from openpyxl import Workbook

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.evaluate import stage, vlmevalkit
from pipeline.evaluate.config import Benchmark
from pipeline.evaluate.published import beside
from pipeline.layout import Layout
from pipeline.report.stage import report

DECODING = {"decoding": "greedy", "num_beams": 1, "max_new_tokens": 512}


def excel(path, heads, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    book = Workbook()
    for line in (heads, *lines):
        book.active.append(line)
    book.save(path)


def table(path, heads, lines):
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([heads, *lines])


def outputs(root, model, right, **decoding):
    """Multiple choice (MMStar), yes or no (POPE), and free answers of which no score is kept (DocVQA_VAL)."""
    home = root / model
    run = home / "T20261125_Gabcdef01"
    heads = ["index", "question", "A", "B", "answer", "category", "l2_category", "prediction"]
    choice = [[i, f"Which, {i}?", "x", "y", "A", "coarse", "c", "A" if right(i) else "B. y"] for i in range(40)]
    excel(run / f"{model}_MMStar.xlsx", heads, choice)
    judged = [[*line, int(right(i)), "Succeed"] for i, line in enumerate(choice)]
    excel(run / f"{model}_MMStar_exact_matching_result.xlsx", [*heads, "hit", "log"], judged)
    share = sum(map(right, range(40))) / 40
    table(run / f"{model}_MMStar_acc.csv", ["split", "Overall", "coarse"], [["none", share, share]])

    heads = ["index", "question", "answer", "category", "image_path", "prediction"]
    yes = [
        [i, "Is there a dog?", "Yes", "random", f"{i // 2}.jpg", "Yes" if right(i) else "I cannot say"]
        for i in range(40)
    ]
    excel(run / f"{model}_POPE.xlsx", heads, yes)
    heads += ["extracted", "score"]
    judged = [[*line, "Yes" if right(i) else "Unknown", bool(right(i))] for i, line in enumerate(yes)]
    excel(run / f"{model}_POPE_auxmatch.xlsx", heads, judged)
    scores = [["random", 1, 1, 1, 1], ["Overall", 88.8, 100 * share, 100.0, 80.0]]
    table(run / f"{model}_POPE_score.csv", ["split", "Overall", "acc", "precision", "recall"], scores)

    heads = ["index", "question", "answer", "prediction"]
    free = [[i, "What is written?", "['one line', '1 line']", "one line" if right(i) else ""] for i in range(40)]
    excel(run / f"{model}_DocVQA_VAL.xlsx", heads, free)
    table(run / f"{model}_DocVQA_VAL_acc.csv", ["val", "Overall"], [[100 * share, 100 * share]])
    (home / "decoding.json").write_text(json.dumps(DECODING | decoding))


def settings_of(root, *more):
    kit = root / "kit"
    kit.mkdir(exist_ok=True)
    return compose(
        [
            "eval=vlmevalkit",
            "eval.harness_tasks=[MMStar,POPE,DocVQA_VAL]",
            f"eval.harness_path={kit}",
            f"runs_dir={root}/runs",
            *more,
        ]
    )


def test_outputs_become_arms(tmp_path, capsys):
    cfg = settings_of(tmp_path)
    outputs(tmp_path / "kit", "base", lambda i: i % 2 == 0)
    outputs(tmp_path / "kit", "sft-1", lambda i: i % 4 == 0)
    outputs(tmp_path / "kit", "lavender-1", lambda i: i % 8 != 7)
    (tmp_path / "kit" / "unrelated").mkdir()
    summary = stage.evaluate(cfg).summary
    assert list(summary["arms"]) == ["base", "sft", "lavender"]
    assert {arm: entry["MMStar"]["accuracy"] for arm, entry in summary["arms"].items()} == {
        "base": 0.5,
        "sft": 0.25,
        "lavender": 0.875,
    }
    assert "DocVQA_VAL" not in summary["arms"]["base"]  # its answers have no score of their own
    assert summary["paired"]["arms"]["lavender"]["POPE"]["real"]
    assert summary["paired"]["arms"]["base"]["MMStar"]["n"] == 40
    details = json.loads((Layout(cfg).eval_dir / "details.json").read_text())
    assert details["harness"]["DocVQA_VAL"]["sft"]["value"] == 25
    total = details["harness"]["POPE"]["base"]
    assert [total[name] for name in ("metric", "value", "n", "mean")] == ["Overall", 88.8, 40, False]
    assert details["harness"]["MMStar"]["base"]["mean"]
    assert details["failures"]["base"] == {"not understood": 20, "empty": 20}
    rows = [json.loads(line) for line in (Layout(cfg).eval_dir / "sft-1" / "per_sample.jsonl").open()]
    one = next(row for row in rows if row["uid"] == "MMStar/4")
    assert (one["prompt"], one["gold"], one["raw"], one["group"]) == ("Which, 4?", "A", "A", "coarse")
    assert (one["scorer"], one["judge"]) == ("vlmevalkit/exact_matching_result/hit", "exact_matching")
    assert one["settings"]["max_new_tokens"] == 512
    assert len({row["cluster"] for row in rows if row["task"] == "POPE"}) == 20
    lines = {
        line.name: line.ours
        for line in beside(compose(["eval=paper20"]).eval.benchmarks, "vlmevalkit", summary, details["harness"])
    }
    assert lines["MMStar"]["lavender"]["value"] == 87.5
    assert lines["MMStar"]["lavender"]["ci95"]
    assert lines["POPE"]["base"] == {"value": 88.8, "ci95": None, "n": 40}
    assert lines["DocVQA"]["sft"]["value"] == 25
    assert stage.evaluate(cfg).written == 0
    cfg.eval.benchmarks["MMStar"] = Benchmark(vlmevalkit="MMStar", sft=45.1)
    page = report(cfg).page.read_text()
    assert "87.5" in page  # ours, beside
    assert "45.1" in page  # the published
    assert "answers 10 of 80 questions wrongly" in page  # DocVQA_VAL's have no score of their own
    outputs(tmp_path / "kit", "sft-1", lambda i: i % 2 == 0)
    with pytest.raises(UserError, match="sft-1"):
        stage.evaluate(cfg)
    capsys.readouterr()


def test_a_scorer_of_ours_where_the_harness_keeps_none(tmp_path):
    outputs(tmp_path / "kit", "base", lambda i: i % 4 == 0)
    rows, total = vlmevalkit.read(tmp_path / "kit" / "base", "DocVQA_VAL", "anls")
    assert [row["score"] for row in rows[:5]] == [1, 0, 0, 0, 1]
    assert rows[0]["scorer"] == "anls"
    assert (total.value, total.mean) == (25, True)


def test_other_decoding_is_refused(tmp_path):
    cfg = settings_of(tmp_path)
    outputs(tmp_path / "kit", "base", lambda i: True)
    outputs(tmp_path / "kit", "sft-1", lambda i: True, decoding="sampled at 0.6")
    with pytest.raises(UserError, match=r"decoding: greedy and sampled at 0\.6"):
        stage.evaluate(cfg)


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match=r"has no outputs with a decoding\.json"):
        stage.evaluate(settings_of(tmp_path))
    outputs(tmp_path / "kit", "base", lambda i: True)
    with pytest.raises(UserError, match="no outputs of 'lavender'"):
        stage.evaluate(settings_of(tmp_path, "eval.arms=[lavender]"))
    with pytest.raises(UserError, match="no outputs of 'AI2D_TEST'"):
        vlmevalkit.read(tmp_path / "kit" / "base", "AI2D_TEST")
    with pytest.raises(UserError, match="no outputs of 'MM'"):
        vlmevalkit.read(tmp_path / "kit" / "base", "MM")


def test_totals_as_its_overview_takes_them():
    assert vlmevalkit.primary({"perception": 1400.0, "reasoning": 300.0, "OCR": 100.0})[1] == 1700
    assert vlmevalkit.primary({"aAcc": 60.0, "fAcc": 30.0, "qAcc": 30.0})[1] == 40
    assert vlmevalkit.primary({"Final Score": 754.0, "Final Score Norm": 75.4}) == ("Final Score", 754)


def test_the_module_that_is_dropped_in(world, tmp_path, monkeypatch):  # noqa: F811
    """With VLMEvalKit's base class stood in for: the answer is the built-in evaluator's, the decoding is recorded."""
    base = types.ModuleType("vlmeval.vlm.base")
    base.BaseModel = type("BaseModel", (), {})
    for name in ("vlmeval", "vlmeval.vlm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", base)
    monkeypatch.delitem(sys.modules, "pipeline.evaluate.vlmevalkit_model", raising=False)
    from pipeline.evaluate import arms
    from pipeline.evaluate.answers import generate
    from pipeline.evaluate.vlmevalkit_model import Lavender

    cfg = settings(world)
    archives, asked, _ = stage.chosen(cfg)
    question = asked["test"][0]
    picture = tmp_path / "picture.png"
    picture.write_bytes(archives["test"][question.index].image)
    model = Lavender("tiny", f"{world}/student", f"{tmp_path}/outputs/base", 6, "cpu")
    assert not model.use_custom_prompt("AI2D_TEST")
    message = [{"type": "image", "value": str(picture)}, {"type": "text", "value": question.prompt}]
    student = arms.load(cfg, arms.base_run(cfg), "cpu")
    assert model.generate_inner(message, "AI2D_TEST") == generate(student, archives, [question], 6)[0][0]
    told = json.loads((tmp_path / "outputs" / "base" / "decoding.json").read_text())
    assert (told["decoding"], told["max_new_tokens"]) == ("greedy", 6)
