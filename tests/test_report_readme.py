"""The README's numbers come from a results file: written by a command, and the repository's own agree with it."""

import json
from pathlib import Path

import pytest

from pipeline.report import readme
from stages.readme import KEPT, main

REPOSITORY = Path(__file__).parent.parent
SUMMARY = {
    "arms": {
        "base": {"test": {"accuracy": 0.1, "ci95": [0.08, 0.12], "n": 1000}},
        "sft": {
            "test": {"accuracy": 0.3, "ci95": [0.27, 0.33], "n": 1000},
            "pointing": {"value": 0.5, "ci95": [0.4, 0.6], "n": 90},
        },
    },
    "teacher": {
        "pointing": 0.91,
        "miou": 0.4,
        "chance": 0.06,
        "ci95": {"pointing": [0.9, 0.92], "miou": [0.3, 0.5], "chance": [0.05, 0.07]},
        "n": 70,
    },
    "seeds": [1, 2],
    "seconds": {"train": 812.4},
    "paired": {
        "reference": "sft",
        "covers": "seeds and examples",
        "arms": {
            "base": {
                "test": {"difference": -0.2, "ci95": [-0.24, -0.16], "p": 1e-9, "mcnemar_p": None, "real": True, "n": 9}
            }
        },
    },
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "README.md").write_text(f"# A\n\n{readme.BEGIN}\nold\n{readme.END}\n\nrest\n")
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path


def test_section_is_written_and_stays(root, capsys):
    arguments = [str(root / "summary.json"), "--made-by", "make demo SEEDS=2", "--root", str(root)]
    assert main(arguments) == 0
    text = (root / "README.md").read_text()
    assert "\nold\n" not in text
    assert text.endswith("rest\n")
    assert "| sft | 0.300 [0.270, 0.330], n=1000 | 0.500 [0.400, 0.600], n=90 |" in text
    assert "| base | 0.100 [0.080, 0.120], n=1000 | – |" in text
    assert "| base | **-0.200 [-0.240, -0.160], p<0.001, n=9** | – |" in text
    assert "`make demo SEEDS=2`" in text
    assert "over 2 seeds and examples" in text
    assert "pointing 0.910 [0.900, 0.920], mIoU 0.400 [0.300, 0.500]; a random point would" in text
    assert "score 0.060 [0.050, 0.070] (n=70)." in text
    assert main(["--root", str(root)]) == 0
    assert "already says" in capsys.readouterr().out
    assert (root / "README.md").read_text() == text


def test_mistakes_are_one_line(root, capsys):
    assert main(["--root", str(root)]) == 2
    assert main([str(root / "README.md"), "--root", str(root)]) == 2
    (root / "README.md").write_text("no marks")
    assert main([str(root / "summary.json"), "--root", str(root)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)


@pytest.mark.skipif(not (REPOSITORY / KEPT).is_file(), reason="no results are kept yet")
def test_the_readme_of_this_repository_says_what_its_results_say():
    made = readme.section(json.loads((REPOSITORY / KEPT).read_text()), KEPT)
    assert f"{readme.BEGIN}\n{made}\n{readme.END}" in (REPOSITORY / "README.md").read_text()
