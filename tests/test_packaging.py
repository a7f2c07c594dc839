"""A wheel carries all that the commands read: settings, templates, bundled models."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.full
def test_a_wheel_has_every_file_that_is_read(tmp_path):
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(argv, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = [ROOT / "conf", ROOT / "stages", ROOT / "pipeline"]
    files = {path.relative_to(ROOT).as_posix() for folder in wanted for path in folder.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} <= packed
    (scripts,) = [name for name in packed if name.endswith("entry_points.txt")]
    assert "lavender-train = stages.train:main" in zipfile.ZipFile(wheel).read(scripts).decode()
