"""The eval and report stages on a small world with real, untrained students."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from evaluate_world import overrides, settings, world  # noqa: F401 (a fixture)
from safetensors.torch import load_file, save_file

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.evaluate import stage, status
from pipeline.evaluate.status import Job
from pipeline.layout import Layout


@pytest.fixture(scope="module")
def root(world):  # noqa: F811
    return world


@pytest.fixture(scope="module")
def evaluated(root):
    cfg = settings(root)
    stage.evaluate(cfg)
    return cfg


def folder(cfg, name):
    return Layout(cfg).eval_dir / name


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_summary_and_rows(evaluated):
    summary = json.loads((Layout(evaluated).eval_dir / "summary.json").read_text())
    assert list(summary["arms"]) == ["base", "sft", "lavender"]
    assert set(summary) == {"arms", "teacher", "seeds", "seconds", "paired"}
    assert set(summary["teacher"]) == {"pointing", "miou", "chance"}  # and "ci95" and "n" where there are maps
    assert summary["seeds"] == [1]
    assert set(summary["arms"]["sft"]) == {"test", "ood", "pointing"}
    per_sample = rows(folder(evaluated, "sft-1") / "per_sample.jsonl")
    assert summary["arms"]["sft"]["test"]["n"] == sum(row["task"] == "test" for row in per_sample)
    ood = [row["uid"].split("/")[0] for row in per_sample if row["task"] == "ood"]
    assert len({ood.count(split) for split in ("ood_pairs", "ood_count", "ood_background")}) == 1
    assert {"key", "kind", "prompt", "gold", "raw", "answer", "correct", "settings"} <= set(per_sample[0])
    assert "caption" not in {row["kind"] for row in per_sample}
    words = rows(folder(evaluated, "sft-1") / "pointing.jsonl")
    with np.load(folder(evaluated, "sft-1") / "maps.npz") as stored:
        assert stored["uid"].tolist() == [row["uid"] for row in words]
        assert stored["maps"].shape == (len(words), 32, 32)
    assert {row["task"] for row in words} == {"test", "val"}


def test_third_run_does_nothing(evaluated, capsys):
    assert status.up_to_date(evaluated)
    assert stage.evaluate(evaluated).written == 0
    assert "up to date" in capsys.readouterr().out


def test_only_the_missing_arm_is_evaluated(evaluated, monkeypatch):
    before = (folder(evaluated, "sft-1") / "per_sample.jsonl").read_bytes()
    (folder(evaluated, "sft-1") / "receipt.json").unlink()
    done = []
    original = stage._work
    monkeypatch.setattr(stage, "_work", lambda cfg, job, *rest: (done.append(job.name), original(cfg, job, *rest))[1])
    assert stage.evaluate(evaluated).written == 1
    assert done == ["sft-1"]
    assert (folder(evaluated, "sft-1") / "per_sample.jsonl").read_bytes() == before


def test_interrupted_run_goes_on(evaluated, monkeypatch):
    from pipeline.evaluate import answers

    cfg, name = evaluated, "lavender-1"
    before = rows(folder(cfg, name) / "per_sample.jsonl")
    (folder(cfg, name) / "receipt.json").unlink()
    original, calls = answers.generate, []

    def stop_after_two(*args):
        calls.append(len(args[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(answers, "generate", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        stage.evaluate_arm(cfg, "lavender", 1)
    (part,) = folder(cfg, name).glob("*.part")
    assert len(part.read_text().splitlines()) == 16
    with part.open("a") as out:
        out.write('{"uid": "test/0000')  # what a kill in the middle of a line leaves
    resumed = []
    monkeypatch.setattr(answers, "generate", lambda *args: (resumed.append(len(args[2])), original(*args))[1])
    stage.evaluate_arm(cfg, "lavender", 1)
    assert sum(resumed) == len(before) - 16
    assert rows(folder(cfg, name) / "per_sample.jsonl") == before
    assert not list(folder(cfg, name).glob("*.part"))


def test_two_ranks_answer_as_one_process_does(root, evaluated, tmp_path):
    """Under torchrun each process does every second batch; the results are the same to the byte."""
    for name in ("sft-1", "lavender-1"):
        shutil.copytree(Layout(evaluated).run_dir(*name.split("-")), tmp_path / "tiny" / "world" / name)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    more = (f"runs_dir={tmp_path}", "eval.point_batch=8", "eval.device=cpu")
    one = settings(root, f"runs_dir={tmp_path}/one", *more[1:], "eval.arms=[base]")
    done = subprocess.run(
        [*launch, "-m", "stages.eval", *overrides(root, *more)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    stage.evaluate(one)
    for name, other in (("base", one), ("sft-1", evaluated), ("lavender-1", evaluated)):
        found, expected = tmp_path / "tiny" / "world" / "eval" / name, folder(other, name)
        assert (found / "per_sample.jsonl").read_bytes() == (expected / "per_sample.jsonl").read_bytes()
        assert not list(found.glob("*.part"))
    for file in ("pointing.jsonl", "maps.npz"):
        found, expected = tmp_path / "tiny" / "world" / "eval" / "base" / file, folder(one, "base") / file
        assert found.read_bytes() == expected.read_bytes()


def test_shares_of_one_machine(root, evaluated, tmp_path):
    """More workers than arms: the questions of an arm are shared out over processes."""
    cfg = settings(root, f"runs_dir={tmp_path}", "eval.arms=[base]", "eval.workers=3")
    stage.evaluate(cfg)
    assert (folder(cfg, "base") / "per_sample.jsonl").read_bytes() == (
        folder(evaluated, "base") / "per_sample.jsonl"
    ).read_bytes()
    assert rows(folder(cfg, "base") / "pointing.jsonl") == rows(folder(evaluated, "base") / "pointing.jsonl")


def test_other_settings_are_refused(root, evaluated):
    other = settings(root, "eval.max_new_tokens=7")
    with pytest.raises(receipts.Stale, match="max_new_tokens"):
        stage.evaluate(other)
    assert not status.current(settings(root, "eval.max_new_tokens=7", "overwrite=true"), Job("sft", 1))


def test_an_arm_that_stops_elsewhere_or_has_another_template_is_refused(root, evaluated, tmp_path):
    """What an arm's own directory decides of its decoding is recorded in every answer."""
    for name in ("generation_config.json", "chat_template.jinja"):
        copy = tmp_path / name.partition(".")[0]
        shutil.copytree(Layout(evaluated).run_dir("sft", 1) / "model", copy)
        text = (copy / name).read_text()
        if name.endswith("json"):
            text = json.dumps(json.loads(text) | {"eos_token_id": 5})
        else:
            text = "Look. " + text
        (copy / name).write_text(text)
        cfg = settings(root, f"runs_dir={tmp_path}/runs", "eval.arms=[base]", f"+eval.students.mine={copy}")
        with pytest.raises(UserError, match=r"base and mine .*(stops|chat_template): "):
            stage.evaluate(cfg)
        shutil.rmtree(tmp_path / "runs")


