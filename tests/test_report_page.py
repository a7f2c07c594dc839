"""The page from synthetic results: every section, escaped texts, pictures that show what they should."""

import re
import shlex

import numpy as np
import pytest
from PIL import Image

from pipeline import receipts
from pipeline.config import compose
from pipeline.overlay import encoded, enlarge, outline, overlay
from pipeline.report import beside, gallery, page, plots, theme
from pipeline.report.repeat import PYTHON, commands, hydra
from pipeline.report.stage import _shown
from pipeline.train import status

EVIL = '<script>alert("x")</script>'


def number(value, key="value"):
    return {key: value, "ci95": [value - 0.05, value + 0.05], "n": 100}


def change(value, real):
    return {"difference": value, "ci95": [0.01, 0.2], "p": 0.0004, "mcnemar_p": 0.0021, "real": real, "n": 100}


@pytest.fixture
def summary():
    entry = {"test": number(0.4, "accuracy"), "pointing": number(0.7)}
    return {
        "arms": {"base": {"test": number(0.1, "accuracy")}, "sft": entry, "lavender": entry, "mine": entry},
        "teacher": {"pointing": 0.9, "miou": 0.5, "chance": 0.06},
        "seeds": [1, 2],
        "seconds": {"eval": 12.0},
        "paired": {
            "reference": "sft",
            "covers": "seeds and examples",
            "arms": {"lavender": {"test": change(0.1, True)}, "mine": {"test": change(-0.01, False)}},
        },
    }


@pytest.fixture
def details():
    measures = ("pointing", "mass", "miou", "chance", "centre", "centre_mass", "centre_miou")
    grounding = {key: number(0.5) for key in measures}
    grounding |= {"threshold": 0.5, "threshold_from": "val", "by_word": {"colour": number(0.6)}}
    return {
        "model": "tiny",
        "data": EVIL,
        "teacher": "tiny",
        "tasks": {"test": ["test"], "ood": ["ood_pairs"]},
        "point_task": "test",
        "questions": {"test": 100, "ood": 0},
        "images": {"test": 50, "ood": 0},
        "by_kind": {"test": {"count": {"sft": number(0.3, "accuracy"), "lavender": number(0.5, "accuracy")}}},
        "yes_no": {"test": {"sft": {key: number(0.5) for key in ("f1", "precision", "recall", "yes_rate")}}},
        "failures": {"sft": {"empty": 2}, "lavender": {}},
        "grounding": {"teacher": grounding, "sft-1": grounding},
        "jobs": [],
        "decoding": {"decoding": "greedy", "scorers": ["exact-1", "set-1"]},
        "versions": {"torch": "2.0"},
    }


@pytest.fixture
def one_shape(monkeypatch):
    """Figures in one width only: drawing takes most of the time."""
    monkeypatch.setattr(plots, "SHAPES", {"wide": plots.SHAPES["wide"]})


def rendered(summary, details, **more):
    curves = {"sft-1": [{"step": s, "ce": 2.0, "align": 0.0} for s in range(5)]}
    given = {"title": EVIL, "commands": "make eval", "facts": [("Data", [("data set", EVIL)])], **more}
    return page.render(page.contents(summary=summary, details=details, curves=curves, **given))


def test_sections_and_escaping(summary, details, one_shape):
    said = [{"text": EVIL, "verdict": "wrong"}]
    row = {"picture": None, "question": EVIL, "kind": "k", "gold": "g", "said": said}
    mistakes = {"arms": ["sft"], "wrong": 1, "asked": 2, "lost": 0, "rows": [row]}
    text = rendered(summary, details, mistakes=mistakes)
    assert EVIL not in text
    assert text.count("&lt;script&gt;alert") >= 4
    for section in ("results", "kinds", "grounding", "training", "mistakes", "facts", "repeat"):
        assert f'<section id="{section}"' in text
    assert '<section id="gallery"' not in text
    assert '<section id="published"' not in text
    assert "lavender against sft: better (+10.0 points [+1.0, +20.0], n = 100) on test." in text
    assert "mine against sft: not distinguishable (−1.0 points" in text
    assert "over seeds and examples, 2 seeds" in text
    assert "not measured" in text
    assert "yes rate" in text
    for value in re.findall(r'(?:src|href|srcset)="([^"]*)"', text):
        assert value.startswith(("data:", "#"))
    used = re.findall(r'(?:href="#|url\(#|aria-labelledby=")([\w-]+)', text)
    names = re.findall(r' id="([^"]+)"', text)
    assert set(used) <= set(names)
    assert len(names) == len(set(names)), "two figures share an identifier"


