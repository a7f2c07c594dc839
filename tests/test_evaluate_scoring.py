"""Scorers: what counts as the same answer, and what is a failure to answer."""

import pytest

from pipeline.evaluate.answers import read_rows, write_rows
from pipeline.evaluate.scoring import as_set, normalise, score


@pytest.mark.parametrize(
    ("kind", "raw", "gold", "correct", "answer"),
    [
        ("attribute", " Red. ", "red", True, "red"),
        ("attribute", "ＲＥＤ！", "red", True, "red"),
        ("attribute", "red circle", "red", False, "red circle"),
        ("relation", "blue  star", "blue star", True, "blue star"),
        ("count", "two", "three", False, "two"),
        ("list", "red and blue", "blue and red", True, "blue, red"),
        ("list", "red, green and blue.", "blue, red and green", True, "blue, green, red"),
        ("list", "red, red and blue", "blue and red", True, "blue, red"),
        ("list", "red", "blue and red", False, "red"),
        ("list", "sand and band", "band and sand", True, "band, sand"),
        ("pope", "Yes, there is a dog.", "yes", True, "yes"),
        ("pope", "no", "yes", False, "no"),
        ("choice", "B", "B", True, "B"),
        ("choice", "(c) lung", "C", True, "C"),
        ("choice", "The answer is D.", "D", True, "D"),
    ],
)
def test_score(kind, raw, gold, correct, answer):
    found = score(kind, raw, gold)
    assert (found.correct, found.answer, found.failure) == (correct, answer, "")


@pytest.mark.parametrize(
    ("kind", "raw", "ended", "failure"),
    [
        ("attribute", "", True, "empty"),
        ("attribute", " . ", True, "empty"),
        ("attribute", "red red red", False, "too long"),
        ("pope", "I cannot tell", True, "neither yes nor no"),
        ("pope", "nobody", True, "neither yes nor no"),
        ("choice", "A lung has two lobes", True, "no letter"),
        ("choice", "answer A or answer B", True, "several letters"),
    ],
)
def test_failures_are_counted_as_wrong(kind, raw, ended, failure):
    found = score(kind, raw, "red", ended)
    assert not found.correct
    assert found.failure == failure


def test_normalise_and_sets():
    assert normalise("  A\tBIG\n Dog ?! ") == "a big dog"
    assert as_set("") == frozenset()
    assert as_set("a & b; c\nd") == {"a", "b", "c", "d"}


def test_rows_survive_every_character_that_some_readers_take_for_a_line_end(tmp_path):
    rows = [{"raw": f"a{chr(code)}b", "uid": code} for code in (0x0A, 0x0B, 0x0C, 0x0D, 0x1C, 0x85, 0x2028, 0x2029)]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    with (tmp_path / "rows.jsonl").open("a") as out:
        out.write('{"raw": "cut o')
    assert read_rows(tmp_path / "rows.jsonl") == rows