def test_a_split_in_two_tasks_is_refused(root):
    with pytest.raises(UserError, match=r"split 'test' is in 'test' and in 'again'.*eval\.tasks\.test=\[\] empties"):
        settings(root, "+eval.tasks.again=[test]")
    assert list(status.tasks(settings(root, "eval.tasks.test=[]", "eval.point_task=", "+eval.tasks.again=[test]"))) == [
        "ood",
        "again",
    ]


def test_missing_run_and_missing_split(root):
    with pytest.raises(Exception, match="no finished run of arm 'oracle'"):
        stage.evaluate(settings(root, "eval.arms=[oracle]"))
    with pytest.raises(Exception, match="none of the splits"):
        stage.evaluate(settings(root, "eval.tasks.test=[nowhere]", "eval.tasks.ood=[elsewhere]"))


def test_a_batch_answers_as_single_questions_do(evaluated):
    from pipeline.evaluate import arms
    from pipeline.evaluate.answers import generate

    archives, asked, _ = stage.chosen(evaluated)
    student = arms.load(evaluated, arms.base_run(evaluated), "cpu")
    some = asked["test"][:7]
    together = generate(student, archives, some, 5)
    assert together == [generate(student, archives, [question], 5)[0] for question in some]


def test_gold_output_is_right_and_masks_point(evaluated):
    """Rows of an oracle: gold answers score 1 in every kind, true regions as maps hit every time."""
    from pipeline.evaluate.attention import _collect, ask
    from pipeline.evaluate.scoring import score

    archives, asked, pointed = stage.chosen(evaluated)
    assert all(score(q.kind, q.gold, q.gold).correct for found in asked.values() for q in found)
    found = ask(archives, pointed)
    looks = _collect((one, word, one.regions[word][0].astype(np.float32)) for one in found for word in one.regions)
    assert looks.rows
    assert all(row["mass"] == 1 for row in looks.rows)
    assert np.mean([row["hit"] for row in looks.rows]) == 1


def test_adapter_and_other_students(root, evaluated, tmp_path):
    """An adapter is merged into the base without losing a weight; one that does not fit is refused."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pipeline.evaluate import arms
    from pipeline.student.load import load_student

    torch.manual_seed(0)
    plain = load_student(evaluated.model)
    tuned = get_peft_model(plain.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "mine")
    cfg = settings(root, f"+eval.students.mine={tmp_path}/mine")
    job = next(job for job in status.jobs(cfg) if job.arm == "mine")
    assert status.folder(cfg, job).name == "mine"
    assert status.inputs(cfg, job)["weights"] != status.inputs(cfg, Job("base", None))["weights"]
    loaded = arms.load(cfg, status.run_of(cfg, job), "cpu")
    archives, asked, _ = stage.chosen(cfg)
    question = asked["test"][0]
    inputs = loaded.family.prompt([archives["test"][question.index]], [question.turn - 1])
    with torch.no_grad():
        gap = (loaded.model(**inputs).logits - tuned.eval()(**inputs).logits).abs().max()
    assert gap < 1e-4
    stored = load_file(tmp_path / "mine" / "adapter_model.safetensors")
    first = next(iter(stored))
    stored[first.replace("layers.0", "layers.9")] = stored.pop(first)
    save_file(stored, tmp_path / "mine" / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"1 weights of .* do not fit"):
        arms.load(cfg, status.run_of(cfg, job), "cpu")
    with pytest.raises(UserError, match="no such directory"):
        status.jobs(settings(root, "+eval.students.mine=/nowhere"))