def test_every_value_has_its_interval_and_count(summary, details, one_shape):
    text = rendered(summary, details)
    values = re.findall(r"<b>[−+]?\d\.\d{3}</b>(.{0,120})", text, re.DOTALL)
    assert len(values) > 10
    assert all(re.search(r"\[[−+]?\d\.\d+, [−+]?\d\.\d+\].*n\s=\s\d+", after, re.DOTALL) for after in values)


def test_verdicts_say_what_the_intervals_say(summary):
    (one,) = page.verdicts(summary, ["test", "ood"])
    assert (one["state"], one["verdict"], one["change"]) == ("better", "a real gain", "+10.0 points")
    summary["paired"]["arms"]["lavender"]["test"] = change(-0.1, True)
    assert page.verdicts(summary, ["test"])[0]["state"] == "worse"
    summary["paired"]["arms"]["lavender"]["test"] = change(0.1, False)
    assert page.verdicts(summary, ["test"])[0]["state"] == "even"


def test_nothing_to_compare(summary, details, one_shape):
    summary["arms"] = {"base": summary["arms"]["base"]}
    summary["paired"] = {"reference": "base", "covers": "examples", "arms": {}}
    summary["seeds"] = []
    details["by_kind"], details["grounding"] = {}, {}
    assert "nothing to compare with yet" in rendered(summary, details)


def test_figures_take_their_colours_from_the_page(summary):
    plan = plots.results(summary, ["test", "ood"])
    drawn = {shape: plots.svg(plan, shape, "results") for shape in plots.SHAPES}
    widths = [float(re.search(r'viewBox="0 0 ([\d.]+)', text)[1]) for text in drawn.values()]
    assert widths == sorted(widths, reverse=True)
    for text in drawn.values():
        assert set(re.findall(r"#[0-9a-f]{6}\b", text)) == set()
        assert {f"var(--{name})" for name in ("ink", "soft", "arm-sft", "arm-lavender")} <= set(
            re.findall(r"var\([\w-]+\)", text)
        )
        assert ">lavender</text>" in text
        assert "font-family" not in text
    assert plots.svg(plan, "wide", "results") == drawn["wide"]
    assert plots.png(plan).startswith(b"\x89PNG")


def test_a_difference_is_filled_only_if_it_is_real(summary):
    circles = {
        real: plots.svg(plots.changes({**summary, "paired": paired(real)}, ["test"]), "wide", "c").count(
            "fill: var(--paper); stroke"
        )
        for real in (True, False)
    }
    assert circles[False] > circles[True] == 0


def paired(real):
    return {"reference": "sft", "covers": "examples", "arms": {"lavender": {"test": change(0.1, real)}}}


def test_arms_have_colours_of_their_own():
    arms = ["base", "sft", "lavender", "mine", "yours", "a"]
    assert len({theme.token(arm, arms) for arm in arms}) == len(arms)
    light = [pair[0] for pair in theme.TOKENS.values()]
    assert len(light) == len(set(light)), "a figure could not tell two tokens apart"


def test_training_curves_of_seeds_have_a_mean():
    curves = {f"sft-{seed}": [{"step": step, "ce": 2.0 + seed, "align": None} for step in (1, 2, 3)] for seed in (1, 2)}
    drawn = plots.svg(plots.training(curves), "wide", "training")
    assert drawn.count("stroke: var(--arm-sft)") == 4  # two seeds, their mean, the key
    assert "alignment loss" not in drawn and "stroke-dasharray" not in drawn
    held = {"sft-1": [{"step": 0, "ce": 5.0}, {"step": 3, "ce": 2.5}], "sft-2": []}
    drawn = plots.svg(plots.training(curves, held), "wide", "training")
    assert drawn.count("stroke: var(--arm-sft)") == 5 and drawn.count("stroke-dasharray") == 1, "held-out, dashed"


def test_overlay_is_bright_where_the_map_is():
    image = Image.new("RGB", (64, 32), (120, 120, 120))
    values = np.zeros((32, 32), np.float32)
    values[:, 24:] = 7
    shown = np.asarray(overlay(image, values, side=64)).astype(int).sum(2)
    assert shown.shape == (32, 64)
    assert shown[:, 52:].min() > shown[:, :44].max() + 100
    region = np.zeros((32, 64), bool)
    region[8:24, 8:24] = True
    edge = outline(region, (64, 32))
    assert edge.sum() == 60
    assert (np.asarray(overlay(image, values, region, side=64))[edge] == 255).all()
    assert enlarge(image, 160).size == (160, 80)
    flat = np.asarray(overlay(image, np.ones((32, 32)), side=64))
    assert (flat == flat[0, 0]).all()
    assert len(encoded(image, colours=16)) < 1000


