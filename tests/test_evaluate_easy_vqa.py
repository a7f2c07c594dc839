"""easy-VQA through the eval command: a few of the package's own questions, each scored by what it asks for."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

ANSWERS = {
    "yesno": {"yes", "no"},
    "shape": {"circle", "rectangle", "triangle"},
    "colour": {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"},
}
OPTIONS = ("data=easy_vqa", "train.steps=120", "train.batch_size=8", "train.micro_batch=8", "eval.workers=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder like the package's: of 16 images of each part two yes/no questions, a colour and a shape."""
    package, folder = Path(find_spec("easy_vqa").origin).parent / "data", tmp_path_factory.mktemp("easy_vqa")
    for part in ("train", "test"):
        (folder / part / "images").mkdir(parents=True)
        kept, counts = [], {}
        for question, answer, number in json.loads((package / part / "questions.json").read_bytes()):
            kind = next(kind for kind, known in ANSWERS.items() if answer in known)
            told = (answer if kind == "yesno" else kind, number)
            if number < 16 and told not in counts:
                counts[told] = True
                kept.append([question, answer, number])
                picture = f"images/{number}.png"
                shutil.copyfile(package / part / picture, folder / part / picture)
        (folder / part / "questions.json").write_text(json.dumps(kept))
    return folder


def asked(folder, run):
    """Rows of an arm, each checked against its own raw output."""
    path = folder / "runs/tiny/easy_vqa/eval" / run / "per_sample.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        assert row["gold"] in ANSWERS[row["kind"]], row
        right = row["raw"].lower().rstrip(" .!?") == row["gold"] and not row["failure"]
        assert (row["correct"], row["score"], row["scorer"]) == (right, float(right), "exact-1"), row
    return rows


def test_each_question_is_scored_by_its_kind(data, command, tmp_path):
    options = [*OPTIONS, f"data.path={data}", "eval.arms=[base]"]
    for stage in ("shard", "eval"):
        result = command(stage, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    rows = asked(tmp_path, "base")
    found = {kind: sum(row["kind"] == kind for row in rows) for kind in ANSWERS}
    assert all(count >= 10 for count in found.values())
    assert sum(found.values()) == len(rows) == len(json.loads((data / "test/questions.json").read_text()))
    details = json.loads((tmp_path / "runs/tiny/easy_vqa/eval/details.json").read_text())
    kinds = details["by_kind"]["test"]
    assert {kind: entry["base"]["n"] for kind, entry in kinds.items()} == found
    assert details["yes_no"]["test"]["base"]["f1"]["n"] == found["yesno"]
    assert sum(details["failures"]["base"].values()) == sum(bool(row["failure"]) for row in rows)
    assert details["images"]["test"] == len({row["cluster"] for row in rows}) > 10


@pytest.mark.full
def test_a_student_that_has_seen_some_answers_in_its_words(data, command, tmp_path):
    """After a short training the outputs are easy-VQA's answers: some are right, some wrong, in each kind its own."""
    options = [*OPTIONS, f"data.path={data}"]
    for stage, *more in (("shard",), ("train", "arm=sft"), ("eval",)):
        result = command(stage, *options, *more, cwd=tmp_path, timeout=900)
        assert result.returncode == 0, result.stderr
    rows = asked(tmp_path, "sft-1")
    told = [row for row in rows if row["answer"] in set.union(*ANSWERS.values())]
    assert len(told) > 0.5 * len(rows)
    assert 0 < sum(row["correct"] for row in rows) < len(rows)
    details = json.loads((tmp_path / "runs/tiny/easy_vqa/eval/details.json").read_text())
    kinds = details["by_kind"]["test"]
    right = {kind: sum(row["correct"] for row in rows if row["kind"] == kind) for kind in ANSWERS}
    for kind, entry in kinds.items():
        assert entry["sft"]["accuracy"] == pytest.approx(right[kind] / entry["sft"]["n"], abs=1e-4)
    assert right["yesno"] > 0
