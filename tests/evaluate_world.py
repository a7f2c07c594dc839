"""A small evaluated world for tests: real archives, real tiny students, runs as training leaves them."""

import json
from pathlib import Path

import pytest

from pipeline import receipts
from pipeline.config import Config, compose
from pipeline.layout import Layout

SIZES = {"train": 4, "val": 6, "test": 10, "ood_pairs": 3, "ood_count": 3, "ood_background": 3}


def overrides(root: Path, *more: str) -> list[str]:
    sizes = [f"data.sizes.{split}={size}" for split, size in SIZES.items()]
    own = [f"shards_dir={root}/shards", f"runs_dir={root}/runs", f"model.path={root}/student", "eval.workers=1"]
    return [*own, *sizes, "eval.max_new_tokens=6", "eval.batch=8", "engine.workers=1", *more]


def settings(root: Path, *more: str) -> Config:
    return compose(overrides(root, *more))


def build(root: Path) -> Config:
    """Shards the world, writes an untrained base and one run each of two arms (other random weights)."""
    from pipeline.archive import Archive
    from pipeline.archive.stage import shard
    from pipeline.train import status
    from pipeline.world.student import build_mllama

    cfg = settings(root)
    shard(cfg)
    texts = [turn.text for one in Archive(Layout(cfg).examples_dir("train")) for turn in one.turns]
    small = {"hidden": 32, "layers": 3, "cross": (1,), "vision_hidden": 32, "vision_layers": 1, "vocabulary": 400}
    build_mllama(root / "student", texts, **small)
    for number, arm in enumerate(("sft", "lavender")):
        run = Layout(cfg).run_dir(arm, 1)
        build_mllama(run / "model", texts, seed=number + 1, **small)
        rows = [{"step": step, "ce": 2 - step / 100, "align": 0.1 * number, "loss": 2.0} for step in range(0, 100, 10)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [run / "model", run / "metrics.jsonl"]
        told = status.settings(settings(root, f"arm={arm}"))
        receipts.write(run / "receipt.json", stage="train", settings=told, files=files, seconds=1.0)
    return cfg


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """The small world, built once however many test modules use it."""
    place = tmp_path_factory.getbasetemp() / "evaluate_world"
    if not place.is_dir():
        build(place)
    return place