def test_mistakes_show_what_was_lost_first():
    def row(correct, raw="no"):
        return {"prompt": "q", "task": "test", "kind": "k", "gold": "g", "raw": raw, "correct": correct, "failure": ""}

    sft = {"a": row(False), "b": row(True, "g"), "c": row(True, "g")}
    lavender = {"a": row(False), "b": row(False, "x" * 200), "c": row(True, "g")}
    found = gallery.mistakes({"sft": sft, "lavender": lavender}, lambda uid: None)
    assert (found["arms"], found["wrong"], found["asked"], found["lost"]) == (["sft", "lavender"], 2, 3, 1)
    assert [[said["verdict"] for said in row["said"]] for row in found["rows"]] == [
        ["right", "wrong"],
        ["wrong", "wrong"],
    ]
    assert len(found["rows"][0]["said"][1]["text"]) < 100
    assert gallery.mistakes({"sft": {"c": row(True)}}, lambda uid: None) is None


def test_the_lowest_scores_come_first_and_a_good_one_is_no_mistake():
    """ANLS 0.8 is not listed; of what is wrong the lowest score comes first, before what was lost."""

    def row(score, correct):
        told = {"prompt": "q", "task": "doc", "kind": "k", "gold": "g", "raw": "said", "failure": ""}
        return told | {"score": score, "correct": correct}

    sft = {"near": row(1.0, True), "half": row(1.0, True), "none": row(0.0, False), "good": row(1.0, True)}
    lavender = {"near": row(0.4, False), "half": row(0.2, False), "none": row(0.0, False), "good": row(0.8, True)}
    found = gallery.mistakes({"sft": sft, "lavender": lavender}, lambda uid: None)
    assert (found["wrong"], found["asked"], found["lost"]) == (3, 4, 2)
    verdicts = [one["said"][1]["verdict"] for one in found["rows"]]
    assert verdicts == ["wrong", "wrong, 0.20", "wrong, 0.40"]
    captions = {"a": row(1.7, None), "b": row(0.3, None), "c": row(0.9, None)}
    found = gallery.mistakes({"lavender": captions}, lambda uid: None, count=2)
    assert (found["wrong"], found["asked"]) == (0, 3)
    assert [one["said"][0]["verdict"] for one in found["rows"]] == ["graded, 0.30", "graded, 0.90"]


def test_words_of_the_gallery():
    def maps(name, *uids):
        return gallery.Maps(name, {uid: {"task": uid[0]} for uid in uids}, {}, {})

    arms = [maps("sft", *(f"t{i}" for i in range(9)), "v1"), maps("lavender", *(f"t{i}" for i in range(8)), "v1")]
    drawn = gallery.choose(arms, "t", 5)
    assert len(drawn) == 5
    assert set(drawn) <= {f"t{i}" for i in range(8)}
    last = gallery.choose(arms, "t", 8)[-1]
    assert gallery.choose(arms, "t", 5, maps("teacher", last))[0] == last
    assert gallery.choose([], "t", 5) == []


def test_arms_of_the_gallery():
    jobs = [{"arm": arm, "name": name} for arm, name in (("base", "base"), ("sft", "sft-1"), ("sft", "sft-2"))]
    base, sft, lavender = ("base", "base"), ("sft", "sft-1"), ("lavender", "lavender-1")
    assert _shown(jobs, "sft", 2) == [base, sft]
    jobs += [{"arm": arm, "name": f"{arm}-1"} for arm in ("shuffled", "lavender", "oracle")]
    assert _shown(jobs, "sft", 2) == [base, sft, lavender]
    assert _shown(jobs, "sft", 3) == [base, sft, ("shuffled", "shuffled-1"), lavender]
    assert _shown(jobs[:1], "base", 2) == [base]


