"""A short form of `make faults`: the same campaigns with few kills and flips (`benchmarks/faults.py`)."""

import json
import random
import sys

import pytest

from benchmarks import faults
from pipeline.archive.stage import shard

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture(scope="module")
def chance():
    return random.Random(7)


def test_kills_of_shard(chance):
    done, identical = faults.kills(shard, faults.settings, 3, chance)
    assert identical == done >= 3


def test_other_ends(chance):
    assert faults.full_disk(shard, faults.settings) == (3, 3)
    assert faults.two_processes(shard, faults.settings) == (1, 1)
    stops, same = faults.failing_tasks(faults.settings, chance)
    assert stops == same >= 1


def test_damage_of_each_kind(chance):
    def damage(cfg):
        return {**faults.flips(cfg, 1, chance), "deleted": faults.deletions(cfg)}

    found = faults.damaged(damage)
    assert {name: done for name, (done, _) in found.items()} == {name: right for name, (_, right) in found.items()}
    assert found.keys() >= faults.KINDS.keys()


def test_a_difference_is_the_exit_code(monkeypatch, tmp_path, capsys):
    """Pieces of the campaign add up in one file, and one thing that is not as it should be makes the command fail."""
    results = {"flips": (2, 2), "deleted": (3, 2)}
    made = {name: lambda name=name: {name: results[name]} for name in results}
    monkeypatch.setattr(faults, "campaigns", lambda *_: made)
    monkeypatch.setattr(faults, "import_teacher", lambda: None)
    file = tmp_path / "out.json"

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["faults", "--json", str(file), *argv])
        return faults.main()

    assert command("--only", "flips") == 0
    assert command("--only", "deleted") == 1
    assert json.loads(file.read_text()) == {"flips": "2/2", "deleted": "2/3", "ok": False}
    assert "deleted 3 detected 2" in capsys.readouterr().out
    results["deleted"] = (3, 3)
    assert command() == 0
    assert json.loads(file.read_text())["ok"] is True
    with pytest.raises(SystemExit, match="2"):
        command("--only", "nonsense")


@pytest.mark.full
@pytest.mark.parametrize("name", faults.campaigns(3, 5, 1))
def test_everything_a_little(name):
    faults.import_teacher()
    found = faults.campaigns(3, 5, 1)[name]()
    assert {name: done for name, (done, _) in found.items()} == {name: right for name, (_, right) in found.items()}
