"""A short form of `make faults`: the same campaigns with few kills and flips (`benchmarks/faults.py`)."""

import random

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


@pytest.mark.full
def test_everything_a_little():
    found = faults.campaign(kill_count=3, flip_count=5, seed=1)
    assert {name: done for name, (done, _) in found.items()} == {name: right for name, (_, right) in found.items()}