def test_published_numbers_beside_ours(summary, details, one_shape):
    """Cells for what the paper does not tell or nobody measured are empty; ours have intervals, in the paper's unit."""
    cfg = compose(["eval=paper20"])
    ours = {"mmmu_val": number(0.5, "accuracy"), "ocrbench": number(0.7, "accuracy")}
    summary["arms"] = {"base": ours, "lavender": {"mmmu_val": number(0.52, "accuracy")}}
    details["harness"] = {"mme": {"base": {"value": 1700.0, "n": 2374}}}
    table = beside.published(cfg, summary, details)
    assert len(table["rows"]) == 20
    found = {row["head"]: row["cells"] for row in table["rows"]}
    assert [cell["value"] for cell in found["MMMU"]] == ["48.0", "43.7", "46.3", "50.0", "52.0"]
    assert found["MMMU"][3] == {"value": "50.0", "interval": "[45.0, 55.0]", "note": "n = 100"}
    assert found["OCRBench"][3]["value"] == "700"
    assert found["OCRBench"][4] is None
    assert (found["MME"][0]["value"], found["MME"][3]["value"], found["MME"][3]["interval"]) == ("1,692", "1,700", "")
    assert found["MMVet"] == [None] * 5
    assert table["note"].startswith("3 of 20 benchmarks are measured here. The published numbers were made with")
    summary["paired"] = {"reference": "base", "covers": "examples", "arms": {}}
    text = rendered(summary, details, published=table)
    row = re.search(r"MMVet <small>.*?</tr>", text, re.DOTALL)[0]
    assert row.count("<td></td>") == 5
    assert beside.published(compose(), summary, details) is None


def test_commands_lead_back_to_the_settings():
    """What make and the shell make of each line composes the settings of the comparison and of the run."""
    given = [
        "data.sizes={train: 24, val: 8}",
        "runs_dir=/a b",
        "train.lr=3e-4",
        "+eval.students.mine=/m",
        "align.lam=2",
    ]
    cfg = compose([*given, "eval.limit=20"])
    runs = [
        (arm, seed, receipts.plain(status.settings(compose([*given, f"arm={arm}", f"seed={seed}"]))))
        for arm, seed in (("sft", 1), ("lavender", 2))
    ]
    lines = commands(cfg, runs).splitlines()
    # `make eval` would train sft-1 and lavender-1; the stages by themselves take what is there.
    assert [line.split()[:3] for line in lines[2:]] == [[PYTHON, "-m", f"stages.{name}"] for name in ("eval", "report")]
    assert [line.split()[1] for line in lines[:2]] == ["train", "train"]
    for line, (_, _, settings) in zip(lines[:2], runs, strict=True):
        assert receipts.plain(status.settings(composed(line))) == settings
    for line in lines[2:]:
        found = composed(line)
        assert (found.eval, found.data, found.train, found.align) == (cfg.eval, cfg.data, cfg.train, cfg.align)
        assert (found.runs_dir, found.shards_dir) == (cfg.runs_dir, cfg.shards_dir)
    usual = [(arm, 1, settings) for arm, _, settings in runs]
    assert [line.split()[:2] for line in commands(cfg, usual).splitlines()[2:]] == [
        ["make", "eval"],
        ["make", "report"],
    ]
    other = compose([o for o in given if o != "train.lr=3e-4"])  # make would refuse what was trained otherwise
    assert PYTHON in commands(other, usual)
    demo = commands(compose(["runs_dir=runs/demo", "train.steps=5", "eval.arms=[sft]"]), runs)
    assert demo == 'make demo SEEDS=2 ARMS=sft,lavender ARGS="train.steps=5"'


def test_commands_of_suites():
    """By SUITE and TASKS, on which the environment of lmms-eval depends; files that the reader has to name are told."""
    lmms = compose(["eval=lmms", "eval.harness_tasks=[ai2d,mmmu_val]", "eval.batch=2"])
    first, second = commands(lmms, []).splitlines()
    assert first == 'make eval DATA=world TEACHER=tiny MODEL=tiny SUITE=lmms TASKS=ai2d,mmmu_val ARGS="eval.batch=2"'
    assert second == first.replace("make eval", "make report")
    pope = commands(compose(["eval=pope"]), []).splitlines()
    assert pope[:2] == [
        '# first: make shard DATA=pope ARGS="data.path=FOLDER"',
        f"{first.partition(' SUITE')[0]} SUITE=pope",
    ]


def composed(line):
    words = shlex.split(line)
    if words[0] == PYTHON:
        return compose(words[3:])
    assert words[0] == "make"
    variables = dict(word.split("=", 1) for word in words[2:])
    # make takes `$$` for `$` and hands ARGS to the shell
    more = shlex.split(variables.pop("ARGS", "").replace("$$", "$"))
    return compose([*(f"{name.lower()}={value}" for name, value in variables.items()), *more])


@pytest.mark.parametrize(
    "value",
    [1, 0.5, 1e-5, True, None, "", "a b", "it's", '"x" $y', "null", "1", [1, 2], ["a", "b c"], {"a": 1, "b": "c"}],
)
def test_values_come_back_from_hydra(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(f"x={hydra(value)}").value() == value
