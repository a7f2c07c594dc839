"""Flickr30k Entities in its published form, hand-made: phrases and boxes, and teacher and students measured on them."""

import io
import json
import shutil

import numpy as np
import pytest
from evaluate_world import settings, world  # noqa: F401 (a fixture)
from PIL import Image

from benchmarks import teacher_quality
from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.evaluate import stage
from pipeline.layout import Layout
from pipeline.sources import open_source
from pipeline.sources.flickr30k_entities import parse

CAPTIONS = (
    "[/EN#1/people/other A red man] with [/EN#2/clothing a hat] stands on [/EN#3/scene a street] "
    "by [/EN#0/notvisual it] .",
    "[/EN#1/people He] sees [/EN#4/other nothing boxed] .",
)


def annotation(width, height, boxes):
    things = "".join(
        f"<object>{''.join(f'<name>{name}</name>' for name in names)}"
        f"<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for names, box in boxes
    )
    other = "<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>"
    other += "<object><name>4</name><scene>0</scene><nobndbox>1</nobndbox></object>"
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{things}{other}</annotation>"


@pytest.fixture(scope="module")
def entities(tmp_path_factory):
    root = tmp_path_factory.mktemp("entities")
    for part in ("Sentences", "Annotations", "images"):
        (root / part).mkdir()
    for number in range(5):
        (root / "Sentences" / f"{number}.txt").write_text("\n".join(CAPTIONS) + "\n")
        # two boxes of the man, one of them also the hat's: the left half and the lower right quarter
        boxes = [(["1"], (1, 1, 60, 80)), (["1", "2"], (61, 41, 120, 80))]
        (root / "Annotations" / f"{number}.xml").write_text(annotation(120, 80, boxes))
        out = io.BytesIO()
        Image.new("RGB", (120, 80), (50 * number, 90, 30)).save(out, "JPEG")
        (root / "images" / f"{number}.jpg").write_bytes(out.getvalue())
    for split, names in (("train", "0"), ("val", "1"), ("test", "2\n3\n4")):
        (root / f"{split}.txt").write_text(names + "\n")
    return root


def data(entities):
    return ["data=flickr30k_entities", f"data.path={entities}", f"data.images={entities}/images"]


def test_captions_and_phrases(entities):
    text, phrases = parse(CAPTIONS[0])
    assert text == "A red man with a hat stands on a street by it ."
    assert [(text[p.start : p.end], p.chain, p.kind) for p in phrases] == [
        ("A red man", "1", "people"),
        ("a hat", "2", "clothing"),
        ("a street", "3", "scene"),
        ("it", "0", "notvisual"),
    ]
    cfg = compose(data(entities))
    source = open_source(cfg.data, Layout(cfg))
    assert {split: source.count(split) for split in source.splits()} == {"train": 1, "val": 1, "test": 3}
    (item, *_) = source.items("test")
    assert [(r["start"], r["end"], r["kind"], r["boxes"]) for r in item.record["meta"]["regions"]] == [
        (0, 9, "people", [[0, 0, 0.5, 1], [0.5, 0.5, 1, 1]]),
        (15, 20, "clothing", [[0.5, 0.5, 1, 1]]),
    ]
    every = compose([*data(entities), "data.captions=all"])
    assert open_source(every.data, Layout(every)).count("test") == 6


def test_mistakes_are_told(entities, tmp_path):
    shutil.copytree(entities, tmp_path / "copy")
    (tmp_path / "copy" / "Annotations" / "2.xml").write_text("<annotation>")
    cfg = compose(data(tmp_path / "copy"))
    assert [item.failure and item.failure.status for item in open_source(cfg.data, Layout(cfg)).items("test")] == [
        "bad_record",
        None,
        None,
    ]
    shutil.rmtree(tmp_path / "copy" / "Sentences")
    with pytest.raises(UserError, match="has no folder Sentences"):
        open_source(cfg.data, Layout(cfg))


def test_the_sweep_runs_on_them(entities, tmp_path, capsys):
    """As a user would with Stable Diffusion: settings chosen on `val`, reported on `test`, phrases as regions."""
    from pipeline.archive.stage import shard

    settings_of = [*data(entities), f"shards_dir={tmp_path}/shards", "engine.workers=1"]
    shard(compose(settings_of))
    teacher_quality.main(["--only", "configured", "--json", str(tmp_path / "q.json"), *settings_of, "teacher=tiny"])
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith('RESULT {"teacher": "tiny", "data": "flickr30k_entities"')
    )
    plain, configured = json.loads((tmp_path / "q.json").read_text())["test"]
    assert (plain["images"], plain["n"]) == (configured["images"], configured["n"]) == (3, 6)
    assert set(plain["by"]) == {"people", "clothing", "assistant"}
    assert plain["chance"] == pytest.approx((0.75 + 0.25) / 2)
    assert set(configured["over_plain"]) == {"pointing", "miou"}


def test_teacher_and_students_side_by_side(world, entities, tmp_path):  # noqa: F811
    from pipeline.archive.stage import shard
    from pipeline.evaluate.attention import _collect, ask

    shard(compose([*data(entities), f"shards_dir={tmp_path}/shards", "engine.workers=1"]))
    cfg = settings(
        world,
        "eval=flickr30k_entities",
        f"shards_dir={tmp_path}/shards",
        f"runs_dir={tmp_path}/runs",
        "eval.max_new_tokens=6",
        "eval.arms=[sft]",
    )
    shutil.copytree(Layout(settings(world)).run_dir("sft", 1), Layout(cfg).run_dir("sft", 1))
    Layout(cfg).maps_dir.mkdir(parents=True)  # what says that this teacher is of interest
    stage.evaluate(cfg)
    details = json.loads((Layout(cfg).eval_dir / "details.json").read_text())
    found = details["grounding"]
    assert set(found) == {"base", "sft-1", "teacher"}
    for entry in found.values():
        assert {key: entry[key]["n"] for key in ("pointing", "mass", "miou", "chance", "centre")} == {
            "pointing": 6, "mass": 6, "miou": 6, "chance": 6, "centre": 6
        }  # fmt: skip
        # a random point: the man covers three quarters, the hat one; the middle lies in the hat's box and in the man's
        assert entry["chance"]["value"] == pytest.approx(0.5, abs=0.01)
        assert entry["centre"]["value"] == 1
        assert 0 < entry["centre_miou"]["value"] < entry["centre_mass"]["value"] < 1
        assert entry["threshold_from"] == "val"
        assert set(entry["by_word"]) == {"people", "clothing"}
        for key in ("pointing", "mass", "miou"):
            assert entry[key]["ci95"][0] <= entry[key]["value"] <= entry[key]["ci95"][1]
    rows = {
        name: [json.loads(line) for line in (Layout(cfg).eval_dir / name / "pointing.jsonl").open()]
        for name in ("base", "sft-1", "teacher-tiny")
    }
    names = [sorted(row["uid"] for row in mine) for mine in rows.values()]
    assert names[0] == names[1] == names[2]
    assert {row["word"] for row in rows["base"]} == {"A red man", "a hat"}
    summary = json.loads((Layout(cfg).eval_dir / "summary.json").read_text())
    assert summary["arms"]["sft"]["entities"]["n"] == 3

    # the true boxes as maps of the words: every phrase is hit, and all of the map lies inside
    archives, _, pointed = stage.chosen(cfg)
    asked = ask(archives, pointed, "phrase")
    looks = _collect((one, word, one.regions[word][0].astype(np.float32)) for one in asked for word in one.regions)
    assert len(looks.rows) == 8
    assert all(row["hit"] and row["mass"] == 1 for row in looks.rows)
