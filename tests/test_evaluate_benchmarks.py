"""Benchmarks' files become questions: POPE and WorldMedQA-V in their published form, sighted and blind."""

import base64
import csv
import io
import json

import pytest
from evaluate_world import world  # noqa: F401 (a fixture)
from PIL import Image

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.evaluate import stage, status
from pipeline.evaluate.answers import read_rows
from pipeline.layout import Layout


def picture(colour):
    out = io.BytesIO()
    Image.new("RGB", (20, 16), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmarks")
    (root / "pope").mkdir()
    for split in ("random", "adversarial"):
        rows = []
        for i in range(4):
            (root / "pope" / f"{split}{i}.png").write_bytes(picture((40 * i, 0, 99)))
            rows.append({"question_id": i, "image": f"{split}{i}.png", "text": "Is there a dog in the image?"})
            rows[-1]["label"] = ("yes", "no")[i % 2]
        (root / "pope" / f"coco_pope_{split}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "med").mkdir()
    for number, split in enumerate(("japan_local", "japan_english", "spain_local")):
        with (root / "med" / f"{split}_processed.tsv").open("w", newline="") as handle:
            out = csv.writer(handle, delimiter="\t")
            out.writerow(["index", "question", "A", "B", "C", "D", "correct_option", "split", "image"])
            for i in range(2 + number):
                image = base64.b64encode(picture((0, 50 * i, 60 * number))).decode()
                out.writerow(
                    [i, f'Was zeigt "{i}"?\nEine Zeile', "Herz", "Lunge", "Niere", "Haut", "ABCD"[i], "test", image]
                )
    return root


def settings(root, data, *more):
    name = {"pope": "pope", "worldmedqa": "med"}[data]
    return compose([f"data={data}", f"data.path={root}/{name}", f"shards_dir={root}/shards", "engine.workers=1", *more])


@pytest.fixture(scope="module")
def sharded(root):
    from pipeline.archive.stage import shard

    for data in ("pope", "worldmedqa"):
        result = shard(settings(root, data))
        assert result.counts["failed"] == 0
    return root


def test_pope_questions(sharded):
    cfg = compose(["eval=pope", f"shards_dir={sharded}/shards"])
    assert status.tasks(cfg) == {"random": ["pope:random"], "adversarial": ["pope:adversarial"]}
    archives, asked, pointed = stage.chosen(cfg)
    assert pointed == {}
    assert [len(found) for found in asked.values()] == [4, 4]
    one = asked["random"][0]
    assert one.prompt == "Is there a dog in the image? Please answer yes or no."
    assert (one.kind, one.group) == ("pope", "random")
    assert {q.gold for q in asked["random"]} == {"yes", "no"}
    assert archives["pope:random"][0].image


def test_worldmedqa_is_asked_sighted_and_blind(sharded):
    cfg = compose(["eval=worldmedqa", f"shards_dir={sharded}/shards"])
    assert status.task_names(cfg) == ["local", "english", "local blind", "english blind"]
    _, asked, _ = stage.chosen(cfg)
    assert {task: len(found) for task, found in asked.items()} == {
        "local": 6,
        "english": 3,
        "local blind": 6,
        "english blind": 3,
    }
    one = next(q for q in asked["english"] if q.gold == "B")
    assert one.prompt.splitlines() == [
        'Was zeigt "1"?',
        "Eine Zeile",
        "A. Herz",
        "B. Lunge",
        "C. Niere",
        "D. Haut",
        "Answer with the letter of the right option only.",
    ]
    assert (one.kind, one.group) == ("choice", "japan")
    assert [q.uid for q in asked["local blind"]] == [f"{q.uid}#blind" for q in asked["local"]]


def test_blind_runs_countries_and_yes_rates_are_evaluated(sharded, world, tmp_path):  # noqa: F811
    """Both benchmarks through the stage, on a tiny student: what they report is in the summary and the details."""
    found = {}
    for name in ("worldmedqa", "pope"):
        own = [f"shards_dir={sharded}/shards", f"runs_dir={tmp_path}/{name}", f"model.path={world}/student"]
        cfg = compose([f"eval={name}", *own, "eval.arms=[base]", "eval.workers=1", "eval.max_new_tokens=3"])
        summary = stage.evaluate(cfg).summary
        details = json.loads((Layout(cfg).eval_dir / "details.json").read_text())
        rows = read_rows(Layout(cfg).eval_dir / "base" / "per_sample.jsonl")
        found[name] = summary["arms"]["base"], details, rows
    numbers, details, rows = found["worldmedqa"]
    counts = {"local": 6, "english": 3, "local blind": 6, "english blind": 3}
    assert {task: entry["n"] for task, entry in numbers.items()} == counts
    assert {country: entry["base"]["n"] for country, entry in details["by_kind"]["local blind"].items()} == {
        "japan": 2,
        "spain": 4,
    }
    by_uid = {row["uid"]: row for row in rows}
    seen = [row for row in rows if not row["uid"].endswith("#blind")]
    assert [by_uid[f"{row['uid']}#blind"]["prompt"] for row in seen] == [row["prompt"] for row in seen]
    assert any(by_uid[f"{row['uid']}#blind"]["raw"] != row["raw"] for row in seen), "the image is not looked at"
    assert {row["scorer"] for row in rows} == {"choice-1"}
    numbers, details, rows = found["pope"]
    for task in ("random", "adversarial"):
        told = details["yes_no"][task]["base"]
        assert set(told) == {"f1", "precision", "recall", "yes_rate"}
        assert all(entry["n"] == numbers[task]["n"] == 4 for entry in told.values())
        said = [row["answer"] == "yes" for row in rows if row["task"] == task]
        assert told["yes_rate"]["value"] == sum(said) / 4


def test_any_held_out_conversations(root):
    """A split of a LLaVA-style file that training does not see is a task; yes/no answers are told from others."""
    from pipeline.archive.stage import shard

    talk = [("Is it red?", "Yes"), ("What is it?", "a square")]
    turns = [{"from": who, "value": text} for pair in talk for who, text in zip(("human", "gpt"), pair, strict=True)]
    for split in ("train", "test"):
        (root / f"{split}.json").write_text(
            json.dumps([{"id": i, "image": f"pope/random{i}.png", "conversations": turns} for i in range(3)])
        )
    cfg = compose(
        [
            "data=llava_json",
            f"data.path={root}",
            "+data.splits={train: train.json, test: test.json}",
            f"shards_dir={root}/shards",
            "engine.workers=1",
        ]
    )
    assert shard(cfg).counts["failed"] == 0
    assert status.tasks(cfg) == {"test": ["test"]}
    _, asked, _ = stage.chosen(cfg)
    assert (
        sorted((q.kind, q.prompt, q.gold) for q in asked["test"])
        == [("other", "What is it?", "a square")] * 3 + [("yesno", "Is it red?", "Yes")] * 3
    )
    assert len({q.cluster for q in asked["test"]}) == 3


def test_broken_rows_are_recorded(tmp_path):
    from pipeline.layout import Layout
    from pipeline.sources import open_source

    (tmp_path / "coco_pope_random.json").write_text('{"image": "a.png", "text": "q", "label": "maybe"}\nnot json\n')
    cfg = compose(["data=pope", f"data.path={tmp_path}"])
    found = list(open_source(cfg.data, Layout(cfg)).items("random"))
    assert [item.failure.status for item in found] == ["bad_record", "bad_record"]
    for data in ("pope", "worldmedqa"):
        empty = compose([f"data={data}", f"data.path={tmp_path}/nothing"])
        with pytest.raises(UserError, match=r"check data\.path"):
            open_source(empty.data, Layout(empty))
    (tmp_path / "x_local_processed.tsv").write_text("index\tquestion\n")
    other = compose(["data=worldmedqa", f"data.path={tmp_path}"])
    with pytest.raises(UserError, match="lacks the column A"):
        open_source(other.data, Layout(other))
