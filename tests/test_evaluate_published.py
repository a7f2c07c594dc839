"""The paper's numbers beside ours."""

from pipeline.config import compose
from pipeline.evaluate.published import ARMS, beside


def test_the_list_and_its_empty_cells():
    cfg = compose(["eval=paper20"])
    assert len(cfg.eval.benchmarks) == 20
    rows = beside(cfg.eval.benchmarks, cfg.eval.suite, {"arms": {"base": {}, "lavender": {}}}, {})
    known = [row for row in rows if all(row.published[arm] is not None for arm in ARMS)]
    assert len(known) == 16
    assert all(row.published == dict.fromkeys(ARMS) for row in rows if row not in known)
    assert all(row.ours == {"base": None, "lavender": None} for row in rows)
    assert [row.name for row in rows if not row.task] == ["OCRVQA", "WorldMedQA-V"]
    assert not any(row.comparable for row in rows)
    kit = beside(cfg.eval.benchmarks, "vlmevalkit", {"arms": {}}, {})
    assert all(row.comparable and row.task for row in kit)


def test_ours_in_the_unit_of_the_published_number():
    benchmarks = compose(["eval=paper20"]).eval.benchmarks
    found = {"accuracy": 0.5, "ci95": [0.4, 0.6], "n": 80}
    summary = {"arms": {"sft": {"ai2d": found, "ocrbench": found, "mme": found}}}
    harness = {"mme": {"sft": {"value": 1700.5, "n": 2374}}}
    rows = {row.name: row.ours["sft"] for row in beside(benchmarks, "lmms", summary, harness)}
    assert rows["AI2D"] == {"value": 50.0, "ci95": [40.0, 60.0], "n": 80}
    assert rows["OCRBench"]["value"] == 500
    assert rows["MME"] == {"value": 1700.5, "ci95": None, "n": 2374}  # not a mean over answers
    assert rows["POPE"] is None
