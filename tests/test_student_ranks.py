"""Two processes of which one sees no image: nobody waits for the other, and gradients are those of one process."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from student_models import KINDS, build_student


def gaps(kinds, folder: Path) -> dict[str, list]:
    """Largest error of a gradient as a share of the largest one, and what has no gradient, by kind and way."""
    settings = {kind: asdict(build_student(kind, folder / kind)) for kind in kinds}
    for setting in settings.values():
        del setting["name"]
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).parent / "two_ranks.py"),
                str(rank),
                str(folder / "meeting"),
                str(folder / "out.json"),
                json.dumps(settings),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120 + 30 * len(settings))[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(said)
    return json.loads((folder / "out.json").read_text())


def check(found: dict[str, list], kinds) -> None:
    assert found.keys() == {f"{kind} {way}" for kind in kinds for way in ("ddp", "fsdp")}
    for name, (gap, missing) in found.items():
        assert gap < 1e-5, name
        assert not missing, name


@pytest.mark.full
def test_a_rank_without_images_keeps_up_in_every_family(tmp_path):
    check(gaps(KINDS, tmp_path), KINDS)
