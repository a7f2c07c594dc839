"""The comparison: schema of the summary, refusal of mixed settings, the printed table."""

import json

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.evaluate.compare import (
    ArmResults,
    by_group,
    difference,
    exceptions,
    failures,
    failures_by_task,
    grid,
    summarise,
    table,
    yes_no,
)
from pipeline.evaluate.scoring import score

SETTINGS = {"decoding": "greedy", "max_new_tokens": 8}


def answers(seed, share, n=200, settings=SETTINGS, tasks=("test", "ood")):
    rng = np.random.default_rng(seed)
    return [
        {
            "uid": f"{task}/{i:05d}:1",
            "task": task,
            "kind": ("shape", "count")[i % 2],
            "group": ("shape", "count")[i % 2],
            "cluster": f"{task}{i // 2}",
            "correct": bool(rng.random() < share),
            "failure": "empty" if i == 0 else "",
            "settings": dict(settings),
        }
        for task in tasks
        for i in range(n)
    ]


def words(seed, share, n=150):
    rng = np.random.default_rng(seed)
    return [
        {"uid": f"test/{i:05d}:1:0", "task": "test", "cluster": f"{i}", "hit": bool(rng.random() < share)}
        for i in range(n)
    ]


def arms(seeds=(1,), **settings):
    return [
        ArmResults("base", {None: answers(0, 0.2)}, {None: words(0, 0.2)}),
        ArmResults("sft", {s: answers(s, 0.3) for s in seeds}, {s: words(s, 0.4) for s in seeds}),
        ArmResults("lavender", {s: answers(100 + s, 0.6) for s in seeds}, {s: words(100 + s, 0.8) for s in seeds}),
    ]


def test_schema():
    summary = summarise(arms(), ["test", "ood"], "test", "sft")
    assert json.loads(json.dumps(summary)) == summary
    assert list(summary["arms"]) == ["base", "sft", "lavender"]
    for entry in summary["arms"].values():
        assert {k: set(v) for k, v in entry.items()} == {
            "test": {"accuracy", "ci95", "n"},
            "ood": {"accuracy", "ci95", "n"},
            "pointing": {"value", "ci95", "n"},
        }
        assert entry["test"]["n"] == 200
        assert entry["pointing"]["n"] == 150
        assert entry["test"]["ci95"][0] < entry["test"]["accuracy"] < entry["test"]["ci95"][1]
    assert summary["seeds"] == [1]
    paired = summary["paired"]
    assert paired["reference"] == "sft"
    assert paired["covers"] == "examples"
    assert set(paired["arms"]) == {"base", "lavender"}
    assert paired["arms"]["lavender"]["test"]["real"]
    assert paired["arms"]["lavender"]["test"]["p"] < 0.001
    assert paired["arms"]["lavender"]["test"]["mcnemar_p"] < 0.001


def test_table_says_what_intervals_cover():
    one = table(summarise(arms(), ["test", "ood"], "test", "sft"), ["test", "ood"])
    assert one.splitlines()[0].split(" | ")[0].strip() == "arm"
    assert [h.strip() for h in one.splitlines()[0].split("|")] == ["arm", "test accuracy", "ood accuracy", "pointing"]
    assert "over examples only (one seed: 1)" in one
    several = table(summarise(arms((1, 2, 3)), ["test", "ood"], "test", "sft"), ["test", "ood"])
    assert "over 3 seeds and examples\n" in several


def test_arms_with_other_seeds_are_told():
    mixed = arms((1, 2, 3))[:2]
    mixed += [ArmResults(name, {s: answers(s + 7, 0.4) for s in seeds}) for name, seeds in (("a", (3,)), ("b", (8, 9)))]
    mixed.append(ArmResults("c", {s: answers(s + 9, 0.4) for s in (2, 3, 4)}))
    summary = summarise(mixed, ["test"], "test", "sft")
    assert exceptions(summary["paired"]) == [
        "a has one seed (3): its interval is over examples only",
        "a minus sft: over the shared seeds 3, over examples only",
        "b (seeds 8, 9) shares no seed with sft and is not compared",
        "c minus sft: over the shared seeds 2, 3",
    ]
    assert summary["paired"]["arms"]["b"] == {}
    assert "; b (seeds 8, 9) shares no seed" in table(summary, ["test"])
    alone = difference(grid({3: answers(10, 0.4)}, "correct"), grid({3: answers(3, 0.3)}, "correct"))
    both = difference(grid({3: answers(10, 0.4)}, "correct"), grid({s: answers(s, 0.3) for s in (1, 3)}, "correct"))
    assert both == alone


