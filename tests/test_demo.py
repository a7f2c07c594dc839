"""The whole chain through the command behind `make demo`, small: killed, resumed, and then up to date."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL

pytestmark = pytest.mark.timeout(1200)  # everything at once, perhaps beside other work
STAGES = ("shard", "precompute", "train", "eval", "report")


@pytest.fixture(scope="module")
def demo(command, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A demo that was killed while it worked on the maps, and then run to its end."""
    folder = tmp_path_factory.mktemp("demo")
    kill_at(folder, "shards/world/maps/tiny/train/*.json", "demo", *SMALL)
    return folder, command("chain", "demo", *SMALL, cwd=folder, timeout=600)


def kill_at(folder: Path, sign: str, *argv: str) -> None:
    """Starts the chain and kills it and all its processes as soon as a file that is not empty matches `sign`."""
    killed = subprocess.Popen(
        [sys.executable, "-m", "stages.chain", *argv], cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 900
    while not any(file.stat().st_size for file in folder.glob(sign)):
        assert time.monotonic() < deadline, f"nothing like {sign} was written"
        assert killed.poll() is None, "it ended by itself"
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()


def test_it_goes_on_and_ends(demo):
    _, result = demo
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("shard: up to date\n")
    assert "\nprecompute: up to date" not in result.stdout


def test_it_prints_the_table(demo):
    _, result = demo
    rows = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines() if "|" in line]
    assert ["arm", "test accuracy", "ood accuracy", "pointing"] in rows
    assert [row[0] for row in rows if row[0] in ("base", "sft", "lavender")][:3] == ["base", "sft", "lavender"]
    assert "over examples only" in result.stdout


def test_it_writes_the_summary(demo):
    folder, _ = demo
    summary = json.loads((folder / "runs/demo/summary.json").read_text())
    assert list(summary["arms"]) == ["base", "sft", "lavender"]
    for arm in summary["arms"].values():
        for task in ("test", "ood"):
            low, high = arm[task]["ci95"]
            assert low <= arm[task]["accuracy"] <= high
            assert arm[task]["n"] > 0
        assert arm["pointing"]["n"] > 0
        assert 0 <= arm["pointing"]["value"] <= 1
    assert {"pointing", "miou", "chance"} <= set(summary["teacher"])
    assert summary["seeds"] == [1]
    assert set(summary["seconds"]) >= set(STAGES) - {"shard"}  # the killed call could not write its own


def test_it_leaves_a_page_and_runs(demo):
    folder, _ = demo
    runs = folder / "runs/demo/tiny/world"
    assert (runs / "report/index.html").stat().st_size > 10_000
    for arm in ("sft-1", "lavender-1"):
        lines = [json.loads(line) for line in (runs / arm / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["step"] == 6
        assert (runs / arm / "model/config.json").is_file()


def test_then_everything_is_up_to_date_at_once(demo, command):
    folder, _ = demo
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = command("chain", "demo", *SMALL, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.stdout.splitlines()[:5] == [f"{stage}: up to date" for stage in STAGES]
    assert "test accuracy" in result.stdout
    # processor time, not the clock: the machine may be busy with other tests
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


@pytest.mark.full
def test_killed_in_train_and_in_eval_it_ends_with_the_same(demo, command):
    folder, _ = demo
    again = [*SMALL, "runs_dir=again"]
    kill_at(folder, "again/tiny/world/*/checkpoints/*/*.safetensors", "eval", *again)
    kill_at(folder, "again/tiny/world/eval/*/answers-*.part", "eval", *again)
    result = command("chain", "eval", *again, cwd=folder, timeout=600)
    assert result.returncode == 0, result.stderr
    for name in ("lavender-1/model/model.safetensors", "eval/lavender-1/per_sample.jsonl", "eval/base/pointing.jsonl"):
        assert (folder / "again/tiny/world" / name).read_bytes() == (
            folder / "runs/demo/tiny/world" / name
        ).read_bytes()


@pytest.mark.full
def test_public_data_go_the_same_way(command, tmp_path):
    options = [option for option in SMALL if not option.startswith("data.")]
    result = command("chain", "report", "data=easy_vqa", "data.limit=24", *options, cwd=tmp_path, timeout=900)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "runs/tiny/easy_vqa/eval/summary.json").read_text())
    assert set(summary["arms"]) == {"base", "sft", "lavender"}
    assert all(arm["test"]["n"] == 20 for arm in summary["arms"].values())
    page = (tmp_path / "runs/tiny/easy_vqa/report/index.html").read_text(encoding="utf-8")
    assert "easy_vqa" in page
