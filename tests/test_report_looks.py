"""Maps read on the spot: the same as the evaluation's, and a gallery for data whose regions nobody knows."""

import re
import shutil

import numpy as np
import pytest
from evaluate_world import settings, world  # noqa: F401 (a fixture)

from pipeline.archive import Archive
from pipeline.evaluate import arms, stage
from pipeline.evaluate.questions import alone
from pipeline.examples import Word
from pipeline.layout import Layout
from pipeline.report.gallery import LIKE, Maps
from pipeline.report.looks import StudentLooks, TeacherLooks, likeness
from pipeline.report.stage import report


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("looks") / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("eval", "report"))
    return folder


def test_one_example_is_read_as_the_evaluation_reads_many(root):
    cfg = settings(root, "eval.limit=8", "eval.arms=[sft]")
    stage.evaluate(cfg)
    kept = Maps.read("sft", Layout(cfg).eval_dir / "sft-1")
    read = StudentLooks(cfg, arms.trained_run(cfg, "sft", 1), "cpu")
    archive = Archive(Layout(cfg).examples_dir("test"))
    rows = [row for row in kept.words.values() if row["task"] == "test"]
    assert rows
    for row in rows:
        found = read(alone(archive[row["index"]], row["turn"]))
        # alone() keeps the question and its answer, as turns 0 and 1 or where they were
        mine = [maps for word, maps in found.items() if (word.start, word.end) == (row["start"], row["end"])]
        stored = kept.maps[row["uid"]].astype(int)
        assert min(np.abs(one.astype(int) - stored).max() for one in mine) <= 1


@pytest.mark.full
def test_gallery_of_data_without_regions(root):
    cfg = settings(root, "eval.limit=6", "eval.point_task=''", "report.words=3", f"runs_dir={root}/other")
    shutil.copytree(root / "runs", root / "other", ignore=shutil.ignore_patterns("eval", "report"))
    Layout(cfg).maps_dir.mkdir(parents=True)  # maps of this teacher were made, so it is shown beside the students
    stage.evaluate(cfg)
    text = report(cfg).page.read_text()
    assert "the true regions of these data are not known" in text
    cards = re.findall(r'<li class="card"[^>]*>', text)
    assert len(cards) == 3
    assert all(f'data-measure="{LIKE}"' in card and "lavender" in card for card in cards)
    assert text.count("<small>r = ") == 9  # of three students for each word
    assert '<em class="hit">hit' not in text
    assert '<section id="grounding"' not in text


def test_a_teacher_reads_every_word(root):
    cfg = settings(root)
    one = Archive(Layout(cfg).examples_dir("test"))[0]
    found = TeacherLooks(cfg, "cpu")(one)
    assert set(found) == set(one.words())
    assert all(isinstance(word, Word) for word in found)
    assert all(map_HW.shape == (32, 32) and map_HW.dtype == np.uint8 for map_HW in found.values())


def test_likeness():
    rng = np.random.default_rng(0)
    first, other = rng.random((32, 32)), rng.random((32, 32))
    assert likeness(first, 3 * first + 2) == pytest.approx(1)
    assert likeness(first, -first) == pytest.approx(-1)
    assert likeness(first, other) == pytest.approx(np.corrcoef(first.ravel(), other.ravel())[0, 1])
    assert likeness(first, np.ones((32, 32))) == 0