def test_missing_task_and_missing_reference():
    alone = [ArmResults("base", {None: answers(0, 0.2, tasks=("test",))}, {None: []})]
    summary = summarise(alone, ["test", "ood"], "test", "sft")
    assert set(summary["arms"]["base"]) == {"test"}
    assert summary["paired"]["arms"] == {}
    assert "| -" in table(summary, ["test", "ood"])


def test_mixed_settings_are_refused():
    mixed = [
        ArmResults("sft", {1: answers(1, 0.3)}, {1: []}),
        ArmResults("lavender", {1: answers(2, 0.3, settings={**SETTINGS, "max_new_tokens": 16})}, {1: []}),
    ]
    with pytest.raises(UserError, match=r"sft-1 and lavender-1 .*max_new_tokens: 8 and 16"):
        summarise(mixed, ["test"], "test", "sft")


def test_other_questions_are_refused():
    short = [
        ArmResults("sft", {1: answers(1, 0.3)}, {1: []}),
        ArmResults("lavender", {1: answers(2, 0.3, 90)}, {1: []}),
    ]
    with pytest.raises(UserError, match="different questions"):
        summarise(short, ["test"], "test", "sft")


def test_broken_arm_is_significantly_worse_and_itself_is_not():
    told = ("red", "blue", "green", "two")
    asked = answers(1, 0.5, 400)
    rng = np.random.default_rng(6)
    golds = [told[k] for k in rng.integers(4, size=len(asked))]
    said = [gold if rng.random() < 0.6 else "red" for gold in golds]

    def scored(outputs):
        pairs = zip(asked, outputs, golds, strict=True)
        return [row | {"correct": score("", output, gold).correct} for row, output, gold in pairs]

    # the same outputs, each given to another question
    good, shuffled = scored(said), scored([said[i] for i in rng.permutation(len(said))])
    pair = [ArmResults("sft", {1: good}, {1: []}), ArmResults("broken", {1: shuffled}, {1: []})]
    found = summarise([*pair, ArmResults("again", {1: good}, {1: []})], ["test"], "test", "sft")["paired"]["arms"]
    assert found["broken"]["test"]["real"]
    assert found["broken"]["test"]["difference"] < -0.2
    assert found["broken"]["test"]["mcnemar_p"] < 0.001
    assert found["again"]["test"]["difference"] == 0
    assert found["again"]["test"]["p"] == 1


def test_kinds_and_failures():
    kinds = by_group(arms((1, 2)), ["test"])
    assert set(kinds["test"]) == {"count", "shape"}
    assert kinds["test"]["count"]["lavender"]["n"] == 100
    assert failures(arms()) == {name: {"empty": 2} for name in ("base", "sft", "lavender")}
    assert failures_by_task(arms())["sft"] == {"test": {"empty": 1}, "ood": {"empty": 1}}


def test_yes_no_as_pope_reports_it():
    told = [("yes", "yes")] * 6 + [("yes", "no")] * 2 + [("no", "yes")] * 3 + [("no", "no")] * 8 + [("no", "")]
    rows = [
        {"uid": f"{i:02}", "task": "t", "kind": "pope", "cluster": str(i), "gold": gold, "answer": said}
        | {"correct": gold == said}
        for i, (gold, said) in enumerate(told)
    ]
    found = yes_no([ArmResults("sft", {1: rows}, {1: []})], ["t"])["t"]["sft"]
    assert found["precision"]["value"] == pytest.approx(6 / 9, abs=1e-4)
    assert found["recall"]["value"] == 0.75
    assert found["f1"]["value"] == pytest.approx(12 / 17, abs=1e-4)
    assert found["yes_rate"]["value"] == 9 / 20
    assert found["f1"]["ci95"][0] < found["f1"]["value"] < found["f1"]["ci95"][1]
    # A second seed that always says yes: n stays that of the questions, the interval covers both seeds.
    other = [row | {"answer": "yes", "correct": row["gold"] == "yes"} for row in rows]
    both = yes_no([ArmResults("sft", {1: rows, 2: other}, {1: [], 2: []})], ["t"])["t"]["sft"]
    assert both["f1"]["n"] == 20
    assert both["yes_rate"]["value"] == 29 / 40
    assert both["yes_rate"]["ci95"] == [0, 1]
    assert both["f1"]["value"] == pytest.approx(28 / (28 + 3 + 12 + 2), abs=1e-4)
    assert yes_no([ArmResults("sft", {1: answers(1, 0.5)}, {1: []})], ["test"]) == {}
