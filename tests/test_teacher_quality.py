"""The sweep over the teacher's settings: what it counts, what it keeps, and the page written from that."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import teacher_quality
from pipeline.archive.stage import shard
from pipeline.config import compose
from pipeline.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    given = [f"shards_dir={folder / 'shards'}", "data.sizes={val: 3, test: 3}", "engine.workers=1"]
    shard(compose(given))
    return given


def test_a_sweep_keeps_what_it_measured_and_a_page_is_written_from_it(world, tmp_path, capsys):
    results, page = tmp_path / "q.json", tmp_path / "page.md"
    page.write_text("before\n<!-- sweep: begin -->old<!-- sweep: end -->\nafter\n")
    teacher_quality.main(["--only", "configured", "--json", str(results), *world, "teacher.batch_size=8"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('RESULT {"teacher": "tiny", "data": "world"')
    rows = json.loads(results.read_text())
    plain, configured = rows["test"]
    assert plain["n"] == configured["n"] > 10
    assert (plain["nfe"], plain["options"]["phrases"], configured["options"]["phrases"]) == (1, "none", "product")
    gain = configured["over_plain"]
    for name in ("pointing", "miou"):
        assert gain[name]["value"] == pytest.approx(configured[name] - plain[name], abs=2e-4)
    teacher_quality.main(["--json", str(results), "--document", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- sweep: begin -->\n")
    assert text.endswith("<!-- sweep: end -->\nafter\n")
    assert "old" not in text
    assert f"| plain mean over all layers | `{plain['setting']}` | 1 |" in text
    with pytest.raises(UserError, match="no such file with the marks"):
        teacher_quality.main(["--json", str(results), "--document", str(tmp_path / "none.md")])


def test_a_phrase_is_measured_by_the_mean_of_its_content_words(world, monkeypatch):
    """A region over several words, as in Flickr30k Entities."""
    cfg = compose([*world, "teacher.batch_size=8", "teacher.phrases=none"])
    scene = teacher_quality.split(cfg, "val", 1)[0]
    turn = next(n for n, t in enumerate(scene.turns) if t.role == "assistant" and len(t.text.split()) > 2)
    said = scene.turns[turn].text
    end = said.index(" ", said.index(" ") + 1)
    region = {"turn": turn, "start": 0, "end": end, "kind": "phrase", "boxes": [[0, 0, 0.5, 1]]}
    scene.meta["regions"] = [region]
    seen = []
    own = teacher_quality.measure
    monkeypatch.setattr(teacher_quality, "measure", lambda found, mask: seen.append(found) or own(found, mask))
    (word,) = teacher_quality.words(cfg.teacher, [scene])
    assert (word.kind, word.role, word.found.area) == ("phrase", "assistant", 0.5)
    content = [piece for piece in said[:end].split() if teacher_quality.is_content(piece)]
    assert len(content) in (1, 2)
    assert (seen[0].min() == 0 and seen[0].max() == 1) == (len(content) == 1)
    assert np.isfinite(seen[0]).all()


def test_settings_are_climbed_axis_by_axis(monkeypatch):
    """Each axis starts from the best so far; a setting that cannot be had is left out."""
    points = {"a": 0.0, "b": 0.3, "b c": 0.2, "b d": 0.5, "a d": 0.9}
    monkeypatch.setattr(teacher_quality, "described", lambda options: " ".join(options.values()))
    sweep = teacher_quality.Sweep(None, [], lambda rows: None)

    def score(options):
        name = " ".join(options.values())
        if name == "b x":
            raise UserError("not there")
        return points[name]

    monkeypatch.setattr(sweep, "score", score)
    found = sweep.climb({"1": "a"}, [lambda best: [{"1": "b"}], lambda best: [{"2": c} for c in "cxd"]])
    assert found == {"1": "b", "2": "d"}


def test_every_preset_is_in_the_table_of_the_documentation():
    root = Path(teacher_quality.__file__).parents[1]
    page = (root / "docs" / "teacher.md").read_text()
    names = [path.stem for path in (root / "conf" / "teacher").glob("*.yaml")]
    assert {"fast", "best", "ddim-inversion", "lavender-compat", "sd14"} <= set(names)
    forwards = {}
    for name in names:
        cfg = compose([f"teacher={name}"]).teacher
        assert cfg.name == name
        assert f"`{name}`" in page
        forwards[name] = cfg.forwards
    known = {"fast": 1, "tiny": 1, "sd14": 1, "sd14-best": 6, "ddim-inversion": 7, "lavender-compat": 639}
    assert {name: forwards[name] for name in known} == known
